"""The pool under planted failures: each leaves a row with its cause and the steps before it, and the next run is as if there
had been none. The fork server's imports leave CUDA alone: a child of a process that asked for a GPU cannot use one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.run.execute import execute
from harness.run.signals import Stop
from harness.supervisor.child_process import is_ending
from harness.supervisor.pool import Pool
from harness.supervisor.process_monitor import Rules
from instrument.results.folder import finished_runs
from instrument.results.lines import read
from instrument.results.schemas import StepRecord
from tests.soak.reliability.faults import FAULTS, HANG_RULES, FaultTrial, case_with, planned, run_faults
from tests.soak.reliability.plants import Plant

pytestmark = pytest.mark.process
QUICK = [kind for kind in FAULTS if not kind.startswith("hang")]


@pytest.mark.parametrize("kind", QUICK)
def test_a_failure_is_a_row_with_its_cause(kind, tmp_path):
    (trial,) = run_faults(kind, 1, tmp_path / "out", first=1)
    assert trial.right, str(trial)


def test_every_way_to_hang_is_noticed_and_ended_and_the_next_run_is_bit_for_bit_the_same(plan, tmp_path):
    """All at once: they wait. Striking in a step, so that the short limit holds."""
    healthy = plan("gpt2_clm", "amp_bf16", max_steps=3)
    alone = execute(healthy, tmp_path / "alone")
    kinds = [kind for kind in FAULTS if kind.startswith("hang")]
    plants = [Plant(kind, "forward", 3) for kind in kinds]
    template = planned("exception", 0, tmp_path)[1]
    runs = [replace(template, case=case_with(plant)) for plant in plants]
    rules = Rules(**{**HANG_RULES, "starting_factor": 30.0})  # nothing hangs before its third step
    rows = {
        ended.settings.case.id: ended.record
        for ended in Pool([*runs, healthy], tmp_path, jobs=4, rules=rules).run(lambda: None, 0.1)
    }
    assert rows["gpt2_clm"].final_weights_sha256 == alone.final_weights_sha256 is not None
    for kind in kinds:
        row = rows[f"gpt2_clm_{kind}"]
        assert (row.status, row.steps_done, row.flags["death"]["step"]) == ("hung", 2, 2), row.error
        death = row.flags["death"]
        assert death["beat_age_s"] >= HANG_RULES["hang_after_s"] and death["goes_on"]
        assert death["ended_by"].startswith("SIGKILL")
        stack = "\n".join(death.get("stack", []))
        assert ("plants.py" in stack) == (kind != "hang_stopped"), stack  # a process that is stopped cannot say where it is
        output = (tmp_path / "runs" / row.run_id / "output.log").read_text()
        assert ("Current thread" in output) == (kind != "hang_stopped")
    assert "the process was stopped" in rows["gpt2_clm_hang_stopped"].error


@pytest.mark.parametrize("kind", ["segfault", "sigkill", "host_oom"])
def test_the_next_run_is_bit_for_bit_the_same(kind, plan, tmp_path):
    healthy = plan("gpt2_clm", "amp_bf16", max_steps=3)
    alone = execute(healthy, tmp_path / "alone")
    sick = replace(planned("exception", 0, tmp_path)[1], case=case_with(Plant(kind, "backward", 2)))
    rows = [ended.record for ended in Pool([sick, healthy], tmp_path / "after", jobs=1).run(lambda: None)]
    assert rows[0].status in ("error", "oom") and rows[1].status == "completed"
    assert rows[1].final_weights_sha256 == alone.final_weights_sha256 is not None
    assert losses(tmp_path / "alone", healthy) == losses(tmp_path / "after", healthy)


def losses(out, settings):
    return [step.loss for step in read(out / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord)]


def test_a_killed_fork_server_is_started_again_and_how_a_run_ended_without_it_is_not_known(plan, tmp_path):
    """Three runs, two at a time: the server is killed, then the second run; the first completes, the third needs a server."""
    from multiprocessing.forkserver import _forkserver

    pool = Pool([plan("gpt2_clm", "fp32_true", seed=n, max_steps=steps) for n, steps in enumerate((30, 200, 2))], tmp_path, 2)
    killed = []

    def kill_server_and_run():
        if not killed and len(pool.running) == 2 and all(run.last_step is not None for run in pool.running):
            killed.append(_forkserver._forkserver_pid)
            os.kill(killed[0], signal.SIGKILL)
            os.kill(pool.running[1].child.pid, signal.SIGKILL)

    rows = {ended.settings.seed: ended.record for ended in pool.run(kill_server_and_run, 0.05)}
    assert killed and _forkserver._forkserver_pid != killed[0] and len(finished_runs(tmp_path)) == 3
    assert [rows[seed].status for seed in range(3)] == ["completed", "error", "completed"]
    assert rows[1].flags["death"]["cause"] == "killed" and "signal" not in rows[1].flags["death"]
    assert "how it ended is not known" in rows[1].error


def test_a_process_is_ending_from_its_kill_on_until_it_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert not is_ending(os.getpid()) and not is_ending(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_ending(process.pid)
    process.wait()
    assert is_ending(process.pid)


def test_one_run_is_supervised_without_a_matrix(plan, tmp_path):
    pool, seen = Pool([plan("gpt2_clm", "fp32_true", max_steps=3)], tmp_path, jobs=1), set()
    (ended,) = pool.run(lambda: seen.update(run.last_step and run.last_step.step for run in pool.running), 0.01)
    assert ended.record.status == "completed" and ended.failure is None and seen >= {3}
    stop = Stop()
    stop.request("a test")
    assert not list(Pool([plan("gpt2_clm", "fp32_true", seed=1)], tmp_path, jobs=1, stop=stop).run(lambda: None))


def test_a_killed_run_resumes_and_one_that_crashed_starts_over(plan, tmp_path):
    for kind, resumed in (("sigkill", True), ("segfault", False)):
        settings = replace(planned("exception", 0, tmp_path)[1], case=case_with(Plant(kind, "forward", 4)), checkpoint_every=2)
        (dead,) = (one.record for one in Pool([settings], tmp_path, jobs=1).run(lambda: None))
        assert dead.steps_done == 3 and dead.flags["death"]["goes_on"] is resumed
        # It counts its own steps: resumed, it never gets to the fourth.
        (again,) = (one.record for one in Pool([settings], tmp_path, jobs=1).run(lambda: None))
        assert again.status == ("completed" if resumed else "error")
        assert ("resumed" in again.flags) is resumed


def test_a_wrong_row_is_not_taken_for_a_right_one():
    right = FaultTrial("segfault", "forward", 3, "error", "segfault", 2, 2, "")
    assert right.right
    for wrong in ({"status": "oom"}, {"cause": "killed"}, {"cause": None}, {"steps_done": 1}, {"kind": "sigkill"}):
        assert not replace(right, **wrong).right


@pytest.mark.soak
@pytest.mark.parametrize("kind", FAULTS)
def test_fifty_of_each_are_classified(kind, tmp_path):
    wrong = [str(trial) for trial in run_faults(kind, 50, tmp_path / "out") if not trial.right]
    assert not wrong, wrong


WATCH_CUDA = """
import torch
asked = []
def watched(name):
    real = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *arguments: (asked.append(name), real(*arguments))[1])
for name in ("is_available", "device_count", "_lazy_init", "current_device"):
    watched(name)
import harness.supervisor.worker
print(asked)
from torch import cuda; cuda.is_available()
print(asked)
"""
"""The calls by which torch binds a process to a GPU's driver; asking how many there are is enough."""


def test_the_worker_is_imported_without_asking_for_a_gpu():
    found = subprocess.run([sys.executable, "-c", WATCH_CUDA], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "['is_available']"]  # the second: who asks is seen
