"""``--engine``: who executes the runs of a matrix.

A Ray cluster: one of our own on this machine's loopback, or one that runs at a private address.

Ray executes whatever reaches its ports, so nothing listens where strangers are: our own cluster is bound to
127.0.0.1, and a public address is refused. The dashboard and the usage reports are off.

What makes an engine unusable. Imports nothing, so that the command line can know it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from harness.settings import RunSettings, SettingsError
from harness.supervisor.pool import Pool
from harness.supervisor.process_monitor import Rules
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
    """The nodes of a Ray cluster, see `harness.matrix.ray_cluster`."""

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

        with Cluster(self.address, device=device.type, threads=max((s.threads for s in queue), default=1)) as cluster:
            from harness.matrix.ray_pool import RayPool

            yield RayPool(queue, out, jobs, None, cluster, device=device_slug(device), rules=rules, say=say)


def choose_engine(options: argparse.Namespace) -> Engine:
    """The engine that was asked for. Raises `SettingsError` for an address that can be none; nothing is contacted."""
    if options.address is not None and options.engine != "ray":
        raise SettingsError("--address goes with --engine ray")
    if options.address is not None:
        parsed(options.address)
    return RayEngine(options.address) if options.engine == "ray" else LocalEngine()


def checked_jobs(asked: int | None) -> int | None:
    """What ``--jobs`` says; raises `SettingsError`."""
    if asked is not None and asked < 1:
        raise SettingsError(f"jobs is {asked}; it must be at least 1")
    return asked


class EngineError(Exception):
    """The cluster cannot be used, or no longer: one sentence that says why."""


OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB. Only chunks of a few MB pass through."""
REACH_WITHIN_S = 10.0
LOOK_EVERY_S = 1.0


class Cluster:
    """Where actors of `harness.matrix.ray_node.Node` live. A slot is a GPU, or as many processors as a run has threads
    (0: all of a node's). A context: leaves the cluster, and ends one of our own."""

    def __init__(self, address: str | None, *, device: str, threads: int) -> None:
        self.address, self.device, self.threads = address, device, threads
        self._quiet, self._nodes, self._looked_s = ExitStack(), [], -LOOK_EVERY_S
        self._ray = self._connect()

    def _connect(self) -> Any:
        if self.address is None:
            bind_to_loopback()
        else:
            require_private(self.address)
        try:
            import ray
        except ImportError as error:
            raise EngineError(f"--engine ray needs Ray, which is not installed here ({error}); pip install '.[ray]'") from error
        quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}
        try:
            if self.address is None:
                ray.init(
                    address="local",
                    num_cpus=len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"cannot use the Ray cluster at {self.address or '127.0.0.1'}: {str(error).strip().splitlines()[0]}"
            ) from error
        return ray

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as of at most `LOOK_EVERY_S` ago."""
        if time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self._nodes, self._looked_s = [node for node in self._ray.nodes() if node["Alive"]], time.monotonic()
        return self._nodes

    def slots(self) -> int:
        """Runs that fit into the cluster at a time."""
        resource, need = ("GPU", 1.0) if self.device == "cuda" else ("CPU", self._processors())
        return sum(int(node["Resources"].get(resource, 0.0) // need) for node in self.nodes()) if need else 0

    def hire(self) -> Any:
        """A slot: an actor that begins to live as soon as a node has room for it."""
        from harness.matrix.ray_node import Node

        room = {"num_gpus": 1, "num_cpus": 0} if self.device == "cuda" else {"num_cpus": self._processors()}
        return self._ray.remote(Node).options(max_restarts=0, max_task_retries=0, **room).remote(self.device)

    def dismiss(self, actor: Any) -> None:
        """End an actor's process, and with it what it executes."""
        self._ray.kill(actor, no_restart=True)

    def _processors(self) -> float:
        most = max((node["Resources"].get("CPU", 0.0) for node in self.nodes()), default=0.0)
        return float(self.threads or most)

    def close(self) -> None:
        """Leave the cluster; one of our own ends."""
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        # Ray prints what a node's end looked like on standard output, whatever it was told: that is the rows' place.
        self._quiet.enter_context(redirect_stdout(self._quiet.enter_context(open(os.devnull, "w"))))
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self._quiet.close()


def bind_to_loopback() -> None:
    """Before Ray is imported: a cluster that begins here listens on 127.0.0.1 alone, and reports to nobody. Only this
    switch binds all of Ray's processes; its option for a node's address leaves the ports open on every interface."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def require_private(address: str) -> None:
    """Raise `SettingsError` unless ``address`` is ``HOST:PORT``, of loopback or of a private network; `EngineError` where
    nothing answers there."""
    host, port = parsed(address)
    try:
        found = {entry[4][0].partition("%")[0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise EngineError(f"--address {address}: {host} has no address here ({error})") from error
    for ip in found:
        _refuse_public(ipaddress.ip_address(ip), address)
    try:
        socket.create_connection((host, port), REACH_WITHIN_S).close()
    except OSError as error:
        raise EngineError(f"--address {address}: no Ray cluster answers there ({error.strerror or error})") from error


def parsed(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port; asks nobody, so a host's name is taken as it is. Raises `SettingsError`
    for what is no ``HOST:PORT``, and for a public address."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SettingsError(
            f"--address {address!r}; allowed: HOST:PORT of a Ray cluster's head, such as 10.0.0.5:6379, on a "
            f"machine that is part of it"
        )
    host = host.strip("[]")
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return host, int(port)
    _refuse_public(ip, address)
    return host, int(port)


def _refuse_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, address: str) -> None:
    if ip.is_global or ip.is_unspecified or ip.is_multicast:
        raise SettingsError(
            f"--address {address}: {ip} is not a private address, and Ray runs whatever reaches its ports; "
            f"allowed: loopback (127.0.0.1) and private networks (10.x, 172.16-31.x, 192.168.x, fd..)"
        )
