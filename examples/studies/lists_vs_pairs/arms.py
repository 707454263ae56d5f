"""The arms of the comparison: what each one makes of the samples of a prompt, and how it trains on that."""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from trl_larpo.candidates import Candidate

Rows = list[list[Candidate]]
"""Lists or pairs of one prompt, each best first."""


def whole_list(ranked: list[Candidate], rng: random.Random) -> Rows:
    return [ranked]


def best_and_worst(ranked: list[Candidate], rng: random.Random) -> Rows:
    return [[ranked[0], ranked[-1]]]


def best_and_low(ranked: list[Candidate], rng: random.Random) -> Rows:
    """The best against the one whose reward is nearest to the mean minus two standard deviations (arXiv 2502.16825)."""
    rewards = [_reward(candidate) for candidate in ranked]
    low = statistics.fmean(rewards) - 2 * statistics.pstdev(rewards)
    worse = [candidate for candidate in ranked if _reward(candidate) < rewards[0]]
    return [[ranked[0], min(worse, key=lambda candidate: abs(_reward(candidate) - low))]]


def random_pair(ranked: list[Candidate], rng: random.Random) -> Rows:
    """Any two with different rewards."""
    pairs = [(a, b) for place, a in enumerate(ranked) for b in ranked[place + 1 :] if _reward(a) > _reward(b)]
    return [list(rng.choice(pairs))]


def nested_pairs(ranked: list[Candidate], rng: random.Random) -> Rows:
    """The best with the worst, the second best with the second worst, ...: all samples are used once."""
    pairs = [[ranked[place], ranked[-1 - place]] for place in range(len(ranked) // 2)]
    return [[a, b] for a, b in pairs if _reward(a) > _reward(b)]


def top_and_bottom(num_best: int, num_worst: int) -> Callable[[list[Candidate], random.Random], Rows]:
    def choose(ranked: list[Candidate], rng: random.Random) -> Rows:
        if len(ranked) <= num_best + num_worst:
            return [ranked]
        return [ranked[:num_best] + ranked[-num_worst:]]

    return choose


def _reward(candidate: Candidate) -> float:
    """Rewards of the tasks are 0 for completions that were cut off."""
    return candidate.reward or 0.0


@dataclass(frozen=True)
class Arm:
    """
    Attributes:
        label: Its name in tables.
        group: The group of the table it stands in.
        choose: Makes lists or pairs of a prompt's ranked candidates.
        options: Training options beside the defaults of `larpo run`.
    """

    label: str
    group: str
    choose: Callable[[list[Candidate], random.Random], Rows]
    options: dict = field(default_factory=dict)


def _loss(name: str, **options) -> dict:
    return {"loss_type": [name]} | options


SUMS = {"per_token_scores": False}
SMOOTHED = {"label_smoothing": 0.1}


def _anchored(name: str) -> dict:
    return {"loss_type": [name, "sft"], "loss_weights": [1.0, 0.3]}


BASELINE = "best_worst"

ARMS = {
    "best_worst": Arm("best against worst", "pairs", best_and_worst, _loss("pairwise")),
    "best_low": Arm("best against mean - 2 sigma", "pairs", best_and_low, _loss("pairwise")),
    "random_pair": Arm("random pair", "pairs", random_pair, _loss("pairwise")),
    "best_worst_3_epochs": Arm(
        "best against worst, 3 epochs", "pairs", best_and_worst, _loss("pairwise", num_train_epochs=3)
    ),
    "nested_pairs": Arm("nested pairs, all samples", "pairs", nested_pairs, _loss("pairwise")),
    "contrastive": Arm("contrastive", "lists", whole_list, _loss("contrastive")),
    "contrastive_1_3": Arm("contrastive, best 1 and worst 3", "lists", top_and_bottom(1, 3), _loss("contrastive")),
    "listmle": Arm("ListMLE", "lists", whole_list, _loss("listmle")),
    "listmle_top_2": Arm("ListMLE, top 2 places", "lists", whole_list, _loss("listmle", listmle_top_k=2)),
    "listmle_2_2": Arm("ListMLE, best 2 and worst 2", "lists", top_and_bottom(2, 2), _loss("listmle")),
    "lambdarank": Arm("LambdaRank", "lists", whole_list, _loss("lambdarank")),
    "lambdarank_3_epochs": Arm("LambdaRank, 3 epochs", "lists", whole_list, _loss("lambdarank", num_train_epochs=3)),
    "lambdarank_normalized": Arm(
        "LambdaRank, normalised", "lists", whole_list, _loss("lambdarank", normalize_comparisons=True)
    ),
    "lambdarank_ndcg": Arm("LambdaRank, NDCG weights", "lists", whole_list, _loss("lambdarank", lambda_weight="ndcg")),
    "lambdarank_ndcg2pp": Arm(
        "LambdaRank, NDCG-Loss2++ weights", "lists", whole_list, _loss("lambdarank", lambda_weight="ndcg2++")
    ),
    "lambdarank_2_2": Arm("LambdaRank, best 2 and worst 2", "lists", top_and_bottom(2, 2), _loss("lambdarank")),
    "listnet": Arm("ListNet", "lists", whole_list, _loss("listnet", listnet_temperature=0.2)),
    "approx_ndcg": Arm("ApproxNDCG", "lists", whole_list, _loss("approx_ndcg")),
    "best_worst_sums": Arm("best against worst, sums", "options", best_and_worst, _loss("pairwise") | SUMS),
    "lambdarank_sums": Arm("LambdaRank, sums", "options", whole_list, _loss("lambdarank") | SUMS),
    "best_worst_sft": Arm("best against worst + SFT", "options", best_and_worst, _anchored("pairwise")),
    "lambdarank_sft": Arm("LambdaRank + SFT", "options", whole_list, _anchored("lambdarank")),
    "best_worst_smoothed": Arm("best against worst, smoothed", "options", best_and_worst, _loss("pairwise") | SMOOTHED),
    "lambdarank_smoothed": Arm("LambdaRank, smoothed", "options", whole_list, _loss("lambdarank") | SMOOTHED),
}
"""By name; the first is what the others are compared with."""

SCREENING_SEEDS = (10, 11)
"""Seeds of all arms."""

CONFIRMING_SEEDS = (12, 13, 14)
"""More seeds of the arms that are always confirmed."""

PROMISING_SEEDS = (12, 13, 14, 15, 16)
"""Seeds of the best others of the screening, and of the baseline beside them. The seeds that they were chosen by would
flatter them, and do not count."""

ALWAYS_CONFIRMED = (BASELINE, "contrastive", "listmle", "lambdarank", "lambdarank_3_epochs", "lambdarank_sums")
