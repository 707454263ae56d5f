"""The benchmark script runs and draws, on a tiny model. Its timings are not looked at."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmarks_run_and_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    training_step, plot = load("training_step"), load("plot")
    output = tmp_path / "results.json"
    options = ["--shape", "tiny", "--steps", "1", "--lengths", "20/6", "--lists", "20/6/3", "--output", str(output)]
    results = training_step.main(["pairs", "lists", "memory", "scaling", *options])
    assert list(results) == ["pairs", "lists", "memory", "scaling"]
    pair, ranked = results["pairs"]["results"][0], results["lists"]["results"][0]
    assert set(pair["seconds"]) == {"DPOTrainer", "LarPOTrainer"}
    assert set(ranked["seconds"]) == {"separate", "shared", "DPOTrainer, all pairs"}
    memory = results["memory"]["results"]
    assert [entry["list_size"] for entry in memory] == [2, 4, 8, 16, 32]
    assert memory[-1]["kept_bytes"]["chunks of 2"] <= 1.25 * memory[0]["kept_bytes"]["whole"]
    assert "list of 3, 20/6, 3 pairs" in capsys.readouterr().out
    plot.main(str(output), str(tmp_path / "results.png"))
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_bad_lengths_are_refused(capsys):
    with pytest.raises(SystemExit):
        load("training_step").main(["lists", "--lists", "20/6"])
    assert "'20/6' is not 3 numbers with / between them" in capsys.readouterr().err
