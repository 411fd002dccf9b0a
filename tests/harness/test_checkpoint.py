"""Checkpoints on disk: whole or not there, two kept, damage skipped with a word; and a disk that fails."""

import errno
import json
import math
import os
import random
import resource
import shutil
from dataclasses import replace

import pytest

from harness.run import checkpoints
from harness.run.checkpoints import CheckpointError, CheckpointInterval, young_daly_s
from harness.run.execute import execute
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.files import TEMPORARY
from instrument.results.folder import OutputError, finished_run, log_paths, output_error
from instrument.results.lines import read
from instrument.results.schemas import StepRecord
from tests.harness.commands import Forked, harness

pytestmark = pytest.mark.slow


@pytest.fixture
def stopped(plan, tmp_path):
    """Settings, results folder and run folder of a run with checkpoints after steps 2 and 4, stopped after 5."""
    settings = plan("gpt2_single_cls", "amp_fp16", max_steps=7, batch_size=2, seq_len=16, checkpoint_every=2)
    stop, out = Stop(), tmp_path / "results"

    def asks(record):
        if isinstance(record, StepRecord) and record.step == 5:
            stop.request("SIGTERM")

    execute(settings, out, asks, stop=stop)
    return settings, out, out / "runs" / settings.run_id


def resumed(settings, out):
    """The run to its end; which step it went on from (None: from none) and the words about what was skipped."""
    record = execute(settings, out)
    assert record.status == "completed" and record.steps_done == 7
    flags = record.flags.get("resumed", {"behind_steps": [], "skipped": []})
    return (flags["behind_steps"] or [None])[-1], flags["skipped"], record.final_weights_sha256


def test_two_are_kept_without_a_pickle(stopped):
    settings, _, folder = stopped
    assert checkpoints.checkpoint_steps(folder) == [5, 4]
    assert sorted(p.name for p in (folder / "checkpoint-5").iterdir()) == ["snapshot.json", "tensors.safetensors"]
    state, progress = checkpoints.read_checkpoint(folder, settings.run_id, 5)
    assert state.step == 5 and state.scaler["scale"] > 0 and progress.taps["steps"] == 5
    with pytest.raises(CheckpointError, match="not of another"):
        checkpoints.read_checkpoint(folder, "another", 5)


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage(folder, kind):
    if kind == "a missing file":
        (folder / "snapshot.json").unlink()
    elif kind == "a truncated file":
        os.truncate(folder / "tensors.safetensors", 1000)
    else:
        flip_a_bit(folder / kind, random.Random(1))


@pytest.mark.parametrize("kind", ["a missing file", "a truncated file", "tensors.safetensors", "snapshot.json"])
def test_a_damaged_one_is_skipped_with_a_word_for_the_one_before(stopped, kind):
    settings, out, folder = stopped
    shutil.copytree(out, out.with_name("whole"))
    damage(folder / "checkpoint-5", kind)
    step, skipped, sha256 = resumed(settings, out)
    assert step == 4 and len(skipped) == 1 and skipped[0].startswith("checkpoint-5: ")
    assert resumed(settings, out.with_name("whole"))[::2] == (5, sha256)


def test_no_flipped_bit_passes(stopped):
    settings, _, folder = stopped
    rng = random.Random(0)
    for name in ["snapshot.json"] * 150 + ["tensors.safetensors"] * 20:
        path = folder / "checkpoint-5" / name
        whole = path.read_bytes()
        flip_a_bit(path, rng)
        try:
            state, progress = checkpoints.read_checkpoint(folder, settings.run_id, 5)
        except CheckpointError:
            pass
        else:  # between two tokens of the JSON, say: then nothing else is read than was written
            path.write_bytes(whole)
            before = checkpoints.read_checkpoint(folder, settings.run_id, 5)
            assert (progress, state.groups, state.states, state.scaler) == (
                before[1],
                before[0].groups,
                before[0].states,
                before[0].scaler,
            )
        path.write_bytes(whole)


def test_with_all_of_them_damaged_the_run_starts_over_and_says_so(stopped):
    settings, out, folder = stopped
    for step in (4, 5):
        damage(folder / f"checkpoint-{step}", "tensors.safetensors")
    step, skipped, _ = resumed(settings, out)
    assert step is None and len(skipped) == 2


@pytest.mark.parametrize(("log", "used"), [("steps", 4), ("evaluations", None)])
def test_a_log_that_lost_lines_is_not_gone_on_from(stopped, log, used):
    settings, out, _ = stopped
    path = out / log_paths(settings.run_id)[log]
    os.truncate(path, path.stat().st_size - 1)
    step, skipped, _ = resumed(settings, out)
    assert step == used and "is not what it was: 1 bytes are missing" in skipped[0]


def test_another_torch_or_processor_starts_over(stopped, monkeypatch):
    settings, out, _ = stopped
    monkeypatch.setattr(
        "harness.run.checkpoints.capture", lambda device: {"torch_version": "1.0", "cpu": "x", "cpu_capability": "y"}
    )
    step, skipped, _ = resumed(settings, out)
    assert step is None and "torch_version was" in skipped[0] and "and is 1.0" in skipped[0]


def test_what_a_killed_process_half_wrote_is_swept_away(stopped):
    settings, out, folder = stopped
    left = folder / f".checkpoint-6.abc{TEMPORARY}"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert resumed(settings, out)[0] == 5
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name]


def test_young_daly():
    assert young_daly_s(30.0, 24 * 3600.0) == pytest.approx(math.sqrt(2 * 30 * 86400))
    # the overhead cost / T + T / (2 mtbf) is least there: T found by trying every one
    least = min(range(10, 20_000), key=lambda t: 30 / t + t / (2 * 86400))
    assert young_daly_s(30.0, 86400.0) == pytest.approx(least, abs=1)
    assert young_daly_s(100.0, 10.0) == 100.0  # outside of what the formula is for


def test_the_interval_follows_the_measured_cost():
    now = [0.0]
    interval = CheckpointInterval(every_steps=0, mtbf_s=200.0, first_step=3, clock=lambda: now[0])
    assert [interval.due(step) for step in (1, 2, 3)] == [False, False, True]
    interval.wrote(1.0)
    assert interval.interval_s == 20.0 and not interval.due(4)
    now[0] = 20.0
    assert interval.due(5)
    interval.wrote(3.0)
    assert interval.interval_s == pytest.approx(math.sqrt(2 * 2 * 200)) and "Young/Daly" in interval.rule


def test_mtbf_in_a_run(plan, tmp_path):
    record = execute(plan("gpt2_single_cls", "fp32_true", max_steps=12, batch_size=2, seq_len=16, mtbf_s=1e-6), tmp_path)
    found = record.flags["checkpoints"]
    assert found["written"] >= 1 and found["interval_s"] == pytest.approx(found["cost_s"], rel=0.01)
    assert record.flags["timings_s"]["checkpoints"] == pytest.approx(found["written"] * found["cost_s"], rel=0.05)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mtbf_s": -1.0}, "mtbf is -1 s"),
        ({"checkpoint_every": -1}, "at least 0"),
        ({"mtbf_s": 1.0, "checkpoint_every": 2}, "give one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(plan, asked, words):
    with pytest.raises(SettingsError, match=words):
        plan("gpt2_clm", "fp32_true", **asked)


def test_checkpoints_are_no_part_of_a_runs_identity(plan):
    assert plan("gpt2_clm", "fp32_true").run_id == plan("gpt2_clm", "fp32_true", checkpoint_every=9).run_id


def disk_full_after(monkeypatch, out, nbytes):
    """Every write below ``out`` after its first ``nbytes`` fails as on a full disk, the last one in its middle."""
    real, room = os.write, [nbytes]

    def write(fd, data):
        if not os.readlink(f"/proc/self/fd/{fd}").startswith(str(out)):
            return real(fd, data)
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("nbytes", [0, 700, 2000, 4000, 6000, 12_000])
def test_a_disk_that_fills_up_ends_the_run_with_its_lines_intact(plan, tmp_path, monkeypatch, nbytes):
    settings = plan("gpt2_single_cls", "fp32_true", max_steps=7, batch_size=2, seq_len=16, checkpoint_every=2)
    whole = execute(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk_full_after(patch, tmp_path / "full", nbytes)
        with pytest.raises(OutputError, match="No space left on device"):
            execute(settings, tmp_path / "full")
    assert finished_run(tmp_path / "full", settings.run_id) is None
    log = tmp_path / "full" / log_paths(settings.run_id)["steps"]
    if log.exists():  # at most its last line is torn
        *lines, last = log.read_bytes().split(b"\n")
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    record = execute(settings, tmp_path / "full")  # there is room again
    assert record.final_weights_sha256 == whole.final_weights_sha256
    assert [r.step for r in read(log, StepRecord)] == list(range(1, 8))


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(stopped, monkeypatch):
    settings, out, folder = stopped

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("harness.forensics.stored.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        execute(settings, out)
    assert checkpoints.checkpoint_steps(folder) == [5, 4] and not list(folder.glob(".checkpoint*"))
    monkeypatch.undo()
    assert resumed(settings, out)[0] == 5


@pytest.mark.parametrize("goes", ["renamed", "removed", "its log removed"])
def test_a_folder_that_disappears_is_noticed_and_not_made_again(plan, tmp_path, goes):
    settings = plan("gpt2_single_cls", "fp32_true", max_steps=7, batch_size=2, seq_len=16)
    out = tmp_path / "results"

    def disappears(record):
        if isinstance(record, StepRecord) and record.step == 3:
            if goes == "its log removed":
                (out / log_paths(settings.run_id)["steps"]).unlink()
            else:
                out.rename(tmp_path / "elsewhere")
                if goes == "removed":
                    shutil.rmtree(tmp_path / "elsewhere")

    with pytest.raises(OutputError, match=("has disappeared" if goes != "its log removed" else "No such file")):
        execute(settings, out, disappears)
    assert not (out / "runs" / settings.run_id / "run.json").exists()
    if goes == "renamed":
        assert len(list(read(tmp_path / "elsewhere" / log_paths(settings.run_id)["steps"], StepRecord))) >= 3


def test_an_error_about_something_else_is_not_the_folders(tmp_path):
    assert output_error(FileNotFoundError(errno.ENOENT, "no compiler", "/usr/bin/g++"), tmp_path) is None
    assert output_error(ConnectionResetError(errno.ECONNRESET, "x"), tmp_path) is None
    assert "Read-only file system" in str(output_error(OSError(errno.EROFS, "x", str(tmp_path / "a")), tmp_path))


def on_a_full_disk(words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return harness(words)


@pytest.mark.process
@pytest.mark.parametrize("command", ["case", "matrix"])
def test_a_full_disk_exits_5_with_one_sentence(tmp_path, command):
    """A real limit: no file of the process may grow beyond 100 KB, and a checkpoint is larger."""
    words = (
        ["case", "gpt2_single_cls", "fp32_true"]
        if command == "case"
        else ["matrix", "--cases", "gpt2_single_cls", "--configs", "fp32_true", "amp_bf16", "--jobs", "2"]
    )
    words += [
        "--preset",
        "tiny",
        "--data",
        "embedded",
        "--max-steps",
        "40",
        "--batch-size",
        "2",
        "--micro-batch",
        "2",
        "--seq-len",
        "16",
        "--documents",
        "400",
        "--validation-documents",
        "4",
        "--checkpoint-every",
        "2",
    ]
    process = Forked([*words, "--out", str(tmp_path / "out")], tmp_path / "command", call=on_a_full_disk)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 5, errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("harness: ")]
    assert "File too large" in sentence and "what was written before is intact" in sentence
    assert "Traceback" not in errors
    rows = [json.loads(path.read_bytes()) for path in (tmp_path / "out").glob("runs/*/run.json")]
    assert all(row["status"] == "preempted" for row in rows), rows  # the other run, stopped before it met the limit


def test_an_unwritable_folder_is_refused_in_one_sentence(stopped, monkeypatch):
    settings, out, _ = stopped

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out / "runs"))

    monkeypatch.setattr("instrument.results.folder.truncate", denied)
    with pytest.raises(OutputError, match="Permission denied"):
        execute(replace(settings, log_every=2), out)
