"""AdamW in the implementations that a dtype configuration can name.

All of them compute the same update (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101):

    p <- p (1 - lr * decay)
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

and differ in where it is rounded: that decides whether 16-bit training lives.

The learning-rate schedule: linear warm-up, then a cosine to a tenth of the peak.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)


class OptimizerUnavailable(Exception):
    """An implementation that this machine lacks; the reason is the message."""


def adamw_for(
    implementation: str, parameters: list[torch.nn.Parameter], *, lr: float, eps: float, weight_decay: float, seed: int
) -> torch.optim.Optimizer:
    """AdamW over ``parameters``; matrices decay, vectors (biases, norms) do not.

    ``implementation`` is one of `bench_cases.dtype_configs.OPTIMIZERS`.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": lr, "betas": BETAS, "eps": eps}
    if implementation in ("foreach", "fused"):
        return torch.optim.AdamW(groups, **options, **{implementation: True})
    if implementation == "fp32_states":
        return Fp32StatesAdamW(groups, **options)
    if implementation == "stochastic_rounding":
        return StochasticRoundingAdamW(groups, **options, seed=seed)
    return eight_bit_adamw()(groups, **options)


def state_dtypes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How many state elements are stored in each dtype (``{"float32": n, "uint8": m}``)."""
    counts: Counter[str] = Counter()
    for state, name in product(optimizer.state.values(), ("exp_avg", "exp_avg_sq", "state1", "state2")):
        if (tensor := state.get(name)) is not None:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts)


def zeros_and_total(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """How many elements of ``exp_avg_sq`` are exactly 0, where (1 - beta2) g^2 underflowed or no gradient ever came, and how
    many there are. (0, 0) when no floating-point one exists (8-bit states are codes, and no step has none)."""
    squares = [state["exp_avg_sq"] for state in optimizer.state.values() if "exp_avg_sq" in state]
    return sum(int((tensor == 0).sum()) for tensor in squares), sum(tensor.numel() for tensor in squares)


def rounded_away_share(
    before: list[torch.Tensor], parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> float | None:
    """Share of the elements with a nonzero ``exp_avg`` that an update left exactly as they were: what it
    changed was less than half a unit in the last place. ``before`` are the parameters' values before it. None
    when no floating-point ``exp_avg`` exists."""
    moving = [
        (old, p, optimizer.state[p]["exp_avg"])
        for old, p in zip(before, parameters, strict=True)
        if "exp_avg" in optimizer.state.get(p, {})
    ]
    total = sum(int((m != 0).sum()) for _, _, m in moving)
    return sum(int(((old == p) & (m != 0)).sum()) for old, p, m in moving) / total if total else None


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW; imported late because its import initialises CUDA (pytorch forks)."""
    import logging

    # It looks for a package called `kernels`, finds ours, and warns that ours is not theirs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise OptimizerUnavailable(f"8-bit AdamW needs bitsandbytes ({error})") from error
    return AdamW8bit


class _WideAdamW(torch.optim.Optimizer):
    """AdamW whose arithmetic runs in fp32 over weights stored in 16 bits."""

    state_dtype = torch.float32

    def __init__(self, params, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state(p) for p in parameters]
            wide = [p.float() for p in parameters]
            means, squares = ([s[name].float() for s in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            gradients, steps = [p.grad.float() for p in parameters], [s["step"] for s in states]
            options = {name: group[name] for name in ("lr", "eps", "weight_decay")} | {"beta1": beta1, "beta2": beta2}
            fixed = {"foreach": True, "amsgrad": False, "maximize": False}
            adamw(wide, gradients, means, squares, [], steps, **fixed, **options)
            self._store(parameters, wide)
            for name, values in (("exp_avg", means), ("exp_avg_sq", squares)):
                self._store([s[name] for s in states], values)

    def _state(self, parameter: torch.nn.Parameter) -> dict:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        return state

    def _store(self, targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        torch._foreach_copy_(targets, values)


class Fp32StatesAdamW(_WideAdamW):
    """fp32 states and arithmetic; only the stored weights are rounded (to nearest)."""


class StochasticRoundingAdamW(_WideAdamW):
    """bf16 states and weights, both stored by stochastic rounding, so that updates below half a
    unit in the last place happen with the right probability and decay does not stall."""

    state_dtype = torch.bfloat16

    def __init__(self, params, *, seed: int, **options) -> None:
        super().__init__(params, **options)
        device = self.param_groups[0]["params"][0].device
        self._generator = torch.Generator(device).manual_seed(seed)

    def _store(self, targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for target, value in zip(targets, values, strict=True):
            target.copy_(round_stochastically(value, self._generator))


def round_stochastically(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 -> bf16, up or down with probabilities that make the rounding unbiased.

    Random bits are added to the 16 bits that bf16 drops, and the sum is cut off. Finite values
    that would round beyond the largest bf16 and non-finite ones are rounded to nearest instead.
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    bits = value.view(torch.int32)
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    near_limit = value.abs() >= torch.finfo(torch.bfloat16).max  # true for inf; nan is caught below
    return torch.where(near_limit | value.isnan(), value, rounded).bfloat16()


FLOOR = 0.1
"""Where the cosine ends, as a share of the peak."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """The rate of update ``step`` (1 to ``max_steps``). The first warm-up step is not 0."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
