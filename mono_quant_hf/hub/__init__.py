"""To the Hub and to other engines: model cards, pushing, and checkpoints in the formats of others, out and in."""

from .card import model_card
from .errors import HubError
from .measurements import Evaluation
from .push import push_to_hub

__all__ = ["Evaluation", "HubError", "model_card", "push_to_hub"]
