"""An interrupted run is started again: what must hold then, and behind a repair."""

from __future__ import annotations

from pathlib import Path

from harness.exit_codes import OK
from harness.settings import RunSettings
from instrument.results.files import TEMPORARY
from instrument.results.repair import Repair, repair_folder
from tests.soak.reliability import same_run
from tests.soak.reliability.processes import Ended, run


def left_alone(settings: RunSettings, folder: Path) -> Path:
    """The results folder of the run that nothing happens to; raises RuntimeError where that fails, since there is then
    nothing to compare with."""
    whole = folder / f"whole-{settings.config.id}"
    if not whole.exists():
        completed(run(settings, whole))
    return whole


def completed(ended: Ended) -> Ended:
    """A run that must have completed."""
    if ended.exit_code != OK:
        raise RuntimeError(f"a run that nothing happened to ended with exit code {ended.exit_code}: {ended.heard[-2000:]}")
    return ended


def goes_on(settings: RunSettings, out: Path, whole: Path, parts: list[Ended]) -> list[str]:
    """Give an interrupted run's command again and let it end; what is wrong then."""
    last = run(settings, out)
    if last.exit_code != OK:
        return [f"did not go on: exit code {last.exit_code}, {last.sentence}"]
    return finished_well(settings, out, whole, [*parts, last])


def finished_well(settings: RunSettings, out: Path, whole: Path, parts: list[Ended]) -> list[str]:
    """What is wrong with a run that has ended, its last part included: it equals the one that nothing happened to, holds
    every acknowledged row, has one terminal record, and nothing is left but what a repair sweeps away."""
    losses = same_run.differences(settings.run_id, out, whole) + same_run.lost_rows(parts, settings.run_id, out)
    losses += same_run.terminal_records(settings.run_id, out) + repaired(out, only_sweeps=True)
    return losses + same_run.left_over(out)


def repaired(out: Path, *, only_sweeps: bool = False) -> list[str]:
    """Repair a folder, twice; what is wrong: something lost, a second repair that finds work, and with ``only_sweeps`` a
    first one that does more than remove what dead writers left."""
    first, losses = repaired_twice(out)
    losses += [
        f"repair: {state.file} lost {state.lost}, foreign {state.foreign}"
        for state in first.files
        if state.lost or state.foreign
    ]
    more = [name for name in first.changed if not name.endswith(TEMPORARY)]
    return losses + ([f"left something to mend: {more}"] if only_sweeps and more else [])


def repaired_twice(out: Path) -> tuple[Repair, list[str]]:
    """What a repair did, and whether a second one found something to do, too."""
    first = repair_folder(out)
    after = contents(out)
    second = repair_folder(out)
    return first, [f"repair is not idempotent: {second.changed}"] if second.changed or contents(out) != after else []


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
