"""Faults with a known producer: each is named with its op, phase, module and cause, and what is healthy is left alone.

A row that is run in several dtypes is run in one of them, in turn, by `make test`, and in all of them by `make soak`.
"""

import pytest
import torch

from instrument.replay.replays import examine
from instrument.replay.snapshot import Snapshot
from kernels.dispatch import interpreted
from tests.instrument.pathologies import arithmetic, constants, order
from tests.instrument.pathologies.planted import survives

ROWS: dict[str, list] = {}
for pathology in (*arithmetic.PATHOLOGIES, *constants.PATHOLOGIES, *order.PATHOLOGIES):
    ROWS.setdefault(pathology.name.removesuffix(f" ({str(pathology.dtype).removeprefix('torch.')})"), []).append(pathology)
if interpreted():  # on a GPU Triton compiles, and its kernels take no tensors of a CPU
    from tests.instrument.pathologies import writes

    ROWS |= {pathology.name: [pathology] for pathology in writes.PATHOLOGIES}
PATHOLOGIES = [
    pytest.param(pathology, id=pathology.name, marks=() if place == row % len(dtypes) else pytest.mark.soak)
    for row, dtypes in enumerate(ROWS.values())
    for place, pathology in enumerate(dtypes)
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.mark.parametrize("pathology", PATHOLOGIES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_producer_is_named(pathology):
    torch.manual_seed(0)
    net, optimizer, step = pathology.made()
    found = examine(1, step, Snapshot(0, net, optimizer), net, optimizer)
    assert (None if found is None else (found.op, found.phase, found.module, found.cause)) == pathology.expected
    assert pathology.microbatch is None or found.culprit.node.microbatch == pathology.microbatch


@pytest.mark.parametrize("pathology", [p for p in PATHOLOGIES if p.values[0].in_float64 is not None])
def test_float64_agrees_with_the_cause(pathology):
    assert survives(pathology, torch.float64) == pathology.in_float64
    assert survives(pathology, pathology.dtype) == (pathology.op is None)


def test_there_are_enough_of_them():
    assert len(ROWS) >= 150 and {p.values[0].cause for p in PATHOLOGIES} >= {
        "overflow",
        "underflow_then_divide",
        "invalid",
        "from_input",
        None,
    }


def test_memory_that_is_read_before_it_is_written_is_named_by_its_allocation():
    class Net(torch.nn.Module):
        def forward(self, weight):
            return weight * torch.empty(4)

    net = torch.nn.ModuleDict({"inner": Net()})
    net.weight = torch.nn.Parameter(torch.ones(4))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = examine(
            1, lambda step, recorder: recorder.loss(net["inner"](net.weight).sum()), Snapshot(0, net, None), net, None
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert (found.op, found.module) == ("aten.empty", "inner")
