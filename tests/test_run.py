"""`larpo run` on a tiny model: from prompts to models and page, stopped and resumed, and every mistake in one line."""

import contextlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import REWARDS, change_options, larpo_run, rows_of, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trl_larpo.locks import exclusive_lock
from trl_larpo.run import checks, disk, loop
from trl_larpo.training.trainer import LarPOTrainer

RESULTS = (
    "run.yaml", "prompts.jsonl", "held_out_prompts.jsonl", "iteration_0/held_out.jsonl", "iteration_0/evaluation.json",
    *(f"iteration_{i}/{name}" for i in (1, 2) for name in (
        "samples.jsonl", "rewarded.jsonl", "lists.jsonl", "selection.json", "held_out.jsonl",
    )),
)  # fmt: skip


CARELESS = """
def careless(prompts, completions, rewards, known, **columns):
    assert set(columns) == {"finished", "prompt_id", "candidates", "columns", "reward_id", "source"}
    scores = vowels(prompts, completions)
    for prompt, completion in zip(prompts, completions):
        prompt.append({"role": "assistant", "content": "spoiled"})
        completion[-1]["content"] = "spoiled"
    return scores
"""


@pytest.mark.slow
def test_runs_from_prompts_to_page(project, capsys, monkeypatch, caplog):
    assert larpo_run() == 0
    printed = capsys.readouterr().out
    assert "iteration 2: sample 6 × 4 at temperature 1, reward 24" in printed
    assert "Report: out/report.html" in printed and "Model: out/iteration_2/model" in printed
    out = project / "out"
    assert all((out / name).exists() for name in RESULTS)
    assert not list(out.rglob("*.partial*")) and not list(out.rglob("checkpoint-*"))
    models = [load_file(out / f"iteration_{i}/model/model.safetensors") for i in (1, 2)]
    assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])
    AutoModelForCausalLM.from_pretrained(out / "iteration_2" / "model")
    lists = [row for row in rows_of(out / "iteration_2/lists.jsonl") if row["problem"] is None]
    assert {x["iteration"] for row in lists for x in row["candidates"]} == {1, 2}  # memory
    for row in lists:  # best first, what was cut off behind all others
        assert row["finished"] == sorted(row["finished"], reverse=True)
        rewards = row["rewards"][: sum(row["finished"])]
        assert rewards == sorted(rewards, reverse=True)
    evaluation = json.loads((out / "iteration_2/evaluation.json").read_text())
    assert (
        evaluation["prompts"] == 4 and evaluation["samples"] == 8 and evaluation["kl_from_initial"]["mean"] is not None
    )
    # Once done, the same command has nothing left to do but a new page, and a page that fails is no reason to end
    pages = []

    def fails(path, with_plots):
        pages.append(with_plots)
        raise ValueError("unknown symbol")

    monkeypatch.setattr(loop, "write_report", fails)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl") if path.name != "timings.jsonl"}
    assert larpo_run() == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl") if path.name != "timings.jsonl"}
    assert pages == [True] and "could not be written (ValueError: unknown symbol)" in caplog.text
    assert "`larpo report out` tries again" in caplog.text


def test_the_divergence_is_the_mean_log_ratio_of_the_samples(finished_run, talkative_model):
    tokenizer = AutoTokenizer.from_pretrained(talkative_model)
    paths = (finished_run / "iteration_2/model", talkative_model)
    policy, initial = (AutoModelForCausalLM.from_pretrained(path) for path in paths)

    def log_probability(model, prompt, completion, about):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
        if "token_ids" in about:  # as it was sampled
            ids = start + about["token_ids"]
        with torch.no_grad():
            of_next = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return of_next.gather(1, torch.tensor(ids)[1:, None])[len(start) - 1 :].sum().item()

    by_prompt = []
    for row in rows_of(finished_run / "iteration_2/held_out.jsonl"):
        ratios = [
            log_probability(policy, row["prompt"], c, about) - log_probability(initial, row["prompt"], c, about)
            for c, about in zip(row["completions"], row["candidates"], strict=True)
            if c[0]["content"].strip()
        ]
        by_prompt += [sum(ratios) / len(ratios)] if ratios else []
    found = json.loads((finished_run / "iteration_2/evaluation.json").read_text())["kl_from_initial"]
    assert found["mean"] == pytest.approx(sum(by_prompt) / len(by_prompt), rel=1e-4)
    assert found["prompts"] == len(by_prompt)


def test_the_plan_alone(project, capsys):
    assert larpo_run("--dry_run") == 0
    output = capsys.readouterr().out
    assert "in all     72 samples" in output
    assert "4 held-out prompts are too few to stop a training" in output
    assert not (project / "out").exists()


@pytest.mark.slow
def test_a_training_that_resumes_does_not_tokenize_again(project, monkeypatch):
    change_options(project, num_iterations=1, monitor_evals=0)
    data, files, train = project / "out" / "iteration_1" / "trainer" / "data", [], LarPOTrainer.train

    def killed_first(self, **options):
        files.append({path.name: path.stat().st_mtime_ns for path in data.iterdir()})
        if len(files) == 1:
            raise KeyboardInterrupt
        return train(self, **options)

    monkeypatch.setattr(LarPOTrainer, "train", killed_first)
    with contextlib.suppress(KeyboardInterrupt):
        assert larpo_run() != 0
    assert larpo_run() == 0
    assert files[0] == files[1] and any(name.startswith("cache-") for name in files[0])
    assert not data.exists()


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_ends_with_the_same_files():
    # Three kills here; tests/kill_and_resume.py does as many as it is asked for, and in several processes too
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--kills", "3", "--seed", "3", "--modes", "in_process", "servers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "3 kills: files equal" in done.stdout


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(project):
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_larpo", "run", "--config", "it.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell started us with `&`
    )
    deadline = time.monotonic() + 120
    while not (project / "out/iteration_0/held_out.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "larpo: stopped by SIGINT. Run the same command again to resume; what was saved is kept." in errors
    assert larpo_run() == 0


@pytest.mark.slow
def test_a_changed_configuration_is_refused_by_name(project, capsys):
    assert larpo_run("--num_iterations", 1) == 0
    assert larpo_run("--num_iterations", 1, "--beta", 0.2) == 2
    assert "`beta` is 0.2, but the run in 'out' was made with 2.0. Undo the change" in capsys.readouterr().err
    assert larpo_run("--num_iterations", 1, "--logging_steps", 1) == 0  # changes nothing that comes out
    assert larpo_run("--num_iterations", 2) == 0  # a run may be made longer
    assert (project / "out/iteration_2/model").is_dir()
    (project / "other").mkdir()
    (project / "other/thesis.txt").write_text("mine")
    assert larpo_run("--output_dir", "other") == 2
    assert "holds other files (thesis.txt) and no run" in capsys.readouterr().err


@pytest.mark.slow
def test_dropped_completions_do_not_end_an_evaluation(project):
    change_options(project, max_new_tokens=8, num_eval_samples=4, num_samples=6, num_iterations=1)
    assert larpo_run("--truncated_completions", "drop") == 0
    held_out = rows_of(project / "out/iteration_1/held_out.jsonl")
    finished = [[x["finished"] for x in row["candidates"]] for row in held_out]
    assert any(not all(of_row) for of_row in finished)
    lists = rows_of(project / "out/iteration_1/lists.jsonl")
    assert all(all(row["finished"]) for row in lists)
    assert json.loads((project / "out/iteration_1/evaluation.json").read_text())["kl_from_initial"] is not None


@pytest.mark.slow
def test_cut_off_completions_need_no_reward(project):
    text = """
def silent_on_cut_off(prompts, completions, finished, **columns):
    return [x if ended else None for x, ended in zip(vowels(prompts, completions), finished)]
"""
    (project / "run_rewards.py").write_text(REWARDS + text)
    sys.modules.pop("run_rewards", None)
    change_options(project, max_new_tokens=8, num_samples=6, num_iterations=1)
    assert larpo_run("--reward_funcs", "run_rewards:silent_on_cut_off") == 0
    lists = [row for row in rows_of(project / "out/iteration_1/lists.jsonl") if row["problem"] is None]
    assert any(None in row["rewards"] for row in lists)
    for row in lists:
        assert [reward is not None for reward in row["rewards"]] == row["finished"]


@pytest.mark.slow
def test_a_folder_of_another_version_is_refused(project, capsys):
    assert larpo_run("--num_iterations", 1) == 0
    settings = yaml.safe_load((project / "out/run.yaml").read_text())
    del settings["per_token_scores"]
    (project / "out/run.yaml").write_text(yaml.safe_dump(settings))
    assert larpo_run("--num_iterations", 1) == 2
    assert "made by another version of trl-larpo, which had no option `per_token_scores`" in capsys.readouterr().err


@pytest.mark.parametrize("option, path, output", [
    ("model_name_or_path", "sft", "sft/larpo"), ("prompts", "data", "data/x/../runs"),
    ("reward_funcs", "sft/", "./sft/x"),
])  # fmt: skip
def test_a_run_inside_the_folder_of_its_model_or_prompts_is_refused(
    project, talkative_model, capsys, option, path, output
):
    (project / "data").mkdir()
    shutil.copy(project / "prompts.jsonl", project / "data/train.jsonl")
    shutil.copytree(talkative_model, project / "sft")
    assert larpo_run(f"--{option}", path, "--output_dir", output, "--dry_run") == 2
    said = f"`output_dir` is {str(Path(output))!r}, inside the folder of `{option}`, {path!r}."
    assert said in capsys.readouterr().err


def test_a_beta_for_sums_is_noted(project, capsys):
    assert larpo_run("--dry_run", "--beta", 0.1) == 0
    assert "beta 0.1 is weak for scores per token" in capsys.readouterr().out
    assert larpo_run("--dry_run", "--per_token_scores", "false") == 0
    output = capsys.readouterr().out
    assert "weak" not in output and "beta 0.1" in output


@pytest.mark.slow
def test_a_reward_that_fails_on_one_prompt_keeps_the_others(project, capsys):
    flags = ["--reward_funcs", "run_rewards:fails_on_cat", "--num_iterations", 1]
    assert larpo_run(*flags) == 0
    assert (
        "1 prompts, e.g. '3 why is the dog a cat': The reward run_rewards:fails_on_cat failed: RuntimeError: no cats"
        in (capsys.readouterr().out)
    )
    assert larpo_run(*flags, "--max_failed_share", 0, "--output_dir", "strict") == 2
    error = capsys.readouterr().err
    assert "The reward run_rewards:fails_on_cat failed: RuntimeError: no cats" in error
    kept = list((project / "strict").rglob("*.jsonl.partial-0"))
    assert kept and "Fix the reward and run the same command again" in error
    (project / "run_rewards.py").write_text(REWARDS.replace('raise RuntimeError("no cats")', "pass"))
    sys.modules.pop("run_rewards")
    assert larpo_run(*flags, "--max_failed_share", 0, "--output_dir", "strict") == 0
    assert not list((project / "strict").rglob("*.set_aside.jsonl"))


@pytest.mark.slow
def test_columns_of_the_user_and_careless_rewards_change_nothing(project):
    (project / "run_rewards.py").write_text(REWARDS + CARELESS)
    sys.modules.pop("run_rewards", None)
    change_options(project, num_iterations=1)
    assert larpo_run("--output_dir", "clean") == 0
    rows = rows_of(project / "prompts.jsonl")
    for number, row in enumerate(rows):  # names that this package uses itself
        row |= {"prompt_id": number % 2, "rewards": [9.0] * 4, "known": [True] * 4, "finished": "no", "prompts": "p",
                "completions": ["x"], "candidates": [], "columns": "c", "reward_id": "r", "source": "s"}  # fmt: skip
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert larpo_run("--output_dir", "full", "--reward_funcs", "run_rewards:careless") == 0
    columns = ("prompt_id", "prompt", "completions", "rewards", "candidates")
    for name in ("iteration_0/held_out", "iteration_1/rewarded", "iteration_1/lists", "iteration_1/held_out"):
        clean, full = (rows_of(project / folder / f"{name}.jsonl") for folder in ("clean", "full"))
        for about in (about for row in clean + full for about in row["candidates"]):
            about.pop("reward_parts", None)  # by the name of the reward, which differs
        assert [[row[column] for column in columns] for row in clean] == [
            [row[column] for column in columns] for row in full
        ]
    clean, full = (load_file(f"{folder}/iteration_1/model/model.safetensors") for folder in ("clean", "full"))
    assert all(torch.equal(clean[name], full[name]) for name in clean)


@pytest.mark.slow
def test_negatives_of_every_kind(project):
    names = ["low_temperature", "high_temperature", "related_prompt", "random_prompt"]
    assert larpo_run("--num_iterations", 1, "--num_negatives", 2, "--negatives", *names) == 0
    rows = rows_of(project / "out/iteration_1/samples.jsonl")
    by_id = {row["prompt_id"]: row for row in rows}
    for row in rows:
        sources = [x["source"] for x in row["candidates"]]
        assert sources == ["policy"] * 4 + [name for name in names for _ in range(2)]
        assert [x["temperature"] for x in row["candidates"]][4:8] == [0.5, 0.5, 1.5, 1.5]
        for completion, about in zip(row["completions"][8:], row["candidates"][8:], strict=True):
            assert about["of_prompt"] != row["prompt_id"]
            assert completion in by_id[about["of_prompt"]]["completions"][:4]
    lists = rows_of(project / "out/iteration_1/lists.jsonl")
    assert {x["source"] for row in lists for x in row["candidates"]} >= {"policy", "random_prompt"}


@pytest.mark.slow
def test_rankers_rank_a_merged_pool_together_and_held_out_samples_against_the_initial_models(project):
    """Beside an empty system turn, and negatives that respond to prompts of another set."""
    (project / "other.jsonl").write_text('{"question": "tell me"}\n{"question": "sing"}\n')
    flags = ["--negatives", "random_prompt", "--random_prompts", "other.jsonl", "--random_prompts_column", "question"]
    flags += ["--prompts_as_messages", "--system_prompt", "", "--monitor_evals", 1, "--monitor_time_share", 1]
    assert larpo_run("--reward_funcs", "pairwise:run_rewards:prefer_longer", *flags) == 0
    for row in rows_of("out/iteration_2/rewarded.jsonl"):
        assert [x["source"] for x in row["candidates"]] == [*["policy"] * 4, "random_prompt"] * 2
        lengths = [len(str(c)) for c in row["completions"]]
        expected = [sum(a > b for b in lengths) / 9 for a in lengths]
        assert row["rewards"] == pytest.approx(expected)
        assert row["prompt"][0] == {"role": "system", "content": ""}
    unrelated = {row["prompt_id"]: row for row in rows_of("out/iteration_1/unrelated_samples.jsonl")}
    assert {row["prompt"][-1]["content"] for row in unrelated.values()} <= {"tell me", "sing"}
    for row in rows_of("out/iteration_1/samples.jsonl"):
        source = unrelated[row["candidates"][-1]["of_prompt"]]
        assert row["completions"][-1] in source["completions"]
    initial = {row["prompt_id"]: row["completions"] for row in rows_of("out/iteration_0/held_out.jsonl")}
    means = []
    for iteration in (0, 1, 2):
        for row in rows_of(f"out/iteration_{iteration}/held_out.jsonl"):
            others = [len(str(c)) for c in initial[row["prompt_id"]]]
            assert row["rewards"] == pytest.approx(
                [sum(len(str(c)) > other for other in others) / len(others) for c in row["completions"]]
            )
        means.append(json.loads((project / f"out/iteration_{iteration}/evaluation.json").read_text())["reward"]["mean"])
    assert len(set(means)) > 1, "not the same by construction"
    [start, *_, end] = json.loads((project / "out/iteration_2/monitor.json").read_text())["points"]
    assert start["by_prompt"].keys() == end["by_prompt"].keys()


@pytest.mark.slow
def test_candidates_of_earlier_runs_join_and_are_rewarded_anew(project):
    assert larpo_run("--num_iterations", 1, "--output_dir", "first") == 0
    earlier = "first/iteration_1/rewarded.jsonl"
    flags = ["--num_iterations", 1, "--seed", 7, "--num_held_out", 4, "--earlier_candidates", earlier]
    shutil.copy("prompts.jsonl", "held.jsonl")
    assert larpo_run(*flags, "--output_dir", "same") == 0
    assert larpo_run(*flags, "--output_dir", "anew", "--reward_weights", 10) == 0
    before = {row["prompt_id"]: row for row in rows_of(earlier)}
    joined = 0
    for same, anew in zip(*(rows_of(f"{name}/iteration_1/rewarded.jsonl") for name in ("same", "anew")), strict=True):
        old = before.get(same["prompt_id"])
        if old is not None:
            assert same["completions"][4:] == old["completions"] and same["rewards"][4:] == old["rewards"]
            joined += 1
        assert anew["rewards"] == pytest.approx([10 * reward for reward in same["rewards"]])
    assert joined


@pytest.mark.slow
def test_without_a_reference_nothing_is_scored_with_one(project):
    flags = ["--num_iterations", 1, "--logging_steps", 1]
    assert larpo_run(*flags, "--reference_free", "true", "--target_margin", 0.5) == 0
    assert rows_of("out/iteration_1/ref_logps.jsonl") == []
    losses = [row["loss"] for row in rows_of("out/iteration_1/training_log.jsonl") if "loss" in row]
    assert losses and all(loss > 0 for loss in losses)


@pytest.mark.slow
def test_text_prompts_fresh_slices_and_the_initial_model_as_reference(project):
    rows = [{"prompt": f"{i} the dog", "extra": i} for i in range(15)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    flags = ["--prompt_schedule", "fresh", "--memory", "none", "--reference", "initial", "--temperature", 1.0, 0.7]
    (project / "run_rewards.py").write_text(
        REWARDS + "\ndef extra(prompts, completions, extra, **columns): return extra\n"
    )
    sys.modules.pop("run_rewards", None)
    assert larpo_run(*flags, "--reward_funcs", "run_rewards:vowels", "run_rewards:extra") == 0
    used = [rows_of(project / f"out/iteration_{i}/samples.jsonl") for i in (1, 2)]
    assert [len(rows) for rows in used] == [5, 5]  # 15 less 4 held out, in 2 slices
    assert not {row["prompt"] for row in used[0]} & {row["prompt"] for row in used[1]}
    assert used[1][0]["candidates"][0]["temperature"] == 0.7
    counts = json.loads((project / "out/prompts.json").read_text())
    assert counts == {"read": 16, "duplicates": 1, "too_long": 0, "also_held_out": 0, "unused": 1, "slices": [5, 5],
                      "saved": [10, 4]}  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--attn_implementation", "eager"],
        ["--attn_implementation", "kernels-community/flash-attn2"],
        ["--use_peft"],
        ["--use_peft", "--lora_target_modules", "all-linear", "--use_dora", "--merge_adapter"],
        ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"],
        ["--use_peft", "--lora_target_modules", r"model\.layers\.0\..*q_proj"],
        ["--use_peft", "--lora_modules_to_save", "lm_head"],
    ],
)
def test_attention_and_modules_that_a_model_has(project, flags):
    if "--use_peft" in flags:
        pytest.importorskip("peft")
    assert larpo_run("--dry_run", *flags) == 0


@pytest.mark.slow
def test_lora_is_merged_into_a_whole_model(project, talkative_model):
    flags = ["--merge_adapter", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    assert larpo_run("--num_iterations", 1, *flags) == 0
    before = load_file(Path(talkative_model) / "model.safetensors")
    after = load_file(project / "out/iteration_1/model/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.slow
def test_a_reward_for_emptiness_is_caught_by_the_second_iteration(project, capsys):
    words = ["blue", "green", "here", "cat", "big", "old", "young", "red", "fast", "slow"]
    write_prompts(project, [f"{i} why is the dog {words[i % 10]}" for i in range(44)])
    change_options(
        project,
        reward_funcs="run_rewards:emptiness",
        num_iterations=3,
        num_samples=8,
        max_new_tokens=48,
        generation_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        beta=0.5,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        num_eval_samples=8,
        save_strategy="no",
        stop_on=["length"],
    )
    assert larpo_run() == 2
    output = capsys.readouterr()
    assert "WARNING length in iteration 1: " in output.err
    assert "as `stop_on` asks: length. Response length changed by more than 50 %." in output.err
    assert not (project / "out/iteration_3").exists()
    lengths = [json.loads(path.read_text())["tokens"] for path in sorted((project / "out").glob("*/evaluation.json"))]
    assert lengths[-1] < lengths[0] / 2


@pytest.mark.slow
def test_secrets_stay_out_of_the_folder(project, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    assert larpo_run("--num_iterations", 1, "--hub_token", "hf_very_secret") == 0
    for path in (project / "out").rglob("*"):
        if path.is_file():
            assert b"very_secret" not in path.read_bytes() and b"very-secret" not in path.read_bytes(), path


BAD = {
    "unknown key": (["--num_sample", 4], "Unknown option `--num_sample`. Did you mean `--num_samples`?"),
    "wrong type": (["--num_samples", "many"], "invalid int value: 'many'"),
    "no prompts": (["--prompts", ""], "No prompts: give `prompts`"),
    "missing prompts": (["--prompts", "none.jsonl"], "There is no file or folder 'none.jsonl'"),
    "missing split": (["--prompts_split", "test"], "has no split 'test', only: train"),
    "missing model": (["--model_name_or_path", "./none"], "`model_name_or_path` is './none', and there is no such "
    "folder"),
    "folder without a model": (["--model_name_or_path", "."], "cannot be loaded"),
    "k = 1": (["--num_samples", 1], "`num_samples` is 1; a list needs at least 2"),
    "top + bottom > k": (["--num_best", 3, "--num_worst", 2], r"`num_best` \+ `num_worst` is 5, but a prompt has only"),
    "top alone": (["--num_best", 3], "`num_best` and `num_worst` go together"),
    "greedy and k > 1": (["--temperature", 0], "`temperature=0` decodes greedily"),
    "negative temperature": (["--temperature", -1], "`temperature` is -1"),
    "temperatures": (["--temperature", 1, 1, 1], "`temperature` has 3 numbers for 2 iterations"),
    "top_p": (["--top_p", 0], "`top_p` is 0.0"),
    "max_new_tokens": (["--max_new_tokens", 0], "`max_new_tokens` is 0"),
    "no reward": (["--reward_funcs"], "expected at least one argument|No reward"),
    "reward module": (["--reward_funcs", "nowhere:f"], "cannot be imported: ModuleNotFoundError"),
    "reward function": (["--reward_funcs", "run_rewards:f"], "has no function 'f'"),
    "reward twice": (["--reward_funcs", "gsm8k", "gsm8k"], "names a reward twice"),
    "reward weights": (["--reward_weights", 1, 2], "`reward_weights` has 2 numbers for 1 rewards"),
    "reward folder": (["--reward_funcs", "."], "'.' is no model"),
    "reward without a tokenizer": (["--reward_funcs", "./untokenized"], "The tokenizer of the reward model"),
    "ranker": (["--reward_funcs", "pairwise:ORG/REWARD"], "`reward_funcs`: 'pairwise:ORG/REWARD' is no model: "),
    "reward model": (["--reward_funcs", "ORG/REWARD"], "`reward_funcs`: 'ORG/REWARD' is no model: "),
    "memory": (["--memory", "some"], "`memory` has 'some'|invalid choice: 'some'"),
    "unrelated prompts": (["--random_prompts", "x.jsonl", "--negatives", "random_prompt"], "'x.jsonl'"),
    "negatives": (["--negatives", "hard"], "`negatives` has 'hard'"),
    "iterations": (["--num_iterations", 0], "`num_iterations` is 0"),
    "too few prompts": (["--num_held_out", 10], "too few for 1"),
    "too many held out": (["--num_held_out", 11], "only 10 prompts to hold out"),
    "prompts per iteration": (["--prompts_per_iteration", 7], "There are 6 prompts beside the 4 held out"),
    "column of a reward": (["--reward_funcs", "gsm8k"], "gsm8k needs the column `answer`, and the prompts of"),
    "server answers not": (["--server_urls", "http://127.0.0.1:9/v1"], "does not answer"),
    "server address": (["--server_urls", "127.0.0.1:8000"], "starts with http"),
    "server password": (["--server_urls", "http://me:word@host/v1"], "address with a password"),
    "server command": (["--server_command", "no-such-program {model} {port}"], "there is no program 'no-such-program'"),
    "server command without port": (["--server_command", "serve {model}"], r"has no \{port\}"),
    "health check": (["--stop_on", "fever"], "`stop_on` names 'fever'"),
    "evaluation of the trainer": (["--eval_strategy", "steps"], "`eval_strategy` is"),
    "chunks of adapters with ZeRO-3": (["--accelerate_config", "shards.yaml", "--use_peft", "--merge_adapter",
     "--candidate_chunk_size", 1, "--gradient_checkpointing", "true"], "Set `gradient_checkpointing: false`"),
    "merged without an adapter": (["--merge_adapter"], "`merge_adapter` is for an adapter"),
    "unknown attention": (["--attn_implementation", "foo"], "`attn_implementation` is 'foo'; it must be one of"),
    "attention that is not installed": (
        ["--attn_implementation", "flash_attention_3"], "`attn_implementation` is 'flash_attention_3': "
    ),
    "unknown modules": (
        ["--use_peft", "--lora_target_modules", "nosuch"],
        "`lora_target_modules` is 'nosuch': Target modules nosuch not found in the base model",
    ),
    "4 bits without an adapter": (["--load_in_4bit"], "set `use_peft`, and leave out `merge_adapter`"),
    "4 bits, merged": (["--load_in_4bit", "--use_peft", "--merge_adapter"], "leave out `merge_adapter`"),
    "an adapter and servers": (["--use_peft", "--server_command", "vllm {model} {port}"], "set `merge_adapter: true`"),
    "an adapter and running servers": (["--use_peft", "--server_urls", "http://host/v1"], "are not given the adapter"),
    "an adapter with weights of its own": (
        ["--use_peft", "--use_dora", "--server_command", "vllm {model} {port}"], "takes neither `use_dora` nor"
    ),
    "open routes": (
        ["--server_command", "VLLM_SERVER_DEV_MODE=1 vllm serve {model} --port {port}"], "Add `--host 127.0.0.1`"
    ),
    "reload": (["--server_reload", "sometimes"], "invalid choice: 'sometimes'"),
    "reload of no servers": (["--server_reload", "always"], "`server_reload` is for servers that the run starts"),
    "4 bits, sharded": (["--use_peft", "--load_in_4bit", "--accelerate_config", "shards.yaml"], "Take ZeRO-2, or"),
    "an adapter and FSDP1": (["--use_peft", "--accelerate_config", "fsdp1.yaml"], "set `fsdp_version: 2` in 'fsdp1"),
    "code of a model": (["--trust_remote_code", "true"], "`trust_remote_code` is True in a run: models with code"),
    "revision of a model": (
        ["--server_command", "python {model} {port}", "--model_name_or_path", "ORG/MODEL", "--model_revision", "v2"],
        "Add `--revision v2` to the command",
    ),
    "revision in the command": (
        ["--server_command", "python {model} {port} --revision=v2", "--model_name_or_path", "ORG/MODEL",
         "--model_revision", "v2"], "`model_name_or_path`: 'ORG/MODEL' cannot be loaded",
    ),
    "resume": (["--resume_from_checkpoint", "x"], "`larpo run` resumes on its own"),
    "a reference and none": (["--reference_free", "true", "--reference", "initial"], "`reference` is 'initial', but"),
    "loss": (["--loss_type", "lambdarnak"], "Did you mean 'lambdarank'"),
    "earlier candidates": (["--earlier_candidates", "none.jsonl"], "`earlier_candidates` names 'none.jsonl'"),
    "accelerate config": (["--accelerate_config", "none.yaml"], "`accelerate_config` is 'none.yaml', and there is no"),
    "no accelerate config": (["--accelerate_config", "it.yaml"], "is no configuration file of accelerate"),
    "sharded models": (["--accelerate_config", "shards.yaml"], "set `zero3_save_16bit_model: true` in 'shards.yaml'"),
    "launcher without a stage": (["--train_launcher", "accelerate launch"], r"`train_launcher` has no \{stage\}"),
    "launcher": (["--train_launcher", "no-such-launcher {stage}"], "there is no program 'no-such-launcher'"),
    "launcher beside processes": (["--train_launcher", "x {stage}", "--train_processes", 2], "starts the processes"),
    "processes": (["--generation_processes", 0], "`generation_processes` is 0"),
    "max_list_size beside top": (["--num_best", 1, "--num_worst", 1, "--max_list_size", 3], "has no effect beside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations_are_one_line_before_any_model_is_loaded(project, capsys, monkeypatch, name):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    shards = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}
    (project / "shards.yaml").write_text(yaml.safe_dump(shards))
    fsdp1 = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}
    (project / "fsdp1.yaml").write_text(yaml.safe_dump(fsdp1))
    LlamaConfig().save_pretrained(project / "untokenized")
    flags, message = BAD[name]
    if name in ("server answers not", "revision in the command"):
        pytest.importorskip("openai")
    assert larpo_run(*flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("larpo: error: ")]
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]
    assert not list((project / "out").rglob("samples.jsonl"))


def test_a_dry_run_may_be_on_a_machine_without_the_attention(project, capsys):
    assert larpo_run("--dry_run", "--attn_implementation", "flash_attention_3") == 0
    output = capsys.readouterr()
    assert "in all     72 samples" in output.out
    assert "The run itself would not start on this machine" in output.err


def test_the_guide_names_the_options_that_a_run_refuses():
    guide = (Path(__file__).parents[1] / "docs/running.md").read_text(encoding="utf-8")
    [entry] = [each for each in guide.split("\n- ") if each.startswith("**Not in a run**")]
    named = re.findall(r"`(\w+)`", entry.split("\n\n")[0])
    assert sorted(named) == sorted(checks._REFUSED)


def test_a_disk_too_small_is_found_before_the_start(project, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert larpo_run() == 2
    assert "the disk has 0.0 MiB free, and the run may need" in capsys.readouterr().err


def test_a_disk_that_may_be_too_small_for_samples_is_told(project, capsys, monkeypatch):
    assert larpo_run("--dry_run") == 0
    assert "samples and lists may need" not in capsys.readouterr().err
    monkeypatch.setattr(disk, "bytes_of_candidates", lambda folder: 2**70)
    assert larpo_run("--dry_run") == 0
    assert "samples and lists may need 1099511627776.0 GiB beside" in capsys.readouterr().err


def test_a_model_in_the_home_folder(project, monkeypatch, talkative_model):
    monkeypatch.setenv("HOME", str(project))
    (project / "model").symlink_to(talkative_model)
    change_options(project, model_name_or_path="~/model")
    assert larpo_run("--dry_run") == 0


PACKAGES = {
    "peft": (["--use_peft"], "for `use_peft`"),
    "bitsandbytes": (["--use_peft", "--load_in_4bit"], "for `load_in_4bit` or `load_in_8bit`"),
    "math_verify": (["--reward_funcs", "math"], "for the reward 'math'"),
    "deepspeed": (["--accelerate_config", "zero.yaml"], "for `accelerate_config`"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_before_anything_is_sampled(project, capsys, monkeypatch, package):
    flags, reason = PACKAGES[package]
    (project / "zero.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n")
    find = importlib.util.find_spec
    hidden = SimpleNamespace(find_spec=lambda name: None if name == package else find(name))
    monkeypatch.setattr(checks, "importlib", SimpleNamespace(util=hidden))
    assert larpo_run(*flags, "--dry_run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"The package {package.replace('_', '-')} is missing, {reason}: pip install 'trl-larpo[" in error


def test_yaml_of_the_wrong_type_is_named(project, capsys):
    config = yaml.safe_load((project / "it.yaml").read_text())
    for key, value in (("num_samples", 2.5), ("memory", True), ("reward_funcs", [1])):
        (project / "it.yaml").write_text(yaml.safe_dump(config | {key: value}))
        assert larpo_run() == 2
        shown = value[0] if isinstance(value, list) else value
        assert f"`{key}` is {shown!r}; it must be" in capsys.readouterr().err
    (project / "it.yaml").write_text(yaml.safe_dump(config | {"num_sample": 4}))
    assert larpo_run() == 2
    assert "Unknown option `num_sample` in the YAML file. Did you mean `--num_samples`?" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_in_one_folder_are_refused(project, capsys):
    with exclusive_lock(project / "out"):
        code = "import sys; from trl_larpo.cli import main; sys.exit(main(['run', '--config', 'it.yaml']))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 2 and "is running in out. Wait for it, stop it" in other.stderr
