"""Scores γ of candidates: what the losses compare, from log-probabilities of the policy and the reference."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig

from ..errors import ConfigError

_STEEPEST = 40.0
"""Exponents from which divergences go on as their tangents: exp(40) times a gradient is still finite in float32."""


def candidate_scores(log_ratios: Tensor, num_tokens: Tensor, args: DPOConfig) -> Tensor:
    """
    Scores of candidates.

    By default γ = β · log(π_θ / π_ref), as in DPO (arXiv 2305.18290). With `per_token_scores` it is divided by the
    number of tokens; with `reference_free` as well it is SimPO's score (arXiv 2405.14734).

    Args:
        log_ratios: log π_θ - log π_ref of each completion, or log π_θ without a reference, float `(batch, list_size)`.
        num_tokens: Tokens of each completion, same shape.
        args: Options of the training.

    Returns:
        Float32 of the same shape.
    """
    divergence = divergence_scores(log_ratios.float(), args.f_divergence_type, args.f_alpha_divergence_coef)
    scores = args.beta * divergence
    return scores / num_tokens.clamp(min=1) if getattr(args, "per_token_scores", False) else scores


def divergence_scores(log_ratios: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """
    f'(π_θ / π_ref): what takes the place of the log ratio under another divergence (f-DPO, arXiv 2309.16240).

    Args:
        log_ratios: log π_θ - log π_ref, float32 of any shape.
        f_divergence_type: `"reverse_kl"` (the log ratio itself), `"forward_kl"`, `"js_divergence"` or
            `"alpha_divergence"`.
        alpha: Coefficient of the α-divergence.

    Returns:
        Tensor of the same shape. A constant is added where it keeps the value finite; ranking losses do not see it.
        Where an exponential would overflow, it goes on as a straight line.

    Raises:
        ConfigError: If the divergence is unknown.
    """
    if f_divergence_type == "reverse_kl":
        return log_ratios
    if f_divergence_type == "forward_kl":
        return -_expm1(-log_ratios)
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if f_divergence_type == "alpha_divergence":
        if abs(alpha - 1) < 1e-6:
            return log_ratios
        return _expm1((alpha - 1) * log_ratios) / (alpha - 1)
    raise ConfigError(
        f"`f_divergence_type` is {f_divergence_type!r}; it must be 'reverse_kl', 'forward_kl', 'js_divergence' or "
        "'alpha_divergence'."
    )


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, and its tangent from [`_STEEPEST`] on."""
    curve = torch.expm1(x.clamp(max=_STEEPEST))
    return curve + math.exp(_STEEPEST) * (x - _STEEPEST).clamp(min=0)
