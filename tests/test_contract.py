"""
What LarPOTrainer relies on in TRL. A failure here says which part of TRL has changed, before anything subtler breaks.
"""

import importlib.util
import inspect
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import trl
from packaging.version import Version
from transformers import AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed
from trl import DPOConfig, DPOTrainer
from trl.data_utils import _tokenize
from trl.models import prepare_deepspeed
from trl.models.utils import add_hooks, disable_gradient_checkpointing, remove_hooks
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_larpo import ConfigError
from trl_larpo.training.config import DPO_LOSSES
from trl_larpo.training.log_probabilities import log_probabilities_under
from trl_larpo.training.trl_compat import keep_forward_from_liger, triton_log_probs

SIGNATURES = {
    DPOTrainer._prepare_dataset: ["self", "dataset", "processing_class", "args", "dataset_name"],
    DPOTrainer._set_signature_columns_if_needed: ["self"],
    DPOTrainer._precompute_ref_logps: ["self", "dataset", "name", "batch_size"],
    DPOTrainer.compute_ref_log_probs: ["self", "model", "inputs"],
    DPOTrainer._compute_loss: ["self", "model", "inputs", "return_outputs"],
    DPOTrainer.prediction_step: ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    DPOTrainer._save_checkpoint: ["self", "model", "trial"],
    DPOTrainer._load_optimizer_and_scheduler: ["self", "checkpoint"],
    _tokenize: ["processing_class", "input", "apply_chat_template_kwargs"],
    disable_gradient_checkpointing: ["model", "gradient_checkpointing_kwargs"],
    prepare_deepspeed: ["model", "accelerator"],
    add_hooks: ["model"],
    remove_hooks: ["model"],
    trl_utils.use_adapter: ["model", "adapter_name"],
    trl_utils.get_config_model_id: ["config"],
}


def is_trl(since: str) -> bool:
    return Version(trl.__version__) >= Version(since)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    found = list(inspect.signature(function).parameters)
    assert found == SIGNATURES[function], f"TRL changed {function.__qualname__}: it now takes {found}"


def test_transformers_keeps_its_deepspeed_config_where_it_did():
    assert hasattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref")  # `trl_compat` removes it for a while and restores it


def test_constructor_takes_what_we_hand_on():
    expected = [
        "self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
        "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config",
    ]  # fmt: skip
    found = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert found == expected, f"TRL changed the arguments of DPOTrainer to {found}"


def test_attributes_of_a_dpo_trainer(tiny_model, config):
    trainer = DPOTrainer(model=tiny_model, args=config(DPOConfig), train_dataset=tiny.pairs())
    used = [
        "beta", "loss_types", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "precompute_ref_logps",
        "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "_metrics", "_total_train_tokens", "_tokenizer",
        "_precompute_engine", "_signature_columns", "is_deepspeed_enabled",
    ]  # fmt: skip
    used += [name for name, since in (("_tp_size", "1.13"), ("_precompute_model_hash", "1.16")) if is_trl(since)]
    missing = [name for name in used if not hasattr(trainer, name)]
    assert not missing, f"DPOTrainer no longer has {missing}"
    assert isinstance(trainer.data_collator, DataCollatorForPreference)
    fields = ["pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"]
    assert list(DataCollatorForPreference.__dataclass_fields__) == fields


@pytest.mark.skipif(not is_trl("1.16"), reason="TRL has the function in this form from 1.16 on")
def test_triton_function_is_found():
    assert triton_log_probs is not None, "TRL changed the arguments of `ChunkedLogProbFunction`"
    assert triton_log_probs(torch.zeros(1, 2), *[None] * 6) is None  # no Triton on a CPU


def test_liger_keeps_its_kernels_and_leaves_the_forward():
    """transformers hands these on to Liger, whose default replaces the model's forward by one with a fused loss."""
    args = SimpleNamespace(liger_kernel_config={"rope": False})
    keep_forward_from_liger(args)
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ConfigError, match="asks for `fused_linear_cross_entropy`"):
        keep_forward_from_liger(SimpleNamespace(liger_kernel_config={"fused_linear_cross_entropy": True}))


def test_names_of_trl_losses(tiny_model, config):
    trainer = DPOTrainer(model=tiny_model, args=config(DPOConfig, loss_type="no such loss"), train_dataset=tiny.pairs())
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trainer.train()
    in_trl = set(re.findall(r"'(\w+)'", str(error.value)))
    assert in_trl == DPO_LOSSES, f"TRL's losses are now {sorted(in_trl)}; update DPO_LOSSES in config.py"


@pytest.mark.parametrize("kind, device_map", [("DEEPSPEED", {"device_map": None}), ("NO", {})])
def test_a_launched_process_loads_the_model_without_a_device_map(tiny_model, config, monkeypatch, kind, device_map):
    # transformers refuses device_map="auto" under ZeRO-3, also in one process; on a CPU it would not show
    given = {}

    class Stop(Exception):
        pass

    def load(path, **options):
        given.update(options)
        raise Stop

    args = config()
    monkeypatch.setattr("trl_larpo.training.log_probabilities.create_model_from_path", load)
    monkeypatch.setattr(args, "distributed_state", SimpleNamespace(distributed_type=kind))
    lists = tiny.lists()
    dataset = lists.add_column("prompt_id", [str(number) for number in range(len(lists))])
    with pytest.raises(Stop):
        log_probabilities_under(tiny_model, dataset, args, {}, AutoTokenizer.from_pretrained(tiny_model), "scoring")
    assert {k: v for k, v in given.items() if k == "device_map"} == device_map


@pytest.mark.parametrize("missing", ["trl.trainer.utils.use_adapter", "trl.DPOTrainer._compute_loss"])
def test_a_trl_that_is_not_known_is_named_at_import(missing, monkeypatch):
    monkeypatch.delattr(missing)
    spec = importlib.util.find_spec("trl_larpo.training.trl_compat")
    with pytest.raises(ImportError) as error:  # a second import of the module, which every public name of ours needs
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for part in (f"does not know TRL {trl.__version__}", missing.split(".")[-1], "pip install 'trl>=1.10,<1.17'"):
        assert part in str(error.value)
