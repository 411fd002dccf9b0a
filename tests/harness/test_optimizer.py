"""Every AdamW against float64 and against each other where they must agree."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.optimizer import BETAS, adamw_for, round_stochastically, rounded_away_share, state_dtypes, zeros_and_total

OPTIONS = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1, "seed": 0}


def parameters(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(8, 16).to(dtype)), torch.nn.Parameter(torch.randn(16).to(dtype))]


def train(implementation, dtype=torch.float32, steps=5, **changes):
    params = parameters(dtype)
    optimizer = adamw_for(implementation, params, **{**OPTIONS, **changes})
    torch.manual_seed(2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p, dtype=torch.float32).to(dtype)
        optimizer.step()
    return params, optimizer


def reference(steps=5, dtype=torch.float32):
    """AdamW by its formula in float64."""
    values = [p.detach().double() for p in parameters(dtype)]
    means = [torch.zeros_like(v) for v in values]
    squares = [torch.zeros_like(v) for v in values]
    torch.manual_seed(2)
    for step in range(1, steps + 1):
        for k, value in enumerate(values):
            g = torch.randn(value.shape).to(dtype).double()
            if value.ndim >= 2:
                value *= 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
            means[k] = BETAS[0] * means[k] + (1 - BETAS[0]) * g
            squares[k] = BETAS[1] * squares[k] + (1 - BETAS[1]) * g * g
            denominator = (squares[k] / (1 - BETAS[1] ** step)).sqrt() + OPTIONS["eps"]
            value -= OPTIONS["lr"] / (1 - BETAS[0] ** step) * means[k] / denominator
    return values


@pytest.mark.parametrize("implementation", ["foreach", "fused", "fp32_states"])
def test_fp32_implementations_follow_the_formula_and_spare_vectors_the_decay(implementation):
    for got, expected in zip(train(implementation)[0], reference(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("implementation", "op"), [("foreach", "_foreach_addcdiv_"), ("fused", "_fused_adamw_"), ("fp32_states", "_foreach_copy_")]
)
def test_the_implementation_that_runs_is_the_one_that_was_named(implementation, op):
    """Where an update is rounded decides whether fp16 lives: the others' results may agree in fp32."""
    with Ops() as ops:
        train(implementation, steps=1)
    assert op in ops.names
    assert not {"_fused_adamw_", "addcdiv_"} & ops.names - {op}


def test_fp32_states_over_fp16_weights_lose_only_the_weights_rounding():
    params, optimizer = train("fp32_states", torch.float16, steps=5)
    assert {p.dtype for p in params} == {torch.float16}
    assert state_dtypes(optimizer) == {"float32": 2 * (8 * 16 + 16)}
    for got, expected in zip(params, reference(5, torch.float16), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=5 * 2.0**-11, atol=1e-3)


def test_fp16_foreach_fails_by_its_epsilon_at_the_first_update():
    param = torch.nn.Parameter(torch.ones(4, 4).half())
    optimizer = adamw_for("foreach", [param], **OPTIONS)
    param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg_sq"].eq(0).all() and state["exp_avg"].isfinite().all()
    assert param.isinf().all()


@pytest.mark.parametrize("change", [{"eps": 1e-4}, {"implementation": "fp32_states"}])
def test_its_two_control_twins_survive_that_update(change):
    param = torch.nn.Parameter(torch.ones(4, 4).half())
    implementation = change.pop("implementation", "foreach")
    optimizer = adamw_for(implementation, [param], **{**OPTIONS, **change})
    param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    assert param.isfinite().all()


def test_stochastic_rounding_is_unbiased_and_keeps_what_bf16_holds():
    generator = torch.Generator().manual_seed(0)
    low, high = 1.0, 1.0 + 2.0**-7
    value = torch.full((40_000,), low + 0.3 * (high - low))
    rounded = round_stochastically(value, generator).float()
    assert set(rounded.unique().tolist()) == {low, high}
    assert (rounded == high).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, float("inf"), float("-inf"), 3.3895313892515355e38])
    assert torch.equal(round_stochastically(exact, generator), exact.bfloat16())
    assert round_stochastically(torch.tensor([float("nan")]), generator).isnan().all()
    full = torch.full((4096,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN whose bits any noise would carry over
    assert round_stochastically(full, generator).isnan().all()
    beyond = torch.full((4096,), 3.3895313892515355e38 * (1 + 2.0**-12))  # nearest is the largest bf16, not infinity
    assert round_stochastically(beyond, generator).isfinite().all()


def test_stochastic_rounding_moves_weights_that_nearest_rounding_leaves():
    def total_move(implementation):
        param = torch.nn.Parameter(torch.ones(64, 64).bfloat16())
        optimizer = adamw_for(implementation, [param], lr=1e-4, eps=1e-8, weight_decay=0.0, seed=0)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return (1 - param.detach().double()).mean().item()

    assert total_move("foreach") == 0.0
    assert total_move("stochastic_rounding") == pytest.approx(20 * 1e-4, rel=0.2)


def test_both_states_are_rounded_stochastically():
    """To nearest, v <- 0.999 v in bf16 never decays, and m <- 0.9 m + 0.1 g stops 2 % short of g."""
    param = torch.nn.Parameter(torch.zeros(64, 64).bfloat16())
    optimizer = adamw_for("stochastic_rounding", [param], lr=0.0, eps=1e-8, weight_decay=0.0, seed=0)
    mean, square = 0.0, 0.0
    for g in [1.0] * 60 + [0.25] * 60:
        param.grad = torch.full_like(param, g)
        optimizer.step()
        mean, square = BETAS[0] * mean + (1 - BETAS[0]) * g, BETAS[1] * square + (1 - BETAS[1]) * g * g
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["exp_avg"].double().mean().item() == pytest.approx(mean, rel=2e-3)
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(square, rel=2e-3)


def test_stochastic_rounding_repeats_with_its_seed():
    runs = [train("stochastic_rounding", torch.bfloat16, seed=seed)[0][0].detach().clone() for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_eight_bit_states_are_eight_bit_where_the_tensor_is_large_enough():
    pytest.importorskip("bitsandbytes")
    params = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(32))]
    optimizer = adamw_for("8bit", params, **OPTIONS)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert state_dtypes(optimizer) == {"uint8": 2 * 64 * 128, "float32": 2 * 32}


def test_a_closure_is_refused():
    params, optimizer = train("fp32_states", steps=1)
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: None)


def test_updates_that_round_to_nothing_are_counted():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
    parameter.grad = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=torch.bfloat16)
    before = [parameter.detach().clone()]
    optimizer.step()  # by 1e-4: less than half of 2^-8 at 1, and plenty at 1e-3
    assert rounded_away_share(before, [parameter], optimizer) == pytest.approx(2 / 3)
    assert rounded_away_share([], [], optimizer) is None


def test_zeros_of_the_second_moment_are_counted_whether_they_underflowed_or_no_gradient_came():
    weights = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float16, torch.float32)]
    adamw = torch.optim.AdamW(weights, lr=1e-3)
    assert zeros_and_total(adamw) == (0, 0)
    for weight in weights:
        weight.grad = torch.tensor([0.0, 1e-3, 1.0, 100.0], dtype=weight.dtype)  # 0.001 * 1e-6 underflows in fp16
    adamw.step()
    assert zeros_and_total(adamw) == (3, 8)
