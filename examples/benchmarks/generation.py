"""
Sampling speed in tokens per second: a plain loop of `model.generate` and `generate_completions`, with equal batch size.

    python examples/quickstart/get_model.py
    python examples/benchmarks/generation.py --model outputs/SmolLM2-135M-Instruct

The prompts are those of the quickstart; every second one starts with a passage of random length. Both sample the same
number of completions at temperature 1, with the same dtype, alternately in one process. Tokens are counted up to the
end token, without padding.
"""

import argparse
import json
import platform
import random
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo.generation.in_process import encode_prompt, end_token_ids, generate_completions
from trl_larpo.generation.sampler import generation_dtype

PROMPTS = Path(__file__).parents[1] / "quickstart" / "prompts.jsonl"


def mixed_prompts(count: int, longest: int) -> list[list[dict]]:
    """Conversations; every second one has a passage of up to `longest` words before its question."""
    rng = random.Random(0)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    words = [word for prompt in prompts for word in prompt[-1]["content"].split()]
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    for i in range(0, count, 2):
        passage = " ".join(rng.choice(words) for _ in range(rng.randint(10, longest)))
        question = {"role": "user", "content": f"{passage}\n\n{chosen[i][-1]['content']}"}
        chosen[i] = [*chosen[i][:-1], question]
    return chosen


def plain_loop(model, tokenizer, prompts, options) -> list[int]:
    """Number of tokens of each completion; prompts are processed in order, batch by batch."""
    end_ids = end_token_ids(model.generation_config, tokenizer)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(options.num_samples)]
    lengths = []
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=options.max_new_tokens,
            eos_token_id=sorted(end_ids), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for ids in output[:, inputs["input_ids"].size(1) :].tolist():
            lengths.append(next((n + 1 for n, token in enumerate(ids) if token in end_ids), len(ids)))
    return lengths


def ours(model, tokenizer, prompts, options) -> list[int]:
    samples = generate_completions(
        model,
        tokenizer,
        prompts,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return [sample.num_tokens for of_prompt in samples for sample in of_prompt]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--longest", type=int, default=200, help="maximum length of a passage, in words")
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = generation_dtype(options.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    prompts = mixed_prompts(options.prompts, options.longest)
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {dtype}\n{len(prompts)} prompts of "
        f"{min(lengths)} to {max(lengths)} tokens × {options.num_samples} samples, batch {options.batch_size}, at most "
        f"{options.max_new_tokens} new tokens"
    )
    rates = {"generate": [], "trl-larpo": []}
    means = {}
    torch.manual_seed(options.seed)
    for repeat in range(options.repeats):
        options.seed = repeat
        for name, side in (("generate", plain_loop), ("trl-larpo", ours)):
            start = time.perf_counter()
            num_tokens = side(model, tokenizer, prompts, options)
            rates[name].append(sum(num_tokens) / (time.perf_counter() - start))
            means.setdefault(name, []).append(statistics.fmean(num_tokens))
    result = {
        name: {"tokens_per_second": statistics.median(rates[name]), "mean_length": statistics.fmean(means[name])}
        for name in rates
    }
    for name, values in result.items():
        print(f"  {name:10} {values['tokens_per_second']:8.0f} tokens/s, {values['mean_length']:.1f} tokens each")
    result["ratio"] = result["trl-larpo"]["tokens_per_second"] / result["generate"]["tokens_per_second"]
    print(f"  ratio      {result['ratio']:8.2f}")
    return result


if __name__ == "__main__":
    main()
