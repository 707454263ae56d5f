"""
The stages of an iteration, in one table.

Each reads what earlier ones left in the run folder and leaves one file or folder that is whole. Run again after a kill,
a stage resumes from what it has saved, and its output is identical. With several processes (`accelerate launch`) each
does its share, and the first one puts the shares together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from ..errors import LarPOError
from ..preparation import seconds_of_preparation
from ..storage import write_json
from ..waiting import wait_for_all
from .candidate_stages import generate, reward, select
from .context import RunContext
from .evaluation_stages import evaluate, held_out, held_out_samples
from .folder import WORK, RunFolder
from .options import RunConfig
from .training_stages import reference, train


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Attributes:
        name: As `larpo stage --stage` takes it, and as the log says it.
        output: The file or folder, in the folder of the iteration, that is there when the stage is done.
        function: Does what is left of the stage: `function(context, iteration, path of the output)`.
        inputs: Stages of the same iteration whose outputs it reads.
        processes: The option that says in how many processes it runs, without `_processes`; `None`: in one.
        sharded: Whether it runs the model with accelerate's configuration, sharded where it is too large for a device.
        at_start: Whether it is done for the initial model too, as iteration 0.
        uses: What has the devices meanwhile: the context's `"sampler"`, its `"scorer"`, or `None` for the stage itself.
            One at a time: the others stop their servers and let go of their models before it begins.
    """

    name: str
    output: str
    function: Callable[[RunContext, int, Path], None]
    inputs: tuple[str, ...] = ()
    processes: str | None = None
    sharded: bool = False
    at_start: bool = False
    uses: str | None = None

    def path(self, folder: RunFolder, iteration: int) -> Path:
        """Where the output is."""
        return folder.iteration(iteration) / self.output

    def num_processes(self, options: RunConfig) -> int:
        """How many processes it runs in."""
        if self.processes is None or (self.processes == "generation" and options.uses_servers):
            return 1
        own = getattr(options, f"{self.processes}_processes")
        return options.num_processes if own is None else own


STAGES = {
    stage.name: stage
    for stage in (
        Stage("generate", "samples.jsonl", generate, processes="generation", uses="sampler"),
        Stage("reward", "rewarded.jsonl", reward, ("generate",), processes="reward", uses="scorer"),
        Stage("select", "selection.json", select, ("reward",)),
        Stage("reference", "ref_logps.jsonl", reference, ("select",), processes="train", sharded=True),
        Stage("train", "model", train, ("select", "reference"), processes="train", sharded=True),
        Stage(
            "held_out_samples",
            "held_out_samples.jsonl",
            held_out_samples,
            processes="generation",
            at_start=True,
            uses="sampler",
        ),
        Stage(
            "held_out",
            "held_out.jsonl",
            held_out,
            ("held_out_samples",),
            processes="reward",
            at_start=True,
            uses="scorer",
        ),
        Stage("evaluate", "evaluation.json", evaluate, ("held_out",), processes="train", sharded=True, at_start=True),
    )
}
"""All stages by name, in the order of an iteration."""


def run_stage(context: RunContext, stage: Stage, iteration: int) -> None:
    """
    Does what is left of a stage, in this process or as one of several.

    Raises:
        LarPOError: If an input is missing.
    """
    path = stage.path(context.folder, iteration)
    missing = not path.exists()
    wait_for_all()  # all have looked before anyone begins, and agree
    if missing:
        for name in stage.inputs:
            if not (needed := STAGES[name].path(context.folder, iteration)).exists():
                raise LarPOError(f"The stage {stage.name!r} needs {needed}, which the stage {name!r} makes.")
        context.leave_devices_to(stage.uses)
        started, prepared = time.monotonic(), seconds_of_preparation()
        stage.function(context, iteration, path)
        wait_for_all()
        if PartialState().is_main_process:
            seconds = time.monotonic() - started - (seconds_of_preparation() - prepared)
            write_json(context.folder.path / WORK, {"iteration": iteration, "stage": stage.name, "seconds": seconds})
