"""
The command `larpo`.

`larpo run` is the whole of Algorithm 1; `larpo generate`, `reward`, `select` and `train` are its steps, with JSONL
files between them; `larpo online` samples and trains in one. `larpo report` writes the page of a run, `larpo status`
says how far it is, and `larpo recall` measures Recall@N. Options come from a YAML file (`--config`) and from flags,
which win. `larpo train` is the counterpart of `trl dpo` and `larpo online` that of `trl grpo`: they run in this
process, also under `accelerate launch -m trl_larpo train ...`; with options of `accelerate launch` (such as
`--num_processes`) or `--accelerate_config` they launch themselves through accelerate.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from .arguments import Parser, asks_for_help, launch_training, parse_options
from .config_file import with_config_apart
from .errors import ConfigError, LarPOError
from .lifetime import Stopped, end_now, end_with_launcher, guard, is_launched, take_time_to_stop
from .version import __version__

_LAST_CHECKPOINT, _NO_CHECKPOINT = ("true", "last", "auto"), ("false", "no", "none", "")

_RERUN = " Run the same command again to resume; what was saved is kept."
_RESUME_TRAINING = " With `--resume_from_checkpoint last` it resumes from its last checkpoint (`save_steps`)."
_HOW_TO_RESUME = {  # of commands that take long
    **dict.fromkeys(("run", "generate", "reward", "recall"), _RERUN),
    **dict.fromkeys(("train", "online"), _RESUME_TRAINING),
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command line.

    Returns:
        The exit status: 0; 2 for an error that a person has to fix; 128 plus the number of the signal that stopped it.
        An unexpected error is raised, which makes it 1.
    """
    is_command, is_worker = argv is None, "LOCAL_RANK" in os.environ or is_launched()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="larpo", description="Align language models with ranked lists of responses (LarPO).", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"trl-larpo {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", description="each explains its options: --help")
    for name, (_, text) in COMMANDS.items():
        if text is not None:
            commands.add_parser(name, add_help=False, help=text)
    if not argv:
        parser.print_help()
        return 0
    if argv[0] not in ("stage", "launch"):
        parser.parse_known_args(argv[:1])  # refuses unknown commands, answers --help and --version
    how_to_resume = _HOW_TO_RESUME.get(argv[0], "")
    is_guarded = bool(how_to_resume) and is_command and not is_worker and not asks_for_help(argv)
    try:
        if is_guarded:
            guard(how_to_resume)
        elif argv[0] == "stage":
            end_with_launcher()  # before the imports, which take seconds
        if argv[0] not in COMMANDS:
            raise ConfigError(f"Unknown option `{argv[0]}`: a command comes first (`larpo --help` lists them).")
        return COMMANDS[argv[0]][0](with_config_apart(argv[1:])) or 0
    except LarPOError as error:
        if is_worker:
            _tell_others(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once per process
            print(f"larpo: error: {error}", file=sys.stderr)
        return error.exit_status
    except Exception as error:
        if is_worker:
            _tell_others(error)
        raise
    except SystemExit as error:
        if error.code or asks_for_help(argv):
            raise
        print("larpo: error: some code called `sys.exit(0)` before the end: a reward, a callback?", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if not is_worker:  # else the launcher says it
            print(f"\nlarpo: stopped by {signal.Signals(number).name}.{how_to_resume}", file=sys.stderr)
        if is_guarded:
            end_now(128 + number)
        return 128 + number


def _tell_others(error: Exception) -> None:
    """Processes of other machines need not wait for one that has failed."""
    from .waiting import tell_others

    tell_others(error)


def run(argv: list[str]) -> None:
    """`larpo run`: all iterations, or what is left of them."""
    from .run.loop import run as run_loop
    from .run.options import RunConfig, RunModelConfig, RunTrainingConfig
    from .run.trial import try_run, without_try

    if "--small" in argv:
        from .run.small import shrink_arguments

        argv = [word for word in argv if word != "--small"]
        argv = argv if asks_for_help(argv) else shrink_arguments(argv)
    argv, num_tried = without_try(argv)
    options, training, model, *_ = parse_options(
        argv,
        (RunConfig, RunTrainingConfig, RunModelConfig),
        command="run",
        description="Algorithm 1 of the LarPO paper: sample, reward, rank, train, evaluate, and again from the result. "
        "Run the same command again to resume after a stop.",
        epilog="With --small, the configuration runs with tiny stand-ins for its models and a few short prompts: to "
        "see in a minute, without a GPU or a network, that all of it works. Other flags still win. With --try 20, one "
        "short iteration runs on 20 of the prompts, with the real models, rewards and servers, in the folder "
        "OUTPUT_DIR-try; then it estimates time and disk of the whole run, and lists problems.",
    )
    _show_log()
    with _quick_collections():
        if num_tried is None:
            run_loop(options, training, model)
        else:
            try_run(options, training, model, num_tried)


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Garbage is collected after each model; the hundred thousands of objects of the imports are not looked through."""
    if gc.get_freeze_count():  # somebody else's business
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def stage(argv: list[str]) -> int:
    """One stage of a run, in one of several processes. `larpo run` starts it through [`launch`]."""
    from .run.launch import run_as_worker
    from .run.stage_process import run_stage_of

    parser = argparse.ArgumentParser(prog="larpo stage")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--iteration", type=int, required=True)
    arguments = parser.parse_args(argv)
    _show_log()
    return run_as_worker(lambda: run_stage_of(arguments.folder, arguments.stage, arguments.iteration))


def launch(argv: list[str]) -> int:
    """Starts a stage in several processes. `larpo run` calls it."""
    from .run.launch import launch

    return launch(argv)


def report(argv: list[str]) -> None:
    """`larpo report`: writes the page of a run, finished or not, or shows the lists of one prompt."""
    from .report.page import describe_prompt, write_report

    parser = Parser(prog="larpo report", description="Write the page of a run: pictures, health, candidate lists.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--prompt", help="show all candidates of one prompt instead: its prompt_id, or how it begins")
    arguments = parser.parse_args(argv)
    if arguments.prompt is not None:
        _show(describe_prompt(arguments.run, arguments.prompt))
    else:
        print(f"Report: {write_report(arguments.run)}")


def status(argv: list[str]) -> None:
    """`larpo status`: how far a run is."""
    from .run.status import as_text, status_of

    parser = Parser(prog="larpo status", description="Show how far a run is, from its files: also while it runs.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(argv)
    found = status_of(arguments.run)
    _show(json.dumps(found, ensure_ascii=False) if arguments.json else as_text(found))


def _show(text: str) -> None:
    """Prints a text; who reads it may leave early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again at its end


def generate(argv: list[str]) -> None:
    """`larpo generate`: samples completions."""
    from .commands import GenerateConfig, SampledModelConfig, generate

    options, model, *_ = parse_options(
        argv,
        (GenerateConfig, SampledModelConfig),
        command="generate",
        description="Sample completions of prompts into a JSONL file.",
    )
    model.check_nothing_is_trained()
    _show_log()
    generate(options, model)


def reward(argv: list[str]) -> None:
    """`larpo reward`: scores completions."""
    from .commands import RewardConfig, reward

    options, *_ = parse_options(
        argv, (RewardConfig,), command="reward", description="Reward the completions of a file into another file."
    )
    _show_log()
    reward(options)


def select(argv: list[str]) -> None:
    """`larpo select`: makes candidate lists."""
    from .commands import SelectConfig, select

    options, *_ = parse_options(
        argv,
        (SelectConfig,),
        command="select",
        description="Merge rewarded completions per prompt and select ranked lists to train on with `larpo train`.",
    )
    _show_log()
    select(options)


def recall(argv: list[str]) -> None:
    """`larpo recall`: Recall@N, best-of-N and majority vote."""
    from .commands import SampledModelConfig
    from .recall import RecallConfig, recall

    options, model, *_ = parse_options(
        argv,
        (RecallConfig, SampledModelConfig),
        command="recall",
        description="Sample completions, check them, and show how many prompts at least one of N solves (Recall@N), "
        "beside greedy decoding, best-of-N and majority vote. Reads the samples of `larpo run` too.",
    )
    model.check_nothing_is_trained()
    _show_log()
    recall(options, model)


def _show_log() -> None:
    """Lets the package say on stderr what it does; as a library it only warns."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler()]


def train(argv: list[str]) -> int:
    """`larpo train`: parses the options, loads the data, trains, saves."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .training.config import LarPOConfig

    script_args, training_args, model_args, mixture_args, *launch_args = parse_options(
        argv,
        (ScriptArguments, LarPOConfig, ModelConfig, DatasetMixtureConfig),
        command="train",
        description="Train a model on ranked lists of responses, or on chosen/rejected pairs.",
        epilog=_LAUNCHES,
        launchable=True,
    )
    _allow_last_checkpoint(training_args)
    if any(launch_args):
        return launch_training("train", argv, *launch_args)

    _show_log()
    from .run.training_stages import make_trainer

    train_dataset, eval_dataset = _load_data(script_args, training_args, model_args, mixture_args)
    trainer = make_trainer(
        model_args.model_name_or_path,
        training_args,
        model_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    _train_and_save(trainer, script_args)
    return 0


def online(argv: list[str]) -> int:
    """`larpo online`: parses the options, loads prompts and rewards, trains, saves."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .commands import make_online_trainer
    from .rewards.options import JudgeOptions
    from .training.online_config import OnlineLarPOConfig

    script_args, judges, training_args, model_args, mixture_args, *launch_args = parse_options(
        argv,
        (ScriptArguments, JudgeOptions, OnlineLarPOConfig, ModelConfig, DatasetMixtureConfig),
        command="online",
        description="Sample completions of prompts at every step, reward them, and train on the ranked lists: the "
        "counterpart of `trl grpo`.",
        epilog=_LAUNCHES,
        launchable=True,
    )
    _allow_last_checkpoint(training_args)
    if any(launch_args):
        return launch_training("online", argv, *launch_args)

    _show_log()
    train_dataset, eval_dataset = _load_data(script_args, training_args, model_args, mixture_args)
    _train_and_save(make_online_trainer(judges, training_args, model_args, train_dataset, eval_dataset), script_args)
    return 0


_LAUNCHES = (
    "Options of `accelerate launch` (--num_processes, --config_file, ...) and --accelerate_config are taken too, and "
    "launch the training through accelerate."
)


_TO_FIND_FILES = ("revision", "subfolder", "token", "cache_dir", "trust_remote_code", "code_revision")


def _allow_last_checkpoint(training_args) -> None:
    if getattr(training_args, "enable_jit_checkpoint", False):  # transformers saves one when SIGTERM comes
        take_time_to_stop()


def _load_data(script_args, training_args, model_args, mixture_args):
    """The training set, and the evaluation set where there is to be an evaluation."""
    from .commands import check_model
    from .run.loading import check_model_path
    from .storage import check_folder
    from .training.datasets import load_splits, pick_split

    check_folder(Path(training_args.output_dir), "output_dir")
    training_args.resume_from_checkpoint = _checkpoint(training_args)
    check_model_path(model_args.model_name_or_path)
    if mixture_args.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture_args)
    elif script_args.dataset_name:
        splits = load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    else:
        raise ConfigError(
            "No data: give `dataset_name` (a file, a folder or a hub id), or `datasets` in the YAML file."
        )
    given = {"trust_remote_code": training_args.trust_remote_code} | (training_args.model_init_kwargs or {})
    check_model(model_args, **{name: value for name, value in given.items() if name in _TO_FIND_FILES})
    train_dataset = pick_split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, pick_split(splits, script_args.dataset_test_split, "dataset_test_split")


def _checkpoint(training_args) -> str | None:
    """The folder of the checkpoint to resume from; `None` for a fresh start."""
    from .training.checkpoints import damage_of, last_whole_checkpoint

    name = str(training_args.resume_from_checkpoint or "")
    if name.lower() in _NO_CHECKPOINT:
        return None
    if name.lower() in _LAST_CHECKPOINT:
        folder, only_model = training_args.output_dir, training_args.save_only_model
        checkpoint = last_whole_checkpoint(folder, only_model)  # None where there is none yet
        if checkpoint is None and not only_model and last_whole_checkpoint(folder, only_model=True) is not None:
            raise ConfigError(
                f"The checkpoints in {folder!r} hold weights alone, without the state of the optimizer. Set "
                "`save_only_model: true` to resume from the weights, or take another `output_dir`."
            )
        return checkpoint
    path = Path(name).expanduser()
    problem = damage_of(path, "trainer_state.json") if path.is_dir() else "there is no such folder"
    if problem is not None:
        raise ConfigError(
            f"`resume_from_checkpoint` is {name!r}, and {problem}. 'last' resumes from the last checkpoint in "
            "`output_dir`, if there is one."
        )
    return str(path)


def _train_and_save(trainer, script_args) -> None:
    import torch

    args = trainer.args
    if script_args.ignore_bias_buffers:  # as in TRL's scripts: a work-around for boolean buffers under DDP
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=_hub_name(script_args.dataset_name))
    trainer.accelerator.print(f"Model saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_name(script_args.dataset_name))
    if hasattr(trainer, "end"):  # transformers ≥ 5.18: finishes trackers and the process group
        trainer.end()


def _hub_name(dataset_name: str | None) -> str | None:
    """The name to put on the model card: hub ids, but no paths of this machine."""
    return None if dataset_name is None or os.path.exists(dataset_name) else dataset_name


COMMANDS = {
    "run": (run, "sample, reward, rank, train and evaluate, iteration after iteration; stops and resumes anywhere"),
    "train": (train, "train on ranked lists or pairs"),
    "online": (online, "train on ranked lists that are sampled at every step"),
    "generate": (generate, "sample completions of prompts"),
    "reward": (reward, "score completions"),
    "select": (select, "merge scored completions and make ranked lists of them"),
    "recall": (recall, "Recall@N of a model or a run, with greedy decoding, best-of-N and majority vote"),
    "report": (report, "write the page of a run, or show the candidates of one prompt"),
    "status": (status, "show how far a run is"),
    "stage": (stage, None),
    "launch": (launch, None),
}
