"""To the Hub and to other engines: model cards, pushing, and checkpoints in the formats of others, out and in."""

from .card import model_card
from .errors import HubError
from .export import export
from .export_bitsandbytes import export_bitsandbytes
from .export_compressed_tensors import export_compressed_tensors
from .export_gguf import export_gguf
from .export_onnx import export_onnx
from .importing import quantize_checkpoint
from .measurements import Evaluation
from .push import push_to_hub
from .verify import ComparedWeight, Verification, verify_checkpoint

__all__ = [
    "ComparedWeight",
    "Evaluation",
    "HubError",
    "Verification",
    "export",
    "export_bitsandbytes",
    "export_compressed_tensors",
    "export_gguf",
    "export_onnx",
    "model_card",
    "push_to_hub",
    "quantize_checkpoint",
    "verify_checkpoint",
]
