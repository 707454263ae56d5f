"""LarPO for Hugging Face TRL: align language models with ranked lists of responses."""

from .collator import DataCollatorForCandidateLists
from .config import LarPOConfig
from .errors import ConfigError, DataError, LarPOError
from .losses import RANKING_LOSSES
from .trainer import LarPOTrainer
from .version import __version__

__all__ = [
    "RANKING_LOSSES",
    "ConfigError",
    "DataCollatorForCandidateLists",
    "DataError",
    "LarPOConfig",
    "LarPOError",
    "LarPOTrainer",
    "__version__",
]
