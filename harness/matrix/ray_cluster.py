"""A Ray cluster: one of our own on this machine's loopback, or one that runs at a private address. Torch-free.

Ray executes whatever reaches its ports: our own cluster is bound to 127.0.0.1, and a public address is refused.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from ipaddress import ip_address

from harness.failure import sentence
from harness.settings import SettingsError

RETRIES = 1  # of a task whose node or worker was lost, or killed by Ray's memory monitor
OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; what does not fit goes through the disk


class EngineError(Exception):
    """The cluster cannot be used, or no longer: one sentence that says why."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """While the block runs, `ray` is connected to the cluster at ``address``, or to one of our own that ends with the block."""
    bind_to_loopback() if address is None else require_private(address)
    os.environ.update(RAY_task_oom_retries=str(RETRIES))  # else without end
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise EngineError(f"--engine ray needs Ray, which is not installed here ({error}); pip install '.[ray]'") from error
    own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        context = ray.init(address or "local", log_to_driver=False, logging_level="CRITICAL", **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise EngineError(f"cannot use Ray at {address or '127.0.0.1'}: {str(error).strip().splitlines()[0]}") from error
    # Ray prints how a node ended on standard output, where the rows go, whatever it is configured to.
    try:
        with redirect_stdout(io.StringIO()), context:
            yield
    except RayError as error:
        raise EngineError(f"Ray failed, and the same command resumes: {sentence(error)}") from error


def bind_to_loopback() -> None:
    """Before Ray is imported: a cluster that begins here listens on 127.0.0.1 alone, and reports to nobody. Only this
    switch binds all of Ray's processes; its option for a node's address leaves the ports open on every interface."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def require_private(address: str) -> None:
    """Raise `SettingsError` for what is no ``HOST:PORT`` or a public address, `EngineError` where nothing answers there."""
    host, port = parse_address(address)
    try:
        for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            _refuse_public(found[4][0], address)
        socket.create_connection((host, port), timeout=10.0).close()
    except (OSError, UnicodeError) as error:
        raise EngineError(f"--address {address}: no Ray cluster answers there ({error})") from error


def parse_address(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port; looks no name up. Raises `SettingsError` as `require_private` does."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        allowed = "HOST:PORT of a Ray cluster's head, such as 10.0.0.5:6379, on a machine that is part of it"
        raise SettingsError(f"--address {address!r}; allowed: {allowed}")
    _refuse_public(host := host.strip("[]"), address)
    return host, int(port)


def _refuse_public(host: str, address: str) -> None:
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return
    if ip.is_global or ip.is_unspecified or ip.is_multicast:
        allowed = "loopback (127.0.0.1) and private networks (10.x, 172.16-31.x, 192.168.x, fd..)"
        why = f"{ip} is not a private address, and Ray runs whatever reaches its ports"
        raise SettingsError(f"--address {address}: {why}; allowed: {allowed}")
