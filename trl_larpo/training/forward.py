"""The forward pass of a model over the candidates of a batch."""

import functools
import types
from functools import partial
from typing import Any, TypeAlias

import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .head import OutputHead, TokenValues, score_logits, score_tokens
from .passes import Call, Pass
from .token_rows import KeysAndValues, Rows


def enable_passes(model: PreTrainedModel) -> None:
    """
    Lets `model` be called as `model(passes=[Pass, ...], head=...)`, which scores the candidates in them.

    All calls happen inside the model's forward, so that whatever wraps it (PEFT, DDP, DeepSpeed, FSDP) sees one. It
    returns `(values, router_logits)`: the [`TokenValues`] of each call, `(rows, length - 1)` and 0 where no token is
    scored; and, where a further argument asks the model for them, the router logits of each layer, a list of tensors
    `(tokens, experts)`, over prompts and calls as they follow one another. Further arguments go to every call of the
    model. Without `passes` the model does what it did before.

    Args:
        model: Bare model.
    """
    original_forward = model.forward

    # This and `_run` are not traced themselves: the backbone that they call is compiled, and nothing around it
    @functools.partial(torch.compiler.disable, recursive=False)
    def forward(
        self,
        *args,
        passes: list[Pass] | None = None,
        head: OutputHead | None = None,
        with_statistics: bool = True,
        **kwargs,
    ):
        if passes is None or head is None:
            return original_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT fills in its own
        run = partial(_run, self, original_forward, head, with_statistics)
        parts: list[_Part] = []
        router_logits: list[list[Tensor]] = []
        for lists in passes:
            reading: dict[str, KeysAndValues] = {}
            if lists.prompts is not None:
                prompts, recorded = lists.prompts, KeysAndValues()
                outputs = self.base_model(
                    input_ids=prompts.input_ids,
                    attention_mask=prompts.real.long(),
                    position_ids=prompts.positions,
                    use_cache=False,
                    record=recorded,
                    **kwargs,
                )
                router_logits.append(_router_logits(outputs))
                reading["recorded"] = recorded
            for call in lists.calls:
                # The backward pass begins with the last call, and needs no more memory where that one is kept
                is_last = lists is passes[-1] and call is lists.calls[-1]
                if lists.recompute and torch.is_grad_enabled() and not is_last:
                    part, of_routers = checkpoint(run, call, use_reentrant=False, **reading, **kwargs)
                else:
                    part, of_routers = run(call, **reading, **kwargs)
                parts.append(part)
                router_logits.append(of_routers)
        calls = [call for lists in passes for call in lists.calls]
        values = _score(self, head, calls, parts, with_statistics) if head.linear else parts
        return values, [torch.cat(of_layer) for of_layer in zip(*router_logits, strict=True)]

    signature = functools.wraps(type(model).forward)  # `generate` looks there for what it may pass
    model.forward = types.MethodType(signature(forward), model)


def run_plainly(model, call: Call, with_statistics: bool, **kwargs) -> TokenValues:
    """
    Scores plain rows by the logits of a model whose forward cannot be entered: one with prompt-learning PEFT, which
    puts virtual tokens in front of each row.
    """
    rows = call.rows
    logits = model(input_ids=rows.input_ids, attention_mask=call.mask, use_cache=False, **kwargs).logits
    logits = logits[:, -rows.labels.size(1) :].flatten(0, 1)
    values = score_logits(logits[call.scored.to(logits.device)], _targets(call), with_statistics)
    return _in_rows(values, rows)


_Part: TypeAlias = Tensor | TokenValues
"""What a call leaves to be scored: hidden states `(tokens, hidden_size)` where the head is linear, else the values."""


@functools.partial(torch.compiler.disable, recursive=False)
def _run(
    model: PreTrainedModel, original_forward, head: OutputHead, with_statistics: bool, call: Call, **kwargs
) -> tuple[_Part, list[Tensor]]:
    rows = call.rows
    if call.with_positions:
        kwargs["position_ids"] = rows.positions
    if call.split is not None:
        kwargs["split"] = call.split
    arguments = {"input_ids": rows.input_ids, "attention_mask": call.mask, "use_cache": False} | kwargs
    _expect_other_sizes(arguments)
    if head.linear:
        outputs = model.base_model(**arguments)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, call.scored.to(hidden.device)), _router_logits(outputs)
    outputs = original_forward(**arguments)
    logits = outputs.logits.flatten(0, 1)
    values = score_logits(logits[call.scored.to(logits.device)], _targets(call), with_statistics)
    return _in_rows(values, rows), _router_logits(outputs)


@torch.compiler.disable
def _score(
    model: PreTrainedModel, head: OutputHead, calls: list[Call], parts: list[Tensor], with_statistics: bool
) -> list[TokenValues]:
    """
    The values of all calls at once: hidden states of the tokens that are scored are small, and the head is faster on
    many of them, and need not be worked out again together with a call.
    """
    targets = torch.cat([_targets(call) for call in calls])
    values = score_tokens(model, head, torch.cat(parts), targets, with_statistics)
    of_calls = zip(*(value.split([len(part) for part in parts]) for value in values.values()), strict=True)
    return [
        _in_rows(dict(zip(values, of_call, strict=True)), call.rows)
        for of_call, call in zip(of_calls, calls, strict=True)
    ]


def _targets(call: Call) -> Tensor:
    """The tokens that are scored, `(scored tokens,)`."""
    return call.rows.labels.flatten()[call.scored + 1]


@torch.compiler.disable
def _in_rows(values: TokenValues, rows: Rows) -> TokenValues:
    """Puts values of scored tokens into rows. `masked_scatter` keeps the model in the graph where nothing is scored."""
    scored = rows.scored[:, :-1]
    return {
        name: value.new_zeros(scored.shape).masked_scatter(scored.to(value.device), value)
        for name, value in values.items()
    }


@torch.compiler.disable
def _expect_other_sizes(arguments: dict[str, Any]) -> None:
    """Tells the compiler that the next batch is of another size, so that it compiles once for all."""
    tensors = [arguments[name] for name in ("input_ids", "attention_mask", "position_ids") if name in arguments]
    tensors += arguments["split"].tensors if "split" in arguments else []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            for dimension in range(tensor.dim()):
                if tensor.size(dimension) > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


@torch.compiler.disable
def _router_logits(outputs) -> list[Tensor]:
    """Of each layer that has experts, `(tokens, experts)`."""
    of_layers = getattr(outputs, "router_logits", None) or ()
    return [logits.flatten(0, -2) for logits in of_layers if isinstance(logits, Tensor)]
