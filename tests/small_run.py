"""A run small enough for tests: its rewards, and how it is started."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM

from trl_larpo import cli

REWARDS = """
def vowels(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / 10 for text in texts]

def fails_on_cat(prompts, completions, **columns):
    if any("cat" in str(prompt) for prompt in prompts):
        raise RuntimeError("no cats")
    return vowels(prompts, completions)

def emptiness(prompts, completions, **columns):
    return [-float(len(c[-1]["content"])) for c in completions]

def prefer_longer(prompt, completions):
    return [[float(len(str(a)) > len(str(b))) for b in completions] for a in completions]
"""


CONFIG = {
    "output_dir": "out",
    "prompts": "prompts.jsonl",
    "num_held_out": 4,
    "num_iterations": 2,
    "num_samples": 4,
    "num_eval_samples": 2,
    "max_new_tokens": 24,
    "generation_batch_size": 8,
    "generation_dtype": "float32",  # the default is bfloat16 on some CPUs
    "reward_funcs": "run_rewards:vowels",
    "memory": "all",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def save_talkative_model(folder: Path) -> str:
    """A tiny model that ends most of its answers by itself within twenty tokens: many of its tokens end them."""
    folder = tiny.save_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, *range(200, 230)]
    model.save_pretrained(folder)
    return folder


def write_project(folder: Path, model: str, **options) -> None:
    """A YAML file, prompts and rewards."""
    words = ["blue", "green", "here", "a cat", "so big", "old", "young", "red", "fast", "slow"]
    write_prompts(folder, [f"{i} why is the dog {word}" for i, word in enumerate(words)])
    (folder / "run_rewards.py").write_text(REWARDS)
    (folder / "it.yaml").write_text(yaml.safe_dump(CONFIG | {"model_name_or_path": model} | options))


def write_prompts(folder: Path, texts: list[str]) -> None:
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_options(folder: Path, **options) -> None:
    config = yaml.safe_load((folder / "it.yaml").read_text())
    (folder / "it.yaml").write_text(yaml.safe_dump(config | options))


def without_kernels_of_bfloat16(monkeypatch) -> None:
    """bitsandbytes, or a skipped test, without its kernels for some CPUs, which take no matrices as small as here."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def larpo_run(*flags):
    return cli.main(["run", "--config", "it.yaml", *map(str, flags)])


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def log_probability(model, tokenizer, prompt, completion, cut_off_ids):
    """Sum of log p over the completion's tokens, by one plain forward pass."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    ids = prompt_ids + [int(i) for i in cut_off_ids.split()] if cut_off_ids else whole
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(len(prompt_ids), len(ids)))
