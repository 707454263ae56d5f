"""[`RunContext`]: what the stages of a run share."""

from functools import cached_property

from ..generation.sampler import PolicySampler
from ..generation.sampling_task import SampleKind, SamplingTask
from ..pools import read_pools
from ..rewards.functions import Completions
from ..rewards.scorer import RewardScorer
from .folder import RunFolder
from .loading import quantization_of
from .options import RunConfig


class RunContext:
    """
    The folder of a run, a sampler and a scorer. The latter two load models, or start servers, when they are used.

    Args:
        folder: With the prompts prepared.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    @property
    def options(self) -> RunConfig:
        return self.folder.options

    @cached_property
    def sampler(self) -> PolicySampler:
        folder = self.folder
        return PolicySampler(
            folder.options,
            seed=folder.training.seed,
            log_folder=folder.path / "servers",
            use_cpu=folder.training.use_cpu,
            attn_implementation=folder.model.attn_implementation,
            quantization_config=quantization_of(folder.model, folder.training),
            server_reload=folder.options.server_reload,
            with_adapters=folder.keeps_adapter,
        )

    @cached_property
    def scorer(self) -> RewardScorer:
        return RewardScorer(self.options, use_cpu=self.folder.training.use_cpu)

    def close(self) -> None:
        """Stops servers and lets go of models."""
        if "sampler" in vars(self):
            self.sampler.close()
        if "scorer" in vars(self):
            self.scorer.close()

    def leave_devices_to(self, user: str | None) -> None:
        """
        Takes the devices from the sampler, whose servers rest or are stopped, and from the scorer, but for the `user`.

        Args:
            user: `"sampler"`, `"scorer"`, or `None` for something else.
        """
        if user != "sampler" and "sampler" in vars(self):
            self.sampler.rest()
        if user != "scorer" and "scorer" in vars(self):
            self.scorer.close()

    def initial_completions(self) -> Completions | None:
        """
        Those of the initial model on held-out prompts, for rewards that compare: measured against each other, the
        samples of any model would come to the same mean. `None` for other rewards.
        """
        if not self.scorer.is_relative:
            return None
        pools = read_pools(self.folder.iteration(0) / "held_out_samples.jsonl")
        return {pool.prompt.id: [candidate.completion for candidate in pool.candidates] for pool in pools}

    def held_out_task(self, iteration: int) -> SamplingTask:
        """How held-out prompts are sampled with the model that an iteration ends with."""
        model_path, revision = self.model(iteration)
        return SamplingTask(
            [SampleKind("policy", self.options.evaluation_temperature)] * self.options.num_eval_samples,
            model_path,
            iteration,
            key="held out",  # the same random numbers every time: what differs, differs by the model
            revision=revision,
            is_trained=self.is_trained(iteration),
            description=f"{f'Iteration {iteration}' if iteration else 'Start'}: sampling on held-out prompts",
        )

    def is_trained(self, iteration: int) -> bool:
        """
        Whether running servers have to show that they have the model that an iteration ends with. In a trial their time
        counts, whatever they have.
        """
        return iteration > 0 and not self.folder.is_trial

    def model(self, iteration: int) -> tuple[str, str]:
        """
        Path and revision of the model that an iteration ends with; for 0 those of the initial one. The revision of an
        adapter that is kept is that of its base.
        """
        of_hub = iteration == 0 or self.folder.keeps_adapter
        return self.folder.model_path(iteration), self.folder.model.model_revision if of_hub else "main"
