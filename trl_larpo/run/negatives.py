"""Easy negatives: responses to other prompts (paper, section 3.2)."""

import hashlib
import math
import re
from collections import Counter

import torch

_PROMPTS_AT_A_TIME = 256


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
    drawn = []
    for index, name in enumerate(ids):
        digest = hashlib.sha256(f"{seed}/{iteration}/{name}/random prompt".encode()).digest()
        other = int.from_bytes(digest[:8], "big") % (len(ids) - 1)
        drawn.append(other + (other >= index))
    return drawn
