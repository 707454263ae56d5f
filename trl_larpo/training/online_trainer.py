"""[`OnlineLarPOTrainer`]: TRL's `GRPOTrainer` with ranking losses over the samples of each prompt."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..errors import ConfigError, DataError
from ..losses import RankingLoss
from .attention import without_sharing
from .candidate_scoring import CandidateScoring
from .datasets import column_names, evaluation_sets, has_images
from .finite import FiniteTraining
from .groups import collate_groups, total_rewards, whole_groups
from .list_metrics import ListMetrics, Measurements
from .objective import RankingObjective
from .online_config import OnlineLarPOConfig
from .online_state import OnlineState
from .ranking_options import check_loss_fn
from .reference import MovingReference, ReferenceCheckpoints, brings_adapter, copy_parameters, reference_adapter
from .sample_memory import SampleMemory
from .scorer import CandidateOutputs
from .token_rows import Batch
from .trainer import LarPOTrainer
from .trl_compat import get_config_model_id, require_grpo, restore_forward_of_copy

require_grpo()

_NO_IMAGES = "Images cannot be ranked online: the losses compare completions of text prompts. Use GRPOTrainer for them."


_ARGUMENTS = ("prompts", "completions")  # of reward functions; the user's columns of these names are not passed on


class OnlineLarPOTrainer(CandidateScoring, ReferenceCheckpoints, GRPOTrainer):
    """
    Online LarPO: samples a group of completions for each prompt at every step, ranks it by its rewards, and trains on
    the list.

    It takes the place of [`~trl.GRPOTrainer`], which does the sampling (in process or with vLLM), calls the rewards and
    runs tools. The samples of a prompt are one list for the losses of [`LarPOTrainer`], in place of GRPO's advantages.
    One step on some samples is one step of [`LarPOTrainer`] on the same lists.

    Paper: "LLM Alignment as Retriever Optimization: An Information Retrieval Perspective", arXiv 2502.03699, Algorithm
    1 with iterations of one batch, or of `ref_update_steps`.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory:
            As in [`~trl.GRPOTrainer`]. `args` is an [`OnlineLarPOConfig`]. Reward functions also receive `finished`,
            whether each completion ended on its own.
        loss_fn (`Callable`, *optional*):
            Takes the place of `loss_type`: a function of `scores`, `relevance` (float32) and `mask` (bool), each
            `(batch, list_size)`, that returns one loss per list, `(batch,)`. See [`trl_larpo.losses`].

    Raises:
        ConfigError: If options exclude each other, or a batch cannot hold whole groups.

    Example:

    ```python
    from datasets import Dataset
    from trl_larpo import OnlineLarPOConfig, OnlineLarPOTrainer

    trainer = OnlineLarPOTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        reward_funcs=lambda completions, **columns: [-float(len(text)) for text in completions],
        args=OnlineLarPOConfig(loss_type="lambdarank", max_completion_length=32, max_steps=1),
        train_dataset=Dataset.from_dict({"prompt": ["The sky is", "A dog can"]}),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "larpo"]  # noqa: RUF012
    _name = "Online LarPO"
    _paper = LarPOTrainer._paper

    loss_is_scaled_for_ga = False  # the mean over lists; Trainer divides it by the accumulated batches

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs=None,
        args: OnlineLarPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
        *,
        loss_fn: RankingLoss | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OnlineLarPOConfig(f"{model_name.split('/')[-1]}-OnlineLarPO")
        if not isinstance(args, OnlineLarPOConfig):
            raise ConfigError(f"`args` is a {type(args).__name__}; OnlineLarPOTrainer takes an OnlineLarPOConfig.")
        check_loss_fn(loss_fn, args)
        if isinstance(train_dataset, Dataset | IterableDataset) and has_images(train_dataset):
            raise ConfigError(f"train_dataset has images. {_NO_IMAGES}")
        check_prompts(train_dataset, eval_dataset)
        if eval_dataset is not None:
            args.check_evaluation()
        beta = args.beta
        if args.reference_free or args.ref_update_steps == 1:
            args.beta = 0.0  # so that GRPOTrainer loads no reference
        restore_forward_of_copy(model)
        has_adapter = brings_adapter(model)
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        finally:
            args.beta = beta
        if has_adapter and "ref" in self.model.peft_config:  # as in LarPOTrainer, GRPOTrainer's copy lacks some of it
            copy_parameters(reference_adapter(self.model))
        self.beta = 0.0  # of GRPO's KL term, which there is none of; that of the scores is in `args`
        self._objective = RankingObjective(args.loss_type, args.loss_weights, args, loss_fn)
        self._list_metrics = ListMetrics(self.accelerator, self.args.beta)
        self._memory = SampleMemory(args.memory_size)
        self._judged: tuple[Tensor, list[bool]] | None = None  # rewards of the last samples, and which of them ended
        self._ref_logps: dict[int, tuple[Batch, int, Tensor]] = {}  # batch of the last samples → of which reference
        if args.sync_ref_model or (args.ref_update_steps is not None and args.ref_update_steps > 1):
            self._moving_reference = MovingReference(self)
            self.add_callback(self._moving_reference)
        self._finite = FiniteTraining(self)
        self.add_callback(self._finite)
        _ = self._policy_scorer  # now, in case an option is impossible
        if self.ref_model is not None:
            _ = self._reference_scorer

    # From prompts to lists

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return _SamplerOfEpochs(super()._get_train_sampler(dataset), self)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        finished = [ids[-1] in ends for ids in completion_ids_list]
        rows = [{name: value for name, value in row.items() if name not in _ARGUMENTS} for row in inputs]
        inputs = [row | {"finished": ended} for row, ended in zip(rows, finished, strict=True)]
        by_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, values in zip(self.reward_func_names, by_function.T, strict=True):
            if values.isinf().any():
                raise DataError(f"The reward {name} is infinite for a completion; it must be a finite number or None.")
        totals = total_rewards(by_function, self.reward_weights, self.multi_objective_aggregation, self._group_size)
        first = self.accelerator.process_index * len(prompts)
        self._judged = totals[first : first + len(prompts)].cpu(), finished
        return by_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """Samples, rewards and ranks: a batch of lists, which GRPOTrainer shuffles and splits as it would samples."""
        in_batches = getattr(self.args, "use_transformers_continuous_batching", False)
        # Which knows transformers' attention alone
        with without_sharing(self.accelerator.unwrap_model(self.model)) if in_batches else nullcontext():
            batch = super()._generate_and_score_completions(inputs)
        if "num_images" in batch or "pixel_values" in batch:
            raise ConfigError(_NO_IMAGES)
        assert self._judged is not None
        groups = list(whole_groups(batch, *self._judged, self._group_size))
        if self.model.training and self.args.memory_size:
            joined = [self._memory.join(group) for group in groups]
            self._memory.remember(gather_object(groups))  # the prompt may come up on another process
            groups = joined
        lists = collate_groups(groups, self._tokenizer.pad_token_id, self.args.truncated_completions)
        return {name: tensor.to(self.accelerator.device) for name, tensor in lists.items()}

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        """GRPOTrainer's log-probabilities of the samples, for importance sampling: nothing here reads them."""
        return None, None, None

    # From lists to the loss

    def _reference_log_probs(self, policy: CandidateOutputs, inputs: Batch) -> Tensor:
        """Log-probabilities under the reference, which a batch that is trained on again keeps until it changes."""
        if self.args.reference_free:
            return torch.zeros_like(policy.logps)
        if self.args.ref_update_steps == 1:  # before a step, the policy is the reference
            return policy.logps.detach()
        version = 0 if self._moving_reference is None else self._moving_reference.version(self.state.global_step)
        place = self._step % self.args.steps_per_generation
        kept = self._ref_logps.get(place)
        if kept is None or kept[0] is not inputs or kept[1] != version:
            reference = self.model if self.ref_model is None else self.ref_model  # a compiled one has no truth value
            kept = inputs, version, self._score_reference(reference, inputs)
            self._ref_logps[place] = kept
        return kept[2]

    def _compute_loss(self, model, inputs):
        policy = self._policy_scorer(model, inputs, with_statistics=True, router_logits=self.aux_loss_enabled)
        objective = self._objective(policy, self._reference_log_probs(policy, inputs), inputs)
        loss = objective.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        is_finite = self._finite.check_loss(loss, inputs)
        measurements = Measurements.of(inputs, policy, objective)
        self._list_metrics.add("train" if self.model.training else "eval", measurements, is_finite)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        averages = self._list_metrics.take(mode)
        averages.pop("completions/mean_length", None)  # GRPOTrainer logs that of the new samples
        self._metrics[mode].update({name: [value] for name, value in averages.items()})
        super().log(logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if not self.args.save_only_model:  # before TRL's files, of which the last one says that a checkpoint is whole
            is_spent = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
            state = OnlineState(
                step=self._step,
                num_processes=self.accelerator.num_processes,
                batches=[] if is_spent or self._buffered_inputs is None else self._buffered_inputs,
                memory=self._memory.to_rows(),
            )
            state.save(folder, self.accelerator.process_index)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        accelerator, folder = self.accelerator, Path(checkpoint)
        state = OnlineState.load(folder, accelerator.process_index, accelerator.num_processes, accelerator.device)
        if state is not None:
            self._step, self._buffered_inputs = state.step, state.batches or None
            self._memory.from_rows(state.memory)


def check_prompts(train_dataset: Any, eval_dataset: Any) -> None:
    """
    Raises:
        DataError: If a dataset has no column `prompt`.
    """
    for where, dataset in {"train_dataset": train_dataset, **evaluation_sets(eval_dataset)}.items():
        if isinstance(dataset, Dataset | IterableDataset) and "prompt" not in (names := column_names(dataset)):
            raise DataError(
                f"{where} has no column `prompt`. Its columns: {', '.join(names)}. Rename the one that holds the "
                "prompts."
            )


class _SamplerOfEpochs(Sampler):
    """
    GRPOTrainer's order of prompts, in an epoch that depends on the seed and the epoch alone.

    Its own sampler draws one order after the other, so that a training resumed in its second epoch would repeat the
    order of the first.
    """

    def __init__(self, sampler: Any, trainer: OnlineLarPOTrainer):
        self._sampler, self._trainer = sampler, trainer

    def __iter__(self):
        if self._sampler.shuffle:
            epoch = int(self._trainer.state.epoch or 0)
            self._sampler.generator.manual_seed(self._trainer.args.seed + epoch)
        return iter(self._sampler)

    def __len__(self):
        return len(self._sampler)
