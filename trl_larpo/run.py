"""
`larpo run`: Algorithm 1 of the paper, from prompts to aligned models, in a folder that survives being killed.

Each iteration samples completions from the current policy, rewards them, builds candidate lists, trains on them with
the policy that starts the iteration as reference, and evaluates on held-out prompts. The next iteration starts from
the result.
"""

import dataclasses
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig

from .config import LarPOConfig
from .errors import ConfigError, LarPOError
from .evaluation import with_error
from .health import CHECKS, Check, check_iteration
from .mirror import Mirror
from .report import write_report
from .rewards import PAIRWISE, load_rewards
from .run_config import RunConfig, RunTrainingConfig
from .run_folder import RunFolder
from .servers import check_servers, server_command
from .stages import SHARDED_STAGES, STAGES, Stages
from .storage import disk_full_is_said, only_process, read_json, read_jsonl, write_json
from .tracking import Tracking

_REFUSED = {  # option of the trainer: (what it must be, why)
    "resume_from_checkpoint": (None, "`larpo run` resumes on its own: run the same command again."),
    "push_to_hub": (False, "push the models of a finished run with `hf upload`."),
    "eval_strategy": ("no", "each iteration ends with an evaluation on held-out prompts."),
    "save_only_model": (False, "a killed training could not be resumed."),
    "sync_ref_model": (False, "the reference is fixed within an iteration (`reference`)."),
    "precompute_ref_log_probs": (False, "`larpo run` always computes them once; leave it out."),
    "load_best_model_at_end": (False, "the model at the end of an iteration is the next policy."),
}


def run(options: RunConfig, training: LarPOConfig, model: ModelConfig) -> Path:
    """
    Runs all iterations, or what is left of them.

    Args:
        options: What the loop does.
        training: How the trainer trains; `output_dir` is the folder of the run.
        model: The initial model, and LoRA.

    Returns:
        Path of the report page.

    Raises:
        LarPOError: If the input is invalid; nothing computed is lost.
    """
    folder = RunFolder(options, training, model)
    mirror = None
    if options.mirror:
        mirror = Mirror(folder.path, options.mirror)
        if not options.dry_run:
            with only_process(folder.path), disk_full_is_said(folder.path):
                _fetch(mirror)
    check(folder)
    if options.dry_run:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
        folder.prepare_prompts(tokenizer, save=False)
        print(plan(folder))
        return folder.path / "report.html"
    with only_process(folder.path), disk_full_is_said(folder.path):
        folder.prepare_prompts(AutoTokenizer.from_pretrained(model.model_name_or_path))
        folder.save_configuration()
        print(plan(folder))
        return _run_all(folder, mirror)


def check(folder: RunFolder) -> None:
    """
    Checks every option, path, reward and server, before any time is spent.

    Raises:
        LarPOError: Names what is invalid and how to fix it.
    """
    options, training, model = folder.options, folder.training, folder.model
    options.check()
    for name, (expected, reason) in _REFUSED.items():
        value = getattr(training, name)
        if getattr(value, "value", value) != expected:
            raise ConfigError(f"`{name}` is {value!r} in a run: {reason}")
    if getattr(model, "load_in_4bit", False) or getattr(model, "load_in_8bit", False):
        raise ConfigError(
            "`load_in_4bit` and `load_in_8bit` do not go with `larpo run`: each iteration saves whole weights."
        )
    for name in options.stop_on:
        if name not in (*CHECKS, "any", "none"):
            raise ConfigError(
                f"`stop_on` names {name!r}; the health checks are {', '.join(CHECKS)}, or 'any' or 'none'."
            )
    path = model.model_name_or_path
    if not path:
        raise ConfigError("No model: give `model_name_or_path`, a folder or a hub id.")
    if path.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(path)):
        raise ConfigError(f"`model_name_or_path` is {path!r}, and there is no such folder.")
    model.model_name_or_path = os.path.expanduser(path)
    folder.check_configuration()
    load_rewards(options.reward_funcs, options.reward_weights)
    for candidates in options.earlier_candidates or []:
        if "://" not in candidates and not Path(candidates).exists():
            raise ConfigError(f"`earlier_candidates` names {candidates!r}, and there is no such file.")
    if options.accelerate_config:
        _check_accelerate_config(options.accelerate_config)
    if options.train_launcher and shutil.which(shlex.split(options.train_launcher)[0]) is None:
        program = shlex.split(options.train_launcher)[0]
        raise ConfigError(f"`train_launcher`: there is no program {program!r} on this machine.")
    if options.server_command:
        words, _ = server_command(options.server_command, model="model", port=1, index=0)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"`server_command`: there is no program {words[0] if words else ''!r} on this machine.")
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    try:
        AutoConfig.from_pretrained(path, revision=model.model_revision)
        AutoTokenizer.from_pretrained(path, revision=model.model_revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`model_name_or_path`: {path!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    for name in (name.removeprefix(PAIRWISE) for name in options.reward_funcs):
        if ":" not in name and os.path.isdir(os.path.expanduser(name)):
            try:
                AutoConfig.from_pretrained(os.path.expanduser(name))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"`reward_funcs`: {name!r} is no model: {' '.join(str(error).split())[:200]}"
                ) from None
    _check_disk(folder)


def _check_accelerate_config(path: str) -> None:
    """Whole models must come out of the training, not shards."""
    if not Path(path).is_file():
        raise ConfigError(f"`accelerate_config` is {path!r}, and there is no such file.")
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ConfigError(f"`accelerate_config`: {path!r} is no configuration file of accelerate.")
    deepspeed, fsdp = settings.get("deepspeed_config") or {}, settings.get("fsdp_config") or {}
    if deepspeed.get("zero_stage") == 3 and not deepspeed.get("zero3_save_16bit_model"):
        raise ConfigError(f"`accelerate_config`: set `zero3_save_16bit_model: true` in {path!r}, to save whole models.")
    if fsdp and fsdp.get("fsdp_state_dict_type") != "FULL_STATE_DICT":
        raise ConfigError(
            f"`accelerate_config`: set `fsdp_state_dict_type: FULL_STATE_DICT` in {path!r}, to save whole models."
        )


def _check_disk(folder: RunFolder) -> None:
    path = folder.model.model_name_or_path
    if not os.path.isdir(path):
        return
    weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    missing = sum(not (folder.iteration(i) / "model").exists() for i in range(1, folder.options.num_iterations + 1))
    # A model for each iteration; in a training its best weights, and two checkpoints with the optimizer's two moments
    needed = weights * missing + (7 * weights if missing else 0)
    existing = folder.path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"`output_dir`: the disk has {_size(free)} free, and the run may need {_size(needed)} for models and "
            "checkpoints. Free some space, or take a folder on another disk."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def plan(folder: RunFolder) -> str:
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
    counts_by_iteration = [len(folder.prompts_of(i)) for i in range(1, options.num_iterations + 1)]
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
    total_samples = len(folder.held_out) * options.num_eval_samples
    total_steps = total_rewards = 0
    for iteration, prompts in enumerate(counts_by_iteration, start=1):
        samples = prompts * k
        remembered = {"none": 0, "previous": 1, "all": iteration - 1}[options.memory]
        pool = k * (1 + min(remembered, iteration - 1)) + added
        steps = _num_steps(folder, prompts)
        lines.append(
            f"  iteration {iteration}: sample {prompts} × {k}{f' + {added} negatives' if added else ''} at temperature "
            f"{options.temperature_in(iteration):g}, reward {prompts * (k + added)}, up to {prompts} lists of up to "
            f"{_list_size(options, pool)}, {steps} optimizer steps, {evaluation}"
        )
        total_samples += samples + len(folder.held_out) * options.num_eval_samples
        total_rewards += prompts * (k + added) + len(folder.held_out) * options.num_eval_samples
        total_steps += steps
    total_rewards += len(folder.held_out) * options.num_eval_samples
    lines.append(
        f"  in all     {total_samples} samples, {total_rewards} reward calls, {total_steps} optimizer steps at most"
    )
    return "\n".join(lines)


def _selection_text(options: RunConfig) -> str:
    if options.num_best is not None:
        return f"best {options.num_best} and worst {options.num_worst} of each prompt"
    return "all candidates" + (f", at most {options.max_list_size}" if options.max_list_size else "")


def _list_size(options: RunConfig, pool: int) -> int:
    if options.num_best is not None:
        return min(pool, options.num_best + options.num_worst)
    return min(pool, options.max_list_size or pool)


def _num_steps(folder: RunFolder, num_lists: int) -> int:
    training = folder.training
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(num_lists / folder.global_batch_size * training.num_train_epochs)


def _run_all(folder: RunFolder, mirror: Mirror | None) -> Path:
    options, started = folder.options, time.monotonic()
    stages, tracking = Stages(folder), Tracking(folder)
    page = folder.path / "report.html"
    try:
        for iteration in range(options.num_iterations + 1):
            for stage in STAGES if iteration else ("held_out", "evaluate"):
                _run_stage(folder, stages, stage, iteration)
                _push(mirror)
            if iteration:
                checks = _check_health(folder, iteration)
                _announce(folder, iteration, checks)
                _track(tracking, iteration, checks)
            page = write_report(folder.path)
            _push(mirror)
            bad = [c for c in checks if not c.ok] if iteration else []
            stops = [c for c in bad if c.name in options.stop_on or "any" in options.stop_on]
            if stops and "none" not in options.stop_on:
                raise LarPOError(
                    f"Stopped after iteration {iteration}, as `stop_on` asks: {stops[0].name}. {stops[0].meaning} See "
                    f"{page}. Best model so far: {_best_model(folder, iteration)}. To go on all the same, run the same "
                    "command with `--stop_on none`."
                )
    except KeyboardInterrupt:
        raise LarPOError("Interrupted. Run the same command again to go on; nothing is lost.") from None
    finally:
        stages.close()
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} minutes. Model: {folder.model_path(options.num_iterations)}\nReport: {page}")
    return page


def _best_model(folder: RunFolder, iteration: int) -> str:
    """Path of the model with the highest held-out reward, among those of iterations 0 to `iteration`."""

    def reward(number: int) -> float:
        mean = read_json(folder.iteration(number) / "evaluation.json")["reward"]["mean"]
        return -math.inf if mean is None else mean

    return folder.model_path(max(range(iteration + 1), key=reward))


def _run_stage(folder: RunFolder, stages: Stages, stage: str, iteration: int) -> None:
    if stages.output(stage, iteration).exists():
        return
    started = time.monotonic()
    num_processes = folder.options.processes_of(stage)
    sharded = stage in SHARDED_STAGES
    launcher = folder.options.train_launcher if sharded else None
    in_processes = num_processes > 1 or launcher or (sharded and folder.options.accelerate_config)
    if in_processes and not (iteration == 0 and stage == "evaluate"):  # which runs no model
        stages.close()
        _launch_stage(folder, stage, iteration, num_processes, launcher)
    else:
        stages.run(stage, iteration)
    with open(folder.path / "timings.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"iteration": {iteration}, "stage": "{stage}", "seconds": {time.monotonic() - started:.2f}}}\n')


def _launch_stage(folder: RunFolder, stage: str, iteration: int, num_processes: int, launcher: str | None) -> None:
    """Runs a stage in several processes."""
    words = ["stage", "--folder", str(folder.path), "--stage", stage, "--iteration", str(iteration)]
    log, message = (folder.path / "logs" / f"iteration_{iteration}_{stage}.{kind}" for kind in ("log", "message"))
    if launcher:
        command = shlex.split(launcher.replace("{stage}", shlex.join(["-m", "trl_larpo", *words])))
    else:
        command = [sys.executable, "-m", "trl_larpo", "launch", "--num_processes", str(num_processes)]
        command += ["--log", str(log), "--message", str(message)]
        if folder.options.accelerate_config and stage in SHARDED_STAGES:
            precision = "bf16" if folder.training.bf16 else "fp16" if folder.training.fp16 else "no"
            command += ["--accelerate_config", folder.options.accelerate_config, "--mixed_precision", precision]
        command += words
    log.parent.mkdir(parents=True, exist_ok=True)
    message.unlink(missing_ok=True)
    if subprocess.run(command).returncode != 0:
        said = message.read_text(encoding="utf-8") if message.exists() else "its message is above."
        raise LarPOError(
            f"The stage {stage!r} of iteration {iteration} failed. {said} What was saved so far is kept; run the same "
            "command again to go on."
        )


def _check_health(folder: RunFolder, iteration: int) -> list[Check]:
    path = folder.iteration(iteration)
    checks = check_iteration(
        samples=read_jsonl(path / "samples.jsonl"),
        selection=read_json(path / "selection.json"),
        training_log=read_jsonl(path / "training_log.jsonl"),
        start=read_json(folder.iteration(0) / "evaluation.json"),
        evaluations=[read_json(folder.iteration(i) / "evaluation.json") for i in range(1, iteration + 1)],
        monitor=read_json(path / "monitor.json") if (path / "monitor.json").exists() else None,
        beta=folder.training.beta,
    )
    write_json(path / "health.json", [dataclasses.asdict(check) for check in checks])
    return checks


def _announce(folder: RunFolder, iteration: int, checks: list[Check]) -> None:
    """A few lines for a person at the end of an iteration."""
    start, now = (read_json(folder.iteration(i) / "evaluation.json") for i in (0, iteration))
    print(
        f"\nIteration {iteration}: held-out reward {with_error(now['reward'])}, at the start "
        f"{with_error(start['reward'])}; gain {with_error(now['gain'], '+')}; {now['tokens']:.0f} tokens, at the "
        "start "
        f"{start['tokens']:.0f}"
    )
    for check in checks:
        if not check.ok:
            print(f"  WARNING {check.name}: {check.value:.3g}, should be {check.limit}. {check.meaning}")


def _fetch(mirror: Mirror) -> None:
    try:
        count = mirror.fetch()
    except Exception as error:  # of any store's
        raise ConfigError(f"`mirror`: {mirror.url} cannot be read: {type(error).__name__}: {error}") from error
    if count:
        print(f"Fetched {count} files of the run from {mirror.url}")


def _push(mirror: Mirror | None) -> None:
    """A store that is out of reach does not stop the run; the next stage tries again."""
    try:
        if mirror is not None:
            mirror.push()
    except Exception as error:  # of any store's
        print(f"  WARNING mirror: {type(error).__name__}: {error} The run continues, and {mirror.url} lags behind.")


def _track(tracking: Tracking, iteration: int, checks: list[Check]) -> None:
    """A tracker that is out of reach at three in the morning does not stop the run."""
    try:
        tracking.log(iteration, checks)
    except Exception as error:  # of any tracker's, the network's
        print(f"  WARNING tracking: {type(error).__name__}: {error} The same numbers are in {tracking.folder.path}.")


def run_stage_of(path: str, stage: str, iteration: int) -> None:
    """
    Does one stage of a run, as one of several processes.

    Args:
        path: Folder of the run.
        stage: One of [`STAGES`].
        iteration: From 0 on.
    """
    values = yaml.safe_load((Path(path) / "run.yaml").read_text(encoding="utf-8"))

    def restore(options_class):
        names = {option.name for option in dataclasses.fields(options_class) if option.init}
        return options_class(**{name: value for name, value in values.items() if name in names})

    folder = RunFolder(restore(RunConfig), restore(RunTrainingConfig), restore(ModelConfig))
    folder.path = Path(path)
    folder.prepare_prompts(AutoTokenizer.from_pretrained(folder.model.model_name_or_path))
    stages = Stages(folder)
    try:
        with disk_full_is_said(folder.path):
            stages.run(stage, iteration)
    finally:
        stages.close()
