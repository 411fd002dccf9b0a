"""``python -m harness flops CASE``: what a training step costs, counted, with no GPU, for any size."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from bench_cases import Case, DtypeConfig, lookup
from bench_cases.dtype_configs import DTYPE_CONFIGS
from harness.settings import Request, RunSettings, SettingsError, resolve

ASKED = ("preset", "data", "weights", "batch_size", "seq_len", "attention", "text_field", "label_field")
"""The settings that change FLOPs or their dtypes: the command's options, under a run's own names."""


def flops_command(options: argparse.Namespace) -> int:
    """Count and print; ``--json`` prints the findings on standard output."""
    from harness.case import asked_case
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
    asked = Request(**{name: getattr(options, name) for name in ASKED})
    device = options.device
    if device == "auto":  # a full run is one for a GPU, whether this machine has it or not
        device = "cuda" if options.preset == "full" else choose_device("auto").type
    findings = count(case, config, resolve(case, config, 0, asked, device=device, data_fingerprint=""))
    from harness.flops.terminal import show

    show(findings)
    if options.json:
        sys.stdout.write(json.dumps(findings, allow_nan=False) + "\n")
    return OK


def count(case: Case, config: DtypeConfig, settings: RunSettings) -> dict[str, object]:
    """The step's FLOPs as plain data; raises `bench_cases.models.ModelError` for a model that cannot be counted."""
    from bench_cases.models import ModelError
    from harness.estimate.model import data_facts
    from harness.flops.model import closed_row_flops, counter_of, dtypes_of, meaningful_outputs, step_flops
    from harness.flops.shapes import shapes_of
    from harness.precision import DEFAULT_ATTENTION
    from instrument.flops import sizes_of
    from instrument.flops.counter import ModelCounter, Uncountable

    facts = data_facts(settings)
    model, outputs = shapes_of(facts.request), meaningful_outputs(facts.request)
    shape = settings.batch_size, settings.seq_len
    attention = DEFAULT_ATTENTION[settings.device] if settings.attention == "auto" else settings.attention
    try:
        products = counter_of(model, case, outputs).count(*shape)
        executed = products if case.task.head == "classification" else ModelCounter(model).count(*shape)
        closed = closed_row_flops(model, case, outputs)
        flops = step_flops(model, case, config, attention=attention, outputs=outputs, seq_len=settings.seq_len)
    except Uncountable as error:
        raise ModelError(f"{case.id}: its FLOPs cannot be counted: {error}") from error
    total = sum(product.flops for product in products)
    closed_flops = sum(flops.of(*shape).values()) if closed else None
    dtypes = dtypes_of(model, config, attention)
    rows = [
        {
            "module": p.module,
            "kind": p.kind,
            "dtype": getattr(dtypes, p.part),
            "forward_flops": p.forward_flops,
            "backward_flops": p.backward_flops,
        }
        for p in products
    ]
    return {
        "case": case.id,
        "architecture": case.architecture.name,
        "task": case.task.name,
        "dtype_config": config.id,
        "preset": settings.preset,
        "device": settings.device,
        "attention": attention,
        "data_source": settings.data,
        "weights_source": settings.weights,
        "batch_size": settings.batch_size,
        "seq_len": settings.seq_len,
        **facts.as_row(),
        "sizes": asdict(sizes_of(getattr(model, model.encoder_name).config, outputs)) if closed else None,
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_step": total,
        "flops_per_token": total / (settings.batch_size * settings.seq_len),
        "forward_flops": sum(p.forward_flops for p in products),
        "backward_flops": sum(p.backward_flops for p in products),
        "by_module": _summed(rows, "module"),
        "by_dtype": _summed(rows, "dtype"),
        "products": rows,
        "closed_form_flops": closed_flops,
        "closed_form_equal": None if closed_flops is None else closed_flops == total,
        "causal_attention": "full" if case.architecture.causal else None,
        "causal_half_flops_per_step": flops.causal_half(*shape),
        "pad_column_flops": sum(product.flops for product in executed) - total,
    }


def _summed(rows: list[dict], key: str) -> dict[str, int]:
    """Training FLOPs of the products by one of their columns, in the order of their first appearance."""
    found: dict[str, int] = {}
    for row in rows:
        found[row[key]] = found.get(row[key], 0) + row["forward_flops"] + row["backward_flops"]
    return found
