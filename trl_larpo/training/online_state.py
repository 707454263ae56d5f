"""What a checkpoint of an online training needs beside TRL's: samples that are still to be trained on, and memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from .token_rows import Batch

logger = get_logger(__name__)


@dataclass
class OnlineState:
    """
    The state of one process between two optimizer steps.

    Attributes:
        step: Batches so far, those within an optimizer step included.
        num_processes: How many processes there are.
        batches: What was sampled last, in batches of a step. Empty where the next step samples again.
        memory: Rows of [`SampleMemory`].
    """

    step: int
    num_processes: int
    batches: list[Batch]
    memory: list[dict[str, Any]]

    def save(self, folder: Path, process: int) -> None:
        """Writes `online-PROCESS.json` and, where there are batches, `online-PROCESS.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{place}.{name}": value.contiguous().cpu()
            for place, batch in enumerate(self.batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        if tensors:
            save_file(tensors, folder / f"online-{process}.safetensors")
        row = {"step": self.step, "num_processes": self.num_processes, "memory": self.memory}
        (folder / f"online-{process}.json").write_text(json.dumps(row), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, process: int, num_processes: int, device: torch.device) -> "OnlineState | None":
        """What [`save`] wrote; `None` where there is nothing, or it is of another number of processes."""
        path = folder / f"online-{process}.json"
        row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if row.get("num_processes") != num_processes:
            logger.warning(
                f"{folder} does not have the samples and the memory of as many processes as there are now "
                f"({num_processes}): the training resumes with new samples."
            )
            return None
        batches: dict[int, Batch] = {}
        if (tensors := path.with_suffix(".safetensors")).exists():
            for key, value in load_file(tensors).items():
                place, _, name = key.partition(".")
                batches.setdefault(int(place), {})[name] = value.to(device)
        return cls(row["step"], num_processes, [batches[place] for place in sorted(batches)], row["memory"])
