"""multi_tensor_stats against a truth made independently: float64, and real conversions to fp16."""

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import TensorStats, multi_tensor_stats, tensor_list
from kernels.multi_tensor_stats.cpu import CHUNK, SMALL
from tests.kernels.truth import DEVICE, DTYPES, IMPLS, close, statistics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy under Triton's interpreter
SPECIAL = [
    *(0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, -65504.0, 65520.0, 1.0, -1.0),
    *(2.0**-24, 2.0**-25, -(2.0**-25), 2.0**-25 * 1.01, 2.0**-26, 2.0**-14, 2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-24),
    *(1e-40, 1e-45, 3.4e38, 1e-30, 6.1e-5, 5.9e-8),
]


def assert_matches(stats: TensorStats, tensors: list[torch.Tensor], below: float = 2.0**-24) -> None:
    """Counts and maxima exactly; sums to 2 ulp of fp32, better than an eager fp32 norm. Names the worst tensor."""
    reading, rows = stats.read(), [statistics(x, below) for x in tensors]
    total = {k: sum(r[k] for r in rows) for k in ("sumsq", "nan", "inf", "zeros", "numel")}
    total |= {k: sum(r[k] for r in rows) for k in ("fp16_flush", "fp16_subnormal", "below")}
    total["absmax"] = max((r["absmax"] for r in rows), default=0.0)
    for index, (got, want) in enumerate(zip((*reading.tensors, reading.total), (*rows, total), strict=True)):
        for name, value in want.items():
            if name not in ("sumsq", "over_fp16"):
                assert getattr(got, name) == value, f"tensor {index} of {len(rows)}: {name}"
        assert close(got.sumsq, want["sumsq"]), f"tensor {index}: sumsq {got.sumsq!r}, float64 {want['sumsq']!r}"
        assert close(got.norm, math.sqrt(want["sumsq"])), f"tensor {index}: norm {got.norm!r}"
    bad = [i for i, r in enumerate(rows) if r["nan"] + r["inf"]]
    assert reading.first_nonfinite_index == (bad[0] if bad else None)
    assert reading.found_inf == bool(bad)
    assert reading.clip_factor == 1.0


def draw(shape, dtype, device, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 2, 255, 257, 1009, 4095, 4096, 4097, 16384, 16411])
def test_every_size(device, impl, dtype, numel):
    x = [draw(numel, dtype, device, 1e-5)]
    assert_matches(multi_tensor_stats(x, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[v for v in SPECIAL if math.isfinite(v)], [math.nan], [math.inf], [-math.inf]])
@pytest.mark.parametrize("at", [0, 4096 - len(SPECIAL), 4096, 4160 - len(SPECIAL)])
def test_special_values_in_every_position_class(device, impl, dtype, values, at):
    """First of a block, last of a block, first of the tail, last of the tail."""
    x = draw(4160, dtype, device, 0.5)
    x[at : at + len(values)] = torch.tensor(values, device=device).to(dtype)
    assert_matches(multi_tensor_stats([x], impl=impl), [x])


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_list(device, impl):
    tensors = [
        draw((33, 17), torch.float32, device),
        draw(0, torch.bfloat16, device),
        draw((), torch.float32, device),
        draw((64, 96), torch.bfloat16, device, 1e-6).T,
        draw((50, 50), torch.float16, device)[:, ::3],
        draw((64, 6), torch.float32, device)[:, ::2],  # reshape(-1) is a view with gaps
        draw((3, 5000), torch.float32, device)[1],
        draw(7, torch.float32, device).expand(4, 7),
        draw(9000, torch.bfloat16, device)[1:],
        draw((4, 5, 6, 7), torch.float16, device).permute(2, 0, 3, 1),
        draw(4242, torch.float32, device)[3:],
    ]
    tensors[4][0, 0] = math.nan
    tensors[6][17] = -math.inf
    stats = multi_tensor_stats(tensors, impl=impl)
    assert_matches(stats, tensors)
    assert stats.first_nonfinite_index.item() == 4
    assert stats.read().total.zeros == stats.total_zeros.item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e19), (torch.float32, 3e38), (torch.bfloat16, 1e38)])
def test_norm_is_finite_where_fp32_would_overflow(device, impl, dtype, scale):
    x = [torch.full((5000,), scale, dtype=dtype, device=device)]
    stats = multi_tensor_stats(x, impl=impl)
    assert_matches(stats, x)
    assert math.isfinite(stats.read().total.norm)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-19, 1e-25, 1e-38, 1e-44])
def test_small_squares_are_not_lost(device, impl, scale):
    x = [torch.full((9000,), scale, device=device)]
    stats = multi_tensor_stats(x, impl=impl)
    assert_matches(stats, x)
    assert stats.read().total.norm > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_fp16_norm_does_not_overflow(device, impl):
    """clip_grad_norm_ on fp16 gradients returned inf for a true norm of 94,869."""
    x = [torch.full((9000,), 1000.0, dtype=torch.float16, device=device)]
    assert multi_tensor_stats(x, impl=impl).read().total.norm == pytest.approx(math.sqrt(9000) * 1000)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_nothing_finite(device, impl, fill):
    x = [torch.full((5000,), fill, device=device), torch.ones(3, device=device)]
    stats = multi_tensor_stats(x, impl=impl)
    assert_matches(stats, x)
    assert stats.read().tensors[0].absmax == 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("below", [0.0, 2.0**-30, 1e-7, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold(device, impl, below, dtype):
    x = [draw(5000, dtype, device, 1e-3), torch.tensor([1e-7, 0.1, 2.0**-30, 0.0], device=device).to(dtype)]
    assert_matches(multi_tensor_stats(x, underflow_below=below, impl=impl), x, below)
    at = torch.tensor(below, device=device)
    assert_matches(multi_tensor_stats(x, underflow_below=at, impl=impl), x, at.item())


@pytest.mark.parametrize("impl", IMPLS)
def test_without_counts(device, impl):
    x = [draw(5000, torch.float32, device), draw(300, torch.bfloat16, device)]
    x[1][7] = math.nan
    got, want = multi_tensor_stats(x, counts="none", impl=impl).read(), multi_tensor_stats(x, impl=impl).read()
    assert (got.total.absmax, got.total.nan, got.total.inf) == (want.total.absmax, 1, 0)
    assert got.tensors[0].norm == pytest.approx(want.tensors[0].norm, rel=1e-7)
    assert got.first_nonfinite_index == 1
    assert got.total.zeros is got.total.below is got.total.fp16_flush is None


@pytest.mark.parametrize("small", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_underflow_counts_are_those_of_a_full_pass(device, dtype, small):
    x = [draw(20_000, dtype, device) + 4, draw(300, dtype, device), draw(7, dtype, device)]
    x[0][11] = small
    x[1][:5] = small
    got, want = multi_tensor_stats(x, counts="underflow").read(), multi_tensor_stats(x).read()
    for mine, full in zip((*got.tensors, got.total), (*want.tensors, want.total), strict=True):
        assert (mine.zeros, mine.below) == (full.zeros, full.below)
        assert (mine.sumsq, mine.absmax, mine.nan, mine.inf) == (full.sumsq, full.absmax, full.nan, full.inf)


def test_unknown_counts_are_refused():
    with pytest.raises(ValueError, match="counts must be one of"):
        multi_tensor_stats([torch.ones(3)], counts="some")


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_list(device, impl):
    out = TensorStats.allocate(0, device)
    reading = multi_tensor_stats([], out=out, impl=impl).read()
    assert reading.tensors == () and reading.first_nonfinite_index is None and reading.clip_factor == 1.0
    assert reading.total.numel == 0 and reading.total.norm == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_out_is_overwritten_and_bits_repeat(device, impl):
    x = [draw(9000, torch.float32, device), draw(700, torch.bfloat16, device), draw(20001, torch.float32, device)]
    out = TensorStats.allocate(3, device)
    first = multi_tensor_stats(x, out=out, impl=impl).table.clone()
    out.table.fill_(-7)
    assert multi_tensor_stats(x, out=out, impl=impl) is out
    assert torch.equal(out.table, first)


def test_views_agree_with_the_reading(device):
    x = [draw(100, torch.float32, device), draw(50, torch.float16, device)]
    stats = multi_tensor_stats(x)
    reading = stats.read()
    assert stats.norm.tolist() == [r.norm for r in reading.tensors]
    assert stats.total_zeros.item() == reading.total.zeros and stats.numel.tolist() == [100, 50]
    assert stats.total_absmax.device == stats.table.device and len(stats) == 2
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stats.nonsense  # noqa: B018


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.integers(0, 3),
            st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=0, max_size=40),
        ),
        max_size=5,
    )
)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_values(impl, lists):
    tensors = [torch.tensor(v, dtype=torch.float64).to(d).to(DEVICE)[offset:] for d, offset, v in lists]
    stats = multi_tensor_stats(tensors, out=TensorStats.allocate(len(tensors), DEVICE), impl=impl)
    assert_matches(stats, tensors)


@pytest.mark.soak
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 * 10**5), st.sampled_from(DTYPES), st.integers(0, 9), st.floats(-40, 37))
@pytest.mark.parametrize("impl", IMPLS)
def test_any_size_and_scale(impl, numel, dtype, offset, log_scale):
    x = [draw(numel, dtype, DEVICE, 10.0**log_scale)[offset:]]
    assert_matches(multi_tensor_stats(x, impl=impl), x)


def test_tables_are_reused_and_follow_the_tensors(device, monkeypatch):
    monkeypatch.setattr(tensor_list, "_tables", OrderedDict())
    monkeypatch.setattr(tensor_list, "_layouts", OrderedDict())
    x = [draw(5000, torch.float32, device), draw(300, torch.bfloat16, device)]
    multi_tensor_stats(x, impl="triton")
    before = tensor_list.launches
    assert tensor_list.last_tables.reused == "nothing" and tensor_list.last_tables.present == (True, True, False)
    multi_tensor_stats(x, impl="triton")
    assert tensor_list.last_tables.reused == "all" and tensor_list.launches == before + 1
    x[0].mul_(3)  # same place, other values
    assert_matches(multi_tensor_stats(x, impl="triton"), x)
    y = [x[0].clone(), x[1]]  # elsewhere
    assert_matches(multi_tensor_stats(y, impl="triton"), y)
    assert tensor_list.last_tables.reused == "tiles"
    z = [y[0][:4999], y[1]]  # same place, other size
    assert_matches(multi_tensor_stats(z, impl="triton"), z)
    assert tensor_list.last_tables.reused == "nothing"
    w = [y[0].view(torch.bfloat16), y[1]]  # same place, other dtype
    assert_matches(multi_tensor_stats(w, impl="triton"), w)


def test_tiles_start_on_16_bytes(device):
    """Every tile long enough for the vectorised path is aligned, and the tiles cover the tensors."""
    x = [draw(50000, torch.float32, device)[1:], draw(40000, torch.bfloat16, device)[3:], draw(3, torch.float16, device)[1:]]
    multi_tensor_stats(x, impl="triton")
    tables, seen = tensor_list.last_tables, [0, 0, 0]
    for head, start in tables.tiles.tolist():
        row, length = head & 0xFFFFFFFF, head >> 32
        assert start == seen[row]
        seen[row] += length
        address = x[row].data_ptr() + start * x[row].element_size()
        assert address % 16 == 0 or length < 8
        assert length <= tensor_list.TILE
    assert seen == [t.numel() for t in x]


def test_small_tensors_are_packed_and_large_ones_cut():
    """The CPU path's own boundaries: packed batches that overflow one chunk, and tensors of several chunks."""
    sizes = [(SMALL - 1), (SMALL - 1) + 1, 1, 0, 3 * CHUNK + 5] + [(SMALL - 1)] * (CHUNK // (SMALL - 1) + 2)
    x = [draw(n, torch.float32, "cpu", 1e-6) for n in sizes] + [draw(n, torch.bfloat16, "cpu") for n in sizes[:4]]
    x[2].fill_(math.inf)
    x[-3][5] = math.nan
    assert_matches(multi_tensor_stats(x), x)


def test_parameters_and_modes(device):
    """Leaf parameters, no_grad, inference_mode, autocast, and FLOP counting, which must add nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    p = [torch.nn.Parameter(draw((9, 9), torch.float32, device))]
    want = multi_tensor_stats(p).read()
    with torch.no_grad():
        assert multi_tensor_stats(p).read() == want
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert multi_tensor_stats(p).read() == want
    with torch.inference_mode():
        assert multi_tensor_stats(p).read() == want
    with FlopCounterMode(display=False) as counter:
        assert multi_tensor_stats(p).read() == want
    assert counter.get_total_flops() == 0


def test_compiles_as_one_opaque_op(device, monkeypatch):
    monkeypatch.undo()  # the poisoned torch.empty cannot be traced
    out = TensorStats.allocate(1, device)

    def f(x):
        y = x * 2
        multi_tensor_stats([y], out=out)
        return y

    y = torch.compile(f, backend="aot_eager", fullgraph=True)(draw((40, 40), torch.float32, device))
    assert out.read() == multi_tensor_stats([y]).read()


@pytest.mark.parametrize(
    "tensors, kwargs, error, message",
    [
        ([torch.ones(2, dtype=torch.int64)], {}, TypeError, r"tensors\[0\] must be float32, bfloat16 or float16, got int64"),
        ([torch.ones(2), 3.0], {}, TypeError, r"tensors\[1\] must be a tensor, got float"),
        ([torch.ones(2).to_sparse()], {}, TypeError, r"tensors\[0\] must be dense"),
        ([torch.ones(2), torch.ones(2, device="meta")], {}, ValueError, r"tensors\[1\] is on meta"),
        ([torch.ones(2)], {"out": TensorStats.allocate(2, "cpu")}, ValueError, "out holds 2 tensors, the list 1"),
        ([torch.ones(2)], {"impl": "cuda"}, ValueError, "impl must be one of"),
        ([torch.ones(2)], {"underflow_below": "tiny"}, TypeError, "underflow_below must be a number"),
    ],
)
def test_misuse_is_refused(tensors, kwargs, error, message):
    with pytest.raises(error, match=message):
        multi_tensor_stats(tensors, **kwargs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_and_no_sync():
    x = [draw(100_000, torch.float32, "cuda"), draw(300, torch.bfloat16, "cuda")]
    out = TensorStats.allocate(2, "cuda")
    multi_tensor_stats(x, out=out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        multi_tensor_stats(x, out=out)
        multi_tensor_stats([v.clone() for v in x], out=out)  # uploads a table: still no sync
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        multi_tensor_stats(x, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            multi_tensor_stats(x, out=out)
    x[0].mul_(2)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert_matches(out, x)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        multi_tensor_stats([x[0][:7]], out=TensorStats.allocate(1, "cuda"))
