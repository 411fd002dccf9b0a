"""The stages of a campaign as commands, in order, and one of them as a process with a time limit. Torch-free."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from harness.campaign.plan import CALIBRATION_STEPS, CampaignPlan, Variant, representatives
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.options import NOT_TIMED, OPS
from harness.run.signals import Stop
from harness.supervisor.child_process import CommandProcess
from harness.supervisor.process_monitor import kill_group
from instrument.results.files import make_folder

FOLDER = "campaign"
"""In the results folder: logs of the stages, parts of their output, the calibration's own results folder."""
CALIBRATION = Path(FOLDER) / "calibration"
SHARES = {"doctor": 0.05, "check": 0.08, "bench": 0.15, "overhead": 0.10, "calibrate": 0.15, "overflow": 0.03, "fit": 0.15}
"""At most this share of the campaign's planned minutes goes to a group of stages; what is left is the matrix's."""
LEAST_S = {"doctor": 60.0, "check": 45.0, "bench": 30.0, "overhead": 60.0, "calibrate": 60.0, "overflow": 60.0, "fit": 60.0}
"""... but so much for each stage of it, however short the campaign: a first import and a first compilation take that."""
FIT_FROM_S = 3600.0
"""From this length on a campaign keeps time free for ``fit``; in a shorter one it gets what the runs leave."""
OVERFLOW = ("roberta_mlm", "amp_fp16_unscaled", "--lr", "3.0")
"""A run that is driven into overflow on purpose, in a folder of its own: for the trace of one replayed overflow."""
OVERFLOW_STEPS = 40
FIT_CASES = ("gpt2_multi_cls", "gpt2_clm")
SIZES = ("preset", "device", "data", "weights", "seq_len", "documents", "threads")
TRAINING_SIZES = ("batch_size", "micro_batch", "validation_documents")
POLL_S, REPORT_S = 0.1, 5.0
ROOMS = ("harness", "kernels", "report")
"""What a stage runs with ``python -m``."""
PACKAGE = __package__.partition("harness")[0]
"""What comes before a room's name: nothing in a clone, ``ddbench.`` where the wheel is installed."""


@dataclass(frozen=True)
class Stage:
    """``command``: what follows ``python -m``. ``group`` shares a time limit (`SHARES`; ``run`` has none of its own).
    ``resumes``: asked to stop, it leaves something to resume from, so the end of a call leaves it pending."""

    name: str
    group: str
    command: tuple[str, ...]
    resumes: bool = False

    @property
    def writes_rows(self) -> bool:
        """Whether what it measured before a cut is kept."""
        return self.group in ("check", "bench", "calibrate", "fit")


@dataclass(frozen=True)
class StageExit:
    """``cut``: None, or why it was asked to end: ``limit`` (its own), ``call`` (no minutes left), ``signal``. ``last_line``: of
    its log."""

    exit_code: int
    seconds: float
    cut: str | None
    last_line: str


def before_the_plan(
    asked: Mapping[str, Any], results: Path, labels: Sequence[str], configs: Sequence[str], total_s: float
) -> list[Stage]:
    """Doctor, the kernels' correctness, how fast kernels and instruments are where there is time for it, calibration."""
    skip, stages = asked["skip"] or (), []
    if "doctor" not in skip:
        stages.append(Stage("doctor", "doctor", ("harness", "doctor", "--measure", "--out", str(results), "--json")))
    if "check" not in skip:
        stages += _per_kernel("check", asked, results)
    speeds = _speeds(asked, results, total_s)
    stages += speeds if _fit_their_shares(speeds, total_s) else []
    by_length = sorted(map(Variant.parse, labels), key=lambda variant: variant.seq_len or 0)
    for seq_len, variants in groupby(by_length, key=lambda variant: variant.seq_len):
        command = (
            *("harness", "matrix", "--cases", *(variant.case for variant in variants)),
            *("--configs", *representatives(configs), "--seeds", "0", "--no-follow-up"),
            *sizes(asked, seq_len, CALIBRATION_STEPS, *TRAINING_SIZES),
            *("--out", str(results / CALIBRATION)),
        )
        stages.append(Stage("calibrate" + (f"@{seq_len}" if seq_len else ""), "calibrate", command, resumes=True))
    return stages


def runs(asked: Mapping[str, Any], results: Path, plan: CampaignPlan) -> list[Stage]:
    """The planned blocks: the first alone, since the first dossier follows it; then neighbours of one seed and sequence length
    in one matrix command, which rotates their configurations itself."""
    stages = []
    key = lambda pair: (pair[0] == 0, pair[1].seed, Variant.parse(pair[1].case).seq_len)  # noqa: E731
    for (_, seed, seq_len), group in groupby(enumerate(plan.blocks), key=key):
        blocks = [block for _, block in group]
        command = (
            *("harness", "matrix", "--cases", *(Variant.parse(block.case).case for block in blocks)),
            *("--configs", *blocks[0].configs, "--seeds", str(seed)),
            *sizes(asked, seq_len, plan.max_steps, *TRAINING_SIZES),
            *("--out", str(results)),
        )
        stages.append(Stage(f"run-{blocks[0].case}-s{seed}", "run", command, resumes=True))
    return stages


def after_the_runs(
    asked: Mapping[str, Any], results: Path, labels: Sequence[str], configs: Sequence[str], total_s: float
) -> list[Stage]:
    """One overflow to look at, the speeds that had no time before, and what fits at most, for one classifier and one
    language model."""
    skip, stages = asked["skip"] or (), []
    if "overflow" not in skip and OVERFLOW[0] in labels:
        common = (*sizes(asked, None, OVERFLOW_STEPS, *TRAINING_SIZES), "--out", str(results / FOLDER / "overflow"))
        stages.append(Stage("overflow", "overflow", ("harness", "case", *OVERFLOW, *common), resumes=True))
    speeds = _speeds(asked, results, total_s)
    stages += [] if _fit_their_shares(speeds, total_s) else speeds
    price = ("--price-per-hour", str(asked["price_per_hour"])) if asked["price_per_hour"] else ()
    for case in FIT_CASES:
        if case in labels and "fit" not in skip:
            command = ("harness", "fit", case, "--configs", *configs, *sizes(asked), *price, "--out", str(results))
            stages.append(Stage(f"fit-{case}", "fit", command, resumes=True))
    return stages


def _speeds(asked: Mapping[str, Any], results: Path, total_s: float) -> list[Stage]:
    """The benchmarks of the kernels and of the instruments."""
    skip, stages = asked["skip"] or (), []
    pairs = ("--pairs", str(asked["pairs"])) if asked["pairs"] else ()
    if "bench" not in skip:
        stages += _per_kernel("bench", asked, results, *pairs)
    if "overhead" not in skip:
        at_most_s = 0.7 * max(LEAST_S["overhead"], SHARES["overhead"] * total_s)  # the rest is for building its arms
        options = (*pairs, "--at-most", f"{at_most_s:.0f}", "--out", str(results))
        stages.append(Stage("overhead", "overhead", ("harness", "bench", "overhead", *options)))
    return stages


def _fit_their_shares(stages: Sequence[Stage], total_s: float) -> bool:
    """Whether a campaign is long enough for the least that these stages need. In a shorter one they would leave nothing to
    the matrix, which tells more, so they come after it."""
    return sum(LEAST_S[stage.group] for stage in stages) <= total_s * sum(SHARES[g] for g in {s.group for s in stages})


def _per_kernel(what: str, asked: Mapping[str, Any], results: Path, *options: str) -> list[Stage]:
    device = ("--device", asked["device"]) if asked["device"] else ()
    stages = []
    left_out = NOT_TIMED if what == "bench" else ()
    for op in (op for op in OPS if op in (asked["ops"] or OPS) and op not in left_out):
        out = ("--out", str(results / FOLDER / f"{what}-{op}.json"))
        stages.append(Stage(f"{what}-{op}", what, ("kernels", what, "--op", op, *device, *options, *out)))
    return stages


def sizes(asked: Mapping[str, Any], seq_len: int | None = None, max_steps: int | None = None, *more: str) -> tuple[str, ...]:
    """The options that every run of the campaign has in common, and ``more`` of what was asked for."""
    given = {name: asked[name] for name in (*SIZES, *more)}
    given |= {"seq_len": seq_len or asked["seq_len"], "max_steps": max_steps}
    return tuple(
        word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))
    )


def kept_for_fit_s(asked: Mapping[str, Any], total_s: float) -> float:
    """Of a campaign's planned seconds."""
    return 0.0 if "fit" in (asked["skip"] or ()) or total_s < FIT_FROM_S else SHARES["fit"] * total_s


def outcome(stage: Stage, ended: StageExit) -> tuple[str, str | None]:
    """(state, note) of a stage from how its process ended."""
    if ended.exit_code == OK and ended.cut is None:
        return "done", None
    if ended.cut in ("call", "signal"):
        return ("done", None) if ended.exit_code == OK and stage.resumes else ("pending", f"stopped by the {ended.cut}")
    if ended.cut == "limit":
        kept = "; the rows that it had by then are kept" if stage.writes_rows else ""
        return "cut", f"its share of the time was over{kept}"
    if ended.exit_code == INTERRUPTED:
        return "pending", "it was interrupted from outside"
    if ended.exit_code == RUN_FAILED and stage.resumes:
        return "done", "some run ended oom, error or hung; their rows say why"
    how = f"signal {-ended.exit_code}" if ended.exit_code < 0 else f"exit code {ended.exit_code}"
    return "failed", f"{how}: {ended.last_line}"


def run_process(
    command: Sequence[str],
    files: Path,
    *,
    limit_s: float,
    call_s: float,
    grace_s: float,
    stop: Stop,
    report: Callable[[int, float], None] = lambda pid, seconds: None,
    echo: Callable[[str], None] = lambda line: None,
) -> StageExit:
    """Run ``python -m command`` with its standard output in ``files``.out and the rest in ``files``.log (added to).

    It is asked to end (SIGTERM) after ``limit_s`` or ``call_s`` seconds, whichever comes first, or when ``stop`` is requested,
    and killed with all its processes ``grace_s`` later. ``report(pid, seconds)`` is called every few seconds, ``echo`` with
    every line of the log.
    """
    make_folder(files.parent)
    out, log = files.with_name(files.name + ".out"), files.with_name(files.name + ".log")
    began_s, cut, report_at_s, seconds = time.monotonic(), None, 0.0, 0.0
    with out.open("wb") as output, log.open("ab") as errors, log.open("rb") as tail:
        tail.seek(0, os.SEEK_END)
        python = [sys.executable, "-u", "-m", PACKAGE + command[0], *command[1:]]
        with CommandProcess(python, stdout=output, stderr=errors) as child:  # whatever it leaves running is killed
            while child.running():
                if seconds >= report_at_s:
                    report_at_s = seconds + REPORT_S
                    report(child.pid, seconds)
                time.sleep(POLL_S)
                _echo(tail, echo)
                seconds = time.monotonic() - began_s
                if cut is None and (stop.requested or seconds > min(limit_s, call_s)):
                    cut = "signal" if stop.requested else "call" if call_s <= limit_s else "limit"
                    child.monitor.end(grace_s)
                child.monitor.look()
        _echo(tail, echo)
    with log.open("rb") as tail:
        tail.seek(max(0, log.stat().st_size - 4000))
        lines = [line.strip() for line in tail.read().decode(errors="replace").splitlines() if line.strip()]
    return StageExit(child.exit_code(), time.monotonic() - began_s, cut, lines[-1][:300] if lines else "it said nothing")


def end_orphan(pid: int | None, grace_s: float) -> bool:
    """End what a killed call's stage left running: it was asked to stop when its parent ended (on Linux), and is given time
    for its checkpoint. Returns whether there was anything. Another process that came by the same number leads no session of
    its own or runs something else."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(pid) if pid is not None and os.getsid(pid) == pid else None
        command = process.cmdline() if process else []
        if "-m" in command and command[command.index("-m") + 1].removeprefix(PACKAGE) in ROOMS:
            process.terminate()
            psutil.wait_procs([process], timeout=grace_s)
            kill_group(pid)
            return True
    return False


def _echo(tail, echo: Callable[[str], None]) -> None:
    """Pass on the lines that are whole."""
    while line := tail.readline():
        if not line.endswith(b"\n"):
            tail.seek(-len(line), os.SEEK_CUR)
            return
        echo(line.decode(errors="replace").rstrip())
