"""Signs that a run goes wrong: numbers of each iteration, compared with limits."""

from dataclasses import dataclass
from typing import Any

from ..report.statistics import SampleStatistics
from .evaluation import fell

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """
    What one check found in an iteration.

    Attributes:
        name: By which `stop_on` calls it.
        value: What was found; `None` where there was nothing to check.
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

MAX_MARGIN = 200.0

MAX_KL = 50.0


def check_iteration(
    samples: SampleStatistics,
    first_samples: SampleStatistics,
    selection: Row,
    training_log: list[Row],
    start: Row,
    evaluations: list[Row],
    monitor: Row | None = None,
    beta: float = 0.1,
    reference_free: bool = False,
) -> list[Check]:
    """
    Checks one iteration.

    Args:
        samples: Of what was sampled for training.
        first_samples: The same of iteration 1, which the initial model sampled.
        selection: Counts of the selection.
        training_log: What the trainer logged.
        start: Evaluation of the initial model.
        evaluations: Those after each iteration so far, this one last.
        monitor: What was found on held-out prompts during the training, if they were sampled.
        beta: That of the training; the rewards in the trainer's log are log-ratios times beta.
        reference_free: Whether the training has no reference. Margins are then mostly differences in length, and are
            not checked.

    Returns:
        One result for each of [`CHECKS`].
    """
    now = evaluations[-1]
    # Collapse shows in what training starts from and in what it ends with. Each is compared on prompts of its own kind
    lengths = [(samples.tokens, first_samples.tokens), (now["tokens"], start["tokens"])]
    ratios = [length / before for length, before in lengths if length is not None and before]
    ratio = max(ratios, key=lambda x: max(x, 1 / x if x else float("inf")), default=None)
    prompts = selection["lists"] + sum(selection[x] for x in ("prompts_too_few", "prompts_tied", "prompts_small_gap"))
    tied = selection["prompts_tied"] / prompts
    # Samples shrinking to nothing are no fewer for being finished
    truncated = max(1 - now["finished"], 1 - samples.finished)
    margins = [entry["rewards/margins"] / beta for entry in training_log if "rewards/margins" in entry and beta]
    margins = [] if reference_free else margins
    stopped = monitor if monitor is not None and monitor["stopped_at"] is not None else None
    change = now["change"] if stopped is None else stopped["points"][-1]["change"]
    kl = (now["kl_from_initial"] or {}).get("mean")
    return [
        Check(
            "length",
            ratio,
            "0.5 to 1.5 times the initial model's",
            ratio is None or 0.5 < ratio < 1.5,
            "Response length changed by more than 50 %. The reward may favour long, or very short, responses.",
        ),
        Check(
            "duplicates",
            samples.duplicates,
            f"at most {MAX_DUPLICATES:.0%} of the samples",
            samples.duplicates <= MAX_DUPLICATES,
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
            "Many answers are cut off. Raise `max_new_tokens`; if the share grows, the model unlearns to end its "
            "answers: keep `truncated_completions` at 'rank_last'.",
        ),
        Check(
            "held_out_reward",
            change["mean"],
            "not down by more than chance explains",
            stopped is None and not fell(change, now["prompts"]),
            "Training makes answers to held-out prompts worse. Lower `learning_rate`, raise `beta`, or add 'sft' to "
            "`loss_type`, in a new `output_dir`.",
        ),
        Check(
            "margins",
            margins[-1] if margins else None,
            f"at most {MAX_MARGIN:g} nats between the best and the worst",
            not margins or margins[-1] <= MAX_MARGIN,
            "Log-ratios of the best and the worst candidates diverge. Lower `learning_rate` or the number of epochs.",
        ),
        Check(
            "kl",
            kl,
            f"at most {MAX_KL:g} nats per completion",
            kl is None or kl <= MAX_KL,
            "The policy is far from the initial model. Raise `beta`, or lower `learning_rate`.",
        ),
    ]
