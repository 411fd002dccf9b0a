"""What machine this is and whether the campaign can be run on it at all, found out in a process of its own: the campaign's
own process never touches the GPU.

    python -m harness.campaign.probe '{"preset": null, "data": "DIR", ...}'
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import Any

from harness.campaign.calibration import START_S, representatives
from harness.campaign.plan import Variant, order

OPTIONAL = {
    "bitsandbytes": "configuration amp_bf16_8bit is unsupported",
    "datasets": "--data hub does not work",
    "weasyprint": "no PDF, HTML only",
    "adjustText": "labels of figure B are not moved apart",
}
CONTROL = "gpt2_clm@512"
SIZES = (
    "preset",
    "device",
    "data",
    "weights",
    "batch_size",
    "micro_batch",
    "seq_len",
    "documents",
    "validation_documents",
    "threads",
)


def main(argv: list[str]) -> int:
    """One JSON object on standard output; errors of the options, the data or the machine are one line and the exit code that
    every command gives them."""
    from harness.exit_codes import exit_code_of, message_of

    asked = json.loads(argv[0])
    try:
        print(json.dumps(probe(asked, estimates="--estimate" in argv)))
        return 0
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        print(f"harness: {message_of(error)}", file=sys.stderr)
        return code


def probe(asked: dict[str, Any], *, estimates: bool) -> dict[str, Any]:
    """The device, its slug, the preset's sizes, the variants and configurations in order, and what is missing here."""
    from bench_cases import DTYPE_CONFIGS, PRESETS, lookup
    from harness.planning import choose_device, plan_run
    from harness.settings import Request, choose_data, choose_preset
    from instrument.environment import capture, device_slug

    device = choose_device(asked["device"] or "auto")
    preset = PRESETS[choose_preset(asked["preset"] or "auto", device.type)]
    request = Request(**{name: asked[name] for name in SIZES if asked[name] is not None})
    configs = asked["configs"] or [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix]
    declared = [lookup("dtype configuration", name, DTYPE_CONFIGS) for name in configs]
    _require_datasets(choose_data(asked["data"], preset.id))
    labels, drafts = _labels(asked, preset.id), {}
    for label in labels:  # their data and sizes are refused now, and not in an hour
        drafts[label] = plan_run(_case(label), declared[0], 0, _sized(request, label), device)
        _fetch(drafts[label])
    found = {
        "device": device.type,
        "slug": device_slug(device),
        "preset": preset.id,
        "preset_steps": preset.max_steps,
        "preset_seeds": list(preset.seeds) if len(preset.seeds) > 1 else [0, 1, 2],
        "labels": labels,
        "configs": configs,
        "data": drafts[labels[0]].data,
        "weights": drafts[labels[0]].weights,
        "environment": capture(device),
        "missing": {name: cost for name, cost in OPTIONAL.items() if find_spec(name) is None},
    }
    if estimates:
        found["estimates"] = [
            _estimate(label, config, plan_run(_case(label), DTYPE_CONFIGS[config], 0, _sized(request, label), device))
            for label in labels
            for config in representatives(configs)
        ]
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
    """Raise `DataUnavailable` where the hub is asked for without its library: now, and not in the calibration."""
    from bench_cases.data.documents import DataUnavailable
    from bench_cases.data.hub import WAYS_OUT

    if data.startswith("hub") and find_spec("datasets") is None:
        raise DataUnavailable(f"--data {data} needs the package datasets, which is not installed; {WAYS_OUT}")


def _labels(asked: dict[str, Any], preset: str) -> list[str]:
    from bench_cases import CASES

    labels = asked["cases"] or [case.id for case in CASES.values() if case.in_default_matrix]
    if not asked["cases"] and preset == "full" and asked["seq_len"] is None:
        labels = [*labels, CONTROL]
    return order(labels)


def _case(label: str):
    from bench_cases import CASES, lookup

    return lookup("case", Variant.parse(label).case, CASES)


def _sized(request, label: str):
    from dataclasses import replace

    seq_len = Variant.parse(label).seq_len
    return request if seq_len is None else replace(request, seq_len=seq_len)


def _estimate(label: str, config: str, settings) -> dict[str, Any]:
    """As `case --dry-run` estimates it; null seconds where it cannot."""
    from pathlib import Path

    from harness.estimate.command import estimate

    found = estimate(settings, Path("results"))
    time, memory = found["time"] or {}, found["memory"] or {}
    known = time.get("step_s") is not None
    return {
        "label": label,
        "config": config,
        "step_s": time.get("step_s"),
        "fixed_s": START_S + time["evaluation_s"] if known else None,
        "peak_bytes": memory.get("peak_bytes"),
        "why_not": found["unsupported"] or found["not_estimated"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
