"""The process-wide switches that change numerics: set, proven by computation, recorded."""

from __future__ import annotations

import torch


class SwitchError(RuntimeError):
    """A switch that was set and did not take effect."""


def set_switches(device: torch.device, *, tf32: bool, threads: int) -> dict[str, object]:
    """Set every global switch explicitly and return the record of them.

    Off everywhere: TF32 (unless ``tf32``), reduced-precision reductions and fp16 accumulation
    in matrix products, cuDNN autotuning. Raises `SwitchError` when a product shows otherwise.
    """
    precision = "tf32" if tf32 else "ieee"
    torch.backends.fp32_precision = precision
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        backend.fp32_precision = precision
    # oneDNN could round fp32 products to bf16; a CPU run must never do that.
    for backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn):
        backend.fp32_precision = "ieee"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)  # the math backend multiplies 16-bit queries in fp32
    torch.backends.cudnn.benchmark = False
    if device.type == "cpu" and threads:
        torch.set_num_threads(threads)
    record = {
        "fp32_precision": precision,
        "fp16_reduced_precision_reduction": False,
        "bf16_reduced_precision_reduction": False,
        "fp16_accumulation": False,
        "math_attention_in_16_bits": False,
        "cudnn_benchmark": False,
        "threads": torch.get_num_threads(),
        "verified": verify(device, tf32=tf32),
    }
    return record


def verify(device: torch.device, *, tf32: bool) -> list[str]:
    """Prove the switches by products whose results differ between the settings.

    Returns what was proven; raises `SwitchError` otherwise.
    """
    checks = {"fp32_products": tf32_rounds(device) == tf32}
    if device.type == "cuda":
        checks["fp16_accumulates_in_fp32"] = accumulates_in_fp32(device, torch.float16)
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise SwitchError(f"set but not in effect on {device}: {', '.join(wrong)} (tf32 wanted: {tf32})")
    return list(checks)


def tf32_rounds(device: torch.device) -> bool:
    """Whether an fp32 product rounds its operands: 1 + 2^-12 survives fp32 and not TF32."""
    value = 1.0 + 2.0**-12
    left = torch.full((256, 256), value, device=device)
    product = left @ torch.eye(256, device=device)
    return not bool((product == value).all())


def accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether partial sums may exceed the dtype's range: 300 x 300 added 8,192 times, then subtracted as often, is
    finite in fp32 (0, where a tensor core's alignment drops no bits) and not when a partial sum is kept in fp16."""
    depth = 16_384
    left = torch.full((64, depth), 300.0, device=device, dtype=dtype)
    left[:, depth // 2 :] = -300.0
    right = torch.full((depth, 64), 300.0, device=device, dtype=dtype)
    return bool((left @ right).isfinite().all())
