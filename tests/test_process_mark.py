"""A test that starts a process is marked, however it starts it, and wherever: itself, or a fixture for it."""

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.process

PLANTED = """
import multiprocessing, os, subprocess, sys
import pytest

WAYS = {
    "subprocess.Popen": lambda: subprocess.run(["true"]),
    "os.system": lambda: os.system("true"),
    "os.popen": lambda: os.popen("true").close(),
    "os.posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "os.spawnv": lambda: os.spawnv(os.P_WAIT, "/bin/true", ["true"]),
    "os.fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "os.forkpty": lambda: os.waitpid(os.forkpty()[0] or os._exit(0), 0),
    "fork": lambda: joined("fork"),
    "spawn": lambda: joined("spawn"),
    "forkserver": lambda: joined("forkserver"),
}

def joined(how):
    process = multiprocessing.get_context(how).Process(target=os.getpid)
    process.start()
    process.join()

@pytest.mark.parametrize("way", WAYS)
def test_itself(way):
    WAYS[way]()

@pytest.mark.process
def test_marked():
    os.system("true")

@pytest.mark.soak
def test_long():
    os.system("true")

@pytest.fixture(scope="module")
def server():
    os.system("true")

@pytest.fixture(scope="module")
def through(server):
    pass

@pytest.mark.process
def test_marked_comes_first(server):
    pass

def test_that_uses_the_fixture(server):
    pass

def test_that_uses_it_through_another(through):
    pass

@pytest.fixture
def once():
    os.system("true")

def test_that_has_its_own(once):
    pass

def test_starts_none(tmp_path):
    subprocess.run(["uname"], stdout=subprocess.DEVNULL)
"""


def test_every_way_of_starting_a_process_needs_the_mark(pytester):
    pytester.makeini("[pytest]")  # or one in a folder above would be taken
    pytester.makeconftest("from tests.process_mark import pytest_fixture_setup, pytest_runtest_call")
    pytester.makepyfile(PLANTED)
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "ignore", "-rpf")
    lines = found.stdout.str().splitlines()
    passed = {line.split("::")[1] for line in lines if line.startswith("PASSED")}
    assert passed == {"test_marked", "test_long", "test_marked_comes_first", "test_starts_none"}
    assert found.parseoutcomes()["failed"] == 13
    reasons = [line for line in lines if line.startswith("E ")]
    assert sum("Failed: starts a process" in line and "without the mark `process`" in line for line in reasons) == 13
