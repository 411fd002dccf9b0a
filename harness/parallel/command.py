"""``torchrun ... -m harness case``: what one of its processes does."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch

from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.matrix.budget import Budget, ending_in_time, refuse_too_little
from harness.parallel.context import RankFailed
from harness.parallel.process_group import StopTogether, joined
from harness.parallel.ranks import Ranks
from harness.parallel.scratch import folder_of
from harness.run.execute import execute
from harness.run.terminal import CaseScreen
from harness.settings import RunSettings
from instrument.results.schemas import encode


def run_rank(
    settings: RunSettings, out: Path, ranks: Ranks, options: argparse.Namespace, started_s: float, budget: Budget | None
) -> int:
    """Execute this rank's part of the run; rank 0 shows it. Returns the exit code, the same on all; where a rank
    failed it does not return but ends the process, since taking a torn process group down may wait for ever."""
    if budget is not None:
        refuse_too_little(budget)  # before the ranks are one team
    screen = CaseScreen(settings, out) if ranks.is_first else None
    try:
        with (
            joined(ranks, torch.device(settings.device), options.hang_after_s) as team,
            folder_of(ranks, out) as folder,
            screen or nullcontext(),
            StopTogether(team).listening() as stop,
            ending_in_time(budget, stop),
        ):
            record = execute(
                settings, folder, screen.show if screen else lambda row: None, started_s, stop, fresh=options.fresh, team=team
            )
            if not team.torn:
                team.gather(None)  # rank 0 has written the row: torchrun ends it as soon as another leaves with 75
    except RankFailed as error:  # before there was a run to write a row of; that rank says why
        print(f"harness: {error}", file=sys.stderr)
        _end(RUN_FAILED)
    if screen:
        screen.summary(record)
        if options.json:
            sys.stdout.write(encode(record).decode() + "\n")
    code = INTERRUPTED if record.status == "preempted" else RUN_FAILED if record.status in ("oom", "error", "hung") else OK
    if team.torn:
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
