"""The worked batch of the docstring, truncation, padding, and reference log-probabilities."""

import pytest
import torch

from trl_larpo import DataCollatorForCandidateLists

EXAMPLES = [
    {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]], "relevance": [0.5, 2.0, -1.0]},
    {"prompt_ids": [7], "completion_ids": [[8], [9, 9]], "relevance": [1.0, 0.0]},
]


def test_worked_batch():
    batch = DataCollatorForCandidateLists(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 6, 0]],
        [[7, 8, 0, 0], [7, 9, 9, 0], [0, 0, 0, 0]],
    ]
    assert batch["attention_mask"].tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
    ]
    assert batch["completion_mask"].tolist() == [
        [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]],
        [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    ]
    assert batch["candidate_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["relevance"].tolist() == [[0.5, 2.0, -1.0], [1.0, 0.0, 0.0]]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "candidate_mask", "relevance"}


@pytest.mark.parametrize(
    "mode, first_list",
    [("keep_start", [[1, 2, 3], [1, 2, 4], [1, 2, 6]]), ("keep_end", [[1, 2, 3], [2, 4, 5], [1, 2, 6]])],
)
def test_truncation(mode, first_list):
    batch = DataCollatorForCandidateLists(pad_token_id=0, max_length=3, truncation_mode=mode)(EXAMPLES)
    assert batch["input_ids"][0].tolist() == first_list
    assert batch["completion_mask"][0, 1].tolist() == ([0, 0, 1] if mode == "keep_start" else [0, 1, 1])


def test_padding_to_a_multiple():
    batch = DataCollatorForCandidateLists(pad_token_id=5, pad_to_multiple_of=8)(EXAMPLES)
    assert batch["input_ids"].shape == (2, 3, 8)
    assert (batch["input_ids"][..., 4:] == 5).all()
    assert (batch["attention_mask"][..., 4:] == 0).all()


def test_reference_log_probabilities_are_padded_like_relevance():
    examples = [example | {"ref_logps": [-1.0] * len(example["relevance"])} for example in EXAMPLES]
    batch = DataCollatorForCandidateLists(pad_token_id=0)(examples)
    torch.testing.assert_close(batch["ref_logps"], torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]]))
