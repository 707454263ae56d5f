"""
Estimates the GPU-hours of recipes and prints its assumptions.

    python examples/recipes/gpu_hours.py examples/recipes/table2/*.yaml

All numbers are computed, not measured. Training and scoring are estimated from floating-point operations (2 per
parameter and token forward, 6 in training, 8 with gradient checkpointing), sampling from tokens per second.
"""

import argparse
from pathlib import Path

import yaml

PARAMETERS = {  # in billions
    "alignment-handbook/zephyr-7b-sft-full": 7.24,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.24,
    "mistralai/Mathstral-7B-v0.1": 7.24,
    "google/gemma-2-2b-it": 2.61,
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": 7.5,
    "pairwise:llm-blender/PairRM-hf": 0.44,
    "gsm8k": 0.0,
}
# Rows of the datasets from their pages; the second third is assumed to have as many as the first
PROMPTS = {"RLHFlow/ultrafeedback_iter1": 20000, "RLHFlow/ultrafeedback_iter2": 20000,
           "RLHFlow/ultrafeedback_iter3": 19569, "openai/gsm8k": 7473}  # fmt: skip

OPERATIONS_PER_SECOND = 0.4 * 989e12  # 40 % of an H100's peak in bfloat16
SAMPLED_TOKENS_PER_SECOND = 2000 * 7.24  # on one GPU, for a model of a billion parameters
PROMPT_TOKENS, COMPLETION_TOKENS = 180, 350


def gpu_hours(recipe: dict) -> float:
    """Hours of one GPU for all iterations, without evaluation."""
    size, judge = (PARAMETERS[recipe[name]] for name in ("model_name_or_path", "reward_funcs"))
    sources = recipe["prompts"] if isinstance(recipe["prompts"], list) else [recipe["prompts"]]
    fresh = recipe["prompt_schedule"] == "fresh"
    prompts = sum(PROMPTS[name] for name in sources) * (1 if fresh else recipe["num_iterations"])
    samples, listed = recipe["num_samples"], recipe["num_best"] + recipe["num_worst"]
    sampling = prompts * samples * COMPLETION_TOKENS * size / SAMPLED_TOKENS_PER_SECOND
    list_tokens = PROMPT_TOKENS + listed * COMPLETION_TOKENS  # the prompt is shared
    operations = prompts * list_tokens * size * 1e9 * (8 * recipe["num_train_epochs"] + 2)  # 2: the reference
    if recipe["reward_funcs"].startswith("pairwise:"):
        comparisons = samples * (samples - 1)
        operations += prompts * comparisons * (PROMPT_TOKENS + 2 * COMPLETION_TOKENS) * 2 * judge * 1e9
    else:
        operations += prompts * samples * (PROMPT_TOKENS + COMPLETION_TOKENS) * 2 * judge * 1e9
    return (sampling + operations / OPERATIONS_PER_SECOND) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    print(
        f"Assumed: one H100, {OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s; {SAMPLED_TOKENS_PER_SECOND / 7.24:.0f} "
        f"tokens/s sampled from a 7B model; prompts of {PROMPT_TOKENS} and completions of {COMPLETION_TOKENS} tokens"
    )
    for path in parser.parse_args().recipes:
        print(f"{gpu_hours(yaml.safe_load(path.read_text())):6.0f} GPU-hours  {path}")


if __name__ == "__main__":
    main()
