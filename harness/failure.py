"""Why a run failed: the status of its row, a cause for machines, a sentence for people. Torch-free, starts nothing.

A cause is stated only on evidence. A SIGKILL counts as the kernel's (``host_oom_kill``) only if the kernel's own count of
out-of-memory kills rose while the run was there; otherwise somebody killed it (``killed``).

`failure_of` describes an exception from inside of the run's process, `of_exit` and `of_hang` the end of a process from outside.
"""

from __future__ import annotations

import linecache
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CAUSES = (
    *("cuda_oom", "host_oom", "host_oom_kill", "killed", "illegal_access", "poisoned_context", "device_error"),
    *("segfault", "exit", "import_failure", "bad_data", "exception", "hung", "node_lost"),
)
OUT_OF_MEMORY = ("cuda_oom", "host_oom", "host_oom_kill")
RESUMABLE = ("killed", "host_oom_kill", "hung", "node_lost")
"""Causes from outside of the run: it resumes from its last checkpoint, as a run whose machine went away without leaving a
row does. What its own code did would happen again: such a run starts over."""
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")
MAX_FRAMES = 20

TYPES = {
    "torch.OutOfMemoryError": "cuda_oom",
    "builtins.MemoryError": "host_oom",
    "builtins.ImportError": "import_failure",
    "bench_cases.data.documents.DataError": "bad_data",
    "bench_cases.data.documents.DataUnavailable": "bad_data",
    "builtins.SystemExit": "exit",
    "ray.exceptions.OutOfMemoryError": "host_oom_kill",
    **{f"ray.exceptions.{name}Error": "node_lost" for name in ("WorkerCrashed", "NodeDied", "LocalRayletDied", "ObjectLost")},
}
MESSAGES = (
    ("cuda_oom", r"(CUDA|HIP) out of memory|CUDA (driver )?error: out of memory|CU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED"),
    (
        "host_oom",
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc|"
        r"could not create a primitive(?! descriptor)",  # oneDNN, with no room for its code
    ),
    ("illegal_access", r"illegal memory access|misaligned address|CUDA error: invalid program counter"),
    (
        "poisoned_context",
        r"device-side assert|unspecified launch failure|CUDA error: (hardware stack|an illegal instruction|"
        r"uncorrectable|operation not supported on global|the launch timed out)|"
        r"CU(BLAS|DNN|SPARSE)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
    ),
    ("device_error", r"\b(CUDA|HIP|NCCL|cuDNN|cuBLAS) (driver )?error|CU(BLAS|DNN|SPARSE)_STATUS_\w+"),
    ("import_failure", r"cannot open shared object file|undefined symbol"),
)
"""Causes by the messages of libraries; the first match wins. ``poisoned_context``: every later call of this process' CUDA
context fails too."""


@dataclass(frozen=True)
class Failure:
    """``detail``: what else is known, for ``flags["death"]``; ``stack``: the stacks of all threads, for people; ``memory``: how
    memory stood when it ran out."""

    cause: str
    error: str
    detail: dict[str, Any] = field(default_factory=dict)
    stack: str = ""
    memory: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.cause not in CAUSES:
            raise ValueError(f"cause is {self.cause!r}; allowed: {', '.join(CAUSES)}")

    @property
    def status(self) -> str:
        """The row's status."""
        return "oom" if self.cause in OUT_OF_MEMORY else "hung" if self.cause == "hung" else "error"

    @property
    def resumable(self) -> bool:
        """Whether the same command resumes the run from its checkpoint."""
        return self.cause in RESUMABLE

    @property
    def flags(self) -> dict[str, Any]:
        """``death``, and ``oom`` where memory ran out, of the row's ``flags``."""
        known = {name: value for name, value in self.detail.items() if value is not None}
        oom = {} if self.memory is None else {"oom": self.memory}
        return {"death": {"cause": self.cause, "goes_on": self.resumable, **known}, **oom}


@dataclass(frozen=True)
class Evidence:
    """What a supervisor knows of a process that ended: its last heartbeat (``phase``, ``steps_done``, ``heartbeat_age_s``), its
    memory when last read, the ``stack`` that it wrote as it crashed, the end of its ``output``, and by how much the kernel's
    count of out-of-memory kills rose since it started (None: no such count can be read)."""

    phase: str | None = None
    steps_done: int | None = None
    heartbeat_age_s: float | None = None
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    memory_limit_bytes: int | None = None
    oom_kills: int | None = None
    oom_counter: str | None = None
    stack: str = ""
    output: str = ""

    @property
    def place(self) -> str:
        """`` in PHASE after step N``."""
        where = f" in {self.phase}" if self.phase else ""
        return f"{where} after step {self.steps_done}" if self.steps_done else where

    @property
    def line(self) -> str:
        """``, at FILE:LINE in FUNCTION`` of the thread that crashed or hung; empty where no stack was written."""
        frames = current_frames(self.stack)
        found = re.fullmatch(r'File "(.+)", line (\d+) in (.+)', frames[0]) if frames else None
        return f", at {found[1]}:{found[2]} in {found[3]}" if found else ""

    @property
    def detail(self) -> dict[str, Any]:
        """For `Failure.detail`."""
        return {
            "phase": self.phase,
            "step": self.steps_done,
            "stack": current_frames(self.stack) or None,
            "beat_age_s": None if self.heartbeat_age_s is None else round(self.heartbeat_age_s, 1),
            "rss_last_seen_bytes": self.rss_bytes,
            "peak_rss_last_seen_bytes": self.peak_rss_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
        }


def current_frames(stack: str) -> list[str]:
    """The frames of the thread that faulthandler calls current, innermost first."""
    found = re.search(r"^Current thread 0x[^\n]*\n((?:  [^\n]*\n?)*)", stack, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()[:MAX_FRAMES]] if found else []


# -- from inside: exceptions ------------------------------------------------------------------

LOOP = Path(__file__).with_name("loop.py")
LOOP_PHASES = {
    "batch = batches.step(": "batch",
    "micro = micro.to(": "batch",
    "logits = model(": "forward",
    "logits = precision.check_logits(": "forward",
    "loss = training_loss(": "loss",
    "loss.backward()": "backward",
    "strategy.sum_gradients()": "backward",
    "gradients = precision.measure_gradients(": "unscale",
    "norm = precision.clip(": "clip",
    "precision.update(": "optimizer",
}
"""The phase that a statement of `harness.loop.train` is, by its beginning. Any other is only known to be in a ``step``."""


def failure_of(error: BaseException, device: str | None = None, phase: str | None = None) -> Failure:
    """Describe an exception of a run. ``device``: the run's (``cpu``, ``cuda``), None where it is not known yet; ``phase``: one
    of `harness.run.heartbeat.RUN_PHASES`. Never raises."""
    where = {"phase": phase} if phase else {}
    if phase in (None, "training"):
        where |= step_and_phase(error)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    failure = of_exception(error, **where, peak_rss_last_seen_bytes=peak_bytes)
    if failure.status != "oom" or device is None:
        return failure
    import torch

    from instrument.memory import memory_when_it_ran_out

    return replace(failure, memory=memory_when_it_ran_out(failure.error, torch.device(device), failure.cause))


def of_exception(error: BaseException, **detail: Any) -> Failure:
    """The cause of the first exception in the chain that has one of its own: a library that wraps an out-of-memory error, or
    fails while handling it, does not hide it."""
    cause, link = next(((cause, link) for link in chain(error) if (cause := _cause(link)) != "exception"), ("exception", error))
    return Failure(cause, sentence(link), {"type": type(link).__name__, **detail})


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from or while handling, once each."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def sentence(error: BaseException) -> str:
    """``Type: first line``."""
    if isinstance(error, SystemExit):
        return f"the run's code called sys.exit({error.code!r})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def step_and_phase(error: BaseException) -> dict[str, Any]:
    """The attempted ``step`` and its ``phase``, from the statement of the training loop that raised; nothing for an error that
    did not come through the loop. It costs a healthy run nothing."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "train" and Path(code.co_filename) == LOOP:
            statement = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            phase = next((phase for begins, phase in LOOP_PHASES.items() if statement.startswith(begins)), "step")
            return {"phase": phase, "step": trace.tb_frame.f_locals.get("step")}
        trace = trace.tb_next
    return {}


def _cause(error: BaseException) -> str:
    for kind in type(error).__mro__:
        if (cause := TYPES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return cause
    if not isinstance(error, (RuntimeError, OSError)):  # others only quote such messages
        return "exception"
    return _cause_in(str(error)) or ("device_error" if type(error).__name__ == "AcceleratorError" else "exception")


def _cause_in(message: str) -> str | None:
    return next((cause for cause, pattern in MESSAGES if re.search(pattern, message)), None)


FORENSICS_ERRORS = "forensics_failed"
"""Key of the row's ``flags``: parts of the forensics that failed, and why."""


def after_divergence(flags: dict[str, Any], error: str, failure_flags: dict[str, Any]) -> dict[str, Any]:
    """The ``flags`` of a run that had diverged before its process failed: why less is known of its first non-finite value."""
    others = {name: value for name, value in failure_flags.items() if name != "death"}
    return flags | others | {FORENSICS_ERRORS: {**flags.get(FORENSICS_ERRORS, {}), "process": error}}


CLEANUP_ERRORS = "failed_behind_the_error"
"""Key of the row's ``flags``."""


@contextmanager
def cleanup(error: BaseException | None, flags: dict[str, Any], what: str) -> Iterator[None]:
    """Records errors of cleaning up after ``error`` in ``flags`` without hiding the original one: a poisoned CUDA context fails
    at every call. Where there was no ``error``, one that is raised here is raised."""
    try:
        yield
    except Exception as second:
        if error is None:
            raise
        flags.setdefault(CLEANUP_ERRORS, []).append(f"{what}: {sentence(second)}")


# -- from outside: how a process ended --------------------------------------------------------


def of_exit(exit_code: int | None, evidence: Evidence) -> Failure:
    """Describe the end of a process that reported nothing. ``exit_code`` as `multiprocessing` has it: negative for a signal;
    None where nobody could learn it, since the fork server ended too."""
    detail = evidence.detail
    if exit_code is None:
        why = "how it ended is not known: the fork server that would have been notified ended as well"
        return Failure("killed", f"the run's process is gone{evidence.place}; {why}", detail, evidence.stack)
    if exit_code >= 0:
        error = f"the run's process exited with code {exit_code} without a result{evidence.place}"
        return Failure("exit", error, detail | {"exit_code": exit_code}, evidence.stack)
    name = next((known.name for known in signal.Signals if known == -exit_code), f"signal {-exit_code}")
    error, detail = f"the run's process was killed by {name}{evidence.place}", detail | {"signal": name}
    if name in CRASHES:
        thrown = _cpp_exception(evidence.output) if name == "SIGABRT" else ""
        error += f"{evidence.line}{f': {thrown}' if thrown else ''}"
        return Failure(_cause_in(thrown) or "segfault", error, detail, evidence.stack)
    return _of_sigkill(evidence, detail) if name == "SIGKILL" else Failure("killed", error, detail, evidence.stack)


def of_hang(evidence: Evidence, hang_after_s: float, ended_by: str) -> Failure:
    """Describe a run that sent no heartbeat for ``hang_after_s`` seconds, and what it took to end it."""
    error = f"no sign of life for {hang_after_s:g} s{evidence.place}{evidence.line}; ended by {ended_by}"
    detail = evidence.detail | {"hang_after_s": hang_after_s, "ended_by": ended_by}
    return Failure("hung", error, detail, evidence.stack)


def _cpp_exception(output: str) -> str:
    """C++ aborts on an exception that nobody caught, and says which."""
    found = re.findall(r"terminate called after throwing an instance of '([^']+)'(?:\s+what\(\): *([^\n]+))?", output)
    return ": ".join(filter(None, found[-1])) if found else ""


def _of_sigkill(evidence: Evidence, detail: dict[str, Any]) -> Failure:
    seen = "" if evidence.rss_bytes is None else f"; {evidence.rss_bytes / 1e9:.2f} GB resident when last seen"
    detail = detail | {"oom_kills": evidence.oom_kills, "oom_counter": evidence.oom_counter}
    if evidence.oom_kills:
        rose = f"its count of such kills rose by {evidence.oom_kills}, {evidence.oom_counter}"
        error = f"the kernel killed the run's process for want of memory{evidence.place} ({rose}){seen}"
        return Failure("host_oom_kill", error, detail)
    why = "from outside: the kernel counted no out-of-memory kill since the run began"
    if evidence.oom_kills is None:
        why = "this machine lets nobody read the kernel's count of out-of-memory kills, so whether it was one is not known"
    return Failure("killed", f"the run's process was killed by SIGKILL{evidence.place}, {why}{seen}", detail)
