"""`larpo run --small`: what stays, what is replaced, and what it says when it cannot."""

import json
from pathlib import Path

import pytest
import yaml
from small_run import CONFIG, rows_of

from trl_larpo import cli
from trl_larpo.run.small import shrink
from trl_larpo.storage import read_jsonl


def test_functions_and_files_of_the_users_stay(project):
    options = {"reward_funcs": ["run_rewards:vowels", "ORG/REWARD", "pairwise:ORG/RANKER"], "output_dir": "out"}
    small = shrink(CONFIG | options | {"num_samples": 7, "loss_type": "listmle"}, project / "parts")
    assert small["reward_funcs"][0] == "run_rewards:vowels"
    assert small["reward_funcs"][1].endswith("parts/reward_model")
    assert small["reward_funcs"][2] == f"pairwise:{project}/parts/pairrm"
    assert (small["num_samples"], small["loss_type"], small["memory"]) == (7, "listmle", "all")
    [prompts] = small["prompts"]
    assert rows_of(prompts) == rows_of(project / "prompts.jsonl")[:8]


def test_prompts_are_read_as_the_run_reads_them(tmp_path):
    """An empty line, and a character that ends a line for Python but not in JSON."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8")
    [prompts] = shrink({"prompts": str(path), "output_dir": "o"}, tmp_path / "parts")["prompts"]
    assert read_jsonl(prompts) == [{"prompt": "a\u2028b"}, {"prompt": "c"}]


@pytest.mark.slow
def test_a_changed_configuration_starts_over_and_long_prompts_are_left_out(project, capsys):
    long = [{"prompt": f"{i} " + "long " * size} for i, size in enumerate([0, 900, 100, 100, 100, 100])]
    rewards = (
        "def characters(completions, **columns):\n    return [float(sum(map(ord, text))) for text in completions]\n"
    )
    (project / "character_rewards.py").write_text(rewards)
    (project / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    config = CONFIG | {"prompts": "long.jsonl", "num_iterations": 1, "monitor_evals": 0}
    config |= {"reward_funcs": "character_rewards:characters"}
    for num_samples in (4, 6):
        (project / "it.yaml").write_text(yaml.safe_dump(config | {"num_samples": num_samples}))
        assert cli.main(["run", "--config", "it.yaml", "--small"]) == 0
        rows = rows_of(project / "out-small/iteration_1/samples.jsonl")
        assert {len(row["completions"]) for row in rows} == {num_samples} and len(rows) == 3  # and two are held out
    assert "there are no lists" in capsys.readouterr().out
    (project / "out-small/run.yaml").write_text("model_name_or_path: another\n")
    (project / "it.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["run", "--config", "it.yaml", "--small"]) != 0
    assert (project / "out-small/iteration_1/samples.jsonl").exists()


def test_flags_win(project, talkative_model, capsys):
    flags = ["--config", "it.yaml", "--small", "--model_name_or_path", talkative_model, "--num_iterations", "1"]
    assert cli.main(["run", *flags, "--max_new_tokens", "9", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert f"model      {talkative_model}" in output and "iteration 2" not in output
    assert yaml.safe_load((project / "out-small-parts" / "small.yaml").read_text())["output_dir"] == "out-small"


def test_prompts_come_in_the_form_that_is_expected(tmp_path):
    as_text = {"prompts": "ORG/A", "prompt_column": "question", "prompts_as_messages": True, "output_dir": "o"}
    [path] = shrink(as_text, tmp_path)["prompts"]
    row = rows_of(path)[0]
    assert isinstance(row["question"], str) and row["answer"].startswith("#### ")
    several = {"prompts": ["ORG/A", "ORG/B"], "prompt_column": "context_messages", "output_dir": "o"}
    first, second = (rows_of(path) for path in shrink(several, tmp_path)["prompts"])
    assert first[0]["context_messages"][0]["role"] == "user"
    assert not {json.dumps(row) for row in first} & {json.dumps(row) for row in second}


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "`--small` makes a small run of a configuration file; give one with `--config`"),
        (["--config"], "give one with `--config`"),
        (["--config", "none.yaml"], "there is no file 'none.yaml'"),
        (["--config", "empty.yaml"], "'empty.yaml' has no `output_dir`"),
    ],
)
def test_what_cannot_be_made_small(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").touch()
    assert cli.main(["run", "--small", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "sources, schedule, rows", [(1, "drawn", 24), (1, "fresh", 24), (1, "same", 8), (3, "drawn", 8)]
)
def test_each_iteration_has_prompts_enough_for_a_list(tmp_path, sources, schedule, rows):
    config = {"output_dir": "out", "prompts": ["a/b"] * sources, "prompt_schedule": schedule, "num_iterations": 3}
    small = shrink(config | {"reward_funcs": "math"}, tmp_path)
    assert [len(Path(path).read_text().splitlines()) for path in small["prompts"]] == [rows] * sources
