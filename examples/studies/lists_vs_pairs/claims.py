"""
The paper's other claims, each as a comparison of runs of `larpo run` on the same task: list size, temperature, hard
negatives, memory, reference, and the number of iterations.

    python examples/studies/lists_vs_pairs/claims.py
    python examples/studies/lists_vs_pairs/claims.py --claims memory list_size --seeds 10 11 12
    python examples/studies/lists_vs_pairs/claims.py --small          # few prompts: does it run here?
    python examples/studies/lists_vs_pairs/claims.py --table          # only prints the results

Results are small JSON files in `results/claims/`, one for each run and seed; the same command resumes. A run that is
part of several comparisons is there once.
"""

import argparse
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from effects import Effect, effect
from experiment import (
    GRADED_TASKS,
    SETTINGS,
    SMALL,
    TEMPERATURE,
    Setup,
    by_topic,
    devices,
    prompts_of,
    quiet,
    sampled,
    summary,
)
from results import Results
from study import parse
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig
from workers import run_all

from trl_larpo.candidates import CandidatePool
from trl_larpo.iterations import iteration_folders
from trl_larpo.run.loop import run as larpo_run
from trl_larpo.run.options import RunConfig, RunTrainingConfig
from trl_larpo.storage import iter_jsonl, read_json, read_jsonl, write_jsonl

TASK = "four_rules"
LEARNING_RATE = 2e-5
SCHEDULE = {"lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 1}
"""With another one, iterations of other lengths would also have other learning rates."""

NUM_WATCHED = 2
"""Held-out prompts of the runs themselves: what counts is measured afterwards, on all of them."""

ONCE: dict[str, Any] = {"num_iterations": 1, "prompts_per_iteration": 32, "num_samples": 8}
THRICE: dict[str, Any] = {"num_iterations": 3, "prompts_per_iteration": 16, "num_samples": 4}
FRESH = {"prompt_schedule": "fresh"}
# The best sample against one negative, as in the paper's figure 4a. A truncated sample would come last before it
BEST_AGAINST = {
    "loss_type": ["pairwise"], "num_best": 1, "num_worst": 1, "truncated_completions": "drop",
}  # fmt: skip

RUNS: dict[str, dict[str, Any]] = {
    "list_2": ONCE | {"num_samples": 2},
    "list_4": ONCE | {"num_samples": 4},
    "list_8": ONCE,
    "list_16": ONCE | {"num_samples": 16},
    "list_2_more_prompts": ONCE | {"num_samples": 2, "prompts_per_iteration": 128},
    "temperature_0.5": ONCE | {"temperature": [0.5]},
    "temperature_1.0": ONCE | {"temperature": [1.0]},
    "temperature_1.3": ONCE | {"temperature": [1.3]},
    "negatives_random": ONCE | BEST_AGAINST | {"negatives": ["random_prompt"]},
    "negatives_related": ONCE | BEST_AGAINST | {"negatives": ["related_prompt"]},
    "negatives_high": ONCE | BEST_AGAINST | {"temperature": [1.2]},
    "negatives_low": ONCE | BEST_AGAINST,
    "memory_none": THRICE,
    "memory_previous": THRICE | {"memory": "previous"},
    "memory_all": THRICE | {"memory": "all"},
    "fresh_none": THRICE | FRESH,
    "fresh_previous": THRICE | FRESH | {"memory": "previous"},
    "fresh_all": THRICE | FRESH | {"memory": "all"},
    "reference_initial": THRICE | FRESH | {"reference": "initial"},
    "iterations_1": THRICE | {"num_iterations": 1, "prompts_per_iteration": 48},
    "iterations_6": THRICE | FRESH | {"num_iterations": 6, "prompts_per_iteration": 8},
}
"""Options of `larpo run` by the name of the run. Other options have the defaults, or are in `SETTINGS`."""

OF_TRAINING = ("loss_type", "truncated_completions")
"""Those of them that are options of the training."""

BUDGET = ("samples", "candidates", "steps", "tokens")
"""What a run samples, and what it trains on."""

CLAIMS: dict[str, dict[str, str]] = {
    "list_size": {
        "list_2": "2 samples",
        "list_4": "4 samples",
        "list_8": "8 samples",
        "list_16": "16 samples",
        "list_2_more_prompts": "2 samples, four times the prompts",
    },
    "temperature": {
        "list_8": "0.8",
        "temperature_0.5": "0.5",
        "temperature_1.0": "1.0",
        "temperature_1.3": "1.3",
    },
    "negatives": {
        "negatives_random": "of any other prompt",
        "negatives_related": "of the most similar prompt",
        "negatives_high": "the worst at temperature 1.2",
        "negatives_low": "the worst at temperature 0.8",
    },
    "memory": {"memory_none": "none", "memory_previous": "previous", "memory_all": "all"},
    "memory_of_fresh_prompts": {"fresh_none": "none", "fresh_previous": "previous", "fresh_all": "all"},
    "reference": {"fresh_none": "start of the iteration", "reference_initial": "initial model"},
    "iterations": {
        "iterations_1": "1 iteration of 48 prompts",
        "fresh_none": "3 of 16",
        "iterations_6": "6 of 8",
    },
}
"""Runs and their labels, by claim; the first is what the others are compared with."""


@dataclass(frozen=True)
class Variation:
    """
    A run of `larpo run`, one of those that a claim compares.

    Attributes:
        task: Name of the task.
        name: Name of its options.
        seed: Seed of the choice of prompts, and of the run.
    """

    task: str
    name: str
    seed: int
    tuning: ClassVar[bool] = False
    folder: ClassVar[str] = "claims"

    @property
    def file_name(self) -> str:
        return f"{self.name}_seed{self.seed}.json"

    @property
    def options(self) -> dict[str, Any]:
        """Options of `larpo run` other than those of the training."""
        return {name: value for name, value in RUNS[self.name].items() if name not in OF_TRAINING}

    @property
    def settings(self) -> dict[str, Any]:
        """All options that do not have their defaults."""
        training = SETTINGS | SCHEDULE | {"learning_rate": LEARNING_RATE, "loss_type": ["lambdarank"]}
        return training | RUNS[self.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--claims", nargs="+", default=list(CLAIMS), choices=CLAIMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    arguments, setup, results = parse(parser)
    seeds = arguments.seeds[:1] if arguments.small else arguments.seeds
    if not arguments.table:
        names = dict.fromkeys(name for claim in arguments.claims for name in CLAIMS[claim])
        runs = [Variation(TASK, name, seed) for seed in seeds for name in names]
        run_all(lambda: results.missing(runs, setup), setup, results, arguments.workers, run)
    print_tables(results, arguments.claims)


def run(variation: Variation, setup: Setup) -> dict:
    """One run and the evaluation of its last model; models are removed afterwards."""
    task, options = GRADED_TASKS[variation.task](), variation.options
    if setup.size == SMALL:
        small = {"prompts_per_iteration": 2, "num_samples": 4, "num_iterations": 2}
        options |= {name: min(value, options[name]) for name, value in small.items()}
    folder = setup.output / "runs" / variation.file_name.removesuffix(".json")
    rows = distinct_rows(task.train, num_prompts(options), variation.seed)
    training = {name: value for name, value in variation.settings.items() if name not in options}
    with quiet(setup.output):
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"prompts": rows, "held_out": task.held_out[:NUM_WATCHED]}
        files = {name: folder.with_name(f"{folder.name}_{name}.jsonl") for name in parts}
        for name, path in files.items():
            write_jsonl(path, parts[name])
        larpo_run(
            RunConfig(
                prompts=[str(files["prompts"])],
                held_out_prompts=str(files["held_out"]),
                num_held_out=NUM_WATCHED,
                max_new_tokens=task.max_new_tokens,
                generation_batch_size=setup.generation_batch_size,
                monitor_evals=0,
                stop_on=["none"],
                reward_funcs=[task.reward],
                **{"temperature": [TEMPERATURE]} | options,
            ),
            RunTrainingConfig(str(folder), seed=variation.seed, use_cpu=setup.device == "cpu", **training),
            ModelConfig(model_name_or_path=setup.model),
        )
        last = folder / f"iteration_{options['num_iterations']}" / "model"
        samples = setup.folder_of_samples(variation.task, variation.seed, tuning=False)
        start = [CandidatePool.from_row(row) for row in read_jsonl(samples / "start.jsonl")]
        model = AutoModelForCausalLM.from_pretrained(last).to(setup.device)
        tokenizer = AutoTokenizer.from_pretrained(last)
        prompts = prompts_of(task.held_out)[: setup.size.held_out]
        end = sampled(
            model, tokenizer, task, prompts, setup.size.eval_samples, "held_out", variation.seed,
            setup.generation_batch_size,
        )  # fmt: skip
        budget = budget_of(folder)
        shutil.rmtree(folder)
    return {
        "task": variation.task,
        "run": variation.name,
        "seed": variation.seed,
        "settings": variation.settings,
        "basis": setup.basis(variation.task),
        "devices": devices(setup, variation.task, variation.seed, tuning=False),
        "budget": budget,
        "start": summary(start),
        "end": summary(end),
        "rewards": by_topic(end),
    }


def num_prompts(options: dict[str, Any]) -> int:
    """How many prompts a run needs in all."""
    fresh = options.get("prompt_schedule") == "fresh"
    return options["prompts_per_iteration"] * (options["num_iterations"] if fresh else 1)


def distinct_rows(rows: list[dict], count: int, seed: int) -> list[dict]:
    """As many rows with different prompts, at random: a task may have a prompt twice, which a run takes once."""
    rng, found = Random(seed), {}
    for row in rng.sample(rows, count):
        found[row["prompt"][-1]["content"]] = row
    others = [row for row in rows if row["prompt"][-1]["content"] not in found]
    return [*found.values(), *rng.sample(others, count - len(found))]


def budget_of(folder: Path) -> dict[str, int]:
    """What a run has sampled and trained on."""
    budget = dict.fromkeys(BUDGET, 0)
    for iteration in iteration_folders(folder).values():
        if (iteration / "selection.json").exists():
            budget["samples"] += sum(len(row["completions"]) for row in iter_jsonl(iteration / "samples.jsonl"))
            budget["steps"] += read_jsonl(iteration / "training_log.jsonl")[-1]["step"]
            budget["candidates"] += read_json(iteration / "selection.json")["candidates"]
            for row in iter_jsonl(iteration / "lists.jsonl"):
                budget["tokens"] += sum(about["num_tokens"] or 0 for about in row["candidates"])
    return budget


def effect_of(results: Results, claim: str, name: str) -> Effect | None:
    """How much more a run earns than the first one of a claim, over the seeds that both have; `None` without any."""
    first = next(iter(CLAIMS[claim]))
    runs, others = results.claims(name), results.claims(first)
    seeds = sorted(runs.keys() & others.keys())
    if name == first or not seeds:
        return None
    return effect(np.array([np.subtract(runs[seed]["rewards"], others[seed]["rewards"]) for seed in seeds]))


def print_tables(results: Results, claims: list[str]) -> None:
    for claim in claims:
        if any(results.claims(name) for name in CLAIMS[claim]):
            print(f"\n{claim}\n")
            print("\n".join(table(results, claim)))


def table(results: Results, claim: str) -> list[str]:
    """Lines of a table in Markdown: a line for each run that has a result."""
    lines = [
        "| | seeds | reward | difference | samples | candidates trained | steps | tokens trained | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, label in CLAIMS[claim].items():
        if runs := results.claims(name).values():
            reward, length = (statistics.fmean(run["end"][part] for run in runs) for part in ("reward", "tokens"))
            budget = [statistics.fmean(run["budget"][part] for run in runs) for part in BUDGET]
            lines.append(
                f"| {label} | {len(runs)} | {reward:.3f} | {effect_of(results, claim, name) or ''} | "
                f"{' | '.join(f'{value:.0f}' for value in (*budget, length))} |"
            )
    return lines


if __name__ == "__main__":
    main()
