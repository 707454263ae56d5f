"""From candidate lists to the next policy: the stages `reference` and `train`."""

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel
from trl import ModelConfig, get_peft_config

from ..candidates import CandidateList, CandidatePool
from ..errors import LarPOError
from ..generation.sampler import sample_pools
from ..pools import read_pools
from ..preparation import preparing
from ..prompts import Prompt, Row
from ..storage import StoredRows, iter_jsonl, partial_path, replace_folder, write_jsonl
from ..training.checkpoints import check_optimizer, last_whole_checkpoint, set_options
from ..training.config import LarPOConfig
from ..training.datasets import dataset_on_disk
from ..training.log_probabilities import log_probabilities_under
from ..training.trainer import LarPOTrainer
from ..training.trl_compat import unset_hf_deepspeed_config, whole_model, without_deepspeed_config
from ..waiting import wait_for_all
from .context import RunContext
from .loading import model_init_kwargs, quantization_of
from .monitor import TrainingMonitor
from .timings import seconds_of_stages
from .tracking import guard_trackers

logger = get_logger(__name__)

_SAMPLING_HELD_OUT = ("held_out_samples", "held_out")  # stages

_LIST_COLUMNS = ("prompt_id", "prompt", "completions", "finished", "completion_ids")


def reference(context: RunContext, iteration: int, path: Path) -> None:
    """Log-probabilities of all candidates under the reference, computed once."""
    logps = {}
    if not context.folder.training.reference_free:
        number = iteration - 1 if context.options.reference == "policy" else 0
        logps = log_probabilities(context, lambda: _read_lists(path), number, path.parent)
    if PartialState().is_main_process:
        names = (made.prompt.id for made in _read_lists(path)) if logps else ()
        write_jsonl(path, ({"prompt_id": name, "ref_logps": logps.get(name)} for name in names))


def log_probabilities(
    context: RunContext, lists: Callable[[], Iterable[CandidateList]], model_of: int, folder: Path
) -> dict[str, list[float]]:
    """
    Log-probabilities of candidates under one of the run's models, by the name of their prompt.

    Args:
        context: The run.
        lists: Gives the candidates to score. Those whose prompt fills `max_length` are left out.
        model_of: The iteration that ends with the model; 0: the initial one.
        folder: Where the dataset is kept meanwhile.
    """
    (model_path, revision), training = context.model(model_of), context.folder.training
    scratch = folder / "scoring"
    dataset = _dataset_on_disk(
        lambda: (_columns(made, _LIST_COLUMNS) for made in lists()), scratch, context.options.template_kwargs
    )
    quantization = quantization_of(context.folder.model, training)
    quantized = {} if quantization is None else {"quantization_config": quantization}
    logps = log_probabilities_under(
        model_path,
        dataset,
        training,
        model_init_kwargs(context.folder.model, training) | quantized,
        AutoTokenizer.from_pretrained(model_path, revision=revision),
        description=f"Scoring candidates with {Path(model_path).parent.name if model_of else 'the initial model'}",
    )
    _free_memory()
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    return logps


def train(context: RunContext, iteration: int, path: Path) -> None:
    """Trains on the lists of the iteration."""
    with preparing():
        stage = TrainingStage(context, iteration, path)
    stage.run()
    _free_memory()


class TrainingStage:
    """
    The training of one iteration.

    Args:
        context: The run.
        iteration: The iteration.
        path: Where the trained model belongs.
    """

    def __init__(self, context: RunContext, iteration: int, path: Path):
        self.context, self.iteration, self.path = context, iteration, path
        self.scratch = path.with_name("trainer")
        self.keeps_adapter = context.folder.keeps_adapter
        # One adapter on the initial model, or the whole model that the last iteration ended with
        self.model_path, self.revision = context.model(0 if self.keeps_adapter else iteration - 1)
        self.trainer = make_trainer(
            self.model_path,
            self._arguments(),
            context.folder.model,
            train_dataset=_dataset_on_disk(self._rows, self.scratch / "data", context.options.template_kwargs),
            processing_class=AutoTokenizer.from_pretrained(self.model_path, revision=self.revision),
        )
        if self.keeps_adapter and iteration > 1:
            load_adapter(self.trainer, context.model(iteration - 1)[0])

    def _arguments(self) -> LarPOConfig:
        folder, args = self.context.folder, copy.copy(self.context.folder.training)
        tensorboard = str(self.path.with_name("tensorboard"))
        args.output_dir = str(self.scratch)
        args.run_name = f"{args.run_name or folder.path.name}-iteration-{self.iteration}"
        args.save_total_limit = args.save_total_limit or 2
        if hasattr(args, "logging_dir"):
            args.logging_dir = tensorboard
        os.environ["TENSORBOARD_LOGGING_DIR"] = tensorboard
        return args

    def _rows(self) -> Iterator[Row]:
        """Lists with the reference's log-probabilities, if any; those that it could not score are left out."""
        if self.context.folder.training.reference_free:
            for made in _read_lists(self.path):
                yield _columns(made, (*_LIST_COLUMNS, "rewards"))
            return
        scored = StoredRows([self.path.with_name("ref_logps.jsonl")], key="prompt_id")
        places = {name: place for place, name in enumerate(scored.keys)}
        for made in _read_lists(self.path):
            logps = scored[places[made.prompt.id]]["ref_logps"]
            if logps is not None:
                pairs = zip(made.selected, logps, strict=True)
                selected = [replace(candidate, ref_logp=logp) for candidate, logp in pairs]
                yield _columns(replace(made, selected=selected), (*_LIST_COLUMNS, "rewards", "ref_logps"))

    def run(self) -> None:
        """Trains, or resumes from the last checkpoint, and saves the model and the log."""
        trainer, monitor = self.trainer, self._monitor()
        checkpoint = last_whole_checkpoint(self.scratch)
        if checkpoint is not None:
            sharded_by = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else None
            check_optimizer(checkpoint, sharded_by)
            if PartialState().is_main_process:
                set_options(checkpoint, trainer.args)
            PartialState().wait_for_everyone()
        if self.keeps_adapter and checkpoint is None:
            save_adapter(trainer, self.scratch / "start")  # what is kept if the training does harm
        if monitor is not None:
            trainer.add_callback(monitor)
        guard_trackers(trainer.callback_handler.callbacks, self.context.folder.path)
        trainer.train(resume_from_checkpoint=checkpoint)
        log = [
            {key: value for key, value in entry.items() if not key.startswith("train_") or key == "train_loss"}
            for entry in trainer.state.log_history
            if "held_out/finished" not in entry  # in monitor.json; when it is sampled depends on the machine's speed
        ]
        with preparing():
            self._save_model(None if monitor is None else monitor.kept_step)
        if PartialState().is_main_process:
            write_jsonl(self.path.with_name("training_log.jsonl"), log)
            replace_folder(partial_path(self.path), self.path)
            shutil.rmtree(self.scratch, ignore_errors=True)  # checkpoints: of no use any more
        wait_for_all()

    # Held-out prompts during the training

    def _monitor(self) -> TrainingMonitor | None:
        """What samples held-out prompts during the training; `None` if it is switched off."""
        options, folder = self.context.options, self.context.folder
        found, is_off = self.path.with_name("monitor.json"), options.monitor_evals == 0
        if PartialState().is_main_process and (is_off or last_whole_checkpoint(self.scratch) is None):
            found.unlink(missing_ok=True)  # of a training that starts over, or was sampled before it was killed
            for weights in self.scratch.glob("best-*"):
                shutil.rmtree(weights)
        PartialState().wait_for_everyone()
        if is_off:
            return None
        seconds = seconds_of_stages(folder.path)
        start = list(read_pools(folder.iteration(self.iteration - 1) / "held_out.jsonl"))
        return TrainingMonitor(
            self.trainer,
            self._sample,
            self._score,
            self._save_best,
            start,
            found,
            num_evals=options.monitor_evals,
            time_share=options.monitor_time_share,
            num_prompts=options.monitor_prompts,
            stop=options.monitor_stop,
            seconds_before=sum(
                spent for (number, name), spent in seconds.items() if number == self.iteration and name != "train"
            ),
            seconds_expected=sum(seconds.get((self.iteration - 1, name), 0.0) for name in _SAMPLING_HELD_OUT)
            * min(1.0, options.monitor_prompts / len(start)),
        )

    def _sample(self, prompts: list[Prompt]) -> list[CandidatePool]:
        """Samples of the model as it is, with the random numbers that held-out prompts have everywhere."""
        trainer, folder = self.trainer, self.context.folder
        task = self.context.held_out_task(self.iteration)
        with whole_model(trainer) as model, trainer.accelerator.autocast(), tqdm(disable=True) as silent:
            bare_model = model.get_base_model() if is_peft_model(model) else model
            tokenizer, seed = trainer.processing_class, folder.training.seed
            return sample_pools(bare_model, tokenizer, prompts, task, folder.options, seed, silent)

    def _score(self, pools: list[CandidatePool]) -> list[CandidatePool]:
        try:
            with without_deepspeed_config():
                return self.context.scorer.score_now(pools, self.context.initial_completions())
        finally:
            self.context.scorer.close()  # the training needs the memory of reward models

    def _save_best(self, step: int) -> None:
        best = self.scratch / f"best-{step}"
        _sample_by_default(self.trainer.accelerator.unwrap_model(self.trainer.model))
        self.trainer.save_model(str(partial_path(best)))
        if PartialState().is_main_process:
            replace_folder(partial_path(best), best)
            older = {int(x.name.removeprefix("best-")): x for x in self.scratch.glob("best-*[0-9]")}
            for number in sorted(older)[:-2]:  # the last but one is still the best if this step is killed now
                shutil.rmtree(older[number])
        wait_for_all()

    # The model that is kept

    def _save_model(self, kept_step: int | None = None) -> None:
        """
        Saves a whole model that transformers and servers load, an adapter merged into it, beside where it belongs.

        Args:
            kept_step: The step whose weights to keep: `None` for the last, 0 for the model that the training started
                from, else what the monitor saved.
        """
        trainer, partial = self.trainer, partial_path(self.path)
        use_peft = self.context.folder.model.use_peft
        if trainer.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        if kept_step and not (self.scratch / f"best-{kept_step}").is_dir():
            logger.warning(
                f"The weights of step {kept_step} are gone; the model that the training started from is kept."
            )
            kept_step = 0
        weights = self.scratch / ("start" if kept_step == 0 and self.keeps_adapter else f"best-{kept_step}")
        if kept_step is None:
            weights = self.scratch / "adapter" if use_peft and not self.keeps_adapter else partial
            _sample_by_default(trainer.accelerator.unwrap_model(trainer.model))
            trainer.save_model(str(weights))  # gathers what is sharded
        if not trainer.accelerator.is_main_process:
            return
        if self.keeps_adapter:
            if weights != partial:
                shutil.copytree(weights, partial)
        elif use_peft or kept_step == 0:
            # On one device, as what is sharded cannot be merged
            unset_hf_deepspeed_config()
            kwargs = model_init_kwargs(self.context.folder.model, trainer.args)
            model = AutoModelForCausalLM.from_pretrained(self.model_path, **kwargs)
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
        if not self.keeps_adapter:
            save_processor(self.model_path, self.revision, trainer, partial)


def make_trainer(model_path: str, args: LarPOConfig, model: ModelConfig, **kwargs: Any) -> LarPOTrainer:
    """
    A trainer as `larpo train` and `larpo run` make it.

    Args:
        model_path: The model to train.
        args: Options of the training.
        model: How to load the model, and LoRA.
        kwargs: Further arguments of [`LarPOTrainer`].
    """
    args.model_init_kwargs = model_init_kwargs(model, args)
    return LarPOTrainer(
        model=model_path,
        args=args,
        quantization_config=quantization_of(model, args),
        peft_config=get_peft_config(model),
        **kwargs,
    )


def load_adapter(trainer: LarPOTrainer, folder: str) -> None:
    """Puts the weights of a saved adapter into the trainer's model, whose adapter is new."""
    from peft import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(trainer.model, load_peft_weights(folder, device="cpu"))
    if result.unexpected_keys:
        raise LarPOError(
            f"The adapter in {folder!r} has weights that this one lacks: {', '.join(result.unexpected_keys[:3])}. Was "
            "`lora_target_modules` changed?"
        )


def save_adapter(trainer: LarPOTrainer, folder: Path) -> None:
    """
    Saves the adapter that a training starts from: before the first step it is whole in the first process, whatever
    shards the model, and there is no engine yet that `save_model` could gather weights by.
    """
    if PartialState().is_main_process:
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    PartialState().wait_for_everyone()


def save_processor(model_path: str, revision: str, trainer: LarPOTrainer, folder: Path) -> None:
    """
    Adds the settings of images to a saved model that also reads them: without, servers do not load it.

    Args:
        model_path: The model that the training started from, which has them.
        revision: Of a model on the hub.
        trainer: The trainer of a policy.
        folder: Where the policy is saved, with its tokenizer.
    """
    config = trainer.model.config
    if config.get_text_config() is config:
        return
    try:
        AutoProcessor.from_pretrained(model_path, revision=revision).save_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:
        logger.warning(
            f"The settings of images of {model_path!r} could not be saved beside the trained model "
            f"({' '.join(str(error).split())[:200]}). Copy `preprocessor_config.json` there if a server asks for it."
        )
    trainer.processing_class.save_pretrained(folder)  # as it was in the training


def _read_lists(path: Path) -> Iterator[CandidateList]:
    """The lists to train on, from beside a stage's output."""
    rows = iter_jsonl(path.with_name("lists.jsonl"))
    return (CandidateList.from_row(row) for row in rows if row["problem"] is None)


def _columns(made: CandidateList, names: tuple[str, ...]) -> Row:
    row = made.to_row()
    return {name: row[name] for name in names}


def _dataset_on_disk(rows: Callable[[], Iterable[Row]], folder: Path, chat_template_kwargs: dict[str, Any]) -> Dataset:
    """The rows as a dataset, with what the chat template is to be given."""
    further = {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
    return dataset_on_disk(lambda: (row | further for row in rows()), folder)


def _sample_by_default(model: PreTrainedModel) -> None:
    """Servers that take their defaults from the model's folder then sample from the model as it is."""
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 1.0, 1.0, 0


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
