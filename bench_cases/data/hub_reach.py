"""One quick question to the hub before a library that would retry for minutes starts."""

from __future__ import annotations

import os

from .errors import DataError, DataUnavailable

WAYS_OUT = "--data embedded needs no network, --data DIR takes a folder with eurlex.jsonl[.gz] and openwebtext.jsonl[.gz]"
_TIMEOUT_S = 10.0


def offline() -> bool:
    """Whether the user told the hub's libraries to stay off the network (they may still have their own cache)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def commit(kind: str, name: str, revision: str) -> str | None:
    """The commit that ``revision`` of a ``dataset`` or ``model`` repository names; None when offline by choice.

    Raises DataError when the hub knows no such repository, DataUnavailable when it does not answer.
    """
    if offline():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        ask = api.dataset_info if kind == "dataset" else api.model_info
        return ask(name, revision=revision, timeout=_TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(f"the hub has no {kind} {name!r} with revision {revision!r}, or it is not public") from error
    except Exception as error:  # httpx, OS and library errors alike mean: no answer
        raise unavailable(name, error) from error


def unavailable(name: str, error: Exception) -> DataUnavailable:
    """The error for ``name``, with the first line of what went wrong and the ways out."""
    lines = str(error).strip().splitlines()
    why = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return DataUnavailable(f"{name!r} cannot be loaded from the hub ({why}); {WAYS_OUT}")
