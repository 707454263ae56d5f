"""
Effect of one training pass over the model's own samples on held-out reward and on the share of answers that end.

    python examples/studies/one_pass/study.py                                # the defaults: three tasks, three seeds
    python examples/studies/one_pass/study.py --tasks graded --seeds 0 --arms default drop sft_0.3
    python examples/studies/one_pass/study.py --table                        # prints the table of all results

Runs one iteration of `larpo run` for each task, seed and arm. All arms of a task and seed share their samples and the
evaluation before training. Each result is a small JSON file in `results/`; rerun the same command to resume.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer
from trl import ModelConfig

from trl_larpo.pools import read_pools
from trl_larpo.report.numbers import with_error
from trl_larpo.run.context import RunContext
from trl_larpo.run.evaluation import evaluate, mean_and_error
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunTrainingConfig
from trl_larpo.run.stages import STAGES, run_stage
from trl_larpo.storage import read_json, write_json

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from tasks import TASKS, Task  # noqa: E402

MODEL = "outputs/SmolLM2-135M-Instruct"

NUM_PROMPTS, NUM_SAMPLES, NUM_HELD_OUT, NUM_EVAL_SAMPLES = 48, 6, 48, 4

# Settings for a small model and few prompts; all other options have their defaults
SETTINGS = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2,
            "num_train_epochs": 1, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 4,
            "save_strategy": "no"}  # fmt: skip

SUMS = {"per_token_scores": False}
SFT = {"loss_type": ["lambdarank", "sft"], "loss_weights": [1.0, 0.3]}
ARMS = {  # training options in addition to SETTINGS
    "default": {},
    "by_reward": {"truncated_completions": "by_reward"},
    "drop": {"truncated_completions": "drop"},
    "sft_0.3": SFT,
    "sums": SUMS,
    "sums_drop": SUMS | {"truncated_completions": "drop"},
    "sums_sft_0.3": SUMS | SFT,
    "lr_1e-5": {"learning_rate": 1e-5},
    "lr_5e-5": {"learning_rate": 5e-5},
    "pairwise": {"loss_type": ["pairwise"]},
    "contrastive": {"loss_type": ["contrastive"]},
    "listmle": {"loss_type": ["listmle"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["default"], choices=ARMS)
    parser.add_argument("--output", type=Path, default=Path("outputs/one_pass"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="only print the results")
    arguments = parser.parse_args()
    if not arguments.table:
        for seed in arguments.seeds:
            for task in arguments.tasks:
                for arm in arguments.arms:
                    path = arguments.results / f"{task}_seed{seed}_{arm}.json"
                    if not path.exists():
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_json(path, run_arm(task, TASKS[task](), seed, arm, arguments.output))
    print_table(arguments.results)


def run_arm(name: str, task: Task, seed: int, arm: str, output: Path) -> dict:
    """Runs one iteration. Returns the results to compare."""
    shared, run = output / f"{name}_seed{seed}" / "samples", output / f"{name}_seed{seed}" / arm
    prompts = [output / f"{name}_{part}.jsonl" for part in ("train", "held_out")]
    for path, rows in zip(prompts, (task.train[:NUM_PROMPTS], task.held_out[:NUM_HELD_OUT]), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = RunConfig(
        prompts=[str(prompts[0])],
        held_out_prompts=str(prompts[1]),
        num_held_out=min(NUM_HELD_OUT, len(task.held_out)),
        num_iterations=1,
        num_samples=NUM_SAMPLES,
        temperature=[0.8],
        max_new_tokens=task.max_new_tokens,
        generation_batch_size=96,
        num_eval_samples=NUM_EVAL_SAMPLES,
        monitor_evals=0,  # so that training is not stopped early if it makes answers worse
        reward_funcs=[task.reward],
    )
    for folder, stages in ((shared, [(0, "held_out_samples"), (0, "held_out"), (1, "generate"), (1, "reward")]),
                           (run, [(1, "select"), (1, "reference"), (1, "train"),
                                 (1, "held_out_samples"), (1, "held_out")])):  # fmt: skip
        if folder == run and not (run / "iteration_0").exists():
            shutil.copytree(shared, run, dirs_exist_ok=True)
        training = RunTrainingConfig(str(folder), seed=seed, **SETTINGS | (ARMS[arm] if folder == run else {}))
        run_folder = RunFolder(options, training, ModelConfig(model_name_or_path=MODEL))
        run_folder.prepare_prompts(AutoTokenizer.from_pretrained(MODEL))
        for iteration in (0, 1):
            run_folder.iteration(iteration).mkdir(parents=True, exist_ok=True)
        context = RunContext(run_folder)
        for iteration, stage in stages:
            torch.manual_seed(seed)
            run_stage(context, STAGES[stage], iteration)
        context.close()
    start, end = (list(read_pools(run / f"iteration_{i}" / "held_out.jsonl")) for i in (0, 1))
    before, after = evaluate(start, start), evaluate(end, start)
    shutil.rmtree(run / "iteration_1" / "model")
    selection = read_json(run / "iteration_1" / "selection.json")
    return {
        "task": name,
        "seed": seed,
        "arm": arm,
        "settings": SETTINGS | ARMS[arm],
        "lists": {key: selection[key] for key in ("lists", "candidates", "truncated")},
        "start": {key: before[key] for key in ("reward", "finished", "tokens", "distinct")},
        "end": {key: after[key] for key in ("reward", "gain", "finished", "tokens", "distinct")},
    }


def print_table(results: Path) -> None:
    """Prints one line per result, and the mean over the seeds of each task and arm."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    print("| task | arm | seed | reward before → after | gain ± SE | SEs | end before → after | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for key in sorted({(x["task"], x["arm"]) for x in found}):
        of_key = [x for x in found if (x["task"], x["arm"]) == key]
        for x in of_key:
            start, end = x["start"], x["end"]
            gain, error = end["gain"]["mean"], end["gain"]["standard_error"]
            print(
                f"| {key[0]} | {key[1]} | {x['seed']} | {start['reward']['mean']:.3f} → {end['reward']['mean']:.3f} | "
                f"{gain:+.3f} ± {error:.3f} | {gain / error:+.1f} | {start['finished']:.0%} → {end['finished']:.0%} | "
                f"{start['tokens']:.0f} → {end['tokens']:.0f} |"
            )
        if len(of_key) > 1:
            gain = with_error(mean_and_error([x["end"]["gain"]["mean"] for x in of_key]), "+")
            ends = statistics.fmean(x["end"]["finished"] for x in of_key)
            tokens = statistics.fmean(x["end"]["tokens"] for x in of_key)
            print(f"| {key[0]} | {key[1]} | mean of {len(of_key)} | | {gain} | | {ends:.0%} | {tokens:.0f} |")


if __name__ == "__main__":
    main()
