import functools
import gc
import importlib.metadata
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and no test waits for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices gain nothing from more, also in the processes that tests start
os.environ.pop("WANDB_API_KEY", None)

import pytest

# Fixtures import what is heavy: pytest's main process reads this file, too, and would keep the workers waiting


def pytest_collection_modifyitems(items):
    """What waits for the whole run of a fixture is slow, however short the test itself is."""
    for item in items:
        if "finished_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_loaded():
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the libraries made is not looked through at each of the many collections
    # accelerate reads it whenever it unwraps a model: a fifth of the time of small trainings
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a tiny Llama with its tokenizer."""
    import tiny

    return tiny.save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def _nothing_left_by_other_tests(tmp_path, monkeypatch):
    """No test reads what another one left: results of `map`, and the precision that transformers 4 keeps in the
    environment from one TrainingArguments to the next."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No test cuts the power, so what is written may stay in memory until the disk is ready."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _tiles_for_tiny_vocabularies(monkeypatch):
    """The logits of a tiny model are few; like those of a real one, they are worked out in tiles."""
    from trl_larpo.training import scorer

    monkeypatch.setattr(scorer, "MAX_KEPT_LOGITS", 0)


@pytest.fixture
def config(tmp_path):
    """Makes a LarPOConfig (or another class) fit for a CPU: float32, quiet, deterministic."""
    from trl_larpo import LarPOConfig

    def make(cls=LarPOConfig, **options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return cls(**(defaults | options))

    return make


@pytest.fixture
def trained(tiny_model, config):
    """Trains on a dataset and returns the trainer. Options of the trainer are keywords, those of the config a dict."""
    from trl_larpo import LarPOConfig, LarPOTrainer

    def train(dataset, options=None, cls=LarPOTrainer, config_cls=LarPOConfig, model=None, **trainer_kwargs):
        trainer = cls(
            model=model or tiny_model,
            args=config(config_cls, **(options or {})),
            train_dataset=dataset,
            **trainer_kwargs,
        )
        trainer.train()
        return trainer

    return train


@pytest.fixture(scope="session")
def talkative_model(tmp_path_factory) -> str:
    import small_run

    return small_run.save_talkative_model(tmp_path_factory.mktemp("talkative"))


@pytest.fixture
def project(tmp_path, talkative_model, monkeypatch):
    """A folder with a YAML file, prompts and rewards; the current one."""
    import small_run

    monkeypatch.chdir(tmp_path)
    small_run.write_project(tmp_path, talkative_model)
    yield tmp_path
    sys.modules.pop("run_rewards", None)


@pytest.fixture
def generate(project, talkative_model):
    """`larpo generate` for four prompts."""
    import small_run

    from trl_larpo import cli

    small_run.write_prompts(project, [f"{i} why is the dog blue" for i in range(4)])
    flags = ["--model_name_or_path", talkative_model, "--prompts", "prompts.jsonl", "--use_cpu", "--num_samples", 2]
    flags += ["--max_new_tokens", 4, "--output", "samples.jsonl", "--generation_dtype", "float32"]
    return lambda *more: cli.main(["generate", *map(str, (*flags, *more))])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, talkative_model):
    """Folder of a run that has ended. Not to be changed: make a copy."""
    import small_run

    folder = tmp_path_factory.mktemp("finished")
    small_run.write_project(folder, talkative_model)
    command = [sys.executable, "-m", "trl_larpo", "run", "--config", "it.yaml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "out"
