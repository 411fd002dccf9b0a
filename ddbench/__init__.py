"""The program as one installed package: ``from ddbench import Watch``, and the command ``ddb``.

Here stand only the public names, the version and the command line over all rooms. A wheel holds the rooms in this folder
(``ddbench.harness``, ``ddbench.report``, ...: setup.py puts them there); in a clone they lie beside it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instrument import NonfiniteError, Watch

__version__ = "0.6.0"
__all__ = ["NonfiniteError", "Watch", "__version__"]

IS_CLONE = not (Path(__file__).parent / "instrument").is_dir()
CLONE = str(Path(__file__).resolve().parents[1])
"""Where the rooms are, in a clone."""
if IS_CLONE:
    sys.path.insert(0, CLONE)


def __getattr__(name: str) -> object:
    if name not in ("NonfiniteError", "Watch"):
        raise AttributeError(f"module 'ddbench' has no attribute {name!r}")
    import instrument as room

    return getattr(room, name)
