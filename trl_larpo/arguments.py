"""
Options of the commands, from YAML files and flags, through TRL's parser; and what of them is for `accelerate launch`.
"""

import argparse
import difflib
import os
import subprocess

from .config_file import as_meant, check_config_file, check_no_flags, check_numbers, check_types, expand_paths
from .errors import ConfigError, LarPOError, ProcessError
from .lifetime import Stopped, ended_by, exit_status, is_launched, mark_launcher
from .option_help import ShowFullHelp, short_help


def asks_for_help(argv: list[str]) -> list[str]:
    """Those of the words that ask for an explanation."""
    return [word for word in argv if word in ("-h", "--help", "--help-all")]


class Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others of a user's input."""

    def error(self, message):  # argparse would print its usage first
        flag = "--help-all" if "--help-all" in self._option_string_actions else "--help"
        raise ConfigError(f"{message} (`{self.prog} {flag}` explains every option)")


def parse_options(
    argv: list[str],
    dataclasses: tuple,
    *,
    command: str,
    description: str,
    epilog: str | None = None,
    launchable: bool = False,
):
    """
    Options as dataclasses, and what is left for `accelerate launch`: words from the YAML file, and from flags.

    In a process that has been launched, those of the YAML file have done their work, and are left out.

    Args:
        argv: What follows the command's name.
        dataclasses: What to fill with options.
        command: Name of the command.
        description: What it does, for `--help`.
        epilog: What else `--help` should say.
        launchable: Whether options of `accelerate launch` are taken too.

    Raises:
        ConfigError: If an option is unknown, or has a value that it cannot take.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl import TrlParser

    launch_actions = launch_command_parser()._actions if launchable else []
    switches = {flag for action in launch_actions if action.nargs == 0 for flag in action.option_strings}

    class OptionParser(TrlParser):
        error = Parser.error

        def format_help(self):
            return short_help(self)

        def set_defaults_with_config(self, **config):
            check_no_flags(config)
            config = as_meant(config, [*launch_actions, *self._actions])
            check_types(config, dataclasses)
            words = super().set_defaults_with_config(**config)
            pairs = zip(words[::2], words[1::2], strict=True)
            return [word for flag, value in pairs for word in _as_flag(flag, value, flag in switches)]

    parser = OptionParser(
        dataclasses,
        prog=f"larpo {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", dest=argparse.SUPPRESS, action=ShowFullHelp)
    if flags := asks_for_help(argv):
        if os.environ.get("LOCAL_RANK", "0") != "0":  # once, not once per process
            parser.exit()
        parser.parse_args(flags[:1])  # which ends here; before a YAML file changes the defaults
    check_config_file(argv)
    try:
        *options, from_config, from_flags = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        check_numbers(*options)
        expand_paths(*options)
    except LarPOError:
        raise
    except IndexError:
        raise ConfigError("`--config` needs the path of a YAML file.") from None
    except Exception as error:  # of many libraries: YAML, files, values that a dataclass refuses
        raise ConfigError(" ".join(str(error).split())) from error

    remaining = from_config + from_flags
    known = {flag for action in parser._actions for flag in action.option_strings}
    if launchable:
        known |= {flag for action in launch_actions for flag in action.option_strings} | {"--accelerate_config"}
    for word in remaining:
        flag = word.split("=")[0]
        if flag.startswith("--") and (flag not in known or not launchable):
            close = difflib.get_close_matches(flag, sorted(known), n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            where = f"`{flag[2:]}` in the YAML file" if word in from_config else f"`{flag}`"
            raise ConfigError(f"Unknown option {where}.{hint}")
    if remaining and not remaining[0].startswith("--"):
        raise ConfigError(f"Unexpected argument {remaining[0]!r}: options start with `--`.")
    if is_launched() or {"RANK", "LOCAL_RANK"} & os.environ.keys():
        from_config = []
    return *options, from_config, from_flags


def _as_flag(flag: str, value: str, is_switch: bool) -> list[str]:
    """The words of a flag for a value of a YAML file: a switch such as `--cpu` is there, or is not."""
    if is_switch and value in ("True", "False"):
        return [flag] * (value == "True")
    return [flag, os.path.expanduser(value) if flag in ("--accelerate_config", "--config_file") else value]


def launch_training(command: str, argv: list[str], from_config: list[str], from_flags: list[str]) -> int:
    """
    Starts `accelerate launch ... -m trl_larpo COMMAND ...`, each option going to the one it belongs to.

    Args:
        command: Name of the command.
        argv: What follows it.
        from_config: Words for accelerate from the YAML file, which the launched processes read again.
        from_flags: Words of `argv` for accelerate, which win.

    Returns:
        The exit status of the process that failed, which has said why.

    Raises:
        ConfigError: If accelerate has launched this process, or has no such configuration.
        ProcessError: If a signal ended a process, which could not say it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .run.launch import first_failure

    if "RANK" in os.environ:
        raise ConfigError(f"Already launched by accelerate; give {from_flags[0]} to `accelerate launch` itself.")
    ours, remaining = [], list(from_flags)
    for word in argv:
        if remaining and word == remaining[0]:
            remaining.pop(0)
        else:
            ours.append(word)
    try:
        launch_args = resolve_accelerate_config_argument([*from_config, *from_flags])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    mark_launcher()
    try:
        launch_command(launch_command_parser().parse_args([*launch_args, "-m", "trl_larpo", command, *ours]))
    except SignalException as stop:
        raise Stopped(stop.sigval) from None
    except subprocess.CalledProcessError as error:
        code, who = error.returncode, "The process"
    except ChildFailedError as error:
        rank, failure = first_failure(error)
        code, who = failure.exitcode, f"Process {rank}"
    else:
        return 0
    if code < 0:
        raise ProcessError(f"{who} {ended_by(-code)}.", exit_status(code))
    return code
