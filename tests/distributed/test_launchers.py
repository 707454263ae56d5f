"""Two processes train as one does: ragged lists, under DDP, DeepSpeed ZeRO and FSDP2, with gloo on a CPU."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train_lists.py")
ONE_PROCESS = {"per_device_train_batch_size": 4}
TWO_PROCESSES = {"per_device_train_batch_size": 2}


def zero(stage, **zero_options):
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, **zero_options},
        }
    }


LAUNCHERS = {
    "DDP": {},
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "FSDP2": {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}},
}


def run(model, result, options, num_processes):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable] if num_processes == 1 else launch
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.run(
        [*command, str(SCRIPT), model, str(result), json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="session")
def one_process(tiny_model, tmp_path_factory):
    """Result of one process for some options; each is run once."""
    folder = tmp_path_factory.mktemp("one-process")

    @functools.cache
    def run_once(options):
        return run(tiny_model, folder / f"{abs(hash(options))}.json", ONE_PROCESS | json.loads(options), 1)

    return run_once


def trajectory(result, *names):
    return [[entry[name] for name in names] for entry in result["steps"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, options",
    [
        *[(launcher, {}) for launcher in LAUNCHERS],
        ("DDP", {"gradient_accumulation_steps": 2}),
        ("DDP", {"precompute_ref_log_probs": True}),
        ("DDP", {"loss_type": "listmle", "gradient_checkpointing": True}),
        *[(launcher, {"candidate_chunk_size": 2}) for launcher in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")],
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_two_processes_train_as_one(tiny_model, tmp_path, one_process, launcher, options):
    if launcher.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install trl-larpo[deepspeed]`")
    # Chunks are compared with the whole
    one = one_process(json.dumps({name: x for name, x in options.items() if name != "candidate_chunk_size"}))
    two = run(tiny_model, tmp_path / "two.json", TWO_PROCESSES | options | LAUNCHERS[launcher], 2)
    names = ["loss", "grad_norm", "rewards/margins", "ranking/accuracy", "list_size", "completions/mean_length"]
    ours, theirs = trajectory(one, *names, "num_tokens"), trajectory(two, *names, "num_tokens")
    assert len(ours) == len(theirs) == 5
    accuracy = names.index("ranking/accuracy")
    for run_of in (ours, theirs):
        del run_of[0][accuracy]  # at the first step scores are 0 but for rounding, and so is their order
    for step, (expected, found) in enumerate(zip(ours, theirs, strict=True)):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), f"step {step}: {names}"
