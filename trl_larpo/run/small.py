"""
`larpo run --small`: a configuration with tiny stand-ins for its models and a few short prompts.

The stand-ins have random weights and the architecture of what they stand for: a Llama for a policy, a Llama classifier
with Llama 3's chat format for a reward model, DeBERTa-v3 with PairRM's head for PairRM. Everything that makes a
configuration what it is (losses, list sizes, selection, memory, temperatures, learning rate, iterations) stays.
"""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    DebertaV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..errors import ConfigError
from ..rewards.functions import BUILT_IN, PAIRWISE
from ..rewards.pairrm import FIRST, SECOND, SOURCE, PairRMModel
from ..storage import iter_jsonl, read_yaml, write_jsonl, write_text

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_NUM_PROMPTS = 8

_LIKELY = {"1": 4.0, "2": 4.0, "3": 4.0, "4": 4.0, " ": 5.0}
"""Logits by which the policy prefers small numbers: so that some of its answers to sums are right."""


def shrink_arguments(argv: list[str]) -> list[str]:
    """
    Writes a small form of the configuration that `--config` names, and names it in its place.

    Args:
        argv: What comes after `larpo run`.

    Raises:
        ConfigError: If there is no configuration file.
    """
    place = next((i for i, word in enumerate(argv) if word == "--config"), None)
    if place is None or place + 1 == len(argv):
        raise ConfigError("`--small` makes a small run of a configuration file; give one with `--config`.")
    path = Path(argv[place + 1])
    if not path.is_file():
        raise ConfigError(f"`--config`: there is no file {str(path)!r}.")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "output_dir" not in config:
        raise ConfigError(f"`--config`: {str(path)!r} has no `output_dir`.")
    parts = Path(f"{config['output_dir']}-small-parts").expanduser()
    small, written = shrink(config, parts), parts / "small.yaml"
    text = yaml.safe_dump(small, sort_keys=True)
    if written.exists() and written.read_text(encoding="utf-8") != text:
        _remove_earlier(Path(small["output_dir"]).expanduser(), parts)
    write_text(written, text)
    print(f"Small form of {path} with tiny stand-ins for its models: {written}")
    if any(":" in name.removeprefix(PAIRWISE) for name in small["reward_funcs"]):
        print("The stand-in answers with small numbers: if a reward is the same for all of them, there are no lists.")
    return [*argv[:place], "--config", str(written), *argv[place + 2 :]]


def _remove_earlier(run: Path, parts: Path) -> None:
    """Removes the small run of a configuration that has changed since, unless it is another run."""
    if (run / "run.yaml").exists() and parts.name in str(read_yaml(run / "run.yaml")["model_name_or_path"]):
        shutil.rmtree(run)


def shrink(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """
    A small form of a configuration of `larpo run`.

    Args:
        config: Its options.
        folder: Where the stand-ins are put.

    Returns:
        The options of the small run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    small = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    small |= _SMALL | {
        "output_dir": f"{config['output_dir']}-small",
        "model_name_or_path": save_small_model(folder / "model"),
        "reward_funcs": [_reward(name, folder) for name in _as_list(config.get("reward_funcs"))],
        "use_cpu": not torch.cuda.is_available(),
    }
    paths = _as_list(config.get("prompts"))
    num_rows = _NUM_PROMPTS
    if config.get("prompt_schedule", "same") != "same" and len(paths) == 1:  # iterations share the prompts of one file
        num_rows *= config.get("num_iterations", 3)
    small["prompts"] = [
        _prompts(path, folder / f"prompts_{number}.jsonl", config, number, num_rows)
        for number, path in enumerate(paths)
    ]
    if config.get("held_out_prompts"):
        small["held_out_prompts"] = _prompts(config["held_out_prompts"], folder / "held_out.jsonl", config, len(paths))
        small["held_out_split"] = "train"
    if config.get("random_prompts"):
        unrelated = config | {
            "prompt_column": config.get("random_prompts_column", config.get("prompt_column", "prompt"))
        }
        small["random_prompts"] = _prompts(config["random_prompts"], folder / "random.jsonl", unrelated, len(paths) + 1)
    small["per_device_train_batch_size"] = min(2, config.get("per_device_train_batch_size", 2))
    return small


_MAX_LENGTH = 4096
"""Of the stand-ins, whose tokens are bytes."""

_LONGEST_PROMPT = 3000  # characters of JSON, of which none becomes more than a byte


_LEFT_OUT = (
    "accelerate_config", "attn_implementation", "dtype", "generation_processes", "load_in_4bit", "max_prompt_length",
    "mirror", "model_revision", "num_processes", "num_servers", "prompts_config", "prompts_per_iteration", "report_to",
    "reward_dtype", "reward_max_length", "reward_processes", "server_command", "server_reload", "server_urls",
    "train_launcher", "train_processes",
)  # fmt: skip


_SMALL = {
    "bf16": False,
    "disable_tqdm": True,
    "generation_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "max_length": _MAX_LENGTH,
    "max_new_tokens": 24,
    "num_eval_samples": 2,
    "num_held_out": 2,
    "prompts_split": "train",
    "report_to": "none",
    "save_strategy": "no",
}


def _reward(name: str, folder: Path) -> str:
    """Functions stay; a model gets a stand-in."""
    path = name.removeprefix(PAIRWISE)
    if name == "math":  # which reads LaTeX, and a stand-in writes none
        return "gsm8k"
    if path in BUILT_IN or ":" in path:
        return name
    if name.startswith(PAIRWISE):
        return PAIRWISE + save_small_pairrm(folder / "pairrm")
    return save_small_reward_model(folder / "reward_model")


def _prompts(path: str, target: Path, config: dict[str, Any], seed: int, num_rows: int = _NUM_PROMPTS) -> str:
    """
    The first rows of a JSONL file, but for long prompts; in place of any other source, or if all are long, sums in the
    form that the configuration expects.
    """
    column = config.get("prompt_column", "prompt")
    if Path(path).suffix == ".jsonl" and Path(path).is_file():
        short = (row for row in iter_jsonl(path) if len(json.dumps(row.get(column))) <= _LONGEST_PROMPT)
        if found := list(itertools.islice(short, num_rows)):
            write_jsonl(target, found)
            return str(target)
    rng, rows = random.Random(seed), []
    for _ in range(num_rows):
        first, second, third = (rng.randint(0, 200) for _ in range(3))
        answer = rng.randint(1, 4)
        text = f"{first} birds sit on a roof, {second} leave, {third} come: {first - second + third} + {answer}?"
        prompt = text if config.get("prompts_as_messages") else [{"role": "user", "content": text}]
        rows.append({column: prompt, "answer": f"#### {answer}", "solution": f"${answer}$"})
    write_jsonl(target, rows)
    return str(target)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


# Models


def byte_tokenizer(
    chat_template: str | None = CHATML,
    special_tokens: tuple[str, ...] = ("<|pad|>", "<|im_start|>", "<|im_end|>"),
    **roles: str,
) -> PreTrainedTokenizerFast:
    """
    A tokenizer with one token for each byte.

    Args:
        chat_template: Its chat template.
        special_tokens: The first token ids.
        **roles: Which of them is `pad_token`, `bos_token`, ...; by default the first, second and third of them are
            padding, beginning and end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special_tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    roles = roles or dict(zip(("pad_token", "bos_token", "eos_token"), special_tokens, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **roles)


def save_small_model(folder: Path) -> str:
    """A Llama with random weights that says small numbers and soon ends. Returns the folder."""
    tokenizer = byte_tokenizer()
    model = _random(LlamaForCausalLM, _llama(tokenizer, tie_word_embeddings=False))
    with torch.no_grad():
        # A direction of the residual stream that every token has, and that makes some tokens likely
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight *= 0.2
        scale = model.model.norm.weight[0] * model.config.hidden_size**0.5
        for token, logit in _LIKELY.items():
            model.lm_head.weight[tokenizer(token)["input_ids"][0], 0] = 2 * logit / scale
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2 * 6.0 / scale
    return _save(model, tokenizer, folder)


def save_small_reward_model(folder: Path) -> str:
    """A Llama classifier with random weights and Llama 3's chat format, as FsfairX has. Returns the folder."""
    special = ("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = byte_tokenizer(LLAMA_3, special)
    return _save(_random(LlamaForSequenceClassification, _llama(tokenizer, num_labels=1)), tokenizer, folder)


def save_small_pairrm(folder: Path) -> str:
    """DeBERTa-v3 with PairRM's head and random weights. Returns the folder."""
    special = ("[PAD]", "[CLS]", "[SEP]", SOURCE, FIRST, SECOND)
    tokenizer = byte_tokenizer(None, special, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    ids = {name: special.index(token) for name, token in (("source", SOURCE), ("cand1", FIRST), ("cand2", SECOND))}
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=512, position_buckets=64, relative_attention=True, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        pad_token_id=0, initializer_range=0.3, n_tasks=1, drop_out=0.05,
        **{f"{name}_prefix_id": value for name, value in ids.items()},
    )  # fmt: skip
    return _save(_random(PairRMModel, config), tokenizer, folder)


def _llama(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=_MAX_LENGTH, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **settings,
    )  # fmt: skip


def _random(model_class: type, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
