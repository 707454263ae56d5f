"""LoRA through the loop: the base stays, iterations train one adapter, the reference is the adapter at the start."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_run import change_options, larpo_run, log_probability, rows_of, without_kernels_of_bfloat16
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_larpo.generation.in_process import generate_completions
from trl_larpo.run.context import RunContext
from trl_larpo.run.monitor import TrainingMonitor

peft = pytest.importorskip("peft")

ADAPTER = ["--use_peft", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj", "--logging_steps", 1]


def quantization(flags):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {"quantization_config": config} if "--load_in_4bit" in flags else {}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]], ids=["LoRA", "QLoRA"])
def test_one_adapter_goes_through_all_iterations(project, talkative_model, flags, monkeypatch):
    if flags:
        without_kernels_of_bfloat16(monkeypatch)
    before = {path.name: path.read_bytes() for path in Path(talkative_model).iterdir()}
    assert larpo_run(*ADAPTER, *flags, "--monitor_evals", 0) == 0
    assert {path.name: path.read_bytes() for path in Path(talkative_model).iterdir()} == before
    folders = [project / f"out/iteration_{i}/model" for i in (1, 2)]
    for folder in folders:
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert not list(folder.glob("*.bin"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)

    # The reference of the second iteration is the base with the first one's adapter, and training starts from it
    base = AutoModelForCausalLM.from_pretrained(talkative_model, **quantization(flags))
    model = peft.PeftModel.from_pretrained(base, folders[0])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    references = {row["prompt_id"]: row["ref_logps"] for row in rows_of("out/iteration_2/ref_logps.jsonl")}
    lists = [row for row in rows_of("out/iteration_2/lists.jsonl") if row["problem"] is None]
    for row in lists[:2]:
        by_hand = [
            log_probability(model, tokenizer, row["prompt"], completion, cut)
            for completion, cut in zip(row["completions"], row["completion_ids"], strict=True)
        ]
        assert references[row["prompt_id"]] == pytest.approx(by_hand, abs=2e-2 if flags else 1e-3)
        with model.disable_adapter():
            other = log_probability(model, tokenizer, row["prompt"], row["completions"][0], row["completion_ids"][0])
        assert abs(other - by_hand[0]) > 1e-4, "or the adapter does nothing, and this test shows nothing"
    # Samples come from the very same model: of the quantized base, where that is trained on
    rows = rows_of("out/iteration_2/samples.jsonl")
    keys = [f"2/{row['prompt_id']}" for row in rows]
    sampled = generate_completions(
        model, tokenizer, [row["prompt"] for row in rows], num_samples=4, max_new_tokens=24, seed=42, keys=keys
    )
    texts = [[completion[-1]["content"] for completion in row["completions"]] for row in rows]
    assert texts == [[sample.text for sample in of_prompt] for of_prompt in sampled]
    start = next(row for row in rows_of("out/iteration_2/training_log.jsonl") if "rewards/margins" in row)
    assert start["rewards/margins"] == pytest.approx(0, abs=5e-2 if flags else 1e-4)
    assert json.loads((project / "out/iteration_2/evaluation.json").read_text())["kl_from_initial"]["mean"] != 0

    # Both load by the adapter's folder
    loaded = AutoModelForCausalLM.from_pretrained(folders[1])
    ids = tokenizer("why is the dog blue", return_tensors="pt")["input_ids"]
    bare = AutoModelForCausalLM.from_pretrained(talkative_model)
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, bare(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kept_step", [0, 7], ids=["start", "weights that are gone"])
def test_a_training_that_does_harm_keeps_the_adapter_it_started_from(project, monkeypatch, kept_step):
    monkeypatch.setattr(TrainingMonitor, "kept_step", property(lambda self: kept_step))
    monkeypatch.setattr(TrainingMonitor, "explanation", lambda self: "harm")
    assert larpo_run(*ADAPTER, "--num_iterations", 1, "--monitor_evals", 1, "--monitor_time_share", 1) == 0
    adapter = load_file(project / "out/iteration_1/model/adapter_model.safetensors")
    outputs = [value for name, value in adapter.items() if "lora_B" in name]
    assert outputs and not any(torch.any(value) for value in outputs), "as LoRA begins"


@pytest.mark.slow
def test_a_base_that_moves_between_iterations_is_the_same_one(project, talkative_model):
    shutil.copytree(talkative_model, project / "base")
    change_options(project, model_name_or_path="base", monitor_evals=0)
    assert larpo_run(*ADAPTER, "--num_iterations", 1) == 0
    shutil.copytree("out", "moved")
    assert larpo_run(*ADAPTER) == 0
    (project / "base").rename("elsewhere")
    tiny.save_tiny_model(project / "base", initializer_range=0.2)  # other weights in its old place
    assert larpo_run(*ADAPTER, "--output_dir", "moved", "--model_name_or_path", "elsewhere") == 0
    names = ("samples.jsonl", "rewarded.jsonl", "lists.jsonl", "ref_logps.jsonl", "held_out.jsonl", "evaluation.json",
             "model/adapter_model.safetensors")  # fmt: skip
    for name in names:
        still, moved = (project / folder / "iteration_2" / name for folder in ("out", "moved"))
        assert still.read_bytes() == moved.read_bytes(), name
    for number in (1, 2):
        settings = json.loads((project / f"moved/iteration_{number}/model/adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "elsewhere"


@pytest.mark.parametrize("keeps_adapter, revision", [(True, "v2"), (False, "main")])
def test_the_base_of_an_adapter_keeps_its_revision(keeps_adapter, revision):
    folder = SimpleNamespace(
        model_path=lambda number: f"model of {number}",
        keeps_adapter=keeps_adapter,
        model=SimpleNamespace(model_revision="v2"),
    )
    context = RunContext(folder)
    assert context.model(0) == ("model of 0", "v2") and context.model(1) == ("model of 1", revision)
