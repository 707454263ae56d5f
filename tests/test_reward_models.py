"""Reward models: a reward depends on the prompt and its completion, and on nothing else in the batch."""

import logging
import weakref

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from trl_larpo import ConfigError
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.rewards.reward_models import RewardModel
from trl_larpo.rewards.scorer import RewardScorer
from trl_larpo.run.small import save_small_reward_model


def save_reward_model(folder, model_type="llama", num_labels=1, chat_template=True, pad_is_eos=False, **config):
    """Random weights of a sequence classifier, with a tokenizer beside them."""
    tokenizer = tiny.tiny_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    if not chat_template:
        tokenizer.chat_template = None
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_labels": num_labels, "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **(settings | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


PROMPTS = ["why is the dog blue", "a", "is the cat green", "the dog"]
COMPLETIONS = [" because", " it runs and runs and runs", "", " no<|im_end|>"]


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own pad", "pad is eos"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_rewards_are_those_of_one_at_a_time(tmp_path, model_type, pad_is_eos):
    path = save_reward_model(tmp_path, model_type, pad_is_eos=pad_is_eos)
    model = RewardModel(path, batch_size=3, device="cpu")
    alone = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([model.tokenizer(prompt + completion)["input_ids"]])
        bare = AutoModelForSequenceClassification.from_pretrained(path)
        bare.config.pad_token_id = 7  # a letter that does not occur: nothing here is padding
        with torch.no_grad():
            alone.append(bare(ids).logits.item())
    assert len({round(x, 3) for x in alone}) == 4
    assert model(PROMPTS, COMPLETIONS) == pytest.approx(alone, abs=1e-4)
    assert model(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(alone[::-1], abs=1e-4)


def test_conversations_go_through_its_own_template_with_one_bos(tmp_path):
    path = save_reward_model(tmp_path)
    model = RewardModel(path, device="cpu")
    prompt, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "no"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    assert model.tokenizer.decode(model._encode(prompt, completion)) == text
    model.tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    assert model.tokenizer.decode(model._encode(prompt, completion)) == "<|im_start|>hi"


def test_fsfairx_reads_llama_3s_format_with_one_bos(tmp_path):
    """FsfairX-LLaMA3-RM: its card renders the conversation, takes the BOS out and lets the tokenizer add it again."""
    model = RewardModel(save_small_reward_model(tmp_path), device="cpu")
    prompt = [{"role": "user", "content": "hi "}]
    ids = model._encode(prompt, [{"role": "assistant", "content": " no\n"}])
    assert model.tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    )
    with torch.no_grad():
        expected = model.model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits.item()
    completions = [[{"role": "assistant", "content": t}] for t in (" no\n", "yes and longer")]
    [reward, _] = model(prompts=[prompt, prompt], completions=completions, self=[1, 1])  # a column of the user's
    assert reward == pytest.approx(expected, abs=1e-5)


def test_a_model_whose_rewards_depend_on_padding_is_refused(tmp_path):
    model = RewardModel(save_reward_model(tmp_path), device="cpu")
    forward = model.model.forward

    def without_mask(input_ids, attention_mask):  # looks at the last column, be it padding or not
        model.model.config.pad_token_id = 255
        return forward(input_ids=input_ids)

    model.model.forward = without_mask
    with pytest.raises(ConfigError, match=r"cannot be trusted: it gives a completion .* alone and .* in one batch"):
        model(PROMPTS, COMPLETIONS)


def test_a_refused_model_ends_the_stage(tmp_path, monkeypatch):
    """Prompt by prompt it would pass sooner or later, and then reward all others."""

    def score(model, sequences, **settings):  # right for completions of one length
        longest = max(map(len, sequences))
        return [float(len(ids) - 10 * (len(ids) < longest)) for ids in sequences]

    monkeypatch.setattr(RewardModel, "_score", score)
    options = RewardOptions(reward_funcs=[save_reward_model(tmp_path / "model")])
    pools = [
        CandidatePool(Prompt.of(str(i)), [Candidate("aa"), Candidate("aa" if i == 2 else "aaaa")]) for i in range(9)
    ]
    with pytest.raises(ConfigError, match="cannot be trusted"):
        RewardScorer(options, use_cpu=True).score(pools, tmp_path / "rewarded.jsonl")


@pytest.mark.parametrize("spread, trusted", [(8.0, True), (0.5, False)])
def test_rounding_is_measured_against_the_spread_of_rewards(tmp_path, monkeypatch, spread, trusted):
    """In bfloat16 a batch may change a reward by 0.2: nothing beside rewards from -4 to 4, much beside 0 to 0.5."""
    model = RewardModel(save_reward_model(tmp_path), device="cpu", dtype="bfloat16")

    def score(sequences, **settings):
        longest = max(map(len, sequences))
        return [spread * (len(ids) / 40 - 0.5) + (0.2 if len(ids) < longest else 0.0) for ids in sequences]

    monkeypatch.setattr(model, "_score", score)
    completions = ["x" * length for length in range(1, 41)]
    if trusted:
        assert len(model([""] * 40, completions)) == 40
    else:
        with pytest.raises(
            ConfigError, match=r"in one batch, where completions differ by 0\.\d+\. Set `reward_dtype: float32`"
        ):
            model([""] * 40, completions)


class Activations:
    """What a call that runs out of memory has allocated."""


def test_out_of_memory_it_goes_on_with_half_the_batch(tmp_path, monkeypatch, caplog):
    model = RewardModel(save_reward_model(tmp_path), device="cpu", batch_size=4)
    expected, forward, sizes, failed = model(PROMPTS, COMPLETIONS), model.model.forward, [], []

    def limited(input_ids, **arguments):
        sizes.append(len(input_ids))
        assert all(reference() is None for reference in failed), "its memory is free when the next call begins"
        if len(input_ids) > fits:
            held = Activations()
            failed.append(weakref.ref(held))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model.model, "forward", limited)
    fits = 1
    assert model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert sizes == [4, 2, 1, 1, 1, 1] and "from now on `reward_batch_size` is 1" in caplog.text
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        model(PROMPTS, COMPLETIONS)


def test_what_a_failed_call_had_allocated_is_free_when_prompts_are_scored_one_by_one(tmp_path, monkeypatch):
    failed, options = [], RewardOptions(reward_funcs=[save_reward_model(tmp_path / "model")])

    def score(model, prompts, completions, **columns):
        assert all(reference() is None for reference in failed)
        if len(prompts) > 1:
            held = Activations()
            failed.append(weakref.ref(held))
            raise torch.OutOfMemoryError
        return [1.0]

    monkeypatch.setattr(RewardModel, "__call__", score)
    pools = [CandidatePool(Prompt.of(str(i)), [Candidate("a")]) for i in range(3)]
    scored = RewardScorer(options, use_cpu=True).score(pools, tmp_path / "rewarded.jsonl")
    assert [c.reward for pool in scored for c in pool.candidates] == [1.0] * 3 and failed


def test_an_empty_system_turn_is_the_policys_alone(tmp_path):
    model = RewardModel(save_reward_model(tmp_path), device="cpu")
    user, completion = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "no"}]
    said = [{"role": "system", "content": "Be brief."}]
    assert model._encode([{"role": "system", "content": ""}, *user], completion) == model._encode(user, completion)
    assert model._encode([*said, *user], completion) != model._encode(user, completion)


def test_long_texts_lose_their_start_and_it_is_said_once(tmp_path, caplog):
    model = RewardModel(save_reward_model(tmp_path), device="cpu", max_length=6)
    with caplog.at_level(logging.WARNING, logger="trl_larpo.rewards.reward_models"):
        model(PROMPTS, COMPLETIONS)
    assert model.tokenizer.decode(model._encode("abcdef", "gh")) == "cdefgh"
    assert caplog.text.count("is cut off. Said once.") == 1


@pytest.mark.parametrize("kind", ["no tokenizer", "two labels", "no head", "no model", "no chat template"])
def test_what_is_no_reward_model_is_named(tmp_path, kind):
    message = {
        "no tokenizer": "The tokenizer of the reward model .* Save the one it was trained with",
        "two labels": "has 2 labels; a reward has 1",
        "no head": "is no trained reward model: it has no weights for score.weight",
        "no model": "cannot be loaded",
        "no chat template": "has no chat template, but the prompts are conversations",
    }[kind]
    if kind == "no head":
        path = tiny.save_tiny_model(tmp_path)
    elif kind == "no model":
        path = str(tmp_path)
    else:
        path = save_reward_model(
            tmp_path, num_labels=2 if kind == "two labels" else 1, chat_template=kind != "no chat template"
        )
    if kind == "no tokenizer":
        for file in tmp_path.glob("*token*"):
            file.unlink()
    with pytest.raises(ConfigError, match=message):
        RewardModel(path, device="cpu")([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])
