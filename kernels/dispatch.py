"""Which implementation runs, the argument checks that every op shares, and how an op is registered with torch.

`impl="auto"` is Triton on CUDA tensors and plain torch elsewhere. `impl="triton"`
on CPU tensors works only under Triton's interpreter (TRITON_INTERPRET=1, for
tests); `impl="torch"` works on every device. Nothing falls back silently: a
choice that cannot run raises.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

IMPLS = ("auto", "triton", "torch")
operators_watched = torch._C._len_torch_dispatch_stack  # 0 without a FlopCounterMode or its kin
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Every dtype that the ops take, by the name that check, bench and compile print."""
FLOAT_DTYPES = tuple(DTYPES.values())
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    return _HAS_TRITON


def interpreted() -> bool:
    """Whether Triton kernels run in the Python interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def resolve_impl(op: str, impl: str, device: torch.device) -> str:
    """`"triton"` or `"torch"` for tensors on `device`; ValueError or RuntimeError says why not."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if impl == "triton":
        if not has_triton():
            raise RuntimeError(f"{op}: impl='triton' needs the triton package, which is not installed")
        if device.type != "cuda" and not interpreted():
            raise RuntimeError(f"{op}: impl='triton' needs CUDA tensors, got {device} (tests: TRITON_INTERPRET=1)")
    return impl


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    """`x` is an fp32, bf16 or fp16 tensor, or TypeError names what it is."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {str(x.dtype)[6:]}")


def check_same_device(op: str, device: torch.device, **tensors) -> None:
    """Every tensor given (None is skipped) lives on `device`, or ValueError names the one that does not."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, the first argument on {device}")


def check_device_scalar(op: str, name: str, x, device: torch.device) -> None:
    """`x` is None, a Python number or a one-element tensor on `device` (a CPU scalar would cost a sync)."""
    if isinstance(x, torch.Tensor):
        if x.numel() != 1:
            raise ValueError(f"{op}: {name} must hold one element, got shape {tuple(x.shape)}")
        check_same_device(op, device, **{name: x})
    elif x is not None and not isinstance(x, (int, float)):
        raise TypeError(f"{op}: {name} must be a number or a one-element tensor, got {type(x).__name__}")


def number_or_tensor(x: int | float | torch.Tensor | None) -> tuple[torch.Tensor | None, float | None]:
    """(device scalar or None, number to multiply it with): how an argument that may be either enters an operator or kernel."""
    return (x, 1.0) if isinstance(x, torch.Tensor) else (None, None if x is None else float(x))


def _nothing(*args) -> None:
    """What an operator that only mutates its arguments returns, by shape alone."""


def _no_model_flops(*args, **kwargs) -> int:
    """Model FLOPs are matmuls and scans: losses, measuring and scaling add none. An op's elementwise work is in its `flops`."""
    return 0


def register(
    library: torch.library.Library,
    schema: str,
    run: Callable,
    fake: Callable | None = _nothing,
    flops: Callable[..., int] = _no_model_flops,
):
    """Define an operator with one implementation for every device, and return it (`torch.ops.<library>.<name>`).

    fake   what it returns by shape alone, under `torch.compile`; None: it is not meant to be traced
    flops  its model FLOPs, given the shapes of its arguments
    """
    name = library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    operator = getattr(getattr(torch.ops, library.ns), name)
    register_flop_formula(operator)(flops)
    return operator
