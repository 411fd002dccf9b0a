"""``python -m harness predict CASE``: from an fp32 run, what would fail in 16 bits, and whether it did. No computing here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bench_cases.own import find_case
from harness.exit_codes import OK
from harness.planning import choose_device, results_folder
from harness.predict.gather import ConfigPrediction, ModuleHeadroom, Predictions, ReferencePrediction, predictions, store
from instrument.prediction import FALSE_ALARM, HIT, MISSED, NOT_REACHED, VERDICTS, Hazard
from instrument.terminal import count

MOST_MODULES = 10
SHORT_BITS = 1.0
ENDS = {
    "overflow_forward": "forward overflow",
    "overflow_backward": "backward overflow",
    "norm_overflow": "norm overflow",
    "division_by_zero": "division by 0",
    "other": "another cause",
}
SHOWN = {
    HIT: "[green]as predicted[/]",
    FALSE_ALARM: "[yellow]did not happen[/]",
    MISSED: "[red]not predicted[/]",
    NOT_REACHED: "[dim]not reached[/]",
}
"""A verdict in the table; the counts below it have it in full."""


def predict_command(options: argparse.Namespace) -> int:
    """Print the predictions and what became of them; ``--json`` prints them as one object on standard output.
    The results folder keeps them for the dossier."""
    case = find_case(options.case)
    out = results_folder(options.out, choose_device("auto"))
    found = predictions(case.id, options.case, out)
    store(found, out)
    if options.json:
        print(msgspec.json.encode(found).decode())
    else:
        show(found)
    return OK


def show(found: Predictions) -> None:
    """For every fp32 run: its range, what it predicts, what happened; then the counts."""
    console = Console(stderr=True, highlight=False)
    for reference in found.references:
        console.print(f"[bold]{escape(found.case)}[/], predicted from {escape(reference.run_id)}")
        steps = count(reference.steps, "step")
        console.print(f"({reference.status} after {steps}, lr {reference.lr:g}, {reference.preset} preset)")
        for part in (*ranges(reference), configurations(reference.configs), *details(reference)):
            console.print(Padding(part, (0, 0, 0, 2)) if isinstance(part, str) else part)
        console.print()
    for line in closing(found):
        console.print(line)


def ranges(reference: ReferencePrediction) -> Iterator[str]:
    """How much of fp16's and bf16's range the fp32 values take, and the modules beyond it or close to it."""
    outputs = [m for m in reference.modules if m.direction == "fwd"]
    gradients = [m for m in reference.modules if m.direction == "bwd"]
    scale = f"{reference.first_loss_scale:,.0f}"
    yield _range("outputs in fp16", outputs, "bits_fp16")
    yield _range("gradients in fp16", gradients, "bits_fp16")
    yield _range(f"gradients in fp16 at loss scale {scale}", gradients, "bits_fp16_scaled")
    yield _range("outputs and gradients in bf16", reference.modules, "bits_bf16")
    close = sorted((m for m in outputs if m.bits_fp16 is not None and m.bits_fp16 < SHORT_BITS), key=lambda m: m.bits_fp16)
    for m in close[:MOST_MODULES]:
        word = "beyond fp16" if m.bits_fp16 < 0 else "close to fp16's limit"
        yield f"  [dim]{escape(m.module)}: largest |output| {m.absmax:.3g} at step {m.step}, {m.bits_fp16:+.1f} bits, {word}[/]"
    if len(close) > MOST_MODULES:
        yield f"  [dim]and {len(close) - MOST_MODULES} more (--json has them all)[/]"


def _range(what: str, modules: list[ModuleHeadroom], field: str) -> str:
    bits = [(getattr(m, field), m.module) for m in modules if getattr(m, field) is not None]
    if not bits:
        return f"{what}: none was measured"
    beyond = sum(b < 0 for b, _ in bits)
    least, module = min(bits)
    room = f"{least:.1f} bits left in" if least >= 0 else f"by {-least:.1f} bits in"
    of = f"of {count(len(bits), 'module')} beyond"
    return f"{what}: {f'[red]{beyond} {of}[/]' if beyond else f'none {of}'}; {room} {escape(module)}"


def configurations(rows: list[ConfigPrediction]) -> Table:
    """A row a configuration: predicted, happened, verdict."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("configuration", no_wrap=True)
    for name in ("predicted", "happened", "verdict"):
        table.add_column(name)
    for row in rows:
        table.add_row(row.config, predicted(row), happened(row), verdict(row))
    return table


def predicted(row: ConfigPrediction) -> str:
    """How it would end, in short."""
    if row.ends is None:
        return f"[green]survives{_also([h.kind for h in row.hazards])}[/]"
    by = "step" if row.ends.kind == "division_by_zero" else "by step"  # modules are measured at a cadence
    return f"[red]{by} {row.ends.step}: {ENDS[row.ends.kind]}[/]"


def happened(row: ConfigPrediction) -> str:
    """How its run ended, in short."""
    if row.status is None:
        return "[dim]no run[/]"
    if row.status == "diverged":
        return f"step {row.ended_at}: {ENDS[row.happened]}"
    if row.status != "completed":
        return f"[dim]{row.status}[/]"
    return f"completed{_also([o.kind for o in row.outcomes if o.verdict in (HIT, MISSED)])}"


def _also(kinds: list[str]) -> str:
    """What goes wrong without ending the training."""
    texts = {"scaler_skip": "steps skipped", "states_flush": "states flush to 0"}
    return "".join(f", {text}" for kind, text in texts.items() if kind in kinds)


def verdict(row: ConfigPrediction) -> str:
    """The verdicts that occurred; agreement where nothing was predicted and nothing happened."""
    if not row.outcomes:
        return ""
    verdicts = {o.verdict for o in row.outcomes}
    if HIT in verdicts:
        verdicts.discard(NOT_REACHED)  # it ended as it should, of the first of several
    return "; ".join(text for v, text in SHOWN.items() if v in verdicts) or SHOWN[HIT]


def details(reference: ReferencePrediction) -> Iterator[str]:
    """The reasons, once for all configurations that share them."""
    reasons: dict[str, list[str]] = {}
    for row in reference.configs:
        for reason in _reasons(row.hazards):
            reasons.setdefault(reason, []).append(row.config)
    for reason, configs in reasons.items():
        yield f"[dim]{', '.join(configs)}: {escape(reason)}[/]"
    if any(row.ends is not None and row.ends.kind == "overflow_forward" for row in reference.configs):
        yield "[dim]'by step': parts of blocks are measured every 16 steps; an fp32 run with --instrument full measures all[/]"
    for row in reference.configs:
        for outcome in row.outcomes:
            if outcome.named is not None:
                named = "was among" if outcome.named else "was not among"
                yield f"{row.config}: its first module to overflow, {escape(str(row.happened_in))}, {named} the predicted ones"


def _reasons(found: list[Hazard]) -> Iterator[str]:
    by_kind: dict[str, list[Hazard]] = {}
    for hazard in found:
        by_kind.setdefault(hazard.kind, []).append(hazard)
    for kind, group in by_kind.items():
        first = group[0]
        if kind == "division_by_zero":
            yield (
                f"clipped gradients have a root mean square of {first.value:.2g}; below {first.limit:.2g} the second moment "
                "rounds to 0, as epsilon does, and AdamW divides by it"
            )
        elif kind == "states_flush":
            yield f"at least {first.share:.1%} of the second moments round to 0 at step {first.step}"
        elif kind == "gradient_flush":
            worst = max(group, key=lambda h: h.share)
            yield (
                f"over half of the gradients of {count(len(group), 'module')} flush to 0 "
                f"(most: {worst.share:.1%} in {worst.module})"
            )
        else:
            worst = max(group, key=lambda h: h.value)
            what = {
                "scaler_skip": "steps skipped for gradients",
                "norm_overflow": "gradient norm",
                "overflow_forward": f"outputs of {count(len(group), 'module')}",
            }.get(kind, "gradients")
            yield f"{what} beyond {first.limit:,.0f}, the largest {worst.value:.3g} in {worst.module or 'the norm'}"


def closing(found: Predictions) -> Iterator[str]:
    """Counts over all compared runs, and what could not be compared."""
    counts = ", ".join(f"{found.counts[v]} {v}" for v in VERDICTS if found.counts.get(v))
    compared = sum(bool(row.outcomes) for reference in found.references for row in reference.configs)
    runs = f"{compared} run{'s' if compared != 1 else ''}"
    yield f"[bold]hazards in {runs}[/]: {counts}" if counts else "no run of a narrower configuration to compare with yet"
    if found.counts.get(MISSED):
        yield "[dim]not predictable: what an op makes between a module's input and output (x^3 in gelu) is in no record[/]"
    if found.without_reference:
        yield f"[yellow]no prediction[/] without an fp32_true run of the same settings: {', '.join(found.without_reference)}"
