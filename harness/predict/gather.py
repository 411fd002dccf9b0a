"""The fp32 runs of a case, what they predict for every narrower configuration, and what the runs of those did.

``predictions/<case>.json`` keeps it for the dossier.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench_cases import DtypeConfig
from bench_cases.dtype_configs import DTYPE_CONFIGS
from harness.optimizer import BETAS
from harness.precision import FIRST_LOSS_SCALE
from harness.settings import MAX_NORM
from instrument.prediction import Arithmetic, Happened, Hazard, Outcome, Reference, compare, end, hazards
from instrument.results.files import replace
from instrument.results.folder import finished_runs
from instrument.results.layout import RunFiles, RunNotFound
from instrument.results.ranges import ModuleRecord
from instrument.results.read import RunUnreadable, records
from instrument.results.schemas import RunRecord, StepRecord
from instrument.watch.readings import HeadroomTable
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
        raise RunNotFound(
            f"no {REFERENCE} run of {case} in {out}; make one: python -m harness case "
            + shlex.join([spelled, REFERENCE, "--out", str(out)])
        )
    narrow = [run for run in runs if run.config["config"]["compute"] != "fp32"]
    found = [_of(reference, [run for run in narrow if _are_twins(run, reference)], out) for reference in references]
    compared = {config.run_id for reference in found for config in reference.configs}
    counts = Counter(o.verdict for reference in found for config in reference.configs for o in config.outcomes)
    return Predictions(case, str(out), found, sorted(run.run_id for run in narrow if run.run_id not in compared), dict(counts))


def arithmetic_of(config: DtypeConfig) -> Arithmetic:
    """What decides, of a configuration."""
    states = {
        "foreach": config.weights,
        "fused": config.weights,
        "fp32_states": "fp32",
        "stochastic_rounding": "bf16",
        "8bit": "8bit",
    }[config.optimizer]
    return Arithmetic(
        compute=config.compute,
        head=config.head,
        states=states,
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
    run = RunFiles(out, reference.run_id)
    modules = _modules(reference, run)
    facts = Reference(modules, _steps(run), reference.n_params, reference.batch_size // reference.micro_batch)
    by_config = {run.dtype_config: run for run in runs}
    configs = {name: config for name, config in DTYPE_CONFIGS.items() if config.compute != "fp32"}
    rows = [_config(config, hazards(facts, arithmetic_of(config)), by_config.get(name)) for name, config in configs.items()]
    return ReferencePrediction(
        run_id=reference.run_id,
        seed=reference.seed,
        lr=reference.config["lr"],
        preset=reference.preset,
        status=reference.status,
        steps=reference.steps_done,
        first_loss_scale=FIRST_LOSS_SCALE,
        modules=_headroom(modules),
        configs=rows,
    )


def _config(config: DtypeConfig, found: list[Hazard], run: RunRecord | None) -> ConfigPrediction:
    """One configuration; compared where a run of it came to a result."""
    if run is None or run.status not in ("completed", "diverged"):
        return ConfigPrediction(config.id, found, end(found), run and run.run_id, run and run.status, None, None, None, [])
    first = run.first_nonfinite
    clean_states = run.status == "completed" or (first is not None and first.phase == "optimizer")
    zero_share = run.flags.get("exp_avg_sq_zero_frac") if clean_states else None  # a failed backward writes NaN into them
    happened = Happened(run.divergence_step, first, run.scaler_skips, zero_share)
    outcome = run.run_id, run.status, run.divergence_step, happened.kind, first and first.module
    return ConfigPrediction(config.id, found, end(found), *outcome, compare(found, happened))


def _headroom(modules: Sequence[ModuleRecord]) -> list[ModuleHeadroom]:
    table = HeadroomTable()
    table.add(modules)
    found = []
    for r in table.rows():
        scaled = FP16.headroom_bits(r.absmax * FIRST_LOSS_SCALE) if r.direction == "bwd" else None
        bits = FP16.headroom_bits(r.absmax), scaled, BF16.headroom_bits(r.absmax)
        found.append(ModuleHeadroom(r.module, r.direction, r.absmax, r.step, *bits, r.flush_frac))
    return found


def _modules(reference: RunRecord, run: RunFiles) -> list[ModuleRecord]:
    if rows := records(run, "activations"):
        return rows
    raise RunNotFound(
        f"{reference.run_id} has no activations.jsonl (--instrument {reference.instrument}): no module was "
        "measured; run it again with --instrument light or full"
    )


def _steps(run: RunFiles) -> list[StepRecord]:
    if rows := records(run, "steps"):
        return rows
    raise RunUnreadable(f"{run.log('steps')} is missing")


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
