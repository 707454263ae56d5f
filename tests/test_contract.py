"""
What LarPOTrainer relies on in TRL. A failure here says which part of TRL has changed, before anything subtler breaks.
"""

import inspect
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed as hf_deepspeed
from trl import DPOConfig, DPOTrainer
from trl.data_utils import _tokenize, common_prefix_length
from trl.models import prepare_deepspeed
from trl.models.utils import add_hooks, disable_gradient_checkpointing, remove_hooks
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_larpo import DataCollatorForCandidateLists
from trl_larpo.training.chunking import run_rows
from trl_larpo.training.config import DPO_LOSSES
from trl_larpo.training.cpu_head import CPULogProbs
from trl_larpo.training.log_probabilities import log_probabilities_under
from trl_larpo.training.token_rows import separate_rows

SIGNATURES = {
    DPOTrainer._prepare_dataset: ["self", "dataset", "processing_class", "args", "dataset_name"],
    DPOTrainer._set_signature_columns_if_needed: ["self"],
    DPOTrainer._precompute_ref_logps: ["self", "dataset", "name", "batch_size"],
    DPOTrainer.compute_ref_log_probs: ["self", "model", "inputs"],
    DPOTrainer._compute_loss: ["self", "model", "inputs", "return_outputs"],
    DPOTrainer.prediction_step: ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    common_prefix_length: ["ids", "other_ids"],
    _tokenize: ["processing_class", "input", "apply_chat_template_kwargs"],
    disable_gradient_checkpointing: ["model", "gradient_checkpointing_kwargs"],
    prepare_deepspeed: ["model", "accelerator"],
    add_hooks: ["model"],
    remove_hooks: ["model"],
    trl_utils.use_adapter: ["model", "adapter_name"],
    trl_utils.global_then_local_main_first: [],
    trl_utils.get_config_model_id: ["config"],
    trl_utils._use_triton: ["device"],
}


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
        "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "_metrics", "_total_train_tokens", "_tp_size",
        "_tokenizer", "_precompute_engine", "_precompute_model_hash", "_signature_columns", "is_deepspeed_enabled",
    ]  # fmt: skip
    missing = [name for name in used if not hasattr(trainer, name)]
    assert not missing, f"DPOTrainer no longer has {missing}"
    assert isinstance(trainer.data_collator, DataCollatorForPreference)
    fields = ["pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"]
    assert list(DataCollatorForPreference.__dataclass_fields__) == fields


def test_fused_head_gives_log_probabilities_of_the_next_token(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    labels = torch.tensor([[-100, -100, 7, 8, 9]])
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    scored = torch.tensor([[False, True, True, True]])
    torch.testing.assert_close(output.log_probs, expected.masked_fill(~scored, 0.0))
    for name in ("entropy", "mean_logits", "is_top1"):
        assert getattr(output, name).shape == (1, 4), f"field {name} of the fused head"


def test_scoring_labelled_positions_only_changes_no_number(tiny_model, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    num_scored = []

    def spy(function):
        class Spy:
            fits = getattr(function, "fits", None)

            @staticmethod
            def apply(hidden, *args):
                num_scored.append((function.__name__, hidden.size(0)))
                return function.apply(hidden, *args)

        return Spy

    example = {"prompt_ids": [5, 6], "completion_ids": [[7, 8], [9]], "relevance": [1.0, 0.0]}
    rows = separate_rows(DataCollatorForCandidateLists(pad_token_id=0)([example]))
    mask = rows.real.long()
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", spy(trl_utils._ChunkedLogProbFunction))
    monkeypatch.setattr("trl_larpo.training.chunking.CPULogProbs", spy(CPULogProbs))
    whole = model(input_ids=rows.input_ids, attention_mask=mask, labels=rows.labels, fused_lm_head=True)
    part = run_rows(model, rows, mask)
    assert num_scored == [("ChunkedLogProbFunction", 6), ("CPULogProbs", 3)], (
        "TRL no longer chooses the scored positions by `_use_triton`, or the function by `_ChunkedLogProbFunction`"
    )
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name))


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
