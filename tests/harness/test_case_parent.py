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

SMALL = [
    "fp32_true",
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
OWN = """from tests.soak.reliability.faults import case_with
from tests.soak.reliability.plants import Plant
"""


@pytest.fixture
def case(tmp_path, command_environment):
    """``case(Plant(...), *words)``: the command with that fault, started."""

    def start(plant: str, *words: str, **environment: str) -> subprocess.Popen:
        own = tmp_path / "own.py"
        own.write_text(f"{OWN}CASE = case_with({plant})\n")
        return subprocess.Popen(
            [sys.executable, "-m", "harness", "case", f"{own}:CASE", *SMALL, "--out", str(tmp_path / "out"), *words],
            env=command_environment | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_a_crash_of_a_single_run_is_a_row_and_exit_code_3(case, tmp_path):
    process = case('Plant("segfault", "forward", 3)', "--max-steps", "5", "--json")
    told, heard = process.communicate(timeout=300)
    (row,) = finished_runs(tmp_path / "out")
    assert process.returncode == 3, heard
    assert (row.status, row.steps_done, row.flags["death"]["cause"]) == ("error", 2, "segfault")
    assert json.loads(told)["run_id"] == row.run_id
    assert "error after 2 steps" in heard and "killed by SIGSEGV in training after step 2, at " in heard
    assert "string_at" in (tmp_path / "out" / "runs" / row.run_id / "output.log").read_text()


def test_a_hang_with_the_lock_held_is_ended(case, tmp_path):
    process = case('Plant("hang_with_the_lock", "forward", 3)', "--max-steps", "5", "--hang-after", "8")
    heard = process.communicate(timeout=300)[1]
    (row,) = finished_runs(tmp_path / "out")
    assert (process.returncode, row.status, row.steps_done) == (3, "hung", 2), heard
    assert "_hang_with_the_lock; ended by SIGKILL" in heard


def test_who_kills_the_parent_kills_the_run_and_who_kills_the_run_gets_a_row(case, tmp_path):
    for victim, row_expected in (("parent", False), ("run", True)):
        process = case('Plant("none", "forward", 1)', "--max-steps", "100000")
        log = tmp_path / "out" / "training_logs"
        until = time.monotonic() + 200
        while not any(path.stat().st_size for path in log.glob("*.jsonl")):
            assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
            time.sleep(0.05)
        (run,) = children(process.pid)
        os.kill(process.pid if victim == "parent" else run, signal.SIGKILL)
        heard = process.communicate(timeout=60)[1]
        while alive(run):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert [row.flags["death"]["cause"] for row in finished_runs(tmp_path / "out")] == ["killed"] * row_expected
        assert process.returncode == (3 if row_expected else -signal.SIGKILL), heard
        for path in log.glob("*.jsonl"):
            path.unlink()


def children(pid):
    return [child.pid for child in psutil.Process(pid).children()]


def alive(pid):
    try:
        return "State:\tZ" not in open(f"/proc/{pid}/status").read()
    except FileNotFoundError:
        return False


def test_who_has_a_parent():
    run = parser().parse_args(["case", "gpt2_clm", "fp32_true"])
    assert is_wanted(run, {}.get)
    assert not is_wanted(parser().parse_args(["case", "gpt2_clm", "fp32_true", "--dry-run"]), {}.get)
    assert not is_wanted(run, {"LOCAL_RANK": "0"}.get)  # torchrun supervises its ranks
    assert not is_wanted(run, {"DDB_CRASH_AT_FILE_OPERATION": "4"}.get)


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
