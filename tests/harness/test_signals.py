"""SIGTERM and SIGINT end a run behind a checkpoint, reach every run of a matrix, and a second one leaves at once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from harness.run import checkpoints
from harness.run.signals import Stop, Stopped
from instrument.results.folder import finished_runs

SMALL = [
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--batch-size",
    "2",
    "--micro-batch",
    "2",
    "--seq-len",
    "16",
    "--validation-documents",
    "2",
    "--documents",
    "400",
]


def started(words, environment):
    """``python -m harness`` in a process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process, timeout_s=120):
    until = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def lines(out):
    """How many steps every run has logged."""
    return [log.read_bytes().count(b"\n") for log in out.glob("training_logs/*.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_case_ends_behind_a_checkpoint_and_the_same_command_goes_on(tmp_path, command_environment, number):
    words = ["case", "gpt2_single_cls", "amp_bf16", *SMALL, "--max-steps", "120", "--out", str(tmp_path), "--json"]
    process = started(words, command_environment)
    wait_until(lambda: sum(lines(tmp_path)) > 3, process)
    process.send_signal(number)
    told, heard = process.communicate(timeout=60)
    assert process.returncode == 75, heard
    assert f"{number.name}: finishing the step, then a checkpoint; a second signal leaves at once" in heard
    row = json.loads(told)
    step = row["steps_done"]
    assert row["status"] == "preempted"
    assert row["error"] == f"stopped by {number.name} after step {step}; the same command resumes from checkpoint-{step}"
    assert lines(tmp_path) == [row["steps_done"]] and "Traceback" not in heard
    again = started(words, command_environment)
    told, heard = again.communicate(timeout=120)
    assert again.returncode == 0 and f"resumes after step {row['steps_done']}" in heard
    assert json.loads(told)["steps_done"] == 120 and lines(tmp_path) == [120]


def test_a_second_signal_leaves_at_once(tmp_path, command_environment):
    words = [
        "case",
        "gpt2_clm",
        "fp32_true",
        *SMALL,
        "--batch-size",
        "512",
        "--micro-batch",
        "2",
        "--seq-len",
        "64",
        "--max-steps",
        "50",
        "--out",
        str(tmp_path),
    ]  # steps of some seconds
    process = started(words, command_environment)
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("runs/*/evaluations.jsonl")), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    heard = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and time.monotonic() - began_s < 15 and "Traceback" not in heard  # a step takes longer
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


@pytest.mark.parametrize("to_the_group", [False, True], ids=["to the matrix", "to every process"])
def test_a_signal_reaches_every_run_of_a_matrix_and_it_goes_on(tmp_path, command_environment, to_the_group):
    words = [
        "matrix",
        *SMALL,
        "--cases",
        "gpt2_single_cls",
        "--configs",
        "fp32_true",
        "amp_bf16",
        "bf16_pure",
        "--max-steps",
        "100",
        "--jobs",
        "2",
        "--out",
        str(tmp_path),
    ]
    process = started(words, command_environment)
    wait_until(lambda: len(lines(tmp_path)) == 2 and min(lines(tmp_path)) > 2, process)
    (os.killpg if to_the_group else os.kill)(process.pid, signal.SIGTERM)
    heard = process.communicate(timeout=60)[1]
    assert process.returncode == 75, heard
    assert "stopped by SIGTERM: the same command goes on where it was" in heard and "Traceback" not in heard
    rows = finished_runs(tmp_path)
    assert [row.status for row in rows] == ["preempted"] * 2
    for row in rows:
        assert checkpoints.checkpoint_steps(tmp_path / "runs" / row.run_id) == [row.steps_done]
    assert not_running(process.pid)
    again = started([*words, "--json"], command_environment)
    told, heard = again.communicate(timeout=240)
    assert again.returncode == 0, heard
    found = {row["run_id"]: row for row in map(json.loads, told.splitlines())}
    assert len(found) == 3 and {row["status"] for row in found.values()} == {"completed"}
    assert all(found[row.run_id]["flags"]["resumed"]["behind_steps"] == [row.steps_done] for row in rows)


def test_a_second_signal_kills_the_runs_of_a_matrix(tmp_path, command_environment):
    words = [
        "matrix",
        *SMALL,
        "--cases",
        "gpt2_clm",
        "--configs",
        "fp32_true",
        "--batch-size",
        "512",
        "--seq-len",
        "64",
        "--max-steps",
        "50",
        "--out",
        str(tmp_path),
    ]
    process = started(words, command_environment)
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("runs/*/evaluations.jsonl")), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    heard = process.communicate(timeout=20)[1]
    assert process.returncode == 75 and "Traceback" not in heard, heard
    assert not_running(process.pid)


def test_runs_whose_matrix_was_killed_leave_behind_a_checkpoint(tmp_path, command_environment):
    words = [
        "matrix",
        *SMALL,
        "--cases",
        "gpt2_single_cls",
        "--configs",
        "fp32_true",
        "--max-steps",
        "2000",
        "--out",
        str(tmp_path),
    ]
    process = started(words, command_environment)
    wait_until(lambda: sum(lines(tmp_path)) > 2, process)
    process.kill()
    process.communicate()
    assert not_running(process.pid)
    (row,) = finished_runs(tmp_path)
    assert row.status == "preempted" and "the end of the matrix" in row.error and row.steps_done < 2000


def not_running(group, timeout_s=20):
    """Whether every process of the group is gone, soon."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_before_there_is_something_to_finish_a_signal_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Stop().listening() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            list(stop.between([1]))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop(patient=True).listening() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGINT, before)
