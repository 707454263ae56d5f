"""Where tokens go in separate and in shared rows, and what sees what."""

import pytest
import torch

from trl_larpo import DataCollatorForCandidateLists
from trl_larpo.training.attention import visible
from trl_larpo.training.token_rows import (
    candidate_rows,
    count_tokens,
    extend,
    pack,
    prompt_rows,
    separate_rows,
    shared_prompt_rows,
)

EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "completion_ids": [[4], [5, 6], [7]], "relevance": [0.5, 2.0, -1.0]},
    {"prompt_ids": [8], "completion_ids": [[9, 10], [11]], "relevance": [1.0, 0.0]},
]


def make_batch(examples=EXAMPLES, **options):
    return DataCollatorForCandidateLists(pad_token_id=0, **options)(examples)


def test_separate_rows():
    rows = separate_rows(make_batch())
    assert rows.input_ids.tolist() == [
        [1, 2, 3, 4, 1],  # padding repeats the first token
        [1, 2, 3, 5, 6],
        [1, 2, 3, 7, 1],
        [8, 9, 10, 8, 8],
        [8, 11, 8, 8, 8],
    ]
    assert rows.real.sum(dim=1).tolist() == [4, 5, 4, 3, 2]
    assert rows.weights.equal(rows.real.long())
    assert rows.labels.tolist() == [
        [-100, -100, -100, 4, -100],
        [-100, -100, -100, 5, 6],
        [-100, -100, -100, 7, -100],
        [-100, 9, 10, -100, -100],
        [-100, 11, -100, -100, -100],
    ]


def test_shared_prompt_rows():
    rows = shared_prompt_rows(make_batch())
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 3, 5, 6, 3, 7], [8, 9, 10, 8, 11, 8, 8, 8, 8]]
    assert rows.weights.tolist() == [[3, 3, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 3], [0, 1, 2, 0, 1, 0, 0, 0, 0]]
    assert rows.segments[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert rows.segments[1, :5].tolist() == [1, 1, 1, 2, 2]
    assert rows.labels.tolist() == [
        [-100, -100, -100, 4, -100, 5, 6, -100, 7],
        [-100, 9, 10, -100, 11, -100, -100, -100, -100],
    ]


@pytest.mark.parametrize("lay_out", [separate_rows, shared_prompt_rows, candidate_rows])
@pytest.mark.parametrize(
    "options, scored",
    [
        ({}, [[[4, 0], [5, 6], [7, 0]], [[9, 10], [11, 0], [0, 0]]]),
        ({"max_length": 4}, [[[4, 0], [5, 0], [7, 0]], [[9, 10], [11, 0], [0, 0]]]),
        ({"max_length": 2}, [[[0, 0], [0, 0], [0, 0]], [[9, 0], [11, 0], [0, 0]]]),
    ],
)
def test_values_come_back_to_their_tokens(lay_out, options, scored):
    batch = make_batch(**options)
    rows = lay_out(batch)
    found = rows.per_token(rows.input_ids[:, 1:])
    expected = torch.tensor(scored)[:, :, : found.size(2)]
    assert found.tolist() == expected.tolist()
    assert rows.token_mask.equal(expected != 0)
    # Nor does a column more move anything
    longer = extend(rows, 99)
    assert longer.positions[:, -1].eq(99).all() and longer.positions[:, :-1].equal(rows.positions)
    assert longer.per_token(longer.input_ids[:, 1:]).equal(found)
    assert not longer.real[:, -1].any() and longer.weights.sum() == rows.weights.sum()


def test_sequences_cut_at_the_start():
    batch = make_batch(max_length=2, truncation_mode="keep_end")
    rows = separate_rows(batch)
    assert rows.input_ids.tolist() == [[3, 4], [5, 6], [3, 7], [9, 10], [8, 11]]
    # What a row begins with is not predicted
    assert rows.per_token(rows.input_ids[:, 1:]).tolist() == [[[4, 0], [0, 6], [7, 0]], [[0, 10], [11, 0], [0, 0]]]
    assert count_tokens(batch) == 10


@pytest.mark.parametrize("lay_out", [separate_rows, shared_prompt_rows])
def test_padding_to_a_multiple(lay_out):
    rows = lay_out(make_batch(), pad_to_multiple_of=8)
    assert rows.input_ids.size(1) % 8 == 0
    assert not rows.real[:, lay_out(make_batch()).input_ids.size(1) :].any()


def test_tokens_counted():
    batch = make_batch()
    assert count_tokens(batch) == separate_rows(batch).real.sum() == 18
    assert count_tokens(batch, shared_prompt=True) == shared_prompt_rows(batch).real.sum() == 14


def test_without_a_prompt_a_candidate_begins_unpredicted():
    # What TRL's format without a common beginning can give
    batch = make_batch([{"prompt_ids": [], "completion_ids": [[4, 5], [6, 7, 8]], "relevance": [1.0, 0.0]}])
    for lay_out in (separate_rows, shared_prompt_rows):
        rows = lay_out(batch)
        assert rows.per_token(rows.input_ids[:, 1:]).tolist() == [[[0, 5, 0], [0, 7, 8]]]


def test_candidates_see_the_prompt_and_themselves():
    seen = visible(shared_prompt_rows(make_batch()))
    # 1 2 | 3 4 | 3 5 6 | 3 7
    expected = [
        "100000000",
        "110000000",
        "111000000",
        "111100000",
        "110010000",
        "110011000",
        "110011100",
        "110000010",
        "110000011",
    ]
    assert ["".join(str(int(x)) for x in row) for row in seen[0]] == expected
    padding = seen[1, 5:]
    assert padding.equal(torch.eye(9, dtype=torch.bool)[5:])


def test_packed_lists():
    rows = pack(shared_prompt_rows(make_batch()), 8)
    assert rows.input_ids.shape == (1, 16)
    assert rows.input_ids[0, :14].tolist() == [1, 2, 3, 4, 3, 5, 6, 3, 7, 8, 9, 10, 8, 11]
    assert rows.lists[0, :14].tolist() == [0] * 9 + [1] * 5
    assert rows.real.sum() == 14 and rows.weights.sum() == 18
    assert rows.per_token(rows.input_ids[:, 1:]).tolist() == [[[4, 0], [5, 6], [7, 0]], [[9, 10], [11, 0], [0, 0]]]


@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_windows_reach_back_by_position(window):
    batch = make_batch()
    shared, separate = visible(shared_prompt_rows(batch), window), visible(separate_rows(batch), window)
    # The second candidate of the first list: columns of its tokens in the shared row, positions 0 to 4
    columns = torch.tensor([0, 1, 4, 5, 6])
    assert shared[0][columns][:, columns].equal(separate[1])
    # The same with the prompt kept outside the row
    prompt_ids, prompt_real = prompt_rows(batch)
    assert prompt_ids.tolist() == [[1, 2], [8, 8]] and prompt_real.tolist() == [[True, True], [False, False]]
    apart = visible(candidate_rows(batch), window, prompt_real)
    assert apart[0].equal(shared[0, 2:])
