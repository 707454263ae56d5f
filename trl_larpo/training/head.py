"""TRL's fused head for a CPU: the same numbers in half the time."""

import torch
from torch import Tensor

from .trl_compat import gather_head

_TOKENS, _VOCABULARY = (
    512,
    2048,
)  # of a tile of logits: small enough to stay in the cache, large enough to multiply fast


class CPULogProbs(torch.autograd.Function):
    """
    Log-probability of each token, and statistics of the distribution it comes from, from hidden states.

    Takes the place of TRL's `ChunkedLogProbFunction`, with the same arguments and results. Logits are worked out a tile
    at a time, in the forward pass and again in the backward pass, and the memory of a tile is gone through few times:
    TRL's form for devices without Triton does so about a dozen times.
    """

    @staticmethod
    def fits(bias: Tensor | None, temperature: float, softcap: float | None, logit_scale: float, outputs) -> bool:
        """Whether this function can do what is asked of the head; if not, TRL's own has to."""
        plain = bias is None and temperature == 1.0 and softcap is None and logit_scale == 1.0
        return plain and "log_sum_sq_probs" not in outputs

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # (tokens, hidden_size)
        weight: Tensor,  # (vocabulary, hidden_size)
        bias: None,
        targets: Tensor,  # (tokens,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        num_tokens, wants_entropy = len(hidden), "entropy" in outputs
        largest = torch.full((num_tokens,), -torch.inf)
        best = torch.zeros(num_tokens, dtype=torch.long)
        sum_exp, sum_exp_times_logit, target_logit = torch.zeros(3, num_tokens)
        for tokens, vocabulary, logits in _tiles(hidden, weight, dtype):
            tile_largest, tile_best = logits.max(dim=1)
            local = targets[tokens] - vocabulary.start
            inside = (local >= 0) & (local < logits.size(1))
            target = logits.gather(1, local.clamp(0, logits.size(1) - 1)[:, None])[:, 0]
            target_logit[tokens] = torch.where(inside, target, target_logit[tokens])
            best[tokens] = torch.where(tile_largest > largest[tokens], tile_best + vocabulary.start, best[tokens])

            new_largest = torch.maximum(largest[tokens], tile_largest)
            shrink = torch.exp(largest[tokens] - new_largest)
            exp = torch.sub(logits, new_largest[:, None]).exp_()
            sum_exp[tokens] = sum_exp[tokens] * shrink + exp.sum(dim=1)
            if wants_entropy:
                sum_exp_times_logit[tokens] = sum_exp_times_logit[tokens] * shrink + torch.linalg.vecdot(exp, logits)
            largest[tokens] = new_largest

        log_normalizer = largest + sum_exp.log()
        entropy = log_normalizer - sum_exp_times_logit / sum_exp if wants_entropy else None
        mean_logits = is_top1 = None
        if "mean_logits" in outputs:
            mean_logits = hidden.float() @ weight.float().mean(dim=0)
        if "is_top1" in outputs:
            is_top1 = best == targets
        ctx.save_for_backward(hidden, weight, targets, log_normalizer, log_normalizer if entropy is None else entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(*(x for x in (mean_logits, is_top1) if x is not None))
        return target_logit - log_normalizer, entropy, None, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_):
        hidden, weight, targets, log_normalizer, entropy = ctx.saved_tensors
        grad_log_probs = torch.zeros(len(hidden)) if grad_log_probs is None else grad_log_probs.float()
        with gather_head(weight, None):
            grad_hidden = torch.zeros(hidden.shape) if ctx.needs_input_grad[0] else None
            # Every part of it is written once before anything is added, so it need not be filled with zeros
            grad_weight = torch.empty(weight.shape) if ctx.needs_input_grad[1] else None
            if len(hidden) == 0 and grad_weight is not None:
                grad_weight.zero_()
            for tokens, vocabulary, logits in _tiles(hidden, weight, ctx.dtype):
                log_probs = logits.sub_(log_normalizer[tokens, None])
                if grad_entropy is None:
                    grad = log_probs.exp_().mul_(-grad_log_probs[tokens, None])
                else:  # dH / dz = -p (log p + H)
                    of_entropy = (log_probs + entropy[tokens, None]) * grad_entropy[tokens, None].float()
                    grad = log_probs.exp_().mul_(-(grad_log_probs[tokens, None] + of_entropy))
                local = targets[tokens] - vocabulary.start
                rows = ((local >= 0) & (local < grad.size(1))).nonzero()[:, 0]
                grad[rows, local[rows]] += grad_log_probs[tokens][rows]
                grad = grad.to(ctx.dtype)
                # Products are summed up in float32 whatever the logits were computed in, as TRL does
                if grad_hidden is not None:
                    grad_hidden[tokens].addmm_(grad.float(), weight[vocabulary].float())
                if grad_weight is not None:
                    kept = 0 if tokens.start == 0 else 1
                    grad_weight[vocabulary].addmm_(grad.float().t(), hidden[tokens].float(), beta=kept)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _tiles(hidden: Tensor, weight: Tensor, dtype: torch.dtype):
    """Token and vocabulary ranges that cover everything, each with its logits in float32."""
    for start in range(0, len(hidden), _TOKENS):
        tokens = slice(start, start + _TOKENS)
        states = hidden[tokens].to(dtype)
        for first in range(0, len(weight), _VOCABULARY):
            vocabulary = slice(first, first + _VOCABULARY)
            yield tokens, vocabulary, torch.mm(states, weight[vocabulary].to(dtype).t()).float()
