"""
Every recipe has the paper's settings, is listed with the paper's figures, and can be started in small form.

One of each kind runs from end to end here; examples/recipes/run_small.py runs all of them.
"""

import json
import re
import runpy
from pathlib import Path

import lanes
import pytest
import yaml
from datasets import Dataset

from trl_larpo import cli
from trl_larpo.candidates import Candidate, CandidatePool, build_lists
from trl_larpo.prompts import Prompt
from trl_larpo.report.page import write_report as page
from trl_larpo.run import loop, small
from trl_larpo.run.options import SelectionOptions
from trl_larpo.storage import read_json, read_jsonl

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = {str(path.relative_to(FOLDER)): yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*/*.yaml"))}
TODAY = [name for name in RECIPES if name.startswith("today/")]
PAPERS = [name for name in RECIPES if name not in TODAY]

LOSSES = ("contrastive", "lambdarank", "listmle")
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2)  # those that the paper searches

# The trained rows of the paper's tables, and the points of its figures
ROWS = [
    *(f"table2/{model}_{loss}_{judge}" for model in ("mistral_base", "mistral_instruct")
      for loss in LOSSES for judge in ("pairrm", "fsfairx")),
    *(f"table2/{model}_iterative_dpo_pairrm" for model in ("mistral_base", "mistral_instruct")),
    *(f"table3/{model}_{loss}" for model in ("gemma", "mistral_instruct") for loss in ("pairwise", *LOSSES)),
    *(f"table4/gemma_memory_{memory}" for memory in ("none", "previous", "all")), "table4/gemma_diverse_temperature",
    *(f"table6/mistral_{data}" for data in ("gsm8k", "math")),
    *(f"figure4a/mathstral_{kind}_negatives" for kind in ("easiest", "easy", "hard", "hardest")),
    *(f"figure4b/mistral_instruct_temperature_{temperature}" for temperature in TEMPERATURES),
    *(f"figure4c/mistral_instruct_{size}_responses" for size in (4, 6, 8, 10)),
    *(f"figure6/gemma_temperature_{temperature}" for temperature in TEMPERATURES),
]  # fmt: skip
# Beside the paper's: the best against the worst of the samples that its lists are made of
BASELINES = [f"table2/{model}_pairwise_{judge}" for model in ("mistral_base", "mistral_instruct")
             for judge in ("pairrm", "fsfairx")]  # fmt: skip
NAMES = sorted(f"{row}.yaml" for row in ROWS + BASELINES)

MODELS = {
    "mistral_base": "alignment-handbook/zephyr-7b-sft-full",
    "mistral_instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    "gemma": "google/gemma-2-2b-it",
    "mathstral": "mistralai/Mathstral-7B-v0.1",
    "mistral_gsm8k": "outputs/recipes/table6/sft",
    "mistral_math": "outputs/recipes/table6/sft",
}
PAIRRM, FSFAIRX = "pairwise:llm-blender/PairRM-hf", "sfairXC/FsfairX-LLaMA3-RM-v0.1"


def stated(name):
    """
    What the paper states of a row, by option; an option that is missing here it leaves open.

    `kept` is no option but the outcome of two: which ranks of the responses to a prompt are trained on.
    """
    place, row = name.removesuffix(".yaml").split("/")
    [model] = [model for start, model in MODELS.items() if row.startswith(start)]
    loss = next((loss for loss in LOSSES if loss in row), "pairwise")
    facts = {"model_name_or_path": model, "loss_type": loss, "num_iterations": 3}
    if place == "table2":
        facts["reward_funcs"] = FSFAIRX if row.endswith("fsfairx") else PAIRRM
        if "iterative_dpo" in row:  # H.1
            return facts | {"num_samples": 2}
        facts |= {"num_samples": 10, "temperature": 1.0 if "base" in row else 0.8}
        # Algorithm 1; section 4: the pool "includes all previously generated responses"
        facts |= {"prompt_schedule": "drawn", "memory": "all"}
        if loss == "pairwise":
            return facts | {"kept": [1, 10]}
        return facts | {"kept": [1, 8, 9, 10] if loss == "contrastive" else [1, 2, 9, 10]}  # top-1 + last-3, 2 + 2
    if place == "table3":  # H.2. Top-1 against the rest, or top-2 and last-2: of four responses that is all
        size = 2 if loss == "pairwise" else 4
        facts |= {"learning_rate": 5e-7, "num_train_epochs": 2, "reward_funcs": FSFAIRX}
        return facts | {"num_samples": size, "kept": list(range(1, size + 1))}
    if place == "table4":  # H.3. Two responses in each iteration; the best of the merged list against the worst
        facts |= {"reward_funcs": FSFAIRX, "num_samples": 2, "num_best": 1, "num_worst": 1}
        if row == "gemma_diverse_temperature":  # two at 1 and two at 0.5, ranked together
            facts |= {"memory": "none", "temperature": 1.0}
            return facts | {"negatives": "low_temperature", "low_temperature": 0.5, "num_negatives": 2}
        return facts | {"memory": row.removeprefix("gemma_memory_")}
    if place == "table6":  # H.4. A rule's 0 or 1
        data = row.removeprefix("mistral_")
        facts |= {"learning_rate": 1e-7, "num_train_epochs": {"gsm8k": 2, "math": 1}[data], "num_iterations": 5}
        return facts | {"reward_funcs": data, "num_best": 1, "num_worst": 1}
    if place == "figure4a":  # H.5. A correct answer against a wrong one
        facts |= {"learning_rate": 2e-7, "reward_funcs": "gsm8k", "num_best": 1, "num_worst": 1}
        if "easiest" in row:  # a response to a random prompt of UltraFeedback
            return facts | {"negatives": "random_prompt", "random_prompts": "RLHFlow/ultrafeedback_iter1"}
        if "easy" in row:  # a response to any other problem of GSM8K's train set: in the run's own prompts
            return facts | {"negatives": "random_prompt"}
        return facts | {"temperature": 0.7 if "hardest" in row else 1.0}
    if place == "figure4c":  # H.7. Top-1 against the rest
        size = int(row.split("_")[2])
        facts |= {"loss_type": "contrastive", "temperature": 1.0, "reward_funcs": FSFAIRX}
        return facts | {"num_samples": size, "kept": list(range(1, size + 1))}
    return facts | {"temperature": float(row.split("_temperature_")[1])}  # figures 4b and 6: iterative DPO


def kept_ranks(recipe):
    """Which of the responses to a prompt the package trains on, best = 1."""
    options = SelectionOptions(num_best=recipe["num_best"], num_worst=recipe["num_worst"])
    candidates = [Candidate(f"response {i}", float(-i)) for i in range(recipe["num_samples"])]
    [made], _ = build_lists([CandidatePool(Prompt.of("p"), candidates)], options.selection())
    return [int(1 - candidate.reward) for candidate in made.selected]


# As printed in the paper. These and `stated` are the one place where its facts are kept: recipes and pages are compared
# with them. AlpacaEval 2 LC win rate, win rate, MixEval, MixEval-Hard; table 6: greedy accuracy, Recall@20, @50, @100
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
    "table6/mistral_gsm8k.yaml": ".7991 .9545 .9727 .9826",
    "table6/mistral_math.yaml": ".2502 .5416 .6258 .6846",
    "table4/gemma_memory_none.yaml": "55.06 66.56",
    "table4/gemma_memory_previous.yaml": "55.62 70.92",
    "table4/gemma_memory_all.yaml": "56.02 72.50",
}

# Of models that are not trained here, by what stands before them in the README
NOT_TRAINED = {
    "| SFT |": "8.4 6.2 .602 .279 17.1 14.7 .707 .361",
    "| DPO |": "15.1 12.5 .686 .341 26.8 24.9 .702 .355",
    "| SimPO |": "21.5 20.8 .672 .347 32.1 34.8 .702 .363",
    "Before training: Gemma-2-2b-it": "36.39 38.26 .6545 .2980 21.14 14.22 .7070 .3610",
    "the paper does not state which. Before training:": "47.03 48.38",
    "Before SFT, and after it: GSM8K": ".4663 .8347 .9090 .9477 .7680 .9462 .9629 .9735"
    " .1004 .2600 .3354 .4036 .2334 .5340 .6190 .6780",
}


def test_there_is_one_recipe_for_each_point_of_the_paper():
    assert sorted(PAPERS) == NAMES
    assert len(set(NAMES)) == 14 + 8 + 4 + 2 + 4 + 5 + 4 + 5 + len(BASELINES)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_papers(name):
    recipe = RECIPES[name]
    found = recipe | {"kept": kept_ranks(recipe)}
    facts = stated(name)
    assert {option: found.get(option) for option in facts} == facts
    # zephyr-7b-sft-full was trained with an empty system turn, which is not the same as none
    assert recipe.get("system_prompt") == ("" if "mistral_base" in name else None)
    assert ("random_prompts" in recipe) == ("easiest" in name)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_paper_leaves_open_is_the_same_everywhere(name):
    """That of the code near the paper, and of one machine with eight GPUs."""
    recipe = RECIPES[name]
    assert recipe["lr_scheduler_type"] == "cosine" and recipe["bf16"] is True
    assert recipe["num_train_epochs"] == stated(name).get("num_train_epochs", 2)
    assert recipe["learning_rate"] == stated(name).get("learning_rate", 5e-7)
    assert (recipe["max_length"], recipe["max_prompt_length"]) == (2048, 1000)
    batch = recipe["num_processes"] * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert batch == 128
    assert recipe["accelerate_config"] == "examples/accelerate_configs/zero2.yaml"
    assert recipe["output_dir"] == f"outputs/recipes/{name.removesuffix('.yaml')}"
    assert (recipe["beta"], recipe["per_token_scores"]) == (0.1, False)
    assert (recipe["monitor_stop"], recipe["stop_on"]) == (False, "none")
    assert recipe["truncated_completions"] == ("drop" if name.startswith("figure4a") else "by_reward")
    assert "held_out_prompts" not in recipe  # none of a test set, on which iterations would be chosen
    assert recipe["reward_funcs"] == stated(name).get("reward_funcs", FSFAIRX)
    ultrafeedback = [f"RLHFlow/ultrafeedback_iter{i}" for i in (1, 2, 3)]
    if name.startswith("table2") and "iterative_dpo" not in name:
        assert recipe["prompts"] == ultrafeedback
    elif name.startswith(("table4", "table6", "figure4a")):
        assert recipe["prompt_schedule"] == "same"
    else:
        assert (recipe["prompts"], recipe["prompt_schedule"], recipe["memory"]) == (ultrafeedback, "fresh", "none")


MARKED = ("num_samples", "temperature", "reward_funcs", "memory", "learning_rate", "num_train_epochs")
ALWAYS_OURS = ("beta", "num_held_out", "num_eval_samples", "max_new_tokens", "gradient_checkpointing", "save_steps",
               "truncated_completions", "monitor_stop", "stop_on")  # fmt: skip


def is_marked(name, option):
    text = (FOLDER / name).read_text()
    return re.search(rf"^{option}: .*# our choice", text, re.MULTILINE) is not None


@pytest.mark.parametrize("name", NAMES)
def test_what_the_paper_does_not_say_is_marked(name):
    for option in (*MARKED, *ALWAYS_OURS):
        assert is_marked(name, option) == (option not in stated(name)), option
    text = (FOLDER / name).read_text()
    assert f"larpo run --config examples/recipes/{name}\n" in re.sub(r" +#[^\n]*", "", text)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_are_the_papers(name):
    """In the head of the recipe and in the table."""
    figures = [float(figure) for figure in FIGURES[name].split()]
    [said] = re.findall(r"The paper's figures.*", (FOLDER / name).read_text())
    assert [float(number) for number in re.findall(r"\d*\.\d+", said)] == figures
    [line] = [line for line in README.splitlines() if f"({name})" in line]
    assert [float(number) for number in re.findall(r"(?<![\w/])\d*\.\d+", line.split("|")[2])] == figures


@pytest.mark.parametrize("place", NOT_TRAINED)
def test_figures_of_models_that_are_not_trained_are_the_papers(place):
    [_, after] = " ".join(README.split()).split(place)
    figures = [float(figure) for figure in NOT_TRAINED[place].split()]
    assert [float(number) for number in re.findall(r"\d*\.\d+", after)[: len(figures)]] == figures


@pytest.mark.parametrize("name", sorted({*PAPERS} - FIGURES.keys()))
def test_no_figure_is_claimed_where_the_paper_prints_none(name):
    [line] = [line for line in README.splitlines() if f"({name})" in line]
    told = line.split("|")[2].strip()
    assert told == "not in the paper" if name.removesuffix(".yaml") in BASELINES else told in ("a plot", "no figure")
    said = re.findall(r"The paper's figures.*", (FOLDER / name).read_text())
    assert not re.findall(r"\d\.\d", " ".join(said))


def test_the_table_lists_every_recipe_with_its_estimate():
    gpu_hours = runpy.run_path(str(FOLDER / "gpu_hours.py"))["gpu_hours"]
    for name, recipe in ((name, RECIPES[name]) for name in PAPERS):
        [line] = [line for line in README.splitlines() if f"({name})" in line]
        _, row, _, hours, ours, _ = map(str.strip, line.split("|"))
        assert row.startswith(f"[{Path(name).stem}]")
        assert hours == " / ".join(f"{one:.0f}" for one in gpu_hours(recipe)) and ours == "not run"


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_the_paper_fit_eight_gpus_of_80_gb(name):
    """Also with every prompt and every answer as long as they may be."""
    stages = runpy.run_path(str(ROOT / "examples/benchmarks/memory_estimate.py"))["stages"]
    assert max(stages(RECIPES[name]).values()) < 0.9 * 80 * 2**30


PAGE = (ROOT / "docs/which_recipe.md").read_text(encoding="utf-8")
STAGES = ("sampling", "rewards", "reference", "training")


@pytest.mark.parametrize("name", TODAY)
def test_recipes_of_today_fit_their_hardware_as_their_heads_and_the_page_say(name):
    stages = runpy.run_path(str(ROOT / "examples/benchmarks/memory_estimate.py"))["stages"]
    wall_hours = runpy.run_path(str(FOLDER / "gpu_hours.py"))["wall_hours"]
    recipe, text = RECIPES[name], (FOLDER / name).read_text()
    gib = {stage: size / 2**30 for stage, size in stages(recipe).items()}
    reward, hardware, room = re.fullmatch(r"today/\w+_(skywork|math)_(\d)x(\d+)gb.yaml", name).groups()
    assert list(gib) == [*STAGES] and max(gib.values()) < 0.9 * int(room)
    said = ", ".join(f"{stage} {size:.0f}" for stage, size in gib.items() if size)
    assert f"# GiB on each GPU (estimate): {said}.\n" in text
    [line] = [line for line in PAGE.splitlines() if f"/{name})" in line]
    of_page = [cell.strip() for cell in line.split("|")]
    assert of_page[1] == f"{hardware} × {room} GB" and of_page[2] == recipe["model_name_or_path"].split("/")[1].replace(
        "gemma-3-4b", "Gemma-3-4B"
    )
    assert of_page[5] == " / ".join(f"{size:.0f}" if size else "–" for size in gib.values())
    assert of_page[6] == " / ".join(f"{hours:.1f}" for hours in wall_hours(recipe))
    assert recipe.get("num_processes", 1) == int(hardware) and recipe.get("use_peft", False) == (hardware == "1")
    assert (recipe["reward_funcs"] == "math") == (reward == "math")
    assert f"larpo run --config examples/recipes/{name}\n" in re.sub(r" +#[^\n]*", "", text)


# One of each kind: what differs from it in a model, a number or the loss takes the same path
KINDS = (
    "table2/mistral_base_listmle_pairrm",  # a ranker, an empty system turn, prompts drawn, memory of all rows
    "table2/mistral_instruct_iterative_dpo_pairrm",  # pairs, fresh prompts
    "table3/gemma_contrastive",  # a reward model
    "table4/gemma_memory_previous",
    "table4/gemma_diverse_temperature",
    "figure4a/mathstral_easiest_negatives",  # a rule, prompts of another set
    "today/qwen3_4b_skywork_1x24gb",  # LoRA
)


@pytest.mark.parametrize("name", lanes.some_are_fast(sorted(RECIPES), {f"{name}.yaml" for name in KINDS}))
def test_its_options_and_its_plan_are_right_in_small_form(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, out = RECIPES[name], f"{RECIPES[name]['output_dir']}-small"
    assert cli.main(["run", "--config", str(FOLDER / name), "--small", "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert f"Run in {out}" in plan and f"{recipe['prompt_schedule']}; " in plan
    assert (
        f"best {recipe['num_best']} and worst {recipe['num_worst']}" in plan and f"memory: {recipe['memory']}" in plan
    )
    assert f"loss       {recipe['loss_type']}, beta {recipe['beta']:g}, " in plan
    assert f"× {recipe['num_samples']}" in plan and f"iteration {recipe['num_iterations']}: " in plan


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_each_kind_runs_in_small_form(kind, tmp_path, monkeypatch):
    name = f"{kind}.yaml"
    monkeypatch.chdir(tmp_path)
    # Pictures take a third of the time: one page, at the end, is enough here
    monkeypatch.setattr(loop, "write_report", lambda path, ends: ends and page(path, with_plots=False))
    assert cli.main(["run", "--config", str(FOLDER / name), "--small"]) == 0
    recipe, out = RECIPES[name], tmp_path / f"outputs/recipes/{kind}-small"
    ran = yaml.safe_load((out / "run.yaml").read_text())
    for option in ("num_samples", "num_best", "num_worst", "memory", "learning_rate", "beta", "num_train_epochs",
                   "prompt_schedule", "prompt_column"):  # fmt: skip
        assert ran[option] == recipe[option], option
    assert ran["system_prompt"] == recipe.get("system_prompt")
    assert ran["temperature"] == [recipe["temperature"]] and ran["loss_type"] == [recipe["loss_type"]]
    assert ran["negatives"] == ([recipe["negatives"]] if "negatives" in recipe else [])
    worst, sources = [], set()
    for iteration in (1, 2, 3):
        folder = out / f"iteration_{iteration}"
        assert read_json(folder / "evaluation.json")["prompts"] == 2
        for row in read_jsonl(folder / "lists.jsonl"):
            assert len(row["completions"]) <= recipe["num_best"] + recipe["num_worst"]
            worst += [candidate["source"] for candidate in row["candidates"][-1:]]
            sources |= {candidate["source"] for candidate in row["candidates"]}
    assert worst and (out / "report.html").exists()
    # Unless it is right, or empty, or equals a sample of the prompt itself: stand-ins say little but small numbers
    if recipe.get("negatives") == "random_prompt":
        assert worst.count("random_prompt") > len(worst) / 3
    assert sources <= {"policy", recipe.get("negatives")} and len(sources) == 1 + ("negatives" in recipe)


NUM_PARTS = 3

# A run with another number or another loss goes through the same stages; losses have tests of their own
NUMBERS = ("temperature", "beta", "learning_rate", "lr_scheduler_type", "num_train_epochs", "num_iterations",
           "num_samples", "num_best", "num_worst", "loss_type")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_all_other_kinds_run_in_small_form(part, tmp_path, monkeypatch):
    """One of those that differ in numbers and losses alone, unless it is among [`KINDS`]."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "write_report", lambda path, ends: None)
    kinds = {}
    for name in sorted(RECIPES, key=lambda name: name.removesuffix(".yaml") not in KINDS):
        kinds.setdefault(kind_of(name, tmp_path / "forms" / name), name)
    remaining = [name for name in kinds.values() if name.removesuffix(".yaml") not in KINDS]
    assert len(KINDS) + len(remaining) > 20
    for name in remaining[part::NUM_PARTS]:
        assert cli.main(["run", "--config", str(FOLDER / name), "--small", "--monitor_evals", "0"]) == 0, name
        out = tmp_path / f"outputs/recipes/{name.removesuffix('.yaml')}-small"
        for iteration in range(1, RECIPES[name]["num_iterations"] + 1):
            assert read_jsonl(out / f"iteration_{iteration}/lists.jsonl"), name
            assert read_json(out / f"iteration_{iteration}/evaluation.json")["prompts"] == 2, name
            assert list((out / f"iteration_{iteration}/model").glob("*.safetensors")), name


def kind_of(name, folder):
    """The options of a recipe's small form, without what it is called and without [`NUMBERS`]."""
    names = ("save_small_model", "save_small_pairrm", "save_small_reward_model")
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in names:
            patch.setattr(small, stand_in, lambda folder, stand_in=stand_in: stand_in)
        form = small.shrink(RECIPES[name], folder) | {"output_dir": ""}
    prompts = [Path(path).read_text() for path in form["prompts"]]
    options = {option: value for option, value in form.items() if option not in NUMBERS}
    return json.dumps([options, prompts], sort_keys=True).replace(str(folder), "")


def test_all_small_forms_can_be_run_by_one_script(monkeypatch, capsys):
    script, started = runpy.run_path(str(FOLDER / "run_small.py")), []
    monkeypatch.setattr(cli, "main", lambda words: started.append(Path(words[2])) or len(started) % 2)
    assert script["main"]([]) == (len(RECIPES) + 1) // 2
    assert [str(path.relative_to(FOLDER)) for path in started] == sorted(RECIPES)
    assert f"{len(RECIPES) // 2} of {len(RECIPES)} recipes ran" in capsys.readouterr().out


def test_metamath_becomes_conversations():
    convert = runpy.run_path(str(FOLDER / "table6/metamath.py"))["as_conversations"]
    rows = Dataset.from_list([{"type": "GSM_Rephrased", "query": "1 + 1?", "response": "2", "original_question": "?"}])
    assert convert(rows)[0] == {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "completion": [{"role": "assistant", "content": "2"}],
    }
