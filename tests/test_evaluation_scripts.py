"""The evaluation scripts: AlpacaEval 2 through the real package and Arena-Hard with a small judge, MixEval's files."""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judge_server import REFERENCE, JudgeServer
from safetensors.torch import load_file, save_file
from small_run import rows_of

from trl_larpo.pools import read_pools
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
        references = (folder / "references.json").read_text()
        (folder / "references.json").write_text(references.replace(REFERENCE, f"{REFERENCE} more"))
        assert "error: `references` is " in alpaca_eval(server).stderr
    written = json.loads((folder / "out" / "my_judge_instruct_weighted" / "result.json").read_text())
    assert (written["win_rate"], written["n_total"], written["missing"]) == (rate, 5, [])
    assert written["settings"]["alpaca_eval"] and written["settings"]["answers"]["temperature"] == 0.7
    assert f"win rate                    {rate:.2f} %" in result.stdout
    assert "judge: alpaca_eval_gpt4_turbo_fn. Another judge's figures cannot be compared" in result.stdout
    assert "LC win rate 31.1, win rate 32.1" in result.stdout and "judged                      5 of 5" in result.stdout


LENGTH = """
def length(prompts, completions, **columns):
    return [float(len(c[-1]["content"])) for c in completions]
"""


@pytest.mark.slow
def test_the_initial_model_and_the_best_of_its_answers_have_the_same_judge(alpaca_eval, folder):
    """Asked as the paper asks for table 4. The package's own files stay as they are."""
    import alpaca_eval as package

    def files():
        return {path for path in Path(package.__file__).parent.rglob("*") if "__pycache__" not in path.parts}

    (folder / "lengths.py").write_text(LENGTH)
    before = files()
    baselines = ["--initial_model", "model", "--best_of_n", 3, "--best_of_n_reward", "lengths:length"]
    recipe = RECIPE.parents[1] / "table4/gemma_memory_all.yaml"
    with JudgeServer("model") as server:
        result = alpaca_eval(
            server, "--judge", "llama3_70b_fn", *baselines, "--recipe", recipe, judge_model="org/Llama-3-70B-Instruct"
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert {(asked["model"], asked["max_tokens"]) for asked in server.requests} == {
            ("org/Llama-3-70B-Instruct", 100)
        }
    results = json.loads((folder / "out/results.json").read_text())
    names = ["model", "initial_model", "initial_model_best_of_3"]
    assert [(each["name"], each["win_rate"]) for each in results] == [(name, 100.0) for name in names]
    for each in results:
        assert each["settings"]["asked_by"] == "alpaca_eval_llama3_70b_fn" and each["environment"]["device"] == "cpu"
        assert each["settings"]["answers"]["batch_size"] == 64 and each["environment"]["transformers"]
    one, best = (rows_of(folder / f"out/{name}/answers.jsonl") for name in names[1:])
    chosen = json.loads((folder / f"out/{names[2]}/model_outputs.json").read_text())
    for alone, several, row in zip(one, best, chosen, strict=True):
        texts = [completion[-1]["content"] for completion in several["completions"]]
        assert len(texts) == 3 and row["output"] == max(texts, key=len)
        assert alone["completions"] == several["completions"][:1], "the same random numbers"
    assert "The paper (the same judge): " in result.stdout and "AlpacaEval 2 LC win rate 56.02" in result.stdout
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
        (["--preset", "mistral_base"], "give --judge_url, e.g. that of `vllm serve Qwen|the package alpaca-eval is"),
        (["--preset", "qwen3", "--judge_later", "--best_of_n", "4"], "--best_of_n and --best_of_n_reward go together"),
        (
            ["--preset", "gemma3", "--judge_later", "--best_of_n", "4", "--best_of_n_reward", "gsm8k"],
            "give --initial_model",
        ),
    ],
)
def test_bad_options_come_before_any_answer(folder, run, words, message):
    result = run("alpaca_eval2.py", "--output", "out", *words)
    assert result.returncode == 2 and not list(folder.glob("out/**/*.jsonl"))
    assert any(part in result.stderr for part in message.split("|"))


def test_presets_are_what_is_sampled_with(folder, run):
    (folder / "references.json").write_text('[{"instruction": "hi", "output": "x", "generator": "y"}]')
    flags = ["--references", "references.json", "--max_new_tokens", 4, "--judge_later"]
    for preset, expected in (
        ("mistral_base", {"temperature": 0.7, "top_p": 1.0, "system_prompt": ""}),
        ("qwen3", {"temperature": 0.7, "top_p": 0.8, "system_prompt": None}),
    ):
        assert run("alpaca_eval2.py", *flags, "--preset", preset, "--output", preset).returncode == 0
        settings = json.loads((folder / preset / "answers.settings.json").read_text())
        assert {name: settings[name] for name in expected} == expected
        [row] = rows_of(folder / preset / "answers.jsonl")
        assert row["prompt"][0]["role"] == ("system" if expected["system_prompt"] == "" else "user")


@pytest.fixture
def write_answers(folder, run):
    """Calls AlpacaEval's script for answers alone, to three instructions, two of them equal."""
    rows = [{"instruction": text, "output": "x", "generator": "y"} for text in ("hi", "tell me", "hi")]
    (folder / "references.json").write_text(json.dumps(rows))
    flags = ["--references", "references.json", "--max_new_tokens", 8, "--temperature", 0.7, "--judge_later"]
    return lambda *more: run("alpaca_eval2.py", *flags, "--output", "out", *more)


def test_a_model_that_was_trained_again_is_another_one(folder, write_answers):
    assert write_answers().returncode == 0
    path = folder / "model/model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path, {"format": "pt"})
    result = write_answers()
    assert result.returncode == 1 and "`model` is 'model', and what it holds has changed since" in result.stderr


def test_equal_questions_have_the_same_answer(folder, write_answers):
    (folder / "lengths.py").write_text(LENGTH)
    result = write_answers("--initial_model", "model", "--best_of_n", 2, "--best_of_n_reward", "lengths:length")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("out", "out/initial_model_best_of_2"):
        first, _, third = json.loads((folder / name / "model_outputs.json").read_text())
        assert first == third and len(rows_of(folder / name / "answers.jsonl")) == 2


def test_answers_that_are_missing_are_tried_again(folder, write_answers, monkeypatch):
    assert write_answers().returncode == 0
    path = folder / "out/answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.splitlines(keepends=True)[0])
    with monkeypatch.context() as patch:
        patch.setattr("answers.sample_file", lambda *_, **__: read_pools(path))  # again it cannot be answered
        result = write_answers()
    assert result.returncode == 1 and "1 of 2 prompts have no answer, such as 'tell me'" in result.stderr
    assert write_answers().returncode == 0 and path.read_bytes() == whole


# Arena-Hard v2


@pytest.fixture
def arena_hard(folder, run):
    """Calls the script with six questions, one of them `quiet`, and one of another category."""
    questions = [
        {"uid": str(i), "prompt": f"{'quiet, ' if i == 2 else ''}tell me {i}", "category": "hard_prompt"}
        for i in range(6)
    ]
    other = [{"uid": "9", "prompt": "sing", "category": "creative_writing"}]
    rows = [
        {"uid": q["uid"], "messages": [{}, {"content": {"answer": f"{REFERENCE} {i}"}}]}
        for i, q in enumerate(questions)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions + other))
    (folder / "baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--questions", "questions.jsonl", "--baseline", "baseline.jsonl", "--preset", "qwen3", "--output", "out"]
    return lambda server, *more: run(
        "arena_hard.py", *flags, "--max_new_tokens", 16, "--judge_url", server.url, "--judge_model", "my/judge", *more
    )


@pytest.mark.slow
def test_arena_hard_asks_in_both_orders_and_counts_clear_verdicts_three_times(arena_hard, folder):
    with JudgeServer("silent") as server:  # which prefers the model
        result = arena_hard(server, "--initial_model", "model")
        assert result.returncode == 0, result.stderr[-3000:]
        assert len(server.requests) == 2 * 2 * 6
        assert "WARNING: 2 judgements have no verdict" in result.stdout
        assert "initial_model: 5 of 6 questions have both verdicts" in result.stdout
    games = rows_of(next((folder / "out/my_judge").glob("games.jsonl*")))
    assert {(g["model_first"], g["verdict"]) for g in games} == {(True, "A>>B"), (False, "B>A")}
    with JudgeServer("reference") as server:
        again = arena_hard(server, "--initial_model", "model")
        assert again.returncode == 0 and len(server.requests) == 4, "only what is missing"
    found = json.loads((folder / "out/results.json").read_text())
    assert [row["name"] for row in found["results"]] == ["model", "initial_model"]
    for row in found["results"]:  # 5 clear ones for the model count 3, 5 others 1; then 1 clear one and 1 against it
        assert row["win_rate"]["rate"] == pytest.approx((5 * 3 + 5) / (5 * 3 + 5 + 3 + 1))
        assert row["win_rate"]["low"] <= row["win_rate"]["rate"] <= row["win_rate"]["high"]
        assert row["judgements"] == 6 and row["answers"]["temperature"] == 0.7
    assert found["judge"] == "my/judge" and found["environment"]["device"] == "cpu"


def test_a_question_with_one_order_alone_does_not_count():
    """A judge that always prefers the first place: it is worth 0.5, whatever is missing."""
    script = runpy.run_path(str(SCRIPTS / "arena_hard.py"))
    games = [{"uid": uid, "model_first": first, "verdict": "A>B"} for uid in "abc" for first in (True, False)]
    assert script["in_both_orders"](games) == games
    assert script["in_both_orders"](games[:-1]) == games[:-2]


@pytest.mark.slow
def test_requests_that_fail_are_left_to_the_next_call(arena_hard, folder):
    with JudgeServer("down") as server:
        result = arena_hard(server)
        assert result.returncode != 0 and "Traceback" not in result.stderr
        assert "12 requests to" in result.stdout and "No verdict on model" in result.stderr
    with JudgeServer("broken") as server:
        result = arena_hard(server)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "WARNING: 2 requests to" in result.stdout and "KeyError: 'choices'" in result.stdout
    with JudgeServer("cut") as server:
        result = arena_hard(server)
        assert result.returncode == 0 and "IncompleteRead" in result.stdout
    with JudgeServer("model") as server:
        assert arena_hard(server).returncode == 0 and len(server.requests) == 2, "only what is missing"


def test_verdicts_beside_another_baseline_are_not_taken(arena_hard, folder):
    with JudgeServer("model") as server:
        assert arena_hard(server).returncode == 0
        asked, path = len(server.requests), folder / "baseline.jsonl"
        path.write_text(path.read_text().replace(REFERENCE, f"{REFERENCE} more"))
        result = arena_hard(server)
        assert result.returncode == 1 and "error: `baseline` is " in result.stderr
        assert len(server.requests) == asked


def test_style_control_takes_out_what_length_explains(monkeypatch):
    """A judge that looks at length alone: a model of longer answers wins, and with style control it does not."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = runpy.run_path(str(SCRIPTS / "arena_hard.py"))
    rng = np.random.default_rng(0)
    results = []
    for extra in (0.5, -0.2):
        styles = np.column_stack([rng.normal(extra, 0.4, 4000), rng.normal(0, 0.1, (4000, 3))])
        outcomes = rng.random(4000) < 1 / (1 + np.exp(-3 * styles[:, 0]))
        results.append({"outcomes": outcomes.astype(float).tolist(), "styles": list(styles)})
    raw, controlled = [np.mean(r["outcomes"]) for r in results], script["style_controlled"](results)
    assert raw[0] > 0.7 and raw[1] < 0.42
    assert controlled == pytest.approx([0.5, 0.5], abs=0.05)
    better = [{"outcomes": [1.0] * 30 + [0.0] * 10, "styles": [np.zeros(4)] * 40}]
    assert script["style_controlled"](better) == pytest.approx([0.75], abs=1e-3)


def test_style_of_a_text(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = runpy.run_path(str(SCRIPTS / "arena_hard.py"))
    text = "# Head\n- one **bold** word\n2. two\n```\n# no head\n- none\n```\n"
    assert script["style_of"](text).tolist() == [8, 1, 2, 1]
    assert script["style_difference"](text, text).tolist() == [0, 0, 0, 0]
    assert [script["verdict_of"](x) for x in ("[[A>B]] no, [[B>>A]]", "A>B", "[[A>>>B]]")] == ["B>>A", None, None]


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
import json, os, sys
from pathlib import Path
print("scored", *sys.argv[1:])
assert os.environ["MODEL_PARSER_API"] == "EMPTY"
value = lambda name: sys.argv[sys.argv.index(name) + 1]
folder = Path(value("--model_response_dir"), "local_chat", value("--benchmark"), value("--version"))
kind = "rule" if "rule" in sys.argv else "model_judge_" + value("--freeform_judge").replace("/", "_")
files = [folder / f"judge_results_{part}_{kind}.jsonl" for part in ("ff", "mp")]
said = os.environ.get("SAID", "[[1]] [[A]]")
if "--compute_score_from_judged_file" not in sys.argv:
    if said == "error":
        raise OSError
    for file in files:
        file.write_text((json.dumps({"judge_response": said or None}) + "\\n") * 2)
    if kind == "rule":
        raise KeyError("number_samples")
if all(file.exists() for file in files):  # else mix_eval ends without an error, too
    (folder / "score.json").write_text("{}")
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


@pytest.fixture
def mix_eval(benchmark, folder, monkeypatch):
    """A package that writes the files of mix_eval."""
    (folder / "mix_eval").mkdir()
    (folder / "mix_eval" / "__init__.py").touch()
    (folder / "mix_eval" / "compute_metrics.py").write_text(SCORER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("MODEL_PARSER_API", raising=False)


def test_the_scorer_is_called_where_it_is_installed(mix_eval, folder, run):
    result = run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval", "--judge", "--initial_model", "model")
    first, second = [line for line in result.stdout.splitlines() if line.startswith("scored")][::2]
    assert first.startswith("scored --benchmark mixeval --version 2024-08-11"), result.stderr[-2000:]
    assert "--free_form_parser rule --multi_choice_parser rule" in first and "out/initial_model" in second
    assert "--compute_score_from_judged_file" in result.stdout, "the rules' first call fails once it has judged"
    parser = ["--parser_model", "my/parser", "--parser_url", "http://127.0.0.1:1/v1"]
    result = run("mixeval.py", *MIXEVAL, "--benchmarks", "mixeval", *parser)
    assert (
        "--freeform_judge my/parser --multichoice_judge my/parser --api_base_url http://127.0.0.1:1/v1" in result.stdout
    )
    assert json.loads((folder / "out/environment.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("parser", [[], ["--parser_model", "my/parser", "--parser_url", "http://127.0.0.1:1/v1"]])
def test_a_score_of_an_earlier_call_is_not_taken(mix_eval, folder, run, parser):
    words = [*MIXEVAL, "--benchmarks", "mixeval", "--judge", *parser]
    score = folder / "out/local_chat/mixeval/2024-08-11/score.json"
    assert run("mixeval.py", *words).returncode == 0 and score.exists()
    result = run("mixeval.py", *words, SAID="error")
    assert result.returncode == 1 and "mix_eval gave no score" in result.stderr and not score.exists()


def test_scores_of_a_parser_that_is_down_are_refused(mix_eval, folder, run):
    """mix_eval gives random scores then, and ends without an error."""
    words = [*MIXEVAL, "--benchmarks", "mixeval", "--judge", "--parser_model", "my/parser", "--parser_url", "http://x"]
    score = folder / "out/local_chat/mixeval/2024-08-11/score.json"
    for said, number in (("", 4), ("I cannot tell.", 4), ("[[1]]", 2), ("[[A]]", 2)):
        result = run("mixeval.py", *words, SAID=said)
        assert result.returncode == 1 and not score.exists()
        assert f"my/parser gave no verdict on {number} of 4 answers, which mix_eval scores at random" in result.stderr
    assert run("mixeval.py", *words).returncode == 0 and score.exists()


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
