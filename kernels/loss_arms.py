"""Benchmark arms and checks of a fused loss, shared by cross_entropy and bce_with_logits."""

from collections.abc import Callable, Iterator

import torch

from kernels.bench import BenchArm, own_name
from kernels.check import Judged, of_bound
from kernels.float_formats import float_format
from kernels.logit_stats import LogitStats

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
INTERPRETED_ULP = {**ULP, torch.bfloat16: 2.0**-6}  # Triton's interpreter truncates where a GPU rounds to nearest


def loss_arms(
    op: str,
    case: str,
    device: str,
    inputs: Callable[[], tuple],
    ours: Callable[..., torch.Tensor],
    eager_loss: Callable[..., torch.Tensor],
    eager_loss_over_a_step: Callable[..., torch.Tensor],
    size: int,
    **on_gpu: Callable[[], Callable[..., torch.Tensor]],
) -> list[BenchArm]:
    """Forward and backward to the logits: ours with and without statistics, eager torch and, on a GPU, torch.compile.

    inputs   makes (logits, targets for ours, targets for the others)
    ours     (logits) -> ((logits, targets, stats) -> loss); it gives grad_scale, as a training loop does: fp16 gradients
             are then made in the forward pass too
    size     device-memory bytes that ours must move
    on_gpu   further arms of a GPU: functions that import and return (logits, targets) -> loss
    """

    def our_arm(with_stats):
        def setup():
            logits, targets, _ = inputs()
            stats = LogitStats(device) if with_stats else None
            loss_of = ours(logits)
            return lambda: torch.autograd.grad(loss_of(logits, targets, stats), logits)

        return setup

    def other_arm(make):
        def setup():
            logits, _, dense = inputs()
            loss_of = make()
            return lambda: torch.autograd.grad(loss_of(logits, dense), logits)

        return setup

    name = own_name(device)
    arms = {name: our_arm(True), f"{name}_no_stats": our_arm(False)}
    arms |= {"eager": other_arm(lambda: eager_loss), "eager_normalizer": other_arm(lambda: eager_loss_over_a_step)}
    if device == "cuda":
        on_gpu = {"compile": lambda: torch.compile(eager_loss, dynamic=False)} | on_gpu
        arms |= {arm: other_arm(make) for arm, make in on_gpu.items()}
    return [BenchArm(op, case, arm, setup, size if arm.startswith(name) else 0) for arm, setup in arms.items()]


def judge_loss(
    case: str,
    loss: torch.Tensor,
    grad: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    eager: tuple[torch.Tensor, torch.Tensor],
    divisor: float,
    weight: float,
    floor: float,
) -> Iterator[Judged]:
    """Loss and gradient may err by no more than eager torch's fp32 loss math does, plus one rounding.

    exact, eager  (sum of the row losses, gradient) in float64 and in fp32
    divisor       of the sum in `loss`
    weight        largest factor of an fp32 probability in the gradient; floor: absolute error allowed in the loss
    """
    (exact_loss, exact_grad), (eager_loss, eager_grad), dtype = exact, eager, grad.dtype
    allowed = ((eager_loss - exact_loss) / divisor).abs().item() + 2.0**-22 * abs(exact_loss.item() / divisor) + floor
    yield Judged(case, "loss", *of_bound((loss.double() - exact_loss / divisor).abs(), allowed))
    ulp = (INTERPRETED_ULP if grad.device.type == "cpu" else ULP)[dtype]
    theirs = (eager_grad.to(dtype).double() - exact_grad).abs().max()
    bound = theirs + ulp * exact_grad.abs() + 2.0**-23 * weight + float_format(dtype).smallest_subnormal
    yield Judged(case, "gradient", *of_bound((grad.double() - exact_grad).abs(), bound))
