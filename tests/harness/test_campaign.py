"""The whole command on a CPU, at sizes that take no time: cut by SIGKILL and by SIGTERM, it adds up to one campaign."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from harness import cli
from harness.campaign import stages
from harness.campaign.command import ASKED, probe
from harness.campaign.stages import StageExit
from harness.exit_codes import exit_code_of
from instrument.results.lines import read
from instrument.results.schemas import RunRecord

SMALL = (
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--cases",
    "gpt2_clm",
    "--configs",
    "bf16_pure",
    "--seeds",
    "0",
    "--max-steps",
    "100",
    "--batch-size",
    "2",
    "--micro-batch",
    "2",
    "--seq-len",
    "16",
    "--documents",
    "300",
    "--validation-documents",
    "2",
    "--ops",
    "logit_stats",
    "--pairs",
    "2",
    "--minutes",
    "20",
)
QUICK = ("--skip", "doctor", "check", "bench", "overhead", "overflow", "fit")


def start(folder, *more):
    command = [
        sys.executable,
        "-m",
        "harness",
        "campaign",
        *SMALL,
        "--results",
        str(folder / "results"),
        "--out",
        str(folder / "out"),
        *more,
    ]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )


def wait_for_steps(folder, config, at_least, campaign, timeout_s=180):
    """Until a run of the matrix (not of the calibration) has made some steps."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for log in (folder / "results" / "training_logs").glob(f"run_gpt2_clm-{config}-*.jsonl"):
            if log.read_bytes().count(b"\n") >= at_least:
                return
        assert campaign.poll() is None, campaign.stderr.read()
        time.sleep(0.02)
    raise AssertionError("no steps in time")


def rows(folder):
    return {row.dtype_config: row for row in read(folder / "results.jsonl", RunRecord)}


@pytest.mark.process
@pytest.mark.parametrize("cut", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_cut_in_the_middle_it_is_one_campaign(tmp_path, plan, cut):
    first = start(tmp_path, *QUICK)
    wait_for_steps(tmp_path, "bf16_pure", 5, first)
    first.send_signal(cut)
    _, words = first.communicate(timeout=120)
    book = json.loads((tmp_path / "results" / "campaign.json").read_text())
    if cut == signal.SIGKILL:
        assert book["stages"]["run-gpt2_clm-s0"]["state"] == "running"
    else:
        assert first.returncode == 75 and "the same command resumes" in words and book["calls"][-1]["end"] == "SIGTERM"
        assert book["stages"]["run-gpt2_clm-s0"]["state"] == "pending"

    second = start(tmp_path, *QUICK, "--json")
    out, words = second.communicate(timeout=240)
    assert second.returncode == 0, words
    book = json.loads(out)
    assert {entry["state"] for entry in book["stages"].values()} == {"done"} and book["calls"][-1]["end"] == "done"
    assert book["stages"]["run-gpt2_clm-s0"]["exit_code"] == 0 and len(book["calls"]) == 2

    # Together what one matrix would have given, bit for bit, and nothing was run twice.
    from harness.run.execute import execute

    found = rows(tmp_path / "results")
    assert set(found) == {"bf16_pure"} and found["bf16_pure"].status == "completed"
    sizes = {"max_steps": 100, "batch_size": 2, "micro_batch": 2, "seq_len": 16, "documents": 300, "validation_documents": 2}
    whole = execute(plan("gpt2_clm", "bf16_pure", **sizes), tmp_path / "whole")
    assert found["bf16_pure"].run_id == whole.run_id
    assert found["bf16_pure"].final_weights_sha256 == whole.final_weights_sha256

    # What is to be committed: a dossier, small, from which it can be built again.
    packed = tmp_path / "out"
    assert (packed / "dossier" / "index.html").is_file() and rows(packed).keys() == found.keys()
    subprocess.run(
        [sys.executable, "-m", "report", "build", str(packed), "--no-pdf", "--format", "svg", "--out", str(tmp_path / "again")],
        check=True,
        capture_output=True,
    )
    ours = json.loads((packed / "summary.json").read_text())
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    changed = [key for key in ours if again[key] != ours[key]]
    assert changed in ([], ["verdict"]) and again["defects"] == [], changed
    assert {k: v for k, v in again["verdict"].items() if k != "next_command"} == {
        k: v for k, v in ours["verdict"].items() if k != "next_command"
    }, "the next command names the folder"


@pytest.fixture
def quick_machine(monkeypatch):
    """A machine that was found out already."""
    from harness.campaign import command

    machine = {
        "device": "cpu",
        "slug": "cpu-x",
        "preset": "tiny",
        "preset_steps": 60,
        "preset_seeds": [0, 1, 2],
        "labels": ["gpt2_clm"],
        "configs": ["fp32_true"],
        "data": "embedded",
        "weights": "scratch",
        "environment": {"cpu": "x", "torch_version": "2"},
        "missing": {"weasyprint": "no PDF, HTML only"},
    }
    monkeypatch.setattr(command, "find_machine", lambda asked, estimates: machine)
    return machine


def campaign(tmp_path, *more):
    return cli.main(["campaign", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *more])


def planted(monkeypatch, ends):
    """Stages that take no time: ``ends`` says how each ends, by the beginning of its name."""
    ran = []

    def run(command, files, *, limit_s, call_s, stop, report=lambda pid, s: None, **_):
        ran.append(files.name)
        report(4242, 0.0)
        exit_code, cut = next((end for name, end in ends.items() if files.name.startswith(name)), (0, None))
        return StageExit(exit_code, 1.5, cut, f"last line of {files.name}")

    monkeypatch.setattr(stages, "run_process", run)
    return ran


def test_two_dossiers_and_what_grows_between_them_stay_within_the_minutes(tmp_path, quick_machine, monkeypatch):
    """On a clock that is planted: whatever is run takes all that it may, and the first block leaves no time for two."""
    from harness.campaign import call

    now_s, rows, ran = [1000.0], [], []
    monkeypatch.setattr(call.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(call, "finished_runs", lambda out: rows)
    monkeypatch.setattr(call.packing, "pack", lambda results, out: None)

    def run(command, files, *, limit_s, call_s, grace_s, **_):
        block = files.name.startswith("run-")
        rows.extend(range(10 * block))
        seconds = call_s + grace_s if block else 28.0 if files.name == "dossier" else 1.0
        now_s[0] += seconds
        ran.append(files.name)
        return StageExit(75 if block else 0, seconds, "call" if block else None, "")

    monkeypatch.setattr(stages, "run_process", run)
    assert campaign(tmp_path, "--minutes", "5", "--ops", "unscale") == 75
    assert now_s[0] <= 1300.0 and ran.count("dossier") == 1


def test_a_stage_that_fails_costs_only_itself(tmp_path, quick_machine, monkeypatch, capsys):
    ran = planted(monkeypatch, {"check-unscale": (-11, None), "overhead": (0, "limit")})
    assert campaign(tmp_path, "--ops", "unscale", "--skip", "fit") == 3
    assert [name for name in ran if name != "dossier"] == [
        "doctor",
        "check-unscale",
        "bench-unscale",
        "overhead",
        "calibrate",
        *[f"run-gpt2_clm-s{s}" for s in (0,)],
    ]
    stages = json.loads((tmp_path / "results" / "campaign.json").read_text())["stages"]
    assert stages["check-unscale"]["state"] == "failed" and "signal 11: last line" in stages["check-unscale"]["note"]
    assert stages["overhead"]["state"] == "cut" and stages["bench-unscale"]["state"] == "done"
    words = capsys.readouterr().err
    assert "failed: check-unscale" in words and "weasyprint is not installed: no PDF, HTML only" in words
    ran.clear()
    assert campaign(tmp_path) == 3 and ran == [], "what is settled is not run again"
    assert campaign(tmp_path, "--retry-failed") == 3 and ran == ["check-unscale"]


def test_a_call_without_minutes_leaves_everything_to_the_next(tmp_path, quick_machine, monkeypatch, capsys):
    ran = planted(monkeypatch, {"run-": (75, "call")})
    assert campaign(tmp_path, "--minutes", "0.1", "--total-minutes", "30") == 75 and ran == []
    assert "left to do: doctor" in capsys.readouterr().err
    assert campaign(tmp_path, "--minutes", "10") == 75, "the runs were stopped by the end of the call"
    book = json.loads((tmp_path / "results" / "campaign.json").read_text())
    assert book["total_minutes"] == 30 and book["stages"]["run-gpt2_clm-s0"]["state"] == "pending"
    steps = book["plan"]["max_steps"]
    planted(monkeypatch, {})
    assert campaign(tmp_path, "--minutes", "10") == 0
    assert json.loads((tmp_path / "results" / "campaign.json").read_text())["plan"]["max_steps"] == steps


def test_a_small_call_keeps_nothing_free_for_a_dossier_that_cannot_be(tmp_path, quick_machine, monkeypatch):
    """Before a run has ended there is none to build; from the first run on there is. What ends late is in the minutes."""
    from harness.campaign import call

    asked = {}

    def run(command, files, *, call_s, grace_s, report=lambda pid, s: None, **_):
        asked[files.name] = (call_s, grace_s)
        report(4242, 0.0)
        return StageExit(0, 0.0, None, "")

    monkeypatch.setattr(stages, "run_process", run)
    assert campaign(tmp_path, "--minutes", "2", "--ops", "unscale", "--skip", "fit", "bench") == 0
    for name, dossier_s in (("doctor", 0.0), ("overhead", 0.0), ("calibrate", 0.0), ("run-gpt2_clm-s0", call.DOSSIER_S["cpu"])):
        call_s, grace_s = asked[name]
        assert 100 < call_s + grace_s + dossier_s <= 120, name


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"data": "nowhere"}, "no such folder or file"),
        ({"cases": ["gpt3_clm"]}, "gpt3_clm"),
        ({"configs": ["fp4"]}, "fp4"),
        ({"cases": ["gpt2_clm@9999"]}, "longer than the"),
        ({"device": "cuda"}, "torch sees no GPU here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(asked, words):
    with pytest.raises(Exception, match=words) as raised:
        probe({**dict.fromkeys(ASKED), "preset": "tiny", **asked}, estimates=False)
    assert exit_code_of(raised.value) in (2, 4)
    again = pickle.loads(pickle.dumps(raised.value))  # it comes from a process of its own
    assert str(again) == str(raised.value) and type(again) is type(raised.value)


def test_a_hub_that_does_not_answer_ends_it_before_anything_is_written(monkeypatch):
    from bench_cases.data import hub

    def silence(kind, name, revision):
        raise hub.unavailable(name, ConnectionError("no route"))

    monkeypatch.setattr(hub, "commit_of", silence)
    with pytest.raises(Exception, match="no route.*--data DIR") as raised:
        probe({**dict.fromkeys(ASKED), "preset": "tiny", "data": "hub", "cases": ["gpt2_multi_cls"]}, estimates=False)
    assert exit_code_of(raised.value) == 5


def test_the_matched_control_joins_the_full_preset_only():
    for preset, sizes, labels in (("tiny", {}, 6), ("full", {}, 7), ("full", {"seq_len": 64}, 6)):
        asked = {**dict.fromkeys(ASKED), "preset": preset, "data": "embedded", "documents": 300, **sizes}
        found = probe(asked, estimates=False)
        assert len(found["labels"]) == labels and ("gpt2_clm@512" in found["labels"]) == (labels == 7)
        assert len(found["configs"]) == 7 and found["preset"] == preset


@pytest.mark.soak
def test_everything_once(tmp_path):
    done = start(tmp_path)
    out, words = done.communicate(timeout=1_200)
    assert done.returncode == 0, words
    for name in ("kernels.json", "kernel_check.json", "overhead.json", "machine.json", "dossier/index.html", "campaign.json"):
        assert (tmp_path / "out" / name).is_file(), name


@pytest.mark.soak
@pytest.mark.parametrize("seconds", range(2, 42, 4))
def test_killed_at_any_moment_it_goes_on(tmp_path, seconds):
    for _ in range(3):
        campaign = start(tmp_path, *QUICK)
        time.sleep(seconds)
        campaign.kill()
        campaign.wait()
    campaign = start(tmp_path, *QUICK)
    out, words = campaign.communicate(timeout=600)
    assert campaign.returncode == 0, words
    assert {row.status for row in rows(tmp_path / "results").values()} == {"completed"}
