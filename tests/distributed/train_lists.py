"""
Trains a tiny model on ragged lists, once for each set of options, under whatever launched it.

    torchrun --nproc_per_node 2 tests/distributed/train_lists.py MODEL FOLDER '{"plain": {"loss_type": "listmle"}}'

For each name it leaves NAME.json with the steps and the evaluation, and NAME.safetensors with the trained weights, in
FOLDER. Options beside those of LarPOConfig: `lora`, to train an adapter, `adapter`, the folder of one to start from, as
`larpo run` does, `num_rows` and `num_eval_rows`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer, set_seed

from trl_larpo import LarPOConfig, LarPOTrainer
from trl_larpo.run.launch import leave
from trl_larpo.run.training_stages import load_adapter, save_adapter
from trl_larpo.training.log_probabilities import log_probabilities_under

NUM_ROWS = 80  # more than any run here sees: no end of an epoch, where batches are filled up with rows from the start


def main(model: str, folder: str, options: str) -> None:
    torch.set_num_threads(1)
    for name, of_run in json.loads(options).items():
        AcceleratorState._reset_state()  # each run as in a process of its own
        GradientState._reset_state()
        train(model, Path(folder), name, of_run)


def train(model: str, folder: Path, name: str, options: dict) -> None:
    lora, num_rows = options.pop("lora", False), options.pop("num_rows", NUM_ROWS)
    adapter, num_eval_rows = options.pop("adapter", None), options.pop("num_eval_rows", 8)
    resume = options.pop("resume_from_checkpoint", None)
    defaults = {
        "output_dir": str(folder / name),
        "learning_rate": 1e-3,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_eval_batch_size": 4,
    }
    args = LarPOConfig(**(defaults | options))
    shard_on_cpu()
    # On disk, because a data set in memory has a cache of its own in each process
    path = folder / f"lists-{num_rows}"
    with args.main_process_first():
        if not path.exists():
            tiny.lists(num_rows=num_rows).save_to_disk(path)
    dataset = tiny.Dataset.load_from_disk(str(path))
    logps = None
    if adapter is not None:  # the stage `reference`
        rows = dataset.select(range(8)).add_column("prompt_id", [str(row) for row in range(8)])
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        logps = log_probabilities_under(adapter, rows, args, {"dtype": "float32"}, tokenizer, "Scoring")
        GradientState._reset_state()
        args = LarPOConfig(**(defaults | options))
        shard_on_cpu()
    set_seed(0)  # of the adapter
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = LarPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(num_eval_rows)),
        peft_config=peft_config if lora else None,
    )
    if adapter is not None:
        load_adapter(trainer, adapter)
        save_adapter(trainer, folder / f"{name}-start")
    trainer.train(resume_from_checkpoint=resume)
    if adapter is not None:
        trainer.save_model(str(folder / f"{name}-end"))
    metrics = trainer.evaluate()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        if lora:
            weights = {key: value for key, value in weights.items() if "lora" in key}
        save_file({key: value.clone().contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
        result = {"steps": trainer.state.log_history, "evaluation": metrics, "distributed": distribution(trainer)}
        result["logps"] = logps
        (folder / f"{name}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def shard_on_cpu() -> None:
    """accelerate leaves FSDP to accelerators, and on a CPU ignores it without a word; torch itself runs it there."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState().distributed_type = DistributedType.MULTI_GPU


def distribution(trainer: LarPOTrainer) -> dict:
    """What really ran: the kind, the stage of ZeRO, and the share of the weights that this process holds."""
    total = local = 0
    for parameter in trainer.model_wrapped.parameters():
        shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3
        if shard is None:
            shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2, or whole
        total += getattr(parameter, "ds_numel", parameter.numel())
        local += shard.numel()
    stage = getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)()
    kind = trainer.accelerator.distributed_type.value
    return {"kind": kind, "zero_stage": stage, "share": local / total, "processes": trainer.accelerator.num_processes}


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
