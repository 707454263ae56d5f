"""`larpo generate`, `reward`, `select`, `train`: from file to file, and with files made elsewhere."""

import datetime
import json
import re
import sys

import pytest
import tiny
from datasets import Dataset
from fake_server import FakeServer
from small_run import rows_of
from transformers import AutoModelForCausalLM

from trl_larpo import DataError, cli
from trl_larpo.candidates import Candidate
from trl_larpo.prompts import Prompt, prompt_id
from trl_larpo.run.candidate_files import read_candidate_pools
from trl_larpo.run.options import PromptOptions
from trl_larpo.run.prompts import load_prompts
from trl_larpo.storage import write_jsonl
from trl_larpo.training.datasets import load_splits
from trl_larpo.training.tokenization import tokenize_dataset


def larpo(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture
def generate(project, talkative_model):
    flags = ["--model_name_or_path", talkative_model, "--prompts", "prompts.jsonl", "--use_cpu", "--num_samples", 4]
    return lambda *more: larpo("generate", *flags, "--max_new_tokens", 24, "--output", "samples.jsonl", *more)


def test_from_prompts_to_a_trained_model(project, talkative_model, generate, capsys):
    assert generate() == 0
    assert larpo("reward", "--samples", "samples.jsonl", "--reward_funcs", "run_rewards:vowels", "--output",
                 "rewarded.jsonl") == 0  # fmt: skip
    assert larpo("select", "--candidates", "rewarded.jsonl", "--num_best", 1, "--num_worst", 1, "--output",
                 "lists.jsonl") == 0  # fmt: skip
    assert larpo("train", "--model_name_or_path", talkative_model, "--dataset_name", "lists.jsonl", "--output_dir",
                 "aligned", "--max_steps", 2, "--use_cpu", "--bf16", "false", "--report_to", "none") == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "40 completions of 10 prompts in samples.jsonl" in output
    assert "Rewards of 10 prompts in rewarded.jsonl" in output
    assert re.search(r"\d+ lists of \d+ candidates \(\d+ cut off\); left out: .*not selected", output)
    lists = rows_of(project / "lists.jsonl")
    assert lists and all(len(row["completions"]) == 2 for row in lists)
    assert all(row["rewards"][0] > row["rewards"][1] for row in lists if all(row["finished"]))
    assert all(row["finished"][0] for row in lists)
    AutoModelForCausalLM.from_pretrained(project / "aligned")


def test_samples_do_not_depend_on_where_it_was_stopped(project, generate):
    assert generate() == 0
    whole = (project / "samples.jsonl").read_bytes()
    (project / "samples.jsonl").rename(project / "samples.jsonl.partial-0")
    kept = b"".join((project / "samples.jsonl.partial-0").read_bytes().splitlines(keepends=True)[:4])
    (project / "samples.jsonl.partial-0").write_bytes(kept + b'{"prompt_id": "cut o')
    assert generate() == 0
    assert (project / "samples.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_samples_from_a_server(project, generate):
    pytest.importorskip("openai")
    server = FakeServer().start()
    assert generate("--server_urls", server.url) == 0
    rows = rows_of(project / "samples.jsonl")
    assert len(rows) == 10 and all(len(row["completions"]) == 4 for row in rows)
    server.close()


def test_rewards_of_files_made_elsewhere(project):
    rlhflow = {"prompt": "p", "responses": ["aaa", "b"], "rewards": [1.0, 2.0]}
    (project / "rlhflow.jsonl").write_text(json.dumps(rlhflow) + "\n")
    assert larpo("select", "--candidates", "rlhflow.jsonl", "--output", "lists.jsonl") == 0
    [row] = rows_of(project / "lists.jsonl")
    assert (row["completions"], row["rewards"]) == (["b", "aaa"], [2.0, 1.0])
    assert (
        larpo("reward", "--samples", "rlhflow.jsonl", "--reward_funcs", "run_rewards:vowels", "--output", "r.jsonl")
        == 0
    )
    [row] = rows_of(project / "r.jsonl")
    assert (row["completions"], row["rewards"]) == (["aaa", "b"], [0.3, 0.0])
    # Rewards of different judges do not mix
    assert larpo("select", "--candidates", "rlhflow.jsonl", "r.jsonl", "--output", "lists.jsonl") == 2


@pytest.mark.parametrize("as_messages", [False, True])
def test_whole_lists_of_simpo_and_ultrafeedback(project, as_messages):
    simpo = {"prompt": "p", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, 0.3, 0.2],
             "chosen": [{"role": "user", "content": "p"}], "rejected": []}  # fmt: skip
    feedback = {
        "instruction": "q",
        "completions": [{"response": "x", "overall_score": "4"}, {"response": "y", "overall_score": 8.5}],
    }
    flags = ["--output", "lists.jsonl", *(["--as_messages"] if as_messages else [])]
    lists = []
    for name, row in (("simpo.jsonl", simpo), ("feedback.jsonl", feedback)):
        write_jsonl(project / name, [row])
        assert larpo("select", "--candidates", name, *flags) == 0
        lists += rows_of(project / "lists.jsonl")
    first, second = lists

    def wrapped(text, role):
        return [{"role": role, "content": text}] if as_messages else text

    assert (first["prompt"], first["rewards"]) == (wrapped("p", "user"), [0.3, 0.2, 0.1])
    assert first["completions"] == [wrapped(text, "assistant") for text in "bca"]
    assert first["candidates"][0]["source"] == "simpo" and second["candidates"][0]["source"] == "ultrafeedback"
    assert (second["completions"][0], second["rewards"]) == (wrapped("y", "assistant"), [8.5, 4.0])


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("columns", [{"tools": "hammer, saw"}, {"tools": ["saw"]}, {"chat_template_kwargs": ""}])
def test_columns_that_only_have_the_names_of_a_templates_arguments_stay_apart(project, columns):
    row = {"prompt": [{"role": "user", "content": "why"}], "rewards": [0.0, 1.0]} | columns
    row["completions"] = [[{"role": "assistant", "content": each}] for each in ("aaa", "e")]
    write_jsonl(project / "a.jsonl", [row])
    assert larpo("select", "--candidates", "a.jsonl", "--output", "lists.jsonl") == 0
    [made] = rows_of("lists.jsonl")
    assert json.loads(made["columns"]) == columns and not made.keys() & columns.keys()


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["objects", "text"])
def test_lists_keep_tools_and_all_other_columns(project, tools):
    """A training on selected lists left the tools of its rows out, and a reward their columns."""
    rows = [
        {"prompt": [{"role": "user", "content": text}], "rewards": [0.0, 1.0], "answer": answer,
         "completions": [[{"role": "assistant", "content": each}] for each in ("aaa", "e")]}
        for text, answer in (("why", 3), ("how", "1"), ("who", None))
    ]  # fmt: skip
    rows[1]["tools"] = tools
    rows[2]["chat_template_kwargs"] = {"shout": True}
    write_jsonl(project / "a.jsonl", rows)
    assert larpo("select", "--candidates", "a.jsonl", "--output", "lists.jsonl") == 0
    assert larpo("select", "--candidates", "lists.jsonl", "--output", "again.jsonl") == 0

    def rendered(dataset):
        options = {"where": "d", "max_length": None, "truncation_mode": "keep_start", "eos_token": tiny.EOS}
        tokens = tokenize_dataset(dataset, tiny.tiny_tokenizer(), **options)
        return [tiny.tiny_tokenizer().decode(ids) for ids in tokens["prompt_ids"]]

    expected = [text for row in rows for text in rendered(Dataset.from_list([row]))]
    assert "look_up" in expected[1] and "SHOUT" in expected[2]
    for file in ("lists.jsonl", "again.jsonl"):
        assert rendered(load_splits(file)["train"]) == expected
    with open(project / "run_rewards.py", "a") as file:
        file.write("def of_answers(completions, answer, **_): return [len(str(each)) for each in answer]")
    flags = ["--samples", "lists.jsonl", "--reward_funcs", "run_rewards:of_answers", "--output", "r.jsonl"]
    assert larpo("reward", *flags) == 0
    assert [row["columns"]["answer"] for row in rows_of("r.jsonl")] == [3, "1", None]
    with pytest.raises(DataError, match="column `tools`, with which completions cannot be sampled"):
        load_prompts("r.jsonl", PromptOptions())


def test_rewards_of_other_scales_do_not_mix(project, capsys):
    """Of 0.1 and 0.2 of SimPO's judge and 8 and 2 of UltraFeedback's one list was made."""
    scored = [{"response": "x", "overall_score": 8}, {"response": "y", "overall_score": 2}]
    rows = {"simpo": {"prompt": "p", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.1, 0.2]},
            "feedback": {"instruction": "p", "completions": scored}}  # fmt: skip
    for name, row in rows.items():
        write_jsonl(project / f"{name}.jsonl", [row])
        assert larpo("select", "--candidates", f"{name}.jsonl", "--output", f"lists_{name}.jsonl") == 0
    write_jsonl(project / "both.jsonl", rows.values())
    for files in (["simpo.jsonl", "feedback.jsonl"], ["lists_simpo.jsonl", "lists_feedback.jsonl"], ["both.jsonl"]):
        assert larpo("select", "--candidates", *files, "--output", "lists.jsonl") == 2
        said = f"Completions in {' and '.join(map(repr, files))} were scored by different rewards, which cannot be"
        assert said in capsys.readouterr().err
    assert larpo("select", "--candidates", "simpo.jsonl", "lists_simpo.jsonl", "--output", "lists.jsonl") == 0


BAD = {
    "no prompts": (["generate", "--output", "x.jsonl"], "No prompts: give `prompts`"),
    "no output": (["generate", "--prompts", "prompts.jsonl"], "`output` is missing"),
    "no model": (["generate", "--prompts", "prompts.jsonl", "--output", "x.jsonl"], "No model: give"),
    "temperature": (
        ["generate", "--prompts", "prompts.jsonl", "--output", "x.jsonl", "--model_name_or_path", "m", "--temperature",
         "0"],
        "`temperature=0` decodes greedily",
    ),
    "server": (
        ["generate", "--prompts", "prompts.jsonl", "--output", "x.jsonl", "--model_name_or_path", "m", "--server_urls",
         "http://127.0.0.1:9/v1"],
        "does not answer",
    ),
    "no reward": (["reward", "--samples", "prompts.jsonl", "--output", "x.jsonl"], "No reward: give `reward_funcs`"),
    "no completions": (
        ["reward", "--samples", "prompts.jsonl", "--reward_funcs", "gsm8k", "--output", "x.jsonl"],
        "'prompts.jsonl' row 0 has no list of completions",
    ),
    "missing file": (["select", "--candidates", "none.jsonl", "--output", "x.jsonl"], "There is no file 'none.jsonl'"),
    "kind of output": (
        ["select", "--candidates", "prompts.jsonl", "--output", "lists.parquet"],
        "`output` is 'lists.parquet'; it is written as JSON lines, so let its name end in .jsonl",
    ),
    "no run": (["report", "."], "'.' is no folder of a run"),
    "report without a folder": (["report"], "the following arguments are required: run"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(project, capsys, name):
    words, message = BAD[name]
    assert larpo(*words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("larpo: error: ") and message in errors[0]


def test_lists_go_into_a_new_folder(project, capsys):
    write_jsonl(project / "a.jsonl", [{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]}])
    assert larpo("select", "--candidates", "a.jsonl", "--output", "new/folder/lists.jsonl") == 0
    assert len(rows_of("new/folder/lists.jsonl")) == 1
    assert larpo("select", "--candidates", "none.jsonl", "--output", "a.jsonl/lists.jsonl") == 2
    assert "`output` is 'a.jsonl', but a.jsonl is a file, not a folder" in capsys.readouterr().err


def test_unrewarded_files_cannot_be_selected_from(project, generate, capsys):
    assert generate() == 0
    assert larpo("select", "--candidates", "samples.jsonl", "--output", "x.jsonl") == 2
    assert "'samples.jsonl' has no rewards; score it first" in capsys.readouterr().err


def test_prompts_without_a_reward_are_left_out_and_the_others_selected(project, capsys):
    rows = [
        {"prompt": name, "completions": ["a", "b"], "rewards": rewards, "reward_id": judge,
         "candidates": [{"iteration": 1, "source": "policy"}] * 2}
        for name, rewards, judge in (("why", [None, None], None), ("how", [1.0, 0.0], "judge"))
    ]  # fmt: skip
    (project / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert larpo("select", "--candidates", "mixed.jsonl", "--output", "lists.jsonl") == 0
    assert [row["prompt"] for row in rows_of("lists.jsonl")] == ["how"]


@pytest.mark.parametrize("form", ["array", "lines"])
def test_rewards_get_the_texts_of_a_json_file_as_they_are(project, form):
    (project / "dates.py").write_text(
        "def is_text(prompts, completions, day, **columns):\n    return [float(each == '2024-01-01') for each in day]\n"
    )
    row = json.dumps({"prompt": "when?", "completions": ["then", "now"], "day": "2024-01-01"})
    (project / "dates.json").write_text(f"[{row}]" if form == "array" else row + "\n")
    flags = ["--samples", "dates.json", "--reward_funcs", "dates:is_text", "--output", "out.jsonl", "--use_cpu"]
    assert larpo("reward", *flags) == 0
    assert [row["rewards"] for row in rows_of("out.jsonl")] == [[1.0, 1.0]]
    sys.modules.pop("dates")


def test_columns_of_times_are_refused_by_name(project, capsys):
    times = [datetime.datetime(2024, 1, 1)]
    columns = {"prompt": ["when?"], "completions": [["then", "now"]], "rewards": [[1.0, 0.0]], "created_at": times}
    Dataset.from_dict(columns).to_parquet("times.parquet")
    assert larpo("select", "--candidates", "times.parquet", "--output", "lists.jsonl") == 0
    assert "Columns that JSON cannot hold are left out: created_at" in capsys.readouterr().out
    assert [row["columns"] for row in rows_of("lists.jsonl")] == ["{}"]
    flags = ["--samples", "times.parquet", "--reward_funcs", "run_rewards:vowels", "--output", "out.jsonl"]
    assert larpo("reward", *flags) == 2
    assert "The prompt 'when?', column `created_at`: holds datetime;" in capsys.readouterr().err


# Shapes of files


def read_pool(folder, row):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_candidate_pools(str(path))[0]


def told(pool, name):
    return [getattr(candidate, name) for candidate in pool.candidates]


def test_shapes_of_candidate_files(tmp_path):
    ours = read_pool(tmp_path, {"prompt": "p", "completions": ["a", "b"], "more": 1})
    assert (told(ours, "completion"), told(ours, "reward")) == (["a", "b"], [None, None])
    assert ours.prompt.columns == {"more": 1}
    conversation = [{"role": "user", "content": "p"}]
    rlhflow = read_pool(tmp_path, {"prompt": conversation, "responses": ["a", "b"], "rewards": [1, 2.5]})
    assert rlhflow.candidates[1].completion == [{"role": "assistant", "content": "b"}]
    assert told(rlhflow, "reward") == [1, 2.5] and told(rlhflow, "source") == ["rlhflow"] * 2
    scored = [{"response": "a", "overall_score": 7.5}, {"response": "b", "overall_score": "6"}, {"response": "c"}]
    feedback = read_pool(tmp_path, {"instruction": "p", "completions": scored})
    assert (feedback.prompt.content, told(feedback, "completion")) == ("p", ["a", "b", "c"])
    assert told(feedback, "reward") == [7.5, 6.0, None] and told(feedback, "source") == ["ultrafeedback"] * 3


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "p"}, "row 0 has no column `prompt`. Its columns: text"),
        ({"prompt": ""}, "row 0, column `prompt`: "),
        ({"prompt": "p"}, "has no list of completions"),
        ({"prompt": "p", "completions": "a"}, "has no list of completions"),
        ({"prompt": "p", "completions": ["a", 3]}, "column `completions`: entry 1 is int, not a text"),
        ({"prompt": "p", "responses": ["a", "b"], "rewards": [1]}, "column `rewards`: has 1 numbers for 2 completions"),
        ({"prompt": "p", "responses": ["a"], "rewards": [float("nan")]}, "entry 0 is nan, not a finite number"),
        ({"prompt": "p", "responses": ["a"], "rewards": ["x"]}, "entry 0 is 'x', not a finite number"),
        ({"prompt": "p", "completions": ["a"], "candidates": []}, "column `candidates`: has 0 entries for 1"),
        ({"prompt": "p", "completions": ["a"], "candidates": 5}, "row 0, column `candidates`: is 5; give a list with"),
        (
            {"prompt": "p", "completions": ["a"], "rewards": 1.0},
            "row 0, column `rewards`: is 1.0; give a list with one",
        ),
        (
            {"prompt": "p", "completions": ["a"], "finished": True},
            "row 0, column `finished`: is True; give a list with",
        ),
        ({"prompt": "p", "completions": ["a"], "finished": [1]}, "column `finished`: give true or false for each of"),
        (
            {"prompt": "p", "completions": ["a"], "completion_ids": 5},
            "row 0, column `completion_ids`: is 5; give a list",
        ),
        (
            {"prompt": "p", "completions": ["a"], "completion_ids": ["a b"]},
            "`completion_ids`: entry 0 is 'a b'; give a",
        ),
        (
            {"prompt": "p", "completions": ["a"], "completion_ids": [[1, -2]]},
            "`completion_ids`: entry 0 is [1, -2]; give",
        ),
        ({"prompt": "p", "completions": list("abc"), "completion_ids": ["", "1 2", 7]}, "entry 2 is 7; give a list of"),
        ({"prompt": "p", "completions": ["a"], "candidates": ["a"]}, "column `candidates`: each entry describes"),
        (
            {"instruction": "p", "completions": [{"response": "a", "overall_score": "good"}]},
            "`overall_score` is 'good'",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pool(tmp_path, row)


def test_rows_that_lack_completions_are_counted_and_the_others_selected(project, caplog, capsys):
    """One of the 64,000 rows of UltraFeedback without completions ended the work on all."""
    scored = [{"response": "a", "overall_score": 8}, {"response": "b", "overall_score": "2"}]
    rows = [
        {"instruction": "p", "completions": scored},
        {"instruction": "q", "completions": []},
        {"instruction": "r", "completions": None},
        {"instruction": "s", "completions": [*scored, {"response": None, "overall_score": 9}, None]},
        {"instruction": "t", "completions": [*scored, {"response": "c", "overall_score": "N/A"}]},
    ]
    write_jsonl(project / "a.jsonl", rows)
    assert larpo("select", "--candidates", "a.jsonl", "--output", "lists.jsonl") == 0
    assert [(row["prompt"], row["completions"]) for row in rows_of("lists.jsonl")] == [(x, ["a", "b"]) for x in "pst"]
    said = "3 lists of 6 candidates; left out: 2 prompts with fewer than 2 usable completions, 2 empty, 1 without a"
    assert said in capsys.readouterr().out
    for said in ("2 of 5 rows have no completions and are left out (first: row 1).",
                 "1 of 5 rows have completions that are null, which count as empty (first: row 3).",
                 "1 of 5 rows have an `overall_score` that says there is none"):  # fmt: skip
        assert f"'a.jsonl': {said}" in caplog.text
    flags = ["--samples", "a.jsonl", "--reward_funcs", "run_rewards:vowels", "--output", "r.jsonl"]
    assert larpo("reward", *flags) == 0 and larpo("reward", *flags) == 0
    assert larpo("select", "--candidates", "r.jsonl", "--output", "lists.jsonl") == 0
    assert [row["prompt"] for row in rows_of("lists.jsonl")] == list("pst")


def test_columns_of_the_user_have_any_name_in_files_of_others(tmp_path):
    mine = {"problem": "1 + 1", "prompt_id": 3, "left_out": "x", "columns": "c", "reward_id": 5}
    pool = read_pool(tmp_path, {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]} | mine)
    assert pool.prompt == Prompt(prompt_id("p"), "p", mine) and told(pool, "scored_by") == ["file"] * 2
    ours = {"candidates": [{"source": "policy"}] * 2, "columns": {"answer": "2"}, "reward_id": "r", "problem": None}
    pool = read_pool(tmp_path, {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]} | ours)
    assert pool.prompt.columns == {"answer": "2"}
    assert pool.candidates[0] == Candidate("a", 1, iteration=0, source="policy", scored_by="r")


def test_rows_of_one_prompt_are_merged(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "completions": [x], "rewards": [y]} for x, y in (("a", 1), ("b", 2))]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q", "completions": ["c"]}]))
    first, second = read_candidate_pools(str(path))
    assert (told(first, "completion"), told(first, "reward")) == (["a", "b"], [1, 2])
    assert told(second, "completion") == ["c"]


def test_candidates_scored_by_different_rewards_are_one_pool_when_scored_again(project):
    rows = [
        {"prompt": "p", "completions": ["a", "bb"], "rewards": [1, 2], "candidates": [{"source": "policy"}] * 2,
         "reward_id": "earlier"},
        {"prompt": "p", "completions": ["ccc"], "candidates": [{"source": "policy"}]},
    ]  # fmt: skip
    write_jsonl(project / "all.jsonl", rows)
    (project / "of_length.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    assert larpo("reward", "--samples", "all.jsonl", "--reward_funcs", "of_length:length", "--output", "out.jsonl") == 0
    [pool] = read_candidate_pools("out.jsonl")
    assert [(c.completion, c.reward) for c in pool.candidates] == [("a", 1.0), ("bb", 2.0), ("ccc", 3.0)]


def test_descriptions_of_others_may_hold_anything(tmp_path):
    about = [{"source": "gpt", "reward": 3, "completion": "x", "count": None, "scored_by": "y", "colour": "red"}]
    [candidate] = read_pool(tmp_path, {"prompt": "p", "completions": ["a"], "candidates": about}).candidates
    assert candidate == Candidate("a", None, iteration=0, source="gpt")


def test_prompts_of_a_run_can_be_prompts_again(tmp_path):
    rows = [{"prompt": "p", "answer": "2", "rewards": "mine"}, {"prompt": "q", "answer": None, "rewards": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    options = PromptOptions(prompts=[str(tmp_path / "a.jsonl")])
    prompts = load_prompts(options.prompts[0], options)
    assert prompts[0].columns == {"answer": "2", "rewards": "mine"}
    write_jsonl(tmp_path / "b.jsonl", [prompt.to_row() for prompt in prompts])
    assert load_prompts(str(tmp_path / "b.jsonl"), options) == prompts


@pytest.mark.parametrize("form", ["samples", "lists"])
def test_columns_of_a_file_of_ours_stay_with_prompts_that_change_their_form(project, form):
    rows = [{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0], "answer": "2"}]
    write_jsonl(project / "a.jsonl", rows)
    if form == "lists":
        assert larpo("select", "--candidates", "a.jsonl", "--output", "b.jsonl") == 0
    else:
        flags = ["--samples", "a.jsonl", "--reward_funcs", "run_rewards:vowels", "--output", "b.jsonl"]
        assert larpo("reward", *flags) == 0
    for options in ({"prompts_as_messages": True}, {"prompt_template": "Q: {prompt}"}):
        [prompt] = load_prompts("b.jsonl", PromptOptions(**options))
        assert prompt.columns == {"answer": "2"} and prompt.content != "p"


def test_a_reward_gets_the_same_columns_in_every_call(project):
    (project / "mixed.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "responses": ["a", "b"]} | ({"answer": "2"} if i == 0 else {})) + "\n"
                for i in range(300))
    )  # fmt: skip
    (project / "of_answers.py").write_text(
        "def r(prompts, completions, answer, **columns): return [float(a == '2') for a in answer]"
    )
    words = ["reward", "--samples", "mixed.jsonl", "--reward_funcs", "of_answers:r", "--output", "scored.jsonl"]
    assert larpo(*words) == 0
    rows = [json.loads(line) for line in (project / "scored.jsonl").read_text().splitlines()]
    assert [row["rewards"][0] for row in rows] == [1.0] + [0.0] * 299


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json"])
def test_a_mark_of_the_encoding_is_passed_over(project, name):
    """Editors on Windows write it; a training read such files, and `larpo select` did not."""
    rows = [{"prompt": text, "completions": ["a", "b"], "rewards": [1, 0]} for text in "pq"]
    text = json.dumps(rows) if name == "array.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (project / name).write_text(text, encoding="utf-8-sig")
    assert larpo("select", "--candidates", name, "--output", "lists.jsonl") == 0
    assert [row["prompt"] for row in rows_of("lists.jsonl")] == ["p", "q"]
    assert [prompt.content for prompt in load_prompts(name, PromptOptions())] == ["p", "q"]


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"rows.jsonl' is empty"):
        read_candidate_pools(str(tmp_path / "rows.jsonl"))
