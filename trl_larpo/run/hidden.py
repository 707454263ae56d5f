"""Options with secrets in them, on their way to the processes of a stage: in the environment, past all files."""

import json
import os
from typing import Any

from ..errors import ConfigError
from ..redaction import HIDDEN
from .folder import HIDDEN_OPTIONS, RunFolder

_VARIABLE = "LARPO_HIDDEN_OPTIONS"

_NOT_OF_STAGES = ("notify_command", "mirror")  # the loop alone uses them


def environment_of_stages(folder: RunFolder) -> dict[str, str]:
    """What the environment of a stage's processes has beside that of this one."""
    hidden = {name: value for name, value in folder.hidden_options().items() if name not in _NOT_OF_STAGES}
    return {_VARIABLE: json.dumps(hidden)} if hidden else {}


def with_hidden_options(options: dict[str, Any]) -> dict[str, Any]:
    """
    Options from run.yaml, with what is hidden there.

    Raises:
        ConfigError: If the environment does not have it.
    """
    found = json.loads(os.environ.get(_VARIABLE, "{}"))
    hidden = options.get(HIDDEN_OPTIONS)
    if hidden is None:  # written by a version that did not list them
        hidden = [name for name, value in options.items() if HIDDEN in str(value)]
    missing = [name for name in hidden if name not in found and name not in _NOT_OF_STAGES]
    if missing:
        raise ConfigError(
            f"`{missing[0]}` has a secret in it, which is in no file. Let `train_launcher` pass on the environment "
            f"variable {_VARIABLE}, or put the secret into a variable of its own, e.g. HF_TOKEN."
        )
    return options | found
