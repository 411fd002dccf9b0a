"""Of all who want a run one gets it (many at once: `test_bench_reliability`); the dead hold nothing; the living are never
robbed."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest

from instrument.results import claims, crash_hook, files
from instrument.results.claims import FILE, RunClaimed, claim, owner_of
from instrument.results.files import TEMPORARY
from tests.soak.reliability.contention import leave_dead_claim

SPAWN = multiprocessing.get_context("spawn")


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


def hold(out, told) -> None:
    claim(out, "a")
    told.send(True)
    time.sleep(60)


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
    assert time.monotonic() - began_s < 5


def test_on_another_host_the_heartbeat_tells(tmp_path):
    path = leave_dead_claim(tmp_path, "a", boot="another kernel", host="elsewhere", pid=1)
    with pytest.raises(RunClaimed, match="process 1 on elsewhere"):
        claim(tmp_path, "a")
    long_ago_s = time.time() - claims.STALE_S - 5
    os.utime(path, (long_ago_s, long_ago_s))
    claim(tmp_path, "a").release()


def test_the_heartbeat_renews_the_file_s_time(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.02)
    own = claim(tmp_path, "a")
    os.utime(own.path, (1, 1))
    deadline_s = time.monotonic() + 5
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


def mark_of(path):
    return path.with_name(f"{FILE}.after-{json.loads(path.read_bytes())['token']}")


def test_a_takeover_under_way_holds_others_off_and_one_that_died_does_not(tmp_path):
    mark = mark_of(leave_dead_claim(tmp_path, "a"))
    with mark.open("w") as taker:
        fcntl.flock(taker, fcntl.LOCK_EX)
        with pytest.raises(RunClaimed):
            claim(tmp_path, "a")
    assert mark.exists()
    claim(tmp_path, "a").release()
    assert not mark.exists()


def test_without_locks_a_takeover_that_died_holds_others_off_for_a_while(tmp_path, monkeypatch):
    path = leave_dead_claim(tmp_path, "a", boot="another kernel")
    mark = mark_of(path)
    mark.touch()
    os.utime(path, (1, 1))

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunClaimed):
        claim(tmp_path, "a")
    os.utime(mark, (1, 1))
    claim(tmp_path, "a").release()
    assert not mark.exists()


def test_a_mark_that_a_taker_left_behind_goes_with_the_next_claim(tmp_path):
    left = leave_dead_claim(tmp_path, "a").with_name(f"{FILE}.after-{'0' * 32}")
    left.touch()
    claim(tmp_path, "a").release()
    assert not left.exists()


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
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
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


def test_a_run_that_another_process_executes_is_left_to_it(plan, tmp_path):
    from harness.run.execute import execute

    settings = plan("gpt2_clm", "fp32_true")
    theirs = tmp_path / "runs" / settings.run_id / "checkpoint-1"
    theirs.mkdir(parents=True)
    with claim(tmp_path, settings.run_id):
        for fresh in (False, True):
            with pytest.raises(RunClaimed, match="is being executed by process"):
                execute(settings, tmp_path, fresh=fresh)
    assert theirs.exists()
    assert not (tmp_path / "runs" / settings.run_id / "run.json").exists()
    assert execute(settings, tmp_path).status == "completed"
    assert not (tmp_path / "runs" / settings.run_id / ".claim").exists()
