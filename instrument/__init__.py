"""How things are measured, in the harness and in anybody's loop: ``from instrument import Watch``.

What may live here: the watch and its counters, the replay of a failed step, FLOPs and MFU, memory, clocks and power,
traces, the environment; and `instrument.results`, the one reader and writer of a results folder. Nothing here knows how a
run is executed. Importing this package imports no torch (the report reads records).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instrument.watch.watch import NonfiniteError as NonfiniteError
    from instrument.watch.watch import Watch as Watch


def __getattr__(name: str):
    if name not in ("Watch", "NonfiniteError"):
        raise AttributeError(f"module 'instrument' has no attribute {name!r}")
    from instrument.watch import watch

    return getattr(watch, name)
