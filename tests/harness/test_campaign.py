"""The whole command on a CPU, at sizes that take no time: cut by SIGKILL and by SIGTERM, it adds up to one campaign."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from instrument.results.lines import read
from instrument.results.schemas import RunRecord
from report.cli import main as report
from tests.harness.commands import Forked, ForkedCommand, harness

SMALL = (
    "--preset tiny --data embedded --cases gpt2_clm --configs bf16_pure --seeds 0 --max-steps 60 --batch-size 2 --micro-batch 2"
    " --seq-len 16 --documents 300 --validation-documents 2 --ops logit_stats --pairs 2 --minutes 20"
).split()
QUICK = ("--skip", "doctor", "check", "bench", "overhead", "overflow", "fit")
pytestmark = pytest.mark.process


def start(folder, *more, fork=False):
    """The command, executed, or else forked as all of its stages and runs are, which saves half a minute."""
    words = ["campaign", *SMALL, "--results", str(folder / "results"), "--out", str(folder / "out"), *more]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if fork:
        return Forked(words, folder / "campaign", environment, forking_campaign)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "harness", *words], env=environment, **pipes)


def forking_campaign(words):
    from harness.campaign import plan
    from harness.supervisor import child_process

    plan.multiprocessing = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    popen = functools.partial(ForkedCommand, close_fds=False)  # a stage that runs runs needs the fork server's
    child_process.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)
    return harness(words)


def wait_for_steps(folder, config, at_least, campaign, timeout_s=180):
    """Until a run has made some steps."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for log in (folder / "results" / "training_logs").glob(f"run_gpt2_clm-{config}-*.jsonl"):
            if log.read_bytes().count(b"\n") >= at_least:
                return
        assert campaign.poll() is None, campaign.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("no steps in time")


def rows(folder):
    return {row.dtype_config: row for row in read(folder / "results.jsonl", RunRecord)}


@pytest.mark.parametrize("cut", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_cut_in_the_middle_it_is_one_campaign(tmp_path, plan, cut):
    fork = cut == signal.SIGKILL
    first = start(tmp_path, *QUICK, fork=fork)
    wait_for_steps(tmp_path, "bf16_pure", 5, first)
    first.send_signal(cut)
    _, words = first.communicate(timeout=120)
    state = json.loads((tmp_path / "results" / "campaign.json").read_text())
    if cut == signal.SIGKILL:
        assert state["stages"]["run-gpt2_clm-s0"]["state"] == "running"
    else:
        assert first.returncode == 75 and "the same command resumes" in words and state["calls"][-1]["end"] == "SIGTERM"
        assert state["stages"]["run-gpt2_clm-s0"]["state"] == "pending"

    second = start(tmp_path, *QUICK, "--json", fork=fork)
    out, words = second.communicate(timeout=240)
    assert second.returncode == 0, words
    state = json.loads(out)
    assert {entry["state"] for entry in state["stages"].values()} == {"done"} and state["calls"][-1]["end"] == "done"
    assert state["stages"]["run-gpt2_clm-s0"]["exit_code"] == 0 and len(state["calls"]) == 2

    # Together what one matrix would have given, bit for bit, and nothing was run twice.
    from harness.run.execute import execute

    found = rows(tmp_path / "results")
    assert set(found) == {"bf16_pure"} and found["bf16_pure"].status == "completed"
    sizes = {"max_steps": 60, "batch_size": 2, "micro_batch": 2, "seq_len": 16, "documents": 300, "validation_documents": 2}
    whole = execute(plan("gpt2_clm", "bf16_pure", **sizes), tmp_path / "whole")
    assert found["bf16_pure"].run_id == whole.run_id
    assert found["bf16_pure"].final_weights_sha256 == whole.final_weights_sha256

    # What is to be committed: a dossier, small, from which it can be built again.
    packed = tmp_path / "out"
    assert (packed / "dossier" / "index.html").is_file() and rows(packed).keys() == found.keys()
    assert report(["build", str(packed), "--no-pdf", "--format", "svg", "--out", str(tmp_path / "again")]) == 0
    ours = json.loads((packed / "summary.json").read_text())
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    changed = [key for key in ours if again[key] != ours[key]]
    assert changed in ([], ["verdict"]) and again["defects"] == [], changed
    assert {k: v for k, v in again["verdict"].items() if k != "next_command"} == {
        k: v for k, v in ours["verdict"].items() if k != "next_command"
    }, "the next command names the folder"


@pytest.mark.soak
def test_everything_once(tmp_path):
    done = start(tmp_path)
    out, words = done.communicate(timeout=1_200)
    assert done.returncode == 0, words
    for name in ("kernels.json", "kernel_check.json", "overhead.json", "machine.json", "dossier/index.html", "campaign.json"):
        assert (tmp_path / "out" / name).is_file(), name


@pytest.mark.soak
@pytest.mark.parametrize("seconds", range(2, 42, 4))
def test_killed_at_any_moment_it_resumes(tmp_path, seconds):
    for _ in range(3):
        campaign = start(tmp_path, *QUICK)
        time.sleep(seconds)
        campaign.kill()
        campaign.wait()
    campaign = start(tmp_path, *QUICK)
    out, words = campaign.communicate(timeout=600)
    assert campaign.returncode == 0, words
    assert {row.status for row in rows(tmp_path / "results").values()} == {"completed"}
