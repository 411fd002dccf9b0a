"""Shared by all rooms: one data cache a session, few threads, and the rule that a test which starts a process says so."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from tests.harness.commands import PRELOADED
from tests.process_mark import pytest_fixture_setup, pytest_runtest_call  # noqa: F401

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which other libraries do: so here, before any test module.
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it, and passes that on
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and pass that on
ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of processes elsewhere
_set_preload = forkserver.set_forkserver_preload  # who starts the server has it import what all tests fork it for
forkserver.set_forkserver_preload = lambda names: _set_preload(list(dict.fromkeys([*names, *PRELOADED])))
SHARED_DATA = ROOT.parent / "shared" / "data"


LONGEST = """
    harness/test_ray harness/test_signals harness/test_forensics harness/test_parallel harness/test_campaign
    soak/test_reliability harness/test_pool harness/test_flops harness/test_resume harness/test_checkpoint harness/test_cli
    harness/test_counterfactual kernels/test_activation_stats harness/test_sharded_checkpoints test_wheel
    kernels/test_multi_tensor_stats report/test_dossier_build report/test_plots_elements report/test_pdf
    report/test_plots_figures harness/test_matrix kernels/test_compile kernels/test_check kernels/test_compiled_loss
    kernels/test_unscale test_layering kernels/test_cross_entropy harness/test_hostile harness/test_missing_libraries
    harness/test_case_parent harness/test_fit soak/test_forensics report/test_plots_write harness/test_loop
""".split()
"""Test files, those that take longest first: begun last, one would keep a single worker busy while the others are done."""


def pytest_collection_modifyitems(items):
    order = {str(ROOT / "tests" / f"{name}.py"): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


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


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as NFS without its lock daemon."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
