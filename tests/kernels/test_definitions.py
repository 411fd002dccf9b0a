"""The definitions themselves, which a CPU's own faster routes stand in for: called directly, against float64."""

import math

import pytest
import torch

from kernels import ActivationRing, TensorStats
from kernels.activation_stats.reference import record_cells
from kernels.multi_tensor_stats.reference import UNDERFLOW_BELOW, reference_stats
from kernels.unscale import reference_scale_, reference_unscale_
from tests.kernels.truth import DTYPES, statistics

EDGES = [0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, 65505.0, -65536.0, 1.0, -3.0, 1e-40]
EDGES += [k * 2.0**e for e in (-24, -25, -14) for k in (1, -1, 1 - 2.0**-11, 1 + 2.0**-11)]
"""What each threshold divides, its two neighbours in fp32 among them."""


def lists():
    return [torch.tensor(EDGES, dtype=torch.float64).to(dtype)[start:] for dtype in DTYPES for start in (0, 5, len(EDGES))]


@pytest.mark.parametrize("below", [UNDERFLOW_BELOW, 1.0, 0.0])
def test_statistics_of_edges(below):
    tensors = lists()
    out = TensorStats.allocate(len(tensors), "cpu")
    reference_stats(tensors, out, below, max_norm=0.5)
    reading, rows = out.read(), [statistics(x, below) for x in tensors]
    names = ("nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "below", "numel")
    total = {name: sum(row[name] for row in rows) for name in names} | {"absmax": max(row["absmax"] for row in rows)}
    for got, want in zip((*reading.tensors, reading.total), (*rows, total), strict=True):
        assert {name: getattr(got, name) for name in (*names, "absmax")} == {n: want[n] for n in (*names, "absmax")}
    assert (reading.first_nonfinite_index, reading.found_inf) == (0, True) and math.isnan(reading.total.norm)


def test_norms_the_first_bad_tensor_and_the_clip_factor():
    tensors = [torch.tensor([3.0, 0.0]), torch.empty(0), torch.tensor([-4.0]), torch.tensor([2e38], dtype=torch.bfloat16)]
    out = TensorStats.allocate(3, "cpu")
    reference_stats(tensors[:3], out, max_norm=1.0)
    got = out.read()
    assert ([row.norm for row in got.tensors], got.total.sumsq, got.total.norm) == ([3.0, 0.0, 4.0], 25.0, 5.0)
    assert (got.first_nonfinite_index, got.found_inf, got.total.below) == (None, False, 0)
    assert got.clip_factor == pytest.approx(0.2, rel=1e-6) and got.total.absmax == 4.0
    reference_stats(tensors[1:], out, max_norm=None)
    assert (out.read().clip_factor, out.read().total.norm) == (1.0, tensors[3].double().item())
    reference_stats([tensors[0], torch.tensor([math.inf]), torch.tensor([math.nan])], out, counts=False)
    got = out.read()
    assert (got.first_nonfinite_index, got.tensors[0].nonfinite, got.total.nonfinite, got.total.numel) == (1, 0, 2, 4)
    assert {got.total.zeros, got.total.below, got.total.fp16_flush, got.total.fp16_subnormal} == {None}


def test_cells_add_up_over_micro_batches_and_begin_anew_with_a_step():
    ring = ActivationRing(2, 2)
    parts = [torch.tensor(EDGES).to(dtype) for dtype in DTYPES]
    for step in (1, 2):
        ring.tick()
        for part in parts[:step]:
            record_cells([part, part[5:]], ring.cells, ring.state, [0, 1], "all")
    record_cells([parts[2]], ring.cells, ring.state, [1], "range")
    cells = {(cell.step, cell.slot): cell for cell in ring.read()}
    wholes = {(1, 0): parts[0], (1, 1): parts[0][5:], (2, 0): torch.cat([p.double() for p in parts[:2]])}
    for key, whole in wholes.items():
        want = statistics(whole)
        for name in ("absmax", "nan", "inf", "zeros", "fp16_flush", "fp16_subnormal", "over_fp16", "numel"):
            assert getattr(cells[key], name) == want[name], (key, name)
    assert cells[1, 1].rms == pytest.approx(parts[0][5:].double().square().mean().sqrt().item())
    assert cells[2, 1].numel == 2 * len(EDGES[5:]) + len(EDGES) and cells[2, 1].nan == 1
    assert {cells[2, 1].rms, cells[2, 1].zeros, cells[2, 1].over_fp16} == {None}
    never = ActivationRing(1, 1, every=0)
    never.tick()
    record_cells([parts[0]], never.cells, never.state, [0], "all")
    assert never.read() == []


@pytest.mark.parametrize("clip", [False, True])
def test_unscaling_counts_underflow_before_it_and_measures_after_it(clip):
    grads = [torch.tensor([3.0, 2.0**-24, 2.0**-25, 0.0]), torch.tensor([-4.0], dtype=torch.bfloat16)]
    out = TensorStats.allocate(2, "cpu")
    reference_unscale_(grads, out, torch.tensor(0.5), UNDERFLOW_BELOW, 0.25, clip)
    got = out.read()
    assert (got.total.below, got.total.zeros, got.total.fp16_flush, got.total.norm) == (1, 1, 2, 2.5)
    factor = 0.25 / (2.5 + 1e-6) if clip else 1.0
    assert torch.cat([g.float() for g in grads]).tolist() == pytest.approx(
        [1.5 * factor, 2.0**-25 * factor, 2.0**-26 * factor, 0.0, -2.0 * factor], rel=2.0**-8
    )
    assert not got.found_inf and got.clip_factor == pytest.approx(0.1, rel=1e-6)
    grads[0][0] = math.inf
    reference_unscale_(grads, out, torch.tensor(0.0), UNDERFLOW_BELOW, 1.0, clip)
    assert out.read().found_inf


def test_scaling_rounds_the_product_once():
    x = torch.tensor([2.0**-14, 1 + 2.0**-7], dtype=torch.bfloat16)
    factor = torch.tensor(1 / 3)
    want = (x.double() * factor.double()).float().bfloat16()
    reference_scale_([x], factor)
    assert torch.equal(x, want)
