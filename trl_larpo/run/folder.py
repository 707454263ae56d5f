"""
The folder of a run: which file is where, the configuration it belongs to, and its prompts.

    run.yaml                     the configuration, without secrets
    prompts.jsonl                prompts in the order they are used
    held_out_prompts.jsonl       prompts to evaluate on
    iteration_0/                 the initial model: evaluation.json, held_out.jsonl
    iteration_1/                 samples.jsonl → rewarded.jsonl → lists.jsonl, selection.json → ref_logps.jsonl →
                                 model/, training_log.jsonl → held_out.jsonl, evaluation.json → health.json
    report.html, plots/          what happened, to look at
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, ModelConfig

from ..errors import ConfigError
from ..generation.in_process import encode_prompt
from ..storage import read_json, read_jsonl, write_json, write_jsonl, write_text
from ..training.config import LarPOConfig
from .options import RunConfig
from .prompts import load_prompts

Row = dict[str, Any]


# May differ when a run is continued: they change where and how it runs, not what comes out
_MAY_CHANGE = frozenset({
    "output_dir", "mirror", "dry_run", "server_urls", "server_command", "num_servers", "server_model",
    "server_health_route", "server_start_timeout", "server_timeout", "server_patience", "server_requests_in_flight",
    "server_api_key_variable", "stop_on", "monitor_evals", "monitor_time_share", "monitor_prompts", "monitor_stop",
    "num_processes", "generation_processes", "reward_processes",
    "train_processes", "accelerate_config", "train_launcher", "report_to", "run_name", "logging_dir", "logging_steps",
    "logging_strategy", "logging_first_step", "disable_tqdm", "log_level", "save_steps",
    "save_strategy", "save_total_limit", "dataloader_num_workers", "project", "trackio_space_id",
})  # fmt: skip


_SECRETS = ("token", "hub_token", "push_to_hub_token")


class RunFolder:
    """
    Paths and prompts of a run.

    Args:
        options: What the loop does.
        training: How the trainer trains; its `output_dir` is the folder.
        model: The initial model, and LoRA.
    """

    def __init__(self, options: RunConfig, training: LarPOConfig, model: ModelConfig):
        self.options, self.training, self.model = options, training, model
        self.path = Path(training.output_dir)

    def iteration(self, number: int) -> Path:
        return self.path / f"iteration_{number}"

    def model_path(self, iteration: int) -> str:
        """The model that an iteration ends with; for 0 the initial one."""
        return self.model.model_name_or_path if iteration == 0 else str(self.iteration(iteration) / "model")

    @property
    def global_batch_size(self) -> int:
        """Lists of one optimizer step, as far as it is known here: not with `train_launcher`."""
        training = self.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return batch * self.options.processes_of("train")

    # Configuration

    def configuration(self) -> dict[str, Any]:
        """All options by name, fit for YAML and without secrets."""
        values: dict[str, Any] = {}
        for part in (self.model, self.training, self.options):
            for option in dataclasses.fields(part):
                if option.init and not option.name.startswith("_") and option.name not in _SECRETS:
                    values[option.name] = _plain(getattr(part, option.name))
        return dict(sorted(values.items()))

    def check_configuration(self) -> None:
        """
        Compares with the configuration that the folder was made with.

        Raises:
            ConfigError: Names each option that differs, or says that the folder is none of ours.
        """
        stored = self.path / "run.yaml"
        if not stored.exists():
            others = [x.name for x in self.path.iterdir() if not x.name.startswith(".")] if self.path.is_dir() else []
            if others:
                raise ConfigError(
                    f"The folder {str(self.path)!r} holds other files ({', '.join(sorted(others)[:3])}) and no run. "
                    "Take a new `output_dir`."
                )
            return
        before, now = yaml.safe_load(stored.read_text(encoding="utf-8")), self.configuration()
        parts = (type(self.options), type(self.training))
        own = {option.name for part in parts for option in dataclasses.fields(part)} - set(
            DPOConfig.__dataclass_fields__
        )
        if unknown := sorted(own - before.keys() - _MAY_CHANGE):
            raise ConfigError(
                f"The run in {str(self.path)!r} was made by another version of trl-larpo, which had no option "
                f"`{unknown[0]}`. Finish it with that version, or take a new `output_dir`."
            )
        changed = [x for x in now if x not in _MAY_CHANGE and x in before and before[x] != now[x]]
        longer = now["num_iterations"] > before["num_iterations"] and self.options.prompt_schedule == "same"
        batch_options = {"per_device_train_batch_size", "gradient_accumulation_steps"}
        processes = before.get("train_processes") or before["num_processes"]
        batch = math.prod(before[name] for name in batch_options) * processes
        if self.options.train_launcher is None and before.get("train_launcher") is None:
            if batch == self.global_batch_size:  # another number of processes, and the same step
                changed = [name for name in changed if name not in batch_options]
            elif not batch_options & set(changed):
                raise ConfigError(
                    f"`num_processes`: a step of the training would have {self.global_batch_size} lists; so far they "
                    f"have {batch}. Change `per_device_train_batch_size` or "
                    "`gradient_accumulation_steps` too, so that it stays the same."
                )
        if longer:  # a run may be made longer, and then needs temperatures for what is new
            kept = now["temperature"][: len(before["temperature"])] == before["temperature"]
            added = {"num_iterations"} | ({"temperature"} if kept and len(before["temperature"]) > 1 else set())
            changed = [name for name in changed if name not in added]
        if changed:
            name = changed[0]
            more = f" Changed too: {', '.join(changed[1:])}." if changed[1:] else ""
            raise ConfigError(
                f"`{name}` is {now[name]!r}, but the run in {str(self.path)!r} was made with {before[name]!r}.{more} "
                "Undo "
                "the change, or take a new `output_dir`."
            )

    def save_configuration(self) -> None:
        text = yaml.safe_dump(self.configuration(), allow_unicode=True, sort_keys=True)
        write_text(self.path / "run.yaml", text)

    # Prompts

    def prepare_prompts(self, tokenizer: PreTrainedTokenizerBase, save: bool = True) -> None:
        """Loads, checks and orders the prompts, once for the whole run."""
        paths = [self.path / name for name in ("prompts.jsonl", "held_out_prompts.jsonl", "prompts.json")]
        if all(path.exists() for path in paths):
            self.prompts, self.held_out, self.prompt_counts = (
                read_jsonl(paths[0]),
                read_jsonl(paths[1]),
                read_json(paths[2]),
            )
            if any("columns" not in row for row in (self.prompts + self.held_out)[:1]):
                raise ConfigError(
                    f"The run in {str(self.path)!r} was made by another version of trl-larpo. Finish it with that "
                    "version, or take a new `output_dir`."
                )
            return
        counts = {"read": 0, "duplicates": 0, "too_long": 0, "also_held_out": 0, "unused": 0}
        sources, held_out = self._load_prompts(tokenizer, counts)
        slices = self._slices(sources, len(held_out))
        counts["unused"] = sum(map(len, sources)) - sum(map(len, slices))
        if self.options.prompt_schedule == "fresh":
            counts["slices"] = list(map(len, slices))
        self.prompts, self.held_out, self.prompt_counts = [row for rows in slices for row in rows], held_out, counts
        if save:
            self.path.mkdir(parents=True, exist_ok=True)
            write_jsonl(paths[0], self.prompts)
            write_jsonl(paths[1], self.held_out)
            write_json(paths[2], counts)

    def _load_prompts(self, tokenizer: PreTrainedTokenizerBase, counts: dict) -> tuple[list[list[Row]], list[Row]]:
        """Usable prompts in the order of their use, from all sources or by source, and those held out."""
        options, limit = self.options, self.options.max_prompt_length
        if limit is None and self.training.max_length is not None:
            limit = self.training.max_length - 1  # room for one token of the completion

        def load(path: str, split: str, known: set[str]) -> list[Row]:
            rows = []
            config = options.prompts_config if path in options.prompts else None
            for row in load_prompts(path, options, config, split):
                counts["read"] += 1
                if row["prompt_id"] in known:
                    counts["duplicates"] += 1
                elif limit is not None and len(encode_prompt(tokenizer, row["prompt"])) > limit:
                    counts["too_long"] += 1
                else:
                    rows.append(row)
                known.add(row["prompt_id"])
            return rows

        seed, known = self.training.seed, set()
        sources = [load(path, options.prompts_split, known) for path in options.prompts]
        if options.prompt_schedule == "same":
            sources = [[row for rows in sources for row in rows]]
        for rows in sources:
            rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{row['prompt_id']}".encode()).digest())
        if options.held_out_prompts is None:
            shares = [options.num_held_out // len(sources)] * len(sources)
            shares[0] += options.num_held_out - sum(shares)
            held_out = [row for rows, share in zip(sources, shares, strict=True) for row in rows[:share]]
            sources = [rows[share:] for rows, share in zip(sources, shares, strict=True)]
        else:
            held_out = load(options.held_out_prompts, options.held_out_split, set())[: options.num_held_out]
            ids = {row["prompt_id"] for row in held_out}
            counts["also_held_out"] = sum(row["prompt_id"] in ids for rows in sources for row in rows)
            sources = [[row for row in rows if row["prompt_id"] not in ids] for rows in sources]
        if len(held_out) < options.num_held_out:
            raise ConfigError(
                f"`num_held_out` is {options.num_held_out}, but there are only {len(held_out)} prompts to hold out."
            )
        return sources, held_out

    def _slices(self, sources: list[list[Row]], num_held_out: int) -> list[list[Row]]:
        """Prompts of each iteration; where all have the same, one slice."""
        options, size = self.options, self.options.prompts_per_iteration
        fresh = options.prompt_schedule == "fresh"
        if fresh and len(sources) == 1:
            [rows] = sources
            size = size or len(rows) // options.num_iterations
            sources = [rows[i * size : (i + 1) * size] for i in range(options.num_iterations)]
        for number, rows in enumerate(sources, start=1):
            if len(rows) < (size or 1):
                raise ConfigError(
                    f"There are {sum(map(len, sources))} prompts beside the {num_held_out} held out, too few for "
                    f"{f'the {size or 1} of iteration {number}' if fresh else size or 1}. Give more prompts, or lower "
                    "`prompts_per_iteration` or `num_held_out`."
                )
        slices = [rows[:size] for rows in sources]
        if {"related_prompt", "random_prompt"} & set(options.negatives) and min(map(len, slices)) < 2:
            raise ConfigError("`negatives` from other prompts need at least 2 prompts in an iteration.")
        return slices

    def prompts_of(self, iteration: int) -> list[Row]:
        """Prompts of an iteration, from 1 on, in their order."""
        if self.options.prompt_schedule == "same":
            return self.prompts
        slices = self.prompt_counts["slices"]
        start = sum(slices[: iteration - 1])
        return self.prompts[start : start + slices[iteration - 1]]


def _plain(value: Any) -> Any:
    """Values of options as YAML knows them."""
    if dataclasses.is_dataclass(value):  # accelerator_config
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(getattr(value, "value", value))
