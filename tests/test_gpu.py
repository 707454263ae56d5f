"""
On a GPU, with its own kernels: shared prompts are as near to float32 as plain rows in bfloat16 are.

Other tests have plain torch in place of these kernels. For FlashAttention, PyTorch's build of its kernels for variable
lengths takes the place of the package. FlexAttention takes minutes to compile; its tests have not been run to the end.
"""

import architectures
import pytest
import torch
from accelerate import Accelerator
from flash_stand_in import FLASH, flash_attention

from trl_larpo import LarPOConfig
from trl_larpo.training.passes import Layout
from trl_larpo.training.scorer import CandidateScorer
from trl_larpo.training.two_part_attention import has_kernel

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_kernel(DEVICE, torch.bfloat16), reason="needs a GPU with FlashAttention"
)

SIZES = {"hidden_size": 128, "n_embd": 128, "head_dim": 32}
"""Kernels take no heads of 8."""


def varlen_of_pytorch(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """As `flash_attn_varlen_func`, for what PyTorch's kernels take."""
    assert not softcap
    left, right = (None if size < 0 else size for size in window_size)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False,
        scale=softmax_scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip


def results(model_type: str, attention: str, dtype: torch.dtype, folder, **options):
    """Layout, log-probabilities, and gradients, of weights that bfloat16 can hold."""
    model = architectures.tiny_model(model_type, attention, **SIZES).to(torch.bfloat16).to(DEVICE, dtype)
    args = LarPOConfig(str(folder), bf16=dtype == torch.bfloat16, report_to="none", **options)
    scorer = CandidateScorer(model, args, Accelerator(), is_trained=True)
    batch = {name: tensor.to(DEVICE) for name, tensor in architectures.lists_of_tokens().items()}
    logps = scorer(model, batch).logps
    return scorer.layout, logps.detach().cpu(), architectures.gradients_of(model, logps.cpu()).float().cpu()


@pytest.mark.parametrize(
    ("attention", "model_type", "layout"),
    [
        ("sdpa", "llama", Layout.PACKED),
        ("sdpa", "qwen3", Layout.PACKED),
        ("sdpa", "gpt2", Layout.PACKED),
        ("sdpa", "mixtral", Layout.PACKED),
        ("sdpa", "mistral", Layout.SHARED),  # has windows
        (FLASH, "llama", Layout.SPLIT),
        (FLASH, "qwen3", Layout.SPLIT),
        (FLASH, "mistral", Layout.SPLIT),
        pytest.param("flex_attention", "llama", Layout.SHARED, marks=pytest.mark.slow),
        pytest.param("flex_attention", "mistral", Layout.SHARED, marks=pytest.mark.slow),
    ],
)
def test_shared_prompts_are_as_exact_as_plain_rows(attention, model_type, layout, tmp_path):
    with flash_attention(varlen_of_pytorch):
        _, *expected = results(model_type, "sdpa", torch.float32, tmp_path, shared_prompt="off")
        _, *plain = results(model_type, attention, torch.bfloat16, tmp_path, shared_prompt="off")
        for chunk_size in (None, 2):
            options = {"shared_prompt": "on", "candidate_chunk_size": chunk_size}
            found_layout, *found = results(model_type, attention, torch.bfloat16, tmp_path, **options)
            assert found_layout is (layout if chunk_size is None else Layout.PROMPT_FIRST)
            for right, of_plain, of_shared in zip(expected, plain, found, strict=True):
                allowed = 2 * (of_plain - right).norm() + 1e-3 * right.norm()
                assert (of_shared - right).norm() <= allowed, (chunk_size, of_plain, of_shared, right)
