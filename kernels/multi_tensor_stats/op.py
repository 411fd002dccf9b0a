"""The public op: checks, the choice of implementation, and the torch operator behind it."""

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import FLOAT_DTYPES, check_device_scalar, check_float, check_same_device, operators_watched, resolve_impl
from kernels.multi_tensor_stats.host import host_stats
from kernels.multi_tensor_stats.reference import reference_stats
from kernels.multi_tensor_stats.stats import UNDERFLOW_BELOW, TensorStats

_OP = "multi_tensor_stats"
COUNTS = ("all", "underflow", "none")
_library = torch.library.Library("dtype_dynamics_stats", "DEF")
_library.define(
    "multi_tensor_stats(Tensor[] tensors, Tensor(a!) words, Tensor? below_at, float below, str counts, str impl) -> ()"
)


def multi_tensor_stats(
    tensors: Sequence[torch.Tensor],
    *,
    out: TensorStats | None = None,
    underflow_below: float | torch.Tensor = UNDERFLOW_BELOW,
    counts: str = "all",
    impl: str = "auto",
) -> TensorStats:
    """Per-tensor and total statistics of a list; no host sync on CUDA, one launch.

    tensors          fp32, bf16, fp16, mixed; any shapes, empty and non-contiguous too (one that is not
                     dense is copied first); one device. An empty list gives zeros.
    out              result to overwrite, of the same length and device; default: a new one
    underflow_below  `below` counts 0 < |x| < this; a number, or a one-element float32 tensor on the device
                     (after unscaling: 2^-24 / scale)
    counts           "all"; "underflow": zeros and below only, where the others cost (on a CPU); "none": a mere
                     check that everything is finite. Cells left out hold -1, and `read()` gives None
    impl             "auto": Triton on CUDA, the numpy and torch path of host.py elsewhere;
                     "torch" on CUDA is the float64 definition, slow

    Raises TypeError for other dtypes or sparse tensors, ValueError for mixed devices or an `out` that does
    not fit, RuntimeError when a CUDA graph is being captured and this list has not been seen before.
    Deterministic: the same values in the same list give the same bits.
    """
    if counts not in COUNTS:
        raise ValueError(f"{_OP}: counts must be one of {COUNTS}, got {counts!r}")
    tensors = list(tensors)
    device = _device(tensors, out)
    check_tensors(_OP, tensors, device)
    out = fitting_out(_OP, out, len(tensors), device)
    check_device_scalar(_OP, "underflow_below", underflow_below, device)
    impl = resolve_impl(_OP, impl, device)
    if impl == "torch" and device.type == "cpu" and not is_compiling() and not operators_watched():
        below = underflow_below.item() if isinstance(underflow_below, torch.Tensor) else float(underflow_below)
        _on_host(tensors, out, below, counts)  # a registered operator costs 20 us more
        return out
    at, below = (underflow_below, 0.0) if isinstance(underflow_below, torch.Tensor) else (None, float(underflow_below))
    torch.ops.dtype_dynamics_stats.multi_tensor_stats(tensors, out.words, at, below, counts, impl)
    return out


def _device(tensors: list[torch.Tensor], out: TensorStats | None) -> torch.device:
    if tensors:
        return tensors[0].device
    return out.words.device if out is not None else torch.device("cpu")


def check_tensors(op: str, tensors: list[torch.Tensor], device: torch.device) -> None:
    """Dense floating-point tensors on one device, or an error that names the first that is not."""
    for index, x in enumerate(tensors):
        if isinstance(x, torch.Tensor) and x.dtype in FLOAT_DTYPES and x.device == device and x.layout is torch.strided:
            continue  # the names are put together only for a message
        check_float(op, f"tensors[{index}]", x)
        if x.layout is not torch.strided:
            raise TypeError(f"{op}: tensors[{index}] must be dense, got layout {x.layout}")
        check_same_device(op, device, **{f"tensors[{index}]": x})


def fitting_out(op: str, out: TensorStats | None, n_tensors: int, device: torch.device) -> TensorStats:
    """`out`, checked, or a new result."""
    if out is None:
        return TensorStats.allocate(n_tensors, device)
    if len(out) != n_tensors:
        raise ValueError(f"{op}: out holds {len(out)} tensors, the list {n_tensors}")
    check_same_device(op, device, out=out.words)
    return out


def flat(x: torch.Tensor) -> torch.Tensor:
    """All elements as one dimension, in storage order where they are dense in memory; otherwise a copy.

    The statistics do not depend on the order. `flat(x).data_ptr() == x.data_ptr()` tells a view from a copy.
    """
    if x.is_contiguous():
        return x.view(-1)
    size = 1
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length != 1 and stride != size:
            return x.reshape(-1).contiguous()  # reshape alone may return a view with gaps
        size *= length
    return x.as_strided((x.numel(),), (1,))


def _on_host(tensors, out, below, counts) -> None:
    host_stats([x if x.is_contiguous() else flat(x.detach()) for x in tensors], out, below, counts=counts)


def _run(tensors, words, below_at, below, counts, impl) -> None:
    out = TensorStats(words)
    if impl == "triton":
        from kernels.multi_tensor_stats.launch import launch_stats  # imports triton

        launch_stats(tensors, words, below_at, below, counts != "none")
    elif words.device.type == "cpu":
        _on_host(tensors, out, below if below_at is None else below_at.item(), counts)
    else:
        reference_stats(tensors, out, below if below_at is None else below_at, counts=counts != "none")


@torch.library.register_fake("dtype_dynamics_stats::multi_tensor_stats", lib=_library)
def _fake(tensors, words, below_at, below, counts, impl) -> None:
    return None


_library.impl("multi_tensor_stats", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.dtype_dynamics_stats.multi_tensor_stats)
def _no_model_flops(*args, **kwargs) -> int:
    """Measuring is not the model's work: it adds nothing to model FLOPs."""
    return 0
