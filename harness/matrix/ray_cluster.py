"""A Ray cluster: one of our own on this machine's loopback, or one that runs at a private address. Torch-free.

Ray executes whatever reaches its ports: our own cluster is bound to 127.0.0.1, and a public address is refused.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from ipaddress import ip_address, ip_network

from harness.failure import sentence
from harness.settings import SettingsError

RETRIES = 1  # of a task whose node or worker was lost, or killed by Ray's memory monitor
ALLOWED = [ip_network(n) for n in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")]
OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; what does not fit goes through the disk


class EngineError(Exception):
    """The cluster cannot be used, or no longer: one sentence that says why."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """While the block runs, `ray` is connected to the cluster at ``address``, or to one of our own that ends with the block."""
    bind_to_loopback() if address is None else None
    at = address and private_address(address)
    os.environ["RAY_task_oom_retries"] = str(RETRIES)  # noqa: SIM112 (Ray spells it so); else without end
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise EngineError(f"--engine ray needs Ray, which is not installed here ({error}); pip install '.[ray]'") from error
    own = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        context = ray.init(at or "local", log_to_driver=False, logging_level="CRITICAL", **({} if address else own))
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


def private_address(address: str) -> str:
    """The number of the host and its port: a name is looked up once, and all it stands for must be private. Raises
    `SettingsError` for what is no ``HOST:PORT`` or another address, `EngineError` where nothing answers there."""
    host, port = parse_address(address)
    try:
        found = [str(at[0]) for *_, at in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for number in found:
            _require_private(number, address)
        socket.create_connection((found[0], port), timeout=10.0).close()
    except (OSError, UnicodeError) as error:
        raise EngineError(f"--address {address}: no Ray cluster answers there ({error})") from error
    return f"[{found[0]}]:{port}" if ":" in found[0] else f"{found[0]}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port; looks no name up. Raises `SettingsError` as `private_address` does."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        allowed = "HOST:PORT of a Ray cluster's head, such as 10.0.0.5:6379, on a machine that is part of it"
        raise SettingsError(f"--address {address!r}; allowed: {allowed}")
    _require_private(host := host.strip("[]"), address)
    return host, int(port)


def _require_private(host: str, address: str) -> None:
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if not any(ip in network for network in ALLOWED):
        allowed = "loopback (127.0.0.1) and private networks (10.x, 172.16-31.x, 192.168.x, fd..)"
        why = f"{ip} is not a private address, and Ray runs whatever reaches its ports"
        raise SettingsError(f"--address {address}: {why}; allowed: {allowed}")
