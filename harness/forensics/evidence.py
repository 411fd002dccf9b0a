"""Pieces of a forensics record, from an examination and the replay's module readings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from instrument.forensics_record import HistogramRecord, KernelRow, Link, Magnitude, OperandRecord, OutputRecord
from instrument.replay.diagnosis import Diagnosis
from instrument.replay.examine import Examination, kind_name
from instrument.replay.graph import Node
from instrument.watch.taps import TapReading
from kernels import exponent_histogram

MOST_LINKS, MOST_STEPS, KERNELS_AROUND = 64, 64, 8
LOWEST_EXPONENT = -40
OURS_PREFIX = "ddb.ours."
LIMITS = {"float16": 65504.0, "bfloat16": torch.finfo(torch.bfloat16).max, "float32": torch.finfo(torch.float32).max}


def chain_links(nodes: Sequence[Node], found: Examination) -> list[Link]:
    """The first links of a chain, or absorbed ops."""
    return [
        Link(
            phase=n.phase,
            module=n.module,
            op=n.op,
            tensor=found.names.get(n.storage, (None,))[0],
            kind=kind_name(n.kinds),
            dtype=n.dtype,
            shape=list(n.shape),
        )
        for n in nodes[:MOST_LINKS]
    ]


def operand_records(diagnosis: Diagnosis | None) -> list[OperandRecord]:
    """What the culprit read."""
    return (
        []
        if diagnosis is None
        else [
            OperandRecord(
                argument=o.argument, shape=list(o.shape), dtype=o.dtype, absmax=o.absmax, nonfinite=o.nonfinite, zeros=o.zeros
            )
            for o in diagnosis.operands
        ]
    )


def output_record(diagnosis: Diagnosis | None) -> OutputRecord | None:
    """What the culprit wrote."""
    return (
        None
        if diagnosis is None
        else OutputRecord(
            shape=list(diagnosis.output_shape),
            dtype=diagnosis.output_dtype,
            nonfinite=diagnosis.nonfinite,
            numel=diagnosis.numel,
            exact_absmax=diagnosis.exact_absmax,
            zero_denominators=diagnosis.zero_denominators,
        )
    )


def history_of(module: str | None, readings: Sequence[TapReading]) -> list[Magnitude]:
    """The magnitudes of one module over the replayed steps; of its nearest measured parent where it has none."""
    measured = {r.module for r in readings}
    name = module or ""
    while name and name not in measured:
        name = name.rpartition(".")[0]
    mine = [r for r in readings if r.module == name]
    steps = sorted({r.step for r in mine})[-MOST_STEPS:]
    at = {(r.step, r.direction): r.absmax for r in mine}
    return [Magnitude(step=s, module=name, absmax_fwd=at.get((s, "fwd")), absmax_bwd=at.get((s, "bwd"))) for s in steps]


def headroom_since(history: Sequence[Magnitude], dtype: str | None, phase: str) -> int | None:
    """The step since which the module's values have stayed within one bit of its dtype's largest number."""
    limit = LIMITS.get(dtype or "")
    since = None
    for row in reversed(history):
        value = row.absmax_bwd if phase == "backward" else row.absmax_fwd
        if not limit or not value or math.log2(limit / value) > 1:
            break
        since = row.step
    return since


def histograms(found: Examination) -> list[HistogramRecord]:
    """The exponents of every floating-point input of the culprit."""
    if found.captured is None:
        return []
    func, args, kwargs = found.captured
    named = zip((a.name for a in func._schema.arguments), args, strict=False)
    rows = []
    for name, value in (*named, *kwargs.items()):
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
                r = exponent_histogram(tensor.detach()).read()
                rows.append(
                    HistogramRecord(
                        tensor=name,
                        lowest=LOWEST_EXPONENT,
                        counts=list(r.bins),
                        zeros=r.zeros,
                        below=r.below_range,
                        above=r.above_range,
                        nonfinite=r.nonfinite,
                    )
                )
    return rows


def kernel_rows(found: Examination, events: list[dict] | None) -> list[KernelRow]:
    """The ops around the culprit, with the durations of the profiled replay."""
    culprit = found.culprit.node
    if culprit is None:
        return []
    ops = _ops(found.graph.nodes)
    here = next(i for i, op in enumerate(ops) if any(n.index == culprit.index for n in op))
    durations = _durations(ops, events or [])
    return [
        _row(ops[i], culprit, durations.get(i))
        for i in range(max(0, here - KERNELS_AROUND), min(len(ops), here + KERNELS_AROUND + 1))
    ]


def _ops(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes by the op that ran: an op over lists has many."""
    ops: list[list[Node]] = []
    for node in nodes:
        if ops and ops[-1][0].start_ns == node.start_ns and ops[-1][0].op == node.op:
            ops[-1].append(node)
        else:
            ops.append([node])
    return ops


def _durations(ops: Sequence[list[Node]], events: Sequence[dict]) -> dict[int, float]:
    """Seconds of the i-th op: the k-th call of its name in the profile, if it was called as often there. What
    ran inside another recorded op is no call of its own."""
    calls: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        calls.setdefault(op[0].op.replace(".", "::", 1), []).append(index)
    profiled: dict[str, list[dict]] = {}
    ends: dict[object, float] = {}  # of the recorded op, or of our own measuring, that is running, by thread
    for event in sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"]):
        ours = str(event["name"]).startswith(OURS_PREFIX)
        if (ours or (event.get("cat") == "cpu_op" and event["name"] in calls)) and event["ts"] >= ends.get(event["tid"], 0.0):
            ends[event["tid"]] = event["ts"] + event["dur"]
            if not ours:
                profiled.setdefault(event["name"], []).append(event)
    return {
        index: event["dur"] / 1e6
        for name, indices in calls.items()
        if len(profiled.get(name, ())) == len(indices)
        for index, event in zip(indices, profiled[name], strict=True)
    }


def _row(op: list[Node], culprit: Node, duration_s: float | None) -> KernelRow:
    here = next((n for n in op if n.index == culprit.index), None)
    node = here or op[0]
    return KernelRow(
        name=node.op,
        phase=node.phase,
        module=node.module,
        duration_s=duration_s,
        shapes=[list(node.shape)],
        dtype=node.dtype,
        nonfinite=any(n.kinds for n in op),
        here=here is not None,
    )
