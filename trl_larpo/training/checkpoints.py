"""Which checkpoint of a training is whole: a kill, a full disk or an interrupted copy leaves folders that are not."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from ..storage import read_json, write_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

_STATE = "trainer_state.json"  # which the trainer writes last

_DEEPSPEED, _FSDP = "global_step*/*_states.pt", "pytorch_model_fsdp*"  # what they save in addition

_PARTS = {  # of a checkpoint: names that they may have
    "weights": ("model*.safetensors", "pytorch_model*", "adapter_model.*", _DEEPSPEED),
    "optimizer": ("optimizer*", _DEEPSPEED),
    "scheduler": ("scheduler.pt", _DEEPSPEED),
}

_ARCHIVES = (".pt", ".pth", ".bin")  # what torch saves is a ZIP archive, whose directory stands at its end


def last_whole_checkpoint(folder: str | Path, only_model: bool = False) -> str | None:
    """
    The latest checkpoint in a folder that was written to its end; `None` if there is none. A later one that was not is
    named in a warning.

    Args:
        folder: Where the training saves them.
        only_model: Whether it saves the weights alone (`save_only_model`).
    """
    for path in checkpoints(Path(folder)):
        problem = damage_of_checkpoint(path, only_model)
        if problem is None:
            return str(path)
        from accelerate.logging import get_logger  # here: `larpo status` does without torch

        get_logger(__name__).warning(
            f"{path} is not whole ({problem}); an earlier checkpoint is taken, if there is one."
        )
    return None


def set_options(checkpoint: str, args: "TrainingArguments") -> None:
    """
    Sets the options with which a training resumes from a checkpoint. transformers takes how often it logs and saves
    from there, whatever the arguments say, and transformers 4 the batch size, so that a smaller one would not help
    where memory ran out.

    Args:
        checkpoint: Its folder.
        args: Options of the training.
    """
    from transformers import TrainerState  # here: `larpo status` does without torch

    path = Path(checkpoint) / _STATE
    state, steps = read_json(path), TrainerState()
    steps.compute_steps(args, state["max_steps"])
    options = {"logging_steps": steps.logging_steps, "save_steps": steps.save_steps}
    if not args.auto_find_batch_size:  # then what was found is kept
        options["train_batch_size"] = args.train_batch_size
    if state | options != state:
        write_json(path, state | options)


def checkpoints(folder: Path) -> Iterator[Path]:
    """All checkpoints, the latest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    yield from sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def check_optimizer(checkpoint: str, sharded_by: str | None) -> None:
    """
    Checks that a training reads the optimizer's state of a checkpoint: transformers resumes without, and Adam and the
    learning rate would start again.

    Args:
        checkpoint: Its folder.
        sharded_by: What shards the training: `"DeepSpeed"`, `"FSDP"` or `None`.

    Raises:
        ConfigError: If something else has saved the checkpoint.
    """
    path = Path(checkpoint)
    patterns = {"DeepSpeed": _DEEPSPEED, "FSDP": _FSDP}
    saved_by = next((name for name, pattern in patterns.items() if any(path.glob(pattern))), None)
    if saved_by != sharded_by:
        was, now = (f"with {name}" if name else "without DeepSpeed and FSDP" for name in (saved_by, sharded_by))
        raise ConfigError(
            f"{checkpoint} was saved {was}, and the training would resume {now}, which cannot read the state of its "
            "optimizer. Finish this training with the configuration that it began with (`accelerate_config`, "
            f"`deepspeed`, `fsdp`), or delete {path.with_name('checkpoint-*')} to start this training over."
        )


def damage_of_checkpoint(folder: Path, only_model: bool = False) -> str | None:
    """As [`damage_of`], of a checkpoint. Without the optimizer or the scheduler, transformers would resume silently."""
    for part, patterns in _PARTS.items():
        if (part == "weights" or not only_model) and not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"it has no {part}"
    return damage_of(folder, _STATE)


def damage_of(folder: Path, *needed: str) -> str | None:
    """
    What is missing or damaged in a saved model or checkpoint; `None` if nothing is. Weights are not read: a file that
    was cut off is known by its ends.

    Args:
        folder: The model or checkpoint.
        needed: Names of JSON files that it must have.
    """
    missing = next((name for name in needed if not (folder / name).is_file()), None)
    if missing is not None:
        return f"it has no {missing}"
    for path in sorted(folder.rglob("*")):
        problem = _damage_of_file(path) if path.is_file() else None
        if problem is not None:
            return f"{path.relative_to(folder)} {problem}"
    return None


def _damage_of_file(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"cannot be read: {error}"
    if path.suffix in _ARCHIVES and not zipfile.is_zipfile(path):
        return "is cut off"
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"is not JSON: {error}"
        if path.name.endswith(".index.json"):
            absent = sorted({name for name in found["weight_map"].values() if not path.with_name(name).is_file()})
            return f"names {absent[0]}, which is missing" if absent else None
    return None
