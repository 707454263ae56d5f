"""Shared code of the evaluation scripts: generates a model's answers and saves them, so that a run can resume."""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from trl import ModelConfig

from trl_larpo import LarPOError
from trl_larpo.commands import GenerateConfig, sample_file
from trl_larpo.generation.sampler import SampleKind
from trl_larpo.generation.server_process import check_servers
from trl_larpo.prompts import Prompt
from trl_larpo.run.context import read_pools
from trl_larpo.storage import keep_settings


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Options for the model and its sampling."""
    parser.add_argument("--model_name_or_path", required=True, help="the model: a folder or a hub id")
    parser.add_argument("--name", help="name of the model in the benchmark (default: the last part of its path)")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and results")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="longest answer (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="answers sampled at the same time (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32 (%(default)s)")
    parser.add_argument("--system_prompt", help="system message before each prompt")
    parser.add_argument("--server_urls", nargs="*", help="OpenAI-compatible servers of the model, e.g. vLLM's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")


def answer(arguments: argparse.Namespace, texts: list[str], path: Path, temperature: float) -> list[str]:
    """
    Answers each text, as a user message with the model's own chat template.

    Args:
        arguments: Options of [`add_options`].
        texts: The prompts.
        path: File for the answers, `.jsonl`; the settings are saved next to it, in `.settings.json`.
        temperature: Sampling temperature; 0 decodes greedily.

    Returns:
        One answer per text, in the same order.
    """
    settings = {
        "model": arguments.model_name_or_path,
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
        "temperature": temperature,
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": arguments.dtype,
        "system_prompt": arguments.system_prompt,
        "seed": arguments.seed,
    }
    keep_settings(path.with_suffix(".settings.json"), settings, "--output")
    system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []
    prompts = [Prompt.of([*system, {"role": "user", "content": text}]) for text in texts]
    options = GenerateConfig(
        max_new_tokens=arguments.max_new_tokens,
        generation_batch_size=arguments.batch_size,
        generation_dtype=arguments.dtype,
        server_urls=arguments.server_urls or None,
        seed=arguments.seed,
        use_cpu=arguments.use_cpu,
    )
    options.check_sampler()
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    model = ModelConfig(model_name_or_path=arguments.model_name_or_path)
    if path.exists():
        pools = read_pools(path)
    else:
        kinds = [SampleKind("policy", temperature)]
        pools = sample_file(options, model, prompts, kinds, path, seed=options.seed, use_cpu=options.use_cpu)
    answers = [pool.candidates[0] for pool in pools]
    cut = sum(not answer.finished for answer in answers)
    if cut:
        print(f"{cut} of {len(answers)} answers were cut off after {arguments.max_new_tokens} tokens.")
    return [answer.text for answer in answers]


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
