"""
Time and memory of a training step: LarPOTrainer and TRL's DPOTrainer, shared prompts and separate rows.

    python examples/benchmarks/training_step.py pairs lists memory scaling
    python examples/benchmarks/training_step.py lists --shape 7b --lora --lists 1500/256/8

A step is the loss and the backward pass, for policy and reference, without the optimizer. The trainers run alternately
in one process; times are medians. Weights and texts are random. The dtype is bfloat16 on a GPU and float32 on a CPU.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from itertools import combinations
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_larpo import LarPOConfig, LarPOTrainer

SHAPES = {
    "135m": {  # SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.5b": {  # Qwen2.5-1.5B
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {  # Mistral 7B, without its sliding window
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
ON_GPU = torch.cuda.is_available()
H200_BF16_FLOPS = 989e12  # for dense matrices, from the data sheet


class Bench:
    """Makes trainers on one random model and times their steps."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype = torch.bfloat16 if ON_GPU else torch.float32):
        self.options, self.dtype = options, dtype
        self.config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=1)
        self.tokenizer = word_tokenizer(self.config.vocab_size)
        self.folder = tempfile.TemporaryDirectory()
        self.models = [self._random_model() for _ in range(1 if options.lora else 2)]
        self.num_parameters = sum(p.numel() for p in self.models[0].parameters())

    def _random_model(self):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # so that a large model is never there in float32
        try:
            with torch.device("cuda" if ON_GPU else "cpu"):
                return LlamaForCausalLM(self.config)
        finally:
            torch.set_default_dtype(default)

    def trainer(self, cls, rows: list[dict], attention: str = "sdpa", **options):
        args_cls = LarPOConfig if cls is LarPOTrainer else DPOConfig
        options = {"gradient_checkpointing": self.options.gradient_checkpointing} | options
        args = args_cls(
            output_dir=self.folder.name,
            report_to="none",
            bf16=ON_GPU and self.dtype == torch.bfloat16,
            use_cpu=not ON_GPU,
            max_length=None,
            **options,
        )
        extra = {}
        if self.options.lora:
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(r=16, target_modules="all-linear")
        elif "ref_logps" not in rows[0]:
            extra["ref_model"] = self.models[1]
        for model in self.models:  # trainers replace the model's forward; each starts from the original one
            model.__dict__.pop("forward", None)
            model.set_attn_implementation(attention)
        dataset = Dataset.from_list(rows)
        trainer = cls(model=self.models[0], args=args, train_dataset=dataset, processing_class=self.tokenizer, **extra)
        for model in self.models:  # what `train` begins with
            model.gradient_checkpointing_disable()
        if args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        return trainer

    def step(self, trainer, first: int, last: int):
        """A function that runs one step on the rows from `first` to `last`."""
        rows = [trainer.train_dataset[i] for i in range(first, last)]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        forwards = [model.__dict__.get("forward") for model in self.models]
        implementation = self.models[0].config._attn_implementation

        def run() -> float:
            for model, forward in zip(self.models, forwards, strict=True):
                model.__dict__["forward"] = forward
                model.config._attn_implementation = implementation
            trainer.model.train()
            synchronize()
            start = time.perf_counter()
            trainer.compute_loss(trainer.model, batch).backward()
            synchronize()
            seconds = time.perf_counter() - start
            trainer.model.zero_grad(set_to_none=True)
            return seconds

        return run

    def compare(self, **steps) -> dict[str, float]:
        """Median seconds of each step; the steps run alternately."""
        times = {name: [] for name in steps}
        for run in steps.values():
            run()  # warm-up: the first run allocates memory
        for _ in range(self.options.steps):
            for name, run in steps.items():
                times[name].append(run())
        return {name: statistics.median(of_step) for name, of_step in times.items()}


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word, so that texts have the requested lengths."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_list(vocab_size: int, prompt: int, completion: int, list_size: int, seed: int = 0) -> dict:
    """A prompt and ranked completions with the given numbers of tokens; a completion includes its end token."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, vocab_size)}" for _ in range(count))

    return {"prompt": words(prompt), "completions": [" " + words(completion - 1) for _ in range(list_size)]}


def all_pairs(row: dict) -> list[dict]:
    """All pairs of a list, in DPOTrainer's format."""
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for better, worse in combinations(row["completions"], 2)
    ]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def matrix_product_flops(dtype: torch.dtype, size: int = 8192 if ON_GPU else 2048) -> float:
    """What the device reaches on a product of large matrices, per second."""
    a, b = torch.randn(2, size, size, device="cuda" if ON_GPU else "cpu", dtype=dtype)
    times = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[3:])


def kept_bytes(run, weights: set[int]) -> int:
    """
    Peak memory that autograd keeps for the backward pass, in bytes, without the weights.

    Args:
        run: Runs one step.
        weights: Addresses of the weights.
    """
    kept: dict[int, int] = {}
    now = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            nonlocal now, most
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            self.counts = self.key not in weights and self.key not in kept
            if self.counts:
                kept[self.key] = tensor.untyped_storage().nbytes()
                now += kept[self.key]
                most = max(most, now)

        def __del__(self):
            nonlocal now
            if self.counts:
                now -= kept.pop(self.key)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda entry: entry.tensor):
        run()
    return most


def bench_pairs(bench: Bench) -> list[dict]:
    """(a) A chosen/rejected pair: LarPOTrainer and DPOTrainer."""
    results = []
    for prompt, completion in bench.options.lengths or [(384, 128), (64, 192)]:
        row = make_list(bench.config.vocab_size, prompt, completion, 2)
        theirs = bench.step(bench.trainer(DPOTrainer, all_pairs(row)), 0, 1)
        ours = bench.step(bench.trainer(LarPOTrainer, all_pairs(row)), 0, 1)
        seconds = bench.compare(DPOTrainer=theirs, LarPOTrainer=ours)
        memory = {
            "DPOTrainer": kept_bytes(theirs, weights_of(bench)),
            "LarPOTrainer": kept_bytes(ours, weights_of(bench)),
        }
        results.append(
            {"prompt": prompt, "completion": completion, "list_size": 2, "seconds": seconds, "kept_bytes": memory}
        )
        report(f"pair, {prompt}/{completion}", seconds, "LarPOTrainer", memory)
    return results


def bench_lists(bench: Bench) -> list[dict]:
    """(a, b) A list: shared prompts, separate rows, and DPOTrainer over all pairs of the list."""
    results = []
    for prompt, completion, size in bench.options.lists or [(384, 128, 4), (384, 64, 8)]:
        row = make_list(bench.config.vocab_size, prompt, completion, size)
        pairs = all_pairs(row)
        trl = bench.trainer(DPOTrainer, pairs)
        # Two pairs at a time, as with gradient accumulation
        in_parts = [bench.step(trl, i, min(i + 2, len(pairs))) for i in range(0, len(pairs), 2)]
        separate = bench.step(bench.trainer(LarPOTrainer, [row], shared_prompt="off"), 0, 1)
        shared = bench.step(bench.trainer(LarPOTrainer, [row], shared_prompt="on"), 0, 1)
        seconds = bench.compare(separate=separate, shared=shared)
        in_parts[0]()
        passes = max(1, -(-bench.options.steps // len(in_parts)))  # at least as many timings as for the other steps
        seconds["DPOTrainer, all pairs"] = sum(statistics.median(run() for _ in range(passes)) for run in in_parts)
        memory = {
            "separate": kept_bytes(separate, weights_of(bench)),
            "shared": kept_bytes(shared, weights_of(bench)),
        }
        results.append(
            {"prompt": prompt, "completion": completion, "list_size": size, "seconds": seconds, "kept_bytes": memory}
        )
        report(f"list of {size}, {prompt}/{completion}, {len(pairs)} pairs", seconds, "shared", memory)
        if ON_GPU:
            tokens = prompt - 1 + size * (completion + 1)
            # 2 FLOPs per parameter and token forward, 4 backward; the reference runs only forward
            used = 8 * bench.num_parameters * tokens / seconds["shared"] / H200_BF16_FLOPS
            print(f"    model FLOPs utilisation (of {H200_BF16_FLOPS / 1e12:.0f} TFLOP/s): {used:.1%}")
    return results


def bench_memory(bench: Bench) -> list[dict]:
    """(c) Memory of a step by the size of the list, with and without chunks of two candidates."""
    prompt, completion = bench.options.lengths[0] if bench.options.lengths else (384, 64)
    results = []
    for size in (2, 4, 8, 16, 32):
        row = make_list(bench.config.vocab_size, prompt, completion, size)
        steps = {
            "whole": bench.step(bench.trainer(LarPOTrainer, [row]), 0, 1),
            "chunks of 2": bench.step(bench.trainer(LarPOTrainer, [row], candidate_chunk_size=2), 0, 1),
        }
        memory = {name: kept_bytes(run, weights_of(bench)) for name, run in steps.items()}
        seconds = bench.compare(**steps) if size in (2, 32) else {}
        results.append(
            {"prompt": prompt, "completion": completion, "list_size": size, "seconds": seconds, "kept_bytes": memory}
        )
        report(f"list of {size}, {prompt}/{completion}", seconds, "whole", memory)
    ratio = results[-1]["kept_bytes"]["chunks of 2"] / results[0]["kept_bytes"]["whole"]
    print(f"    a list of 32 in chunks of 2 keeps {ratio:.2f} times what a whole list of 2 keeps")
    return results


def bench_scaling(bench: Bench) -> list[dict]:
    """(d) Time of a step by its number of distinct tokens."""
    import numpy as np

    results = []
    for prompt, completion, size, batch in [
        (64, 64, 2, 1),
        (64, 64, 8, 1),
        (64, 64, 24, 1),
        (256, 64, 4, 1),
        (1024, 64, 4, 1),
        (256, 128, 4, 2),
        (256, 256, 6, 1),
    ]:
        rows = [make_list(bench.config.vocab_size, prompt, completion, size, seed) for seed in range(batch)]
        seconds = bench.compare(shared=bench.step(bench.trainer(LarPOTrainer, rows), 0, batch))["shared"]
        tokens = batch * (prompt - 1 + size * (completion + 1))
        results.append(
            {"prompt": prompt, "completion": completion, "list_size": size, "batch": batch, "tokens": tokens}
            | {"seconds": seconds}
        )
        print(f"  {batch} x list of {size}, {prompt}/{completion}: {tokens} tokens, {seconds:.2f} s")
    exponent = np.polyfit(*(np.log([r[name] for r in results]) for name in ("tokens", "seconds")), 1)[0]
    print(f"    time grows with the distinct tokens to the power {exponent:.2f}")
    heads = bench.config.hidden_size * bench.config.num_hidden_layers
    for length in (512, 2048):
        share = 2 * length * heads / (2 * length * heads + 2 * bench.num_parameters)
        print(f"    attention's own share of the FLOPs in a causal row of {length} tokens: {share:.0%}")
    return results


def weights_of(bench: Bench) -> set[int]:
    return {p.untyped_storage().data_ptr() for model in bench.models for p in model.parameters()}


def report(title: str, seconds: dict[str, float], ours: str, memory: dict[str, int]) -> None:
    print(f"  {title}")
    for name in seconds | memory:
        line = f"    {name:<22}"
        if name in seconds:
            line += f"{seconds[name]:>8.2f} s  {seconds[name] / seconds[ours]:>6.2f} x"
        if name in memory:
            line += f"  {memory[name] / 2**20:>8.0f} MiB kept for the backward pass"
        print(line, flush=True)


def machine() -> str:
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def numbers(count: int):
    def parse(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split("/"))
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers with / between them")
        return values

    return parse


BENCHMARKS = {"pairs": bench_pairs, "lists": bench_lists, "memory": bench_memory, "scaling": bench_scaling}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--shape", choices=SHAPES, default="7b" if ON_GPU else "135m", help="shape of the random Llama")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps; the median is reported")
    parser.add_argument(
        "--lengths", type=numbers(2), nargs="+", metavar="PROMPT/COMPLETION", help="for pairs and memory"
    )
    parser.add_argument("--lists", type=numbers(3), nargs="+", metavar="P/C/SIZE", help="tokens and size, for lists")
    parser.add_argument("--lora", action="store_true", help="train an adapter; the reference is the model without it")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="add the results to this JSON file")
    options = parser.parse_args(argv)
    disable_progress_bars()
    bench = Bench(options)
    head = {"date": date.today().isoformat(), "machine": machine(), "shape": options.shape, "steps": options.steps}
    print(", ".join(f"{name}: {value}" for name, value in head.items()))
    results = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    for name in options.what:
        print(BENCHMARKS[name].__doc__)
        results[name] = head | {"results": BENCHMARKS[name](bench)}
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
