"""
Asynchronous rewards: many calls in flight, for judges behind an API.

A reward that is an `async def` function runs in an event loop of its own thread. The loop stays for the whole process:
clients that a reward keeps from one call to the next belong to it.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether calls of the function, or of the object, are to be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def start_call(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
    """Starts a call of an asynchronous function. Cancelling the result cancels the call."""

    return asyncio.run_coroutine_threadsafe(awaited(function, *arguments, **named), _event_loop())


async def awaited(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """
    What a call returns. A `SystemExit`, which would end the loop and with it all later calls, becomes an error, and so
    does what the function has cancelled itself.
    """
    try:
        return await function(*arguments, **named)
    except SystemExit as error:
        raise RuntimeError(f"it ends the program: SystemExit({error.code!r})") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():  # it is the call that is cancelled
            raise
        raise RuntimeError("something that it waited for was cancelled") from error


def result_of(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What a function returns, awaited if it is asynchronous."""
    if not is_asynchronous(function):
        return function(*arguments, **named)
    call = start_call(function, *arguments, **named)
    try:
        return call.result()
    finally:
        call.cancel()  # if the wait was interrupted


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="larpo-rewards", daemon=True).start()
    return loop


class CallsInFlight(Generic[Item]):
    """Calls that have begun, by what they are for. An item without calls is ready at once."""

    def __init__(self) -> None:
        self._calls_of: list[tuple[Item, dict[str, Future]]] = []

    def __len__(self) -> int:
        return len(self._calls_of)

    def add(self, item: Item, calls: dict[str, Future]) -> None:
        self._calls_of.append((item, calls))

    def take_ready(self, timeout: float | None = None) -> list[tuple[Item, dict[str, Future]]]:
        """Takes out the items whose calls have all ended; if there are none, waits for a call, up to some seconds."""
        pending = [call for _, calls in self._calls_of for call in calls.values() if not call.done()]
        ready = [each for each in self._calls_of if all(call.done() for call in each[1].values())]
        self._calls_of = [each for each in self._calls_of if not any(each is taken for taken in ready)]
        if not ready:
            wait(pending, timeout, FIRST_COMPLETED)
        return ready

    def cancel(self) -> None:
        """Cancels all calls."""
        for _, calls in self._calls_of:
            for call in calls.values():
                call.cancel()
