"""What a kernel or op does, from its name: ours, attention, matmul, reduction, optimizer, copy, elementwise.

Names are of cuBLAS, cuDNN, CUTLASS, FlashAttention, ATen's CUDA kernels and ATen's ops, as torch.profiler prints them. First
rule that matches; a name that no rule knows is ``other`` and stays visible as such. Torch-free.
"""

from __future__ import annotations

import re

CLASSES = ("matmul", "attention", "elementwise", "reduction", "optimizer", "copy", "ours", "other")
"""``reduction`` includes normalisations and softmax."""

OUR_KERNELS = (
    "cross_entropy_rows bce_rows sum_rows inverse_count scale_rows logit_stats_rows activation_kernel "
    "stats_kernel scale_kernel resolvent_maps resolvent_borders resolvent_carries resolvent_walk resolvent_adjoint "
    "scan_maps scan_borders scan_walk scan_adjoint".split()
)
"""Every Triton kernel that this project launches."""

_OURS = rf"^({'|'.join(OUR_KERNELS)})(_\w+)?$|^_FusedLoss|^dtype_dynamics_|^ddb\.ours"
_RULES = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("ours", _OURS),
        (
            "attention",
            r"flash|fmha|scaled_dot_product|mem_?eff(icient)?_?att|efficient_attention|cudnn.*(sdpa|attention)|"
            r"attention_(forward|backward)|ScaledDotProduct|EfficientAttention",
        ),
        (
            "optimizer",
            r"_fused_(adamw?|sgd|adagrad)|FusedAdam|FusedOptimizer|Optimizer(Static)?(Blockwise)?\d*(State|bit)|"
            r"optimizer_(update|step)|OptimizerStatic|OptimizerBlockwise|^Optimizer\.step",
        ),
        (
            "matmul",
            r"gemm|gemv|nvjet|cublas|cutlass|xmma|wgmma|hmma|splitk|_dot_kernel|dot_kernel|"
            r"^aten::(mm|addmm|bmm|baddbmm|addbmm|addmv|mv|dot|matmul|linear|_addmm_activation|einsum|mkldnn_linear)$|"
            r"^(Mm|Addmm|Bmm|Baddbmm|Linear|MkldnnLinear)Backward|^mkldnn|convolution",
        ),
        (
            "copy",
            r"^memcpy|^memset|copy_kernel|CatArray|^aten::(copy_|_to_copy|to|clone|contiguous|cat|_cat|stack|fill_|zero_|"
            r"zeros|zeros_like|ones|full|_foreach_copy_|_foreach_zero_|index_select|lift_fresh)$|FillFunctor|"
            r"^(ToCopy|Clone|Cat|Copy\w*)Backward",
        ),
        (
            "reduction",
            r"reduce|layer_?norm|rms_?norm|batch_?norm|group_?norm|softmax|GammaBeta|RowwiseMoments|welford|"
            r"cross_entropy|nll_?loss|logsumexp|_foreach_norm|multi_tensor.*norm|LpNorm|cub::|scan|sort|topk|"
            r"^aten::(sum|mean|amax|amin|aminmax|max|min|norm|linalg_vector_norm|var|std|any|all|argmax|cumsum|"
            r"count_nonzero|isfinite)$|^(Sum|Mean|Norm|LinalgVectorNorm)Backward",
        ),
        (
            "elementwise",
            r"elementwise|pointwise|multi_tensor_apply|gelu|relu|tanh|sigmoid|dropout|embedding|index|gather|scatter|"
            r"^aten::_foreach_|^aten::(add|sub|mul|div|pow|square|sqrt|rsqrt|neg|exp|log|abs|where|masked_fill|clamp|addcmul|"
            r"addcdiv|lerp|silu|erf|sin|cos|sign|reciprocal|eq|ne|lt|gt|le|ge|logical_\w+|bitwise_\w+|"
            r"binary_cross_entropy\w*|threshold\w*|native_\w*|uniform|normal|arange|tril|triu)_?$|"
            r"^(Add|Sub|Mul|Div|Pow|Sqrt|Neg|Exp|Log|Where|MaskedFill|Clamp)Backward|^triton_poi",
        ),
    )
)


def kernel_class(name: str) -> str:
    """One of `CLASSES`."""
    return next((kind for kind, rule in _RULES if rule.search(name)), "other")
