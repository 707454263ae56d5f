"""
Puts the results into the docs: tables into README.md and docs/evidence.md, pictures into docs/images/.

    python examples/studies/lists_vs_pairs/publish.py

A table stands between two comments, `<!-- results: arms four_rules -->` and `<!-- end of results -->`, and is replaced
as a whole. The first word is a kind of table, the second one a task or a claim. Tables of a pilot name its folder in
`results/`: `pilots/constant/arms`.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import claims
import figures
from arms import ARMS, BASELINE
from effects import GOAL, MIN_SEEDS
from results import Results
from study import HERE

DOCS = HERE.parents[2] / "docs"
PAGES = (HERE / "README.md", DOCS / "evidence.md")

PILOTS = {
    "constant": "constant, 1 epoch",
    "constant_after_warmup": "constant after warm-up, 1 epoch",
    "cosine_1_epoch": "cosine after warm-up, 1 epoch",
    "cosine_batches_of_1": "the same, batches of one list",
    "cosine_2_epochs": "cosine after warm-up, 2 epochs",
}
"""Schedules that were tried before the study, by the folder of their results in `results/pilots/`."""

PILOT_ARMS = (BASELINE, "contrastive", "listmle", "lambdarank", "lambdarank_sums")

PILOT_SEEDS = 2
"""How many seeds the pilots tried learning rates with, where they tried them with all."""

_TABLE = re.compile(r"(<!-- results: (?:([\w/]+)/)?(\w+) (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.strip().split("\n")[0]).parse_args()
    results = Results(HERE / "results")
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"Tables: {path}")
    for path in draw(results, DOCS / "images"):
        print(f"Picture: {path}")


def filled(page: str, results: Results) -> str:
    """The page with all of its tables replaced by those of the results."""

    def replaced(match: re.Match[str]) -> str:
        start, folder, kind, about, end = match.groups()
        found = Results(results.folder / folder) if folder else results
        lines = TABLES[kind](found, about) or ["Not run yet."]
        return "\n".join([start, *lines, "", end])

    return _TABLE.sub(replaced, page)


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws what there are results of: a picture for each task and pilot, and one for the other claims."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    pilots = {f"_{name}": (Results(results.folder / "pilots" / name), f"; {label}") for name, label in PILOTS.items()}
    for suffix, (found, label) in {"": (results, ""), **pilots}.items():
        for task in found.tasks():
            if len(found.seeds(task, BASELINE)) >= MIN_SEEDS:
                pictures.append(folder / f"lists_vs_pairs_{task}{suffix}.png")
                figures.draw_arms(found, task, pictures[-1], f"{task}, equal samples{label}")
    if any(claims.effect_of(results, claim, name) for claim, names in claims.CLAIMS.items() for name in names):
        pictures.append(folder / "lists_vs_pairs_claims.png")
        figures.draw_claims(results, pictures[-1])
    return pictures


def tuning_table(results: Results, task: str) -> list[str]:
    return results.tuning_table(task) if task in results.tuned_tasks() else []


def arms_table(results: Results, task: str) -> list[str]:
    return results.table(task) if task in results.tasks() else []


def seeds_table(results: Results, task: str) -> list[str]:
    return results.seeds_table(task) if task in results.tasks() else []


def effects_table(results: Results, task: str) -> list[str]:
    """What each arm earns over best against worst, by seed and on average, and how many seeds would tell it exactly."""
    lines = []
    for arm in results.arms(task):
        found = results.effect(task, arm)
        if found is not None and found.num_seeds >= MIN_SEEDS:
            needed = results.seeds_needed(task, arm) or "–"
            lines.append(f"{_by_seed(results, task, arm)} | {found} | {found.verdict} | {needed} |")
    head = [
        f"| | over {ARMS[BASELINE].label}, by seed | mean and interval | | seeds for ± {GOAL} |",
        "|---|---|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def screened_table(results: Results, task: str) -> list[str]:
    """The same of the arms with too few seeds for an interval."""
    lines = []
    for arm in results.arms(task):
        found = results.effect(task, arm)
        if found is not None and found.num_seeds < MIN_SEEDS:
            lines.append(f"{_by_seed(results, task, arm)} | {found} |")
    return [f"| | over {ARMS[BASELINE].label}, by seed | mean |", "|---|---|---|", *lines] if lines else []


def _by_seed(results: Results, task: str, arm: str) -> str:
    of_seeds = ", ".join(f"{value:+.2f}" for value in results.differences(task, arm).mean(axis=1))
    return f"| {ARMS[arm].label} | {of_seeds}"


def more_steps_table(results: Results, task: str) -> list[str]:
    """What lists earn over the arms of pairs that train on about as many tokens, in three times the steps."""
    others = [arm for arm in ("nested_pairs", "best_worst_3_epochs") if arm in results.arms(task)]
    lines = []
    for arm in results.arms(task):
        effects = [results.effect(task, arm, other) for other in others]
        if ARMS[arm].group == "lists" and any(found and found.num_seeds >= MIN_SEEDS for found in effects):
            cells = [f"{found} | {found.verdict}" if found else " | " for found in effects]
            lines.append(f"| {ARMS[arm].label} | {' | '.join(cells)} |")
    head = f"| | {' | '.join(f'over {ARMS[arm].label} |' for arm in others)} |"
    return [head, "|---" * (2 * len(others) + 1) + "|", *lines] if lines else []


def pilots_table(results: Results, task: str) -> list[str]:
    """The best mean reward of each arm on the prompts for tuning, over rates that were tried with all seeds."""
    lines = []
    for folder, label in PILOTS.items():
        cells = []
        for arm in PILOT_ARMS:
            found = Results(results.folder / "pilots" / folder).tuning(task, arm)
            means = {rate: fmean(of_seeds) for rate, of_seeds in found.items() if len(of_seeds) == PILOT_SEEDS}
            best = max(means, key=means.__getitem__, default=None)
            shown = best and f"{means[best]:.3f} ({', '.join(f'{reward:.2f}' for reward in found[best])}; {best:g})"
            cells.append(shown or "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    head = f"| | {' | '.join(ARMS[arm].label for arm in PILOT_ARMS)} |"
    return [head, "|---" * (len(PILOT_ARMS) + 1) + "|", *lines]


def claim_table(results: Results, claim: str) -> list[str]:
    return claims.table(results, claim) if any(map(results.claims, claims.CLAIMS[claim])) else []


TABLES: dict[str, Callable[[Results, str], list[str]]] = {
    "tuning": tuning_table,
    "arms": arms_table,
    "seeds": seeds_table,
    "pilots": pilots_table,
    "effects": effects_table,
    "screened": screened_table,
    "more_steps": more_steps_table,
    "claim": claim_table,
}


if __name__ == "__main__":
    main()
