"""fp16 matrix products on CPUs that have no fp16 arithmetic: computed in fp32, rounded once.

That is what a tensor core with fp32 accumulators does, and it is over a hundred times faster
than the CPU's own fp16 path, which emulates every multiplication. The products of two fp16
numbers are exact in fp32, so the only differences to a float64 product rounded to fp16 are the
fp32 accumulation and one rounding (`tests/harness/test_precision.py` proves the bound).

The override is global to the process; every run has a process of its own.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

_FP16_UNITS = {"avx512_fp16", "amx_fp16", "asimdhp", "fphp"}


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo lists of this CPU; nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}


def cpu_has_fp16_arithmetic() -> bool:
    """Whether this CPU multiplies fp16 numbers in hardware."""
    return bool(cpu_flags() & _FP16_UNITS)


def install() -> torch.library.Library:
    """Override ``aten::mm``, ``addmm``, ``bmm`` and ``baddbmm`` on the CPU; keep the returned handle.

    Other dtypes go to the very kernels they had (through the ``out=`` variants, which are not
    overridden). Dropping the handle does not restore the kernels in every torch version: call
    its ``_destroy()``.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel", category=UserWarning)
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            library.impl(name, _in_fp32(getattr(torch.ops.aten, name).out), "CPU", allow_override=True)
    return library


@contextmanager
def installed():
    """The override for the length of a ``with`` block."""
    library = install()
    try:
        yield
    finally:
        library._destroy()


def _in_fp32(out_variant):
    """The op through its ``out=`` variant, in fp32 where the operands are fp16."""

    def product(*operands: torch.Tensor, **scalars) -> torch.Tensor:
        dtype = operands[-1].dtype
        if dtype != torch.float16:
            return out_variant(*operands, **scalars, out=torch.empty(0, dtype=dtype))
        return out_variant(*(operand.float() for operand in operands), **scalars, out=torch.empty(0)).half()

    return product
