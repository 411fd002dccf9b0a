"""``python -m harness case``: one run, in this process, which `harness.supervisor.case_parent` started, or on several
ranks, which torchrun started."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bench_cases import Case, DtypeConfig, lookup
from bench_cases.dtype_configs import DTYPE_CONFIGS
from bench_cases.own import case_for_model, find_case
from harness import options as arguments
from harness.budget import Budget, asked_budget
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.parallel.ranks import Ranks, end_process, on_ranks
from harness.settings import RunSettings, SettingsError
from instrument.results import files
from instrument.results.schemas import RunRecord, encode

if TYPE_CHECKING:
    from harness.run.terminal import CaseScreen


def case_command(options: argparse.Namespace) -> int:
    """Run what was asked and print its summary; ``--json`` prints the row."""
    case, config, ranks = asked_case(options), asked_config(options), Ranks.from_environment()
    # Only now: everything above can refuse in milliseconds.
    import time

    started_s = time.perf_counter()
    from harness.planning import choose_device, plan_run, results_folder

    device = choose_device(options.device)
    settings = on_ranks(plan_run(case, config, options.seed, arguments.request(options), device), ranks, options.parallel)
    out = results_folder(options.out, device)
    budget = asked_budget(options, device=settings.device, preset=settings.preset, ranks=ranks)
    if options.dry_run:
        from harness.estimate import print_estimate

        if ranks.is_first:
            print_estimate(settings, out, options.json)
        return OK
    if ranks.world > 1:
        return _run_rank(settings, out, ranks, options, started_s, budget)
    from harness.budget import ending_in_time
    from harness.run.execute import execute
    from harness.run.signals import Stop
    from harness.run.terminal import CaseScreen

    with (
        CaseScreen(settings, out) as screen,
        Stop(heartbeat=options.heartbeat).listening() as stop,
        ending_in_time(budget, stop),
    ):
        record = execute(settings, out, screen.show, started_s, stop, fresh=options.fresh)
    return _concluded(screen, record, options.json)


def _run_rank(
    settings: RunSettings, out: Path, ranks: Ranks, options: argparse.Namespace, started_s: float, budget: Budget | None
) -> int:
    """Execute this rank's part of the run; rank 0 shows it. Returns the exit code, the same on all; where a rank failed it does
    not return but ends the process, since destroying a broken process group may wait for ever."""
    import torch

    from harness.budget import ending_in_time, refuse_too_little
    from harness.parallel.context import RankFailed
    from harness.parallel.process_group import joined
    from harness.run.execute import execute
    from harness.run.signals import StopTogether
    from harness.run.terminal import CaseScreen

    if budget is not None:
        refuse_too_little(budget)  # before the ranks wait for each other
    screen = CaseScreen(settings, out) if ranks.is_first else None
    show = screen.show if screen else lambda row: None
    try:
        with (
            joined(ranks, torch.device(settings.device), options.hang_after_s) as context,
            _folder_of(ranks, out) as folder,
            screen or nullcontext(),
            StopTogether(context).listening() as stop,
            ending_in_time(budget, stop),
        ):
            record = execute(settings, folder, show, started_s, stop, fresh=options.fresh, context=context)
            if not context.broken:
                context.gather(None)  # rank 0 has written the row: torchrun ends it as soon as another leaves with 75
    except RankFailed as error:  # before there was a run to write a row of; that rank says why
        print(f"harness: {error}", file=sys.stderr)
        end_process(RUN_FAILED)
    code = _concluded(screen, record, options.json)
    if context.broken:
        end_process(code)
    return code


@contextmanager
def _folder_of(ranks: Ranks, out: Path) -> Iterator[Path]:
    """``out`` for rank 0. The other ranks execute the whole run too, each into a temporary folder. What killed ranks left is
    deleted."""
    files.sweep(Path(tempfile.gettempdir()))
    if ranks.is_first:
        yield out
        return
    with files.temporary_folder(f"ddb-rank{ranks.rank}") as temporary:
        yield temporary


def _concluded(screen: CaseScreen | None, record: RunRecord, as_json: bool) -> int:
    """The exit code of a run that is over, after its summary, which only the first rank has a ``screen`` for."""
    if screen is not None:
        screen.summary(record)
        if as_json:
            sys.stdout.write(encode(record).decode() + "\n")
    if record.status == "preempted":
        return INTERRUPTED
    return RUN_FAILED if record.status in ("oom", "error", "hung") else OK


def asked_case(options: argparse.Namespace) -> Case:
    """The case from ``CASE``, from ``--model --task`` or from ``--model_arch --task``."""
    if options.model and options.model_arch:
        raise SettingsError("--model and --model_arch both name the model; give one of them")
    if options.task and not (options.model or options.model_arch):
        raise SettingsError("--task goes with --model or --model_arch; a case id has its task in it")
    if (options.model or options.model_arch) and not options.task:
        given = "--model" if options.model else "--model_arch"
        raise SettingsError(f"{given} needs --task (clm, mlm, multi_cls or single_cls)")
    if options.model:
        return case_for_model(options.model, options.task)
    if options.model_arch:
        return find_case(f"{options.model_arch}_{options.task}")
    if not options.names:
        how = "give CASE CONFIG (`python -m harness list` shows them), or --model DIR --task TASK CONFIG"
        raise SettingsError(f"no case: {how}")
    return find_case(options.names[0])


def asked_config(options: argparse.Namespace) -> DtypeConfig:
    """The configuration named after the case, or from ``--dtype_config``."""
    named = options.names if options.model or options.model_arch else options.names[1:]
    named = [*named, *([options.dtype_config] if options.dtype_config else [])]
    if len(named) != 1:
        given = ", ".join(named) or "none"
        raise SettingsError(f"one dtype configuration is needed; given: {given}; allowed: {', '.join(DTYPE_CONFIGS)}")
    return lookup("dtype configuration", named[0], DTYPE_CONFIGS)
