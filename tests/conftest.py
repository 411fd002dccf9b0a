"""Shared by all rooms: one data cache a session, few threads, and the rule that a test which starts a process says so."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which other libraries do: so here, before any test module.
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and pass that on
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of processes elsewhere
SHARED_DATA = ROOT.parent / "shared" / "data"


STARTED: list[object] = []
"""What started a process so far. Programs that a library asks about the machine are not meant."""
ASKED_BY_LIBRARIES = ("lscpu", "uname", "ldconfig", "nvidia-smi")


def _notice(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen" and os.path.basename(str(arguments[0])) not in ASKED_BY_LIBRARIES:
        STARTED.append(arguments[1])
    elif event in ("os.fork", "os.posix_spawn"):
        STARTED.append(event)


sys.addaudithook(_notice)
_start = multiprocessing.process.BaseProcess.start


def _noticed_start(process) -> None:
    STARTED.append(process)
    _start(process)


multiprocessing.process.BaseProcess.start = _noticed_start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """`make quick` runs no test that starts a process: such a test is marked ``process`` or ``soak``."""
    before = len(STARTED)
    result = yield
    if STARTED[before:] and "not process" in item.config.option.markexpr:
        pytest.fail(f"starts a process without the mark `process`: {STARTED[before]}")
    return result


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Tokenised data of this session; nothing is read from or written to the user's cache."""
    folder = tmp_path_factory.getbasetemp().parent / "ddb-cache"  # shared by parallel test processes
    before = os.environ.get("DDB_CACHE")
    os.environ["DDB_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["DDB_CACHE"]
    else:
        os.environ["DDB_CACHE"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, where it is at hand."""
    if not (SHARED_DATA / "eurlex.jsonl.gz").is_file():
        pytest.skip("no real data beside the checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture
def one_thread():
    """A single CPU thread, as the tiny preset has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
