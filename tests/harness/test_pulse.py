"""Signs of life: phases and the first step at once, everything else about once a second."""

from harness.signals import Stop
from harness.supervise import pulse as pulse_module
from harness.supervise.pulse import Beat, Pulse


def test_phases_and_the_first_step_are_told_at_once_and_the_rest_is_throttled(monkeypatch):
    now_s, told = [0.0], []
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now_s[0])
    pulse = Pulse(told.append)
    pulse.at("opening", 50)
    pulse.at("training", 50)
    for step in range(51, 60):
        pulse.beat(step)
    assert told == [Beat("opening", 50), Beat("training", 50), Beat("training", 51)]
    now_s[0] = 1.5
    Stop(pulse=pulse).check()  # whoever looks for a wish to stop is alive
    Stop(pulse=pulse).check()
    assert told[3:] == [Beat("training", 59)]
    pulse.at("checkpoint", 60)
    assert told[4:] == [Beat("checkpoint", 60)]


def test_without_a_supervisor_nothing_is_told():
    pulse = Pulse()
    pulse.at("training", 1)
    pulse.draft(lambda: 1 / 0, "nowhere")
    pulse.fault(ValueError("x"))
