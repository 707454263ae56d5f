"""
Runs recipes in small form, one after the other, and says which work.

    python examples/recipes/run_small.py                                    # all of them: ten minutes
    python examples/recipes/run_small.py examples/recipes/table2/*.yaml     # some
"""

import argparse
import sys
import time
from pathlib import Path

from trl_larpo import cli


def main(argv: list[str] | None = None) -> int:
    """Returns the number of recipes that failed."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="recipes (default: all)")
    recipes = parser.parse_args(argv).recipes or sorted(Path(__file__).parent.glob("*/*.yaml"))
    failed = []
    for path in recipes:
        started = time.monotonic()
        if cli.main(["run", "--config", str(path), "--small"]) != 0:
            failed.append(path)
        print(f"{'FAILED' if path in failed else 'ok':6} {time.monotonic() - started:5.1f} s  {path}", flush=True)
    print(f"{len(recipes) - len(failed)} of {len(recipes)} recipes ran in small form.")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
