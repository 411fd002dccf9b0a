"""Of all who want a run one gets it (many at once: `test_bench_reliability`); the dead hold nothing; the living are never
robbed."""

import contextlib
import errno
import fcntl
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from instrument.results import claims, files
from instrument.results.claims import FILE, RunClaimed, claim, owner_of
from instrument.results.files import TEMPORARY
from tests import crash_hook
from tests.soak.reliability.logs_and_claims import leave_dead_claim

SPAWN = multiprocessing.get_context("spawn")


def refuse_links(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_claim_names_its_owner_and_goes_with_release(tmp_path):
    own = claim(tmp_path, "a")
    facts = owner_of(tmp_path, "a")
    assert facts["pid"] == os.getpid() and facts["host"] and time.time() - facts["started_unix_s"] < 60
    with pytest.raises(RunClaimed, match=f"a is being executed by process {os.getpid()} on ") as raised:
        claim(tmp_path, "a")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    own.release()
    own.release()
    assert owner_of(tmp_path, "a") is None and not own.path.exists()
    with claim(tmp_path, "a") as again:
        assert again.is_held
    assert not again.is_held


def test_a_sweep_beside_takes_no_claim_away(tmp_path):
    over = threading.Event()

    def sweeping():
        while not over.is_set():
            files.sweep(tmp_path / "runs" / "a")

    sweepers = [threading.Thread(target=sweeping) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        for _ in range(50):
            with claim(tmp_path, "a") as own:
                assert own.path.exists()
    finally:
        over.set()
        for thread in sweepers:
            thread.join()


def hold(out, ready) -> None:
    claim(out, "a")
    ready.send(True)
    time.sleep(60)


@pytest.mark.process
def test_a_killed_owner_s_run_is_free_at_once(tmp_path):
    here, there = SPAWN.Pipe()
    owner = SPAWN.Process(target=hold, args=(tmp_path, there))
    owner.start()
    there.close()
    here.recv()
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    began_s = time.monotonic()
    claim(tmp_path, "a").release()
    assert time.monotonic() - began_s < claims.STALE_S / 2  # that of another host would be waited for


def test_on_another_host_the_heartbeat_tells(tmp_path):
    path = leave_dead_claim(tmp_path, "a", boot="another kernel", host="elsewhere", pid=1)
    with pytest.raises(RunClaimed, match="process 1 on elsewhere"):
        claim(tmp_path, "a")
    long_ago_s = time.time() - claims.STALE_S - 5
    os.utime(path, (long_ago_s, long_ago_s))
    claim(tmp_path, "a").release()


@pytest.mark.parametrize("locks", [True, False])
def test_a_claim_from_the_future_becomes_stale(tmp_path, request, locks):
    """Of an owner elsewhere that died before the file server's clock was set back."""
    if locks:
        path = leave_dead_claim(tmp_path, "a", boot="another kernel", host="elsewhere", pid=1)
    else:
        request.getfixturevalue("no_locks")
        (path := tmp_path / "runs" / "a" / FILE).parent.mkdir(parents=True)
        path.write_text("1\nelsewhere\n")
    os.utime(path, (time.time() + 1e6,) * 2)
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    assert path.stat().st_mtime <= time.time(), "its time runs from now"
    os.utime(path, (time.time() - claims.STALE_S - 5,) * 2)
    claim(tmp_path, "a").release()


@pytest.mark.parametrize("call", ["link", "unlink", "replace"])
def test_an_interrupted_call_is_made_again(tmp_path, monkeypatch, call):
    real, interruptions = getattr(os, call), [1, 2]

    def interrupted(*paths, **given):
        if interruptions:
            interruptions.pop()
            raise InterruptedError(errno.EINTR, "Interrupted system call", str(paths[0]))
        return real(*paths, **given)

    monkeypatch.setattr(os, call, interrupted)
    with claim(tmp_path, "a") as own:
        files.replace(tmp_path / "file", b"x")
        assert own.is_held
    assert not interruptions and os.listdir(tmp_path / "runs" / "a") == [] and (tmp_path / "file").read_bytes() == b"x"


def test_the_heartbeat_renews_the_file_s_time(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    own = claim(tmp_path, "a")
    os.utime(own.path, (1, 1))
    deadline_s = time.monotonic() + 60
    while own.path.stat().st_mtime == 1 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert time.time() - own.path.stat().st_mtime < 60
    own.release()


def test_an_owner_taken_for_dead_finds_out_and_frees_nothing_of_the_new_one(tmp_path):
    slept = claim(tmp_path, "a")
    slept.path.unlink()
    new = claim(tmp_path, "a")
    assert new.is_held and not slept.is_held
    slept.release()
    assert new.is_held and owner_of(tmp_path, "a") is not None
    new.release()


def test_of_many_who_find_a_dead_owner_one_takes_over(tmp_path):
    leave_dead_claim(tmp_path, "a")
    together, held = threading.Barrier(8), []

    def take_over():
        together.wait()
        with contextlib.suppress(RunClaimed):
            held.append(claim(tmp_path, "a"))

    threads = [threading.Thread(target=take_over) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (own,) = held
    assert own.is_held
    own.release()


def test_who_looks_takes_no_claim_away(tmp_path):
    """`owner_of` takes the lock for a moment: a claimant tries again."""
    over = threading.Event()

    def looking():
        while not over.is_set():
            owner_of(tmp_path, "a")

    watcher = threading.Thread(target=looking)
    watcher.start()
    try:
        for _ in range(50):
            leave_dead_claim(tmp_path, "a")
            claim(tmp_path, "a").release()
    finally:
        over.set()
        watcher.join()


@pytest.mark.process
def test_a_forked_process_neither_frees_a_claim_nor_keeps_it(tmp_path):
    own = claim(tmp_path, "a")
    pid = os.fork()
    if pid == 0:
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    assert own.is_held
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    own.release()


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_locks_there_is_one_owner_too(tmp_path, no_locks, hard_links, monkeypatch):
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse_links)
    own = claim(tmp_path, "a")
    assert own.is_held and owner_of(tmp_path, "a")["pid"] == os.getpid()
    with pytest.raises(RunClaimed, match=f"process {os.getpid()} on "):
        claim(tmp_path, "a")
    own.release()
    assert owner_of(tmp_path, "a") is None and [path.name for path in tmp_path.rglob("*")] == ["runs", "a"]


def test_without_locks_another_host_s_heartbeat_tells(tmp_path, no_locks):
    path = tmp_path / "runs" / "a" / FILE
    path.parent.mkdir(parents=True)
    path.write_text("1\nelsewhere\n")
    with pytest.raises(RunClaimed, match="process 1 on elsewhere"):
        claim(tmp_path, "a")
    os.utime(path, (1, 1))
    assert owner_of(tmp_path, "a") is None
    claim(tmp_path, "a").release()
    assert not path.exists()


@pytest.mark.process
def test_without_locks_a_dead_owner_of_this_host_is_followed_at_once(tmp_path, no_locks):
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    path = tmp_path / "runs" / "a" / FILE
    path.parent.mkdir(parents=True)
    path.write_text(f"{over.pid}\n{socket.gethostname()}\n")
    claim(tmp_path, "a").release()
    assert not path.exists()


@pytest.mark.process
def test_without_locks_a_host_of_the_same_name_with_other_process_ids_is_judged_by_its_heartbeat(tmp_path, no_locks):
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    path = tmp_path / "runs" / "a" / FILE
    path.parent.mkdir(parents=True)
    path.write_text(f"{over.pid}\n{socket.gethostname()}\n")
    mark = path.with_name(f"{FILE}.{over.pid}-{'0' * 32}-1{TEMPORARY}")
    mark.touch()
    with pytest.raises(RunClaimed, match=f"process {over.pid} on "):
        claim(tmp_path, "a")
    assert path.exists() and mark.exists()
    os.utime(path, (1, 1))
    with claim(tmp_path, "a") as own:
        assert own.is_held and not mark.exists()
    assert [one.name for one in tmp_path.rglob("*")] == ["runs", "a"]


def two_hosts(tmp_path, monkeypatch) -> list:
    """The claims of two hosts, none of which sees the other's locks, that find the same stale claim at the same instant."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    age_s, together, held = claims.age_s, threading.Barrier(2), []

    def age_at_once(path):
        age = age_s(path)
        if path.name == FILE:
            together.wait(10)
        return age

    def take_over():
        with contextlib.suppress(RunClaimed):
            held.append(claim(tmp_path, "a"))

    monkeypatch.setattr(claims, "age_s", age_at_once)
    threads = [threading.Thread(target=take_over) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return held


def test_of_two_hosts_that_find_the_same_stale_claim_one_takes_over(tmp_path, monkeypatch):
    path = leave_dead_claim(tmp_path, "a", boot="another kernel", host="elsewhere", pid=1)
    os.utime(path, (1, 1))
    (own,) = two_hosts(tmp_path, monkeypatch)
    assert own.is_held
    own.release()
    assert list(path.parent.iterdir()) == []


def test_a_host_that_died_in_a_takeover_is_waited_for(tmp_path):
    path = leave_dead_claim(tmp_path, "a", boot="another kernel", token="0" * 32)
    os.utime(path, (1, 1))
    takeover = path.with_name(f"{FILE}.after-{'0' * 32}{TEMPORARY}")
    takeover.touch()
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    os.utime(takeover, (1, 1))
    claim(tmp_path, "a").release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize("plant_dead", [False, True], ids=["free", "owner dead"])
def test_a_claimant_that_dies_at_any_file_operation_holds_nobody_up(tmp_path, plant_dead):
    for nth in range(1, 50):
        out = tmp_path / str(nth)
        if plant_dead:
            leave_dead_claim(out, "a")
        pid = os.fork()
        if pid == 0:
            crash_hook.crash_at(nth)
            claim(out, "a")
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        claim(out, "a").release()
        left = {path.name for path in (out / "runs" / "a").iterdir() if not path.name.endswith(TEMPORARY)}
        assert left == set(), nth
        if exit_code == 0:
            break
        assert exit_code == crash_hook.CRASHED
    assert nth > 5


def test_a_file_system_without_hard_links_has_one_winner_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    own = claim(tmp_path, "a")
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    own.release()
    leave_dead_claim(tmp_path, "b")
    claim(tmp_path, "b").release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "../../x", "boot": "b"}', b'{"token": 7}', b"\xff" * 5000])
def test_a_claim_that_is_not_of_our_making_holds_nothing_and_leads_nowhere(tmp_path, content):
    path = tmp_path / "runs" / "a" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    claim(tmp_path, "a").release()
    assert [p.name for p in tmp_path.rglob("*")] == ["runs", "a"]


def test_a_claim_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        claim(tmp_path, "a")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"


def test_an_unsafe_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no safe file name"):
        claim(tmp_path, "../a")
