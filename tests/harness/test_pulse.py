"""Signs of life: phases and the first step at once, everything else about once a second."""

from harness.run.signals import Stop
from harness.supervisor import heartbeat as pulse_module
from harness.supervisor.heartbeat import Heartbeat, HeartbeatSender


def test_phases_and_the_first_step_are_told_at_once_and_the_rest_is_throttled(monkeypatch):
    now_s, told = [0.0], []
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now_s[0])
    pulse = HeartbeatSender(told.append)
    pulse.at("opening", 50)
    pulse.at("training", 50)
    for step in range(51, 60):
        pulse.beat(step)
    assert told == [Heartbeat("opening", 50), Heartbeat("training", 50), Heartbeat("training", 51)]
    now_s[0] = 1.5
    Stop(pulse=pulse).check()  # whoever looks for a wish to stop is alive
    Stop(pulse=pulse).check()
    assert told[3:] == [Heartbeat("training", 59)]
    pulse.at("checkpoint", 60)
    assert told[4:] == [Heartbeat("checkpoint", 60)]


def test_without_a_supervisor_nothing_is_told():
    pulse = HeartbeatSender()
    pulse.at("training", 1)
    pulse.draft(lambda: 1 / 0, "nowhere")
    pulse.fault(ValueError("x"))
