"""One arm, one seed: samples, training on one thread, and the evaluation on held-out prompts."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_larpo import LarPOTrainer
from trl_larpo.candidates import CandidateList, CandidatePool, Selection, build_list
from trl_larpo.errors import DataError
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.sampler import sample_pools
from trl_larpo.generation.sampling_task import SampleKind, SamplingTask
from trl_larpo.prompts import Prompt
from trl_larpo.rewards.functions import load_rewards, score_pools
from trl_larpo.run.evaluation import evaluate, means_by_prompt
from trl_larpo.run.options import RunTrainingConfig
from trl_larpo.storage import read_json, read_jsonl, write_json, write_jsonl
from trl_larpo.training.log_probabilities import log_probabilities_under

sys.path.append(str(Path(__file__).parents[1]))

from arms import ARMS, Arm
from tasks import GRADED_TASKS, Task

MODEL = "outputs/SmolLM2-135M-Instruct"

TEMPERATURE = 0.8

# Settings for a small model and few prompts; all other options have the defaults of `larpo run`
SETTINGS = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 1,
            "gradient_checkpointing": False, "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
            "disable_tqdm": True, "bf16": False}  # fmt: skip

_COLUMNS = ("prompt", "completions", "rewards", "finished", "completion_ids", "ref_logps")


@dataclass(frozen=True)
class Size:
    """
    Attributes:
        prompts: Training prompts; each seed draws its own.
        samples: Completions sampled for each.
        held_out: Held-out prompts, the same for all seeds.
        eval_samples: Completions sampled for each of those.
        tuning_samples: Completions sampled for each of as many other prompts, to choose a learning rate.
    """

    prompts: int
    samples: int
    held_out: int
    eval_samples: int
    tuning_samples: int


WHOLE = Size(prompts=96, samples=8, held_out=128, eval_samples=4, tuning_samples=2)
SMALL = Size(prompts=8, samples=4, held_out=8, eval_samples=2, tuning_samples=1)


@dataclass(frozen=True)
class Setup:
    """
    Attributes:
        size: How much.
        output: Folder of samples and logs.
        model: The initial model.
        device: What it is trained and sampled on in float32, `cpu` or `cuda`. They differ by rounding alone, so that
            results of both count.
    """

    size: Size
    output: Path
    model: str
    device: str = "cpu"

    @property
    def generation_batch_size(self) -> int:
        """A GPU takes as long for one completion as for hundreds."""
        return 128 if self.device == "cpu" else 768

    @functools.cache  # noqa: B019  setups are few, and live as long as the process
    def basis(self, task: str) -> dict[str, Any]:
        """What all results of a task are based on. Results of another basis are not compared."""
        made = GRADED_TASKS[task]()
        return {
            "size": asdict(self.size),
            "temperature": TEMPERATURE,
            "prompts": _digest([json.dumps(asdict(made)).encode()]),
            "model": _digest_of_files(self.model),
        }

    def folder_of_samples(self, task: str, seed: int, tuning: bool) -> Path:
        basis = _digest([json.dumps(self.basis(task)).encode()])
        return self.output / "samples" / f"{task}{'_tuning' if tuning else ''}_seed{seed}_{basis}"


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]


@functools.cache
def _digest_of_files(model: str) -> str:
    return _digest(path.read_bytes() for path in sorted(Path(model).glob("*.safetensors")))


@dataclass(frozen=True)
class Experiment:
    """
    What one result is about.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        learning_rate: Learning rate.
        seed: Seed of the choice of prompts, the samples and the training.
        tuning: Whether it serves to choose a learning rate: it is then evaluated on prompts of its own.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    tuning: bool = False

    @property
    def folder(self) -> str:
        """The folder of its result: `tuning` holds what learning rates are chosen by, `reported` what counts."""
        return "tuning" if self.tuning else "reported"

    @property
    def file_name(self) -> str:
        rate = f"_lr{self.learning_rate:g}" if self.tuning else ""
        return f"{self.task}_{self.arm}{rate}_seed{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """All options of the training that do not have their defaults."""
        return SETTINGS | ARMS[self.arm].options | {"learning_rate": self.learning_rate}


def prepare(task: str, seed: int, tuning: bool, setup: Setup) -> None:
    """Samples of the initial model, their rewards and log-probabilities; all arms of a task and seed share them."""
    size, folder = setup.size, setup.folder_of_samples(task, seed, tuning)
    if (folder / "ref_logps.json").exists():
        return
    with quiet(setup.output):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(setup.model).to(setup.device), _tokenizer(setup)
        made = GRADED_TASKS[task]()
        rows = made.tuning_train if tuning else made.train
        prompts = random.Random(seed).sample(prompts_of(rows), size.prompts)
        batch_size = setup.generation_batch_size
        samples = sampled(model, tokenizer, made, prompts, size.samples, f"train/{seed}", seed, batch_size)
        held_out = prompts_of(made.tuning if tuning else made.held_out)[: size.held_out]
        num_samples = size.tuning_samples if tuning else size.eval_samples
        start = sampled(model, tokenizer, made, held_out, num_samples, "held_out", seed, batch_size)
        del model
        # Those without any text teach nothing, and have no log-probability
        samples = [pool.with_candidates([c for c in pool.candidates if c.text.strip()]) for pool in samples]
        folder.mkdir(parents=True, exist_ok=True)
        for name, pools in (("samples", samples), ("start", start)):
            write_jsonl(folder / f"{name}.jsonl", [pool.to_row() for pool in pools])
        lists = [CandidateList(pool.prompt, pool.candidates).to_row() for pool in samples if pool.candidates]
        columns = ("prompt_id", "prompt", "completions", "finished", "completion_ids")
        logps = log_probabilities_under(
            setup.model,
            Dataset.from_list([{name: row[name] for name in columns} for row in lists]),
            RunTrainingConfig(str(folder / "scratch"), use_cpu=setup.device == "cpu", **SETTINGS),
            {},
            tokenizer,
            description="Reference",
        )
        write_json(folder / "about.json", {"device": setup.device})
        write_json(folder / "ref_logps.json", logps)  # last, as it says that all is there


def run(experiment: Experiment, setup: Setup) -> dict:
    """Trains and evaluates one arm. Returns its result; the same again is equal to the last digit on one machine."""
    arm, task = ARMS[experiment.arm], GRADED_TASKS[experiment.task]()
    settings = experiment.settings
    scratch = setup.output / "scratch" / experiment.file_name
    with quiet(setup.output):
        samples, start = read_samples(experiment, setup)
        lists = make_lists(arm, samples, random.Random(f"{experiment.arm} {experiment.seed}"))
        if not lists:
            raise DataError("The samples of each prompt all have the same reward.")
        tokenizer = _tokenizer(setup)
        trainer = LarPOTrainer(
            model=setup.model,
            args=RunTrainingConfig(str(scratch), seed=experiment.seed, use_cpu=setup.device == "cpu", **settings),
            train_dataset=Dataset.from_list([{name: made.to_row()[name] for name in _COLUMNS} for made in lists]),
            processing_class=tokenizer,
        )
        trainer.train()
        prompts, num_samples = [pool.prompt for pool in start], len(start[0].candidates)
        end = sampled(
            trainer.model, tokenizer, task, prompts, num_samples, "held_out", experiment.seed,
            setup.generation_batch_size,
        )  # fmt: skip
        shutil.rmtree(scratch, ignore_errors=True)
    trained = [candidate for made in lists for candidate in made.selected]
    return {
        "task": experiment.task,
        "arm": experiment.arm,
        "seed": experiment.seed,
        "settings": settings,
        "basis": setup.basis(experiment.task),
        "devices": devices(setup, experiment.task, experiment.seed, experiment.tuning),
        "budget": {
            "samples": sum(candidate.count for pool in samples for candidate in pool.candidates),
            "lists": len(lists),
            "candidates": len(trained),
            "steps": trainer.state.global_step,
            "tokens": sum(candidate.num_tokens or 0 for candidate in trained) * settings["num_train_epochs"],
        },
        "start": summary(start),
        "end": summary(end),
        "rewards": by_topic(end),
    }


def devices(setup: Setup, task: str, seed: int, tuning: bool) -> dict[str, str]:
    """What the samples of the initial model were drawn on, and what the model was trained and evaluated on."""
    about = read_json(setup.folder_of_samples(task, seed, tuning) / "about.json")
    return {"samples": about["device"], "training": setup.device}


def by_topic(pools: list[CandidatePool]) -> list[float]:
    """The mean reward on the prompts of each topic; on each prompt, if they have no topics."""
    rewards = means_by_prompt(pools)
    groups = itertools.groupby(pools, key=lambda pool: pool.prompt.columns.get("topic", pool.prompt.id))
    return [round(statistics.fmean(rewards[pool.prompt.id] for pool in group), 4) for _, group in groups]


def make_lists(arm: Arm, pools: list[CandidatePool], rng: random.Random) -> list[CandidateList]:
    """The lists or pairs that an arm trains on; prompts whose samples all have the same reward have none."""
    found = [build_list(pool, Selection()) for pool in pools]
    return [
        CandidateList(whole.prompt, chosen)
        for whole in found
        if whole.problem is None
        for chosen in arm.choose(whole.selected, rng)
    ]


def read_samples(experiment: Experiment, setup: Setup) -> tuple[list[CandidatePool], list[CandidatePool]]:
    """The rewarded samples with their log-probabilities, and the initial model's on held-out prompts."""
    folder = setup.folder_of_samples(experiment.task, experiment.seed, experiment.tuning)
    samples, start = (
        [CandidatePool.from_row(row) for row in read_jsonl(folder / f"{name}.jsonl")] for name in ("samples", "start")
    )
    logps = read_json(folder / "ref_logps.json")
    for place, pool in enumerate(samples):
        pairs = zip(pool.candidates, logps.get(pool.prompt.id, []), strict=True)
        samples[place] = pool.with_candidates([replace(candidate, ref_logp=logp) for candidate, logp in pairs])
    return samples, start


def sampled(
    model: PreTrainedModel, tokenizer, task: Task, prompts: list[Prompt], count: int, key: str, seed: int,
    batch_size: int,
) -> list[CandidatePool]:  # fmt: skip
    """Samples of each prompt with their rewards."""
    how = SamplingTask([SampleKind("policy", TEMPERATURE)] * count, "", iteration=1, key=key)
    options = GenerationOptions(max_new_tokens=task.max_new_tokens, generation_batch_size=batch_size)
    with tqdm(disable=True) as silent:
        pools = sample_pools(model, tokenizer, prompts, how, options, seed, silent)
    return score_pools(load_rewards([task.reward]), pools)


def summary(pools: list[CandidatePool]) -> dict[str, float]:
    found = evaluate(pools, pools)
    return {
        "reward": round(found["reward"]["mean"], 4),
        "finished": round(found["finished"], 4),
        "tokens": round(found["tokens"], 2),
        "distinct": round(found["distinct"], 4),
    }


def prompts_of(rows: list[dict]) -> list[Prompt]:
    return [Prompt.of(row["prompt"], {name: row[name] for name in row if name != "prompt"}) for row in rows]


def _tokenizer(setup: Setup):
    return AutoTokenizer.from_pretrained(setup.model)


@contextlib.contextmanager
def quiet(output: Path):
    """On one thread, so that results do not depend on how many run side by side; what is printed goes to a log."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    with (
        open(output / f"log_{os.getpid()}.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
