"""How things are measured. Importing this package imports no torch (the report reads records).

from instrument import Watch
"""


def __getattr__(name: str):
    if name not in ("Watch", "NonfiniteError"):
        raise AttributeError(f"module 'instrument' has no attribute {name!r}")
    from instrument.watch import watch

    return getattr(watch, name)
