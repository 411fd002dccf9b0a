"""The rule that a test which starts a process is marked ``process`` or ``soak``; `tests.conftest` takes these hooks over.

A process that a fixture started counts for every test that uses the fixture, whichever of them came first.
"""

from __future__ import annotations

import multiprocessing.process
import multiprocessing.util
import os
import sys

import pytest

EVENTS = ("os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec")
"""Audit events, beside `subprocess.Popen`. `multiprocessing` raises none when it spawns: its two functions are replaced."""
ASKED_BY_LIBRARIES = ("lscpu", "uname", "ldconfig", "nvidia-smi", "gcc", "cc", "ld", "objdump")
"""Programs that a library asks about the machine, a compiler's for `ctypes.util.find_library` (WeasyPrint does, imported)."""
STARTED: list[str] = []
"""What started a process so far."""


def _notice(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen" and os.path.basename(str(arguments[0])) not in ASKED_BY_LIBRARIES:
        STARTED.append(f"{event} {arguments[1]}")
    elif event in EVENTS:
        STARTED.append(event)


def _noticed(owner: object, name: str) -> None:
    original = getattr(owner, name)

    def call(*arguments, **named):
        STARTED.append(f"multiprocessing {name}")
        return original(*arguments, **named)

    setattr(owner, name, call)


sys.addaudithook(_notice)
_noticed(multiprocessing.process.BaseProcess, "start")
_noticed(multiprocessing.util, "spawnv_passfds")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    before = len(STARTED)
    fixturedef.started = None
    try:
        return (yield)
    finally:
        fixturedef.started = next(iter(STARTED[before:]), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = len(STARTED)
    result = yield
    fixtures = (fixture for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures)
    by_fixtures = [fixture.started for fixture in fixtures if getattr(fixture, "started", None)]
    started = next(iter(STARTED[before:] + by_fixtures), None)
    if started and not any(item.get_closest_marker(mark) for mark in ("process", "soak")):
        pytest.fail(f"starts a process ({started}) without the mark `process`")
    return result
