"""What only a GPU can show. Skipped without one; `make gpu` runs these, the kernels' tests on the
device and the benchmarks in one command."""

import warnings

import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from bench_cases.models import build_model
from harness.loop import LoopOptions, train
from harness.planning import plan_run
from harness.precision import Precision
from harness.run import execute, load_run_data, make_batches, model_request
from harness.settings import Request
from instrument.step_meter import StepMeter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"preset": "tiny", "data": "embedded", "max_steps": 12}


def settings(case, config, **asked):
    return plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**{**SMALL, **asked}), torch.device("cuda"))


def syncs(run_settings, steps) -> list[str]:
    """Where the host waited for the device during ``steps`` steps between two log points."""
    device = torch.device("cuda")
    data = load_run_data(run_settings)
    precision = Precision(run_settings.config, device)
    model = precision.prepare(build_model(model_request(run_settings, data)))
    optimizer = precision.make_optimizer(lr=1e-3, weight_decay=0.01, seed=0)
    vocabulary = data.valid_vocab if run_settings.case.task.head != "classification" else None

    def loop(steps, window):
        meter = StepMeter(model, optimizer, device, window=window, micro_batches=2, warmup_steps=1)
        options = LoopOptions(steps, 1, run_settings.micro_batch, 1e-3, 1.0, vocabulary)
        return train(run_settings.case, model, optimizer, make_batches(run_settings, data), precision, meter, options)

    list(loop(4, 4))  # caches, kernels, optimizer states
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            list(loop(steps, steps))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("config", [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix])
@pytest.mark.parametrize("case", ["gpt2_clm", "roberta_mlm", "gpt2_multi_cls", "roberta_single_cls"])
def test_nothing_waits_for_the_device_between_log_points(case, config):
    """At most the log point's own read, and one check a step in the stock loss scaler."""
    steps = 8
    if config == "fp16_naive":
        config = "fp16_naive_fp32_states"
    found = syncs(settings(case, config), steps)
    of_the_scaler = [place for place in found if "grad_scaler" in place]
    assert len(of_the_scaler) <= (steps if DTYPE_CONFIGS[config].scaler else 0)
    others = [place for place in found if place not in of_the_scaler]
    assert len(others) <= 2, others


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
