"""
Every architecture of causal language models in transformers, small, with random weights: what the scorer makes of it.

    python tests/architectures.py             # prints a table, a line for each model type
    python tests/architectures.py gpt2 llama  # of some of them
    python tests/architectures.py --flash     # on FlashAttention, with a stand-in in plain torch for its kernels
    python tests/architectures.py --parts     # with attention in two parts, as on a GPU, in plain torch
"""

import contextlib
import dataclasses
import signal
import sys

import torch
from accelerate import Accelerator
from flash_stand_in import FLASH, flash_attention, two_parts_without_a_gpu
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_larpo import DataCollatorForCandidateLists, LarPOConfig
from trl_larpo.training.passes import Layout
from trl_larpo.training.scorer import CandidateScorer
from trl_larpo.training.token_rows import separate_rows

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 120

_SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # logits far enough from uniform for a mistake to show
    "init_std": 0.3,
    "sliding_window": 8,  # shorter than the rows
    "window_size": 8,
    "attention_window": 8,
    "attention_chunk_size": 8,
    "is_decoder": True,
    "layerdrop": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
"""Values for all that have the option."""

_BY_NAME: list[tuple[tuple[str, ...], object]] = [
    (("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32),
    (("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    (("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks"), 2),
    (
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        4,
    ),
    (("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv"), 2),
    (("head_dim", "global_head_dim", "rotary_dim", "kv_channels", "d_kv", "v_head_dim"), 8),
    (("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"), 256),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    (("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_size"), 16),
    (("q_lora_rank", "kv_lora_rank"), 16),
    (("qk_rope_head_dim", "qk_nope_head_dim"), 8),
]


_ABSENT = object()
_OF_MODEL: dict[str, dict[str, object]] = {
    **{
        name: {"num_key_value_heads": 4}  # one for each head of multi-head latent attention
        for name in (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
            "longcat_flash", "minicpm3", "youtu",
        )
    },
    "falcon": {"head_dim": _ABSENT},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 64],  # of each layer
        "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single architectures need beside that."""

LARGEST = 2_000_000
"""Parameters of a model that is small enough."""


def tiny_config(model_type: str, **options):
    """The configuration of an architecture with every size that it knows made small."""
    text = AutoConfig.for_model(model_type).get_text_config()
    sizes = _SIZES | {name: value for names, value in _BY_NAME for name in names}
    sizes = {name: value for name, value in sizes.items() if getattr(text, name, None) is not None}
    chosen = sizes | _OF_MODEL.get(model_type, {}) | options
    return AutoConfig.for_model(model_type, **{name: value for name, value in chosen.items() if value is not _ABSENT})


def tiny_model(model_type: str, attn_implementation: str | None = None, **options) -> PreTrainedModel:
    """
    A model in float32 on the CPU, in evaluation mode.

    Raises:
        ValueError: If it cannot be made small with what is known here.
    """
    config = tiny_config(model_type, **options)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} has {size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()


def lists_of_tokens():
    """A batch of two ragged lists, with rows longer than the windows above."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    examples = [
        {
            "prompt_ids": tokens(prompt),
            "completion_ids": [tokens(n) for n in lengths],
            "relevance": [0.0] * len(lengths),
        }
        for prompt, lengths in ((20, (5, 9, 3)), (13, (7, 4)))
    ]
    return DataCollatorForCandidateLists(pad_token_id=0)(examples)


def plain_logps(model: PreTrainedModel, batch) -> torch.Tensor:
    """Log-probabilities of the candidates from the model's logits over padded rows of prompt and completion."""
    rows = separate_rows(batch)
    logits = model(input_ids=rows.input_ids, attention_mask=rows.real.long(), use_cache=False).logits[:, :-1]
    log_probs = logits.float().log_softmax(dim=-1).gather(2, rows.input_ids[:, 1:, None])[..., 0]
    return rows.per_token(log_probs).sum(dim=-1)


def gradients_of(model: PreTrainedModel, logps: torch.Tensor) -> torch.Tensor:
    """Of a weighted sum of log-probabilities, in all parameters, as one vector."""
    weights = torch.linspace(-1, 1.5, logps.numel()).view_as(logps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((weights * logps).sum(), parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([gradient.flatten() for gradient in flat])


def make_scorer(model: PreTrainedModel, output_dir: str, **options) -> CandidateScorer:
    """A scorer of a model to be trained, on the CPU."""
    args = LarPOConfig(output_dir, use_cpu=True, bf16=False, **options)
    return CandidateScorer(model, args, Accelerator(cpu=True), is_trained=True)


class CannotBeTried(Exception):
    """The model cannot be built small, or not be used in plain rows either."""


@dataclasses.dataclass
class Outcome:
    """What the scorer chose, without and with chunks of two candidates, and how far it is from plain rows."""

    layouts: dict[int | None, Layout]
    logps: float  # largest difference, as a share of the largest log-probability
    gradients: float  # norm of the difference, as a share of the norm


def sweep(model_type: str, output_dir: str, attn_implementation: str | None = None) -> Outcome:
    """
    Scores two lists with a tiny model of some architecture, in each chunk setting, and in plain rows.

    Raises:
        CannotBeTried: If the model cannot be built small, does not run in plain rows, or itself depends on the padding
            of its rows, so that there is nothing to be equal to.
    """
    batch, layouts, worst = lists_of_tokens(), {}, [0.0, 0.0]
    try:
        model = tiny_model(model_type, attn_implementation)
        expected = plain_logps(model, batch)
        alone = torch.cat([plain_logps(model, {name: x[i : i + 1] for name, x in batch.items()}) for i in range(2)])
        expected_gradients = gradients_of(model, expected)
    except Exception as error:  # of any of two hundred
        raise CannotBeTried(" ".join(str(error).split())[:90]) from error
    if not (alone - expected).abs().max() < 1e-3:
        raise CannotBeTried("what padding stands beside a row changes its log-probabilities")
    for chunk_size in (None, 2):
        model = tiny_model(model_type, attn_implementation)
        scorer = make_scorer(model, output_dir, candidate_chunk_size=chunk_size)
        logps = scorer(model, batch).logps
        gradients = gradients_of(model, logps)
        layouts[chunk_size] = scorer.layout
        differences = [
            (logps - expected).detach().abs().max() / expected.detach().abs().max(),
            (gradients - expected_gradients).norm() / expected_gradients.norm(),
        ]
        worst = [
            max(old, float(new)) if new == new else float("nan") for old, new in zip(worst, differences, strict=True)
        ]
    return Outcome(layouts, *worst)


@contextlib.contextmanager
def time_limit(seconds: int):
    """Raises TimeoutError after so many seconds: reference implementations of some kernels take minutes."""

    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(model_types: list[str], attn_implementation: str | None = None) -> None:
    print("| model type | a list at once | in chunks | log-probabilities off by | gradients off by |")
    print("|---|---|---|---|---|")
    names = {Layout.SPLIT: "shared", Layout.SHARED: "shared", Layout.PROMPT_FIRST: "shared, prompt first",
             Layout.PACKED: "shared, in two parts"}  # fmt: skip
    num_shared = num_chunked = num_tried = 0
    for model_type in model_types or MODEL_TYPES:
        try:
            with time_limit(60):
                outcome = sweep(model_type, "/tmp", attn_implementation)
        except (CannotBeTried, TimeoutError) as error:
            print(f"| {model_type} | not tried: {error} | | | |", flush=True)
            continue
        num_tried += 1
        num_shared += outcome.layouts[None].shares_prompt
        num_chunked += outcome.layouts[2].shares_prompt
        whole, chunks = (names.get(outcome.layouts[size], "separate") for size in (None, 2))
        print(f"| {model_type} | {whole} | {chunks} | {outcome.logps:.0e} | {outcome.gradients:.0e} |", flush=True)
    print(f"\n{num_tried} architectures tried: {num_shared} share their prompts, {num_chunked} also in chunks.")


if __name__ == "__main__":
    if "--flash" in sys.argv:
        with flash_attention():
            main([name for name in sys.argv[1:] if name != "--flash"], FLASH)
    elif "--parts" in sys.argv:
        with two_parts_without_a_gpu():
            main([name for name in sys.argv[1:] if name != "--parts"])
    else:
        main(sys.argv[1:])
