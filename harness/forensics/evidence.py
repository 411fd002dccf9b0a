"""The parts of a forensics record, from an examination and the replay's module readings; and the culprit op's operands.

``runs/<run_id>/culprit.safetensors`` holds what the culprit op read, so that the op alone can be run again: tensors by argument
name (of a list: ``name.position``); all else (scalars, dtypes, devices, which arguments are written to, what came out) as one
JSON object in the file's metadata. An op that cannot be kept leaves a file without tensors that says why in ``left_out``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.utils._pytree import tree_leaves

from instrument.replay.graph import Node
from instrument.replay.replays import Examination, kind_name
from instrument.results.files import replace
from instrument.results.measurements import HistogramRecord, KernelRow, Link, Magnitude, TapReading
from kernels import exponent_histogram
from kernels.float_formats import float_format

MOST_LINKS, MOST_STEPS, KERNELS_AROUND = 64, 64, 8
LOWEST_EXPONENT = -40
OURS_PREFIX = "ddb.ours."


def chain_links(nodes: Sequence[Node], found: Examination) -> list[Link]:
    """The first links of a chain, or absorbed ops."""

    def link(n: Node) -> Link:
        place = {"phase": n.phase, "module": n.module, "op": n.op, "tensor": found.names.get(n.storage, (None,))[0]}
        return Link(kind=kind_name(n.kinds), dtype=n.dtype, shape=list(n.shape), **place)

    return [link(n) for n in nodes[:MOST_LINKS]]


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
    limits = float_format(dtype)
    since = None
    for row in reversed(history):
        value = row.absmax_bwd if phase == "backward" else row.absmax_fwd
        bits = limits.headroom_bits(value) if limits and value else None
        if bits is None or bits > 1:
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
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
                r = exponent_histogram(tensor)
                outside = {"zeros": r.zeros, "below": r.below_range, "above": r.above_range}
                outside["nonfinite"] = r.nan + r.pos_inf + r.neg_inf
                rows.append(HistogramRecord(tensor=name, lowest=LOWEST_EXPONENT, counts=list(r.bins), **outside))
    return rows


def kernel_rows(found: Examination, events: list[dict] | None) -> list[KernelRow]:
    """The ops around the culprit, with the durations of the profiled replay."""
    culprit = found.culprit.node
    if culprit is None:
        return []
    # an op over lists has many nodes
    ops = [list(nodes) for _, nodes in groupby(found.graph.nodes, key=lambda node: (node.start_ns, node.op))]
    here = next(i for i, op in enumerate(ops) if any(n.index == culprit.index for n in op))
    durations = _durations(ops, events or [])
    around = range(max(0, here - KERNELS_AROUND), min(len(ops), here + KERNELS_AROUND + 1))
    return [_row(ops[i], culprit, durations.get(i)) for i in around]


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
    what = {"name": node.op, "phase": node.phase, "module": node.module, "shapes": [list(node.shape)], "dtype": node.dtype}
    return KernelRow(duration_s=duration_s, nonfinite=any(n.kinds for n in op), here=here is not None, **what)


SCHEMA = 1
METADATA_KEY = "culprit"
MOST_BYTES = 256 * 2**20
NAMED = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format"}
"""Arguments that are written down by their torch name: type -> what it is."""


class CannotKeep(ValueError):
    """An argument that is neither a tensor nor a value that JSON can name."""


def save_operands(path: Path, found: Examination, *, most_bytes: int = MOST_BYTES) -> None:
    """Write the culprit's arguments, or why they are not kept."""
    if found.captured is None or found.diagnosis is None:
        left_out, tensors, facts = "the value was there before the step began: there is no op of it to run again", {}, {}
    else:
        left_out, tensors, facts = _operands(found, most_bytes)
    metadata = {METADATA_KEY: json.dumps({"schema": SCHEMA, "left_out": left_out, **facts}, allow_nan=False)}
    replace(path, save(tensors, metadata))


def _operands(found: Examination, most_bytes: int) -> tuple[str | None, dict[str, torch.Tensor], dict[str, Any]]:
    """(why not, tensors, facts) of an op that was captured."""
    func, args, kwargs = found.captured
    tensors: dict[str, torch.Tensor] = {}
    names = [argument.name for argument in func._schema.arguments]
    facts: dict[str, Any] = {"op": func._schema.name, "overload": func._overloadname}
    n_bytes = sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    if n_bytes > most_bytes:
        return f"its operands are {n_bytes:,} bytes, and at most {most_bytes:,} are kept", {}, facts
    try:
        facts["args"] = [_written(value, name, tensors) for name, value in zip(names, args, strict=False)]
        facts["kwargs"] = {name: _written(value, name, tensors) for name, value in kwargs.items()}
    except CannotKeep as error:
        return str(error), {}, facts
    output = found.diagnosis.output
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    failed = {"shape": output.shape, "dtype": output.dtype, "numel": output.numel, "counts": found.diagnosis.counts}
    facts |= {
        "device": next((t.device.type for t in tensors.values()), "cpu"),
        "strides": {name: list(t.stride()) for name, t in tensors.items() if not t.is_contiguous()},
        "overwritten": [i if i < len(args) else name for i, name in written if i < len(args) or name in kwargs],
        "failed": failed,
    }
    return None, {name: t.contiguous().cpu() for name, t in tensors.items()}, facts


def _written(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; tensors go into ``tensors`` and leave their name."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise CannotKeep(f"its argument {name} is a {value.layout} tensor of {value.dtype}, which is not kept")
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return [_written(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = next((name for type_, name in NAMED.items() if isinstance(value, type_)), None)
    if kind is None:
        raise CannotKeep(f"its argument {name} is a {type(value).__name__}, which cannot be written down")
    return {kind: str(value).removeprefix("torch.")}
