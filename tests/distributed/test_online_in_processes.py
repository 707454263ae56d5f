"""Two processes train online as one does: groups stay whole, and memory is shared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tiny.HAS_ONLINE, reason="OnlineLarPOTrainer needs TRL 1.16"),
]

SHARED = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4}
SETS = {
    "moving reference, memory": SHARED | {"ref_update_steps": 2, "memory_size": 2, "loss_type": ["listmle"]},
    "LoRA": SHARED | {"lora": True},
    "on-policy": SHARED | {"ref_update_steps": 1, "candidate_chunk_size": 3},
}


def test_two_processes_equal_one(tiny_model, tmp_path):
    pytest.importorskip("peft")
    sys.path.insert(0, str(Path(__file__).parent))
    from train_online import main

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    main(tiny_model, one, {name: {**options, "per_device_train_batch_size": 8} for name, options in SETS.items()})
    options = {name: {**options, "per_device_train_batch_size": 4} for name, options in SETS.items()}
    script = str(Path(__file__).with_name("train_online.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, script, tiny_model, str(two), json.dumps(options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in SETS:
        ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, two))
        assert (ours["processes"], theirs["processes"]) == (1, 2)
        for key in ("loss", "grad_norm", "rewards/margins", "list_size"):
            values = [[step[key] for step in found["steps"]] for found in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5), (name, key)
        weights = [load_file(folder / f"{name}.safetensors") for folder in (one, two)]
        for key, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][key], rtol=1e-5, atol=1e-6, msg=key)
