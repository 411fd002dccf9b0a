"""The meter's numbers against their definitions, the exact step of what it finds at any window, exploding losses, and
the steps of several ranks as one.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from instrument.results.measurements import TapReading
from instrument.watch.counters import REPORTED
from instrument.watch.meter import EXPLOSION_STEPS, MEDIAN_STEPS, ExplosionDetector, MeasuredStep, StepMeter, merge_ranks
from instrument.watch.surface import Surface
from instrument.watch.taps import merge_readings
from kernels import logit_stats, multi_tensor_stats

CPU = torch.device("cpu")
BATCH = SimpleNamespace(samples=4, tokens=12, real_tokens=10, seq_len=3, n_targets=12, lengths=torch.tensor([3, 3, 2, 2]))


def make(window=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, StepMeter(model, optimizer, CPU, window=window, micro_batches=2, warmup_steps=0)


def one_step(model, optimizer, meter, step, *, spoil=lambda phase: None, scale=None, clip_norm=None):
    """A step as the loop takes it; ``spoil(phase)`` may plant something before the meter looks."""
    meter.begin_step(step, 0.01, scale)
    meter.count(BATCH)
    for index in range(2):
        logits = model(torch.randn(2, 4))
        spoil(("forward", index, logits))
        loss = logits.square().mean() / 2
        spoil(("loss", index, loss))
        logit_stats(logits, meter.next_logits())
        meter.add_loss(loss)
        loss.backward()
    spoil(("backward", None, model))
    threshold = 2.0**-24 if scale is None else 2.0**-24 / scale  # these gradients are unscaled already
    stats = multi_tensor_stats([p.grad for p in meter.parameters], underflow_below=threshold)
    meter.gradients(stats, clip_norm=stats.total_norm if clip_norm is None else clip_norm)
    skipped = scale is not None and not all(p.grad.isfinite().all() for p in model.parameters())
    if not skipped:
        optimizer.step()
    spoil(("optimizer", None, model))
    meter.updated()
    optimizer.zero_grad()
    meter.end_step()


def test_a_healthy_step_reads_as_defined():
    model, optimizer, meter = make()
    seen = {}

    def look(at):
        phase, index, value = at
        if phase == "forward":
            seen.setdefault("logits", []).append(value.detach().clone())
        if phase == "loss":
            seen.setdefault("losses", []).append(value.item())
        if phase == "backward":
            seen["grads"] = torch.cat([p.grad.flatten() for p in value.parameters()]).double()

    one_step(model, optimizer, meter, 1, spoil=look)
    reading = meter.read()
    (record,) = reading.steps
    assert reading.divergence is None and reading.events == []
    assert record.loss == pytest.approx(sum(seen["losses"]), rel=1e-7)
    assert record.logit_absmax == max(x.abs().max().item() for x in seen["logits"])
    assert record.grad_norm == pytest.approx(seen["grads"].norm().item(), rel=1e-12)
    assert record.grad_absmax == seen["grads"].abs().max().item()
    assert (record.grad_nonfinite, record.logit_nonfinite, record.logit_over_fp16) == (0, 0, 0)
    assert record.grad_underflow_frac == 0 and record.loss_scale is None and not record.step_skipped
    assert (record.samples, record.tokens, record.real_tokens, record.seq_len) == (4, 12, 10, 3)
    assert record.step_time_s > 0


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize(
    ("phase", "tensor", "module"),
    [("forward", "output", None), ("loss", "output", None), ("backward", "grad", "1"), ("optimizer", "param", "1")],
)
def test_the_first_bad_step_is_exact_whatever_the_window(window, phase, tensor, module):
    model, optimizer, meter = make(window)
    bad_step = 5

    def spoil(at):
        where, index, value = at
        if step != bad_step or where != phase or index == 0:
            return
        with torch.no_grad():
            if where in ("forward", "loss"):
                value.view(-1)[0] = math.nan
            elif where == "backward":
                value[1].weight.grad[0, 0] = math.inf
            else:
                value[1].weight[0, 0] = -math.inf

    divergence = None
    for step in range(1, 15):
        one_step(model, optimizer, meter, step, spoil=spoil)
        if meter.due:
            reading = meter.read()
            divergence = reading.divergence
            if divergence:
                break
    assert divergence.step == bad_step and reading.steps[-1].step == bad_step
    first = divergence.first_nonfinite
    assert (first.step, first.phase, first.tensor, first.module) == (bad_step, phase, tensor, module)
    assert first.kind == ("nan" if phase in ("forward", "loss") else "inf")
    assert first.microbatch == (1 if phase in ("forward", "loss") else None)


@pytest.mark.parametrize("window", [1, 2])
def test_every_window_reads_the_logits_of_its_own_micro_batches(window):
    """The second micro-batch's are the larger ones, and each step's smaller than the last one's."""
    model, optimizer, meter = make(window)
    found = []

    def spoil(at):
        if at[0] == "forward":
            at[2].data.fill_(10.0 * (1 + at[1]) / step)

    for step in range(1, 5):
        one_step(model, optimizer, meter, step, spoil=spoil)
        if meter.due:
            found += [record.logit_absmax for record in meter.read().steps]
    assert found == pytest.approx([20.0, 10.0, 20 / 3, 5.0])


@pytest.mark.parametrize("microbatch", [0, 1])
def test_bad_logits_of_a_later_window_are_of_their_micro_batch(microbatch):
    model, optimizer, meter = make()

    def spoil(at):
        if step == 3 and at[:2] == ("forward", microbatch):
            at[2].data[0, 0] = math.inf

    for step in (1, 2, 3):
        one_step(model, optimizer, meter, step, spoil=spoil)
        divergence = meter.read().divergence
    assert (divergence.step, divergence.first_nonfinite.microbatch) == (3, microbatch)


def test_a_loss_that_fails_in_the_first_micro_batch_is_the_first_ones():
    model, optimizer, meter = make()

    def spoil(at):
        if at[:2] == ("loss", 0):
            at[2].data.fill_(math.nan)

    one_step(model, optimizer, meter, 1, spoil=spoil)
    first = meter.read().divergence.first_nonfinite
    assert (first.phase, first.microbatch, first.kind) == ("loss", 0, "nan")


def test_a_bad_state_comes_before_the_parameter_it_spoils():
    model, optimizer, meter = make()
    one_step(model, optimizer, meter, 1)
    assert meter.read().divergence is None

    def spoil(at):
        if at[0] == "optimizer":
            optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = math.inf
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan

    one_step(model, optimizer, meter, 2, spoil=spoil)
    first = meter.read().divergence.first_nonfinite
    assert (first.phase, first.tensor, first.module, first.dtype) == ("optimizer", "exp_avg_sq", "0", "float32")


def test_a_state_that_overflows_is_a_divergence_though_the_parameters_stay_finite():
    """A thousandth of (1e21)^2 is beyond fp32; m / inf = 0 freezes the weight, and nothing else shows it."""
    model, optimizer, meter = make()

    def spoil(at):
        if at[0] == "backward":
            model[1].weight.grad[0, 0] = 1e21

    one_step(model, optimizer, meter, 1, spoil=spoil)
    first = meter.read().divergence.first_nonfinite
    assert (first.phase, first.tensor, first.module, first.kind) == ("optimizer", "exp_avg_sq", "1", "inf")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_scaler_skip_is_an_event_and_no_divergence():
    model, optimizer, meter = make()

    def spoil(at):
        if at[0] == "backward":
            model[0].bias.grad[1] = math.inf

    one_step(model, optimizer, meter, 1, spoil=spoil, scale=torch.tensor(1024.0))
    reading = meter.read()
    assert reading.divergence is None
    (record,), (event,) = reading.steps, reading.events
    assert record.step_skipped and record.loss_scale == 1024.0 and record.grad_nonfinite == 1
    assert event.kind == "scaler_skip" and event.detail == {"loss_scale": 1024.0, "grad_nonfinite": 1, "tensor": "0.bias"}
    one_step(model, optimizer, meter, 2, spoil=spoil)  # the same without a scaler is a divergence
    assert meter.read().divergence.first_nonfinite.phase == "backward"


def test_underflow_is_judged_at_the_scale_of_backward():
    model, optimizer, meter = make()

    def spoil(at):
        if at[0] == "backward":
            for p in model.parameters():
                p.grad.fill_(2.0**-30)
            model[0].bias.grad[0] = 0.0  # a zero is not an underflow

    for step, (scale, expected) in enumerate([(None, 1.0), (torch.tensor(1024.0), 0.0), (torch.tensor(2.0), 1.0)], 1):
        one_step(model, optimizer, meter, step, spoil=spoil, scale=scale)
        assert meter.read().steps[0].grad_underflow_frac == expected


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_norm_that_overflows_in_clipping_is_the_culprit_only_if_parameters_fail(spoilt):
    model, optimizer, meter = make()

    def spoil(at):
        if at[0] == "optimizer" and spoilt:
            with torch.no_grad():
                model[0].weight.fill_(math.nan)

    one_step(model, optimizer, meter, 1, spoil=spoil, clip_norm=torch.tensor(math.inf, dtype=torch.float16))
    divergence = meter.read().divergence
    if not spoilt:
        assert divergence is None
        return
    first = divergence.first_nonfinite
    assert (first.phase, first.tensor, first.kind) == ("clip", "grad_norm", "inf")


def test_a_loss_that_stays_high_ends_the_run_without_a_non_finite_value():
    model, optimizer, meter = make(window=10)

    def raise_the_loss(at):
        if at[0] == "loss" and step > 1:
            at[2].data.fill_(50.0)

    for step in range(1, 200):
        one_step(model, optimizer, meter, step, spoil=raise_the_loss)
        if meter.due and (divergence := meter.read().divergence):
            break
    assert divergence.step == MEDIAN_STEPS - 1 + EXPLOSION_STEPS and divergence.first_nonfinite is None
    assert "rolling median loss" in divergence.reason


def first_explosion(losses, warmup_steps=0, uninformed_loss=0.0):
    detector = ExplosionDetector(warmup_steps, uninformed_loss)
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


def test_a_head_that_begins_with_a_prior_is_held_to_the_loss_that_it_would_have_begun_with():
    """Without the prior the first loss is ln 2; with it 0.06, and 1.5 times that would be no explosion of anything."""
    never, at_149 = None, MEDIAN_STEPS - 1 + EXPLOSION_STEPS
    for later, end in ((0.5, never), (1.03, never), (1.05, at_149), (33_000.0, at_149)):
        without = first_explosion([math.log(2)] + [later] * 400)
        assert first_explosion([0.06] + [later] * 400, uninformed_loss=math.log(2)) == without == end
    assert first_explosion([2.0] + [2.9] * 400, uninformed_loss=math.log(2)) is None  # nor does it tighten a larger one


def test_warm_up_is_forgiven():
    assert first_explosion([2.0] + [3.1] * 400, warmup_steps=200) == 200 + EXPLOSION_STEPS
    assert first_explosion([2.0] + [9.0] * 150 + [2.0] * 400, warmup_steps=150) is None


def test_a_non_finite_loss_does_not_break_the_median():
    assert first_explosion([2.0] * 60 + [math.inf] + [2.0] * 200) is None


HEALTHY = dict.fromkeys(REPORTED, 0.0) | {
    "loss_microbatch": -1.0,
    "loss_scale": -1.0,
    "backward_tensor": -1.0,
    "state_tensor": -1.0,
    "param_tensor": -1.0,
}
FINITE = {"nan": 0, "pos_inf": 0, "neg_inf": 0}


def step(time_s=1.0, slots=2, nbytes=None, **row):
    return MeasuredStep({**HEALTHY, **row}, [FINITE] * slots, time_s, nbytes)


def first_of(merged):
    return Surface(1, merged.row, None, merged.logits, world=merged.world, rank_of=merged.rank_of).first_nonfinite()


def test_one_process_is_left_as_it_is():
    alone = step(loss=math.inf, loss_microbatch=1.0)
    assert merge_ranks([alone]) is alone and (first_of(alone).microbatch, first_of(alone).rank) == (1, None)


def test_losses_add_up_and_the_slowest_rank_is_the_steps_time():
    both = merge_ranks(
        [step(loss=2.0, time_s=1.0, nbytes=5, grad_norm=3.0), step(loss=0.5, time_s=2.0, nbytes=7, grad_norm=3.0)]
    )
    assert (both.row["loss"], both.step_time_s, both.allocated_bytes, both.row["grad_norm"]) == (2.5, 2.0, 7, 3.0)
    assert len(both.logits) == 4 and first_of(both) is None


@pytest.mark.parametrize("microbatch", range(4))
def test_bad_logits_are_of_the_rank_that_ran_the_micro_batch(microbatch):
    both = merge_ranks([step(), step()])
    both.logits[microbatch] = {"nan": 0, "pos_inf": 1, "neg_inf": 2}
    both.row["loss"] = math.inf
    first = first_of(both)
    assert (first.phase, first.kind, first.microbatch, first.rank) == ("forward", "-inf", microbatch, microbatch // 2)


def test_the_first_bad_micro_batch_is_counted_through_the_step():
    both = merge_ranks([step(loss=1.0), step(loss=math.nan, loss_microbatch=1.0)])
    assert both.row["loss_microbatch"] == 3 and math.isnan(both.row["loss"])
    assert (first_of(both).phase, first_of(both).microbatch, first_of(both).rank) == ("loss", 3, 1)
    earlier = merge_ranks([step(loss=math.inf, loss_microbatch=1.0), step(loss=math.nan, loss_microbatch=0.0)])
    assert earlier.row["loss_microbatch"] == 1 and first_of(earlier).rank == 0


def test_a_tensor_that_one_rank_shows_is_its_and_one_that_all_show_is_nobodys():
    both = merge_ranks(
        [
            step(param_tensor=4.0, param_nan=1.0, backward_tensor=2.0, backward_nan=-3.0),
            step(state_tensor=7.0, param_tensor=3.0, param_nan=-2.0, backward_tensor=2.0, backward_nan=-3.0),
        ]
    )
    assert both.rank_of == {"backward": None, "state": 1, "param": 1}
    assert (both.row["param_tensor"], both.row["param_nan"], both.row["state_tensor"]) == (3, -2, 7)


def test_module_readings_of_ranks_are_one():
    def reading(module, absmax, nan, flush_frac, step=1):
        return TapReading(step, module, 0, "fwd", "float32", absmax, nan, 1, flush_frac, 5)

    first = [reading("a", 1.0, 0, None), reading("b", 9.0, 0, 0.5)]
    second = [reading("b", 2.0, 3, 0.7), reading("c", 1.0, 0, None)]
    assert merge_readings([first]) is first
    both = merge_readings([first, second])
    assert [r.module for r in both] == ["a", "b", "c"]
    assert (both[1].absmax, both[1].nan, both[1].inf, both[1].flush_frac) == (9.0, 3, 2, 0.7)
