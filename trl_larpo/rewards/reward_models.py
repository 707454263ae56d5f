"""Reward models: sequence classifiers that score a prompt with its completion."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ConfigError
from ..prompts import Content, without_empty_system_turn

logger = logging.getLogger(__name__)

_SHARE_OF_SPREAD = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""By how much of the distance between the best and the worst completion the rewards of one may differ."""

_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""What may differ in any case, as a share of the reward, or of 1 where that is more."""

_COMPLETIONS_TO_CHECK = 8


class Judge:
    """
    A model that judges completions, in eval mode, with the tokenizer it was trained with.

    Args:
        path: Folder or hub id.
        batch_size: Sequences that go through the model at the same time; half as many after it ran out of memory.
        max_length: Longest sequence in tokens; `None`: the subclass decides.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`; `"auto"` is bfloat16 on a GPU and float32 on a CPU.
        device: `None`: a GPU where there is one.

    Raises:
        ConfigError: If there is no tokenizer, no model, or weights are missing.
    """

    model_class: type[Any]
    """Has `from_pretrained`."""

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
    ):
        self.__name__ = path
        self.batch_size, self.max_length, self.num_cut = batch_size, max_length, 0
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto":
            dtype = "bfloat16" if place.type == "cuda" else "float32"
        self.tokenizer = load_tokenizer(path)
        try:
            model, loading = self.model_class.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"The reward model {path!r} cannot be loaded: {' '.join(str(error).split())}") from error
        if missing := sorted(loading["missing_keys"]):
            raise ConfigError(f"{path!r} is no trained reward model: it has no weights for {', '.join(missing)}.")
        self.model = model.to(place).eval()

    def _in_batches(self, sequences: list[list[int]], score: Callable[[list[list[int]]], list[float]]) -> list[float]:
        """
        What `score` gives for each token sequence. Similar lengths go together, the longest first.

        Where the memory is too small for a batch, this one and all later ones have half as many sequences.
        """
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        scores: list[float] = []
        while len(scores) < len(order):
            batch = [sequences[i] for i in order[len(scores) :][: self.batch_size]]
            try:
                scores += score(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            # After the block, as the error holds what the failed call has allocated
            self.batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            logger.warning(f"{self.__name__}: out of memory; from now on `reward_batch_size` is {self.batch_size}.")
        in_order = dict(zip(order, scores, strict=True))
        return [in_order[i] for i in range(len(sequences))]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer that a reward model was trained with.

    Args:
        path: Folder or hub id of the model.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        advice = "Save the one it was trained with beside it."
        if importlib.util.find_spec("sentencepiece") is None:
            advice += " If it is there, it may need the package sentencepiece: pip install sentencepiece."
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"The tokenizer of the reward model {path!r} cannot be loaded: {reason}. {advice}") from error


class RewardModel(Judge):
    """
    A sequence classification model of one label as a reward function.

    It always goes with its own tokenizer and chat template. Before the first batch it checks that the reward of a
    completion does not depend on what else is in the batch and how it is padded.

    Args:
        path: Folder or hub id.
        **options: `batch_size`, `max_length`, `dtype` and `device`, as in [`Judge`]. `max_length` is the longest prompt
            plus completion in tokens; of longer ones the start is cut off. `None`: no limit.

    Raises:
        ConfigError: If it is no reward model, has no tokenizer, or (when called) does not pass that check.
    """

    model_class = AutoModelForSequenceClassification

    def __init__(self, path: str, **options: Any):
        super().__init__(path, **options)
        if self.model.config.num_labels != 1:
            raise ConfigError(
                f"The reward model {path!r} has {self.model.config.num_labels} labels; a reward has 1. Wrap it in a "
                "function that makes one number of them."
            )
        self.checked = False

    def __call__(self, /, prompts: list[Content], completions: list[Any], **columns: list[Any]) -> list[float]:
        """The reward of each completion."""
        sequences = [self._encode(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        if not self.checked and sequences:
            self._check(sequences)
            self.checked = True
        return self._in_batches(sequences, self._score)

    def _encode(self, prompt: Content, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            if self.tokenizer.chat_template is None:
                raise ConfigError(
                    f"The tokenizer of the reward model {self.__name__!r} has no chat template, but the prompts are "
                    "conversations. Save its template beside it, or wrap the model in a function of your own."
                )
            messages = without_empty_system_turn(prompt) + completion
            ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos and self.tokenizer.eos_token_id != bos:
            ids = ids[1:]  # the chat template and the tokenizer have both added one
        if self.max_length is not None and len(ids) > self.max_length:
            self.num_cut += 1
            if self.num_cut == 1:
                logger.warning(
                    f"{self.__name__}: a prompt with its completion has {len(ids)} tokens; the start of what is longer "
                    f"than `reward_max_length={self.max_length}` is cut off. Said once."
                )
            ids = ids[-self.max_length :]
        return ids

    @torch.no_grad()
    def _score(self, sequences: list[list[int]], extra_padding: int = 0, pad_id: int | None = None) -> list[float]:
        """
        Rewards of some token sequences.

        Decoders take the reward from the last token that is not padding, and tell padding by its id. Where that id is
        also the end token, or unset, they would look at the wrong token: so padding gets an id that ends no sequence.
        """
        length = max(map(len, sequences)) + extra_padding
        pad_id = self._pad_id(sequences) if pad_id is None else pad_id
        input_ids = torch.full((len(sequences), length), pad_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        configured, self.model.config.pad_token_id = self.model.config.pad_token_id, pad_id
        try:
            output = self.model(input_ids=input_ids.to(self.model.device), attention_mask=mask.to(self.model.device))
        finally:
            self.model.config.pad_token_id = configured
        return output.logits[:, 0].float().tolist()

    def _pad_id(self, sequences: list[list[int]]) -> int:
        last = {ids[-1] for ids in sequences}
        own = self.tokenizer.pad_token_id
        if own is not None and own not in last:
            return own
        return next(i for i in range(len(last) + 1) if i not in last)

    def _check(self, sequences: list[list[int]]) -> None:
        """
        Scores a short and a long completion alone, together, with further padding and another padding token.

        Raises:
            ConfigError: If a reward changes. It ends the stage: with a few prompts alone the same model may pass.
        """
        ordered = sorted(sequences, key=len)
        ordered = [*ordered[:: max(1, len(ordered) // _COMPLETIONS_TO_CHECK)], ordered[-1]]
        scores = [self._score([ids])[0] for ids in ordered]
        (short, long), alone = (ordered[0], ordered[-1]), [scores[0], scores[-1]]
        used = {short[-1], long[-1]}
        other_pad = next(i for i in range(3, 10) if i not in used)
        settings = {
            "in one batch": self._score([short, long]),
            "in the other order": self._score([long, short])[::-1],
            "with more padding": self._score([short, long], extra_padding=7),
            "with another padding token": self._score([short, long], pad_id=other_pad),
        }
        dtype, spread = self.model.dtype, max(scores) - min(scores)
        tolerance = max(_SHARE_OF_SPREAD[dtype] * spread, _ROUNDING[dtype] * max(1.0, *map(abs, alone)))
        for setting, rewards in settings.items():
            for expected, found in zip(alone, rewards, strict=True):
                if not abs(expected - found) <= tolerance:
                    raise ConfigError(
                        f"The reward model {self.__name__!r} cannot be trusted: it gives a completion {expected:.4f} "
                        f"alone and {found:.4f} {setting}, where completions differ by {spread:.4f}. Set "
                        "`reward_dtype: float32`, or wrap it in a function of your own that scores one at a time."
                    )
