"""
Estimates the memory of list training on each GPU from the size of the model, the lists, and the number of GPUs.

    python examples/benchmarks/memory_estimate.py                                  # the table of the README
    python examples/benchmarks/memory_estimate.py --model ./my-model --gpus 16 --list 8 --lengths 1500/500
    python examples/benchmarks/memory_estimate.py --params 13e9 --gpus 8
    python examples/benchmarks/memory_estimate.py --recipe examples/recipes/today/qwen3_4b_skywork_1x24gb.yaml

All numbers are computed, not measured. Weights, gradients and optimizer state follow DeepSpeed's own estimator (bf16
weights and gradients, Adam in float32). The reference adds its weights, unless its log-probabilities are precomputed
(`precompute_ref_log_probs`, always the case in `larpo run`). Activations assume gradient checkpointing and shared
prompts, one list at a time: the input that each layer keeps, and the memory of one layer while it is recomputed.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30


@dataclass
class Shape:
    """Dimensions of a Llama-like model that the estimate depends on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool = False
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def layer_params(self) -> int:
        heads = 2 * self.num_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * self.head_size * heads
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def embedding_params(self) -> int:
        """Of the embedding and the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        return self.embedding_params + self.num_layers * self.layer_params + self.hidden_size

    @property
    def bytes_in_4_bits(self) -> float:
        """NF4 has a scale in float32 for 64 weights; the embedding and the head stay in bf16."""
        return 2 * self.embedding_params + (0.5 + 4 / 64) * (self.params - self.embedding_params)

    def lora_params(self, rank: int) -> int:
        """Of adapters on all linear layers of the blocks."""
        queries, keys = self.num_heads * self.head_size, self.num_key_value_heads * self.head_size
        sizes = 2 * (self.hidden_size + queries) + 2 * (self.hidden_size + keys)
        return rank * self.num_layers * (sizes + 3 * (self.hidden_size + self.intermediate_size))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of a token, in bf16."""
        return 2 * 2 * self.num_key_value_heads * self.head_size * self.num_layers

    @property
    def largest_layer_params(self) -> int:
        """Parameters of the largest module, as DeepSpeed counts it: usually the embedding."""
        return max(self.vocab_size * self.hidden_size, self.hidden_size * self.intermediate_size)


SHAPES = {
    "135M": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "2B": Shape(2304, 9216, 26, 8, 4, 256000, tied=True),
    "7B": Shape(4096, 14336, 32, 32, 8, 32000),
    "13B": Shape(5120, 13824, 40, 40, 40, 32000),
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),
}

MODELS = {
    "alignment-handbook/zephyr-7b-sft-full": SHAPES["7B"],
    "mistralai/Mistral-7B-Instruct-v0.2": SHAPES["7B"],
    "mistralai/Mathstral-7B-v0.1": SHAPES["7B"],
    "outputs/recipes/table6/sft": SHAPES["7B"],
    "google/gemma-2-2b-it": SHAPES["2B"],
    "Qwen/Qwen3-4B-Instruct-2507": Shape(2560, 9728, 36, 32, 8, 151936, tied=True, head_dim=128),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(4096, 14336, 32, 32, 8, 128256),
    "google/gemma-3-4b-it": Shape(2560, 10240, 34, 8, 4, 262208, tied=True, head_dim=256),  # the language model
}
"""Models of recipes, by hub id: from the configurations that their vendors publish."""

REWARD_MODELS = {
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": 7.5e9,
    "Skywork/Skywork-Reward-V2-Qwen3-4B": 4.0e9,
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": 7.5e9,
    "pairwise:llm-blender/PairRM-hf": 0.44e9,
}
"""Weights of reward models."""

WORKSPACE = 1.5 * GIB
"""Of CUDA, its kernels and fragments: our assumption."""


def model_states(
    shape: Shape, stage: int, gpus_per_node: int, nodes: int = 1, offload: bool = False
) -> tuple[float, float]:
    """
    Bytes of weights, gradients and optimizer state.

    Args:
        shape: The model.
        stage: ZeRO stage, 0 (none, as in DDP) to 3.
        gpus_per_node: GPUs per machine.
        nodes: Number of machines.
        offload: Whether weights (stage 3) and optimizer state are in CPU memory.

    Returns:
        Bytes on each GPU, and in the CPU memory of each machine.
    """
    params, gpus = shape.params, gpus_per_node * nodes
    buffers = 1.5  # DeepSpeed's factor for buffers in CPU memory
    if stage == 3:
        gathered = 4 * shape.largest_layer_params  # one module's weights and gradients, unsharded
        if offload:
            return gathered, 18 * params / nodes * buffers
        return gathered + 18 * params / gpus, shape.largest_layer_params * 4 * gpus_per_node * buffers
    if stage == 2:
        if offload:
            return 2 * params, params * max(4 * gpus, 16) * buffers
        return 2 * params + 18 * params / gpus, params * 4 * gpus_per_node * buffers
    if stage == 1:  # 16-bit gradients are not sharded
        return 4 * params + 16 * params / gpus, params * 4 * gpus_per_node * buffers
    return 20 * params, params * 4 * gpus_per_node * buffers


def activations(shape: Shape, prompt: int, completion: int, list_size: int, chunk: int | None = None) -> float:
    """
    Bytes of the activations of one list, in bf16, with gradient checkpointing and a shared prompt.

    Args:
        shape: The model.
        prompt: Tokens of the prompt.
        completion: Tokens of each completion.
        list_size: Number of completions.
        chunk: `candidate_chunk_size`; `None`: all at once.
    """
    at_once = min(list_size, chunk or list_size)
    tokens = prompt + at_once * (completion + 1)
    kept = 2 * tokens * shape.hidden_size * shape.num_layers  # the input of each layer
    if chunk is not None:  # and the prompt's keys and values, which all chunks read
        kept += prompt * shape.cache_bytes
    one_layer = 2 * tokens * (8 * shape.hidden_size + 4 * shape.intermediate_size)  # activations while recomputing it
    head = 3 * 4 * min(at_once * completion, 1024) * shape.vocab_size  # a chunk of logits in float32, and its gradient
    return kept + max(one_layer, head)


def reference(shape: Shape, stage: int, gpus: int) -> float:
    """Bytes of the reference's weights on each GPU, in bf16."""
    return 2 * shape.params / (gpus if stage == 3 else 1)


def stages(recipe: dict[str, Any]) -> dict[str, float]:
    """
    Bytes on each GPU in each stage of a recipe of `larpo run`; stages follow each other, and share nothing.

    Args:
        recipe: Its options. Prompts and completions are taken to be as long as they may be.
    """
    shape, judge = MODELS[recipe["model_name_or_path"]], REWARD_MODELS.get(recipe["reward_funcs"], 0)
    prompt, completion = recipe["max_prompt_length"], recipe["max_new_tokens"]
    list_size, chunk = recipe["num_best"] + recipe["num_worst"], recipe.get("candidate_chunk_size")
    moving, base = activations(shape, prompt, completion, list_size, chunk), 2 * shape.params
    if recipe.get("load_in_4bit"):
        base = shape.bytes_in_4_bits
    if recipe.get("use_peft"):
        training = base + 18 * shape.lora_params(recipe["lora_r"])
    else:
        training = model_states(shape, 2, recipe["num_processes"])[0]
    cache = recipe["generation_batch_size"] * (prompt + completion) * shape.cache_bytes
    read = recipe.get("reward_batch_size", 16) * (prompt + completion) * 2 * 4096 * 12  # activations of one layer
    return {
        "sampling": base + cache + WORKSPACE,
        "rewards": 2 * judge + read + WORKSPACE if judge else 0.0,
        "reference": base + moving + WORKSPACE,
        "training": training + moving + WORKSPACE,
    }


def table(prompt: int, completion: int) -> str:
    """Markdown table of the smallest number of 80 GiB GPUs for some models and lists."""
    lines = [
        "| model | list | GPUs | ZeRO | states | activations | per GPU | CPU memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("2B", "7B", "13B", "70B"):
        for list_size in (4, 8, 32):
            shape, chunk = SHAPES[name], 4 if list_size == 32 else None
            stage, gpus, gpu, cpu, moving = smallest(shape, prompt, completion, list_size, chunk)
            chunks = f", chunks of {chunk}" if chunk else ""
            machines = f" ({gpus // 8} × 8)" if gpus > 8 else ""
            lines.append(
                f"| {name} | {list_size} × {prompt}/{completion}{chunks} | {gpus}{machines} | {stage} | "
                f"{(gpu - moving) / GIB:.1f} GiB | {moving / GIB:.1f} GiB | {gpu / GIB:.1f} GiB | {cpu / GIB:.0f} GiB |"
            )
    return "\n".join(lines)


def smallest(shape: Shape, prompt: int, completion: int, list_size: int, chunk: int | None, room: float = 72 * GIB):
    """Smallest number of GPUs, then lowest ZeRO stage, with at most `room` bytes on each GPU."""
    moving = activations(shape, prompt, completion, list_size, chunk)
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128):
        for stage in (1, 2, 3):
            states, cpu = model_states(shape, stage, min(gpus, 8), max(1, gpus // 8))
            if states + moving <= room:
                return stage, gpus, states + moving, cpu, moving
    raise SystemExit("It fits on none of 128 GPUs.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", help="folder or hub id; only the configuration is read")
    parser.add_argument("--recipe", type=Path, help="recipe of examples/recipes: memory of each of its stages")
    parser.add_argument("--params", type=float, help="number of weights of a Llama-like model")
    parser.add_argument("--gpus", type=int, default=8, help="total number, on all machines")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--list", type=int, default=4, help="completions per prompt")
    parser.add_argument("--lengths", default="1000/1000", help="tokens of the prompt / of each completion")
    parser.add_argument("--candidate_chunk_size", type=int)
    options = parser.parse_args(argv)
    prompt, completion = map(int, options.lengths.split("/"))
    print("Computed, not measured.\n")
    if options.recipe is not None:
        for stage, size in stages(yaml.safe_load(options.recipe.read_text(encoding="utf-8"))).items():
            print(f"{stage:10} {size / GIB:6.1f} GiB on each GPU")
        return
    if options.model is None and options.params is None:
        print(
            "Fewest GPUs of 80 GiB (72 used), the reference's log-probabilities computed beforehand:\n\n"
            f"{table(prompt, completion)}"
        )
        return
    shape = shape_of(options.model) if options.model else scaled(options.params)
    moving = activations(shape, prompt, completion, options.list, options.candidate_chunk_size)
    nodes = max(1, options.gpus // options.gpus_per_node)
    per_node = min(options.gpus, options.gpus_per_node)
    print(f"{shape.params / 1e9:.2f}B weights, a list of {options.list} × {options.lengths}, {options.gpus} GPUs")
    print(f"activations {moving / GIB:8.1f} GiB on each GPU\n")
    print(f"{'':14}{'states':>12}{'+ reference':>14}{'in all':>12}{'CPU memory':>14}")
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        states, cpu = model_states(shape, stage, per_node, nodes, offload)
        frozen = reference(shape, stage, options.gpus)
        name = ("DDP" if stage == 0 else f"ZeRO-{stage}") + (" offload" if offload else "")
        values = (states, frozen, states + frozen + moving, cpu)
        print(f"{name:14}" + "".join(f"{v / GIB:{w}.1f}" for v, w in zip(values, (12, 14, 12, 14), strict=True)))


def shape_of(model: str) -> Shape:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        config.vocab_size,
        bool(config.tie_word_embeddings),
        getattr(config, "head_dim", None),
    )


def scaled(params: float) -> Shape:
    """The listed shape of the nearest size, with the number of layers adjusted to the number of weights."""
    nearest = min(SHAPES.values(), key=lambda shape: abs(shape.params - params))
    rest = nearest.params - nearest.num_layers * nearest.layer_params
    nearest.num_layers = max(1, round((params - rest) / nearest.layer_params))
    return nearest


if __name__ == "__main__":
    main()
