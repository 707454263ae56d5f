"""Tokenised candidate lists → one padded batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin


@dataclass
class DataCollatorForCandidateLists(DataCollatorMixin):
    """
    Pads candidate lists of different sizes and lengths into one batch, with a separate row for each candidate.

    The first dimension of every tensor is the prompts of the batch, so that whatever slices a batch along it (last
    incomplete batches, several processes) keeps lists whole.

    Each example is a dictionary with `prompt_ids` (list of int), `completion_ids` (list of m lists of int), `relevance`
    (list of m floats) and optionally `ref_logps` (list of m floats). The batch has:

    - `input_ids`, `attention_mask`, `completion_mask`: int64 `(batch, list_size, length)`;
    - `candidate_mask`: bool `(batch, list_size)`, `False` where a shorter list was padded;
    - `relevance` and, if given, `ref_logps`: float32 `(batch, list_size)`, 0 in the padding.

    Args:
        pad_token_id: Token to pad with.
        max_length: Prompt plus completion are cut to so many tokens. `None`: not cut.
        truncation_mode: `"keep_start"` or `"keep_end"`.
        pad_to_multiple_of: Length is padded to a multiple of this.
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
    {'input_ids': tensor([[[1, 2, 3, 0],
                           [1, 2, 4, 5],
                           [1, 2, 6, 0]],
                          [[7, 8, 0, 0],
                           [7, 9, 9, 0],
                           [0, 0, 0, 0]]]),
     'attention_mask': tensor([[[1, 1, 1, 0],
                                [1, 1, 1, 1],
                                [1, 1, 1, 0]],
                               [[1, 1, 0, 0],
                                [1, 1, 1, 0],
                                [0, 0, 0, 0]]]),
     'completion_mask': tensor([[[0, 0, 1, 0],
                                 [0, 0, 1, 1],
                                 [0, 0, 1, 0]],
                                [[0, 1, 0, 0],
                                 [0, 1, 1, 0],
                                 [0, 0, 0, 0]]]),
     'candidate_mask': tensor([[ True,  True,  True],
                               [ True,  True, False]]),
     'relevance': tensor([[ 0.5000,  2.0000, -1.0000],
                          [ 1.0000,  0.0000,  0.0000]])}
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        kept = slice(None)
        if self.max_length is not None:
            kept = slice(-self.max_length, None) if self.truncation_mode == "keep_end" else slice(self.max_length)
        input_ids = [[(ex["prompt_ids"] + ids)[kept] for ids in ex["completion_ids"]] for ex in examples]
        completion_masks = [
            [([0] * len(ex["prompt_ids"]) + [1] * len(ids))[kept] for ids in ex["completion_ids"]] for ex in examples
        ]
        list_size = max(len(rows) for rows in input_ids)
        length = max(len(row) for rows in input_ids for row in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        shape = (len(examples), list_size, length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "completion_mask": torch.zeros(shape, dtype=torch.long),
            "candidate_mask": torch.zeros(shape[:2], dtype=torch.bool),
        }
        for i, (rows, masks) in enumerate(zip(input_ids, completion_masks, strict=True)):
            batch["candidate_mask"][i, : len(rows)] = True
            for j, (row, mask) in enumerate(zip(rows, masks, strict=True)):
                batch["input_ids"][i, j, : len(row)] = torch.tensor(row)
                batch["attention_mask"][i, j, : len(row)] = 1
                batch["completion_mask"][i, j, : len(row)] = torch.tensor(mask)
        for name in ("relevance", "ref_logps"):
            if name in examples[0]:
                batch[name] = torch.zeros(shape[:2])
                for i, example in enumerate(examples):
                    batch[name][i, : len(example[name])] = torch.tensor(example[name])
        return batch
