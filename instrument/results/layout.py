"""Where everything lies in a results folder, which records its logs hold, and which run a name means.

``out`` is the results folder of one device throughout::

    results.jsonl  machine.json  kernels.json  overhead.json  fit.json  kernel_check.json  predictions/<case>.json
    training_logs/run_<run_id>.jsonl
    runs/<run_id>/  run.json  evaluations.jsonl  events.jsonl  activations.jsonl  hardware.jsonl
                    forensics.json  culprit.safetensors  snapshot/  checkpoint-<step>/  weights.safetensors
                    output.log  .claim
    traces/<run_id>.json.gz  traces/<run_id>-step<step>.json.gz

A packed campaign has the logs gzipped (``.jsonl.gz``), which `instrument.results.lines` reads as well. Torch-free; nothing
here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from instrument.results.measurements import HardwareRecord, ModuleRecord
from instrument.results.schemas import EvaluationRecord, EventRecord, Record, StepRecord

DEFAULT_RESULTS = Path("results")
RUNS, STEP_LOGS, TRACES = "runs", "training_logs", "traces"
INDEX, INDEX_LOCK, MACHINE = "results.jsonl", ".index.lock", "machine.json"
SIDE_FILES = (MACHINE, "kernels.json", "overhead.json")
"""Of the device and not of a run: one JSON object each."""
LOGS: dict[str, type[Record]] = {
    "steps": StepRecord,
    "evaluations": EvaluationRecord,
    "events": EventRecord,
    "hardware": HardwareRecord,
    "activations": ModuleRecord,
}
"""A run's logs, and the kind of record in every line."""
PINNED_LOGS = ("steps", "evaluations", "events", "activations")
"""Those that a run continues when it resumes from a checkpoint, which knows their sizes."""
MOST_NAMES = 4


class RunNotFound(Exception):
    """A name that is no run, or the beginning of several."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run, whether they are there or not."""

    out: Path
    run_id: str

    @property
    def path(self) -> Path:
        return self.out / RUNS / self.run_id

    @property
    def row(self) -> Path:
        """The terminal row, a `RunRecord`: written last, so that a run without it has not ended."""
        return self.path / "run.json"

    @property
    def forensics(self) -> Path:
        """What the replay of a failure found, a `ForensicsRecord`."""
        return self.path / "forensics.json"

    @property
    def culprit(self) -> Path:
        """What the failing op read, as safetensors."""
        return self.path / "culprit.safetensors"

    @property
    def weights(self) -> Path:
        """The final weights of a completed run, by parameter name; with ``--keep-weights``."""
        return self.path / "weights.safetensors"

    @property
    def snapshot(self) -> Path:
        """The folder with the state from before the failed step."""
        return self.path / "snapshot"

    @property
    def output(self) -> Path:
        return self.path / "output.log"

    def log(self, name: str) -> Path:
        """One of `LOGS`."""
        return self.out / STEP_LOGS / f"run_{self.run_id}.jsonl" if name == "steps" else self.path / f"{name}.jsonl"

    def trace(self, step: int | None = None) -> Path:
        """The trace of the run's window, or of the replay of a failed ``step``."""
        return self.out / TRACES / (f"{self.run_id}.json.gz" if step is None else f"{self.run_id}-step{step}.json.gz")

    def name(self, path: Path) -> str:
        """A file's name seen from the results folder."""
        return path.relative_to(self.out).as_posix()


def runs_of(out: Path) -> Iterator[RunFiles]:
    """The runs with a terminal row, by run id."""
    for path in sorted((out / RUNS).glob("*/run.json")):
        yield RunFiles(out, path.parent.name)


def locate(name: str, out: Path | None) -> RunFiles:
    """The run that ``name`` means; without ``out``, in any folder of ``results/``. Raises `RunNotFound`."""
    if "/" in name or (name and Path(name).resolve().parent.name == RUNS and Path(name).is_dir()):
        return _by_path(Path(name))
    folders = [out] if out is not None else sorted(path.parent for path in DEFAULT_RESULTS.glob(f"*/{RUNS}"))
    places = [path for folder in folders for path in sorted((folder / RUNS).glob("*"))]
    runs = [RunFiles(path.parents[1], path.name) for path in places if path.is_dir() and not path.is_symlink()]
    where = str(out) if out is not None else f"{DEFAULT_RESULTS}/*"
    if not runs:
        raise RunNotFound(f"no runs in {where}; --out names the results folder that holds runs/")
    found = [run for run in runs if run.run_id == name] or [run for run in runs if name and run.run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunNotFound(f"no run {name!r} in {where}; {_near(name, [run.run_id for run in runs])}")
    if len({run.run_id for run in found}) == 1:
        several = _some([str(run.out) for run in found])
        raise RunNotFound(f"{name!r} is in several results folders: {several}; choose with --out")
    raise RunNotFound(f"{name!r} begins {len(found)} runs in {where}: {_some([run.run_id for run in found])}; give more of it")


def _by_path(path: Path) -> RunFiles:
    folder = (path.parent if path.is_file() else path).resolve()
    if not folder.is_dir():
        raise RunNotFound(f"{path} is no folder; a run's folder is RESULTS/runs/RUN_ID")
    if folder.parent.name != RUNS:
        raise RunNotFound(f"{path} is not a run's folder, which is RESULTS/runs/RUN_ID; --out names a results folder")
    return RunFiles(folder.parent.parent, folder.name)


def _near(name: str, ids: list[str]) -> str:
    near = [i for i in ids if name and name in i] or get_close_matches(name, ids, n=MOST_NAMES, cutoff=0.3)
    return f"near: {_some(near)}" if near else f"there {'is' if len(ids) == 1 else 'are'} {_some(ids)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
