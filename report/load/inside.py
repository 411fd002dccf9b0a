"""What is read from a results folder must lie in it: links are not followed, pipes and devices not opened."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from report.load.defect import Defect, defect


def link_on_the_way(path: Path, name: str) -> list[Defect]:
    """A defect when ``path``, which is ``name`` seen from the results folder, is a link, lies behind one, or is
    a pipe or a device."""
    depth = len(PurePosixPath(name).parts)
    for place in (path, *path.parents[: depth - 1]):
        if place.is_symlink():
            return [defect(name, None, f"{place.name!r} is a link, and links in a results folder are not followed: left out")]
    if path.exists() and not path.is_file() and not path.is_dir():
        return [defect(name, None, "is no plain file: left out")]
    return []
