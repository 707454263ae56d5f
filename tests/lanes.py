"""Parameters of a test of which the fast lane takes only some."""

from collections.abc import Collection, Iterable

import pytest


def some_are_fast(values: Iterable, fast: Collection) -> list:
    """The values, all but those in `fast` marked as slow."""
    values = list(values)
    assert set(fast) <= set(values), f"not among the values: {set(fast) - set(values)}"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
