"""A whole run: its files, its row, its repeatability, and what becomes of failures."""

import io
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bench_cases import DTYPE_CONFIGS
from bench_cases.data.documents import DataError
from bench_cases.models import build_model, weights_sha256
from harness import training
from harness.inspect.findings import gather, verdict
from harness.matrix.screen import cell_text
from harness.precision import Precision
from harness.run import execute as run_module
from harness.run.execute import execute, load_run_data, make_batches, model_request
from harness.run.terminal import CaseScreen, show_summary
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import OutputError, RunFolder, finished_runs, write_index
from instrument.results.layout import RunFiles
from instrument.results.lines import read
from instrument.results.schemas import EvaluationRecord, EventRecord, RunRecord, StepRecord, decode

pytestmark = pytest.mark.slow


def test_a_run_leaves_its_logs_its_row_and_the_index(plan, tmp_path):
    settings = plan("gpt2_clm", "amp_bf16", max_steps=4, eval_every=2)
    seen = []
    record = execute(settings, tmp_path, seen.append)
    assert (record.status, record.steps_done, record.error) == ("completed", 4, None)
    steps = list(read(tmp_path / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord))
    evaluations = list(read(tmp_path / "runs" / settings.run_id / "evaluations.jsonl", EvaluationRecord))
    assert [s.step for s in steps] == [1, 2, 3, 4] and [e.step for e in evaluations] == [0, 2, 4]
    assert [r for r in seen if isinstance(r, StepRecord)] == steps
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row == json.loads((tmp_path / "runs" / settings.run_id / "run.json").read_text())
    assert row["loss_initial"] == steps[0].loss and row["val_loss"] == evaluations[-1].val_loss
    assert row["perplexity"] > 1 and row["f1_micro"] is None
    assert row["timed_steps"] == 4 - settings.untimed_steps
    timed = steps[settings.untimed_steps :]
    assert row["tokens_per_s"] == pytest.approx(sum(s.tokens for s in timed) / sum(s.step_time_s for s in timed))
    assert row["attention_backend"] == "math" and row["autocast"] == "cpu" and row["mfu"] is None
    assert row["attention_dtype"] == "fp32" and all(s.targets == s.tokens for s in steps)  # math, whatever the compute dtype
    assert row["flags"]["switches"]["verified"] == ["fp32_products"]
    assert row["config"]["lr"] == settings.lr and row["env"]["torch_version"]


def test_the_final_weights_are_kept_where_asked_for_and_make_the_model_again(plan, tmp_path):
    """Of the last run only: what failed, was stopped or did not ask leaves no weights, and not an older run's either."""
    settings = plan("gpt2_clm", "bf16_pure", keep_weights=True)
    assert settings.run_id == plan("gpt2_clm", "bf16_pure").run_id
    record = execute(settings, tmp_path)
    kept = RunFiles(tmp_path, record.run_id).weights
    assert record.flags["weights"] == {"file": "weights.safetensors", "bytes": kept.stat().st_size}
    assert kept.stat().st_mode & 0o777 == 0o644
    data = load_run_data(settings)
    model = build_model(replace(model_request(settings, data), seed=9)).bfloat16()
    missing, unexpected = model.load_state_dict(load_file(kept), strict=False)
    assert not unexpected and set(missing) == {"head.model.lm_head.weight"}  # which is tied
    assert weights_sha256(model) == record.final_weights_sha256
    with safe_open(kept, "pt") as file:
        assert file.metadata() == {"run_id": record.run_id, "weights_sha256": record.final_weights_sha256}
    assert gather(RunFiles(tmp_path, record.run_id))["weights_file"] == str(kept)

    again = execute(replace(settings, keep_weights=False), tmp_path)
    assert "weights" not in again.flags and not kept.exists()


def test_a_run_that_fails_keeps_no_weights(plan, tmp_path, monkeypatch):
    settings = plan("gpt2_clm", "fp32_true", keep_weights=True)
    kept = RunFiles(tmp_path, settings.run_id).weights
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"an older run's")
    with monkeypatch.context() as patch:
        patch.setattr("harness.run.trainer.peaks_by_rank", lambda *_: 1 / 0)  # the last thing that can fail
        assert execute(settings, tmp_path).status == "error" and not kept.exists()
    diverged = execute(plan("gpt2_clm", "fp16_naive", lr=0.9, instrument="off", keep_weights=True), tmp_path)
    assert diverged.status == "diverged" and not RunFiles(tmp_path, diverged.run_id).weights.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error (os error 28)")])
def test_weights_that_do_not_fit_on_the_disk_leave_nothing_and_the_run_without_a_row(plan, tmp_path, monkeypatch, error):
    settings = plan("gpt2_clm", "fp32_true", keep_weights=True)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("harness.forensics.stored.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        execute(settings, tmp_path)
    folder = RunFiles(tmp_path, settings.run_id)
    assert not folder.row.exists() and not list(folder.path.glob("*weights*")) + list(folder.path.glob(".*.ddb-tmp"))


def test_masked_language_modelling_counts_its_targets(plan, tmp_path):
    settings = plan("roberta_mlm", "fp32_true")
    execute(settings, tmp_path)
    batches = make_batches(settings, load_run_data(settings))
    steps = read(tmp_path / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord)
    assert [s.targets for s in steps] == [int((batches.step(s).targets >= 0).sum()) for s in (1, 2)]


def test_the_same_command_twice_is_the_same_run_bit_for_bit(plan, tmp_path):
    settings = plan("roberta_mlm", "amp_fp16", max_steps=3)
    first, second = (execute(settings, tmp_path / name) for name in "ab")
    assert first.final_weights_sha256 == second.final_weights_sha256
    losses = [
        [s.loss for s in read(tmp_path / name / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord)] for name in "ab"
    ]
    assert losses[0] == losses[1] and first.val_loss == second.val_loss
    other = execute(replace(settings, seed=1), tmp_path / "c")
    assert other.final_weights_sha256 != first.final_weights_sha256 and other.init_sha256 != first.init_sha256


def test_configurations_start_from_the_same_weights_and_see_the_same_batches(plan, tmp_path):
    rows = [
        execute(plan("gpt2_multi_cls", config, max_steps=1), tmp_path)
        for config in ("fp32_true", "bf16_pure", "amp_bf16_fp32_head", "fp16_naive")
    ]
    assert len({row.init_sha256 for row in rows}) == 1 and len({row.data_sha256 for row in rows}) == 1
    assert len(finished_runs(tmp_path)) == 4
    other = execute(plan("gpt2_multi_cls", "fp32_true", seed=1, max_steps=1), tmp_path)
    assert other.data_sha256 != rows[0].data_sha256


def test_a_divergence_is_a_result_with_its_step_and_phase(plan, tmp_path):
    record = execute(plan("gpt2_single_cls", "fp16_naive", max_steps=3), tmp_path)
    assert (record.status, record.divergence_step) == ("diverged", 1)
    assert record.first_nonfinite.phase == "optimizer" and record.first_nonfinite.tensor == "param"
    assert record.steps_done == 1 and record.val_loss is None and record.final_weights_sha256 is None
    assert record.error.startswith("step 1, optimizer, param of transformer.wte.weight, aten._foreach_addcdiv_: param is")
    assert record.first_nonfinite.cause == "underflow_then_divide" and record.first_nonfinite.source_tensor == "exp_avg_sq"


def test_what_the_device_cannot_do_is_unsupported_with_the_reason(plan, tmp_path):
    record = execute(plan("gpt2_clm", "fp32_tf32"), tmp_path)
    assert record.status == "unsupported" and "TF32" in record.error and record.steps_done == 0


def test_a_crash_is_a_row_that_keeps_what_was_reached(plan, tmp_path, monkeypatch):
    settings = plan("gpt2_clm", "fp32_true", max_steps=3)
    real = training.train

    def dies_after_two(*arguments):
        for number, reading in enumerate(real(*arguments), start=1):
            yield reading
            if number == 2:
                raise RuntimeError("boom")

    monkeypatch.setattr(training, "train", dies_after_two)
    record = execute(settings, tmp_path)
    assert (record.status, record.steps_done, record.error) == ("error", 2, "RuntimeError: boom")
    assert "dies_after_two" in record.flags["traceback"]
    assert len(list(read(tmp_path / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord))) == 2


def test_logits_that_are_all_nan_are_a_divergence_and_can_be_shown(plan, tmp_path, capsys):
    settings = plan("gpt2_clm", "fp32_true", max_steps=4, lr=1e30)
    with CaseScreen(settings, tmp_path) as screen:
        record = execute(settings, tmp_path, screen.show)
    screen.summary(record)
    assert (record.status, record.first_nonfinite.phase) == ("diverged", "forward"), record.error
    assert "none finite" in capsys.readouterr().err


def test_a_screen_that_fails_does_not_hide_the_divergence(plan, tmp_path):
    def fails(row):
        if isinstance(row, StepRecord):
            raise RuntimeError("no terminal")

    settings = plan("gpt2_clm", "fp16_naive")
    record = execute(settings, tmp_path, fails)
    assert (record.status, record.divergence_step, record.steps_done) == ("diverged", 1, 1)
    assert record.flags["forensics_failed"]["process"] == "RuntimeError: no terminal"


def test_an_interrupted_run_is_a_row_and_no_result(plan, tmp_path):
    settings = plan("gpt2_clm", "fp32_true", max_steps=3)
    assert execute(settings, tmp_path).status == "completed"

    def interrupt(row):
        if isinstance(row, StepRecord) and row.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(settings, tmp_path, interrupt)
    (row,) = finished_runs(tmp_path)
    assert (row.status, row.steps_done) == ("preempted", 2)
    assert json.loads((tmp_path / "results.jsonl").read_text())["status"] == "preempted"


def test_dropout_repeats_with_its_seed(plan, tmp_path):
    rows = [execute(plan("gpt2_clm", "fp32_true", dropout=0.1), tmp_path / name) for name in "ab"]
    assert rows[0].final_weights_sha256 == rows[1].final_weights_sha256 is not None


def test_too_little_text_is_refused_before_anything_is_written(plan, tmp_path):
    short = tmp_path / "openwebtext.jsonl"
    short.write_text("".join(json.dumps({"text": f"a few words {n}"}) + "\n" for n in range(30)))
    settings = plan("gpt2_clm", "fp32_true", data=str(tmp_path), seq_len=512)
    with pytest.raises(DataError):
        execute(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scaler_skip_is_an_event(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.precision.FIRST_LOSS_SCALE", 2.0**40)
    settings = plan("gpt2_clm", "amp_fp16", max_steps=2)
    record = execute(settings, tmp_path)
    events = list(read(tmp_path / "runs" / settings.run_id / "events.jsonl", EventRecord))
    assert record.status == "completed" and record.scaler_skips == 2
    assert [e.kind for e in events] == ["scaler_skip"] * 2
    assert [e.detail["loss_scale"] for e in events] == [2.0**40, 2.0**39]
    producer = events[0].detail["first_nonfinite"]
    assert (producer["step"], producer["phase"], producer["cause"], producer["dtype"]) == (1, "loss", "overflow", "float16")


def test_a_run_whose_clip_norm_overflows_has_an_event_a_step_and_is_stalled(plan, tmp_path, monkeypatch):
    """As `torch.nn.utils.clip_grad_norm_` does with an fp16 norm of Inf: every gradient is multiplied by 0."""
    clip, calls = Precision.clip, itertools.count(1)

    def overflowing(self, norm, max_norm):
        if next(calls) <= 8:
            return clip(self, norm, max_norm)
        for parameter in self.parameters:
            parameter.grad.zero_()
        return torch.tensor(math.inf)

    monkeypatch.setattr(Precision, "clip", overflowing)
    settings = plan("gpt2_clm", "fp32_true", max_steps=12, instrument="off")
    record = execute(settings, tmp_path)
    events = list(read(tmp_path / "runs" / settings.run_id / "events.jsonl", EventRecord))
    assert [(e.step, e.kind) for e in events] == [(step, "clip_norm") for step in (9, 10, 11, 12)]
    assert events[0].detail["clip_norm"] == "inf" and events[0].detail["grad_norm"] > 0
    assert record.status == "completed" and record.first_nonfinite is None
    assert record.flags["stalled"] == {"since_step": 8, "why": "gradients"}  # AdamW's first moment still moves the weights
    assert record.stalled == "every gradient that entered an update was 0 after step 8"
    assert_shown_as_stalled(record, tmp_path)


def assert_shown_as_stalled(record, out):
    """At the run's end, in the matrix and in the sentence of ``inspect``."""
    console = Console(record=True, width=200, file=io.StringIO())
    show_summary(console, record, out)
    assert f"stalled: {record.stalled}" in console.export_text()
    outcome, detail, status = cell_text([record])
    assert outcome.startswith("= ") and (detail, status) == ("stalled", "stalled")
    assert verdict(record, None, record.steps_done).startswith(f"completed, but stalled: {record.stalled}")


@pytest.mark.parametrize(("case", "config"), [("gpt2_clm", "bf16_pure"), ("roberta_single_cls", "fp32_true")])
def test_a_run_whose_weights_no_longer_change_is_stalled_and_one_that_moves_is_not(plan, tmp_path, case, config):
    stalled = execute(plan(case, config, max_steps=4, lr=1e-60, instrument="off"), tmp_path)
    assert stalled.flags["stalled"] == {"since_step": 3, "why": "weights"}
    assert_shown_as_stalled(stalled, tmp_path)
    moving = execute(plan(case, config, max_steps=4, instrument="off"), tmp_path)
    assert moving.status == "completed" and "stalled" not in moving.flags and moving.stalled is None


def test_bad_data_are_refused_before_anything_is_written(plan, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise DataError("broken.jsonl:3: no text")

    monkeypatch.setattr(run_module, "load_data", refuse)
    with pytest.raises(DataError):
        execute(plan("gpt2_clm", "fp32_true"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*file/out.*--out"):
        RunFolder(tmp_path / "file" / "out", "x")


@pytest.mark.parametrize("place", ["", "training_logs", "runs/x", "traces"])
def test_a_temporary_file_that_a_dead_writer_left_goes_with_the_next_run(tmp_path, place):
    (left := tmp_path / place / ".results.jsonl.abc.ddb-tmp").parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    RunFolder(tmp_path, "x").close()
    assert not left.exists() and not list(tmp_path.glob(".writable*"))


def test_the_index_is_rebuilt_from_the_runs(plan, tmp_path):
    rows = {execute(plan("gpt2_clm", "fp32_true", seed=s, max_steps=1), tmp_path).run_id for s in (0, 1)}
    (tmp_path / "results.jsonl").write_text("garbage")
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "run.json").write_text('{"schema": 1, "run')
    write_index(tmp_path)
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines()
    assert {decode(line, RunRecord).run_id for line in lines} == rows


@pytest.mark.parametrize("case", ["gpt2_clm", "roberta_mlm", "gpt2_multi_cls", "roberta_single_cls"])
def test_real_documents_end_to_end(plan, tmp_path, shared_data, case):
    settings = plan(case, "amp_bf16", data=str(shared_data), documents=40, validation_documents=4, seq_len=32, max_steps=2)
    record = execute(settings, tmp_path)
    assert record.status == "completed", record.error
    assert record.loss_initial > 0 and record.val_loss is not None


def test_every_configuration_completes_or_says_why(plan, tmp_path):
    outcomes = {name: execute(plan("roberta_multi_cls", name, max_steps=2), tmp_path).status for name in DTYPE_CONFIGS}
    expected = {name: "completed" for name in DTYPE_CONFIGS} | {
        "fp16_naive": "diverged",
        "fp16_naive_clip16": "diverged",
        "fp32_tf32": "unsupported",
    }
    assert outcomes == expected


def test_a_run_that_another_process_executes_is_left_to_it(plan, tmp_path):
    settings = plan("gpt2_clm", "fp32_true")
    theirs = tmp_path / "runs" / settings.run_id / "checkpoint-1"
    theirs.mkdir(parents=True)
    with claim(tmp_path, settings.run_id):
        for fresh in (False, True):
            with pytest.raises(RunClaimed, match="is being executed by process"):
                execute(settings, tmp_path, fresh=fresh)
    assert theirs.exists()
    assert not (tmp_path / "runs" / settings.run_id / "run.json").exists()
    assert execute(settings, tmp_path).status == "completed"
    assert not (tmp_path / "runs" / settings.run_id / ".claim").exists()
