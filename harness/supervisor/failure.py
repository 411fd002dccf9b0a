"""What killed a run: its row's status, its cause for machines, and a sentence for people. Pure, torch-free.

A cause is stated only on evidence. A SIGKILL is the kernel's (`host_oom_kill`) when the kernel's own count of such
kills rose while the run was there; otherwise somebody's (`killed`).

What an exception did to a run, from inside its process: cause, place, and memory where that ran out.

Where in a run an exception struck: the step and the phase, read from the frames it came through. It costs a healthy
run nothing. Torch-free.
"""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

CAUSES = (
    "cuda_oom",
    "host_oom",
    "host_oom_kill",
    "killed",
    "illegal_access",
    "poisoned_context",
    "device_error",
    "segfault",
    "exit",
    "import_failure",
    "bad_data",
    "exception",
    "hung",
    "node_lost",
)
OUT_OF_MEMORY = ("cuda_oom", "host_oom", "host_oom_kill")
GOES_ON = ("killed", "host_oom_kill", "hung", "node_lost")
"""Deaths from outside: the run's last checkpoint is as good as that of a run whose machine went away, which has no row
at all and goes on. What its own code did would happen again: such a run starts over."""
MOST_FRAMES = 20
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")

TYPES = {
    "torch.OutOfMemoryError": "cuda_oom",
    "builtins.MemoryError": "host_oom",
    "builtins.ImportError": "import_failure",
    "bench_cases.data.documents.DataError": "bad_data",
    "bench_cases.data.documents.DataUnavailable": "bad_data",
    "builtins.SystemExit": "exit",
}
MESSAGES = (
    ("cuda_oom", r"CUDA out of memory|CUDA (driver )?error: out of memory|CU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED"),
    ("host_oom", r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc"),
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
"""First match wins. ``poisoned_context``: every later call of this process' CUDA context fails too."""


@dataclass(frozen=True)
class Failure:
    """``detail`` is what else is known, for ``flags["death"]``; ``stack`` the stacks of all threads, for people; ``memory``
    how it stood when it ran out."""

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
    def flags(self) -> dict[str, Any]:
        """``death``, and ``oom`` where memory ran out, of the row's ``flags``."""
        known = {name: value for name, value in self.detail.items() if value is not None}
        oom = {} if self.memory is None else {"oom": self.memory}
        return {"death": {"cause": self.cause, "goes_on": self.cause in GOES_ON, **known}, **oom}


@dataclass(frozen=True)
class Evidence:
    """What a supervisor knows of a process: the last sign of life (``phase``, ``steps_done``, ``beat_age_s``), its memory
    when it was last looked at, the ``stack`` that it wrote as it died, the end of its ``output``, and by how much the kernel's
    count of out-of-memory kills rose since it began (None: there is no such count to read)."""

    phase: str | None = None
    steps_done: int | None = None
    beat_age_s: float | None = None
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    memory_limit_bytes: int | None = None
    oom_kills: int | None = None
    oom_counter: str | None = None
    stack: str = ""
    output: str = ""

    @property
    def place(self) -> str:
        """Where it was, in words."""
        where = f" in {self.phase}" if self.phase else ""
        return f"{where} behind step {self.steps_done}" if self.steps_done else where

    @property
    def detail(self) -> dict[str, Any]:
        """For `Death.detail`."""
        return {
            "phase": self.phase,
            "step": self.steps_done,
            "stack": current_frames(self.stack) or None,
            "beat_age_s": None if self.beat_age_s is None else round(self.beat_age_s, 1),
            "rss_last_seen_bytes": self.rss_bytes,
            "peak_rss_last_seen_bytes": self.peak_rss_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
        }


def of_exception(error: BaseException, **detail: Any) -> Failure:
    """What an exception says. The first one in its chain that has a cause of its own speaks: a library that wraps an
    out-of-memory error, or fails behind it, does not hide it."""
    for link in chain(error):
        cause = _cause(link)
        if cause != "exception":
            return Failure(cause, sentence(link), {"type": type(link).__name__, **detail})
    return Failure("exception", sentence(error), {"type": type(error).__name__, **detail})


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from or behind, once each."""
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


def _cause(error: BaseException) -> str:
    for kind in type(error).__mro__:
        if (cause := TYPES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return cause
    if not isinstance(error, (RuntimeError, OSError)):  # others only quote such words
        return "exception"
    if (cause := _of_message(str(error))) is not None:
        return cause
    return "device_error" if type(error).__name__ == "AcceleratorError" else "exception"


def _of_message(text: str) -> str | None:
    return next((cause for cause, pattern in MESSAGES if re.search(pattern, text)), None)


def of_exit(exit_code: int | None, evidence: Evidence) -> Failure:
    """What the end of a process says that left no word: ``exit_code`` as `multiprocessing` has it, negative for a signal,
    None where nobody could learn it (its fork server died too)."""
    if exit_code is None:
        return Failure(
            "killed",
            f"the run's process is gone{evidence.place}; how it ended is not known: the fork server that "
            f"would have been told died as well",
            evidence.detail,
            evidence.stack,
        )
    if exit_code >= 0:
        return Failure(
            "exit",
            f"the run's process exited with code {exit_code} without a result{evidence.place}",
            evidence.detail | {"exit_code": exit_code},
            evidence.stack,
        )
    name = _signal_name(-exit_code)
    detail = evidence.detail | {"signal": name}
    if name in CRASHES:
        return _crash(name, evidence, detail)
    if name == "SIGKILL":
        return _sigkill(evidence, detail)
    return Failure("killed", f"the run's process was killed by {name}{evidence.place}", detail, evidence.stack)


def of_hang(evidence: Evidence, hang_after_s: float, ended_by: str) -> Failure:
    """A run that gave no sign of life for ``hang_after_s`` seconds, and what it took to end it."""
    line = innermost(evidence.stack)
    return Failure(
        "hung",
        f"no sign of life for {hang_after_s:g} s{evidence.place}{f', {line}' if line else ''}; ended by {ended_by}",
        evidence.detail | {"hang_after_s": hang_after_s, "ended_by": ended_by},
        evidence.stack,
    )


def current_frames(stack: str) -> list[str]:
    """The frames of the thread that a dump calls current, innermost first."""
    found = re.search(r"^Current thread 0x[^\n]*\n((?:  [^\n]*\n?)*)", stack, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()[:MOST_FRAMES]] if found else []


def innermost(stack: str) -> str | None:
    """Where the current thread was, in words."""
    frames = current_frames(stack)
    found = re.fullmatch(r'File "(.+)", line (\d+) in (.+)', frames[0]) if frames else None
    return f"at {found[1]}:{found[2]} in {found[3]}" if found else None


def _crash(name: str, evidence: Evidence, detail: dict[str, Any]) -> Failure:
    """C++ aborts over what nobody caught: its last words say what that was."""
    said = (
        re.findall(r"terminate called after throwing an instance of '([^']+)'(?:\s+what\(\): *([^\n]+))?", evidence.output)
        if name == "SIGABRT"
        else []
    )
    words = ": ".join(filter(None, said[-1])) if said else ""
    line = innermost(evidence.stack)
    where = f"{evidence.place}{f', {line}' if line else ''}"
    return Failure(
        _of_message(words) or "segfault",
        f"the run's process was killed by {name}{where}{f': {words}' if words else ''}",
        detail,
        evidence.stack,
    )


def _sigkill(evidence: Evidence, detail: dict[str, Any]) -> Failure:
    seen = "" if evidence.rss_bytes is None else f"; {evidence.rss_bytes / 1e9:.2f} GB resident when last seen"
    detail = detail | {"oom_kills": evidence.oom_kills, "oom_counter": evidence.oom_counter}
    if evidence.oom_kills:
        return Failure(
            "host_oom_kill",
            f"the kernel killed the run's process for want of memory{evidence.place} (its count of "
            f"such kills rose by {evidence.oom_kills}, {evidence.oom_counter}){seen}",
            detail,
        )
    why = (
        "this machine lets nobody read the kernel's count of out-of-memory kills, so whether it was one is not known"
        if evidence.oom_kills is None
        else "from outside: the kernel counted no out-of-memory kill since the run began"
    )
    return Failure("killed", f"the run's process was killed by SIGKILL{evidence.place}, {why}{seen}", detail)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


ROOT = Path(__file__).resolve().parents[2]
LOOP = ("harness/loop.py", "train")
PHASES = {
    ("harness/evaluate.py", "evaluate"): "evaluation",
    ("harness/run/checkpoints.py", "write"): "checkpoint",
    ("harness/run/instruments.py", "investigate"): "forensics",
    ("harness/training.py", "prepare"): "build",
    ("bench_cases/models.py", "build_model"): "build",
    ("bench_cases/data/__init__.py", "load_data"): "data",
}
"""Of the functions that a run goes through, outermost first."""
IN_THE_LOOP = {
    **dict.fromkeys(("_wrapped_call_impl", "_call_impl", "__call__", "compile_wrapper", "_fn"), "forward"),
    "check_logits": "forward",
    "training_loss": "loss",
    "backward": "backward",
    "measure_gradients": "unscale",
    "clip": "clip",
    "update": "optimizer",
    "to": "batch",
    "step": "batch",
}
"""By the function that the loop called; of any other it is only known that it was in a step."""


def step_and_phase(error: BaseException) -> dict[str, Any]:
    """``phase`` and ``step`` (the attempted one, where it was a training step), or nothing where it is not known."""
    frames = list(_frames(error.__traceback__))
    for outer, inner in zip(frames, [*frames[1:], None], strict=True):
        if (phase := PHASES.get(_name(outer))) is not None:
            return {"phase": phase}
        if _name(outer) == LOOP:
            called = inner.f_code.co_name if inner is not None else ""
            return {"phase": IN_THE_LOOP.get(called, "step"), "step": outer.f_locals.get("step")}
    return {}


def _frames(trace: TracebackType | None) -> Any:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _name(frame: FrameType) -> tuple[str, str]:
    path = Path(frame.f_code.co_filename)
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return str(inside), frame.f_code.co_name


def failure_of(error: BaseException, device: str | None = None) -> Failure:
    """``device``: the run's (``cpu``, ``cuda``), None where it is not known yet. Never raises."""
    death = of_exception(
        error, **step_and_phase(error), peak_rss_last_seen_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    if death.status != "oom" or device is None:
        return death
    import torch

    from instrument.memory import memory_when_it_ran_out

    return replace(death, memory=memory_when_it_ran_out(death.error, torch.device(device), death.cause))
