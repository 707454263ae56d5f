"""
What the commands beside `larpo run` do: the steps of an iteration one at a time, from file to file (`larpo generate`,
`larpo reward`, `larpo select`), and the trainer of `larpo online`.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from .candidates import CandidatePool, SelectionCounts, each_list
from .errors import ConfigError, DataError
from .generation.options import GenerationOptions
from .generation.sampler import PolicySampler, device_of, finish_samples, generation_dtype
from .generation.sampling_task import SampleKind, SamplingTask
from .generation.server_process import check_servers
from .options import option
from .outputs import check_output, continue_output, resumable_output
from .pools import StoredPools, chain_pools, merge_pools, read_pools
from .prompts import Prompt, changed_columns, checked_columns, is_plain
from .rewards.functions import load_rewards
from .rewards.options import JudgeOptions, RewardOptions
from .rewards.scorer import RewardScorer, saved_scores_of_row
from .rewards.trl_convention import as_function
from .run.candidate_files import read_candidate_pools
from .run.loading import check_model_path, config_of, tokenizer_of
from .run.options import PromptOptions, SelectionOptions
from .run.prompts import load_prompts, warn_of_other_columns
from .selection import TRUNCATED_COMPLETIONS
from .set_aside import set_aside_files, set_aside_in
from .storage import GrowingFile, make_folder, write_jsonl

if TYPE_CHECKING:
    from .training.online_config import OnlineLarPOConfig
    from .training.online_trainer import OnlineLarPOTrainer

_AS_MESSAGES = (
    "Make text prompts and their completions the messages of a conversation, so that the chat template is applied: for "
    "chat models and files that hold bare texts."
)


@dataclass
class GenerateConfig(PromptOptions, GenerationOptions):
    """Options of `larpo generate`."""

    output: str | None = option(
        None,
        "JSONL file to write. The same command resumes from what it saved; one with other settings is refused.",
    )
    seed: int = option(0, "Seed of the sampling.")
    use_cpu: bool = option(False, "Do not use a GPU.")


@dataclass
class SampledModelConfig(ModelConfig):
    """TRL's `ModelConfig`, for commands that train nothing."""

    dtype: str | None = option(None, "Not used: see `generation_dtype`.")

    def check_nothing_is_trained(self) -> None:
        """
        Raises:
            ConfigError: Names an option that is only of use in a training.
        """
        if self.dtype is not None:
            raise ConfigError("`dtype` is the type of weights that are trained. Give `generation_dtype` instead.")
        if self.use_peft:
            raise ConfigError(
                "`use_peft` is for a training. To sample with an adapter, give its folder as `model_name_or_path`."
            )


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
    check_model_path(model.model_name_or_path)
    options.check_generation()
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    kinds = [SampleKind("policy", options.temperature[0])] * options.num_samples
    settings = sampling_settings(options, model)
    with resumable_output(output, settings, paths=PATHS_OF_SAMPLING, inputs=["prompts"]):
        prompts = prompts_of(options)
        pools = sample_file(options, model, prompts, kinds, output, seed=options.seed, use_cpu=options.use_cpu)
    if pools:
        print(f"{sum(len(pool.candidates) for pool in pools)} completions of {len(pools)} prompts in {output}")
        if len(pools) < len(prompts):
            print(f"{len(prompts) - len(pools)} prompts were set aside; {set_aside_files(output)} says why")


PATHS_OF_SAMPLING = ("prompts", "model_name_or_path")
"""Those of [`sampling_settings`] that are compared by content."""


def sampling_settings(options: Any, model: ModelConfig) -> dict[str, Any]:
    """What samples depend on, beside speed and rounding: options by name."""
    names = ("prompts", "prompts_config", "prompts_split", "prompt_column", "prompt_template", "prompts_as_messages",
             "system_prompt", "chat_template_kwargs",
             "num_samples", "temperature", "top_p", "max_new_tokens", "seed")  # fmt: skip
    of_model = ("model_name_or_path", "model_revision", "load_in_4bit", "load_in_8bit")
    return {name: getattr(options, name) for name in names} | {name: getattr(model, name) for name in of_model}


def prompts_of(options: PromptOptions) -> list[Prompt]:
    """All prompts, each once; a warning counts those that occur again with other columns."""
    first: dict[str, Prompt] = {}
    others = []
    for path in options.prompt_sources:
        for prompt in load_prompts(path, options, options.prompts_config, options.prompts_split):
            if changed_columns(first.setdefault(prompt.id, prompt), prompt):
                others.append(prompt)
    warn_of_other_columns(others)
    return list(first.values())


def check_model(model: ModelConfig, **kwargs: Any) -> None:
    """
    Checks that there is such a model, or an adapter.

    Args:
        model: Which one.
        kwargs: Further arguments of `from_pretrained`.

    Raises:
        ConfigError: If there is none.
    """
    check_model_path(model.model_name_or_path)
    try:
        config_of(model, **kwargs)
    except ConfigError:
        with contextlib.suppress(OSError):
            if find_adapter_config_file(model.model_name_or_path, revision=model.model_revision):
                return
        raise


def sample_file(
    options: GenerationOptions,
    model: ModelConfig,
    prompts: list[Prompt],
    kinds: list[SampleKind],
    output: Path,
    *,
    seed: int = 0,
    use_cpu: bool = False,
) -> StoredPools:
    """
    Samples completions into a JSONL file. Called again, it resumes from what it saved: what a whole file lacks is
    sampled.

    Args:
        options: How to sample; of `num_samples` and `temperature` only `kinds` counts.
        model: The model.
        prompts: The prompts.
        kinds: One for each completion of a prompt.
        output: The file.
        seed: Seed of the sampling.
        use_cpu: Do not use a GPU.

    Returns:
        The prompts with their candidates. On processes but the first nothing.

    Raises:
        ConfigError: If there is no such model, or servers are to sample from one that is quantized in this process.
    """
    path, quantization = model.model_name_or_path, get_quantization_config(model)
    if quantization is not None:
        if options.uses_servers:
            raise ConfigError(
                "`load_in_4bit` and `load_in_8bit` are for sampling in this process. Leave them out; servers have "
                "options of their own, e.g. `vllm serve --quantization bitsandbytes`."
            )
        quantization.bnb_4bit_compute_dtype = generation_dtype(options.generation_dtype, device_of(use_cpu))
    if continue_output(output, [prompt.id for prompt in prompts], lambda place: prompts[place].text):
        return read_pools(output)
    if not options.uses_servers:
        check_model(model)
    tokenizer_of(model)  # an error here, before servers start
    sampler = PolicySampler(
        options,
        seed=seed,
        log_folder=output.with_name(f"{output.name}.servers"),  # others may sample into the same folder
        use_cpu=use_cpu,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization,
    )
    task = SamplingTask(kinds, path, iteration=1, key="1", revision=model.model_revision)
    try:
        pools = sampler.sample(prompts, task, output)
    finally:
        sampler.close()
    if not pools:
        return pools
    finish_samples(output, pools)
    return read_pools(output)


def reward(options: RewardConfig) -> None:
    """Rewards all completions of a file."""
    samples, output = _path(options, "samples"), Path(_path(options, "output"))
    options.check_rewards()
    load_rewards(options.reward_funcs, options.reward_weights)
    settings = {name: getattr(options, name) for name in ("samples", "as_messages", *REWARD_SETTINGS)}
    with resumable_output(output, settings, paths=["samples", "reward_funcs"], inputs=["samples"]):
        pools = read_candidate_pools(samples, options.as_messages)
        scored = reward_file(options, pools, output, use_cpu=options.use_cpu)
    if scored:
        print(f"Rewards of {len(scored)} prompts in {output}")
        if failed := set_aside_in(output.parent).get(output.stem):
            files = set_aside_files(output)
            print(f"{len(failed)} prompts on which the reward failed were set aside; {files} says why")


def reward_file(
    options: RewardOptions,
    pools: Sequence[CandidatePool],
    output: Path,
    *,
    use_cpu: bool = False,
    description: str = "Rewarding",
) -> StoredPools:
    """
    Rewards completions into a JSONL file. Called again, it resumes from what it saved: what a whole file lacks is
    rewarded.

    Args:
        options: Who judges.
        pools: Prompts and their completions. Those of one prompt are merged.
        output: The file.
        use_cpu: Do not use a GPU.
        description: What the progress bar says.

    Returns:
        The pools with rewards. On processes but the first nothing.

    Raises:
        DataError: If a column holds what JSON files cannot, such as times.
    """
    unscored = merge_pools(pools).map(_to_reward)
    scorer = RewardScorer(options, use_cpu=use_cpu)
    if continue_output(output, unscored.ids, lambda place: unscored[place].prompt.text, saved_scores_of_row):
        return _with_same_completions(read_pools(output), scorer.as_judged(unscored), output)
    scored = scorer.score(unscored, output, description)
    if not scored:
        return scored
    GrowingFile.finish(output, (pool.to_row() for pool in scored))
    return read_pools(output)


def _to_reward(pool: CandidatePool) -> CandidatePool:
    checked_columns(pool.prompt.columns, f"The prompt {pool.prompt.text[:60]!r}")
    return pool.without_rewards()


REWARD_SETTINGS = (
    "reward_funcs", "reward_weights", "normalize_rewards", "reward_max_length", "reward_dtype", "strip_thinking",
)  # fmt: skip
"""Options that rewards depend on, beside speed and rounding."""


def _with_same_completions(kept: StoredPools, pools: Sequence[CandidatePool], output: Path) -> StoredPools:
    place_of = {name: place for place, name in enumerate(kept.ids)}
    for pool in pools:
        found = kept[place_of[pool.prompt.id]]
        if [c.completion for c in found.candidates] != [c.completion for c in pool.candidates]:
            raise ConfigError(f"{output} holds rewards of other completions. Take another `output`.")
        if changed := changed_columns(found.prompt, pool.prompt):
            raise ConfigError(
                f"{output} holds rewards of the prompt {pool.prompt.text[:60]!r} with another `{changed[0]}`. Take "
                "another `output`."
            )
    return kept


def select(options: SelectConfig) -> None:
    """Makes candidate lists."""
    paths, output = _path(options, "candidates"), Path(_path(options, "output"))
    check_output(output, "candidates", paths)
    make_folder(output.parent, "output")
    files = [read_candidate_pools(path, options.as_messages) for path in paths]
    judges: dict[str | None, str] = {}
    columns: dict[str, None] = {}
    not_plain: set[str] = set()
    for path, pools in zip(paths, files, strict=True):
        has_rewards = False
        for pool in pools:
            columns.update(dict.fromkeys(pool.prompt.columns))
            not_plain.update(name for name, value in pool.prompt.columns.items() if not is_plain(value))
            if any(candidate.reward is not None for candidate in pool.candidates):
                has_rewards = True
                judges.setdefault(pool.candidates[0].scored_by, path)
        if not has_rewards:
            raise DataError(f"{path!r} has no rewards; score it first: larpo reward --samples {path} --output ...")
    if len(judges) > 1:
        named = " and ".join(map(repr, dict.fromkeys(judges.values())))
        raise DataError(
            f"Completions in {named} were scored by different rewards, which cannot be compared. Score all of them "
            "again: larpo reward."
        )
    counts = SelectionCounts()
    kept = [name for name in columns if name not in not_plain]
    pools = merge_pools(chain_pools(files)).map(lambda pool: pool.with_columns(kept))
    lists = each_list(pools, options.selection(options.truncated_completions), counts)
    write_jsonl(output, (made.to_row() for made in lists if made.problem is None))
    if not_plain:
        print(f"Columns that JSON cannot hold are left out: {', '.join(sorted(not_plain))}")
    print(f"{counts.summary()}\nLists in {output}")


def make_online_trainer(
    judges: JudgeOptions,
    args: "OnlineLarPOConfig",
    model: ModelConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
) -> "OnlineLarPOTrainer":
    """The trainer of `larpo online`. `reward_weights` are TRL's."""
    from .run.loading import model_init_kwargs
    from .training.online_trainer import OnlineLarPOTrainer, check_prompts

    check_prompts(train_dataset, eval_dataset)  # before reward models are loaded
    options = RewardOptions(**dataclasses.asdict(judges))
    options.check_rewards()
    load_rewards(options.reward_funcs, args.reward_weights)  # an error here, before a model is loaded
    loaded = RewardScorer(options, use_cpu=args.use_cpu).rewards
    args.model_init_kwargs = model_init_kwargs(model, args)
    return OnlineLarPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=[as_function(reward) for reward in loaded],
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _path(options, name: str):
    value = getattr(options, name)
    if not value:
        raise ConfigError(f"`{name}` is missing.")
    return value
