"""A run's settings on several ranks: what fits together and what does not. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from harness.parallel.ranks import HOW, Ranks
from harness.settings import RunSettings, SettingsError


def on_ranks(settings: RunSettings, ranks: Ranks, asked: str | None) -> RunSettings:
    """The settings of a run on ``ranks``; raises `SettingsError`. ``asked`` is ``--parallel``."""
    if ranks.world == 1:
        if asked is not None:
            raise SettingsError(
                f"--parallel {asked} is for a run on several GPUs, and this is one process: start it with `{HOW}`"
            )
        return settings
    if settings.mtbf_s is not None:
        raise SettingsError(
            "--mtbf is chosen by each process' own clock, and a run on several GPUs writes its checkpoints "
            "together: give --checkpoint-every N"
        )
    if asked == "fsdp":
        for flag, given in (("--compile", settings.compile), ("--trace", settings.trace_steps)):
            if given:
                raise SettingsError(
                    f"{flag} does not go with --parallel fsdp, where no rank has the whole state; use --parallel ddp"
                )
    micro_batches = settings.batch_size // settings.micro_batch
    if micro_batches % ranks.world:
        largest = settings.batch_size // ranks.world
        how = (
            f"give a --micro-batch that divides {largest}"
            if settings.batch_size % ranks.world == 0
            else f"give a --batch-size that {ranks.world} divides"
        )
        raise SettingsError(
            f"{settings.batch_size} rows in micro-batches of {settings.micro_batch} make {micro_batches}, "
            f"which cannot be dealt equally to {ranks.world} ranks; {how}"
        )
    return replace(settings, world=ranks.world, parallel=asked or "ddp")
