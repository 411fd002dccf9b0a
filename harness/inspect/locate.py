"""A run by its id, the beginning of it, or a path. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

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
