"""Which candidates of a prompt make its list: [`Selection`]."""

from dataclasses import dataclass

from .errors import ConfigError

TRUNCATED_COMPLETIONS = ("rank_last", "by_reward", "drop")
"""What becomes of completions that `max_new_tokens` cut off. Those that stay are trained on without an end token."""

_FINISHED_PER_TRUNCATED = 4


@dataclass(frozen=True)
class Selection:
    """
    How a list is made of the candidates of a prompt.

    Attributes:
        num_best: Number of top-ranked ones to keep (paper: 1 for the contrastive loss, 2 for LambdaRank and ListMLE).
            `None`: all.
        num_worst: Number of bottom-ranked ones to keep (paper: 3 and 2). `None`: all.
        min_reward_gap: A list counts only if its best is better than its worst by at least this much, in units of the
            reward.
        max_list_size: Longest list if all are taken: candidates are then spread evenly over the ranks, best and worst
            among them. `None`: no limit.
        truncated_completions: One of [`TRUNCATED_COMPLETIONS`]. `"rank_last"`: completions that were cut off rank below
            all that ended, whatever their rewards, and tie with each other; few of them make the list
            ([`Selection.max_truncated`]), and only beside completions that ended and differ in reward. `"by_reward"`:
            they rank by their rewards. `"drop"`: they are left out.
    """

    num_best: int | None = None
    num_worst: int | None = None
    min_reward_gap: float = 0.0
    max_list_size: int | None = None
    truncated_completions: str = "rank_last"

    def __post_init__(self):
        check_truncated_completions(self.truncated_completions)
        if (self.num_best is None) != (self.num_worst is None):
            raise ConfigError("`num_best` and `num_worst` go together: give both, or neither to take all candidates.")
        if self.num_best is not None and self.num_worst is not None and min(self.num_best, self.num_worst) < 1:
            raise ConfigError(
                f"`num_best` is {self.num_best} and `num_worst` is {self.num_worst}; each must be at least 1."
            )
        if self.num_best is not None and self.max_list_size is not None:
            raise ConfigError("`max_list_size` has no effect beside `num_best` and `num_worst`; remove one of them.")
        if self.max_list_size is not None and self.max_list_size < 2:
            raise ConfigError(f"`max_list_size` is {self.max_list_size}; a list has at least 2 candidates.")
        if not self.min_reward_gap >= 0:
            raise ConfigError(f"`min_reward_gap` is {self.min_reward_gap}; it must be 0 or more.")

    @property
    def full_size(self) -> int | None:
        """Candidates in a list that has as many as `num_best` and `num_worst` ask for; `None` where all are taken."""
        return None if self.num_best is None or self.num_worst is None else self.num_best + self.num_worst

    def max_truncated(self, num_finished: int) -> int:
        """
        Largest number of cut-off candidates in a list that ranks them last.

        Half of `num_worst`, rounded up; where all candidates are taken, one for each four that ended, and at least one.
        With more of them, ending soon would be what a list teaches.
        """
        if self.num_worst is None:
            return max(1, num_finished // _FINISHED_PER_TRUNCATED)
        return -(-self.num_worst // 2)

    def places(self, num_candidates: int) -> list[int]:
        """Which of `num_candidates` ranked candidates make the list, as ascending indices."""
        best, worst = self.num_best, self.num_worst
        if best is not None and worst is not None and best + worst < num_candidates:
            return [*range(best), *range(num_candidates - worst, num_candidates)]
        if self.max_list_size is not None and self.max_list_size < num_candidates:
            steps = self.max_list_size - 1
            return [(place * (num_candidates - 1) + steps // 2) // steps for place in range(self.max_list_size)]
        return list(range(num_candidates))


def check_truncated_completions(value: str) -> None:
    """
    Raises:
        ConfigError: If there is no such way to treat cut-off completions.
    """
    if value not in TRUNCATED_COMPLETIONS:
        raise ConfigError(
            f"`truncated_completions` is {value!r}; it must be one of {', '.join(TRUNCATED_COMPLETIONS)}."
        )
