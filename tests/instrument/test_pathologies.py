"""Faults with a known producer: each is named with its op, phase, module and cause, and what is healthy is left alone."""

import pytest
import torch

from instrument.replay.replays import examine
from instrument.replay.snapshot import Snapshot
from tests.instrument.pathologies import arithmetic
from tests.instrument.pathologies.planted import survives

PATHOLOGIES = [*arithmetic.PATHOLOGIES]


def named(pathology):
    torch.manual_seed(0)
    net, optimizer, step = pathology.made()
    found = examine(1, step, Snapshot(0, net, optimizer), net, optimizer)
    return None if found is None else (found.op, found.phase, found.module, found.cause)


@pytest.mark.parametrize("pathology", PATHOLOGIES, ids=lambda p: p.name)
def test_the_producer_is_named(pathology):
    assert named(pathology) == pathology.expected


@pytest.mark.parametrize("pathology", [p for p in PATHOLOGIES if p.in_float64 is not None], ids=lambda p: p.name)
def test_float64_agrees_with_the_cause(pathology):
    assert survives(pathology, torch.float64) == pathology.in_float64 and not survives(pathology, pathology.dtype)
