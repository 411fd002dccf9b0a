"""``runs/<run_id>/culprit.safetensors``: what the culprit op read, so that the op alone can be run again.

Tensors by argument name (of a list: ``name.position``); all else (scalars, dtypes, devices, which
arguments are written to, what came out) as one JSON object in the file's metadata. An op that
cannot be kept leaves a file without tensors that says why in ``left_out``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.utils._pytree import tree_leaves, tree_map

from instrument.files import replace
from instrument.replay.diagnosis import DENOMINATOR
from instrument.replay.examine import Examination
from instrument.replay.recorder import mutated

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
    diagnosis = found.diagnosis
    facts |= {
        "device": next((t.device.type for t in tensors.values()), "cpu"),
        "strides": {name: list(t.stride()) for name, t in tensors.items() if not t.is_contiguous()},
        "overwritten": [
            place if place < len(args) else argument.name
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None
            and argument.alias_info.is_write
            and (place < len(args) or argument.name in kwargs)
        ],
        "divisor": DENOMINATOR.get(func._schema.name.partition("::")[2]),
        "failed": {
            "shape": list(diagnosis.output_shape),
            "dtype": diagnosis.output_dtype,
            "numel": diagnosis.numel,
            "counts": _counts(func, args, kwargs, diagnosis.output_shape),
        },
    }
    return None, {name: t.contiguous().cpu() for name, t in tensors.items()}, facts


@torch.no_grad()
def _counts(func: Any, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> dict[str, int]:
    """How many NaN, +Inf and -Inf the op writes into the tensor of ``shape`` that fails."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    returned = func(*args, **kwargs)
    written = [
        t
        for t in (*mutated(func, args, kwargs), *tree_leaves(returned))
        if isinstance(t, torch.Tensor) and t.is_floating_point() and tuple(t.shape) == shape
    ]
    out = next((t for t in written if not bool(t.isfinite().all())), written[0])
    return {"nan": int(out.isnan().sum()), "inf": int((out == math.inf).sum()), "-inf": int((out == -math.inf).sum())}


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
    kind = next((word for type_, word in NAMED.items() if isinstance(value, type_)), None)
    if kind is None:
        raise CannotKeep(f"its argument {name} is a {type(value).__name__}, which cannot be written down")
    return {kind: str(value).removeprefix("torch.")}
