"""Runs on a cluster: the same rows, no node's death loses one, and what goes wrong there is a row or a sentence."""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")

from ray.exceptions import ActorDiedError, RayTaskError

from harness.matrix import ray_node as node_module
from harness.matrix import ray_pool
from harness.matrix.ray_cluster import Cluster, EngineError
from harness.matrix.ray_node import Node
from harness.matrix.ray_pool import RayPool, nodes_own_failure
from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from instrument.results.claims import claim
from instrument.results.files import temporary_folder
from instrument.results.folder import finished_runs, indexed_rows, write_terminal
from tests.soak.reliability.ray_nodes import trial, two_nodes

DONE = "unsupported"
"""A settled row that needs no evaluation."""


class Question:
    """What ``actor.method.remote(...)`` returns here: the call itself, made when its answer is fetched."""

    def __init__(self, call):
        self.call = call


class Method:
    def __init__(self, ask):
        self.remote = ask


class Actor:
    """Actors without Ray: `Node` in this process, and a fault planted at one of its calls."""

    def __init__(self, cluster):
        self.cluster, self.node, self.dead = cluster, Node("cpu"), False

    def __getattr__(self, name):
        return Method(lambda *given: Question(lambda: self._answer(name, given)))

    def _answer(self, name, given):
        self.cluster.calls += 1
        if self.cluster.calls in self.cluster.die_at:
            self.dead = True
        if self.dead:
            raise ActorDiedError()
        if self.cluster.fail == name:
            raise RayTaskError(
                name, "Traceback\nOSError: [Errno 28] No space left on device", OSError(28, "No space left on device")
            )
        return getattr(self.node, name)(*given)


class InProcess:
    """A cluster without Ray, with ``slots`` slots."""

    device = "cpu"

    def __init__(self, slots=1, die_at=(), fail=None):
        self.room, self.die_at, self.fail, self.calls, self.dismissed = slots, set(die_at), fail, 0, 0

    def slots(self):
        return self.room

    def hire(self):
        return Actor(self)

    def dismiss(self, actor):
        self.dismissed += 1
        if hasattr(actor.node, "out"):
            actor.node._over.wait(10)
            with contextlib.suppress(OSError):
                actor.node.forget()


@pytest.fixture
def instant(monkeypatch, tmp_path):
    """Runs that end at once, and questions that are answered at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)

    def execute(settings, out, *, stop, on_step, rules):
        log = out / "training_logs" / f"run_{settings.run_id}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        went_on = log.read_text() if log.exists() else ""
        log.write_text(went_on + "{}\n")
        status = "preempted" if stop.requested else DONE
        (out / "runs" / settings.run_id / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (out / "runs" / settings.run_id / "checkpoint-1" / "state").write_bytes(b"x" * 10)
        write_terminal(out, summarize(settings, Outcome(status=status)))
        return SimpleNamespace(failure=None)

    class Answers:
        @staticmethod
        def wait(questions, num_returns, timeout):
            return questions, []

        @staticmethod
        def get(question):
            return question.call()

    monkeypatch.setattr(node_module, "supervise", execute)
    monkeypatch.setattr(ray_pool, "ray", Answers)
    return tmp_path / "out"


def run(pool):
    return list(pool.run(lambda: None, seconds_between_ticks=0.01))


def nothing_left_behind(out: Path):
    assert not list(out.rglob("*.ddb-tmp")) and not list(out.rglob(".claim*"))
    assert not list(Path(os.environ["TMPDIR"]).iterdir())


@pytest.fixture
def runs(plan):
    return [plan("gpt2_clm", "fp32_true", seed=seed) for seed in range(3)]


def test_a_node_that_dies_at_any_call_loses_nothing(instant, runs, tmp_path):
    healthy = InProcess()
    run(RayPool(list(runs), tmp_path / "healthy", None, None, healthy))
    assert healthy.calls > 20
    for nth in range(1, healthy.calls + 1):
        out, notes = tmp_path / f"out-{nth}", []
        pool = RayPool(list(runs), out, None, None, InProcess(die_at=[nth]), say=notes.append)
        ended = run(pool)
        assert sorted(one.settings.seed for one in ended) == [0, 1, 2]
        assert all(one.record.status == DONE and one.failure is None for one in ended), nth
        assert set(indexed_rows(out)) == {one.run_id for one in runs} and len(notes) <= 1
        nothing_left_behind(out)


def test_a_run_that_loses_two_nodes_is_a_row_and_the_next_runs(instant, runs):
    pool = RayPool(list(runs), instant, None, None, InProcess(die_at=[4, 9]))
    rows = {one.settings.seed: one.record for one in run(pool)}
    assert [rows[seed].status for seed in range(3)] == ["error", DONE, DONE]
    assert "its node was lost 2 times" in rows[0].error and rows[0].flags["death"] == {"cause": "node_lost", "goes_on": True}
    assert rows[0].env["python"] and len(indexed_rows(instant)) == 3
    nothing_left_behind(instant)


def test_a_node_s_own_failure_is_that_run_s_row_and_is_not_tried_again(instant, runs):
    for fail in ("start", "report", "read"):
        cluster = InProcess(fail=fail)
        (ended,) = run(RayPool(runs[:1], instant / fail, None, None, cluster))
        assert ended.record.status == "error" and "No space left on device" in ended.record.error
        assert ended.record.flags["death"] == {"cause": "exception", "goes_on": False, "type": "OSError"}
        assert len(indexed_rows(instant / fail)) == 1


def test_a_node_s_own_failure_is_the_death_that_it_would_be_here():
    """The whole error of a task is long; its cause, where it could be sent, is the exception itself."""
    memory = nodes_own_failure(RayTaskError("start", "Traceback\nMemoryError", MemoryError()), "far")
    assert (memory.cause, memory.status, memory.error) == ("host_oom", "oom", "on far: MemoryError")
    behind = OSError(28, "No space left on device")
    behind.__cause__ = ImportError("no such library")
    assert nodes_own_failure(RayTaskError("start", "", behind), "far").cause == "import_failure"


def test_a_node_s_failure_that_could_not_be_sent_says_so():
    class Unsendable(Exception):
        def __reduce__(self):
            raise TypeError("a lock is in it")

    death = nodes_own_failure(RayTaskError("start", "Traceback\nUnsendable: words", Unsendable("words")), "far")
    assert (death.cause, death.error) == ("exception", "on far: Unsendable: words")
    assert death.flags["death"]["why"] == "the node could not send the exception itself"


def test_other_data_on_a_node_are_refused_there(instant, runs):
    other = dataclasses.replace(runs[0], data_fingerprint="that of another folder")
    (ended,) = run(RayPool([other], instant, None, None, InProcess()))
    assert ended.record.status == "error" and "is not here what it is on the machine that planned the run" in ended.record.error


@pytest.mark.parametrize(
    "attribute, value, says",
    [("project_sha256", "0", "another version of this program"), ("device", "nvidia-h200", "one device a folder")],
)
def test_a_node_that_would_do_something_else_gets_no_run(instant, runs, monkeypatch, attribute, value, says):
    facts = Node("cpu").facts()
    monkeypatch.setattr(Node, "facts", lambda self: dataclasses.replace(facts, **{attribute: value}))
    with pytest.raises(EngineError, match=says):
        run(RayPool(runs, instant, None, None, InProcess(), device=facts.device))
    assert not finished_runs(instant)
    nothing_left_behind(instant)


def test_a_cluster_that_cannot_run_this_program_is_a_sentence_not_a_loop(instant, runs):
    with pytest.raises(EngineError, match="cannot run this program"):
        run(RayPool(runs, instant, None, None, InProcess(die_at=range(1, 100))))
    with pytest.raises(EngineError, match="cannot run this program: OSError"):
        run(RayPool(runs, instant, None, None, InProcess(fail="facts")))


def test_a_cluster_without_room_is_waited_for_and_then_a_sentence(instant, runs, monkeypatch):
    monkeypatch.setattr(ray_pool, "WAIT_FOR_ROOM_S", 0.05)
    with pytest.raises(EngineError, match="no node with room"):
        run(RayPool(runs, instant, None, None, InProcess(slots=0)))


def test_a_run_that_another_driver_has_is_left_to_it(instant, runs):
    with claim(instant, runs[1].run_id):
        ended = {one.settings.seed: one for one in run(RayPool(list(runs), instant, None, None, InProcess(slots=2)))}
    assert "is being executed by process" in str(ended[1].failure) and ended[1].record is None
    assert [ended[seed].record.status for seed in (0, 2)] == [DONE, DONE]


def test_a_run_that_another_driver_finished_meanwhile_is_not_done_again(instant, runs):
    before, cluster = summarize(runs[0], Outcome(status=DONE, error="before")), InProcess()
    write_terminal(instant, before)
    pool = RayPool(list(runs), instant, None, None, cluster)
    theirs = summarize(runs[1], Outcome(status=DONE, error="by the other driver"))
    write_terminal(instant, theirs)
    rows = {one.settings.seed: one.record for one in run(pool)}
    assert rows[1] == theirs and rows[0] != before, "one that was done when this driver began was asked for again"


def test_jobs_are_the_runs_of_the_whole_cluster(instant, runs):
    pool, seen = RayPool(list(runs), instant, 2, None, InProcess(slots=8)), []
    for _ in pool.run(lambda: seen.append(len(pool.slots)), seconds_between_ticks=0):
        pass
    assert max(seen) == 2


def test_a_stop_begins_nothing_new(instant, runs):
    stop = Stop()
    pool = RayPool(list(runs), instant, None, stop, InProcess())
    ended = []
    for one in pool.run(lambda: None, seconds_between_ticks=0.01):
        ended.append(one)
        stop.request("SIGTERM")
    assert len(ended) in (1, 2) and len(ended) + len(pool.queue) == 3, "at most the one that had begun"


def test_what_a_stopped_run_left_goes_to_the_node_that_goes_on(instant, runs):
    run_id = runs[1].run_id
    write_terminal(instant, summarize(runs[1], Outcome(status="preempted")))
    (instant / "runs" / run_id / "checkpoint-1").mkdir()
    (instant / "runs" / run_id / "checkpoint-1" / "state").write_bytes(b"y" * (5 << 20))
    (instant / "training_logs").mkdir()
    (instant / "training_logs" / f"run_{run_id}.jsonl").write_text("before\n")
    (again,) = run(RayPool([runs[1]], instant, None, None, InProcess()))
    assert again.record.status == DONE
    assert (instant / "training_logs" / f"run_{run_id}.jsonl").read_text() == "before\n{}\n", "its log came along and back"
    nothing_left_behind(instant)


def test_a_killed_slot_s_folder_is_swept_by_the_next_one(instant):
    import subprocess
    import sys

    code = (
        "from instrument.results.files import temporary_folder\nimport os\n"
        "with temporary_folder('ddb-run') as folder: print(folder, flush=True), os.kill(os.getpid(), 9)"
    )
    left = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    assert left.is_dir()
    with temporary_folder("ddb-run") as mine:
        Node("cpu")
        assert not left.exists() and mine.is_dir()
    assert not mine.exists()


def test_four_runs_on_two_real_nodes_one_of_which_is_killed(tmp_path):
    """Every row, every step and every weight as by the sequential runner; one run was begun on both nodes."""
    found = trial(tmp_path, 4, kill=True)
    assert found == {"trials": 4, "lost": [], "differing": [], "run_again": 1, "nodes_killed": 1}


@pytest.mark.soak
def test_a_real_node_s_run_is_stopped_with_a_checkpoint_and_goes_on_on_another(plan, tmp_path):
    settings, stop = plan("gpt2_clm", "amp_fp16", max_steps=300), Stop()
    with two_nodes() as (address, kill_a_node), Cluster(address, device="cpu", threads=1) as cluster:
        pool = RayPool([settings], tmp_path / "out", None, stop, cluster)

        def look():
            if any(run.last_step is not None for run in pool.running):
                stop.request("SIGTERM")

        (stopped,) = pool.run(look, seconds_between_ticks=0.05)
        assert stopped.record.status == "preempted" and 0 < stopped.record.steps_done < 300
        assert list((tmp_path / "out" / "runs" / settings.run_id).glob("checkpoint-*"))
        began_s = time.monotonic()
        (ended,) = RayPool([settings], tmp_path / "out", None, Stop(), cluster).run(lambda: None)
    assert ended.record.status == "completed" and ended.record.steps_done == 300
    assert ended.record.flags["resumed"]["behind_steps"] == [stopped.record.steps_done], time.monotonic() - began_s
    steps = (tmp_path / "out" / "training_logs" / f"run_{settings.run_id}.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 301))


@pytest.mark.soak
@pytest.mark.parametrize("kill", [False, True], ids=["healthy", "node killed"])
def test_forty_two_runs_on_two_real_nodes(tmp_path, kill):
    found = trial(tmp_path, 42, kill=kill)
    assert (found["lost"], found["differing"], found["nodes_killed"], found["run_again"]) == ([], [], int(kill), int(kill))
