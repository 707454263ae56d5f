"""What a run will do, in a few lines."""

import math
from collections import Counter

from transformers import PreTrainedTokenizerBase

from .evaluation import MIN_PROMPTS_TO_JUDGE
from .folder import RunFolder
from .memory import earlier_iterations
from .options import RunConfig


def plan(folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> str:
    """What will be done, in a few lines."""
    options, training, counts = folder.options, folder.training, folder.prompt_counts
    left_out = [
        f"{counts[name]} {text}"
        for name, text in (
            ("duplicates", "duplicates"),
            ("too_long", "too long"),
            ("also_held_out", "held out too"),
            ("unused", "not used"),
        )
        if counts[name]
    ]
    numbers = range(1, options.num_iterations + 1)
    counts_by_iteration = [len(folder.prompts_of(number)) for number in numbers]
    same = len(set(counts_by_iteration)) == 1
    k, added = options.num_samples, options.num_negatives * len(options.negatives)
    evaluation = f"evaluate {len(folder.held_out)} × {options.num_eval_samples} samples"
    lines = [
        f"Run in {folder.path}",
        f"  model      {folder.model.model_name_or_path}; reference: the {options.reference} model",
        f"  prompts    {counts_by_iteration[0] if same else ', '.join(map(str, counts_by_iteration))} in "
        f"{'each iteration' if same else 'the iterations'}, {options.prompt_schedule}; {len(folder.held_out)} held out"
        + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        f"  rewards    {', '.join(options.reward_funcs)}",
        f"  lists      {_selection_text(options)}; memory: {options.memory}",
        f"  loss       {' + '.join(training.loss_type)}, beta {training.beta:g}, learning rate "
        f"{training.learning_rate:g}",
        f"  start      {evaluation}",
    ]
    if training.per_token_scores and training.beta < 0.5:
        lines.append(
            f"  note       beta {training.beta:g} is weak for scores per token, whose default is 2; for sums, as in "
            "DPO, set `per_token_scores: false`"
        )
    if tokenizer.chat_template and any(isinstance(prompt.content, str) for prompt in folder.prompts):
        lines.append(
            "  note       prompts are texts, to which the model's chat template is not applied; if it should be, set "
            "`prompts_as_messages: true`"
        )
    if options.server_urls and not options.server_model:
        lines.append(
            "  note       `server_urls` is not given new weights: after each training the run stops until you have "
            "restarted these servers with its model; with `server_command` it continues on its own"
        )
    if 0 < len(folder.held_out) < MIN_PROMPTS_TO_JUDGE:
        lines.append(
            f"  note       {len(folder.held_out)} held-out prompts are too few to stop a training or a run that does "
            f"harm: it takes {MIN_PROMPTS_TO_JUDGE}, and with 64 also smaller drops are found"
        )
    total_samples = len(folder.held_out) * options.num_eval_samples
    total_steps = total_rewards = 0
    for iteration, prompts in enumerate(counts_by_iteration, start=1):
        samples = prompts * k
        times = times_of_prompts(folder, iteration)
        pool, num_lists = (k + added) * max(times.values()), len(times)
        steps = num_steps(folder, num_lists)
        lines.append(
            f"  iteration {iteration}: sample {prompts} × {k}{f' + {added} negatives' if added else ''} at temperature "
            f"{options.temperature_in(iteration):g}, reward {prompts * (k + added)}, up to {num_lists} lists of up to "
            f"{list_size(options, pool)}, {steps} optimizer steps, {evaluation}"
        )
        total_samples += samples + len(folder.held_out) * options.num_eval_samples
        total_rewards += prompts * (k + added) + len(folder.held_out) * options.num_eval_samples
        total_steps += steps
    total_rewards += len(folder.held_out) * options.num_eval_samples
    lines.append(
        f"  in all     {total_samples} samples, {total_rewards} reward calls, {total_steps} optimizer steps at most"
    )
    return "\n".join(lines)


def times_of_prompts(folder: RunFolder, iteration: int) -> Counter[str]:
    """How many times each prompt has been sampled, in the iterations whose rows this one trains on."""
    numbers = [iteration, *earlier_iterations(folder.options.memory, iteration)]
    return Counter(prompt.id for number in numbers for prompt in folder.prompts_of(number))


def _selection_text(options: RunConfig) -> str:
    if options.num_best is not None:
        return f"best {options.num_best} and worst {options.num_worst} of each prompt"
    return "all candidates" + (f", at most {options.max_list_size}" if options.max_list_size else "")


def list_size(options: RunConfig, pool: int) -> int:
    """Candidates in the list of a prompt that has as many as `pool`."""
    return min(pool, options.selection().full_size or options.max_list_size or pool)


def num_steps(folder: RunFolder, num_lists: int) -> int:
    """Optimizer steps of an iteration."""
    training = folder.training
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(math.ceil(num_lists / folder.global_batch_size) * training.num_train_epochs)
