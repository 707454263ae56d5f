"""
Plots the results of training_step.py.

    python examples/benchmarks/plot.py RESULTS.json PICTURE.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

COLORS = {
    "DPOTrainer": "#b8b8b8",
    "DPOTrainer, all pairs": "#b8b8b8",
    "separate": "#f2a65a",
    "shared": "#2a6f97",
    "LarPOTrainer": "#2a6f97",
    "whole": "#f2a65a",
    "chunks of 2": "#2a6f97",
}


def main(source: str, picture: str) -> None:
    results = json.loads(Path(source).read_text())
    figure, (bars, memory, scaling) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    figure.suptitle(f"{results['lists']['machine']}, Llama of {results['lists']['shape']}", fontsize=10)

    labels, position, seen = [], 0, set()
    for entry in results["pairs"]["results"] + results["lists"]["results"]:
        for name, seconds in sorted(entry["seconds"].items(), key=lambda item: -item[1]):
            label = name.removesuffix(", all pairs").replace("LarPOTrainer", "shared")
            bars.barh(position, seconds, color=COLORS[name], label=None if label in seen else label)
            bars.text(seconds, position, f" {seconds:.1f} s", va="center", fontsize=8)
            seen.add(label)
            what = "pair" if entry["list_size"] == 2 else f"list of {entry['list_size']}"
            labels.append((position, f"{what}, {entry['prompt']}/{entry['completion']}"))
            position += 1
        position += 0.6
    bars.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=8)
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.set_xlim(right=bars.get_xlim()[1] * 2)
    bars.set(title="Time of a step (prompt/completion tokens)", xlabel="seconds")
    bars.legend(fontsize=8)

    entries = results["memory"]["results"]
    for name in entries[0]["kept_bytes"]:
        sizes, mebibytes = zip(*((e["list_size"], e["kept_bytes"][name] / 2**20) for e in entries), strict=True)
        memory.plot(sizes, mebibytes, "o-", color=COLORS[name], label=name)
    memory.set(title="Kept for the backward pass", xlabel="list size", ylabel="MiB", ylim=(0, None))
    memory.legend(fontsize=8)

    points = results["scaling"]["results"]
    scaling.loglog([p["tokens"] for p in points], [p["seconds"] for p in points], "o", color=COLORS["shared"])
    for axis in (scaling.xaxis, scaling.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    scaling.set(title="Time of a step", xlabel="distinct tokens", ylabel="seconds")
    for axes in (bars, memory, scaling):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
