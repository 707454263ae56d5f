"""
What a layout of rows costs for a batch: a small model of time, fitted to measurements.

Shared prompts run fewer tokens through the layers. They lose where lists of very different sizes are padded to one
another, or where prompts are so short that taking rows apart costs more than it saves. Nor do fewer tokens help where a
device waits for the host, which starts its kernels one by one.
"""

from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from transformers import PreTrainedModel

from .attention import uses_blocks
from .passes import BLOCK, Layout
from .token_rows import Batch
from .variable_length import uses_variable_lengths

logger = get_logger(__name__)

MOST_TOKENS = 1.5
"""
Separate rows may hold this many times the tokens of shared ones where the time is the host's: they need memory.
"""

MARGIN = 0.05
"""Separate rows must be cheaper by this share: the model is small, and changes of layout cost something, too."""


@dataclass(frozen=True)
class Prices:
    """
    What things cost, in the time that one token takes in the layers but for attention.

    Attributes:
        flops: A floating-point operation of attention, as a share of the price of one in the layers.
        apart: Taking rows apart for attention, for each of their tokens.
        batch: The same, once for each batch.
        launch: What the host needs to start the kernels of a layer, in floating-point operations of the device.
        launch_apart: The share that comes on top of it where rows are taken apart.
    """

    flops: float = 1.0
    apart: float = 0.0
    batch: float = 0.0
    launch: float = 0.0
    launch_apart: float = 0.0


PRICES = {"cpu": Prices(apart=0.05), "cuda": Prices(launch=5e11, launch_apart=0.2)}
"""
By type of device. That of CPUs is from steps of lists of 2 and 6, prompts of 4, 64 and 192 and completions of 16 and 64
tokens (layers of the 135M shape): what it chooses is at most 6 % slower than the other layout in any of them. Least
squares say 0.17 for `apart`, with which the shortest prompts would lose up to 19 %. Of GPUs, operations are
counted, and `launch` is from steps of a 7B model on one H200, which take as long up to about 1,100 tokens;
`examples/benchmarks/gpu.py` prints what to put here.
"""


@dataclass(frozen=True)
class Work:
    """
    What a model does for a batch in some layout.

    Attributes:
        tokens: Tokens in the rows, with their padding.
        pairs: Pairs of a query and a key that attention works out, in each head.
        is_apart: Whether attention takes the rows apart.
    """

    tokens: int
    pairs: float
    is_apart: bool


@dataclass(frozen=True)
class Lengths:
    """
    Lengths of the sequences of a batch, in tokens.

    Attributes:
        prompts: Of each prompt.
        completions: Of the completions of each list.
    """

    prompts: list[int]
    completions: list[list[int]]

    @classmethod
    def of(cls, batch: Batch) -> "Lengths":
        completions = batch["completion_mask"].sum(dim=2).masked_fill(~batch["candidate_mask"], -1).tolist()
        return cls(
            batch["prompt_mask"].sum(dim=1).tolist(), [[n for n in of_list if n >= 0] for of_list in completions]
        )


def count_work(lengths: Lengths, layout: Layout, attention: str) -> Work:
    """
    Counts what a layout asks for.

    Args:
        lengths: Lengths of the batch.
        layout: `PACKED`, `SPLIT`, `SHARED` or `SEPARATE`.
        attention: `"mask"` (SDPA, eager), `"blocks"` (FlexAttention) or `"lengths"` (FlashAttention).
    """
    if layout is Layout.SEPARATE:
        rows = [
            prompt + n for prompt, of_list in zip(lengths.prompts, lengths.completions, strict=True) for n in of_list
        ]
        tokens = len(rows) * max(rows)
        if attention == "mask" and len(set(rows)) > 1:  # then they have a mask, whose zeros are worked out, too
            return Work(tokens, tokens * max(rows), False)
        return Work(tokens, sum(n * n for n in rows) / 2, False)
    # A candidate begins with a copy of the prompt's last token
    shared = [prompt - 1 for prompt in lengths.prompts]
    segments = [[n + 1 for n in of_list] for of_list in lengths.completions]
    totals = [prompt + sum(of_list) for prompt, of_list in zip(shared, segments, strict=True)]
    if attention != "mask" or (layout is Layout.PACKED and min(shared) > 0):
        seen = [
            prompt * prompt / 2 + sum(n * (prompt + n / 2) for n in of_list)
            for prompt, of_list in zip(shared, segments, strict=True)
        ]
        tokens = -(-sum(totals) // BLOCK) * BLOCK if attention == "blocks" else sum(totals)
        return Work(tokens, sum(seen), attention != "blocks")
    tokens = len(totals) * max(totals)
    if layout is not Layout.SPLIT or max(shared) == 0:
        return Work(tokens, tokens * max(totals), False)
    most, longest, prompt = max(map(len, segments)), max(n for of_list in segments for n in of_list), max(shared)
    return Work(tokens, len(totals) * (prompt * prompt / 2 + most * longest * (prompt + longest)), True)


def flops_of_token(config: Any) -> float:
    """
    Floating-point operations of a token in a layer but for attention, in a forward pass.

    Args:
        config: Of the text model. Sizes that it does not have are taken as usual.
    """
    hidden, width = config.hidden_size, _width(config)
    heads = getattr(config, "num_attention_heads", None) or 1
    key_width = width * (getattr(config, "num_key_value_heads", None) or heads) // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # of each layer
        inner = sum(inner) / len(inner)
    return 2 * hidden * (2 * width + 2 * key_width + 3 * inner * experts)


def flops_of_pair(config: Any) -> float:
    """The same of a pair of a query and a key in attention, as a share of `flops_of_token`."""
    return 4 * _width(config) / flops_of_token(config)


def _width(config: Any) -> int:
    """Of all attention heads together."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


class LayoutChoice:
    """
    Chooses the cheaper of two layouts that are both right, for each batch.

    Args:
        model: The model, bare or as a `PeftModel`.
        shared: The layout with shared prompts.
        prices: What things cost on the device.
        name: What the log calls the model.
    """

    def __init__(self, model: PreTrainedModel, shared: Layout, prices: Prices, name: str = "Model"):
        self.shared, self.prices, self.name = shared, prices, name
        self.attention = "lengths" if uses_variable_lengths(model) else "blocks" if uses_blocks(model) else "mask"
        config = model.config.get_text_config()
        self.of_pair = flops_of_pair(config)
        self.launch = prices.launch / flops_of_token(config)
        self._has_told = False

    def cost(self, work: Work) -> float:
        """Time, in that of a token in the layers."""
        cost = work.tokens + self.prices.flops * self.of_pair * work.pairs
        cost += (self.prices.apart * work.tokens + self.prices.batch) * work.is_apart
        return max(cost, self.launch * (1 + self.prices.launch_apart * work.is_apart))

    def __call__(self, batch: Batch) -> Layout:
        lengths = Lengths.of(batch)
        if not any(lengths.completions):  # in online training, all may be left out
            return self.shared
        in_rows, together = (count_work(lengths, layout, self.attention) for layout in (Layout.SEPARATE, self.shared))
        separate, shared = self.cost(in_rows), self.cost(together)
        if separate >= (1 - MARGIN) * shared or (self.launch > 0 and in_rows.tokens > MOST_TOKENS * together.tokens):
            return self.shared
        if not self._has_told:
            self._has_told = True
            logger.info(
                f"{self.name}: batches for which that costs less have a row for each completion. The first has lists "
                f"of {', '.join(str(len(of_list)) for of_list in lengths.completions)} and prompts of up to "
                f"{max(lengths.prompts)} tokens; estimated cost: {separate / shared:.0%} of shared prompts."
            )
        return Layout.SEPARATE
