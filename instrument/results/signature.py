"""Whether this user made a run: its row is signed with a key that lies in the user's state directory, outside of every results
folder. People exchange results folders; a run id is a hash that anybody can compute, and says nothing about who wrote the row.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from instrument.results.schemas import RunRecord

KEY_BYTES = 32
SIGNED = ("run_id", "case", "scenario", "seed", "instrument", "config")
"""The fields of a row that decide what making the run again loads, and how it is found."""


def key_file() -> Path:
    """``$XDG_STATE_HOME/ddbench/key``, by default under ``~/.local/state``. Raises RuntimeError for a user without a home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "ddbench" / "key"


def signature_of(record: RunRecord) -> str | None:
    """A signature of the row's `SIGNED` fields, for ``flags["signature"]``; None where this user can keep no key."""
    try:
        key = _key() or _new_key()
    except (OSError, RuntimeError):
        return None
    return _signature(record, key) if key else None


def is_own(record: RunRecord) -> bool:
    """Whether this user's key signed the row."""
    try:
        key = _key()
    except (OSError, RuntimeError):
        return False
    signature = record.flags.get("signature")
    return key is not None and hmac.compare_digest(str(signature).encode(), _signature(record, key).encode())


def _signature(record: RunRecord, key: bytes) -> str:
    signed = msgspec.json.decode(msgspec.json.encode({name: getattr(record, name) for name in SIGNED}))
    return hmac.new(key, msgspec.json.encode(signed, order="sorted"), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    try:
        key = key_file().read_bytes()
    except FileNotFoundError:
        return None
    return key if len(key) == KEY_BYTES else None


def _new_key() -> bytes | None:
    """Make the key, readable by this user alone, or take the one that another process made meanwhile."""
    path = key_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent) as new:
        new.write(secrets.token_bytes(KEY_BYTES))
        new.flush()
        with suppress(FileExistsError):
            os.link(new.name, path)
    return _key()
