"""LarPO for Hugging Face TRL: align language models with ranked lists of responses."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError, LarPOError
from .version import __version__

if TYPE_CHECKING:
    from .losses import RANKING_LOSSES
    from .training.collator import DataCollatorForCandidateLists
    from .training.config import LarPOConfig
    from .training.online_config import OnlineLarPOConfig as OnlineLarPOConfig
    from .training.online_trainer import OnlineLarPOTrainer as OnlineLarPOTrainer
    from .training.trainer import LarPOTrainer

_LAZY = {
    "RANKING_LOSSES": ".losses",
    "DataCollatorForCandidateLists": ".training.collator",
    "LarPOConfig": ".training.config",
    "LarPOTrainer": ".training.trainer",
    "OnlineLarPOConfig": ".training.online_config",
    "OnlineLarPOTrainer": ".training.online_trainer",
}
"""Public names that need torch or TRL: imported when they are first used, so that `import trl_larpo` stays light."""

# Without the names of online training, which need TRL 1.16: `import *` works with every TRL
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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY})
