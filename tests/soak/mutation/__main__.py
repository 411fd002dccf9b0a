"""``python -m tests.soak.mutation``: changes the code in small ways, and says which changes no test notices."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from harness.exit_codes import OK, RUN_FAILED
from harness.options import at_least_one
from tests.soak.mutation.operators import Mutant, mutants
from tests.soak.mutation.targets import PLANTED, ROOMS, Room

ROOT = Path(__file__).resolve().parents[3]
SURVIVORS = Path(__file__).with_name("survivors.toml")
UNEXPLAINED_SHARE = 0.03
QUICK = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not soak and not process")
LIMIT = (20.0, 4.0)
"""A mutant that loops is killed after so many seconds, and so many times what all of its room's tests take."""
PRELOADED = ("numpy", "torch", "scipy.stats", "sklearn.metrics", "transformers.models.gpt2.modeling_gpt2",
             "transformers.models.roberta.modeling_roberta", "hypothesis", "pandas", "triton")  # fmt: skip
"""Imported once, before the forks; of the project nothing is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 3 when a planted mutant lives, a room's tests fail without one, or more than 3 % of the sample survive without
    an explanation."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.mutation", description=__doc__.partition(": ")[2])
    parser.add_argument("--mutants", type=at_least_one, default=320, metavar="N", help="how many, over all rooms (default 320)")
    parser.add_argument("--seed", type=int, default=13, metavar="N", help="of the sample (default 13)")
    parser.add_argument("--only", nargs="+", default=list(ROOMS), choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    options = parser.parse_args(argv)
    explained = tomllib.loads(SURVIVORS.read_text())
    # On the CPU everywhere: what a forked process may do depends on no GPU, and Triton's kernels are not mutated.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    run, survived, unexplained, living, broken = 0, 0, 0, [], []
    with tempfile.TemporaryDirectory(prefix="ddb-mutation-") as folder:
        laboratory = Laboratory(Path(folder))
        for name in options.only:
            room = ROOMS[name]
            try:
                coverage, limit_s = laboratory.prepare(room)
            except TestsFail as error:
                broken.append(name)
                print(f"{name}: {error}", flush=True)
                continue
            planted = [laboratory.plant(*plant) for plant in PLANTED if any(Path(plant[1]).match(glob) for glob in room.files)]
            living += [mutant for mutant in planted if laboratory.survives(mutant, room, coverage, limit_s)]
            sample = laboratory.sample(room, -(-options.mutants // len(ROOMS)), options.seed)
            whys = []
            for mutant in sample:
                why = explained.get(mutant.path, {}).get(mutant.key)
                if laboratory.survives(mutant, room, coverage, limit_s):
                    whys.append(why)
                    print(f"{mutant.path}:{mutant.line} {mutant.key}\n    {why or 'UNEXPLAINED'}", flush=True)
            print(f"{name}: {len(sample)} mutants, {len(whys)} survive, {whys.count(None)} of them unexplained", flush=True)
            run, survived, unexplained = run + len(sample), survived + len(whys), unexplained + whys.count(None)
    print(f"{run} mutants, seed {options.seed}: {run - survived} die, {survived} survive, {unexplained} of them unexplained")
    for mutant in living:
        print(f"planted, and no test notices: {mutant.key} ({mutant.path}:{mutant.line})")
    return RUN_FAILED if broken or living or unexplained > UNEXPLAINED_SHARE * run else OK


Coverage = dict[tuple[str, int], list[str]]
"""File and line -> the tests that run it, the shortest first."""


class TestsFail(Exception):
    """A room whose tests fail without a mutant."""

    __test__ = False


class Laboratory:
    """A copy of the checkout in which mutants live, one at a time, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._root, self._runs = folder / "checkout", folder / "runs"
        self._runs.mkdir()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (self._root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self._root / name)

    def sample(self, room: Room, count: int, seed: int) -> list[Mutant]:
        """So many mutants of a room's files, in the order of their lines."""
        files = {str(path.relative_to(self._root)): path for glob in room.files for path in self._root.glob(glob)}
        found = [mutant for name, path in files.items() for mutant in mutants(name, path.read_bytes())]
        return sorted(sorted(found, key=lambda m: m.order(seed))[:count], key=lambda m: (m.path, m.line))

    def plant(self, what: str, path: str, old: str, new: str) -> Mutant:
        """A mutant of `PLANTED`; raises SystemExit where its text does not stand once."""
        source = (self._root / path).read_text()
        if source.count(old) != 1:
            raise SystemExit(f"targets.py plants {what!r} in {path}, where its text stands {source.count(old)} times")
        return Mutant(path, source[: source.index(old)].count("\n") + 1, what, source.replace(old, new).encode())

    def prepare(self, room: Room) -> tuple[Coverage, float]:
        """Run a room's tests on the code as it is: which test runs which line, and the time limit of a mutant. Raises
        `TestsFail`."""
        began, written = time.monotonic(), self._runs / "coverage"
        code = self._fork(room.tests, 3600, lambda: _traced(self._root, room, written))
        if code != pytest.ExitCode.OK:
            said = (self._runs / "output").read_text()[-3000:]
            raise TestsFail(f"not mutated: its tests end with {code} on the code as it is:\n{said}")
        coverage: Coverage = defaultdict(list)
        for line in written.read_text().splitlines():
            path, number, test = line.split("\t")
            coverage[path, int(number)].append(test)
        return coverage, LIMIT[0] + LIMIT[1] * (time.monotonic() - began)

    def survives(self, mutant: Mutant, room: Room, coverage: Coverage, limit_s: float) -> bool:
        """Whether no test fails that runs the line, the short ones first; of a line that runs when its module is imported,
        no test of the room."""
        place = self._root / mutant.path
        original = place.read_bytes()
        place.write_bytes(mutant.source)
        try:
            tests = coverage.get((mutant.path, mutant.line)) or room.tests
            return self._fork(tests, limit_s) == pytest.ExitCode.OK
        finally:
            place.write_bytes(original)

    def _fork(self, tests: Sequence[str], limit_s: float, plugin=lambda: None) -> int:
        """pytest's exit code in a forked process; 1 where it did not end in time, or crashed."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(self._run(tests, plugin))
            os._exit(1)
        deadline = time.monotonic() + limit_s
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 1
            time.sleep(0.02)

    def _run(self, tests: Sequence[str], plugin) -> int:
        os.setpgid(0, 0)
        with (self._runs / "output").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self._root)
        sys.path[:] = [
            str(self._root),
            *(place for place in sys.path if Path(place or ".").resolve() not in (ROOT, self._root)),
        ]
        rooms = {path.name for path in self._root.iterdir() if path.is_dir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in rooms]:
            del sys.modules[name]
        plugins = [found for found in [plugin()] if found is not None]
        sys.dont_write_bytecode = not plugins  # what the first run compiled serves for all but the mutated file
        globs = [test for test in tests if "*" in test and "::" not in test]
        chosen = [test for test in tests if test not in globs] + [str(path) for g in globs for path in sorted(Path().glob(g))]
        return int(pytest.main([*QUICK, f"--basetemp={self._runs / 'now'}", *chosen], plugins))


def _traced(root: Path, room: Room, written: Path):
    """A plugin that writes a line ``path, line, test`` for every line of a room's files and every test that runs it."""
    files = {str(path): str(path.relative_to(root)) for glob in room.files for path in root.glob(glob)}
    seen: dict[tuple[str, int, str], None] = {}
    seconds: dict[str, float] = {}
    test = ""

    def trace(frame, event, argument):
        path = files.get(frame.f_code.co_filename)
        if path is None:
            return None

        def line(frame, event, argument):
            seen[path, frame.f_lineno, test] = None
            return line

        return line(frame, event, argument)

    class Plugin:
        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef, request) -> Iterator[None]:
            nonlocal test
            mine = test
            if fixturedef.scope != "function":  # made once, for every test of the file
                test = mine.partition("::")[0]
                seconds.setdefault(test, 1e9)
            try:
                return (yield)
            finally:
                test = mine

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item) -> Iterator[None]:
            nonlocal test
            test, began = item.nodeid, time.monotonic()
            sys.settrace(trace)
            threading.settrace(trace)
            try:
                return (yield)
            finally:
                sys.settrace(None)
                seconds[test] = time.monotonic() - began

        def pytest_sessionfinish(self) -> None:
            found = sorted((entry for entry in seen if entry[2]), key=lambda entry: seconds[entry[2]])
            written.write_text("".join(f"{path}\t{line}\t{test}\n" for path, line, test in found))

    return Plugin()


if __name__ == "__main__":
    sys.exit(main())
