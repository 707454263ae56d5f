"""Tells somebody that a run has ended or failed, by a command of the user's."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from accelerate.logging import get_logger

logger = get_logger(__name__)

_SECONDS = 60  # that the command may take


class Notifier:
    """
    Tells of the end of a run, once.

    Args:
        command: As of [`notify`].
        run: Folder of the run.
    """

    def __init__(self, command: str | None, run: Path):
        self.command, self.run = command, run
        self._has_told = False

    def tell(self, state: str, message: str) -> None:
        """As [`notify`], unless the end was told before."""
        if not self._has_told:
            self._has_told = True
            notify(self.command, self.run, state, message)

    @contextlib.contextmanager
    def of_failure(self) -> Iterator[None]:
        """Tells of an error or a stop in the context, and passes it on."""
        try:
            yield
        except BaseException as error:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self.tell(state, str(error) or type(error).__name__)
            raise


def notify(command: str | None, run: Path, state: str, message: str) -> None:
    """
    Runs the command. Whatever goes wrong with it is a warning.

    Args:
        command: For a shell; it finds the rest in the environment variables LARPO_RUN, LARPO_STATE and LARPO_MESSAGE.
            `None`: nobody is told.
        run: Folder of the run.
        state: `"finished"`, `"failed"`, or `"stopped"` by a signal or Ctrl-C.
        message: What happened.
    """
    if command is None:
        return
    told = {"LARPO_RUN": str(run.resolve()), "LARPO_STATE": state, "LARPO_MESSAGE": message}
    try:
        subprocess.run(command, shell=True, check=True, env=os.environ | told, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        logger.warning(f"`notify_command` failed with exit status {error.returncode}.")
    except subprocess.TimeoutExpired:
        logger.warning(f"`notify_command` took more than {_SECONDS} s and was ended.")
    except (OSError, ValueError) as error:
        logger.warning(f"`notify_command` could not be run: {type(error).__name__}")
