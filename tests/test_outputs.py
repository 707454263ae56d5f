"""`larpo generate` and `larpo reward` never mix what different settings made, and finish what is incomplete."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from small_run import rows_of, write_prompts

from trl_larpo import cli
from trl_larpo.locks import exclusive_lock
from trl_larpo.settings import fingerprint, fingerprints
from trl_larpo.storage import write_jsonl


@pytest.fixture
def reward(project):
    """`larpo reward` for the completions of four prompts."""
    rows = [{"prompt": f"{i}", "responses": ["a", "bae", f"{i} oui"], "mine": i} for i in range(4)]
    write_jsonl(project / "samples.jsonl", rows)
    (project / "run_rewards.py").write_text((project / "run_rewards.py").read_text() + COUNTED)
    flags = ["--samples", "samples.jsonl", "--reward_funcs", "run_rewards:counted", "--output", "rewarded.jsonl"]
    return lambda *more: cli.main(["reward", *map(str, (*flags, *more))])


COUNTED = """
def counted(prompts, completions, mine, **columns):
    with open("calls.txt", "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    return [len(text) + number for text, number in zip(completions, mine)]
"""


def be_killed(path, num_lines):
    """Leaves what a kill leaves of an output after some lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    path.with_name(f"{path.name}.partial-0").write_bytes(b"".join(lines[:num_lines]))


@pytest.mark.parametrize("stop_after", [None, 2])
def test_samples_of_other_settings_are_refused(generate, project, capsys, stop_after):
    assert generate() == 0
    if stop_after is not None:
        be_killed(project / "samples.jsonl", stop_after)
    before = {path: path.read_bytes() for path in project.glob("samples*")}
    for name, value, was in (("temperature", 0.5, [1.0]), ("seed", 7, 0), ("num_samples", 3, 2)):
        assert generate(f"--{name}", value) == 2
        said = f"but 'samples.jsonl' was made with {was}. Undo the change, or take another `output`."
        error = capsys.readouterr().err
        assert f"`{name}` is " in error and said in error
    assert before == {path: path.read_bytes() for path in project.glob("samples*")}


def test_what_changes_speed_alone_and_moved_inputs_are_accepted(generate, project, capsys):
    assert generate() == 0
    whole = (project / "samples.jsonl").read_bytes()
    be_killed(project / "samples.jsonl", 2)
    shutil.copy(project / "prompts.jsonl", project / "moved.jsonl")
    assert generate("--generation_batch_size", 3, "--prompts", "./moved.jsonl") == 0
    assert (project / "samples.jsonl").read_bytes() == whole
    write_prompts(project, ["another prompt"])
    assert generate() == 2
    said = "`prompts` is ['prompts.jsonl'], and what it holds has changed since 'samples.jsonl' was made"
    assert said in capsys.readouterr().err
    assert (project / "samples.jsonl").read_bytes() == whole


def test_a_finished_output_stays_and_an_incomplete_one_is_finished(generate, project, capsys, monkeypatch):
    assert generate() == 0
    path, changed = project / "samples.jsonl", (project / "samples.jsonl").stat().st_mtime_ns
    whole = path.read_bytes()
    assert generate() == 0 and path.stat().st_mtime_ns == changed
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 100 + b"\n" + lines[2][:30] + lines[3])  # the last two run into each other
    capsys.readouterr()
    assert generate() == 0
    assert path.read_bytes() == whole
    said = capsys.readouterr().out
    assert "samples.jsonl has 2 damaged lines, which are dropped. samples.jsonl line 2 is not JSON" in said
    assert "it holds zero bytes" in said and "lacks 3 of 4 prompts, which are done now: '1 why is the dog blue'" in said


def test_files_that_would_be_lost_are_refused(generate, reward, project, capsys):
    (project / "samples.jsonl").unlink()
    (project / "unknown.jsonl").write_text("mine\n")
    assert generate("--output", "unknown.jsonl") == 2
    assert "no unknown.jsonl.settings.json beside it says how it was made" in capsys.readouterr().err
    assert generate("--output", "./prompts.jsonl") == 2
    assert "`output` is 'prompts.jsonl', the file of `prompts`, which would be lost" in capsys.readouterr().err
    write_jsonl(project / "samples.jsonl", [{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]}])
    before = (project / "samples.jsonl").read_bytes()
    (project / "link.jsonl").symlink_to("samples.jsonl")
    assert reward("--output", "link.jsonl") == 2
    assert "the file of `samples`, which would be lost" in capsys.readouterr().err
    assert cli.main(["select", "--candidates", "samples.jsonl", "--output", "samples.jsonl"]) == 2
    assert "the file of `candidates`, which would be lost" in capsys.readouterr().err
    (project / "folder").mkdir()
    assert reward("--output", "folder") == 2
    assert "`output` is 'folder', which is a folder; name a file in it" in capsys.readouterr().err
    assert (project / "samples.jsonl").read_bytes() == before


def test_one_command_writes_an_output(reward, project):
    code = "import sys; from trl_larpo.locks import exclusive_lock; from pathlib import Path\n"
    code += "with exclusive_lock(Path(), sys.argv[1], 'output'): pass"
    with exclusive_lock(project, "rewarded.jsonl", "output"):
        others = [
            subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
            for name in ("rewarded.jsonl", "other.jsonl")
        ]
        assert reward() == 2 and not (project / "rewarded.jsonl").exists()
    assert reward() == 0
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"Another process ({owner} since " in others[0].stderr and "is writing rewarded.jsonl" in others[0].stderr
    assert "take another `output`" in others[0].stderr and others[1].returncode == 0


@pytest.mark.parametrize("flags, said", [
    (["--reward_funcs", "run_rewards:vowels"], "`reward_funcs` is ['run_rewards:vowels'], but 'rewarded.jsonl' was"),
    (["--reward_weights", 2], "`reward_weights` is [2.0], but 'rewarded.jsonl' was made with None"),
])  # fmt: skip
def test_rewards_of_other_judges_are_refused(reward, project, capsys, flags, said):
    assert reward() == 0
    assert reward(*flags) == 2
    assert said in capsys.readouterr().err


def test_rewards_of_other_completions_are_refused_or_made_again(reward, project, capsys):
    assert reward() == 0
    rows = rows_of(project / "samples.jsonl")
    rows[2]["responses"][0] = "something else"
    write_jsonl(project / "samples.jsonl", rows)
    assert reward() == 2
    assert "`samples` is 'samples.jsonl', and what it holds has changed since 'rewarded.jsonl'" in (
        capsys.readouterr().err
    )


def test_saved_rewards_count_for_the_completions_that_they_were_given_for(reward, project):
    """A file that has grown differs from the one asked for: only what is equal is taken from it."""
    from trl_larpo.rewards.options import RewardOptions
    from trl_larpo.rewards.scorer import RewardScorer, saved_scores_of_row
    from trl_larpo.run.candidate_files import read_candidate_pools

    assert reward() == 0
    saved = [saved_scores_of_row(row) for row in rows_of("rewarded.jsonl")]
    saved[3]["digest"] = "of others"
    write_jsonl(project / "again.jsonl.partial-0", saved)
    (project / "calls.txt").unlink()
    pools = read_candidate_pools("samples.jsonl").map(lambda pool: pool.without_rewards())
    options = RewardOptions(reward_funcs=["run_rewards:counted"])
    scored = RewardScorer(options).score(pools, project / "again.jsonl")
    assert [[c.reward for c in pool.candidates] for pool in scored] == [
        row["rewards"] for row in rows_of("rewarded.jsonl")
    ]
    assert set((project / "calls.txt").read_text().split()) == {"3"}


def test_an_incomplete_file_of_rewards_is_finished(reward, project):
    assert reward() == 0
    path, whole = project / "rewarded.jsonl", (project / "rewarded.jsonl").read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    (project / "calls.txt").unlink()
    assert reward() == 0
    assert path.read_bytes() == whole and set((project / "calls.txt").read_text().split()) == {"3"}


def test_names_with_the_signs_of_patterns_are_names(reward, project):
    assert reward("--output", "r[1].jsonl") == 0
    whole = (project / "r[1].jsonl").read_bytes()
    (project / "r[1].jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    (project / "calls.txt").unlink()
    assert reward("--output", "r[1].jsonl") == 0
    assert (project / "r[1].jsonl").read_bytes() == whole and not list(project.glob("*partial*"))
    assert "0" not in (project / "calls.txt").read_text().split()


def test_a_folder_is_known_by_what_it_holds(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 2**23)
    (tmp_path / "b" / "README.md").write_text("about it")
    assert fingerprint(f"{tmp_path}/a/") == fingerprint(str(tmp_path / "b")) != None  # noqa: E711 - the same name
    (tmp_path / "b" / "config.json").write_text(json.dumps({"vocab_size": 3}))
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))
    data = tmp_path / "rows.jsonl"  # of data all counts, of weights a part
    data.write_bytes(b"x" * 2**23)
    before = fingerprint(str(data))
    data.write_bytes(b"x" * (2**22 + 3**10) + b"y" + b"x" * (2**22 - 3**10 - 1))
    assert fingerprint(str(data)) != before
    assert fingerprint("org/model") is fingerprint("module:function") is None


def test_a_folder_called_as_a_reward_is_not_the_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}")
    (tmp_path / "judge" / "config.json").write_text("{}")
    found = fingerprints({"reward_funcs": ["gsm8k", "pairwise:judge"], "prompts": ["gsm8k"]}, ["reward_funcs"])
    assert found.keys() == {"pairwise:judge"}
    assert fingerprints({"prompts": ["gsm8k"]}, ["prompts"]).keys() == {"gsm8k"}


def test_an_edited_reward_function_is_noticed(reward, project, capsys):
    """After a fix in the reward, the same command printed the earlier rewards as its result."""
    assert reward() == 0
    whole = (project / "rewarded.jsonl").read_bytes()
    assert reward() == 0
    assert "rewarded.jsonl was complete already; nothing was computed. Delete it, or take" in capsys.readouterr().out
    source = project / "run_rewards.py"
    source.write_text(source.read_text().replace("len(text) + number", "-len(text)"))
    assert reward() == 2
    said = f"{source}, which holds the reward 'run_rewards:counted', has changed since 'rewarded.jsonl'"
    error = capsys.readouterr().err
    assert said in error and "take another `output`, or delete 'rewarded.jsonl'." in error
    assert (project / "rewarded.jsonl").read_bytes() == whole
    (project / "rewarded.jsonl").unlink()
    sys.modules.pop("run_rewards")
    assert reward() == 0
    assert rows_of("rewarded.jsonl")[0]["rewards"] == [-1.0, -3.0, -5.0]


def test_functions_of_one_file_are_not_one_reward(reward, project, capsys):
    assert reward() == 0
    assert reward("--reward_funcs", "run_rewards:vowels") == 2
    assert "`reward_funcs` is ['run_rewards:vowels'], but 'rewarded.jsonl' was made with" in capsys.readouterr().err
    record = json.loads((project / "rewarded.jsonl.settings.json").read_text())
    assert record["fingerprints"].keys() == {"samples.jsonl", "run_rewards:counted"}
    assert fingerprints({"reward_funcs": ["gsm8k", "none:f", "org/model"]}, ["reward_funcs"]) == {}


@pytest.mark.parametrize("failing, status", [("1 // number", 0), ("1 // 0", 2)], ids=["on one prompt", "on all"])
def test_a_reward_function_that_failed_may_be_fixed(reward, project, caplog, failing, status):
    source = project / "run_rewards.py"
    fixed = source.read_text()
    source.write_text(fixed.replace("len(text) + number", failing))
    assert reward() == status
    source.write_text(fixed)
    sys.modules.pop("run_rewards")
    assert reward() == 0 and reward() == 0
    assert caplog.text.count("which holds the reward 'run_rewards:counted', has changed since 'rewarded.jsonl'") == (
        not status
    )
    rows = rows_of("rewarded.jsonl")
    assert rows[0]["rewards"] == [1.0, 3.0, 5.0] and len(rows) == 4
