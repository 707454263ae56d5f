"""
Two iterations of `larpo run` against three servers that answer badly at random, with a reward that fails at 1 %.

    python tests/faulty_night.py --prompts 2000

One command, no restart. Checks that it ends with exit status 0, that every prompt which a server can answer is sampled,
that all others are named with the reason, and that no sample of the second iteration has the random numbers of the
first. Some prompts ("poison") are answered badly by every server, in all the ways that servers have.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import yaml
from fake_server import FakeServer
from small_run import CONFIG, rows_of, save_talkative_model, write_prompts

from trl_larpo import cli

REWARDS = """
import hashlib

def fails_at_one_percent(prompts, completions, **columns):
    for prompt in prompts:
        if hashlib.sha256(str(prompt).encode()).digest()[0] % 100 == 0:
            raise RuntimeError("the judge is confused")
    return [sum(letter in "aeiou" for letter in completion[-1]["content"]) / 10 for completion in completions]
"""

NUM_SAMPLES, NUM_HELD_OUT, POISONED = 4, 4, 100  # one prompt in so many


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--model", help="folder of a model that ends its answers; by default one is made")
    options = parser.parse_args(argv)
    offers = ("fake", "out/iteration_1/model", "out/iteration_2/model")
    servers = [FakeServer(fault="random", offers=offers).start() for _ in range(3)]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            return _night(Path(folder), options.prompts, options.model, servers)
    finally:
        for server in servers:
            server.close()


def _night(folder: Path, num_prompts: int, model: str | None, servers: list[FakeServer]) -> int:
    model = model or save_talkative_model(folder / "model")
    words = ("poison", "dog")
    texts = [f"{i} why is the {words[i % POISONED != 7]} blue" for i in range(num_prompts + NUM_HELD_OUT)]
    write_prompts(folder, texts)
    (folder / "night_rewards.py").write_text(REWARDS)
    config = CONFIG | {
        "model_name_or_path": model, "num_held_out": NUM_HELD_OUT, "num_samples": NUM_SAMPLES, "memory": "none",
        "reward_funcs": "night_rewards:fails_at_one_percent", "server_urls": [server.url for server in servers],
        "server_requests_in_flight": 8, "num_best": 1, "num_worst": 1, "max_steps": 2, "save_strategy": "no",
        "reference_free": True, "monitor_evals": 0, "stop_on": "none",
    }  # fmt: skip
    (folder / "it.yaml").write_text(yaml.safe_dump(config))
    started, output = time.monotonic(), io.StringIO()
    sys.modules.pop("night_rewards", None)
    with contextlib.redirect_stdout(output):
        status = cli.main(["run", "--config", "it.yaml"])
    print(f"exit status {status} in {time.monotonic() - started:.0f} s")
    if status != 0:
        return 1
    problems = _problems(folder / "out", servers, output.getvalue())
    print("\n".join(problems) or "all that can be sampled is, the rest is named, and no sample is drawn twice")
    return 1 if problems else 0


def _problems(run: Path, servers: list[FakeServer], output: str) -> list[str]:
    problems = []
    prompts = {row["prompt_id"]: row["prompt"] for row in rows_of(run / "prompts.jsonl")}
    poisoned = {name for name, prompt in prompts.items() if "poison" in str(prompt)}
    failing = {
        name for name, prompt in prompts.items() if hashlib.sha256(str(prompt).encode()).digest()[0] % 100 == 0
    } - poisoned
    texts = defaultdict(list)
    for number in (1, 2):
        path = run / f"iteration_{number}"
        for stage, left_out in (("samples", poisoned), ("rewarded", failing)):
            rows = rows_of(path / f"{stage}.jsonl")
            expected = prompts.keys() - poisoned - (failing if stage == "rewarded" else set())
            if Counter(row["prompt_id"] for row in rows) != Counter(expected):
                problems.append(f"iteration {number}: {stage}.jsonl has {len(rows)} prompts of {len(expected)}")
            named = {row["prompt_id"]: row["reason"] for row in rows_of(path / f"{stage}.set_aside.jsonl")}
            if named.keys() != left_out or not all(named.values()):
                problems.append(f"iteration {number}: {len(named)} prompts are named for {stage}, not {len(left_out)}")
            if f"Set aside in iteration {number} ({stage}): {len(left_out)} prompts" not in output:
                problems.append(f"iteration {number}: the output does not say what was set aside ({stage})")
            if stage == "samples":
                for row in rows:
                    texts[row["prompt_id"]].append({completion[0]["content"] for completion in row["completions"]})
                    if len(row["completions"]) != NUM_SAMPLES:
                        problems.append(f"iteration {number}: {row['prompt_id']} has {len(row['completions'])} samples")
        print(
            f"iteration {number}: {len(prompts) - len(poisoned)} sampled, {len(poisoned)} and {len(failing)} set aside"
        )
    seeds = defaultdict(set)
    for asked in (asked for server in servers for asked in server.requests if asked.get("n") == NUM_SAMPLES):
        seeds[json.dumps(asked["messages"])].add(asked["seed"])
    for prompt, of_prompt in seeds.items():  # servers draw sample i with seed + i
        first, second = (sorted(of_prompt) * 2)[:2]
        if len(of_prompt) != 2 or second - first < NUM_SAMPLES:
            problems.append(f"{prompt} was asked for with the seeds {of_prompt}")
    repeated = sum(len(set.intersection(*of_prompt)) for of_prompt in texts.values() if len(of_prompt) == 2)
    if repeated > 3:  # of a fake server's few words
        problems.append(f"{repeated} samples of the first iteration are also in the second")
    kinds = Counter(
        row["reason"].split(": ", 1)[-1][:40] for row in rows_of(run / "iteration_1/samples.set_aside.jsonl")
    )
    print(f"{sum(len(server.requests) for server in servers)} requests; why prompts were set aside: {dict(kinds)}")
    return problems


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
