"""
Writes docs/api.md from the docstrings of the public names.

    python docs/make_api.py
"""

import importlib
import inspect
import re
from pathlib import Path

PUBLIC = {
    "trl_larpo": ["LarPOTrainer", "LarPOConfig", "LarPOError", "ConfigError", "DataError"],
    "trl_larpo.losses": [
        "RANKING_LOSSES", "pairwise_loss", "contrastive_loss", "lambdarank_loss", "ndcg_lambda_weight", "listmle_loss",
        "listnet_loss", "approx_ndcg_loss",
    ],
    "trl_larpo.metrics": [
        "ndcg", "mrr", "kendall_tau", "pair_accuracy", "recall_at_n", "best_of_n_accuracy", "majority_accuracy",
        "bootstrap_interval",
    ],
    "trl_larpo.candidates": ["Candidate", "Selection", "SelectionCounts", "build_list", "build_lists"],
    "trl_larpo.rewards.verifiers": [
        "verifiable_instruction_reward", "verifiable_instructions_reward", "is_repetitive", "gsm8k_reward",
        "math_reward",
    ],
    "trl_larpo.rewards.functions": ["load_rewards", "score_rows", "win_rates"],
    "trl_larpo.rewards.reward_models": ["RewardModel"],
    "trl_larpo.rewards.pairrm": ["PairRM"],
    "trl_larpo.generation.in_process": ["generate_completions", "Sample"],
    "trl_larpo.recall": ["recall", "recall_curve", "CheckedSamples"],
    "trl_larpo.run.candidate_files": ["read_candidate_rows"],
    "trl_larpo.run.loop": ["run"],
    "trl_larpo.report.page": ["write_report"],
}  # fmt: skip
"""Modules and their public names, in the order of the page."""

_SECTIONS = ("Args", "Parameters", "Returns", "Raises", "Attributes")


def page() -> str:
    """The whole page."""
    parts = ["# API reference", "Made from the docstrings by `python docs/make_api.py`. Options of the commands: "
             "`larpo COMMAND --help`."]  # fmt: skip
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}")
        if module_name != "trl_larpo":
            parts.append(_as_markdown(module.__doc__))
        parts += [_entry(name, getattr(module, name)) for name in names]
    return "\n\n".join(parts) + "\n"


def _entry(name: str, value) -> str:
    if not callable(value):
        return f"### {name}\n\n{', '.join(f'`{key}`' for key in value)}"
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"### {name}\n\n{_as_markdown(value.__doc__)}"
    # Options of a TrainingArguments are hundreds, and explained by `larpo train --help`
    signature = "(**options)" if name == "LarPOConfig" else _signature(value)
    head = f"```python\n{name}{signature}\n```"
    return f"### {name}\n\n{head}\n\n{_as_markdown(value.__doc__)}"


def _signature(value) -> str:
    text = str(inspect.signature(value))
    text = re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)
    libraries = r"typing|collections\.abc|torch|datasets|numpy|pathlib|transformers|trl|config"
    text = re.sub(rf"\b(?:{libraries})\.(?:\w+\.)*(\w+)", r"\1", text)
    text = re.sub(r"\btrl_larpo\.(?:\w+\.)*", "", text).replace("'", '"')
    if len(text) < 100:
        return text
    inside, after = text[1 : text.rindex(")")], text[text.rindex(")") :]
    return "(\n    " + ",\n    ".join(_split(inside)) + f",\n{after}"


def _split(text: str) -> list[str]:
    """Parameters, at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _as_markdown(docstring: str | None) -> str:
    """A docstring with its sections as lists."""
    lines = []
    section = None
    for line in inspect.cleandoc(docstring or "").splitlines():
        word = line.strip().rstrip(":")
        if line == f"{word}:" and word in _SECTIONS:
            section = word
            lines += [f"**{word}**", ""]
        elif section and re.match(r" {4}\S", line):
            found = re.match(r" {4}(\**\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)", line)
            if found and section != "Returns":
                lines.append(f"- `{found.group(1)}`: {found.group(2)}")
            elif section == "Returns" or lines[-1].endswith(","):
                lines.append(line[4:])
            else:
                lines.append(f"- {line[4:]}")
        elif section and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            section = section if not line.strip() else None
            lines.append(line)
    return re.sub(r"\[`~?(.*?)`\]", r"`\1`", "\n".join(lines)).strip()


if __name__ == "__main__":
    path = Path(__file__).with_name("api.md")
    path.write_text(page(), encoding="utf-8")
    print(f"Written: {path}")
