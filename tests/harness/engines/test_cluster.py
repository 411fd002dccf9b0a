"""The cluster: bound to loopback, refused elsewhere, and one sentence for what cannot work."""

import socket
import sys

import psutil
import pytest

from harness import cli
from harness.exit_codes import ENVIRONMENT, USAGE
from harness.matrix import ray_cluster
from harness.matrix.ray_cluster import EngineError, require_private
from harness.settings import SettingsError

SMALL = [
    "matrix",
    "--preset",
    "tiny",
    "--data",
    "embedded",
    "--max-steps",
    "2",
    "--batch-size",
    "2",
    "--micro-batch",
    "2",
    "--seq-len",
    "16",
    "--validation-documents",
    "2",
    "--documents",
    "400",
    "--cases",
    "gpt2_clm",
    "--configs",
    "fp32_true",
]


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8:6379",
        "1.1.1.1:1",
        "[2606:4700:4700::1111]:6379",
        "0.0.0.0:6379",
        "224.0.0.1:6379",
        "[::]:6379",
        "[::ffff:8.8.8.8]:6379",
    ],
)
def test_a_public_address_is_refused(address):
    with pytest.raises(SettingsError, match="not a private address.*allowed: loopback"):
        require_private(address)


@pytest.mark.parametrize(
    "address", ["auto", "ray://10.0.0.1:10001", "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:x", "h:99999", "", "local"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(SettingsError, match="allowed: HOST:PORT"):
        require_private(address)


def test_a_name_counts_by_all_it_stands_for(monkeypatch):
    both = [(0, 0, 0, "", ("10.0.0.1", 1)), (0, 0, 0, "", ("8.8.8.8", 1))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(SettingsError, match="8.8.8.8 is not a private address"):
        require_private("head:6379")


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "localhost")])
def test_loopback_is_allowed_where_something_answers(family, host):
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        require_private(f"{host}:{server.getsockname()[1]}")
        port = server.getsockname()[1]
    with pytest.raises(EngineError, match="no Ray cluster answers"):
        require_private(f"127.0.0.1:{port}")


def test_usage_errors_are_one_sentence_and_touch_nothing(tmp_path, capsys):
    for words, code, says in (
        (["--address", "127.0.0.1:1"], USAGE, "--address goes with --engine ray"),
        (["--engine", "ray", "--address", "8.8.8.8:6379"], USAGE, "not a private address"),
        (["--engine", "ray", "--jobs", "0"], USAGE, "jobs is 0"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], ENVIRONMENT, "no Ray cluster answers there"),
    ):
        assert cli.main([*SMALL, *words, "--out", str(tmp_path / "out")]) == code
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


def test_a_dry_run_looks_at_the_address_and_says_that_nobody_was_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a dry run asked for a name"))
    dry = [*SMALL, "--dry-run", "--out", str(tmp_path / "out"), "--engine", "ray"]
    for address, says in (
        ("nonsense", "allowed: HOST:PORT"),
        ("8.8.8.8:6379", "not a private address"),
        ("[2606:4700:4700::1111]:1", "not a private address"),
    ):
        assert cli.main([*dry, "--address", address]) == USAGE
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    for address in ("10.0.0.5:6379", "head.cluster:6379", "[fd00::1]:6379"):
        assert cli.main([*dry, "--address", address]) == 0
        assert f"; the cluster at {address} was not contacted\n" in capsys.readouterr().err
    assert cli.main(dry) == 0 and "; no cluster was begun\n" in capsys.readouterr().err


def test_without_ray_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(ray_cluster, "bind_to_loopback", lambda: None)
    assert cli.main([*SMALL, "--engine", "ray", "--out", str(tmp_path / "out")]) == ENVIRONMENT
    said = capsys.readouterr().err
    assert "pip install '.[ray]'" in said and said.count("\n") == 1


def test_our_own_cluster_listens_on_loopback_alone_and_has_no_dashboard(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")
    code = (
        "from harness.matrix.ray_cluster import Cluster; import sys\n"
        "with Cluster(None, device='cpu', threads=1) as own:\n"
        "    print(own.slots(), *[n['NodeManagerAddress'] for n in own.nodes()], file=sys.stderr, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    child = psutil.Popen([sys.executable, "-c", code], stdin=-1, stderr=-1)
    try:
        said = child.stderr.readline().decode()
        while said and not said[0].isdigit():
            said = child.stderr.readline().decode()
        family = [child, *child.children(recursive=True)]
        listening = [c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        dashboards = [p.cmdline() for p in family if any("dashboard.py" in word for word in p.cmdline())]
    finally:
        child.communicate(timeout=60)
    assert said.split() == [str(len(psutil.Process().cpu_affinity())), "127.0.0.1"]
    assert len(listening) >= 4 and {at.ip for at in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert 8265 not in {at.port for at in listening} and all("--disable-frontend" in command for command in dashboards)
