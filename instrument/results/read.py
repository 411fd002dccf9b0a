"""What a run left on disk, validated. Every broken file is `RunUnreadable`, with its path and line.

A run by its id, the beginning of it, or a path. Torch-free.

Two finished runs with their logs, and whether they may be compared step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from instrument.results.forensics import ForensicsRecord
from instrument.results.log import read
from instrument.results.schemas import AnyRecord, RecordError, RunRecord, StepRecord, decode
from kernels.float_formats import FLOAT_FORMATS

DEFAULT_RESULTS = Path("results")
MOST_NAMES = 4


class RunNotFound(Exception):
    """A name that is no run, or the beginning of several."""


class RunUnreadable(Exception):
    """A run whose files break their schema."""


@dataclass(frozen=True)
class FoundRun:
    """A run's place: ``out`` is the results folder, ``path`` the run's own folder in it."""

    out: Path
    run_id: str

    @property
    def path(self) -> Path:
        return self.out / "runs" / self.run_id

    @property
    def steps_file(self) -> Path:
        return self.out / "training_logs" / f"run_{self.run_id}.jsonl"


def locate(name: str, out: Path | None) -> FoundRun:
    """The run that ``name`` means; without ``out``, in any folder of ``results/``. Raises `RunNotFound`."""
    if "/" in name or (name and Path(name).resolve().parent.name == "runs" and Path(name).is_dir()):
        return _by_path(Path(name))
    folders = [out] if out is not None else sorted(path.parent for path in DEFAULT_RESULTS.glob("*/runs"))
    runs = [
        FoundRun(folder, path.name)
        for folder in folders
        for path in sorted((folder / "runs").glob("*"))
        if path.is_dir() and not path.is_symlink()
    ]
    where = str(out) if out is not None else f"{DEFAULT_RESULTS}/*"
    if not runs:
        raise RunNotFound(f"no runs in {where}; --out names the results folder that holds runs/")
    found = [run for run in runs if run.run_id == name] or [run for run in runs if name and run.run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RunNotFound(f"no run {name!r} in {where}; {_near(name, [run.run_id for run in runs])}")
    if len({run.run_id for run in found}) == 1:
        folders = _some([str(run.out) for run in found])
        raise RunNotFound(f"{name!r} is in several results folders: {folders}; choose with --out")
    raise RunNotFound(f"{name!r} begins {len(found)} runs in {where}: {_some([run.run_id for run in found])}; give more of it")


def _by_path(path: Path) -> FoundRun:
    folder = (path.parent if path.is_file() else path).resolve()
    if not folder.is_dir():
        raise RunNotFound(f"{path} is no folder; a run's folder is RESULTS/runs/RUN_ID")
    if folder.parent.name != "runs":
        raise RunNotFound(f"{path} is not a run's folder, which is RESULTS/runs/RUN_ID; --out names a results folder")
    return FoundRun(folder.parent.parent, folder.name)


def _near(name: str, ids: list[str]) -> str:
    near = [i for i in ids if name and name in i] or get_close_matches(name, ids, n=MOST_NAMES, cutoff=0.3)
    return f"near: {_some(near)}" if near else f"there {'is' if len(ids) == 1 else 'are'} {_some(ids)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def run_record(run: FoundRun) -> RunRecord | None:
    """The run's terminal row; None when it has not ended."""
    return _one(run.path / "run.json", RunRecord)


def failure_of(run: FoundRun, record: RunRecord | None) -> ForensicsRecord | None:
    """What its replay found; None where there was none, and for what an earlier run of the same id left behind."""
    found = _one(run.path / "forensics.json", ForensicsRecord)
    if found is None or record is None or record.status != "diverged" or found.first_nonfinite.step != record.divergence_step:
        return None
    return found


def records(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """The lines of one of a run's logs; none where there is no such file."""
    try:
        return list(read(path, kind))
    except FileNotFoundError:
        return []
    except RecordError as error:
        raise RunUnreadable(str(error)) from error


def _one(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    if path.is_symlink():
        raise RunUnreadable(f"{path} is a link, and links in a results folder are not followed")
    try:
        return decode(path.read_bytes(), kind)
    except FileNotFoundError:
        return None
    except RecordError as error:
        raise RunUnreadable(f"{path}: {error}") from error


def module_rows(run: FoundRun) -> list:
    """The run's module magnitudes, in windows of steps."""
    from instrument.results.ranges import ModuleRecord

    return records(run.path / "activations.jsonl", ModuleRecord)


SAME_EXPERIMENT = (
    "case",
    "seed",
    "loss_reduction",
    "batch_size",
    "seq_len",
    "n_params",
    "data_source",
    "weights_source",
    "init_sha256",
)
"""Fields of the row that two runs share when their steps are pairs: same start, same batches."""
SAME_BATCHES = ("data_fingerprint", "documents", "bucket_by_length")
"""Settings that decide the batches. ``data_sha256`` is over all of a run's steps: it can only be compared
when both were to run equally many."""
NAMED = ("case", "dtype_config", "seed", "preset", "instrument", "attention_backend", "autocast")


@dataclass(frozen=True)
class Run:
    """One run: its place, its row, its steps by number and its modules' magnitudes in windows."""

    place: FoundRun
    record: RunRecord
    steps: dict[int, StepRecord]
    modules: tuple[Any, ...]

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype in which the run stores weights or computes."""
        config = self.record.config.get("config", {})
        names = {config.get(part) for part in ("weights", "compute", "head", "loss")}
        names |= {"tf32"} if config.get("tf32") else set()
        known = [FLOAT_FORMATS[name].eps for name in names if name in FLOAT_FORMATS]
        if not known:
            raise RunUnreadable(f"{self.place.path / 'run.json'}: its config names no dtype, so rounding cannot be told apart")
        return max(known)

    @property
    def settings(self) -> dict[str, Any]:
        """All that was decided for the run, flat, by dotted name."""
        r = self.record
        named = {name: getattr(r, name) for name in NAMED}
        switches = {key: r.flags.get(key) for key in ("switches", "fp16_products") if key in r.flags}
        decided = named | dict(flat({**r.config, **switches}))
        return {name: value for name, value in decided.items() if name not in ("config.id", "case.id")}  # named already

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the versions, flat."""
        return {"device": self.record.device} | dict(flat(self.record.env))


def load(names: Sequence[str], out: Path | None) -> tuple[Run, Run]:
    """Both runs; raises `RunNotFound` for a name that is none, and for a run that has not ended."""
    first, second = (_load(locate(name, out)) for name in names)
    return first, second


def _load(place: FoundRun) -> Run:
    record = run_record(place)
    if record is None:
        raise RunNotFound(
            f"{place.run_id} has not ended (no {place.path / 'run.json'}): there is nothing to compare yet; "
            f"`inspect` shows how far it is"
        )
    steps = {step.step: step for step in records(place.steps_file, StepRecord)}
    return Run(place, record, steps, tuple(module_rows(place)))


def flat(values: dict[str, Any], prefix: str = "") -> Any:
    """Pairs of dotted name and plain value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Names with different values; absent is None."""
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    return [{"name": name, "a": a.get(name), "b": b.get(name)} for name in names]


def why_not_paired(a: Run, b: Run) -> list[dict[str, Any]]:
    """What keeps the steps of two runs from being pairs; empty when they are. An unknown start is no same start."""
    rows = differences(*({name: getattr(run.record, name) for name in SAME_EXPERIMENT} for run in (a, b)))
    rows += differences(*({name: run.record.config.get(name) for name in SAME_BATCHES} for run in (a, b)))
    if not rows and a.record.max_steps == b.record.max_steps:
        rows = differences(*({"data_sha256": run.record.data_sha256} for run in (a, b)))
    if not rows and a.record.init_sha256 is None:
        rows = [{"name": "init_sha256", "a": None, "b": None}]
    return rows
