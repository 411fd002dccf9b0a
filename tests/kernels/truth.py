"""What the tests of several ops compare with, made independently of the kernels: by float64 and by real conversions."""

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("torch", "triton")
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# Triton's interpreter truncates where a GPU rounds bf16 to nearest, and a gradient may be stored twice: two ulps.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0 ** (-8 if ON_CUDA else -6), torch.float16: 2.0**-10}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def statistics(x: torch.Tensor, below: float = 2.0**-24) -> dict:
    """What the statistics of x are; those of fp16 by a conversion."""
    x = x.detach().cpu().reshape(-1)
    wide, half = x.double(), x.float().half().double()
    finite = wide[wide.isfinite()].abs()
    return {
        "sumsq": wide.square().sum().item(),
        "absmax": finite.max().item() if len(finite) else 0.0,
        "nan": int(wide.isnan().sum()),
        "inf": int(wide.isinf().sum()),
        "zeros": int((wide == 0).sum()),
        "fp16_flush": int(((wide != 0) & (half == 0)).sum()),
        "fp16_subnormal": int(((half != 0) & (half.abs() < 2.0**-14)).sum()),
        "below": int(((wide != 0) & (wide.abs() < below)).sum()),
        "over_fp16": int((finite > 65504).sum()),
        "numel": x.numel(),
    }


def close(got: float, want: float) -> bool:
    """Equal to 2 ulp of fp32, better than an eager fp32 norm."""
    if math.isnan(want) or math.isinf(want):
        return math.isnan(got) if math.isnan(want) else got == want
    return abs(got - want) <= 2.0**-22 * abs(want)


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Equal, zeros of the same sign; any NaN is as good as another."""
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        same = ((g == w) & (g.signbit() == w.signbit())) | (g.isnan() & w.isnan())
        assert same.all(), f"tensor {index}: {int((~same).sum())} differ, first {g[~same][0]!r} against {w[~same][0]!r}"


def assert_no_worse(
    loss: float,
    grad: torch.Tensor,
    expected: tuple[float, torch.Tensor],
    reference: tuple[float, torch.Tensor],
    weight: float = 0.0,
    floor: float = 0.0,
    ulp: dict[torch.dtype, float] = ULP,
) -> None:
    """Error of a loss and its gradient <= largest error of eager plus one rounding, or the worst element is printed.

    expected, reference  (loss, gradient) in float64, and of eager torch's fp32 loss math rounded to the logits' dtype
    weight               of the fp32 probability (at most 1) from which a one-hot is subtracted: it rounds too
    floor                absolute error allowed in the loss
    ulp                  relative error of one rounding of the gradient
    """
    exact_loss, exact = expected
    bound = abs(reference[0] - exact_loss) + 2.0**-22 * abs(exact_loss) + floor
    assert abs(loss - exact_loss) <= bound, f"loss {loss!r}, float64 {exact_loss!r}, eager {reference[0]!r}"
    theirs = (reference[1].double() - exact).abs().max()
    excess = (grad.double() - exact).abs() - (
        theirs + ulp[grad.dtype] * exact.abs() + 2.0**-23 * abs(weight) + TINY[grad.dtype]
    )
    at = divmod(excess.argmax().item(), grad.shape[1])
    assert excess.max() <= 0, (
        f"gradient{list(at)}: got {grad[at].item()!r}, float64 {exact[at].item()!r}, eager {reference[1][at].item()!r}"
    )


def with_gradients(way, given, seed: int = 1) -> list[torch.Tensor]:
    """Outputs and the gradients of all inputs, for random gradients of the outputs that every dtype holds."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    made = way(*leaves)
    generator = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(x.shape, generator=generator) * 32).round().div(32).to(x) for x in made]
    return [*(x.detach() for x in made), *torch.autograd.grad(made, leaves, weights)]


def worst_of(got, want) -> float:
    """The largest error of any tensor, as a share of the largest value that it should hold."""
    return max(((g.double() - w.double()).abs().max() / w.double().abs().max()).item() for g, w in zip(got, want, strict=True))
