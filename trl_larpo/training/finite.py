"""Training that notices when its numbers are no longer finite, before weights are lost."""

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

from ..errors import NonFiniteError

logger = get_logger(__name__)

_PATIENCE = 3  # steps in a row
_SHOWN = 4  # prompts of a batch


class FiniteTraining(TrainerCallback):
    """
    Drops optimizer steps whose loss or gradient is NaN or infinite, names the prompts, and stops after three in a row.

    transformers logs such a loss as 0, and one step with such a gradient makes every weight NaN. The backward pass runs
    in any case, so that processes stay together; the gradients are dropped before the optimizer sees them, on all
    processes alike. With float16 that is left to the loss scaler, which does the same. DeepSpeed keeps gradients to
    itself: there the first such loss ends the training.

    Args:
        trainer: A trainer of lists.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._in_a_row = 0
        self._batches: list[Tensor] = []  # token ids of the prompts since the last step
        self._has_bad_loss = False

    def check_loss(self, loss: Tensor, inputs: dict[str, Tensor]) -> bool:
        """
        Checks a loss before its backward pass.

        Args:
            loss: Loss of this process, a scalar.
            inputs: The batch, with `prompt_ids`.

        Returns:
            Whether the metrics of the batch count: `False` in training where the loss of this process is not finite.

        Raises:
            NonFiniteError: If it is not finite on some process, in a training with DeepSpeed that scales no losses.
        """
        if not self._trainer.model.training:
            return True
        self._batches.append(inputs["prompt_ids"])
        is_finite = bool(loss.detach().isfinite())
        if self._on_all_processes(is_finite):
            return True
        if not is_finite:
            self._report(f"the loss is {loss.item()}", self._batches[-1])
        self._has_bad_loss = True
        if self._trainer.is_deepspeed_enabled and not self._trainer.args.fp16:
            self._stop("The loss is not finite")
        return is_finite

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, has_bad_loss = self._batches, self._has_bad_loss
        self._batches, self._has_bad_loss = [], False
        scales_losses = self._trainer.is_deepspeed_enabled or self._trainer.accelerator.scaler is not None
        is_finite = True if scales_losses else self._on_all_processes(self._has_finite_gradients(batches, has_bad_loss))
        if is_finite and not has_bad_loss:
            self._in_a_row = 0
            return
        if not scales_losses:
            self._trainer.model.zero_grad(set_to_none=True)
        self._in_a_row += 1
        if self._in_a_row >= _PATIENCE:
            self._stop(f"The loss or its gradient was not finite in {self._in_a_row} steps in a row")

    def _has_finite_gradients(self, batches: list[Tensor], is_reported: bool) -> bool:
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else []
        is_finite = not norms or bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all())
        if not is_finite and not is_reported:
            self._report("the gradient is not finite", *batches)
        return is_finite

    def _on_all_processes(self, is_finite: bool) -> bool:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return is_finite
        flags = accelerator.gather(torch.tensor([int(is_finite)], device=accelerator.device))
        return bool(flags.min())

    def _report(self, what: str, *batches: Tensor) -> None:
        decode = self._trainer._tokenizer.decode
        prompts = [prompt for of_batch in batches for prompt in of_batch][:_SHOWN]
        texts = [repr(decode(prompt, skip_special_tokens=True)[:60]) for prompt in prompts]
        logger.warning(
            f"Step {self._trainer.state.global_step + 1}: {what}. No step is taken. The prompts begin "
            f"{', '.join(texts)}.",
            main_process_only=False,
        )

    def _stop(self, what: str) -> None:
        raise NonFiniteError(
            f"{what}; the prompts are named above. No step was taken on them, so the last checkpoint is sound. Lower "
            "`learning_rate` or `beta`, set `max_grad_norm`, or train in bf16 rather than fp16; if it happens in the "
            "first steps, look at the model's weights and at these prompts."
        )
