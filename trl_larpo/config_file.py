"""YAML files of options: what YAML would take for something else without a word is understood, or refused."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import yaml

from .errors import ConfigError


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
    Options of a YAML file, with "no" where it is one of the choices: YAML reads it as false.

    Args:
        options: By name.
        actions: What argparse knows of each.
    """
    choices = {action.dest: action.choices or () for action in actions}
    return {
        name: "no" if value is False and "no" in choices.get(name, ()) else value for name, value in options.items()
    }


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
