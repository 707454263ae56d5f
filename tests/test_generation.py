"""Sampling equals `generate`, ends are told from cut-offs, and impossible requests are refused."""

from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_larpo import ConfigError, LarPOError
from trl_larpo.generation import sampled_tokens
from trl_larpo.generation.continuous_batching import Job, _draw
from trl_larpo.generation.in_process import (
    Sample,
    encode_prompt,
    generate_completions,
    with_half_character,
)
from trl_larpo.generation.sampled_tokens import tokens_beyond_text
from trl_larpo.training.tokenization import tokenize_dataset

PROMPTS = ["a", "the dog runs", [{"role": "user", "content": "why is the cat blue"}], "is"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_pretrained(
        tiny.save_tiny_model(tmp_path_factory.mktemp("m"), initializer_range=1.0)
    )


def plain_generate(model, tokenizer, prompt, **options):
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=tokenizer.pad_token_id, **options
    )
    return tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mistral with a window", "gpt2", "mamba"))],
)
def test_greedy_equals_generate_prompt_by_prompt(tmp_path, architecture):
    # Left padding, the shared prefill and leaving the batch early must not show
    config = {"sliding_window": 8} if architecture == "mistral with a window" else {}
    if architecture == "gpt2":
        config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
    if architecture == "mamba":  # keeps a state, no keys and values
        config = {"state_size": 4}
    folder = tiny.save_tiny_model(tmp_path, architecture.split()[0], **config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.tiny_tokenizer()
    samples = generate_completions(model, tokenizer, PROMPTS, num_samples=1, temperature=0, max_new_tokens=40)
    expected = [plain_generate(model, tokenizer, prompt, max_new_tokens=40) for prompt in PROMPTS]
    assert [sample.text for [sample] in samples] == expected


@pytest.mark.filterwarnings("error::FutureWarning")  # such as a new name of an argument of the model
def test_samples_are_distinct_reproducible_and_leave_the_global_seed_alone(model):
    tokenizer = tiny.tiny_tokenizer()
    options = {"num_samples": 5, "max_new_tokens": 12, "batch_size": 7}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate_completions(model, tokenizer, PROMPTS, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == generate_completions(model, tokenizer, PROMPTS, seed=1, **options)
    assert first != generate_completions(model, tokenizer, PROMPTS, seed=2, **options)
    assert [len(of_prompt) for of_prompt in first] == [5] * 4
    assert all(len({sample.text for sample in of_prompt}) > 1 for of_prompt in first)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_samples_do_not_depend_on_the_batch(tmp_path, architecture):
    config = {"state_size": 4} if architecture == "mamba" else {}
    folder = tiny.save_tiny_model(tmp_path, architecture, **config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.tiny_tokenizer()
    prompts = [*PROMPTS, "a much longer prompt than the others", "why"]
    options = {"num_samples": 5, "temperature": [1.0, 0.0, 0.5, 1.0, 2.0], "max_new_tokens": 30, "top_p": 0.9}
    reference = generate_completions(model, tokenizer, prompts, batch_size=64, **options)
    assert any(not sample.finished for of_prompt in reference for sample in of_prompt)
    for batch_size in (1, 3, 8):
        assert generate_completions(model, tokenizer, prompts, batch_size=batch_size, **options) == reference
    # nor on what else is asked for: names of prompts choose their numbers
    keys = [str(i) for i in range(len(prompts))]
    last = generate_completions(model, tokenizer, prompts[-1:], keys=keys[-1:], **options)
    assert last == reference[-1:]


@pytest.mark.slow
def test_nucleus_sampling_leaves_out_the_tail():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    job = Job([1], [1.0], np.linspace(0, 0.999, 1000)[None, :])
    drawn = [int(_draw(weights, [(job, 0, n)], top_p=0.8)[0]) for n in range(1000)]
    assert Counter(drawn) == {0: pytest.approx(625, abs=2), 1: pytest.approx(375, abs=2)}  # 0.5 and 0.3 of 0.8


def test_ends_are_told_from_cut_offs(model):
    tokenizer = tiny.tiny_tokenizer()
    always_end = model.generation_config.eos_token_id = list(range(len(tokenizer)))
    try:
        samples = generate_completions(model, tokenizer, ["a"], num_samples=3, max_new_tokens=5)
        assert all(sample.finished and sample.num_tokens == 1 and sample.text == "" for sample in samples[0])
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert always_end
    samples = generate_completions(model, tokenizer, ["a"], num_samples=8, max_new_tokens=1)
    assert all(sample.num_tokens == 1 and sample.finished == (sample.text == "") for sample in samples[0])


@pytest.mark.parametrize(
    "prompt", ["the dog", [{"role": "user", "content": "why is the cat blue"}]], ids=["text", "chat"]
)
def test_tokens_are_kept_where_the_text_does_not_give_them_back(prompt):
    tokenizer = tiny.tiny_tokenizer()

    def sample(ids, finished=True):
        text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        return Sample(text, len(ids), finished, ids)

    end = tokenizer.eos_token_id
    if not isinstance(prompt, str):  # what the chat template puts there
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": "x"}], tokenize=True, return_dict=True
        )["input_ids"]
        end = whole[len(encode_prompt(tokenizer, prompt)) + 1]
    usual = tokenizer("blue é", add_special_tokens=False)["input_ids"]
    half = usual[:-1]  # ends within a character
    samples = [
        sample([*usual, end]),
        sample([*half, end]),
        sample([*usual, usual[0]]),  # another end
        sample(usual, finished=False),
        Sample("blue", 5, True),
    ]
    assert tokens_beyond_text(tokenizer, prompt, samples) == [None, [*half, end], [*usual, usual[0]], usual, None]


def word_tokenizer(prepend_scheme):
    """As those of SentencePiece: a word has another token where a space is before it, or the text begins."""
    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz<>/|_\n:"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0), *letters]
    words = [(word, -2.0) for word in ("why", "▁why", "blue", "▁blue", "user", "▁user", "assistant", "assistant\nblue")]
    tokenizer = Tokenizer(models.Unigram(vocabulary + words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=tiny.tiny_tokenizer().chat_template
    )


def kept_the_long_way(tokenizer, prompt, samples):
    """What [`tokens_beyond_text`] returns, from the tokens of the whole text of each sample."""
    kept = []
    for sample in samples:
        if isinstance(prompt, str):
            whole = tokenizer(prompt + sample.text + tokenizer.eos_token)["input_ids"]
        else:
            messages = [*prompt, {"role": "assistant", "content": sample.text}]
            whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        sampled = encode_prompt(tokenizer, prompt) + sample.token_ids
        kept.append(None if sample.finished and whole[: len(sampled)] == sampled else sample.token_ids)
    return kept


TOKENIZERS = {
    "bytes": tiny.tiny_tokenizer,
    "space in front of the text": lambda: word_tokenizer("first"),
    "space in front of each part": lambda: word_tokenizer("always"),
}


@pytest.mark.parametrize("kind", ["conversation", "text", "text with special tokens"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_prompts_are_not_tokenised_with_each_of_their_completions(name, kind, monkeypatch):
    monkeypatch.setattr(sampled_tokens, "_NUM_CHECKED", 1)  # prompts
    tokenizer, texts, lengths = TOKENIZERS[name](), ["blue", " blue", "why blue", "", "<|im_end|>blue", "bl"], []
    call = type(tokenizer).__call__

    def counted(self, text, *arguments, **named):
        lengths.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return call(self, text, *arguments, **named)

    num_given_back = 0
    for number in range(3):
        content = "user why blue " * (400 + number)
        prompt = [{"role": "user", "content": content}]
        if kind != "conversation":
            prompt = content if kind == "text" else f"<|im_start|>{content}<|im_end|>assistant\n"
        start, end = encode_prompt(tokenizer, prompt), [tokenizer.eos_token_id]
        samples = []
        for text in texts:
            whole = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], tokenize=True, return_dict=True
            )["input_ids"] if kind == "conversation" else tokenizer(prompt + text)["input_ids"] + end  # fmt: skip
            alone = tokenizer(text, add_special_tokens=False)["input_ids"] + end
            samples += [Sample(text, 1, True, whole[len(start) :]), Sample(text, 1, True, alone)]
            samples += [Sample(text, 1, False, alone)]
        expected = kept_the_long_way(tokenizer, prompt, samples)
        num_given_back += expected.count(None)
        with monkeypatch.context() as patched:
            patched.setattr(type(tokenizer), "__call__", counted)
            lengths.clear()
            assert tokens_beyond_text(tokenizer, prompt, samples) == expected
        if number and kind != "text":
            assert sum(lengths) < 1000, "the prompt is tokenised"
    assert 0 < num_given_back < 3 * len(samples)


def test_sampled_tokens_are_compared_with_whole_texts_where_parts_differ(monkeypatch):
    tokenizer, prompt = tiny.tiny_tokenizer(), [{"role": "user", "content": "why"}]
    answered = [*prompt, {"role": "assistant", "content": "blue"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)["input_ids"]
    sampled = whole[len(encode_prompt(tokenizer, prompt)) :]
    samples = [Sample("blue", 3, True, sampled), Sample("x", 1, True, [1])]
    monkeypatch.setattr(sampled_tokens, "encode_texts", lambda *arguments, **options: [[1], [2], [3]])  # nonsense
    for _ in range(3):
        assert tokens_beyond_text(tokenizer, prompt, samples) == [None, [1]]


def test_arguments_of_the_chat_template_that_act_on_tokens_are_kept():
    """As `sanitize_control_tokens` of transformers 5, which refuses to give the text alone."""
    tokenizer, options = tiny.tiny_tokenizer(), {"sanitize_control_tokens": True}
    prompt = [{"role": "user", "content": "why<|im_end|>"}]
    answered = [*prompt, {"role": "assistant", "content": "blue"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True, **options)["input_ids"]
    sampled = whole[len(encode_prompt(tokenizer, prompt, options)) :]
    samples = [Sample("blue", 3, True, sampled), Sample("x", 1, True, [1])]
    assert tokens_beyond_text(tokenizer, prompt, samples, options) == [None, [1]]
    row = {"prompt": prompt, "completions": [answered[1:], answered[1:]], "rewards": [1.0, 0.0]}
    row["chat_template_kwargs"] = options
    dataset = tokenize_dataset(
        Dataset.from_list([row]), tokenizer, where="d", eos_token="</s>", max_length=None, truncation_mode="keep_start"
    )
    [completion_ids, _] = dataset[0]["completion_ids"]
    assert dataset[0]["prompt_ids"] + completion_ids == whole


def test_half_a_character_at_the_end_is_part_of_the_text():
    """vLLM leaves it out, and the tokens would be taken for those of another text."""
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("a é", add_special_tokens=False)["input_ids"]

    def text(**values):
        return with_half_character(tokenizer, Sample(num_tokens=3, **values)).text

    assert text(text="a ", finished=False, token_ids=ids[:-1]) == "a \ufffd" == tokenizer.decode(ids[:-1])
    assert text(text="a ", finished=True, token_ids=ids[:-1]) == "a "
    assert text(text="other", finished=False, token_ids=ids) == "other", "tokens of another tokenizer"
    assert text(text="a ", finished=False, token_ids=None) == "a "


def test_sampling_follows_the_model_distribution(model):
    # 4000 first tokens against the softmax: the shared prefill must feed the right logits to every copy
    tokenizer = tiny.tiny_tokenizer()
    prompt = "why is"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(ids).logits[0, -1].softmax(-1)
    samples = generate_completions(model, tokenizer, [prompt], num_samples=4000, max_new_tokens=1, batch_size=4000)
    expected, found = Counter(), Counter()  # by text: several tokens can read the same
    for token, probability in enumerate(probabilities.tolist()):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += probability
    for sample in samples[0]:
        found[sample.text] += 1 / 4000
    assert max(expected.values()) < 0.95
    for text, probability in expected.items():
        assert found[text] == pytest.approx(probability, abs=0.04), repr(text)


def test_model_mode_is_restored(model):
    model.train()
    generate_completions(model, tiny.tiny_tokenizer(), ["a b"], num_samples=1, max_new_tokens=2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"num_samples": 2, "temperature": 0}, "`temperature=0` decodes greedily, so all 2 samples"),
        ({"num_samples": 2, "temperature": -1.0}, "`temperature` is -1.0"),
        ({"num_samples": 2, "temperature": float("inf")}, "`temperature` is inf, with which"),
        ({"num_samples": 2, "temperature": [1.0]}, "`temperature` has 1 numbers for 2 samples"),
        ({"num_samples": 2, "top_p": 1.5}, "`top_p` is 1.5"),
        ({"num_samples": 2, "max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_impossible_requests_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        generate_completions(model, tiny.tiny_tokenizer(), ["a"], **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("architecture, options", [
    ("llama", {"temperature": 1.0}), ("llama", {"temperature": 1.0, "top_p": 0.9}), ("llama", {"temperature": 0.0}),
    ("mamba", {"temperature": 1.0}),
])  # fmt: skip
def test_logits_that_are_not_finite_are_said_to_be(tmp_path, architecture, options, value):
    """As of a model in float16 whose numbers are too large for it, from its third token on."""
    config = {"state_size": 4} if architecture == "mamba" else {}
    model = AutoModelForCausalLM.from_pretrained(tiny.save_tiny_model(tmp_path, architecture, **config))
    forward, calls = model.forward, []

    def overflows(*arguments, **named):
        output = forward(*arguments, **named)
        calls.append(1)
        if len(calls) > 2:
            output.logits[0] = value
        return output

    model.forward = overflows
    with pytest.raises(LarPOError, match=r"are NaN or infinite in float32\. If .*`generation_dtype: float32`"):
        generate_completions(model, tiny.tiny_tokenizer(), ["a", "the dog"], num_samples=1, **options)
    assert len(calls) > 2
