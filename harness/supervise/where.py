"""Where in a run an exception struck: the step and the phase, read from the frames it came through. It costs a healthy
run nothing. Torch-free."""

from __future__ import annotations

from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOOP = ("harness/loop.py", "train")
PHASES = {
    ("harness/evaluate.py", "evaluate"): "evaluation",
    ("harness/checkpointing.py", "write"): "checkpoint",
    ("harness/instruments.py", "investigate"): "forensics",
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


def where_of(error: BaseException) -> dict[str, Any]:
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
