"""
Time that goes into loading models and starting servers, before any work is done.

It does not grow with the number of prompts: what a long run will take is extrapolated without it.
"""

import contextlib
import time
from collections.abc import Iterator


class _Clock:
    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0


_clock = _Clock()


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Counts the time up to the end of the context, once where contexts are nested."""
    started = time.monotonic()
    _clock.depth += 1
    try:
        yield
    finally:
        _clock.depth -= 1
        if _clock.depth == 0:
            _clock.seconds += time.monotonic() - started


def seconds_of_preparation() -> float:
    """What this process has spent in [`preparing`] so far."""
    return _clock.seconds
