"""The public op: checks, the choice of implementation, and the torch operator behind it."""

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import check_float, check_same_device, resolve_impl
from kernels.exponent_histogram.counts import ExponentHistogram
from kernels.exponent_histogram.reference import host_histogram, reference_histogram

_OP = "exponent_histogram"
_library = torch.library.Library("dtype_dynamics_histogram", "DEF")
_library.define("exponent_histogram(Tensor x, Tensor(a!) words, str impl) -> ()")


def exponent_histogram(x: torch.Tensor, *, out: ExponentHistogram | None = None, impl: str = "auto") -> ExponentHistogram:
    """Add the counts of x per power of two to `out` (default: a new one). No host sync on CUDA.

    x    fp32, bf16 or fp16, any shape and strides, at most 2^30 elements (one that is not dense is copied)
    out  an ExponentHistogram on the same device, added to: several tensors can share one

    TypeError for other dtypes, ValueError for another device. Exact and independent of order.
    """
    check_float(_OP, "x", x)
    out = ExponentHistogram(x.device) if out is None else out
    check_same_device(_OP, x.device, out=out.words)
    if x.numel() > 2**30:
        raise ValueError(f"{_OP}: x has {x.numel()} elements, the limit is 2^30: pass it in parts")
    torch.ops.dtype_dynamics_histogram.exponent_histogram(x, out.words, resolve_impl(_OP, impl, x.device))
    return out


def _run(x, words, impl) -> None:
    if impl == "triton":
        from kernels.exponent_histogram.triton_kernel import launch_histogram  # imports triton

        launch_histogram(x.detach(), words)
    elif x.device.type == "cpu":
        host_histogram(x, words)
    else:
        reference_histogram(x, words)


@torch.library.register_fake("dtype_dynamics_histogram::exponent_histogram", lib=_library)
def _fake(x, words, impl) -> None:
    return None


_library.impl("exponent_histogram", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_histogram.exponent_histogram)
def _no_model_flops(*args, **kwargs) -> int:
    """Measuring is not the model's work: it adds nothing to model FLOPs."""
    return 0
