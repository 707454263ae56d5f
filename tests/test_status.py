"""`larpo status` reads from the files of a run what it is doing, and a command is told when it ends."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from small_run import rows_of

from trl_larpo import cli
from trl_larpo.candidates import Candidate, CandidatePool
from trl_larpo.errors import LarPOError
from trl_larpo.locks import exclusive_lock
from trl_larpo.prompts import Prompt
from trl_larpo.run import loop, status
from trl_larpo.run.notify import notify
from trl_larpo.run.stages import STAGES
from trl_larpo.run.status import PROGRESS, forget_warnings, keep_warnings, note_stage, seconds_left, status_of
from trl_larpo.storage import GrowingFile, partial_files, write_json, write_jsonl


@pytest.fixture
def run(tmp_path):
    """A run of two iterations, the first done, in the second 10 of 40 prompts sampled."""
    folder = tmp_path / "run"
    for number in (0, 1):
        (folder / f"iteration_{number}").mkdir(parents=True)
        for stage in STAGES.values():
            if number or stage.at_start:
                write_json(folder / f"iteration_{number}" / stage.output, {})
    (folder / "run.yaml").write_text(yaml.safe_dump({"num_iterations": 2, "server_urls": None}))
    prompts = [Prompt.of(f"prompt {i}") for i in range(40)]
    write_jsonl(folder / "prompts.jsonl", map(Prompt.to_row, prompts))
    write_json(folder / "prompts.json", {})
    seconds = {name: 50.0 if name.startswith("held_out") else 100.0 for name in STAGES}
    timings = [{"iteration": 1, "stage": name, "seconds": value} for name, value in seconds.items()]
    write_jsonl(folder / "timings.jsonl", timings)
    GrowingFile(folder / "iteration_2/samples.jsonl").add(
        [CandidatePool(prompt, [Candidate("a")]).to_row() for prompt in prompts[:10]]
    )
    return folder


@pytest.mark.parametrize("words", [["status", "RUN"], ["status", "RUN", "--json"], ["--help"], ["status", "--help"]])
def test_light_commands_import_no_library_of_models(run, words):
    """People run `larpo status` in `watch`: torch, TRL and transformers took 12 seconds of the processor each time."""
    heavy = {"torch", "trl", "transformers", "accelerate", "datasets", "pandas", "peft", "numpy", "matplotlib"}
    words = [str(run) if word == "RUN" else word for word in words]
    code = (
        "import contextlib, sys\nfrom trl_larpo import cli\n"
        f"with contextlib.suppress(SystemExit): assert cli.main({words!r}) == 0\n"
        f"print(*sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n" and done.stdout


def test_a_run_at_work(run, capsys):
    write_json(run / PROGRESS, {"iteration": 2, "stage": "generate", "started": time.time() - 50, "done": 5})
    row = {"prompt_id": "x", "prompt": "p", "reason": "r"}
    write_jsonl(run / "iteration_1/samples.set_aside.jsonl", [row, row])
    with exclusive_lock(run):
        assert cli.main(["status", str(run), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.main(["status", str(run)]) == 0
        text = capsys.readouterr().out
    assert [found[x] for x in ("state", "iteration", "num_iterations", "stage")] == ["running", 2, 2, "generate"]
    assert (found["done"], found["total"], found["set_aside"]) == (10, 40, {"iteration_1/samples": 2})
    assert found["per_second"] == pytest.approx(0.1, rel=0.2)  # 5 prompts in 50 seconds
    assert found["seconds_left"] == pytest.approx(30 / found["per_second"] + 600, rel=0.1)
    assert found["disk"]["used"] > 1000 and found["servers"] == found["warnings"] == []
    assert "running: iteration 2 of 2" in text and "generate: 10 of 40, 0.1" in text and "about 15 min" in text
    assert "set aside  2 prompts in iteration_1/samples" in text


def test_sampling_before_the_evaluation_of_the_iteration_before(run):
    # With `server_command` the status was that of `held_out` while the next iteration was sampled for hours
    (run / "iteration_1" / STAGES["held_out"].output).unlink()
    with open(run / "timings.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 0, "stage": "held_out", "seconds": 20.0}) + "\n")
    write_json(run / PROGRESS, {"iteration": 2, "stage": "generate", "started": time.time() - 50, "done": 5})
    with exclusive_lock(run):
        found = status_of(run)
    assert [found[x] for x in ("iteration", "stage", "done", "total")] == [2, "generate", 10, 40]
    assert found["seconds_left"] == pytest.approx(30 / 0.1 + 20 + 600 - 30, rel=0.1)


def test_rewards_are_also_of_prompts_that_are_remembered(run):
    # The total was that of the iteration's own prompts: 70 of 40
    (run / "run.yaml").write_text(yaml.safe_dump({"num_iterations": 2, "server_urls": None, "memory": "all"}))
    prompts = [Prompt.of(f"prompt {i}") for i in (*range(40), *range(35, 75))]  # five are drawn again
    write_jsonl(run / "prompts.jsonl", map(Prompt.to_row, prompts))
    write_json(run / "prompts.json", {"slices": [40, 40]})
    write_jsonl(run / "iteration_2/samples.jsonl", [{"prompt_id": prompt.id} for prompt in prompts[40:]])
    scores = [{"digest": str(i), "prompt_id": str(i), "scores": []} for i in range(70)]
    GrowingFile(run / "iteration_2/rewarded.jsonl", key="digest").add(scores)
    found = status_of(run)
    assert (found["stage"], found["done"], found["total"]) == ("reward", 70, 75)


def test_no_time_is_left_where_more_is_done_than_was_expected(run):
    write_json(run / PROGRESS, {"iteration": 2, "stage": "generate", "started": time.time() - 50, "done": 5})
    more = [{"prompt_id": str(i)} for i in range(60)]  # such as rewards of candidates that were sampled again
    GrowingFile(run / "iteration_2/samples.jsonl").add(more)
    assert status_of(run)["done"] == 70 and seconds_left(run) == 600


def test_a_run_that_stopped_and_one_that_ended(run):
    assert status_of(run)["state"] == "stopped"
    assert seconds_left(run) == 700  # as long as in the iteration before
    for stage in STAGES.values():
        write_json(run / "iteration_2" / stage.output, {})
    found = status_of(run)
    assert (found["state"], found["stage"], seconds_left(run)) == ("finished", None, 0)


def test_files_may_go_while_they_are_looked_at(run, monkeypatch):
    gone = [run / "iteration_2/samples.jsonl.partial-7", run / "iteration_2/lists.jsonl"]
    monkeypatch.setattr(status, "partial_files", lambda path: [*partial_files(path), gone[0]])
    monkeypatch.setattr(status.os, "walk", lambda top: [(str(path.parent), [], [path.name]) for path in gone])
    is_file = type(run).is_file
    monkeypatch.setattr(type(run), "is_file", lambda self: self in gone or is_file(self))
    found = status_of(run)
    assert found["done"] == 10 and found["disk"]["used"] == 0


def test_a_checkpoint_may_be_deleted_while_its_size_is_read(run, monkeypatch):
    checkpoint = run / "iteration_2/trainer/checkpoint-1"
    checkpoint.mkdir(parents=True)
    scandir = os.scandir

    def after_deletion(path="."):
        if os.fspath(path) == str(checkpoint):
            checkpoint.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", after_deletion)
    found = status_of(run)
    assert not checkpoint.exists() and found["disk"]["used"] > 1000


def test_other_folders_with_names_like_those_of_iterations(run):
    row = {"prompt_id": "x", "prompt": "p", "reason": "r"}
    for name in ("iteration_old", "iteration_1_copy", "iteration_1"):
        (run / name).mkdir(exist_ok=True)
        write_jsonl(run / name / "samples.set_aside.jsonl", [row])
    assert status_of(run)["set_aside"] == {"iteration_1/samples": 1}


def test_a_checkpoint_that_is_being_written_or_deleted_does_not_count(run):
    for stage in ("generate", "reward", "select", "reference"):
        write_json(run / "iteration_2" / STAGES[stage].output, {})
    trainer = run / "iteration_2/trainer"
    for number, text in ((9, '{"global_step": 9, "max_steps": 40}'), (10, '{"global_st'), (11, None)):
        (trainer / f"checkpoint-{number}").mkdir(parents=True)
        if text is not None:
            (trainer / f"checkpoint-{number}/trainer_state.json").write_text(text)
    (trainer / "checkpoint-12").mkdir()
    (trainer / "checkpoint-12/trainer_state.json").symlink_to("gone")  # listed, and gone when it is read
    found = status_of(run)
    assert (found["stage"], found["done"], found["total"]) == ("train", 9, 40)


def test_a_line_that_is_being_written_does_not_count(run):
    with open(run / "iteration_2/samples.jsonl.partial-0", "a") as file:
        file.write('{"prompt_id": "half')
    assert status_of(run)["done"] == 10


def test_what_is_not_known_is_not_guessed(run, capsys):
    (run / "timings.jsonl").unlink()
    note_stage(run, 2, STAGES["generate"])
    assert seconds_left(run) is None and capsys.readouterr().out == ""


def test_a_stage_that_was_resumed_took_all_of_its_calls(run):
    # The time that is left was estimated from the last call alone
    def note(iteration, stage, seconds, resumed_at):
        with open(run / "timings.jsonl", "a") as file:
            row = {"iteration": iteration, "stage": stage, "seconds": seconds, "resumed_at": resumed_at}
            file.write(json.dumps(row) + "\n")

    before = seconds_left(run)
    note(1, "train", 300.0, 0)
    note(1, "train", 200.0, 30)  # stopped at step 30
    note(2, "generate", 1.0, 0)  # stopped, and not done: no measure
    assert seconds_left(run) == before - 100 + 500
    (run / "timings.jsonl").write_text((run / "timings.jsonl").read_text().replace('"reward"', '"held_out"'))
    note(1, "reward", 5.0, 30)  # killed before: the time of the other call is not known
    assert seconds_left(run) is None


def test_a_stage_that_fails_leaves_its_time(project, monkeypatch):
    def fails(context, iteration, path):
        raise RuntimeError("no power")

    monkeypatch.setitem(STAGES, "held_out_samples", replace(STAGES["held_out_samples"], function=fails))
    with pytest.raises(RuntimeError):
        cli.main(["run", "--config", "it.yaml"])
    assert [(row["iteration"], row["stage"], row["resumed_at"]) for row in rows_of("out/timings.jsonl")] == [
        (0, "held_out_samples", 0)
    ]


def test_the_log_says_how_much_time_is_left(run, capsys):
    note_stage(run, 2, STAGES["generate"])
    assert "Iteration 2, generate: about 12 min left in the run, until" in capsys.readouterr().out
    assert json.loads((run / PROGRESS).read_text())["done"] == 10


def test_the_last_warnings_are_kept(run):
    handler = keep_warnings(run)
    for number in range(7):
        logging.getLogger("trl_larpo.run").warning(f"warning {number}")
    forget_warnings(handler)
    logging.getLogger("trl_larpo.run").warning("later")
    assert [line.split(" ", 2)[2] for line in status_of(run)["warnings"]] == [f"warning {i}" for i in range(2, 7)]


def test_no_run_is_named(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err


def test_a_command_is_told_of_the_end_and_of_a_failure(project, monkeypatch, capsys):
    command = 'echo "$LARPO_STATE: $LARPO_MESSAGE" >> told.txt'
    flags = ["run", "--config", "it.yaml", "--notify_command", command]
    monkeypatch.setattr(loop, "_run_all", lambda context, mirror: context.folder.path / "report.html")
    assert cli.main(flags) == 0

    def fails(context, mirror):
        raise RuntimeError("no power")

    monkeypatch.setattr(loop, "_run_all", fails)
    with pytest.raises(RuntimeError):
        cli.main(flags)

    def is_stopped(context, mirror):
        # Closing servers may take longer than a command that is told to stop has
        monkeypatch.setattr(context, "close", lambda: (project / "told.txt").open("a").write("closed\n"))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_run_all", is_stopped)
    cli.main(flags)
    assert (project / "told.txt").read_text().splitlines() == [
        "finished: The report is out/report.html.",
        "failed: no power",
        "stopped: KeyboardInterrupt",
        "closed",
    ]


def test_a_command_is_told_once_of_a_start_that_fails(project, monkeypatch, capsys):
    flags = ["run", "--config", "it.yaml", "--notify_command", 'echo "$LARPO_STATE: $LARPO_MESSAGE" >> told.txt']
    flags += ["--mirror", f"file://{project}/store"]

    def fails_at(step):
        def fails(*arguments):
            raise LarPOError(step)

        monkeypatch.setattr(loop, step, fails)

    for step in ("RunContext", "check_run", "_fetch", "exclusive_lock"):  # each comes before those that fail already
        fails_at(step)
        assert cli.main(flags) != 0
    told = ["failed: RunContext", "failed: check_run", "failed: _fetch", "failed: exclusive_lock"]
    assert (project / "told.txt").read_text().splitlines() == told
    # Neither of a dry run nor of options that are wrong in any folder
    assert cli.main([*flags, "--dry_run"]) != 0 and cli.main([*flags, "--num_iterations", "0"]) != 0
    assert (project / "told.txt").read_text().splitlines() == told


def test_a_command_that_fails_is_a_warning(tmp_path, caplog):
    notify("exit 3; curl -u me:passw0rd", tmp_path, "finished", "")
    assert "`notify_command` failed with exit status 3." in caplog.text
    assert "passw0rd" not in caplog.text
