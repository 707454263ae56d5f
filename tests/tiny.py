"""Models, tokenizer and data small enough for tests, made in code: nothing is downloaded."""

import random
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_larpo.run.small import byte_tokenizer

TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5

HAS_ONLINE = Version(trl.__version__).release[:2] == (1, 16)
"""Whether there is a GRPOTrainer that OnlineLarPOTrainer knows."""

LOSS_ROUNDING = 1e-4 if TRANSFORMERS_4 else 0.0
"""transformers 4 logs the loss with four decimals."""

PAD, BOS, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool['function']['name'] + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% if shout %}{{ '<|im_start|>system\nSHOUT<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a ChatML template."""
    return byte_tokenizer(CHAT_TEMPLATE, (PAD, BOS, EOS))


def save_tiny_model(folder: Path, model_type: str = "llama", **config) -> str:
    """Random weights of a given architecture, with the tokenizer beside them. Returns the folder."""
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # logits far enough from uniform for a mistake to show
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(["blue", "green", "dog", "cat", "is", "a", "runs", "why"]) for _ in range(count))


def pairs(num_rows: int = 16, conversational: bool = False, implicit_prompt: bool = False, seed: int = 0) -> Dataset:
    """Preference pairs in TRL's format."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_rows):
        prompt, chosen, rejected = (
            f"{i} {_words(rng, 3)}",
            f" {_words(rng, rng.randint(1, 6))}",
            f" no {_words(rng, 2)}",
        )
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if conversational:
            row = {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
                for name, text in row.items()
            }
        if implicit_prompt:
            row = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        rows.append(row)
    return Dataset.from_list(rows)


def lists(
    num_rows: int = 16,
    max_size: int = 5,
    conversational: bool = False,
    with_rewards: bool = True,
    seed: int = 0,
    long_prompts: bool = False,
) -> Dataset:
    """Ragged lists of 2 to `max_size` completions with rewards, some of them tied."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_rows):
        size = rng.randint(2, max_size)
        prompt = f"{i} {_words(rng, rng.randint(3, 12) if long_prompts else 3)}"
        completions = [f" {_words(rng, rng.randint(1, 6))} {j}" for j in range(size)]
        rewards = [float(rng.randint(0, 3)) for _ in range(size)]
        rewards[0] = 3.5  # something to compare in every list
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        rows.append({"prompt": prompt, "completions": completions} | ({"rewards": rewards} if with_rewards else {}))
    return Dataset.from_list(rows)
