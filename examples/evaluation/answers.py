"""Shared code of the evaluation scripts: generates a model's answers and saves them, so that a run can resume."""

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig

from trl_larpo import LarPOError
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.commands import GenerateConfig, reward_file, sample_file
from trl_larpo.generation.sampler import device_of, generation_dtype
from trl_larpo.generation.sampling_task import SampleKind
from trl_larpo.generation.server_process import check_servers
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.options import RewardOptions
from trl_larpo.settings import keep_settings

PRESETS: dict[str, dict[str, Any]] = {
    "mistral_instruct": {"temperature": 0.5},
    "mistral_base": {"temperature": 0.7, "system_prompt": ""},
    "gemma2": {"temperature": 0.5},
    "gemma3": {"temperature": 1.0, "top_p": 0.95},
    "llama3": {"temperature": 0.6, "top_p": 0.9},
    "qwen3": {"temperature": 0.7, "top_p": 0.8},
}
"""The first two are the paper's baselines (zephyr-7b-sft-full has an empty system turn), `gemma2` is that of SimPO's
Gemma-2 models. The others are their vendors' recommendations, of Qwen3 for Instruct-2507, without top_k."""


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Options for the model and its sampling."""
    parser.add_argument("--model_name_or_path", required=True, help="the model: a folder or a hub id")
    parser.add_argument("--name", help="name of the model in the benchmark (default: the last part of its path)")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and results")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="longest answer (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="answers sampled at the same time (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32 (%(default)s)")
    parser.add_argument("--system_prompt", help="system message before each prompt; '' is an empty one")
    parser.add_argument("--chat_template_kwargs", type=json.loads, help='in JSON, e.g. {"enable_thinking": false}')
    parser.add_argument("--server_urls", nargs="*", help="OpenAI-compatible servers of the model, e.g. vLLM's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--preset", choices=PRESETS, help="temperature, top_p and system prompt for a family of models")
    parser.add_argument("--top_p", type=float, help="nucleus sampling threshold, instead of a preset's")
    parser.add_argument(
        "--initial_model", help="model that the training started from, measured beside it with the same judge"
    )
    parser.add_argument("--best_of_n", type=int, default=1, help="also measure the best of N of its answers")
    parser.add_argument("--best_of_n_reward", help="reward that chooses it: a name as in `reward_funcs`")


@dataclass(frozen=True)
class Entrant:
    """What is measured: a model's answers, or the best of several of its answers."""

    name: str
    model: str
    folder: Path
    best_of: int = 1


def entrants(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Entrant]:
    """The model and its baselines, each with a folder of its own."""
    if (arguments.best_of_n > 1) != bool(arguments.best_of_n_reward):
        parser.error("--best_of_n and --best_of_n_reward go together")
    if arguments.best_of_n > 1 and arguments.initial_model is None:
        parser.error("--best_of_n is a baseline of the initial model: give --initial_model")
    name = arguments.name or Path(arguments.model_name_or_path).name
    found = [Entrant(name, arguments.model_name_or_path, arguments.output)]
    if arguments.initial_model is not None:
        found.append(Entrant("initial_model", arguments.initial_model, arguments.output / "initial_model"))
        if arguments.best_of_n > 1:
            best = f"initial_model_best_of_{arguments.best_of_n}"
            found.append(Entrant(best, arguments.initial_model, arguments.output / best, arguments.best_of_n))
    return found


def sampling_of(arguments: argparse.Namespace, temperature: float | None = None) -> dict[str, Any]:
    """Temperature, top_p and system prompt: those given, else the preset's."""
    preset = PRESETS.get(arguments.preset, {})
    given = {"temperature": temperature, "top_p": arguments.top_p, "system_prompt": arguments.system_prompt}
    defaults = {"temperature": None, "top_p": 1.0, "system_prompt": None} | preset
    return {key: defaults[key] if value is None else value for key, value in given.items()}


def answer(
    arguments: argparse.Namespace, entrant: Entrant, texts: list[str], path: Path, sampling: dict[str, Any]
) -> list[str]:
    """
    Answers each text, as a user message with the model's own chat template.

    Args:
        arguments: Options of [`add_options`].
        entrant: Who answers.
        texts: The prompts.
        path: File for the answers, `.jsonl`; the settings are saved next to it, in `.settings.json`.
        sampling: From [`sampling_of`]; temperature 0 decodes greedily.

    Returns:
        One answer per text, in the same order. Equal texts have the same answer.

    Raises:
        LarPOError: If a text has no answer, or none with a reward to choose it by. The next call tries again.
    """
    settings = {
        "model": entrant.model,
        "prompts": digest(texts),
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "servers": bool(arguments.server_urls),
        "chat_template_kwargs": arguments.chat_template_kwargs,
        "seed": arguments.seed,
        "best_of": entrant.best_of,
        "best_of_n_reward": arguments.best_of_n_reward if entrant.best_of > 1 else None,
        **sampling,
    }
    keep_settings(path.with_suffix(".settings.json"), settings, "--output", paths=["model", "best_of_n_reward"])
    text = sampling["system_prompt"]
    system = [] if text is None else [{"role": "system", "content": text}]
    prompts = [Prompt.of([*system, {"role": "user", "content": text}]) for text in texts]
    distinct = list({prompt.id: prompt for prompt in prompts}.values())
    options = GenerateConfig(
        max_new_tokens=arguments.max_new_tokens,
        top_p=sampling["top_p"],
        chat_template_kwargs=arguments.chat_template_kwargs,
        generation_batch_size=arguments.batch_size,
        generation_dtype=arguments.dtype,
        server_urls=arguments.server_urls or None,
        seed=arguments.seed,
        use_cpu=arguments.use_cpu,
    )
    options.check_sampler()
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    model = ModelConfig(model_name_or_path=entrant.model)
    kinds = [SampleKind("policy", sampling["temperature"])] * entrant.best_of
    pools = sample_file(options, model, distinct, kinds, path, seed=options.seed, use_cpu=options.use_cpu)
    if entrant.best_of > 1:
        judge = RewardOptions(reward_funcs=[arguments.best_of_n_reward])
        pools = reward_file(judge, pools, path.with_suffix(".rewarded.jsonl"), use_cpu=arguments.use_cpu)
    best = {pool.prompt.id: _best(pool.candidates) for pool in pools if entrant.best_of == 1 or _has_reward(pool)}
    if missing := [prompt.text for prompt in distinct if prompt.id not in best]:
        what = "answer" if entrant.best_of == 1 else "answer with a reward to choose it by"
        raise LarPOError(
            f"{len(missing)} of {len(distinct)} prompts have no {what}, such as {missing[0][:60]!r}; *.set_aside.jsonl "
            f"in {path.parent} says why. Call again to try again."
        )
    answers = [best[prompt.id] for prompt in prompts]
    cut = sum(not answer.finished for answer in answers)
    if cut:
        print(f"{cut} of {len(answers)} answers were cut off after {arguments.max_new_tokens} tokens.")
    return [answer.text for answer in answers]


def digest(value: Any) -> str:
    """A name for a value of JSON, to compare settings by."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _best(candidates: list[Candidate]) -> Candidate:
    return max(candidates, key=lambda candidate: -math.inf if candidate.reward is None else candidate.reward)


def _has_reward(pool: CandidatePool) -> bool:
    return any(candidate.reward is not None for candidate in pool.candidates)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What results also depend on, beside the settings: written with each result, and not compared."""
    on_gpu = torch.cuda.is_available() and not arguments.use_cpu
    return {
        "device": "servers" if arguments.server_urls else torch.cuda.get_device_name() if on_gpu else "cpu",
        "generation_dtype": str(generation_dtype(arguments.dtype, device_of(arguments.use_cpu))).removeprefix("torch."),
        **{name: version(name) for name in ("torch", "transformers", "trl-larpo")},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def paper_figures(recipe: Path) -> str:
    """The paper's results, from the header of a recipe."""
    said = re.search(r"^# The paper's figures(.*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return said.group(1).lstrip(": ") if said else "no figures"


def run(main) -> None:
    """Runs a script. Errors caused by user input are printed as one line."""
    try:
        main()
    except LarPOError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
