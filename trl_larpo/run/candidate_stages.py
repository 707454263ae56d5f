"""From prompts to candidate lists: the stages `generate`, `reward` and `select`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import AutoTokenizer

from ..candidates import CandidateList, CandidatePool, SelectionCounts, each_list
from ..errors import LarPOError
from ..generation.sampler import finish_samples
from ..generation.sampling_task import SampleKind, SamplingTask
from ..pools import StoredPools, chain_pools, read_pools
from ..prompts import Prompt
from ..report.statistics import SampleCounts, keep_sample_statistics
from ..rewards.early import EarlyRewards, can_reward_early, forget_early_rewards, with_early_rewards
from ..storage import GrowingFile, write_json, write_jsonl
from .candidate_files import read_candidate_pools
from .context import RunContext
from .memory import add_earlier_candidates, earlier_iterations, earlier_rows, joined_prompts
from .negatives import TEMPERATURES, add_responses_to_other_prompts, unrelated_prompts
from .prompts import load_random_prompts

logger = get_logger(__name__)


def generate(context: RunContext, iteration: int, path: Path) -> None:
    """Samples completions of the iteration's prompts, and adds negatives."""
    options = context.options
    path = path.absolute()  # early rewards run beside the sampling, and may change the working directory for a moment
    kinds = [SampleKind("policy", options.temperature_in(iteration))] * options.num_samples
    for name in TEMPERATURES:
        if name in options.negatives:
            kinds += [SampleKind(name, getattr(options, name))] * options.num_negatives
    model_path, revision = context.model(iteration - 1)
    task = SamplingTask(
        kinds,
        model_path,
        iteration,
        key=str(iteration),
        revision=revision,
        is_trained=context.is_trained(iteration - 1),
        description=f"Iteration {iteration}: sampling",
    )
    with _early_rewards(context, iteration, path.with_name("rewarded.jsonl")) as on_pools:
        pools = context.sampler.sample(context.folder.prompts_of(iteration), task, path, on_pools)
    unrelated = _responses_to_unrelated_prompts(context, task, path) if options.random_prompts else None
    if PartialState().is_main_process:
        seed = context.folder.training.seed
        pools = add_responses_to_other_prompts(
            pools, options.negatives, options.num_negatives, seed, iteration, unrelated
        )
        counts = SampleCounts()
        finish_samples(path, counts.counted(pools))
        keep_sample_statistics(path.parent, counts)


@contextlib.contextmanager
def _early_rewards(
    context: RunContext, iteration: int, output: Path
) -> Iterator[Callable[[list[CandidatePool]], None]]:
    """Gives what rewards prompts as they are sampled; it does nothing where rewards have to wait."""
    if not context.options.reward_while_sampling or not can_reward_early(context.scorer):
        yield lambda pools: None
        return
    numbers = [iteration, *earlier_iterations(context.options.memory, iteration)]  # all that the stage will reward
    prompts = (prompt for number in numbers for prompt in context.folder.prompts_of(number))
    with EarlyRewards(context.scorer, output, (name for prompt in prompts for name in prompt.columns)) as early:
        yield early.add


def _responses_to_unrelated_prompts(
    context: RunContext, task: SamplingTask, path: Path
) -> Callable[[Prompt], CandidatePool]:
    """Gives, for each prompt of the iteration, responses to one of another set."""
    options, prompts = context.options, context.folder.prompts_of(task.iteration)
    model_path, revision = context.model(0)
    others = load_random_prompts(options, AutoTokenizer.from_pretrained(model_path, revision=revision))
    drawn = unrelated_prompts(prompts, others, context.folder.training.seed, task.iteration)
    kinds = [SampleKind("random_prompt", options.temperature_in(task.iteration))] * options.num_negatives
    task = replace(task, kinds=kinds, description=f"Iteration {task.iteration}: sampling unrelated prompts")
    path = path.with_name("unrelated_samples.jsonl")
    if path.exists():
        pools = read_pools(path)
    else:
        distinct = list({prompt.id: prompt for prompt in drawn.values()}.values())
        pools = context.sampler.sample(distinct, task, path)
        if PartialState().is_main_process:
            finish_samples(path, pools)
            pools = read_pools(path)
    place_of = {name: place for place, name in enumerate(pools.ids)}

    def responses(prompt: Prompt) -> CandidatePool:
        other = drawn[prompt.id]
        return pools[place_of[other.id]] if other.id in place_of else CandidatePool(other, [])  # it was set aside

    return responses


def reward(context: RunContext, iteration: int, path: Path) -> None:
    """Rewards the new samples. Rows of earlier iterations join them, with the rewards they have."""
    options, scorer, folder = context.options, context.scorer, context.folder
    remembered = [
        (read_pools(folder.iteration(number) / path.name), number)
        for number in earlier_iterations(options.memory, iteration)
    ]
    earlier: list[tuple[Sequence[CandidatePool], int | None]] = [*remembered]
    if options.earlier_candidates and (iteration == 1 or options.memory == "all"):
        earlier += [(_candidates_of_other_runs(context, iteration, name), None) for name in options.earlier_candidates]
    sampled = with_early_rewards(read_pools(folder.iteration(iteration) / "samples.jsonl"), path, scorer)
    pools = add_earlier_candidates(sampled, earlier, scorer.id)
    if scorer.is_relative:  # what is measured against the other candidates of a prompt holds in no other pool
        pools = pools.map(CandidatePool.without_rewards)
    pools = chain_pools([pools, earlier_rows(pools, remembered, options.memory, scorer.is_relative)])
    scored = scorer.score(pools, path, f"Iteration {iteration}: rewarding")
    if PartialState().is_main_process:
        GrowingFile.finish(path, (pool.to_row() for pool in scored))


def _candidates_of_other_runs(context: RunContext, iteration: int, path: str) -> StoredPools:
    """The pools of a file. No iteration of this run sampled its candidates, whatever the file says."""
    pools = read_candidate_pools(path)
    joined = joined_prompts(context.folder.prompts_of(iteration), pools)
    count = f"`earlier_candidates`: {len(joined)} of the {len(set(pools.ids))} prompts in {path!r}"
    if joined or iteration > 1:
        logger.info(f"Iteration {iteration}: {count} are prompts of this iteration.")
    else:
        logger.warning(
            f"{count} are prompts of iteration 1, and candidates of other prompts are not used. Prompts must be equal "
            "character by character, after `prompt_template`, `prompts_as_messages` and `system_prompt` are applied. "
            "Conversations must have the same messages. Only the system message may be missing in the file, and a "
            "single message may be a text there."
        )
    return pools.map(lambda pool: pool.with_candidates([replace(each, iteration=0) for each in pool.candidates]))


def select(context: RunContext, iteration: int, path: Path) -> None:
    """Ranks the candidates and makes lists of them."""
    if not PartialState().is_main_process:
        return
    forget_early_rewards(path.with_name("rewarded.jsonl"))
    selection = context.options.selection(context.folder.training.truncated_completions)
    counts = SelectionCounts()
    lists = each_list(read_pools(path.with_name("rewarded.jsonl")), selection, counts)
    write_jsonl(path.with_name("lists.jsonl"), map(CandidateList.to_row, lists))
    logger.info(f"Iteration {iteration}: {counts.summary()}")
    if counts.lists == 0:
        raise LarPOError(
            f"Iteration {iteration} has no list to train on: {counts.summary()} Change the reward, raise "
            "`num_samples`, `temperature` or `max_new_tokens`, in a new `output_dir`."
        )
    write_json(path, vars(counts))
