"""
Memory and time of the commands that read a large run folder.

    python examples/benchmarks/run_folder.py --output outputs/run_folder
    python examples/benchmarks/run_folder.py --prompts 2000 --output outputs/run_folder

Makes a folder as `larpo run` leaves it when it is killed shortly before the end of sampling (60,000 prompts, 10 samples
of 1.5 KB each), with a tiny model. Then resumes it to the end of the iteration, and runs the other commands, each in a
process of its own. Memory is the peak of the process beyond that of one which only imports the package. Where the
system tells, it is also given without mapped files (datasets on disk), which the system drops when memory is short.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from transformers import AutoTokenizer

from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.prompts import Prompt
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.options import RunConfig, RunModelConfig, RunTrainingConfig
from trl_larpo.run.small import save_small_model
from trl_larpo.storage import GrowingFile, write_jsonl

REWARD = """
def first_word(prompts, completions, **columns):
    return [(sum(map(ord, [*completion.split(), ""][0])) % 1000) / 100 for completion in completions]
"""

NUM_UNFINISHED = 8  # prompts that are left to be sampled

NUM_HELD_OUT = 8


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Returns of each command peak memory beyond the import, the same without mapped files, in bytes, and seconds."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--prompts", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--characters", type=int, default=1500, help="length of a sample")
    parser.add_argument("--output", required=True, help="folder, which is emptied first")
    options = parser.parse_args(argv)
    output = Path(options.output).resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    started = time.monotonic()
    make(output, options.prompts, options.samples, options.characters)
    size = sum(path.stat().st_size for path in (output / "run").rglob("*") if path.is_file())
    print(f"{options.prompts} prompts × {options.samples}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    rewarded = "run/iteration_1/rewarded.jsonl"
    commands = {
        "import": ["-c", "import trl_larpo.recall, trl_larpo.run.loop"],
        "resume": ["run", "--config", "run.yaml"],
        "status": ["status", "run"],
        "report": ["report", "run"],
        "select": ["select", "--candidates", rewarded, "--output", "lists.jsonl"],
        "recall": ["recall", "--candidates", rewarded, "--threshold", "5", "--output", "recall"],
    }
    results: dict[str, tuple[float, float, float]] = {}
    for name, words in commands.items():
        words = words if name == "import" else ["-m", "trl_larpo", *words]
        peak, own, seconds = measure(words, output, output / f"{name}.log")
        before = results.get("import", (0.0, 0.0, 0.0))
        results[name] = (peak - before[0], own - before[1], seconds)
        gigabytes = f"{results[name][0] / 1e9:6.2f} GB, {results[name][1] / 1e9:6.2f} without mapped files"
        print(f"  {name:8} {gigabytes}, {seconds:7.1f} s", flush=True)
    page = (output / "run" / "report.html").stat().st_size
    print(f"  report.html {page / 1e6:.1f} MB")
    return results


def make(output: Path, num_prompts: int, num_samples: int, num_characters: int) -> None:
    """The folder of a run that was killed shortly before the end of sampling."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    parts = [" ".join(rng.choices(words, k=num_characters // 30)) for _ in range(5000)]
    prompts = [f"{number} {' '.join(rng.choices(words, k=30))}?" for number in range(num_prompts + NUM_HELD_OUT)]
    save_small_model(output / "model")
    write_jsonl(output / "prompts.jsonl", ({"prompt": text} for text in prompts))
    (output / "folder_rewards.py").write_text(REWARD)
    config = {
        "model_name_or_path": "model",
        "output_dir": "run", "prompts": ["prompts.jsonl"], "num_held_out": NUM_HELD_OUT, "num_iterations": 1,
        "num_samples": num_samples, "num_eval_samples": 2, "max_new_tokens": 8,
        "reward_funcs": ["folder_rewards:first_word"],
        "negatives": ["related_prompt"], "num_best": 1, "num_worst": 1, "max_length": 512, "max_steps": 1,
        "per_device_train_batch_size": 2, "reference_free": True, "monitor_evals": 0, "stop_on": ["none"],
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    (output / "run.yaml").write_text(yaml.safe_dump(config))
    parts_of_config = [
        kind(**{x.name: config[x.name] for x in dataclasses.fields(kind) if x.name in config})
        for kind in (RunConfig, RunTrainingConfig, RunModelConfig)
    ]
    folder = RunFolder(*parts_of_config)
    with contextlib.chdir(output):
        folder.prepare_prompts(AutoTokenizer.from_pretrained("model"))
        folder.save_configuration()
    samples = GrowingFile(output / folder.iteration(1) / "samples.jsonl")

    def pool(prompt: Prompt) -> CandidatePool:
        texts = [" ".join([rng.choice(words), *rng.choices(parts, k=5)])[:num_characters] for _ in range(num_samples)]
        return CandidatePool(prompt, [Candidate(text, temperature=1.0, num_tokens=len(text)) for text in texts])

    write_jsonl(samples.partial, (pool(prompt).to_row() for prompt in folder.prompts[:-NUM_UNFINISHED]))


def measure(words: list[str], folder: Path, log: Path) -> tuple[float, float, float]:
    """Peak memory of a Python process, the same without mapped files, in bytes, and seconds."""
    started = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=file, stderr=file)
        ended, own = 0, 0.0
        while not ended:
            own = max(own, _own_memory(process.pid))
            time.sleep(0.1)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        sys.exit(f"{' '.join(words)} failed:\n{log.read_text()[-3000:]}")
    process.returncode = 0
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, own, time.monotonic() - started


def _own_memory(number: int) -> float:
    """Bytes that a process and those that it has started have for themselves; 0 where the system does not tell."""
    try:
        process = psutil.Process(number)
        numbers = [number, *(child.pid for child in process.children(recursive=True))]
        statuses = [Path(f"/proc/{each}/status").read_text() for each in numbers]
    except (OSError, psutil.Error):
        return 0.0
    lines = [line for status in statuses for line in status.splitlines()]
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
