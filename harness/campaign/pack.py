"""The campaign as it is committed: what the dossier can be built from again, small; and a campaign that continues from it.

Step logs and the like are gzipped, weights and checkpoints are left out, and of the traces one is kept: a replayed overflow.
`report build` reads the packed folder as it reads a results folder.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

from instrument.results.files import copy, make_folder, placing_folder, plain_inside, replacing
from instrument.results.folder import OutputError
from instrument.results.layout import INDEX, SIDE_FILES
from instrument.terminal import count

CAMPAIGN = "campaign.json"
FOLDER = "campaign"  # in the results folder: what stages print, and a results folder for the overflow
LIMIT_BYTES = 15_000_000
PLAIN = (
    *(INDEX, *SIDE_FILES, "kernel_check.json", "fit.json", CAMPAIGN, "summary.json", "predictions/*.json"),
    *(f"{FOLDER}/*.json", f"{FOLDER}/logs/*.log"),
    *("dossier/index.html", "dossier/dossier.pdf"),
    *(f"runs/*/{name}" for name in ("run.json", "forensics.json", "evaluations.jsonl", "events.jsonl")),
)
GZIPPED = ("training_logs/run_*.jsonl", "runs/*/activations.jsonl", "runs/*/hardware.jsonl")
TRACES = (f"{FOLDER}/overflow/traces/*.json.gz", "traces/*-step*.json.gz")
"""One of a replayed failure is kept, the smallest: of the run that was driven into an overflow on purpose, or of any."""
LATER = "runs/*-s[1-9]*-*"
DISPENSABLE = (f"{LATER}/activations*", f"{LATER}/hardware*", "traces/*", "runs/*/activations*", "runs/*/hardware*")
"""Left out, in this order, when the folder would be larger than `LIMIT_BYTES`: later seeds first, since the figures of modules
and hardware show the lowest. What was left out is said."""


class PackTooLarge(Exception):
    """More than may be committed, whatever is left out."""


def require_ours(out: Path) -> None:
    """Raise `OutputError` where a pack would replace what is no pack."""
    ours = not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / CAMPAIGN).exists()))
    if out.is_symlink() or not ours:
        raise OutputError(f"{out} holds something that no campaign wrote, and would be replaced; give another folder")


def pack(results: Path, out: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """Write the committed form of ``results`` as ``out``, in place of what was there, all or nothing. Returns a line that says
    how large it is and what was left out. Raises `PackTooLarge`, and OSError."""
    with placing_folder(out) as folder:
        for pattern in (*PLAIN, *GZIPPED):
            for path in (path for path in sorted(results.glob(pattern)) if plain_inside(results, path)):
                target = folder / path.relative_to(results)
                target.parent.mkdir(parents=True, exist_ok=True)
                if pattern in PLAIN:
                    shutil.copyfile(path, target)
                else:  # the same bytes each time
                    target.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        traces = [path for pattern in TRACES for path in sorted(results.glob(pattern), key=lambda path: path.stat().st_size)]
        for path in [path for path in traces if plain_inside(results, path)][:1]:
            (folder / "traces").mkdir()
            shutil.copyfile(path, folder / "traces" / path.name)
        sizes, left_out = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}, ""
        for pattern in DISPENSABLE:
            if (found := sorted(folder.glob(pattern))) and sum(sizes.values()) > limit_bytes:
                left_out += f"; left out: {pattern} ({sum(sizes.pop(path) for path in found) / 1e6:.1f} MB)"
                for path in found:
                    path.unlink()
        if sum(sizes.values()) > limit_bytes:
            largest = max(sizes, key=sizes.__getitem__)
            why = f"{sum(sizes.values()) / 1e6:.1f} MB, and {limit_bytes / 1e6:.0f} MB are allowed; the largest file is "
            raise PackTooLarge(f"{why}{largest.relative_to(folder)} with {sizes[largest] / 1e6:.1f} MB")
    return f"{count(len(sizes), 'file')}, {sum(sizes.values()) / 1e6:.1f} MB, in {out}{left_out}"


def unpack(packed: Path, results: Path) -> bool:
    """Where ``results`` has no campaign and ``packed`` has one, continue from that; returns whether there was one. A run that
    was stopped after a checkpoint starts over, since weights are not packed."""
    if (results / CAMPAIGN).exists() or not plain_inside(packed, packed / CAMPAIGN):
        return False
    make_folder(results)
    for path in sorted(packed.rglob("*"), key=lambda path: path.name == CAMPAIGN):  # it last: a cut before starts over
        name = path.relative_to(packed)
        if not plain_inside(packed, path) or name.parts[0] == "dossier":
            continue
        if not path.name.endswith(".jsonl.gz"):
            copy(path, results / name)
        else:
            with gzip.open(path, "rb") as zipped, replacing(results / name.with_suffix("")) as plain, plain.open("wb") as file:
                shutil.copyfileobj(zipped, file)
    return True
