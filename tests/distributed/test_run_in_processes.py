"""`larpo run` on two processes: the same candidates as one makes, and one message when a process dies."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_run import change_options, larpo_run, rows_of
from transformers import AutoModelForCausalLM

from trl_larpo.run.small import save_small_reward_model

pytestmark = pytest.mark.slow

ZERO_3 = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "zero3.yaml"
COMMAND = [sys.executable, "-m", "trl_larpo", "run", "--config", "it.yaml"]


def in_processes(**environment):
    return {"env": os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment}


def test_two_processes_with_zero_3_make_what_one_makes(project):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install trl-larpo[deepspeed]`")
    # Two processes fill an incomplete batch with lists from the start, one does not
    change_options(project, num_iterations=1, dataloader_drop_last=True, monitor_time_share=1)
    # The monitor loads the reward model in one process, in the midst of a training that shards what is loaded
    judge = save_small_reward_model(project / "judge")
    change_options(project, reward_funcs=["run_rewards:vowels", str(judge)], reward_weights=[1.0, 0.1])
    assert larpo_run("--output_dir", "one") == 0
    flags = ["--output_dir", "two", "--num_processes", "2", "--accelerate_config", str(ZERO_3)]
    flags += ["--per_device_train_batch_size", "1", "--reward_processes", "1"]
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=900, **in_processes())
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for name in ("samples", "rewarded", "lists", "held_out"):
        one, two = (Path(run) / "iteration_1" / f"{name}.jsonl" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), two
    one, two = (load_file(f"{run}/iteration_1/model/model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    AutoModelForCausalLM.from_pretrained("two/iteration_1/model")  # whole, not shards
    check_monitors()
    one, two = (json.loads(Path(f"{run}/iteration_1/evaluation.json").read_text()) for run in ("one", "two"))
    assert one["kl_from_initial"]["mean"] == pytest.approx(two["kl_from_initial"]["mean"], rel=1e-3)
    assert "Policy: one row for each list" in done.stderr and done.stderr.count("Traceback") == 0
    # Another number of processes would make another step of it
    assert larpo_run("--output_dir", "two", "--num_processes", 4, "--accelerate_config", ZERO_3,
                     "--per_device_train_batch_size", 1) == 2  # fmt: skip


def check_monitors():
    """Held-out prompts that two processes sampled during the training have the rewards that one process found."""
    one, two = (json.loads(Path(f"{run}/iteration_1/monitor.json").read_text())["points"] for run in ("one", "two"))
    assert len(one) > 2 and [point["step"] for point in one] == [point["step"] for point in two]
    for a, b in zip(one, two, strict=True):
        assert a["by_prompt"] == pytest.approx(b["by_prompt"])


def workers(process, stage):
    """Processes of a stage, by their rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if f"--stage {stage}" in " ".join(child.cmdline()) and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_process_that_is_killed_ends_the_run_with_one_message(project, capfd):
    change_options(project, num_iterations=1, num_train_epochs=60, save_steps=5, train_processes=2, logging_steps=50)
    change_options(project, per_device_train_batch_size=1, reference_free=True)  # nothing before it has processes
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **in_processes())
    scratch, deadline = project / "out/iteration_1/trainer", time.monotonic() + 200
    while not list(scratch.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    workers(process, "train")[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - killed < 60
    assert process.returncode == 137
    said = [line for line in errors.splitlines() if line.startswith("larpo: error: ")]
    assert len(said) == 1 and "Traceback" not in errors
    assert re.search(r"The stage 'train' of iteration 1 failed. Process 1 of 2 was ended by SIGKILL", said[0])
    assert "run the same command again to resume" in said[0]
    assert not workers_left(project)
    # Nor does a worker live on when it is the main process that is killed
    process = subprocess.Popen(COMMAND, stderr=subprocess.PIPE, **in_processes())
    deadline = time.monotonic() + 200
    while len(found := workers(process, "train")) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=10)
    assert len(found) == 2 and not psutil.wait_procs(found.values(), timeout=10)[1]
    assert not workers_left(project)
    # It goes on from a checkpoint
    change_options(project, logging_steps=1)
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, **in_processes())
    assert done.returncode == 0, done.stderr[-3000:]
    assert (project / "out/iteration_1/model/model.safetensors").exists()
    steps = [entry["step"] for entry in rows_of(project / "out/iteration_1/training_log.jsonl") if "loss" in entry]
    assert steps[-1] > 5 and 1 not in steps[-10:]


def workers_left(project):
    here = [x for x in psutil.process_iter(["cwd"]) if x.info["cwd"] == str(project)]
    return [x for x in here if x.pid != os.getpid()]


def test_an_error_in_one_process_is_said_once(project):
    rewards = (project / "run_rewards.py").read_text()
    (project / "run_rewards.py").write_text(rewards + "\ndef broken(prompts, completions, **columns): return 1 / 0\n")
    change_options(project, reward_funcs="run_rewards:broken", reward_processes=2)
    done = subprocess.run(
        [*COMMAND, "--generation_processes", "2"], capture_output=True, text=True, timeout=200, **in_processes()
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("larpo: error: ")]
    assert len(said) == 1 and "The reward run_rewards:broken failed: ZeroDivisionError: division by zero" in said[0]


def test_a_slow_process_is_waited_for(tmp_path):
    script, port = Path(__file__).with_name("slow_process.py"), str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, script, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            **in_processes(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert said == ["8 sampled, 8 rewarded\n", "0 sampled, 0 rewarded\n"]


def test_two_machines_train_and_watch_as_one_process_does(project):
    # Two machines on one host: each starts its own process, and they find each other by address and rank
    node = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1"
    node = f"{node} --master_port {free_port()} --node_rank"
    both = f"bash -c '{node} 1 {{stage}} & other=$!; {node} 0 {{stage}} && wait $other'"
    change_options(project, num_iterations=1, num_train_epochs=3, dataloader_drop_last=True, monitor_time_share=1)
    change_options(project, reward_funcs="run_rewards:emptiness")  # which makes few ties
    assert larpo_run("--output_dir", "one") == 0
    flags = ["--output_dir", "two", "--per_device_train_batch_size", "1", "--train_launcher", both]
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=300, **in_processes())
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(f"{run}/iteration_1/model/model.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    check_monitors()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
