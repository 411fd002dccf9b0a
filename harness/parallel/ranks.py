"""Which process of a run this one is, from what ``torchrun`` puts in the environment, and which settings a run on several ranks
may have. Torch-free."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass, replace
from typing import NoReturn

from harness.settings import RunSettings, SettingsError

LAUNCH = "torchrun --nproc-per-node N -m harness case ..."
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``world``; the ``local_rank``-th of ``local_world`` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """This process' place; alone where ``WORLD_SIZE`` is not set or 1. Raises `SettingsError` where it is
        larger and the rest is missing (a batch system's own variable, say)."""
        world = _number("WORLD_SIZE", least=1) if os.environ.get("WORLD_SIZE") else 1
        if world == 1:
            return cls()
        missing = [name for name in LAUNCH_VARIABLES if not os.environ.get(name)]
        if missing:
            raise SettingsError(
                f"WORLD_SIZE is {world}, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                f"set: a run on several GPUs is started with `{LAUNCH}`; for one process unset WORLD_SIZE"
            )
        return cls(_number("RANK"), world, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", least=1))


def end_process(code: int) -> NoReturn:
    """End a rank without finalising its interpreter: while Python finalises, a thread of gloo or of the store that asks
    for the interpreter's lock is ended in the middle of C++, which aborts the process: a run that has completed would end with
    SIGABRT, and torchrun would kill the other ranks."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse_ranks(command: str) -> None:
    """Raise `SettingsError` where a command that is not made for it was started several times by ``torchrun``."""
    world = Ranks.from_environment().world
    if world > 1:
        raise SettingsError(f"{command} was started as {world} processes of one job; only `case` runs on several GPUs at once")


def is_main_process() -> bool:
    """Whether this process prints what all ranks would: the first rank, and a process that is none."""
    try:
        return Ranks.from_environment().is_first
    except SettingsError:
        return True


def _number(name: str, least: int = 0) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least:
        raise SettingsError(f"{name} is {text!r} in the environment; it must be a whole number from {least}")
    return int(text)


def on_ranks(settings: RunSettings, ranks: Ranks, asked: str | None) -> RunSettings:
    """The settings of a run on ``ranks``; raises `SettingsError`. ``asked`` is ``--parallel``."""
    if ranks.world == 1:
        if asked is not None:
            several = f"--parallel {asked} is for a run on several GPUs, and this is one process"
            raise SettingsError(f"{several}: start it with `{LAUNCH}`")
        return settings
    if settings.mtbf_s is not None:
        why = "--mtbf is chosen by each process' own clock, and a run on several GPUs writes its checkpoints together"
        raise SettingsError(f"{why}: give --checkpoint-every N")
    if asked == "fsdp":
        for flag, given in (("--compile", settings.compile), ("--trace", settings.trace_steps)):
            if given:
                whole = "does not go with --parallel fsdp, where no rank has the whole state"
                raise SettingsError(f"{flag} {whole}; use --parallel ddp")
    rows, size, world = settings.batch_size, settings.micro_batch, ranks.world
    if rows // size % world:
        how = f"batch-size that {world} divides" if rows % world else f"micro-batch that divides {rows // world}"
        dealt = f"{rows} rows in micro-batches of {size} make {rows // size}, which cannot be dealt equally to {world} ranks"
        raise SettingsError(f"{dealt}; give a --{how}")
    return replace(settings, world=ranks.world, parallel=asked or "ddp")
