"""
Trains the same ragged lists in one process and in two, under every launcher, and prints how far apart they end.

    python tests/distributed/compare_launchers.py                    # all of it, some ten minutes on two cores
    python tests/distributed/compare_launchers.py --steps 5 ZeRO-3   # some launchers, fewer steps

All on CPUs, with gloo. The launchers are those of examples/accelerate_configs/, whose files are used as they stand.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("train_lists.py")
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def accelerate(name: str) -> list[str]:
    flags = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    return ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml"), *flags]


# Name: (how it is started, options of the trainer). Those that are started alike may share processes
LAUNCHERS = {
    "DDP": (TORCHRUN, {}),
    "ZeRO-1": (accelerate("zero1"), {}),
    "ZeRO-2": (accelerate("zero2"), {}),
    "ZeRO-3": (accelerate("zero3"), {}),
    "ZeRO-2 JSON": (TORCHRUN, {"deepspeed": str(CONFIGS / "deepspeed" / "zero2.json")}),
    "ZeRO-3 JSON": (TORCHRUN, {"deepspeed": str(CONFIGS / "deepspeed" / "zero3.json")}),
    "ZeRO-3 offload": (TORCHRUN, {"deepspeed": str(CONFIGS / "deepspeed" / "zero3_offload.json")}),
    "FSDP2": (accelerate("fsdp2"), {}),
}

LOSSES = ("pairwise", "contrastive", "lambdarank", "listmle")
COMPARED = ("loss", "grad_norm", "rewards/margins", "ranking/accuracy", "list_size", "completions/mean_length")


def option_sets(steps: int) -> dict[str, dict]:
    """All losses, with and without LoRA; for two processes also with gradient accumulation."""
    return {
        f"{loss}{'-lora' if lora else ''}": {"loss_type": loss, "lora": lora, "max_steps": steps}
        for loss in LOSSES
        for lora in (False, True)
    }


def run(model: str, folder: Path, sets: dict[str, dict], launcher: str | None = None, timeout: float = 900) -> None:
    """
    Trains with each set of options, one after the other in the same processes.

    Args:
        model: Folder of the model.
        folder: Where results are left.
        sets: Options by name.
        launcher: One of [`LAUNCHERS`], with two processes. `None`: one process.

    Raises:
        RuntimeError: With what the processes said, if one of them failed.
    """
    start, more = LAUNCHERS[launcher] if launcher else (None, {})
    start_processes(model, folder, {name: options | more for name, options in sets.items()}, start, timeout)


def start_processes(
    model: str, folder: Path, sets: dict[str, dict], start: list[str] | None, timeout: float = 900
) -> None:
    """As [`run`], with the module that starts the processes and its flags."""
    command = [sys.executable, *(["-m", *start] if start else []), str(SCRIPT), model, str(folder), json.dumps(sets)]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(start or ['one process'])} failed:\n{done.stderr[-4000:]}")


def result_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def steps_of(folder: Path, name: str) -> list[dict]:
    return [entry for entry in result_of(folder, name)["steps"] if "loss" in entry]


def largest_differences(expected: Path, found: Path, name: str, found_name: str | None = None) -> dict[str, float]:
    """Largest relative difference of each compared number over all steps, and of the weights."""
    ours, theirs = steps_of(expected, name), steps_of(found, found_name or name)
    if len(ours) != len(theirs):
        raise RuntimeError(f"{found}: {len(theirs)} steps instead of {len(ours)}")
    differences = {}
    for key in COMPARED:
        first = (
            1 if key == "ranking/accuracy" else 0
        )  # at first all scores are 0 but for rounding, and so is their order
        differences[key] = max(
            abs(a[key] - b[key]) / max(abs(a[key]), 1e-2) for a, b in list(zip(ours, theirs, strict=True))[first:]
        )
    weights = [load_file(folder / f"{x}.safetensors") for folder, x in ((expected, name), (found, found_name or name))]
    if weights[0].keys() != weights[1].keys():
        raise RuntimeError(f"{found}: other weights: {sorted(weights[0].keys() ^ weights[1].keys())[:4]}")
    differences["weights"] = max(
        ((a.float() - weights[1][key].float()).norm() / a.float().norm().clamp(min=1e-6)).item()
        for key, a in weights[0].items()
    )
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("launchers", nargs="*", choices=[*LAUNCHERS, []], help="by default all")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = tiny.save_tiny_model(folder / "model")
        sets = option_sets(options.steps)
        one = {name: x | {"per_device_train_batch_size": 4} for name, x in sets.items()}
        run(model, folder / "one", one)
        print(f"{options.steps} steps of 4 ragged lists; largest relative difference from one process\n")
        names = (*COMPARED[:4], "weights")
        print(f"{'launcher':16} {'options':28}" + "".join(f"{name:>18}" for name in names))
        for launcher in options.launchers or LAUNCHERS:
            started = time.monotonic()
            two = {name: x | {"per_device_train_batch_size": 2} for name, x in sets.items()}
            two |= {
                f"{name}-accumulation": x | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
                for name, x in sets.items()
            }
            run(model, folder / launcher, two, launcher)
            for name in two:
                differences = largest_differences(
                    folder / "one", folder / launcher, name.removesuffix("-accumulation"), name
                )
                worst = max(worst, *(differences[x] for x in ("loss", "grad_norm", "weights")))
                print(f"{launcher:16} {name:28}" + "".join(f"{differences[x]:18.1e}" for x in names), flush=True)
            ran = result_of(folder / launcher, next(iter(two)))["distributed"]
            stage = "" if ran["zero_stage"] is None else f", ZeRO stage {ran['zero_stage']}"
            what = f"{ran['processes']} processes, {ran['kind']}{stage}, {ran['share']:.0%} of the weights in each"
            print(f"{'':16} {what}; {time.monotonic() - started:.0f} s")
    print(f"\nLargest difference of a loss, a gradient norm or the trained weights: {worst:.1e}")
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
