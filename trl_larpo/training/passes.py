"""
Passes over the candidates of a batch a few at a time, so that memory does not grow with the list.

Each chunk of candidates runs under checkpointing: what its backward pass needs is computed again when it is needed, and
freed before the next chunk. Gradients are exact, and there is one backward pass. Where prompts are shared, a prompt
runs once for all of its chunks, and these read its keys and values.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .attention import KeysAndValues, attention_masks, uses_blocks
from .cpu_head import CPULogProbs
from .token_rows import Batch, Rows, candidate_rows, pack, prompt_rows, separate_rows, shared_prompt_rows
from .trl_compat import FusedCausalLMOutput, fused_head, gather_partitioned_heads


@dataclass
class Pass:
    """
    Lists that go through the model together.

    Attributes:
        chunks: Their candidates, in the rows that the model is given one after the other.
        masks: What the rows of each chunk see, as `attention_mask`.
        prompt_ids: int64 `(lists, prompt_length)`, prompts that run once before the chunks; `None` where each chunk has
            its prompts in its rows.
        prompt_real: bool, same shape, `False` in the padding.
    """

    chunks: list[Rows]
    masks: list[Tensor | dict[str, Tensor]]
    prompt_ids: Tensor | None = None
    prompt_real: Tensor | None = None


def passes_in_chunks(
    model: PreTrainedModel,
    batch: Batch,
    shared_prompt: bool,
    chunk_size: int,
    list_size: int,
    prompts_first: bool = True,
) -> list[Pass]:
    """
    The candidates of a batch, at most `chunk_size` at a time. Lists are cut only where a whole one does not fit.

    Args:
        model: Model the passes are for, bare or as a `PeftModel`.
        batch: As [`DataCollatorForCandidateLists`] makes it.
        shared_prompt: Whether candidates share their prompt.
        chunk_size: Most candidates in a chunk.
        list_size: What lists are taken to hold, at least `batch`'s own. Processes that work together must agree on it,
            because all take part in every pass.
        prompts_first: Whether shared prompts may run once before all chunks, and not in the rows of each. Not under
            FSDP: it brings back the weights of a layer for the backward pass when the layer's output gets a gradient,
            and here only keys and values do.
    """
    of_prompts = {name: tensor for name, tensor in batch.items() if name.startswith("prompt_")}
    missing = list_size - batch["candidate_mask"].size(1)
    of_candidates = {
        name: F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing])
        for name, tensor in batch.items()
        if name not in of_prompts
    }
    lists_per_pass, candidates_per_chunk = max(1, chunk_size // list_size), min(chunk_size, list_size)
    passes = []
    for start in range(0, of_prompts["prompt_ids"].size(0), lists_per_pass):
        lists = slice(start, start + lists_per_pass)
        prompts = {name: tensor[lists] for name, tensor in of_prompts.items()}
        chunks = [
            prompts
            | {name: tensor[lists, first : first + candidates_per_chunk] for name, tensor in of_candidates.items()}
            for first in range(0, list_size, candidates_per_chunk)
        ]
        if shared_prompt and (uses_blocks(model) or not prompts_first):  # the prompt is in the rows of each chunk
            rows = [shared_prompt_rows(chunk) for chunk in chunks]
            rows = [pack(of_chunk) for of_chunk in rows] if uses_blocks(model) else rows
            passes.append(Pass(rows, [attention_masks(model, of_chunk) for of_chunk in rows]))
        elif shared_prompt:
            rows = [candidate_rows(chunk) for chunk in chunks]
            prompt_ids, prompt_real = prompt_rows(prompts)
            masks = [attention_masks(model, of_chunk, prompt_real) for of_chunk in rows]
            passes.append(Pass(rows, masks, prompt_ids, prompt_real))
        else:
            rows = [separate_rows(chunk) for chunk in chunks]
            passes.append(Pass(rows, [of_chunk.real.long() for of_chunk in rows]))
    return passes


def enable_passes(model: PreTrainedModel) -> None:
    """
    Lets `model` be called as `model(passes=[Pass, ...])`, which returns what it says of each chunk, in order.

    They are run inside the model's forward so that whatever wraps it (PEFT, DDP, DeepSpeed, FSDP) sees one call. The
    values returned are TRL's `FusedCausalLMOutput`. Further keyword arguments go to every call of the model.

    Args:
        model: Bare model with TRL's fused head.
    """
    original_forward = model.forward
    gather_partitioned_heads()

    def forward(self, *args, passes: list[Pass] | None = None, **kwargs):
        if passes is None:
            return original_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT fills in its own
        outputs = []
        for lists in passes:
            recorded: KeysAndValues = {}
            if lists.prompt_ids is not None and lists.prompt_real is not None:
                self.base_model(
                    input_ids=lists.prompt_ids,
                    attention_mask=lists.prompt_real.long(),
                    use_cache=False,
                    record=recorded,
                    **kwargs,
                )
            reading = {"recorded": recorded} if recorded else {}
            for rows, mask in zip(lists.chunks, lists.masks, strict=True):
                run = partial(run_rows, original_forward, rows, mask, **kwargs, **reading)
                outputs.append(checkpoint(run, use_reentrant=False) if torch.is_grad_enabled() else run())
        return outputs

    model.forward = types.MethodType(forward, model)


def run_rows(model: Callable, rows: Rows, mask: Tensor | dict[str, Tensor], **kwargs) -> FusedCausalLMOutput:
    """
    Calls a model with TRL's fused head on some rows.

    Args:
        model: The model, however wrapped, or its forward.
        rows: The rows.
        mask: Two-dimensional for rows of one sequence; else from [`attention_masks`].
        kwargs: Further arguments for the model.
    """
    if isinstance(mask, dict) or len(mask.shape) == 4:
        kwargs["position_ids"] = rows.positions
    with fused_head(rows.real, CPULogProbs):
        return model(
            input_ids=rows.input_ids,
            attention_mask=mask,
            labels=rows.labels,
            use_cache=False,
            fused_lm_head=True,
            **kwargs,
        )
