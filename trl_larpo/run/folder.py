"""
The folder of a run: which file is where, the configuration it belongs to, and its prompts.

    run.yaml                     the configuration, without secrets; changes.jsonl: options that were changed later
    prompts.jsonl                prompts in the order they are used
    held_out_prompts.jsonl       prompts to evaluate on
    iteration_0/                 the initial model: evaluation.json, held_out.jsonl
    iteration_1/                 samples.jsonl → rewarded.jsonl → lists.jsonl, selection.json → ref_logps.jsonl →
                                 model/, training_log.jsonl → held_out.jsonl, evaluation.json → health.json
    report.html, plots/          what happened, to look at
"""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import yaml
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, ModelConfig

from ..errors import ConfigError, DataError
from ..iterations import iteration_folder, iteration_folders
from ..prompts import Prompt
from ..redaction import hide_secrets
from ..rewards.functions import check_columns, load_rewards
from ..settings import changed_settings, changed_sources, check_is_outside, describe_change, fingerprints
from ..storage import append_jsonl, iter_jsonl, read_json, read_yaml, whole_rows, write_json, write_jsonl, write_text
from ..training.config import LarPOConfig
from .options import RunConfig
from .prompts import choose_prompts

# May differ when a run is continued: they change where and how it runs, not what comes out but for rounding
_MAY_CHANGE = frozenset({
    "output_dir", "mirror", "notify_command", "dry_run", "server_urls", "server_command", "num_servers", "server_model",
    "server_health_route", "server_start_timeout", "server_timeout", "server_patience", "server_requests_in_flight",
    "server_api_key_variable", "server_reload", "stop_on", "monitor_evals", "monitor_time_share", "monitor_prompts",
    "monitor_stop", "num_processes", "generation_processes", "reward_processes",
    "reward_calls_in_flight", "reward_while_sampling",
    "train_processes", "accelerate_config", "train_launcher", "report_to", "run_name", "logging_steps",
    "logging_strategy", "logging_first_step", "disable_tqdm", "log_level", "save_steps",
    "save_strategy", "save_total_limit", "dataloader_num_workers", "project", "trackio_space_id",
    # Speed and memory
    "generation_batch_size", "reward_batch_size", "candidate_chunk_size", "shared_prompt", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
    "activation_offloading", "torch_empty_cache_steps", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc", "padding_free",
    "pad_to_multiple_of", "per_device_eval_batch_size", "precompute_ref_batch_size", "eval_accumulation_steps",
    "skip_memory_metrics", "deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "max_failed_share",
    # Rounding, too. What is trained and saved in another type is refused: `dtype`, `bf16`, `reward_dtype`
    "generation_dtype", "attn_implementation", "use_cpu", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "use_liger_kernel", "liger_kernel_config",
})  # fmt: skip

# May differ as long as nothing is trained: no samples, rewards, lists or log-probabilities depend on them
_OF_UPDATES = frozenset({
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "neftune_noise_alpha", "auto_find_batch_size", "average_tokens_across_devices", "dataloader_drop_last",
    "router_aux_loss_coef", "loss_type", "loss_weights", "label_smoothing", "beta", "f_divergence_type",
    "f_alpha_divergence_coef", "lambda_weight", "normalize_comparisons", "listmle_top_k", "contrastive_positives",
    "listnet_temperature", "per_token_scores", "target_margin", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora",
})  # fmt: skip

_TRAINED = ("model", "training_log.jsonl", "trainer/checkpoint-*")  # in the folder of an iteration

# `logging_dir` is a new folder at each start where transformers has the option, and training stages set it anyway
_NOT_RECORDED = ("output_dir", "dry_run", "local_rank", "logging_dir")

# Compared by what is there: a moved file or model is the same one
_PATHS = ("prompts", "held_out_prompts", "random_prompts", "earlier_candidates", "model_name_or_path", "reward_funcs")

_PRINTS = "fingerprints"  # among the options in run.yaml: what the paths in them hold

HIDDEN_OPTIONS = "hidden_options"
"""Also there: names of the options in which a secret is hidden. Others may hold the text `<hidden>` on their own."""

CHANGES = "changes.jsonl"

TRIAL = "trial.json"
"""What the trial of `--try` says, for scripts; it also tells the folder of a trial from others."""

_NUM_SAVED = "saved"  # in prompts.json: how many prompts of training and evaluation the other files have

logger = get_logger(__name__)

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
        self.prompts: list[Prompt] = []
        self.held_out: list[Prompt] = []
        self.prompt_counts: dict[str, Any] = {}
        self._changes: dict[str, tuple[Any, Any]] = {}  # accepted options: what they were, and what they are

    def iteration(self, number: int) -> Path:
        return iteration_folder(self.path, number)

    def model_path(self, iteration: int) -> str:
        """The model that an iteration ends with; for 0 the initial one."""
        return self.model.model_name_or_path if iteration == 0 else str(self.iteration(iteration) / "model")

    @property
    def is_trial(self) -> bool:
        """Whether the folder is that of a trial (`--try`)."""
        return (self.path / TRIAL).exists()

    @property
    def keeps_adapter(self) -> bool:
        """Whether iterations end with an adapter, in place of a whole model."""
        return self.model.use_peft and not self.options.merge_adapter

    @property
    def global_batch_size(self) -> int:
        """Lists of one optimizer step, as far as it is known here: not with `train_launcher`."""
        training = self.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return batch * (self.options.train_processes or self.options.num_processes)

    # Configuration

    def configuration(self) -> dict[str, Any]:
        """All options by name, fit for YAML and without secrets."""
        return hide_secrets(self._all_options())

    def _all_options(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for part in (self.model, self.training, self.options):
            for option in dataclasses.fields(part):
                if option.init and not option.name.startswith("_") and option.name not in _SECRETS:
                    values[option.name] = _plain(getattr(part, option.name))
        return dict(sorted(values.items()))

    def hidden_options(self) -> dict[str, Any]:
        """Those of which `configuration` hides a part, as they are: for processes of this run, never for a file."""
        shown = self.configuration()
        return {name: value for name, value in self._all_options().items() if shown[name] != value}

    def check_is_outside_inputs(self) -> None:
        """
        Raises:
            ConfigError: If the folder is in one that prompts or models are read from.
        """
        check_is_outside(self.path, "output_dir", self._all_options(), _PATHS)

    def check_configuration(self) -> None:
        """
        Compares with the configuration that the folder was made with.

        Raises:
            ConfigError: Names each option that differs, or says that the folder holds no run.
        """
        stored = self.path / "run.yaml"
        if not stored.exists():
            self._check_is_new()
            return
        before, now = hide_secrets(read_yaml(stored)), self.configuration()
        parts = (type(self.options), type(self.training))
        own = {option.name for part in parts for option in dataclasses.fields(part)} - set(
            DPOConfig.__dataclass_fields__
        )
        if unknown := sorted(own - before.keys() - _MAY_CHANGE):
            raise ConfigError(
                f"The run in {str(self.path)!r} was made by another version of trl-larpo, which had no option "
                f"`{unknown[0]}`. Finish it with that version, or take a new `output_dir`."
            )
        held, holds = before.get(_PRINTS, {}), fingerprints(now, _PATHS)
        sources = changed_sources(held, holds)
        common = {name: now[name] for name in now.keys() & before.keys() - set(_NOT_RECORDED)}
        differ = dict(sorted(changed_settings(before, common, held, holds | {name: held[name] for name in sources})))
        self._changes = {name: (was, now[name]) for name, was in differ.items()}
        for name, file in sources.items():  # a comment, or the fix of an error that stopped the run: not refused
            self._changes[f"{file}, which holds {name}"] = (held[name], holds[name])
            logger.warning(
                f"`reward_funcs`: {file}, which holds the reward {name!r}, has changed since the last start. Rewards "
                "that were given before are kept. If they are wrong, take a new `output_dir`."
            )
        changed = [name for name in differ if name not in _MAY_CHANGE]
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
        folders = iteration_folders(self.path).values()
        if not any(any(path.glob(trained)) for path in folders for trained in _TRAINED):
            changed = [name for name in changed if name not in _OF_UPDATES]
        if longer:  # a run may be made longer, and then needs temperatures for what is new
            kept = now["temperature"][: len(before["temperature"])] == before["temperature"]
            added = {"num_iterations"} | ({"temperature"} if kept and len(before["temperature"]) > 1 else set())
            changed = [name for name in changed if name not in added]
        if changed:
            change = describe_change(changed[0], before[changed[0]], now[changed[0]], f"the run in {str(self.path)!r}")
            more = f" Changed too: {', '.join(changed[1:])}." if changed[1:] else ""
            raise ConfigError(f"{change}{more} Undo the change, or take a new `output_dir`.")

    def _check_is_new(self) -> None:
        """
        Raises:
            ConfigError: If a folder without a run holds files that are whole.
        """
        found = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        others = sorted(name for name in found if not name.startswith(".") and ".partial" not in name)
        if others:
            raise ConfigError(
                f"The folder {str(self.path)!r} holds other files ({', '.join(others[:3])}) and no run. "
                "Take a new `output_dir`."
            )

    def save_configuration(self) -> None:
        """Also records the options that changed since the last start, in changes.jsonl."""
        options = self.configuration()
        if self._changes:
            for name in sorted(self._changes.keys() & options.keys()):  # a warning has told of the files of rewards
                was, now = self._changes[name]
                print(f"Changed: `{name}` from {was!r} to {now!r}")
            record = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changed": self._changes}
            append_jsonl(self.path / CHANGES, [record])
        options |= {_PRINTS: fingerprints(options, _PATHS), HIDDEN_OPTIONS: sorted(self.hidden_options())}
        text = yaml.safe_dump(options, allow_unicode=True, sort_keys=True)
        write_text(self.path / "run.yaml", text)

    # Prompts

    def prepare_prompts(self, tokenizer: PreTrainedTokenizerBase, save: bool = True) -> None:
        """Loads, checks and orders the prompts, once for the whole run."""
        paths = [self.path / name for name in ("prompts.jsonl", "held_out_prompts.jsonl", "prompts.json")]
        known: set[str] = set()
        if all(path.exists() for path in paths):
            try:
                self._read_prompts(*paths)
                return
            except DataError as error:
                logger.warning(f"{error} The prompts are chosen again.")
                known = {row["prompt_id"] for path in paths[:2] for row in whole_rows(path, [])}
        chosen = choose_prompts(self.options, tokenizer, self.training.seed, self.training.max_length)
        self.prompts, self.held_out, self.prompt_counts = chosen.prompts, chosen.held_out, chosen.counts
        rewards = load_rewards(self.options.reward_funcs, self.options.reward_weights)
        for number in range(1, self.options.num_iterations + 1):
            check_columns(rewards, self.prompts_of(number), f"prompts of iteration {number}")
        check_columns(rewards, self.held_out, "held-out prompts")
        if known - {prompt.id for prompt in (*self.prompts, *self.held_out)}:
            raise DataError(
                f"The prompts in {str(self.path)!r} are damaged, and `prompts` does not give the same ones again. Put "
                "the files back that they came from, or take a new `output_dir`."
            )
        if save:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "run.yaml").exists():  # first: it makes the folder one of a run, if this is interrupted
                self.save_configuration()
            write_jsonl(paths[0], map(Prompt.to_row, self.prompts))
            write_jsonl(paths[1], map(Prompt.to_row, self.held_out))
            write_json(paths[2], self.prompt_counts | {_NUM_SAVED: [len(self.prompts), len(self.held_out)]})

    def _read_prompts(self, of_training: Path, of_evaluation: Path, counts: Path) -> None:
        """
        Raises:
            DataError: If a file is damaged, or lacks prompts.
        """
        paths = (of_training, of_evaluation)
        first = next(itertools.chain(iter_jsonl(paths[0]), iter_jsonl(paths[1])), None)
        if first is not None and "columns" not in first:
            raise ConfigError(
                f"The run in {str(self.path)!r} was made by another version of trl-larpo. Finish it with that "
                "version, or take a new `output_dir`."
            )
        self.prompts, self.held_out = (list(map(Prompt.from_row, iter_jsonl(path))) for path in paths)
        self.prompt_counts = read_json(counts)
        found = [len(self.prompts), len(self.held_out)]
        expected = self.prompt_counts.pop(_NUM_SAVED, found)
        for path, number, wanted in zip(paths, found, expected, strict=True):
            if number != wanted:
                raise DataError(f"{path} has {number} of {wanted} prompts.")

    def prompts_of(self, iteration: int) -> list[Prompt]:
        """Prompts of an iteration, from 1 on, in their order."""
        if self.options.prompt_schedule == "same":
            return self.prompts
        slices = self.prompt_counts["slices"]
        start = sum(slices[: iteration - 1])
        return self.prompts[start : start + slices[iteration - 1]]


def _plain(value: Any) -> Any:
    """Values of options as YAML knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # accelerator_config
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(getattr(value, "value", value))
