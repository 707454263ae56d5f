"""
What the trainer touches of TRL's and transformers' internals: imports that they do not document, and patches of them.

When a new version breaks one, tests/test_contract.py says which.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import trl
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.hooks import add_hook_to_module
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.deepspeed import (
    HfTrainerDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from ..errors import ConfigError, UnsupportedTRLError
from ..version import __version__

try:
    from trl import DPOTrainer
    from trl.data_utils import _tokenize as tokenize
    from trl.data_utils import prepare_multimodal_messages
    from trl.models import prepare_deepspeed
    from trl.models.utils import add_hooks, disable_gradient_checkpointing, prepare_fsdp, remove_hooks
    from trl.trainer import utils as trl_utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import (
        create_model_from_path,
        disable_dropout_in_model,
        get_config_model_id,
        hash_module,
        use_adapter,
    )

    for _name in ("_prepare_dataset", "_precompute_ref_logps", "compute_ref_log_probs", "_compute_loss"):
        if not hasattr(DPOTrainer, _name):  # what LarPOTrainer overrides
            raise ImportError(f"DPOTrainer has no method {_name!r}")
except ImportError as _error:
    raise ImportError(
        f"trl-larpo {__version__} does not know TRL {trl.__version__}: {_error}. It was tested with TRL 1.10 to 1.16: "
        "`pip install 'trl>=1.10,<1.17'`, or install a newer trl-larpo."
    ) from _error

__all__ = [
    "DataCollatorForPreference",
    "accelerator_of",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "forget_order_of_modules",
    "gather_head",
    "gathered_for_writing",
    "get_config_model_id",
    "hash_module",
    "prepare_deepspeed",
    "prepare_fsdp",
    "prepare_multimodal_messages",
    "require_grpo",
    "restore_forward_of_copy",
    "tokenize",
    "triton_log_probs",
    "unset_hf_deepspeed_config",
    "use_adapter",
    "whole_model",
    "without_deepspeed_config",
]


def accelerator_of(args: TrainingArguments) -> Accelerator:
    """The accelerator that a trainer with these options would make: same precision, device, DeepSpeed or FSDP."""
    _ = args.device  # decides on the device and joins the other processes
    fsdp = getattr(args, "fsdp_plugin_args", None)  # transformers 4 keeps these, and the precision, in the environment
    accelerator = Accelerator(
        mixed_precision=getattr(args, "mixed_precision", None),
        deepspeed_plugin=getattr(args, "deepspeed_plugin", None),
        fsdp_plugin=None if fsdp is None else FullyShardedDataParallelPlugin(**fsdp),
    )
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and getattr(args, "hf_deepspeed_config", None) is None:  # replaces its "auto" values
        plugin.hf_ds_config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
        plugin.deepspeed_config = plugin.hf_ds_config.config
        plugin.hf_ds_config.trainer_config_process(args)
    return accelerator


def gather_head(*parameters: Tensor | None) -> contextlib.AbstractContextManager:
    """
    A context in which the weights of the head are whole under ZeRO-3, which shards what no module's forward asks for.

    Checkpointing hands the backward pass the weights as they were when it computed something again: gathered, and no
    parameters of DeepSpeed's. Those, and what is whole already, are left alone: another gathering would take them away
    from the module that holds them.
    """
    sharded = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list({id(p): p for p in sharded}.values()))


def is_sharded_by_deepspeed(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards a parameter, also while it is gathered: its values are gone in the backward pass."""
    return hasattr(parameter, "ds_status")


_TRL_KERNEL_ARGUMENTS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
]  # fmt: skip


def _find_triton_log_probs():
    """TRL's function from hidden states to log-probabilities on Triton, where this TRL has it in the known form."""
    kernel = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    uses_triton = getattr(trl_utils, "_use_triton", None)
    if (
        uses_triton is None
        or kernel is None
        or list(inspect.signature(kernel.forward).parameters) != _TRL_KERNEL_ARGUMENTS
    ):
        return None

    def log_probs_on_triton(hidden, weight, bias, targets, scale, softcap, with_statistics):
        if not uses_triton(hidden.device):
            return None
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1") if with_statistics else ("log_probs",)
        log_probs, entropy, _, mean_logits, is_top1 = kernel.apply(
            hidden, weight, bias, targets, 1.0, 32768, softcap, scale, outputs
        )
        return log_probs, entropy, mean_logits, is_top1

    return log_probs_on_triton


triton_log_probs = _find_triton_log_probs()
"""Arguments as [`TiledLogProbs`] has them; returns `None` on a device without Triton. `None` where TRL has no such."""


def forget_order_of_modules(engine: nn.Module) -> None:
    """
    Makes ZeRO-3 note the order of modules anew in the next forward pass.

    It fetches weights ahead in the order of the last pass, and refuses a pass in which they are needed in another one.
    """
    optimizer = engine.optimizer
    coordinator = getattr(optimizer, "parameter_offload", optimizer).get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def keep_forward_from_liger(args: TrainingArguments) -> None:
    """
    Leaves Liger its kernels, without the fused loss that would replace the model's forward: TRL does so from 1.15 on.

    Raises:
        ConfigError: If the fused loss is asked for.
    """
    kernels = args.liger_kernel_config or {}
    if kernels.get("fused_linear_cross_entropy"):
        raise ConfigError(
            "`liger_kernel_config` asks for `fused_linear_cross_entropy`, which replaces the model's forward; the "
            "trainer needs its own. Remove it; other kernels of Liger stay."
        )
    args.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}


def restore_forward_of_copy(model: Any) -> None:
    """
    Gives a deep copy of a model that a trainer has used its own forward pass again.

    TRL and this package patch `model.forward`. The patch in a copy still calls the model that it is a copy of.

    Args:
        model: Bare, or a `PeftModel`. Any other value is left alone.
    """
    if not isinstance(model, nn.Module):
        return
    if not calls_another_model(model):
        return
    bare: Any = model.get_base_model() if is_peft_model(model) else model
    for name in ("forward", "_original_forward"):  # the second is accelerate's
        bare.__dict__.pop(name, None)
    if hasattr(bare, "_hf_hook"):  # of a model that is split across devices
        add_hook_to_module(bare, bare._hf_hook)


def calls_another_model(model: nn.Module) -> bool:
    """Whether a patched `forward` is built around a method of another object of the model's class."""
    model = model.get_base_model() if is_peft_model(model) else model
    remaining, seen = [model.__dict__.get("forward")], set()
    while remaining:
        value = remaining.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        remaining.append(getattr(value, "__dict__", {}).get("__wrapped__"))
        if isinstance(value, types.MethodType):
            if isinstance(value.__self__, type(model)) and value.__self__ is not model:
                return True
            remaining.append(value.__func__)
        elif isinstance(value, functools.partial):
            if any(isinstance(argument, type(model)) and argument is not model for argument in value.args):
                return True
            remaining.append(value.func)
        elif isinstance(value, types.FunctionType):
            empty = types.CellType()
            remaining += [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
    return False


@contextlib.contextmanager
def whole_model(trainer) -> Iterator[PreTrainedModel]:
    """
    The policy of a trainer so that each process can sample from it on its own: under ZeRO-3 its weights are gathered.

    TRL's `unwrap_model_for_generation` would switch gradient checkpointing off, and on again with other settings, and
    leaves ZeRO-3 without its hooks after an error.
    """
    engine: nn.Module = trainer.model_wrapped
    model = trainer.accelerator.unwrap_model(engine)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        yield model
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)
        try:
            yield model
        finally:
            add_hooks(engine)


@contextlib.contextmanager
def without_deepspeed_config() -> Iterator[None]:
    """Models loaded inside are whole, in one process alone: under ZeRO-3 transformers would shard them among all."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def options_ask_for_reentrant_checkpoints(args: Any) -> bool:
    """Whether a training will checkpoint that way. TRL itself sets it for adapters with ZeRO-3."""
    kwargs = [getattr(args, f"{name}_checkpointing_kwargs", None) for name in ("gradient", "activation")]
    return args.gradient_checkpointing and any((each or {}).get("use_reentrant") for each in kwargs)


def has_reentrant_checkpoints(model: nn.Module) -> bool:
    """Whether layers of a model checkpoint that way now."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        for module in model.modules()
    )


_GRPO_METHODS = {  # what OnlineLarPOTrainer overrides: arguments
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save_checkpoint": ["self", "model", "trial"],
    "log": ["self", "logs", "start_time"],
}


def require_grpo() -> None:
    """
    Checks that this TRL has a GRPOTrainer that [`OnlineLarPOTrainer`] was written for: its internals change often.

    Raises:
        UnsupportedTRLError: Says which TRL to install.
    """
    problem = None
    if Version(trl.__version__).release[:2] != (1, 16):
        problem = "its GRPOTrainer is another one"
    else:
        for name, arguments in _GRPO_METHODS.items():
            method = getattr(trl.GRPOTrainer, name, None)
            if method is None or list(inspect.signature(method).parameters) != arguments:
                problem = f"`GRPOTrainer.{name}` is missing or takes other arguments"
                break
    if problem is not None:
        raise UnsupportedTRLError(
            f"OnlineLarPOTrainer of trl-larpo {__version__} needs TRL 1.16, and TRL {trl.__version__} is installed: "
            f"{problem}. `pip install 'trl>=1.16,<1.17'`, or install a newer trl-larpo. Everything else works with "
            "this TRL."
        )


@contextlib.contextmanager
def gathered_for_writing(parameters: list[Tensor]) -> Iterator[None]:
    """Parameters that ZeRO-3 shards are whole inside, and what the first process writes into them stays."""
    if not any(map(is_sharded_by_deepspeed, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield
