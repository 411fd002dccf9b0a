"""SIGTERM, SIGINT and SIGHUP end a run after a checkpoint, reach every run of a matrix, and a second one leaves at once."""

import json
import operator
import os
import signal
import time

import pytest

from harness.cli import main
from harness.run.progress import checkpoint_steps
from harness.run.signals import Stop, Stopped, interrupt_on_signals
from instrument.results.folder import finished_runs
from tests.harness.commands import SMALL, Forked, group_is_gone, logged, wait_until

SLOW_STEPS = [*SMALL, "--batch-size", "512", "--micro-batch", "2", "--seq-len", "64", "--max-steps", "50"]
"""Steps of some seconds."""


@pytest.mark.process
def test_a_case_ends_after_a_checkpoint_and_the_same_command_resumes(tmp_path):
    out = tmp_path / "out"
    words = ["case", "gpt2_single_cls", "amp_bf16", *SMALL, "--max-steps", "120", "--out", str(out), "--json"]
    step = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = Forked(words, tmp_path / number.name)
        wait_until(lambda before=step: sum(logged(out)) > before + 3, process)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert f"{number.name}: finishing the step, then a checkpoint; a second signal leaves at once" in errors
        assert "Traceback" not in errors and (f"resumes after step {step}" in errors) == (step > 0)
        row = json.loads(printed)
        step = row["steps_done"]
        assert row["status"] == "preempted" and logged(out) == [step]
        assert row["error"] == f"stopped by {number.name} after step {step}; the same command resumes from checkpoint-{step}"
    process = Forked(words, tmp_path / "last")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resumes after step {step}" in errors
    assert json.loads(printed)["steps_done"] == 120 and logged(out) == [120]


@pytest.mark.process
def test_a_second_signal_leaves_at_once(tmp_path):
    process = Forked(["case", "gpt2_clm", "fp32_true", *SLOW_STEPS, "--out", str(tmp_path / "out")], tmp_path / "case")
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("out/runs/*/evaluations.jsonl")), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in errors
    assert not list(tmp_path.glob("out/runs/*/checkpoint-*"))


@pytest.mark.process
def test_a_signal_reaches_every_run_of_a_matrix_and_the_same_command_resumes_them(tmp_path, capsys):
    """A matrix that is killed, then loses its terminal, then is signalled with all of its processes, then left alone."""
    out = tmp_path / "out"
    words = ["matrix", *SMALL, "--cases", "gpt2_single_cls", "--configs", "fp32_true", "amp_bf16", "bf16_pure"]
    words += ["--max-steps", "150", "--jobs", "2", "--out", str(out)]
    stopped_after = {}
    for send in ("SIGKILL to the matrix", "SIGHUP to every process", "SIGTERM to every process"):
        process, before = Forked(words, tmp_path / "stopped"), logged(out) or [0, 0]
        wait_until(lambda old=before: len(logged(out)) == 2 and min(map(operator.sub, logged(out), old)) > 2, process)
        (os.killpg if "every" in send else os.kill)(process.pid, getattr(signal, send.split()[0]))
        errors = process.communicate(timeout=60)[1]
        assert group_is_gone(process.pid), send
        rows = finished_runs(out)
        assert [row.status for row in rows] == ["preempted"] * 2, send
        if "SIGKILL" in send:
            assert all("the end of the matrix" in row.error for row in rows)
        else:
            assert process.returncode == 75 and f"stopped by {send.split()[0]}: the same command" in errors, errors
            assert "Traceback" not in errors
        for row in rows:
            assert checkpoint_steps(out / "runs" / row.run_id)[0] == row.steps_done < 150
            stopped_after.setdefault(row.run_id, []).append(row.steps_done)
    assert main([*words, "--json"]) == 0
    found = {row["run_id"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(found) == 3 and {row["status"] for row in found.values()} == {"completed"}
    resumed = {run_id: row["flags"]["resumed"]["behind_steps"] for run_id, row in found.items() if "resumed" in row["flags"]}
    assert resumed == stopped_after


@pytest.mark.process
def test_a_second_signal_kills_the_runs_of_a_matrix(tmp_path):
    words = ["matrix", *SLOW_STEPS, "--cases", "gpt2_clm", "--configs", "fp32_true", "--out", str(tmp_path / "out")]
    process = Forked(words, tmp_path / "matrix")
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("out/runs/*/evaluations.jsonl")), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in errors, errors
    assert not list(tmp_path.glob("out/runs/*/checkpoint-*")), "the step was waited for"
    assert group_is_gone(process.pid)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_caller_ignores_stays_ignored(number):
    before = {n: signal.getsignal(n) for n in (number, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(number, signal.SIG_IGN)
    try:
        if number == signal.SIGHUP:
            interrupt_on_signals()  # `nohup python -m harness case ...`
        with Stop(patient=True).listening() as stop:
            os.kill(os.getpid(), number)
            assert stop.requested is None
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
