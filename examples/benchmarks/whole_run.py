"""
Time of each stage of a `larpo run`: seconds and share of the total, samples and lists per second.

    larpo run --config examples/quickstart/quickstart.yaml
    python examples/benchmarks/whole_run.py outputs/quickstart

If a stage was interrupted and resumed, only the time of its last part counts.
"""

import argparse
from pathlib import Path

from trl_larpo.storage import read_json, read_jsonl

STAGES = ("generate", "reward", "select", "reference", "train", "held_out_samples", "held_out", "evaluate")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", help="folder of a run")
    run = Path(parser.parse_args(argv).run)
    seconds = dict.fromkeys(STAGES, 0.0)
    for entry in read_jsonl(run / "timings.jsonl"):
        seconds[entry["stage"]] += entry["seconds"]
    samples = tokens = rewards = lists = candidates = 0
    for folder in sorted(run.glob("iteration_*")):
        for name in ("samples.jsonl", "held_out.jsonl"):
            for row in read_jsonl(folder / name) if (folder / name).exists() else []:
                if name == "samples.jsonl":
                    samples += len(row["completions"])
                    tokens += sum(about["num_tokens"] or 0 for about in row["candidates"])
                rewards += len(row["completions"])
        if (folder / "selection.json").exists():
            selection = read_json(folder / "selection.json")
            lists, candidates = lists + selection["lists"], candidates + selection["candidates"]

    total = sum(seconds.values())
    what = {
        "generate": f"{samples} samples, {_rate(samples, seconds['generate'])} samples/s, "
        f"{_rate(tokens, seconds['generate'])} tokens/s",
        "reward": f"{rewards} rewards, with those of held-out prompts, whose time falls under held_out",
        "reference": f"{candidates} candidates, {_rate(candidates, seconds['reference'])} candidates/s",
        "train": f"{lists} lists, {_rate(lists, seconds['train'])} lists/s",
        "held_out_samples": "samples of held-out prompts",
        "held_out": "their rewards",
        "evaluate": "the divergence from the start",
    }
    for stage in STAGES:
        print(f"  {stage:10} {seconds[stage]:8.1f} s {seconds[stage] / total:6.1%}   {what.get(stage, '')}")
    print(f"  {'in all':10} {total:8.1f} s")
    return {"seconds": seconds, "samples": samples, "lists": lists, "candidates": candidates}


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.2f}" if seconds > 0 else "–"


if __name__ == "__main__":
    main()
