"""A disk that fills up, a folder that cannot be written, a folder that goes away: exit code 5, one sentence, earlier lines
intact, and the same command resumes when that is put right.
"""

from __future__ import annotations

import math
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.exit_codes import ENVIRONMENT, OK
from harness.settings import RunSettings
from instrument.results.folder import finished_run, log_paths
from tests.soak.reliability import same_run
from tests.soak.reliability.processes import ProcessResult, asked_to_stop, run, small
from tests.soak.reliability.same_run import contents, finished_well, left_alone, resumes_well
from tests.soak.reliability.trials import Trial, share_of

FULL, GONE = 20, 12
SMALLEST_BYTES, PAGE_BYTES = 300, 4096


def full(share: float, folder: Path) -> Iterator[Trial]:
    """A limit on every file's size, and where this process may mount one a small disk of its own (tmpfs), in turn; of a run
    that writes checkpoints, which fill it first, and of one that does not. Then there is room again."""
    rng, mounts, out = random.Random(8), can_mount(folder), folder / "out"
    storing, plain = _settings(), replace(_settings(), checkpoint_every=0)
    whole = left_alone(plain, folder)
    run(storing, folder / "half", then=(storing.max_steps // 2, asked_to_stop))
    for number in range(share_of(FULL, share)):
        settings, measured = ((storing, folder / "half"), (plain, whole))[number // 2 % 2]
        sizes = [path.stat().st_size for path in measured.rglob("*") if path.is_file()]
        checkpoints = f"{'with' if settings is storing else 'without'} checkpoints"
        if mounts and number % 2:
            size_bytes = PAGE_BYTES * (_up_to(sum(sizes), rng) // PAGE_BYTES + 1)
            with disk(folder / "disk", size_bytes) as (place, resize):
                yield _full(
                    f"a disk of {size_bytes:,} bytes, {checkpoints}",
                    settings,
                    place / "out",
                    whole,
                    room=partial(resize, 1 << 28),
                )
        else:
            size_bytes = _up_to(max(sizes), rng)
            yield _full(
                f"files of {size_bytes:,} bytes at most, {checkpoints}",
                settings,
                out,
                whole,
                prepare=partial(limit_files, size_bytes),
            )
            shutil.rmtree(out)


def _up_to(most_bytes: int, rng: random.Random) -> int:
    """A random size, as likely small as large."""
    return round(math.exp(rng.uniform(math.log(SMALLEST_BYTES), math.log(most_bytes))))


def read_only(share: float, folder: Path) -> Iterator[Trial]:
    """A folder on a disk that is mounted read-only (for a user who may not mount: one without the permission), empty,
    missing, and with a run that was stopped."""
    settings = _settings()
    whole = left_alone(settings, folder)
    for state in ("empty", "missing", "with a run that was stopped")[: share_of(3, share)]:
        with _protected(folder / "disk") as (place, protect, allow):
            out, before = place / "out", []
            if state == "empty":
                out.mkdir()
            elif state != "missing":
                before.append(run(settings, out, then=(3, asked_to_stop)))
            held = contents(place)
            protect()
            part = run(settings, out)
            losses = _ended_well(settings, out, part) + ([] if contents(place) == held else ["its files have changed"])
            losses += same_run.lost_rows(before, settings.run_id, out) if before else []
            allow()
            yield Trial(f"read-only, {state}", losses + resumes_well(settings, out, whole, before))


def disappearing(share: float, folder: Path) -> Iterator[Trial]:
    """The folder is renamed or removed after a random step, or the run's log is: nothing is made again in its place; put
    back, the run resumes."""
    settings, out, away, rng = _settings(), folder / "out", folder / "away", random.Random(9)
    whole = left_alone(settings, folder)

    remove = {
        "renamed": partial(out.rename, away),
        "removed": partial(out.rename, away),
        "its log removed": (out / log_paths(settings.run_id)["steps"]).unlink,
    }
    for number in range(share_of(GONE, share)):
        what, after = list(remove)[number % 3], rng.randint(1, settings.max_steps)
        part = run(settings, out, then=(after, remove[what]))
        losses = _ended_well(settings, away if away.exists() else out, part, logs_there=what == "renamed")
        losses += ["the folder was made again"] if away.exists() and out.exists() else []
        if what == "renamed":
            shutil.rmtree(out, ignore_errors=True)
            away.rename(out)
        elif what == "removed":
            shutil.rmtree(away)
        losses += resumes_well(settings, out, whole, [part] if what == "renamed" else [])
        shutil.rmtree(out)
        yield Trial(f"{what} after step {after}", losses, {"acknowledged rows": len(part.acknowledged)})


def _settings() -> RunSettings:
    return small("amp_bf16", max_steps=40, eval_every=10, checkpoint_every=4)


def _full(
    name: str,
    settings: RunSettings,
    out: Path,
    whole: Path,
    room: Callable[[], object] = lambda: None,
    prepare: Callable[[], None] | None = None,
) -> Trial:
    part = run(settings, out, prepare=prepare)
    counts = {"acknowledged rows": len(part.acknowledged), "had room enough": part.exit_code == OK}
    if part.exit_code == OK:
        return Trial(name, finished_well(settings, out, whole, [part]), counts)
    losses = _ended_well(settings, out, part)
    room()
    return Trial(name, losses + resumes_well(settings, out, whole, [part]), counts)


def _ended_well(settings: RunSettings, out: Path, part: ProcessResult, *, logs_there: bool = True) -> list[str]:
    """Exit code 5, one sentence, what was acknowledged is there, and no row says that the run is over."""
    losses = [] if part.exit_code == ENVIRONMENT else [f"exit code {part.exit_code}: {part.sentence}"]
    said = [line for line in part.stderr.splitlines() if line.startswith("harness: ")]
    losses += [] if len(said) == 1 and "Traceback" not in part.stderr else [f"{len(said)} sentences: {part.stderr[-300:]!r}"]
    if logs_there:
        losses += same_run.lost_rows([part], settings.run_id, out)
        losses += ["a torn line"] if same_run.torn_lines(settings.run_id, out) else []
    row = finished_run(out, settings.run_id)
    return losses + ([] if row is None or row.status == "preempted" else [f"its row says {row.status}"])


def limit_files(size_bytes: int) -> None:
    """No file of this process grows beyond that (`EFBIG`: Python ignores the signal)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def can_mount(folder: Path) -> bool:
    """Whether this process may mount file systems."""
    try:
        with disk(folder / "probe", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def disk(place: Path, size_bytes: int) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A file system of its own in memory; and what gives it another size. Raises CalledProcessError where mounting is not
    allowed."""

    def options(words: str) -> None:
        subprocess.run(["mount", "-o", words, "-t", "tmpfs", "tmpfs", str(place)], check=True, capture_output=True)

    place.mkdir(exist_ok=True)
    options(f"size={size_bytes}")
    try:
        yield place, lambda size_bytes: options(f"remount,size={size_bytes}")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)
        place.rmdir()


@contextmanager
def _protected(place: Path) -> Iterator[tuple[Path, Callable[[], object], Callable[[], object]]]:
    """A folder, what takes the right to write there away, and what gives it back."""
    if not can_mount(place.parent):
        place.mkdir()
        yield place, partial(_permit, place, False), partial(_permit, place, True)
        shutil.rmtree(place)
        return
    with disk(place, 1 << 28):

        def mount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True, capture_output=True)

        yield place, partial(mount, "ro"), partial(mount, "rw")


def _permit(place: Path, writing: bool) -> None:
    for path in (place, *place.rglob("*")):
        path.chmod((0o755 if writing else 0o555) if path.is_dir() else (0o644 if writing else 0o444))
