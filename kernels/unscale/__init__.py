"""Unscale, count, measure and clip the gradients of a loss-scaled step.

With S the loss scale, c = 1/S and g the gradients as backward left them:

    y_i        = round(g_i c)                         what `GradScaler.unscale_` leaves, to the last bit
    found_inf  = 1 if some g_i is NaN or Inf          before the multiplication, as in GradScaler
    statistics of y as in multi_tensor_stats, except
    below      counts 0 < |g_i| < t, t = 2^-24: underflow *at the scale at which backward ran*
    factor     = min(1, max_norm / (norm + 1e-6))     fp32, evaluated as `clip_grad_norm_` does

Memory passes, a pass being one read or one write of all gradients. torch: unscale reads and
writes, the norm reads, the clip reads and writes: 5. Here:

    clip=False: one kernel reads g, writes y:                                    2
                (the caller folds `clip_factor` into the optimizer, or multiplies: 4)
    clip=True:  a kernel reads g and measures y without writing it; a second     3
                reads g and writes round(y * factor), pieces in reverse order,
                so that it starts with what the first left in the L2 cache

The second kernel rounds twice, as torch does (y to the gradient's dtype, then the product), so the
result differs from torch only where the norm itself does (torch sums in fp32, here in float64), and in
bf16 on CUDA, where torch also rounds the factor to bf16 (kernels/scale).
"""

from importlib import import_module

_LAZY = {
    "unscale_and_stats_": "op",
    "compile_specs": "triton_kernel",
    "bench_arms": "bench_arms",
}


def bytes_moved(numels: list[int], element_bytes: list[int], clip: bool) -> int:
    """Device-memory bytes of one call: 2 passes over the gradients, 3 with `clip`."""
    return (3 if clip else 2) * sum(n * size for n, size in zip(numels, element_bytes, strict=True))


def flops(numels: list[int], clip: bool) -> int:
    """Floating-point operations an element: unscale 1, square and add 2; with `clip` unscale and clip again, 2."""
    return (5 if clip else 3) * sum(numels)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
