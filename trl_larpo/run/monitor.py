"""
Watches a training through held-out prompts: reward, share of answers that end, and length, while there is time to act.

[`TrainingMonitor`] is a callback of the trainer. A few times in a training it samples a fixed set of held-out prompts
with the model as it is, compares with the model that the training started from, stops a training that does harm, and
keeps the best weights it has seen.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback

from ..candidates import CandidatePool
from ..prompts import Prompt
from ..report.numbers import with_error
from ..storage import read_json, write_json
from ..waiting import wait_for_all
from .evaluation import MIN_PROMPTS_TO_JUDGE, evaluate, fell, mean_and_error, means_by_prompt

logger = get_logger(__name__)

_CONFIRMATION = 4  # times as many prompts are asked before a training is stopped

_CERTAIN = 3.0  # standard errors by which weights must be worse to be given up; of several points, one is often by two

_CHANCES = 4  # steps at which it may sample, for each time that it is asked to


@dataclass(frozen=True)
class MonitorPoint:
    """
    What held-out prompts said of the model at a step.

    Attributes:
        step: Optimizer steps of the iteration so far; 0 is the model that the training started from.
        reward: Mean reward and its standard error over prompts.
        change: The same of the difference to step 0, prompt by prompt.
        finished: Share of the answers that ended on their own.
        tokens: Mean tokens of an answer.
        seconds: What it took.
        by_prompt: Mean reward of each prompt.
    """

    step: int
    reward: dict[str, float | None]
    change: dict[str, float | None]
    finished: float
    tokens: float | None
    seconds: float
    by_prompt: dict[str, float]

    @classmethod
    def of(
        cls, step: int, pools: list[CandidatePool], start: list[CandidatePool], seconds: float = 0.0
    ) -> "MonitorPoint":
        """Sums up scored samples of a model, beside those of the model that the training started from."""
        found, by_prompt = evaluate(pools, start), means_by_prompt(pools)
        return cls(step, found["reward"], found["gain"], found["finished"], found["tokens"], seconds, by_prompt)

    def change_from(self, other: "MonitorPoint") -> dict[str, float | None]:
        """Mean and standard error of the difference to another point, prompt by prompt."""
        common = self.by_prompt.keys() & other.by_prompt.keys()
        return mean_and_error([self.by_prompt[name] - other.by_prompt[name] for name in sorted(common)])

    @property
    def is_suspect(self) -> bool:
        """Whether the reward is lower than at the start by two standard errors, which may well be chance."""
        return fell(self.change, len(self.by_prompt), num_errors=2)

    @property
    def is_harm(self) -> bool:
        """Whether the reward is lower than at the start by three standard errors."""
        return fell(self.change, len(self.by_prompt), _CERTAIN)


class TrainingMonitor(TrainerCallback):
    """
    Samples held-out prompts during a training.

    It samples at equal distances, but only while that takes at most `time_share` of the time: a short training has
    fewer points. Training itself is not touched: the random numbers of the samples are their own. In several processes
    each samples its share of the prompts. Under FSDP it does nothing.

    Args:
        trainer: The trainer, to which this is added with `add_callback`.
        sample: Samples held-out prompts with the trainer's model. Each process calls it with its share.
        score: Rewards the samples. Called in the main process.
        save: Saves the weights as they are: `save(step)`. Called in all processes.
        start: Scored held-out samples of the model that training starts from. The first `num_prompts` are watched.
        path: JSON file for the points. What an earlier, killed training left there is taken over.
        num_evals: How often to sample in a training.
        time_share: Largest share of the iteration's time, up to now, that sampling may take. 1: no limit.
        num_prompts: How many held-out prompts.
        stop: Whether to stop a training after which the reward is lower than at its start by three standard errors,
            and to keep the best weights. Up to four times as many prompts are asked first. Without, it only watches.
        seconds_before: Seconds that the iteration has taken before the training.
        seconds_expected: What the first sampling may take, in seconds.
    """

    def __init__(
        self,
        trainer: Trainer,
        sample: Callable[[list[Prompt]], list[CandidatePool]],
        score: Callable[[list[CandidatePool]], list[CandidatePool]],
        save: Callable[[int], None],
        start: list[CandidatePool],
        path: Path,
        *,
        num_evals: int = 4,
        time_share: float = 0.1,
        num_prompts: int = 16,
        stop: bool = True,
        seconds_before: float = 0.0,
        seconds_expected: float = 0.0,
    ):
        self.trainer, self.sample, self.score, self.save, self.path = trainer, sample, score, save, path
        self.all_start, self.start, self.num_evals, self.stop = start, start[:num_prompts], num_evals, stop
        self.time_share, self.seconds_before, self.seconds_expected = time_share, seconds_before, seconds_expected
        self.points = [MonitorPoint.of(0, self.start, self.start)]
        self.stopped_at: int | None = None
        self.seconds_spent = 0.0
        self._off = False
        [earlier] = self._from_main([read_json(path) if PartialState().is_main_process and path.exists() else None])
        if earlier is not None:
            self.points = [MonitorPoint(**point) for point in earlier["points"]]
            self.stopped_at = earlier["stopped_at"] if stop else None
            self.seconds_spent = earlier["seconds_spent"]

    @property
    def best(self) -> MonitorPoint:
        """The point with the highest reward; of equal ones the first."""
        return max(self.points, key=lambda point: -math.inf if point.change["mean"] is None else point.change["mean"])

    @property
    def kept_step(self) -> int | None:
        """
        The step whose weights are to be kept, `None` for the last, as always without `stop`.

        The best one where the training was stopped, or where the last step was sampled too and is worse than the best
        by three standard errors.
        """
        at_the_end = self.stop and self.points[-1].step == self.trainer.state.max_steps
        if self.stopped_at is not None or (at_the_end and self._ended_below_best()):
            return self.best.step
        return None

    def _ended_below_best(self) -> bool:
        return fell(self.points[-1].change_from(self.best), len(self.points[-1].by_prompt), _CERTAIN)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin, self._first_step = time.monotonic(), state.global_step
        if self.stop and len(self.points[0].by_prompt) < MIN_PROMPTS_TO_JUDGE:
            logger.warning(
                f"Held-out prompts are fewer than {MIN_PROMPTS_TO_JUDGE}, too few to stop a training that does harm."
            )
        if self.trainer.accelerator.distributed_type == DistributedType.FSDP:
            logger.warning("Held-out prompts are not sampled during the training: under FSDP no process has the model.")
            self._off = True
        if self.stopped_at is not None:  # before it was killed
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._off or self.stopped_at is not None or not self._is_chance(state):
            return
        if not self._agreed(self._has_time(state.global_step)):
            return
        last = state.global_step == state.max_steps
        point = self._evaluate(self.start, state.global_step)
        if point is None:
            return
        harmful = False
        if self._agreed(self.stop and not last and point.is_suspect):
            more = self.all_start[: _CONFIRMATION * len(self.start)]
            of_more = self._evaluate(more, state.global_step) if len(more) > len(self.start) else point
            harmful = of_more is not None and self._agreed(of_more.is_harm)
        is_best = point.change["mean"] is not None and point.change["mean"] > (self.best.change["mean"] or 0.0)
        if self._agreed(is_best) and not last:
            began = time.monotonic()
            self.save(state.global_step)
            self.seconds_spent += time.monotonic() - began
        self.points.append(point)
        if harmful:
            self.stopped_at = state.global_step
            control.should_training_stop = True
        if self.trainer.accelerator.is_main_process:
            self._write()
            logs = {"held_out/reward": point.reward["mean"], "held_out/change": point.change["mean"],
                    "held_out/finished": point.finished, "held_out/tokens": point.tokens}  # fmt: skip
            should_log = control.should_log
            # Not DPOTrainer's: it would add, and clear, the means of the steps since its last line
            Trainer.log(self.trainer, {name: value for name, value in logs.items() if value is not None})
            control.should_log = should_log  # which the line above has switched off
            change = with_error(point.change, "+")
            logger.info(f"Step {state.global_step}: held-out reward {with_error(point.reward)}, change {change}")

    def on_train_end(self, args, state, control, **kwargs):
        if len(self.points) > 1 and self.trainer.accelerator.is_main_process:
            self._write()  # what a resumed training keeps may depend on options that were changed

    def explanation(self) -> str | None:
        """Why other weights than the last are kept, for a person; `None` if the last are."""
        if self.kept_step is None:
            return None
        kept = "the model that the training started from" if self.best.step == 0 else f"step {self.best.step}"
        last = self.points[-1]
        change = with_error(last.change if self.stopped_at else last.change_from(self.best), "+")
        if self.stopped_at is not None:
            what = f"Training was stopped at step {self.stopped_at}: the reward on held-out prompts changed by {change}"
        else:
            what = f"The last step is worse than the best: the reward on held-out prompts differs by {change}"
        return f"{what}, and {last.finished:.0%} of the answers end on their own. Kept: {kept}."

    def _is_chance(self, state) -> bool:
        """Whether it is about time to sample. The same in all processes."""
        step, distance = state.global_step, state.max_steps / self.num_evals
        if step <= self.points[-1].step:  # seen before the training was killed
            return False
        # A few steps for each time, since all processes then wait for the main one
        passed, before = (math.floor(_CHANCES * n / distance) for n in (step, step - 1))
        return step == state.max_steps or (passed > before and step >= self.points[-1].step + distance)

    def _has_time(self, step: int) -> bool:
        if self.time_share >= 1:
            return True
        expected = self.points[-1].seconds or self.seconds_expected
        # What it took to the first step since the last kill is not known: in proportion
        training = (time.monotonic() - self._begin) * step / max(1, step - self._first_step)
        elapsed = self.seconds_before + training
        return self.seconds_spent + expected <= self.time_share * (elapsed + expected)

    def _evaluate(self, start: list[CandidatePool], step: int) -> MonitorPoint | None:
        """Samples the prompts of `start`. `None` if it failed, which is logged and never ends the training."""
        began, point, process = time.monotonic(), None, PartialState()
        with _random_states_kept():
            share = [pool.prompt for pool in start[process.process_index :: process.num_processes]]
            sampled, problem = _attempt(self.sample, share)
        wait_for_all()
        gathered = gather_object([(sampled, problem)])  # also where one process failed: none may wait for it
        problem = next((problem for _, problem in gathered if problem), None)
        if process.is_main_process and problem is None:
            with _random_states_kept():  # of the training, whatever a reward draws
                scored, problem = _attempt(self.score, [pool for of_process, _ in gathered for pool in of_process])
            if problem is None:
                point = MonitorPoint.of(step, scored, start, time.monotonic() - began)
        wait_for_all()  # a judge may be slow
        point, problem = self._from_main([point, problem])
        self.seconds_spent += time.monotonic() - began
        if problem is not None:
            logger.warning(f"Held-out prompts are no longer sampled in this training, which continues. {problem}")
            self._off = True
        return point

    def _write(self) -> None:
        found = {"stopped_at": self.stopped_at, "kept_step": self.kept_step, "explanation": self.explanation()}
        points = [asdict(point) for point in self.points]
        write_json(self.path, found | {"seconds_spent": self.seconds_spent, "points": points})

    def _agreed(self, value: bool) -> bool:
        """What the main process says."""
        return self._from_main([value])[0]

    def _from_main(self, values: list) -> list:
        return broadcast_object_list(values, from_process=0)


def _attempt(function: Callable[[list], list[CandidatePool]], items: list) -> tuple[list[CandidatePool], str | None]:
    """What a function returns, and what went wrong: out of memory, or a reward of the user's that fails."""
    try:
        return function(items), None
    except (Exception, SystemExit) as error:
        return [], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Random numbers drawn inside leave those that come after as they would have been."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
