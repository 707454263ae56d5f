"""Dataclasses of options that come from YAML and flags."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def option(default: Any, text: str, **metadata: Any):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text} | metadata)
    return field(default=default, metadata={"help": text} | metadata)


@dataclass
class CheckedOptions:
    def __post_init__(self):
        """YAML gives any type; this makes lists of single values and refuses what is of another type."""
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = getattr(self, each.name)
            kinds = get_args(hints[each.name]) if type(None) in get_args(hints[each.name]) else (hints[each.name],)
            if value is None and type(None) in kinds:
                continue
            kind = kinds[0]
            if kind is dict and isinstance(value, str):  # as a flag gives it
                value = _parsed(value, each.name)
            if get_origin(kind) is list:
                value = value if isinstance(value, list | tuple) else [value]
                value = [_of_type(item, get_args(kind)[0], each.name) for item in value]
            else:
                value = _of_type(value, kind, each.name)
            setattr(self, each.name, value)


def _of_type(value: Any, kind: type, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(of_another_type(name, value, KINDS[kind]))
    return value


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "names and values"}
"""What values of the types are called."""


def of_another_type(name: str, value: Any, kind: str) -> str:
    """The message that a value of an option is not of its kind."""
    hint = " (YAML reads no, off, yes and on as true or false: quote it)" if isinstance(value, bool) else ""
    return f"`{name}` is {value!r}; it must be {kind}{hint}."


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"`{name}` is {text!r}; as a flag it is written in JSON: '{{\"name\": value}}'.") from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` has {value!r}; it must be one of {', '.join(choices)}.")
