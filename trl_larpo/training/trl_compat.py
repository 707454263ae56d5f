"""
What the trainer touches of TRL's and transformers' internals: imports that they do not document, and patches of them.

When a new version breaks one, tests/test_contract.py says which.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.deepspeed import (
    HfTrainerDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.models.mixtral import modeling_mixtral
from trl.data_utils import _tokenize as tokenize
from trl.data_utils import common_prefix_length, prepare_multimodal_messages
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import add_hooks, disable_gradient_checkpointing, remove_hooks
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
    use_adapter,
)

__all__ = [
    "DataCollatorForPreference",
    "FusedCausalLMOutput",
    "accelerator_of",
    "add_fused_lm_head",
    "common_prefix_length",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "fused_head",
    "gather_head",
    "gather_partitioned_heads",
    "get_config_model_id",
    "global_then_local_main_first",
    "prepare_deepspeed",
    "prepare_fsdp",
    "prepare_multimodal_messages",
    "tokenize",
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


_trl_gather_head = trl_utils.maybe_gather_lm_head_ctx


def gather_head(*parameters: Tensor | None) -> contextlib.AbstractContextManager:
    """
    TRL's context in which the head is whole under ZeRO-3, which may also be given what is whole already.

    Checkpointing hands the backward pass the weights as they were when it computed the chunk again, gathered.
    """
    return _trl_gather_head(*(p if hasattr(p, "ds_status") else None for p in parameters))


def gather_partitioned_heads() -> None:
    """Makes TRL's own head gather its weights through [`gather_head`]."""
    trl_utils.maybe_gather_lm_head_ctx = gather_head


@contextlib.contextmanager
def fused_head(real: Tensor, cpu_function: type[Any]) -> Iterator[None]:
    """
    Makes TRL's fused head fit for some rows.

    On a CPU it leaves out prompt and padding too, and takes another function where that fits. TRL leaves them out only
    where it runs Triton, because dynamic shapes would recompile on accelerators such as Neuron; a CPU has no such
    trouble, and the head is half of the work there. And the load-balancing loss of a mixture of experts, which reads
    from a mask of two dimensions what is padding, is given such a mask.

    Args:
        real: bool `(rows, length)`, `False` in the padding.
        cpu_function: The function for a CPU, with `fits` and `apply`.
    """
    uses_triton, head = trl_utils._use_triton, trl_utils._ChunkedLogProbFunction
    load_balancing_loss = modeling_mixtral.load_balancing_loss_func

    class Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, *options):
            fits = hidden.device.type == "cpu" and cpu_function.fits(bias, temperature, *options)
            function = cpu_function if fits else head
            return function.apply(hidden, weight, bias, targets, temperature, chunk_size, *options)

    def load_balancing_loss_of_rows(router_logits, num_experts, num_experts_per_token, attention_mask):
        return load_balancing_loss(router_logits, num_experts, num_experts_per_token, real.long())

    trl_utils._use_triton = lambda device: device.type == "cpu" or uses_triton(device)
    trl_utils._ChunkedLogProbFunction = Head
    modeling_mixtral.load_balancing_loss_func = load_balancing_loss_of_rows
    try:
        yield
    finally:
        trl_utils._use_triton, trl_utils._ChunkedLogProbFunction = uses_triton, head
        modeling_mixtral.load_balancing_loss_func = load_balancing_loss


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
