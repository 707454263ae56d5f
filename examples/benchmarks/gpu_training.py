"""
Whole training steps, optimizer and all, of one process: what gpu.py starts for DeepSpeed and for quantized models.

    accelerate launch --config_file examples/accelerate_configs/zero3.yaml --num_processes 1 \\
        examples/benchmarks/gpu_training.py --model outputs/random-1.5b --list 384/256/4 --output outputs/zero3.json
    python examples/benchmarks/gpu_training.py --model outputs/random-7b --qlora --memory 24 --output outputs/qlora.json

The model is a folder with the weights. The reference's log-probabilities are given, as in `larpo run`. The output is a
JSON file: seconds of a step (the median, without the first), the peak of memory, and the losses.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from training_step import ON_GPU, make_list, synchronize
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from trl_larpo import LarPOConfig, LarPOTrainer
from trl_larpo.storage import write_json


class Watch(TrainerCallback):
    """Times steps and keeps their losses."""

    def __init__(self):
        self.seconds, self.losses = [], []

    def on_step_begin(self, *args, **kwargs):
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--list", default="384/256/4", help="prompt/completion/size, in tokens and completions")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--qlora", action="store_true", help="a base in 4 bits, and LoRA")
    parser.add_argument("--memory", type=float, help="GiB of the GPU that may be used")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(argv)
    if options.memory and ON_GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 2**30 / total))
    prompt, completion, list_size = map(int, options.list.split("/"))
    vocab_size = AutoConfig.from_pretrained(options.model).vocab_size
    rows = [make_list(vocab_size, prompt, completion, list_size, seed) for seed in range(options.steps)]
    given = {"ref_logps": [[-100.0] * list_size] * len(rows)}
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LarPOTrainer(
            model=options.model,
            args=LarPOConfig(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=1,
                gradient_checkpointing=True,
                max_length=None,
                bf16=ON_GPU,
                use_cpu=not ON_GPU,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                model_init_kwargs=loading(options.qlora),
            ),
            train_dataset=Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]} | given),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[watch],
            peft_config=lora() if options.qlora else None,
        )
        trainer.train()
    write_json(
        options.output,
        {
            "seconds": statistics.median(watch.seconds[1:] or watch.seconds),
            "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
            "losses": watch.losses,
        },
    )


def loading(quantized: bool) -> dict:
    """Keyword arguments of `from_pretrained`: weights in float32, as `larpo run` trains them, or in 4 bits."""
    if not quantized:
        return {"dtype": "float32"}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if ON_GPU else torch.float32,
    )  # fmt: skip
    return {"dtype": "bfloat16", "quantization_config": quantization}


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    main()
