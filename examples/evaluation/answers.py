"""What the evaluation scripts share: answers of a model, in files from which an interrupted run resumes."""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from trl import ModelConfig

from trl_larpo import LarPOError
from trl_larpo.commands import GenerateConfig, sample_file
from trl_larpo.generation.server_process import check_servers
from trl_larpo.prompts import completion_text, prompt_id
from trl_larpo.storage import keep_settings, read_jsonl


def add_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Options that say which model answers, and how."""
    parser.add_argument("--model_name_or_path", required=True, help="the model: a folder or a hub id")
    parser.add_argument("--name", help="its name in the benchmark (default: the last part of its path)")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and results")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="longest answer (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="answers sampled at the same time (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="arithmetic: auto, bfloat16, float32 (%(default)s)")
    parser.add_argument("--system_prompt", help="a system message in front of each prompt")
    parser.add_argument("--server_urls", nargs="*", help="OpenAI-compatible servers of the model, e.g. vLLM's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")


def answer(arguments: argparse.Namespace, texts: list[str], path: Path, temperature: float) -> list[str]:
    """
    Answers each text, as a user's message under the model's own chat template.

    Args:
        arguments: Of [`add_options`].
        texts: The prompts.
        path: Where the answers are kept, `.jsonl`; beside it, in `.settings.json`, how they were made.
        temperature: 0 decodes greedily.

    Returns:
        An answer for each text, in their order.
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
    prompts = [[*system, {"role": "user", "content": text}] for text in texts]
    rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt} for prompt in prompts]
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
    answered = read_jsonl(path) if path.exists() else sample_file(options, model, rows, [("policy", temperature)], path)
    cut = sum(not row["candidates"][0]["finished"] for row in answered)
    if cut:
        print(f"{cut} of {len(answered)} answers were cut off after {arguments.max_new_tokens} tokens.")
    return [completion_text(row["completions"][0]) for row in answered]


def paper_figures(recipe: Path) -> str:
    """The paper's figures, as the head of a recipe has them."""
    said = re.search(r"^# The paper's figures(.*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    return said.group(1).lstrip(": ") if said else "no figures"


def run(main) -> None:
    """Runs a script; an error caused by user input is one line."""
    try:
        main()
    except LarPOError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
