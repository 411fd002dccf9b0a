"""``python -m harness flops CASE``: what a training step costs, counted, with no GPU, for any size."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from bench_cases import Case, DtypeConfig, lookup
from bench_cases.dtype_configs import DTYPE_CONFIGS
from harness.options import FLOPS_SETTINGS, request
from harness.settings import RunSettings, SettingsError, resolve
from instrument.results.schemas import strict_json
from instrument.terminal import count as count_in_words
from instrument.terminal import plain_table, rich_console


def flops_command(options: argparse.Namespace) -> int:
    """Count and print; ``--json`` prints the findings on standard output."""
    from harness.commands.case import asked_case
    from harness.exit_codes import OK
    from harness.planning import choose_device

    own = options.model or options.model_arch
    if len(options.names) != (0 if own else 1):
        given = (" ".join(options.names) or "none") + (" beside the model" if own else "")
        raise SettingsError(
            f"one case is needed (`python -m harness list` shows them); given: {given}; the configuration goes with --config"
        )
    case = asked_case(options)
    config = lookup("dtype configuration", options.config, DTYPE_CONFIGS)
    asked = request(options, FLOPS_SETTINGS)
    device = options.device
    if device == "auto":  # a full run is one for a GPU, whether this machine has it or not
        device = "cuda" if options.preset == "full" else choose_device("auto").type
    findings = count(case, config, resolve(case, config, 0, asked, device=device, data_fingerprint=""))

    show(findings)
    if options.json:
        print(strict_json(findings))
    return OK


def count(case: Case, config: DtypeConfig, settings: RunSettings) -> dict[str, object]:
    """The step's FLOPs as plain data; raises `bench_cases.models.ModelError` for a model that cannot be counted."""
    from bench_cases.models import ModelError
    from harness.fake_model import data_facts, shapes_of
    from harness.precision import DEFAULT_ATTENTION
    from harness.run.step_flops import (
        attention_backend,
        closed_row_flops,
        counter_of,
        dtypes_of,
        meaningful_outputs,
        step_flops,
    )
    from instrument.flop_counter import ModelCounter, Uncountable
    from instrument.flops import sizes_of

    facts = data_facts(settings)
    model, outputs = shapes_of(facts.request), meaningful_outputs(facts.request)
    shape, passes = (settings.batch_size, settings.seq_len), settings.batch_size // settings.micro_batch
    one_pass = settings.micro_batch, settings.seq_len
    attention = DEFAULT_ATTENTION[settings.device] if settings.attention == "auto" else settings.attention
    try:
        products = counter_of(model, case, outputs).count(*one_pass)
        executed = products if case.task.head == "classification" else ModelCounter(model).count(*one_pass)
        closed = closed_row_flops(model, case, outputs)
        sizes = {"outputs": outputs, "seq_len": settings.seq_len, "micro_batch": settings.micro_batch}
        flops = step_flops(model, case, config, attention=attention, **sizes)
    except Uncountable as error:
        raise ModelError(f"{case.id}: its FLOPs cannot be counted: {error}") from error
    total = passes * sum(product.flops for product in products)
    closed_flops = sum(flops.of(*shape).values()) if closed else None
    dtypes = dtypes_of(model, config, attention)

    def row(p) -> dict[str, object]:
        direction = {"forward_flops": passes * p.forward_flops, "backward_flops": passes * p.backward_flops}
        return {"module": p.module, "kind": p.kind, "dtype": getattr(dtypes, p.part), **direction}

    rows = [row(p) for p in products]
    return {
        "case": case.id,
        "architecture": case.architecture.name,
        "task": case.task.name,
        "dtype_config": config.id,
        "attention": attention_backend(model, attention),
        "data_source": settings.data,
        "weights_source": settings.weights,
        **{name: getattr(settings, name) for name in ("preset", "device", "batch_size", "seq_len")},
        **facts.as_row(),
        "sizes": asdict(sizes_of(getattr(model, model.encoder_name).config, outputs)) if closed else None,
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_step": total,
        "flops_per_token": total / (settings.batch_size * settings.seq_len),
        "forward_flops": passes * sum(p.forward_flops for p in products),
        "backward_flops": passes * sum(p.backward_flops for p in products),
        "by_module": _summed(rows, "module"),
        "by_dtype": _summed(rows, "dtype"),
        "products": rows,
        "closed_form_flops": closed_flops,
        "closed_form_equal": None if closed_flops is None else closed_flops == total,
        "causal_attention": "full" if case.architecture.causal and model.attention else None,
        "causal_half_flops_per_step": flops.causal_half(*shape),
        "pad_column_flops": passes * sum(product.flops for product in executed) - total,
    }


def _summed(rows: list[dict], key: str) -> dict[str, int]:
    """Training FLOPs of the products by one of their columns, in the order of their first appearance."""
    found: dict[str, int] = {}
    for row in rows:
        found[row[key]] = found.get(row[key], 0) + row["forward_flops"] + row["backward_flops"]
    return found


UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
LAYER = re.compile(r"^(.*?)\.\d+\.(.+)$")
"""``transformer.h.0.attn.c_attn``: stack, number, and what the layers have in common."""


def show(findings: dict) -> None:
    """The sizes, the table by module group, and what the total does and does not hold."""
    console = rich_console(stderr=True)
    for line in heading(findings):
        console.print(escape(line))
    console.print(table(findings))
    for line in closing(findings):
        console.print(escape(line))


def heading(found: dict) -> list[str]:
    """What was counted."""
    outputs = f"vocabulary {found['vocabulary']:,} padded to {found['padded_vocabulary']:,}"
    if found["outputs"]:
        outputs = f"{found['outputs']} outputs"
    what = f"{found['case']}: {found['architecture']}, {found['task']}, {found['n_params']:,} parameters"
    step = f"one step of {count_in_words(found['batch_size'], 'row')} of {count_in_words(found['seq_len'], 'token')}"
    where = f"{'GPU' if found['device'] == 'cuda' else 'CPU'} with {found['attention'].replace('none', 'no')} attention"
    return [f"{what}, {outputs} ({found['shape_source']})", f"{step} under {found['dtype_config']}, {where}"]


def groups(products: list[dict]) -> list[dict]:
    """One row for what the layers of a stack have in common, ``layers`` of them; other modules by full name."""
    found: dict[tuple[str, ...], dict] = {}
    for row in products:
        layer = LAYER.match(row["module"])
        stack, module = layer.groups() if layer else ("", row["module"])
        key = {"stack": stack, "module": module, "kind": row["kind"], "dtype": row["dtype"]}
        group = found.setdefault(tuple(key.values()), key | {"layers": 0, "forward_flops": 0, "backward_flops": 0})
        group["layers"] += 1
        group["forward_flops"] += row["forward_flops"]
        group["backward_flops"] += row["backward_flops"]
    return list(found.values())


def table(found: dict) -> Table:
    """A row a module group, then one a dtype where there are several, then the sum."""
    scale, unit = next(((scale, name) for scale, name in UNITS if found["flops_per_step"] >= scale), UNITS[-1])
    name, numbers = f"{unit} by module", ("forward", "backward", "share")
    drawn = plain_table(name, "dtype", *numbers, right=numbers, fold=(name,))

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
    dtype = "" if len(found["by_dtype"]) > 1 else next(iter(found["by_dtype"]))
    add("step", dtype, found["forward_flops"], found["backward_flops"], style="bold")
    return drawn


def closing(found: dict) -> list[str]:
    """The total in words: exactly, against the closed form, with causal attention halved, without padding."""
    total = found["flops_per_step"]
    lines = [
        f"{total:,} FLOPs a step, {found['flops_per_token']:,.0f} a token: matrix products"
        f"{' and attention' if found['attention'] != 'none' else ''}, forward and backward; no embeddings, elementwise work "
        "or optimizer"
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
        share = f"{found['pad_column_flops']:,} ({found['pad_column_flops'] / total:.2%})"
        lines.append(f"not in it: {share} for the columns that pad the vocabulary, which run but count for nothing")
    return lines
