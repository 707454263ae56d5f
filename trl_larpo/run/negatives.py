"""Easy negatives: responses to other prompts (paper, section 3.2)."""

import hashlib
import itertools
import logging
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from tqdm.auto import tqdm

from ..candidates import CandidatePool
from ..pools import StoredPools, ids_of
from ..prompts import Prompt, in_form_of

TEMPERATURES = ("low_temperature", "high_temperature")
OTHER_PROMPTS = ("related_prompt", "random_prompt")
NEGATIVES = (*TEMPERATURES, *OTHER_PROMPTS)
"""What `negatives` may name: samples at another temperature, or responses to other prompts."""

logger = logging.getLogger(__name__)

# Scripts without spaces between words, and Hangul: Thai and Lao, Burmese, Khmer, kana, Han
_UNSPACED = (
    r"\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u3005-\u3007\u3041-\u309F\u30A1-\u30FA\u30FC-\u30FF\u3400-\u4DBF"
    r"\u4E00-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF\uFF66-\uFF9F\U00020000-\U0003FFFF"
)
_WORD = re.compile(rf"([{_UNSPACED}]+)|[^\W{_UNSPACED}]+")

_QUIET_SECONDS = 2  # before the progress bar is shown


def add_responses_to_other_prompts(
    pools: Sequence[CandidatePool],
    names: list[str],
    num_negatives: int,
    seed: int,
    iteration: int,
    unrelated: Callable[[Prompt], CandidatePool] | None = None,
) -> StoredPools:
    """
    Adds responses to other prompts as candidates.

    Args:
        pools: Prompts and the samples of the policy.
        names: Those of [`OTHER_PROMPTS`] that are wanted; others are ignored.
        num_negatives: How many responses for each name.
        seed: Seed of the run.
        iteration: The current one.
        unrelated: Gives for each prompt a pool of another set, from which `"random_prompt"` takes its responses in
            place of `pools`.
    """
    ids = ids_of(pools)
    others: dict[str, list[int]] = {}
    if "related_prompt" in names:
        related_or_none = related_prompts(pool.prompt.text for pool in pools)
        by_chance = random_prompts(ids, seed, iteration, "related prompt")
        others["related_prompt"] = [
            drawn if found is None else found for found, drawn in zip(related_or_none, by_chance, strict=True)
        ]
        if num_unlike := related_or_none.count(None):
            logger.info(
                f"Iteration {iteration}: {num_unlike} of {len(ids)} prompts have no word in common with another one. "
                "For these, `related_prompt` takes a random prompt."
            )
    if "random_prompt" in names:
        others["random_prompt"] = random_prompts(ids, seed, iteration) if unrelated is None else []

    def with_responses(place: int) -> CandidatePool:
        pool = pools[place]
        added = []
        for name, related in others.items():
            other = pools[related[place]] if related or unrelated is None else unrelated(pool.prompt)
            # Those that can be trained on first
            usable = sorted(other.candidates, key=lambda c: not (c.finished and c.text.strip()))
            added += [
                replace(
                    candidate,
                    completion=in_form_of(pool.prompt.content, candidate.completion),
                    source=name,
                    of_prompt=other.prompt.id,
                )
                for candidate in usable[:num_negatives]
            ]
        return pool.with_candidates([*pool.candidates, *added])

    return StoredPools(ids, with_responses)


def related_prompts(texts: Iterable[str], most_compared: int = 50_000) -> list[int | None]:
    """
    For each prompt the one most like it, by the words they share; rarer words weigh more (TF-IDF, cosine).

    In scripts without spaces between words, and in Hangul, pairs of neighboring characters count as words.

    Each prompt is compared with those that share its rarest words. Time and memory grow with the number of prompts,
    and not with its square.

    Args:
        texts: At least two prompts.
        most_compared: Once its words have led to so many prompts, its more frequent words are left aside. Of some
            hundred prompts, all words count.

    Returns:
        Index of the related prompt for each, never its own. Of prompts equally alike the first counts. `None` where no
        other prompt shares a word, or only such as almost all prompts have.
    """
    index = _WordIndex(texts)
    numbers = tqdm(range(index.num_texts), desc="Related prompts", unit=" prompts", delay=_QUIET_SECONDS)
    return [index.most_similar(number, most_compared) for number in numbers]


def _words(text: str) -> Iterator[str]:
    for match in _WORD.finditer(text.lower()):
        characters = match[1]
        if characters is None or len(characters) == 1:
            yield match[0]
        else:
            yield from map("".join, itertools.pairwise(characters))


class _WordIndex:
    """Which text has which words: for each word its texts, and for each text its words, as sorted arrays."""

    def __init__(self, texts: Iterable[str]):
        columns: dict[str, int] = {}
        rows_of, columns_of, counts_of = array("i"), array("i"), array("d")
        starts = [0]
        for row, text in enumerate(texts):
            for word, count in Counter(_words(text)).items():
                rows_of.append(row)
                columns_of.append(columns.setdefault(word, len(columns)))
                counts_of.append(count)
            starts.append(len(rows_of))
        self.num_texts, self.starts = len(starts) - 1, starts
        rows, self.words, counts = (np.array(values) for values in (rows_of, columns_of, counts_of))
        self.num_with = np.bincount(self.words.astype(int), minlength=len(columns))
        # A little more than log(n / df), so that prompts without any rare word are not all alike
        weights = counts * (np.log(self.num_texts / self.num_with) + 1e-3)[self.words.astype(int)]
        norms = np.sqrt(np.bincount(rows.astype(int), weights**2, minlength=self.num_texts))
        self.weights = weights / norms[rows.astype(int)]
        by_word = np.argsort(self.words, kind="stable")
        self.texts_with, self.weights_in = rows[by_word], self.weights[by_word]
        self.ends = np.cumsum(self.num_with)

    def most_similar(self, number: int, most_compared: int) -> int | None:
        """Index of the text most like a text; `None` if none is like it."""
        own = slice(self.starts[number], self.starts[number + 1])
        words, weights = self.words[own], self.weights[own]
        rarest_first = np.argsort(self.num_with[words], kind="stable")
        compared = np.cumsum(self.num_with[words[rarest_first]])
        used = rarest_first[: 1 + np.searchsorted(compared, most_compared)]
        found = [slice(self.ends[word] - self.num_with[word], self.ends[word]) for word in words[used]]
        similarity = np.zeros(self.num_texts)
        if found:
            similarity = np.bincount(
                np.concatenate([self.texts_with[places] for places in found]),
                np.concatenate([w * self.weights_in[places] for w, places in zip(weights[used], found, strict=True)]),
                minlength=self.num_texts,
            )
        # Rounding differs between machines; it must not decide between prompts that are equally similar
        similarity = np.round(similarity * 1e5)
        similarity[number] = 0
        most = int(similarity.argmax())
        return most if similarity[most] > 0 else None


def random_prompts(ids: list[str], seed: int, iteration: int, purpose: str = "random prompt") -> list[int]:
    """
    For each prompt another one, drawn by chance.

    Args:
        ids: Names of the prompts, at least two.
        seed: Seed of the run.
        iteration: Draws differ between iterations.
        purpose: Draws also differ between purposes.

    Returns:
        Index of the other prompt for each. It depends on the prompt and on the other arguments alone.
    """
    drawn = [_draw(name, len(ids) - 1, seed, iteration, purpose) for name in ids]
    return [other + (other >= index) for index, other in enumerate(drawn)]


def unrelated_prompts(prompts: list[Prompt], others: list[Prompt], seed: int, iteration: int) -> dict[str, Prompt]:
    """For each of `prompts`, by its name, one of `others`, drawn by chance as in [`random_prompts`]."""
    return {prompt.id: others[_draw(prompt.id, len(others), seed, iteration)] for prompt in prompts}


def _draw(name: str, count: int, seed: int, iteration: int, purpose: str = "random prompt") -> int:
    digest = hashlib.sha256(f"{seed}/{iteration}/{name}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
