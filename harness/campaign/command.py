"""``python -m harness campaign``: begin one, go on with one, or (``--dry-run``) say what one would do."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.campaign import pack as packing
from harness.campaign import terminal
from harness.campaign.book import Book, only_call
from harness.campaign.calibration import calibrated, spread
from harness.campaign.call import Campaign
from harness.campaign.plan import Cost, make_plan
from harness.campaign.stages import SHARES, kept_for_fit_s
from harness.exit_codes import OK
from harness.run.signals import Stop
from instrument.results.folder import OutputError, require_writable

ASKED = (
    "preset",
    "device",
    "data",
    "weights",
    "cases",
    "configs",
    "seeds",
    "max_steps",
    "batch_size",
    "micro_batch",
    "seq_len",
    "documents",
    "validation_documents",
    "threads",
    "ops",
    "pairs",
    "skip",
    "price_per_hour",
)


def campaign_command(options: argparse.Namespace) -> int:
    """Go on with the campaign of a results folder, or begin one. Exit code 75 while something is left to do."""
    began_s = time.monotonic()
    asked = {name: getattr(options, name) for name in ASKED}
    machine, code = find_machine(asked, estimates=False)
    if machine is None:
        return code
    results = options.results or Path("results") / machine["slug"]
    out = options.out or Path("dossiers") / machine["slug"]
    require_ours(out)
    if options.dry_run:
        return dry_run(asked, options, results)
    require_writable(results)
    with only_call(results):
        if packing.unpack(out, results):
            print(f"going on from {out}", file=sys.stderr)
        book = Book.open(results, asked, options.total_minutes or options.minutes)
        if book.asked != asked:  # what a later call leaves out is what the first one said
            machine, code = find_machine(book.asked, estimates=False)
            if machine is None:
                return code
        book.content["machine"] = machine
        with Stop(patient=True).listening() as stop:
            campaign = Campaign(book, machine, results, out, began_s + 60 * options.minutes, stop, retry=options.retry_failed)
            code = campaign.run(began_s)
    if options.json:
        print(json.dumps(book.content))
    return code


def find_machine(asked: dict[str, Any], *, estimates: bool) -> tuple[dict[str, Any] | None, int]:
    """What `harness.campaign.probe` finds out, or None and the exit code (its words are on standard error already)."""
    command = [sys.executable, "-m", "harness.campaign.probe", json.dumps(asked), *(["--estimate"] if estimates else [])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    return (json.loads(done.stdout.splitlines()[-1]), OK) if done.returncode == 0 else (None, done.returncode)


def require_ours(out: Path) -> None:
    """Raise `OutputError` where a pack would replace what is no pack."""
    if (
        out.is_symlink()
        or (out.exists() and not out.is_dir())
        or (out.is_dir() and any(out.iterdir()) and not (out / "campaign.json").exists())
    ):
        raise OutputError(
            f"{out} holds something that no campaign wrote, and a campaign replaces its --out as a whole; give another folder"
        )


def dry_run(asked: dict[str, Any], options: argparse.Namespace, results: Path) -> int:
    """The plan, from a calibration that is done or from estimates. Writes nothing."""
    machine, code = find_machine(asked, estimates=True)
    if machine is None:
        return code
    total_s = 60 * (options.total_minutes or options.minutes)
    known = calibrated(results, machine["labels"])
    for row in machine["estimates"]:
        if (row["label"], row["config"]) not in known and row["step_s"] is not None:
            known[row["label"], row["config"]] = Cost(
                row["fixed_s"], row["step_s"], "estimated", peak_allocated_bytes=row["peak_bytes"]
            )
    before = sum(share for group, share in SHARES.items() if group not in (*(asked["skip"] or ()), "fit"))
    known = spread(known, machine["labels"], machine["configs"])
    plan = make_plan(
        known,
        machine["labels"],
        machine["configs"],
        budget_s=(1 - before) * total_s - kept_for_fit_s(asked, total_s),
        preset_steps=machine["preset_steps"],
        preset_seeds=machine["preset_seeds"],
        max_steps=asked["max_steps"],
        seeds=asked["seeds"],
    )
    terminal.show_machine(machine, results)
    terminal.show_plan(plan, known, machine)
    if options.json:
        print(json.dumps({"machine": machine, "plan": plan.as_row()}))
    return OK
