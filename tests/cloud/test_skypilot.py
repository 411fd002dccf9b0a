"""The SkyPilot task: fields that SkyPilot documents, nothing of anybody's account, and a script that does what it says."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "cloud" / "skypilot.yaml"
FIELDS = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "file_mounts",
    "volumes",
    "setup",
    "run",
    "config",
    "service",
}
RESOURCES = {
    "infra",
    "cloud",
    "region",
    "zone",
    "accelerators",
    "accelerator_args",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "disk_tier",
    "network_tier",
    "image_id",
    "ports",
    "labels",
    "any_of",
    "ordered",
    "job_recovery",
    "autostop",
}
"""The fields of https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load(TASK.read_text())


def test_every_field_is_one_that_skypilot_documents(task):
    assert set(task) <= FIELDS and set(task["resources"]) <= RESOURCES
    assert isinstance(task["num_nodes"], int) and re.fullmatch(r"[A-Za-z0-9-]+:1", task["resources"]["accelerators"])
    assert task["resources"]["use_spot"] is True and isinstance(task["resources"]["disk_size"], int)
    assert all(isinstance(value, (str, int, type(None))) for value in task["envs"].values())
    (mount,) = task["file_mounts"].values()
    assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
    assert set(mount) <= {"name", "source", "store", "mode", "persistent"}
    assert all(isinstance(task[name], str) for name in ("name", "workdir", "setup", "run"))


def test_it_names_no_account_no_region_and_no_secret(task):
    assert not {"region", "zone", "cloud", "infra", "instance_type", "image_id"} & set(task["resources"])
    assert task["envs"]["BUCKET"] is None and task["file_mounts"]["/ddb-results"]["source"] == "${BUCKET}"
    assert "secrets" not in task and not re.search(r"(?i)token|secret|api_key|password", TASK.read_text())
    assert all(subprocess.run(["bash", "-n"], input=task[name], text=True).returncode == 0 for name in ("setup", "run"))


@pytest.fixture
def node(task, tmp_path):
    """``node(body, rank=0, nodes=2)``: the task's run section in an empty folder, with a python that does ``body``."""
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed here; the task's setup installs it")

    def run(body, rank=0, nodes=2, sync_every_s="1000"):
        work = tmp_path / f"work-{rank}-{time.monotonic_ns()}"
        work.mkdir()
        python = work / "python"
        python.write_text(f'#!/bin/bash\necho "$@" > {work}/asked\nout=$7\n{body}\n')
        python.chmod(0o755)
        environment = {
            **os.environ,
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": str(nodes),
            "PYTHON": str(python),
            "DDB_BUCKET_FOLDER": str(tmp_path / "bucket"),
            "MATRIX": "--preset full --mtbf 7200",
            "SYNC_EVERY_S": sync_every_s,
        }
        (tmp_path / "bucket").mkdir(exist_ok=True)
        started.append(
            subprocess.Popen(["bash", "-c", task["run"]], cwd=work, env=environment, text=True, start_new_session=True)
        )
        return started[-1], work

    started = []
    yield run
    for process in started:  # and the copying that a failed test left
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


WRITE = "mkdir -p $out/runs/a; echo row > $out/runs/a/run.json; touch $out/runs/a/.claim; ls $out/runs > seen"


@pytest.mark.parametrize("code, ends", [(0, 0), (3, 0), (4, 4), (5, 5), (75, 75)])
def test_a_node_runs_its_shard_and_brings_its_results_to_the_bucket(node, tmp_path, code, ends):
    process, work = node(f"{WRITE}; exit {code}", rank=1, nodes=4)
    assert process.wait(timeout=60) == ends
    assert (
        work / "asked"
    ).read_text() == "-m harness matrix --shard 2/4 --out results/shard-2-of-4 --preset full --mtbf 7200\n"
    bucket = tmp_path / "bucket" / "shard-2-of-4"
    assert (bucket / "runs" / "a" / "run.json").read_text() == "row\n" and not (bucket / "runs" / "a" / ".claim").exists()


def test_a_new_machine_goes_on_with_what_the_bucket_has(node, tmp_path):
    process, _ = node(WRITE)
    assert process.wait(timeout=60) == 0
    process, work = node("cat $out/runs/a/run.json > seen; rm -r $out/runs/a; mkdir -p $out/runs/b; echo > $out/runs/b/log")
    assert process.wait(timeout=60) == 0 and (work / "seen").read_text() == "row\n"
    assert [path.name for path in (tmp_path / "bucket" / "shard-1-of-2" / "runs").iterdir()] == ["b"]


def test_results_reach_the_bucket_while_the_matrix_runs_and_when_it_is_stopped(node, tmp_path):
    process, _ = node(
        f'trap "touch $out/runs/a/checkpoint; exit 75" TERM; {WRITE}; while :; do sleep 0.05; done', sync_every_s="0.2"
    )
    row = tmp_path / "bucket" / "shard-1-of-2" / "runs" / "a" / "run.json"
    deadline_s = time.monotonic() + 60
    while not row.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert row.exists() and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75 and (row.parent / "checkpoint").exists()
