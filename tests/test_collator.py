"""The worked batch of the docstring, truncation, padding, and reference log-probabilities."""

import torch

from trl_larpo import DataCollatorForCandidateLists

EXAMPLES = [
    {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]], "relevance": [0.5, 2.0, -1.0]},
    {"prompt_ids": [7], "completion_ids": [[8], [9, 9]], "relevance": [1.0, 0.0]},
]


def test_worked_batch():
    batch = DataCollatorForCandidateLists(pad_token_id=0)(EXAMPLES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "prompt_ids": [[1, 2], [7, 0]],
        "prompt_mask": [[1, 1], [1, 0]],
        "completion_ids": [[[3, 0], [4, 5], [6, 0]], [[8, 0], [9, 9], [0, 0]]],
        "completion_mask": [[[1, 0], [1, 1], [1, 0]], [[1, 0], [1, 1], [0, 0]]],
        "candidate_mask": [[True, True, True], [True, True, False]],
        "relevance": [[0.5, 2.0, -1.0], [1.0, 0.0, 0.0]],
    }


def test_padding_takes_the_token_given():
    batch = DataCollatorForCandidateLists(pad_token_id=5)(EXAMPLES)
    assert (batch["prompt_ids"][batch["prompt_mask"] == 0] == 5).all()
    assert (batch["completion_ids"][batch["completion_mask"] == 0] == 5).all()


def test_the_end_is_cut():
    batch = DataCollatorForCandidateLists(pad_token_id=0, max_length=3)(EXAMPLES)
    assert batch["completion_ids"].tolist() == [[[3, 0], [4, 0], [6, 0]], [[8, 0], [9, 9], [0, 0]]]
    batch = DataCollatorForCandidateLists(pad_token_id=0, max_length=1)(EXAMPLES)
    assert batch["prompt_ids"].tolist() == [[1], [7]]
    assert batch["completion_mask"].sum() == 0


def test_the_start_is_cut():
    batch = DataCollatorForCandidateLists(pad_token_id=0, max_length=2, truncation_mode="keep_end")(EXAMPLES)
    assert batch["first_position"].tolist() == [[1, 2, 1], [0, 1, 0]]
    assert batch["completion_ids"].tolist()[0] == [[3, 0], [4, 5], [6, 0]]


def test_reference_log_probabilities_are_padded_like_relevance():
    examples = [example | {"ref_logps": [-1.0] * len(example["relevance"])} for example in EXAMPLES]
    batch = DataCollatorForCandidateLists(pad_token_id=0)(examples)
    torch.testing.assert_close(batch["ref_logps"], torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]]))
