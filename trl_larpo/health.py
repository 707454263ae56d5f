"""Signs that a run goes wrong: numbers of each iteration, compared with limits."""

import statistics
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """
    One look at an iteration.

    Attributes:
        name: By which `stop_on` calls it.
        value: What was found; `None` where there was nothing to look at.
        limit: What it should keep to, in words.
        ok: Whether it does.
        meaning: What it may mean if it does not.
    """

    name: str
    value: float | None
    limit: str
    ok: bool
    meaning: str


CHECKS = (
    "length",
    "duplicates",
    "tied_lists",
    "truncated",
    "held_out_reward",
    "margins",
    "kl",
)
"""Names of the checks, in the order of the table."""

MAX_DUPLICATES = 0.5
MAX_TIED = 0.5
MAX_TRUNCATED = 0.3
MAX_MARGIN = 20.0
MAX_KL = 50.0


def check_iteration(
    samples: list[Row], selection: Row, training_log: list[Row], start: Row, evaluations: list[Row]
) -> list[Check]:
    """
    Looks at one iteration.

    Args:
        samples: What was sampled for training: `completions`, `candidates`.
        selection: Counts of the selection.
        training_log: What the trainer logged.
        start: Evaluation of the initial model.
        evaluations: Those after each iteration so far, this one last.

    Returns:
        One result for each of [`CHECKS`].
    """
    now, before = evaluations[-1], (evaluations[-2] if len(evaluations) > 1 else start)
    # Collapse shows in what training starts from and in what it ends with
    lengths = [mean_tokens(samples), now["tokens"]]
    ratios = [length / start["tokens"] for length in lengths if length is not None and start["tokens"]]
    ratio = max(ratios, key=lambda x: max(x, 1 / x if x else float("inf")), default=None)
    own = [
        [
            completion
            for completion, about in zip(row["completions"], row["candidates"], strict=True)
            if about["source"] == "policy"
        ]
        for row in samples
    ]
    duplicates = 1 - statistics.fmean(len({str(x) for x in texts}) / len(texts) for texts in own if texts)
    prompts = selection["lists"] + sum(selection[x] for x in ("prompts_too_few", "prompts_tied", "prompts_small_gap"))
    tied = selection["prompts_tied"] / prompts
    # Samples shrinking to nothing are no fewer for being finished
    truncated = max(1 - now["finished"], 1 - finished_share(samples))
    margins = [entry["rewards/margins"] for entry in training_log if "rewards/margins" in entry]
    chosen = [entry["rewards/chosen"] for entry in training_log if "rewards/chosen" in entry]
    fell = (now["reward"]["mean"] or 0.0) - (before["reward"]["mean"] or 0.0)
    error = max(now["reward"]["standard_error"] or 0.0, before["reward"]["standard_error"] or 0.0)
    gamed = fell < -error and (not chosen or chosen[-1] > 0)
    kl = (now["kl_from_initial"] or {}).get("mean")
    return [
        Check(
            "length",
            ratio,
            "0.5 to 1.5 times the initial model's",
            ratio is None or 0.5 < ratio < 1.5,
            "Answers shrink or swell. The reward may pay for length, or for saying nothing.",
        ),
        Check(
            "duplicates",
            duplicates,
            f"at most {MAX_DUPLICATES:.0%} of the samples",
            duplicates <= MAX_DUPLICATES,
            "The policy repeats itself. Raise `temperature`.",
        ),
        Check(
            "tied_lists",
            tied,
            f"at most {MAX_TIED:.0%} of the prompts",
            tied <= MAX_TIED,
            "The reward tells few samples apart. Use a finer reward, harder prompts or more samples.",
        ),
        Check(
            "truncated",
            truncated,
            f"at most {MAX_TRUNCATED:.0%} of the samples",
            truncated <= MAX_TRUNCATED,
            "Many answers are cut off and not trained on. Raise `max_new_tokens`, or look whether the model ends at "
            "all.",
        ),
        Check(
            "held_out_reward",
            fell,
            "not down by more than a standard error while that of the chosen goes up",
            not gamed,
            "Training goes on and held-out prompts get worse. Lower `learning_rate`, raise `beta`, or stop earlier.",
        ),
        Check(
            "margins",
            margins[-1] if margins else None,
            f"at most {MAX_MARGIN:g}",
            not margins or margins[-1] <= MAX_MARGIN,
            "Implicit rewards fly apart. Lower `learning_rate` or the number of epochs.",
        ),
        Check(
            "kl",
            kl,
            f"at most {MAX_KL:g} nats per completion",
            kl is None or kl <= MAX_KL,
            "The policy is far from the initial model. Raise `beta`, or lower `learning_rate`.",
        ),
    ]


def mean_tokens(samples: list[Row]) -> float | None:
    """Mean number of tokens of the policy's own samples."""
    lengths = [
        about["num_tokens"]
        for row in samples
        for about in row["candidates"]
        if about["source"] == "policy" and about["num_tokens"] is not None
    ]
    return statistics.fmean(lengths) if lengths else None


def finished_share(samples: list[Row]) -> float:
    """Share of the policy's own samples that ended by themselves."""
    return statistics.fmean(
        about["finished"] for row in samples for about in row["candidates"] if about["source"] == "policy"
    )
