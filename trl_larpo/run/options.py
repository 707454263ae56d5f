"""Options of `larpo run`, beside those of [`LarPOConfig`] and of TRL's `ModelConfig`."""

from dataclasses import dataclass, field

from trl import ModelConfig

from ..errors import ConfigError
from ..generation.in_process import check_sampling
from ..generation.model_servers import RELOADS
from ..generation.options import GenerationOptions
from ..options import DTYPES, CheckedOptions, check_choice, option
from ..rewards.options import RewardOptions
from ..selection import Selection
from ..training.config import LarPOConfig
from .evaluation import MIN_PROMPTS_TO_JUDGE
from .memory import MEMORIES
from .negatives import NEGATIVES

SCHEDULES = ("same", "drawn", "fresh")

REFERENCES = ("policy", "initial")


@dataclass
class PromptOptions(CheckedOptions):
    """Where prompts come from, and how they are put to the model."""

    prompts: list[str] | None = option(
        None,
        "Prompts: JSONL, JSON, Parquet or CSV files, folders, or hub ids, with the column `prompt_column` and any that "
        "rewards need. In `larpo run`, several with prompt_schedule='fresh' are one for each iteration.",
    )
    prompts_config: str | None = option(None, "Configuration of a hub dataset of prompts.")
    prompts_split: str = option("train", "Split of the prompts.")
    prompt_column: str = option("prompt", "Column of the prompts: texts, or conversations (lists of messages).")
    prompt_template: str | None = option(
        None, "Text to put around each text prompt, e.g. '{prompt} Think step by step.'."
    )
    prompts_as_messages: bool = option(
        False, "Make each text prompt the user's message of a conversation, so that the chat template is applied."
    )

    system_prompt: str | None = option(
        None,
        "System message in front of each conversation that has none. '': an empty one, with which the models of some "
        "chat templates were trained. None: no message.",
    )

    @property
    def prompt_sources(self) -> list[str]:
        """The files, folders and hub ids in `prompts`."""
        return self.prompts or []

    def check_prompts(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ConfigError(
                f"No prompts: give `prompts`, a file, a folder or a hub id with a column `{self.prompt_column}`."
            )
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ConfigError(f"`prompt_template` is {self.prompt_template!r}; it has no {{prompt}} to be replaced.")


@dataclass
class SelectionOptions(CheckedOptions):
    """Which completions make a list."""

    num_best: int | None = option(
        None,
        "Number of top-ranked completions to keep per prompt (paper: 1 for the contrastive loss, 2 for LambdaRank and "
        "ListMLE). None: all.",
    )
    num_worst: int | None = option(
        None, "Number of bottom-ranked completions to keep per prompt (paper: 3 and 2). None: all."
    )
    min_reward_gap: float = option(
        0.0, "A list counts only if its best is better than its worst by at least this much."
    )
    max_list_size: int | None = option(
        None, "Longest list where all are taken: candidates are then spread evenly over the ranks."
    )

    def selection(self, truncated_completions: str = "rank_last") -> Selection:
        """
        Raises:
            ConfigError: If the numbers do not fit together.
        """
        return Selection(self.num_best, self.num_worst, self.min_reward_gap, self.max_list_size, truncated_completions)


@dataclass
class RunConfig(PromptOptions, GenerationOptions, RewardOptions, SelectionOptions):
    """Algorithm 1 of the paper: prompts, iterations, sampling, rewards, candidate lists, evaluation."""

    held_out_prompts: str | None = option(
        None, "Prompts to evaluate on, given as `prompts` is. None: `num_held_out` of `prompts` are held out."
    )
    held_out_split: str = option("train", "Split of the held-out prompts.")
    num_held_out: int = option(64, "Number of held-out prompts, taken from `held_out_prompts`, else from `prompts`.")
    num_iterations: int = option(3, "Iterations (T in the paper).")
    prompts_per_iteration: int | None = option(
        None,
        "Prompts of an iteration (M in the paper). None: all, or an equal share of them where they are drawn or fresh.",
    )
    prompt_schedule: str = option(
        "same",
        "'same': the same prompts in each iteration. 'drawn': each draws its own from all prompts, and some come "
        "again, as in Algorithm 1. 'fresh': a slice of its own, or a file of `prompts` of its own.",
        choices=[*SCHEDULES],
    )
    max_prompt_length: int | None = option(
        None, "Prompts with more tokens are left out, and counted. None: those that fit into `max_length` stay."
    )
    negatives: list[str] = option(
        [],
        "Further candidates, by name (paper, section 3.2): 'low_temperature' and 'high_temperature' samples of the "
        "policy, a response to the most similar prompt ('related_prompt') or to any other one ('random_prompt').",
    )
    random_prompts: str | None = option(
        None,
        "Prompts of another set, given as `prompts` is, from which the negative 'random_prompt' takes its responses. "
        "None: the iteration's own prompts.",
    )
    random_prompts_column: str | None = option(None, "Column of `random_prompts`. None: `prompt_column`.")
    num_negatives: int = option(1, "Number of candidates for each name in `negatives`.")
    low_temperature: float = option(0.5, "Temperature of the negative 'low_temperature'.")
    high_temperature: float = option(1.5, "Temperature of the negative 'high_temperature'.")
    memory: str = option(
        "none",
        "Iterations whose rows are trained on again: 'none', the 'previous' one, or 'all'. Where a prompt comes again, "
        "its earlier candidates join its list.",
        choices=[*MEMORIES],
    )
    earlier_candidates: list[str] | None = option(
        None,
        "Files of candidates made elsewhere or by earlier runs, which join the lists of the first iteration's prompts. "
        "They are rewarded again unless the very same rewards scored them.",
    )
    reference: str = option(
        "policy",
        "Reference model: the 'policy' that starts the iteration, as in the paper, or the 'initial' model.",
        choices=[*REFERENCES],
    )
    merge_adapter: bool = option(
        False,
        "With `use_peft`: merge the adapter into a whole model after each iteration, as `server_urls` need. "
        "Otherwise the base stays as it is, all iterations train one adapter, and only that is saved.",
    )
    num_eval_samples: int = option(4, "Completions sampled for each held-out prompt.")
    eval_temperature: float | None = option(None, "Their temperature. None: that of the first iteration.")
    monitor_evals: int = option(
        4,
        "How many times in a training held-out prompts are sampled, at most; 0: never.",
    )
    monitor_time_share: float = option(
        0.1,
        "Largest share of an iteration's time that this may take; a short training is sampled less often for it. 1: no "
        "limit.",
    )
    monitor_prompts: int = option(16, "How many held-out prompts are sampled then.")
    monitor_stop: bool = option(
        True,
        "Stop a training once the reward on held-out prompts is lower than at its start by three standard errors; from "
        "two on, more prompts are asked first. The best weights seen are kept.",
    )
    stop_on: list[str] = option(
        ["held_out_reward"],
        "Health checks that stop the run after an iteration, by name, 'any' or 'none'. The others warn. See `larpo "
        "report`.",
    )
    reward_while_sampling: bool = option(
        True,
        "Reward prompts as they are sampled, where all rewards are functions. false: when all are sampled, e.g. for a "
        "function that holds a model on the GPU, or that only works in the main thread, as math-verify does.",
    )
    server_reload: str = option(
        "auto",
        "Whether servers of `server_command` stay between iterations and load the next weights, which vLLM can with "
        "VLLM_SERVER_DEV_MODE=1 and, on a GPU, --enable-sleep-mode. 'auto': if they can, else they are restarted. "
        "'always': an error if they cannot. 'never': they are restarted.",
        choices=[*RELOADS],
    )
    num_processes: int = option(
        1,
        "Processes of the stages that run a model: by torchrun, one for each GPU, or on a CPU.",
    )
    generation_processes: int | None = option(None, "Processes of the sampling. None: `num_processes`.")
    reward_processes: int | None = option(None, "Processes of the rewards. None: `num_processes`.")
    train_processes: int | None = option(
        None, "Processes of the training and of log-probabilities. None: `num_processes`."
    )
    accelerate_config: str | None = option(
        None,
        "accelerate's configuration file (DeepSpeed, FSDP, ...) for the training and for log-probabilities, which then "
        "run in `train_processes`.",
    )
    train_launcher: str | None = option(
        None,
        "Command that starts the training and the log-probabilities, e.g. on several machines; {stage} stands for what "
        "comes after `python` or `accelerate launch ...`, e.g. 'srun --nodes 2 ... accelerate launch ... {stage}'.",
    )
    mirror: str | None = option(
        None,
        "Where a copy of the folder is kept, for machines that come and go: s3://bucket/run, gs://... or any URL of "
        "fsspec's. An empty `output_dir` is filled from it, and the run resumes. What is deleted in the folder is not "
        "fetched again.",
    )
    notify_command: str | None = option(
        None,
        "Command for a shell that is run when the run has ended, failed or been stopped. The environment variables "
        "LARPO_RUN, LARPO_STATE ('finished', 'failed', also by `stop_on`, or 'stopped' by a signal) and LARPO_MESSAGE "
        "say what happened. After a signal it has less than four seconds.",
    )
    dry_run: bool = option(False, "Check everything, print the plan, and stop.")

    def check(self) -> None:
        """
        Checks everything that needs neither a file nor a model.

        Raises:
            ConfigError: Names the option and how to fix it.
        """
        self.check_prompts()
        num_sources = len(self.prompt_sources)
        if num_sources > 1 and self.prompt_schedule == "fresh" and num_sources != self.num_iterations:
            raise ConfigError(
                f"`prompts` names {num_sources} files for {self.num_iterations} iterations; give one, or one for each."
            )
        for name, least in (
            ("num_iterations", 1),
            ("num_held_out", 2),
            ("num_negatives", 1),
            ("num_eval_samples", 1),
            ("monitor_evals", 0),
            ("monitor_prompts", MIN_PROMPTS_TO_JUDGE),
            ("num_processes", 1),
            ("generation_processes", 1),
            ("reward_processes", 1),
            ("train_processes", 1),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.monitor_time_share <= 1:
            raise ConfigError(
                f"`monitor_time_share` is {self.monitor_time_share}; it must be above 0 and at most 1. "
                "`monitor_evals: 0` switches the sampling off."
            )
        if self.prompts_per_iteration is not None and self.prompts_per_iteration < 1:
            raise ConfigError(f"`prompts_per_iteration` is {self.prompts_per_iteration}; it must be at least 1.")
        self.check_generation(self.num_iterations)
        self.check_rewards()
        for name, choices in (("prompt_schedule", SCHEDULES), ("memory", MEMORIES), ("reference", REFERENCES)):
            check_choice(name, getattr(self, name), choices)
        check_choice("server_reload", self.server_reload, RELOADS)
        if self.server_reload == "always" and not self.server_command:
            raise ConfigError(
                "`server_reload` is for servers that the run starts: set `server_command`, or leave it out."
            )
        for name in self.negatives:
            check_choice("negatives", name, NEGATIVES)
        if self.random_prompts and "random_prompt" not in self.negatives:
            raise ConfigError("`random_prompts` is for the negative 'random_prompt': add it to `negatives`.")
        if self.random_prompts_column and not self.random_prompts:
            raise ConfigError("`random_prompts_column` is a column of `random_prompts`, which is missing.")
        check_sampling(self.num_eval_samples, self.evaluation_temperature, self.top_p, self.max_new_tokens)
        if "low_temperature" in self.negatives:
            check_sampling(self.num_negatives, self.low_temperature, self.top_p, self.max_new_tokens)
        if self.train_launcher is not None and "{stage}" not in self.train_launcher:
            raise ConfigError("`train_launcher` has no {stage}; write e.g. 'accelerate launch ... {stage}'.")
        if self.train_launcher is not None and (self.accelerate_config or self.train_processes):
            raise ConfigError(
                "`train_launcher` starts the processes itself; give `accelerate_config` and `train_processes` in its "
                "command instead."
            )
        selection, pool = self.selection(), self.num_samples + self.num_negatives * len(self.negatives)
        if selection.full_size is not None and selection.full_size > pool:
            raise ConfigError(
                f"`num_best` + `num_worst` is {selection.full_size}, but a prompt has only {pool} "
                "completions. Raise `num_samples`, or take fewer."
            )

    @property
    def evaluation_temperature(self) -> float:
        return self.temperature[0] if self.eval_temperature is None else self.eval_temperature

    def temperature_in(self, iteration: int) -> float:
        return self.temperature[0] if len(self.temperature) == 1 else self.temperature[iteration - 1]


@dataclass
class RunTrainingConfig(LarPOConfig):
    """
    [`LarPOConfig`] with the defaults of `larpo run`.

    Scores are per token. Sums make lists of unequal lengths a matter of length: a small model learned from them to say
    next to nothing, and gained less (see docs/choosing.md).
    """

    per_token_scores: bool = field(
        default=True,
        metadata={
            "help": "Divide the score of a completion by its number of tokens, so that long completions weigh no more "
            "than short ones. The paper's scores are sums: false."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the reference: scores are beta times the log-ratio. None: 2 with `per_token_scores`, "
            "else 0.1, DPO's default."
        },
    )

    def __post_init__(self):
        if self.beta is None:
            self.beta = 2.0 if self.per_token_scores else 0.1
        # None: transformers 4 would take all trackers that are installed. mypy does not see the type that it gives
        if self.report_to is None:  # type: ignore[has-type]
            self.report_to = "none"
        super().__post_init__()


@dataclass
class RunModelConfig(ModelConfig):
    """TRL's `ModelConfig`, with a type of the weights that depends on what is trained."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights that are trained, or that an adapter is trained on; models are saved in it. "
            "None: float32, and with `use_peft` the checkpoint's own, of its base and of the reference alike.",
            "choices": [*DTYPES],
        },
    )
