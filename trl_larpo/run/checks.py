"""Checks a run before any time is spent."""

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from accelerate.logging import get_logger
from transformers import AttentionInterface, AutoConfig, PretrainedConfig
from trl import get_peft_config

from ..errors import ConfigError
from ..generation.server_process import check_servers, server_command
from ..generation.server_routes import check_command
from ..rewards.functions import BUILT_IN, PAIRWISE, load_rewards
from ..rewards.reward_models import load_tokenizer
from ..storage import check_folder
from .candidate_files import read_candidate_pools
from .disk import check_disk
from .folder import RunFolder
from .health import CHECKS
from .loading import check_model_path, config_of, empty_model, tokenizer_of
from .prompts import load_random_prompts
from .tracking import check_trackers

logger = get_logger(__name__)

_REFUSED = {  # option of the trainer: (what it must be, why)
    "resume_from_checkpoint": (None, "`larpo run` resumes on its own: run the same command again."),
    "push_to_hub": (False, "push the models of a finished run with `hf upload`."),
    "eval_strategy": ("no", "each iteration ends with an evaluation on held-out prompts."),
    "save_only_model": (False, "a killed training could not be resumed."),
    "sync_ref_model": (False, "the reference is fixed within an iteration (`reference`)."),
    "precompute_ref_log_probs": (False, "`larpo run` always computes them once; leave it out."),
    "enable_jit_checkpoint": (False, "a run stops on SIGTERM, and resumes from its last checkpoint (`save_steps`)."),
    "trust_remote_code": (False, "models with code of their own cannot be sampled and scored by a run yet."),
    "load_best_model_at_end": (False, "the model at the end of an iteration is the next policy."),
}


def check_run(folder: RunFolder) -> int | None:
    """
    Checks every option, path, reward and server, before any time is spent.

    Returns:
        As [`check_disk`].

    Raises:
        LarPOError: Names what is invalid and how to fix it.
    """
    options, training, model = folder.options, folder.training, folder.model
    options.check()
    check_folder(folder.path, "output_dir")
    for name, (expected, reason) in _REFUSED.items():
        value = getattr(training, name, expected)  # older versions of transformers lack some
        if getattr(value, "value", value) != expected:
            raise ConfigError(f"`{name}` is {value!r} in a run: {reason}")
    if training.reference_free and options.reference != "policy":
        raise ConfigError(
            f"`reference` is {options.reference!r}, but with `reference_free` there is none; leave it out."
        )
    _check_adapter(folder)
    for name in options.stop_on:
        if name not in (*CHECKS, "any", "none"):
            raise ConfigError(
                f"`stop_on` names {name!r}; the health checks are {', '.join(CHECKS)}, or 'any' or 'none'."
            )
    path = model.model_name_or_path
    check_model_path(path)
    path = model.model_name_or_path = os.path.expanduser(path)
    load_rewards(options.reward_funcs, options.reward_weights)
    folder.check_configuration()
    for candidates in options.earlier_candidates or []:
        if "://" not in candidates and not Path(candidates).expanduser().exists():
            raise ConfigError(f"`earlier_candidates` names {candidates!r}, and there is no such file.")
        if not (folder.iteration(1) / "rewarded.jsonl").exists():  # then they have been read, and are the same still
            read_candidate_pools(candidates)
    if options.accelerate_config:
        _check_accelerate_config(options.accelerate_config, folder)
    _check_packages(folder)
    check_trackers(training.report_to)
    if options.train_launcher and shutil.which(shlex.split(options.train_launcher)[0]) is None:
        program = shlex.split(options.train_launcher)[0]
        raise ConfigError(f"`train_launcher`: there is no program {program!r} on this machine.")
    if options.server_command:
        revision = model.model_revision
        words = re.split(r"[\s='\"@]+", os.path.expandvars(options.server_command))
        if revision not in (None, "main", *words) and not os.path.isdir(path):
            raise ConfigError(
                f"`server_command` would sample the revision 'main' of {path!r}, and `model_revision` is {revision!r}. "
                f"Add `--revision {revision}` to the command."
            )
        check_command(options.server_command, model.lora_r if folder.keeps_adapter else None)
        words, _ = server_command(options.server_command, model="model", port=1, index=0)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"`server_command`: there is no program {words[0] if words else ''!r} on this machine.")
    check_servers(options.server_urls, options.server_command, options.server_api_key_variable)
    config, tokenizer = config_of(model), tokenizer_of(model)
    _check_attention(folder, config)
    _check_modules(folder, config)
    if options.random_prompts:
        load_random_prompts(options, tokenizer)
    for name in options.reward_funcs:
        _check_reward_model(name)
    folder.check_is_outside_inputs()
    return check_disk(folder, config)


def _check_packages(folder: RunFolder) -> None:
    """Those that a run would miss only after hours of sampling: extras by what asks for them."""
    options, model = folder.options, folder.model
    needed = {
        "peft": ("peft", "`use_peft`", model.use_peft),
        "bitsandbytes": ("quantization", "`load_in_4bit` or `load_in_8bit`", model.load_in_4bit or model.load_in_8bit),
        "math_verify": ("eval", "the reward 'math'", "math" in options.reward_funcs),
        "deepspeed": ("deepspeed", "`accelerate_config`", _uses_deepspeed(options.accelerate_config)),
    }
    for module, (extra, name, is_used) in needed.items():
        if is_used and importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ConfigError(f"The package {package} is missing, for {name}: pip install 'trl-larpo[{extra}]'.")


def _uses_deepspeed(accelerate_config: str | None) -> bool:
    if accelerate_config is None:
        return False
    return yaml.safe_load(Path(accelerate_config).read_text(encoding="utf-8"))["distributed_type"] == "DEEPSPEED"


def _check_reward_model(name: str) -> None:
    """Whether there is such a model with a tokenizer, in a folder or on the hub."""
    path = os.path.expanduser(name.removeprefix(PAIRWISE))
    if name in BUILT_IN or ":" in path:
        return
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`reward_funcs`: {name!r} is no model: {' '.join(str(error).split())[:200]}") from None
    load_tokenizer(path)


def _check_adapter(folder: RunFolder) -> None:
    """What an adapter goes with that is kept, or merged."""
    options, model = folder.options, folder.model
    if options.merge_adapter and not model.use_peft:
        raise ConfigError("`merge_adapter` is for an adapter: set `use_peft`, or leave it out.")
    if (model.load_in_4bit or model.load_in_8bit) and not folder.keeps_adapter:
        raise ConfigError(
            "`load_in_4bit` and `load_in_8bit` need an adapter that is trained on the base and kept: set `use_peft`, "
            "and leave out `merge_adapter`."
        )
    if folder.keeps_adapter and options.server_urls:
        raise ConfigError(
            "`server_urls`: servers that run already are not given the adapter with which iterations end (`use_peft`). "
            "Let the run start them (`server_command`), or set `merge_adapter: true`."
        )
    if folder.keeps_adapter and options.server_command and (model.use_dora or model.lora_modules_to_save):
        raise ConfigError(
            "`server_command`: vLLM takes neither `use_dora` nor `lora_modules_to_save` of an adapter. Leave them out, "
            "set `merge_adapter: true`, or sample in this process."
        )


def _check_attention(folder: RunFolder, config: PretrainedConfig) -> None:
    """Whether transformers knows `attn_implementation`, and the model and this machine have it."""
    name = folder.model.attn_implementation
    if name is None or "/" in name:  # a kernel of the hub, which is loaded where it is used
        return
    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known:
        raise ConfigError(f"`attn_implementation` is {name!r}; it must be one of {', '.join(sorted(known))}.")
    if folder.options.train_launcher is not None:  # other machines train
        return
    try:
        _check_empty_model(config, "attn_implementation", name, lambda: empty_model(config, attn_implementation=name))
    except ConfigError as error:
        if not folder.options.dry_run:
            raise
        logger.warning(f"{error} The run itself would not start on this machine.")


def _check_modules(folder: RunFolder, config: PretrainedConfig) -> None:
    """Whether the model has the modules that LoRA is to train."""
    if not folder.model.use_peft:
        return
    from peft import inject_adapter_in_model

    lora = get_peft_config(folder.model)
    _check_empty_model(
        config,
        "lora_target_modules",
        folder.model.lora_target_modules,
        lambda: inject_adapter_in_model(lora, empty_model(config), low_cpu_mem_usage=True),
    )


def _check_empty_model(config: PretrainedConfig, option: str, value: object, attempt: Callable[[], object]) -> None:
    """
    Raises:
        ConfigError: If the attempt fails for a reason that the loaded model will have, too.
    """
    try:
        empty_model(config)
    except Exception:  # then nothing can be said without the weights; `check_disk` warns
        return
    try:
        attempt()
    except (ImportError, ValueError) as error:
        raise ConfigError(f"`{option}` is {value!r}: {' '.join(str(error).split())[:300]}") from None
    except Exception:  # for want of weights
        return


def _check_accelerate_config(path: str, folder: RunFolder) -> None:
    """Whole models, or whole adapters, must come out of the training, not shards."""
    if not Path(path).is_file():
        raise ConfigError(f"`accelerate_config` is {path!r}, and there is no such file.")
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ConfigError(f"`accelerate_config`: {path!r} is no configuration file of accelerate.")
    deepspeed, fsdp = settings.get("deepspeed_config") or {}, settings.get("fsdp_config") or {}
    if (folder.model.load_in_4bit or folder.model.load_in_8bit) and (deepspeed.get("zero_stage") == 3 or fsdp):
        raise ConfigError(
            f"`accelerate_config`: {path!r} shards the model, and a quantized base is whole in each process. Take "
            "ZeRO-2, or leave out `load_in_4bit` and `load_in_8bit`."
        )
    if folder.keeps_adapter and fsdp and int(fsdp.get("fsdp_version", 1)) < 2:
        raise ConfigError(
            f"`accelerate_config`: set `fsdp_version: 2` in {path!r}, or `merge_adapter: true`: FSDP1 does not train "
            "an adapter that is kept."
        )
    training = folder.training
    is_sharded_base = folder.model.use_peft and deepspeed.get("zero_stage") == 3
    if is_sharded_base and training.gradient_checkpointing and training.candidate_chunk_size is not None:
        raise ConfigError(
            "`candidate_chunk_size` does not go with `gradient_checkpointing` for adapters with ZeRO-3, which take "
            "reentrant checkpoints. Set `gradient_checkpointing: false`: chunks are computed again in any case."
        )
    if deepspeed.get("zero_stage") == 3 and not deepspeed.get("zero3_save_16bit_model"):
        raise ConfigError(f"`accelerate_config`: set `zero3_save_16bit_model: true` in {path!r}, to save whole models.")
    if fsdp and fsdp.get("fsdp_state_dict_type") != "FULL_STATE_DICT":
        raise ConfigError(
            f"`accelerate_config`: set `fsdp_state_dict_type: FULL_STATE_DICT` in {path!r}, to save whole models."
        )
