"""When a run hangs and what is done about it, on a clock of our own."""

import signal

import pytest

from harness.supervisor.heartbeat import ASK, Heartbeat
from harness.supervisor.process_monitor import UNKILLABLE_AFTER_S, ProcessMonitor, Rules


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
    for vigil in made:
        vigil.close()


def training(step):
    return Heartbeat("training", step)


def test_silence_brings_stacks_then_term_then_kill(watched):
    vigil = watched(hang_after_s=10, grace_s=5, for_stacks_s=1)
    vigil.hear(training(0))
    vigil.hear(training(1))
    vigil.pass_time(10)
    assert not vigil.hung
    vigil.pass_time(20)
    assert vigil.sent == [(10.25, ASK), (11.25, signal.SIGTERM), (16.25, signal.SIGKILL)]
    death = vigil.death(-9, 1, vigil.stacks.path)
    assert (death.cause, death.detail["ended_by"], death.detail["step"]) == ("hung", "SIGKILL", 1)
    assert death.detail["beat_age_s"] == 10.2 and "no sign of life for 10 s in training behind step 1" in death.error


def test_every_beat_starts_the_clock_again(watched):
    vigil = watched(hang_after_s=2)
    for step in range(20):
        vigil.hear(training(step))
        vigil.pass_time(1.75)
    assert not vigil.hung and vigil.sent == []


def test_until_the_first_step_is_done_there_is_more_time(watched):
    vigil = watched(hang_after_s=10)
    for beat in (Heartbeat("data", 0), Heartbeat("build", 0), Heartbeat("opening", 0), Heartbeat("evaluation", 0), training(0)):
        vigil.hear(beat)
        assert vigil.limit_s == 10 * vigil.rules.starting_factor
    vigil.hear(training(1))
    assert vigil.limit_s == 10


def test_a_run_that_goes_on_has_not_made_a_step_of_its_own_yet(watched):
    vigil = watched(hang_after_s=10)
    for beat in (Heartbeat("opening", 50), training(50)):
        vigil.hear(beat)
    assert vigil.limit_s == 10 * vigil.rules.starting_factor and vigil.opened
    vigil.hear(training(51))
    assert vigil.limit_s == 10


def test_a_step_whose_end_is_told_with_its_checkpoint_counts(watched):
    vigil = watched(hang_after_s=10)
    for beat in (Heartbeat("opening", 0), training(0), Heartbeat("checkpoint", 1), training(1)):
        vigil.hear(beat)
    assert vigil.limit_s == 10


def test_a_run_with_long_steps_may_be_silent_for_four_of_them(watched):
    vigil = watched(hang_after_s=10)
    for step in range(4):
        vigil.hear(training(step))
        vigil.pass_time(9)
    assert vigil.limit_s == 36 and not vigil.hung
    vigil.now_s += 3600  # not its silence: the supervisor slept
    vigil.hear(training(5))
    assert vigil.limit_s == 36


def test_never_means_never(watched):
    vigil = watched(hang_after_s=0)
    vigil.hear(training(3))
    vigil.pass_time(100_000, every=5)
    assert vigil.sent == []


def test_a_supervisor_that_slept_itself_heard_nothing_and_concludes_nothing(watched):
    vigil = watched(hang_after_s=60)
    vigil.hear(training(0))
    vigil.hear(training(1))
    vigil.pass_time(3600, every=3600)  # Ctrl-Z for an hour
    assert not vigil.hung
    vigil.pass_time(61)
    assert vigil.hung


def test_a_process_that_outlives_sigkill_is_not_waited_for(watched):
    vigil = watched(hang_after_s=1, grace_s=1, for_stacks_s=0.5)
    vigil.hear(training(0))
    vigil.hear(training(1))
    vigil.pass_time(4)
    assert vigil.sent[-1][1] == signal.SIGKILL and not vigil.given_up
    vigil.pass_time(UNKILLABLE_AFTER_S)
    assert vigil.given_up


def test_files_count_as_the_runs_own_from_their_opening_on(watched):
    vigil = watched()
    for phase, opened in (("data", False), ("build", False), ("opening", True), ("closing", True)):
        vigil.hear(Heartbeat(phase, 0))
        assert vigil.opened is opened
