"""A content-addressed folder of built data: a key names what it was built from, never a place.

An entry is a folder that appears in one rename and never changes, with a ``meta.json`` that holds the
size and sha256 of every other file. A reader checks them; a damaged or half-written entry is built again.
Two processes may build the same entry at once: the first rename wins and the other one's work is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench_cases.data.documents import DataError

FORMAT = 1
_STALE_S = 24 * 3600


def root(cache_dir: Path | None = None) -> Path:
    """``cache_dir``, else $DDB_CACHE, else the XDG cache folder's ``datatype-dynamics-bench``."""
    if cache_dir is not None:
        return Path(cache_dir)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DDB_CACHE") or Path(home) / "datatype-dynamics-bench")


def key(identity: dict[str, object]) -> str:
    """sha256 (hex) of what an entry is built from; any field that differs gives another key."""
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path, wanted: str) -> dict | None:
    """The entry's metadata when every file is as it was published, else None."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["key"] != wanted:
            return None
        for name, expected in meta["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
                return None
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def obtain(
    kind: str, identity: dict[str, object], build: Callable[[Path], dict], cache_dir: Path | None = None
) -> tuple[Path, dict]:
    """(folder, metadata) of the entry for ``identity``; ``build(folder)`` fills an empty folder and
    returns what goes under ``data`` in the metadata. Errors of ``build`` pass through and leave nothing."""
    base, wanted = root(cache_dir) / kind, key(identity)
    folder = base / wanted[:32]
    meta = read(folder, wanted)
    if meta is not None:
        return folder, meta
    try:
        base.mkdir(parents=True, exist_ok=True)
        work = base / f".{wanted[:8]}-{uuid.uuid4().hex}"
        work.mkdir()
    except OSError as error:
        raise DataError(
            f"the data cache {base} cannot be written ({error.strerror}); set DDB_CACHE to a folder that can"
        ) from error
    try:
        data = build(work)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(work.iterdir())}
        meta = {"key": wanted, "identity": identity, "data": data, "files": files}
        (work / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True, allow_nan=False), "utf-8")
        for path in work.iterdir():
            _sync(path)
        _publish(work, folder, wanted)
    except OSError as error:
        raise DataError(
            f"writing the data cache {base} failed ({error.strerror}); set DDB_CACHE to a folder with room"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _sweep(base)
    published = read(folder, wanted)
    if published is None:
        raise DataError(f"the cache entry {folder} was damaged while it was written; remove it and try again")
    return folder, published


def _publish(work: Path, folder: Path, wanted: str) -> None:
    if folder.exists() and read(folder, wanted) is None:
        aside = folder.with_name(f"{work.name}-damaged")  # in one step, so that no reader sees it half removed
        with suppress(FileNotFoundError):  # another process was first
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(work, folder)
        _sync(folder.parent)
    except OSError:
        if not folder.exists():
            raise  # else another process was first


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _sweep(base: Path) -> None:
    """Remove what killed builders left more than a day ago."""
    for path in base.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
