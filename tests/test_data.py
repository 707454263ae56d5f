"""Bad input is named before anything else happens; good input becomes the tokens that DPOTrainer would see."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer

from trl_larpo import ConfigError, DataError, LarPOTrainer
from trl_larpo.training import datasets as datasets_module
from trl_larpo.training import tokenization
from trl_larpo.training.datasets import dataset_on_disk, load_splits
from trl_larpo.training.tokenization import tokenize_dataset
from trl_larpo.training.validation import canonical_row, check_dataset, dataset_format

GOOD = {"prompt": "p", "completions": [" a", " b"], "rewards": [1.0, 0.0]}
USER = [{"role": "user", "content": "p"}]


def say(text, role="assistant"):
    return [{"role": role, "content": text}]


def nested(row):
    """A row as JSON: the only way that mixed types get into a table."""
    return json.loads(json.dumps(row))


# One bad row each: what is wrong, the column that must be named, a piece of the fix
BAD_ROWS = {
    "completions a string": ({"completions": "just one text"}, "completions", "is a string; give a list"),
    "completions a number": ({"completions": 3}, "completions", "of type int; give a list"),
    "completions None": ({"completions": None}, "completions", "of type NoneType; give a list"),
    "no completion": ({"completions": [], "rewards": []}, "completions", "has 0 of the 2 entries"),
    "one completion": ({"completions": [" a"], "rewards": [1.0]}, "completions", "has 1 of the 2 entries"),
    "completion None": ({"completions": [" a", None]}, "completions", "entry 1 is None; remove it"),
    "completion empty": ({"completions": ["", " b"]}, "completions", "entry 0 is empty; remove it"),
    "completion of blanks": ({"completions": [" a", " \n"]}, "completions", "entry 1 is empty; remove it"),
    "completion a number": ({"completions": [" a", 5]}, "completions", "entry 1 is of type int"),
    "completion a dict": ({"completions": [{"response": "x"}, " b"]}, "completions", "keys 'response'; give its text"),
    "messages in a text prompt": ({"completions": [" a", say("b")]}, "completions", "entry 1 is a list of messages"),
    "rewards too short": ({"rewards": [1.0]}, "rewards", "has 1 numbers for 2 completions"),
    "rewards too long": ({"rewards": [1.0, 2.0, 3.0]}, "rewards", "has 3 numbers for 2 completions"),
    "rewards None": ({"rewards": None}, "rewards", "is None; give one number per completion"),
    "rewards a number": ({"rewards": 1.0}, "rewards", "is of type float; give one number per completion"),
    "reward None": ({"rewards": [1.0, None]}, "rewards", "entry 1 is None, not a number"),
    "reward a string": ({"rewards": ["high", 0.0]}, "rewards", "entry 0 is 'high', not a number"),
    "reward NaN": ({"rewards": [1.0, math.nan]}, "rewards", "entry 1 is nan; give a finite number"),
    "reward infinite": ({"rewards": [-math.inf, 1.0]}, "rewards", "entry 0 is -inf; give a finite number"),
    "reward beyond float32": ({"rewards": [1.0, -1e39]}, "rewards", "entry 1 is beyond 3.25e"),
    "prompt empty": ({"prompt": ""}, "prompt", "is empty; remove the row or fill it"),
    "prompt None": ({"prompt": None}, "prompt", "is None; give a string or a list of messages"),
    "prompt a number": ({"prompt": 7}, "prompt", "is of type int"),
    "prompt without messages": ({"prompt": []}, "prompt", "is an empty list of messages"),
    "prompt of empty messages": ({"prompt": say("", "user")}, "prompt", "no message has any content"),
    "prompt of strings": ({"prompt": ["p"]}, "prompt", "which is no message"),
    "unknown role in prompt": ({"prompt": say("p", "usr")}, "prompt", "unknown role 'usr'; use one of"),
    "text in a conversation": ({"prompt": USER, "completions": [say("a"), "b"]}, "completions", "entry 1 is a string"),
    "message not in a list": (
        {"prompt": USER, "completions": [say("a"), say("b")[0]]},
        "completions",
        "entry 1 is a single object",
    ),
    "empty message": ({"prompt": USER, "completions": [say("a"), say("")]}, "completions", "entry 1 is empty"),
    "no messages": ({"prompt": USER, "completions": [say("a"), []]}, "completions", "entry 1 is an empty list"),
    "unknown role": (
        {"prompt": USER, "completions": [say("a"), say("b", "bot")]},
        "completions",
        "entry 1 has a message of the unknown role 'bot'",
    ),
    "message without role": (
        {"prompt": USER, "completions": [say("a"), [{"content": "b"}]]},
        "completions",
        "which is no message",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_in_one_line_before_the_model_is_loaded(config, tmp_path, name):
    change, column, fix = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, GOOD, GOOD | change, GOOD]))
    dataset = load_splits(str(path))["train"]
    with pytest.raises(DataError) as error:
        LarPOTrainer(model="/no/such/model", args=config(), train_dataset=dataset)
    assert str(error.value).startswith(f"train_dataset row 2, column `{column}`: ")
    assert fix in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_of_a_stream_is_named_as_well(name):
    change, column, fix = BAD_ROWS[name]
    stream = IterableDataset.from_generator(lambda: iter([GOOD, GOOD | change]))
    with pytest.raises(DataError, match=f"rows row 1, column `{column}`") as error:
        check_dataset(stream, "rows")
    assert fix in str(error.value)


BAD_COLUMNS = {
    "no completions": ([{"prompt": "p", "rewards": [1.0]}], "no column `completions`; add `prompt` and `completions`"),
    "responses": ([{"prompt": "p", "responses": ["a", "b"]}], r"rename_column\('responses', 'completions'\)"),
    "no prompt": ([{"completions": ["a", "b"]}], "has the column `completions` but no column `prompt`"),
    "both formats": ([GOOD | {"chosen": "a", "rejected": "b"}], "keep one of the two"),
    "chosen alone": ([{"prompt": "p", "chosen": "a"}], "no column `completions`"),
    "no rows": ([], "is empty; give at least one row"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_missing_columns_are_named(config, name):
    rows, message = BAD_COLUMNS[name]
    with pytest.raises(DataError, match=f"train_dataset .*{message}"):
        LarPOTrainer(model="/no/such/model", args=config(), train_dataset=Dataset.from_list(rows))


def test_evaluation_sets_are_checked_by_name(config):
    bad = Dataset.from_list([GOOD | {"rewards": [1.0]}])
    with pytest.raises(DataError, match=r"eval_dataset\['hard'\] row 0, column `rewards`"):
        LarPOTrainer(model="/no/such/model", args=config(), train_dataset=tiny.lists(), eval_dataset={"hard": bad})


def test_one_bad_row_among_many_is_found_and_others_are_listed():
    rows = [GOOD] * 5000
    for i in (4321, 4400, 4999):
        rows[i] = GOOD | {"rewards": [1.0, math.nan]}
    with pytest.raises(DataError, match=r"^d row 4321, .*\(Bad as well: rows 4400, 4999\.\)$"):
        check_dataset(Dataset.from_list(rows), "d")


def test_ties_and_conflicting_duplicates_are_kept_and_counted(caplog):
    rows = [
        GOOD,
        {"prompt": "tied", "completions": [" a", " b"], "rewards": [1.0, 1.0]},
        {"prompt": "conflict", "completions": [" a", " a", " b"], "rewards": [1.0, 2.0, 3.0]},
        {"prompt": "same", "completions": [" a", " a", " b"], "rewards": [1.0, 1.0, 3.0]},
    ]
    with caplog.at_level(logging.WARNING):
        summary = check_dataset(Dataset.from_list(rows), "d")
    assert (summary.num_lists, summary.num_candidates) == (4, 10)
    assert (summary.num_tied, summary.num_conflicting) == (1, 1)
    assert "in 1 of 4 lists all rewards are equal" in caplog.text
    assert "1 of 4 lists hold the same completion more than once, with different rewards" in caplog.text


def test_conversations_with_conflicting_duplicates_are_counted():
    row = {"prompt": USER, "completions": [say("a"), say("a")], "rewards": [1.0, 2.0]}
    assert check_dataset(Dataset.from_list([row]), "d").num_conflicting == 1


@pytest.mark.parametrize("rewards", [(1, 0), np.array([1.5, 0.5]), [True, False], [np.float32(2), np.int64(1)]])
def test_numbers_come_in_many_types(rewards):
    row = canonical_row(GOOD | {"rewards": rewards}, 0, "d")
    assert row["relevance"] == [float(reward) for reward in rewards]


def test_rewards_are_rounded_as_in_batches(caplog):
    rewards = [0.1, -1e9, -1e9 - 1, 3.2e32]
    row = canonical_row(GOOD | {"completions": [" a", " b", " c", " d"], "rewards": rewards}, 0, "d")
    assert row["relevance"] == torch.tensor(rewards).tolist()
    assert row["relevance"][1] == row["relevance"][2]
    with caplog.at_level(logging.WARNING):
        assert check_dataset(Dataset.from_list([GOOD | {"rewards": [-1e9, -1e9 - 1]}]), "d").num_tied == 1
    assert "in 1 of 1 lists all rewards are equal" in caplog.text
    with pytest.raises(DataError, match=r"^d row 7, column `rewards`: entry 0 is beyond"):
        canonical_row(GOOD | {"rewards": [10**400, 0]}, 7, "d")


def test_order_stands_for_rewards_where_there_are_none():
    assert canonical_row({"prompt": "p", "completions": ["a", "b", "c"]}, 0, "d")["relevance"] == [2.0, 1.0, 0.0]


def test_tool_calls_need_no_content():
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    assert canonical_row({"prompt": USER, "completions": [call, say("b")]}, 0, "d")["completions"][0] == call


@pytest.mark.parametrize("rows", [tiny.pairs(), tiny.pairs(implicit_prompt=True), tiny.lists()])
def test_formats(rows):
    expected = "list" if "completions" in rows.column_names else "pair"
    assert dataset_format(rows, "d") == expected
    assert dataset_format(rows.to_iterable_dataset(), "d") == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"conversational": True}, {"implicit_prompt": True}, {"conversational": True, "implicit_prompt": True}],
    ids=str,
)
def test_pairs_get_the_tokens_of_dpo_trainer(tiny_model, config, options):
    if options.get("conversational") and options.get("implicit_prompt"):
        rows = [
            {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
            for row in tiny.pairs(conversational=True)
        ]
        dataset = Dataset.from_list(rows)
    else:
        dataset = tiny.pairs(**options)
    theirs = DPOTrainer(model=tiny_model, args=config(DPOConfig), train_dataset=dataset).train_dataset
    ours = LarPOTrainer(model=tiny_model, args=config(), train_dataset=dataset).train_dataset
    assert ours["prompt_ids"][:] == theirs["prompt_ids"][:]
    assert ours["completion_ids"][:] == [[r["chosen_ids"], r["rejected_ids"]] for r in theirs]
    assert set(map(tuple, ours["relevance"])) == {(1.0, 0.0)}


PAIR = {"prompt": "p", "chosen": " a", "rejected": " b"}
TALK = USER + say("a")

BAD_PAIRS = {
    "a prompt beside whole conversations": (
        {"chosen": TALK, "rejected": TALK}, "prompt", "from them: `dataset.remove_columns('prompt')`",
    ),
    "a prompt beside answers": ({"chosen": say("a"), "rejected": say("b")}, "prompt", "[{'role': 'user', 'content'"),
    "messages and texts": ({"prompt": USER}, "prompt", "holds messages, and `chosen` a string"),
    "two forms": ({"prompt": USER, "chosen": say("a")}, "rejected", "give both as strings or both as messages"),
    "nothing": ({"chosen": None}, "chosen", "is None; give a string or a list of messages"),
    "a single message": ({"rejected": say("b")[0]}, "rejected", "give a string or a list of messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_named_before_the_model_is_loaded(config, tmp_path, name):
    change, column, fix = BAD_PAIRS[name]
    path = tmp_path / "rows.jsonl"
    rows = [PAIR | change] if name != "nothing" else [PAIR, PAIR, PAIR | change]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_splits(str(path))["train"]
    with pytest.raises(DataError) as error:
        LarPOTrainer(model="/no/such/model", args=config(), train_dataset=dataset)
    assert str(error.value).startswith(f"train_dataset row {len(rows) - 1}, column `{column}`: ")
    assert fix in str(error.value)


def test_the_tokenizer_is_that_of_a_processor_alone():
    """mistral-common's has an attribute `tokenizer` that is none of transformers'."""
    tokenizer = tiny.tiny_tokenizer()
    expected = tokenize_dataset(Dataset.from_list([GOOD]), tokenizer, where="d", eos_token=tiny.EOS, max_length=None,
                                truncation_mode="keep_start")  # fmt: skip
    tokenizer.tokenizer = object()
    found = tokenize_dataset(Dataset.from_list([GOOD]), tokenizer, where="d", eos_token=tiny.EOS, max_length=None,
                             truncation_mode="keep_start")  # fmt: skip
    assert found.to_list() == expected.to_list()


def tokenize(rows, **options):
    settings = {"where": "d", "max_length": None, "truncation_mode": "keep_start", "eos_token": tiny.EOS}
    tokenizer = tiny.tiny_tokenizer()
    return tokenizer, tokenize_dataset(Dataset.from_list(rows), tokenizer, **(settings | options))


def test_end_of_sequence_is_appended_once_to_plain_text():
    tokenizer, dataset = tokenize([{"prompt": "p", "completions": [" a", " b" + tiny.EOS]}])
    assert [tokenizer.decode(ids) for ids in dataset[0]["completion_ids"]] == [" a" + tiny.EOS, " b" + tiny.EOS]


def test_plain_text_needs_an_end_of_sequence():
    with pytest.raises(ConfigError, match=r"^d: plain-text completions get an end-of-sequence token"):
        tokenize([{"prompt": "p", "completions": [" a", " b"]}], eos_token=None)
    row = {"prompt": say("p", "user"), "completions": [say("a"), say("b")]}
    assert len(tokenize([row], eos_token=None)[1]) == 1


def test_conversations_are_rendered_by_the_chat_template():
    tokenizer, dataset = tokenize([{"prompt": USER, "completions": [say("a"), say("b")]}])
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in dataset[0]["completion_ids"]] == ["a<|im_end|>\n", "b<|im_end|>\n"]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_options_reach_the_chat_template(as_json):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    row = {"prompt": USER, "completions": [say("a"), say("b")], "chat_template_kwargs": {"shout": True}}
    tokenizer, dataset = tokenize([row | {"tools": json.dumps(tools) if as_json else tools}])
    prompt = tokenizer.decode(dataset[0]["prompt_ids"])
    assert prompt.startswith("<|im_start|>tools\nlook_up\n")
    assert "SHOUT" in prompt


def test_candidates_share_the_shortest_common_prompt(caplog, monkeypatch):
    # A template that renders the generation prompt in another way than the conversation: the prompt is cut there
    monkeypatch.setattr(
        tiny, "CHAT_TEMPLATE", tiny.CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "bot\n' }}{% endif %}")
    )
    with caplog.at_level(logging.WARNING):
        tokenizer, dataset = tokenize([{"prompt": USER, "completions": [say("a"), say("b")]}])
    assert tokenizer.decode(dataset[0]["prompt_ids"]).endswith("<|im_end|>\n<|im_start|>")
    assert tokenizer.decode(dataset[0]["completion_ids"][0]) == "assistant\na<|im_end|>\n"


def test_tokenizing_finds_its_result_in_the_cache_but_not_that_of_other_code(tmp_path, monkeypatch):
    tiny.lists().save_to_disk(tmp_path / "lists")
    tokenizer = tiny.tiny_tokenizer()
    options = {"where": "d", "max_length": 64, "truncation_mode": "keep_start", "eos_token": tiny.EOS}
    runs = [tokenize_dataset(Dataset.load_from_disk(tmp_path / "lists"), tokenizer, **options) for _ in range(2)]
    assert runs[0]._fingerprint == runs[1]._fingerprint
    assert runs[0].cache_files == runs[1].cache_files != []
    monkeypatch.setattr(tokenization, "_CODE", "of a later version")
    later = tokenize_dataset(Dataset.load_from_disk(tmp_path / "lists"), tokenizer, **options)
    assert later.cache_files != runs[0].cache_files


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"lists{suffix}"
    dataset = tiny.lists()
    dataset.to_parquet(path) if suffix == ".parquet" else dataset.to_json(path, lines=suffix == ".jsonl")
    assert load_splits(str(path))["train"].to_list() == dataset.to_list()


def test_folders(tmp_path):
    dataset = tiny.lists()
    (tmp_path / "files").mkdir()
    dataset.to_json(tmp_path / "files" / "train.jsonl")
    assert load_splits(str(tmp_path / "files"))["train"].to_list() == dataset.to_list()
    dataset.save_to_disk(tmp_path / "saved")
    assert load_splits(str(tmp_path / "saved"))["train"].to_list() == dataset.to_list()


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_missing_files(path):
    with pytest.raises(DataError, match="There is no file or folder"):
        load_splits(path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="none of the kinds that can be read"):
        load_splits(str(tmp_path / "notes.txt"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", "completions": ["a"\n')
    with pytest.raises(DataError, match=r"broken\.jsonl' cannot be read") as error:
        load_splits(str(tmp_path / "broken.jsonl"))
    assert "\n" not in str(error.value)


def test_unknown_hub_dataset():
    with pytest.raises(DataError, match="'nobody/nothing' cannot be read"):
        load_splits("nobody/nothing")


def test_rows_that_are_never_in_memory_together_are_the_same_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_module, "_ROWS_IN_MEMORY", 2)
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "rewards": [None, None], "ids": []} for i in range(5)]
    rows[3] |= {"rewards": [1.5, None], "ids": [7]}  # types that the first rows do not tell
    rows[4]["prompt"][0]["name"] = "Ada"  # and a key
    dataset = dataset_on_disk(lambda: iter(rows), tmp_path / "data")
    assert dataset.to_list() == Dataset.from_list(rows).to_list()
    again = Dataset.from_file(dataset.cache_files[0]["filename"])
    assert dataset._fingerprint == again._fingerprint  # all processes find each other's results in the cache
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)  # NFS: a process holds a file open
    other = [row | {"ids": [5]} for row in rows]
    assert dataset_on_disk(lambda: iter(other), tmp_path / "data").to_list() == Dataset.from_list(other).to_list()


def tokens_of(dataset, tokenizer, **options):
    settings = {"where": "d", "max_length": None, "truncation_mode": "keep_start", "eos_token": tiny.EOS}
    return tokenize_dataset(dataset, tokenizer, **(settings | options))


def test_rows_of_a_killed_process_stay_with_their_tokens(tmp_path):
    rows = [{"prompt": f"p{i}", "completions": [" a", " b"], "rewards": [1.0, 0.0]} for i in range(5)]
    folder, tokenizer = tmp_path / "data", tiny.tiny_tokenizer()
    before = tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "tmp123").write_text("what was being written")
    again = tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert again.cache_files == before.cache_files and again.to_list() == before.to_list()


@pytest.mark.parametrize("change", ["rows", "order", "a column", "tokenizer", "options", "code"])
def test_tokens_of_something_else_are_not_taken(change, tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "completions": [" a", " b"], "rewards": [1.0, 0.0]} for i in range(5)]
    folder, tokenizer, options = tmp_path / "data", tiny.tiny_tokenizer(), {}
    before = tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer)
    before_files, before = {path.name for path in folder.glob("cache-*")}, before.to_list()
    if change == "rows":
        rows[4] = rows[4] | {"completions": [" a", " c"]}
    elif change == "order":
        rows.reverse()
    elif change == "a column":
        rows = [row | {"finished": [True, False]} for row in rows]
    elif change == "tokenizer":
        tokenizer.add_tokens(["p4"])
    elif change == "options":
        options = {"truncated_completions": "by_reward"}
    else:
        monkeypatch.setattr(tokenization, "_CODE", "of a later version")
    found = tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer, **options)
    assert {path.name for path in folder.glob("cache-*")} - before_files
    expected = tokens_of(Dataset.from_list(rows), tokenizer, **options).to_list()
    assert found.to_list() == expected
    assert (expected == before) == (change in ("options", "code"))


@pytest.mark.parametrize("name", ["rows.arrow", "rows.hash", "cache-*.arrow"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "zeros"])
def test_damaged_rows_and_tokens_are_made_again(name, damage, tmp_path):
    rows = [{"prompt": f"p{i}", "completions": [" a", " b"], "rewards": [1.0, 0.0]} for i in range(5)]
    folder, tokenizer = tmp_path / "data", tiny.tiny_tokenizer()
    before = tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer).to_list()
    [path] = folder.glob(name)
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        kept = whole[: {"empty": 0}.get(damage, len(whole) // 2)]
        path.write_bytes(kept + bytes(len(whole) - len(kept)) if damage == "zeros" else kept)
    assert tokens_of(dataset_on_disk(lambda: iter(rows), folder), tokenizer).to_list() == before
