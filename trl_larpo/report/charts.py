"""The pictures of a run."""

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from ..storage import finish, partial_path
from .statistics import bin_edges

Row = dict[str, Any]
Colors = tuple[list[str], str, str]

# Colours of lines, text and axes in the pictures. In the SVG they are stand-ins, for which the page puts its own, light
# or dark; in the PNG the light ones
_STAND_INS: Colors = ([f"#00000{i}" for i in range(1, 7)], "#000007", "#000008")

_OF_PAGE: Colors = ([f"var(--c{i})" for i in range(1, 7)], "var(--text)", "var(--line)")

_LIGHT: Colors = (["#2a6f97", "#d1793b", "#5b8c5a", "#8d5a97", "#a08a2c", "#667085"], "#1c2430", "#d5d9e0")


_MAX_COLORS = 6
_COLORS = [f"C{i}" for i in range(_MAX_COLORS)]

_MAX_TICKS = 12

_ITERATION = r"iteration (\d+)"  # a source of candidates
_AGES = ("this iteration", "the one before", "older ones")


def draw(iterations: dict[int, Row], folder: Path | None) -> list[str]:
    """
    Draws all pictures.

    Args:
        iterations: From the run folder.
        folder: Where they are saved as PNG; `None`: nowhere.

    Returns:
        The same pictures as SVG, in the colours of the page.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, draw_one in _PICTURES.items():
        svg = io.StringIO()
        if _draw_to(svg, draw_one, iterations, _STAND_INS, format="svg", transparent=True, metadata={"Date": None}):
            pictures.append(_as_page_svg(svg.getvalue()))
            if folder is not None:
                partial = partial_path(folder / f"{name}.png")
                _draw_to(partial, draw_one, iterations, _LIGHT, format="png", dpi=150, facecolor="white")
                finish(partial, folder / f"{name}.png")
    return pictures


def _draw_to(target, draw_one: Callable, iterations: dict[int, Row], colors: Colors, **options) -> bool:
    """Draws one picture in some colours; `False` if there is nothing to draw."""
    lines, text, faint = colors
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "larpo", "font.size": 10, "axes.titlesize": 11, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": faint, "axes.labelcolor": text,
        "text.color": text, "xtick.color": faint, "ytick.color": faint, "xtick.labelcolor": text,
        "ytick.labelcolor": text, "axes.prop_cycle": cycler(color=lines), "legend.labelcolor": "linecolor",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        if draw_one(figure.add_subplot(), iterations) is False:
            return False
        figure.savefig(target, **options)
    return True


def _as_page_svg(svg: str) -> str:
    """The picture as a part of the page: as wide as there is room, in the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for stand_in, color in zip(_flat(_STAND_INS), _flat(_OF_PAGE), strict=True):
        svg = svg.replace(stand_in, color)
    return svg


def _flat(colors: Colors) -> list[str]:
    lines, text, faint = colors
    return [*lines, text, faint]


def _labels(axes, numbers: list[int]) -> None:
    shown = numbers[:: math.ceil(len(numbers) / _MAX_TICKS) or 1]
    axes.set_xticks(shown, ["start" if number == 0 else str(number) for number in shown])
    axes.set_xlabel("iteration")


def _evenly_spread(numbers: list[int]) -> list[int]:
    """Iterations to show where each has a colour of its own: all, or the first, the last and some between them."""
    if len(numbers) <= _MAX_COLORS:
        return numbers
    return [numbers[round(i * (len(numbers) - 1) / (_MAX_COLORS - 1))] for i in range(_MAX_COLORS)]


def _of_all(shown: list[int], numbers: list[int]) -> str:
    """What a title says where not all iterations are shown."""
    return "" if len(shown) == len(numbers) else f" ({len(shown)} of {len(numbers)} iterations)"


def _held_out_reward(axes, iterations: dict[int, Row]) -> None:
    known = {
        number: found["evaluation"]["reward"]
        for number, found in iterations.items()
        if found["evaluation"]["reward"]["mean"] is not None
    }
    axes.errorbar(
        list(known), [x["mean"] for x in known.values()], [x["standard_error"] or 0 for x in known.values()],
        marker="o", capsize=4, color="C0",
    )  # fmt: skip
    _labels(axes, list(known))
    axes.set_title("Held-out reward, ± standard error")


def _monitor_points(iterations: dict[int, Row]) -> list[list[tuple[int, Row]]]:
    """For each iteration, its monitored points and their steps, counted over all iterations."""
    of_iterations, before = [], 0
    for found in iterations.values():
        points = found["monitor"]["points"] if "monitor" in found else []
        steps = [x["step"] for x in [*points, *found.get("training_log", [])] if "step" in x]
        of_iterations.append([(before + point["step"], point) for point in points])
        before += max(steps, default=0)
    return [points for points in of_iterations if len(points) > 1]


def _monitor_reward(axes, iterations: dict[int, Row]):
    of_iterations = _monitor_points(iterations)
    for points in of_iterations:
        known = [(step, x["reward"]) for step, x in points if x["reward"]["mean"] is not None]
        steps, rewards = [step for step, _ in known], [reward for _, reward in known]
        errors = [reward["standard_error"] or 0 for reward in rewards]
        axes.errorbar(steps, [reward["mean"] for reward in rewards], errors, marker="o", capsize=4, color="C0")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("training step, over all iterations")
    axes.set_title("Held-out reward during training, ± standard error")
    return bool(of_iterations)


def _monitor_answers(axes, iterations: dict[int, Row]):
    of_iterations = _monitor_points(iterations)
    most = max((x["tokens"] or 0 for points in of_iterations for _, x in points), default=0)
    for number, points in enumerate(of_iterations):
        steps = [step for step, _ in points]
        ending, length = ("end on their own", f"mean tokens / {most:.0f}") if number == 0 else (None, None)
        axes.plot(steps, [x["finished"] for _, x in points], marker="o", color="C0", label=ending)
        if most:
            lengths = [math.nan if x["tokens"] is None else x["tokens"] / most for _, x in points]
            axes.plot(steps, lengths, marker="s", color="C1", label=length)
    if not of_iterations:
        return False
    axes.set_ylim(0, 1.05)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("training step, over all iterations")
    axes.set_title("Held-out answers during training")
    axes.legend(loc="lower left")


def _best_of_n(axes, iterations: dict[int, Row]):
    curves = {number: found["evaluation"]["best_of_n"] for number, found in iterations.items()}
    if all(len(curve) < 2 for curve in curves.values()):
        return False
    shown = _evenly_spread(list(curves))
    for color, number in zip(_COLORS, shown, strict=False):
        label = "start" if number == 0 else f"iteration {number}"
        axes.plot(range(1, len(curves[number]) + 1), curves[number], marker="o", label=label, color=color)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("samples N")
    axes.set_title(f"Best of N on held-out prompts{_of_all(shown, list(curves))}")
    axes.legend()


def _reward_distribution(axes, iterations: dict[int, Row]):
    found = {n: x["statistics"]["rewards"] for n, x in iterations.items() if "rewards" in x["statistics"]}
    if not found:
        return False
    low, high = min(x["low"] for x in found.values()), max(x["high"] for x in found.values())
    edges = bin_edges(low, high, 20)
    shown = _evenly_spread(list(found))
    for color, number in zip(_COLORS, shown, strict=False):
        x = found[number]
        # Each fine bin counts where its middle is, and the outer ones at the ends, where the rewards of 0 and 1 are
        middles = np.linspace(x["low"], x["high"], len(x["counts"]))
        weights = np.array(x["counts"]) / sum(x["counts"])
        axes.hist(
            middles, edges, weights=weights, histtype="step", linewidth=1.8, label=f"iteration {number}", color=color
        )
    axes.set_xlabel("reward")
    axes.set_ylabel("share of samples")
    axes.set_title(f"Rewards of the training samples{_of_all(shown, list(found))}")
    axes.legend()


def _lengths(axes, iterations: dict[int, Row]) -> None:
    numbers = [n for n, found in iterations.items() if found["evaluation"]["tokens"] is not None]
    axes.plot(
        numbers, [iterations[n]["evaluation"]["tokens"] for n in numbers], marker="o", color="C0", label="held out"
    )
    known = {n: found["statistics"].get("tokens") for n, found in iterations.items()}
    means = {n: mean for n, mean in known.items() if mean is not None}
    axes.plot(list(means), list(means.values()), marker="s", color="C1", label="training samples")
    _labels(axes, list(iterations))
    axes.set_ylim(bottom=0)
    axes.set_title("Tokens per answer")
    axes.legend()


def _ranking_metrics(axes, iterations: dict[int, Row]):
    step = 0
    drawn: dict[str, tuple[list[float], list[float]]] = {"ranking/ndcg": ([], []), "ranking/accuracy": ([], [])}
    for found in iterations.values():
        entries = [entry for entry in found.get("training_log", []) if "ranking/ndcg" in entry]
        for entry in entries:
            for name, (steps, values) in drawn.items():
                if name in entry:
                    steps.append(step + entry["step"])
                    values.append(entry[name])
        if entries:
            step += entries[-1]["step"]
            axes.axvline(step, color=matplotlib.rcParams["axes.edgecolor"], linewidth=1)
    if step == 0:
        return False
    for (steps, values), color, label in zip(drawn.values(), _COLORS, ("NDCG", "pairs ranked right"), strict=False):
        axes.plot(steps, values, label=label, color=color)
    axes.set_xlabel("training step, over all iterations")
    axes.set_title("How the policy ranks its training lists")
    axes.legend()


def _sources(axes, iterations: dict[int, Row]):
    counts = {n: Counter(x["statistics"]["sources"]) for n, x in iterations.items() if "sources" in x["statistics"]}
    if not counts:
        return False
    counts = _few_kinds(counts)
    kinds = sorted({kind for counter in counts.values() for kind in counter}, key=_in_order)
    below = dict.fromkeys(counts, 0)
    for color, kind in zip(itertools.cycle(_COLORS), kinds, strict=False):
        heights = [counter[kind] for counter in counts.values()]
        axes.bar(list(counts), heights, 0.6, bottom=list(below.values()), label=kind, color=color)
        below = {number: below[number] + counter[kind] for number, counter in counts.items()}
    _labels(axes, list(counts))
    axes.set_ylim(top=1.4 * max(below.values()))
    axes.set_title("Where the candidates of the lists come from")
    axes.legend(ncols=2)


def _few_kinds(counts: dict[int, Counter[str]]) -> dict[int, Counter[str]]:
    """Sources of candidates, those of many iterations as seen from the iteration of the list."""
    if len({kind for counter in counts.values() for kind in counter}) <= _MAX_COLORS:
        return counts
    few: dict[int, Counter[str]] = {}
    for number, counter in counts.items():
        few[number] = Counter()
        for kind, count in counter.items():
            match = re.fullmatch(_ITERATION, kind)
            age = None if match is None else number - int(match[1])
            name = kind if age is None else _AGES[min(age, len(_AGES) - 1)]
            few[number][name] += count
    return few


def _in_order(kind: str) -> tuple[bool, int, str]:
    """Iterations in their order, then the others."""
    match = re.fullmatch(_ITERATION, kind)
    place = int(match[1]) if match else _AGES.index(kind) if kind in _AGES else 0
    return match is None and kind not in _AGES, place, kind


def _list_sizes(axes, iterations: dict[int, Row]):
    sizes = {n: dict(x["statistics"]["sizes"]) for n, x in iterations.items() if "sizes" in x["statistics"]}
    if not any(sizes.values()):
        return False
    shown = _evenly_spread(list(sizes))
    width = 0.8 / len(shown)
    for place, (color, number) in enumerate(zip(_COLORS, shown, strict=False)):
        positions = [size + (place - (len(shown) - 1) / 2) * width for size in sizes[number]]
        axes.bar(positions, list(sizes[number].values()), width, label=f"iteration {number}", color=color)
    occurring = sorted({size for number in shown for size in sizes[number]})
    if len(occurring) <= _MAX_TICKS:
        axes.set_xticks(occurring)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(occurring[0] - 1, occurring[-1] + 1)
    axes.set_ylim(top=1.4 * max(count for number in shown for count in sizes[number].values()))
    axes.set_xlabel("candidates in a list")
    axes.set_ylabel("lists")
    axes.set_title(f"List sizes{_of_all(shown, list(sizes))}")
    axes.legend(ncols=2)


_PICTURES = {
    "held_out_reward": _held_out_reward,
    "monitor_reward": _monitor_reward,
    "monitor_answers": _monitor_answers,
    "best_of_n": _best_of_n,
    "reward_distribution": _reward_distribution,
    "tokens": _lengths,
    "ranking_metrics": _ranking_metrics,
    "sources": _sources,
    "list_sizes": _list_sizes,
}
