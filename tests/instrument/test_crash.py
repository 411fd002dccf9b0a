"""The crash hook dies where it is told to: before the n-th operation on a file, in the middle of a write."""

import os
import shutil
import sys
import threading

import pytest

from instrument.results import crash_hook

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
    "standard error": (lambda folder: print("words", file=sys.stderr), 0),
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
