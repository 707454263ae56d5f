"""[`CandidateScorer`]: one model's log-probabilities of candidates."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig

from ..errors import ConfigError
from .attention import (
    disable_sharing,
    enable_sharing,
    positions_depend_on_length,
    sharing_obstacle,
    splits_rows,
    uses_blocks,
    what_masks_depend_on,
)
from .forward import enable_passes, run_plainly
from .head import OutputHead, TokenValues
from .layout_costs import PRICES, LayoutChoice, Prices
from .load_balancing import experts_per_token, load_balancing_loss
from .passes import Layout, Pass, PassMemory, passes_in_chunks, whole_pass
from .proof import ROUGHLY, Difference, Proof
from .token_rows import Batch, Rows, sequence_lengths
from .trl_compat import (
    forget_order_of_modules,
    has_reentrant_checkpoints,
    options_ask_for_reentrant_checkpoints,
)
from .two_part_attention import has_kernel, recorded_deviations
from .variable_length import uses_variable_lengths

logger = get_logger(__name__)

MAX_KEPT_LOGITS = 2**23
"""Logits that are kept for the backward pass, on each device: 32 MiB."""


@dataclass
class CandidateOutputs:
    """
    What one forward pass says of the candidates of a batch.

    Attributes:
        logps: Log-probability of each completion, the sum over its tokens, `(batch, list_size)`, 0 in the padding.
        tokens: Statistics of each completion, summed over its tokens and without gradient, float `(batch, list_size)`:
            `"count"` and, where asked for, `"entropy"`, `"mean_logits"` and `"is_top1"`.
        aux_loss: Load-balancing loss of a mixture of experts, a scalar.
    """

    logps: Tensor
    tokens: dict[str, Tensor]
    aux_loss: Tensor | None = None

    def up_to(self, list_size: int) -> "CandidateOutputs":
        """Without the candidates from `list_size` on."""
        tokens = {name: values[:, :list_size] for name, values in self.tokens.items()}
        return CandidateOutputs(self.logps[:, :list_size], tokens, self.aux_loss)


class CandidateScorer:
    """
    Scores candidates with one model: how a batch becomes the rows of its forward pass is decided here, once.

    The layout is proved on the model before it is used: see [`trl_larpo.training.proof`]. Where the model is sharded,
    that happens in the first call.

    Args:
        model: Bare model, or a `PeftModel`. It learns to score candidates in its forward.
        args: Options of the training: `shared_prompt`, `candidate_chunk_size`, `max_length`, `truncation_mode`,
            `pad_to_multiple_of`. Those that a configuration of TRL lacks are at their defaults.
        accelerator: That of the training.
        name: What the log calls the model.
        is_trained: Whether gradients are wanted, so that they are proved too.
        policy: Scorer of the model that scores each batch first, so that what is equal is not worked out twice.

    Attributes:
        layout: How candidates are laid out in rows; `None` before it is decided. With `shared_prompt='auto'`, batches
            for which separate rows cost less have these: see [`trl_larpo.training.layout_costs`].

    Raises:
        ConfigError: If an option asks for what the model cannot do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: DPOConfig,
        accelerator: Accelerator,
        name: str = "Model",
        is_trained: bool = False,
        policy: "CandidateScorer | None" = None,
    ):
        self.model, self.args, self.accelerator, self.name, self.is_trained = model, args, accelerator, name, is_trained
        self.chunk_size: int | None = getattr(args, "candidate_chunk_size", None)
        self._wish = getattr(args, "shared_prompt", "auto")
        self._bare: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
        self.layout: Layout | None = None
        self._choice: LayoutChoice | None = None
        self._memory: PassMemory = PassMemory() if policy is None else policy._memory
        self._head = OutputHead()
        self._engine: nn.Module | None = None  # of ZeRO-3
        self._longest_matters = positions_depend_on_length(self._bare)
        self._runs_plainly = is_peft_model(model) and any(x.is_prompt_learning for x in model.peft_config.values())
        self._obstacle = "`shared_prompt` is 'off'" if self._wish == "off" else self._known_obstacle()
        if self._wish == "on" and self._obstacle:
            self._refuse(self._obstacle)
        if self._runs_plainly and self.chunk_size is not None:
            raise ConfigError("`candidate_chunk_size` does not work with prompt-learning PEFT. Remove it, or use LoRA.")
        if self.chunk_size is not None and is_trained:
            _check_checkpoints_of_chunks(accelerator, args, model)
        if not self._runs_plainly:
            enable_passes(self._bare)
        if accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            self._decide()

    @property
    def shares_prompt(self) -> bool:
        """Whether the candidates of a list share their prompt in one row."""
        return self.layout is not None and self.layout.shares_prompt

    def _known_obstacle(self) -> str | None:
        if getattr(self.args, "max_length", None) is not None and self.args.truncation_mode == "keep_end":
            return "`truncation_mode='keep_end'` leaves each completion another prompt"
        if self.is_trained and getattr(self.args, "neftune_noise_alpha", None):
            return "`neftune_noise_alpha` scales its noise by the length of rows"
        return sharing_obstacle(self.model)

    def _refuse(self, obstacle: str) -> None:
        raise ConfigError(
            f"`shared_prompt='on'` is not possible, because {obstacle}. With 'auto' such models get a row for each "
            "completion."
        )

    # How the model is to be called

    def _decide(self) -> None:
        """Chooses the head and the layout, by measurement."""
        if self._runs_plainly:
            self._settle(Layout.SEPARATE, self._obstacle)
            return
        device = self.accelerator.device.type
        weights = self.model.get_input_embeddings().weight
        full_precision = torch.autocast(device, enabled=False)  # where weights have it, to see mistakes and no rounding
        with full_precision if weights.dtype == torch.float32 else self.accelerator.autocast():
            # Logits are the model's own word: whatever is faster is compared with them
            logits = self._head = OutputHead(linear=False)
            separate = partial(self._logps, logits, Layout.SEPARATE)
            # ZeRO-3 takes no backward pass that is not its engine's
            with_gradients = self.is_trained and self._engine is None
            try:
                proof = Proof(self.model, separate, self.accelerator, with_gradients)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
                if isinstance(error, torch.OutOfMemoryError | ConfigError):
                    raise
                obstacle = f"two short lists could not be scored: {error}"
                if self._wish == "on":
                    self._refuse(obstacle)
                self._settle(Layout.SEPARATE, obstacle)
                return
            head = OutputHead.from_config(self._bare)
            if head.linear:
                difference = proof.compare(partial(self._logps, head, Layout.SEPARATE))
                if difference.accepted:
                    self._head = head
                else:
                    logger.warning(
                        f"{self.name}: whole logits are worked out, which takes memory; otherwise {difference}."
                    )
            if self._obstacle is not None:
                self._settle(Layout.SEPARATE, self._obstacle)
                return
            enable_sharing(self.model)
            reasons = []
            for layout in self._sharing_layouts():
                difference = proof.compare(partial(self._logps, self._head, layout))
                if difference.accepted:
                    in_two_parts = _prove_two_parts(self, proof)
                    reason = str(difference) if in_two_parts is None else f"{difference}; {in_two_parts}"
                    self._settle(layout if in_two_parts is None else Layout.PACKED, reason)
                    return
                reasons.append(str(difference))
        disable_sharing(self.model)
        obstacle = f"{type(self._bare).__name__} does not give the same numbers otherwise: {reasons[-1]}"
        if self._wish == "on":
            self._refuse(obstacle)
        self._settle(Layout.SEPARATE, obstacle)

    def _settle(self, layout: Layout, reason: str | None) -> None:
        self.layout = layout
        self._head = replace(self._head, max_kept_logits=MAX_KEPT_LOGITS)  # what was measured keeps none
        if layout.shares_prompt:
            # Compiled code is made for each layout: one of them is enough
            if self._wish == "auto" and self.chunk_size is None and not self.args.torch_compile:
                prices = PRICES.get(self.accelerator.device.type, Prices())
                self._choice = LayoutChoice(self.model, layout, prices, self.name)
            logger.info(
                f"{self.name}: one row for each list; its completions share one pass over their prompt. Checked on "
                f"this model: {reason}."
            )
        else:
            log = logger.info if self._wish == "off" else logger.warning
            log(f"{self.name}: a row for each completion, with the prompt in each, because {reason}.")

    def _sharing_layouts(self) -> list[Layout]:
        """Those that the model may be able to do, the best first."""
        # Kernels without masks take rows apart in any case
        in_rows = Layout.SPLIT if uses_variable_lengths(self.model) else Layout.SHARED
        if self.chunk_size is None:
            return [Layout.SPLIT, in_rows] if splits_rows(self.model) else [in_rows]
        return [Layout.PROMPT_FIRST, in_rows] if _can_run_prompts_first(self) else [in_rows]

    def _logps(self, head: OutputHead, layout: Layout, batch: Batch) -> Tensor:
        return self._tried(head, self._passes(batch, layout)).logps

    def _tried(self, head: OutputHead, passes: list[Pass]) -> CandidateOutputs:
        """What is found while the layout is being decided."""
        try:
            return self._run(self.model, head, passes)
        finally:
            if self._engine is not None:
                forget_order_of_modules(self._engine)

    # Scoring

    def __call__(
        self, model: nn.Module, batch: Batch, *, with_statistics: bool = False, router_logits: bool = False
    ) -> CandidateOutputs:
        """
        Runs each candidate of a batch once.

        Args:
            model: The scorer's model, however the training has wrapped it.
            batch: As [`DataCollatorForCandidateLists`] makes it.
            with_statistics: Whether to return more of the tokens than their number.
            router_logits: Whether to work out the load-balancing loss of a mixture of experts.
        """
        if self.layout is None:
            zero = getattr(self.accelerator.state, "deepspeed_plugin", None)
            self._engine = model if zero is not None and zero.zero_stage == 3 else None
            self._decide()
        assert self.layout is not None
        if self.layout is Layout.PROMPT_FIRST:
            _check_checkpoints(self.model)
        # Whole logits come from the model's own forward, which takes no other mask together with router logits
        in_separate_rows = router_logits and not self._head.linear
        kind = in_separate_rows, *self._kind
        passes = self._memory.take(batch, kind)
        if passes is None:
            layout = self.layout if self._choice is None else self._choice(batch)
            passes = self._passes(batch, Layout.SEPARATE if in_separate_rows else layout)
            self._memory.keep(batch, kind, passes)
        outputs = self._run(model, self._head, passes, with_statistics, router_logits)
        return outputs.up_to(batch["candidate_mask"].size(1))

    @cached_property
    def _kind(self) -> tuple[Any, ...]:
        """What passes depend on, beside the batch."""
        return self.layout, self._longest_matters, type(self._bare), *what_masks_depend_on(self._bare)

    def _passes(self, batch: Batch, layout: Layout) -> list[Pass]:
        if self.chunk_size is None:
            return whole_pass(self.model, batch, layout, self.args.pad_to_multiple_of)
        list_size = batch["candidate_mask"].size(1)
        if self.accelerator.num_processes > 1:
            sizes = self.accelerator.gather(torch.tensor([list_size], device=self.accelerator.device))
            list_size = int(sizes.max())
        longest = None
        if self._longest_matters:
            longest = int((sequence_lengths(batch) - batch.get("first_position", 0)).max())
        return passes_in_chunks(
            self.model,
            batch,
            layout,
            self.chunk_size,
            list_size,
            longest=longest,
            multiple=self.args.pad_to_multiple_of,
        )

    def _run(
        self,
        model: nn.Module,
        head: OutputHead,
        passes: list[Pass],
        with_statistics: bool = False,
        router_logits: bool = False,
    ) -> CandidateOutputs:
        if self._runs_plainly:
            values = [run_plainly(model, call, with_statistics) for of_pass in passes for call in of_pass.calls]
            logits: list[Tensor] = []
        else:
            asked = {"output_router_logits": True} if router_logits else {}
            values, logits = model(passes=passes, head=head, with_statistics=with_statistics, **asked)
        remaining = iter(values)
        lists = [
            _concatenate([_candidate_outputs(call.rows, next(remaining)) for call in of_pass.calls], dim=1)
            for of_pass in passes
        ]
        outputs = _concatenate(lists, dim=0)
        if router_logits:
            if not logits:
                raise ConfigError(
                    f"{type(self._bare).__name__} returns no router logits, which the load-balancing loss is made of. "
                    "Set `router_aux_loss_coef` to 0."
                )
            top_k = experts_per_token(self._bare.config.get_text_config())
            outputs.aux_loss = load_balancing_loss(logits, _token_weights(passes), top_k)
        return outputs


def _can_run_prompts_first(scorer: CandidateScorer) -> bool:
    """
    Whether gradients of a prompt that runs before its candidates would be right.

    Of such a prompt only keys and values get gradients. FSDP brings back the weights of a layer for the backward pass
    when the layer's output gets one; reentrant checkpoints make keys and values without. Block masks hold whole rows.
    """
    is_fsdp = getattr(scorer.accelerator.state, "fsdp_plugin", None) is not None
    is_reentrant = options_ask_for_reentrant_checkpoints(scorer.args) or has_reentrant_checkpoints(scorer.model)
    return not (is_fsdp or is_reentrant or uses_blocks(scorer.model))


def _check_checkpoints_of_chunks(accelerator: Accelerator, args: DPOConfig, model: nn.Module) -> None:
    """
    Each chunk is a call of the model, and each reentrant checkpoint has a backward pass of its own: weights then get
    gradients several times in a step, which what joins the gradients of processes does not take.
    """
    if accelerator.distributed_type == DistributedType.NO:
        return
    if options_ask_for_reentrant_checkpoints(args) or has_reentrant_checkpoints(model):
        raise ConfigError(
            "`candidate_chunk_size` does not work with reentrant gradient checkpoints under DDP, DeepSpeed or FSDP "
            "(TRL makes them reentrant for adapters with ZeRO-3). Set `gradient_checkpointing: false`: chunks are "
            "computed again in the backward pass, so that the activations of one are in memory."
        )


def _check_checkpoints(model: nn.Module) -> None:
    if torch.is_grad_enabled() and has_reentrant_checkpoints(model):
        raise ConfigError(
            "Reentrant gradient checkpoints were switched on after the trainer was made; with `candidate_chunk_size`, "
            "gradients would be wrong. Set `gradient_checkpointing` in the options instead."
        )


def _prove_two_parts(scorer: CandidateScorer, proof: Proof) -> Difference | None:
    """Whether attention of shared rows can be worked out in two parts, by kernels in half precision."""
    weights = scorer.model.get_input_embeddings().weight.dtype
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(scorer.accelerator.mixed_precision, weights)
    # Chunks, whose prompts run first, and compiled code are left to SDPA
    is_possible = scorer.chunk_size is None and not scorer.args.torch_compile and splits_rows(scorer.model)
    if not is_possible or not has_kernel(scorer.accelerator.device, dtype):
        return None

    def deviations(batch: Batch) -> list[float]:
        passes = scorer._passes(batch, Layout.PACKED)
        with scorer.accelerator.autocast(), recorded_deviations(passes[0].calls[0].split) as of_layers:
            scorer._tried(scorer._head, passes)
        return of_layers

    # In half precision, other kernels round otherwise, which deep models amplify: only gross mistakes show in the whole
    difference = proof.compare(
        partial(scorer._logps, scorer._head, Layout.PACKED), ROUGHLY if weights != torch.float32 else None
    )
    if difference.accepted:
        difference = proof.compare_attention(deviations)
    if difference.accepted:
        return difference
    logger.info(f"{scorer.name}: attention is not worked out in two parts, because otherwise {difference}.")
    return None


def _token_weights(passes: list[Pass]) -> Tensor:
    """How often each token counts, in the order of the router logits."""
    weights = []
    for of_pass in passes:
        weights += [] if of_pass.prompts is None else [of_pass.prompts.weights]
        weights += [call.rows.weights for call in of_pass.calls]
    return torch.cat([of_rows.flatten() for of_rows in weights])


def _candidate_outputs(rows: Rows, values: TokenValues) -> CandidateOutputs:
    """What a model says of the tokens of some rows, summed up by candidate."""
    sums = {name: rows.per_token(of_rows.to(rows.token_index.device)).sum(dim=-1) for name, of_rows in values.items()}
    logps = sums.pop("log_probs")
    tokens = {name: of_candidates.detach().float() for name, of_candidates in sums.items()}
    return CandidateOutputs(logps, {"count": rows.token_mask.sum(dim=-1).float()} | tokens)


def _concatenate(parts: list[CandidateOutputs], dim: int) -> CandidateOutputs:
    """Joins lists (dim 0) or candidates of the same lists (dim 1)."""
    if len(parts) == 1:
        return parts[0]
    return CandidateOutputs(
        logps=torch.cat([part.logps for part in parts], dim=dim),
        tokens={name: torch.cat([part.tokens[name] for part in parts], dim=dim) for name in parts[0].tokens},
    )
