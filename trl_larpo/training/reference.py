"""A reference that follows the policy: at regular intervals the policy takes its place."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from .trl_compat import disable_dropout_in_model, gathered_for_writing

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
    Copies the policy into the reference after every `ref_update_steps` optimizer steps.

    The reference is the trainer's `ref_model` or, of a policy with an adapter, a frozen copy of the adapter named
    "ref", which is made here if the trainer has none. Checkpoints keep what the policy's own weights do not tell.

    Args:
        trainer: An [`OnlineLarPOTrainer`].

    Raises:
        ConfigError: If checkpoints would be saved between two copies of a sharded model, which they cannot hold.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        args, policy = trainer.args, trainer.model
        self._steps: int | None = args.ref_update_steps  # None: TRL's callback mixes the policy in
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
        is_policy = self._steps is not None and step % self._steps == 0
        accelerator = self._trainer.accelerator
        if not (is_policy or self._has_adapter or self._is_sharded) and accelerator.is_main_process:
            model = accelerator.unwrap_model(self._trainer.ref_model)
            save_file({name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}, folder / _FILE)

    def load(self, folder: Path, step: int) -> None:
        """
        The reference as it was at a checkpoint.

        Raises:
            ConfigError: If the checkpoint does not have it.
        """
        if self._has_adapter:
            return
        if self._steps is not None and step % self._steps == 0:
            self._copy()
            return
        if not (folder / _FILE).exists():
            if self._steps is None:  # as in TRL: from the initial model again
                return
            raise ConfigError(
                f"{folder} was saved between two updates of the reference and does not have it. Resume from a step "
                f"that is a multiple of `ref_update_steps={self._steps}`."
            )
        saved = load_file(folder / _FILE)
        model = self._trainer.accelerator.unwrap_model(self._trainer.ref_model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])

    def _copy(self) -> None:
        trainer = self._trainer
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        if self._has_adapter:
            copy_parameters(reference_adapter(policy))
        else:
            copy_parameters(zip(trainer.ref_model.parameters(), policy.parameters(), strict=True))
