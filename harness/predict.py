"""``python -m harness predict CASE``: from the fp32 runs of a case, what would fail under every narrower configuration, beside
what the runs of those did. ``predictions/<case>.json`` keeps it for the dossier."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bench_cases import DtypeConfig
from bench_cases.dtype_configs import DTYPE_CONFIGS
from bench_cases.own import find_case
from harness.exit_codes import OK
from harness.optimizer import BETAS
from harness.planning import choose_device, results_folder
from harness.precision import FIRST_LOSS_SCALE
from harness.settings import MAX_NORM
from instrument import prediction
from instrument.prediction import FALSE_ALARM, HIT, MISSED, NOT_REACHED, VERDICTS, Hazard, Outcome
from instrument.results.files import replace
from instrument.results.folder import finished_runs
from instrument.results.layout import RunFiles, RunNotFound
from instrument.results.measurements import ModuleRecord
from instrument.results.read import RunUnreadable, records
from instrument.results.schemas import RunRecord
from instrument.terminal import count, plain_table, rich_console
from instrument.watch.taps import HeadroomTable
from kernels.float_formats import BF16, FP16

REFERENCE = "fp32_true"


class ModuleHeadroom(msgspec.Struct, frozen=True):
    """One module and direction of the fp32 run. ``bits_scaled``: the headroom that its gradient has in fp16 at the
    first loss scale; null for outputs. ``flush_frac``: the share that fp16 would flush to zero, unscaled."""

    module: str
    direction: str
    absmax: float
    step: int
    bits_fp16: float | None
    bits_fp16_scaled: float | None
    bits_bf16: float | None
    flush_frac: float | None


class ConfigPrediction(msgspec.Struct, frozen=True):
    """A configuration: what would go wrong, of what it would end, and what came of it in a run where there is one."""

    config: str
    hazards: list[Hazard]
    ends: Hazard | None
    run_id: str | None
    status: str | None
    ended_at: int | None
    happened: str | None
    happened_in: str | None
    outcomes: list[Outcome]


class ReferencePrediction(msgspec.Struct, frozen=True):
    """One fp32 run and all that follows from it."""

    run_id: str
    seed: int
    lr: float
    preset: str
    status: str
    steps: int
    first_loss_scale: float
    modules: list[ModuleHeadroom]
    configs: list[ConfigPrediction]


class Predictions(msgspec.Struct, frozen=True):
    """The answer. ``without_reference``: runs that have no fp32 twin, and so no prediction; ``counts``: verdicts over
    all kinds of hazards of all compared runs."""

    case: str
    out: str
    references: list[ReferencePrediction]
    without_reference: list[str]
    counts: dict[str, int]


def predictions(case: str, spelled: str, out: Path) -> Predictions:
    """Predict and compare; raises `RunNotFound` when there is no fp32 run to predict from, `RunUnreadable`."""
    runs = [run for run in finished_runs(out) if run.case == case]
    references = [run for run in runs if run.dtype_config == REFERENCE and run.steps_done]
    if not references:
        make = shlex.join([spelled, REFERENCE, "--out", str(out)])
        raise RunNotFound(f"no {REFERENCE} run of {case} in {out}; make one: python -m harness case {make}")
    narrow = [run for run in runs if run.config["config"]["compute"] != "fp32"]
    found = [_of(reference, [run for run in narrow if _are_twins(run, reference)], out) for reference in references]
    compared = {config.run_id for reference in found for config in reference.configs}
    counts = Counter(o.verdict for reference in found for config in reference.configs for o in config.outcomes)
    return Predictions(case, str(out), found, sorted(run.run_id for run in narrow if run.run_id not in compared), dict(counts))


def arithmetic_of(config: DtypeConfig) -> prediction.Arithmetic:
    """What decides, of a configuration."""
    states = {"fp32_states": "fp32", "stochastic_rounding": "bf16", "8bit": "8bit"}
    return prediction.Arithmetic(
        compute=config.compute,
        head=config.head,
        states=states.get(config.optimizer, config.weights),
        update=config.weights if config.optimizer == "foreach" else "fp32",
        clip=config.clip,
        mixed=config.autocast is not None,
        eps=config.eps,
        beta2=BETAS[1],
        max_norm=MAX_NORM,
        loss_scale=FIRST_LOSS_SCALE if config.scaler else None,
    )


def _are_twins(run: RunRecord, reference: RunRecord) -> bool:
    """The same experiment but for the dtype configuration."""
    mine, its = ({**row.config, "config": None} for row in (run, reference))
    return run.seed == reference.seed and mine == its


def _of(reference: RunRecord, runs: Sequence[RunRecord], out: Path) -> ReferencePrediction:
    """Raises `RunNotFound` where no module was measured."""
    run = RunFiles(out, reference.run_id)
    modules, steps = records(run, "activations"), records(run, "steps")
    if not modules:
        missing = f"{reference.run_id} has no activations.jsonl (--instrument {reference.instrument}): no module was measured"
        raise RunNotFound(f"{missing}; run it again with --instrument light or full")
    if not steps:
        raise RunUnreadable(f"{run.log('steps')} is missing")
    facts = prediction.Reference(modules, steps, reference.n_params, reference.batch_size // reference.micro_batch)
    by_config = {run.dtype_config: run for run in runs}
    narrow = [config for config in DTYPE_CONFIGS.values() if config.compute != "fp32"]
    rows = [_config(config, facts, by_config.get(config.id)) for config in narrow]
    r = reference
    who = r.run_id, r.seed, r.config["lr"], r.preset, r.status, r.steps_done
    return ReferencePrediction(*who, FIRST_LOSS_SCALE, _headroom(modules), rows)


def _config(config: DtypeConfig, facts: prediction.Reference, run: RunRecord | None) -> ConfigPrediction:
    """One configuration; compared where a run of it came to a result."""
    found = prediction.hazards(facts, arithmetic_of(config))
    predicted = config.id, found, prediction.end(found)
    if run is None or run.status not in ("completed", "diverged"):
        return ConfigPrediction(*predicted, run and run.run_id, run and run.status, None, None, None, [])
    first = run.first_nonfinite
    clean_states = run.status == "completed" or (first is not None and first.phase == "optimizer")
    zero_share = run.flags.get("exp_avg_sq_zero_frac") if clean_states else None  # a failed backward writes NaN into them
    happened = prediction.Happened(run.divergence_step, first, run.scaler_skips, zero_share)
    outcome = run.run_id, run.status, run.divergence_step, happened.kind, first and first.module
    return ConfigPrediction(*predicted, *outcome, prediction.compare(found, happened))


def _headroom(modules: Sequence[ModuleRecord]) -> list[ModuleHeadroom]:
    table = HeadroomTable()
    table.add(modules)
    found = []
    for r in table.rows():
        scaled = FP16.headroom_bits(r.absmax * FIRST_LOSS_SCALE) if r.direction == "bwd" else None
        bits = FP16.headroom_bits(r.absmax), scaled, BF16.headroom_bits(r.absmax)
        found.append(ModuleHeadroom(r.module, r.direction, r.absmax, r.step, *bits, r.flush_frac))
    return found


def store(found: Predictions, out: Path) -> None:
    """Write one case's predictions."""
    replace(out / "predictions" / f"{found.case}.json", msgspec.json.encode(found) + b"\n")


def store_all(cases: Iterable[str], out: Path) -> None:
    """Predict for every case that has an fp32 run; others have nothing to predict from."""
    for case in cases:
        try:
            store(predictions(case, case, out), out)
        except (RunNotFound, RunUnreadable):
            continue


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
    console = rich_console(stderr=True)
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
    outputs, gradients = ([m for m in reference.modules if m.direction == direction] for direction in ("fwd", "bwd"))
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
    columns = ("predicted", "happened", "verdict")
    table = plain_table("configuration", *columns, fold=columns)
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
            rounds = f"below {first.limit:.2g} the second moment rounds to 0, as epsilon does, and AdamW divides by it"
            yield f"clipped gradients have a root mean square of {first.value:.2g}; {rounds}"
        elif kind == "states_flush":
            yield f"at least {first.share:.1%} of the second moments round to 0 at step {first.step}"
        elif kind == "gradient_flush":
            worst, modules = max(group, key=lambda h: h.share), count(len(group), "module")
            yield f"over half of the gradients of {modules} flush to 0 (most: {worst.share:.1%} in {worst.module})"
        else:
            worst = max(group, key=lambda h: h.value)
            names = {"scaler_skip": "steps skipped for gradients", "norm_overflow": "gradient norm"}
            what = f"outputs of {count(len(group), 'module')}" if kind == "overflow_forward" else names.get(kind, "gradients")
            yield f"{what} beyond {first.limit:,.0f}, the largest {worst.value:.3g} in {worst.module or 'the norm'}"


def closing(found: Predictions) -> Iterator[str]:
    """Counts over all compared runs, and what could not be compared."""
    counts = ", ".join(f"{found.counts[v]} {v}" for v in VERDICTS if found.counts.get(v))
    compared = sum(bool(row.outcomes) for reference in found.references for row in reference.configs)
    hazards = f"[bold]hazards in {count(compared, 'run')}[/]: {counts}"
    yield hazards if counts else "no run of a narrower configuration to compare with yet"
    if found.counts.get(MISSED):
        yield "[dim]not predictable: what an op makes between a module's input and output (x^3 in gelu) is in no record[/]"
    if found.without_reference:
        yield f"[yellow]no prediction[/] without an fp32_true run of the same settings: {', '.join(found.without_reference)}"
