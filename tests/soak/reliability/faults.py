"""Runs that fail on purpose, and whether their rows name the cause.

Every trial is a tiny run in a process of its own, under the same supervision as any run of a matrix; the fault's phase
and step are drawn by the trial's number.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench_cases import CASES, DTYPE_CONFIGS, Case
from harness.planning import plan_run
from harness.settings import Request, RunSettings
from harness.supervisor.pool import Pool, ProcessExit
from harness.supervisor.process_monitor import Rules
from instrument.results.schemas import RunRecord
from tests.soak.reliability.plants import PHASES, Plant, planted_architecture
from tests.soak.reliability.trials import Trial, share_of

EXPECTED = {
    "segfault": ("error", "segfault"),
    "abort": ("error", "segfault"),
    "os_exit": ("error", "exit"),
    "sys_exit": ("error", "exit"),
    "exception": ("error", "exception"),
    "import_failure": ("error", "import_failure"),
    "bad_data": ("error", "bad_data"),
    "device_oom": ("oom", "cuda_oom"),
    "host_oom": ("oom", "host_oom"),
    "kernel_kill": ("oom", "host_oom_kill"),
    "sigkill": ("error", "killed"),
    "hang_asleep": ("hung", "hung"),
    "hang_with_the_lock": ("hung", "hung"),
    "hang_deaf": ("hung", "hung"),
    "hang_stopped": ("hung", "hung"),
    "illegal_access": ("error", "illegal_access"),
    "device_assert": ("error", "poisoned_context"),
}
"""By kind of fault: the status and ``flags["death"]["cause"]`` of the row that it should leave."""
FAULTS = tuple(EXPECTED)
MAX_STEPS = 4
HANGS_AT_A_TIME = 6
"""A hanging run waits, so several can wait together."""
HANG_RULES = {"hang_after_s": 6.0, "starting_factor": 4.0, "patience_factor": 1.5, "grace_s": 0.7, "for_stacks_s": 0.3}
"""A busy machine keeps a tiny run's evaluation waiting for seconds: that is no hang yet."""
SIZES = Request(
    preset="tiny",
    device="cpu",
    data="embedded",
    max_steps=MAX_STEPS,
    batch_size=2,
    micro_batch=2,
    seq_len=16,
    documents=400,
    validation_documents=2,
)


@dataclass(frozen=True)
class FaultTrial:
    """One fault and what became of it. ``steps_expected``: steps that the run must have kept (None: not reported by the
    place of the fault)."""

    kind: str
    phase: str
    step: int
    status: str | None
    cause: str | None
    steps_done: int | None
    steps_expected: int | None
    error: str

    @property
    def right(self) -> bool:
        """Whether the row has the status and the cause of the fault, and the steps before it."""
        return (self.status, self.cause) == EXPECTED[self.kind] and self.steps_expected in (None, self.steps_done)

    def __str__(self) -> str:
        return (
            f"{self.kind} in {self.phase} of step {self.step}: {self.status}/{self.cause} after {self.steps_done} steps, "
            f"expected {'/'.join(EXPECTED[self.kind])} after {self.steps_expected} ({self.error})"
        )


def run_faults(kind: str, trials: int, out: Path, *, first: int = 0) -> list[FaultTrial]:
    """``trials`` runs with a fault of ``kind`` (one of `KINDS`), into the results folder ``out``; those numbered from
    ``first`` on."""
    numbers = range(first, first + trials)
    if kind == "kernel_kill":  # each with a counter of its own, so one at a time
        return [trial for number in numbers for trial in _run(kind, [number], out, Rules(oom_counters=[_counter(out, number)]))]
    if kind.startswith("hang"):
        return _run(kind, numbers, out, Rules(**HANG_RULES), jobs=HANGS_AT_A_TIME)
    return _run(kind, numbers, out, Rules())


def planned(kind: str, number: int, out: Path) -> tuple[Plant, RunSettings]:
    """The ``number``-th fault of a kind, and the run that it is planted in."""
    draw = random.Random(f"{kind}-{number}")
    phase = "data" if kind == "bad_data" else draw.choice(PHASES)
    plant = Plant(
        "none" if kind == "bad_data" else kind,
        phase,
        draw.randint(1, MAX_STEPS),
        str(_counter(out, number)) if kind == "kernel_kill" else "",
    )
    sizes = replace(SIZES, data=str(_bad_data(out))) if kind == "bad_data" else SIZES
    return plant, plan_run(case_with(plant), DTYPE_CONFIGS["fp32_true"], number, sizes, torch.device("cpu"))


def case_with(plant: Plant, builder: str = "build") -> Case:
    """``gpt2_clm``, and a fault in it; ``builder`` is a function of `plants`."""
    architecture = planted_architecture("gpt2", f"tests.soak.reliability.plants:{builder}", name=plant.name)
    return replace(CASES["gpt2_clm"], id=f"gpt2_clm_{plant.what}", architecture=architecture, in_default_matrix=False)


def _run(kind: str, numbers: range | list[int], out: Path, rules: Rules, jobs: int = 1) -> list[FaultTrial]:
    plants = [planned(kind, number, out) for number in numbers]
    ended = {one.settings.run_id: one for one in _supervised([settings for _, settings in plants], out, rules, jobs)}
    return [_trial(kind, plant, ended[settings.run_id]) for plant, settings in plants]


def _supervised(runs: list[RunSettings], out: Path, rules: Rules, jobs: int) -> Iterator[ProcessExit]:
    for settings in runs:  # of an earlier round: a killed run would resume, and its row be taken for this one's
        shutil.rmtree(out / "runs" / settings.run_id, ignore_errors=True)
    return Pool(list(runs), out, jobs=jobs, rules=rules).run(lambda: None, seconds_between_ticks=0.1)


def _trial(kind: str, plant: Plant, ended: ProcessExit) -> FaultTrial:
    row: RunRecord | None = ended.record
    in_a_step = plant.phase in ("forward", "backward")
    return FaultTrial(
        kind=kind,
        phase=plant.phase,
        step=plant.step,
        status=row and row.status,
        cause=row and row.flags.get("death", {}).get("cause"),
        steps_done=row and row.steps_done,
        steps_expected=plant.step - 1 if in_a_step else 0,
        error=str(row.error if row else ended.failure),
    )


def _counter(out: Path, number: int) -> Path:
    path = out.parent / f"{out.name}-memory.events-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("low 0\noom_kill 0\n")
    return path


def _bad_data(out: Path) -> Path:
    """A file of text that is broken off in the middle of a line."""
    folder = out.parent / f"{out.name}-bad-data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openwebtext.jsonl").write_text('{"text": "a document"}\n{"text": "another one, torn in the mid')
    return folder


OF_EACH = 50
AT_A_TIME = 10


def all_faults(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a fault; lost where the row has another status or cause, or not the steps that were made before it."""
    for kind in FAULTS:
        count = share_of(OF_EACH, share)
        for first in range(0, count, AT_A_TIME):
            for fault in run_faults(kind, min(AT_A_TIME, count - first), folder / kind, first=first):
                yield Trial(f"{kind}, in {fault.phase} of step {fault.step}", [] if fault.right else [str(fault)], {kind: 1})
