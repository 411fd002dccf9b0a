"""What several processes measured of a step, put together."""

import math

from instrument.step_meter import COLUMNS, MeasuredStep, together
from instrument.watch.taps import TapReading, merged

HEALTHY = dict.fromkeys(COLUMNS, 0.0) | {
    "loss_microbatch": -1.0,
    "loss_scale": -1.0,
    "grad_tensor": -1.0,
    "state_tensor": -1.0,
    "param_tensor": -1.0,
}


def step(time_s=1.0, slots=2, nbytes=None, **row):
    return MeasuredStep({**HEALTHY, **row}, [{"slot": n} for n in range(slots)], time_s, nbytes)


def test_one_process_is_left_as_it_is():
    alone = step(loss=2.0)
    assert together([alone])[0] is alone and alone.rank_of(1) is None


def test_losses_add_up_and_the_slowest_rank_is_the_steps_time():
    both, _ = together(
        [step(loss=2.0, time_s=1.0, nbytes=5, grad_norm=3.0), step(loss=0.5, time_s=2.0, nbytes=7, grad_norm=3.0)]
    )
    assert (both.row["loss"], both.step_time_s, both.allocated_bytes, both.row["grad_norm"]) == (2.5, 2.0, 7, 3.0)
    assert len(both.logits) == 4 and [both.rank_of(n) for n in range(4)] == [0, 0, 1, 1]


def test_the_first_bad_micro_batch_is_counted_through_the_step():
    both, _ = together([step(loss=1.0), step(loss=math.nan, loss_microbatch=1.0)])
    assert both.row["loss_microbatch"] == 3 and both.rank_of(3) == 1 and math.isnan(both.row["loss"])
    earlier, _ = together([step(loss=math.inf, loss_microbatch=1.0), step(loss=math.nan, loss_microbatch=0.0)])
    assert earlier.row["loss_microbatch"] == 1


def test_a_tensor_that_one_rank_shows_is_its_and_one_that_all_show_is_nobodys():
    both, ranks = together(
        [
            step(param_tensor=4.0, param_nan=1.0, grad_tensor=2.0, grad_nan=-3.0),
            step(state_tensor=7.0, param_tensor=3.0, param_nan=-2.0, grad_tensor=2.0, grad_nan=-3.0),
        ]
    )
    assert ranks == {"grad": None, "state": 1, "param": 1}
    assert (both.row["param_tensor"], both.row["param_nan"], both.row["state_tensor"]) == (3, -2, 7)


def test_module_readings_of_ranks_are_one():
    def reading(module, absmax, nan, flush_frac, step=1):
        return TapReading(step, module, 0, "fwd", "float32", absmax, nan, 1, flush_frac, 5)

    first = [reading("a", 1.0, 0, None), reading("b", 9.0, 0, 0.5)]
    second = [reading("b", 2.0, 3, 0.7), reading("c", 1.0, 0, None)]
    assert merged([first]) is first
    both = merged([first, second])
    assert [r.module for r in both] == ["a", "b", "c"]
    assert (both[1].absmax, both[1].nan, both[1].inf, both[1].flush_frac) == (9.0, 3, 2, 0.7)
