"""[`LarPOTrainer`]: TRL's `DPOTrainer` for ranked lists of completions."""

import os
import textwrap

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets, is_caching_enabled
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from ..errors import ConfigError
from ..losses import RankingLoss
from ..version import __version__
from ..waiting import main_process_first, wait_for_all
from .candidate_scoring import CandidateScoring
from .collator import DataCollatorForCandidateLists
from .config import LarPOConfig, trains_lists
from .datasets import column_names, evaluation_sets, has_images
from .finite import FiniteTraining
from .list_metrics import ListMetrics, Measurements
from .log_probabilities import configuration_of, score_dataset
from .objective import RankingObjective
from .ranking_options import DPO_LOSSES, check_loss_types
from .ref_logps_column import check_column_after_training, stream_without_column, warn_of_unread_column
from .reference import MovingReference, ReferenceCheckpoints, brings_adapter, copy_parameters, reference_adapter
from .token_rows import count_tokens
from .tokenization import is_tokenized, tokenize_dataset
from .trl_compat import (
    DataCollatorForPreference,
    get_config_model_id,
    hash_module,
    keep_forward_from_liger,
    prepare_deepspeed,
    restore_forward_of_copy,
)
from .validation import check_dataset, dataset_format


class LarPOTrainer(CandidateScoring, ReferenceCheckpoints, DPOTrainer):
    """
    Trainer for LarPO: aligns a language model with ranked lists of completions by the losses of information retrieval.

    It takes the place of [`~trl.DPOTrainer`]. Given a list of completions per prompt, the policy and the reference
    score every completion once, and a ranking loss compares them. Chosen/rejected pairs are lists of two; with TRL's
    own losses, or options that only pairs have, they go through `DPOTrainer`'s own code.

    Paper: "LLM Alignment as Retriever Optimization: An Information Retrieval Perspective", arXiv 2502.03699.

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with these additions. `args` is a [`LarPOConfig`]. Datasets may hold lists
            (`prompt`, `completions` and, unless the completions stand best first, `rewards`). A column `ref_logps`, the
            reference's log-probability of each completion (the sum over its tokens, after truncation to
            `max_length`), takes the place of a reference model. On lists,
            `compute_metrics` receives as predictions the tuple (scores, candidate_mask) and as labels the relevance,
            each `(prompts, list_size)` and padded with -100 where lists differ in size: what counts are the entries
            whose candidate_mask is 1.
        loss_fn (`Callable`, *optional*):
            Takes the place of `loss_type`: a function of `scores`, `relevance` (float32) and `mask` (bool), each
            `(batch, list_size)`, that returns one loss per list, `(batch,)`. See [`trl_larpo.losses`].

    Raises:
        ConfigError: If options exclude each other or have no meaning on the given data.
        DataError: If a dataset cannot be used; names row, column and fix. Raised before the model is loaded.

    Example:

    ```python
    from datasets import Dataset
    from trl_larpo import LarPOConfig, LarPOTrainer

    dataset = Dataset.from_list(
        [{"prompt": "The sky is", "completions": [" blue.", " green.", " a dog."], "rewards": [1.0, 0.2, -1.0]}]
    )
    trainer = LarPOTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=LarPOConfig(loss_type="listmle"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "larpo"]  # noqa: RUF012
    _name = "LarPO"
    _paper = {  # noqa: RUF012
        "title": "LLM Alignment as Retriever Optimization: An Information Retrieval Perspective",
        "id": "2502.03699",
        "citation": textwrap.dedent("""\
            @inproceedings{jin2025llm,
                title        = {{LLM Alignment as Retriever Optimization: An Information Retrieval Perspective}},
                author       = {Jin, Bowen and Yoon, Jinsung and Qin, Zhen and Wang, Ziqi and Xiong, Wei and
                                Meng, Yu and Han, Jiawei and Ar{\\i}k, Sercan {\\"O}.},
                year         = 2025,
                booktitle    = {Proceedings of the 42nd International Conference on Machine Learning},
                series       = {Proceedings of Machine Learning Research},
                volume       = 267,
            }"""),
    }

    _signature_columns: list[str] | None  # of Trainer
    _precompute_engine: nn.Module | None  # of DPOTrainer
    loss_weights: list[float]

    def __init__(
        self,
        model: "str | PreTrainedModel",
        ref_model: PreTrainedModel | None = None,
        args: LarPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        *,
        loss_fn: RankingLoss | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = LarPOConfig(f"{model_name.split('/')[-1]}-LarPO")
        check_loss_types(args.loss_type)
        self._list_mode = False
        if isinstance(train_dataset, Dataset | IterableDataset):  # anything else DPOTrainer refuses by name
            self._list_mode = trains_lists(
                args,
                formats=_check_datasets(
                    train_dataset,
                    eval_dataset,
                    losses_need_pairs=loss_fn is None and DPO_LOSSES.issuperset(args.loss_type),
                    truncated_completions=_truncated_completions(args),
                ),
                loss_fn=loss_fn,
                has_images=has_images(train_dataset),
                has_collator=data_collator is not None,
                has_compute_metrics=compute_metrics is not None,
            )
        self._brings_ref_logps = False
        given = {name: getattr(args, name) for name in ("loss_type", "precompute_ref_log_probs")}
        self._reference_free = self._list_mode and getattr(args, "reference_free", False)
        if isinstance(train_dataset, Dataset | IterableDataset):
            warn_of_unread_column(train_dataset, eval_dataset, args, self._list_mode)
        if self._reference_free:
            if ref_model is not None:
                raise ConfigError("`reference_free` scores need no reference, but `ref_model` is given. Remove one.")
            args.precompute_ref_log_probs = True  # so that DPOTrainer loads none
        elif self._list_mode and "ref_logps" in column_names(train_dataset):
            if ref_model is not None:
                raise ConfigError(
                    "train_dataset has the column `ref_logps`, and `ref_model` is given as well. Pass one of the two."
                )
            if args.sync_ref_model:
                raise ConfigError(
                    "`sync_ref_model` moves the reference, but train_dataset has the column `ref_logps`, which holds "
                    "the log-probabilities under a fixed one. Remove one of the two."
                )
            self._brings_ref_logps = True
            args.precompute_ref_log_probs = True  # what this dataset brings, and others still need
        if self._list_mode and args.use_liger_kernel:
            keep_forward_from_liger(args)
        loss_types = args.loss_type
        # DPOTrainer checks its options against its own losses. Every ranking loss depends on differences of scores
        # alone, as "sigmoid" does, so what is sound for "sigmoid" is sound for it.
        args.loss_type = [name if name in DPO_LOSSES else "sigmoid" for name in loss_types]
        self._datasets_are_checked = True
        for given_model in (model, ref_model):
            restore_forward_of_copy(given_model)
        self._adapter_is_to_be_copied = ref_model is None and brings_adapter(model)
        try:
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            for name, value in given.items():  # the user's, who may have another use for it
                setattr(args, name, value)
        self._datasets_are_checked = False  # those still to come, in `evaluate`
        self._complete_reference_adapter()
        if args.sync_ref_model:
            self._moving_reference = MovingReference(self)
        if self._list_mode:
            self.data_collator = self._list_collator()
            self._objective = RankingObjective(loss_types, self.loss_weights, args, loss_fn)
            self.loss_types, self.loss_weights = self._objective.names, self._objective.weights
            if args.n_gpu > 1:
                raise ConfigError(
                    "Several GPUs are visible to one process, and `nn.DataParallel` is not supported. Start with "
                    "`accelerate launch` or `torchrun`, or make one GPU visible with `CUDA_VISIBLE_DEVICES`."
                )
            if self._reference_free:
                self.precompute_ref_logps = False
            self.use_liger_kernel = False  # up to TRL 1.13, Liger's loss on pairs; its layer kernels stay
            self._list_metrics = ListMetrics(self.accelerator, self.beta)
            self._finite = FiniteTraining(self)
            self.add_callback(self._finite)
            _ = self._policy_scorer  # now, in case an option is impossible
            if self.ref_model is not None:
                _ = self._reference_scorer
            else:
                self.__dict__.pop("_reference_scorer", None)  # of a model that only the precomputation had

    def _complete_reference_adapter(self) -> None:
        """DPOTrainer's copy "ref" of an adapter lacks what has no module in the adapter, such as that of embeddings."""
        if self._adapter_is_to_be_copied and "ref" in self.model.peft_config:
            copy_parameters(reference_adapter(self.model))
        self._adapter_is_to_be_copied = False

    # From rows to batches

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self._list_mode and is_tokenized(dataset):  # a prepared one, such as `trainer.train_dataset`
            return dataset
        where = f"{dataset_name} dataset"
        if not self._datasets_are_checked:
            row_format = _check_dataset(dataset, where, not self._list_mode, _truncated_completions(args))
            if row_format == "list" and not self._list_mode:
                raise ConfigError(f"{where} holds lists, but this trainer was built for pairs. Evaluate it on pairs.")
        if not self._list_mode:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with main_process_first():
            return tokenize_dataset(
                dataset,
                processing_class,
                where=where,
                eos_token=self._tokenizer.eos_token,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                length_column=args.length_column_name,
                truncated_completions=_truncated_completions(args),
            )

    def _set_signature_columns_if_needed(self):
        if self._list_mode and self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completion_ids", "relevance", "ref_logps"]
            self._signature_columns.append(self.args.length_column_name)  # what batches may be grouped by
        super()._set_signature_columns_if_needed()

    def _list_collator(self):
        """The collator for lists, with the padding that DPOTrainer settled on. A collator of the user's stays."""
        collator = self.data_collator
        if not isinstance(collator, DataCollatorForPreference):
            return collator
        return DataCollatorForCandidateLists(
            pad_token_id=collator.pad_token_id,
            max_length=collator.max_length,
            truncation_mode=collator.truncation_mode,
        )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._complete_reference_adapter()
        if not self._list_mode:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._reference_free or "ref_logps" in column_names(dataset):
            return dataset
        if isinstance(dataset, IterableDataset):
            raise stream_without_column(name, is_brought=self._brings_ref_logps)
        if not (dataset.cache_files and is_caching_enabled()):  # it has no file that all processes would find
            ref_logps = self._compute_all_ref_logps(dataset, name, batch_size)
            return concatenate_datasets([dataset, Dataset.from_dict({"ref_logps": ref_logps})], axis=1)
        # Everything the values depend on, and the same file for every process
        args, model = self.args, self.model if self.ref_model is None else self.ref_model
        settings = (args.max_length, args.truncation_mode, args.bf16, args.fp16, configuration_of(model), __version__)
        model_hash = getattr(self, "_precompute_model_hash", None)  # from TRL 1.16
        if model_hash is None:
            model_hash = hash_module(model)
        fingerprint = [Hasher.hash((dataset._fingerprint, model_hash, settings))]
        broadcast_object_list(fingerprint, from_process=0)
        cache_file = dataset._get_cache_file_path(fingerprint[0])
        if not os.path.exists(cache_file):
            ref_logps = self._compute_all_ref_logps(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                dataset.map(
                    lambda _, indices: {"ref_logps": [ref_logps[i] for i in indices]},
                    with_indices=True,
                    batched=True,
                    remove_columns=dataset.column_names,
                    new_fingerprint=fingerprint[0],
                    cache_file_name=cache_file,
                    desc=f"Caching reference log probs for {name} dataset",
                )
            wait_for_all()
        return concatenate_datasets([dataset, Dataset.from_file(cache_file)], axis=1)

    def _compute_all_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> list[list[float]]:
        """Reference log-probabilities of every candidate, list by list."""
        model = self.model if self.ref_model is None else self.ref_model
        # As in DPOTrainer: the policy is prepared in `train`, so until then DeepSpeed needs an engine to run it
        if self.ref_model is None and self.is_deepspeed_enabled:
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        return score_dataset(
            lambda batch: self.compute_ref_log_probs(model, batch),
            dataset,
            self._list_collator(),
            self.args,
            self.accelerator,
            batch_size=batch_size,
            description=f"Computing reference log probs for {name} dataset",
        )

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        is_prepared = eval_dataset is None or isinstance(eval_dataset, str)
        if is_prepared or not (self._list_mode and self.precompute_ref_logps):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        if self._brings_ref_logps and self.state.global_step > 0 and not is_peft_model(self.model):
            check_column_after_training(datasets)
        if not all("ref_logps" in column_names(dataset) for dataset in datasets.values()):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # DPOTrainer would refuse to compute a reference after training; there is nothing to compute
        prepared = {
            name: self._prepare_dataset(dataset, self.processing_class, self.args, name)
            for name, dataset in datasets.items()
        }
        metrics: dict[str, float] = {}
        for name, dataset in prepared.items():
            prefix = f"{metric_key_prefix}_{name}" if isinstance(eval_dataset, dict) else metric_key_prefix
            metrics |= super(DPOTrainer, self).evaluate(dataset, ignore_keys, prefix)
        return metrics

    # From batches to the loss

    def compute_ref_log_probs(self, model, inputs):
        """
        Reference log-probabilities of one batch.

        Returns:
            On lists, a float tensor `(batch, list_size)`, 0 in the padding; else what `DPOTrainer` returns.
        """
        if not self._list_mode:
            return super().compute_ref_log_probs(model, inputs)
        return self._score_reference(model, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        if not self._list_mode:
            return super()._compute_loss(model, inputs, return_outputs)
        policy = self._policy_scorer(model, inputs, with_statistics=True, router_logits=self.aux_loss_enabled)
        if self._reference_free:
            ref_logps = torch.zeros_like(policy.logps)
        elif self.precompute_ref_logps:
            ref_logps = inputs["ref_logps"]
        else:
            reference = self.model if self.ref_model is None else self.ref_model  # a compiled one has no truth value
            ref_logps = self.compute_ref_log_probs(reference, inputs)
        mode = "train" if self.model.training else "eval"
        # Of lists that fill the last batches, transformers leaves out whole processes alone
        num_counted = self._list_metrics.num_counted(mode, policy.logps.size(0))
        objective = self._objective(policy, ref_logps, inputs, num_counted)
        loss = objective.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        is_finite = self._finite.check_loss(loss, inputs)

        measurements = Measurements.of(inputs, policy, objective)
        self._list_metrics.add(mode, measurements, is_finite)
        return (loss, {"scores": objective.scores.detach()}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        if not self._list_mode or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, (outputs["scores"], inputs["candidate_mask"].long()), inputs["relevance"]

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Of one forward and backward pass over the batch by the policy, as transformers estimates them."""
        if not self._list_mode:
            return super().floating_point_ops(inputs)
        return (
            6
            * int(count_tokens(inputs, self._policy_scorer.shares_prompt))
            * self.model.num_parameters(exclude_embeddings=True)
        )

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        if not self._list_mode:
            super()._track_num_input_tokens(inputs)
        elif self.args.include_num_input_tokens_seen not in ("no", False):
            self.state.num_input_tokens_seen += int(self.accelerator.gather(count_tokens(inputs)).sum())

    # What is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._list_mode:
            self._total_train_tokens += self._list_metrics.take_tokens("train") // getattr(self, "_tp_size", 1)
            mode = "train" if self.model.training else "eval"
            averages = self._list_metrics.take(mode)
            if averages:
                averages["num_tokens"] = self._total_train_tokens
            self._metrics[mode].update({name: [value] for name, value in averages.items()})
        super().log(logs, start_time)


def _truncated_completions(args: DPOConfig) -> str:
    return getattr(args, "truncated_completions", "rank_last")


def _check_datasets(train_dataset, eval_dataset, losses_need_pairs: bool, truncated_completions: str) -> dict[str, str]:
    """Validates all rows that can be read in advance. Name of each dataset, the training set first → its format."""
    datasets = {"train_dataset": train_dataset} | evaluation_sets(eval_dataset)
    return {
        where: _check_dataset(dataset, where, losses_need_pairs, truncated_completions)
        for where, dataset in datasets.items()
    }


def _check_dataset(dataset, where: str, losses_need_pairs: bool, truncated_completions: str) -> str:
    row_format = dataset_format(dataset, where, losses_need_pairs)
    if row_format == "list" or not losses_need_pairs:  # pairs that are trained on as lists of two
        check_dataset(dataset, where, truncated_completions)
    return row_format
