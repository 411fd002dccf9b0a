"""Compares what a run wrote with what it reported and with the same run left alone; then resumes it, repairs its folder, and
says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from harness.exit_codes import OK
from harness.run.progress import checkpoint_steps
from harness.settings import RunSettings
from instrument.results.files import TEMPORARY
from instrument.results.folder import finished_run, log_paths
from instrument.results.layout import INDEX
from instrument.results.lines import read
from instrument.results.measurements import ModuleRecord
from instrument.results.repair import Repair, repair_folder
from instrument.results.schemas import EvaluationRecord, EventRecord, Record, RecordError, RunRecord, StepRecord, decode, encode
from tests.soak.reliability.processes import ProcessResult, run

TIMES = {
    "step_time_s",
    "mfu",
    "mfu_bf16_peak",
    "mfu_measured_peak",
    "mfu_real_tokens",
    "mfu_bf16_peak_real_tokens",
    "mfu_measured_peak_real_tokens",
    "duration_s",
}
KINDS: dict[str, type[Record]] = {
    "steps": StepRecord,
    "evaluations": EvaluationRecord,
    "events": EventRecord,
    "activations": ModuleRecord,
}
LOGGED = {name: KINDS[name] for name in ("steps", "evaluations", "events")}
"""What a run reports when it has written it."""
OF_THE_RUN = (
    "status",
    "steps_done",
    "final_weights_sha256",
    "init_sha256",
    "data_sha256",
    "loss_initial",
    "train_loss_final",
    "val_loss",
    "f1_micro",
    "perplexity",
    "scaler_skips",
    "divergence_step",
    "first_nonfinite",
    "flops_per_step",
)
"""Fields of a run's row that do not depend on time."""


def written(run_id: str, out: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Everything a finished run wrote that does not depend on time, and its row's results. Raises `RecordError`."""
    logs = {
        name: [
            {k: v for k, v in msgspec.to_builtins(record).items() if k not in TIMES} for record in read(out / path, KINDS[name])
        ]
        for name, path in log_paths(run_id).items()
        if (out / path).exists()
    }
    row = finished_run(out, run_id)
    return logs, {name: getattr(row, name) for name in OF_THE_RUN} if row is not None else {}


def differences(run_id: str, out: Path, whole: Path) -> list[str]:
    """Where a run that was interrupted is not the one that was not; ``whole`` is the latter's results folder."""
    try:
        (logs, row), (whole_logs, whole_row) = written(run_id, out), written(run_id, whole)
    except RecordError as error:
        return [f"a log cannot be read: {error}"]
    wrong = [f"{name} is {row.get(name)} and not {value}" for name, value in whole_row.items() if row.get(name) != value]
    for name, expected in whole_logs.items():
        found = logs.get(name, [])
        if found != expected:
            same = min(len(found), len(expected))
            at = next((k for k in range(same) if found[k] != expected[k]), same)
            wrong.append(f"{name}: {len(found)} rows, and {len(expected)} of the whole run; they part at row {at + 1}")
    return wrong


def lost_rows(parts: Sequence[ProcessResult], run_id: str, out: Path) -> list[str]:
    """Acknowledged rows that the logs do not hold, after the last of a run's ``parts`` has ended.

    Of a run that has no result yet: every row of the last part, byte for byte where it is the only one; of the parts
    before, those up to the newest checkpoint. What an earlier part did beyond is done again, and so is
    everything where there is no checkpoint: of a finished run every row of every part must be there, but for times.
    """
    newest = max(checkpoint_steps(out / "runs" / run_id), default=-1)
    everything, times = finished_run(out, run_id) is not None, len(parts) == 1
    wrong = []
    for name, kind in LOGGED.items():
        path = out / log_paths(run_id)[name]
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        there = {_key(row, times) for line in lines if (row := _decoded(line, kind)) is not None}
        promised = {
            _key(row, times): row
            for part in parts
            for row in part.acknowledged
            if isinstance(row, kind)
            and getattr(row, "kind", "") != "resumed"  # which is shown, and kept in the row's flags
            and (everything or part is parts[-1] or row.step <= newest)
        }
        wrong += [f"acknowledged and lost: {name}, step {row.step}" for key, row in promised.items() if key not in there]
    return wrong


def torn_lines(run_id: str, out: Path) -> int:
    """Lines of a run's logs that are no record."""
    torn = 0
    for name, path in log_paths(run_id).items():
        content = (out / path).read_bytes() if (out / path).exists() else b""
        torn += sum(_decoded(line, KINDS[name]) is None for line in content.split(b"\n") if line)
    return torn


def terminal_records(run_id: str, out: Path) -> list[str]:
    """What is wrong with a finished run's row, in its folder and in the index: exactly one each, and the same."""
    row, index = finished_run(out, run_id), out / INDEX
    lines = index.read_bytes().splitlines() if index.exists() else []
    ours = [line for line in lines if (there := _decoded(line, RunRecord)) is not None and there.run_id == run_id]
    wrong = [] if row is not None else ["run.json is missing or cannot be read"]
    if len(ours) != 1:
        wrong.append(f"the index has {len(ours)} rows of the run")
    elif row is not None and ours[0] != encode(row):
        wrong.append("the index has another row than run.json")
    return wrong


def left_over(out: Path) -> list[str]:
    """Files that a finished run should not leave: half-written ones, checkpoints, claims."""
    names = [path.relative_to(out) for path in out.rglob("*")]
    return [
        f"left over: {name}"
        for name in names
        if name.name.endswith(TEMPORARY) or name.name.startswith(("checkpoint-", ".claim"))
    ]


def _key(row: Record, times: bool) -> bytes:
    line = encode(row)
    return line if times else msgspec.json.encode({k: v for k, v in msgspec.json.decode(line).items() if k not in TIMES})


def _decoded(line: bytes, kind: type[Record]) -> Record | None:
    try:
        return decode(line, kind)
    except (ValueError, RecursionError):
        return None


def left_alone(settings: RunSettings, folder: Path) -> Path:
    """The results folder of the run that nothing happens to; raises RuntimeError where that fails, since there is then
    nothing to compare with."""
    whole = folder / f"whole-{settings.config.id}"
    if not whole.exists():
        completed(run(settings, whole))
    return whole


def completed(ended: ProcessResult) -> ProcessResult:
    """A run that must have completed."""
    if ended.exit_code != OK:
        raise RuntimeError(f"a run that nothing happened to ended with exit code {ended.exit_code}: {ended.stderr[-2000:]}")
    return ended


def resumes_well(settings: RunSettings, out: Path, whole: Path, parts: list[ProcessResult]) -> list[str]:
    """Give an interrupted run's command again and let it end; what is wrong then."""
    last = run(settings, out)
    if last.exit_code != OK:
        return [f"did not resume: exit code {last.exit_code}, {last.sentence}"]
    return finished_well(settings, out, whole, [*parts, last])


def finished_well(settings: RunSettings, out: Path, whole: Path, parts: list[ProcessResult]) -> list[str]:
    """What is wrong with a run that has ended, its last part included: it equals the one that nothing happened to, holds
    every acknowledged row, has one terminal record, and nothing is left but what a repair sweeps away."""
    losses = differences(settings.run_id, out, whole) + lost_rows(parts, settings.run_id, out)
    losses += terminal_records(settings.run_id, out) + repaired(out, only_sweeps=True)
    return losses + left_over(out)


def repaired(out: Path, *, only_sweeps: bool = False) -> list[str]:
    """Repair a folder, twice; what is wrong: something lost, a second repair that finds work, and with ``only_sweeps`` a
    first one that does more than remove what dead writers left."""
    first, losses = repaired_twice(out)
    losses += [
        f"repair: {state.file} lost {state.lost}, foreign {state.foreign}"
        for state in first.files
        if state.lost or state.foreign
    ]
    more = [name for name in first.changed if not name.endswith(TEMPORARY)]
    return losses + ([f"left something to repair: {more}"] if only_sweeps and more else [])


def repaired_twice(out: Path) -> tuple[Repair, list[str]]:
    """What a repair did, and whether a second one found something to do, too."""
    first = repair_folder(out)
    after = contents(out)
    second = repair_folder(out)
    return first, [f"repair is not idempotent: {second.changed}"] if second.changed or contents(out) != after else []


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
