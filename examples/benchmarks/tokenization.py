"""
Time of tokenizing lists for the training: prompts once for a list, against once more for each completion.

    python examples/quickstart/get_model.py
    python examples/benchmarks/tokenization.py --model outputs/SmolLM2-135M-Instruct

Lists are conversations of random words. Both ways are measured by turns in one process, with the threads of the
tokenizers library (`RAYON_NUM_THREADS=1`: one core), and must give the same tokens. Times are the fastest of
`--repeats`, which other programs on the machine disturb least.
"""

import argparse
import random
import time
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer

from trl_larpo.training import tokenization

WORDS = (
    "the of and to in is you that it was for on are as with his they at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then "
    "them these so some her would make like him into time has look two more write go see number no way could people"
)


def main(argv: list[str] | None = None) -> dict[tuple[int, int], tuple[float, float]]:
    """Returns milliseconds per list, of whole texts and of parts, by words of the prompt and number of completions."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a tokenizer with a chat template")
    parser.add_argument("--prompts", type=int, nargs="+", default=[60, 1170], help="words of a prompt")
    parser.add_argument("--completions", type=int, nargs="+", default=[4, 10], help="completions of a list")
    parser.add_argument("--words", type=int, default=75, help="words of a completion")
    parser.add_argument("--lists", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    PartialState()  # which logging needs
    tokenizer, rng = AutoTokenizer.from_pretrained(options.model), random.Random(0)
    results = {}
    print("  prompt  completions      whole      parts  ratio  60,000 lists")
    for num_words in options.prompts:
        for size in options.completions:
            rows = [make_row(rng, num_words, size, options.words) for _ in range(options.lists)]
            seconds = {True: float("inf"), False: float("inf")}
            tokens = {}
            for _ in range(options.repeats):
                for by_parts in (False, True):
                    started = time.perf_counter()
                    tokens[by_parts] = tokenize(rows, tokenizer, by_parts)
                    seconds[by_parts] = min(seconds[by_parts], time.perf_counter() - started)
            if tokens[True] != tokens[False]:
                raise SystemExit("The tokens of parts are not those of whole texts.")
            whole, parts = (1000 * seconds[by_parts] / len(rows) for by_parts in (False, True))
            length = sum(len(row["prompt_ids"]) for row in tokens[True]) / len(rows)
            print(
                f"{length:8.0f} {size:12d} {whole:7.2f} ms {parts:7.2f} ms {whole / parts:6.2f} "
                f"{whole:5.1f} → {parts:.1f} min"
            )
            results[num_words, size] = whole, parts
    return results


def make_row(rng: random.Random, prompt_words: int, size: int, words: int) -> dict[str, Any]:
    """A list of random words; those of a prompt are counted in words."""

    def message(role: str, count: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choices(WORDS.split(), k=count))}]

    completions = [message("assistant", words) for _ in range(size)]
    return {"prompt": message("user", prompt_words), "completions": completions}


def tokenize(rows: list[dict[str, Any]], tokenizer: Any, by_parts: bool) -> list[dict[str, Any]]:
    """Tokens of rows, without the checks of some of them."""
    settings = {"processing_class": tokenizer, "eos_token": tokenizer.eos_token, "where": "lists", "code": ""}
    settings |= {"length_column": "length", "truncated_completions": "rank_last", "min_candidates": 2}
    return [tokenization._tokenize_row(row, 10, by_parts=by_parts, **settings) for row in rows]


if __name__ == "__main__":
    main()
