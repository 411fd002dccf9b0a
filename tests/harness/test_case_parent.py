"""A single run and its thin parent."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.options import parser
from harness.supervisor.case_parent import is_wanted
from instrument.results.folder import finished_runs
from tests.harness.commands import SMALL, Forked, logged, wait_until

pytestmark = pytest.mark.process
OWN = """from tests.soak.reliability.faults import case_with
from tests.soak.reliability.plants import Plant
"""


@pytest.fixture
def case(tmp_path):
    """``case(Plant(...), out, *words)``: the command with that fault, started."""

    def start(plant: str, out: str, *words: str) -> Forked:
        own = tmp_path / f"{out}.py"
        own.write_text(f"{OWN}CASE = case_with({plant})\n")
        return Forked(["case", f"{own}:CASE", "fp32_true", *SMALL, "--out", str(tmp_path / out), *words], tmp_path / out)

    return start


def test_a_crash_and_a_hang_of_a_single_run_are_rows_and_exit_code_3(case, tmp_path):
    hanging = case('Plant("hang_with_the_lock", "forward", 3)', "hung", "--max-steps", "5", "--hang-after", "6")
    crashing = case('Plant("segfault", "forward", 3)', "crashed", "--max-steps", "5", "--json")
    printed, errors = crashing.communicate(timeout=300)
    (row,) = finished_runs(tmp_path / "crashed")
    assert crashing.returncode == 3, errors
    assert (row.status, row.steps_done, row.flags["death"]["cause"]) == ("error", 2, "segfault")
    assert json.loads(printed)["run_id"] == row.run_id
    assert "error after 2 steps" in errors and "killed by SIGSEGV in training after step 2, at " in errors
    assert "string_at" in (tmp_path / "crashed" / "runs" / row.run_id / "output.log").read_text()

    errors = hanging.communicate(timeout=300)[1]
    (row,) = finished_runs(tmp_path / "hung")
    assert (hanging.returncode, row.status, row.steps_done) == (3, "hung", 2), errors
    assert "_hang_with_the_lock; ended by SIGKILL" in errors


def test_who_kills_the_parent_kills_the_run_and_who_kills_the_run_gets_a_row(case, tmp_path):
    for victim, row_expected in (("parent", False), ("run", True)):
        process = case('Plant("none", "forward", 1)', victim, "--max-steps", "100000")
        wait_until(lambda out=tmp_path / victim: any(logged(out)), process, timeout_s=200)
        (run,) = [child.pid for child in psutil.Process(process.pid).children()]
        os.kill(process.pid if victim == "parent" else run, signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
        until = time.monotonic() + 60
        while is_alive(run):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert [row.flags["death"]["cause"] for row in finished_runs(tmp_path / victim)] == ["killed"] * row_expected
        assert process.returncode == (3 if row_expected else -signal.SIGKILL), errors


def test_a_killed_run_whose_row_cannot_be_written_is_a_sentence_and_exit_code_5(case, tmp_path):
    """On a full disk (of the parent, which writes the row), and where somebody deleted the folder: it is not made again."""
    for what in ("full", "deleted"):
        out, process = tmp_path / what, case('Plant("none", "forward", 1)', what, "--max-steps", "100000")
        wait_until(lambda out=out: any(logged(out)), process, timeout_s=200)
        (run,) = psutil.Process(process.pid).children()
        run.suspend()
        if what == "full":
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (2000, 2000))
        else:
            out.rename(tmp_path / "away")
        run.kill()
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 5 and "Traceback" not in errors and errors.count("harness: ") == 1, errors
        assert ("has disappeared" in errors and not out.exists()) if what == "deleted" else "File too large" in errors
        assert finished_runs(out) == []


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_who_has_a_parent():
    run = parser().parse_args(["case", "gpt2_clm", "fp32_true"])
    assert is_wanted(run, {}.get)
    assert not is_wanted(parser().parse_args(["case", "gpt2_clm", "fp32_true", "--dry-run"]), {}.get)
    assert not is_wanted(run, {"LOCAL_RANK": "0"}.get)  # torchrun supervises its ranks


def test_what_is_refused_costs_no_process_and_keeps_its_exit_code(command_environment):
    command = [sys.executable, "-m", "harness", "case"]
    asked = [
        (["gpt2_clm", "fp32_true", "--hang-after", "-3"], 2, "'-3'; allowed: seconds from 0"),
        (["nonsense", "fp32_true"], 2, "nonsense"),
        (["--help"], 0, ""),
    ]
    for words, code, said in asked:
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=command_environment)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_the_parent_imports_no_torch(command_environment):
    code = "import sys, harness.supervisor.case_parent; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=command_environment).returncode == 0
