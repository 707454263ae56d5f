"""
What `--help` shows: the options that people set, in the order in which they think of them, with a line each.

`larpo run` has more than two hundred options, most of them transformers'. [`short_help`] shows about fifty on two
screens; [`full_help`], for `--help-all`, has all of them with their whole texts.
"""

import argparse
import shutil
import textwrap
from collections.abc import Iterator

GROUPS: dict[str, dict[str, str]] = {
    "model": {
        "model_name_or_path": "the model: a folder or a hub id",
        "dtype": "dtype of its weights",
        "attn_implementation": "sdpa, eager, flash_attention_2, ...",
        "use_peft": "train a LoRA adapter",
        "lora_r": "its rank",
        "lora_target_modules": "modules that it adapts",
        "merge_adapter": "merge it into a whole model after each iteration",
    },
    "data": {
        "dataset_name": "lists or pairs: a file, a folder or a hub id",
        "dataset_train_split": "split to train on",
        "dataset_test_split": "split to evaluate on",
        "samples": "file of completions to read",
        "candidates": "files of rewarded completions to read",
        "as_messages": "make conversations of texts, so that the chat template is applied",
        "output": "file to write",
    },
    "prompts": {
        "prompts": "files, folders or hub ids",
        "prompt_column": "column of the prompts: texts or conversations",
        "prompts_as_messages": "make conversations of texts, so that the chat template is applied",
        "prompt_template": "text around each prompt, e.g. '{prompt} Think step by step.'",
        "prompts_per_iteration": "prompts in each iteration (default: all)",
        "prompt_schedule": "prompts of iterations: same, drawn or fresh",
    },
    "sampling": {
        "num_samples": "completions of each prompt",
        "temperature": "sampling temperature; several: one for each iteration",
        "top_p": "nucleus sampling threshold",
        "max_new_tokens": "longest completion, in tokens",
        "generation_batch_size": "completions sampled at the same time",
        "server_urls": "running OpenAI-compatible servers (vLLM, SGLang, ...)",
        "server_command": "starts a server, e.g. 'vllm serve {model} --port {port}'",
        "num_servers": "how many of them",
        "num_generations": "completions of each prompt, at every step",
        "max_completion_length": "longest completion, in tokens",
        "use_vllm": "sample with vLLM",
        "vllm_mode": "vLLM in these processes (colocate) or a server",
    },
    "rewards": {
        "reward_funcs": "rules, functions, reward models or rankers, summed",
        "reward_weights": "factor of each",
        "threshold": "a completion is correct if its reward is at least this much",
        "best_of_n_reward": "reward by which best-of-N chooses",
    },
    "lists": {
        "num_best": "top-ranked completions to keep per prompt (default: all)",
        "num_worst": "bottom-ranked completions to keep per prompt (default: all)",
        "max_list_size": "longest list where all are taken",
        "min_reward_gap": "minimum difference in reward between best and worst of a list",
        "memory": "train on rows of earlier iterations too: none, previous, all",
        "negatives": "further candidates: other temperatures, other prompts",
        "truncated_completions": "cut-off completions: rank_last, by_reward or drop",
    },
    "loss and training": {
        "loss_type": "lambdarank, listmle, contrastive, pairwise, ...",
        "beta": "scale of the scores",
        "per_token_scores": "divide scores by the number of tokens",
        "reference": "the policy that starts the iteration, or the initial model",
        "ref_update_steps": "steps after which the policy becomes the reference",
        "memory_size": "last samples of a prompt that join its new ones",
        "learning_rate": "peak learning rate",
        "lr_scheduler_type": "linear, cosine, constant, ...",
        "num_train_epochs": "passes over the lists",
        "per_device_train_batch_size": "lists in a batch on each device",
        "gradient_accumulation_steps": "batches in an optimizer step",
        "max_length": "longest prompt plus completion, in tokens",
        "gradient_checkpointing": "saves memory, slows the step",
        "candidate_chunk_size": "completions in memory at once; saves memory, slows the step",
        "bf16": "mixed precision",
        "seed": "seed of sampling and training",
    },
    "evaluation": {
        "held_out_prompts": "prompts to evaluate on (default: some of `prompts`)",
        "num_held_out": "number of held-out prompts",
        "num_eval_samples": "completions of each",
        "monitor_evals": "evaluations during a training, at most",
        "monitor_stop": "stop a training that makes held-out answers worse",
        "stop_on": "health checks that end the run, or none",
        "greedy": "also decode each prompt greedily",
        "eval_strategy": "when to evaluate: no, steps or epoch",
    },
    "machines": {
        "num_processes": "processes of the stages that run a model, one for each GPU",
        "accelerate_config": "configuration of accelerate for the training (DeepSpeed, FSDP, ...)",
        "use_cpu": "do not use a GPU",
    },
    "run": {
        "output_dir": "folder of the results",
        "num_iterations": "iterations",
        "resume_from_checkpoint": "last, or a checkpoint's folder",
        "report_to": "wandb, trackio, tensorboard, none",
        "dry_run": "check everything, print the plan, and stop",
    },
}
"""Group → option → its line."""

_OF_ONLINE = {
    "dataset_name": "prompts: a file, a folder or a hub id",
    "temperature": "sampling temperature",
    "per_device_train_batch_size": "completions in a batch on each device",
    "num_iterations": "times that each batch of samples is used",
}
"""Lines of options that mean something else in online training."""

FURTHER: dict[str, tuple[str, ...]] = {
    "prompts": ("prompts_config", "prompts_split", "max_prompt_length", "system_prompt"),
    "sampling": (
        "generation_dtype", "chat_template_kwargs", "server_requests_in_flight", "server_model",
        "server_api_key_variable", "server_health_route", "server_start_timeout", "server_timeout", "server_patience",
        "server_reload",
    ),
    "rewards": (
        "normalize_rewards", "strip_thinking", "reward_batch_size", "reward_max_length", "reward_dtype",
        "reward_calls_in_flight", "reward_while_sampling", "answer_func",
    ),
    "lists": (
        "num_negatives", "low_temperature", "high_temperature", "random_prompts", "random_prompts_column",
        "earlier_candidates",
    ),
    "loss and training": (
        "loss_weights", "lambda_weight", "normalize_comparisons", "listmle_top_k", "contrastive_positives",
        "listnet_temperature", "reference_free", "target_margin", "shared_prompt",
    ),
    "evaluation": ("held_out_split", "eval_temperature", "monitor_prompts", "monitor_time_share", "num_bootstrap"),
    "machines": ("generation_processes", "reward_processes", "train_processes", "train_launcher"),
    "run": ("max_failed_share", "mirror", "notify_command"),
}  # fmt: skip
"""Options of ours that only [`full_help`] shows, behind those of their group."""

_NOT_IN_A_RUN = ("eval_strategy", "resume_from_checkpoint")  # it evaluates and resumes on its own

_OF_A_TRAINING = ("dtype", "use_peft", "use_rslora", "use_dora", "lora_")  # names, or how they begin

_INDENT = 32


def short_help(parser: argparse.ArgumentParser) -> str:
    """One line for each option that people set."""
    width = _width()
    text = _head(parser, width)
    special = _OF_ONLINE if "num_generations" in _actions(parser) else {}
    for title, actions in _grouped(parser):
        said = GROUPS[title] | {name: line for name, line in special.items() if name in GROUPS[title]}
        lines = [_short(actions[name], line, width) for name, line in said.items() if name in actions]
        text += f"\n{title}:\n" + "".join(lines)
    return f"{text}\nAll options, with whole explanations: {parser.prog} --help-all\n"


def full_help(parser: argparse.ArgumentParser) -> str:
    """All options, with all that there is to say."""
    width, shown = _width(), set()
    text = _head(parser, width)
    for title, actions in _grouped(parser):
        names = [name for name in (*GROUPS[title], *FURTHER.get(title, ())) if name in actions]
        shown |= set(names)
        text += f"\n{title}:\n" + "".join(_full(actions[name], width) for name in names)
    others = [action for name, action in _actions(parser).items() if name not in shown]
    if others:
        text += "\nmore of TRL and transformers:\n" + "".join(_full(action, width) for action in others)
    return text


class ShowFullHelp(argparse.Action):
    """The action of `--help-all`."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show all options and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        print(full_help(parser), end="")
        parser.exit()


def _width() -> int:
    return max(80, min(120, shutil.get_terminal_size().columns))


def _head(parser: argparse.ArgumentParser, width: int) -> str:
    paragraphs = [parser.description, parser.epilog, "Every option may stand in the YAML file too; flags win."]
    text = f"usage: {parser.prog} [--config FILE.yaml] [--OPTION VALUE ...]\n"
    return text + "".join(f"\n{textwrap.fill(each, width)}\n" for each in paragraphs if each)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options by name, without help itself, the second form that switches one off, and what has no meaning there."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction | ShowFullHelp):
            actions.setdefault(action.dest, action)
    if "prompt_schedule" in actions:
        for name in _NOT_IN_A_RUN:
            actions.pop(name)
    elif "generation_dtype" in actions:  # commands that only sample
        return {name: action for name, action in actions.items() if not name.startswith(_OF_A_TRAINING)}
    return actions


def _grouped(parser: argparse.ArgumentParser) -> Iterator[tuple[str, dict[str, argparse.Action]]]:
    """Groups of which the command has an option, with all options of the command."""
    actions = _actions(parser)
    for title, lines in GROUPS.items():
        if any(name in actions for name in lines):
            yield title, actions


def _short(action: argparse.Action, line: str, width: int) -> str:
    name, end = f"  --{action.dest}", _default(action)
    room = max(20, width - _INDENT - 1 - len(end))
    return f"{name.ljust(_INDENT)} {textwrap.shorten(line, room, placeholder='…')}{end}\n"


def _full(action: argparse.Action, width: int) -> str:
    choices = "" if action.choices is None else " {" + ", ".join(map(str, action.choices)) + "}"
    said = " ".join((action.help or "").replace("%%", "%").split()) + _default(action)
    lines = textwrap.wrap(said, width - 6, break_on_hyphens=False, break_long_words=False)
    body = textwrap.indent("\n".join(lines), " " * 6)
    return f"  --{action.dest}{choices}\n{body}\n"


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value is False or value in ([], "", argparse.SUPPRESS):
        return ""
    value = value.value if hasattr(value, "value") else value
    return f" [{' '.join(map(str, value)) if isinstance(value, list) else value}]"
