"""Every recipe has the paper's settings, is listed with the paper's figures, and runs from end to end in small form."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from trl_larpo import cli
from trl_larpo.report.page import write_report as page
from trl_larpo.run import loop
from trl_larpo.storage import read_json, read_jsonl

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = {str(path.relative_to(FOLDER)): yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*/*.yaml"))}

# The paper's settings, and our choices where it is silent (OURS), written down independently of the recipes:
# file: (responses k, selection best + worst, temperature, memory, loss)
PAPER = {}
for _model, _temperature in (("mistral_base", 1.0), ("mistral_instruct", 0.8)):
    for _judge in ("pairrm", "fsfairx"):
        for _loss, _best, _worst in (("contrastive", 1, 3), ("lambdarank", 2, 2), ("listmle", 2, 2)):
            PAPER[f"table2/{_model}_{_loss}_{_judge}.yaml"] = (10, _best, _worst, _temperature, "none", _loss)
    PAPER[f"table2/{_model}_iterative_dpo_pairrm.yaml"] = (2, 1, 1, _temperature, "none", "pairwise")
for _model, _temperature in (("gemma", 1.0), ("mistral_instruct", 0.8)):
    PAPER[f"table3/{_model}_pairwise.yaml"] = (2, 1, 1, _temperature, "none", "pairwise")
    PAPER[f"table3/{_model}_contrastive.yaml"] = (4, 1, 3, _temperature, "none", "contrastive")
    for _loss in ("listmle", "lambdarank"):
        PAPER[f"table3/{_model}_{_loss}.yaml"] = (4, 2, 2, _temperature, "none", _loss)
for _memory in ("none", "previous", "all"):
    PAPER[f"table4/gemma_memory_{_memory}.yaml"] = (2, 1, 1, 1.0, _memory, "pairwise")
for _kind, _temperature in (("easiest", 1.0), ("easy", 1.0), ("hard", 1.0), ("hardest", 0.7)):
    PAPER[f"figure4a/mathstral_{_kind}_negatives.yaml"] = (10, 1, 1, _temperature, "none", "pairwise")
for _figure in ("figure4b/mistral_instruct", "figure6/gemma"):
    for _temperature in (0.8, 0.9, 1.0, 1.1, 1.2):
        PAPER[f"{_figure}_temperature_{_temperature}.yaml"] = (2, 1, 1, _temperature, "none", "pairwise")
for _k in (4, 6, 8, 10):
    PAPER[f"figure4c/mistral_instruct_{_k}_responses.yaml"] = (_k, 1, _k - 1, 1.0, "none", "contrastive")

# What is our choice in all recipes, and beyond that in those of a row
OURS = ("beta", "num_held_out", "num_eval_samples", "max_new_tokens", "gradient_checkpointing", "save_steps")
OURS_TOO = {
    "table2/mistral_base_iterative": ("num_samples", "num_best", "temperature", "reward_funcs", "memory"),
    "table2/mistral_instruct_iterative": ("num_samples", "num_best", "temperature", "reward_funcs", "memory"),
    "table2": ("memory",),
    "table3": ("temperature", "reward_funcs", "memory"),
    "table4": ("temperature", "reward_funcs"),
    "figure4a/mathstral_easi": ("num_samples", "memory", "temperature"),
    "figure4a/mathstral_easy": ("num_samples", "memory", "temperature"),
    "figure4a": ("num_samples", "memory"),
    "figure4b": ("num_samples", "num_best", "reward_funcs", "memory"),
    "figure6": ("num_samples", "num_best", "reward_funcs", "memory"),
    "figure4c": ("reward_funcs", "memory"),
}

MODELS = {
    "mistral_base": "alignment-handbook/zephyr-7b-sft-full",
    "mistral_instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    "gemma": "google/gemma-2-2b-it",
    "mathstral": "mistralai/Mathstral-7B-v0.1",
}

# AlpacaEval 2 LC win rate, win rate, MixEval, MixEval-Hard, as printed in the paper
FIGURES = {
    "table2/mistral_base_iterative_dpo_pairrm.yaml": "18.9 16.7 .660 .341",
    "table2/mistral_base_contrastive_pairrm.yaml": "31.6 30.8 .703 .409",
    "table2/mistral_base_lambdarank_pairrm.yaml": "34.9 37.2 .695 .452",
    "table2/mistral_base_listmle_pairrm.yaml": "31.1 32.1 .669 .390",
    "table2/mistral_base_contrastive_fsfairx.yaml": "41.5 42.9 .718 .417",
    "table2/mistral_base_lambdarank_fsfairx.yaml": "35.8 34.1 .717 .431",
    "table2/mistral_base_listmle_fsfairx.yaml": "36.6 37.8 .730 .423",
    "table2/mistral_instruct_iterative_dpo_pairrm.yaml": "20.4 24.8 .719 .389",
    "table2/mistral_instruct_contrastive_pairrm.yaml": "32.7 38.6 .718 .418",
    "table2/mistral_instruct_lambdarank_pairrm.yaml": "32.9 38.9 .720 .417",
    "table2/mistral_instruct_listmle_pairrm.yaml": "29.7 36.2 .709 .397",
    "table2/mistral_instruct_contrastive_fsfairx.yaml": "43.0 53.8 .718 .425",
    "table2/mistral_instruct_lambdarank_fsfairx.yaml": "41.9 48.1 .740 .440",
    "table2/mistral_instruct_listmle_fsfairx.yaml": "39.6 48.1 .717 .397",
    "table3/gemma_pairwise.yaml": "41.39 54.60 .6740 .3375",
    "table3/gemma_contrastive.yaml": "43.41 56.83 .6745 .3315",
    "table3/gemma_listmle.yaml": "49.77 62.05 .6715 .3560",
    "table3/gemma_lambdarank.yaml": "43.76 60.56 .6750 .3560",
    "table3/mistral_instruct_pairwise.yaml": "36.43 41.86 .7175 .4105",
    "table3/mistral_instruct_contrastive.yaml": "38.44 42.61 .7260 .4340",
    "table3/mistral_instruct_listmle.yaml": "38.02 43.03 .7360 .4200",
    "table3/mistral_instruct_lambdarank.yaml": "40.29 46.21 .7370 .4400",
    "table4/gemma_memory_none.yaml": "55.06 66.56",
    "table4/gemma_memory_previous.yaml": "55.62 70.92",
    "table4/gemma_memory_all.yaml": "56.02 72.50",
}


def test_there_is_one_recipe_for_each_point_of_the_paper():
    assert sorted(RECIPES) == sorted(PAPER)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_settings_are_the_papers(name):
    recipe = RECIPES[name]
    num_samples, best, worst, temperature, memory, loss = PAPER[name]
    assert (recipe["num_samples"], recipe["num_best"], recipe["num_worst"]) == (num_samples, best, worst)
    assert (recipe["temperature"], recipe["memory"], recipe["loss_type"]) == (temperature, memory, loss)
    [model] = [value for key, value in MODELS.items() if Path(name).name.startswith(key)]
    assert recipe["model_name_or_path"] == model
    on_gsm8k = name.startswith("figure4a")
    assert recipe["learning_rate"] == (2e-7 if on_gsm8k else 5e-7)
    assert recipe["num_iterations"] == 3 and recipe["num_train_epochs"] == 2
    assert recipe["lr_scheduler_type"] == "cosine" and recipe["bf16"] is True
    assert (recipe["max_length"], recipe["max_prompt_length"]) == (2048, 1000)
    batch = recipe["num_processes"] * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert batch == 128
    assert recipe["accelerate_config"] == "examples/accelerate_configs/zero2.yaml"
    assert recipe["output_dir"] == f"outputs/recipes/{name.removesuffix('.yaml')}"
    if "pairrm" in name:
        assert recipe["reward_funcs"] == "pairwise:llm-blender/PairRM-hf"
    else:
        assert recipe["reward_funcs"] == ("gsm8k" if on_gsm8k else "sfairXC/FsfairX-LLaMA3-RM-v0.1")
    if name.startswith(("table4", "figure4a")):
        assert recipe["prompt_schedule"] == "same"
    else:
        assert recipe["prompts"] == [f"RLHFlow/ultrafeedback_iter{i}" for i in (1, 2, 3)]
        assert recipe["prompt_schedule"] == "fresh"


@pytest.mark.parametrize("name", sorted(PAPER))
def test_what_the_paper_does_not_say_is_marked(name):
    text = (FOLDER / name).read_text()
    too = next(options for start, options in OURS_TOO.items() if name.startswith(start))
    for option in ("num_samples", "num_best", "temperature", "reward_funcs", "memory", "learning_rate", *OURS):
        marked = re.search(rf"^{option}: .*# our choice", text, re.MULTILINE) is not None
        assert marked == (option in (*OURS, *too)), option
    assert f"larpo run --config examples/recipes/{name}\n" in re.sub(r" +#[^\n]*", "", text)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_are_the_papers(name):
    """In the head of the recipe and in the table."""
    figures = [float(figure) for figure in FIGURES[name].split()]
    text = (FOLDER / name).read_text().split("larpo run")[0]
    said = text.split("The paper's figures")[1]
    assert [float(number) for number in re.findall(r"\d*\.\d+", said)] == figures
    [line] = [line for line in README.splitlines() if f"({name})" in line]
    assert [float(number) for number in re.findall(r"(?<![\w/])\d*\.\d+", line.split("|")[2])] == figures


def test_the_table_lists_every_recipe_with_its_estimate():
    gpu_hours = runpy.run_path(str(FOLDER / "gpu_hours.py"))["gpu_hours"]
    for name, recipe in RECIPES.items():
        [line] = [line for line in README.splitlines() if f"({name})" in line]
        _, row, _, hours, ours, _ = map(str.strip, line.split("|"))
        assert row.startswith(f"[{Path(name).stem}]")
        assert int(hours) == round(gpu_hours(recipe)) and ours == "not run"


@pytest.mark.parametrize("name", sorted(PAPER))
def test_it_runs_in_small_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Pictures take a third of the time: one page, at the end, is enough here
    monkeypatch.setattr(
        loop, "write_report", lambda path: (path / "iteration_3" / "health.json").exists() and page(path)
    )
    assert cli.main(["run", "--config", str(FOLDER / name), "--small"]) == 0
    recipe, out = RECIPES[name], tmp_path / f"outputs/recipes/{name.removesuffix('.yaml')}-small"
    ran = yaml.safe_load((out / "run.yaml").read_text())
    for option in ("num_samples", "num_best", "num_worst", "memory", "num_iterations", "learning_rate", "beta",
                   "num_train_epochs", "prompt_schedule", "prompt_column"):  # fmt: skip
        assert ran[option] == recipe[option], option
    assert ran["temperature"] == [recipe["temperature"]] and ran["loss_type"] == [recipe["loss_type"]]
    assert ran["negatives"] == ([recipe["negatives"]] if "negatives" in recipe else [])
    worst = []
    for iteration in (1, 2, 3):
        folder = out / f"iteration_{iteration}"
        assert read_json(folder / "evaluation.json")["prompts"] == 2
        for row in read_jsonl(folder / "lists.jsonl"):
            assert len(row["completions"]) <= recipe["num_best"] + recipe["num_worst"]
            worst += [candidate["source"] for candidate in row["candidates"][-1:]]
    assert worst and (out / "report.html").exists()
    if "negatives" in recipe:  # unless it equals a sample of the prompt itself, word for word
        assert worst.count(recipe["negatives"]) > len(worst) / 2
