"""The launcher: one launch to unscale and measure, or two to measure, unscale and clip."""

import torch

from kernels.multi_tensor_stats import launch as stats_launch
from kernels.multi_tensor_stats.op import flat
from kernels.multi_tensor_stats.stats import TensorStats
from kernels.multi_tensor_stats.triton_kernel import TENSOR_WORDS
from kernels.unscale.triton_kernel import clip_kernel

BLOCK, TAIL, NUM_WARPS = 4096, 512, 4


def launch_unscale(
    grads: list[torch.Tensor],
    words: torch.Tensor,
    inv_scale_at: torch.Tensor | None,
    inv_scale: float,
    below_at: torch.Tensor | None,
    below: float,
    max_norm: float | None,
    clip: bool,
) -> stats_launch.Plan | None:
    """Grads (any strides; a copy and back where they are not dense) in place. Returns the plan, None for no grads."""
    flats = [g.view(-1) if g.is_contiguous() else flat(g) for g in grads]
    scale = dict(inv_scale_at=inv_scale_at, inv_scale=inv_scale, max_norm=max_norm, scale=True, store=not clip)
    plan = stats_launch.launch_stats(flats, words, below_at, below, True, **scale)
    if clip and plan is not None:
        fp32, bf16, _ = plan.present
        factor = TensorStats(words).clip_factor
        with torch.cuda.device_of(words):
            clip_kernel[(plan.n_pieces,)](
                plan.tensors, plan.pieces, factor if inv_scale_at is None else inv_scale_at, factor,
                float(inv_scale), plan.n_pieces,
                BLOCK=BLOCK, TAIL=TAIL, TENSOR_WORDS=TENSOR_WORDS, FP32=fp32, BF16=bf16,
                INV_SCALE_AT=inv_scale_at is not None, num_warps=NUM_WARPS,
            )  # fmt: skip
        stats_launch.launches += 1
    for g, f in zip(grads, flats, strict=True):
        if f.data_ptr() != g.data_ptr():
            g.copy_(f.view(g.shape))
    return plan
