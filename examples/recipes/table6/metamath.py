"""
Writes MetaMathQA as conversations for `trl sft`: the SFT of the paper's table 6.

    python examples/recipes/table6/metamath.py outputs/recipes/table6/metamath

The argument is the folder to write to.
"""

import sys
from pathlib import Path

from datasets import Dataset, load_dataset


def as_conversations(rows: Dataset) -> Dataset:
    """MetaMathQA's `query` and `response` as TRL's columns `prompt` and `completion`."""

    def conversation(row: dict) -> dict:
        return {
            "prompt": [{"role": "user", "content": row["query"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }

    return rows.map(conversation, remove_columns=rows.column_names)


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = as_conversations(load_dataset("meta-math/MetaMathQA", split="train"))
    rows.to_json(Path(folder) / "train.jsonl")
    print(f"{len(rows)} conversations in {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
