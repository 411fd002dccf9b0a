"""Lines are whole whoever writes them (many at once: `test_bench_reliability`), a failed write is taken back, and a bad line
is named."""

import errno
import json
import os
import resource
import signal
import threading
import time

import pytest

from instrument.results import log
from instrument.results.files import try_lock
from instrument.results.lines import read
from instrument.results.log import Appender, JsonlLog
from instrument.results.schemas import EventRecord, RecordError, encode


def event(step: int, text: str = "x" * 500) -> EventRecord:
    return EventRecord(step=step, kind="warning", detail={"text": text})


def test_what_is_written_is_read_back_in_order(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    with JsonlLog(path) as lines:
        for step in range(20):
            lines.write(event(step))
    with JsonlLog(path) as lines:  # appends
        lines.write(event(20))
    assert [record.step for record in read(path, EventRecord)] == list(range(21))
    with JsonlLog(path, fresh=True):
        pass
    assert path.read_bytes() == b""


def test_a_writer_that_takes_part_of_a_line_at_a_time_mixes_nothing_under_the_lock(tmp_path, monkeypatch):
    """What O_APPEND alone does not give: the kernel may take a line in pieces."""
    whole_write, path = os.write, tmp_path / "events.jsonl"
    with JsonlLog(path) as other:

        def in_pieces(fd: int, data: bytes) -> int:
            if fd == mine._fd:
                assert not try_lock(other._fd), "the lock is held while a line is in pieces"
                return whole_write(fd, data[:7])
            return whole_write(fd, data)

        with JsonlLog(path) as mine:
            monkeypatch.setattr(os, "write", in_pieces)
            mine.write(event(1))
            other.write(event(2))
            monkeypatch.undo()
    assert [record.step for record in read(path, EventRecord)] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"schema":1,"st', b"\0\0\0", '{"é'.encode()[:-1]])
def test_a_torn_last_line_is_ended_when_the_log_is_opened(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(event(1)) + b"\n" + torn)
    with JsonlLog(path) as lines:
        lines.write(event(2))
    assert path.read_bytes().split(b"\n") == [encode(event(1)), torn, encode(event(2)), b""]


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(event(1)))
    with JsonlLog(path) as lines:
        lines.write(event(2))
    assert [record.step for record in read(path, EventRecord)] == [1, 2]


def test_a_full_disk_leaves_the_earlier_lines_whole(tmp_path):
    """A limit on the file's size makes the kernel take a part of a line and refuse the rest."""
    path = tmp_path / "events.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lines = JsonlLog(path)
    try:
        lines.write(event(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
        with pytest.raises(OSError, match=r"events\.jsonl") as raised:
            lines.write(event(2))
        assert raised.value.errno == errno.EFBIG
        assert path.read_bytes() == encode(event(1)) + b"\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    lines.write(event(3))  # the disk has room again
    lines.close()
    assert [record.step for record in read(path, EventRecord)] == [1, 3]


def test_a_file_that_was_deleted_is_an_error_and_not_a_silence(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = JsonlLog(path)
    lines.write(event(1))
    path.unlink()
    lines._sync_quietly()  # what the background does every few seconds
    with pytest.raises(FileNotFoundError, match="deleted while it was being written"):
        lines.write(event(2))
    with pytest.raises(FileNotFoundError, match=r"events\.jsonl"):
        lines.close()


def test_the_background_syncs_what_was_written_and_the_writer_never_waits(tmp_path, monkeypatch):
    synced, began, release, real_fsync = [], threading.Event(), threading.Event(), os.fsync
    monkeypatch.setattr(log, "SYNC_EVERY_S", 0.02)

    def held_fsync(fd: int) -> None:
        began.set()
        release.wait(20)
        real_fsync(fd)
        synced.append(fd)

    monkeypatch.setattr(os, "fsync", held_fsync)
    lines = Appender(tmp_path / "log.jsonl")
    lines.append(b"{}\n")
    assert began.wait(60), "nothing is synced in the background"
    for _ in range(100):
        lines.append(b"{}\n")
    assert not synced, "an append waited for a sync"
    release.set()
    until_s = time.monotonic() + 60
    while len(synced) < 3 and time.monotonic() < until_s:  # the file, its folder, and what came meanwhile
        time.sleep(0.01)
    lines.append(b"{}\n")
    while_open = len(synced)
    lines.close()
    assert while_open >= 3 and len(synced) > while_open, "synced meanwhile, and on close"


def test_an_idle_log_is_not_synced_again(tmp_path, monkeypatch):
    lines = Appender(tmp_path / "log.jsonl")
    lines.append(b"{}\n")
    lines.sync()
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("nothing is new"))
    lines.sync()
    monkeypatch.undo()
    lines.close()
    lines.close()


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"not ours\n")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        JsonlLog(tmp_path / "log.jsonl", fresh=True)
    assert (tmp_path / "elsewhere").read_bytes() == b"not ours\n"


@pytest.mark.process
def test_a_forked_child_does_not_run_its_parents_jobs(tmp_path):
    calls = tmp_path / "calls"
    key = log.run_every(0.02, lambda: calls.open("a").write(f"{os.getpid()}\n"))
    until_s = time.monotonic() + 60
    while not calls.exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    pid = os.fork()
    if pid == 0:
        log.run_every(0.01, lambda: None)  # starts a thread of its own
        time.sleep(0.2)
        os._exit(0)
    os.waitpid(pid, 0)
    log.cancel_job(key)
    assert set(calls.read_text().split()) == {str(os.getpid())}


def test_a_bad_line_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(event(1)) + b"\n" + b'{"schema": 1, "st')
    with pytest.raises(RecordError, match=r"events\.jsonl:2: not JSON"):
        list(read(path, EventRecord))
    assert json.loads(path.read_bytes().splitlines()[0])["step"] == 1
