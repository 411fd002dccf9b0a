"""A failed run explains itself: the record, the trace, and what the instruments must not change."""

import gzip
import json
import math
from contextlib import suppress

import pytest
import torch
import transformers

from bench_cases import DTYPE_CONFIGS
from bench_cases.own import case_for_model
from harness.inspect.findings import verdict
from harness.planning import plan_run
from harness.run import execute as run_module
from harness.run.execute import execute
from harness.run.signals import Stopped
from harness.settings import Request
from instrument.results.folder import finished_runs
from instrument.results.lines import read
from instrument.results.measurements import ForensicsRecord, ModuleRecord
from instrument.results.schemas import EventRecord, StepRecord, decode
from tests.instrument.chrome_format import violations

pytestmark = pytest.mark.slow


def forensics(out, settings):
    return decode((out / "runs" / settings.run_id / "forensics.json").read_bytes(), ForensicsRecord)


def test_fp16_adamw_is_distinguished_from_overflow(plan, tmp_path):
    settings = plan("roberta_single_cls", "fp16_naive")
    record = execute(settings, tmp_path)
    found = forensics(tmp_path, settings)
    first = record.first_nonfinite
    assert found.matched and found.first_nonfinite == first and record.error == found.sentence
    assert (first.step, first.phase, first.op, first.tensor, first.source_tensor, first.cause) == (
        1,
        "optimizer",
        "aten._foreach_addcdiv_",
        "param",
        "exp_avg_sq",
        "underflow_then_divide",
    )
    assert "its denominator from exp_avg_sq underflowed to 0" in found.sentence and "nothing overflowed" in found.sentence
    assert found.output.zero_denominators == found.output.nonfinite
    (here,) = [kernel for kernel in found.kernels if kernel.here]
    assert here.name == first.op and here.nonfinite and here.duration_s > 0


@pytest.fixture(scope="module")
def overflows(plan, tmp_path_factory):
    """Row and findings of one run that overflows in its forward pass, by its log window."""
    made = {}
    for log_every in (1, 4):
        out = tmp_path_factory.mktemp("overflow")
        settings = plan("roberta_mlm", "amp_fp16_unscaled", max_steps=30, lr=3.0, log_every=log_every)
        made[log_every] = execute(settings, out), forensics(out, settings)
    return made


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_forward_overflow_is_named_with_its_history(overflows, log_every):
    record, found = overflows[log_every]
    first = record.first_nonfinite
    assert found.matched and first.replay["matched"] and first.step == record.divergence_step
    assert first.cause == "overflow" and first.dtype == "float16" and first.headroom_bits >= 0
    assert found.output.exact_absmax > 65_504 and found.chain[0].op == first.op and found.spread_modules > 1
    assert [row.step for row in found.history] == list(range(1, first.step + 1))
    assert sum(h.nonfinite for h in found.histograms) == 0  # its inputs were finite
    for h, operand in zip(found.histograms, found.operands, strict=True):
        assert sum(h.counts) + h.zeros + h.below + h.above == math.prod(operand.shape)


def test_the_log_window_changes_nothing_of_what_is_found(overflows):
    (_, a), (_, b) = overflows[1], overflows[4]
    assert (a.first_nonfinite, a.sentence, a.chain, a.operands) == (b.first_nonfinite, b.sentence, b.chain, b.operands)


def test_the_trace_of_the_failed_step_keeps_the_formats_rules_and_holds_our_tracks(plan, tmp_path):
    settings = plan("gpt2_single_cls", "fp16_naive")
    execute(settings, tmp_path)
    trace = json.loads(gzip.decompress((tmp_path / "traces" / forensics(tmp_path, settings).trace_file).read_bytes()))
    assert violations(trace) == []
    names = [event["name"] for event in trace["traceEvents"]]
    assert any(name.startswith("first non-finite value: aten._foreach_addcdiv_") for name in names)
    assert {"forward", "loss", "backward", "optimizer"} <= set(names)
    assert any(event["ph"] == "C" and "h.0" in event["name"] for event in trace["traceEvents"])


@pytest.mark.parametrize("config", ["amp_fp16", "bf16_pure", pytest.param("fp32_true", marks=pytest.mark.soak)])
def test_instruments_and_traces_leave_the_run_bit_for_bit_as_it_is(plan, tmp_path, config, monkeypatch):
    monkeypatch.setattr("harness.precision.FIRST_LOSS_SCALE", 2.0**30)  # skips, and the replay of the first
    seen = {}
    for level, trace in (("off", 0), ("light", 0), ("full", 2)):
        settings = plan("gpt2_multi_cls", config, max_steps=20, instrument=level, trace_steps=trace)
        record = execute(settings, tmp_path / level)
        steps = read(tmp_path / level / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord)
        seen[level] = record.final_weights_sha256, record.val_loss, [(s.loss, s.grad_norm, s.loss_scale) for s in steps]
        assert record.status == "completed" and record.instrument == level
        assert ("time_by_kernel" in record.flags) == bool(trace)
    assert seen["off"] == seen["light"] == seen["full"]
    events = list(read(tmp_path / "full" / "runs" / settings.run_id / "events.jsonl", EventRecord))
    skips = [event for event in events if event.kind == "scaler_skip"]
    assert bool(skips) == (config == "amp_fp16")
    assert all(skip.detail["first_nonfinite"]["op"] for skip in skips[:1])


def test_off_writes_neither_modules_nor_hardware_nor_a_replay(plan, tmp_path):
    settings = plan("gpt2_clm", "fp16_naive", instrument="off")
    record = execute(settings, tmp_path)
    assert record.status == "diverged" and record.first_nonfinite.replay is None and record.first_nonfinite.op is None
    assert sorted(p.name for p in (tmp_path / "runs" / settings.run_id).iterdir()) == [
        "evaluations.jsonl",
        "events.jsonl",
        "run.json",
    ]


def test_the_sampler_gets_where_timing_begins_and_ends_and_not_every_step(plan, tmp_path, monkeypatch):
    edges = []
    monkeypatch.setattr("instrument.sampler.sampler.Sampler.mark", lambda self, name, edge: edges.append(edge))
    settings = plan("gpt2_single_cls", "fp32_true", max_steps=12, eval_every=6, checkpoint_every=8)
    execute(settings, tmp_path)
    assert settings.untimed_steps < 6
    assert edges == ["begin", "end"] * 4  # apart: the evaluation at 6, the checkpoint at 8, the hash of the weights at 11


def test_every_block_is_in_the_module_log_at_every_window(plan, tmp_path):
    settings = plan("gpt2_clm", "amp_bf16", max_steps=20)
    execute(settings, tmp_path)
    rows = list(read(tmp_path / "runs" / settings.run_id / "activations.jsonl", ModuleRecord))
    assert {(r.module, r.direction) for r in rows} >= {(f"transformer.h.{i}", d) for i in (0, 1) for d in ("fwd", "bwd")}
    assert all(r.first_step <= r.absmax_step <= r.step and r.absmax > 0 and r.dtype in ("bfloat16", "float32") for r in rows)
    assert any(r.module.endswith("mlp.c_fc") and r.flush_frac is not None for r in rows)  # leaves, at their cadence
    assert max(r.step for r in rows) == 20


def test_flops_and_memory_stand_in_the_row(plan, tmp_path):
    settings = plan("gpt2_clm", "amp_bf16")
    record = execute(settings, tmp_path)
    assert record.flops_per_step > 6 * 4 * 32 * 1e5 and record.mfu is None and record.mfu_bf16_peak is None  # no datasheet
    split = record.flags["memory_split"]
    assert split["weights_bytes"] == 4 * record.n_params and split["optimizer_bytes"] >= 8 * record.n_params
    assert torch.device(split["device"]).type == "cpu"


def test_a_producer_of_complex_numbers_has_an_op_and_a_cause(tmp_path, monkeypatch):
    """FNet's Fourier transform, whose sums leave float32's range."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    transformers.FNetConfig(**sizes).save_pretrained(tmp_path / "fnet")
    build = run_module.build_model

    def scaled(request):
        model = build(request)
        transform = next(m for m in model.modules() if hasattr(m, "fourier_transform"))
        inner = transform.fourier_transform
        transform.fourier_transform = lambda hidden: inner(hidden.clamp(-1, 1) * 3e38)
        return model

    monkeypatch.setattr(run_module, "build_model", scaled)
    asked = Request(preset="tiny", max_steps=2, batch_size=4, micro_batch=2, seq_len=16, validation_documents=4, documents=400)
    case = case_for_model(str(tmp_path / "fnet"), "mlm")
    record = execute(plan_run(case, DTYPE_CONFIGS["fp32_true"], 0, asked, torch.device("cpu")), tmp_path / "out")
    first = record.first_nonfinite
    assert (record.status, first.op, first.cause, first.dtype) == ("diverged", "aten._fft_c2c", "overflow", "complex64")
    assert "forensics_failed" not in record.flags


PLANTS = {
    "harness.run.instruments.store": "snapshot",
    "harness.forensics.investigate.ModuleTaps": "replay",
    "instrument.replay.snapshot.Snapshot.restore": "replay",
    "instrument.replay.replays.examine": "replay",
    "instrument.replay.graph.StepGraph.culprit": "replay",
    "instrument.replay.replays.diagnose": "replay",
    "instrument.replay.replays._conclude": "replay",
    "instrument.replay.replays.Replayed.completed": "forensics",
    "harness.run.instruments.investigate": "forensics",
    "harness.forensics.investigate.of_this_rank": "forensics",
    "harness.forensics.investigate.save_operands": "operands",
    "harness.forensics.investigate.history_of": "history",
    "harness.forensics.investigate.headroom_since": "headroom",
    "harness.forensics.investigate.trace_step": "trace",
    "harness.forensics.investigate.chain_links": "chain",
    "harness.forensics.investigate.sentence": "sentence",
    "harness.forensics.investigate.histograms": "histograms",
    "harness.forensics.investigate.kernel_rows": "kernels",
    "harness.run.instruments.encode": "writing",
    "harness.run.instruments.Instruments.after": "process",
    "harness.run.instruments.Instruments.investigate": "process",
    "harness.run.trainer.facts_of_all": "process",
    "harness.run.trainer.peaks_by_rank": "process",
}
KEEP_THE_OP = ("snapshot", "operands", "history", "headroom", "trace", "chain", "sentence", "histograms", "kernels", "writing")
INDEPENDENT = [where for where, part in PLANTS.items() if part in KEEP_THE_OP and part != "snapshot"]
"""Parts of the record, each guarded by itself: a single run may lose them all."""


def fails_at(where, monkeypatch):
    error = SystemExit if where.endswith("peaks_by_rank") else RuntimeError

    def fails(*args, **kwargs):
        raise error(f"planted in {where}")

    monkeypatch.setattr(where, fails)


def test_all_parts_of_the_record_may_fail_in_one_run(plan, tmp_path, monkeypatch):
    for where in INDEPENDENT:
        fails_at(where, monkeypatch)
    record = execute(plan("gpt2_single_cls", "fp16_naive"), tmp_path)
    failed, first = record.flags["forensics_failed"], record.first_nonfinite
    assert {PLANTS[where]: f"planted in {where}" in failed.get(PLANTS[where], "") for where in INDEPENDENT} == {
        PLANTS[where]: True for where in INDEPENDENT
    }
    assert (record.status, record.divergence_step) == ("diverged", 1) and "death" not in record.flags
    assert (first.step, first.op, first.cause) == (1, "aten._foreach_addcdiv_", "underflow_then_divide")
    assert finished_runs(tmp_path) == [record]


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=pytest.mark.soak) if where in INDEPENDENT else where for where in PLANTS]
)
def test_whatever_fails_after_the_divergence_costs_what_it_would_have_found_and_never_the_status(
    plan, tmp_path, where, monkeypatch
):
    fails_at(where, monkeypatch)
    settings = plan("gpt2_single_cls", "fp16_naive")
    record = execute(settings, tmp_path)
    part = PLANTS[where]
    assert (record.status, record.divergence_step, record.steps_done) == ("diverged", 1, 1)
    assert f"planted in {where}" in record.flags["forensics_failed"][part] and "death" not in record.flags
    first = record.first_nonfinite
    assert (first.step, first.tensor) == (1, "param")
    if part in KEEP_THE_OP:
        assert (first.op, first.cause) == ("aten._foreach_addcdiv_", "underflow_then_divide")
    elif part == "replay":
        assert (
            first.op is None and where in first.replay["error"] and "its replay failed (RuntimeError: planted" in record.error
        )
    (row,) = finished_runs(tmp_path)
    assert row == record and verdict(record, None, 1).startswith("step 1, ")


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), Stopped("SIGTERM")])
def test_a_run_stopped_in_its_forensics_has_diverged(plan, tmp_path, raised, monkeypatch):
    def stops(*_):
        raise raised

    monkeypatch.setattr("harness.run.instruments.Instruments.investigate", stops)
    with suppress(KeyboardInterrupt):
        execute(plan("gpt2_single_cls", "fp16_naive"), tmp_path)
    (row,) = finished_runs(tmp_path)
    assert row.status == "diverged" and row.flags["forensics_failed"]["process"]
