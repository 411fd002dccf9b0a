"""The launcher: one launch over the tables that multi_tensor_stats keeps of a list."""

import torch

from kernels.multi_tensor_stats import launch as stats_launch
from kernels.multi_tensor_stats.op import flat
from kernels.multi_tensor_stats.triton_kernel import TENSOR_WORDS
from kernels.scale.triton_kernel import scale_kernel

BLOCK, TAIL, NUM_WARPS = 4096, 512, 4


def launch_scale(tensors: list[torch.Tensor], factor: torch.Tensor) -> stats_launch.Plan:
    """Tensors (at least one; any strides, a copy and back where they are not dense) in place. Returns the plan."""
    flats = [flat(x) for x in tensors]
    plan = stats_launch.plan_for(flats, factor.device)
    fp32, bf16, fp16 = plan.present
    with torch.cuda.device_of(factor):
        scale_kernel[(plan.n_pieces,)](
            plan.tensors, plan.pieces, factor, plan.n_pieces,
            BLOCK=BLOCK, TAIL=TAIL, TENSOR_WORDS=TENSOR_WORDS, FP32=fp32, BF16=bf16, FP16=fp16, num_warps=NUM_WARPS,
        )  # fmt: skip
    stats_launch.last_plan = plan
    stats_launch.launches += 1
    for x, f in zip(tensors, flats, strict=True):
        if f.data_ptr() != x.data_ptr():
            x.copy_(f.view(x.shape))
    return plan
