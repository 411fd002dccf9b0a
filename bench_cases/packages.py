"""What a missing package means to the person at the terminal. Imports nothing."""

from __future__ import annotations

OURS = ("bench_cases", "harness", "instrument", "kernels", "report")


def missing_package(error: BaseException) -> str | None:
    """One sentence for the import of a package that is not installed; None for any other error, ours included."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package in OURS:
        return None
    return (
        f"the package {package} is not installed in this Python; install what the project needs with "
        "pip install -c constraints.txt -e . (or make run, in an environment of its own)"
    )
