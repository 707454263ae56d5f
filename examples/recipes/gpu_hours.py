"""
Estimates the GPU-hours of recipes, stage by stage, and prints its assumptions with their sources.

    python examples/recipes/gpu_hours.py examples/recipes/table2/*.yaml

All numbers are computed, not measured. Training and scoring are estimated from floating-point operations (2 per
parameter and token forward, 6 in training, 8 with gradient checkpointing), sampling from tokens per second. Sampling is
most of it where many responses are sampled, and is given twice: with vLLM servers, and in the process.
"""

import argparse
from pathlib import Path

import yaml

PARAMETERS = {  # in billions
    "alignment-handbook/zephyr-7b-sft-full": 7.24,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.24,
    "mistralai/Mathstral-7B-v0.1": 7.24,
    "outputs/recipes/table6/sft": 7.24,
    "google/gemma-2-2b-it": 2.61,
    "Qwen/Qwen3-4B-Instruct-2507": 4.02,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "google/gemma-3-4b-it": 4.3,
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": 7.5,
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": 7.5,
    "Skywork/Skywork-Reward-V2-Qwen3-4B": 4.0,
    "pairwise:llm-blender/PairRM-hf": 0.44,
    "gsm8k": 0.0,
    "math": 0.0,
}
# Rows of the datasets from their pages; the second third is assumed to have as many as the first
PROMPTS = {"RLHFlow/ultrafeedback_iter1": 20000, "RLHFlow/ultrafeedback_iter2": 20000,
           "RLHFlow/ultrafeedback_iter3": 19569, "openai/gsm8k": 7473,
           "DigitalLearningGmbH/MATH-lighteval": 7500}  # fmt: skip

PEAK = 989e12  # operations per second of an H100 in bfloat16, without sparsity (NVIDIA's data sheet)

USED_IN_TRAINING = 0.4
"""Share of the peak. llm-foundry's tables: 40 to 54 % for 7B models on 8 H100; a list at a time uses less."""

USED_IN_SCORING = 0.3
"""Of reward models, and of the reference: our assumption, as sequences are padded and batches small."""

USED_BY_PAIRRM = 0.15
"""DeBERTa's attention has no fused kernel: our assumption."""

VLLM_TOKENS = 6000 * 8.03
"""Per second and GPU, for a model of a billion parameters: half of the 12,500 tokens per second that are reported for
Llama-3.1-8B in bfloat16 with vLLM on one H100 under full load, as long answers leave the batch half empty."""

PROCESS_TOKENS = 2000 * 7.24
"""The same for this package's continuous batching in the process: our assumption; it has not run on a GPU."""

PROMPT_TOKENS, COMPLETION_TOKENS = 180, 350
"""Means for UltraFeedback: our assumption. Memory adds rows; lists keep their size."""


def stage_hours(recipe: dict) -> dict[str, float]:
    """Hours of one GPU for all iterations, by stage, without evaluation."""
    size, judge = (PARAMETERS[recipe[name]] for name in ("model_name_or_path", "reward_funcs"))
    prompts, rows = num_rows(recipe)
    samples = recipe["num_samples"] + recipe.get("num_negatives", 1) * (
        "low_temperature" in recipe.get("negatives", "")
    )
    tokens = prompts * samples * COMPLETION_TOKENS
    if recipe["reward_funcs"].startswith("pairwise:"):
        comparisons = samples * (samples - 1)
        scoring = prompts * comparisons * (PROMPT_TOKENS + 2 * COMPLETION_TOKENS) * 2 * judge * 1e9 / USED_BY_PAIRRM
    else:
        scoring = prompts * samples * (PROMPT_TOKENS + COMPLETION_TOKENS) * 2 * judge * 1e9 / USED_IN_SCORING
    list_size = recipe["num_best"] + recipe["num_worst"]
    forward = rows * (PROMPT_TOKENS + list_size * COMPLETION_TOKENS) * size * 1e9  # the prompt is shared
    seconds = {
        "sampling with vLLM": tokens * size / VLLM_TOKENS,
        "sampling in the process": tokens * size / PROCESS_TOKENS,
        "rewards": scoring / PEAK,
        "reference": 2 * forward / (PEAK * USED_IN_SCORING),
        "training": 8 * forward * recipe["num_train_epochs"] / (PEAK * USED_IN_TRAINING),
    }
    return {stage: spent / 3600 for stage, spent in seconds.items()}


def num_rows(recipe: dict) -> tuple[float, float]:
    """Prompts sampled, and rows trained on, in all iterations together."""
    sources = recipe["prompts"] if isinstance(recipe["prompts"], list) else [recipe["prompts"]]
    available, iterations = sum(PROMPTS[name] for name in sources), recipe["num_iterations"]
    if recipe["prompt_schedule"] == "same":
        each = recipe.get("prompts_per_iteration", available)
        return each * iterations, each * iterations  # a list for each prompt, whatever is remembered
    each = recipe.get("prompts_per_iteration", available / iterations)
    if recipe["memory"] == "none":
        return each * iterations, each * iterations
    missed = 1 - each / available if recipe["prompt_schedule"] == "drawn" else None
    rows = sum(each * i if missed is None else available * (1 - missed**i) for i in range(1, iterations + 1))
    return each * iterations, rows


def gpu_hours(recipe: dict) -> tuple[float, float]:
    """Hours of one GPU in all: with vLLM servers, and with sampling in the process."""
    stages = stage_hours(recipe)
    rest = sum(hours for stage, hours in stages.items() if not stage.startswith("sampling"))
    return stages["sampling with vLLM"] + rest, stages["sampling in the process"] + rest


SLOWER_24GB = 6
"""A card of 24 GB beside an H100: 165 against 989 TFLOP/s of an RTX 4090 (NVIDIA's data sheets)."""


def wall_hours(recipe: dict) -> tuple[float, float]:
    """Hours on the hardware that a recipe of today/ is for: with vLLM servers, and with sampling in the process."""
    factor = SLOWER_24GB if recipe["output_dir"].endswith("24gb") else 1
    vllm, process = gpu_hours(recipe)
    return factor * vllm / recipe.get("num_processes", 1), factor * process / recipe.get("num_processes", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    print(
        f"Assumed of an H100: {PEAK / 1e12:.0f} TFLOP/s at most, of which training uses {USED_IN_TRAINING:.0%}, "
        f"scoring {USED_IN_SCORING:.0%}, PairRM {USED_BY_PAIRRM:.0%}; tokens/s sampled from an 8B model: "
        f"{VLLM_TOKENS / 8.03:.0f} with vLLM, {PROCESS_TOKENS / 8.03:.0f} in the process; prompts of {PROMPT_TOKENS} "
        f"and completions of {COMPLETION_TOKENS} tokens. Sources are in the script.\n"
    )
    for path in parser.parse_args().recipes:
        recipe = yaml.safe_load(path.read_text())
        vllm, process = gpu_hours(recipe)
        stages = ", ".join(f"{stage} {hours:.1f}" for stage, hours in stage_hours(recipe).items())
        print(f"{vllm:4.0f} GPU-hours with vLLM, {process:4.0f} in the process  {path}\n     {stages}")


if __name__ == "__main__":
    main()
