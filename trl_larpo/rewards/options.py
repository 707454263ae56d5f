"""Options of rewards."""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..options import DTYPES, CheckedOptions, check_choice, option
from ..set_aside import SetAsideOptions

STRIP_THINKING = ("none", "rewards", "all")


@dataclass
class JudgeOptions(CheckedOptions):
    """Who judges completions."""

    reward_funcs: list[str] = option(
        [],
        "Rewards, summed up: 'verifiable_instruction', 'verifiable_instructions', 'gsm8k', 'math', "
        "'package.module:function' (called as TRL calls its reward functions), the folder or hub id of a sequence "
        "classification model, or, for a ranker that compares the completions of a prompt, "
        "'pairwise:package.module:function' or PairRM, 'pairwise:llm-blender/PairRM-hf'.",
    )
    reward_batch_size: int = option(16, "Completions that a reward model scores at the same time.")
    reward_max_length: int | None = option(
        None,
        "Longest prompt plus completion for a reward model, in tokens; the start of longer ones is cut off. Of PairRM, "
        "which cuts off ends: prompt plus two completions; None: 2048.",
    )
    reward_dtype: str = option(
        "auto", "Arithmetic of reward models. 'auto': bfloat16 on a GPU, float32 on a CPU.", choices=[*DTYPES]
    )


@dataclass
class RewardOptions(JudgeOptions, SetAsideOptions):
    """Who judges completions, and what becomes of the numbers."""

    reward_weights: list[float] | None = option(None, "Factor of each reward in the sum. None: 1 each.")
    normalize_rewards: bool = option(
        False, "Bring each reward to mean 0 and deviation 1 over the completions of a prompt before it is weighted."
    )
    reward_calls_in_flight: int = option(
        32,
        "Calls of an asynchronous reward function (`async def`) at the same time, each for the completions of one "
        "prompt: for judges behind an API.",
    )
    strip_thinking: str = option(
        "none",
        "Thoughts of a reasoning model, which end with '</think>': 'none': they are part of the answer. 'rewards': "
        "rewards do not see them. 'all': they are neither rewarded nor trained on.",
        choices=[*STRIP_THINKING],
    )

    def check_rewards(self) -> None:
        self.check_set_aside()
        if not self.reward_funcs:
            raise ConfigError(
                "No reward: give `reward_funcs`, e.g. 'package.module:function' or a reward model's folder."
            )
        if len(set(self.reward_funcs)) < len(self.reward_funcs):
            raise ConfigError("`reward_funcs` names a reward twice; give it a weight in `reward_weights` instead.")
        if self.reward_batch_size < 1:
            raise ConfigError(f"`reward_batch_size` is {self.reward_batch_size}; it must be at least 1.")
        if self.reward_calls_in_flight < 1:
            raise ConfigError(f"`reward_calls_in_flight` is {self.reward_calls_in_flight}; it must be at least 1.")
        check_choice("reward_dtype", self.reward_dtype, DTYPES)
        check_choice("strip_thinking", self.strip_thinking, STRIP_THINKING)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on beside names and weights."""
        return {
            "normalize": self.normalize_rewards,
            "max_length": self.reward_max_length,
            "dtype": self.reward_dtype,
            "strip_thinking": self.strip_thinking,
        }
