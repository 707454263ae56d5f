"""Log-probabilities of all candidates of a dataset under one model, with and without a trainer."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import tqdm
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..preparation import preparing
from ..waiting import main_process_first
from .collator import DataCollatorForCandidateLists
from .config import LarPOConfig
from .scorer import CandidateScorer
from .token_rows import Batch
from .tokenization import tokenize_dataset
from .trl_compat import (
    accelerator_of,
    create_model_from_path,
    disable_dropout_in_model,
    prepare_deepspeed,
    prepare_fsdp,
)


def score_dataset(
    score: Callable[[Batch], Tensor],
    dataset: Dataset,
    collator: Callable,
    args: LarPOConfig,
    accelerator: Accelerator,
    *,
    batch_size: int,
    description: str,
) -> list[list[float]]:
    """
    Log-probabilities of every candidate, list by list; each process scores its share of the lists.

    Args:
        score: Log-probabilities of a batch, `(batch, list_size)`.
        dataset: Tokenised lists.
        collator: Makes batches of them.
        args: Options of the data loader.
        accelerator: What the processes share the work by.
        batch_size: Lists in a batch of each process.
        description: What the progress bar says.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and accelerator.device.type != "cpu",
    )
    logps: list[list[float]] = []
    quiet = bool(os.environ.get("TQDM_DISABLE", ""))
    for batch in tqdm(accelerator.prepare(loader), desc=description, disable=quiet):
        of_batch = accelerator.pad_across_processes(score(batch), dim=1)  # lists on other processes may be longer
        sizes = batch["candidate_mask"].sum(dim=1)
        of_batch, sizes = accelerator.gather_for_metrics((of_batch, sizes))
        logps += [of_list[:size] for of_list, size in zip(of_batch.tolist(), sizes.tolist(), strict=True)]
    return logps


def configuration_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's log-probabilities depend on beside its weights: its configuration, and that of its adapters."""
    configuration = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        configuration.pop(name, None)
    adapters = getattr(model, "peft_config", {})
    return configuration | {"adapters": {name: adapters[name].to_dict() for name in sorted(adapters)}}


def load_with_adapter(path: str, **kwargs: Any) -> PreTrainedModel:
    """
    A model, or its base with the adapter in a folder.

    Args:
        path: Folder or hub id of a model, or the folder of an adapter, which names its base.
        **kwargs: For `from_pretrained` of the model, or of the base.
    """
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return create_model_from_path(path, **kwargs)
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = create_model_from_path(base, **kwargs)
    model.load_adapter(path)
    return model


def log_probabilities_under(
    model_path: str,
    dataset: Dataset,
    args: LarPOConfig,
    model_init_kwargs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    description: str,
) -> dict[str, list[float]]:
    """
    Loads a model and scores the candidates of a dataset with it, in all processes together.

    The numbers are those that a trainer with these options would compute: same tokens, rows, precision and sharding.

    Args:
        model_path: Folder or hub id.
        dataset: Lists as the trainer takes them, of one candidate or more, with a column `prompt_id`.
        args: Options of the training.
        model_init_kwargs: For `from_pretrained`.
        tokenizer: Of the model.
        description: What the progress bar says.

    Returns:
        Log-probability of each candidate, the sum over its tokens, by the list's `prompt_id`. Lists whose prompt fills
        `max_length` have none.
    """
    tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    with main_process_first():
        dataset = tokenize_dataset(
            dataset,
            tokenizer,
            where="lists",
            eos_token=tokenizer.eos_token,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            min_candidates=1,
        )
    # As in DPOTrainer: "auto", its default on a GPU, does not go with a launcher, even of one process
    launched = args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED")
    device_map = {"device_map": None} if launched else {}
    defaults = {"trust_remote_code": args.trust_remote_code}
    with preparing():
        model = load_with_adapter(model_path, **defaults | model_init_kwargs | device_map)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if args.disable_dropout:
        disable_dropout_in_model(model)
    accelerator = accelerator_of(args)  # after the model: ZeRO-3 loads it with the batch sizes still "auto"
    scorer = CandidateScorer(model, args, accelerator)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        prepared = prepare_deepspeed(model, accelerator)
    elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
        prepared = prepare_fsdp(model, accelerator)
    else:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def score(batch: Batch) -> Tensor:
        with accelerator.autocast():
            return scorer(prepared, batch).logps

    collator = DataCollatorForCandidateLists(
        pad_token_id=tokenizer.pad_token_id, max_length=args.max_length, truncation_mode=args.truncation_mode
    )
    batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
    logps = score_dataset(score, dataset, collator, args, accelerator, batch_size=batch_size, description=description)
    AcceleratorState._reset_state()  # DeepSpeed allows one model for each, and there may come another
    return dict(zip(dataset["prompt_id"], logps, strict=True))
