"""A run's copy in an object store: a machine that comes later goes on from it, and trouble does not stop a run."""

import json
import shutil
import time
from types import SimpleNamespace

import fsspec
import pytest
from small_run import change_options, larpo_run, rows_of

from trl_larpo import ConfigError, LarPOError
from trl_larpo.run import loop
from trl_larpo.run.candidate_files import read_candidate_pools
from trl_larpo.run.mirror import Mirror
from trl_larpo.run.status import status_of
from trl_larpo.training.datasets import load_splits


@pytest.mark.slow
def test_another_machine_goes_on_where_the_first_one_ended(project, capsys):
    change_options(project, mirror=f"file://{project}/store/run")
    assert larpo_run("--num_iterations", 1) == 0
    files = {path.relative_to(project / "out").as_posix() for path in (project / "out").rglob("*") if path.is_file()}
    assert "iteration_1/model/model.safetensors" in files
    before = (project / "out/iteration_1/samples.jsonl").read_bytes()
    shutil.move(project / "out", project / "gone")
    assert larpo_run() == 0  # two iterations now
    assert "Fetched" in capsys.readouterr().out
    assert (project / "out/iteration_1/samples.jsonl").read_bytes() == before
    timings = [(row["iteration"], row["stage"]) for row in rows_of(project / "out/timings.jsonl")]
    assert timings.count((1, "train")) == 1 and timings.count((2, "train")) == 1  # the first was not done again
    assert (project / "store/run/iteration_2/model/model.safetensors").exists()
    assert not list((project / "store").rglob("*.partial*")) and not list((project / "store").rglob(".lock"))


def test_a_copy_that_was_broken_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "iteration_1").mkdir(parents=True)
    (folder / "run.yaml").write_text("a: 1")
    mirror = Mirror(folder, "memory://broken/run")
    assert mirror.push() == 1 and mirror.push() == 0
    for name in ("one", "two"):
        (folder / f"iteration_1/{name}.jsonl").write_text("{}\n")
    put = mirror.files.put_file

    def put_one_only(source, target):
        if "two" in target:
            raise ConnectionError
        put(source, target)

    monkeypatch.setattr(mirror.files, "put_file", put_one_only)
    with pytest.raises(ConnectionError):
        mirror.push()
    assert fsspec.filesystem("memory").exists("/broken/run/iteration_1/one.jsonl")
    other = Mirror(tmp_path / "other", "memory://broken/run")
    assert other.fetch() == 1 and not (tmp_path / "other/iteration_1").exists()
    monkeypatch.setattr(mirror.files, "put_file", put)
    assert mirror.push() == 1  # what was left
    assert Mirror(tmp_path / "third", "memory://broken/run").fetch() == 3
    assert other.fetch() == 0  # has a run already


def test_a_restart_copies_what_is_new_alone(tmp_path):
    folder, url = tmp_path / "run", "memory://restarted/run"
    folder.mkdir()
    for name in ("run.yaml", "a.jsonl"):
        (folder / name).write_text("a: 1")
    assert Mirror(folder, url).push() == 2
    assert Mirror(folder, url).push() == 0
    (folder / "b.jsonl").write_text("{}")
    assert Mirror(folder, url).push() == 1
    assert Mirror(tmp_path / "other", url).fetch() == 3
    assert Mirror(tmp_path / "other", url).push() == 0
    fsspec.filesystem("memory").rm("/restarted", recursive=True)
    assert Mirror(folder, url).push() == 3, "the store has lost them"
    assert Mirror(folder, "memory://another/run").push() == 3
    (folder / ".mirrored.json").write_text("")
    assert Mirror(folder, url).push() == 3, "damaged: what was copied is not known"
    assert not [name for name in fsspec.filesystem("memory").find("/restarted") if "mirrored" in name]


def test_deleted_files_are_not_fetched(tmp_path):
    folder, url = tmp_path / "run", "memory://deleted/run"
    folder.mkdir()
    for name in ("run.yaml", "samples.set_aside.jsonl"):
        (folder / name).write_text("{}")
    mirror = Mirror(folder, url)
    assert mirror.push() == 2
    (folder / "samples.set_aside.jsonl").unlink()
    assert mirror.push() == 0 and Mirror(tmp_path / "second", url).fetch() == 1
    (folder / "samples.set_aside.jsonl").write_text("{}")
    assert mirror.push() == 1
    (folder / "samples.set_aside.jsonl").unlink()
    assert Mirror(folder, url).push() == 0 and Mirror(tmp_path / "third", url).fetch() == 1, "after a restart"
    assert [path.name for path in (tmp_path / "third").glob("[!.]*")] == ["run.yaml"]


def write_files(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("change", [{"samples": "new"}, {"run": "b: 1"}], ids=["new file", "new version"])
def test_work_of_another_machine_is_not_overwritten(tmp_path, change):
    first, second, url = tmp_path / "first", tmp_path / "second", f"memory://newer/{'-'.join(change)}"
    write_files(first, run="a: 1")
    Mirror(first, url).push()
    other = Mirror(second, url)
    other.fetch()
    Mirror(first, url).check_is_not_newer()  # nothing new yet
    write_files(second, **change)
    assert other.push() == 1
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"newer work of another machine.* Start with an empty `output_dir`"):
            Mirror(first, url).check_is_not_newer()
    Mirror(second, url).check_is_not_newer()
    Mirror(tmp_path / "third", url).fetch()
    Mirror(tmp_path / "third", url).check_is_not_newer()
    Mirror(first, f"{url}-other").check_is_not_newer()


def test_a_machines_own_copy_is_not_newer(tmp_path, monkeypatch):
    folder, url = tmp_path / "run", "memory://own/run"
    write_files(folder, run="a: 1", samples="{}")
    Mirror(folder, url).check_is_not_newer()  # nothing there
    mirror = Mirror(folder, url)
    mirror.push()
    (folder / "samples.yaml").unlink()
    write_files(folder, scores="{}")
    Mirror(folder, url).check_is_not_newer()  # files deleted and made since
    pipe = mirror.files.pipe_file

    def is_killed(name, content):
        pipe(name, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.files, "pipe_file", is_killed)
    with pytest.raises(KeyboardInterrupt):
        mirror.push()
    monkeypatch.setattr(mirror.files, "pipe_file", pipe)
    Mirror(folder, url).check_is_not_newer()
    # What was copied and pushed is not known any more: names tell
    (folder / ".mirrored.json").unlink()
    Mirror(folder, url).check_is_not_newer()
    (folder / "scores.yaml").unlink()
    with pytest.raises(ConfigError, match=r"e\.g\. scores\.yaml; the run in"):
        Mirror(folder, url).check_is_not_newer()
    pipe("/own/run/mirror.json", b"[")
    Mirror(folder, url).check_is_not_newer()  # damaged: all is copied again


def test_a_run_in_an_old_folder_is_refused_at_the_start(project, capsys):
    store = fsspec.filesystem("memory")
    store.pipe_file("/refused/run/mirror.json", json.dumps(["run.yaml", "iteration_1/samples.jsonl"]).encode())
    (project / "out").mkdir()
    (project / "out/run.yaml").write_text("a: 1")
    assert larpo_run("--mirror", "memory://refused/run") == 2
    said = capsys.readouterr().err
    assert "memory://refused/run has newer work of another machine, e.g. iteration_1/samples.jsonl" in said
    assert "cannot be read" not in said


@pytest.mark.parametrize("name", ["../outside.jsonl", "a/../../outside.jsonl", "/tmp/outside.jsonl", 3])
def test_an_index_of_files_outside_the_folder_is_refused(tmp_path, name):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bad/run/mirror.json", json.dumps(["run.yaml", name]).encode())
    store.pipe_file("/bad/outside.jsonl", b"{}")
    with pytest.raises(ConfigError, match="which is not in the folder of the run"):
        Mirror(tmp_path / "run", "memory://bad/run").fetch()
    assert not (tmp_path / "run").exists() and not (tmp_path / "outside.jsonl").exists()


@pytest.mark.slow
def test_a_store_out_of_reach_does_not_stop_the_run(project, monkeypatch):
    push, page = Mirror.push, project / "out/report.html"
    monkeypatch.setattr(Mirror, "push", lambda self: push(self) if page.exists() else out_of_reach())
    assert larpo_run("--num_iterations", 1, "--mirror", "memory://out-of-reach") == 0
    said = [
        warning for warning in status_of("out")["warnings"] if "`mirror`: ConnectionError: no route The run" in warning
    ]
    assert len(said) == 1, "once, of all the stages of a night"


def out_of_reach(*arguments):
    raise ConnectionError("no route")


def fails_for_two_pauses(monkeypatch, name):
    """A method of mirrors that works after two pauses. Returns the seconds of the pauses."""
    pauses, method = [], getattr(Mirror, name)
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: time.monotonic() + sum(pauses))
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(Mirror, name, lambda self: method(self) if len(pauses) >= 2 else out_of_reach())
    return pauses


@pytest.fixture
def mirrored(project, finished_run):
    """Runs that have ended, with a mirror that has nothing of them yet."""
    shutil.copytree(finished_run, project / "out")
    told = 'echo "$LARPO_STATE: $LARPO_MESSAGE" >> told.txt'
    return lambda *flags: larpo_run("--mirror", f"file://{project}/store", "--notify_command", told, *flags)


def test_the_last_push_is_tried_again(project, mirrored, monkeypatch):
    pauses = fails_for_two_pauses(monkeypatch, "push")
    assert mirrored() == 0 and pauses == [5, 10]
    assert (project / "store/iteration_2/model/model.safetensors").exists()


def test_the_last_push_before_a_stop_is_tried_again(project, mirrored, monkeypatch, capsys):
    pauses = fails_for_two_pauses(monkeypatch, "push")
    assert mirrored("--stop_on", "any") == 2 and pauses == [5, 10]
    assert "Stopped after iteration 1" in capsys.readouterr().err
    assert (project / "store/iteration_1/model/model.safetensors").exists()


def test_a_run_whose_newest_files_are_in_no_mirror_is_not_finished(project, mirrored, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "push", out_of_reach)
        patched.setattr(loop, "_SECONDS_OF_RETRIES", 0.0)
        assert mirrored() == 2
    said = f"The run has ended. But the newest files are not in the mirror file://{project}/store (ConnectionError: no "
    assert said in capsys.readouterr().err and (project / "told.txt").read_text().startswith(f"failed: {said}")
    assert not (project / "store").exists()
    assert mirrored() == 0, "the same command copies them"
    assert (project / "store/iteration_2/model/model.safetensors").exists()
    assert (project / "told.txt").read_text().splitlines()[1:] == ["finished: The report is out/report.html."]


def test_a_restart_waits_for_the_store(project, mirrored, monkeypatch, capsys):
    pauses = fails_for_two_pauses(monkeypatch, "check_is_not_newer")
    assert mirrored() == 0 and pauses == [5, 10]
    monkeypatch.setattr(Mirror, "check_is_not_newer", out_of_reach)
    assert mirrored() == 2 and sum(pauses[2:]) == 5 + 10 + 20 + 40 + 80
    assert f"file://{project}/store cannot be read: ConnectionError: no route" in capsys.readouterr().err


def test_a_first_start_does_not_wait_for_the_store(project, monkeypatch, capsys):
    monkeypatch.setattr(Mirror, "fetch", out_of_reach)
    monkeypatch.setattr(loop, "_retry", lambda work: pytest.fail("the address may be wrong"))
    assert larpo_run("--mirror", "memory://out-of-reach") == 2  # said before time is spent
    assert "memory://out-of-reach cannot be read: ConnectionError: no route" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nowhere://bucket/run", "s3://bucket/run"])
def test_unknown_or_missing_protocols_are_named(project, capsys, url):
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed")
    assert larpo_run("--mirror", url) == 2
    assert f"`mirror`: {url!r} cannot be used: " in capsys.readouterr().err


def test_prompts_and_candidates_from_urls(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n")
    assert load_splits(f"file://{tmp_path}/rows.jsonl")["train"][0] == {"prompt": "p"}
    candidates = {"prompt": "p", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
    (tmp_path / "candidates.jsonl").write_text(json.dumps(candidates) + "\n")
    [pool] = read_candidate_pools(f"file://{tmp_path}/candidates.jsonl")
    assert [(c.completion, c.reward) for c in pool.candidates] == [("a", 1.0), ("b", 2.0)]
    for url, message in ((f"file://{tmp_path}/none.jsonl", "cannot be read"), ("file:///x.txt", "none of the kinds")):
        with pytest.raises(LarPOError, match=message):
            load_splits(url)
