"""``python -m harness fit CASE``: a search per configuration, its row kept in fit.json as soon as it is known; and what a
person sees of it, on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench_cases import Case, DtypeConfig
from bench_cases.own import find_case
from harness.exit_codes import OK, RUN_FAILED
from harness.fit.search import BatchTrial, Found, search
from harness.options import FIT_SETTINGS
from harness.settings import Request, RunSettings
from instrument.results.files import locked, read_plain, replace
from instrument.results.folder import require_writable
from instrument.results.lines import json_object
from instrument.terminal import count, plain_table, rich_console

SCHEMA, NAME, LOCK = 1, "fit.json", ".fit.lock"
ON_A_CPU = (
    "a CPU has no memory of its own that a batch could fill; --memory-limit GB searches in so much, with --dry-run in "
    "the memory model"
)
START = 32
"""Rows of the first trial, which is also the one that the largest batch is compared with."""
STEPS = 100
"""Of the schedule; a trial makes fewer."""
SAME = ("preset", "device", "data", "data_fingerprint", "sources_fingerprint", "weights", "seq_len", "attention", "compile")


def fit_command(options: argparse.Namespace) -> int:
    """Fill fit.json's rows of a case and print them. Exit code 3 where a configuration ran into an error of its own."""
    case = find_case(options.case)
    from harness.fit.trial import TrialProcesses
    from harness.planning import asked_configs, choose_device, plan_run

    configs, device = asked_configs(options.configs), choose_device(options.device)
    request = {name: getattr(options, name) for name in FIT_SETTINGS}

    def settings(config: DtypeConfig, batch: int) -> RunSettings:
        return plan_run(case, config, 0, Request(**request, batch_size=batch, micro_batch=batch, max_steps=STEPS), device)

    limit = None if options.memory_limit is None else round(options.memory_limit * 1e9)
    processes = TrialProcesses(limit)
    slug, name, total = processes.facts()
    out = options.out or Path("results") / slug
    limit_bytes = limit if limit is not None else total
    if not options.dry_run:
        require_writable(out)
    rows = []
    for config in configs:
        drafted = settings(config, min(START, options.most))
        row = None if options.rerun or options.dry_run else kept(out, drafted, limit)
        if row is None:
            row = {"device": name, "memory_bytes": limit_bytes, "memory_limit_bytes": limit, **identity(drafted)}
            if device.type == "cpu" and limit is None:
                row |= {"status": "unsupported", "largest_batch": None, "limited_by": ON_A_CPU}
            elif options.dry_run:
                row |= in_the_model(partial(settings, config), options.most, limit_bytes, out)
            else:
                row |= measured(processes, partial(settings, config), options.most, limit_bytes)
            if not options.dry_run:
                keep(out, row)
        row = row | costs(row, options.price_per_hour)
        print(f"{row['case']} {row['config']}: {largest(row)}", file=sys.stderr, flush=True)
        rows.append(row)
    table(case.id, rows, options.price_per_hour)
    if options.json:
        print(json.dumps({"schema": SCHEMA, "case": case.id, "price_per_hour": options.price_per_hour, "rows": rows}))
    return RUN_FAILED if any(row["status"] == "error" for row in rows) else OK


def identity(settings: RunSettings) -> dict[str, Any]:
    """What a row is about."""
    import torch

    case: Case = settings.case
    return {
        "case": case.id,
        "config": settings.config.id,
        "torch_version": torch.__version__,
        **{name: getattr(settings, name) for name in SAME},
    }


def measured(processes, settings, most: int, limit_bytes: int | None) -> dict[str, Any]:
    """Search by trials, then time the largest batch and the one of `START` rows. One that fitted and does not fit twice, or
    over more steps, is none: the next smaller that was tried and fitted takes its place."""

    def shown(batch: int, *, timed: bool) -> BatchTrial:
        trial = processes.trial(settings(batch), timed=timed)
        show_trial(trial)
        return trial

    @cache
    def try_batch(batch: int) -> BatchTrial:
        return shown(batch, timed=batch == START)

    first = try_batch(min(START, most))
    if first.status in ("unsupported", "error"):
        return verdict(Found(None, first.batch, (first,)), most) | {"status": first.status}
    found = search(try_batch, start=first.batch, most=most, limit_bytes=limit_bytes)
    trials, largest, fails = {t.batch: t for t in found.trials}, None, found.fails
    for batch in sorted((t.batch for t in found.trials if t.fits), reverse=True):
        if trials[batch].tokens_per_s is None:
            trials[batch] = shown(batch, timed=True)
        if trials[batch].fits:
            largest = batch
            break
        fails = batch
    return verdict(Found(largest, fails, tuple(trials.values())), most)


def verdict(found: Found, most: int) -> dict[str, Any]:
    """The row's findings."""
    trials = {trial.batch: trial for trial in found.trials}
    best, small, beyond = trials.get(found.largest), trials.get(START), trials.get(found.fails)
    small = small if small is not None and small.fits else None
    rates = ("step_s", "tokens_per_s", "peak_bytes", "real_tokens_per_s")
    return {
        **found_rows(found, most),
        "trials": len(trials),
        "limited_by": None if beyond is None else f"{beyond.status}: {beyond.why}",
        "timed_steps": best.timed_steps if best else 0,
        **{name: best and getattr(best, name) for name in rates},
        "at_32": small and {name: getattr(small, name) for name in rates},
    }


def found_rows(found: Found, most: int) -> dict[str, Any]:
    """Where the limit is. ``within_rows``: how far it may lie beyond what fits."""
    return {
        "status": "none_fits" if found.largest is None else "at_least" if found.fails is None else "found",
        "largest_batch": found.largest,
        "next_batch_fails": found.fails,
        "most": most,
        "within_rows": None if found.largest is None or found.fails is None else found.fails - found.largest,
    }


def in_the_model(settings, most: int, limit_bytes: int, out: Path) -> dict[str, Any]:
    """The same search in the memory model of ``case --dry-run``. No speed: none was measured."""
    from harness.estimate import estimate

    @cache
    def try_batch(batch: int) -> BatchTrial:
        found = estimate(settings(batch), out)
        if found["memory"] is None:
            return BatchTrial(batch, "unsupported", found["unsupported"] or found["not_estimated"])
        peak = found["memory"]["peak_bytes"]
        return BatchTrial(batch, "fits" if peak <= limit_bytes else "oom", peak_bytes=peak)

    first = try_batch(min(START, most))
    if first.status == "unsupported":
        return {"status": "unsupported", "largest_batch": None, "limited_by": first.why, "dry_run": True}
    found = search(try_batch, start=first.batch, most=most, limit_bytes=limit_bytes)
    peaks, fails = {t.batch: t.peak_bytes for t in found.trials}, found.fails
    over = None if fails is None else f"the memory model: {peaks[fails] / 1e9:.1f} GB of {limit_bytes / 1e9:.1f}"
    measured = {"peak_bytes": peaks.get(found.largest), "limited_by": over, "trials": len(found.trials)}
    return found_rows(found, most) | measured | {"dry_run": True}


def costs(row: dict[str, Any], price_per_hour: float | None) -> dict[str, Any]:
    """What 10^9 real tokens cost at the largest batch and at 32, in the price's own currency; null without both."""

    def cost(rate: float | None) -> float | None:
        return None if price_per_hour is None or not rate else price_per_hour / 3600 * 1e9 / rate

    return {
        "price_per_hour": price_per_hour,
        "cost_per_1e9_real_tokens": cost(row.get("real_tokens_per_s")),
        "cost_per_1e9_real_tokens_at_32": cost((row.get("at_32") or {}).get("real_tokens_per_s")),
    }


def kept(out: Path, settings: RunSettings, limit: int | None) -> dict[str, Any] | None:
    """The row of an earlier call about the same thing; one that ended in an error is measured again."""
    wanted = identity(settings) | {"memory_limit_bytes": limit}
    same = (row for row in read_rows(out) if all(row.get(name) == value for name, value in wanted.items()))
    return next((row for row in same if row.get("status") != "error"), None)


def keep(out: Path, row: dict[str, Any]) -> None:
    """Put a row into fit.json, in place of the one about the same thing."""
    with locked(out / LOCK):
        about = ("case", "config", "seq_len", "preset", "data", "weights", "memory_limit_bytes")
        rows = [r for r in read_rows(out) if any(r.get(name) != row[name] for name in about)]
        text = json.dumps({"schema": SCHEMA, "rows": [*rows, row]}, indent=1, allow_nan=False)
        replace(out / NAME, text.encode() + b"\n")


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of fit.json; none where there is no such file."""
    try:
        return json_object(read_plain(out / NAME))["rows"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        print(f"{out / NAME} is damaged, and is written anew", file=sys.stderr)
        return []


def show_trial(found: BatchTrial) -> None:
    """A trial is over."""
    line = f"  {count(found.batch, 'row'):>11}: {found.status}"
    if found.peak_bytes is not None:
        line += f", {found.peak_bytes / 1e9:.1f} GB"
    if found.tokens_per_s is not None:
        line += f", {found.tokens_per_s:,.0f} tokens/s"
    print(line + (f" ({found.why})" if found.why else ""), file=sys.stderr, flush=True)


def largest(found: dict[str, Any]) -> str:
    """The answer, for people."""
    if found["status"] in ("unsupported", "error"):
        return f"{found['status']} ({found['limited_by']})"
    if found["status"] == "none_fits":
        return "not even one row fits"
    return f"{'at least ' if found['status'] == 'at_least' else ''}{count(found['largest_batch'], 'row')}"


def table(case: str, rows: list[dict[str, Any]], price_per_hour: float | None) -> None:
    """All configurations side by side, within 80 columns; what was not measured is a dash."""
    names, prices = ("peak_bytes", "tokens_per_s", "real_tokens_per_s"), ()
    heads = ["peak\nGB", "tokens\nk/s", "real\nk/s", "real k/s\nat 32"]
    if price_per_hour is not None:
        prices = ("cost_per_1e9_real_tokens", "cost_per_1e9_real_tokens_at_32")
        heads += ["cost\n/10^9", "cost\nat 32"]
    heads = ["configuration", "rows\nthat fit", *heads]
    drawn = plain_table(*heads, right=heads[1:], title=f"{case}: the largest batch that fits, in one forward pass")
    for found in rows:
        values = [*(found.get(name) for name in names), (found.get("at_32") or {}).get("real_tokens_per_s")]
        cells = [_number(value, unit) for value, unit in zip(values, (1e9, 1e3, 1e3, 1e3), strict=True)]
        cells += [_number(found[name], 1, 2) for name in prices]
        drawn.add_row(found["config"], rows_shown(found), *cells)
    console = rich_console(stderr=True, markup=False)
    console.print(drawn)
    console.print("; ".join(legend(rows, price_per_hour)), style="dim")
    for reason in sorted({f"{found['config']}: {found['limited_by']}" for found in rows if found.get("limited_by")}):
        console.print(reason, soft_wrap=True)


def rows_shown(found: dict[str, Any]) -> str:
    """The largest batch, as far as it is known."""
    largest, within = found["largest_batch"], found.get("within_rows")
    if not largest:
        return found["status"].replace("_", " ")
    if found["status"] == "at_least":
        return f"≥ {largest}"
    return f"{largest}–{largest + within - 1}" if within and within > 1 else str(largest)


def legend(rows: list[dict[str, Any]], price_per_hour: float | None) -> list[str]:
    """What the heads, and a range of rows, mean."""
    parts = ["k/s: thousand tokens a second", "real: without padding", "at 32: with 32 rows"]
    if price_per_hour is not None:
        parts.append("cost: of 10^9 real tokens")
    between = next((found for found in rows if "–" in rows_shown(found)), None)
    if between is not None:
        largest = between["largest_batch"]
        parts.append(f"{rows_shown(between)}: {largest} rows fit, {largest + between['within_rows']} do not")
    return parts


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"
