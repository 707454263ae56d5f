"""A reference that follows the policy: at regular intervals the policy takes its place, or is mixed into it."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from .trl_compat import disable_dropout_in_model, gathered_for_writing

logger = get_logger(__name__)

_FILE = "reference.safetensors"


def brings_adapter(model: Any) -> bool:
    """Whether what a trainer is given is a `PeftModel` without an adapter "ref", which TRL's trainers may make."""
    return not isinstance(model, str) and is_peft_model(model) and "ref" not in model.peft_config


def reference_adapter(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Each parameter of the adapter "ref" of a `PeftModel` beside that of the adapter "default".

    Raises:
        ConfigError: If "ref" has no such parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        copy = re.sub(r"\.default(?=\.|$)", ".ref", name)  # at the end where an adapter has no module of its own
        if copy == name:
            continue
        if copy not in parameters:
            raise ConfigError(
                f'The adapter "ref", which is to be a copy of "default", has no parameter {copy!r}. Pass `ref_model`, '
                "or merge the adapter into the model and train a new one with `peft_config`."
            )
        yield parameters[copy], parameter


@torch.no_grad()
def copy_parameters(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Writes the second parameter of each pair into the first, also where ZeRO-3 shards them."""
    pairs = list(pairs)
    with gathered_for_writing([parameter for pair in pairs for parameter in pair]):
        for reference, policy in pairs:
            reference.copy_(policy)


class MovingReference(TrainerCallback):
    """
    Copies the policy into the reference after every `ref_update_steps` optimizer steps, and keeps the reference in
    checkpoints. Where `sync_ref_model` mixes the policy in, TRL's callback does that, and checkpoints are left to this.

    The reference is the trainer's `ref_model` or, of a policy with an adapter, a frozen copy of the adapter named
    "ref", which is made here if the trainer has none. Checkpoints keep what the policy's own weights do not tell.

    Args:
        trainer: An [`OnlineLarPOTrainer`], or a [`LarPOTrainer`] with `sync_ref_model`.

    Raises:
        ConfigError: If checkpoints would be saved between two copies of a sharded model, which they cannot hold.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        args, policy = trainer.args, trainer.model
        self._steps: int | None = getattr(args, "ref_update_steps", None)  # None: TRL's callback mixes the policy in
        self._has_adapter = is_peft_model(policy)
        if self._has_adapter and "ref" not in policy.peft_config:
            policy.add_adapter("ref", policy.peft_config["default"])
            if args.disable_dropout:  # TRL did so before this adapter was there
                disable_dropout_in_model(policy)
            self._copy()
        zero = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        self._is_sharded = trainer.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3)
        saves_between = args.save_strategy == "steps" and self._steps and args.save_steps % self._steps
        if self._is_sharded and saves_between and not self._has_adapter:
            raise ConfigError(
                f"`save_steps` is {args.save_steps} and `ref_update_steps` is {self._steps}: the reference of a "
                "sharded model is not in checkpoints between two updates. Make `save_steps` a multiple of "
                f"{self._steps}."
            )

    def version(self, step: int) -> int:
        """How often the reference has been replaced before an optimizer step."""
        return step // (self._trainer.args.ref_model_sync_steps if self._steps is None else self._steps)

    def on_step_end(self, args, state, control, **kwargs):
        if self._steps is not None and state.global_step % self._steps == 0:
            self._copy()

    def save(self, folder: Path, step: int) -> None:
        """Adds the reference to a checkpoint that cannot do without it. Adapters are in it already."""
        trainer = self._trainer
        if self._has_adapter or self._is_sharded or self._is_known(step) or not trainer.args.should_save:
            return
        model = trainer.accelerator.unwrap_model(trainer.ref_model)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}, folder / _FILE)

    def load(self, folder: Path, step: int) -> None:
        """
        The reference as it was at a checkpoint. A warning says so where `sync_ref_model` has to start again from the
        initial model.

        Raises:
            ConfigError: If the checkpoint does not have the reference, and `ref_update_steps` needs it.
        """
        if self._has_adapter:
            return
        if self._is_known(step):
            if self._steps is not None:
                self._copy()
            return
        exists = (folder / _FILE).exists()
        if self._steps is None and (self._is_sharded or not exists):
            reason = "the model is sharded" if self._is_sharded else f"{folder} has no {_FILE}"
            logger.warning(
                f"The reference that `sync_ref_model` had moved cannot be restored, because {reason}. It starts again "
                "from the initial model, so scores and losses differ from those of an uninterrupted training."
            )
            return
        if not exists:
            raise ConfigError(
                f"{folder} was saved between two updates of the reference and does not have it. Resume from a step "
                f"that is a multiple of `ref_update_steps={self._steps}`."
            )
        saved = load_file(folder / _FILE)
        model = self._trainer.accelerator.unwrap_model(self._trainer.ref_model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])

    def _is_known(self, step: int) -> bool:
        """Whether the reference after a step needs no file: it is the policy, or still the initial model."""
        return self.version(step) == 0 if self._steps is None else step % self._steps == 0

    def _copy(self) -> None:
        trainer = self._trainer
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        if self._has_adapter:
            copy_parameters(reference_adapter(policy))
        else:
            copy_parameters(zip(trainer.ref_model.parameters(), policy.parameters(), strict=True))


class ReferenceCheckpoints:
    """What [`LarPOTrainer`] and [`OnlineLarPOTrainer`] add to TRL's trainers to keep a reference that moves."""

    args: Any  # of Trainer
    state: Any

    _moving_reference: MovingReference | None = None

    def _save_checkpoint(self, model, trial):
        if self._moving_reference is not None and not self.args.save_only_model:
            # Before TRL's files, of which the last one says that a checkpoint is whole
            step = self.state.global_step
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")  # type: ignore[attr-defined]
            self._moving_reference.save(folder, step)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self._moving_reference is not None:
            # Not all versions of transformers have set `self.state` by now
            step = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            self._moving_reference.load(Path(checkpoint), step)
