"""
`larpo run`, `larpo online` and TRL's `GRPOTrainer` side by side, at equal numbers of samples, on the quickstart's task.

    python examples/studies/online/compare.py                        # three seeds; hours on a CPU
    python examples/studies/online/compare.py --seeds 0 --steps 2    # a look at it
    python examples/studies/online/compare.py --table                # prints the results

Each arm samples `steps` × 16 prompts × 4 completions and trains once on each list. The mean reward on held-out prompts
is measured with the same sampler before and after. Each result is a small JSON file in `results/`; rerun the same
command to resume.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from trl_larpo import OnlineLarPOConfig, OnlineLarPOTrainer
from trl_larpo.report.numbers import with_error
from trl_larpo.rewards.functions import load_rewards
from trl_larpo.run.evaluation import mean_and_error
from trl_larpo.run.loop import run
from trl_larpo.run.options import RunConfig, RunTrainingConfig

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "quickstart"
NUM_SAMPLES, TEMPERATURE = 4, 0.8
PROMPTS_AT_ONCE = 16
"""Held-out prompts in a batch of the evaluation."""
TRAINING = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "bf16": False,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True}  # fmt: skip
ARMS = {  # options of a trainer on GRPO's engine; of `run` there are none here
    "run": None,
    "online": (OnlineLarPOTrainer, OnlineLarPOConfig, {"per_token_scores": True, "beta": 2.0, "ref_update_steps": 1}),
    "semi_online": (
        OnlineLarPOTrainer, OnlineLarPOConfig, {"per_token_scores": True, "beta": 2.0, "ref_update_steps": 4},
    ),
    "grpo": (GRPOTrainer, GRPOConfig, {}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", default="outputs/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=4, help="times that prompts are sampled")
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--reward", default="verifiable_instructions", help="as in `larpo run`")
    parser.add_argument("--held-out", type=int, default=64, help="held-out prompts, four answers each")
    parser.add_argument("--output", type=Path, default=Path("outputs/online_study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="only print the results")
    options = parser.parse_args()
    if not options.table:
        options.results.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for arm in options.arms:
                path = options.results / f"{arm}_seed{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(result_of(arm, seed, options), indent=2) + "\n", encoding="utf-8")
    print_table(options.results)


def result_of(arm: str, seed: int, options: argparse.Namespace) -> dict:
    """Mean held-out reward of the model before and after the training of an arm."""
    folder = options.output / f"{arm}_seed{seed}"
    started = time.monotonic()
    train = rows_of("prompts.jsonl", options.steps * options.prompts_per_step)
    trained = (
        train_run(folder, seed, options) if ARMS[arm] is None else train_on_grpo(arm, folder, seed, train, options)
    )
    minutes = (time.monotonic() - started) / 60
    held_out = rows_of("held_out_prompts.jsonl", options.held_out)
    before, after = (held_out_rewards(path, held_out, seed, options) for path in (options.model, trained))
    return {"arm": arm, "seed": seed, "samples": len(train) * NUM_SAMPLES,
            "before": statistics.fmean(before), "after": statistics.fmean(after),
            "gain": statistics.fmean(b - a for a, b in zip(before, after, strict=True)),
            "minutes": round(minutes, 1)}  # fmt: skip


def rows_of(name: str, count: int) -> list[dict]:
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def train_run(folder: Path, seed: int, options: argparse.Namespace) -> str:
    """Two iterations of `larpo run`, half of the samples in each."""
    run(
        RunConfig(
            prompts=[str(QUICKSTART / "prompts.jsonl")],
            held_out_prompts=str(QUICKSTART / "held_out_prompts.jsonl"),
            num_held_out=2,
            prompts_per_iteration=options.steps * options.prompts_per_step // 2,
            prompt_schedule="fresh",
            num_iterations=2,
            num_samples=NUM_SAMPLES,
            temperature=[TEMPERATURE],
            max_new_tokens=options.max_tokens,
            generation_batch_size=64,
            monitor_evals=0,
            stop_on=["none"],
            reward_funcs=[options.reward],
        ),
        RunTrainingConfig(str(folder), seed=seed, per_device_train_batch_size=2, num_train_epochs=1, **TRAINING),
        ModelConfig(model_name_or_path=options.model),
    )
    return str(folder / "iteration_2" / "model")


def train_on_grpo(arm: str, folder: Path, seed: int, rows: list[dict], options: argparse.Namespace) -> str:
    """One pass over the prompts. Optimizer steps of 2 lists, as in the other arm, from samples of 16 prompts."""
    trainer_cls, config_cls, own = ARMS[arm]
    args = config_cls(
        str(folder),
        seed=seed,
        num_generations=NUM_SAMPLES,
        per_device_train_batch_size=2 * NUM_SAMPLES,
        steps_per_generation=options.prompts_per_step // 2,
        num_train_epochs=1,
        temperature=TEMPERATURE,
        max_completion_length=options.max_tokens,
        **TRAINING | own,
    )
    trainer = trainer_cls(
        model=options.model,
        reward_funcs=load_rewards([options.reward])[0].function if arm != "grpo" else partial(grpo_reward, options),
        args=args,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return str(folder / "model")


def grpo_reward(options: argparse.Namespace, prompts, completions, completion_ids, **columns):
    """The same reward for GRPOTrainer, which does not say what ended."""
    finished = [len(ids) < options.max_tokens for ids in completion_ids]
    return load_rewards([options.reward])[0].function(prompts, completions, finished=finished, **columns)


def held_out_rewards(model: str, rows: list[dict], seed: int, options: argparse.Namespace) -> list[float]:
    """The reward of four answers to each held-out prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    reward = load_rewards([options.reward])[0].function
    set_seed(seed)
    rewards: list[float] = []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        batch = rows[start : start + PROMPTS_AT_ONCE]
        inputs = tokenizer.apply_chat_template(
            [row["prompt"] for row in batch], add_generation_prompt=True, return_dict=True, return_tensors="pt",
            padding=True,
        )  # fmt: skip
        outputs = policy.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, num_return_sequences=NUM_SAMPLES,
            max_new_tokens=options.max_tokens,
        )[:, inputs["input_ids"].size(1) :]  # fmt: skip
        finished = [bool((tokens == tokenizer.eos_token_id).any()) for tokens in outputs]
        completions = [
            [{"role": "assistant", "content": text}]
            for text in tokenizer.batch_decode(outputs, skip_special_tokens=True)
        ]
        repeated = [row for row in batch for _ in range(NUM_SAMPLES)]
        columns = {name: [row[name] for row in repeated] for name in repeated[0] if name != "prompt"}
        rewards += reward([row["prompt"] for row in repeated], completions, finished=finished, **columns)
    return rewards


def print_table(folder: Path) -> None:
    """Means over seeds, ± their standard error."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    print("| arm | seeds | samples | before | after | gain |\n|---|---|---|---|---|---|")
    for arm in ARMS:
        of_arm = [result for result in results if result["arm"] == arm]
        if of_arm:
            means = [with_error(mean_and_error([x[name] for x in of_arm])) for name in ("before", "after", "gain")]
            print(f"| {arm} | {len(of_arm)} | {of_arm[0]['samples']} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
