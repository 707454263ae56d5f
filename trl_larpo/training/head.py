"""From hidden states to log-probabilities of tokens, without logits of the whole vocabulary in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from .trl_compat import gather_head, is_sharded_by_deepspeed, triton_log_probs

_TOKENS, _VOCABULARY = 512, 2048  # of a tile of logits: small enough to stay in a cache, large enough to multiply fast

TokenValues = dict[str, Tensor]
"""`"log_probs"` and, where they are asked for, `"entropy"`, `"mean_logits"` and `"is_top1"` of tokens; float32."""


@dataclass
class OutputHead:
    """
    How a model turns hidden states into logits z.

    Where it is linear, z = scale · (W h + b), then softcap · tanh(z / softcap) if the model has one, and logits never
    exist as a whole. Some models do something else; then they work out their logits themselves.

    Attributes:
        linear: Whether it is of that form.
        scale: Factor of the logits.
        softcap: Limit of the logits, `None` for none.
        max_kept_logits: So many logits are kept for the backward pass; more are worked out again there, as memory
            allows no more, which takes longer.
    """

    linear: bool = True
    scale: float = 1.0
    softcap: float | None = None
    max_kept_logits: int = 0

    @classmethod
    def from_config(cls, model: PreTrainedModel) -> "OutputHead":
        """What a model's configuration says. Whether it is right is for [`trl_larpo.training.proof`] to find out."""
        config = model.config.get_text_config()
        layer = model.get_output_embeddings()
        # More parameters, such as a scale for each token or an adapter, have to be trained as well
        parameters = {name.rpartition(".")[2] for name, _ in layer.named_parameters()}
        linear = (
            isinstance(getattr(layer, "weight", None), Tensor)
            and parameters <= {"weight", "bias"}
            and not hasattr(layer, "base_layer")
        )
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if isinstance(value := getattr(config, name, None), int | float):
                scale *= value
                break
        if isinstance(value := getattr(config, "logits_scaling", None), int | float):
            scale *= value if config.model_type == "hyperclovax" else 1 / value
        return cls(linear, scale, getattr(config, "final_logit_softcapping", None))


@torch.compiler.disable
def score_tokens(
    model: PreTrainedModel, head: OutputHead, hidden: Tensor, targets: Tensor, with_statistics: bool
) -> TokenValues:
    """
    Log-probabilities of tokens from the hidden states that predict them.

    Args:
        model: Bare model, whose output embeddings are the head.
        head: Its form, linear.
        hidden: `(tokens, hidden_size)`.
        targets: int64 `(tokens,)`.
        with_statistics: Whether to return more than log-probabilities.
    """
    layer = model.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    # With a model split across devices, the backbone may end on another one than the head
    hidden, targets = hidden.to(weight.device), targets.to(weight.device)
    if isinstance(weight, DTensor):  # FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    if len(hidden) * len(weight) <= head.max_kept_logits and not is_sharded_by_deepspeed(weight):
        logits = functional.linear(hidden, weight, bias).float() * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return score_logits(logits, targets, with_statistics)
    arguments = hidden, weight, bias, targets, head.scale, head.softcap, with_statistics
    with gather_head(weight, bias):
        values = None if triton_log_probs is None else triton_log_probs(*arguments)
        if values is None:
            values = TiledLogProbs.apply(*arguments)
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


@torch.compiler.disable
def score_logits(logits: Tensor, targets: Tensor, with_statistics: bool) -> TokenValues:
    """
    The same from logits `(tokens, vocabulary)`, for models whose head is not linear.

    A few tokens at a time go through the softmax in float32.
    """
    parts = []
    for some_logits, some_targets in zip(logits.split(_TOKENS), targets.to(logits.device).split(_TOKENS), strict=True):
        log_probs = some_logits.float().log_softmax(dim=-1)
        values = {"log_probs": log_probs.gather(1, some_targets[:, None])[:, 0]}
        if with_statistics:
            with torch.no_grad():
                values["entropy"] = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(dim=1)
                values["mean_logits"] = some_logits.float().mean(dim=1)
                values["is_top1"] = some_logits.argmax(dim=1) == some_targets
        parts.append(values)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class TiledLogProbs(torch.autograd.Function):
    """
    Log-probability of each token, and statistics of the distribution it comes from, from hidden states.

    Logits are worked out a tile of tokens and vocabulary at a time, in the forward pass and again in the backward pass,
    and go through memory few times: on a CPU it takes half the time of TRL's function for devices without Triton.
    Products are summed up in float32. Statistics carry no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # (tokens, hidden_size)
        weight: Tensor,  # (vocabulary, hidden_size)
        bias: Tensor | None,  # (vocabulary,)
        targets: Tensor,  # (tokens,)
        scale: float = 1.0,
        softcap: float | None = None,
        with_statistics: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.scale, ctx.softcap = scale, softcap
        num_tokens = len(hidden)
        largest = hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
        best = targets.new_zeros(num_tokens)
        sum_exp, sum_exp_times_logit, target_logit, sum_logits = largest.new_zeros(4, num_tokens)
        for tokens, vocabulary, logits in _tiles(hidden, weight, bias, ctx.dtype, scale, softcap):
            tile_largest, tile_best = logits.max(dim=1)
            local = targets[tokens] - vocabulary.start
            inside = (local >= 0) & (local < logits.size(1))
            target = logits.gather(1, local.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
            target_logit[tokens] = torch.where(inside, target, target_logit[tokens])

            new_largest = torch.maximum(largest[tokens], tile_largest)
            shrink = torch.exp(largest[tokens] - new_largest)
            exp = torch.sub(logits, new_largest[:, None]).exp_()
            sum_exp[tokens] = sum_exp[tokens] * shrink + exp.sum(dim=1)
            if with_statistics:
                best[tokens] = torch.where(tile_largest > largest[tokens], tile_best + vocabulary.start, best[tokens])
                products = torch.linalg.vecdot(exp, logits)
                sum_exp_times_logit[tokens] = sum_exp_times_logit[tokens] * shrink + products
                if softcap is not None:
                    sum_logits[tokens] += logits.sum(dim=1)
            largest[tokens] = new_largest

        log_normalizer = largest + sum_exp.log()
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizer)
        log_probs = target_logit - log_normalizer
        if not with_statistics:
            return log_probs, None, None, None
        entropy = log_normalizer - sum_exp_times_logit / sum_exp
        if softcap is not None:
            mean_logits = sum_logits / len(weight)
        else:  # the mean of the logits is the logit of the mean
            mean_logits = scale * (hidden.float() @ weight.float().mean(dim=0))
            mean_logits += 0.0 if bias is None else scale * bias.float().mean()
        is_top1 = best == targets
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1)
        return log_probs, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad_log_probs: Tensor | None, *_):
        hidden, weight, bias, targets, log_normalizer = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if grad_log_probs is None:
            return (None,) * 7
        grad_log_probs = grad_log_probs.float()
        with gather_head(weight, bias):
            grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
            # Every part of it is written once before anything is added, so it need not be filled with zeros
            grad_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
            if len(hidden) == 0 and grad_weight is not None:
                grad_weight.zero_()
            for tokens, vocabulary, logits in _tiles(hidden, weight, bias, ctx.dtype, ctx.scale, ctx.softcap):
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
                grad = logits.sub_(log_normalizer[tokens, None]).exp_().mul_(-grad_log_probs[tokens, None])
                local = targets[tokens] - vocabulary.start
                rows = ((local >= 0) & (local < grad.size(1))).nonzero()[:, 0]
                grad[rows, local[rows]] += grad_log_probs[tokens][rows]
                if slope is not None:
                    grad *= slope
                if ctx.scale != 1.0:
                    grad *= ctx.scale
                if grad_bias is not None:
                    grad_bias[vocabulary] += grad.sum(dim=0)
                grad = grad.to(ctx.dtype).float()
                if grad_hidden is not None:
                    grad_hidden[tokens].addmm_(grad, weight[vocabulary].float())
                if grad_weight is not None:
                    kept = 0 if tokens.start == 0 else 1
                    grad_weight[vocabulary].addmm_(grad.t(), hidden[tokens].float(), beta=kept)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float, softcap: float | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Token and vocabulary ranges that cover everything, each with its logits in float32."""
    for start in range(0, len(hidden), _TOKENS):
        tokens = slice(start, start + _TOKENS)
        states = hidden[tokens].to(dtype)
        for first in range(0, len(weight), _VOCABULARY):
            vocabulary = slice(first, first + _VOCABULARY)
            logits = torch.mm(states, weight[vocabulary].to(dtype).t()).float()
            if bias is not None:
                logits += bias[vocabulary].float()
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            yield tokens, vocabulary, logits
