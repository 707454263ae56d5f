"""[`CandidateScoring`]: the policy and the reference of a trainer as scorers of candidates."""

import contextlib
import functools
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from .proof import evaluating
from .scorer import CandidateScorer
from .token_rows import Batch
from .trl_compat import disable_gradient_checkpointing, use_adapter


class CandidateScoring:
    """What [`LarPOTrainer`] and [`OnlineLarPOTrainer`] add to TRL's trainers to run their models on lists."""

    accelerator: Any  # of Trainer
    args: Any
    model: Any
    ref_model: Any

    @functools.cached_property
    def _policy_scorer(self) -> CandidateScorer:
        # Without the autocast that accelerate may have put around the forward: the caller brings it
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return CandidateScorer(model, self.args, self.accelerator, "Policy", is_trained=True)

    @functools.cached_property
    def _reference_scorer(self) -> CandidateScorer:
        """Of a reference model; where there is none, the policy's scorer runs the policy instead."""
        model = self.accelerator.unwrap_model(self.ref_model, keep_fp32_wrapper=False)
        return CandidateScorer(model, self.args, self.accelerator, "Reference", policy=self._policy_scorer)

    def _score_reference(self, model: nn.Module, batch: Batch) -> Tensor:
        """
        Log-probabilities of candidates under the reference, `(batch, list_size)`, 0 in the padding. Without dropout,
        also where the reference is the policy in the middle of its training.

        Args:
            model: The reference; where it is the policy without its adapter, the policy.
            batch: As [`DataCollatorForCandidateLists`] makes it.
        """
        adapter_context: contextlib.AbstractContextManager = contextlib.nullcontext()
        dropout_context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ref_model is None:
            unwrapped = self.accelerator.unwrap_model(self.model)
            dropout_context = evaluating(unwrapped)
            if is_peft_model(self.model):
                # A new adapter is switched off; of an adapter that was there before, a frozen copy named "ref" is used
                adapter_context = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter_context,
            dropout_context,
            self.accelerator.autocast(),
        ):
            scorer = self._policy_scorer if self.ref_model is None else self._reference_scorer
            return scorer(model, batch).logps

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what a CPU raises
            trains_lists = "_policy_scorer" in self.__dict__
            if trains_lists and any(text in str(error) for text in ("out of memory", "can't allocate memory")):
                error.add_note(self._how_to_save_memory())
            raise

    def _how_to_save_memory(self) -> str:
        size = self._policy_scorer.chunk_size
        now = "None: all candidates of a batch are" if size is None else f"{size}: as many candidates are"
        return (
            f"LarPO: out of memory. `candidate_chunk_size` is {now} in memory at the same time. Lower it (1 is the "
            "least); results stay the same, and a step takes somewhat longer."
        )
