"""``python -m harness campaign``: begin one, continue one, or (``--dry-run``) print what one would do."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS, lookup
from harness.campaign import pack as packing
from harness.campaign import terminal
from harness.campaign.call import Call, CampaignState, only_call
from harness.campaign.plan import START_S, Cost, Variant, calibrated, make_plan, order, representatives, spread
from harness.campaign.stages import CALIBRATION, SHARES, kept_for_fit_s
from harness.exit_codes import OK
from harness.options import CAMPAIGN_SETTINGS
from harness.run.signals import Stop
from harness.settings import Request, choose_data, choose_preset
from instrument.results.folder import OutputError, finished_runs, require_writable

ASKED = (*CAMPAIGN_SETTINGS, "cases", "configs", "seeds", "ops", "pairs", "skip", "price_per_hour")
OPTIONAL = {
    "bitsandbytes": "configuration amp_bf16_8bit is unsupported",
    "datasets": "--data hub does not work",
    "weasyprint": "no PDF, HTML only",
    "adjustText": "labels of figure B are not moved apart",
}
CONTROL = "gpt2_clm@512"


def campaign_command(options: argparse.Namespace) -> int:
    """Continue the campaign of a results folder, or begin one. Exit code 75 while something is left to do."""
    began_s = time.monotonic()
    asked = {name: getattr(options, name) for name in ASKED}
    machine = find_machine(asked, estimates=options.dry_run)
    results = options.results or Path("results") / machine["slug"]
    out = options.out or Path("dossiers") / machine["slug"]
    require_ours(out)
    total_minutes = options.total_minutes or options.minutes
    if options.dry_run:
        return dry_run(asked, machine, 60 * total_minutes, results, as_json=options.json)
    require_writable(results)
    with only_call(results):
        if packing.unpack(out, results):
            print(f"continues from {out}", file=sys.stderr)
        state = CampaignState.open(results, asked, total_minutes)
        if state.asked != asked:  # what a later call leaves out is what the first one said
            machine = find_machine(state.asked, estimates=False)
        state.content["machine"] = machine
        with Stop(patient=True).listening() as stop:
            call = Call(state, machine, results, out, began_s + 60 * options.minutes, stop, retry=options.retry_failed)
            code = call.run(began_s)
    if options.json:
        print(json.dumps(state.content))
    return code


def require_ours(out: Path) -> None:
    """Raise `OutputError` where a pack would replace what is no pack."""
    theirs = not out.is_dir() or (any(out.iterdir()) and not (out / packing.CAMPAIGN).exists())
    if out.is_symlink() or (out.exists() and theirs):
        raise OutputError(
            f"{out} holds something that no campaign wrote, and a campaign replaces its --out as a whole; give another folder"
        )


def dry_run(asked: dict[str, Any], machine: dict[str, Any], total_s: float, results: Path, *, as_json: bool) -> int:
    """The plan, from a calibration that is done or from estimates. Writes nothing."""
    labels, configs = machine["labels"], machine["configs"]
    estimated = {
        (row["label"], row["config"]): Cost(row["fixed_s"], row["step_s"], "estimated", peak_allocated_bytes=row["peak_bytes"])
        for row in machine["estimates"]
        if row["step_s"] is not None
    }
    costs = spread(estimated | calibrated(finished_runs(results / CALIBRATION), labels), labels, configs)
    before = sum(share for group, share in SHARES.items() if group not in (*(asked["skip"] or ()), "fit"))
    plan = make_plan(
        costs,
        labels,
        configs,
        budget_s=(1 - before) * total_s - kept_for_fit_s(asked, total_s),
        preset_steps=machine["preset_steps"],
        preset_seeds=machine["preset_seeds"],
        max_steps=asked["max_steps"],
        seeds=asked["seeds"],
    )
    terminal.show_machine(machine, results)
    terminal.show_plan(plan, costs, configs, labels)
    if as_json:
        print(json.dumps({"machine": machine, "plan": asdict(plan)}))
    return OK


def find_machine(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """What `probe` finds out, in a process of its own: the campaign's never touches the GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(probe, asked, estimates=estimates).result()


def probe(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """The device, its slug, the preset's sizes, the variants and configurations in order, and what is missing here. Raises what
    is wrong with the options, the data or the machine: now, and not in an hour."""
    from harness.planning import choose_device, plan_run
    from instrument.environment import capture, device_slug

    device = choose_device(asked["device"] or "auto")
    preset = PRESETS[choose_preset(asked["preset"] or "auto", device.type)]
    given = {name: asked[name] for name in CAMPAIGN_SETTINGS if asked[name] is not None and name != "max_steps"}
    configs = asked["configs"] or [config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix]
    declared = {name: lookup("dtype configuration", name, DTYPE_CONFIGS) for name in configs}
    _require_datasets(choose_data(asked["data"], preset.id))
    labels = asked["cases"] or [case.id for case in CASES.values() if case.in_default_matrix]
    if not asked["cases"] and preset.id == "full" and asked["seq_len"] is None:
        labels = [*labels, CONTROL]
    labels = order(labels)

    def draft(label: str, config: str):
        variant = Variant.parse(label)
        request = Request(**given) if variant.seq_len is None else replace(Request(**given), seq_len=variant.seq_len)
        return plan_run(lookup("case", variant.case, CASES), declared[config], 0, request, device)

    drafts = [draft(label, configs[0]) for label in labels]
    for settings in drafts:
        _fetch(settings)
    found = {
        "device": device.type,
        "slug": device_slug(device),
        "preset": preset.id,
        "preset_steps": preset.max_steps,
        "preset_seeds": list(preset.seeds) if len(preset.seeds) > 1 else [0, 1, 2],
        "labels": labels,
        "configs": configs,
        "data": drafts[0].data,
        "weights": drafts[0].weights,
        "environment": capture(device),
        "missing": {name: cost for name, cost in OPTIONAL.items() if find_spec(name) is None},
    }
    if estimates:
        pairs = [(label, config) for label in labels for config in representatives(configs)]
        found["estimates"] = [_estimate(label, config, draft(label, config)) for label, config in pairs]
    return found


def _fetch(settings) -> None:
    """What comes from the hub is fetched before anything else: a hub that does not answer ends the campaign in its first
    minute, with the ways out. Files are read by the runs."""
    from bench_cases.models import build_model
    from harness.run.execute import load_run_data, model_request

    if settings.data.startswith("hub"):
        data = load_run_data(settings)
        if settings.weights != "scratch":
            build_model(model_request(settings, data))


def _require_datasets(data: str) -> None:
    """Raise `DataUnavailable` where the hub is asked for without its library."""
    from bench_cases.data.documents import DataUnavailable
    from bench_cases.data.hub import WAYS_OUT

    if data.startswith("hub") and find_spec("datasets") is None:
        raise DataUnavailable(f"--data {data} needs the package datasets, which is not installed; {WAYS_OUT}")


def _estimate(label: str, config: str, settings) -> dict[str, Any]:
    """As `case --dry-run` estimates it; null seconds where it cannot."""
    from harness.estimate import estimate

    found = estimate(settings, Path("results"))
    time_s, memory = found["time"] or {}, found["memory"] or {}
    return {
        "label": label,
        "config": config,
        "step_s": time_s.get("step_s"),
        "fixed_s": START_S + time_s["evaluation_s"] if time_s.get("step_s") is not None else None,
        "peak_bytes": memory.get("peak_bytes"),
        "why_not": found["unsupported"] or found["not_estimated"],
    }
