"""Attention in two parts, without the kernels that a GPU has. `architectures.py --parts` tests all models."""

import architectures
import pytest
import torch
from accelerate import Accelerator
from flash_stand_in import two_parts_without_a_gpu

from trl_larpo import DataCollatorForCandidateLists, LarPOConfig
from trl_larpo.training import two_part_attention
from trl_larpo.training.passes import Layout
from trl_larpo.training.scorer import CandidateScorer
from trl_larpo.training.token_rows import pack, shared_prompt_rows
from trl_larpo.training.two_part_attention import has_kernel, two_parts


@pytest.fixture(autouse=True)
def _two_parts():
    with two_parts_without_a_gpu():
        yield


def lists_with_prompts_of(*prompt_lengths: int):
    examples = [
        {"prompt_ids": list(range(3, 3 + n)), "completion_ids": [[40, 41, 42], [50, 51]], "relevance": [1.0, 0.0]}
        for n in prompt_lengths
    ]
    return DataCollatorForCandidateLists(pad_token_id=0)(examples)


def test_prompts_come_before_candidates():
    parts = two_parts(pack(shared_prompt_rows(architectures.lists_of_tokens()), 8, prompts_first=True))
    # Prompts of 20 and 13 tokens but for the last, completions of 5, 9, 3 and 7, 4 after that one, 5 of padding
    assert parts.own.query_ends.diff().tolist() == [19, 12, 6, 10, 4, 8, 5]
    assert parts.prompts.query_ends.tolist() == [0, 20, 33]
    assert parts.prompts.key_ends.tolist() == [0, 19, 31]
    assert parts.candidates == slice(31, 64)
    assert (parts.own.max_keys, parts.prompts.max_queries, parts.prompts.max_keys) == (19, 20, 19)
    padded = two_parts(pack(shared_prompt_rows(architectures.lists_of_tokens()), 50, prompts_first=True))
    assert padded.own.query_ends.diff().tolist() == [19, 12, 6, 10, 4, 8, 5, 36]
    assert padded.candidates == parts.candidates


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mixtral"])
def test_numbers_are_those_of_plain_rows(model_type, tmp_path):
    outcome = architectures.sweep(model_type, str(tmp_path))
    assert outcome.layouts == {None: Layout.PACKED, 2: Layout.PROMPT_FIRST}
    assert outcome.logps < 1e-5 and outcome.gradients < 1e-5, outcome


def test_layers_with_windows_and_caps_are_left_to_other_layouts(tmp_path):
    for model_type in ("mistral", "gemma2"):
        outcome = architectures.sweep(model_type, str(tmp_path))
        assert outcome.layouts[None] is Layout.SHARED


def test_lists_without_a_prompt_to_share(tmp_path):
    model = architectures.tiny_model("llama")
    scorer = architectures.make_scorer(model, str(tmp_path), shared_prompt="on")
    for prompt_lengths in ((1,), (1, 6), (6, 2)):
        batch = lists_with_prompts_of(*prompt_lengths)
        expected = architectures.plain_logps(model, batch)
        torch.testing.assert_close(scorer(model, batch).logps, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the weights; products are in bfloat16
def test_kernels_are_compared_in_the_precision_that_they_run_in(dtype, tmp_path, monkeypatch):
    args = LarPOConfig(str(tmp_path), use_cpu=True, bf16=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    forward, seen = two_part_attention._plain_forward, []

    def spoilt_in_bfloat16(query, *args):
        seen.append(query.dtype)
        output, normalizer = forward(query, *args)
        return (output.flip(0) if query.dtype == torch.bfloat16 else output), normalizer

    def layout() -> Layout:
        model = architectures.tiny_model("llama").to(dtype)
        return CandidateScorer(model, args, accelerator, is_trained=True).layout

    assert layout() is Layout.PACKED
    monkeypatch.setattr(two_part_attention, "_plain_forward", spoilt_in_bfloat16)
    assert layout() is Layout.SPLIT
    assert set(seen) == {dtype, torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_wrong_are_found(dtype, tmp_path, monkeypatch, caplog):
    def with_positions_of_the_row(*args, **kwargs):
        rows = pack(*args, **kwargs)
        rows.positions = torch.arange(rows.positions.size(1))[None]
        return rows

    monkeypatch.setattr("trl_larpo.training.passes.pack", with_positions_of_the_row)
    model = architectures.tiny_model("llama").to(dtype)
    with caplog.at_level("INFO", logger="trl_larpo"):
        scorer = architectures.make_scorer(model, str(tmp_path))
    assert scorer.layout is Layout.SPLIT
    assert "attention is not worked out in two parts, because otherwise log-probabilities differ by" in caplog.text


def test_gradients_are_those_of_one_softmax():
    generator = torch.Generator().manual_seed(0)
    rows = pack(shared_prompt_rows(lists_with_prompts_of(7, 4)), 1, prompts_first=True)
    parts = two_parts(rows)
    length = rows.input_ids.size(1)

    def states(heads: int):
        return torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = states(4), states(2), states(2)
    found, _ = parts.attend(None, None, *inputs, None, scaling=0.3)
    segments, lists = rows.segments[0], rows.lists[0]
    index = torch.arange(length)
    sees = (segments == 0) | (segments == segments[:, None])
    sees &= (lists == lists[:, None]) & (index[:, None] >= index)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=sees, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    of_found, of_expected = (torch.autograd.grad((weights * x).sum(), inputs) for x in (found, expected))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-5, atol=1e-6)


def test_kernels_run_on_gpus_in_half_precision_alone():
    assert not has_kernel(torch.device("cpu"), torch.bfloat16)
    if torch.cuda.is_available():
        assert not has_kernel(torch.device("cuda"), torch.float32)
