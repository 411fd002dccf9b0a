"""Heartbeats as they are sent; when a run hangs and what is done about it, on a clock of our own; what is seen from outside."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.run import heartbeat as heartbeat_module
from harness.run.heartbeat import STACKS_SIGNAL, Heartbeat, HeartbeatSender
from harness.run.signals import Stop
from harness.supervisor.process_monitor import (
    UNKILLABLE_AFTER_S,
    OomKills,
    ProcessMonitor,
    Rules,
    is_stopped,
    memory_groups,
    oom_counters,
    read_count,
    resident_bytes,
    tail,
)


class Watched(ProcessMonitor):
    """Over no process: what would be sent is noted."""

    def __init__(self, rules: Rules) -> None:
        self.now_s, self.sent = 100.0, []
        super().__init__(rules, lambda: self.now_s)
        self.begin(1 << 30)  # no such process

    def send(self, number: int) -> None:
        self.sent.append((round(self.now_s - 100, 3), number))

    def pass_time(self, seconds: float, every: float = 0.25) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += every
            self.look()


@pytest.fixture
def watched(tmp_path):
    made = []

    def make(**rules):
        made.append(Watched(Rules(oom_counters=[], **rules)))
        return made[-1]

    yield make
    for monitor in made:
        monitor.close()


def training(step):
    return Heartbeat("training", step)


def test_silence_brings_stacks_then_term_then_kill(watched):
    monitor = watched(hang_after_s=10, grace_s=5, for_stacks_s=1)
    monitor.alive(training(0))
    monitor.alive(training(1))
    monitor.pass_time(10)
    assert not monitor.hung
    monitor.pass_time(20)
    assert monitor.sent == [(10.25, STACKS_SIGNAL), (11.25, signal.SIGTERM), (16.25, signal.SIGKILL)]
    death = monitor.failure(-9, 1, monitor.stacks.path)
    assert (death.cause, death.detail["ended_by"], death.detail["step"]) == ("hung", "SIGKILL", 1)
    assert death.detail["beat_age_s"] == 10.2 and "no sign of life for 10 s in training after step 1" in death.error


def test_every_beat_starts_the_clock_again(watched):
    monitor = watched(hang_after_s=2)
    for step in range(20):
        monitor.alive(training(step))
        monitor.pass_time(1.75)
    assert not monitor.hung and monitor.sent == []


def test_until_the_first_step_is_done_there_is_more_time(watched):
    monitor = watched(hang_after_s=10)
    for beat in (Heartbeat("data", 0), Heartbeat("build", 0), Heartbeat("opening", 0), Heartbeat("evaluation", 0), training(0)):
        monitor.alive(beat)
        assert monitor.limit_s == 10 * monitor.rules.starting_factor
    monitor.alive(training(1))
    assert monitor.limit_s == 10


def test_a_run_that_goes_on_has_not_made_a_step_of_its_own_yet(watched):
    monitor = watched(hang_after_s=10)
    for beat in (Heartbeat("opening", 50), training(50)):
        monitor.alive(beat)
    assert monitor.limit_s == 10 * monitor.rules.starting_factor and monitor.opened
    monitor.alive(training(51))
    assert monitor.limit_s == 10


def test_a_step_whose_end_is_reported_with_its_checkpoint_counts(watched):
    monitor = watched(hang_after_s=10)
    for beat in (Heartbeat("opening", 0), training(0), Heartbeat("checkpoint", 1), training(1)):
        monitor.alive(beat)
    assert monitor.limit_s == 10


def test_a_run_with_long_steps_may_be_silent_for_four_of_them(watched):
    monitor = watched(hang_after_s=10)
    for step in range(4):
        monitor.alive(training(step))
        monitor.pass_time(9)
    assert monitor.limit_s == 36 and not monitor.hung
    monitor.now_s += 3600  # not its silence: the supervisor slept
    monitor.alive(training(5))
    assert monitor.limit_s == 36


def test_never_means_never(watched):
    monitor = watched(hang_after_s=0)
    monitor.alive(training(3))
    monitor.pass_time(100_000, every=5)
    assert monitor.sent == []


def test_a_supervisor_that_slept_itself_heard_nothing_and_concludes_nothing(watched):
    monitor = watched(hang_after_s=60)
    monitor.alive(training(0))
    monitor.alive(training(1))
    monitor.pass_time(3600, every=3600)  # Ctrl-Z for an hour
    assert not monitor.hung
    monitor.pass_time(61)
    assert monitor.hung


def test_a_process_that_outlives_sigkill_is_not_waited_for(watched):
    monitor = watched(hang_after_s=1, grace_s=1, for_stacks_s=0.5)
    monitor.alive(training(0))
    monitor.alive(training(1))
    monitor.pass_time(4)
    assert monitor.sent[-1][1] == signal.SIGKILL and not monitor.given_up
    monitor.pass_time(UNKILLABLE_AFTER_S)
    assert monitor.given_up


def test_files_count_as_the_runs_own_from_their_opening_on(watched):
    monitor = watched()
    for phase, opened in (("data", False), ("build", False), ("opening", True), ("closing", True)):
        monitor.alive(Heartbeat(phase, 0))
        assert monitor.opened is opened


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


@pytest.mark.process
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


def test_phases_and_the_first_step_are_reported_at_once_and_the_rest_is_throttled(monkeypatch):
    now_s, sent = [0.0], []
    monkeypatch.setattr(heartbeat_module.time, "monotonic", lambda: now_s[0])
    heartbeat = HeartbeatSender(sent.append)
    heartbeat.enter("opening", 50)
    heartbeat.enter("training", 50)
    for step in range(51, 60):
        heartbeat.alive(step)
    assert sent == [Heartbeat("opening", 50), Heartbeat("training", 50), Heartbeat("training", 51)]
    now_s[0] = 1.5
    Stop(heartbeat=heartbeat).check()  # whoever looks for a wish to stop is alive
    Stop(heartbeat=heartbeat).check()
    assert sent[3:] == [Heartbeat("training", 59)]
    heartbeat.enter("checkpoint", 60)
    assert sent[4:] == [Heartbeat("checkpoint", 60)]


def test_without_a_supervisor_nothing_is_reported():
    heartbeat = HeartbeatSender()
    heartbeat.enter("training", 1)
    heartbeat.draft(lambda: 1 / 0, "nowhere")
    heartbeat.failed(ValueError("x"))
