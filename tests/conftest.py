"""Shared by all rooms: one data cache a session, few threads, and the rule that a test which starts a process says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.process_mark import pytest_fixture_setup, pytest_runtest_call  # noqa: F401

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which other libraries do: so here, before any test module.
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and pass that on
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of processes elsewhere
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Tokenised data, and the key of signatures, of this session; the user's own are neither read nor written."""
    shared = tmp_path_factory.getbasetemp().parent  # by parallel test processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDB_CACHE", str(shared / "ddb-cache"))
        patch.setenv("XDG_STATE_HOME", str(shared / "state"))
        yield shared / "ddb-cache"


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
