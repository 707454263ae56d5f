"""From prompts to candidate lists: the stages `generate`, `reward` and `select`."""

from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger

from ..candidates import CandidatePool, build_lists
from ..errors import LarPOError
from ..generation.sampler import SampleKind, SamplingTask
from ..storage import GrowingFile, write_json, write_jsonl
from .candidate_files import read_candidate_pools
from .context import RunContext, read_pools
from .memory import add_earlier_candidates, earlier_iterations
from .negatives import TEMPERATURES, add_responses_to_other_prompts

logger = get_logger(__name__)


def generate(context: RunContext, iteration: int, path: Path) -> None:
    """Samples completions of the iteration's prompts, and adds negatives."""
    options = context.options
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
        description=f"Iteration {iteration}: sampling",
    )
    pools = context.sampler.sample(context.folder.prompts_of(iteration), task, path)
    if PartialState().is_main_process:
        seed = context.folder.training.seed
        pools = add_responses_to_other_prompts(pools, options.negatives, options.num_negatives, seed, iteration)
        GrowingFile(path).finish([pool.to_row() for pool in pools])


def reward(context: RunContext, iteration: int, path: Path) -> None:
    """Rewards the new samples. Those of earlier iterations join them, with the rewards they have."""
    options, scorer, folder = context.options, context.scorer, context.folder
    earlier: list[tuple[list[CandidatePool], int | None]] = [
        (read_pools(folder.iteration(number) / path.name), number)
        for number in earlier_iterations(options.memory, iteration)
    ]
    if options.earlier_candidates and (iteration == 1 or options.memory == "all"):
        earlier += [(read_candidate_pools(name), None) for name in options.earlier_candidates]
    pools = add_earlier_candidates(read_pools(folder.iteration(iteration) / "samples.jsonl"), earlier, scorer.id)
    # What is measured against the other candidates of its prompt cannot be kept from another pool
    scored = scorer.score(pools, path, f"Iteration {iteration}: rewarding", again=scorer.is_relative)
    if PartialState().is_main_process:
        GrowingFile(path).finish([pool.to_row() for pool in scored])


def select(context: RunContext, iteration: int, path: Path) -> None:
    """Ranks the candidates and makes lists of them."""
    if not PartialState().is_main_process:
        return
    selection = context.options.selection(context.folder.training.truncated_completions)
    lists, counts = build_lists(read_pools(path.with_name("rewarded.jsonl")), selection)
    logger.info(f"Iteration {iteration}: {counts.summary()}")
    write_jsonl(path.with_name("lists.jsonl"), [made.to_row() for made in lists])
    if counts.lists == 0:
        raise LarPOError(
            f"Iteration {iteration} has no list to train on: {counts.summary()} Change the reward, raise "
            "`num_samples`, `temperature` or `max_new_tokens`, in a new `output_dir`."
        )
    write_json(path, vars(counts))
