"""Loading something of `transformers` from a folder or the hub, with one clear line when it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS_OUT = "use --weights scratch, or --weights DIR with config.json and model.safetensors"


class WeightsUnavailable(Exception):
    """A model that cannot be reached or read; the message says what to do."""


def reach(load: Callable[[], Any], source: str, ways_out: str = WAYS_OUT) -> Any:
    """``load()``, whose source is a folder or a hub id; raises `WeightsUnavailable`.

    The hub is asked one quick question first: the library itself would retry for minutes.
    """
    from bench_cases.data import hub
    from bench_cases.data.documents import DataError, DataUnavailable

    if not Path(source).is_dir():
        if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
            raise WeightsUnavailable(f"no folder {source!r} with a model; {ways_out}")
        try:
            hub.commit_of("model", source, "main")
        except (DataError, DataUnavailable) as error:
            cause = first_line(error.__cause__ or error)
            raise WeightsUnavailable(
                f"there is no folder {source!r} here, and the hub gives no model of that name ({cause}); {ways_out}"
            ) from error
    try:
        return load()
    except Exception as error:  # OS, value, JSON and safetensors errors alike mean: not to be had
        raise WeightsUnavailable(f"model {source!r} cannot be loaded ({first_line(error)}); {ways_out}") from error


def first_line(error: BaseException) -> str:
    """Kind and first line of a library's message, for messages of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__
