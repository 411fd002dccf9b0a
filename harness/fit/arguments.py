"""The grammar of ``fit``. Torch-free, as all of the command line's."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_cases import PRESETS
from harness.option_types import at_least_one, positive
from harness.settings import ATTENTION_CHOICES, DEVICES

DESCRIPTION = """\
The largest batch (rows in one forward pass, no accumulation) per configuration: doubling, then bisection, each trial a few
steps in a process of its own, optimizer states and the longest rows included, so that running out of memory costs only that
trial. Then tokens a second there and at 32 rows, and what 10^9 real (unpadded) tokens cost. Rows are kept in fit.json of the
results folder; the same command goes on where it was."""


def add_fit(command: argparse.ArgumentParser) -> None:
    """Options of ``fit``."""
    command.description = DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("case", metavar="CASE", help="a case id or path/to/file.py:NAME")
    command.add_argument("--configs", nargs="+", metavar="CONFIG", help="configuration ids or 'all'; default: the seven")
    command.add_argument("--price-per-hour", type=positive, metavar="X", help="of this machine, to give costs")
    command.add_argument("--most", type=at_least_one, default=4096, metavar="N", help="rows, more are not tried (default 4096)")
    command.add_argument(
        "--memory-limit",
        type=positive,
        metavar="GB",
        help="act as if the GPU had no more. On a CPU everything is unsupported without it: what a trial may "
        "take beside its libraries, to try the procedure",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="search in the memory model of `case --dry-run`: no trial, no speed"
    )
    command.add_argument("--rerun", action="store_true", help="measure again what fit.json has already")
    command.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="default: full on a GPU, else tiny")
    command.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    command.add_argument("--data", metavar="embedded|hub|DIR|FILE", help="default: hub for full, embedded for tiny")
    command.add_argument("--weights", metavar="scratch|pretrained|DIR", help="default: pretrained with the hub, else scratch")
    for flag, dest in (("--seq-len", "seq_len"), ("--documents", "documents"), ("--threads", "threads")):
        command.add_argument(flag, type=at_least_one, dest=dest, metavar="N", help="as for case")
    command.add_argument("--sdpa", dest="attention", choices=ATTENTION_CHOICES, default="auto", help="attention backend")
    command.add_argument("--compile", action="store_true", help="torch.compile: another experiment")
    command.add_argument("--out", type=Path, metavar="DIR", help="results folder; default: results/<device>")
    command.add_argument("--json", action="store_true", help="JSON on standard output")
