"""Pictures of effects with their intervals: of all arms on a task, and of the runs that each claim compares."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import ARMS, BASELINE
from claims import CLAIMS, effect_of
from effects import GOAL, MIN_SEEDS, Effect
from matplotlib.axes import Axes
from results import Results

COLORS = {"pairs": "#f2a65a", "lists": "#2a6f97", "options": "#7a7a7a"}


def draw_arms(results: Results, task: str, picture: Path, title: str) -> None:
    """Effects on the reward, grouped as in the table, each group from the largest to the smallest."""
    found = {arm: effect for arm in results.arms(task) if (effect := results.effect(task, arm)) is not None}
    order = sorted(found, key=lambda arm: ([*COLORS].index(ARMS[arm].group), -found[arm].mean))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(order)), layout="constrained")
    _draw(axes, [(ARMS[arm].label, found[arm], COLORS[ARMS[arm].group]) for arm in order])
    axes.axvspan(-GOAL, GOAL, color="#eeeeee", zorder=0)
    axes.set_xlabel(f"held-out reward over {ARMS[BASELINE].label} (95 % interval; number of seeds)")
    for group in dict.fromkeys(ARMS[arm].group for arm in order):
        axes.plot([], [], "o", color=COLORS[group], label=group)
    figure.legend(fontsize=8, loc="outside right upper")
    axes.set_title(title, fontsize=10)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_claims(results: Results, picture: Path) -> None:
    """A panel for each claim: differences from its first run."""
    panels = {}
    for claim, names in CLAIMS.items():
        effects = [(label, effect_of(results, claim, name), COLORS["lists"]) for name, label in names.items()]
        if known := [entry for entry in effects if entry[1] is not None]:
            panels[claim] = known
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.9 * len(panels) + 0.28 * sum(map(len, panels.values()))), layout="constrained",
        sharex=True, squeeze=False, height_ratios=[1 + len(entries) for entries in panels.values()],
    )  # fmt: skip
    for (claim, entries), axes in zip(panels.items(), all_axes[:, 0], strict=True):
        _draw(axes, entries)
        first = next(iter(CLAIMS[claim].values()))
        axes.set_title(f"{claim.replace('_', ' ')}, against: {first}", fontsize=9, loc="left")
    all_axes[-1, 0].set_xlabel("difference in held-out reward (95 % interval; number of seeds)")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _draw(axes: Axes, entries: list[tuple[str, Effect, str]]) -> None:
    for place, (_, effect, color) in enumerate(entries):
        ends = [effect.low, effect.high] if effect.num_seeds >= MIN_SEEDS else [effect.mean, effect.mean]
        axes.plot(ends, [place, place], color=color)
        axes.plot(effect.mean, place, "o", color=color)
        axes.annotate(f"  {effect.num_seeds}", (ends[1], place), va="center", fontsize=7, color="#555555")
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [label for label, *_ in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
