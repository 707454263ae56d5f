"""
PairRM (Jiang et al. 2023, "LLM-Blender", arXiv 2306.02561), a ranker that reads two completions side by side.

The architecture of the public checkpoint `llm-blender/PairRM-hf`, so that it loads with the installed transformers; its
own package, llm-blender, does not go with transformers 5.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from ..errors import ConfigError
from ..prompts import Content, completion_text, without_empty_system_turn
from .reward_models import Judge

logger = logging.getLogger(__name__)

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"

MAX_LENGTH = 2048
"""Tokens of a prompt and two completions, in training and here."""

MAX_SOURCE_LENGTH = 1224
"""Tokens of the prompt. What it leaves of [`MAX_LENGTH`] the two completions share equally."""


class PairRMModel(DebertaV2PreTrainedModel):
    """
    DeBERTa-v3 that reads `source, first completion, second completion`, with a head over the encodings of the markers.

    Its config holds `n_tasks`, `drop_out`, `source_prefix_id`, `cand1_prefix_id` and `cand2_prefix_id`.
    """

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.markers = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(config.hidden_size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Args:
            input_ids: int64 `(batch, length)`, each row with each of the three markers once.
            attention_mask: int64 `(batch, length)`, 1 for tokens, 0 for padding.

        Returns:
            How much the first completion is better than the second, in logits, `(batch,)`.
        """
        encodings = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        source, first, second = (encodings[rows, (input_ids == marker).int().argmax(1)] for marker in self.markers)
        scores = [self.head_layer(torch.cat([source, completion], dim=-1)) for completion in (first, second)]
        return (scores[0] - scores[1]).mean(dim=-1)


class PairRM(Judge):
    """
    PairRM as a pairwise ranker: `ranker(prompt, completions)` returns a matrix of preferences.

    Every two completions are read in both orders, and the mean of the two logits decides, so that no place is favoured.

    Args:
        path: Folder or hub id, such as `llm-blender/PairRM-hf`.
        **options: `batch_size`, `max_length`, `dtype` and `device`, as in [`Judge`]. `max_length` is the longest prompt
            with two completions, in tokens; the end of what is longer is cut off. `None`: 2048.

    Raises:
        ConfigError: If it is no such model.
    """

    model_class = PairRMModel

    def __init__(self, path: str, **options: Any):
        super().__init__(path, **options)
        if self.tokenizer.convert_tokens_to_ids([SOURCE, FIRST, SECOND]) != self.model.markers:
            raise ConfigError(
                f"The tokenizer of {path!r} is not PairRM's: it does not know {SOURCE}, {FIRST}, {SECOND}."
            )

    @torch.no_grad()
    def __call__(self, prompt: Content, completions: list[Any]) -> list[list[float]]:
        """
        Entry `[i][j]` is how much completion i is better than j, in logits; 0 on the diagonal.

        Logits, because LLM-Blender ranks by their mean (its "max_logits"). The mean of probabilities ranks otherwise.
        """
        count = len(completions)
        encoded = self.encode(source_text(prompt), [completion_text(completion) for completion in completions])
        logits = torch.zeros(count, count, dtype=torch.float64)
        for pair, logit in zip(encoded, self._in_batches(list(encoded.values()), self._compare), strict=True):
            logits[pair] = logit
        return ((logits - logits.T) / 2).tolist()

    def encode(self, source: str, completions: list[str]) -> dict[tuple[int, int], list[int]]:
        """Token ids of each comparison, by the numbers of its first and second completion; cut as in training."""
        max_length = self.max_length or MAX_LENGTH
        source_ids = self._marked(SOURCE, source, MAX_SOURCE_LENGTH * max_length // MAX_LENGTH)
        rest = (max_length - len(source_ids)) // 2
        firsts, seconds = ([self._marked(marker, text, rest) for text in completions] for marker in (FIRST, SECOND))
        return {
            (i, j): source_ids + first + second
            for i, first in enumerate(firsts)
            for j, second in enumerate(seconds)
            if i != j
        }

    def _marked(self, marker: str, text: str, max_length: int) -> list[int]:
        for other in (SOURCE, FIRST, SECOND):  # no text may pass for a marker
            text = text.replace(other, other.replace("<|", "< |"))
        ids = self.tokenizer(marker + text)["input_ids"]
        if len(ids) > max_length:
            self.num_cut += 1
            if self.num_cut == 1:
                logger.warning(
                    f"{self.__name__}: a text has {len(ids)} tokens; the end of what is longer than {max_length} is "
                    "cut off. Said once."
                )
            ids = [*ids[: max_length - 1], ids[-1]]  # the end marker stays
        return ids

    def _compare(self, sequences: list[list[int]]) -> list[float]:
        length = max(map(len, sequences))
        input_ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        device = self.model.device
        return self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).double().tolist()


def source_text(prompt: Content) -> str:
    """A prompt as one text: the user's words; of several messages each with its role in front."""
    if isinstance(prompt, str):
        return prompt
    prompt = without_empty_system_turn(prompt)
    if len(prompt) == 1:
        return str(prompt[0].get("content") or "")
    return "\n".join(f"{message['role'].upper()}: {message.get('content') or ''}" for message in prompt)
