"""The crash hook kills before the n-th operation on a file, or in the middle of a write; nothing that was acknowledged is
lost, wherever it kills."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from instrument.results.log import JsonlLog
from instrument.results.schemas import EventRecord, RecordError, decode
from tests import crash_hook

pytestmark = pytest.mark.process


def dies(nth, change):
    """Call ``change`` in a forked child that dies at its ``nth`` operation; exit code and operations counted before its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            crash_hook.crash_at(nth)
            change()
            os.write(writing, b"%d" % crash_hook.operations())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as counted:
        count = counted.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(count) if count else None


def write(folder):
    fd = os.open(folder / "new", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"0123456789")
    os.fsync(fd)
    os.close(fd)


def write_from_another_thread(folder):
    thread = threading.Thread(target=write, args=(folder,))
    thread.start()
    thread.join()


CHANGES = {
    "a write": (write, 4),
    "text": (lambda folder: (folder / "new").write_text("x"), 1),
    "rename": (lambda folder: os.replace(folder / "old", folder / "new"), 1),
    "delete": (lambda folder: (folder / "old").unlink(), 1),
    "cut": (lambda folder: os.truncate(folder / "old", 0), 1),
    "link": (lambda folder: os.link(folder / "old", folder / "new"), 1),
    "folder": (lambda folder: (folder / "new").mkdir(), 1),
    "mode": (lambda folder: (folder / "old").chmod(0o600), 1),
    "tree": (lambda folder: shutil.rmtree(folder / "tree"), 2),
    "reading": (lambda folder: (folder / "old").read_bytes(), 0),
    "a pipe": (lambda folder: os.write(os.pipe()[1], b"x"), 0),
    "standard error": (lambda folder: print("text", file=sys.stderr), 0),
    "another thread": (write_from_another_thread, 0),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "leaf").touch()
    return tmp_path


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_disk_is_counted_and_nothing_else(folder, name):
    change, operations = CHANGES[name]
    assert dies(sys.maxsize, lambda: change(folder)) == (0, operations)


@pytest.mark.parametrize("name", [name for name, (_, operations) in CHANGES.items() if operations])
def test_death_comes_before_the_operation(folder, name):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert dies(1, lambda: CHANGES[name][0](folder)) == (crash_hook.CRASHED, None)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("nth", "left"), [(1, None), (2, b""), (3, b"01234"), (4, b"0123456789")])
def test_a_write_has_a_middle(folder, nth, left):
    assert dies(nth, lambda: write(folder)) == (crash_hook.CRASHED, None)
    assert ((folder / "new").read_bytes() if (folder / "new").exists() else None) == left


def test_0_is_never(folder):
    assert dies(0, lambda: write(folder)) == (0, 0) and crash_hook.operations() == 0


SEQUENCE = """
import sys
from functools import partial
from pathlib import Path
from instrument.results.files import replace
from instrument.results.log import JsonlLog
from instrument.results.schemas import EventRecord
out = Path(sys.argv[1])
with JsonlLog(out / "events.jsonl") as log:
    for step in range(1, 7):
        log.write(EventRecord(step=step, kind="warning", detail={"text": "x" * 50}))
        print(f"row {step}", flush=True)
        if step % 3 == 0:
            replace(out / "state.json", b'{"step": %d}' % step)
            print(f"state {step}", flush=True)
"""


@pytest.mark.process
def test_killed_at_any_file_operation_nothing_acknowledged_is_lost(tmp_path):
    """The crash sweep on a small sequence: in one process a crash, forked, since an import costs a second."""
    survived = 0
    for nth in range(1, 200):
        out = tmp_path / str(nth)
        said, exit_code = crash_in_a_fork(out, nth)
        lines = (out / "events.jsonl").read_bytes().split(b"\n") if (out / "events.jsonl").exists() else [b""]
        whole = [decode(line, EventRecord).step for line in lines[:-1]]
        acknowledged = [int(word.split()[1]) for word in said if word.startswith("row")]
        assert whole[: len(acknowledged)] == acknowledged and len(whole) <= len(acknowledged) + 1, nth
        if lines[-1]:  # at most one torn line, and it is the last
            with pytest.raises(RecordError):
                decode(lines[-1], EventRecord)
        states = [int(word.split()[1]) for word in said if word.startswith("state")]
        if states:
            assert (out / "state.json").read_bytes() in [b'{"step": %d}' % step for step in (states[-1], 6)], nth
        if exit_code == 0:
            survived = nth
            break
        assert exit_code == crash_hook.CRASHED
        with JsonlLog(out / "events.jsonl") as log:  # the next process continues
            log.write(EventRecord(step=99, kind="warning", detail={}))
        last = (out / "events.jsonl").read_bytes().split(b"\n")
        assert last[-1] == b"" and decode(last[-2], EventRecord).step == 99
    what = "folder and its name, file, six lines, two replacements, two syncs on closing"
    assert survived == 2 + 1 + 6 * 2 + 2 * 7 + 2 + 1, what


def crash_in_a_fork(out: Path, nth: int) -> tuple[list[str], int]:
    """Run the sequence in a forked child that dies at its ``nth`` file operation; what it acknowledged, its exit code."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(writing, 1)
            sys.stdout, sys.argv = os.fdopen(1, "w"), ["-", str(out)]
            crash_hook.crash_at(nth)
            exec(SEQUENCE, {"__name__": "sequence"})
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as output:
        said = output.read().splitlines()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
