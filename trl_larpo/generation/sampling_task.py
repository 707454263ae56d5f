"""[`SamplingTask`]: what to sample, and the candidates that samples become."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..candidates import Candidate, CandidatePool
from ..prompts import Prompt, completion_for
from .in_process import Sample, end_token_ids
from .sampled_tokens import tokens_beyond_text


@dataclass(frozen=True)
class SampleKind:
    """
    How one of the samples of a prompt is drawn.

    Attributes:
        source: What the candidate will say of where it came from.
        temperature: Sampling temperature.
    """

    source: str
    temperature: float


@dataclass(frozen=True)
class SamplingTask:
    """
    What to sample.

    Attributes:
        kinds: One for each sample of a prompt.
        model_path: Folder or hub id of the policy.
        iteration: The iteration the samples belong to.
        key: Together with the prompt, the name of the random numbers.
        revision: Of a model on the hub.
        is_trained: Whether the run has trained the model, so that servers that ran before cannot have it yet.
        description: What the progress bar says.
    """

    kinds: list[SampleKind]
    model_path: str
    iteration: int
    key: str
    revision: str = "main"
    is_trained: bool = False
    description: str = "Sampling"

    @property
    def temperatures(self) -> list[float]:
        return [kind.temperature for kind in self.kinds]


def as_pool(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    samples: list[Sample],
    task: SamplingTask,
    chat_template_kwargs: dict[str, Any],
) -> CandidatePool:
    """The candidates that were sampled for a prompt."""
    token_ids = tokens_beyond_text(tokenizer, prompt.content, samples, chat_template_kwargs)
    return CandidatePool(
        prompt,
        [
            Candidate(
                completion_for(prompt.content, sample.text),
                iteration=task.iteration,
                source=kind.source,
                temperature=kind.temperature,
                finished=sample.finished,
                num_tokens=sample.num_tokens,
                token_ids=ids,
            )
            for kind, sample, ids in zip(task.kinds, samples, token_ids, strict=True)
        ],
    )


def end_ids_of(task: SamplingTask, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion."""
    try:
        return end_token_ids(GenerationConfig.from_pretrained(task.model_path, revision=task.revision), tokenizer)
    except OSError:  # it has none
        return {tokenizer.eos_token_id} - {None}
