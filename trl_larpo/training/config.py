"""Options of [`LarPOTrainer`]: TRL's [`~trl.DPOConfig`] plus what lists need."""

import difflib
import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from ..candidates import TRUNCATED_COMPLETIONS, check_truncated_completions
from ..errors import ConfigError
from ..losses import RANKING_LOSSES, RankingLoss, ndcg2pp_lambda_weight, ndcg_lambda_weight, smoothed

# fmt: off
DPO_LOSSES = frozenset([
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
])
# fmt: on
"""Names of TRL's own losses. TRL exports no such list; the contract test compares this one with TRL's."""

SIGMOID_ON_PAIRS = frozenset({"pairwise", "contrastive", "lambdarank", "listmle"})
"""Ranking losses that are TRL's "sigmoid" on two candidates."""

_PAIR_OPTIONS = ("ld_alpha", "use_weighting", "discopop_tau")

SHARED_PROMPT = ("auto", "on", "off")

LAMBDA_WEIGHTS = {"ndcg": ndcg_lambda_weight, "ndcg2++": ndcg2pp_lambda_weight}

_OF_LOSS = {  # option: the losses that it belongs to
    "lambda_weight": ("lambdarank",),
    "listnet_temperature": ("listnet",),
    "listmle_top_k": ("listmle",),
    "contrastive_positives": ("contrastive",),
    "normalize_comparisons": ("lambdarank", "listmle"),
}


@dataclass
class LarPOConfig(DPOConfig):
    r"""
    Configuration class for the [`LarPOTrainer`].

    It has every option of [`~trl.DPOConfig`] and those below. Defaults are the same but for `loss_type`, and for `bf16`
    on a machine without an accelerator that has it, where it is off. Like any TRL configuration it can be filled from
    the command line and from YAML by [`~trl.TrlParser`].

    Parameters:
        loss_type (`list[str]`, *optional*, defaults to `["lambdarank"]`):
            Losses over a ranked list: `'pairwise'`, `'contrastive'`, `'lambdarank'`, `'listmle'` (those of the LarPO
            paper), `'listnet'` and `'approx_ndcg'`; `'sft'` adds the negative log-likelihood of the best completion.
            Several are combined with `loss_weights`. On chosen/rejected pairs TRL's own losses may be used as well.
        lambda_weight (`str`, *optional*):
            Weight of a pair of candidates in the `'lambdarank'` loss. `None`: every pair counts the same, as in the
            paper. `'ndcg'`: the change in NDCG from swapping the two, as in LambdaRank proper. `'ndcg2++'`: the weights
            of NDCG-Loss2++ from the LambdaLoss framework.
        normalize_comparisons (`bool`, *optional*, defaults to `False`):
            Whether the `'lambdarank'` and `'listmle'` losses are divided by the number of comparisons in a list, so
            that gradients do not grow with it. The learning rate should then be larger.
        listmle_top_k (`int`, *optional*):
            The first places of the ranking that the `'listmle'` loss counts. `None`: all.
        contrastive_positives (`int`, *optional*, defaults to `1`):
            The first places of the ranking that are positives in the `'contrastive'` loss, each compared with the
            others that are worse.
        listnet_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the soft targets of the `'listnet'` loss, softmax(rewards / temperature), in units of the
            reward.
        per_token_scores (`bool`, *optional*, defaults to `False`):
            Whether the score of a completion is divided by its number of tokens, as in TRL's `'sigmoid_norm'` on pairs,
            so that long completions weigh no more than short ones. `beta` should then be larger, about 2. The default
            of `larpo run` is `True`, with `beta` 2.
        reference_free (`bool`, *optional*, defaults to `False`):
            Whether scores are `beta` times the policy's log-probabilities, without a reference, which is then not
            loaded. With `per_token_scores` and `target_margin` they are SimPO's, on lists of any size. For lists, and
            pairs that are trained as lists.
        target_margin (`float`, *optional*, defaults to `0.0`):
            By how much the score of a better completion has to be ahead of a worse one's, in units of the score.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For ranking losses, the probability that an order is the other way round, below 0.5; for TRL's losses as
            there.
        truncated_completions (`str`, *optional*, defaults to `"rank_last"`):
            What becomes of completions that the column `finished` calls cut off. `"rank_last"`: they rank below all
            that ended, and tie with each other; `"by_reward"`: they rank by their rewards; `"drop"`: they are left out.
            In the first two they are trained on without an end token, so that a model learns to end its answers.
        shared_prompt (`str`, *optional*, defaults to `"auto"`):
            Whether the completions of a list share one pass over their prompt, in one row. `"auto"`: where the model
            allows it; `"on"`: an error where it does not; `"off"`: a row for each completion, with the prompt in each.
            The results are the same.
        candidate_chunk_size (`int`, *optional*):
            How many completions are in memory at the same time, on each device. `None`: all of a batch. A smaller
            number takes less memory and somewhat more time; the results are the same.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["lambdarank"],
        metadata={
            "help": "Losses over a ranked list: 'pairwise', 'contrastive', 'lambdarank', 'listmle' (those of the LarPO "
            "paper), 'listnet' and 'approx_ndcg'; 'sft' adds the negative log-likelihood of the best completion. "
            "Several are combined with `loss_weights`. On chosen/rejected pairs TRL's own losses ('sigmoid', 'ipo', "
            "...) may be used as well."
        },
    )
    lambda_weight: str | None = field(
        default=None,
        metadata={
            "help": "Weight of a pair of candidates in the 'lambdarank' loss. None: every pair counts the same, as in "
            "the LarPO paper. 'ndcg': the change in NDCG from swapping the two, as in LambdaRank proper. 'ndcg2++': "
            "the weights of NDCG-Loss2++.",
            "choices": [*LAMBDA_WEIGHTS],
        },
    )
    normalize_comparisons: bool = field(
        default=False,
        metadata={
            "help": "Divide the 'lambdarank' and 'listmle' losses by the number of comparisons in a list, so that "
            "gradients do not grow with it. The learning rate should then be larger."
        },
    )
    listmle_top_k: int | None = field(
        default=None,
        metadata={"help": "The first places of the ranking that the 'listmle' loss counts. None: all."},
    )
    contrastive_positives: int = field(
        default=1,
        metadata={
            "help": "The first places of the ranking that are positives in the 'contrastive' loss, each compared with "
            "the others that are worse."
        },
    )
    listnet_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of the soft targets of the 'listnet' loss, softmax(rewards / temperature), in units "
            "of the reward."
        },
    )
    per_token_scores: bool = field(
        default=False,
        metadata={
            "help": "Divide the score of a completion by its number of tokens, as TRL's 'sigmoid_norm' does on pairs, "
            "so that long completions weigh no more than short ones. `beta` should then be larger, about 2."
        },
    )
    reference_free: bool = field(
        default=False,
        metadata={
            "help": "Score completions by the policy's log-probabilities alone; no reference model is loaded. With "
            "`per_token_scores` and `target_margin` the scores are SimPO's."
        },
    )
    target_margin: float = field(
        default=0.0,
        metadata={
            "help": "By how much the score of a better completion has to be ahead of a worse one's, in units of the "
            "score."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "For ranking losses, the probability that an order is the other way round, below 0.5; for TRL's "
            "losses as there."
        },
    )
    truncated_completions: str = field(
        default="rank_last",
        metadata={
            "help": "Cut-off completions: 'rank_last' (below all that ended), 'by_reward', or 'drop'. They are trained "
            "on without an end token, so that a model learns to end its answers.",
            "choices": [*TRUNCATED_COMPLETIONS],
        },
    )
    shared_prompt: str = field(
        default="auto",
        metadata={
            "help": "Whether the completions of a list share one pass over their prompt, in one row. 'auto': where the "
            "model allows it; 'on': an error where it does not; 'off': a row for each completion, with the prompt in "
            "each. The results are the same.",
            "choices": [*SHARED_PROMPT],
        },
    )
    candidate_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "How many completions are in memory at the same time, on each device. None: all of a batch. A "
            "smaller number takes less memory and somewhat more time; the results are the same."
        },
    )

    def __post_init__(self):
        loss_type: Any = self.loss_type
        if isinstance(loss_type, str):  # one name, not in a list
            self.loss_type = [loss_type]
        check_loss_types(self.loss_type)
        if self.lambda_weight is not None and self.lambda_weight not in LAMBDA_WEIGHTS:
            raise ConfigError(
                f"`lambda_weight` is {self.lambda_weight!r}; it must be one of {sorted(LAMBDA_WEIGHTS)} or None."
            )
        if not self.listnet_temperature > 0:
            raise ConfigError(f"`listnet_temperature` is {self.listnet_temperature}; it must be greater than 0.")
        for name in ("listmle_top_k", "contrastive_positives"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}; it must be at least 1.")
        for option, losses in _OF_LOSS.items():
            value = getattr(self, option)
            if value != _default(option) and not set(losses) & set(self.loss_type):
                names = " and ".join(repr(name) for name in losses)
                raise ConfigError(
                    f"`{option}={value!r}` belongs to {names}, but `loss_type` is {self.loss_type}. Add {losses[0]!r} "
                    f"to `loss_type` or remove `{option}`."
                )
        self._check_scores()
        check_truncated_completions(self.truncated_completions)
        shared_prompt: Any = self.shared_prompt
        if isinstance(shared_prompt, bool):  # what YAML makes of on and off
            self.shared_prompt = "on" if shared_prompt else "off"
        if self.shared_prompt not in SHARED_PROMPT:
            raise ConfigError(f"`shared_prompt` is {self.shared_prompt!r}; it must be one of {list(SHARED_PROMPT)}.")
        if self.candidate_chunk_size is not None and self.candidate_chunk_size < 1:
            raise ConfigError(f"`candidate_chunk_size` is {self.candidate_chunk_size}; it must be at least 1, or None.")
        if self.candidate_chunk_size is not None and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "`candidate_chunk_size` needs checkpointing of the kind that is not reentrant. Set "
                "`gradient_checkpointing_kwargs` to {'use_reentrant': False}."
            )
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16: bool | None = False  # DPOConfig's default of True is refused on a machine without an accelerator
        super().__post_init__()

    def _check_scores(self) -> None:
        if not math.isfinite(self.target_margin) or self.target_margin < 0:
            raise ConfigError(f"`target_margin` is {self.target_margin}; it must be a number of at least 0.")
        if not 0 <= self.label_smoothing < 0.5 and set(self.loss_type) - DPO_LOSSES:
            raise ConfigError(
                f"`label_smoothing` is {self.label_smoothing}; with ranking losses it must be at least 0 and below 0.5."
            )
        if self.reference_free and self.f_divergence_type != "reverse_kl":
            raise ConfigError(
                f"`reference_free` scores have no reference to diverge from, but `f_divergence_type` is "
                f"{self.f_divergence_type!r}. Remove one of the two."
            )
        for option in ("sync_ref_model", "precompute_ref_log_probs"):
            if self.reference_free and getattr(self, option):
                raise ConfigError(
                    f"`{option}` needs a reference, and `reference_free` has none. Remove one of the two."
                )


def _default(option: str) -> Any:
    return LarPOConfig.__dataclass_fields__[option].default


def check_loss_types(loss_types: list[str]) -> None:
    """
    Refuses an empty list and names that are neither a ranking loss nor one of TRL's.

    Raises:
        ConfigError: Names the unknown loss and the closest known one.
    """
    if not loss_types:
        raise ConfigError("`loss_type` is empty; name at least one loss, e.g. 'lambdarank'.")
    known = [*RANKING_LOSSES, *sorted(DPO_LOSSES)]
    for name in loss_types:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"`loss_type` names {name!r}, which is unknown. {hint}Ranking losses: {', '.join(RANKING_LOSSES)}; "
                f"TRL's losses for pairs: {', '.join(sorted(DPO_LOSSES))}."
            )


def ranking_loss(name: str, args: DPOConfig) -> RankingLoss:
    """The function behind a name in `loss_type`, with the options that belong to it bound."""
    options: dict[str, Any] = {}
    if name == "lambdarank" and getattr(args, "lambda_weight", None) is not None:
        options["lambda_weight"] = LAMBDA_WEIGHTS[args.lambda_weight]
    if name in _OF_LOSS["normalize_comparisons"]:
        options["normalize"] = getattr(args, "normalize_comparisons", False)
    for option, loss, keyword in (
        ("listmle_top_k", "listmle", "top_k"),
        ("contrastive_positives", "contrastive", "positives"),
        ("listnet_temperature", "listnet", "temperature"),
    ):
        if name == loss and hasattr(args, option):
            options[keyword] = getattr(args, option)
    loss_fn = partial(RANKING_LOSSES[name], **options)
    margin = getattr(args, "target_margin", 0.0)
    if margin and "margin" not in inspect.signature(RANKING_LOSSES[name]).parameters:
        raise ConfigError(
            f"`target_margin={margin}`: the loss {name!r} takes no argument `margin`. Remove one of the two."
        )
    if args.label_smoothing:
        return smoothed(loss_fn, args.label_smoothing, margin)
    return partial(loss_fn, margin=margin) if margin else loss_fn


def trains_lists(
    args: DPOConfig,
    *,
    formats: dict[str, str],
    loss_fn: RankingLoss | None,
    has_images: bool,
    has_collator: bool,
    has_compute_metrics: bool,
) -> bool:
    """
    Decides whether candidates are trained as lists, and refuses options that the data cannot honour.

    Ranked lists always are. Chosen/rejected pairs are too, as lists of two, unless something asks for what only
    `DPOTrainer` has: a loss of TRL's own, `ld_alpha`, `use_weighting`, images, a data collator of the user's or
    `compute_metrics` over logits. Then they go `DPOTrainer`'s way, where the paper's losses read as "sigmoid".

    Args:
        args: Options of the run.
        formats: Name of each dataset, the training set first → `"list"` or `"pair"`.
        loss_fn: The user's own ranking loss.
        has_images: Whether the training set has images.
        has_collator: Whether the user brings a data collator.
        has_compute_metrics: Whether the user brings `compute_metrics`.

    Returns:
        `True` for lists, `False` for `DPOTrainer`'s way.

    Raises:
        ConfigError: Names the option that does not go with the data, and how to fix it.
    """
    train_set = next(iter(formats))
    if loss_fn is not None and args.loss_type not in (["lambdarank"], ["sigmoid"]):
        raise ConfigError(
            f"`loss_fn` and `loss_type={args.loss_type}` are both given. `loss_fn` takes the place of `loss_type`: "
            "leave `loss_type` at its default."
        )
    if loss_fn is not None:
        for option in ("lambda_weight", "normalize_comparisons", "target_margin", "label_smoothing"):
            if getattr(args, option, None):
                raise ConfigError(f"`{option}` has no effect on a `loss_fn` of your own; remove one of the two.")
    dpo_losses = [name for name in args.loss_type if name in DPO_LOSSES and name != "sft"] if loss_fn is None else []

    if not args.beta > 0 and (formats[train_set] == "list" or not dpo_losses):
        raise ConfigError(f"`beta` is {args.beta}; it must be greater than 0.")
    if formats[train_set] == "list":
        if "inputs" in (getattr(args, "include_for_metrics", None) or []):
            raise ConfigError(
                "`include_for_metrics` names 'inputs', which are the `input_ids` of single sequences; lists have none. "
                "Remove it: `compute_metrics` receives scores and relevance."
            )
        if has_images:
            raise ConfigError(
                f"{train_set} has images. Images are supported on chosen/rejected pairs only, not on lists."
            )
        if dpo_losses:
            raise ConfigError(
                f"`loss_type` names {dpo_losses[0]!r}, which TRL defines on chosen/rejected pairs only, but "
                f"{train_set} holds lists. Use one of {', '.join(RANKING_LOSSES)}, or reduce each list to a pair."
            )
        for option, value, default in _pair_options(args):
            if value != default:
                raise ConfigError(
                    f"`{option}={value}` has no meaning on lists, only on chosen/rejected pairs, and {train_set} holds "
                    f"lists. Remove `{option}`, or reduce each list to a pair."
                )
        return True

    only_dpo_has = {
        f"`loss_type` {args.loss_type}": dpo_losses or args.loss_type == ["sft"],
        f"`ld_alpha={args.ld_alpha}`": args.ld_alpha is not None,
        "`use_weighting`": args.use_weighting,
        "images": has_images,
        "a data collator of your own": has_collator,
        "`compute_metrics`": has_compute_metrics,
    }
    reasons = [reason for reason, applies in only_dpo_has.items() if applies]
    if not reasons or (loss_fn is not None and reasons == [f"`loss_type` {args.loss_type}"]):
        return True
    list_only = [f"loss_type {name!r}" for name in args.loss_type if name not in DPO_LOSSES | SIGMOID_ON_PAIRS]
    list_only += ["`lambda_weight`"] if getattr(args, "lambda_weight", None) is not None else []
    list_only += [
        f"`{option}`"
        for option in ("per_token_scores", "reference_free", "target_margin")
        if getattr(args, option, False)
    ]
    list_only += ["`loss_fn`"] if loss_fn is not None else []
    if list_only:
        raise ConfigError(
            f"{list_only[0]} ranks candidates and cannot be combined with {reasons[0]}, which DPOTrainer alone has. "
            "Remove one of the two."
        )
    for where, row_format in formats.items():
        if row_format == "list":
            raise ConfigError(
                f"{where} holds lists, but {train_set} holds pairs that are trained as DPOTrainer does because of "
                f"{reasons[0]}. Evaluate on pairs, or remove it."
            )
    return False


def _pair_options(args: DPOConfig) -> list[tuple[str, object, object]]:
    """Options that DPOTrainer reads on pairs and nothing would read on lists: name, value, value that means unset."""
    defaults = {name: DPOConfig.__dataclass_fields__[name].default for name in _PAIR_OPTIONS}
    return [(name, getattr(args, name), default) for name, default in defaults.items()]
