"""Options of ranking losses and of candidates, which [`LarPOConfig`] and [`OnlineLarPOConfig`] share."""

import difflib
import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_torch_bf16_gpu_available

from ..errors import ConfigError
from ..losses import (
    RANKING_LOSSES,
    RankingLoss,
    ndcg2pp_lambda_weight,
    ndcg_lambda_weight,
    reversed_relevance,
    smoothed,
)
from ..selection import TRUNCATED_COMPLETIONS, check_truncated_completions
from .scores import divergence_scores

# fmt: off
DPO_LOSSES = frozenset([
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
])
# fmt: on
"""Names of TRL's own losses. TRL exports no such list; the contract test compares this one with TRL's."""

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
class RankingOptions:
    """The options themselves; [`LarPOConfig`] says what each is for."""

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
            "model allows it, in batches for which separate rows are not cheaper; 'on': always, and an error where the "
            "model does not allow it; 'off': a row for each completion, with the prompt in each. The results are the "
            "same.",
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


def check_ranking_options(args: Any) -> None:
    """
    Checks [`RankingOptions`], and brings them into their form, before those of TRL are checked.

    Raises:
        ConfigError: Names the option, and how to fix it.
    """
    loss_type: Any = args.loss_type
    if isinstance(loss_type, str):  # one name, not in a list
        args.loss_type = [loss_type]
    check_loss_types(args.loss_type)
    if args.lambda_weight is not None and args.lambda_weight not in LAMBDA_WEIGHTS:
        raise ConfigError(
            f"`lambda_weight` is {args.lambda_weight!r}; it must be one of {sorted(LAMBDA_WEIGHTS)} or None."
        )
    if not args.listnet_temperature > 0:
        raise ConfigError(f"`listnet_temperature` is {args.listnet_temperature}; it must be greater than 0.")
    for name in ("listmle_top_k", "contrastive_positives"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"`{name}` is {value}; it must be at least 1.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    for option, losses in _OF_LOSS.items():
        value = getattr(args, option)
        if value != _default(option) and not set(losses) & set(args.loss_type):
            names = " and ".join(repr(name) for name in losses)
            raise ConfigError(
                f"`{option}={value!r}` belongs to {names}, but `loss_type` is {args.loss_type}. Add {losses[0]!r} "
                f"to `loss_type` or remove `{option}`."
            )
    _check_scores(args)
    check_truncated_completions(args.truncated_completions)
    shared_prompt: Any = args.shared_prompt
    if isinstance(shared_prompt, bool):  # what YAML makes of on and off
        args.shared_prompt = "on" if shared_prompt else "off"
    if args.shared_prompt not in SHARED_PROMPT:
        raise ConfigError(f"`shared_prompt` is {args.shared_prompt!r}; it must be one of {list(SHARED_PROMPT)}.")
    if args.candidate_chunk_size is not None and args.candidate_chunk_size < 1:
        raise ConfigError(f"`candidate_chunk_size` is {args.candidate_chunk_size}; it must be at least 1, or None.")
    if args.candidate_chunk_size is not None and args.neftune_noise_alpha:
        raise ConfigError(
            "`neftune_noise_alpha` scales its noise by the length of rows, which `candidate_chunk_size` changes. "
            "Remove one of the two."
        )
    if args.bf16 is None and not args.fp16 and not args.use_cpu and not is_torch_bf16_gpu_available():
        args.bf16 = False  # TRL's default of True is refused on a machine without an accelerator


def _check_scores(args: Any) -> None:
    if not math.isfinite(args.target_margin) or args.target_margin < 0:
        raise ConfigError(f"`target_margin` is {args.target_margin}; it must be a number of at least 0.")
    if args.target_margin and DPO_LOSSES.issuperset(args.loss_type):
        raise ConfigError(
            f"`target_margin={args.target_margin}` belongs to ranking losses, but `loss_type` is {args.loss_type}. Add "
            "one, e.g. 'lambdarank', or remove `target_margin`."
        )
    if not 0 <= args.label_smoothing < 0.5 and set(args.loss_type) - DPO_LOSSES:
        raise ConfigError(
            f"`label_smoothing` is {args.label_smoothing}; with ranking losses it must be at least 0 and below 0.5."
        )
    divergence_scores(torch.zeros(1), args.f_divergence_type, args.f_alpha_divergence_coef)
    if args.reference_free and args.f_divergence_type != "reverse_kl":
        raise ConfigError(
            f"`reference_free` scores have no reference to diverge from, but `f_divergence_type` is "
            f"{args.f_divergence_type!r}. Remove one of the two."
        )
    for option in ("sync_ref_model", "precompute_ref_log_probs"):
        if args.reference_free and getattr(args, option, False):
            raise ConfigError(f"`{option}` needs a reference, and `reference_free` has none. Remove one of the two.")


def _default(option: str) -> Any:
    return RankingOptions.__dataclass_fields__[option].default


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


def ranking_loss(name: str, args: Any) -> RankingLoss:
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
        reversed_loss_fn = loss_fn
        if (weight := options.get("lambda_weight")) is not None:  # that of a pair is the same in both orders

            def of_right_order(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
                return weight(scores, reversed_relevance(relevance, mask), mask)

            reversed_loss_fn = partial(RANKING_LOSSES[name], **options | {"lambda_weight": of_right_order})
        return smoothed(loss_fn, args.label_smoothing, margin, reversed_loss_fn)
    return partial(loss_fn, margin=margin) if margin else loss_fn


def check_loss_fn(loss_fn: RankingLoss | None, args: Any) -> None:
    """
    Refuses options that have no effect beside a ranking loss of the user's own.

    Raises:
        ConfigError: Names the option.
    """
    if loss_fn is None:
        return
    if args.loss_type not in (["lambdarank"], ["sigmoid"]):
        raise ConfigError(
            f"`loss_fn` and `loss_type={args.loss_type}` are both given. `loss_fn` takes the place of `loss_type`: "
            "leave `loss_type` at its default."
        )
    for option in ("loss_weights", "lambda_weight", "normalize_comparisons", "target_margin", "label_smoothing"):
        if getattr(args, option, None):
            raise ConfigError(f"`{option}` has no effect on a `loss_fn` of your own; remove one of the two.")
