"""What can be learnt about a process from outside."""

import os
import signal
import subprocess
import sys
import time

from harness.supervisor.process_monitor import (
    OomKills,
    is_stopped,
    memory_groups,
    oom_counters,
    read_count,
    resident_bytes,
    tail,
)


def test_the_nearest_count_that_rose_is_the_evidence(tmp_path):
    group, machine, missing = tmp_path / "memory.events", tmp_path / "vmstat", tmp_path / "none"
    group.write_text("low 0\nhigh 0\noom 4\noom_kill 2\noom_group_kill 0\n")
    machine.write_text("pgfault 3\noom_kill 7\n")
    kills = OomKills([missing, group, machine])
    assert kills.risen() == (0, None)
    machine.write_text("pgfault 9\noom_kill 8\n")
    assert kills.risen() == (1, str(machine))
    group.write_text("oom 9\noom_kill 4\n")
    assert kills.risen() == (2, str(group))
    group.unlink()
    assert kills.risen() == (1, str(machine))
    assert OomKills([missing]).risen() == (None, None)


def test_a_count_is_read_from_its_own_line_only(tmp_path):
    path = tmp_path / "memory.oom_control"
    path.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert read_count(path) == 5
    path.write_text("oom_kill_disable 1\n")
    assert read_count(path) is None


def test_this_machines_counters_are_where_they_are_looked_for():
    assert oom_counters()[-1].name == "vmstat" and all(folder.is_absolute() for folder in memory_groups())


def test_memory_and_state_of_a_process():
    now_bytes, peak_bytes = resident_bytes(os.getpid())
    assert 10e6 < now_bytes <= peak_bytes < 1e12
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 20
        while not is_stopped(child.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert is_stopped(child.pid)
    finally:
        child.kill()
        child.wait()
    assert resident_bytes(child.pid) == (None, None) and not is_stopped(child.pid)


def test_the_end_of_a_file_and_not_of_a_link(tmp_path):
    path = tmp_path / "output.log"
    path.write_bytes(b"x" * 100_000 + b"\xff the end")
    assert tail(path).endswith(" the end") and len(tail(path)) <= 64 * 1024
    (tmp_path / "link").symlink_to(path)
    assert tail(tmp_path / "link") == tail(tmp_path / "nothing") == ""
