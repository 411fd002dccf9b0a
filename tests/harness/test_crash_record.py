"""The row of a run whose process wrote none."""

import errno
import shutil
import subprocess
import sys

import pytest

from harness.failure import Failure
from harness.run.execute import execute
from harness.run.heartbeat import Heartbeat
from harness.run.outcome import Outcome, summarize
from harness.supervisor import crash_record
from harness.supervisor.crash_record import amend, logged_steps, write_crash_record
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.claims import RunClaimed
from instrument.results.folder import OutputError, finished_run, finished_runs
from instrument.results.schemas import FirstNonfinite
from instrument.watch.meter import Divergence

HOLD = """import sys, time; from pathlib import Path; from instrument.results.claims import claim
claim(Path(sys.argv[1]), sys.argv[2]); print("held", flush=True); time.sleep(60)"""


@pytest.fixture
def dead(plan, tmp_path):
    """Settings of a run that had logged three steps, its row's draft, and the watch over it."""
    settings = plan("gpt2_clm", "fp32_true", max_steps=3)
    execute(settings, tmp_path)
    (tmp_path / "runs" / settings.run_id / "run.json").unlink()
    monitor = ProcessMonitor(Rules(oom_counters=[]))
    monitor.begin(1 << 30)
    monitor.alive(Heartbeat("training", 2))
    yield settings, summarize(settings, Outcome()), monitor
    monitor.close()


def test_a_dead_run_keeps_what_it_had_reached(dead, tmp_path):
    settings, draft, monitor = dead
    log = tmp_path / "training_logs" / f"run_{settings.run_id}.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:50])  # the third was being written
    row = write_crash_record(draft, tmp_path, monitor, -9)
    assert (row.status, row.steps_done, row.flags["death"]["cause"]) == ("error", 2, "killed")
    assert "after step 2" in row.error and row.loss_initial == logged_steps(tmp_path, settings.run_id, True)[0].loss
    assert row.env == draft.env and row.config == draft.config and row.val_loss is None
    assert row.flags["unhashed"] == settings.unhashed() and row.flags["unhashed"]["log_every"] == settings.log_every
    assert finished_runs(tmp_path) == [row]


@pytest.mark.parametrize("exit_code", [-9, -11, None])
def test_a_run_that_dies_in_its_forensics_has_diverged(dead, tmp_path, exit_code):
    settings, _, monitor = dead
    outcome = Outcome()
    outcome.diverged(Divergence(3, FirstNonfinite.surfaced(3, "optimizer", "param", "nan"), "param is nan"))
    row = write_crash_record(summarize(settings, outcome), tmp_path, monitor, exit_code)
    assert (row.status, row.divergence_step, row.steps_done, row.error) == ("diverged", 3, 3, "param is nan")
    assert row.first_nonfinite.tensor == "param" and "death" not in row.flags
    assert "the run's process" in row.flags["forensics_failed"]["process"] or "SIG" in row.flags["forensics_failed"]["process"]


def test_a_row_that_the_dead_process_had_written_stands(dead, tmp_path):
    settings, draft, monitor = dead
    execute(settings, tmp_path)
    row = write_crash_record(draft, tmp_path, monitor, -9)  # killed between its row and its last word
    assert row.status == "completed" and finished_run(tmp_path, settings.run_id) == row


def test_a_run_that_had_not_begun_to_write_has_nothing_of_the_one_before(dead, tmp_path):
    settings, draft, monitor = dead
    monitor.opened = False
    row = write_crash_record(draft, tmp_path, monitor, 1, Failure("bad_data", "DataError: x"))
    assert (row.steps_done, row.loss_initial, row.error) == (0, None, "DataError: x")
    (tmp_path / "runs" / settings.run_id / "checkpoint-2").mkdir()  # but one that was to resume keeps its part before
    assert write_crash_record(draft, tmp_path, monitor, -9).steps_done == 3


def test_a_killed_run_with_a_checkpoint_says_that_it_resumes(dead, tmp_path):
    settings, draft, monitor = dead
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x"):
        (tmp_path / "runs" / settings.run_id / name).mkdir()
    assert write_crash_record(draft, tmp_path, monitor, -9).error.endswith("; the same command resumes from checkpoint-10")
    (tmp_path / "runs" / settings.run_id / "run.json").unlink()
    assert "resumes" not in write_crash_record(draft, tmp_path, monitor, -11).error  # a segfault does not


@pytest.mark.process
def test_a_run_that_another_process_has_by_now_is_left_to_it(dead, tmp_path):
    settings, draft, monitor = dead
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), settings.run_id], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunClaimed):
            write_crash_record(draft, tmp_path, monitor, -9)
        assert finished_runs(tmp_path) == []
        monitor.pid = other.pid  # unless it is the very one, and nobody can end it
        assert write_crash_record(draft, tmp_path, monitor, None).status == "error"
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("what", ["claim", "row", "amended row"])
def test_a_row_that_a_full_disk_refuses_is_an_output_error(dead, tmp_path, monkeypatch, what):
    settings, draft, monitor = dead

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs"))

    monkeypatch.setattr(crash_record, "claim" if what == "claim" else "write_terminal", full)
    with pytest.raises(OutputError, match="cannot write .*No space left on device"):
        if what == "amended row":
            amend(draft, tmp_path, Failure("hung", "no sign of life"))
        else:
            write_crash_record(draft, tmp_path, monitor, -9)


@pytest.mark.parametrize("gone", ["the run's folder", "the results folder"])
def test_a_deleted_folder_is_not_made_again_by_the_death_of_a_run(dead, tmp_path, gone):
    settings, draft, monitor = dead
    folder = tmp_path / "runs" if gone == "the run's folder" else tmp_path
    shutil.rmtree(folder)
    for write in (
        lambda: write_crash_record(draft, tmp_path, monitor, -9),
        lambda: amend(draft, tmp_path, Failure("hung", "x")),
    ):
        with pytest.raises(OutputError, match="has disappeared" if folder == tmp_path else "cannot write"):
            write()
        assert not folder.exists()


def test_a_hung_run_that_still_wrote_a_checkpoint_is_hung_and_says_so(dead, tmp_path):
    settings, draft, monitor = dead
    stopped = summarize(settings, Outcome(status="preempted", error="stopped by SIGTERM after step 2; it resumes"))
    stack = 'Current thread 0x1 (most recent call first):\n  File "a", line 1 in b\n'
    failure = Failure("hung", "no sign of life for 9 s", stack=stack)
    row = amend(stopped, tmp_path, failure)
    assert (row.status, row.flags["death"]["goes_on"]) == ("hung", True) and row == finished_run(tmp_path, settings.run_id)
    assert row.error.startswith("no sign of life for 9 s; stopped by SIGTERM after step 2")
    assert 'File "a", line 1 in b' in (tmp_path / "runs" / settings.run_id / "output.log").read_text()
