"""The resolved run and its estimate for a person, on standard error. No computing here."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from instrument.count import count


def show(findings: dict) -> None:
    """Two columns: what, and its value."""
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines(findings):
        table.add_row(name, escape(text))
    console.print(table)


def lines(found: dict) -> list[tuple[str, str]]:
    """The findings as (name, text)."""
    config, model, done = found["configuration"], found["model"], found["already_done"]
    cast = f"{config['autocast']} autocast" if config["autocast"] else config["compute"]
    rows = [
        ("run", found["run_id"]),
        ("case", f"{found['case']}: {found['architecture']}, {found['task']}, {found['loss']} ({found['loss_reduction']})"),
        (
            "configuration",
            f"{found['dtype_config']}: weights {config['weights']}, compute {cast}, head {config['head']}, "
            f"loss {config['loss']}, AdamW {config['optimizer']} eps {config['eps']:g}, "
            f"{'dynamic loss scaling' if config['scaler'] else 'no loss scaling'}"
            + (", norm in fp16" if config["clip"] == "fp16" else "")
            + (", TF32" if config["tf32"] else ""),
        ),
        ("data, weights", f"{found['data_source']}, {found['weights_source']}"),
        ("model", _model(model)),
        (
            "step",
            f"{count(found['batch_size'], 'sequence')} of at most {found['seq_len']} = "
            f"{found['tokens_per_step']:,} tokens, in micro-batches of {found['micro_batch']}",
        ),
        ("schedule", f"{count(found['max_steps'], 'step')}, peak rate {found['lr']:g}, warm-up {found['warmup_steps']}"),
        (
            "device",
            f"{found['device']}, preset {found['preset']}, seed {found['seed']}, "
            f"threads {found['threads'] or 'all'}, attention {found['attention']}",
        ),
        (
            "results",
            found["results_folder"]
            + ("" if done is None else f" (already there: {done['status']}, {count(done['steps_done'], 'step')})"),
        ),
    ]
    if found["unsupported"]:
        return [*rows, ("unsupported", found["unsupported"])]
    if found["not_estimated"]:
        return [*rows, ("not estimated", found["not_estimated"])]
    return [*rows, *_memory(found["memory"]), *_time(found["time"])]


def _model(model: dict) -> str:
    if "n_params" not in model:
        return f"vocabulary {model['vocabulary']:,} ({model['shape_source']})"
    return (
        f"{model['n_params']:,} parameters, {model['embedding_params']:,} of them embeddings; vocabulary "
        f"{model['vocabulary']:,} padded to {model['padded_vocabulary']:,}"
        + (f", {model['outputs']} outputs" if model["outputs"] else "")
        + f" ({model['shape_source']})"
    )


def _memory(memory: dict) -> list[tuple[str, str]]:
    parts = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:,.1f} MB" for name, count in memory["parts_bytes"].items())
    return [("memory, estimate", f"{memory['peak_bytes'] / 1e9:.2f} GB: {parts}"), ("", memory["rule"])]


def _time(found: dict) -> list[tuple[str, str]]:
    if found["total_s"] is None:
        return [("time, estimate", f"unknown: {found['rule']}")]
    return [
        (
            "time, estimate",
            f"{found['total_s']:,.1f} s: {found['step_s'] * 1e3:,.1f} ms a step of "
            f"{found['flops_per_step'] / 1e9:,.2f} GFLOP, evaluation {found['evaluation_s']:,.1f} s; "
            "without start-up and data",
        ),
        ("", found["rule"]),
    ]
