"""Where a run failed: step and phase, and that errors while cleaning up do not take the first one's place."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from harness import failure, loop, precision, training
from harness.failure import CLEANUP_ERRORS, cleanup
from harness.parallel.strategy import ParallelStrategy
from harness.run import instruments, trainer
from harness.run.execute import execute
from instrument.watch.taps import ModuleTaps

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def raising(error, on_call=1):
    """A function that raises at its n-th call and does what ``real`` did before."""

    def wrap(real):
        calls = 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == on_call:
                raise error
            return real(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize(
    ("place", "name", "call", "phase", "step"),
    [
        (loop, "training_loss", 3, "loss", 2),  # two micro-batches a step
        (torch.Tensor, "backward", 4, "backward", 2),
        (precision.Precision, "measure_gradients", 3, "unscale", 3),
        (precision.Precision, "clip", 1, "clip", 1),
        (precision.Precision, "update", 2, "optimizer", 2),
        (ParallelStrategy, "weights_sha256", 1, "closing", None),
        (trainer, "evaluate", 2, "evaluation", None),
        (training.Training, "prepare", 1, "build", None),
    ],
)
def test_an_out_of_memory_error_has_its_phase_and_step(plan, tmp_path, monkeypatch, place, name, call, phase, step):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has ...")
    monkeypatch.setattr(place, name, raising(error, call)(getattr(place, name)))
    row = execute(plan("gpt2_clm", "fp32_true", max_steps=4), tmp_path)
    death = row.flags["death"]
    assert (row.status, death["cause"], death.get("phase"), death.get("step")) == ("oom", "cuda_oom", phase, step)
    assert row.flags["oom"]["requested_bytes"] == 3 << 29 and row.steps_done == (
        step - 1 if step else 0 if phase == "build" else 4
    )


def test_every_phase_of_the_loop_is_a_statement_of_it():
    statements = [line.strip() for line in inspect.getsource(loop.train).splitlines()]
    assert Path(loop.__file__) == failure.LOOP
    for begins in failure.LOOP_PHASES:
        assert sum(statement.startswith(begins) for statement in statements) == 1, begins


def test_a_poisoned_context_leaves_the_first_error_in_the_row(plan, tmp_path, monkeypatch):
    """Everything that touches the device after the fault fails, as it would."""
    broken = []

    def poison(*_, **__):
        for place, name in ((ModuleTaps, "read"), (ModuleTaps, "state_dict"), (precision.Precision, "close")):
            monkeypatch.setattr(place, name, lambda *_, **__: fail())
        for name in (
            "max_memory_allocated",
            "max_memory_reserved",
            "memory_stats",
            "mem_get_info",
            "get_device_properties",
            "get_device_name",
            "synchronize",
        ):
            monkeypatch.setattr(torch.cuda, name, fail)
        monkeypatch.setattr("harness.run.outcome.capture", fail)
        monkeypatch.setattr("harness.run.outcome.device_slug", fail)
        raise torch.AcceleratorError(ILLEGAL)

    def fail(*_, **__):
        broken.append(1)
        raise torch.AcceleratorError("CUDA error: the context is poisoned")

    real_words = trainer.Trainer._memory_and_speed

    def on_a_gpu(self, struck):
        self.device = torch.device("cuda")  # so that its figures are asked for
        real_words(self, struck)

    monkeypatch.setattr(trainer.Trainer, "_memory_and_speed", on_a_gpu)
    monkeypatch.setattr(precision.Precision, "update", raising_second(poison))
    row = execute(plan("gpt2_clm", "fp32_true", max_steps=4), tmp_path)
    assert broken
    assert (row.status, row.flags["death"]["cause"], row.steps_done) == ("error", "illegal_access", 1)
    assert row.error == f"AcceleratorError: {ILLEGAL}" and row.flags["death"]["phase"] == "optimizer"
    failed = " ".join(row.flags[CLEANUP_ERRORS])
    assert all(what in failed for what in ("module statistics", "the allocator's peaks", "taking back the switches"))
    assert row.env["torch_version"] and row.peak_allocated_bytes is None and row.loss_initial
    assert json.loads((tmp_path / "runs" / row.run_id / "run.json").read_text())["error"] == row.error


def raising_second(poison):
    real, calls = precision.Precision.update, []

    def update(self, optimizer):
        calls.append(1)
        return poison() if len(calls) == 2 else real(self, optimizer)

    return update


def test_without_a_first_error_the_second_is_one(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(instruments.ModuleTaps, "state_dict", lambda self: 1 / 0)
    row = execute(plan("gpt2_clm", "fp32_true", max_steps=2), tmp_path)
    assert row.status == "error" and row.error.startswith("ZeroDivisionError")
    flags = {}
    with pytest.raises(ZeroDivisionError), cleanup(None, flags, "it"):
        raise ZeroDivisionError("division by zero")
    with cleanup(ValueError("first"), flags, "it"):
        raise ZeroDivisionError("division by zero")
    assert flags == {CLEANUP_ERRORS: ["it: ZeroDivisionError: division by zero"]}
