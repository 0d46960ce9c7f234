"""To the Hub and to other engines: model cards, pushing, and checkpoints in the formats of others, out and in."""

from .card import model_card
from .errors import HubError
from .estimate import Estimate, estimate
from .evaluation import Evaluation
from .export import export
from .importing import quantize_checkpoint
from .push import push_to_hub
from .verify import ComparedWeight, Verification, verify_checkpoint

__all__ = [
    "ComparedWeight",
    "Estimate",
    "Evaluation",
    "HubError",
    "Verification",
    "estimate",
    "export",
    "model_card",
    "push_to_hub",
    "quantize_checkpoint",
    "verify_checkpoint",
]
