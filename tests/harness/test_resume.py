"""A run that was stopped and goes on equals the one that was not, bit for bit, in every configuration."""

import json
import math
import os
import random
import shutil
import threading
import time
from collections import deque
from dataclasses import replace

import msgspec
import pytest

from bench_cases import DTYPE_CONFIGS
from harness import checkpoint
from harness.checkpointing import Checkpointing
from harness.cli import main
from harness.pool import Pool
from harness.resume import log_paths
from harness.run import execute
from harness.run_folder import finished_run
from harness.signals import Stop
from instrument.log import read
from instrument.records import EvaluationRecord, EventRecord, StepRecord
from instrument.watch.module_log import ModuleRecord

TIMES = {"step_time_s", "mfu", "mfu_bf16_peak", "mfu_measured_peak", "mfu_real_tokens", "mfu_bf16_peak_real_tokens",
         "mfu_measured_peak_real_tokens", "duration_s"}
KINDS = {"steps": StepRecord, "evaluations": EvaluationRecord, "events": EventRecord, "activations": ModuleRecord}
OF_THE_RUN = ("status", "steps_done", "final_weights_sha256", "init_sha256", "data_sha256", "loss_initial", "train_loss_final",
              "val_loss", "f1_micro", "perplexity", "scaler_skips", "divergence_step", "first_nonfinite", "flops_per_step")


def written(settings, out):
    """Everything a run wrote that does not depend on time, and its row's results."""
    logs = {name: [{k: v for k, v in msgspec.to_builtins(record).items() if k not in TIMES}
                   for record in read(out / path, KINDS[name])]
            for name, path in log_paths(settings.run_id).items() if (out / path).exists()}
    row = finished_run(out, settings.run_id)
    return logs, {name: getattr(row, name) for name in OF_THE_RUN}


def stopped_at(settings, out, step):
    """Run until a signal comes during ``step`` (0: during the first evaluation)."""
    stop = Stop()

    def signals(record):
        if isinstance(record, EvaluationRecord | StepRecord) and record.step == step:
            stop.request("SIGTERM")

    return execute(settings, out, signals, stop=stop)


class Killed(BaseException):
    """The process is gone: nothing behind this line is written by the run."""


def killed_at(settings, out, step):
    """Run until the process dies behind ``step``; what a run's end still wrote is taken back to a torn line."""
    def dies(record):
        if isinstance(record, StepRecord) and record.step == step:
            raise Killed

    with pytest.raises(Killed):
        execute(settings, out, dies)
    with (out / log_paths(settings.run_id)["steps"]).open("ab") as log:
        log.write(b'{"schema":1,"step":99')


@pytest.fixture
def small(plan):
    def make(config, case="gpt2_single_cls", **asked):
        return plan(case, config, **{"max_steps": 7, "batch_size": 2, "seq_len": 16, "eval_every": 3, **asked})

    return make


@pytest.mark.parametrize("config", DTYPE_CONFIGS)
def test_stopped_twice_a_run_equals_the_one_that_was_not(small, tmp_path, config):
    settings = small(config, dropout=0.1)
    whole = execute(settings, tmp_path / "whole")
    parts = [stopped_at(settings, tmp_path / "parts", step) for step in (2, 6)]
    last = execute(settings, tmp_path / "parts")
    assert written(settings, tmp_path / "parts") == written(settings, tmp_path / "whole")
    if whole.status == "completed":
        assert [part.status for part in parts] == ["preempted"] * 2 and [part.steps_done for part in parts] == [2, 6]
        assert last.flags["resumed"]["behind_steps"] == [2, 6]
        assert whole.final_weights_sha256 is not None and not checkpoint.steps(tmp_path / "parts" / "runs" / settings.run_id)
    else:
        assert whole.status in ("diverged", "unsupported")


@pytest.mark.parametrize(("case", "config"), [("gpt2_clm", "amp_fp16"), ("roberta_mlm", "amp_bf16_8bit"),
                                              ("roberta_multi_cls", "bf16_pure_sr"), ("gpt2_multi_cls", "amp_fp16_unscaled")])
@pytest.mark.parametrize("cuts", [(0, 3, 7), pytest.param((1, 2, 4, 5, 6), marks=pytest.mark.soak)])
def test_every_cut_gives_the_same_run(small, tmp_path, monkeypatch, case, config, cuts):
    monkeypatch.setattr("harness.precision.FIRST_LOSS_SCALE", 2.0**36)  # skipped steps, the first of them explained
    settings = small(config, case)
    execute(settings, tmp_path / "whole")
    expected = written(settings, tmp_path / "whole")
    for step in cuts:
        out = tmp_path / str(step)
        assert stopped_at(settings, out, step).status == "preempted"  # behind step 7, too: its evaluation is to come
        execute(settings, out)
        assert written(settings, out) == expected, f"cut at {step}"


def test_the_modules_windows_are_those_of_the_whole_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.instruments.KEPT_STEPS", 6)  # summed up over three steps
    settings = small("amp_bf16", max_steps=8, instrument="full")
    execute(settings, tmp_path / "whole")
    lines = written(settings, tmp_path / "whole")[0]["activations"]
    assert {line["step"] for line in lines} == {1, 3, 6, 8}  # 1: the module whose output is the model's own, once
    for step in (1, 2, 3, 4, 5):
        stopped_at(settings, tmp_path / str(step), step)
        execute(settings, tmp_path / str(step))
        assert written(settings, tmp_path / str(step)) == written(settings, tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint(small, tmp_path):
    settings = small("amp_fp16", checkpoint_every=2)
    execute(replace(settings, checkpoint_every=0), tmp_path / "whole")
    killed_at(settings, tmp_path / "parts", 5)
    assert finished_run(tmp_path / "parts", settings.run_id) is None
    record = execute(settings, tmp_path / "parts")
    assert record.flags["resumed"]["behind_steps"] == [4]
    assert written(settings, tmp_path / "parts") == written(settings, tmp_path / "whole")
    flags = record.flags["checkpoints"]
    assert flags["written"] == 1 and flags["rule"] == "every 2 steps" and record.flags["timings_s"]["checkpoints"] > 0


def test_an_exploding_loss_is_noticed_at_the_same_step(small, tmp_path, monkeypatch):
    monkeypatch.setattr("instrument.explosion.EXPLOSION_STEPS", 3)
    monkeypatch.setattr("instrument.explosion.MEDIAN_STEPS", 4)
    monkeypatch.setattr("instrument.explosion.deque", lambda maxlen: deque(maxlen=4))
    settings = small("fp32_true", "gpt2_clm", max_steps=30, lr=3.0)
    whole = execute(settings, tmp_path / "whole")
    assert whole.status == "diverged" and whole.first_nonfinite is None
    step = whole.divergence_step - 2
    stopped_at(settings, tmp_path / "parts", step)
    execute(settings, tmp_path / "parts")
    assert written(settings, tmp_path / "parts") == written(settings, tmp_path / "whole")


def test_a_log_window_and_an_instrument_level_may_change_between_the_parts(small, tmp_path):
    settings = small("amp_bf16", max_steps=9, eval_every=0)
    execute(settings, tmp_path / "whole")
    stopped_at(replace(settings, log_every=4), tmp_path / "parts", 4)
    record = execute(replace(settings, instrument="off", log_every=3), tmp_path / "parts")
    ours, whole = written(settings, tmp_path / "parts"), written(settings, tmp_path / "whole")
    assert ours[1] == whole[1] and ours[0]["steps"] == whole[0]["steps"]
    assert record.instrument == "off" and record.flags["resumed"]["instrument_before"] == "light"


def test_a_stop_in_a_log_window_does_not_wait_for_its_end(small, tmp_path, monkeypatch):
    settings = replace(small("amp_bf16", max_steps=9, eval_every=0), log_every=9)
    stop = Stop()
    stop.request("SIGTERM")
    record = execute(settings, tmp_path, stop=stop)  # asked before the first step
    assert (record.status, record.steps_done) == ("preempted", 0) and "before its first step" in record.error
    seen, stop = [], Stop()
    cut = Checkpointing.cut

    def asked_at_5(self, step):
        if step == 5:
            stop.request("SIGTERM")
        seen.append(step)
        return cut(self, step)

    monkeypatch.setattr(Checkpointing, "cut", asked_at_5)
    record = execute(settings, tmp_path, stop=stop)
    assert seen == [1, 2, 3, 4, 5] and record.steps_done == 5 and "goes on from checkpoint-5" in record.error


def test_cold_steps_behind_a_continuation_are_not_timed(small, tmp_path):
    settings = replace(small("amp_bf16", max_steps=9), untimed_steps=2)
    stopped_at(settings, tmp_path, 5)
    record = execute(settings, tmp_path)
    assert record.timed_steps == 9 - 2 - 2 and record.energy_j is None
    assert record.flags["hardware"]["part"].startswith("behind step 5")
    assert (tmp_path / "runs" / settings.run_id / "hardware.until-5.jsonl").exists()


def test_a_finished_run_and_a_failed_one_start_over(small, tmp_path):
    settings = small("fp32_true")
    stopped_at(settings, tmp_path, 3)
    folder = tmp_path / "runs" / settings.run_id
    row = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(json.dumps(row | {"status": "error", "error": "x"}))
    record = execute(settings, tmp_path)
    assert "resumed" not in record.flags and record.steps_done == 7 and checkpoint.steps(folder) == []


def ends(settings, out, kill_when=lambda logged: False):
    """Run in a process of its own, from a fork server; SIGKILL it when ``kill_when(steps logged)`` says so."""
    pool, log = Pool([settings], out, 1), out / log_paths(settings.run_id)["steps"]

    def look():
        for run in pool.running:
            if kill_when(log.read_bytes().count(b"\n") if log.exists() else 0):
                run.process.kill()

    (ended,) = pool.run(look, seconds_between_ticks=0.002)
    return ended


def behind(steps, wait_s):
    """Says that it is time ``wait_s`` after ``steps`` were logged: in a step, an evaluation or a checkpoint."""
    def due(logged):
        if logged < steps:
            return False
        time.sleep(wait_s)
        return True

    return due


def killed_at_random(settings, out, kills, rng):
    """Kill and start again up to ``kills`` times at random moments, then let it end: the record, and how many
    deaths there were."""
    log = out / log_paths(settings.run_id)["steps"]
    for deaths in range(kills):
        logged = log.read_bytes().count(b"\n") if log.exists() else 0
        when = behind(min(logged + rng.randint(0, 4), settings.max_steps - 1), rng.random() * 0.03)
        ended = ends(settings, out, when)
        if ended.record.status == "completed":
            return ended.record, deaths
    return ends(settings, out).record, kills


@pytest.mark.parametrize("kills", [5, pytest.param(300, marks=pytest.mark.soak)])
def test_sigkill_at_random_moments_loses_nothing(small, tmp_path, kills):
    rng = random.Random(kills)
    killed = rounds = 0
    while killed < kills:
        config = ("amp_fp16", "amp_bf16_8bit", "bf16_pure_sr")[rounds % 3]
        settings = small(config, max_steps=40, eval_every=10, checkpoint_every=3)
        whole, out = tmp_path / f"whole-{config}", tmp_path / f"parts-{rounds}"
        if not whole.exists():
            assert ends(settings, whole).record.status == "completed"
        record, deaths = killed_at_random(settings, out, min(kills - killed, 15), rng)
        killed, rounds = killed + deaths, rounds + 1
        assert record.status == "completed" and written(settings, out) == written(settings, whole)
        left = {path.name for path in (out / "runs" / settings.run_id).iterdir()}
        assert not any("checkpoint" in name for name in left) and "run.json" in left
    print(f"{killed} SIGKILLs in {rounds} runs, all as if there had been none")


def test_fresh_starts_over(small, tmp_path, capsys):
    words = ["case", "gpt2_single_cls", "fp32_true", "--preset", "tiny", "--data", "embedded", "--max-steps", "7",
             "--batch-size", "2", "--micro-batch", "2", "--seq-len", "16", "--validation-documents", "4",
             "--documents", "400", "--eval-every", "3", "--out", str(tmp_path), "--json"]
    settings = small("fp32_true")
    for more, behind in ((["--fresh"], None), ([], [3])):
        stopped_at(settings, tmp_path, 3)
        assert main([*words, *more]) == 0
        told = capsys.readouterr()
        row = json.loads(told.out)
        assert row["run_id"] == settings.run_id and row["status"] == "completed"
        assert row["flags"].get("resumed", {}).get("behind_steps") == behind
        assert ("goes on behind step 3, from checkpoint-3" in told.err) == (behind is not None)


FILE_OPERATIONS = ("write", "fsync", "mkdir", "rename", "replace", "truncate", "ftruncate", "unlink", "rmdir")


def dies_at(patch, operation):
    """From the ``operation``-th file operation of this thread on, all of them raise: nothing more reaches the disk
    but half of a write. The list returned grows with each."""
    seen = []

    def dying(name, real):
        def call(*arguments, **options):
            if threading.current_thread() is threading.main_thread():
                seen.append(name)
                if len(seen) == operation and name == "write":
                    real(arguments[0], arguments[1][:len(arguments[1]) // 2])
                if len(seen) >= operation:
                    raise Killed
            return real(*arguments, **options)
        return call

    for name in FILE_OPERATIONS:
        patch.setattr(os, name, dying(name, getattr(os, name)))
    return seen


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.soak), 0.03])
@pytest.mark.parametrize("behind_step", [0, 3], ids=["from the beginning", "from a checkpoint"])
def test_a_death_at_any_file_operation_loses_nothing(small, tmp_path, share, behind_step):
    settings = small("amp_fp16", max_steps=5, eval_every=2, checkpoint_every=2)
    execute(settings, tmp_path / "whole")
    expected, begun = written(settings, tmp_path / "whole"), tmp_path / "begun"
    begun.mkdir()
    if behind_step:
        stopped_at(settings, begun, behind_step)
    log = log_paths(settings.run_id)["steps"]

    def dies(operation):
        shutil.copytree(begun, tmp_path / "out")
        with pytest.MonkeyPatch.context() as patch:
            seen = dies_at(patch, operation)
            execute(settings, tmp_path / "out")
        return len(seen)

    operations = dies(math.inf)
    shutil.rmtree(tmp_path / "out")
    sample = sorted(random.Random(0).sample(range(1, operations + 1), math.ceil(share * operations)))
    for operation in sample:
        with pytest.raises(Killed):
            dies(operation)
        *lines, torn = (tmp_path / "out" / log).read_bytes().split(b"\n") if (tmp_path / "out" / log).exists() else [b""]
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert len(lines) >= behind_step
        execute(settings, tmp_path / "out")
        assert written(settings, tmp_path / "out") == expected, f"death at operation {operation}"
        shutil.rmtree(tmp_path / "out")
    print(f"{operations} file operations, {len(sample)} deaths")
