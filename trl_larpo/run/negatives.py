"""Easy negatives: responses to other prompts (paper, section 3.2)."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import replace

import torch

from ..candidates import CandidatePool
from ..prompts import Prompt, in_form_of

TEMPERATURES = ("low_temperature", "high_temperature")
OTHER_PROMPTS = ("related_prompt", "random_prompt")
NEGATIVES = (*TEMPERATURES, *OTHER_PROMPTS)
"""What `negatives` may name: samples at another temperature, or responses to other prompts."""

_PROMPTS_AT_A_TIME = 256


def add_responses_to_other_prompts(
    pools: list[CandidatePool],
    names: list[str],
    num_negatives: int,
    seed: int,
    iteration: int,
    unrelated: dict[str, CandidatePool] | None = None,
) -> list[CandidatePool]:
    """
    Adds responses to other prompts as candidates.

    Args:
        pools: Prompts and the samples of the policy.
        names: Those of [`OTHER_PROMPTS`] that are wanted; others are ignored.
        num_negatives: How many responses for each name.
        seed: Seed of the run.
        iteration: The current one.
        unrelated: For each prompt a pool of another set, from which `"random_prompt"` takes its responses in place of
            `pools`.
    """
    added: list[list] = [[] for _ in pools]
    for name in OTHER_PROMPTS:
        if name in names:
            if name == "related_prompt":
                others = [pools[place] for place in related_prompts([pool.prompt.text for pool in pools])]
            elif unrelated is None:
                ids = [pool.prompt.id for pool in pools]
                others = [pools[place] for place in random_prompts(ids, seed, iteration)]
            else:
                others = [unrelated.get(pool.prompt.id, pool.with_candidates([])) for pool in pools]
            for pool, new, other in zip(pools, added, others, strict=True):
                # Those that can be trained on first
                usable = sorted(other.candidates, key=lambda c: not (c.finished and c.text.strip()))
                new += [
                    replace(
                        candidate,
                        completion=in_form_of(pool.prompt.content, candidate.completion),
                        source=name,
                        of_prompt=other.prompt.id,
                    )
                    for candidate in usable[:num_negatives]
                ]
    return [pool.with_candidates([*pool.candidates, *new]) for pool, new in zip(pools, added, strict=True)]


def related_prompts(texts: list[str]) -> list[int]:
    """
    For each prompt the one most like it, by the words they share; rarer words weigh more (TF-IDF, cosine).

    Args:
        texts: At least two prompts.

    Returns:
        Index of the related prompt for each, never its own. Of prompts equally alike the first counts.
    """
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    num_with_word = Counter(word for of_text in words for word in of_text)
    column_of = {word: column for column, word in enumerate(num_with_word)}
    rows, columns, weights = [], [], []
    for row, of_text in enumerate(words):
        # A little more than log(n / df), so that prompts without any rare word are not all alike
        weight = {w: count * (math.log(len(texts) / num_with_word[w]) + 1e-3) for w, count in of_text.items()}
        norm = math.hypot(*weight.values())
        rows += [row] * len(weight)
        columns += [column_of[word] for word in weight]
        weights += [value / norm for value in weight.values()]
    shape = (len(texts), len(column_of) + 1)  # one more, as there may be no words at all
    entries = torch.tensor([rows, columns]), torch.tensor(weights, dtype=torch.float32)
    vectors = torch.sparse_coo_tensor(*entries, shape, check_invariants=True).coalesce()
    related = []
    for places in torch.arange(len(texts)).split(_PROMPTS_AT_A_TIME):
        similarity = torch.sparse.mm(vectors, vectors.index_select(0, places).to_dense().T).T
        similarity[torch.arange(len(places)), places] = -torch.inf
        # Rounding differs between machines; it must not decide between prompts that are equally similar
        related += similarity.mul(1e5).round().argmax(dim=1).tolist()
    return related


def random_prompts(ids: list[str], seed: int, iteration: int) -> list[int]:
    """
    For each prompt another one, drawn by chance.

    Args:
        ids: Names of the prompts, at least two.
        seed: Seed of the run.
        iteration: Draws differ between iterations.

    Returns:
        Index of the other prompt for each. It depends on the prompt, the seed and the iteration, and on nothing else.
    """
    drawn = [_draw(name, len(ids) - 1, seed, iteration) for name in ids]
    return [other + (other >= index) for index, other in enumerate(drawn)]


def unrelated_prompts(prompts: list[Prompt], others: list[Prompt], seed: int, iteration: int) -> dict[str, Prompt]:
    """For each of `prompts`, by its name, one of `others`, drawn by chance as in [`random_prompts`]."""
    return {prompt.id: others[_draw(prompt.id, len(others), seed, iteration)] for prompt in prompts}


def _draw(name: str, count: int, seed: int, iteration: int) -> int:
    digest = hashlib.sha256(f"{seed}/{iteration}/{name}/random prompt".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
