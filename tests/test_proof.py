"""Layouts are measured on the model: right ones pass in any precision, wrong ones are found and named."""

import functools

import architectures
import lanes
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trl_larpo import ConfigError, LarPOTrainer
from trl_larpo.training import attention
from trl_larpo.training.head import OutputHead
from trl_larpo.training.passes import Layout, whole_pass
from trl_larpo.training.token_rows import Rows

DTYPES = [torch.float32, torch.bfloat16]


def scorer_of(tmp_path, dtype=torch.float32, **options):
    return architectures.make_scorer(architectures.tiny_model("llama").to(dtype), str(tmp_path), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chunk_size, layout", [(None, Layout.SPLIT), (1, Layout.PROMPT_FIRST), (3, Layout.PROMPT_FIRST)]
)
def test_the_best_layout_is_chosen_where_it_is_right(tmp_path, dtype, chunk_size, layout, caplog):
    with caplog.at_level("INFO", logger="trl_larpo"):
        assert scorer_of(tmp_path, dtype, candidate_chunk_size=chunk_size).layout is layout
    assert "Checked on this model: log-probabilities differ by" in caplog.text
    assert "gradients by" in caplog.text


def see_everything(monkeypatch):
    """Masks that let candidates see one another."""

    def visible(rows: Rows, window=None, prompt_real=None):
        index = torch.arange(rows.input_ids.size(1))
        seen = (index[:, None] >= index).expand(len(rows.real), -1, -1)
        if prompt_real is None:
            return seen
        return torch.cat([prompt_real[:, None, :].expand(-1, seen.size(1), -1), seen], dim=2)

    monkeypatch.setattr(attention, "visible", visible)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", lanes.some_are_fast([None, 2], {2}))
def test_a_wrong_mask_is_found(tmp_path, dtype, chunk_size, monkeypatch, caplog):
    see_everything(monkeypatch)
    monkeypatch.setattr("trl_larpo.training.scorer.splits_rows", lambda model: False)
    with caplog.at_level("WARNING", logger="trl_larpo"):
        scorer = scorer_of(tmp_path, dtype, candidate_chunk_size=chunk_size)
    assert scorer.layout is Layout.SEPARATE
    [said] = [record.message for record in caplog.records if "a row for each completion" in record.message]
    assert "because LlamaForCausalLM does not give the same numbers otherwise: log-probabilities differ by" in said
    batch = architectures.lists_of_tokens()
    expected = architectures.plain_logps(scorer.model, batch)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(scorer(scorer.model, batch).logps.float(), expected, **tolerance)
    with pytest.raises(
        ConfigError, match="`shared_prompt='on'` is not possible, because LlamaForCausalLM does not give"
    ):
        scorer_of(tmp_path, dtype, candidate_chunk_size=chunk_size, shared_prompt="on")


def test_wrong_gradients_alone_are_found(tmp_path, monkeypatch):
    def cut(states):
        return states.detach()

    inner = attention._attend_in_parts
    monkeypatch.setattr(
        attention,
        "_attend_in_parts",
        lambda module, query, key, value, *args, **kwargs: inner(module, query, cut(key), value, *args, **kwargs),
    )
    assert scorer_of(tmp_path).layout is Layout.SHARED  # the next best


@pytest.mark.parametrize("replace", [lambda other: other.forward, lambda other: lambda **named: other(**named)])
def test_a_forward_of_another_model_is_refused(tmp_path, replace):
    model, other = architectures.tiny_model("llama"), architectures.tiny_model("llama")
    model.forward = replace(other)
    with pytest.raises(ConfigError, match="`forward` of this LlamaForCausalLM was replaced, and calls another model"):
        architectures.make_scorer(model, str(tmp_path))


def test_a_model_that_looks_its_embeddings_up_by_itself_gets_separate_rows(tmp_path, caplog):
    model = architectures.tiny_model("llama")
    forward, weight = model.forward, model.get_input_embeddings().weight

    def looks_up(input_ids=None, **named):
        return forward(inputs_embeds=torch.nn.functional.embedding(input_ids, weight), **named)

    model.forward = looks_up
    with caplog.at_level("WARNING", logger="trl_larpo"):
        assert architectures.make_scorer(model, str(tmp_path)).layout is Layout.SEPARATE
    assert "does not call its layer of input embeddings" in caplog.text


def test_what_raises_steps_aside(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise TypeError("unexpected argument 'split'")

    monkeypatch.setattr(attention, "_attend_in_parts", refuse)
    assert scorer_of(tmp_path).layout is Layout.SHARED
    monkeypatch.setattr(attention, "visible", refuse)
    with caplog.at_level("WARNING", logger="trl_larpo"):
        assert scorer_of(tmp_path).layout is Layout.SEPARATE
    assert "it raises TypeError: unexpected argument 'split'" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_is_not_linear_is_found(tmp_path, dtype, monkeypatch, caplog):
    with caplog.at_level("INFO", logger="trl_larpo"):
        scorer = architectures.make_scorer(architectures.tiny_model("bert").to(dtype), str(tmp_path))
    assert scorer._head == OutputHead(linear=False)  # a dense layer and a norm come first
    assert "whole logits are worked out" in caplog.text
    assert scorer_of(tmp_path, dtype)._head.linear


def test_the_model_is_as_it_was_afterwards(tmp_path):
    model = architectures.tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    architectures.make_scorer(model, str(tmp_path))
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_calls_without_passes_are_the_models_own(tmp_path):
    model = architectures.tiny_model("llama")
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        architectures.make_scorer(model, str(tmp_path))
        assert model(ids).logits.equal(before)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 18)


def test_nan_gradients_are_found(tmp_path, monkeypatch):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    inner = attention._attend_in_parts
    monkeypatch.setattr(attention, "_attend_in_parts", lambda *args, **kwargs: Spoilt.apply(inner(*args, **kwargs)))
    assert scorer_of(tmp_path).layout is Layout.SHARED


def test_a_reference_under_autocast_has_the_layout_of_the_policy(tiny_model, config):
    trainer = LarPOTrainer(model=tiny_model, args=config(bf16=True), train_dataset=tiny.lists())
    assert trainer._policy_scorer.layout is trainer._reference_scorer.layout is Layout.SPLIT
    assert trainer._policy_scorer._head.linear and trainer._reference_scorer._head.linear
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["scores"].abs().max() < 0.05  # the policy is the reference, but for rounding


def test_layers_that_round_more_than_the_embeddings_say(tmp_path):
    # As with 4-bit weights that compute in bfloat16: rounding is not taken for a wrong layout
    model = architectures.tiny_model("llama", num_hidden_layers=6)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(in_bfloat16, module)
    scorer = architectures.make_scorer(model, str(tmp_path))
    assert scorer._head.linear and scorer.layout.shares_prompt


def in_bfloat16(module, x):
    return torch.nn.functional.linear(x.bfloat16(), module.weight.bfloat16()).float()


def test_rows_are_laid_out_once_for_policy_and_reference(tiny_model, config, monkeypatch):
    laid_out = []

    def counted(*args, **kwargs):
        laid_out.append(args[0])
        return whole_pass(*args, **kwargs)

    monkeypatch.setattr("trl_larpo.training.scorer.whole_pass", counted)
    losses = {}
    for same in (True, False):
        reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa" if same else "eager")
        trainer = LarPOTrainer(
            model=tiny_model, ref_model=reference, args=config(shared_prompt="on"), train_dataset=tiny.lists()
        )
        batches = [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in ((0, 1), (2, 3), (0, 1))]
        laid_out.clear()
        losses[same] = [trainer.compute_loss(trainer.model, batch).item() for batch in batches]
        assert len(laid_out) == (4 if same else 6)  # the first batch tells that there is a reference
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
