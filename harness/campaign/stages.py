"""The stages as commands, in order. Torch-free: a list of what `python -m` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.campaign.calibration import FOLDER as CALIBRATION
from harness.campaign.calibration import STEPS, representatives
from harness.campaign.plan import Plan, Variant
from harness.options import OPS

FOLDER = "campaign"
"""In the results folder: logs of the stages, parts of their output, the calibration's own results folder."""
SHARES = {"doctor": 0.05, "check": 0.08, "bench": 0.15, "overhead": 0.10, "calibrate": 0.15, "overflow": 0.03, "fit": 0.15}
"""At most this share of the campaign's planned minutes goes to a group of stages; what is left is the matrix's."""
LEAST_S = {"doctor": 60.0, "check": 45.0, "bench": 30.0, "overhead": 60.0, "calibrate": 60.0, "overflow": 60.0, "fit": 60.0}
"""... but so much for each stage of it, however short the campaign: a first import and a first compilation take that."""
FIT_FROM_S = 3600.0
"""From this length on a campaign keeps time free for ``fit``; in a shorter one it gets what the runs leave."""
OVERFLOW_CASE, OVERFLOW_CONFIG, OVERFLOW_LR, OVERFLOW_STEPS = "roberta_mlm", "amp_fp16_unscaled", 3.0, 40
"""A run that is driven into overflow on purpose, in a folder of its own: for the trace of one replayed overflow."""
FIT_CASES = ("gpt2_multi_cls", "gpt2_clm")


@dataclass(frozen=True)
class Stage:
    """``command``: what follows ``python -m``. ``group`` shares a time limit (`SHARES`; ``run`` has none of its own).
    ``goes_on``: asked to stop, it leaves something to go on from, so the end of a call leaves it pending."""

    name: str
    group: str
    command: tuple[str, ...]
    goes_on: bool = False
    echo: bool = False


def before_the_plan(
    asked: Mapping[str, Any], results: Path, labels: Sequence[str], configs: Sequence[str], total_s: float
) -> list[Stage]:
    """Doctor, the kernels' correctness, how fast kernels and instruments are where there is time for it, calibration."""
    skip, stages = asked["skip"] or (), []
    if "doctor" not in skip:
        stages.append(Stage("doctor", "doctor", ("harness", "doctor", "--measure", "--out", str(results), "--json")))
    if "check" not in skip:
        stages += _per_kernel("check", asked, results, _device(asked))
    speeds = speed(asked, results, total_s)
    return stages + (speeds if fit_their_shares(speeds, total_s) else []) + calibration(asked, results, labels, configs)


def speed(asked: Mapping[str, Any], results: Path, total_s: float) -> list[Stage]:
    """The benchmarks of the kernels and of the instruments."""
    skip, stages = asked["skip"] or (), []
    pairs = ("--pairs", str(asked["pairs"])) if asked["pairs"] else ()
    if "bench" not in skip:
        stages += _per_kernel("bench", asked, results, (*_device(asked), *pairs))
    if "overhead" not in skip:
        at_most_s = 0.7 * max(LEAST_S["overhead"], SHARES["overhead"] * total_s)  # the rest is for building its arms
        stages.append(
            Stage(
                "overhead",
                "overhead",
                ("harness", "bench", "overhead", *pairs, "--at-most", f"{at_most_s:.0f}", "--out", str(results)),
            )
        )
    return stages


def fit_their_shares(stages: Sequence[Stage], total_s: float) -> bool:
    """Whether a campaign is long enough for the least that these stages need. In a shorter one they would leave nothing to
    the matrix, which tells more, so they come behind it."""
    return sum(LEAST_S[stage.group] for stage in stages) <= total_s * sum(SHARES[g] for g in {s.group for s in stages})


def _per_kernel(what: str, asked: Mapping[str, Any], results: Path, options: Sequence[str]) -> list[Stage]:
    return [
        Stage(
            f"{what}-{op}", what, ("kernels", what, "--op", op, *options, "--out", str(results / FOLDER / f"{what}-{op}.json"))
        )
        for op in OPS
        if op in (asked["ops"] or OPS)
    ]


def _device(asked: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--device", asked["device"]) if asked["device"] else ()


def calibration(asked: Mapping[str, Any], results: Path, labels: Sequence[str], configs: Sequence[str]) -> list[Stage]:
    """A few steps of every case, one command for each sequence length."""
    stages, folder = [], str(results / CALIBRATION)
    for seq_len, group in groupby(sorted(map(Variant.parse, labels), key=lambda v: v.seq_len or 0), key=lambda v: v.seq_len):
        command = (
            "harness",
            "matrix",
            "--cases",
            *(variant.case for variant in group),
            "--configs",
            *representatives(configs),
            "--seeds",
            "0",
            *sizes(asked, seq_len, STEPS),
            "--no-follow-up",
            "--out",
            folder,
        )
        stages.append(Stage("calibrate" + (f"@{seq_len}" if seq_len else ""), "calibrate", command, goes_on=True, echo=True))
    return stages


def runs(asked: Mapping[str, Any], results: Path, plan: Plan) -> list[Stage]:
    """The planned blocks: the first alone, since the first dossier follows it; then neighbours of one seed and sequence length
    in one matrix command, which rotates their configurations itself."""
    blocks, stages = list(plan.blocks), []
    key = lambda pair: (pair[0] == 0, pair[1].seed, Variant.parse(pair[1].case).seq_len)  # noqa: E731
    for (_, seed, seq_len), group in groupby(enumerate(blocks), key=key):
        members = [block for _, block in group]
        cases = [Variant.parse(block.case).case for block in members]
        command = (
            "harness",
            "matrix",
            "--cases",
            *cases,
            "--configs",
            *members[0].configs,
            "--seeds",
            str(seed),
            *sizes(asked, seq_len, plan.max_steps),
            "--out",
            str(results),
        )
        stages.append(Stage(f"run-{members[0].case}-s{seed}", "run", command, goes_on=True, echo=True))
    return stages


def behind_the_runs(
    asked: Mapping[str, Any], results: Path, labels: Sequence[str], configs: Sequence[str], total_s: float
) -> list[Stage]:
    """One overflow to look at, the speeds that had no time before, and what fits at most, for one classifier and one
    language model."""
    skip, stages = asked["skip"] or (), []
    if "overflow" not in skip and OVERFLOW_CASE in labels:
        command = (
            "harness",
            "case",
            OVERFLOW_CASE,
            OVERFLOW_CONFIG,
            "--lr",
            str(OVERFLOW_LR),
            *sizes(asked, None, OVERFLOW_STEPS),
            "--out",
            str(results / FOLDER / "overflow"),
        )
        stages.append(Stage("overflow", "overflow", command, goes_on=True))
    speeds = speed(asked, results, total_s)
    stages += [] if fit_their_shares(speeds, total_s) else speeds
    if "fit" in skip:
        return stages
    price = ("--price-per-hour", str(asked["price_per_hour"])) if asked["price_per_hour"] else ()
    cases = [case for case in FIT_CASES if case in labels]
    common = sizes(asked, None, None, fit=True)
    return stages + [
        Stage(
            f"fit-{case}",
            "fit",
            ("harness", "fit", case, "--configs", *configs, *common, *price, "--out", str(results)),
            goes_on=True,
            echo=True,
        )
        for case in cases
    ]


def kept_for_fit_s(asked: Mapping[str, Any], total_s: float) -> float:
    """Of a campaign's planned seconds."""
    return 0.0 if "fit" in (asked["skip"] or ()) or total_s < FIT_FROM_S else SHARES["fit"] * total_s


def sizes(asked: Mapping[str, Any], seq_len: int | None, max_steps: int | None, *, fit: bool = False) -> tuple[str, ...]:
    """The options that every run of the campaign has in common."""
    given = {
        "preset": asked["preset"],
        "device": asked["device"],
        "data": asked["data"],
        "weights": asked["weights"],
        "seq_len": seq_len or asked["seq_len"],
        "documents": asked["documents"],
        "threads": asked["threads"],
    }
    if not fit:
        given |= {
            "max_steps": max_steps,
            "batch_size": asked["batch_size"],
            "micro_batch": asked["micro_batch"],
            "validation_documents": asked["validation_documents"],
        }
    return tuple(
        word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))
    )
