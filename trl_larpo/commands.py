"""The steps of an iteration one at a time, from file to file: `larpo generate`, `larpo reward`, `larpo select`."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from trl import ModelConfig

from .candidates import TRUNCATED_COMPLETIONS, build_lists, candidates_of
from .errors import ConfigError, DataError
from .generation.options import GenerationOptions
from .generation.server_process import check_servers
from .options import option
from .rewards.functions import load_rewards
from .rewards.options import RewardOptions
from .run.candidate_files import read_candidate_rows
from .run.options import PromptOptions, SelectionOptions
from .run.prompts import load_prompts
from .run.stages import Stages
from .storage import GrowingFile, write_jsonl

Row = dict[str, Any]


_AS_MESSAGES = (
    "Make text prompts and their completions the messages of a conversation, so that the chat template is applied: for "
    "chat models and files that hold bare texts."
)


@dataclass
class GenerateConfig(PromptOptions, GenerationOptions):
    """Options of `larpo generate`."""

    output: str | None = option(None, "JSONL file to write. After a kill, the same command resumes from what it saved.")
    seed: int = option(0, "Seed of the sampling.")
    use_cpu: bool = option(False, "Do not use a GPU.")


@dataclass
class RewardConfig(RewardOptions):
    """Options of `larpo reward`."""

    samples: str | None = option(
        None, "Completions: a file of `larpo generate`, or one in RLHFlow's, SimPO's or UltraFeedback's form."
    )
    as_messages: bool = option(False, _AS_MESSAGES)
    output: str | None = option(None, "JSONL file to write.")
    use_cpu: bool = option(False, "Do not use a GPU.")


@dataclass
class SelectConfig(SelectionOptions):
    """Options of `larpo select`."""

    candidates: list[str] | None = option(
        None, "Files of rewarded completions, the latest first. Those of one prompt are merged."
    )
    as_messages: bool = option(False, _AS_MESSAGES)
    truncated_completions: str = option(
        "rank_last",
        "Cut-off completions: 'rank_last' (below all that ended; of `num_worst` they take at most half, rounded up), "
        "'by_reward', or 'drop'. Give `larpo train` the same.",
        choices=[*TRUNCATED_COMPLETIONS],
    )
    output: str | None = option(None, "JSONL file to write, for `larpo train --dataset_name`.")


def generate(options: GenerateConfig, model: ModelConfig) -> None:
    """Samples completions of all prompts."""
    output = Path(_path(options, "output"))
    options.check_prompts()
    if not model.model_name_or_path:
        raise ConfigError("No model: give `model_name_or_path`, a folder or a hub id.")
    options.check_generation()
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    kinds = [("policy", options.temperature[0])] * options.num_samples
    rows = sample_file(options, model, prompts_of(options), kinds, output)
    if rows:
        print(f"{sum(len(row['completions']) for row in rows)} completions of {len(rows)} prompts in {output}")


def prompts_of(options: PromptOptions) -> list[Row]:
    """All prompts, each once."""
    rows = [
        row
        for path in options.prompts
        for row in load_prompts(path, options, options.prompts_config, options.prompts_split)
    ]
    return list({row["prompt_id"]: row for row in rows}.values())


def sample_file(
    options: GenerateConfig, model: ModelConfig, rows: list[Row], kinds: list[tuple[str, float]], output: Path
) -> list[Row]:
    """
    Samples completions into a JSONL file. Called again after a kill, it resumes from what it saved.

    Args:
        options: How to sample; of `num_samples` and `temperature` only `kinds` counts.
        model: The model.
        rows: Prompts, with `prompt_id` and `prompt`.
        kinds: A name and the temperature of each completion of a prompt.
        output: The file.

    Returns:
        The rows with `completions` and `candidates` added. On processes but the first nothing.
    """
    AutoTokenizer.from_pretrained(model.model_name_or_path)
    training = SimpleNamespace(seed=options.seed, use_cpu=options.use_cpu)
    folder = SimpleNamespace(
        options=options,
        training=training,
        model=model,
        path=output.parent,
        model_path=lambda _: model.model_name_or_path,
    )
    stages = Stages(folder)
    try:
        sampled = stages.sample(
            rows,
            kinds,
            output,
            model_path=model.model_name_or_path,
            iteration=1,
            key="1",
            description="Sampling",
        )
    finally:
        stages.close()
    if sampled:
        GrowingFile(output).finish(sampled)
    return sampled


def reward(options: RewardConfig) -> None:
    """Rewards all completions of a file."""
    samples, output = _path(options, "samples"), Path(_path(options, "output"))
    options.check_rewards()
    load_rewards(options.reward_funcs, options.reward_weights)
    scored = reward_file(options, read_candidate_rows(samples, options.as_messages), output, use_cpu=options.use_cpu)
    if scored:
        print(f"Rewards of {len(scored)} prompts in {output}")


def reward_file(
    options: RewardOptions, rows: list[Row], output: Path, *, use_cpu: bool = False, description: str = "Rewarding"
) -> list[Row]:
    """
    Rewards completions into a JSONL file. Called again after a kill, it resumes from what it saved.

    Args:
        options: Who judges.
        rows: With `prompt_id`, `prompt`, `completions`, `candidates`.
        output: The file.
        use_cpu: Do not use a GPU.
        description: What the progress bar says.

    Returns:
        The rows with `rewards`. On processes but the first nothing.
    """
    for row in rows:
        row["rewards"], row["known"] = [None] * len(row["completions"]), [False] * len(row["completions"])
    stages = Stages(SimpleNamespace(options=options, training=SimpleNamespace(use_cpu=use_cpu)))
    scored = stages.score(rows, output, description)
    if scored:
        GrowingFile(output).finish(scored)
    return scored


def select(options: SelectConfig) -> None:
    """Makes candidate lists."""
    paths, output = _path(options, "candidates"), Path(_path(options, "output"))
    pools: dict[str, tuple[dict, list]] = {}
    judges: dict[str | None, str] = {}
    for path in paths:
        for row in read_candidate_rows(path, options.as_messages):
            judges.setdefault(row.get("reward_id"), path)
            if all(reward is None for reward in row["rewards"]):
                raise DataError(f"{path!r} has no rewards; score it first: larpo reward --samples {path} --output ...")
            prompt = {name: row[name] for name in ("prompt_id", "prompt")}
            pools.setdefault(row["prompt_id"], (prompt, []))[1].extend(candidates_of(row))
    if len(judges) > 1:
        raise DataError(
            f"{' and '.join(map(repr, judges.values()))} were scored by different rewards, which cannot be compared. "
            "Score all of them again: larpo reward."
        )
    rows, counts = build_lists(list(pools.values()), options.selection(options.truncated_completions))
    write_jsonl(output, [row for row in rows if row["problem"] is None])
    print(f"{counts.summary()}\nLists in {output}")


def _path(options, name: str):
    value = getattr(options, name)
    if not value:
        raise ConfigError(f"`{name}` is missing.")
    return value
