"""A loss explodes when its rolling median stays high, not when it spikes."""

import math

from instrument.step_meter import EXPLOSION_STEPS, MEDIAN_STEPS, ExplosionDetector


def first_explosion(losses, warmup_steps=0):
    detector = ExplosionDetector(warmup_steps)
    return next((step for step, loss in enumerate(losses, start=1) if detector.exploded(step, loss)), None)


def test_a_steady_and_a_falling_loss_never_explode():
    assert first_explosion([2.0] * 1_000) is None
    assert first_explosion([8.0 / (1 + 0.01 * s) for s in range(1_000)]) is None


def test_spikes_do_not_count():
    assert first_explosion([2.0 if s % 3 else 100.0 for s in range(1_000)]) is None


def test_a_loss_that_stays_above_explodes_after_the_stated_number_of_steps():
    high = [2.0] + [3.1] * 400
    assert first_explosion(high) == MEDIAN_STEPS - 1 + EXPLOSION_STEPS
    assert first_explosion([2.0] + [2.9] * 400) is None


def test_warm_up_is_forgiven():
    assert first_explosion([2.0] + [3.1] * 400, warmup_steps=200) == 200 + EXPLOSION_STEPS
    assert first_explosion([2.0] + [9.0] * 150 + [2.0] * 400, warmup_steps=150) is None


def test_a_non_finite_loss_does_not_break_the_median():
    assert first_explosion([2.0] * 60 + [math.inf] + [2.0] * 200) is None
