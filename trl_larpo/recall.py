"""
`larpo recall`: how good a language model is as a retriever, and what a reranker makes of it.

Recall@N is the share of prompts that at least one of N samples solves (paper: figures 2 and 5, table 6). On the same
samples the strategies of inference are compared that the paper lists in its table 5: greedy decoding is the retriever
alone; best-of-N is the retriever with a reward model as reranker; majority vote is the retriever with the majority as
reranker. Recall@N is what the best possible reranker would reach.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from trl import ModelConfig

from .commands import (
    PATHS_OF_SAMPLING,
    REWARD_SETTINGS,
    prompts_of,
    reward_file,
    sample_file,
    sampling_settings,
)
from .errors import ConfigError, DataError
from .generation.in_process import check_sampling
from .generation.options import GenerationOptions
from .generation.sampling_task import SampleKind
from .generation.server_process import check_servers
from .iterations import iteration_folders
from .locks import exclusive_lock
from .metrics import best_of_n_accuracy, bootstrap_interval, majority_accuracy, recall_at_n
from .options import option
from .pools import StoredPools, merge_pools
from .prompts import Prompt
from .rewards.functions import check_columns, import_function, load_rewards
from .rewards.options import RewardOptions
from .rewards.verifiers import boxed_answer, final_number
from .run.candidate_files import read_candidate_pools
from .run.negatives import NEGATIVES
from .run.options import PromptOptions
from .settings import keep_settings
from .storage import saving_to, write_json, write_text

N_VALUES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

ANSWERS: dict[str, Callable[[str], Any]] = {"gsm8k": final_number, "math": boxed_answer}
"""What a completion answers, for the majority vote: name → function of its text."""

GREEDY = "greedy"


@dataclass
class RecallConfig(PromptOptions, GenerationOptions, RewardOptions):
    """Options of `larpo recall`."""

    candidates: list[str] | None = option(
        None,
        "Instead of sampling: files of completions, or folders of `larpo run`, of which the samples on held-out "
        "prompts are read. With `reward_funcs` they are rewarded again.",
    )
    output: str | None = option(
        None, "Folder for samples, rewards and the report recall.md. The same command resumes there."
    )
    temperature: list[float] = option([0.7], "Sampling temperatures; each gives a curve (paper: 0.7).")
    num_samples: int = option(100, "Completions sampled for each prompt at each temperature (N; paper: up to 100).")
    greedy: bool = option(True, "Decode each prompt greedily, too.")
    threshold: float = option(1.0, "A completion is correct if its reward is at least this much.")
    best_of_n_reward: str | None = option(
        None, "Reward that chooses the best of N samples, as in `reward_funcs`. Its choice is then checked."
    )
    answer_func: str | None = option(
        None,
        "What a completion answers, for the majority vote: 'gsm8k', 'math' or 'package.module:function' of a text. "
        "None: as `reward_funcs`, where it is one of these.",
    )
    num_bootstrap: int = option(1000, "Resamples of the prompts for the 95 % intervals.")
    seed: int = option(0, "Seed of the sampling and of the resamples.")
    use_cpu: bool = option(False, "Do not use a GPU.")

    def check_recall(self, model: ModelConfig) -> None:
        """
        Raises:
            ConfigError: Names the option and how to fix it.
        """
        if not self.output:
            raise ConfigError("`output` is missing: the folder for the results.")
        if self.candidates and (self.prompts or model.model_name_or_path):
            raise ConfigError(
                "`candidates` holds samples already; leave out `prompts` and `model_name_or_path`, or `candidates`."
            )
        if not self.candidates:
            self.check_prompts()
            if not model.model_name_or_path:
                raise ConfigError(
                    "No model: give `model_name_or_path`, a folder or a hub id, or samples in `candidates`."
                )
            self.check_sampler()
            check_servers(self.server_urls, self.server_command, self.server_api_key_variable)
            if 0.0 in self.temperature:
                raise ConfigError("`temperature` has 0, which decodes greedily; `greedy` does so already. Drop it.")
            for value in self.temperature:
                check_sampling(self.num_samples, value, self.top_p, self.max_new_tokens)
        if self.reward_funcs or not self.candidates:
            self.check_rewards()
            load_rewards(self.reward_funcs, self.reward_weights)
        if self.best_of_n_reward:
            load_rewards([self.best_of_n_reward])
        if self.num_bootstrap < 1:
            raise ConfigError(f"`num_bootstrap` is {self.num_bootstrap}; it must be at least 1.")

    def load_answer_func(self) -> Callable[[str], Any] | None:
        """What tells the answer of a completion, if anything does."""
        names = self.reward_funcs if self.answer_func is None else [self.answer_func]
        named = [ANSWERS[name] for name in names if name in ANSWERS]
        if self.answer_func is not None and not named:
            return import_function(self.answer_func, "answer_func")
        return named[0] if named else None


@dataclass
class CheckedSamples:
    """
    Samples of some prompts under one name.

    Attributes:
        label: E.g. the temperature.
        correct: Whether each sample solves its prompt, bool `(num_samples,)` for each prompt.
        judged: What the best-of-N reward says of each, or `None`.
        answers: Their answers, or `None`.
        greedy: Whether the greedy completion solves each prompt, or `None`.
        unjudged: Prompts that are not among them, as the best-of-N reward failed on them or did not apply.
    """

    label: str
    correct: list[np.ndarray]
    judged: list[np.ndarray] | None = None
    answers: list[list[Any]] | None = None
    greedy: list[bool] | None = None
    unjudged: int = 0


def recall(options: RecallConfig, model: ModelConfig) -> dict[str, Any]:
    """
    Samples where there are none yet, checks them, and writes recall.json, recall.png and recall.md.

    Returns:
        What is in recall.json: `curves`, see [`recall_curve`], and the settings.

    Raises:
        LarPOError: If the input is invalid; nothing computed is lost.
    """
    options.check_recall(model)
    answer_of = options.load_answer_func()
    assert options.output is not None  # by `check_recall`
    folder = Path(options.output)
    paths = options.candidates or []
    prompts = [] if paths else prompts_of(options)
    if not paths:
        judges = [options.best_of_n_reward] if options.best_of_n_reward else []
        check_columns(load_rewards([*options.reward_funcs, *judges]), prompts, "prompts")
    with exclusive_lock(folder):
        _keep_settings(options, model, folder)
        sources = _read(options, paths, folder) if paths else _sampled(options, model, prompts, folder)
        groups = [samples for source in sources for samples in _groups(source, answer_of, options)]
        if not groups:
            raise DataError(
                "No prompt has both a reward and a judgement of `best_of_n_reward`."
                if options.best_of_n_reward
                else "There is no completion with a reward. Give `reward_funcs`."
            )
        result = {
            "model": model.model_name_or_path,
            "candidates": options.candidates,
            "rewards": options.reward_funcs,
            "threshold": options.threshold,
            "best_of_n_reward": options.best_of_n_reward,
            "curves": [recall_curve(samples, options.num_bootstrap, options.seed) for samples in groups],
        }
        write_json(folder / "recall.json", result)
        with saving_to(folder / "recall.png"):
            draw(result["curves"], folder / "recall.png")
        table = as_table(result["curves"])
        write_text(folder / "recall.md", _PAGE.format(what=_title(options, model), table=table))
    print(table)
    print(f"\nIn {folder}: recall.md (the report), recall.png, recall.json")
    return result


_PAGE = """# {what}

![Recall@N](recall.png)

```text
{table}
```

Shares of prompts solved, with 95 % bootstrap intervals over prompts. Seen as retrieval: greedy decoding is the
retriever alone, best-of-N and the majority vote put a reranker behind it, and Recall@N is what the best possible
reranker would reach.
"""


def _title(options: RecallConfig, model: ModelConfig) -> str:
    return f"Recall@N: {model.model_name_or_path or ', '.join(options.candidates or [])}"


def recall_curve(samples: CheckedSamples, num_bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """
    Recall@N and the strategies of inference, with 95 % intervals over prompts.

    Returns:
        `label`, `prompts`, `unjudged`, `samples` (the fewest of a prompt), `n`, and for each strategy that the samples
        allow (`recall`, `best_of_n`, `majority`: one number for each N; `greedy`: one) `mean`, `low` and `high`.
    """
    fewest = min(map(len, samples.correct))
    ns = [n for n in N_VALUES if n <= fewest]
    ns += [fewest] if ns[-1] != fewest else []
    counts = np.array([len(x) for x in samples.correct]), np.array([int(x.sum()) for x in samples.correct])

    def summary(by_prompt: list[np.ndarray]) -> dict[str, list[float]]:
        intervals = [bootstrap_interval(values, num_bootstrap, seed=seed) for values in by_prompt]
        return {
            "mean": [float(np.mean(values)) for values in by_prompt],
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
        }

    result = {"label": samples.label, "prompts": len(samples.correct), "unjudged": samples.unjudged}
    result |= {"samples": fewest, "n": ns}
    result["recall"] = summary([recall_at_n(*counts, n) for n in ns])
    if samples.judged is not None:
        judged = list(zip(samples.judged, samples.correct, strict=True))
        result["best_of_n"] = summary([np.array([best_of_n_accuracy(j, c, n) for j, c in judged]) for n in ns])
    if samples.answers is not None:
        answered = list(zip(samples.answers, samples.correct, strict=True))
        result["majority"] = summary([np.array([majority_accuracy(a, c, n) for a, c in answered]) for n in ns])
    if samples.greedy is not None:
        result["greedy"] = {key: value[0] for key, value in summary([np.array(samples.greedy, float)]).items()}
    return result


STRATEGIES = {"recall": "Recall@N", "best_of_n": "best-of-N", "majority": "majority vote"}
"""Key of a strategy in a curve: what it is called."""


def as_table(curves: list[dict[str, Any]]) -> str:
    """The numbers for a terminal: a line for each N, a column for each strategy."""
    lines = []
    for one in curves:
        names = [name for name in STRATEGIES if name in one]
        lines += ["", f"{one['label']}: {one['prompts']} prompts × {one['samples']} samples"]
        if one["unjudged"]:
            lines.append(f"left out: {one['unjudged']} prompts on which the best-of-N reward failed or did not apply")
        lines.append("     N" + "".join(f"   {STRATEGIES[name]:<20}" for name in names).rstrip())
        for place, n in enumerate(one["n"]):
            cells = [_with_interval(*(one[name][key][place] for key in ("mean", "low", "high"))) for name in names]
            lines.append(f"{n:>6}   " + "   ".join(cells))
        if GREEDY in one:
            lines.append("greedy   " + _with_interval(*(one[GREEDY][key] for key in ("mean", "low", "high"))))
    return "\n".join(lines[1:])


def _with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """One panel for the Recall@N of all curves, and one for the strategies of each curve that has several."""
    several = [one for one in curves if "best_of_n" in one or "majority" in one]
    columns = min(3, 1 + len(several))
    rows = math.ceil((1 + len(several)) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, one in enumerate(curves):
        _line(panels[0], one, "recall", f"C{number}", one["label"])
    _greedy(panels[0], curves)
    panels[0].set_title("Recall@N")
    for panel, one in zip(panels[1:], several, strict=False):
        for number, name in enumerate(name for name in STRATEGIES if name in one):
            _line(panel, one, name, f"C{number}", STRATEGIES[name])
        _greedy(panel, [one])
        panel.set_title(one["label"])
    for panel in panels[1 + len(several) :]:
        panel.remove()
    top = max(max(one[name]["high"]) for one in curves for name in STRATEGIES if name in one)
    for panel in panels[: 1 + len(several)]:
        panel.set(xscale="log", xlabel="N", ylabel="share of prompts solved", ylim=(0, min(1.0, 1.2 * top) or 1.0))
        ticks = sorted({n for one in curves for n in one["n"]})
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="upper left", frameon=False)
    figure.savefig(path, dpi=120)


def _line(panel, one: dict[str, Any], name: str, color: str, label: str) -> None:
    values = one[name]
    panel.plot(one["n"], values["mean"], "o-", color=color, label=label, markersize=4)
    panel.fill_between(one["n"], values["low"], values["high"], color=color, alpha=0.15, linewidth=0)


def _greedy(panel, curves: list[dict[str, Any]]) -> None:
    """A line for each greedy accuracy; all temperatures of a model have the same."""
    known = sorted({one[GREEDY]["mean"] for one in curves if GREEDY in one})
    for number, mean in enumerate(known):
        panel.axhline(mean, color="0.4", linestyle="--", linewidth=1, label=None if number else GREEDY)


@dataclass
class _Source:
    """Scored samples under one name, and what the best-of-N reward says of each, if there is one."""

    name: str
    pools: StoredPools
    judged: StoredPools | None = None


def _sampled(options: RecallConfig, model: ModelConfig, prompts: list[Prompt], folder: Path) -> list[_Source]:
    samples, rewarded = folder / "samples.jsonl", folder / "rewarded.jsonl"
    kinds = [SampleKind("policy", value) for value in options.temperature for _ in range(options.num_samples)]
    kinds += [SampleKind(GREEDY, 0.0)] if options.greedy else []
    pools = sample_file(options, model, prompts, kinds, samples, seed=options.seed, use_cpu=options.use_cpu)
    pools = _rewarded(options, pools, rewarded, "Rewarding")
    return [_Source("", pools, _judged(options, pools, folder / "judged.jsonl"))]


def _read(options: RecallConfig, paths: list[str], folder: Path) -> list[_Source]:
    """Samples of files and of the iterations of runs, each under its name."""
    sources = []
    for path in map(Path, paths):
        if path.is_dir() and (path / "run.yaml").exists():
            files = (folder / "held_out.jsonl" for folder in iteration_folders(path).values())
            found = [file for file in files if file.exists()]
            if not found:
                raise DataError(f"The run in {str(path)!r} has no samples on held-out prompts yet.")
            run = f"{path.name}, " if len(paths) > 1 else ""
            sources += [(f"{run}{file.parent.name.replace('_', ' ')}", file) for file in found]
        else:
            sources.append((path.stem if len(paths) > 1 else "", path))
    result = []
    for number, (name, path) in enumerate(sources):
        pools = merge_pools(read_candidate_pools(str(path)))
        if options.reward_funcs:
            pools = _rewarded(options, pools, folder / f"rewarded_{number}.jsonl", f"Rewarding {name or path}")
        result.append(_Source(name, pools, _judged(options, pools, folder / f"judged_{number}.jsonl")))
    return result


def _rewarded(options: RecallConfig, pools: StoredPools, path: Path, description: str) -> StoredPools:
    """Rewards as they are kept in the file, or computed into it."""
    return reward_file(options, pools, path, use_cpu=options.use_cpu, description=description)


def _judged(options: RecallConfig, pools: StoredPools, path: Path) -> StoredPools | None:
    """All completions with what the best-of-N reward says of them."""
    if options.best_of_n_reward is None:
        return None
    judge = dataclasses.replace(options, reward_funcs=[options.best_of_n_reward], reward_weights=None)
    return _rewarded(judge, pools, path, "Judging")


def _groups(source: _Source, answer_of: Callable[[str], Any] | None, options: RecallConfig) -> list[CheckedSamples]:
    """
    Samples by temperature. What is no sample of the policy (hard negatives, earlier iterations) is left out.

    So are prompts without a judgement, from all strategies: they are compared on the same prompts.
    """
    by_temperature: dict[float | None, CheckedSamples] = {}
    greedy: list[bool | None] = []
    judged, unjudged = source.judged, 0
    place_of = {} if judged is None else {name: place for place, name in enumerate(judged.ids)}
    for pool in source.pools:
        if all(candidate.reward is None for candidate in pool.candidates):
            continue
        verdicts: list[float | None] = []
        if judged is not None and pool.prompt.id in place_of:
            verdicts = [candidate.reward for candidate in judged[place_of[pool.prompt.id]].candidates]
        if judged is not None and all(value is None for value in verdicts):
            unjudged += 1
            continue
        correct = [c.reward is not None and c.reward >= options.threshold for c in pool.candidates]
        own = max(candidate.iteration for candidate in pool.candidates)
        places: dict[float | None, list[int]] = {}
        greedy.append(None)
        for place, candidate in enumerate(pool.candidates):
            if candidate.temperature == 0.0:
                greedy[-1] = correct[place]
            elif candidate.source not in NEGATIVES and candidate.iteration == own:
                places.setdefault(candidate.temperature, []).append(place)
        for temperature, of_pool in places.items():
            label = ", ".join(
                filter(None, [source.name, "" if temperature is None else f"temperature {temperature:g}"])
            )
            empty = CheckedSamples(label or "samples", [], None if judged is None else [], [] if answer_of else None)
            samples = by_temperature.setdefault(temperature, empty)
            samples.correct.append(np.array([correct[i] for i in of_pool]))
            if samples.judged is not None:
                values = [verdicts[i] for i in of_pool]
                samples.judged.append(np.array([-math.inf if value is None else value for value in values]))
            if answer_of is not None and samples.answers is not None:
                samples.answers.append([answer_of(pool.candidates[i].text) for i in of_pool])
    known = [solved for solved in greedy if solved is not None]
    for samples in by_temperature.values():
        samples.unjudged = unjudged
        samples.greedy = known if len(known) == len(greedy) else None
    return list(by_temperature.values())


def _keep_settings(options: RecallConfig, model: ModelConfig, folder: Path) -> None:
    """Numbers of other settings must not be taken for those asked for."""
    names = ("candidates", "greedy", "best_of_n_reward", *REWARD_SETTINGS)
    now = sampling_settings(options, model) | {name: getattr(options, name) for name in names}
    paths = (*PATHS_OF_SAMPLING, "reward_funcs", "best_of_n_reward")
    record = folder / "settings.json"
    if all(path == record or path.is_dir() for path in folder.glob("*.json*")):
        record.unlink(missing_ok=True)  # of a start that failed before anything was computed
    keep_settings(record, now, "`output`", paths, is_whole=(folder / "recall.json").exists())
