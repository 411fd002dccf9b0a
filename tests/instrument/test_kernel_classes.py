"""Names that profilers print, classed as their authors meant them; and every kernel of ours is known."""

import ast
import re
from pathlib import Path

import pytest

import kernels
from instrument.kernel_classes import CLASSES, OUR_KERNELS, kernel_class

NAMES = {
    "matmul": [
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "AddmmBackward0",
        "ampere_sgemm_128x64_tn",
        "nvjet_hsh_128x256_64x4_1x2",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_wmma>(...)",
        "void gemv2T_kernel_val<int, float>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int>(...)",
    ],
    "attention": [
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>(...)",
        "ScaledDotProductEfficientAttentionBackward0",
        "aten::_efficient_attention_forward",
    ],
    "optimizer": [
        "aten::_fused_adamw_",
        "void kOptimizerStatic8bit2StateBlockwise<float, 0, 256, 1>(...)",
        "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>(...)",
    ],
    "copy": [
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "aten::copy_",
        "aten::_to_copy",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 2>(...)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(...)",
    ],
    "reduction": [
        "aten::native_layer_norm",
        "NativeLayerNormBackward0",
        "aten::_softmax",
        "aten::sum",
        "aten::_foreach_norm",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>(...)",
        "void (anonymous namespace)::cunn_SoftMaxForward<8, float>(...)",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>(...)",
    ],
    "elementwise": [
        "aten::add",
        "aten::mul_",
        "aten::gelu",
        "GeluBackward0",
        "aten::_foreach_mul_",
        "aten::embedding",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)",
        "void at::native::unrolled_elementwise_kernel<...>",
        "triton_poi_fused_add_0",
    ],
    "ours": [
        "cross_entropy_rows",
        "stats_kernel",
        "scale_kernel",
        "_FusedLoss",
        "_FusedLossBackward",
        "bce_rows",
        "dtype_dynamics_logit_stats::logit_stats",
    ],
    "other": ["aten::view", "some_kernel_of_the_future", "cudaLaunchKernel", ""],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names_are_classed(kind, name):
    assert kernel_class(name) == kind


def test_every_class_has_an_example():
    assert set(NAMES) == set(CLASSES)


def test_every_kernel_that_we_launch_is_known_as_ours():
    """By the source: each name before a launch grid, ``name[grid](``, that is a Triton function of this project."""
    jitted, launched = set(), set()
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
    launched &= jitted
    assert len(launched) >= 8 and launched <= set(OUR_KERNELS) <= jitted
    assert all(kernel_class(name) == "ours" for name in launched)


def test_every_op_that_we_register_is_known_as_ours():
    source = "\n".join(path.read_text() for path in Path(kernels.__file__).parent.rglob("*.py"))
    libraries = re.findall(r'torch\.library\.(?:Library|custom_op|triton_op)\("([^"]+)"', source)
    assert libraries and all(kernel_class(library) == "ours" for library in libraries)
