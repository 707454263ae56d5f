"""Every architecture of transformers: the scorer gives the numbers of plain rows, whatever layout it chooses."""

import math

import architectures
import pytest
import torch
from flash_stand_in import FLASH, flash_attention
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trl_larpo.training.token_rows import separate_rows

pytestmark = pytest.mark.slow

SHARING = [
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "llama", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
"""What people use; it must not lose its shared prompts unnoticed."""


@pytest.mark.parametrize("model_type", architectures.MODEL_TYPES)
def test_numbers_are_those_of_plain_rows(model_type, tmp_path):
    try:
        with architectures.time_limit(120 if model_type in SHARING else 20):
            outcome = architectures.sweep(model_type, str(tmp_path))
    except (architectures.CannotBeTried, TimeoutError) as error:
        assert model_type not in SHARING, error
        pytest.skip(str(error))
    assert outcome.logps < 1e-4 and outcome.gradients < 1e-3, outcome
    if model_type in SHARING:
        assert all(layout.shares_prompt for layout in outcome.layouts.values()), outcome


LENGTH_DEPENDENT = {
    "dynamic NTK": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
    "LongRoPE": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [2.0, 4.0, 6.0, 8.0],
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 24,
        },
    ),
}


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
@pytest.mark.parametrize("shared_prompt, attn_implementation", [("on", None), ("off", None), ("on", FLASH)])
@flash_attention()
def test_position_embeddings_that_depend_on_the_length(kind, shared_prompt, attn_implementation, tmp_path):
    # The longest sequence is beyond what the embeddings were made for, and single chunks are not
    model_type, rope = LENGTH_DEPENDENT[kind]
    options = {"rope_parameters": rope, "max_position_embeddings": 24, "head_dim": 8, "sliding_window": None}
    if kind == "LongRoPE":
        options |= {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
    batch = architectures.lists_of_tokens()
    expected = architectures.plain_logps(architectures.tiny_model(model_type, **options), batch)
    short = {name: tensor[1:] for name, tensor in batch.items()}
    alone = architectures.plain_logps(architectures.tiny_model(model_type, **options), short)
    assert (alone - expected[1:]).abs().max() > 1e-3  # the length does matter
    for chunk_size, multiple in ((None, None), (1, None), (2, None), (2, 32)):
        scorer = architectures.make_scorer(
            architectures.tiny_model(model_type, attn_implementation, **options),
            str(tmp_path),
            candidate_chunk_size=chunk_size,
            shared_prompt=shared_prompt,
            pad_to_multiple_of=multiple,
        )
        torch.testing.assert_close(scorer(scorer.model, batch).logps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_load_balancing_loss_is_that_of_separate_rows(model_type, tmp_path):
    batch = architectures.lists_of_tokens()
    model = architectures.tiny_model(model_type)
    rows = separate_rows(batch)
    mask = rows.real.long()
    routers = model(input_ids=rows.input_ids, attention_mask=mask, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(tuple(routers), 4, 2, mask)
    for shared_prompt in ("on", "off"):
        for chunk_size in (None, 1, 2, 3):  # with chunks past the end of the shorter list
            model = architectures.tiny_model(model_type)
            scorer = architectures.make_scorer(
                model, str(tmp_path), candidate_chunk_size=chunk_size, shared_prompt=shared_prompt
            )
            aux_loss = scorer(model, batch, router_logits=True).aux_loss
            torch.testing.assert_close(aux_loss, expected, rtol=1e-5, atol=1e-5)
            aux_loss.backward()
            norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            assert norms and all(math.isfinite(norm) for norm in norms)
