"""
Measures on a model itself whether a layout of rows gives the numbers of separate rows.

What a model computes for two short lists is compared: log-probabilities, and gradients in the embeddings of the tokens,
which all other gradients follow from. Nothing is read from the model's source.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from .attention import uses_blocks
from .collator import DataCollatorForCandidateLists
from .token_rows import Batch
from .trl_compat import calls_another_model

logger = get_logger(__name__)

Score = Callable[[Batch], Tensor]
"""Log-probabilities of the candidates of a batch, `(batch, list_size)`."""

_PROMPT_LENGTHS = (9, 5)
_COMPLETION_LENGTHS = ((6, 3, 5), (4, 7))  # ragged, in tokens

FULL_PRECISION = 1e-3
"""Largest difference in float32: as a share of what the prompt changes in log-probabilities, and of a gradient."""

HALF_PRECISION = 0.05
"""The same in half precision, where rounding alone changes a few per cent; also for attention of one layer."""

ROUGHLY = 0.4
"""A share of what the prompt changes in log-probabilities that no rounding reaches, and mistakes in rows exceed."""

_CHANGE = 1e-4  # of embeddings: little in float32, and enough to be rounded otherwise in half precision

_NOISE = 4.0  # a difference of this many times what rounding alone makes is allowed as well


@dataclass
class Difference:
    """
    How far a layout is from separate rows.

    Attributes:
        logps: Largest difference of a log-probability, in nats.
        of_prompt: The same as a share of what another prompt changes.
        gradients: Norm of the difference in gradients, as a share of the gradients'. `None`: not measured.
        attention: The same of what a layer's attention returns, and of its gradients. `None`: not measured.
        accepted: Whether all of it is rounding.
        error: What the model raised, in place of numbers.
    """

    logps: float = float("nan")
    of_prompt: float = float("nan")
    gradients: float | None = None
    attention: float | None = None
    accepted: bool = False
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"it raises {self.error}"
        if self.attention is not None:
            return f"attention of a layer differs by {self.attention:.1e}"
        text = f"log-probabilities differ by {self.logps:.1e} nats ({self.of_prompt:.1e} of what the prompt changes)"
        return text if self.gradients is None else f"{text}, gradients by {self.gradients:.1e} of their norm"


@dataclass
class _Measured:
    logps: Tensor  # (candidates,)
    gradients: Tensor | None  # (distinct tokens, hidden_size)


class Proof:
    """
    Measures separate rows once, then compares with them.

    Args:
        model: The model, bare or as a `PeftModel`, in place: on its device, and sharded if it will be.
        separate: Scores a batch in separate rows.
        accelerator: That of the training.
        with_gradients: Whether the model is trained.

    Raises:
        ConfigError: If the model's forward pass is that of another model.
        RuntimeError: If it does not call the layer of input embeddings, so that nothing can be measured.
    """

    def __init__(self, model: PreTrainedModel, separate: Score, accelerator: Accelerator, with_gradients: bool):
        self._model, self._separate, self._accelerator = model, separate, accelerator
        embeddings = model.get_input_embeddings()
        device = embeddings.weight.device
        self._device = accelerator.device if device.type == "meta" else device
        self._vocabulary = model.config.get_text_config().vocab_size
        self._batch = self._make_batch()
        self._with_gradients = with_gradients
        try:
            self._expected = self._measure(separate, self._batch)
        except RuntimeError as error:
            if not with_gradients or self._device.type != "cpu" or not uses_blocks(model):
                raise
            # FlexAttention on a CPU has no backward pass
            self._with_gradients = False
            self._expected = self._measure(separate, self._batch)
            logger.debug(f"No gradients are compared, because there are none: {error}")
        other = self._measure(separate, self._make_batch(first_token=1), with_gradients=False)
        self._effect = (other.logps - self._expected.logps).abs().max()
        self._noise: _Measured | None = None

    def _make_batch(self, first_token: int = 0, multiple: int = 1) -> Batch:
        """Two lists of distinct tokens, as far as the vocabulary has them; `first_token` changes the prompts."""
        step = max(1, self._vocabulary // 2 // (sum(_PROMPT_LENGTHS) + sum(map(sum, _COMPLETION_LENGTHS)) + 1))
        tokens = iter(range(self._vocabulary // 4, self._vocabulary * 4, step))

        def take(count: int, shift: int = 0) -> list[int]:
            return [(next(tokens) + shift) % self._vocabulary for _ in range(count)]

        examples = [
            {
                "prompt_ids": take(prompt_length, first_token),
                "completion_ids": [take(length) for length in completion_lengths],
                "relevance": [0.0] * len(completion_lengths),
            }
            for prompt_length, completion_lengths in zip(_PROMPT_LENGTHS, _COMPLETION_LENGTHS, strict=True)
        ]
        batch = DataCollatorForCandidateLists(pad_token_id=0)(examples)
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def compare(self, score: Score, roughly: float | None = None) -> Difference:
        """
        How far another way to score the lists is from separate rows. All processes come to the same verdict.

        Args:
            score: The other way.
            roughly: Accept log-probabilities up to this share of what the prompt changes, whatever the gradients are.
        """
        found, difference = None, Difference()
        try:
            found = self._measure(score, self._batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with what it does not know
            difference.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        share = float("inf")
        if found is not None:
            expected = self._expected
            difference.logps = float((found.logps - expected.logps).abs().max())
            difference.of_prompt = difference.logps / max(float(self._effect), 1e-12)
            share = difference.of_prompt
            if found.gradients is not None and expected.gradients is not None:
                off, norm = (found.gradients - expected.gradients).norm(), expected.gradients.norm()
                difference.gradients = float(off / norm.clamp(min=1e-12))
                if not difference.gradients <= share:  # also where it is NaN
                    share = difference.gradients
        limit = FULL_PRECISION if self._is_full_precision else HALF_PRECISION
        # Embeddings in float32 do not tell what the layers compute in (autocast, 4-bit weights): the noise does
        accepted, unsure = share <= limit, limit < share <= _NOISE * HALF_PRECISION
        if self._on_some_process(unsure):  # then all of them measure it
            noise = self._measure_noise()
            accepted |= found is not None and unsure and self._is_noise(found, noise)
        if roughly is not None:
            accepted = difference.of_prompt <= roughly
        difference.accepted = not self._on_some_process(not accepted)
        return difference

    def compare_attention(self, deviations: Callable[[Batch], list[float]]) -> Difference:
        """
        How far attention of each layer is from a softmax in float32 over the same states.

        In half precision, other kernels round otherwise, and differences grow from layer to layer until they say little
        about where they come from. Within a layer they do not.

        Args:
            deviations: Runs the model on a batch and returns the difference in each layer.
        """
        difference = Difference()
        try:
            with evaluating(self._model), torch.no_grad():
                difference.attention = max(deviations(self._batch), default=float("inf"))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            difference.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        is_off = difference.attention is None or not difference.attention <= HALF_PRECISION
        difference.accepted = not self._on_some_process(is_off)
        return difference

    def _measure_noise(self) -> _Measured:
        """Separate rows in calls of other shapes, of embeddings changed a little: rounding falls out differently."""
        if self._noise is None:
            batch = self._batch
            by_list = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(_PROMPT_LENGTHS))]

            def score(_: Batch) -> Tensor:
                width = batch["candidate_mask"].size(1)
                return torch.cat([self._separate(one)[:, :width] for one in by_list])

            self._noise = self._measure(score, batch, change=_CHANGE)
        return self._noise

    def _is_noise(self, found: _Measured, noise: _Measured) -> bool:
        expected = self._expected
        if (found.logps - expected.logps).abs().max() > _NOISE * (noise.logps - expected.logps).abs().max():
            return False
        if found.gradients is None or expected.gradients is None or noise.gradients is None:
            return True
        off, rounding = found.gradients - expected.gradients, noise.gradients - expected.gradients
        return bool(off.norm() <= _NOISE * rounding.norm())

    def _on_some_process(self, flag: bool) -> bool:
        if self._accelerator.num_processes == 1:
            return flag
        flags = self._accelerator.gather(torch.tensor([int(flag)], device=self._accelerator.device))
        return bool(flags.max())

    def _depends_on_weights(self, logps: Tensor) -> bool:
        """Whether log-probabilities have gradients of the model's own weights, where they have any."""
        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        if not (trained and logps.requires_grad):
            return True
        gradients = torch.autograd.grad(logps.sum(), trained, allow_unused=True, retain_graph=True)
        return any(gradient is not None for gradient in gradients)

    def _measure(
        self, score: Score, batch: Batch, with_gradients: bool | None = None, change: float = 0.0
    ) -> _Measured:
        with_gradients = self._with_gradients if with_gradients is None else with_gradients
        with (
            evaluating(self._model),
            torch.set_grad_enabled(with_gradients),
            _embeddings(self._model.get_input_embeddings(), with_gradients, change) as embedded,
        ):
            logps = score(batch)[batch["candidate_mask"]].float()
            if not embedded.is_used:
                if calls_another_model(self._model) or not self._depends_on_weights(logps):
                    raise ConfigError(
                        f"`forward` of this {type(self._model).__name__} was replaced, and calls another model. Load "
                        "the model again."
                    )
                raise RuntimeError("the model's forward pass does not call its layer of input embeddings")
            self._is_full_precision = embedded.dtype == torch.float32
            if not with_gradients:
                return _Measured(logps.detach(), None)
            # Not the same for all candidates, so that mistakes do not cancel
            weights = torch.linspace(-1.0, 1.5, len(logps), device=logps.device)
            embedded.recording = False
            gradients = torch.autograd.grad((weights * logps).sum(), embedded.outputs, allow_unused=True)
        distinct = torch.cat([tokens.flatten() for tokens in embedded.tokens]).unique()
        by_token = torch.zeros(len(distinct), embedded.outputs[0].size(-1), device=distinct.device)
        for tokens, gradient in zip(embedded.tokens, gradients, strict=True):
            if gradient is not None:
                flat = gradient.flatten(0, -2).float().to(by_token.device)
                by_token.index_add_(0, torch.searchsorted(distinct, tokens.flatten()), flat)
        return _Measured(logps.detach(), by_token)


class _Embedded:
    """What the embedding layer was given and returned, as leaves that gradients end at."""

    def __init__(self):
        self.tokens: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.recording = True
        self.is_used = False
        self.dtype = torch.float32


@contextmanager
def _embeddings(layer: nn.Module, as_leaves: bool, change: float) -> Iterator[_Embedded]:
    """Watches an embedding layer; `change` is by how much, relatively, its output is changed."""
    embedded = _Embedded()

    def hook(module, args, output: Tensor) -> Tensor:
        embedded.is_used, embedded.dtype = True, output.dtype
        factors = 1 + change * torch.arange(output.size(-1), device=output.device).cos().to(output.dtype)
        if not as_leaves:
            return output * factors if change else output
        leaf = output.detach().requires_grad_()
        if embedded.recording:
            embedded.tokens.append(args[0])
            embedded.outputs.append(leaf)
        return leaf * factors if change else leaf.clone()  # models may change it in place

    handle = layer.register_forward_hook(hook)
    try:
        yield embedded
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context without dropout, also that of attention. Afterwards each module has its previous mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
