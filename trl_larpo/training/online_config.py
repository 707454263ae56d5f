"""Options of [`OnlineLarPOTrainer`]: TRL's [`~trl.GRPOConfig`] plus what ranked lists need."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..errors import ConfigError
from ..redaction import hide_secrets
from .ranking_options import DPO_LOSSES, RankingOptions, check_ranking_options
from .trl_compat import require_grpo

require_grpo()

# Option of GRPO's loss: what to do about it
_OF_GRPO_LOSS = dict.fromkeys(
    ("epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
     "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level", "scale_rewards",
     "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max",
     "entropy_coef_delta", "entropy_target", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
     "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "off_policy_mask_threshold",
     "use_bias_correction_kl", "cast_lm_head_to_fp32"),
    "Remove it.",
) | {"mask_truncated_completions": "Set `truncated_completions` to 'drop'."}  # fmt: skip


@dataclass
class OnlineLarPOConfig(RankingOptions, GRPOConfig):
    r"""
    Configuration class for the [`OnlineLarPOTrainer`].

    It has the options of [`~trl.GRPOConfig`] and, with the same names and meanings, those of [`LarPOConfig`] for losses
    and scores: `loss_type`, `loss_weights`, `lambda_weight`, `normalize_comparisons`, `listmle_top_k`,
    `contrastive_positives`, `listnet_temperature`, `per_token_scores`, `reference_free`, `target_margin`,
    `label_smoothing`, `f_divergence_type`, `f_alpha_divergence_coef`, `truncated_completions`, `shared_prompt` and
    `candidate_chunk_size`. Options of GRPO's loss (clipping, importance sampling, scaled rewards, entropy) are refused.

    Batch sizes count completions, as in [`~trl.GRPOConfig`], and are multiples of `num_generations`.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            β of the scores, as in [`LarPOConfig`]: how much the policy may move away from the reference. There is no KL
            term.
        ref_update_steps (`int`, *optional*):
            Optimizer steps after which the policy takes the place of the reference: the length of an iteration. `None`:
            the reference stays the initial model. 1: the policy itself is the reference of each step, which takes
            neither a second model nor a second pass.
        memory_size (`int`, *optional*, defaults to `0`):
            How many of the last samples of a prompt join its new ones when the prompt comes up again. Not with
            `multi_objective_aggregation="normalize_then_sum"`, whose rewards are comparable within a group only.
    """

    beta: float = field(
        default=0.1,
        metadata={
            "help": "β of the scores, as in `larpo train`: how much the policy may move away from the reference. There "
            "is no KL term."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Factors of the losses in `loss_type`. None: 1 each."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence that scores are made of: 'reverse_kl' (the log ratio), 'forward_kl', 'js_divergence' "
            "or 'alpha_divergence'."
        },
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "α of 'alpha_divergence'."})
    ref_update_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps after which the policy takes the place of the reference: the length of an "
            "iteration. None: the reference stays the initial model. 1: the policy itself is the reference of each "
            "step, which takes neither a second model nor a second pass."
        },
    )
    memory_size: int = field(
        default=0,
        metadata={"help": "How many of the last samples of a prompt join its new ones when the prompt comes up again."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Of GRPO's loss. Ranking losses have no importance sampling."}
    )

    def to_dict(self):
        """As in TRL, without secrets: trackers log it."""
        return hide_secrets(super().to_dict())

    def __post_init__(self):
        check_ranking_options(self)
        self._check_group("per_device_train_batch_size", "num_generations")
        super().__post_init__()
        self._check_losses()
        self._check_reference()
        if self.do_eval and self.eval_strategy != "no":
            self.check_evaluation()
        if self.accelerator_config.split_batches and self.world_size > 1:
            raise ConfigError(
                "`split_batches` of `accelerator_config` would cut batches, and the groups in them, apart. Turn it off."
            )
        for option, remedy in _OF_GRPO_LOSS.items():
            value = getattr(self, option)
            if value != type(self).__dataclass_fields__[option].default:
                raise ConfigError(
                    f"`{option}={value!r}` belongs to GRPO's loss and has no effect on ranking losses. {remedy}"
                )

    def _check_losses(self) -> None:
        for name in self.loss_type:
            if name in DPO_LOSSES and name != "sft":
                raise ConfigError(
                    f"`loss_type` names {name!r}, which TRL defines on chosen/rejected pairs only. Use a ranking loss; "
                    "on two completions 'lambdarank' is 'sigmoid'."
                )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ConfigError(
                f"`loss_weights` has {len(self.loss_weights)} numbers for {len(self.loss_type)} losses; give one for "
                "each."
            )
        if not self.beta > 0:
            raise ConfigError(f"`beta` is {self.beta}; it must be greater than 0.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"`temperature` is {self.temperature}; samples that differ need one above 0.")
        if self.memory_size < 0:
            raise ConfigError(f"`memory_size` is {self.memory_size}; it must be at least 0.")
        if self.memory_size and self.multi_objective_aggregation == "normalize_then_sum":
            raise ConfigError(
                f"`memory_size={self.memory_size}` ranks earlier samples among new ones by their rewards, but with "
                "`multi_objective_aggregation='normalize_then_sum'` rewards are standardized within each group, so "
                "those of different groups cannot be compared. Set `memory_size` to 0, or "
                "`multi_objective_aggregation` to 'sum_then_normalize'."
            )

    def _check_reference(self) -> None:
        if self.ref_update_steps is None:
            return
        if self.ref_update_steps < 1:
            raise ConfigError(f"`ref_update_steps` is {self.ref_update_steps}; it must be at least 1, or None.")
        for option in ("reference_free", "sync_ref_model"):
            if getattr(self, option):
                raise ConfigError(f"`{option}` and `ref_update_steps` exclude each other. Remove one of the two.")

    def check_evaluation(self) -> None:
        """
        Checks the batch size of evaluations, where there are any.

        Raises:
            ConfigError: If batches would cut groups apart.
        """
        own = self.num_generations_eval is not None
        self._check_group("per_device_eval_batch_size", "num_generations_eval" if own else "num_generations")

    def _check_group(self, batch_size: str, group_size: str) -> None:
        """Losses compare the samples of a prompt, so all of them have to be in one batch of one device."""
        size, group = getattr(self, batch_size), getattr(self, group_size)
        if group and size % group:
            raise ConfigError(
                f"`{batch_size}` is {size}, but a batch has to hold all completions of a prompt, and `{group_size}` is "
                f"{group}. Make it a multiple of {group}; `candidate_chunk_size` limits how many of them are in memory "
                "at the same time."
            )
