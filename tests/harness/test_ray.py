"""``--engine ray``: the same rows on a cluster's nodes, no lost node loses one, and what cannot work is a sentence or a row."""

import dataclasses
import functools
import json
import os
import re
import socket
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy
import psutil
import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")

from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from harness import cli
from harness.exit_codes import ENVIRONMENT, RUN_FAILED, USAGE
from harness.matrix import ray_cluster, ray_pool
from harness.matrix.ray_cluster import EngineError, connected, private_address
from harness.matrix.ray_pool import RayPool
from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from harness.settings import SettingsError
from harness.supervisor.pool import Pool
from instrument.environment import device_slug
from instrument.results import transfer
from instrument.results.claims import claim
from instrument.results.folder import finished_runs, indexed_rows, write_terminal
from tests.harness.commands import TWO_STEPS
from tests.soak.reliability.ray_nodes import trial, two_nodes

SLUG = device_slug(torch.device("cpu"))
SMALL = ["matrix", *TWO_STEPS, "--cases", "gpt2_clm", "--configs", "fp32_true"]


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
        "100.64.0.1:6379",
        "169.254.169.254:80",
        "192.0.2.1:6379",
        "[fe80::1]:6379",
    ],
)
def test_a_public_address_is_refused(address):
    with pytest.raises(SettingsError, match="not a private address.*allowed: loopback"):
        private_address(address)


@pytest.mark.parametrize(
    "address", ["auto", "ray://10.0.0.1:10001", "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:x", "h:99999", "", "local"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(SettingsError, match="allowed: HOST:PORT"):
        private_address(address)


def test_a_name_counts_by_all_it_stands_for(monkeypatch):
    both = [(0, 0, 0, "", ("10.0.0.1", 1)), (0, 0, 0, "", ("8.8.8.8", 1))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(SettingsError, match="8.8.8.8 is not a private address"):
        private_address("head:6379")


def test_a_name_is_looked_up_once_and_ray_gets_the_number(monkeypatch):
    """A name server that answers a public address the second time leads nowhere."""
    answers, asked = iter(["10.0.0.1", "8.8.8.8"]), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (next(answers), 6379))])
    monkeypatch.setattr(socket, "create_connection", lambda at, **_: asked.append(at) or socket.socket())
    fake = SimpleNamespace(init=lambda address, **_: asked.append(address) or nullcontext())
    monkeypatch.setitem(sys.modules, "ray", fake)
    with connected("head:6379"):
        assert asked == [("10.0.0.1", 6379), "10.0.0.1:6379"]


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "localhost")])
def test_loopback_is_allowed_where_something_answers(family, host):
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        private_address(f"{host}:{server.getsockname()[1]}")
        port = server.getsockname()[1]
    with pytest.raises(EngineError, match="no Ray cluster answers"):
        private_address(f"127.0.0.1:{port}")


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


@pytest.mark.process
def test_our_own_cluster_listens_on_loopback_alone_and_has_no_dashboard(tmp_path):
    code = (
        "from harness.matrix.ray_cluster import connected; import sys\n"
        "with connected(None):\n"
        "    import ray\n"
        "    found = [(n['Resources']['CPU'], n['NodeManagerAddress']) for n in ray.nodes()]\n"
        "    print(*found[0], file=sys.stderr, flush=True)\n"
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
        child.communicate(timeout=300)
    assert said.split() == [str(float(len(psutil.Process().cpu_affinity()))), "127.0.0.1"]
    assert len(listening) >= 4 and {at.ip for at in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert 8265 not in {at.port for at in listening} and all("--disable-frontend" in command for command in dashboards)


NODE = "0" * 56
DONE = "unsupported"
"""A settled row that needs no evaluation."""


class Question:
    """A reference: a call, made when somebody waits for its answer or fetches it."""

    def __init__(self, call, number=0):
        self.number = number
        self.call = functools.cache(lambda: self._answer(call))

    def _answer(self, call):
        try:
            return call(), None
        except Exception as error:
            return None, error


class RayInProcess:
    """What the pool uses of Ray, in this process: tasks are executed one by one when somebody waits for them. By number:
    those that ``lose`` their node after they posted progress, those that stay ``pending``. ``fail``: raised by all at once."""

    def __init__(self, slots=1, lose=(), pending=(), fail=None):
        self.slots, self.lose, self.pending, self.fail = slots, lose, pending, fail
        self.tasks, self.workers, self.cancelled = 0, 0, []
        self.node = NODE

    def remote(self, what):
        def submit(*given):
            if isinstance(what, type):
                self.board = actor = what()
                method = lambda name: SimpleNamespace(remote=lambda *a: Question(lambda: getattr(actor, name)(*a)))  # noqa: E731
                return SimpleNamespace(post=method("post"), read=method("read"))
            self.tasks += 1
            return Question(lambda number=self.tasks: self._execute(number, what, given), self.tasks)

        return SimpleNamespace(options=lambda **room: SimpleNamespace(remote=submit))

    def _execute(self, number, what, given):
        if self.fail is not None:
            raise self.fail
        self.workers += 1
        try:
            result = what(*given)
        except Exception as error:
            raise RayTaskError("execute_on_node", "Traceback", error) from error
        if number in self.lose:
            raise WorkerCrashedError()
        return result

    def get(self, question, timeout=None):
        if question in self.cancelled:
            raise TaskCancelledError()
        answer, error = question.call()
        if error is not None:
            raise error
        return answer

    def wait(self, questions, timeout):
        ready = [question for question in questions if question in self.cancelled or question.number not in self.pending][:1]
        for question in ready:
            if question not in self.cancelled:
                question.call()
        return ready, []

    def cancel(self, question, force=False):
        self.cancelled.append(question)

    def nodes(self):
        return [{"NodeID": self.node, "Alive": True, "Resources": {"CPU": float(self.slots)}}]

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: NODE, get_worker_id=lambda: f"worker {self.workers}")


@pytest.fixture
def instant(monkeypatch, tmp_path):
    """A cluster without Ray, on whose nodes runs end at once."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)

    class InstantPool(Pool):
        def run(self, tick):
            (settings,), out = self.queue, self.out
            log = out / "training_logs" / f"run_{settings.run_id}.jsonl"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text((log.read_text() if log.exists() else "") + "{}\n")
            (out / "runs" / settings.run_id / "checkpoint-1").mkdir(parents=True, exist_ok=True)
            (out / "runs" / settings.run_id / "checkpoint-1" / "state").write_bytes(b"x" * 10)
            write_terminal(out, summarize(settings, Outcome(status="preempted" if self.stop.requested else DONE)))
            yield SimpleNamespace(failure=None)

    def make(**how):
        cluster = RayInProcess(**how)
        monkeypatch.setattr(ray_pool, "ray", cluster)
        return cluster

    monkeypatch.setattr(ray_pool, "Pool", InstantPool)
    make.out = tmp_path / "out"
    return make


def run(runs, out, jobs=None, device=SLUG, **given):
    return list(RayPool(list(runs), out, jobs, device, **given).run(lambda: None, seconds_between_ticks=0.01))


def nothing_left(out):
    assert not list(out.rglob("*.ddb-tmp")) and not list(out.rglob(".claim*"))
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


@pytest.fixture
def runs(plan):
    return [plan("gpt2_clm", "fp32_true", seed=seed) for seed in range(3)]


def test_rows_and_files_come_home_and_nothing_stays(instant, runs):
    instant(slots=2)
    (left := Path(os.environ["TMPDIR"]) / ".ddb-run.killed.ddb-tmp").mkdir()
    rows = [one.record for one in run(runs, instant.out)]
    assert [row.status for row in rows] == [DONE] * 3 and indexed_rows(instant.out).keys() == {row.run_id for row in rows}
    assert not left.exists(), "what a killed worker left is swept"
    nothing_left(instant.out)


def test_a_run_that_loses_two_nodes_is_a_row_and_the_next_runs(instant, runs):
    """Ray has retried the first task by then."""
    instant(lose=[1])
    rows = {one.settings.seed: one.record for one in run(runs, instant.out)}
    assert [rows[seed].status for seed in range(3)] == ["error", DONE, DONE]
    assert "its node was lost 2 times" in rows[0].error and rows[0].flags["death"] == {"cause": "node_lost", "goes_on": True}
    assert rows[0].env["python"] and len(indexed_rows(instant.out)) == 3
    nothing_left(instant.out)


def test_a_run_that_another_worker_executes_again_is_reported(instant, runs):
    cluster, notes = instant(), []
    pool = RayPool(runs[:1], instant.out, None, SLUG, say=notes.append)
    first = ray_pool.Progress("worker 1", NODE, "far", None)
    pool.running = [ray_pool.Running(runs[0], None, Question(lambda: None), progress=first)]
    cluster.board.post(runs[0].run_id, dataclasses.replace(first, worker="worker 2"))
    pool._ended(0.0)
    pool._ended(0.0)
    assert notes == [f"far was lost with {runs[0].run_id}: it is run again"]


@pytest.mark.parametrize(
    "error, status, cause", [(OSError(28, "No space left on device"), "error", "exception"), (MemoryError(), "oom", "host_oom")]
)
def test_a_node_s_own_failure_is_that_run_s_row(instant, runs, monkeypatch, error, status, cause):
    def fail(*_):
        raise error

    instant()
    monkeypatch.setattr(ray_pool.Pool, "run", fail)
    (ended,) = run(runs[:1], instant.out)
    assert ended.record.status == status and ended.record.error.startswith(f"on {socket.gethostname()}: {type(error).__name__}")
    death = ended.record.flags["death"]
    assert (death["cause"], death["goes_on"], death["type"]) == (cause, False, type(error).__name__)
    assert len(indexed_rows(instant.out)) == 1


@pytest.mark.parametrize(
    "error, cause",
    [(RayTaskError("execute_on_node", "Traceback\nA: b", None), "exception"), (OutOfMemoryError("no room"), "host_oom_kill")],
)
def test_a_task_that_ray_ends_in_the_middle_is_a_row(instant, runs, error, cause):
    cluster = instant()

    def execute(number, what, given):
        cluster.board.post(runs[0].run_id, ray_pool.Progress("w", NODE, "far", summarize(runs[0], Outcome(status="error"))))
        raise error

    cluster._execute = execute
    pool = RayPool(runs[:1], instant.out, None, SLUG)
    (ended,) = pool.run(lambda: None)
    assert ended.record.flags["death"]["cause"] == cause and "far" in ended.record.error


def test_other_data_on_a_node_are_refused_there(instant, runs):
    instant()
    (ended,) = run([dataclasses.replace(runs[0], data_fingerprint="that of another folder")], instant.out)
    assert ended.record.status == "error" and "is not here what it is on the machine that planned the run" in ended.record.error


def test_a_node_that_would_do_something_else_gets_no_run(instant, runs, monkeypatch):
    instant()
    with pytest.raises(EngineError, match="one device a folder"):
        run(runs, instant.out, device="nvidia-h200")
    pool = RayPool(runs, instant.out, None, SLUG)
    monkeypatch.setattr(ray_pool, "project_sha256", lambda: "0")
    with pytest.raises(EngineError, match="another version of this program"):
        list(pool.run(lambda: None))
    assert not finished_runs(instant.out)
    nothing_left(instant.out)


def test_a_cluster_that_cannot_run_this_program_is_a_sentence_not_a_loop(instant, runs):
    instant(fail=RayTaskError("execute_on_node", "Traceback\nOSError: x", None))
    with pytest.raises(EngineError, match="cannot run this program"):
        run(runs, instant.out)
    nothing_left(instant.out)


@pytest.mark.parametrize(
    "error, cause, says",
    [
        (WorkerCrashedError(), "node_lost", "its node was lost 2 times.* a node that had reported nothing"),
        (NodeDiedError("the node is dead"), "node_lost", "its node was lost 2 times"),
        (ObjectReconstructionFailedError("00", None, ""), "node_lost", "its node was lost 2 times"),
        (OutOfMemoryError("no room"), "host_oom_kill", "OutOfMemoryError: no room"),
        (RayTaskError("execute_on_node", "T", OutOfMemoryError("no room")), "host_oom_kill", "OutOfMemoryError: no room"),
        (RayTaskError("execute_on_node", "T", ActorDiedError()), "exception", "ActorDiedError: "),
        (ObjectLostError("0" * 56, None, ""), "node_lost", "its node was lost 2 times.*ObjectLostError"),
        (LocalRayletDiedError(), "node_lost", "its node was lost 2 times"),
        (RaySystemError("broken"), "exception", "RaySystemError: .*broken"),
        (RuntimeEnvSetupError("no pip"), "exception", "RuntimeEnvSetupError"),
        (ObjectStoreFullError("full"), "exception", "ObjectStoreFullError"),
        (OutOfDiskError("full"), "exception", "on a node that had reported nothing: OutOfDiskError"),
    ],
)
@pytest.mark.parametrize("where", ["the result", "the submission", "the wait"])
def test_a_task_that_is_lost_before_it_posted_progress_is_a_row_and_never_the_end_of_the_matrix(
    instant, runs, monkeypatch, error, cause, says, where
):
    def fail(*_, **__):
        raise error

    cluster = instant(fail=error)
    if where == "the submission":
        monkeypatch.setattr(cluster, "_execute", lambda *_: pytest.fail("nothing was submitted"))
        submitted = lambda what: SimpleNamespace(remote=fail if callable(what) else None)  # noqa: E731
        board = cluster.remote(ray_pool.Board)
        monkeypatch.setattr(
            cluster,
            "remote",
            lambda what: board if what is ray_pool.Board else SimpleNamespace(options=lambda **_: submitted(what)),
        )
    elif where == "the wait":
        monkeypatch.setattr(cluster, "wait", fail)
    rows = [ended.record for ended in run(runs, instant.out)]
    assert [row.flags["death"]["cause"] for row in rows] == [cause] * 3 and all(re.search(says, row.error) for row in rows)
    assert {row.status for row in rows} == {"oom" if cause == "host_oom_kill" else "error"}
    assert indexed_rows(instant.out).keys() == {run.run_id for run in runs}
    nothing_left(instant.out)


@pytest.mark.parametrize("error", [OutOfMemoryError("no room"), ActorDiedError(), GetTimeoutError("nothing")])
def test_runs_do_without_a_board_that_ray_killed(instant, runs, monkeypatch, error):
    cluster, get = instant(), RayInProcess.get

    def lost(question, timeout=None):
        if timeout is not None:
            raise error
        return get(cluster, question)

    monkeypatch.setattr(cluster, "get", lost)
    assert [one.record.status for one in run(runs, instant.out)] == [DONE] * 3
    nothing_left(instant.out)


def test_a_cluster_that_fails_altogether_is_a_sentence(instant, tmp_path, capsys, monkeypatch):
    def fail():
        raise RaySystemError("no more nodes")

    @contextmanager
    def fake(*_, **__):
        yield

    cluster = instant()
    cluster.init, cluster.nodes = fake, fail
    monkeypatch.setitem(sys.modules, "ray", cluster)
    assert cli.main([*SMALL, "--engine", "ray", "--out", str(instant.out)]) == ENVIRONMENT
    said = capsys.readouterr().err
    assert re.search("harness: Ray failed, .*RaySystemError.*no more nodes\n", said) and "Traceback" not in said


@pytest.mark.process
@pytest.mark.soak
def test_real_ray_s_memory_monitor_makes_rows_and_the_matrix_ends(tmp_path, capsys, monkeypatch):
    """The monitor finds too little memory whatever is used, and kills the runs' workers and the board again and again."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    assert cli.main([*SMALL, "--seeds", "0", "1", "--engine", "ray", "--out", str(tmp_path / "out")]) == RUN_FAILED
    rows = finished_runs(tmp_path / "out")
    assert [(row.status, row.flags["death"]["cause"]) for row in rows] == [("oom", "host_oom_kill")] * 2
    assert all("running low on memory" in row.error for row in rows)


def test_what_is_not_what_was_sent_is_refused(instant, runs, monkeypatch):
    instant()
    spoiled = lambda out, run_id: [dataclasses.replace(one, sha256="0") for one in transfer.pack(out, run_id)]  # noqa: E731
    monkeypatch.setattr(ray_pool, "pack", spoiled)
    with pytest.raises(EngineError, match=rf"{socket.gethostname()}: .*SHA-256 differs"):
        run(runs, instant.out)
    assert not finished_runs(instant.out)


def test_a_cluster_without_room_is_waited_for_and_then_a_sentence(instant, runs, monkeypatch):
    instant(slots=0)
    monkeypatch.setattr(ray_pool, "WAIT_FOR_ROOM_S", 0.05)
    with pytest.raises(EngineError, match="no node with room"):
        run(runs, instant.out)


def test_a_run_that_another_driver_has_is_left_to_it(instant, runs):
    instant(slots=2)
    with claim(instant.out, runs[1].run_id):
        ended = {one.settings.seed: one for one in run(runs, instant.out)}
    assert "is being executed by process" in str(ended[1].failure) and ended[1].record is None
    assert [ended[seed].record.status for seed in (0, 2)] == [DONE, DONE]


def test_a_run_that_another_driver_finished_meanwhile_is_not_done_again(instant, runs):
    instant()
    before = summarize(runs[0], Outcome(status=DONE, error="before"))
    write_terminal(instant.out, before)
    pool = RayPool(list(runs), instant.out, None, SLUG)
    theirs = summarize(runs[1], Outcome(status=DONE, error="by the other driver"))
    write_terminal(instant.out, theirs)
    rows = {one.settings.seed: one.record for one in pool.run(lambda: None)}
    assert rows[1] == theirs and rows[0] != before, "one that was done when this driver began was asked for again"


def test_jobs_are_the_runs_of_the_whole_cluster(instant, runs):
    instant(slots=8)
    pool, seen = RayPool(list(runs), instant.out, 2, SLUG), []
    for _ in pool.run(lambda: seen.append(len(pool.running)), seconds_between_ticks=0):
        seen.append(len(pool.running) + 1)
    assert max(seen) == 2


def test_a_stop_begins_nothing_new_and_takes_back_what_no_node_executes(instant, runs):
    stop, cluster = Stop(), instant(slots=2, pending=[2])
    ended, pool = [], RayPool(list(runs), instant.out, None, SLUG, stop=stop)
    for one in pool.run(lambda: None, seconds_between_ticks=0.01):
        ended.append(one)
        stop.request("SIGTERM")
    assert [one.record and one.record.status for one in ended] == [DONE, None] and len(pool.queue) == 1
    assert len(set(cluster.cancelled)) == 1, "the second task, which had posted nothing"
    assert not list(instant.out.rglob(".claim*"))


def test_a_stop_reaches_the_run_and_its_checkpoint_comes_home_and_goes_to_the_next_node(instant, runs, monkeypatch):
    stop, cluster, out, run_id = Stop(), instant(), instant.out, runs[1].run_id
    execute = ray_pool.Pool.run

    def asked_in_the_middle(pool, tick):
        cluster.board.stop = "SIGTERM"
        time.sleep(ray_pool.POST_EVERY_S)
        tick()
        return execute(pool, tick)

    monkeypatch.setattr(ray_pool.Pool, "run", asked_in_the_middle)
    (stopped,) = run([runs[1]], out, stop=stop)
    assert stopped.record.status == "preempted" and (out / "runs" / run_id / "checkpoint-1" / "state").read_bytes() == b"x" * 10
    (out / "runs" / run_id / "checkpoint-1" / "state").write_bytes(b"y" * (5 << 20))
    monkeypatch.setattr(ray_pool.Pool, "run", execute)
    (again,) = run([runs[1]], out)
    assert again.record.status == DONE
    assert (out / "training_logs" / f"run_{run_id}.jsonl").read_text() == "{}\n{}\n", "its log went along and came back"
    nothing_left(out)


@pytest.mark.process
def test_two_runs_on_two_real_nodes_one_of_which_is_killed(tmp_path):
    """Every row, every step and every weight as by the sequential runner; one run was begun on both nodes."""
    found = trial(tmp_path, 2, kill=True)
    assert found == {"trials": 2, "lost": [], "differing": [], "run_again": 1, "nodes_killed": 1}


@pytest.mark.process
@pytest.mark.soak
def test_files_larger_than_the_object_store_come_home(plan, tmp_path, monkeypatch):
    """120 MB to each of two nodes and back, through stores of 80 MiB; the board is killed meanwhile, and starts again."""
    import ray

    large = numpy.random.default_rng(0).bytes(120_000_000)
    runs, out, nodes = [plan("gpt2_clm", "fp32_true", seed=seed) for seed in (0, 1)], tmp_path / "out", tmp_path / "nodes"
    checkpoints = [out / "runs" / run.run_id / "checkpoint-1" / "state" for run in runs]
    for checkpoint in checkpoints:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(large)

    def echo(board, settings, device, project, rules, packed):
        node = nodes / ray.get_runtime_context().get_node_id()
        transfer.unpack(node, settings.run_id, packed)
        state = node / "runs" / settings.run_id / "checkpoint-1" / "state"
        state.write_bytes(state.read_bytes()[::-1])
        write_terminal(node, summarize(settings, Outcome(status=DONE)))
        return transfer.pack(node, settings.run_id)

    monkeypatch.setattr(ray_pool, "execute_on_node", echo)
    with two_nodes() as (address, _), connected(address):
        pool = RayPool(runs, out, None, SLUG)
        ray.kill(pool._board, no_restart=False)
        assert [ended.record.status for ended in pool.run(lambda: None)] == [DONE] * 2
    assert all(checkpoint.read_bytes() == large[::-1] for checkpoint in checkpoints) and len(list(nodes.iterdir())) == 2


@pytest.mark.soak
def test_a_real_node_s_run_is_stopped_with_a_checkpoint_and_resumes_on_another(plan, tmp_path):
    settings, stop = plan("gpt2_clm", "amp_fp16", max_steps=300), Stop()
    with two_nodes() as (address, kill_a_node), connected(address):
        pool = RayPool([settings], tmp_path / "out", None, SLUG, stop=stop)

        def look():
            if any(run.last_step is not None for run in pool.running):
                stop.request("SIGTERM")

        (stopped,) = pool.run(look, seconds_between_ticks=0.05)
        assert stopped.record.status == "preempted" and 0 < stopped.record.steps_done < 300
        assert list((tmp_path / "out" / "runs" / settings.run_id).glob("checkpoint-*"))
        (ended,) = RayPool([settings], tmp_path / "out", None, SLUG).run(lambda: None)
    assert ended.record.status == "completed" and ended.record.steps_done == 300
    assert ended.record.flags["resumed"]["behind_steps"] == [stopped.record.steps_done]
    steps = (tmp_path / "out" / "training_logs" / f"run_{settings.run_id}.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 301))


@pytest.mark.soak
@pytest.mark.parametrize("kill", [False, True], ids=["healthy", "node killed"])
def test_forty_two_runs_on_two_real_nodes(tmp_path, kill):
    found = trial(tmp_path, 42, kill=kill)
    assert (found["lost"], found["differing"], found["nodes_killed"], found["run_again"]) == ([], [], int(kill), int(kill))
