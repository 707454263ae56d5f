"""The evaluation scripts: AlpacaEval 2 through the real package with a small judge, MixEval's files key by key."""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from judge_server import REFERENCE, JudgeServer
from small_run import rows_of

from trl_larpo.run.small import save_small_model

SCRIPTS = Path(__file__).parents[1] / "examples" / "evaluation"
RECIPE = Path(__file__).parents[1] / "examples/recipes/table2/mistral_base_listmle_pairrm.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model; the current one. No key of a judge is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    save_small_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """Runs a script as `python script ...` does, in this process: importing torch takes longer than the rest."""

    def call(script, *words, **environment):
        with monkeypatch.context() as patch:
            argv = [script, "--model_name_or_path", "model", "--use_cpu", *map(str, words)]
            patch.setattr(sys, "argv", argv)
            for name, value in environment.items():
                patch.setenv(name, value)
            capfd.readouterr()
            try:
                runpy.run_path(str(SCRIPTS / script), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code
        output = capfd.readouterr()
        if isinstance(code, str):  # the interpreter would print it
            return SimpleNamespace(returncode=1, stdout=output.out, stderr=output.err + code)
        return SimpleNamespace(returncode=code, stdout=output.out, stderr=output.err)

    return call


# AlpacaEval 2


@pytest.fixture
def alpaca_eval(folder, run):
    """Calls the script with a handful of instructions, of which one is `quiet`."""
    pytest.importorskip("alpaca_eval", reason="needs the extra [eval]")
    rows = [
        {"instruction": f"{'quiet, ' if i == 2 else ''}tell me {i}", "output": f"{REFERENCE} {i}",
         "generator": "gpt4_1106_preview", "dataset": "helpful_base"}
        for i in range(5)
    ]  # fmt: skip
    (folder / "references.json").write_text(json.dumps(rows))
    flags = ["--temperature", 0.7, "--references", "references.json", "--max_new_tokens", 16, "--output", "out"]

    def call(server, *more, judge_model="my/judge-instruct", **environment):
        judge = ["--judge_model", judge_model, "--judge_url", server.url] if judge_model else []
        return run("alpaca_eval2.py", *flags, *judge, *more, **environment)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("prefers, rate", [("model", 100.0), ("reference", 0.0)])
def test_a_judge_that_always_prefers_one_side(alpaca_eval, folder, prefers, rate):
    with JudgeServer(prefers) as server:
        result = alpaca_eval(server, "--recipe", RECIPE)
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(server.requests) == 5
        for asked in server.requests:
            assert (asked["model"], asked["max_tokens"], asked["top_logprobs"]) == ("my/judge-instruct", 1, 5)
        outputs = json.loads((folder / "out" / "model_outputs.json").read_text())
        assert [set(row) for row in outputs] == [{"instruction", "output", "generator", "dataset"}] * 5
        assert [row["instruction"][-1] for row in outputs] == list("01234")
        again = alpaca_eval(server)
        assert again.returncode == 0 and len(server.requests) == 5, "nothing is judged twice"
    written = json.loads((folder / "out" / "my_judge_instruct" / "result.json").read_text())
    assert (written["win_rate"], written["n_total"], written["missing"]) == (rate, 5, [])
    assert written["settings"]["alpaca_eval"] and written["settings"]["answers"]["temperature"] == 0.7
    assert f"win rate                    {rate:.2f} %" in result.stdout
    assert "LC win rate 31.1, win rate 32.1" in result.stdout and "judged                      5 of 5" in result.stdout


@pytest.mark.slow
def test_the_leaderboards_judge_leaves_the_package_as_it_is(alpaca_eval, folder):
    """GPT-4-turbo's configuration, with its endpoint on the loopback."""
    import alpaca_eval as package

    def files():
        return {path for path in Path(package.__file__).parent.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    with JudgeServer("model") as server:
        key = {"OPENAI_API_KEY": "EMPTY", "OPENAI_API_BASE": server.url}
        result = alpaca_eval(server, judge_model=None, **key)
        assert result.returncode == 0, result.stderr[-3000:]
        assert {asked["model"] for asked in server.requests} == {"gpt-4-1106-preview"}
        again = alpaca_eval(server, judge_model=None, **key)
        assert again.returncode == 0 and len(server.requests) == 5
    assert "win rate                    100.00 %" in again.stdout
    assert files() == before


@pytest.mark.slow
def test_judgements_that_are_missing_are_said_and_asked_for_again(alpaca_eval, folder):
    with JudgeServer("silent") as server:
        result = alpaca_eval(server)
    assert "WARNING: no judgement of the instructions [2]" in result.stdout
    assert "judged                      4 of 5" in result.stdout
    kept = (folder / "out" / "answers.jsonl").read_bytes()
    with JudgeServer("model") as server:
        again = alpaca_eval(server)
        assert len(server.requests) == 1 and "quiet" in str(server.requests[0])
    assert "judged                      5 of 5" in again.stdout
    assert (folder / "out" / "answers.jsonl").read_bytes() == kept


def test_other_settings_are_refused(alpaca_eval, folder):
    with JudgeServer("model") as server:
        assert alpaca_eval(server, "--judge_later").returncode == 0 and not server.requests
        result = alpaca_eval(server, "--max_new_tokens", 17)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("alpaca_eval2.py: error: `max_new_tokens` is 17")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--judge_later"], "give --preset or --temperature"),
        (["--preset", "mistral_base", "--judge_model", "x"], "--judge_model and --judge_url go together"),
        (["--preset", "mistral_base"], "OPENAI_API_KEY|the package alpaca-eval is missing"),
    ],
)
def test_bad_options_come_before_any_answer(folder, run, words, message):
    result = run("alpaca_eval2.py", "--output", "out", *words)
    assert result.returncode == 2 and not (folder / "out").exists()
    assert any(part in result.stderr for part in message.split("|"))


# MixEval

FREE_FORM = {
    "7": {"problem_type": "free-form", "context": None, "prompt": "Who sings?", "target": ["A bird", "b"],
          "benchmark_name": "TriviaQA", "further": {"kept": [1, None]}},
    "3": {"problem_type": "free-form", "context": "Some context.", "prompt": "How many?", "target": ["4"],
          "benchmark_name": "DROP"},
    "12": {"problem_type": "free-form", "context": None, "prompt": "2 + 2?", "target": ["4"],
           "benchmark_name": "GSM8k"},
}  # fmt: skip
MULTIPLE_CHOICE = {
    "1": {"problem_type": "multiple-choice", "context": "why", "prompt": "It was just", "options": ["a", "b", "c"],
          "target": [2], "benchmark_name": "CommonsenseQA"},
    "0": {"problem_type": "multiple-choice", "context": None, "prompt": "Is it?", "options": ["Yes", "No"],
          "target": [0], "benchmark_name": "BoolQ"},
}  # fmt: skip

INPUTS = {
    ("free-form", "7"): "Question: Who sings?\nAnswer the question shortly.",
    ("free-form", "3"): "Question: Some context.\nHow many?\nAnswer the question shortly.",
    ("free-form", "12"): "Question: 2 + 2?\nAnswer the question. \nLet's think step by step.",
    ("multiple-choice", "1"): "why\nIt was just\nA. a\nB. b\nC. c\n"
    "Answer with the option letter from the given choices directly.",
    ("multiple-choice", "0"): "Is it?\nA. Yes\nB. No\nAnswer with the option letter from the given choices directly.",
}

SCORER = """
import sys, json, pathlib
print("scored", *sys.argv[1:])
"""


@pytest.fixture
def benchmark(folder):
    data = folder / "mixeval-2024-08-11"
    for name in ("mixeval", "mixeval-hard"):
        (data / name).mkdir(parents=True)
        (data / name / "free-form.json").write_text(json.dumps(FREE_FORM))
        (data / name / "multiple-choice.json").write_text(json.dumps(MULTIPLE_CHOICE))
    return data


MIXEVAL = ["--data", "mixeval-2024-08-11", "--output", "out", "--max_new_tokens", 8]


def test_every_key_order_and_id_is_kept(benchmark, folder, run):
    result = run("mixeval.py", *MIXEVAL)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, suffix in (("mixeval", ""), ("mixeval_hard", "_hard")):
        for part, file, entries in (
            ("free-form", "close_freeform", FREE_FORM),
            ("multiple-choice", "close_multichoice", MULTIPLE_CHOICE),
        ):
            path = folder / "out" / "local_chat" / name / "2024-08-11" / f"local_chat_{file}{suffix}.jsonl"
            rows = rows_of(path)
            assert [row["id"] for row in rows] == list(entries)
            for row in rows:
                entry = entries[row["id"]]
                assert {key: row[key] for key in entry} == entry
                assert set(row) - set(entry) == {"id", "formated_input", "response"}
                assert row["formated_input"] == INPUTS[part, row["id"]]
                assert isinstance(row["response"], str)
    assert "--benchmark mixeval_hard --version 2024-08-11 --model_response_dir out --models_to_eval local_chat" in (
        result.stdout
    )


def test_an_interrupted_run_goes_on(benchmark, folder, run):
    assert run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval").returncode == 0
    responses = folder / "out" / "local_chat" / "mixeval" / "2024-08-11" / "local_chat_close_freeform.jsonl"
    whole, answers = responses.read_bytes(), folder / "out/answers/2024-08-11/mixeval_free-form.jsonl"
    partial = answers.with_name("mixeval_free-form.jsonl.partial-0")
    partial.write_bytes(b"".join(answers.read_bytes().splitlines(keepends=True)[:1]))
    answers.unlink()
    responses.unlink()
    assert run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval").returncode == 0
    assert responses.read_bytes() == whole


def test_answers_to_other_questions_are_not_taken(benchmark, folder, run):
    assert run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval").returncode == 0
    changed = FREE_FORM | {"3": FREE_FORM["3"] | {"prompt": "How few?"}}
    (benchmark / "mixeval" / "free-form.json").write_text(json.dumps(changed))
    result = run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval")
    assert result.returncode == 1 and "error: `prompts` is" in result.stderr
    # Another version has answers of its own
    benchmark.rename(folder / "mixeval-2024-06-01")
    again = run("mixeval.py", "--data", "mixeval-2024-06-01", *MIXEVAL[2:], "--benchmarks", "mixeval")
    assert again.returncode == 0
    rows = rows_of(folder / "out/local_chat/mixeval/2024-06-01/local_chat_close_freeform.jsonl")
    assert "How few?" in rows[1]["formated_input"]


def test_the_scorer_is_called_where_it_is_installed(benchmark, folder, run, monkeypatch):
    (folder / "mix_eval").mkdir()
    (folder / "mix_eval" / "__init__.py").touch()
    (folder / "mix_eval" / "compute_metrics.py").write_text(SCORER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    result = run(
        "mixeval.py", *MIXEVAL, "--benchmarks", "mixeval", "--judge", "--judge_arguments=--free_form_parser rule"
    )
    assert "scored --benchmark mixeval --version 2024-08-11" in result.stdout, result.stderr[-2000:]
    assert "--free_form_parser rule" in result.stdout


@pytest.mark.parametrize("kind", ["no file", "no version", "no options"])
def test_what_is_wrong_with_the_data_is_named_before_any_answer(benchmark, folder, run, kind):
    words = list(MIXEVAL)
    if kind == "no file":
        (benchmark / "mixeval-hard" / "free-form.json").unlink()
        message = "There is no file 'mixeval-2024-08-11/mixeval-hard/free-form.json'"
    elif kind == "no version":
        benchmark.rename(folder / "data")
        words[1], message = "data", "does not end in a version"
    else:
        (benchmark / "mixeval" / "multiple-choice.json").write_text(json.dumps({"5": {"prompt": "p", "target": [0]}}))
        message = "entry '5' has no benchmark_name, options"
    result = run("mixeval.py", *words)
    assert result.returncode == 1 and message in result.stderr and not (folder / "out").exists()
