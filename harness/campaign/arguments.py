"""The campaign's grammar. Torch-free, as all of the command line's."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_cases import PRESETS
from harness.option_types import at_least_one, positive

SKIPPABLE = ("doctor", "check", "bench", "overhead", "overflow", "fit")
OPS = (
    "cross_entropy",
    "multi_tensor_stats",
    "unscale",
    "scale",
    "bce_with_logits",
    "activation_stats",
    "logit_stats",
    "exponent_histogram",
)
"""The kernels, in the order in which their figures matter."""
DESCRIPTION = """\
Doctor with measured ceilings, kernels against float64, kernel and overhead benchmarks (behind the matrix where the minutes
are few), a calibration of every case, the matrix at real size, what fits at most, and the dossier. Each stage is a process
of its own, and its outcome is recorded.
The same command goes on where it was cut, by a signal, SIGKILL or the end of its minutes: several calls make one campaign.
How many steps and seeds are run is planned once, behind the calibration, for --total-minutes, and printed."""


def add_campaign(command: argparse.ArgumentParser) -> None:
    """Options of ``campaign``. Those that make the campaign what it is default to None: a later call finds them in
    campaign.json."""
    command.description = DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    time = command.add_argument_group("time")
    time.add_argument(
        "--minutes", type=positive, default=30.0, metavar="M", help="of this call, the dossier included (default 30)"
    )
    time.add_argument(
        "--total-minutes",
        type=positive,
        metavar="T",
        help="of all calls together, for which steps and seeds are planned; default: the first call's --minutes",
    )
    place = command.add_argument_group("folders")
    place.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the dossier and its data, small enough to commit; "
        "default: dossiers/<device>. Where results are missing, a campaign goes on from here",
    )
    place.add_argument("--results", type=Path, metavar="DIR", help="the working results folder; default: results/<device>")
    what = command.add_argument_group("what is measured")
    what.add_argument("--preset", choices=list(PRESETS), help="default: full on a GPU; on a CPU only tiny makes sense")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the GPU if there is one")
    what.add_argument(
        "--data", metavar="embedded|hub|DIR|FILE", help="default: hub for full, embedded for tiny; never another by itself"
    )
    what.add_argument("--weights", metavar="scratch|pretrained|DIR", help="default: pretrained with the hub, else scratch")
    what.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="default: the six, and gpt2_clm at 512 tokens as the matched control (also: CASE@TOKENS)",
    )
    what.add_argument("--configs", nargs="+", metavar="CONFIG", help="default: the seven")
    what.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of as many as fit")
    what.add_argument("--max-steps", type=at_least_one, metavar="N", help="instead of as many as fit")
    for flag in ("--batch-size", "--micro-batch", "--seq-len", "--documents", "--validation-documents", "--threads"):
        what.add_argument(flag, type=at_least_one, metavar="N", help="as for matrix")
    what.add_argument(
        "--ops", nargs="+", choices=OPS, metavar="OP", help=f"kernels to check and bench; default: {', '.join(OPS)}"
    )
    what.add_argument("--pairs", type=at_least_one, metavar="N", help="pairs per ratio of both benchmarks; default: theirs")
    what.add_argument("--skip", nargs="+", choices=SKIPPABLE, metavar="STAGE", help=", ".join(SKIPPABLE))
    what.add_argument("--price-per-hour", type=positive, metavar="X", help="of this machine, for costs in dossier and fit")
    how = command.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the plan, from estimates or from a calibration that is done")
    how.add_argument("--retry-failed", action="store_true", help="try stages again that failed in an earlier call")
    how.add_argument("--json", action="store_true", help="campaign.json on standard output at the end")
