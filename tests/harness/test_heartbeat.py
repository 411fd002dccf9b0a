"""Heartbeats: phases and the first step at once, everything else about once a second."""

from harness.run import heartbeat as heartbeat_module
from harness.run.heartbeat import Heartbeat, HeartbeatSender
from harness.run.signals import Stop


def test_phases_and_the_first_step_are_told_at_once_and_the_rest_is_throttled(monkeypatch):
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


def test_without_a_supervisor_nothing_is_told():
    heartbeat = HeartbeatSender()
    heartbeat.enter("training", 1)
    heartbeat.draft(lambda: 1 / 0, "nowhere")
    heartbeat.failed(ValueError("x"))
