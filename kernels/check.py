"""Correctness of every op on the device at hand, judged against float64, at real sizes.

    python -m kernels check [--op NAME ...] [--jobs N] [--json]

Each op has a function (device, dtype, impl) that yields `Judged`, in `CHECKS` of its module. The tests go through many more
shapes; this is what an installed package, or a benchmark that is about to trust its kernels, asks of a GPU that nobody has
tried yet. Losses and gradients may err by no more than eager torch in the same dtype does, plus one rounding; counts are exact.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module

import torch

from kernels import bench
from kernels.dispatch import DTYPES
from kernels.float_formats import FP16

SCHEMA = 1

MODULES = bench.MODULES | {"exponent_histogram": "kernels.list_cases"}
"""Op -> the module whose CHECKS judge it."""
SMALLEST = FP16.smallest_subnormal
SPECIAL = (*(sign * value for value in (0.0, float("inf"), FP16.max) for sign in (1, -1)), float("nan"), 65536.0, 1e30,
           SMALLEST / 2, SMALLEST, 1e-40)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One quantity of one case: `error` (0: as in float64) beside what is `allowed`, both in `unit`."""

    case: str
    quantity: str
    error: float
    allowed: float
    unit: str

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # a NaN is not


@dataclass(frozen=True)
class CheckRow:
    """status: "right", "wrong", or "failed": the op raised, and `note` says what. Then there is no error to give."""

    op: str
    dtype: str
    device: str
    impl: str
    case: str
    quantity: str
    status: str
    error: float | None = None
    allowed: float | None = None
    unit: str | None = None
    note: str = ""


def run(device: str, impl: str = "auto", ops: list[str] | None = None, dtypes: list[str] | None = None) -> Iterator[CheckRow]:
    """Check ops on `device` ("cuda" or "cpu"), a row a quantity, as they are judged. An op that raises costs its own dtype."""
    for op in bench.known(ops, MODULES):
        for dtype in dtypes or DTYPES:
            torch.manual_seed(0)
            head = (op, dtype, device, impl)
            try:
                for judged in import_module(MODULES[op]).CHECKS[op](torch.device(device), DTYPES[dtype], impl):
                    yield _row(head, judged)
            except Exception as e:  # what one kernel does on an unknown device must not hide the others
                note = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"[:300]
                yield CheckRow(*head, "", "", "failed", note=note)


def run_apart(
    device: str, impl: str = "auto", ops: list[str] | None = None, dtypes: list[str] | None = None, jobs: int = 2
) -> Iterator[CheckRow]:
    """As `run`, each op in a process of its own, ``jobs`` at a time: one that crashes costs its own op. It is tried again when
    the others have ended, since a GPU that is full, or allows one process, is no fault of an op."""

    def check(op: str) -> tuple[str, list[CheckRow] | None, str]:
        options = f"check --op {op} --device {device} --impl {impl} --jobs 1 --json".split()
        options += ["--dtype", *dtypes] if dtypes else []
        done = subprocess.run([sys.executable, "-m", __package__, *options], capture_output=True, text=True, check=False)
        try:
            return op, [CheckRow(**row) for row in json.loads(done.stdout)["rows"]], ""
        except ValueError:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            return op, None, f"its process ended with {done.returncode}: {said}"[:300]

    with ThreadPoolExecutor(jobs) as threads:
        ended = [threads.submit(check, op) for op in bench.known(ops, MODULES)]
        again = []
        for op, rows, _ in (future.result() for future in as_completed(ended)):
            if rows is None or any(row.status == "failed" for row in rows):
                again.append(op)
            else:
                yield from rows
    for op in again:
        _, rows, why = check(op)
        yield from rows if rows is not None else [CheckRow(op, "", device, impl, "", "", "failed", note=why)]


def _row(head: tuple[str, str, str, str], judged: Judged) -> CheckRow:
    error = judged.error if abs(judged.error) < float("inf") else None  # strict JSON
    note = "" if error is not None else "the error is not a finite number"
    status = "right" if judged.right else "wrong"
    return CheckRow(*head, judged.case, judged.quantity, status, error, judged.allowed, judged.unit, note)


def differing(got: dict, want: dict) -> tuple[float, float, str]:
    """(error, allowed, unit) of counts that must be equal: how many are not."""
    return float(sum(got[name] != want[name] for name in want)), 0.0, "counts that differ"


def of_bound(error: torch.Tensor, bound: torch.Tensor | float) -> tuple[float, float, str]:
    """(error, allowed, unit) of numbers that may err: the worst, as a share of its bound."""
    share = error.double() / bound
    return (share.max().item() if share.numel() else 0.0), 1.0, "of its bound"


def with_special(x: torch.Tensor) -> torch.Tensor:
    """x with NaN, infinities, zeros, subnormals and fp16's limits at both ends of its memory."""
    flat = x.view(-1)
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(x.dtype).to(x.device)[: max(1, flat.numel() // 4)]
    flat[: len(special)] = special
    flat[flat.numel() - len(special) :] = special
    return x


def counted(x: torch.Tensor, below: float = SMALLEST) -> dict[str, int | float]:
    """What the statistics ops count, by torch's comparisons in float64 on x's device; fp16 by a conversion."""
    a = x.detach().reshape(-1).double()
    half, finite = a.float().half().double(), a[a.isfinite()].abs()
    return {
        "numel": a.numel(),
        "absmax": finite.max().item() if finite.numel() else 0.0,
        "nan": int(a.isnan().sum()),
        "inf": int(a.isinf().sum()),
        "zeros": int((a == 0).sum()),
        "fp16_flush": int(((a != 0) & (half == 0)).sum()),
        "fp16_subnormal": int(((half != 0) & (half.abs() < FP16.smallest_normal)).sum()),
        "below": int(((finite > 0) & (finite < below)).sum()),
        "over_fp16": int((finite > FP16.max).sum()),
    }
