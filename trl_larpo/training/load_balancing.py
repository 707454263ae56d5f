"""The loss that keeps the experts of a mixture equally busy."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import ConfigError


def load_balancing_loss(router_logits: list[Tensor], weights: Tensor, top_k: int) -> Tensor:
    """
    E · Σ_e f_e · P_e: the share of tokens that expert e gets times its mean router probability (Switch Transformers,
    arXiv 2101.03961, eq. 4 to 6), over all layers together as in transformers.

    Args:
        router_logits: One tensor `(tokens, experts)` for each layer.
        weights: How often each token counts, `(tokens,)`. A prompt that several completions share counts once for each
            of them, so the loss is that of separate rows.
        top_k: Experts that a token goes to.

    Returns:
        A scalar, float32.
    """
    weights = weights.float()
    num_experts = router_logits[0].size(-1)
    shares = probabilities = torch.zeros(num_experts, device=router_logits[0].device)
    for logits in router_logits:
        of_tokens = logits.to(shares.device).softmax(dim=-1)
        chosen = F.one_hot(of_tokens.topk(top_k, dim=-1).indices, num_experts).sum(dim=1)
        of_layer = weights.to(shares.device)[:, None]
        shares = shares + (chosen * of_layer).sum(dim=0)
        probabilities = probabilities + (of_tokens.float() * of_layer).sum(dim=0)
    total = (weights.sum() * len(router_logits)).clamp(min=1).to(shares.device)
    return num_experts * (shares / total * (probabilities / total)).sum()


def experts_per_token(config: PretrainedConfig) -> int:
    """
    How many experts a token goes to.

    Raises:
        ConfigError: If the configuration does not say.
    """
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ConfigError(
        f"The load-balancing loss needs the number of experts for each token, and the configuration of this "
        f"{config.model_type!r} model does not say it. Set `router_aux_loss_coef` to 0."
    )
