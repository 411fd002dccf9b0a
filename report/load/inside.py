"""What is read from a results folder must lie in it: links are not followed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from report.load.defect import Defect, defect


def link_on_the_way(path: Path, name: str) -> list[Defect]:
    """A defect when ``path``, which is ``name`` seen from the results folder, is a link or lies behind one."""
    depth = len(PurePosixPath(name).parts)
    for place in (path, *path.parents[: depth - 1]):
        if place.is_symlink():
            return [defect(name, None, f"{place.name!r} is a link, and links in a results folder are not followed: left out")]
    return []
