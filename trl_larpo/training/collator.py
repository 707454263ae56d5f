"""Tokenised candidate lists → one padded batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin


@dataclass
class DataCollatorForCandidateLists(DataCollatorMixin):
    """
    Pads candidate lists of different sizes and lengths into one batch. A list's prompt is in it once.

    The first dimension of every tensor is the prompts of the batch, so that whatever slices a batch along it (last
    incomplete batches, several processes) keeps lists whole. What rows the model is given is decided later, see
    [`trl_larpo.training.token_rows`].

    Each example is a dictionary with `prompt_ids` (list of int), `completion_ids` (list of m lists of int), `relevance`
    (list of m floats) and optionally `ref_logps` (list of m floats). The batch has:

    - `prompt_ids`, `prompt_mask`: int64 `(batch, prompt_length)`;
    - `completion_ids`, `completion_mask`: int64 `(batch, list_size, completion_length)`;
    - `candidate_mask`: bool `(batch, list_size)`, `False` where a shorter list was padded;
    - `relevance` and, if given, `ref_logps`: float32 `(batch, list_size)`, 0 in the padding;
    - where sequences are cut at the start, `first_position`: int64 `(batch, list_size)`, the tokens cut off from each
      candidate's prompt and completion.

    Args:
        pad_token_id: Token to pad with.
        max_length: Prompt plus completion are truncated to this many tokens. `None`: not truncated.
        truncation_mode: `"keep_start"` or `"keep_end"`.
        return_tensors: Only `"pt"`.

    Example:
    ```python
    >>> collator = DataCollatorForCandidateLists(pad_token_id=0)
    >>> collator(
    ...     [
    ...         {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]], "relevance": [0.5, 2.0, -1.0]},
    ...         {"prompt_ids": [7], "completion_ids": [[8], [9, 9]], "relevance": [1.0, 0.0]},
    ...     ]
    ... )
    {'prompt_ids': tensor([[1, 2],
                           [7, 0]]),
     'prompt_mask': tensor([[1, 1],
                            [1, 0]]),
     'completion_ids': tensor([[[3, 0],
                                [4, 5],
                                [6, 0]],
                               [[8, 0],
                                [9, 9],
                                [0, 0]]]),
     'completion_mask': tensor([[[1, 0],
                                 [1, 1],
                                 [1, 0]],
                                [[1, 0],
                                 [1, 1],
                                 [0, 0]]]),
     'candidate_mask': tensor([[ True,  True,  True],
                               [ True,  True, False]]),
     'relevance': tensor([[ 0.5000,  2.0000, -1.0000],
                          [ 1.0000,  0.0000,  0.0000]])}
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        completions = [example["completion_ids"] for example in examples]
        kept_at_start = self.max_length if self.truncation_mode != "keep_end" else None
        kept_at_end = self.max_length if self.truncation_mode == "keep_end" else None
        if kept_at_start is not None:
            prompts = [ids[:kept_at_start] for ids in prompts]
            completions = [
                [ids[: kept_at_start - len(prompt)] for ids in candidates]
                for prompt, candidates in zip(prompts, completions, strict=True)
            ]
        list_size = max(len(candidates) for candidates in completions)
        longest_prompt = max(1, *(len(ids) for ids in prompts))
        longest_completion = max(1, *(len(ids) for candidates in completions for ids in candidates))

        prompt_shape = (len(examples), longest_prompt)
        shape = (len(examples), list_size, longest_completion)
        batch = {
            "prompt_ids": torch.full(prompt_shape, self.pad_token_id),
            "prompt_mask": torch.zeros(prompt_shape, dtype=torch.long),
            "completion_ids": torch.full(shape, self.pad_token_id),
            "completion_mask": torch.zeros(shape, dtype=torch.long),
            "candidate_mask": torch.zeros(shape[:2], dtype=torch.bool),
        }
        if kept_at_end is not None:
            batch["first_position"] = torch.zeros(shape[:2], dtype=torch.long)
        for i, (prompt, candidates) in enumerate(zip(prompts, completions, strict=True)):
            batch["prompt_ids"][i, : len(prompt)] = torch.tensor(prompt)
            batch["prompt_mask"][i, : len(prompt)] = 1
            batch["candidate_mask"][i, : len(candidates)] = True
            for j, ids in enumerate(candidates):
                batch["completion_ids"][i, j, : len(ids)] = torch.tensor(ids)
                batch["completion_mask"][i, j, : len(ids)] = 1
                if kept_at_end is not None:
                    batch["first_position"][i, j] = max(0, len(prompt) + len(ids) - kept_at_end)
        for name in ("relevance", "ref_logps"):
            if name in examples[0]:
                batch[name] = torch.zeros(shape[:2])
                for i, example in enumerate(examples):
                    batch[name][i, : len(example[name])] = torch.tensor(example[name])
        return batch
