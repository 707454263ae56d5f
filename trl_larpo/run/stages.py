"""
The stages of an iteration, in one table.

Each reads what earlier ones left in the run folder and leaves one file or folder that is whole. Run again after a kill,
a stage resumes from what it has saved, and its output is identical. With several processes (`accelerate launch`) each
does its share, and the first one puts the shares together.

The table is light: the function of a stage is imported when the stage is run. `larpo status` reads the table every few
seconds, and a process that samples has no use for a trainer.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LarPOError
from ..iterations import iteration_folder
from ..preparation import preparing, seconds_of_preparation
from ..storage import write_json
from .timings import WORK

if TYPE_CHECKING:
    from .context import RunContext
    from .folder import RunFolder
    from .options import RunConfig


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
    function: Callable[["RunContext", int, Path], None]
    inputs: tuple[str, ...] = ()
    processes: str | None = None
    sharded: bool = False
    at_start: bool = False
    uses: str | None = None

    def path(self, folder: "RunFolder", iteration: int) -> Path:
        """Where the output is."""
        return folder.iteration(iteration) / self.output

    def num_processes(self, options: "RunConfig") -> int:
        """How many processes it runs in."""
        if self.processes is None or (self.processes == "generation" and options.uses_servers):
            return 1
        own = getattr(options, f"{self.processes}_processes")
        return options.num_processes if own is None else own


def _of(module: str, name: str) -> Callable[["RunContext", int, Path], None]:
    """A function of a module beside this one, which is imported when the function is called."""

    def function(context: "RunContext", iteration: int, path: Path) -> None:
        with preparing():
            imported = importlib.import_module(f".{module}", __package__)
        getattr(imported, name)(context, iteration, path)

    return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage("generate", "samples.jsonl", _of("candidate_stages", "generate"), processes="generation", uses="sampler"),
        Stage(
            "reward",
            "rewarded.jsonl",
            _of("candidate_stages", "reward"),
            ("generate",),
            processes="reward",
            uses="scorer",
        ),
        Stage("select", "selection.json", _of("candidate_stages", "select"), ("reward",)),
        Stage(
            "reference",
            "ref_logps.jsonl",
            _of("training_stages", "reference"),
            ("select",),
            processes="train",
            sharded=True,
        ),
        Stage(
            "train", "model", _of("training_stages", "train"), ("select", "reference"), processes="train", sharded=True
        ),
        Stage(
            "held_out_samples",
            "held_out_samples.jsonl",
            _of("evaluation_stages", "held_out_samples"),
            processes="generation",
            at_start=True,
            uses="sampler",
        ),
        Stage(
            "held_out",
            "held_out.jsonl",
            _of("evaluation_stages", "held_out"),
            ("held_out_samples",),
            processes="reward",
            at_start=True,
            uses="scorer",
        ),
        Stage(
            "evaluate",
            "evaluation.json",
            _of("evaluation_stages", "evaluate"),
            ("held_out_samples", "held_out"),
            processes="train",
            sharded=True,
            at_start=True,
        ),
    )
}
"""All stages by name, in the order of an iteration."""


def is_done(run: Path, stage: Stage, iteration: int, num_iterations: int) -> bool:
    """
    Whether nothing is left to do of a stage: its output is there, or was deleted when the run had no more use for it.
    That is so for the samples of an evaluated iteration that are in its rewarded file, and for the model of one whose
    next iteration needs it no more.
    """
    folder = iteration_folder(run, iteration)
    if (folder / stage.output).exists():
        return True
    if stage.name not in ("generate", "train") or not (folder / STAGES["evaluate"].output).exists():
        return False
    if stage.name == "generate":
        return (folder / STAGES["reward"].output).exists()
    users = [STAGES[name] for name in ("generate", "reference", "train")]
    return iteration < num_iterations and all(is_done(run, user, iteration + 1, num_iterations) for user in users)


def run_stage(context: "RunContext", stage: Stage, iteration: int) -> None:
    """
    Does what is left of a stage, in this process or as one of several.

    Raises:
        LarPOError: If an input is missing.
    """
    from accelerate import PartialState

    from ..waiting import wait_for_all

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
