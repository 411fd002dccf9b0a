"""Why a run failed: causes from exceptions and exit codes, never one without evidence; step and phase; and that errors of
cleaning up do not take the first one's place."""

import inspect
import json
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench_cases.data.documents import DataError, DataUnavailable
from bench_cases.models import ModelError
from harness import failure, loop, precision, training
from harness.failure import CAUSES, CLEANUP_ERRORS, RESUMABLE, Evidence, Failure, cleanup, of_exception, of_exit, of_hang
from harness.parallel.strategy import ParallelStrategy
from harness.run import instruments, trainer
from harness.run.execute import execute
from instrument.watch.taps import ModuleTaps

STACK = """Fatal Python error: Segmentation fault

Thread 0x01 (most recent call first):
  File "/a/b.py", line 1 in idle

Current thread 0x02 (most recent call first):
  File "/c/d.py", line 7 in strike
  File "/c/e.py", line 9 in run
"""


def raised_while_handling(outer: Exception, inner: Exception) -> Exception:
    """``outer``, raised while ``inner`` was handled."""
    try:
        try:
            raise inner
        except Exception:
            raise outer from None if isinstance(outer, KeyError) else inner
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom", "cuda_oom"),
        (torch.AcceleratorError("CUDA error: out of memory"), "oom", "cuda_oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", "cuda_oom"),
        (MemoryError(), "oom", "host_oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "oom", "host_oom"),
        (OSError(12, "Cannot allocate memory"), "oom", "host_oom"),
        (RuntimeError("could not create a primitive"), "oom", "host_oom"),  # oneDNN
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), "error", "exception"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "error", "illegal_access"),
        (RuntimeError("CUDA error: misaligned address"), "error", "illegal_access"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "error", "poisoned_context"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "error", "poisoned_context"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "error", "poisoned_context"),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
            "error",
            "device_error",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), "error", "device_error"),
        (ModuleNotFoundError("No module named 'x'"), "error", "import_failure"),
        (OSError("libcudart.so.13: cannot open shared object file: No such file or directory"), "error", "import_failure"),
        (DataError("x.jsonl:3: not JSON"), "error", "bad_data"),
        (DataUnavailable("no network"), "error", "bad_data"),
        (SystemExit(4), "error", "exit"),
        (ZeroDivisionError("division by zero"), "error", "exception"),
        (ValueError("the file says: CUDA out of memory"), "error", "exception"),  # quoted, not met
        (raised_while_handling(ModelError("cannot be trained"), MemoryError("x")), "oom", "host_oom"),
        (
            raised_while_handling(
                RuntimeError("clean-up failed"), torch.AcceleratorError("CUDA error: an illegal memory access")
            ),
            "error",
            "illegal_access",
        ),
        (
            raised_while_handling(KeyError("instead"), MemoryError()),
            "error",
            "exception",
        ),  # raised "from None": the first is disowned
    ],
)
def test_an_exception_has_the_cause_of_the_first_that_has_one(error, status, cause):
    death = of_exception(error, step=3)
    assert (death.status, death.cause, death.flags["death"]["step"]) == (status, cause, 3)
    assert death.error and "\n" not in death.error


def test_the_sentence_is_that_of_the_error_which_has_the_cause():
    error = raised_while_handling(
        RuntimeError("clean-up failed"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    )
    assert of_exception(error).error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB."
    assert of_exception(ValueError("first\nsecond")).error == "ValueError: first"


def test_a_sigkill_is_the_kernels_only_on_evidence():
    seen = {"phase": "training", "steps_done": 7, "rss_bytes": 12_300_000_000}
    kernel = of_exit(-9, Evidence(oom_kills=1, oom_counter="/sys/fs/cgroup/memory.events", **seen))
    assert (kernel.status, kernel.cause) == ("oom", "host_oom_kill")
    assert "in training after step 7" in kernel.error and "rose by 1, /sys/fs/cgroup/memory.events" in kernel.error
    assert "12.30 GB resident when last seen" in kernel.error
    somebody, nobody_knows = (of_exit(-9, Evidence(oom_kills=kills, **seen)) for kills in (0, None))
    assert (somebody.status, somebody.cause, nobody_knows.cause) == ("error", "killed", "killed")
    assert "the kernel counted no out-of-memory kill" in somebody.error and "is not known" in nobody_knows.error


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL"])
def test_a_crash_says_where_python_was(name):
    death = of_exit(-signal.Signals[name], Evidence(phase="training", steps_done=2, stack=STACK))
    assert (death.status, death.cause, death.detail["signal"]) == ("error", "segfault", name)
    assert death.error == f"the run's process was killed by {name} in training after step 2, at /c/d.py:7 in strike"
    assert death.detail["stack"] == ['File "/c/d.py", line 7 in strike', 'File "/c/e.py", line 9 in run']
    assert death.stack == STACK


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n", "host_oom"),
        (
            "terminate called after throwing an instance of 'c10::AcceleratorError'\n  what():  CUDA error: an illegal memory "
            "access was encountered\n",
            "illegal_access",
        ),
        ("terminate called after throwing an instance of 'std::logic_error'\n  what():  a bug\n", "segfault"),
        ("earlier a library wrote: illegal memory access\n", "segfault"),
    ],
)
def test_an_abort_has_the_cause_that_cpp_named(words, cause):
    assert of_exit(-signal.SIGABRT, Evidence(output="a warning\n" + words)).cause == cause


def test_an_exit_and_an_unknown_end():
    assert (of_exit(3, Evidence(phase="build")).cause, of_exit(0, Evidence()).cause) == ("exit", "exit")
    assert "exited with code 3 without a result in build" in of_exit(3, Evidence(phase="build")).error
    unknown = of_exit(None, Evidence())
    assert unknown.cause == "killed" and "fork server" in unknown.error
    assert of_exit(-signal.SIGTERM, Evidence()).error == "the run's process was killed by SIGTERM"


def test_a_hang_says_for_how_long_where_and_what_ended_it():
    death = of_hang(Evidence(phase="evaluation", steps_done=0, heartbeat_age_s=901.23, stack=STACK), 900, "SIGKILL")
    assert (death.status, death.flags["death"]["beat_age_s"]) == ("hung", 901.2)
    assert death.error == "no sign of life for 900 s in evaluation, at /c/d.py:7 in strike; ended by SIGKILL"


@given(st.integers(-70, 300), st.integers(0, 3) | st.none(), st.text(), st.text())
def test_every_end_has_a_cause_and_only_those_from_outside_resume(exit_code, oom_kills, stack, output):
    death = of_exit(exit_code, Evidence(oom_kills=oom_kills, stack=stack, output=output))
    assert death.cause in CAUSES and death.flags["death"]["goes_on"] == (death.cause in RESUMABLE)
    assert (death.cause == "host_oom_kill") == (exit_code == -9 and bool(oom_kills))


def test_a_cause_that_is_not_declared_is_refused():
    with pytest.raises(ValueError, match="cause is 'bad luck'; allowed: cuda_oom"):
        Failure("bad luck", "x")


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
        (ParallelStrategy, "weights_sha256", 2, "closing", None),
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


@pytest.mark.process
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


@pytest.mark.process
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
