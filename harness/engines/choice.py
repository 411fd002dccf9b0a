"""``--engine``: who executes the runs of a matrix."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from harness.pool import Pool
from harness.settings import RunSettings, SettingsError
from harness.supervise.vigil import Rules
from instrument.environment import device_slug

Say = Callable[[str], None]


class Engine(Protocol):
    """``jobs``: runs at a time (None: not known before it has begun); ``pool``: a context with the pool of the runs;
    ``shares_a_unit``: they share one thing that is paid by the hour, whether it works or not; ``untried``: what a plan
    that is only printed leaves open, in words."""

    shares_a_unit: bool
    untried: str | None

    def jobs(self, asked: int | None, planned: list[RunSettings], device: torch.device) -> int | None: ...

    def pool(self, queue: list[RunSettings], out: Path, jobs: int | None, device: torch.device, rules: Rules, say: Say): ...


class LocalEngine:
    """Processes of this machine."""

    shares_a_unit = True
    untried = None

    def jobs(self, asked: int | None, planned: list[RunSettings], device: torch.device) -> int:
        """Runs at a time: one on a GPU; on a CPU as many as have cores of their own."""
        cores = len(os.sched_getaffinity(0))
        threads = max((s.threads or cores for s in planned), default=1)
        return checked_jobs(asked) or (1 if device.type == "cuda" else max(1, cores // threads))

    @contextmanager
    def pool(
        self, queue: list[RunSettings], out: Path, jobs: int, device: torch.device, rules: Rules, say: Say
    ) -> Iterator[Pool]:
        yield Pool(queue, out, jobs, rules=rules)


@dataclass(frozen=True)
class RayEngine:
    """The nodes of a Ray cluster, see `harness.engines.cluster`."""

    address: str | None
    shares_a_unit = False

    @property
    def untried(self) -> str:
        """Whether there is such a cluster, and how much room it has."""
        return f"the cluster at {self.address} was not contacted" if self.address else "no cluster was begun"

    def jobs(self, asked: int | None, planned: list[RunSettings], device: torch.device) -> int | None:
        """Runs at a time; None: as many as the cluster has room for."""
        return checked_jobs(asked)

    @contextmanager
    def pool(
        self, queue: list[RunSettings], out: Path, jobs: int | None, device: torch.device, rules: Rules, say: Say
    ) -> Iterator[object]:
        from harness.engines.cluster import Cluster

        with Cluster(self.address, device=device.type, threads=max((s.threads for s in queue), default=1)) as cluster:
            from harness.engines.ray_pool import RayPool

            yield RayPool(queue, out, jobs, None, cluster, device=device_slug(device), rules=rules, say=say)


def choose_engine(options: argparse.Namespace) -> Engine:
    """The engine that was asked for. Raises `SettingsError` for an address that can be none; nothing is contacted."""
    if options.address is not None and options.engine != "ray":
        raise SettingsError("--address goes with --engine ray")
    if options.address is not None:
        from harness.engines.cluster import parsed

        parsed(options.address)
    return RayEngine(options.address) if options.engine == "ray" else LocalEngine()


def checked_jobs(asked: int | None) -> int | None:
    """What ``--jobs`` says; raises `SettingsError`."""
    if asked is not None and asked < 1:
        raise SettingsError(f"jobs is {asked}; it must be at least 1")
    return asked
