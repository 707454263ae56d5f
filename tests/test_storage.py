"""Files appear whole, appended lines survive, and nobody else may enter a folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from trl_larpo import DataError, LarPOError, storage
from trl_larpo.full_disk import explain_full_disk
from trl_larpo.storage import (
    GrowingFile,
    StoredRows,
    read_jsonl,
    write_jsonl,
    write_text,
)

HOSTILE = [{"text": "line\u2028separator \x85 \x0b \r\n tab\t"}, {"text": "\ud800 alone"}, {"text": "🦜 مرحبا"}]


def test_any_text_comes_back(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", HOSTILE)
    assert read_jsonl(tmp_path / "a.jsonl") == HOSTILE
    growing = GrowingFile(tmp_path / "b.jsonl")
    growing.add(HOSTILE)
    assert list(GrowingFile(tmp_path / "b.jsonl").rows) == HOSTILE


def test_growing_file_drops_a_line_that_was_not_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    GrowingFile(path).add([{"i": 1}, {"i": 2}])
    with open(GrowingFile(path).partial, "ab") as file:
        file.write(b'{"i": 3')
    again = GrowingFile(path)
    assert list(again.rows) == [{"i": 1}, {"i": 2}] and not path.exists()
    again.add([{"i": 4}])
    assert [row["i"] for row in GrowingFile(path).rows] == [1, 2, 4]
    GrowingFile.finish(path, GrowingFile(path).rows)
    assert [row["i"] for row in read_jsonl(path)] == [1, 2, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_stored_rows_are_read_when_they_are_asked_for(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = [{"prompt_id": f"{i}\u2028é", "text": "x" * i} for i in range(5)]
    write_jsonl(first, rows[:3])
    second.write_text('\n{"text": "xxx", "prompt_id": "3\u2028é"}\r\n' + json.dumps(rows[4], ensure_ascii=False))
    stored = StoredRows([first, second], key="prompt_id")
    assert stored.keys == [row["prompt_id"] for row in rows] and list(stored) == rows
    assert (stored[-1], stored[1:3], len(stored)) == (rows[-1], rows[1:3], 5)
    assert len(StoredRows([second], growing=True)) == 1  # a line that has not ended is not there yet
    first.write_text('{"prompt_id": "0"}\n{"prompt_id": "1", \n')
    damaged = StoredRows([first], key="prompt_id")
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is not JSON"):
        damaged[1]
    with pytest.raises(DataError, match=r"b\.jsonl line 2 has no column `id`"):
        StoredRows([second], key="id")


def test_an_unfinished_line_longer_than_a_block_is_cut_off(tmp_path):
    file = GrowingFile(tmp_path / "rows.jsonl")
    file.add([{"i": 1}])
    with open(file.partial, "ab") as opened:
        opened.write(b'{"i": "' + b"x" * 200_000)
    GrowingFile(tmp_path / "rows.jsonl").add([{"i": 2}])
    assert [row["i"] for row in GrowingFile(tmp_path / "rows.jsonl").rows] == [1, 2]


def test_rows_are_there_at_once_and_synced_together(tmp_path, monkeypatch):
    """To sync takes milliseconds, and tenths of a second on some network disks, in which no request would be sent."""
    path, clock, synced = tmp_path / "rows.jsonl", [100.0], []
    time_to_sync = [0.001]

    def fsync(descriptor):
        synced.append(len(path.with_name("rows.jsonl.partial-0").read_text().splitlines()))
        clock[0] += time_to_sync[0]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    file = GrowingFile(path)
    for number in range(100):
        file.add([{"i": number}])
        assert len(GrowingFile(path).rows) == number + 1
        clock[0] += 0.01
    assert synced == [1, 51]
    file.sync()
    assert synced == [1, 51, 100]
    time_to_sync[0] = 0.2  # a slow disk takes a twentieth of the time
    clock[0] += 1
    for number in range(100, 1000):
        file.add([{"i": number}])
        clock[0] += 0.01
    assert synced[3:] == [101, 501, 901]


def test_what_was_added_survives_a_kill(tmp_path):
    code = (
        "import os, pathlib, signal, sys; from trl_larpo.storage import GrowingFile\n"
        "file = GrowingFile(pathlib.Path(sys.argv[1]))\n"
        "for i in range(20): file.add([{'i': i}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "rows.jsonl"], check=False)
    assert list(GrowingFile(tmp_path / "rows.jsonl").rows) == [{"i": i} for i in range(20)]


def test_shares_of_several_processes_are_read_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    GrowingFile(path, share=0).add([{"i": 0}])
    GrowingFile(path, share=1).add([{"i": 1}])
    assert sorted(row["i"] for row in GrowingFile(path).rows) == [0, 1]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LarPOError, match=r"The disk is full.*run the same command again"):
        write_text(path, "new")
    with pytest.raises(LarPOError, match="The disk is full"):
        GrowingFile(tmp_path / "b.jsonl").add([{"i": 1}])
    assert path.read_text() == "old"


def test_other_errors_of_a_full_disk_are_said_too(tmp_path, monkeypatch):
    with pytest.raises(LarPOError, match=r"The disk is full: .* Free some space"), explain_full_disk(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    with pytest.raises(LarPOError, match="The disk is full"), explain_full_disk(tmp_path):
        raise RuntimeError("I/O error: Disk quota exceeded (os error 122)")
    with pytest.raises(RuntimeError, match="something else"), explain_full_disk(tmp_path):
        raise RuntimeError("something else")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(LarPOError, match="The disk is full"), explain_full_disk(tmp_path):
        raise RuntimeError("unexpected pos 72128 vs 72020")  # as torch says it


@pytest.mark.parametrize("error", [None, RuntimeError("download failed")], ids=["alone", "wrapped"])
def test_a_full_disk_elsewhere_is_named(tmp_path, error):
    """E.g. of the cache in the home directory."""
    run, cache = tmp_path / "run", tmp_path / "cache/model.incomplete"
    run.mkdir()
    with pytest.raises(LarPOError) as said, explain_full_disk(run):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(cache))
        except OSError as full:
            raise (error or full) from full
    text = "RuntimeError: download failed" if error else f"OSError: [Errno 28] No space left on device: '{cache}'"
    assert str(said.value).startswith(f"The disk is full: {cache} cannot be written to ({text}). Free some space")


@pytest.mark.parametrize("names, more", [(["run/a.jsonl"], ""), ([], ", or a folder of caches or temporary files,")])
def test_a_full_disk_is_that_of_the_run_or_unknown(tmp_path, names, more):
    """An error of `write` knows no file."""
    (tmp_path / "run").mkdir()
    with pytest.raises(LarPOError) as said, explain_full_disk(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device", *(str(tmp_path / name) for name in names))
    assert f"The disk is full: {tmp_path / 'run'}{more} cannot be written to (OSError: " in str(said.value)


@pytest.mark.parametrize("text, message", [("{", "line 1 is not JSON"), ('{"a": 1}\n[1]', "line 2 is list")])
def test_bad_lines_are_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_jsonl(tmp_path / "a.jsonl")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_lines_are_json_of_their_own(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [{"a": 1}, {"a": 2}]
