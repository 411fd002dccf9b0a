"""One run on several processes under torchrun, over gloo: it is the run of one process, and what becomes of a rank is
its row.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.whole_runs import ROOT
from instrument.results.claims import owner_of
from instrument.results.folder import finished_runs
from instrument.results.lines import read
from instrument.results.schemas import StepRecord
from tests.soak.reliability.plants import Plant
from tests.soak.reliability.trials import Trial, share_of

LAUNCHES = ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
CASES = ("gpt2_clm", "roberta_mlm", "gpt2_multi_cls")
FAULTS = {
    "sigkill": ("error", "killed"),
    "exception": ("error", "exception"),
    "device_oom": ("oom", "cuda_oom"),
    "hang_asleep": ("hung", "hung"),
}
"""By kind of fault, on rank 1: the status and the cause of the run's row."""
OF_EACH = 5
STEPS = 6
FORWARDS_BEFORE = 1
"""A forward pass finds out whether a parameter takes no part, which DDP wants to know."""
TOLERANCE = 1e-5
HANG_AFTER_S = 15
LONGEST_S = 300.0
SIZES = [
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--device",
    "cpu",
    "--documents",
    "400",
    "--validation-documents",
    "4",
    "--seq-len",
    "32",
    "--max-steps",
    str(STEPS),
]


def alike(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a case and launch in fp32: the losses and gradient norms of every step agree to 1e-5, however targets are
    dealt."""
    pairs = [(case, launch) for launch in LAUNCHES for case in CASES]
    words = {
        case: ["-m", "harness", "case", case, "fp32_true", *SIZES, "--batch-size", "8", "--micro-batch", "2"] for case in CASES
    }
    alone = {}
    for case, (processes, parallel) in pairs[: share_of(len(pairs), share)]:
        if case not in alone:
            alone[case] = _steps(folder / f"{case}-alone", words[case])
        several = _steps(folder / f"{case}-{parallel}-{processes}", [*_on(processes), *words[case], "--parallel", parallel])
        yield Trial(f"{case}, {parallel} on {processes}", _differences(alone[case], several), {parallel: 1})


def _differences(alone: list[StepRecord], several: list[StepRecord]) -> list[str]:
    losses = [] if len(alone) == len(several) == STEPS else [f"{len(several)} and {len(alone)} of {STEPS} steps"]
    pairs = [
        (a.step, name, getattr(a, name), getattr(b, name))
        for a, b in zip(alone, several, strict=False)
        for name in ("loss", "grad_norm")
    ]
    return losses + [
        f"step {step}: {name} is {found} and was {due}"
        for step, name, due, found in pairs
        if found is None or not abs(found - due) <= TOLERANCE * due
    ]


def _on(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def one_fails(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a fault on rank 1 at a random step: one terminal row that says of what, the steps before it, no process left."""
    for what, expected in FAULTS.items():
        for number in range(share_of(OF_EACH, share)):
            out, step = folder / f"{what}-{number}", random.Random(f"{what}-{number}").randint(1, STEPS)
            own = _own_case(folder, Plant(what, "forward", step + FORWARDS_BEFORE))
            words = [
                "-m",
                "harness",
                "case",
                f"{own}:CASE",
                "fp32_true",
                *SIZES,
                "--batch-size",
                "2",
                "--micro-batch",
                "1",
                "--hang-after",
                str(HANG_AFTER_S),
                "--out",
                str(out),
            ]
            wrong = _wrong(out, _launched([*_on(2), *words]), expected, step - 1)
            yield Trial(f"{what} of rank 1 in step {step}", wrong, {what: 1})


def _wrong(out: Path, exit_code: int | None, expected: tuple[str, str], steps: int) -> list[str]:
    rows = finished_runs(out)
    if exit_code is None or len(rows) != 1:
        return [f"no end within {LONGEST_S:.0f} s" if exit_code is None else f"{len(rows)} rows"]
    (row,) = rows
    found = row.status, row.flags.get("death", {}).get("cause")
    wrong = [] if found == expected else [f"{'/'.join(map(str, found))}: {row.error}"]
    wrong += [] if row.steps_done == steps else [f"{row.steps_done} steps, expected {steps}"]
    wrong += [] if "rank 1" in (row.error or "") else [f"rank 1 is not named: {row.error}"]
    wrong += [] if owner_of(out, row.run_id) is None else ["the run is still claimed"]
    return wrong if exit_code != 0 else [*wrong, "exit code 0"]


def _own_case(folder: Path, plant: Plant) -> Path:
    path = folder / f"{plant.what}_{plant.step}.py"
    path.write_text(
        "from tests.soak.reliability.faults import case_with\n"
        "from tests.soak.reliability.plants import Plant\n"
        f"CASE = case_with({plant!r}, 'build_on_rank_1')\n"
    )
    return path


def _steps(out: Path, command: list[str]) -> list[StepRecord]:
    """The steps of a run that this command makes; none where it did not end well."""
    if _launched([*command, "--out", str(out)]) != 0:
        return []
    (row,) = finished_runs(out)
    return list(read(out / "training_logs" / f"run_{row.run_id}.jsonl", StepRecord))


def _launched(arguments: list[str]) -> int | None:
    """Its exit code; None for one that had to be killed, with all of its processes, for taking too long."""
    with tempfile.TemporaryDirectory(prefix="ddb-torchrun-", ignore_cleanup_errors=True) as temporary:  # torchrun litters
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": temporary},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):  # ranks have sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            return None
