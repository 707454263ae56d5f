"""Options of [`LarPOTrainer`]: TRL's [`~trl.DPOConfig`] plus what lists need."""

from dataclasses import dataclass

from trl import DPOConfig

from ..errors import ConfigError
from ..losses import RANKING_LOSSES, RankingLoss
from ..redaction import hide_secrets
from .ranking_options import DPO_LOSSES, RankingOptions, check_loss_fn, check_ranking_options

SIGMOID_ON_PAIRS = frozenset({"pairwise", "contrastive", "lambdarank", "listmle"})
"""Ranking losses that are TRL's "sigmoid" on two candidates."""

_PAIR_OPTIONS = ("ld_alpha", "use_weighting", "discopop_tau")


@dataclass
class LarPOConfig(RankingOptions, DPOConfig):
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

    def to_dict(self):
        """As in TRL, without secrets: trackers log it."""
        return hide_secrets(super().to_dict())

    def __post_init__(self):
        check_ranking_options(self)
        super().__post_init__()


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
    check_loss_fn(loss_fn, args)
    dpo_losses = [name for name in args.loss_type if name in DPO_LOSSES and name != "sft"] if loss_fn is None else []

    if not args.beta > 0 and (formats[train_set] == "list" or not dpo_losses) and list(args.loss_type) != ["sft"]:
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
        if args.label_smoothing and loss_fn is None and args.loss_type == ["sft"]:
            raise ConfigError(
                f"`label_smoothing={args.label_smoothing}` belongs to ranking losses, but `loss_type` is ['sft']. Add "
                "one, e.g. 'lambdarank', or remove `label_smoothing`."
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
    ranking_losses = [name for name in args.loss_type if name not in DPO_LOSSES]
    if list_only:
        raise ConfigError(
            f"{list_only[0]} ranks candidates and cannot be combined with {reasons[0]}, which DPOTrainer alone has. "
            "Remove one of the two."
        )
    without_effect = {
        f"`label_smoothing={args.label_smoothing}` of {ranking_losses}": ranking_losses and args.label_smoothing,
        "`candidate_chunk_size`": getattr(args, "candidate_chunk_size", None) is not None,
        "`shared_prompt='on'`": getattr(args, "shared_prompt", "auto") == "on",
    }
    for option, is_set in without_effect.items():
        if is_set:
            raise ConfigError(
                f"{option} has no effect where DPOTrainer's own code trains pairs, as it does because of {reasons[0]}. "
                "Remove one of the two, or name TRL's 'sigmoid' in place of the ranking loss."
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
