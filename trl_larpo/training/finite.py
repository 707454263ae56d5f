"""Training that notices when its numbers are no longer finite, before weights are lost."""

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

from ..errors import NonFiniteError

logger = get_logger(__name__)

_PATIENCE = 3  # batches in a row
_SHOWN = 4  # prompts of a batch


class SkippedBatch(Exception):
    """The loss of this batch is not finite: no gradient comes from it."""


class FiniteTraining(TrainerCallback):
    """
    Leaves out batches whose loss or gradient is NaN or infinite, names their prompts, and stops after three in a row.

    transformers logs such a loss as 0, and one step with such a gradient makes every weight NaN. What is skipped is the
    same on all processes. Under DeepSpeed, which keeps gradients to itself, the loss alone is watched; with float16 a
    gradient that is not finite is for its scaler to handle.

    Args:
        trainer: A trainer of lists.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._in_a_row = 0
        self._batches: list[Tensor] = []  # token ids of the prompts since the last step

    def check_loss(self, loss: Tensor, inputs: dict[str, Tensor]) -> None:
        """
        Looks at a loss before its backward pass.

        Raises:
            SkippedBatch: If it is not finite on some process, in training.
            NonFiniteError: If it was not for several batches in a row.
        """
        if not self._trainer.model.training:
            return
        self._batches.append(inputs["prompt_ids"])
        is_finite = bool(loss.detach().isfinite())
        if self._on_all_processes(is_finite):
            return
        skipped = self._batches.pop()
        if not is_finite:
            self._report(f"the loss is {loss.item()}", skipped)
        self._count()
        raise SkippedBatch

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, self._batches = self._batches, []
        if self._trainer.is_deepspeed_enabled or self._trainer.accelerator.scaler is not None:
            return
        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        norms = torch._foreach_norm(gradients) if gradients else []
        is_finite = not norms or bool(
            torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all()
        )
        if self._on_all_processes(is_finite):
            if batches:  # else all of the step's were skipped
                self._in_a_row = 0
            return
        if not is_finite:
            self._report("the gradient is not finite", *batches)
        self._trainer.model.zero_grad(set_to_none=True)
        self._count()

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
            f"Step {self._trainer.state.global_step + 1}: {what}. No step is taken on this batch. Its prompts begin "
            f"{', '.join(texts)}.",
            main_process_only=False,
        )

    def _count(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= _PATIENCE:
            raise NonFiniteError(
                f"The loss or its gradient was not finite for {self._in_a_row} batches in a row; the prompts of each "
                "are named above. No step was taken on them, so the last checkpoint is sound. Lower `learning_rate` or "
                "`beta`, set `max_grad_norm`, or train in bf16 rather than fp16; if it happens in the first steps, "
                "look at the model's weights and at these prompts."
            )
