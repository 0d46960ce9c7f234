"""What a quantized checkpoint in a folder is: read from its files, without loading the weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from mono_quant_hf.config import QUANT_METHOD, MonoQuantConfig
from mono_quant_hf.integration.checkpoint import StoredTensor, decide_by_checkpoint, read_headers
from mono_quant_hf.integration.conversions import checkpoint_of
from mono_quant_hf.integration.selection import Decision, decide_recorded

from .errors import HubError
from .folders import weight_files
from .opening import quantization_of, settings_of, skeleton_of

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

AUTO_CLASSES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "translation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModel": "feature-extraction",
}
"""Auto classes, the more telling first, and the Hub's name of the task each is made for."""

_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForZeroShotImageClassification": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True)
class CheckpointFacts:
    """What is in a folder that `save_pretrained` wrote for a quantized model.

    Attributes:
        architecture: class of the model, such as `"LlamaForCausalLM"`.
        auto_class: the Auto class that loads it.
        task: the Hub's name of its task.
        config: how it was quantized.
        decisions: what became of every module that holds weights; a tied weight counts in the first module only.
        bytes_on_disk: of the tensors.
        bytes_as_float: of the same model in float32, codes and float16 weights counted as float32 and without
            scales and zero-points.
        sharded: whether the weights are in more than one file.
    """

    architecture: str
    auto_class: str
    task: str
    config: MonoQuantConfig
    decisions: list[Decision]
    bytes_on_disk: int
    bytes_as_float: int
    sharded: bool


def read_facts(folder: str | os.PathLike[str]) -> CheckpointFacts:
    """The facts of a folder that holds a model quantized by mono_quant_hf.

    Raises:
        HubError, ValueError: it does not, or a file is damaged; the message says what is missing or names it.
    """
    folder = Path(folder)
    settings = quantization_of(folder)
    method = (settings or {}).get("quant_method")
    if settings is None or method != QUANT_METHOD:
        found = "float" if settings is None else f"quantized by {method}"
        raise HubError(
            f"The model in {folder} is {found}, not quantized by mono_quant_hf; "
            "quantize it first (mono-quant-hf quantize)."
        )
    files = weight_files(folder)
    stored = read_headers([str(file) for file in files])
    config = settings_of(folder, settings)
    skeleton = skeleton_of(folder)
    planned = decide_recorded(skeleton, config)
    decisions = decide_by_checkpoint(skeleton, planned, config, checkpoint_of(skeleton, stored))
    companions = {
        name for name in stored if name.endswith(("_scale", "_zero_point")) and _owner(name) in stored
    }
    return CheckpointFacts(
        architecture=type(skeleton).__name__,
        auto_class=auto_class_of(type(skeleton).__name__),
        task=AUTO_CLASSES[auto_class_of(type(skeleton).__name__)],
        config=config,
        decisions=_counted_once(skeleton, decisions),
        bytes_on_disk=sum(size_of(tensor) for tensor in stored.values()),
        bytes_as_float=sum(4 * math.prod(t.shape) for name, t in stored.items() if name not in companions),
        sharded=len(files) > 1,
    )


def auto_class_of(architecture: str) -> str:
    """The Auto class that loads an architecture, `"AutoModel"` where none is more telling."""
    for auto_class, mapping in _MAPPINGS.items():
        for names in getattr(modeling_auto, mapping, {}).values():
            if architecture == names or (isinstance(names, (tuple, list)) and architecture in names):
                return auto_class
    return "AutoModel"


def _counted_once(model: PreTrainedModel, decisions: list[Decision]) -> list[Decision]:
    seen: set[int] = set()
    counted = []
    for decision in decisions:
        own = {id(p): p.numel() for p in model.get_submodule(decision.module).parameters(recurse=False)}
        counted.append(replace(decision, parameters=sum(n for key, n in own.items() if key not in seen)))
        seen |= own.keys()
    return counted


def _owner(name: str) -> str:
    return name.removesuffix("_scale").removesuffix("_zero_point")


def size_of(tensor: StoredTensor) -> int:
    """Bytes of a tensor on disk."""
    return ITEM_SIZES.get(tensor.dtype, 1) * math.prod(tensor.shape)
