"""Commands of the harness as processes for the tests: of their own interpreter, or forked from a server that has imported what
they need, which takes a third of a second instead of several."""

import multiprocessing
import os
import subprocess
import sys
import time

SMALL = (
    "--preset tiny --data embedded --batch-size 2 --micro-batch 2 --seq-len 16 --validation-documents 2 --documents 400".split()
)
TWO_STEPS = [*SMALL, "--max-steps", "2"]
PRELOADED = ["sklearn.metrics", "harness.commands.case", "harness.run.terminal", "harness.supervisor.worker", __name__]


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


class Forked:
    """The same, forked, with the interface of `subprocess.Popen`; ``files``: where its output goes, without a suffix."""

    def __init__(self, words, files):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._files = [files.with_name(f"{files.name}.{name}") for name in ("stdout", "stderr")]
        self._process = context.Process(target=_enter, args=(list(words), self._files))
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
            self._process.kill()
            raise subprocess.TimeoutExpired("harness", timeout)
        return [path.read_text() for path in self._files]


def _enter(words, files):
    os.setsid()
    for stream, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), stream)
    from harness.cli import main

    sys.argv = ["harness", *words]
    os.environ["COLUMNS"] = "200"
    sys.exit(main(words, supervised=True))


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
