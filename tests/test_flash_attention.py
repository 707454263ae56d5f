"""Shared prompts on FlashAttention, with its functions in plain torch. `architectures.py --flash` tests all models."""

from functools import partial

import architectures
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from flash_stand_in import FLASH, flash_attention, flash_attn_varlen_func
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_larpo.training.attention import enable_sharing
from trl_larpo.training.passes import Layout
from trl_larpo.training.token_rows import candidate_rows, pack, prompt_rows, shared_prompt_rows
from trl_larpo.training.variable_length import uses_variable_lengths, variable_lengths


@pytest.fixture(autouse=True)
def _flash_attention():
    with flash_attention():
        yield


def test_sequences_of_a_packed_row():
    rows = pack(shared_prompt_rows(architectures.lists_of_tokens()), 8)
    # Prompts of 20 and 13 tokens but for the last, completions of 5, 9, 3 and 7, 4 after that one, 6 of padding
    queries = torch.tensor([0, 19, 6, 10, 4, 12, 8, 5])
    assert rows.input_ids.shape == (1, 64)
    found = variable_lengths(rows)
    assert found.query_ends.diff().tolist() == [19, 6, 10, 4, 12, 8, 5]
    assert found.query_ends.tolist() == queries.cumsum(dim=0).tolist()
    assert found.key_ends.diff().tolist() == [19, 25, 29, 23, 12, 20, 17]
    assert (found.max_queries, found.max_keys) == (19, 29)
    third_of_first = found.keys[found.key_ends[3] : found.key_ends[4]]
    assert third_of_first.tolist() == [*range(19), *range(35, 39)]
    first_of_second = found.keys[found.key_ends[5] : found.key_ends[6]]
    assert first_of_second.tolist() == [*range(39, 51), *range(51, 59)]


def test_sequences_after_prompts_outside_the_row():
    batch = architectures.lists_of_tokens()
    _, real = prompt_rows(batch)  # (2, 19)
    found = variable_lengths(pack(candidate_rows(batch), 1), real)
    assert found.query_ends.diff().tolist() == [6, 10, 4, 8, 5]
    assert found.key_ends.diff().tolist() == [25, 29, 23, 20, 17]
    assert found.keys[-17:].tolist() == [*range(19, 31), *range(38 + 28, 38 + 33)]
    nothing = {name: tensor[:, :0] if name == "candidate_mask" else tensor for name, tensor in batch.items()}
    nothing["candidate_mask"] = torch.zeros_like(batch["candidate_mask"])  # a chunk past the end of its lists
    found = variable_lengths(pack(candidate_rows(nothing), 1), real)
    assert found.query_ends.tolist() == found.key_ends.tolist() == [0, 2]


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # windows and soft caps in the second
def test_numbers_are_those_of_plain_rows(model_type, tmp_path):
    outcome = architectures.sweep(model_type, str(tmp_path), FLASH)
    assert outcome.layouts == {None: Layout.SPLIT, 2: Layout.PROMPT_FIRST}
    assert outcome.logps < 1e-5 and outcome.gradients < 1e-5, outcome


def test_plain_rows_are_those_of_other_attention():
    batch = architectures.lists_of_tokens()
    flash, sdpa = (architectures.plain_logps(architectures.tiny_model("mistral", x), batch) for x in (FLASH, "sdpa"))
    torch.testing.assert_close(flash, sdpa, rtol=1e-5, atol=1e-4)


def test_kernels_of_another_contract_are_found(tmp_path, monkeypatch, caplog):
    def top_left(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        """As before flash-attn 2.1: query i sees keys up to i, also where there are more keys."""
        pieces = []
        for i in range(len(cu_seqlens_q) - 1):
            length = int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
            ends = torch.tensor([0, length], dtype=torch.int32)
            keys = slice(cu_seqlens_k[i], cu_seqlens_k[i] + length)
            query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
            pieces.append(flash_attn_varlen_func(query, k[keys], v[keys], ends, ends, length, length, **options))
        return torch.cat(pieces)

    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", top_left)
    for chunk_size in (None, 2):
        model = architectures.tiny_model("llama", FLASH)
        with caplog.at_level("WARNING", logger="trl_larpo"):
            scorer = architectures.make_scorer(model, str(tmp_path), candidate_chunk_size=chunk_size)
        assert scorer.layout is Layout.SEPARATE
        assert "does not give the same numbers otherwise: log-probabilities differ by" in caplog.text


def test_kernels_from_the_hub():
    model = architectures.tiny_model("llama", FLASH)
    # How transformers 5 and 4 register them
    for name, function in (
        ("kernels-community/one", flash_attention_forward),
        ("kernels-community/two", partial(flash_attention_forward, implementation=None)),
        ("kernels-community/other", lambda *args, **kwargs: None),
    ):
        AttentionInterface.register(name, function)
        model.config._attn_implementation = name
        assert uses_variable_lengths(model) == ("other" not in name)
        if uses_variable_lengths(model):
            enable_sharing(model)
            knowing = ALL_ATTENTION_FUNCTIONS[name]
            assert knowing is not function and uses_variable_lengths(model)
            enable_sharing(model)
            assert ALL_ATTENTION_FUNCTIONS[name] is knowing
            assert model.config._attn_implementation == name  # by which transformers knows what to load
