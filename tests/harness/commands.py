"""Commands of the harness as processes for the tests, forked from a server that has imported what they need: a third of a
second instead of several."""

import contextlib
import gc
import math
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback

import psutil

from harness.parallel.ranks import end_process

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


def harness(words):
    """The command in this process."""
    from harness.cli import main

    return main(words, supervised=True)


class Forked:
    """The same, forked, with the interface of `subprocess.Popen`. ``files``: where its output goes, without a suffix;
    ``environment``: all of it, or None for the fork server's; ``call(words)``: what is done and returns the exit code."""

    def __init__(self, words, files, environment=None, call=harness):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._files = [files.with_name(f"{files.name}.{name}") for name in ("stdout", "stderr")]
        self._process = context.Process(target=_enter, args=(call, list(words), self._files, environment))
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


class ForkedCommand:
    """What a launcher needs of `subprocess.Popen`: a fork of this process, which has everything imported. It executes a Python
    command (``python -u FILE`` or ``python -u -m MODULE``) in a session of its own, as a new interpreter would."""

    def __init__(self, command, env=None, stdout=None, stderr=None, *, preexec_fn=None, close_fds=True, **_):
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for number, file in ((1, stdout), (2, stderr)):
                    if file:
                        os.dup2(file.fileno(), number)
                if close_fds:
                    close_all_but(0, 1, 2)
                if preexec_fn:
                    preexec_fn()
                self._execute(command[2:], env)
            finally:  # nothing of the launcher's is ended or closed here
                os._exit(1)

    def _execute(self, words, env):
        gc.freeze()
        forget_handlers()
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        run, words = (runpy.run_module, words[1:]) if words[0] == "-m" else (runpy.run_path, words)
        sys.argv, code = list(words), 0
        try:
            run(words[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        end_process(code)

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout=None):
        until_s = math.inf if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until_s:
                raise subprocess.TimeoutExpired("a forked command", timeout)
            time.sleep(0.01)
        return self.returncode


def fork_the_fork_servers():
    """From here on a fork server of this process is forked from it, with everything imported, instead of executed."""
    executed_anew = multiprocessing.util.spawnv_passfds

    def spawn(path, arguments, passed):
        if "multiprocessing.forkserver" not in arguments[-1]:  # but for the resource tracker
            return executed_anew(path, arguments, passed)
        if pid := os.fork():
            return pid
        try:
            close_all_but(0, 1, 2, *passed)
            forget_handlers()
            multiprocessing.forkserver._forkserver.__init__()  # its lock is held
            exec(arguments[-1], {})
        finally:
            os._exit(0)

    multiprocessing.util.spawnv_passfds = spawn


def close_all_but(*kept):
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(number)


def forget_handlers():
    """Of signals, as a new interpreter has none."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _enter(call, words, files, environment):
    os.setsid()
    fork_the_fork_servers()
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
