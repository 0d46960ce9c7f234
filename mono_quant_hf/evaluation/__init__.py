"""How much did quantizing cost?  Perplexity, divergence from the float model, classifier and encoder error.

| question | function | result |
| --- | --- | --- |
| how well does a causal language model predict a text | `perplexity` | `PerplexityResult` |
| how far are its predictions from the float model's | `divergence` | `DivergenceResult` |
| the same, one model in memory at a time | `record_reference`, then `divergence` | `Reference` |
| does a classifier still answer the same | `compare_classifiers` | `ClassifierComparison` |
| what did it do to each module, and which cost most | `quantization_report` | `QuantizationReport` |
| which modules should stay more exact, for a budget | `search_overrides` | `SearchResult` |
| does an encoder still place its inputs in the same spot | `compare_encoders` | `EncoderComparison` |

Every result is a frozen dataclass with a `to_dict()` that `json` can write.  Logarithms are natural.
"""

from mono_quant_hf.evaluation.divergence import DivergenceResult, divergence, kl_divergence
from mono_quant_hf.evaluation.module_report import ModuleReport
from mono_quant_hf.evaluation.outputs import (
    ClassifierComparison,
    EncoderComparison,
    classifier_logits,
    compare_classifiers,
    compare_encoders,
    text_embeddings,
)
from mono_quant_hf.evaluation.perplexity import PerplexityResult, perplexity
from mono_quant_hf.evaluation.reference import Reference, load_reference, record_reference
from mono_quant_hf.evaluation.report import QuantizationReport, quantization_report
from mono_quant_hf.evaluation.search import SearchResult, search_overrides
from mono_quant_hf.evaluation.windows import Window, sliding_windows

__all__ = [
    "ClassifierComparison",
    "DivergenceResult",
    "EncoderComparison",
    "ModuleReport",
    "PerplexityResult",
    "QuantizationReport",
    "Reference",
    "SearchResult",
    "Window",
    "classifier_logits",
    "compare_classifiers",
    "compare_encoders",
    "divergence",
    "kl_divergence",
    "load_reference",
    "perplexity",
    "quantization_report",
    "record_reference",
    "search_overrides",
    "sliding_windows",
    "text_embeddings",
]
