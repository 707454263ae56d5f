"""FlashAttention on a CPU: its functions in plain torch, below transformers' own code for it."""

import contextlib
from functools import partial
from unittest import mock

import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AttentionInterface, PreTrainedModel

FLASH = "flash_attention_2"


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False, s_aux=None,
):  # fmt: skip
    """
    What the kernels of flash-attn 2.1 and later compute, one sequence after the other.

    Args:
        q: `(queries, heads, head_size)`; those of sequence i are from `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]`.
        k: `(keys, key_heads, head_size)`, as `v`, likewise by `cu_seqlens_k`.
        causal: The last query of a sequence sees its last key, the one before all but the last key.
        window_size: How many keys to the left and right a query sees beside that, -1 for all.
        softcap: Scores are squeezed into -softcap to softcap, 0 for none.
        s_aux: A score for nothing, of each head.
    """
    assert dropout_p == 0.0 and q.dim() == k.dim() == 3 and k.shape == v.shape, "not the contract"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert isinstance(max_seqlen_q, int) and cu_seqlens_q.diff().max() == max_seqlen_q, "kernels would stop early"
    assert isinstance(max_seqlen_k, int) and cu_seqlens_k.diff().max() == max_seqlen_k
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    groups = q.size(1) // k.size(1)
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        key, value = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (k, v)
        )
        scores = query @ key.transpose(1, 2) * (q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        # By how many keys a key is after the one that its query stands at
        after = torch.arange(key.size(1)) - (torch.arange(query.size(1))[:, None] + key.size(1) - query.size(1))
        left, right = window_size
        seen = (after >= -left if left >= 0 else after == after) & (after <= right if right >= 0 else after == after)
        scores = scores.masked_fill(~(seen & (after <= 0) if causal else seen), -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, query.size(1), 1)], dim=2)
        outputs.append((scores.softmax(dim=-1)[..., : key.size(1)] @ value).transpose(0, 1))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, varlen, **options):
    """The same for sequences of one length, `(batch, length, heads, head_size)`."""
    ends = [torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.size(1) for x in (q, k)]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return varlen(*flat, *ends, q.size(1), k.size(1), **options).view(q.shape[:3] + v.shape[3:])


def _accept(model, attn_implementation, *args, **kwargs):
    if attn_implementation == FLASH and not model._supports_flash_attn:
        raise ValueError(f"{type(model).__name__} does not support FlashAttention")
    return attn_implementation or "sdpa"


@contextlib.contextmanager
def flash_attention(varlen=flash_attn_varlen_func):
    """
    Models can be made with `attn_implementation="flash_attention_2"`, and run on a CPU, in float32 too.

    Args:
        varlen: What stands in for `flash_attn_varlen_func`.
    """
    functions = {
        "_loaded_implementation": FLASH,
        "_flash_fn": partial(flash_attn_func, varlen=varlen),
        "_flash_varlen_fn": varlen,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(varlen),
    }
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():  # transformers 4 has no `_loaded_implementation`
            stack.enter_context(mock.patch.object(flash_utils, name, function, create=True))
        stack.enter_context(mock.patch.dict(AttentionInterface._global_mapping))  # as it was, afterwards
        # The kernels want half precision, and transformers casts to that of some nn.Linear, which GPT-2 has none of
        stack.enter_context(mock.patch.object(flash_integration, "get_target_dtype", lambda *args: None, create=True))
        stack.enter_context(mock.patch.object(PreTrainedModel, "_check_and_adjust_attn_implementation", _accept))
        yield


@contextlib.contextmanager
def two_parts_without_a_gpu():
    """Lets attention in two parts be chosen on a CPU, where plain torch stands in for PyTorch's kernels."""
    with mock.patch("trl_larpo.training.scorer.has_kernel", return_value=True):
        yield
