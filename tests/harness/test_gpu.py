"""What only a GPU can show. Skipped without one; `make gpu` runs these, the kernels' tests on the
device and the benchmarks in one command."""

import warnings

import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from bench_cases.models import build_model
from harness.planning import plan_run
from harness.precision import Precision
from harness.run.execute import execute, load_run_data, make_batches, model_request
from harness.settings import Request
from harness.training import Training
from instrument.watch.taps import ModuleTaps
from tests.soak.forensics.trials import healthy_trials, injection_trials

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"preset": "tiny", "data": "embedded", "max_steps": 12}


def settings(case, config, **asked):
    return plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**{**SMALL, **asked}), torch.device("cuda"))


def syncs(run_settings, steps, instrumented) -> list[str]:
    """Where the host waited for the device during ``steps`` steps between two log points."""
    device = torch.device("cuda")
    data = load_run_data(run_settings)
    training = Training.prepare(
        run_settings,
        build_model(model_request(run_settings, data)),
        make_batches(run_settings, data),
        Precision(run_settings.config, device),
    )

    def loop(steps):
        taps = ModuleTaps(training.model, device, every=2, skip_output=True) if instrumented else None
        list(training.train(training.meter(steps, taps), range(1, steps + 1)))

    loop(4)  # caches, kernels, optimizer states
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loop(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("instrumented", [False, True])
@pytest.mark.parametrize("config", [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix])
@pytest.mark.parametrize("case", ["gpt2_clm", "roberta_mlm", "gpt2_multi_cls", "roberta_single_cls"])
def test_nothing_waits_for_the_device_between_log_points(case, config, instrumented):
    """At most the log point's own read, and one check a step in the stock loss scaler."""
    steps = 8
    if config == "fp16_naive":
        config = "fp16_naive_fp32_states"
    found = syncs(settings(case, config), steps, instrumented)
    of_the_scaler = [place for place in found if "grad_scaler" in place]
    assert len(of_the_scaler) <= (steps if DTYPE_CONFIGS[config].scaler else 0)
    others = [place for place in found if place not in of_the_scaler]
    assert len(others) <= 2 + instrumented, others  # the modules' ring is read with the window


@pytest.mark.parametrize("case", [case.id for case in CASES.values() if case.in_default_matrix])
def test_every_configuration_ends_as_declared(case, tmp_path):
    for config in DTYPE_CONFIGS.values():
        record = execute(settings(case, config.id), tmp_path)
        dies = config.id in ("fp16_naive", "fp16_naive_clip16")
        expected = ("diverged",) if dies else ("completed", "unsupported")
        assert record.status in expected, (config.id, record.status, record.error)
        assert record.autocast == ("cuda" if config.autocast else None)
        assert record.attention_backend == "efficient"
        if record.status == "diverged":
            assert record.first_nonfinite.phase == "optimizer" and record.divergence_step == 1


def test_the_first_bad_step_does_not_depend_on_the_log_window(tmp_path):
    rows = [execute(settings("gpt2_clm", "fp16_naive", log_every=n), tmp_path / str(n)) for n in (1, 10)]
    assert {row.divergence_step for row in rows} == {1} and {row.steps_done for row in rows} == {1}


def test_injected_faults_are_named_on_the_device():
    wrong = [r.as_row() for r in (*injection_trials(100, device="cuda"), *healthy_trials(40, device="cuda")) if r.why_wrong]
    assert wrong == []


def test_a_replay_on_the_device_matches_and_names_the_op(tmp_path):
    record = execute(settings("gpt2_multi_cls", "fp16_naive"), tmp_path)
    first = record.first_nonfinite
    assert first.replay["matched"] and first.cause == "underflow_then_divide" and first.source_tensor == "exp_avg_sq"


def test_energy_memory_and_flops_make_sense(tmp_path):
    record = execute(settings("gpt2_clm", "amp_bf16", max_steps=200), tmp_path)
    assert record.peak_device_bytes >= record.peak_reserved_bytes >= record.peak_allocated_bytes > 0
    assert record.mfu is None or 0 < record.mfu < 1
    assert record.flags["hardware"]["samples"] > 0
