"""Errors of the package cross processes: pools of processes send them pickled, and hang or hide those that are not."""

import contextlib
import importlib
import inspect
import pickle
import pkgutil

import pytest

import trl_larpo


def exceptions() -> list[type[BaseException]]:
    """Every one that a module of the package defines."""
    found = {}
    for module in pkgutil.walk_packages(trl_larpo.__path__, "trl_larpo."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of modules for another TRL
                names = vars(importlib.import_module(module.name)).values()
                of_module = (x for x in names if isinstance(x, type) and issubclass(x, BaseException))
                found |= {x.__qualname__: x for x in of_module if x.__module__ == module.name}
    return list(found.values())


@pytest.mark.slow  # it imports all modules
def test_errors_are_the_same_in_another_process():
    kinds, of_type = exceptions(), {str: "Something is wrong.", int: 9}
    assert {"LarPOError", "ProcessError", "Stopped", "ServersGoneError", "RouteError"} <= {x.__name__ for x in kinds}
    for kind in kinds:
        arguments = inspect.signature(kind).parameters.values() if "__init__" in vars(kind) else ()
        error = kind(*(of_type[x.annotation] for x in arguments)) if arguments else kind("Something is wrong.")
        error.add_note("a note")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))
