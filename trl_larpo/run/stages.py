"""
The stages of an iteration. Each reads files of the run folder and leaves one that is whole.

Run again after a kill, a stage resumes from what it has saved, and its output file is identical. With several processes
(`accelerate launch`) each does its share, and the first one puts the shares together.
"""

import contextlib
import copy
import gc
import json
import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import get_peft_config
from trl.models.utils import add_hooks, remove_hooks

from ..candidates import build_lists, candidates_of, earlier_iterations
from ..errors import DataError, LarPOError
from ..generation.in_process import Sample, encode_prompt, end_token_ids, generate_completions
from ..generation.server_client import Request, Sampler, request_seed
from ..generation.server_process import running_servers
from ..prompts import completion_text, prompt_id, prompt_text
from ..rewards.functions import Reward, load_rewards, reward_id, score_rows
from ..rewards.pairrm import PairRM
from ..rewards.reward_models import RewardModel
from ..storage import GrowingFile, partial_path, read_jsonl, replace_folder, write_json, write_jsonl
from ..training.trainer import LarPOTrainer
from .candidate_files import read_candidate_rows
from .evaluation import evaluate_rows
from .folder import RunFolder
from .monitor import TrainingMonitor
from .negatives import random_prompts, related_prompts

Row = dict[str, Any]
logger = get_logger(__name__)


STAGES = ("generate", "reward", "select", "reference", "train", "held_out", "evaluate")


SHARDED_STAGES = ("reference", "train", "evaluate")
"""Those that run the model through the trainer, sharded where it is too large for one device."""


_BATCHES_PER_UNIT = 4  # at most this many batches are sampled again after a kill

_COMPLETIONS_PER_CALL = 256  # of a reward function

_FAILURES_IN_A_ROW = 5  # of a reward, before the rest is not tried any more

_MAX_KL_PROMPTS = 64


class Stages:
    """
    The stages of one run.

    Args:
        folder: Its folder, with the prompts prepared.
    """

    def __init__(self, folder: RunFolder):
        self.folder, self.options = folder, folder.options
        self._rewards: list[Reward] | None = None
        self._sampler: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._servers: tuple[str, contextlib.ExitStack, list[str]] | None = None

    def output(self, stage: str, iteration: int) -> Path:
        """The file or folder that is there when the stage is done."""
        name = {
            "generate": "samples.jsonl",
            "reward": "rewarded.jsonl",
            "select": "selection.json",
            "reference": "ref_logps.jsonl",
            "train": "model",
            "held_out": "held_out.jsonl",
            "evaluate": "evaluation.json",
        }[stage]
        return self.folder.iteration(iteration) / name

    def run(self, stage: str, iteration: int) -> None:
        """Does what is left of a stage."""
        path = self.output(stage, iteration)
        missing = not path.exists()
        PartialState().wait_for_everyone()  # all have looked before anyone begins, and agree
        if missing:
            getattr(self, stage)(iteration, path)
            PartialState().wait_for_everyone()

    def close(self) -> None:
        """Stops servers and lets go of models."""
        self._sampler = self._rewards = None
        if self._servers is not None:
            self._servers[1].close()
            self._servers = None

    # Sampling

    def generate(self, iteration: int, path: Path) -> None:
        options = self.options
        rows = self.folder.prompts_of(iteration)
        kinds = [("policy", options.temperature_in(iteration))] * options.num_samples
        for name in ("low_temperature", "high_temperature"):
            if name in options.negatives:
                kinds += [(name, getattr(options, name))] * options.num_negatives
        sampled = self.sample(
            rows, kinds, path, model_path=self.folder.model_path(iteration - 1), iteration=iteration, key=str(iteration)
        )
        if not PartialState().is_main_process:
            return
        own = [list(zip(row["completions"], row["candidates"], strict=True)) for row in sampled]
        for name in ("related_prompt", "random_prompt"):
            if name in options.negatives:
                ids = [row["prompt_id"] for row in rows]
                others = (
                    related_prompts([prompt_text(row["prompt"]) for row in rows])
                    if name == "related_prompt"
                    else random_prompts(ids, self.folder.training.seed, iteration)
                )
                for row, other in zip(sampled, others, strict=True):
                    # Those that can be trained on first
                    usable = sorted(own[other], key=lambda x: not (x[1]["finished"] and completion_text(x[0]).strip()))
                    for completion, description in usable[: options.num_negatives]:
                        row["completions"].append(_in_form_of(row["prompt"], completion))
                        row["candidates"].append(description | {"source": name, "of_prompt": ids[other]})
        GrowingFile(path).finish(sampled)

    def sample(
        self,
        rows: list[Row],
        kinds: list[tuple[str, float]],
        path: Path,
        *,
        model_path: str,
        iteration: int,
        key: str,
        description: str | None = None,
    ) -> list[Row]:
        """
        Samples for prompts, all of which are safe in the growing file when it returns.

        Args:
            rows: Prompts.
            kinds: Source and temperature of each sample of a prompt.
            path: Where the whole file will be.
            model_path: The policy.
            iteration: The iteration the samples belong to.
            key: Together with the prompt, the name of the random numbers.
            description: What the progress bar says.

        Returns:
            The rows with `completions` and `candidates` added. On processes but the first nothing.
        """
        file, state = GrowingFile(path, share=PartialState().process_index), PartialState()
        state.wait_for_everyone()  # all have read what is there before any process adds to it
        done = {row["prompt_id"]: row for row in file.rows}
        temperatures = [temperature for _, temperature in kinds]

        def as_row(row: Row, samples: list[Sample]) -> Row:
            return {"prompt_id": row["prompt_id"]} | _sampled(row["prompt"], samples, kinds, iteration)

        total, found = len(rows) * len(kinds), sum(row["prompt_id"] in done for row in rows) * len(kinds)
        with tqdm(
            total=total,
            initial=found,
            desc=description or f"Iteration {iteration}: sampling",
            unit=" completions",
            disable=not state.is_main_process,
        ) as progress:
            if self.options.server_urls or self.options.server_command:
                if state.is_main_process:
                    missing = [row for row in rows if row["prompt_id"] not in done]
                    self._sample_on_servers(missing, temperatures, model_path, key, file, as_row, progress)
            else:
                # What is in a batch can change a result in its last digits: so a unit is sampled in whole or not at
                # all, always with the same prompts in it, whichever process does it
                size = max(1, _BATCHES_PER_UNIT * self.options.generation_batch_size // len(kinds))
                ordered = sorted(range(len(rows)), key=lambda i: -len(prompt_text(rows[i]["prompt"])))
                units = [[rows[i] for i in ordered[start : start + size]] for start in range(0, len(rows), size)]
                for unit in units[state.process_index :: state.num_processes]:
                    if all(row["prompt_id"] in done for row in unit):
                        continue
                    model, tokenizer = self._load_policy(model_path)
                    samples = generate_completions(
                        model,
                        tokenizer,
                        [row["prompt"] for row in unit],
                        num_samples=len(kinds),
                        temperature=temperatures,
                        top_p=self.options.top_p,
                        max_new_tokens=self.options.max_new_tokens,
                        batch_size=self.options.generation_batch_size,
                        seed=self.folder.training.seed,
                        keys=[f"{key}/{row['prompt_id']}" for row in unit],
                        progress=progress,
                    )
                    new = [(row, of_row) for row, of_row in zip(unit, samples, strict=True)]
                    file.add([as_row(row, of_row) for row, of_row in new if row["prompt_id"] not in done])
        state.wait_for_everyone()
        if not state.is_main_process:
            return []
        done = {row["prompt_id"]: row for row in GrowingFile(path).rows}
        return [row | done[row["prompt_id"]] for row in rows]

    def _sample_on_servers(
        self,
        rows: list[Row],
        temperatures: list[float],
        model_path: str,
        key: str,
        file: GrowingFile,
        as_row: Callable[[Row, list], Row],
        progress: tqdm,
    ) -> None:
        if not rows:
            return
        options, urls = self.options, self._server_urls(model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        by_id = {row["prompt_id"]: row for row in rows}
        started, num_tokens = time.monotonic(), 0

        def save(request: Request, samples: list) -> None:
            nonlocal num_tokens
            file.add([as_row(by_id[request.key], samples)])
            num_tokens += sum(sample.num_tokens for sample in samples)
            progress.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            progress.update(len(samples))

        sampler = Sampler(
            urls,
            options.server_model or (model_path if options.server_command else None),
            max_new_tokens=options.max_new_tokens,
            top_p=options.top_p,
            end_ids=sorted(_end_ids_of(model_path, tokenizer)),
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            api_key_variable=options.server_api_key_variable,
            requests_in_flight=options.server_requests_in_flight,
            timeout=options.server_timeout,
            patience=options.server_patience,
        )
        seed = self.folder.training.seed
        requests = [
            Request(
                key=row["prompt_id"],
                prompt=row["prompt"],
                temperatures=temperatures,
                prompt_ids=encode_prompt(tokenizer, row["prompt"]),
                seed=request_seed(seed, key, row["prompt_id"]),
            )
            for row in rows
        ]
        sampler.sample(requests, save)

    def _server_urls(self, model_path: str) -> list[str]:
        """Running servers; those of another model are stopped, and those of this one started."""
        if self.options.server_urls:
            return self.options.server_urls
        if self._servers is None or self._servers[0] != model_path:
            self.close()
            stack = contextlib.ExitStack()
            print(f"Starting {self.options.num_servers} server(s) of {model_path}; their output is in servers/")
            urls = stack.enter_context(
                running_servers(
                    self.options.server_command,
                    model_path,
                    self.options.num_servers,
                    self.folder.path / "servers",
                    health_route=self.options.server_health_route,
                    start_timeout=self.options.server_start_timeout,
                )
            )
            self._servers = (model_path, stack, urls)
        return self._servers[2]

    def _load_policy(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._sampler is None or self._sampler[0] != path:
            self._sampler = None
            name = self.options.generation_dtype
            dtype = generation_dtype() if name == "auto" else getattr(torch, name)
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                revision=self.folder.model.model_revision if path == self.folder.model_path(0) else "main",
                attn_implementation=self.folder.model.attn_implementation,
            )
            device = "cpu" if self.folder.training.use_cpu else PartialState().device
            self._sampler = (path, model.to(device), AutoTokenizer.from_pretrained(path))
        return self._sampler[1:]

    # Rewards and lists

    @property
    def rewards(self) -> list[Reward]:
        if self._rewards is None:
            options = self.options

            def load_model(path: str, pairwise: bool) -> RewardModel | PairRM:
                return (PairRM if pairwise else RewardModel)(
                    path,
                    batch_size=options.reward_batch_size,
                    max_length=options.reward_max_length,
                    dtype=options.reward_dtype,
                    device="cpu" if self.folder.training.use_cpu else PartialState().device,
                )

            self._rewards = load_rewards(options.reward_funcs, options.reward_weights, load_model)
        return self._rewards

    @property
    def reward_id(self) -> str:
        return reward_id(self.options.reward_funcs, self.options.reward_weights, **self.options.settings)

    def reward(self, iteration: int, path: Path) -> None:
        """Rewards the new samples. Those of earlier iterations join them, with the rewards they have."""
        rows = read_jsonl(self.output("generate", iteration))
        for row in rows:
            row["rewards"] = [None] * len(row["completions"])
            row["known"] = [False] * len(row["completions"])
        self._add_remembered(rows, iteration)
        # What is measured against the other candidates of its prompt cannot be kept from another pool
        relative = self.options.normalize_rewards or any(reward.pairwise for reward in self.rewards)
        if relative:
            for row in rows:
                row["known"] = [False] * len(row["completions"])
        scored = self.score(rows, path, f"Iteration {iteration}: rewarding")
        if PartialState().is_main_process:
            GrowingFile(path).finish(scored)

    def _add_remembered(self, rows: list[Row], iteration: int) -> None:
        by_id = {row["prompt_id"]: row for row in rows}
        for row in rows:  # files made elsewhere hold the bare text of what is a conversation here
            if not isinstance(row["prompt"], str) and len(row["prompt"]) == 1:
                by_id.setdefault(prompt_id(row["prompt"][0]["content"]), row)
        pools = [
            (read_jsonl(self.output("reward", earlier)), {earlier})
            for earlier in earlier_iterations(self.options.memory, iteration)
        ]
        if self.options.earlier_candidates and (iteration == 1 or self.options.memory == "all"):
            pools += [(read_candidate_rows(path), None) for path in self.options.earlier_candidates]
        for pool, iterations in pools:
            for earlier in pool:
                row = by_id.get(earlier["prompt_id"])
                if row is None:
                    continue
                same_rewards = earlier.get("reward_id") == self.reward_id
                rewards = earlier.get("rewards") or [None] * len(earlier["completions"])
                for completion, reward, description in zip(
                    earlier["completions"], rewards, earlier["candidates"], strict=True
                ):
                    if iterations is None or description["iteration"] in iterations:
                        row["completions"].append(_in_form_of(row["prompt"], completion))
                        row["candidates"].append(description)
                        row["rewards"].append(reward if same_rewards else None)
                        row["known"].append(same_rewards)

    def score(self, rows: list[Row], path: Path, description: str) -> list[Row]:
        """Rewards what has no reward yet; safe in the growing file as it goes. On processes but the first nothing."""
        state = PartialState()
        file = GrowingFile(path, share=state.process_index)
        state.wait_for_everyone()
        done = {row["prompt_id"]: row for row in file.rows}
        of_rows = [row.get("columns") or {} for row in rows]
        names = dict.fromkeys(name for columns in of_rows for name in columns)  # the same in every call of a reward
        rows = [row | {"columns": names | columns} for row, columns in zip(rows, of_rows, strict=True)]
        size = max(1, _COMPLETIONS_PER_CALL // max(1, max(len(row["completions"]) for row in rows)))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        failures: list[str] = []
        with tqdm(
            total=len(rows), initial=len(done), desc=description, unit=" prompts", disable=not state.is_main_process
        ) as progress:
            for chunk in chunks[state.process_index :: state.num_processes]:
                missing = [row for row in chunk if row["prompt_id"] not in done]
                if not missing:
                    continue
                try:
                    if len(failures) < _FAILURES_IN_A_ROW:
                        file.add(self._score_chunk(missing))
                except DataError as error:
                    if len(missing) == 1:
                        failures.append(str(error))
                    else:
                        self._score_one_by_one(missing, file, failures)
                progress.update(len(missing))
        state.wait_for_everyone()
        if failures:
            raise DataError(
                f"{failures[0]} Rewards of "
                f"{sum(row['prompt_id'] in {r['prompt_id'] for r in file.rows} for row in rows)} of "
                f"{len(rows)} prompts are kept. Fix the reward and run the same command again."
            )
        if not state.is_main_process:
            return []
        done = {row["prompt_id"]: row for row in GrowingFile(path).rows}
        if len(done) < len({row["prompt_id"] for row in rows}):
            raise DataError("Another process could not reward its share; see its message.")
        names = ("completions", "candidates", "rewards", "known", "prompt_id")
        return [
            {k: v for k, v in row.items() if k not in names}
            | {"prompt_id": row["prompt_id"], "completions": row["completions"], "candidates": row["candidates"]}
            | {"rewards": done[row["prompt_id"]]["rewards"], "reward_parts": done[row["prompt_id"]]["reward_parts"]}
            | {"reward_id": self.reward_id}
            for row in rows
        ]

    def _score_one_by_one(self, rows: list[Row], file: GrowingFile, failures: list[str]) -> None:
        """Finds the prompts at which the reward fails, and keeps the rewards of the others."""
        for row in rows:
            if len(failures) >= _FAILURES_IN_A_ROW:
                return
            try:
                file.add(self._score_chunk([row]))
            except DataError as error:
                failures.append(str(error))

    def _score_chunk(self, rows: list[Row]) -> list[Row]:
        asked, new_places = [], []
        for row in rows:
            known = row.get("known") or [False] * len(row["completions"])
            places = [i for i, is_known in enumerate(known) if not is_known]
            new_places.append(places)
            asked.append(
                {
                    "prompt": row["prompt"],
                    "columns": row.get("columns"),
                    "completions": [row["completions"][i] for i in places],
                    "finished": [row["candidates"][i]["finished"] for i in places],
                }
            )
        results = []
        for row, places, scored in zip(
            rows, new_places, score_rows(self.rewards, asked, self.options.normalize_rewards), strict=True
        ):
            rewards = list(row.get("rewards") or [None] * len(row["completions"]))
            for place, reward in zip(places, scored["rewards"], strict=True):
                rewards[place] = reward
            results.append({"prompt_id": row["prompt_id"], "rewards": rewards, "reward_parts": scored["reward_parts"]})
        return results

    def select(self, iteration: int, path: Path) -> None:
        if not PartialState().is_main_process:
            return
        rows = read_jsonl(self.output("reward", iteration))
        columns = ("prompt_id", "prompt")
        pools = [({name: row[name] for name in columns}, candidates_of(row)) for row in rows]
        lists, counts = build_lists(pools, self.options.selection(self.folder.training.truncated_completions))
        logger.info(f"Iteration {iteration}: {counts.summary()}")
        write_jsonl(path.with_name("lists.jsonl"), lists)
        write_json(path, vars(counts))
        if counts.lists == 0:
            path.unlink()
            raise LarPOError(
                f"Iteration {iteration} has no list to train on: {counts.summary()} Change the reward, raise "
                "`num_samples`, `temperature` or `max_new_tokens`, in a new `output_dir`."
            )

    # Training

    def _lists(self, iteration: int) -> list[Row]:
        rows = read_jsonl(self.folder.iteration(iteration) / "lists.jsonl")
        names = ("prompt_id", "prompt", "completions", "rewards", "finished", "completion_ids")
        return [{name: row[name] for name in names} for row in rows if row["problem"] is None]

    def reference(self, iteration: int, path: Path) -> None:
        """Log-probabilities of all candidates under the reference, computed once."""
        self.close()  # the memory is needed
        model_path = self.folder.model_path(iteration - 1 if self.options.reference == "policy" else 0)
        logps = self._log_probabilities(self._lists(iteration), model_path, self.folder.iteration(iteration))
        if PartialState().is_main_process:
            write_jsonl(path, logps)

    def _log_probabilities(self, lists: list[Row], model_path: str, scratch: Path) -> list[Row]:
        """Rows of `prompt_id` and `ref_logps`; lists whose prompt fills `max_length` have none."""
        args = copy.copy(self.folder.training)
        args.output_dir, args.report_to, args.precompute_ref_log_probs = str(scratch / "trainer"), [], True
        args.gradient_checkpointing = False
        args.truncated_completions = "rank_last"  # which drops none, and takes those without a reward
        trainer = LarPOTrainer(
            model=model_path,
            args=self._with_model_kwargs(args),
            train_dataset=_dataset_on_disk(lists, scratch / "trainer" / "data"),
            processing_class=AutoTokenizer.from_pretrained(model_path),
        )
        dataset = trainer.train_dataset.select_columns(["prompt_id", "ref_logps"])
        rows = [dict(row) for row in dataset]
        del trainer
        _free_memory()
        AcceleratorState._reset_state()  # DeepSpeed allows one trainer for each, and there may come another
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(scratch / "trainer", ignore_errors=True)
        return rows

    def train(self, iteration: int, path: Path) -> None:
        self.close()
        folder, scratch = self.folder, path.with_name("trainer")
        ref_logps = {row["prompt_id"]: row["ref_logps"] for row in read_jsonl(self.output("reference", iteration))}
        lists = [
            row | {"ref_logps": ref_logps[row["prompt_id"]]}
            for row in self._lists(iteration)
            if row["prompt_id"] in ref_logps
        ]
        args = copy.copy(folder.training)
        name = folder.path.name
        args.output_dir = str(scratch)
        args.run_name = f"{args.run_name or name}-iteration-{iteration}"
        args.save_total_limit = args.save_total_limit or 2
        if hasattr(args, "logging_dir"):
            args.logging_dir = str(path.with_name("tensorboard"))
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(path.with_name("tensorboard"))
        model_path = folder.model_path(iteration - 1)
        trainer = LarPOTrainer(
            model=model_path,
            args=self._with_model_kwargs(args),
            train_dataset=_dataset_on_disk(lists, scratch / "data"),
            processing_class=AutoTokenizer.from_pretrained(model_path),
            peft_config=get_peft_config(folder.model),
        )
        monitor = self._monitor(trainer, iteration, path)
        if monitor is not None:
            trainer.add_callback(monitor)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(scratch))
        log = [
            {key: value for key, value in entry.items() if not key.startswith("train_") or key == "train_loss"}
            for entry in trainer.state.log_history
            if "held_out/finished" not in entry  # in monitor.json; when it is sampled depends on the machine's speed
        ]
        kept_step = None if monitor is None else monitor.kept_step
        if kept_step is not None and PartialState().is_main_process:
            print(f"Iteration {iteration}: {monitor.explanation()}")
        self._save_model(trainer, model_path, path, kept_step)
        if PartialState().is_main_process:
            write_jsonl(path.with_name("training_log.jsonl"), log)
            replace_folder(partial_path(path), path)
            shutil.rmtree(scratch, ignore_errors=True)  # checkpoints: of no use any more
        PartialState().wait_for_everyone()
        del trainer
        _free_memory()

    def _with_model_kwargs(self, args):
        model = self.folder.model
        args.model_init_kwargs = {
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
        } | (args.model_init_kwargs or {})
        return args

    def _monitor(self, trainer: LarPOTrainer, iteration: int, path: Path) -> TrainingMonitor | None:
        """What samples held-out prompts during the training; `None` if it is switched off."""
        options, scratch = self.options, path.with_name("trainer")
        if options.monitor_evals == 0:
            return None
        kinds = [("policy", options.evaluation_temperature)] * options.num_eval_samples

        def sample(rows: list[Row]) -> list[Row]:
            with _whole_model(trainer) as model, trainer.accelerator.autocast(), tqdm(disable=True) as silent:
                samples = generate_completions(
                    model.get_base_model() if is_peft_model(model) else model,
                    trainer.processing_class,
                    [row["prompt"] for row in rows],
                    num_samples=len(kinds),
                    temperature=[temperature for _, temperature in kinds],
                    top_p=options.top_p,
                    max_new_tokens=options.max_new_tokens,
                    batch_size=options.generation_batch_size,
                    seed=self.folder.training.seed,
                    keys=[f"held out/{row['prompt_id']}" for row in rows],  # the same numbers as at the start
                    progress=silent,
                )
            columns = [name for name in rows[0] if name not in ("rewards", "reward_parts", "reward_id")] if rows else []
            return [
                {name: row[name] for name in columns} | _sampled(row["prompt"], of_row, kinds, iteration)
                for row, of_row in zip(rows, samples, strict=True)
            ]

        def score(rows: list[Row]) -> list[Row]:
            try:
                with _without_deepspeed_config():
                    scores = self._score_chunk(rows)
            finally:
                self._rewards = None  # the training needs the memory of reward models
                _free_memory()
            return [row | {"rewards": of_row["rewards"]} for row, of_row in zip(rows, scores, strict=True)]

        def save(step: int) -> None:
            best = scratch / f"best-{step}"
            _sample_by_default(trainer.accelerator.unwrap_model(trainer.model))
            trainer.save_model(str(partial_path(best)))
            if PartialState().is_main_process:
                replace_folder(partial_path(best), best)
                older = {int(x.name.removeprefix("best-")): x for x in scratch.glob("best-*[0-9]")}
                for number in sorted(older)[:-2]:  # the last but one is still the best if this step is killed now
                    shutil.rmtree(older[number])
            PartialState().wait_for_everyone()

        found = path.with_name("monitor.json")
        if PartialState().is_main_process and last_whole_checkpoint(scratch) is None:
            found.unlink(missing_ok=True)  # of a training that starts over
        PartialState().wait_for_everyone()
        path_of_timings = self.folder.path / "timings.jsonl"
        timings = read_jsonl(path_of_timings) if path_of_timings.exists() else []
        seconds = {(x["iteration"], x["stage"]): x["seconds"] for x in timings}
        start = read_jsonl(self.output("held_out", iteration - 1))
        return TrainingMonitor(
            trainer,
            sample,
            score,
            save,
            start,
            found,
            num_evals=options.monitor_evals,
            time_share=options.monitor_time_share,
            num_prompts=options.monitor_prompts,
            stop=options.monitor_stop,
            seconds_before=sum(spent for (number, _), spent in seconds.items() if number == iteration),
            seconds_expected=seconds.get((iteration - 1, "held_out"), 0.0)
            * min(1.0, options.monitor_prompts / len(start)),
        )

    def _save_model(self, trainer: LarPOTrainer, model_path: str, path: Path, kept_step: int | None = None) -> None:
        """
        Saves a whole model that transformers and servers load, an adapter merged into it.

        Args:
            trainer: The trainer.
            model_path: The model that it started from.
            path: Where the model belongs; it is saved beside it.
            kept_step: The step whose weights to keep: `None` for the last, 0 for the model it started from, else what
                the monitor saved.
        """
        partial, scratch = partial_path(path), path.with_name("trainer")
        use_peft = self.folder.model.use_peft
        if trainer.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        weights = scratch / f"best-{kept_step}"
        if kept_step and not weights.is_dir():
            logger.warning(
                f"The weights of step {kept_step} are gone; the model that the training started from is kept."
            )
            kept_step = 0
        if kept_step is None:
            weights = scratch / "adapter" if use_peft else partial
            _sample_by_default(trainer.accelerator.unwrap_model(trainer.model))
            trainer.save_model(str(weights))  # gathers what is sharded
        if not trainer.accelerator.is_main_process:
            return
        if use_peft or kept_step == 0:
            # On one device, as what is sharded cannot be merged
            unset_hf_deepspeed_config()
            kwargs = self._with_model_kwargs(trainer.args).model_init_kwargs
            model = AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
            if kept_step != 0:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, weights).merge_and_unload()
            _sample_by_default(model)
            model.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        elif kept_step is not None:
            shutil.copytree(weights, partial)
        if not any(partial.glob("*.safetensors")):
            raise LarPOError(
                "The weights are sharded and were not gathered. In accelerate's configuration set "
                "`zero3_save_16bit_model: true` (DeepSpeed) or `fsdp_state_dict_type: FULL_STATE_DICT` (FSDP)."
            )
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine

    # Evaluation

    def held_out(self, iteration: int, path: Path) -> None:
        """Samples on held-out prompts, and rewards them."""
        folder, options = self.folder, self.options
        samples = path.with_name("held_out_samples.jsonl")
        if not samples.exists():
            # The same random numbers every time: what differs, differs by the model
            sampled = self.sample(
                folder.held_out,
                [("policy", options.evaluation_temperature)] * options.num_eval_samples,
                samples,
                model_path=folder.model_path(iteration),
                iteration=iteration,
                key="held out",
                description=f"Iteration {iteration}: sampling on held-out prompts"
                if iteration
                else "Start: sampling on held-out prompts",
            )
            if PartialState().is_main_process:
                GrowingFile(samples).finish(sampled)
        PartialState().wait_for_everyone()
        scored = self.score(read_jsonl(samples), path, f"Iteration {iteration}: rewarding held-out")
        if PartialState().is_main_process:
            GrowingFile(path).finish(scored)

    def evaluate(self, iteration: int, path: Path) -> None:
        """Compares the samples on held-out prompts with those of the initial model."""
        rows = read_jsonl(self.output("held_out", iteration))
        divergence = self._divergence_from_start(rows, iteration) if iteration else None
        if PartialState().is_main_process:
            start = rows if iteration == 0 else read_jsonl(self.output("held_out", 0))
            before = read_jsonl(self.output("held_out", iteration - 1)) if iteration else rows
            change = evaluate_rows(rows, before)["gain"]
            write_json(path, evaluate_rows(rows, start) | {"change": change, "kl_from_initial": divergence})

    def _divergence_from_start(self, rows: list[Row], iteration: int) -> dict[str, float] | None:
        """
        Estimate of the KL divergence of the policy from the initial model, in nats per completion.

        The mean of log π_θ - log π_initial over completions that the policy sampled: unbiased at temperature 1.
        """
        lists, counts = [], []
        for row in rows[:_MAX_KL_PROMPTS]:
            sampled = [
                ((completion_text(completion), about["finished"]), (completion, about))
                for completion, about in zip(row["completions"], row["candidates"], strict=True)
                if completion_text(completion).strip()
            ]
            if sampled:
                distinct = list(dict(sampled).values())
                counts.append(list(Counter(key for key, _ in sampled).values()))
                if len(distinct) == 1:  # a list has at least two candidates; the filler is ignored
                    completion, about = distinct[0]
                    filler = _in_form_of(row["prompt"], f"{completion_text(completion)} .")
                    distinct.append((filler, about | {"token_ids": None}))
                lists.append(
                    {name: row[name] for name in ("prompt_id", "prompt")}
                    | {
                        "completions": [completion for completion, _ in distinct],
                        "finished": [about["finished"] for _, about in distinct],
                        "completion_ids": [about.get("token_ids") for _, about in distinct],
                    }
                )
        if not lists:
            return None
        self.close()
        scratch = self.folder.iteration(iteration)
        policy, initial = (
            {x["prompt_id"]: x["ref_logps"] for x in self._log_probabilities(lists, self.folder.model_path(i), scratch)}
            for i in (iteration, 0)
        )
        by_prompt = []
        for row, of_row in zip(lists, counts, strict=True):
            if (name := row["prompt_id"]) in policy:  # it is not where its prompt fills `max_length`
                log_ratios = [p - q for p, q in zip(policy[name], initial[name], strict=True)][: len(of_row)]
                by_prompt.append(sum(x * count for x, count in zip(log_ratios, of_row, strict=True)) / sum(of_row))
        if not by_prompt:
            return None
        error = statistics.stdev(by_prompt) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None
        return {"mean": statistics.fmean(by_prompt), "standard_error": error, "prompts": len(by_prompt)}


@contextlib.contextmanager
def _whole_model(trainer: LarPOTrainer) -> Iterator[PreTrainedModel]:
    """
    The policy so that each process can sample from it on its own: under ZeRO-3 its weights are gathered.

    TRL's `unwrap_model_for_generation` would switch gradient checkpointing off, and on again with other settings, and
    leaves ZeRO-3 without its hooks after an error.
    """
    model, engine = trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.model_wrapped
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        yield model
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)
        try:
            yield model
        finally:
            add_hooks(engine)


@contextlib.contextmanager
def _without_deepspeed_config() -> Iterator[None]:
    """Models loaded inside are whole, in one process alone: under ZeRO-3 transformers would shard them among all."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def _sample_by_default(model: PreTrainedModel) -> None:
    """Servers that take their defaults from the model's folder then sample from the model as it is."""
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 1.0, 1.0, 0


def _dataset_on_disk(rows: list[Row], folder: Path) -> Dataset:
    """The same dataset for all processes, with one cache."""
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        Dataset.from_list(rows).save_to_disk(folder)
    PartialState().wait_for_everyone()
    return Dataset.load_from_disk(str(folder))


def generation_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies such matrices in hardware, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def last_whole_checkpoint(folder: Path) -> str | None:
    """
    The latest checkpoint that was written to its end. A kill in the midst of one leaves it without its last file.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for path in checkpoints:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        shutil.rmtree(path)
    return None


def _end_ids_of(model_path: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    try:
        return end_token_ids(GenerationConfig.from_pretrained(model_path), tokenizer)
    except OSError:  # it has none
        return {tokenizer.eos_token_id} - {None}


def _sampled(prompt: Any, samples: list[Sample], kinds: list[tuple[str, float]], iteration: int) -> Row:
    """The columns `completions` and `candidates` of a prompt. `kinds`: source and temperature of each sample."""
    return {
        "completions": [_completion(prompt, sample.text) for sample in samples],
        "candidates": [
            {
                "iteration": iteration,
                "source": source,
                "temperature": temperature,
                "finished": sample.finished,
                "num_tokens": sample.num_tokens,
            }
            | ({} if sample.token_ids is None else {"token_ids": sample.token_ids})
            for (source, temperature), sample in zip(kinds, samples, strict=True)
        ],
    }


def _completion(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _in_form_of(prompt: Any, completion: Any) -> Any:
    """A completion as text or messages, whichever its prompt is."""
    if isinstance(prompt, str) == isinstance(completion, str):
        return completion
    return _completion(prompt, completion_text(completion))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
