"""
Trains online on given completions, in as many processes as it is started in. What it ends with goes to a folder.

    torchrun --nproc_per_node 2 tests/distributed/train_online.py MODEL FOLDER OPTIONS
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from peft import LoraConfig
from safetensors.torch import save_file
from scripted_online import ONLINE, PROMPTS, Scripted, vowels

from trl_larpo import OnlineLarPOConfig

QUIET = {
    "report_to": "none", "bf16": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
    "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-3, "max_grad_norm": 0.0,
}  # fmt: skip


def main(model: str, folder: Path, sets: dict[str, dict]) -> None:
    for name, options in sets.items():
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if options.pop("lora", False) else None
        trainer = Scripted(
            model=model,
            reward_funcs=vowels,
            args=OnlineLarPOConfig(str(folder / "out"), **(QUIET | ONLINE | options)),
            train_dataset=PROMPTS,
            peft_config=adapter,
        )
        trainer.train()
        if trainer.accelerator.is_main_process:
            trained = {key: p.detach().contiguous() for key, p in trainer.model.named_parameters()}
            save_file(trained, folder / f"{name}.safetensors")
            steps = [entry for entry in trainer.state.log_history if "loss" in entry]
            result = {"steps": steps, "processes": trainer.accelerator.num_processes}
            (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
