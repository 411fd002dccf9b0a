"""Commands of the harness as processes for the tests: of their own interpreter, or forked from a server that has imported what
they need, which takes a third of a second instead of several."""

import contextlib
import multiprocessing.forkserver
import os
import subprocess
import sys
import time

import psutil

SMALL = (
    "--preset tiny --data embedded --batch-size 2 --micro-batch 2 --seq-len 16 --validation-documents 2 --documents 400".split()
)
TWO_STEPS = [*SMALL, "--max-steps", "2"]
PRELOADED = [
    "sklearn.metrics",
    "torch.distributed.run",
    "harness.commands.case",
    "harness.parallel.process_group",
    "harness.run.terminal",
    "harness.supervisor.worker",
    "tests.harness.launched",
    "tests.soak.reliability.processes",
    __name__,
]
"""Imported by the fork server, so that a process costs a third of a second."""


def executed(words, environment):
    """``python -m harness`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def harness(words):
    """The command in this process."""
    from harness.cli import main

    return main(words, supervised=True)


class Forked:
    """The same, forked, with the interface of `subprocess.Popen`. ``files``: where its output goes, without a suffix;
    ``environment``: all of it, or None for the fork server's; ``call(words)``: what is done and returns the exit code;
    ``own_server``: a matrix starts a fork server of its own, as it does outside of the tests, which takes seconds."""

    def __init__(self, words, files, environment=None, call=harness, own_server=True):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._files = [files.with_name(f"{files.name}.{name}") for name in ("stdout", "stderr")]
        self._process = context.Process(target=_enter, args=(call, list(words), self._files, environment, own_server))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self._process.is_alive():
            end_all(self.pid)
            raise subprocess.TimeoutExpired("harness", timeout)
        return [path.read_text() for path in self._files]


def _enter(call, words, files, environment, own_server):
    os.setsid()
    if not own_server:
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    for stream, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), stream)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    sys.argv = ["harness", *words]
    os.environ["COLUMNS"] = "200"
    sys.exit(call(words))


def end_all(pid):
    """Kill a process and all that it started; ranks have sessions of their own."""
    for one in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def wait_until(condition, process, timeout_s=120):
    """Until it is so; fails when the process has ended before."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def logged(out):
    """How many steps every run of a results folder has logged."""
    return [log.read_bytes().count(b"\n") for log in sorted(out.glob("training_logs/*.jsonl"))]


def group_is_gone(group, timeout_s=60):
    """Whether every process of the group is gone, soon."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
