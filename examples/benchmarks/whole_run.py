"""
Time of each stage of a `larpo run`: seconds, share of the total, and how much of it loads models and starts processes.

    larpo run --config examples/quickstart/quickstart.yaml
    python examples/benchmarks/whole_run.py outputs/quickstart
    python examples/benchmarks/whole_run.py outputs/quickstart --floor

`--floor` measures on this machine what the work alone would take: sampling as fast as the sampler fills one batch after
the other, one forward pass over the lists for the reference, forward and backward passes for the training, at the speed
of a product of large matrices. Nothing else should be running. If a stage was interrupted and resumed, only the time of
its last part counts.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl_larpo.iterations import iteration_folders
from trl_larpo.storage import iter_jsonl, read_jsonl, read_yaml

SAMPLING, TRAINING = ("generate", "held_out_samples"), ("reference", "train")
STAGES = {
    "generate": "samples to train on",
    "reward": "their rewards",
    "select": "lists of them",
    "reference": "log-probabilities under the reference",
    "train": "training",
    "held_out_samples": "samples of held-out prompts",
    "held_out": "their rewards",
    "evaluate": "the divergence from the start",
}
"""What they do, in the order of an iteration."""

BATCHES = 2  # to measure the sampler by


@dataclass
class Work:
    """What a run has computed: completions and their tokens by stage of sampling, and the lists."""

    samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SAMPLING, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SAMPLING, 0))
    lists: int = 0
    candidates: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--floor", action="store_true", help="measure what the work alone would take; needs the model")
    arguments = parser.parse_args(argv)
    run = Path(arguments.run)
    seconds, loading = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for entry in read_jsonl(run / "timings.jsonl"):
        seconds[entry["stage"]] += entry["seconds"]
        loading[entry["stage"]] += entry["seconds"] - entry.get("work", entry["seconds"])
    if not any(seconds.values()):
        parser.error(f"no stage of {run} is finished yet")
    tokenizer = None
    if arguments.floor:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(read_yaml(run / "run.yaml")["model_name_or_path"])
    work = count_work(run, tokenizer)
    floors = measure_floors(run, work, tokenizer) if arguments.floor else {}
    print_table(seconds, loading, floors, work)
    return {"seconds": seconds, "loading": loading, "floors": floors, "lists": work.lists} | {
        "samples": work.samples["generate"]
    }


def count_work(run: Path, tokenizer=None) -> Work:
    """Prompts' tokens are counted with the tokenizer."""
    work = Work()
    for folder in iteration_folders(run).values():
        for stage, name in (("generate", "samples.jsonl"), ("held_out_samples", "held_out_samples.jsonl")):
            for row in iter_jsonl(folder / name) if (folder / name).exists() else []:
                work.samples[stage] += len(row["completions"])
                work.tokens[stage] += _num_tokens(row)
        for row in iter_jsonl(folder / "lists.jsonl") if (folder / "lists.jsonl").exists() else []:
            if len(row["completions"]) > 1 and row.get("problem") is None:
                work.lists += 1
                work.candidates += len(row["completions"])
                work.completion_tokens += _num_tokens(row)
                work.prompt_tokens += 0 if tokenizer is None else len(_token_ids(tokenizer, row["prompt"]))
    return work


def measure_floors(run: Path, work: Work, tokenizer) -> dict[str, float]:
    """Seconds of the stages that sample and train, by name."""
    import torch
    from training_step import ON_GPU, matrix_product_flops
    from transformers import AutoModelForCausalLM

    options = read_yaml(run / "run.yaml")
    precision = torch.bfloat16 if options["bf16"] else torch.float16 if options["fp16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=precision)
    head = model.get_output_embeddings().weight.numel()
    embeddings = 0 if model.config.get_text_config().tie_word_embeddings else head
    body = sum(weights.numel() for weights in model.parameters()) - head - embeddings
    # The head has to see the tokens of completions alone
    forward = 2 * (body * (work.prompt_tokens + work.completion_tokens) + head * work.completion_tokens)
    forward /= matrix_product_flops(precision if ON_GPU else torch.float32)
    # Forward and backward, which with frozen weights needs only the gradients of what goes through them
    passes = (2 if options["use_peft"] else 3) + bool(options["gradient_checkpointing"])
    floors = {"reference": forward, "train": passes * options["num_train_epochs"] * forward}
    if not (options["server_command"] or options["server_urls"]):  # they are gone
        rate = sampling_rate(model, tokenizer, run, options)
        floors |= {stage: work.tokens[stage] / rate for stage in SAMPLING}
    return floors


def sampling_rate(model, tokenizer, run: Path, options: dict) -> float:
    """Tokens per second of the sampler in this process, on the run's own prompts."""
    from trl_larpo.generation.in_process import generate_completions
    from trl_larpo.generation.sampler import device_of, generation_dtype

    device = device_of(options["use_cpu"])
    model = model.to(device, generation_dtype(options["generation_dtype"], device)).eval()
    rows = read_jsonl(run / "iteration_1/samples.jsonl")
    batch, num_samples = options["generation_batch_size"], options["num_samples"]
    prompts = [row["prompt"] for row in rows][: max(1, BATCHES * batch // num_samples)]
    settings = {"num_samples": num_samples, "max_new_tokens": options["max_new_tokens"], "batch_size": batch}
    generate_completions(model, tokenizer, prompts[:1], **settings | {"max_new_tokens": 4})  # the first call is slow
    started = time.monotonic()
    samples = generate_completions(model, tokenizer, prompts, **settings)
    return sum(len(sample.token_ids) for of_prompt in samples for sample in of_prompt) / (time.monotonic() - started)


def print_table(seconds: dict[str, float], loading: dict[str, float], floors: dict[str, float], work: Work) -> None:
    what = dict(STAGES)
    for stage in SAMPLING:
        count, rate = work.samples[stage], _rate(work.tokens[stage], seconds[stage] - loading[stage])
        what[stage] = f"{count} {STAGES[stage]}, {rate} tokens/s without loading"
    what["reference"] = f"{_rate(work.candidates, seconds['reference'] - loading['reference'])} candidates/s"
    what["train"] = f"{work.lists} lists in each epoch"
    total = sum(seconds.values())
    print(f"  {'':16} {'time':>10} {'share':>6} {'loading':>10} {'floor':>10}")
    for stage in STAGES:
        floor = f"{floors[stage]:8.1f} s" if stage in floors else " " * 10
        share = seconds[stage] / total
        print(f"  {stage:16} {seconds[stage]:8.1f} s {share:6.1%} {loading[stage]:8.1f} s {floor}   {what[stage]}")
    print(f"  {'in all':16} {total:8.1f} s {1:6.0%} {sum(loading.values()):8.1f} s", end="")
    print(f" {sum(floors.values()):8.1f} s" if floors else "")
    neither = total - sum(seconds[stage] - loading[stage] for stage in SAMPLING + TRAINING)
    print(f"  {neither / total:.1%} of the time is neither sampling nor training, but loading and all other stages.")


def _num_tokens(row: dict) -> int:
    return sum(about["num_tokens"] or 0 for about in row["candidates"])


def _token_ids(tokenizer, prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.2f}" if seconds > 0 else "–"


if __name__ == "__main__":
    main()
