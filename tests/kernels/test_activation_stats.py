"""activation_stats: the cells against float64, the ring and its flag on the device."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ActivationReading, ActivationRing, activation_stats
from tests.kernels.truth import DEVICE, DTYPES, IMPLS, statistics

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, -65504.0, 65505.0, 65536.0, 1e30, 2.0**-25, 2.0**-24, 1e-40]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy under Triton's interpreter


def assert_cell(cell: ActivationReading, *tensors: torch.Tensor) -> None:
    x = torch.cat([t.detach().cpu().reshape(-1).double() for t in tensors])
    for name, value in statistics(x).items():
        if name not in ("sumsq", "below"):
            assert getattr(cell, name) == value, name
    rms = x.square().mean().sqrt().item() if len(x) else 0.0
    assert cell.rms == pytest.approx(rms, rel=1e-6, nan_ok=True)


def assert_range(cell: ActivationReading, *tensors: torch.Tensor) -> None:
    want = statistics(torch.cat([t.detach().cpu().reshape(-1).double() for t in tensors]))
    assert all(getattr(cell, name) == want[name] for name in ("absmax", "numel", "nan", "inf"))
    assert {cell.rms, cell.zeros, cell.fp16_flush, cell.fp16_subnormal, cell.over_fp16} == {None}


def one(x: torch.Tensor, impl: str, counts: str = "all") -> ActivationReading:
    ring = ActivationRing(1, 1, x.device)
    ring.tick()
    activation_stats([x], ring.at(0), counts=counts, impl=impl)
    (cell,) = ring.read()
    return cell


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 1009, 4096, 4099, 9001])
def test_every_size_with_special_values(device, impl, dtype, numel):
    x = (torch.randn(numel) * 1e-3).to(dtype).to(device)
    special = torch.tensor(SPECIAL[: numel // 2], dtype=torch.float64).to(dtype).to(device)
    assert_cell(one(x, impl), x)
    x[: len(special)] = special
    assert_cell(one(x, impl), x)
    x[len(x) - len(special) :] = special
    assert_cell(one(x, impl), x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 1009, 9001])
def test_range_of_every_size_with_special_values(device, impl, dtype, numel):
    x = (torch.randn(numel) * 1e-3).to(dtype).to(device)
    for values in (x, -x.abs(), x.abs(), torch.full_like(x, -0.0), torch.full_like(x, math.nan)):
        assert_range(one(values, impl, "range"), values)
    for value in SPECIAL if numel < 5_000 else SPECIAL[::4]:
        if numel:
            x[numel // 2] = value
            assert_range(one(x, impl, "range"), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_range_among_the_writes_of_a_cell_leaves_its_counts_out(device, impl):
    ring = ActivationRing(2, 4, device)
    x, y = torch.randn(4100, device=device), torch.randn(33, device=device).bfloat16() * 9
    x[7] = math.nan
    for step, order in enumerate((("all", "range"), ("range", "all"), ("range", "range"), ("all", "all")), start=1):
        ring.tick()
        for counts, tensor in zip(order, (x, y), strict=True):
            activation_stats([tensor, tensor], ring.at([0, 1]), counts=counts, impl=impl)
        for cell in [c for c in ring.read() if c.step == step]:
            (assert_cell if order == ("all", "all") else assert_range)(cell, x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_range_of_strided_tensors(device, impl):
    wide = torch.randn(64, 60, device=device)
    wide[:, 1] = math.inf
    for x in (wide[:, ::2], wide.t(), wide[3:, 2:].half(), wide[5], wide[0, 0]):
        assert_range(one(x, impl, "range"), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_mixed_outputs_in_few_launches(device, impl):
    tensors = [
        torch.randn(3, 5, 7, device=device, requires_grad=True),
        torch.randn(64, 6, device=device)[:, ::2].bfloat16(),
        torch.randn(64, 6, device=device)[:, ::2],
        torch.randn(40, 50, device=device).half().T,
        torch.randn(5001, device=device)[1:],
        torch.full((300,), 1e5, device=device),
        *[torch.randn(n, device=device) for n in (2, 3, 5, 7, 11)],
    ]
    ring = ActivationRing(20, 2, device)
    ring.tick()
    slots = [3, 0, 19, 7, 8, 9, 10, 1, 2, 4, 5]
    activation_stats(tensors, ring.at(slots), impl=impl)
    cells = {c.slot: c for c in ring.read()}
    assert sorted(cells) == sorted(slots) and {c.step for c in cells.values()} == {1}
    for slot, x in zip(slots, tensors, strict=True):
        assert_cell(cells[slot], x)


@pytest.mark.parametrize("impl", IMPLS)
def test_ring_schedule_and_accumulation(device, impl):
    ring = ActivationRing(2, 3, device, every=2)
    x = torch.randn(4100, device=device)
    activation_stats([x], ring.at(0), impl=impl)
    assert ring.read() == []  # nothing before the first tick
    for step in range(1, 10):
        ring.tick()
        activation_stats([x * step], ring.at(0), impl=impl)
        if step == 9:  # more micro-batches add to the cell, the largest of them not the last
            activation_stats([x * 100], ring.at(0), impl=impl)
            activation_stats([x * 50], ring.at(0), impl=impl)
    cells = ring.read()
    assert [c.step for c in cells] == [5, 7, 9]  # odd steps are measured; the ring keeps three
    assert_cell(cells[0], x * 5)
    assert_cell(cells[2], x * 9, x * 100, x * 50)
    never = ActivationRing(1, 1, device, every=0)
    never.tick()
    activation_stats([x], never.at(0), impl=impl)
    assert never.read() == []


@pytest.mark.parametrize("impl", IMPLS)
def test_bits_repeat(device, impl):
    x = torch.randn(100_003, device=device)
    assert one(x, impl) == one(x, impl)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), max_size=50), st.sampled_from(DTYPES))
@pytest.mark.parametrize("impl", IMPLS)
def test_any_values(impl, values, dtype):
    x = torch.tensor(values, dtype=torch.float64).to(dtype).to(DEVICE)
    assert_cell(one(x, impl), x)


def test_triton_launches(device):
    from kernels.activation_stats.triton_kernel import launch_activation

    ring = ActivationRing(9, 1, device)
    ring.tick()
    x = [torch.randn(5, device=device) for _ in range(9)]
    activation_stats(x[:1], ring.at(0), impl="triton")
    floats, ints = ring.scratch
    assert launch_activation(x, ring.cells, ring.state, floats, ints, list(range(9))) == 2
    assert len(ring.read()) == 9


def test_hooks_autocast_and_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to(device)
    ring = ActivationRing(3, 4, device)
    for slot, module in enumerate(model):
        module.register_forward_hook(lambda m, i, y, slot=slot: activation_stats([y], ring.at(slot)))
    x = torch.randn(2, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        ring.tick()
        model(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (8 * 16 * 2 + 16 * 4 * 3)  # the matmuls and nothing else
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.inference_mode():
        ring.tick()
        model(x)
    assert [(c.step, c.slot) for c in ring.read()] == [(s, k) for s in (1, 2) for k in range(3)]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda ring: activation_stats([torch.ones(2, dtype=torch.int32)], ring.at(0)), TypeError, "got int32"),
        (lambda ring: activation_stats([torch.ones(2)], ring.at([0, 1])), ValueError, "1 tensors for 2 slots"),
        (lambda ring: activation_stats([torch.ones(2, device="meta")], ring.at(0)), ValueError, "is on meta"),
        (lambda ring: activation_stats([torch.ones(2)], ring.at(0), counts="none"), ValueError, "all, range, got 'none'"),
        (lambda ring: ring.at(2), IndexError, "slot 2 of 2"),
        (lambda ring: ring.at([1, 1]), ValueError, "a slot twice"),
        (lambda ring: ActivationRing(0), ValueError, "must be positive"),
    ],
)
def test_misuse_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(ActivationRing(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_decides_on_the_device():
    ring = ActivationRing(1, 8, "cuda", every=3)
    x = torch.randn(50_000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ring.tick()
        activation_stats([x], ring.at(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_cell(ring.read()[0], x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        ring.tick()
        activation_stats([x], ring.at(0))
    for _ in range(6):  # steps 2 to 7
        graph.replay()
    torch.cuda.synchronize()
    cells = ring.read()
    assert [c.step for c in cells] == [1, 4, 7]
    assert_cell(cells[-1], x)


@pytest.mark.parametrize("counts", ["all", "range"])
def test_one_graph_under_compile(device, counts):
    torch._dynamo.reset()
    ring = ActivationRing(1, 4, device)

    def forward(x):
        y = x * 3
        activation_stats([y.detach()], ring.at(0), counts=counts)
        return y.sum()

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    x = torch.randn(40, device=device)
    for step in (1, 2):
        ring.tick()
        compiled((x * step).requires_grad_()).backward()
        (assert_cell if counts == "all" else assert_range)(ring.read()[-1], x * step * 3)
