"""
Trains a tiny model on ragged lists under whatever launched it, and writes the trajectory.

    torchrun --nproc_per_node 2 tests/distributed/train_lists.py MODEL RESULT.json '{"max_steps": 5}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch

from trl_larpo import LarPOConfig, LarPOTrainer


def main(model: str, result: str, options: str) -> None:
    torch.set_num_threads(1)
    defaults = {
        "output_dir": str(Path(result).with_suffix("")),
        "learning_rate": 1e-3,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    args = LarPOConfig(**(defaults | json.loads(options)))
    # On disk, because a data set in memory has a cache of its own in each process
    path = Path(result).parent / "lists"
    with args.main_process_first():
        if not path.exists():
            tiny.lists(num_rows=42).save_to_disk(path)  # more than any run sees: no end of epoch
    dataset = tiny.Dataset.load_from_disk(str(path))
    trainer = LarPOTrainer(model=model, args=args, train_dataset=dataset, eval_dataset=dataset.select(range(7)))
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        Path(result).write_text(json.dumps({"steps": trainer.state.log_history, "evaluation": metrics}))
    trainer.accelerator.end_training()  # leaves the process group in order; without, one process in many aborts at exit


if __name__ == "__main__":
    main(*sys.argv[1:])
