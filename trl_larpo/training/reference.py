"""A reference that follows the policy: at regular intervals the policy takes its place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from .trl_compat import gathered_for_writing

_FILE = "reference.safetensors"


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

    @torch.no_grad()
    def _copy(self) -> None:
        pairs = list(self._pairs())
        with gathered_for_writing([parameter for pair in pairs for parameter in pair]):
            for reference, policy in pairs:
                reference.copy_(policy)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of the reference beside that of the policy."""
        trainer = self._trainer
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        if self._has_adapter:
            for name, parameter in policy.named_parameters():
                if ".default." in name:
                    yield policy.get_parameter(name.replace(".default.", ".ref.")), parameter
        else:
            yield from zip(trainer.ref_model.parameters(), policy.parameters(), strict=True)
