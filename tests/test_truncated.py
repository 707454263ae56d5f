"""Completions that were cut off train on exactly what was sampled: no end token, nothing that a template appends."""

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from trl_larpo import ConfigError, DataError, LarPOConfig
from trl_larpo.training.tokenization import tokenize_dataset
from trl_larpo.training.validation import canonical_row, check_dataset

# As the models' own templates write a conversation, reduced to what this is about: what stands after a message
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "text after the end token": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + ' [rate this answer]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "no end token": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
USER = [{"role": "user", "content": "why"}]
PartialState()  # which logging needs
CUT = "It ends in the mid"


def say(text):
    return [{"role": "assistant", "content": text}]


def row(completions, finished, prompt=USER, **columns):
    return {"prompt": prompt, "completions": completions, "finished": finished} | columns


def tokenized(rows, template=None, **options):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    settings = {"where": "rows", "eos_token": tokenizer.eos_token, "max_length": None, "truncation_mode": "keep_start"}
    dataset = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    return list(tokenize_dataset(dataset, tokenizer, **(settings | options))), tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", [CUT, CUT + " ", CUT + "\n\n", "m", "assistant", "ENDOFCONTENT x"])
def test_messages_end_where_the_sample_did(name, text):
    [found], tokenizer = tokenized([row([say("Yes."), say(text)], [True, False])], TEMPLATES[name])
    ended, cut = found["completion_ids"]
    space = " " if name == "mistral" else ""  # stands in the template, in front of the completion
    assert cut == tokenizer(space + text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in cut
    # A finished one is what it always was
    whole = tokenizer.apply_chat_template(USER + say("Yes."), tokenize=True, return_dict=True)["input_ids"]
    assert found["prompt_ids"] + ended == whole


@pytest.mark.parametrize("text", [CUT, CUT + tiny.EOS, " " + CUT + " "])
def test_strings_end_where_the_sample_did(text):
    [found], tokenizer = tokenized([row([" Yes.", text], [True, False], prompt="why")])
    assert found["completion_ids"][0] == tokenizer(" Yes." + tiny.EOS)["input_ids"]
    assert found["completion_ids"][1] == tokenizer(text.removesuffix(tiny.EOS))["input_ids"]


def test_tokens_are_those_that_were_sampled():
    tokenizer = tiny.tiny_tokenizer()
    half = tokenizer("so é", add_special_tokens=False)["input_ids"][:-1]  # ends within a character
    text = tokenizer.decode(half, skip_special_tokens=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] != half
    for prompt, wrap in ((USER, say), ("why", str)):
        rows = [row([wrap("Yes."), wrap(text)], [True, False], prompt, completion_ids=[None, half])]
        [found], _ = tokenized(rows)
        assert found["completion_ids"][1] == half
        [with_end], _ = tokenized([rows[0] | {"completion_ids": [None, [*half, tokenizer.eos_token_id]]}])
        assert with_end["completion_ids"][1] == half


@pytest.mark.parametrize("end", ["end of sequence", "another end"])
def test_tokens_of_a_completion_that_ended_are_those_that_were_sampled(end):
    tokenizer = tiny.tiny_tokenizer()
    end_id = tokenizer.eos_token_id if end == "end of sequence" else tokenizer("z")["input_ids"][0]
    half = tokenizer("so é", add_special_tokens=False)["input_ids"][:-1]  # which no text gives back
    text, ids = tokenizer.decode(half, skip_special_tokens=True), [*half, end_id]
    for prompt, wrap in ((USER, say), ("why", str)):
        [found], _ = tokenized([row([wrap("Yes."), wrap(text)], [True, True], prompt, completion_ids=[None, ids])])
        assert found["completion_ids"][1] == ids
        assert found["completion_ids"][0][: len(tokenizer("Yes.")["input_ids"])] == tokenizer("Yes.")["input_ids"]


def test_tokens_of_another_tokenizer_are_not_taken(caplog):
    rows = [row([say("Yes."), say(CUT)], [True, False], completion_ids=[None, [1, 2, 9_999]])]
    [found], tokenizer = tokenized(rows)
    assert found["completion_ids"][1] == tokenizer(CUT)["input_ids"]
    assert "entry 1 does not hold the tokens of the completion with this tokenizer" in caplog.text


@pytest.mark.parametrize("has_column", [True, False])
def test_sampled_tokens_that_count_as_finished_without_an_end_token_are_told(caplog, has_column):
    tokenizer = tiny.tiny_tokenizer()
    ids, other_end = tokenizer(CUT)["input_ids"], tokenizer("z")["input_ids"]

    def said(of_cut, is_finished=True):
        caplog.clear()
        columns = {"completion_ids": [None, of_cut]} | ({"finished": [True, is_finished]} if has_column else {})
        rows = [{"prompt": USER, "completions": [say("Yes."), say(CUT)]} | columns] * 3
        with caplog.at_level("WARNING", logger="trl_larpo"):
            found, _ = tokenized(rows)
        assert [row["completion_ids"][1] for row in found] == [of_cut] * 3
        return [record.message for record in caplog.records]

    [text] = said(ids)
    assert "rows row 0, column `completion_ids`: entry 1 has no end token, but counts as finished" in text
    assert not said([*ids, tokenizer.eos_token_id]) and not said(ids + other_end)
    if has_column:
        assert not said(ids, is_finished=False)


def relevance(rewards, finished, mode="rank_last"):
    completions = [f" {i}" for i in range(len(finished))]
    ranked = canonical_row(row(completions, finished, "p", rewards=rewards), 0, "rows", mode)
    return ranked["relevance"]


def test_relevance_of_each_mode():
    assert relevance([1.0, 9.0, 3.0, 5.0], [True, False, True, False]) == [1.0, -1.0, 3.0, -1.0]  # one step below
    assert relevance([1.0, None, 2.0, 4.0], [True, False, True, True]) == [1.0, -0.5, 2.0, 4.0]
    assert relevance([2.0, 9.0], [True, False]) == [2.0, 1.0]
    assert relevance([1.0, 2.0], [False, False]) == [-1.0, -1.0]  # a tie, and so without effect
    assert relevance([1e30, 9.0], [True, False])[1] < 1e30
    for reward in (1e30, -1e9, 1e-40, -3.2e32):  # below it in float32, too, as batches hold it
        worst, last = torch.tensor(relevance([reward, 9.0], [True, False]))
        assert last < worst and last.isfinite()
    assert relevance([3e32, -3e32, 9.0], [True, True, False])[2] < torch.tensor(-3e32)
    assert relevance([1.0, 9.0], [True, False], "by_reward") == [1.0, 9.0]
    assert relevance([1.0, 9.0, 3.0], [True, False, True], "drop") == [1.0, 3.0]
    best_first = row([" a", " b", " c"], [False, True, True], "p")
    assert canonical_row(best_first, 0, "rows")["relevance"] == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("streamed", [False, True])
def test_dropping_leaves_no_trace_of_them(streamed, caplog):
    rows = [
        row([" a", " bb", " c"], [True, False, True], "p", rewards=[1.0, None, 2.0], ref_logps=[-1.0, -2.0, -3.0]),
        row([" a", " b", " c"], [True, False, False], "q", rewards=[1.0, 2.0, 3.0], ref_logps=[-1.0, -2.0, -3.0]),
    ]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else rows
    [found], _ = tokenized(data, truncated_completions="drop")
    assert len(found["completion_ids"]) == 2
    assert found["relevance"] == [1.0, 2.0] and found["ref_logps"] == [-1.0, -3.0]
    with pytest.raises(DataError, match="no list is left, because fewer than 2 of their completions are finished"):
        tokenized(rows[1:], truncated_completions="drop")


def test_bad_columns_are_named():
    good = row([" a", " b"], [True, False], "p")
    for change, message in (
        ({"finished": [True]}, r"column `finished`: is \[True\]; give true or false for each of the 2"),
        ({"finished": [True, 1]}, "column `finished`: entry 1 is 1; give true or false"),
        ({"completion_ids": [[1]]}, "column `completion_ids`: does not have an entry for each of the 2"),
        ({"completion_ids": [None, [-1]]}, r"column `completion_ids`: entry 1 is \[-1\]; give a list of token ids"),
        ({"completion_ids": ["", "1 b"]}, "column `completion_ids`: entry 1 is '1 b'; give a list of token ids"),
        ({"completion_ids": [None, [True]]}, r"column `completion_ids`: entry 1 is \[True\]; give a list of token ids"),
        ({"completion_ids": [12, 99]}, r"rows row 3, column `completion_ids`: entry 0 is 12; give a list of token ids"),
        ({"completion_ids": [None, 0.5]}, r"column `completion_ids`: entry 1 is 0.5; give a list of token ids"),
    ):
        with pytest.raises(DataError, match=message):
            canonical_row(good | change, 3, "rows")
    with pytest.raises(DataError, match="entry 1 is None, not a number"):
        relevance([1.0, None], [True, False], "by_reward")
    with pytest.raises(DataError, match="the rendered chat template"):
        tokenized([row([say("a"), say("b")], [True, False])], "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ConfigError, match="`truncated_completions` is 'keep'"):
        LarPOConfig("out", truncated_completions="keep", use_cpu=True)


def test_they_are_counted():
    rows = [row([" a", " b", " c"], [True, False, False], "p", rewards=[1.0, 1.0, 1.0])] * 3
    summary = check_dataset(Dataset.from_list(rows), "rows")
    assert (summary.num_truncated, summary.num_tied) == (6, 0)
    assert check_dataset(Dataset.from_list(rows), "rows", "by_reward").num_tied == 3


@pytest.mark.slow
def test_training_raises_the_probability_of_ending(trained, tiny_model):
    """The same texts, of which the second was cut off: the probability of an end token rises only where it was not."""
    rows = [row([say("yes yes"), say("no no no")], [True, False], rewards=[1.0, 0.0])] * 8
    options = {"max_steps": 8, "learning_rate": 1e-2}
    accuracies = {}
    for name, dataset in (("cut off", rows), ("as if it had ended", [x | {"finished": [True, True]} for x in rows])):
        trainer = trained(Dataset.from_list(dataset), options)
        accuracies[name] = end_probability(trainer)
    assert accuracies["cut off"] > 2 * accuracies["as if it had ended"]


def end_probability(trainer):
    tokenizer = trainer.processing_class
    text = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) + "no no no"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return trainer.model(ids).logits[0, -1].softmax(-1)[tokenizer.eos_token_id].item()


# Beginnings of answers, and tokenizers with habits


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_beginning_of_an_answer_is_continued(name):
    prompt = [*USER, *say("Because the")]
    [found], tokenizer = tokenized([{"prompt": prompt, "completions": [say(" sky"), say(" sea is")]}], TEMPLATES[name])
    assert tokenizer.decode(found["prompt_ids"]).endswith("Because the")
    for text, ids in zip((" sky", " sea is"), found["completion_ids"], strict=True):  # as if it had been said at once
        whole = tokenizer.apply_chat_template([*USER, *say("Because the" + text)], tokenize=False)
        assert tokenizer.decode(found["prompt_ids"] + ids) == whole


def test_samples_follow_the_generation_prompt_that_they_were_sampled_after(caplog):
    prompt = [*USER, *say("Because the")]
    [found], tokenizer = tokenized([row([say("sky"), say("sea")], [True, True], prompt)], TEMPLATES["chatml"])
    [said] = [record.message for record in caplog.records]
    assert "rows row 0, column `prompt`: ends with a message of the assistant" in said and "without `finished`" in said
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(found["prompt_ids"]) == asked


def test_a_tokenizer_that_adds_an_end_token_itself_adds_no_second_one(monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    plain = tokenizer("why, blue", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    call = type(tokenizer).__call__

    def with_end_token(self, text, *args, **kwargs):
        output = call(self, text, *args, **kwargs)
        output["input_ids"] = output["input_ids"] + [eos]
        return output

    monkeypatch.setattr(type(tokenizer), "__call__", with_end_token)
    rows = [{"prompt": "why", "completions": [", blue", ", green"], "finished": [True, False]}]
    settings = {"where": "rows", "eos_token": tokenizer.eos_token, "max_length": None, "truncation_mode": "keep_start"}
    [found] = list(tokenize_dataset(Dataset.from_list(rows), tokenizer, **settings))
    assert found["prompt_ids"] + found["completion_ids"][0] == [*plain, eos]
    assert found["prompt_ids"] == plain[:3] and eos not in found["completion_ids"][1]


def test_what_is_said_once_is_said_once_a_data_set(caplog):
    rows = [row([say("a"), say("b")], [True, True], completion_ids=[[1], [2]]) for _ in range(30)]
    with caplog.at_level("WARNING", logger="trl_larpo"):
        tokenized(rows)
        tokenized(rows[:20])
    said = [record.message for record in caplog.records if "does not hold the tokens" in record.message]
    assert len(said) == 2 and all("row 0" in text for text in said)
