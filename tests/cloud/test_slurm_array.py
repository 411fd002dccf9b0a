"""The Slurm script: it parses, asks for what it says, and runs shards that queue themselves again when they must."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cloud" / "slurm_array.sh"
PLAN = [
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--cases",
    "gpt2_clm",
    "--configs",
    "fp32_true",
    "amp_bf16",
    "bf16_pure",
    "--dry-run",
    "--json",
]


def directives():
    """What sbatch reads: the #SBATCH lines before the first command."""
    found = {}
    for line in SCRIPT.read_text().splitlines():
        if line.startswith("#SBATCH "):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert option, line
            assert option[1] not in found, line
            found[option[1]] = option[2]
        elif line and not line.startswith("#"):
            break
    return found


def test_it_is_bash_and_all_of_its_directives_are_read_by_slurm():
    assert SCRIPT.read_text().startswith("#!/bin/bash\n")
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    found = directives()
    assert len(found) == SCRIPT.read_text().count("\n#SBATCH ")
    assert found["array"] == "1-4" and found["signal"] == "B:TERM@120" and found["requeue"] is None and "requeue" in found
    assert found["gres"] == "gpu:1" and found["nodes"] == found["ntasks"] == "1" and found["open-mode"] == "append"
    assert re.fullmatch(r"\d\d:\d\d:\d\d", found["time"]) and not {"account", "partition", "qos", "mail-user"} & set(found)


@pytest.fixture
def slurm(tmp_path):
    """``slurm(*options, task=1, count=2, python=..., **environment)``: a Popen of the script as an array task."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)

    def submit(*words, task=1, count=2, python=sys.executable, **environment):
        task_of = {
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_MAX": str(count),
            "SLURM_ARRAY_TASK_COUNT": str(count),
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_JOB_ID": str(77 + task),
            "PYTHON": str(python),
            "RESULTS": str(tmp_path / "results"),
        }
        environment = (
            {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | task_of | environment
        )
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
        return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1)

    return submit


def a_python(tmp_path, body):
    """An executable that stands for python: it notes its arguments, then does as its arguments say."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked.part; mv {tmp_path}/asked.part {tmp_path}/asked\n{body}\n')
    path.chmod(0o755)
    return path


def test_the_tasks_of_an_array_run_all_of_the_matrix_once(slurm, tmp_path):
    tasks = [slurm(*PLAN, task=task) for task in (1, 2)]
    plans = []
    for task in tasks:
        out, err = task.communicate(timeout=300)
        assert task.returncode == 0, err
        plans.append(json.loads(out))
    assert [len(plan["todo"]) for plan in plans] == [1, 2] and len({run for plan in plans for run in plan["todo"]}) == 3
    assert [Path(plan["results_folder"]).name for plan in plans] == ["shard-1-of-2", "shard-2-of-2"]


@pytest.mark.parametrize("code", [0, 2, 3, 5, 75])
def test_the_exit_code_is_the_matrix_s_and_a_spent_budget_is_not_requeued(slurm, tmp_path, code):
    task = slurm("--preset", "full", task=2, count=8, python=a_python(tmp_path, f"exit {code}"))
    task.communicate(timeout=60)
    assert task.returncode == code and not (tmp_path / "requeued").exists()
    assert (tmp_path / "asked").read_text().split() == [
        "-m",
        "harness",
        "matrix",
        "--shard",
        "2/8",
        "--out",
        str(tmp_path / "results" / "shard-2-of-8"),
        "--preset",
        "full",
    ]


def stopped(slurm, tmp_path, body, signals=1):
    task = slurm(task=3, count=4, python=a_python(tmp_path, body))
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "listening").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for _ in range(signals):
        task.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    task.communicate(timeout=60)
    return task.returncode


LISTENING = 'touch "${0%/*}/listening"; while :; do sleep 0.05; done'
CHECKPOINTS = f'trap "sleep 0.5; exit 75" TERM; {LISTENING}'


@pytest.mark.parametrize("signals", [1, 3])
def test_a_task_that_slurm_stops_waits_for_the_checkpoints_and_queues_itself_again(slurm, tmp_path, signals):
    assert stopped(slurm, tmp_path, CHECKPOINTS, signals) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 77_3\n"


def test_a_task_that_ended_just_before_it_was_stopped_is_not_queued_again(slurm, tmp_path):
    assert stopped(slurm, tmp_path, f'trap "exit 0" TERM; {LISTENING}') == 0
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"SLURM_ARRAY_TASK_ID": ""}, "no array task"),
        ({"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, "SHARDS=N"),
        ({"SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_COUNT": "2"}, "SHARDS=N"),
        ({"PYTHON": "no/such/python"}, "install.sh"),
    ],
)
def test_what_would_run_the_wrong_shards_is_refused(slurm, environment, says):
    task = slurm(**environment)
    _, err = task.communicate(timeout=60)
    assert task.returncode == 2 and says in err and err.count("\n") == 1


def test_some_shards_of_a_known_number_can_be_run_again(slurm, tmp_path):
    task = slurm(task=5, python=a_python(tmp_path, "exit 0"), SHARDS="8", SLURM_ARRAY_TASK_MIN="3", SLURM_ARRAY_TASK_MAX="5")
    task.communicate(timeout=60)
    assert task.returncode == 0 and "--shard 5/8" in (tmp_path / "asked").read_text()
