"""What the command's exit code says, and which error gets which. Torch-free."""

from __future__ import annotations

from bench_cases.lookup import missing_package
from instrument.terminal import sentence_of

OK = 0
USAGE = 2
RUN_FAILED = 3
"""Some run ended ``oom``, ``error`` or ``hung``. A divergence is a result, and exits 0."""
BAD_DATA = 4
ENVIRONMENT = 5
INTERRUPTED = 75

CODE_OF_ERROR = {
    "bench_cases.lookup.UnknownId": USAGE,
    "bench_cases.lookup.BadDeclaration": USAGE,
    "bench_cases.models.ModelError": USAGE,
    "bench_cases.data.documents.DataError": BAD_DATA,
    "bench_cases.data.documents.DataUnavailable": ENVIRONMENT,
    "bench_cases.models.WeightsUnavailable": ENVIRONMENT,
    "harness.settings.SettingsError": USAGE,
    "harness.forensics.stored.NothingToReplay": USAGE,
    "harness.forensics.stored.SnapshotError": BAD_DATA,
    "harness.forensics.stored.RebuildError": ENVIRONMENT,
    "harness.matrix.ray_cluster.EngineError": ENVIRONMENT,
    "instrument.results.layout.RunNotFound": USAGE,
    "instrument.results.read.RunUnreadable": BAD_DATA,
    "instrument.results.folder.OutputError": ENVIRONMENT,
    "instrument.results.transfer.MergeRefused": USAGE,
    "instrument.results.claims.RunClaimed": ENVIRONMENT,
}
"""By name, so that no module is imported for an error that nobody raised."""


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that a person can mend; None for a defect of ours."""
    if missing_package(error) or sentence_of(error):
        return ENVIRONMENT
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    return next((code for name, code in CODE_OF_ERROR.items() if name in names), None)


def message_of(error: BaseException) -> str:
    """An error's one line; of a package that is not installed, what to do."""
    return missing_package(error) or sentence_of(error) or str(error)
