"""The comparison of `larpo run`, `larpo online` and GRPOTrainer runs all arms at equal numbers of samples."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.skipif(not tiny.HAS_ONLINE, reason="OnlineLarPOTrainer needs TRL 1.16")

STUDY = Path(__file__).parents[1] / "examples" / "studies" / "online" / "compare.py"


def test_the_table_of_the_docs_is_that_of_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(STUDY), "--table"])
    runpy.run_path(str(STUDY), run_name="__main__")
    assert capsys.readouterr().out in (Path(__file__).parents[1] / "docs" / "online.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_arms(project, talkative_model, tmp_path, monkeypatch, capsys):
    flags = ["--model", talkative_model, "--seeds", "0", "--steps", "2", "--prompts-per-step", "4", "--max-tokens", "8"]
    folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--held-out", "2"]
    reward = ["--reward", "run_rewards:vowels"]
    monkeypatch.setattr(sys, "argv", [str(STUDY), *flags, *folders, *reward])
    runpy.run_path(str(STUDY), run_name="__main__")
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert [result["arm"] for result in results] == ["grpo", "online", "run", "semi_online"]
    assert {result["samples"] for result in results} == {2 * 4 * 4}
    assert len({result["before"] for result in results}) == 1
    table = capsys.readouterr().out
    assert all(f"| {arm} | 1 | 32 |" in table for arm in ("run", "online", "semi_online", "grpo"))
