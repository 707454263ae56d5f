"""A stage in a process of its own: what `larpo stage` does. It imports no more than its stage needs."""

import dataclasses
from pathlib import Path

from accelerate import PartialState

from ..full_disk import explain_full_disk
from ..storage import read_yaml
from .context import RunContext
from .folder import RunFolder
from .hidden import with_hidden_options
from .loading import tokenizer_of
from .options import RunConfig, RunModelConfig, RunTrainingConfig
from .stages import STAGES, run_stage
from .status import forget_warnings, keep_warnings


def run_stage_of(path: str, stage: str, iteration: int) -> None:
    """
    Does one stage of a run, as one of several processes.

    Args:
        path: Folder of the run.
        stage: One of [`STAGES`].
        iteration: From 0 on.
    """
    values = with_hidden_options(read_yaml(Path(path) / "run.yaml"))

    def restore(options_class):
        names = {option.name for option in dataclasses.fields(options_class) if option.init}
        return options_class(**{name: value for name, value in values.items() if name in names})

    folder = RunFolder(restore(RunConfig), restore(RunTrainingConfig), restore(RunModelConfig))
    folder.path = Path(path)
    folder.prepare_prompts(tokenizer_of(folder.model))
    context = RunContext(folder)
    warnings = keep_warnings(folder.path) if PartialState().is_main_process else None
    try:
        with explain_full_disk(folder.path):
            run_stage(context, STAGES[stage], iteration)
    finally:
        context.close()
        if warnings is not None:
            forget_warnings(warnings)
