"""The column `ref_logps`, by which a dataset brings the reference's log-probabilities: warnings and errors about it."""

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import DPOConfig

from ..errors import ConfigError
from .datasets import column_names, evaluation_sets

logger = get_logger(__name__)

COLUMN = "ref_logps"

_NO_REFERENCE = f"train_dataset brings `{COLUMN}`, so no reference is kept"


def warn_of_unread_column(train_dataset, eval_dataset, args: DPOConfig, list_mode: bool) -> None:
    """Names the datasets whose column `ref_logps` is not read, and says why."""
    datasets = {"train_dataset": train_dataset} | evaluation_sets(eval_dataset)
    found = [where for where, dataset in datasets.items() if COLUMN in column_names(dataset)]
    if not list_mode:
        reason = (
            "these pairs are trained by DPOTrainer's own code, which knows `ref_chosen_logps` and `ref_rejected_logps`."
        )
    elif getattr(args, "reference_free", False):
        reason = "`reference_free` scores need no reference."
    elif "train_dataset" in found or args.precompute_ref_log_probs:
        return
    else:
        reason = (
            "train_dataset has none, so the reference model is used. Set `precompute_ref_log_probs`, or add it there."
        )
    if found:
        logger.warning(f"The column `{COLUMN}` of {' and '.join(found)} is not read: {reason}")


def stream_without_column(name: str, is_brought: bool) -> ConfigError:
    """
    The error about a stream whose log-probabilities would have to be computed in advance.

    Args:
        name: What the message calls the dataset.
        is_brought: Whether the training set has the column, and not the option `precompute_ref_log_probs` is set.
    """
    if is_brought:
        return ConfigError(
            f"{_NO_REFERENCE}, and the {name} dataset is an IterableDataset without this column. Add the column to "
            "this dataset, or pass it as a map-style Dataset when the trainer is made."
        )
    return ConfigError(
        f"`precompute_ref_log_probs=True` is not supported with IterableDataset, which the {name} dataset is. "
        f"Turn the option off, pass a map-style Dataset, or bring a column `{COLUMN}`."
    )


def check_column_after_training(datasets: dict[str, Dataset | IterableDataset]) -> None:
    """
    Checks datasets that are evaluated after a training whose dataset brought the column.

    Args:
        datasets: What the message calls each → the dataset.

    Raises:
        ConfigError: If one has no such column: the reference that would compute it is not there.
    """
    for name, dataset in datasets.items():
        if COLUMN not in column_names(dataset):
            raise ConfigError(
                f"{_NO_REFERENCE}, and the {name} dataset has no such column. Add the column to this dataset, or pass "
                "the dataset as `eval_dataset` when the trainer is made."
            )
