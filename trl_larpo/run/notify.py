"""Tells somebody that a run has ended or failed, by a command of the user's."""

import os
import subprocess
from pathlib import Path

from accelerate.logging import get_logger

logger = get_logger(__name__)

_SECONDS = 60  # that the command may take


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
