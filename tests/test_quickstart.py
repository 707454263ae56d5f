"""The quickstart from end to end on a tiny model, and its prompts."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import quickstart

    yield quickstart
    for name in ("quickstart", "prompts"):
        sys.modules.pop(name)


def test_runs_from_prompts_to_picture(quickstart, tiny_model, tmp_path, capsys, monkeypatch):
    # A random model follows no instruction: here every other answer earns something
    monkeypatch.setattr(
        quickstart,
        "verifiable_instruction_reward",
        lambda prompts, completions, **columns: [float(i % 2) for i in range(len(completions))],
    )
    monkeypatch.setattr(quickstart, "bfloat16_is_fast", lambda: False)
    options = ["--model", tiny_model, "--output_dir", str(tmp_path), "--num_train_prompts", "6"]
    options += [
        "--num_held_out_prompts",
        "4",
        "--num_samples",
        "4",
        "--num_eval_samples",
        "2",
        "--max_new_tokens",
        "400",
    ]
    options += ["--learning_rate", "1e-3"]
    results = quickstart.main(options)

    saved = json.loads((tmp_path / "model" / "results.json").read_text())
    assert saved == json.loads(json.dumps(results))
    assert saved["num_held_out_prompts"] == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lists = [json.loads(line) for line in (tmp_path / "candidate_lists.jsonl").read_text().splitlines()]
    assert lists and all(len(row["completions"]) == len(row["rewards"]) >= 2 for row in lists)
    assert len((tmp_path / "held_out_answers.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Instructions followed, 4 held-out prompts" in printed
    assert "before:" in printed and "after:" in printed


def test_comparison_is_by_prompt(quickstart):
    from trl_larpo.generation import Sample

    prompts = quickstart.make_prompts(["bees", "tea"])
    good, bad = Sample("A fact because bees fly.", 6, True), Sample("No.", 2, True)
    prompts = [row | {"instruction": "no_commas", "value": None} for row in prompts]
    results = quickstart.compare(
        prompts, before=[[bad, bad]] * 4, after=[[good, good], [good, bad], [good, bad], [bad, bad]]
    )
    assert results["before"]["satisfaction"] == [0.0, 0.0]
    assert results["after"]["satisfaction"][0] == 0.5
    # Differences 1, 0.5, 0.5, 0: standard deviation sqrt(1/6), over four prompts
    assert results["gain"] == pytest.approx([0.5, (1 / 6) ** 0.5 / 2])


def test_prompts_are_balanced_and_topics_held_out(quickstart):
    train, held_out = (
        quickstart.make_prompts(topics) for topics in (quickstart.TRAIN_TOPICS, quickstart.HELD_OUT_TOPICS)
    )
    assert not set(quickstart.TRAIN_TOPICS) & set(quickstart.HELD_OUT_TOPICS)
    assert (len(train), len(held_out)) == (80, 64)
    for prompts in (train, held_out):
        assert len({row["prompt"][-1]["content"] for row in prompts}) == len(prompts)
        kinds = [quickstart.label(row) for row in prompts]
        assert [kinds.count(kind) for kind in set(kinds)] == [len(prompts) // 4] * 4
