"""A Ray cluster: one of our own on this machine's loopback, or one that runs at a private address.

Ray executes whatever reaches its ports, so nothing listens where strangers are: our own cluster is bound to
127.0.0.1, and a public address is refused. The dashboard and the usage reports are off.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from contextlib import ExitStack, redirect_stdout
from typing import Any

from harness.engines.errors import EngineError
from harness.settings import SettingsError

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB. Only chunks of a few MB pass through."""
REACH_WITHIN_S = 10.0
LOOK_EVERY_S = 1.0


class Cluster:
    """Where actors of `harness.engines.node.Node` live. A slot is a GPU, or as many processors as a run has threads
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
        from harness.engines.node import Node

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
