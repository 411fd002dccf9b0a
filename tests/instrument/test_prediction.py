"""Hazards from planted fp32 figures, against torch's own rounding, and the comparison with what happened."""

import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument.prediction import (
    FALSE_ALARM,
    HIT,
    MISSED,
    NEITHER,
    NOT_REACHED,
    Arithmetic,
    Happened,
    Hazard,
    Reference,
    compare,
    end,
    hazards,
    smallest_gradient,
)
from instrument.results.schemas import FirstNonfinite, StepRecord

NAIVE = Arithmetic(
    compute="fp16",
    head="fp16",
    states="fp16",
    update="fp16",
    clip="fp32",
    mixed=False,
    eps=1e-8,
    beta2=0.999,
    max_norm=1.0,
    loss_scale=None,
)
AMP = replace(NAIVE, states="fp32", update="fp32", mixed=True, loss_scale=65536.0)
BF16 = replace(NAIVE, compute="bf16", head="bf16", states="bf16", update="bf16")


def step(number, norm=1.0, absmax=0.1, logits=1.0):
    return StepRecord(
        step=number,
        loss=1.0,
        lr=0.1,
        grad_norm=norm,
        grad_absmax=absmax,
        grad_nonfinite=0,
        grad_underflow_frac=0.0,
        logit_absmax=logits,
        logit_nonfinite=0,
        logit_over_fp16=0,
        loss_scale=None,
        step_skipped=False,
        step_time_s=0.1,
        samples=1,
        tokens=1,
        real_tokens=1,
        seq_len=1,
    )


def row(module, absmax, direction="fwd", at=1, flush=None, inf=0):
    return SimpleNamespace(module=module, direction=direction, absmax=absmax, absmax_step=at, nan=0, inf=inf, flush_frac=flush)


def reference(*rows, steps=(), n_params=100):
    return Reference(rows, steps or (step(1, norm=1.0),), n_params)


def kinds(found):
    return [h.kind for h in found]


def first(phase, cause, module="a"):
    return FirstNonfinite(
        step=1,
        microbatch=None,
        phase=phase,
        phase_surfaced=phase,
        module=module,
        op=None,
        tensor="output",
        source_tensor=None,
        kind="inf",
        dtype=None,
        cause=cause,
        input_absmax=None,
        headroom_bits=None,
    )


@pytest.mark.parametrize(("absmax", "overflows"), [(65504.0, False), (65505.0, True), (4e38, True)])
def test_an_output_beyond_the_largest_number_overflows_in_that_format(absmax, overflows):
    found = hazards(reference(row("a", absmax, at=7), n_params=4), NAIVE)
    assert kinds(found) == ["overflow_forward"] * overflows
    if overflows:
        assert (found[0].module, found[0].step, found[0].value) == ("a", 7, absmax) and found[0].bits < 0
        assert found[0].bits == pytest.approx(math.log2(65504 / absmax)) and end(found) is found[0]
    assert kinds(hazards(reference(row("a", absmax)), BF16)) == ["overflow_forward"] * (absmax > 3.39e38)


def test_a_module_counts_once_with_its_largest_value_and_the_first_step_beyond():
    found = hazards(reference(row("a", 7e4, at=20), row("a", 1e3, at=3), row("a", 9e4, at=30), n_params=4), NAIVE)
    assert [(h.value, h.step) for h in found] == [(9e4, 20)]


def test_what_is_infinite_in_fp32_already_is_beyond_every_format():
    (found,) = hazards(reference(row("a", 1.0, inf=3), n_params=4), BF16)
    assert found.value == math.inf and found.bits is None


def test_the_head_has_its_own_format_and_its_logits_come_from_the_step_log():
    rows = row("head.dense", 1e5), row("header", 1.0)
    logits = step(4, logits=7e4)
    assert {h.module for h in hazards(reference(*rows, steps=(step(1), logits), n_params=4), NAIVE)} == {"head.dense", "logits"}
    assert hazards(reference(*rows, steps=(step(1), logits), n_params=4), replace(NAIVE, head="fp32")) == []


def test_under_autocast_the_sum_that_a_block_hands_on_is_fp32():
    rows = row("h.0", 1e5), row("h.0.mlp", 1.0)
    assert hazards(reference(*rows), AMP) == []
    assert [h.module for h in hazards(reference(*rows, n_params=4), NAIVE)] == ["h.0"]
    assert [h.module for h in hazards(reference(row("h.0", 1.0), row("h.0.mlp", 1e5)), AMP)] == ["h.0.mlp"]


def test_gradients_are_judged_at_the_scale_at_which_backward_runs():
    rows = reference(row("a", 2.0, "bwd"), steps=(step(1, absmax=1.5),), n_params=4)
    assert hazards(rows, NAIVE) == []
    skips = hazards(rows, AMP)
    assert kinds(skips) == ["scaler_skip"] * 2
    assert [(h.module, h.value) for h in skips] == [("a", 131072.0), ("parameter gradients", 98304.0)]
    assert end(skips) is None  # a skipped step is no end
    assert kinds(hazards(reference(row("a", 7e4, "bwd"), n_params=4), NAIVE)) == ["overflow_backward"]


def test_under_autocast_a_sum_over_micro_batches_is_beyond_only_if_a_share_of_it_is():
    rows = reference(steps=(step(1, absmax=1.5),), n_params=4)
    assert kinds(hazards(rows, AMP)) == ["scaler_skip"] and hazards(replace(rows, micro_batches=2), AMP) == []
    large = replace(reference(steps=(step(1, absmax=7e4),), n_params=4), micro_batches=2)
    assert kinds(hazards(large, NAIVE)) == ["overflow_backward"]  # summed in fp16


def test_a_norm_beyond_fp16_overflows_where_it_is_accumulated_in_fp16():
    large = reference(steps=(step(1, norm=9.4e4),), n_params=4)
    assert kinds(hazards(large, replace(NAIVE, clip="fp16"))) == ["norm_overflow"] and hazards(large, NAIVE) == []


def test_flushed_gradients_are_reported_only_without_a_loss_scale():
    rows = reference(*(row(name, 0.5, "bwd", flush=share) for name, share in (("a", 0.9), ("a", 0.6), ("b", 0.4))), n_params=4)
    (found,) = hazards(rows, NAIVE)
    assert (found.kind, found.module, found.share) == ("gradient_flush", "a", 0.9) and not found.fatal
    assert hazards(rows, AMP) == hazards(rows, BF16) == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3000),
    exponent=st.floats(-6, 1),
    spread=st.floats(0, 3),
    eps=st.sampled_from([1e-8, 2.0**-25, 1e-4]),
)
def test_what_is_predicted_of_the_optimizer_holds_for_torchs_adamw_in_fp16(seed, n, exponent, spread, eps):
    """The bound on lost second moments is never too high, and a predicted division by zero always happens."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(n, generator=generator, dtype=torch.float64) * 10.0**exponent
    gradient *= torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64))
    norm = float(gradient.norm())
    clipped = (gradient * min(1.0, 1 / norm)).half()
    found = hazards(reference(steps=(step(1, norm=norm),), n_params=n), replace(NAIVE, eps=eps))
    parameter = torch.nn.Parameter(torch.zeros(n, dtype=torch.float16))
    parameter.grad = clipped
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, eps=eps, foreach=True)
    optimizer.step()
    lost = float((optimizer.state[parameter]["exp_avg_sq"] == 0).double().mean())
    for hazard in found:
        if hazard.kind == "states_flush":
            assert lost >= hazard.share - 1e-2  # gradients were rounded to fp16 first
        else:
            assert hazard.kind == "division_by_zero" and eps <= 2.0**-25 and not parameter.isfinite().all()


def test_epsilon_and_the_states_format_decide_whether_it_ends():
    small = reference(steps=(step(1, norm=1.0),), n_params=10**6)
    assert kinds(hazards(small, NAIVE)) == ["division_by_zero", "states_flush"]
    unclipped = reference(steps=(step(1, norm=100.0),), n_params=10**6)  # clipping makes them small
    assert hazards(unclipped, NAIVE) == hazards(small, NAIVE) and hazards(unclipped, replace(NAIVE, max_norm=1e9)) == []
    assert kinds(hazards(small, replace(NAIVE, eps=1e-4))) == ["states_flush"]
    assert hazards(replace(small, n_params=None), NAIVE) == []  # not known: nothing is claimed
    for fine in (BF16, replace(NAIVE, states="fp32", update="fp32"), replace(NAIVE, states="8bit", update="fp32")):
        assert hazards(small, fine) == []
    assert smallest_gradient(NAIVE) == pytest.approx(5.46e-3, rel=1e-3)  # "about 5e-3"


def test_the_first_fatal_hazard_ends_it():
    found = [
        Hazard("division_by_zero", None, 1, 1.0, 1.0),
        Hazard("overflow_forward", "a", 9, 1.0, 1.0),
        Hazard("scaler_skip", None, 1, 1.0, 1.0),
    ]
    assert end(found).kind == "division_by_zero" and end(found[1:]).kind == "overflow_forward" and end(found[2:]) is None
    assert end([replace(found[0], step=9), found[1]]).kind == "overflow_forward"  # a step's forward pass comes first


def verdicts(found, happened):
    return {o.kind: o.verdict for o in compare(found, happened)}


def test_every_way_a_prediction_can_turn_out():
    overflow = [Hazard("overflow_forward", "a.b", 9, 1e5, 65504.0)]
    died = Happened(4, first("forward", "overflow", "a"), 0, None)
    assert verdicts(overflow, died)["overflow_forward"] == HIT
    assert [o.named for o in compare(overflow, died) if o.kind == "overflow_forward"] == [True]
    other = Happened(4, first("forward", "overflow", "c"), 0, None)
    assert [o.named for o in compare(overflow, other) if o.kind == "overflow_forward"] == [False]
    assert verdicts(overflow, Happened(None, None, 0, 0.0))["overflow_forward"] == FALSE_ALARM
    assert verdicts([], died)["overflow_forward"] == MISSED
    assert verdicts(overflow, Happened(4, first("optimizer", "underflow_then_divide"), 0, 1.0)) == {
        "overflow_forward": NOT_REACHED,
        "overflow_backward": NEITHER,
        "norm_overflow": NEITHER,
        "division_by_zero": MISSED,
        "scaler_skip": NEITHER,
        "states_flush": MISSED,
    }
    assert set(verdicts([], Happened(None, None, 0, 0.0)).values()) == {NEITHER}


def test_a_hazard_of_the_step_that_ended_was_reached_if_its_phase_came_before():
    ended = Happened(1, first("optimizer", "underflow_then_divide"), 0, None)
    assert verdicts([Hazard("overflow_forward", "a", 1, 1e5, 1.0)], ended)["overflow_forward"] == FALSE_ALARM
    forward = Happened(1, first("forward", "overflow"), 0, None)
    assert verdicts([Hazard("division_by_zero", None, 1, 1.0, 1.0)], forward)["division_by_zero"] == NOT_REACHED


def test_an_end_that_no_hazard_stands_for_was_not_predicted():
    for happened in (
        Happened(3, None, 0, None),
        Happened(3, first("forward", "invalid"), 0, None),
        Happened(3, first("optimizer", "overflow"), 0, None),
        Happened(3, first("backward", None), 0, None),
    ):
        assert verdicts([], happened)["other"] == MISSED
    assert Happened(3, first("clip", "overflow"), 0, None).kind == "norm_overflow"
    assert Happened(3, first("unscale", "overflow"), 0, None).kind == "overflow_backward"


def test_states_that_nobody_could_count_are_not_compared():
    assert "states_flush" not in verdicts([Hazard("states_flush", None, 1, 1.0, 1.0, share=0.9)], Happened(2, None, 0, None))


def test_skipped_steps_are_compared():
    skip = [Hazard("scaler_skip", None, 1, 1e5, 65504.0)]
    assert verdicts(skip, Happened(None, None, 2, None))["scaler_skip"] == HIT
    assert verdicts(skip, Happened(None, None, 0, None))["scaler_skip"] == FALSE_ALARM
    assert verdicts([], Happened(None, None, 1, None))["scaler_skip"] == MISSED


@pytest.mark.process
def test_it_needs_no_torch():
    code = "import sys, instrument.prediction; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
