"""[`CandidateScorer`]: one model's log-probabilities of candidates."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig

from ..errors import ConfigError
from .attention import attention_masks, enable_sharing, sharing_obstacle, split_rows, splits_rows, uses_blocks
from .chunking import enable_passes, passes_in_chunks, run_rows
from .token_rows import Batch, Rows, pack, separate_rows, shared_prompt_rows
from .trl_compat import FusedCausalLMOutput

logger = get_logger(__name__)


@dataclass
class CandidateOutputs:
    """
    What one forward pass says of the candidates of a batch.

    Attributes:
        logps: Log-probability of each completion, the sum over its tokens, `(batch, list_size)`, 0 in the padding.
        tokens: Statistics of each completion, summed over its tokens and without gradient, float `(batch, list_size)`:
            `"count"`, `"entropy"`, `"mean_logits"`, `"is_top1"`. Of a reference model only `"count"`.
        aux_loss: Load-balancing loss of a mixture of experts, a scalar.
    """

    logps: Tensor
    tokens: dict[str, Tensor]
    aux_loss: Tensor | None

    def up_to(self, list_size: int) -> "CandidateOutputs":
        """Without the candidates from `list_size` on."""
        tokens = {name: values[:, :list_size] for name, values in self.tokens.items()}
        return CandidateOutputs(self.logps[:, :list_size], tokens, self.aux_loss)


class CandidateScorer:
    """
    Scores candidates with one model: how a batch becomes the rows of its forward pass is decided here, once.

    Args:
        model: Bare model, or a `PeftModel`, with TRL's fused head. It learns to share prompts and to run in chunks.
        args: Options of the training: `shared_prompt`, `candidate_chunk_size`, `max_length`, `truncation_mode`,
            `pad_to_multiple_of`. Those that a plain `DPOConfig` lacks are at their defaults.
        accelerator: That of the training.
        name: What the log calls the model.

    Attributes:
        shares_prompt: Whether the candidates of a list share their prompt in one row.

    Raises:
        ConfigError: If an option asks for what the model cannot do.
    """

    def __init__(self, model: PreTrainedModel, args: DPOConfig, accelerator: Accelerator, name: str = "Model"):
        self.model, self.args, self.accelerator = model, args, accelerator
        self.chunk_size: int | None = getattr(args, "candidate_chunk_size", None)
        wish = getattr(args, "shared_prompt", "auto")
        obstacle = "`shared_prompt` is 'off'" if wish == "off" else self._sharing_obstacle()
        if wish == "on" and obstacle:
            raise ConfigError(
                f"`shared_prompt='on'` is not possible, because {obstacle}. With 'auto' such models get a row for "
                "each completion."
            )
        self.shares_prompt = obstacle is None
        if self.shares_prompt:
            enable_sharing(model)
            logger.info(f"{name}: one row for each list; its completions share one pass over their prompt.")
        else:
            log = logger.info if wish == "off" else logger.warning
            log(f"{name}: a row for each completion, with the prompt in each, because {obstacle}.")
        if self.chunk_size is not None:
            if is_peft_model(model) and any(x.is_prompt_learning for x in model.peft_config.values()):
                raise ConfigError(
                    "`candidate_chunk_size` does not work with prompt-learning PEFT. Remove it, or use LoRA."
                )
            enable_passes(model.get_base_model() if is_peft_model(model) else model)

    def _sharing_obstacle(self) -> str | None:
        if self.args.max_length is not None and self.args.truncation_mode == "keep_end":
            return "`truncation_mode='keep_end'` leaves each completion another prompt"
        return sharing_obstacle(self.model)

    def __call__(self, model: nn.Module, batch: Batch, **model_kwargs) -> CandidateOutputs:
        """
        Runs each candidate of a batch once.

        Args:
            model: The scorer's model, however the training has wrapped it.
            batch: As [`DataCollatorForCandidateLists`] makes it.
            model_kwargs: Further arguments for the model.
        """
        if self.chunk_size is not None:
            return self._in_chunks(model, batch, self.chunk_size, **model_kwargs)
        if self.shares_prompt:
            rows = shared_prompt_rows(batch, self.args.pad_to_multiple_of)
            rows = pack(rows) if uses_blocks(self.model) else rows
            split = split_rows(rows) if splits_rows(self.model) else None
            if split is not None:
                model_kwargs["split"] = split
            mask = attention_masks(self.model, rows) if split is None else split.mask
        else:
            rows = separate_rows(batch, self.args.pad_to_multiple_of)
            mask = rows.real.long()
        return _candidate_outputs(rows, run_rows(model, rows, mask, **model_kwargs))

    def _in_chunks(self, model: nn.Module, batch: Batch, chunk_size: int, **model_kwargs) -> CandidateOutputs:
        list_size = batch["candidate_mask"].size(1)
        if self.accelerator.num_processes > 1:
            sizes = self.accelerator.gather(torch.tensor([list_size], device=self.accelerator.device))
            list_size = int(sizes.max())
        is_fsdp = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        passes = passes_in_chunks(
            self.model, batch, self.shares_prompt, chunk_size, list_size, prompts_first=not is_fsdp
        )
        outputs = iter(model(passes=passes, **model_kwargs))
        lists = [
            _concatenate([_candidate_outputs(rows, next(outputs)) for rows in of_pass.chunks], dim=1)
            for of_pass in passes
        ]
        return _concatenate(lists, dim=0).up_to(batch["candidate_mask"].size(1))


def _candidate_outputs(rows: Rows, raw: FusedCausalLMOutput) -> CandidateOutputs:
    """What a model says of the tokens of some rows, summed up by candidate."""
    statistics = {name: getattr(raw, name) for name in ("entropy", "mean_logits", "is_top1")}
    tokens = {name: rows.per_token(v.detach()).sum(dim=-1).float() for name, v in statistics.items() if v is not None}
    return CandidateOutputs(
        logps=rows.per_token(raw.log_probs).sum(dim=-1),
        tokens={"count": rows.token_mask.sum(dim=-1).float()} | tokens,
        aux_loss=raw.aux_loss,
    )


def _concatenate(parts: list[CandidateOutputs], dim: int) -> CandidateOutputs:
    """Joins lists (dim 0) or candidates of the same lists (dim 1). Load-balancing losses are averaged."""
    if len(parts) == 1:
        return parts[0]
    aux_losses = [part.aux_loss for part in parts]
    return CandidateOutputs(
        logps=torch.cat([part.logps for part in parts], dim=dim),
        tokens={name: torch.cat([part.tokens[name] for part in parts], dim=dim) for name in parts[0].tokens},
        aux_loss=None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
    )
