"""YAML files of options: what YAML would take for something else without a word is understood, or refused."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError
from .options import KINDS, CheckedOptions, of_another_type


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that occurs twice, YAML takes the last value; this refuses it."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{key.start_mark.name} has `{name}` twice, in lines {lines[name]} and {line}.")
            lines[name] = line
        return node


def with_config_apart(argv: list[str]) -> list[str]:
    """
    The words of a command, with `--config=FILE` as the two words that TRL's parser takes.

    Raises:
        ConfigError: If there are several files.
    """
    words: list[str] = []
    for word in argv:
        flag, is_joined, path = word.partition("=")
        words += [flag, os.path.expanduser(path)] if is_joined and flag == "--config" else [word]
    if words.count("--config") > 1:
        raise ConfigError("`--config` is given twice; put all options in one YAML file, or give some as flags.")
    return words


def check_config_file(argv: list[str]) -> None:
    """
    Checks the file that `--config` names, if it does.

    Raises:
        ConfigError: If it cannot be read, or has a key twice.
    """
    for flag, path in itertools.pairwise(argv):
        if flag == "--config":
            try:
                with open(path, encoding="utf-8") as file:
                    yaml.load(file, _UniqueKeys)
            except OSError as error:
                raise ConfigError(f"`--config`: {path!r} cannot be read: {error.strerror}.") from None
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"`--config`: {path!r} is not YAML: {' '.join(str(error).split())}") from None


def as_meant(options: dict[str, Any], actions: Iterable[Any]) -> dict[str, Any]:
    """
    Options of a YAML file as flags would give them: "no", "off" and "on" where they are among the choices (YAML reads
    them as false and true), and lists of one value for options that take several, with numbers out of texts (YAML reads
    `1e-2` as text).

    Args:
        options: By name.
        actions: What argparse knows of each.

    Raises:
        ConfigError: If a text in a list is not what the option takes.
    """
    known = {action.dest: action for action in sorted(actions, key=lambda action: action.nargs == "+")}
    choices = {action.dest: action.choices or () for action in actions}
    meant = {}
    for name, value in options.items():
        words = [word for word, read in _WORDS.items() if read is value and word in choices.get(name, ())]
        if words:
            value = words[0]
        elif name == "resume_from_checkpoint" and isinstance(value, bool):
            value = str(value).lower()  # as the flag is written
        if name in known and known[name].nargs == "+" and value is not None:
            items = value if isinstance(value, list) else [value]
            value = [_converted(name, item, known[name].type) for item in items]
        meant[name] = value
    return meant


_WORDS = {"no": False, "off": False, "on": True}  # as YAML reads them


def _converted(name: str, item: Any, kind: Any) -> Any:
    """An item of a list; argparse converts texts only outside of lists."""
    if not isinstance(item, str):
        return item
    try:
        return kind(item)
    except ValueError:
        raise ConfigError(of_another_type(name, item, KINDS.get(kind, kind.__name__))) from None


def check_types(options: dict[str, Any], groups: Iterable[Any]) -> None:
    """
    Checks what TRL and transformers do not: their options have the types of what the YAML file gives.

    Args:
        options: From [`as_meant`]. Texts outside of lists are left to argparse, which converts them.
        groups: Dataclasses of options. [`CheckedOptions`] check themselves.

    Raises:
        ConfigError: Names an option, its value, and what it must be.
    """
    for group in groups:
        if issubclass(group, CheckedOptions):
            continue
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            value, hint = options.get(field.name, ""), hints[field.name]
            is_unset = value is None and (field.default is None or hint is str)  # as YAML's `name:` is mostly meant
            if isinstance(value, str) or is_unset or _fits(value, hint):
                continue
            if isinstance(value, _MORE_TYPES.get(field.name, ())):
                continue
            raise ConfigError(of_another_type(field.name, value, " or ".join(dict.fromkeys(_names(hint)))))


_MORE_TYPES: dict[str, Any] = {"scale_rewards": bool, "fsdp": (bool, list)}  # no hint tells them


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, each) for item in value for each in arguments)
    if isinstance(value, bool):
        return origin is bool or (origin not in (*KINDS, NoneType) and not issubclass(origin, Enum))
    if origin is float:
        return isinstance(value, int | float)
    if issubclass(origin, Enum):  # its names are checked later
        return isinstance(value, str)
    return isinstance(value, origin) if origin in (*KINDS, NoneType) else True  # or a class that takes what it takes


def _names(hint: Any) -> list[str]:
    """What values of a type are called."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return [name for each in arguments if each is not NoneType for name in _names(each)]
    if origin is Literal:
        return list(map(repr, arguments))
    if origin is list and arguments:
        return [f"a list (each item: {' or '.join(_names(arguments[0]))})"]
    return [KINDS.get(origin, "text" if issubclass(origin, Enum) else origin.__name__)]


def check_numbers(*groups: Any) -> None:
    """
    Args:
        groups: Dataclasses of options.

    Raises:
        ConfigError: If one is not a number (`.nan` in YAML): every comparison with it is false, and so every check.
    """
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name, None)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, float) and math.isnan(each):
                    raise ConfigError(f"`{field.name}` is nan, which is not a number.")


_PATHS = ("output", "model_name_or_path", "candidates", "samples", "prompts", "accelerate_config")


_FLAGS = ("config", "help", "help_all", "small", "try")


def check_no_flags(options: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: If a YAML file has what can only be a flag.
    """
    for name in _FLAGS:
        if name in options:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"`{name}` in the YAML file: write it as the flag `{flag}` in the command, and leave it out."
            )


def expand_paths(*groups: Any) -> None:
    """
    Puts the home folder in place of `~` in options that name files and folders: no shell does so in a YAML file.

    Args:
        groups: Dataclasses of options.
    """
    for group in groups:
        for name in _PATHS:
            value = getattr(group, name, None)
            if isinstance(value, str):
                setattr(group, name, os.path.expanduser(value))
            elif isinstance(value, list):
                setattr(group, name, [os.path.expanduser(path) for path in value])
