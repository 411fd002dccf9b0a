"""A run that was stopped and resumed equals the one that was not, bit for bit, in every configuration (of failures, see
`test_bench_reliability`)."""

import json
from collections import deque
from dataclasses import replace

import pytest

from bench_cases import DTYPE_CONFIGS
from harness.cli import main
from harness.run import checkpoints
from harness.run.checkpoints import Checkpointing
from harness.run.execute import execute
from harness.run.signals import Stop
from instrument.results.folder import finished_run, log_paths
from instrument.results.schemas import EvaluationRecord, StepRecord
from tests.soak.reliability import same_run

pytestmark = pytest.mark.slow


def written(settings, out):
    """Everything a run wrote that does not depend on time, and its row's results."""
    return same_run.written(settings.run_id, out)


def stopped_at(settings, out, step):
    """Run until a signal comes during ``step`` (0: during the first evaluation)."""
    stop = Stop()

    def signals(record):
        if isinstance(record, EvaluationRecord | StepRecord) and record.step == step:
            stop.request("SIGTERM")

    return execute(settings, out, signals, stop=stop)


class Killed(BaseException):
    """The process is gone: nothing after this line is written by the run."""


def killed_at(settings, out, step):
    """Run until the process is killed after ``step``; what a run's end still wrote is taken back to a torn line."""

    def kill(record):
        if isinstance(record, StepRecord) and record.step == step:
            raise Killed

    with pytest.raises(Killed):
        execute(settings, out, kill)
    with (out / log_paths(settings.run_id)["steps"]).open("ab") as log:
        log.write(b'{"schema":1,"step":99')


@pytest.fixture
def small(plan):
    def make(config, case="gpt2_single_cls", **asked):
        return plan(case, config, **{"max_steps": 7, "batch_size": 2, "seq_len": 16, "eval_every": 3, **asked})

    return make


SAMPLE = ("fp32_true", "amp_fp16", "amp_bf16_8bit", "bf16_pure_sr", "fp16_naive", "fp16_naive_fp32_states")
"""One of each way to scale, to hold states and to round, and one that diverges; `make soak` takes all."""


@pytest.mark.parametrize(
    "config", [config if config in SAMPLE else pytest.param(config, marks=pytest.mark.soak) for config in DTYPE_CONFIGS]
)
def test_stopped_twice_a_run_equals_the_one_that_was_not(small, tmp_path, config):
    settings = small(config, dropout=0.1)
    whole = execute(settings, tmp_path / "whole")
    parts = [stopped_at(settings, tmp_path / "parts", step) for step in (2, 6)]
    last = execute(settings, tmp_path / "parts")
    assert written(settings, tmp_path / "parts") == written(settings, tmp_path / "whole")
    if whole.status == "completed":
        assert [part.status for part in parts] == ["preempted"] * 2 and [part.steps_done for part in parts] == [2, 6]
        assert last.flags["resumed"]["behind_steps"] == [2, 6]
        assert whole.final_weights_sha256 is not None and not checkpoints.checkpoint_steps(
            tmp_path / "parts" / "runs" / settings.run_id
        )
    else:
        assert whole.status in ("diverged", "unsupported")


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("gpt2_clm", "amp_fp16"),
        ("roberta_mlm", "amp_bf16_8bit"),
        ("roberta_multi_cls", "bf16_pure_sr"),
        ("gpt2_multi_cls", "amp_fp16_unscaled"),
    ],
)
@pytest.mark.parametrize("cuts", [(0, 3, 7), pytest.param((1, 2, 4, 5, 6), marks=pytest.mark.soak)])
def test_every_cut_gives_the_same_run(small, tmp_path, monkeypatch, case, config, cuts):
    monkeypatch.setattr("harness.precision.FIRST_LOSS_SCALE", 2.0**36)  # skipped steps, the first of them explained
    settings = small(config, case)
    execute(settings, tmp_path / "whole")
    expected = written(settings, tmp_path / "whole")
    for step in cuts:
        out = tmp_path / str(step)
        assert stopped_at(settings, out, step).status == "preempted"  # after step 7, too: its evaluation is to come
        execute(settings, out)
        assert written(settings, out) == expected, f"cut at {step}"


@pytest.mark.parametrize("cuts", [(2, 3), pytest.param((1, 4, 5), marks=pytest.mark.soak)])
def test_the_modules_windows_are_those_of_the_whole_run(small, tmp_path, monkeypatch, cuts):
    monkeypatch.setattr("harness.run.instruments.KEPT_STEPS", 6)  # summed up over three steps
    settings = small("amp_bf16", max_steps=8, instrument="full")
    execute(settings, tmp_path / "whole")
    lines = written(settings, tmp_path / "whole")[0]["activations"]
    assert {line["step"] for line in lines} == {1, 3, 6, 8}  # 1: the module whose output is the model's own, once
    for step in cuts:  # within a window, and at its end
        stopped_at(settings, tmp_path / str(step), step)
        execute(settings, tmp_path / str(step))
        assert written(settings, tmp_path / str(step)) == written(settings, tmp_path / "whole")


def test_a_killed_run_resumes_from_its_last_checkpoint(small, tmp_path):
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
    monkeypatch.setattr("instrument.watch.meter.EXPLOSION_STEPS", 3)
    monkeypatch.setattr("instrument.watch.meter.MEDIAN_STEPS", 4)
    monkeypatch.setattr("instrument.watch.meter.deque", lambda maxlen: deque(maxlen=4))
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
    assert seen == [1, 2, 3, 4, 5] and record.steps_done == 5 and "resumes from checkpoint-5" in record.error


def test_warm_up_steps_after_a_resume_are_not_timed(small, tmp_path):
    settings = replace(small("amp_bf16", max_steps=9), untimed_steps=2)
    stopped_at(settings, tmp_path, 5)
    record = execute(settings, tmp_path)
    assert record.timed_steps == 9 - 2 - 2 and record.energy_j is None
    assert record.flags["hardware"]["part"].startswith("after step 5")
    assert (tmp_path / "runs" / settings.run_id / "hardware.until-5.jsonl").exists()


def test_a_finished_run_and_a_failed_one_start_over(small, tmp_path):
    settings = small("fp32_true")
    stopped_at(settings, tmp_path, 3)
    folder = tmp_path / "runs" / settings.run_id
    row = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(json.dumps(row | {"status": "error", "error": "x"}))
    record = execute(settings, tmp_path)
    assert "resumed" not in record.flags and record.steps_done == 7 and checkpoints.checkpoint_steps(folder) == []


def test_fresh_starts_over(small, tmp_path, capsys):
    words = [
        "case",
        "gpt2_single_cls",
        "fp32_true",
        "--preset",
        "tiny",
        "--data",
        "embedded",
        "--max-steps",
        "7",
        "--batch-size",
        "2",
        "--micro-batch",
        "2",
        "--seq-len",
        "16",
        "--validation-documents",
        "4",
        "--documents",
        "400",
        "--eval-every",
        "3",
        "--out",
        str(tmp_path),
        "--json",
    ]
    settings = small("fp32_true")
    for more, after in ((["--fresh"], None), ([], [3])):
        stopped_at(settings, tmp_path, 3)
        assert main([*words, *more]) == 0
        printed = capsys.readouterr()
        row = json.loads(printed.out)
        assert row["run_id"] == settings.run_id and row["status"] == "completed"
        assert row["flags"].get("resumed", {}).get("behind_steps") == after
        assert ("resumes after step 3, from checkpoint-3" in printed.err) == (after is not None)
