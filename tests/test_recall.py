"""`larpo recall`: estimators against brute force, sampling, resuming, and the samples of finished runs."""

import itertools
import json

import numpy as np
import pytest
import small_run
from small_run import rows_of

from trl_larpo import cli
from trl_larpo.metrics import best_of_n_accuracy, bootstrap_interval, majority_accuracy
from trl_larpo.recall import CheckedSamples, recall_curve
from trl_larpo.run.small import save_small_model, save_small_reward_model
from trl_larpo.storage import write_jsonl

RNG = np.random.default_rng(0)
CASES = [
    (RNG.integers(0, 2, size).astype(bool), RNG.integers(0, 3, size).astype(float), list(RNG.integers(0, 3, size)))
    for size in (1, 2, 3, 5, 6)
    for _ in range(4)
]


def choices(size):
    for n in range(1, size + 1):
        yield n, list(itertools.combinations(range(size), n))


@pytest.mark.parametrize("correct, judged, answers", CASES)
def test_recall_is_the_average_over_all_choices(correct, judged, answers):
    """Every choice of N samples, looked at one by one."""
    result = recall_curve(CheckedSamples("x", [correct, correct[::-1]], [judged, judged[::-1]]), num_bootstrap=10)
    for n, chosen in choices(len(correct)):
        if n in result["n"]:
            expected = np.mean([any(correct[i] for i in places) for places in chosen])
            assert result["recall"]["mean"][result["n"].index(n)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("correct, judged, answers", CASES)
def test_best_of_n_is_the_average_over_all_choices_and_ties(correct, judged, answers):
    for n, chosen in choices(len(correct)):
        by_choice = []
        for places in chosen:
            best = max(judged[i] for i in places)
            by_choice.append(np.mean([correct[i] for i in places if judged[i] == best]))
        # Ties count with those of the whole set in one, with those of the choice in the other: the same on average
        assert best_of_n_accuracy(judged, correct, n) == pytest.approx(np.mean(by_choice), abs=1e-12)


@pytest.mark.parametrize("correct, judged, answers", CASES)
def test_majority_is_the_average_over_all_choices(correct, judged, answers):
    right = [answer == 1 for answer in answers]
    for n, chosen in choices(len(answers)):
        by_choice = []
        for places in chosen:
            votes = [answers[i] for i in places]
            most = max(map(votes.count, votes))
            leading = {answer for answer in votes if votes.count(answer) == most}
            by_choice.append((1 in leading) / len(leading))
        assert majority_accuracy(answers, right, n) == pytest.approx(np.mean(by_choice), abs=1e-12)


def test_majority_of_many_samples_is_drawn():
    answers = [1.0] * 30 + [2.0] * 20 + [None] * 50
    drawn = majority_accuracy(answers, [a == 1.0 for a in answers], 51)
    assert 0.9 < drawn < 1.0
    assert majority_accuracy([None, None], [False, False], 1) == 0.0
    assert majority_accuracy([float("nan"), 2.0], [False, True], 2) == 1.0


def test_a_judge_that_knows_finds_what_recall_promises():
    correct = np.array([True, False, False, True, False])
    result = recall_curve(CheckedSamples("x", [correct], [correct.astype(float)]), num_bootstrap=10)
    assert result["best_of_n"]["mean"] == pytest.approx(result["recall"]["mean"], abs=1e-12)


def test_intervals_cover_the_mean_and_shrink():
    few, many = (RNG.integers(0, 2, size) for size in (20, 2000))
    for values in (few, many):
        low, high = bootstrap_interval(values)
        assert low <= values.mean() <= high
    assert np.diff(bootstrap_interval(many)) < np.diff(bootstrap_interval(few)) / 3


@pytest.mark.parametrize("n", [0, 4])
def test_n_out_of_range(n):
    for function in (best_of_n_accuracy, majority_accuracy):
        with pytest.raises(ValueError, match=r"between 1 and the number of samples \(3\)"):
            function([1.0, 2.0, 3.0], [True, False, True], n)


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A folder with sums and a model that guesses small numbers; the current one."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"1 + {i % 3}?", "answer": f"#### {1 + i % 3}"} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps(row | {"question": f"{i}: {row['question']}"}) + "\n" for i, row in enumerate(rows))
    )
    save_small_model(tmp_path / "model")
    return tmp_path


SUMS = [
    "recall", "--model_name_or_path", "model", "--prompts", "sums.jsonl", "--prompt_column", "question",
    "--prompts_as_messages", "--reward_funcs", "gsm8k", "--num_samples", "12", "--temperature", "0.8", "1.2",
    "--max_new_tokens", "16", "--use_cpu", "--output", "recall",
]  # fmt: skip


@pytest.mark.slow
def test_from_prompts_to_curves(sums, capsys):
    save_small_reward_model(sums / "judge")
    assert cli.main([*SUMS, "--best_of_n_reward", "./judge"]) == 0
    output = capsys.readouterr().out
    result = json.loads((sums / "recall" / "recall.json").read_text())
    assert [one["label"] for one in result["curves"]] == ["temperature 0.8", "temperature 1.2"]
    rows = rows_of(sums / "recall" / "rewarded.jsonl")
    for number, one in enumerate(result["curves"]):
        assert (one["prompts"], one["samples"], one["n"]) == (8, 12, [1, 2, 5, 10, 12])
        own = [row["rewards"][12 * number : 12 * (number + 1)] for row in rows]
        assert one["recall"]["mean"][0] == pytest.approx(np.mean(own))
        assert one["recall"]["mean"][-1] == pytest.approx(np.mean([max(rewards) for rewards in own]))
        assert one["recall"]["mean"] == sorted(one["recall"]["mean"]), "grows with N"
        for name in ("best_of_n", "majority"):
            assert all(a <= b + 1e-12 for a, b in zip(one[name]["mean"], one["recall"]["mean"], strict=True))
        assert one["greedy"]["mean"] == pytest.approx(np.mean([row["rewards"][-1] for row in rows]))
    assert result["curves"][0]["recall"]["mean"][-1] > 0 and "majority vote" in output and "best-of-N" in output
    assert (sums / "recall" / "recall.png").stat().st_size > 10_000
    report = (sums / "recall" / "recall.md").read_text()
    assert "# Recall@N: model" in report and "temperature 1.2: 8 prompts × 12 samples" in report


@pytest.mark.slow
def test_it_goes_on_where_it_stood_and_refuses_other_settings(sums, capsys):
    assert cli.main(SUMS) == 0
    folder = sums / "recall"
    whole = {name: (folder / name).read_bytes() for name in ("samples.jsonl", "rewarded.jsonl", "recall.json")}
    (folder / "rewarded.jsonl").unlink()
    (folder / "samples.jsonl").rename(folder / "samples.jsonl.partial-0")
    lines = (folder / "samples.jsonl.partial-0").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl.partial-0").write_bytes(b"".join(lines[:3]) + b'{"cut o')
    assert cli.main(SUMS) == 0
    for name, data in whole.items():
        assert (folder / name).read_bytes() == data, name
    assert cli.main([*SUMS, "--num_samples", "13"]) == 2
    assert "`num_samples` is 13, but 'recall' was made with 12" in capsys.readouterr().err


def test_a_finished_run_needs_no_new_samples(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(finished_run.parent)
    output = tmp_path / "recall"
    assert cli.main(["recall", "--candidates", "out", "--threshold", "0.3", "--output", str(output)]) == 0
    result = json.loads((output / "recall.json").read_text())
    assert [one["label"] for one in result["curves"]] == [f"iteration {i}, temperature 1" for i in range(3)]
    for i, one in enumerate(result["curves"]):
        rows = rows_of(finished_run / f"iteration_{i}" / "held_out.jsonl")
        assert one["recall"]["mean"][-1] == np.mean([max(row["rewards"]) >= 0.3 for row in rows])


WRONG_MODEL = ["--model_name_or_path", "nomodel", "--reward_funcs", "gsm8k", "--use_cpu"]


@pytest.mark.parametrize("wrong", [["--candidates", "nowhere.jsonl"], ["--prompts", "sums.jsonl", *WRONG_MODEL]])
def test_a_failed_start_does_not_block_its_output(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "sums.jsonl", [{"prompt": "1 + 1 =", "answer": "2", "completions": ["2", "3"], "rewards": [1, 0]}]
    )
    assert cli.main(["recall", *wrong, "--output", "out"]) == 2
    assert cli.main(["recall", "--candidates", "sums.jsonl", "--output", "out"]) == 0
    assert cli.main(["recall", *wrong, "--output", "out"]) == 2
    assert "but 'out' was made with" in capsys.readouterr().err


def test_a_file_of_candidates_leaves_negatives_and_memory_out(tmp_path):
    about = {"finished": True, "num_tokens": 3}
    candidates = [
        about | {"iteration": 2, "source": "policy", "temperature": 1.0},
        about | {"iteration": 2, "source": "random_prompt", "temperature": 1.0},
        about | {"iteration": 1, "source": "policy", "temperature": 1.0},
        about | {"iteration": 2, "source": "policy", "temperature": 1.0},
    ]
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"], "rewards": [0.0, 1.0, 1.0, 0.0]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row | {"candidates": candidates}) + "\n")
    flags = ["--candidates", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.main(["recall", *flags]) == 0
    [one] = json.loads((tmp_path / "out" / "recall.json").read_text())["curves"]
    assert (one["samples"], one["recall"]["mean"]) == (2, [0.0, 0.0])


def test_copies_of_iterations_are_left_alone(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b"], "rewards": [0.0, 1.0]}
    for name in ("iteration_10", "iteration_2", "iteration_2_backup", "iteration_old", "iteration_02"):
        (tmp_path / "run" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "run" / name / "held_out.jsonl", [row])
    (tmp_path / "run/iteration_3").write_text("")
    (tmp_path / "run/run.yaml").write_text("")
    flags = ["--candidates", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    assert cli.main(["recall", *flags]) == 0
    curves = json.loads((tmp_path / "out" / "recall.json").read_text())["curves"]
    assert [one["label"] for one in curves] == ["iteration 2", "iteration 10"]


def test_rewards_of_other_completions_are_not_taken(tmp_path, capsys):
    row = {"prompt": "p", "completions": ["1", "2"], "answer": "2"}
    flags = ["--candidates", str(tmp_path / "c.jsonl"), "--reward_funcs", "gsm8k", "--output", str(tmp_path / "out")]
    for change, error in (
        ({}, None),
        ({"completions": ["2", "1"]}, "holds rewards of other completions"),
        ({"answer": "1"}, "holds rewards of the prompt 'p' with another `answer`"),
        ({}, None),
    ):
        (tmp_path / "c.jsonl").write_text(json.dumps(row | change) + "\n")
        assert cli.main(["recall", *flags]) == (0 if error is None else 2)
        assert error is None or error in capsys.readouterr().err


JUDGE = """
def judge(prompts, completions, **columns):
    if "fails" in prompts[0]:
        raise ValueError("no idea")
    return [None if "silent" in prompt else float(text) for prompt, text in zip(prompts, completions)]
"""


def test_an_edited_reward_function_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "reward_of_recall.py"
    source.write_text("def r(completions, **_): return [1.0 for _ in completions]")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}) + "\n")
    flags = ["recall", "--candidates", "a.jsonl", "--output", "recall", "--num_bootstrap", "10", "--use_cpu"]
    flags += ["--reward_funcs", "reward_of_recall:r", "--best_of_n_reward", "reward_of_recall:r"]
    assert cli.main(flags) == 0
    assert cli.main(flags) == 0
    assert "recall/judged_0.jsonl was complete already" in capsys.readouterr().out
    source.write_text("def r(completions, **_): return [0.0 for _ in completions]")
    assert cli.main(flags) == 2
    assert f"{source}, which holds the reward 'reward_of_recall:r', has changed since" in capsys.readouterr().err


def test_prompts_that_the_judge_could_not_judge_are_left_out(tmp_path, monkeypatch):
    # Judgements were matched by position: those of one prompt were taken for those of the next
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judge_of_recall.py").write_text(JUDGE)
    rows = [
        {"prompt": prompt, "completions": ["0", "1"][:: (-1) ** number], "rewards": [0.0, 1.0][:: (-1) ** number]}
        for number, prompt in enumerate(["fails", "b", "silent", "c", "d"])
    ]
    rows.append({"prompt": "no reward", "completions": ["0", "1"], "rewards": [None, None]})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--candidates", "c.jsonl", "--best_of_n_reward", "judge_of_recall:judge", "--output", "out"]
    for _ in range(2):  # the second time from the file of judgements
        assert cli.main(["recall", *flags]) == 0
        [one] = json.loads((tmp_path / "out/recall.json").read_text())["curves"]
        assert (one["prompts"], one["unjudged"]) == (3, 2)
        assert one["best_of_n"]["mean"] == one["recall"]["mean"] == [0.5, 1.0]
    assert "left out: 2 prompts on which the best-of-N reward failed" in (tmp_path / "out/recall.md").read_text()


BAD = {
    "no output": (["--candidates", "x.jsonl"], "`output` is missing"),
    "no model": (["--prompts", "sums.jsonl", "--output", "o"], "No model: give `model_name_or_path`"),
    "no prompts": (["--model_name_or_path", "model", "--output", "o"], "No prompts: give `prompts`"),
    "no reward": (["--model_name_or_path", "model", "--prompts", "sums.jsonl", "--output", "o"], "No reward"),
    "both": (["--candidates", "x.jsonl", "--prompts", "sums.jsonl", "--output", "o"], "holds samples already"),
    "no file": (["--candidates", "x.jsonl", "--output", "o"], "There is no file 'x.jsonl'"),
    "column": ([*SUMS[1:], "--prompt_column", "problem"], "has no column `problem`. Its columns: question, answer"),
    "template": ([*SUMS[1:], "--prompt_template", "Think."], "has no {prompt} to be replaced"),
    "two greedy": ([*SUMS[1:], "--temperature", "0"], "`greedy` does so already"),
    "answer": ([*SUMS[1:], "--answer_func", "no_such_module_here:f"], "`answer_func`: the module of"),
    "judge": ([*SUMS[1:], "--best_of_n_reward", "./none"], "there is no such folder"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_bad_options_are_one_line(sums, capsys, flags, message):
    assert cli.main(["recall", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("larpo: error: ") and message in error


@pytest.mark.slow
def test_several_files_of_prompts_one_for_each_iteration(project):
    """As the paper's thirds of UltraFeedback are: conversations in a column of another name, unequal sizes."""
    for number, size in enumerate((9, 14)):
        rows = [{"context_messages": [{"role": "user", "content": f"{number} why {i}"}]} for i in range(size)]
        (project / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", "part_0.jsonl", "part_1.jsonl", "--prompt_column", "context_messages"]
    flags += ["--prompt_schedule", "fresh", "--num_held_out", "3", "--memory", "none"]
    assert small_run.larpo_run(*flags) == 0
    for iteration, size in ((1, 9 - 2), (2, 14 - 1)):
        rows = rows_of(project / "out" / f"iteration_{iteration}" / "samples.jsonl")
        assert len(rows) == size
        assert all(row["prompt"][0]["content"].startswith(f"{iteration - 1} why") for row in rows)
    assert len(rows_of(project / "out" / "held_out_prompts.jsonl")) == 3
    assert small_run.larpo_run(*flags, "--output_dir", "other", "--num_iterations", "3") == 2
