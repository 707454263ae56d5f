"""What layouts cost, by hand; which one a batch gets."""

from types import SimpleNamespace

import architectures
import pytest
import torch
from accelerate import PartialState
from flash_stand_in import FLASH, flash_attention

from trl_larpo import DataCollatorForCandidateLists
from trl_larpo.training.layout_costs import (
    LayoutChoice,
    Lengths,
    Prices,
    Work,
    count_work,
    flops_of_pair,
    flops_of_token,
)
from trl_larpo.training.passes import Layout, whole_pass

RAGGED = Lengths(prompts=[20, 13], completions=[[5, 9, 3], [7, 4]])


@pytest.fixture(autouse=True)
def _logging_works():
    PartialState(cpu=True)


def batch_of(lengths: Lengths):
    examples = [
        {"prompt_ids": [5] * n, "completion_ids": [[6 + i] * x for i, x in enumerate(xs)], "relevance": [0.0] * len(xs)}
        for n, xs in zip(lengths.prompts, lengths.completions, strict=True)
    ]
    return DataCollatorForCandidateLists(pad_token_id=0)(examples)


def test_a_batch_without_candidates_has_no_work():
    model, batch = architectures.tiny_model("llama"), batch_of(RAGGED)
    batch["candidate_mask"][:] = False  # as where all samples of online training were cut off, and are left out
    assert LayoutChoice(model, Layout.SPLIT, Prices())(batch) is Layout.SPLIT


def test_widths_may_differ_from_layer_to_layer():
    of_layers, of_all = (SimpleNamespace(hidden_size=8, intermediate_size=size) for size in ([16, 48], 32))
    assert flops_of_token(of_layers) == flops_of_token(of_all)


def test_work_by_hand():
    # Rows of 25, 29, 23, 20 and 17; in shared rows 19 + 6 + 10 + 4 = 39 and 12 + 8 + 5 = 25
    assert count_work(RAGGED, Layout.SEPARATE, "mask") == Work(5 * 29, 5 * 29**2, False)
    squares = (25**2 + 29**2 + 23**2 + 20**2 + 17**2) / 2
    assert count_work(RAGGED, Layout.SEPARATE, "lengths") == Work(5 * 29, squares, False)
    assert count_work(RAGGED, Layout.SHARED, "mask") == Work(2 * 39, 2 * 39**2, False)
    assert count_work(RAGGED, Layout.SPLIT, "mask") == Work(2 * 39, 2 * (19**2 / 2 + 3 * 10 * 29), True)
    seen = 19**2 / 2 + 6 * 22 + 10 * 24 + 4 * 21 + 12**2 / 2 + 8 * 16 + 5 * 14.5
    assert count_work(RAGGED, Layout.SPLIT, "lengths") == Work(64, seen, True)
    assert count_work(RAGGED, Layout.SHARED, "blocks") == Work(128, seen, False)


@pytest.mark.parametrize("attention", [None, FLASH])
@flash_attention()
def test_work_is_what_the_rows_ask_for(attention):
    model = architectures.tiny_model("llama", attention)
    for layout in (Layout.SEPARATE, Layout.SPLIT):
        [of_pass] = whole_pass(model, batch_of(RAGGED), layout)
        [call] = of_pass.calls
        work = count_work(RAGGED, layout, "mask" if attention is None else "lengths")
        assert work.tokens == call.rows.input_ids.numel()
        if layout is Layout.SPLIT and attention is None:
            assert work.pairs == call.split.mask.numel() + 2 * 19**2 / 2


def test_flops_of_a_pair():
    config = architectures.tiny_config("llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8)
    # 2 x 2 x 32 for a pair; for a token 2 x (32 x 32 x 2 for queries and output, 32 x 16 x 2, and 32 x 48 x 3)
    assert flops_of_pair(config) == pytest.approx(128 / (2 * (2048 + 1024 + 4608)))


@pytest.mark.parametrize(
    "prompts, completions, layout",
    [
        ([64], [[64, 64]], Layout.SPLIT),
        ([1500], [[256] * 8], Layout.SPLIT),
        ([8, 8], [[32] * 16, [32] * 2], Layout.SEPARATE),  # half of shared rows would be padding
        ([384, 384], [[32] * 16, [32] * 2], Layout.SPLIT),
    ],
)
def test_the_cheaper_layout(prompts, completions, layout):
    choice = LayoutChoice(architectures.tiny_model("llama"), Layout.SPLIT, Prices())
    assert choice(batch_of(Lengths(prompts, completions))) is layout


def test_prices_decide():
    model, batch = architectures.tiny_model("llama"), batch_of(Lengths([12], [[32, 32]]))
    for prices, layout in (
        (Prices(), Layout.SPLIT),
        (Prices(apart=0.2), Layout.SEPARATE),
        (Prices(batch=20), Layout.SEPARATE),
    ):
        assert LayoutChoice(model, Layout.SPLIT, prices)(batch) is layout


@pytest.mark.parametrize(
    "prompts, completions, layout",
    [
        ([64], [[192, 192]], Layout.SEPARATE),  # the host takes longer than the device in both
        ([1500], [[256] * 8], Layout.PACKED),
        ([200], [[30] * 3], Layout.PACKED),  # separate rows have more than twice the tokens, and would need the memory
        ([1], [[192, 192]], Layout.SEPARATE),  # nothing is shared, and one row would need a mask
    ],
)
def test_small_batches_on_a_device_that_waits_for_its_host(prompts, completions, layout):
    model = architectures.tiny_model("llama")
    launch = 1000 * flops_of_token(model.config)  # as long as 1,000 tokens take
    choice = LayoutChoice(model, Layout.PACKED, Prices(launch=launch, launch_apart=0.2))
    assert choice(batch_of(Lengths(prompts, completions))) is layout


def test_work_of_packed_rows_is_that_of_variable_lengths():
    assert count_work(RAGGED, Layout.PACKED, "mask") == count_work(RAGGED, Layout.SPLIT, "lengths")
    without_prompt = Lengths([1, 20], RAGGED.completions)
    assert count_work(without_prompt, Layout.PACKED, "mask") == count_work(without_prompt, Layout.SHARED, "mask")


def test_batches_get_the_cheaper_layout(tmp_path, caplog):
    lengths = Lengths([8, 8], [[12] * 10, [12] * 2])
    batch = batch_of(lengths)
    model = architectures.tiny_model("llama")
    expected = architectures.plain_logps(model, batch)
    for shared_prompt, rows in (("auto", 12), ("on", 2)):
        scorer = architectures.make_scorer(
            architectures.tiny_model("llama"), str(tmp_path), shared_prompt=shared_prompt
        )
        seen = []
        scorer.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        with caplog.at_level("INFO", logger="trl_larpo"):
            torch.testing.assert_close(scorer(scorer.model, batch).logps, expected, rtol=1e-4, atol=1e-4)
            scorer(scorer.model, batch)
        assert seen == [rows, rows] and scorer.layout is Layout.SPLIT
    [said] = [record.message for record in caplog.records if "that costs less" in record.message]
    assert "lists of 10, 2 and prompts of up to 8 tokens" in said
