"""The FLOPs of a step for a person, on standard error. No counting here."""

from __future__ import annotations

import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from instrument.count import count

UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
LAYER = re.compile(r"^(.*?)\.\d+\.(.+)$")
"""``transformer.h.0.attn.c_attn``: stack, number, and what the layers have in common."""


def show(findings: dict) -> None:
    """The sizes, the table by module group, and what the total does and does not hold."""
    console = Console(stderr=True, highlight=False)
    for line in heading(findings):
        console.print(escape(line))
    console.print(table(findings))
    for line in closing(findings):
        console.print(escape(line))


def heading(found: dict) -> list[str]:
    """What was counted."""
    outputs = (
        f"{found['outputs']} outputs"
        if found["outputs"]
        else f"vocabulary {found['vocabulary']:,} padded to {found['padded_vocabulary']:,}"
    )
    where = "GPU" if found["device"] == "cuda" else "CPU"
    return [
        f"{found['case']}: {found['architecture']}, {found['task']}, {found['n_params']:,} parameters, "
        f"{outputs} ({found['shape_source']})",
        f"one step of {count(found['batch_size'], 'row')} of {count(found['seq_len'], 'token')} under "
        f"{found['dtype_config']}, {where} with {found['attention']} attention",
    ]


def groups(products: list[dict]) -> list[dict]:
    """One row for what the layers of a stack have in common, ``layers`` of them; other modules by full name."""
    found: dict[tuple[str, ...], dict] = {}
    for row in products:
        layer = LAYER.match(row["module"])
        stack, module = layer.groups() if layer else ("", row["module"])
        key = stack, module, row["kind"], row["dtype"]
        group = found.setdefault(
            key,
            dict(zip(("stack", "module", "kind", "dtype"), key, strict=True))
            | {"layers": 0, "forward_flops": 0, "backward_flops": 0},
        )
        group["layers"] += 1
        group["forward_flops"] += row["forward_flops"]
        group["backward_flops"] += row["backward_flops"]
    return list(found.values())


def table(found: dict) -> Table:
    """A row a module group, then one a dtype where there are several, then the sum."""
    scale, unit = _unit(found["flops_per_step"])
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    drawn.add_column(f"{unit} by module", overflow="fold")
    for name in ("dtype", "forward", "backward", "share"):
        drawn.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)

    def add(name: str, dtype: str, forward: int, backward: int, style: str | None = None) -> None:
        share = (forward + backward) / found["flops_per_step"]
        drawn.add_row(escape(name), dtype, f"{forward / scale:,.3f}", f"{backward / scale:,.3f}", f"{share:.1%}", style=style)

    for group in groups(found["products"]):
        times = f"{group['layers']} x " if group["stack"] else ""
        scores = " (scores)" if group["kind"] == "attention" else ""
        add(times + group["module"] + scores, group["dtype"], group["forward_flops"], group["backward_flops"])
    drawn.add_section()
    if len(found["by_dtype"]) > 1:
        for dtype in found["by_dtype"]:
            rows = [row for row in found["products"] if row["dtype"] == dtype]
            add(f"all in {dtype}", dtype, sum(r["forward_flops"] for r in rows), sum(r["backward_flops"] for r in rows))
    add(
        "step",
        next(iter(found["by_dtype"])) if len(found["by_dtype"]) == 1 else "",
        found["forward_flops"],
        found["backward_flops"],
        style="bold",
    )
    return drawn


def closing(found: dict) -> list[str]:
    """The total in words: exactly, against the closed form, with causal attention halved, without padding."""
    total = found["flops_per_step"]
    lines = [
        f"{total:,} FLOPs a step, {found['flops_per_token']:,.0f} a token: matrix products and attention, "
        "forward and backward; no embeddings, elementwise work or optimizer"
    ]
    if found["closed_form_flops"] is None:
        lines.append("no closed form for this architecture: the count is all there is")
    elif found["closed_form_equal"]:
        lines.append("equal to the closed form")
    else:
        lines.append(f"NOT equal to the closed form, which says {found['closed_form_flops']:,}: one of the two is wrong")
    half = found["causal_half_flops_per_step"]
    if found["causal_attention"] and half is not None:
        lines.append(f"causal attention counts in full (the MFU numerator); half: {half:,} ({half / total:.1%})")
    if found["pad_column_flops"]:
        lines.append(
            f"not in it: {found['pad_column_flops']:,} ({found['pad_column_flops'] / total:.2%}) for the columns that "
            "pad the vocabulary, which run but count for nothing"
        )
    return lines


def _unit(flops: int) -> tuple[float, str]:
    return next(((scale, name) for scale, name in UNITS if flops >= scale), UNITS[-1])
