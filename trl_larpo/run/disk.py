"""How much of the disk a run will need: for models and checkpoints, and for samples and lists."""

import json
import math
import shutil
from pathlib import Path

import torch
import yaml
from accelerate.logging import get_logger
from transformers.configuration_utils import PretrainedConfig

from ..errors import ConfigError
from ..storage import partial_files
from .folder import RunFolder
from .loading import empty_model, model_init_kwargs
from .plan import list_size, times_of_prompts
from .stages import STAGES, is_done

logger = get_logger(__name__)

_BYTES_PER_TOKEN = 5  # of text: English has four or a little more, other languages and code mostly fewer

_BYTES_OF_DESCRIPTION = 300  # source, reward, temperature, ... of a candidate in a row


def check_disk(folder: RunFolder, config: PretrainedConfig) -> int | None:
    """
    Checks that the disk has room for models and checkpoints.

    Returns:
        What [`bytes_of_models`] returns.

    Raises:
        ConfigError: If it has not.
    """
    needed = bytes_of_models(folder, config)
    if needed is None:
        return None
    free = shutil.disk_usage(existing_folder(folder.path)).free
    if free < needed:
        raise ConfigError(
            f"`output_dir`: the disk has {size_text(free)} free, and the run may need {size_text(needed)} for models "
            "and checkpoints. Free some space, take a folder on another disk, or keep fewer checkpoints: "
            "`save_total_limit: 1`, or `save_strategy: 'no'`."
        )
    return needed


def warn_of_little_space(folder: RunFolder, of_models: int | None) -> None:
    """
    Warns if samples and lists may not fit onto the disk beside models and checkpoints. It is no error: answers are
    mostly shorter than they may be.

    Args:
        folder: With the prompts prepared.
        of_models: From [`check_disk`].
    """
    free, of_files = shutil.disk_usage(existing_folder(folder.path)).free, bytes_of_candidates(folder)
    if free < of_files + (of_models or 0):
        models = "" if of_models is None else f" beside {size_text(of_models)} of models and checkpoints"
        logger.warning(
            f"`output_dir`: the disk has {size_text(free)} free, and samples and lists may need "
            f"{size_text(of_files)}{models}, if all answers have {folder.options.max_new_tokens} tokens "
            "(`max_new_tokens`). `larpo run --try 20` estimates it from samples of your own prompts."
        )


def bytes_of_candidates(folder: RunFolder) -> int:
    """
    What the run still needs at most for the files of samples, rewards and lists, of training and held-out prompts.

    Each candidate of an iteration is in three files: samples, rewarded samples and lists, in which those that are not
    selected are too; with memory, earlier candidates are in the latter two again. While a file is being finished, its
    samples are there twice; while a training runs, its lists are there as a dataset. It assumes that all answers have
    `max_new_tokens` tokens, of 5 bytes of text each. Candidates from other files (`earlier_candidates`) are left out.

    Args:
        folder: With the prompts prepared.
    """
    options = folder.options
    per_candidate = _BYTES_PER_TOKEN * options.max_new_tokens + _BYTES_OF_DESCRIPTION
    prompts = [*folder.prompts, *folder.held_out]
    per_prompt = sum(len(json.dumps(prompt.to_row())) for prompt in prompts) / max(1, len(prompts))
    pool = options.num_samples + options.num_negatives * len(options.negatives)
    held_out = len(folder.held_out) * (per_prompt + options.num_eval_samples * per_candidate)
    needed, meanwhile = 0.0, 0.0
    for number in range(options.num_iterations + 1):
        path = folder.iteration(number)
        sizes = {"held_out_samples.jsonl": held_out, "held_out.jsonl": held_out}
        if number:
            own, times = len(folder.prompts_of(number)), times_of_prompts(folder, number)
            joined = len(times) * per_prompt + times.total() * pool * per_candidate
            of_samples = own * (per_prompt + pool * per_candidate)
            sizes |= {"rewarded.jsonl": joined, "lists.jsonl": joined}
            if not _is_done(folder, "generate", number):
                sizes["samples.jsonl"] = of_samples
                if options.random_prompts:
                    sizes["unrelated_samples.jsonl"] = own * (per_prompt + options.num_negatives * per_candidate)
            if not _is_done(folder, "train", number):
                selected = sum(list_size(options, pool * each) for each in times.values())
                meanwhile = max(meanwhile, of_samples, selected * per_candidate)
        for name, size in sizes.items():
            if not (path / name).exists():
                saved = sum(file.stat().st_size for file in partial_files(path / name))
                needed += max(0.0, size - saved)
    return math.ceil(needed + meanwhile)


def _is_done(folder: RunFolder, stage: str, iteration: int) -> bool:
    return is_done(folder.path, STAGES[stage], iteration, folder.options.num_iterations)


def existing_folder(path: Path) -> Path:
    """The folder, or the closest one around it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def bytes_of_models(folder: RunFolder, config: PretrainedConfig) -> int | None:
    """
    What the run still needs for the model of each iteration and, in a training, for its best weights and its
    checkpoints, beside what a stopped training has left; `None` where that is not known.
    """
    num_parameters, training = _num_parameters(config), folder.training
    if num_parameters is None:
        return None
    dtype = model_init_kwargs(folder.model, training)["dtype"]
    own = getattr(config, "dtype", None) or torch.float32
    weights = num_parameters * (own if dtype == "auto" else getattr(torch, dtype)).itemsize
    numbers = range(1, folder.options.num_iterations + 1)
    missing = [folder.iteration(number) for number in numbers if not _is_done(folder, "train", number)]

    def left(num_bytes: int, pattern: str) -> int:
        return max(0, num_bytes - sum(_bytes_in(found) for path in missing for found in path.glob(pattern)))

    needed = 0 if folder.keeps_adapter else left(weights * len(missing), "model.partial")
    if missing and not folder.model.use_peft:  # of an adapter, both are small
        needed += left(2 * weights, "trainer/best-*") if folder.options.monitor_evals else 0
        if training.save_strategy != "no":
            num_checkpoints = (training.save_total_limit or 2) + 1  # one is written before the oldest is deleted
            of_all = num_checkpoints * num_parameters * _bytes_of_checkpoint(folder.options.accelerate_config)
            needed += left(of_all, "trainer/checkpoint-*")
    return needed


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _num_parameters(config: PretrainedConfig) -> int | None:
    """`None` where the configuration alone does not tell."""
    try:
        return empty_model(config).num_parameters()
    except Exception as error:  # some architectures compute with weights when they are made: no reason not to run
        logger.warning(f"The disk space that the run needs is not known and was not checked: {error}")
        return None


def _bytes_of_checkpoint(accelerate_config: str | None) -> int:
    """
    Bytes of a parameter in a checkpoint: of the weights in float32 and AdamW's two moments 12. DeepSpeed keeps, beside
    those, weights in 16 bits for the forward pass twice.
    """
    settings = yaml.safe_load(Path(accelerate_config).read_text(encoding="utf-8")) if accelerate_config else {}
    return 16 if settings.get("distributed_type") == "DEEPSPEED" else 12


def size_text(num_bytes: float) -> str:
    """A number of bytes for a person."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
