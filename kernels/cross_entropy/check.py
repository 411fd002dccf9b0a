"""What `python -m kernels check` asks of cross_entropy: the formula in float64, and eager torch's error in the same dtype."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.check import Judged, of_bound
from kernels.cross_entropy.op import cross_entropy

SHAPES = {"cuda": (512, 50304), "cpu": (24, 1024)}
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
INTERPRETED_ULP = {**ULP, torch.bfloat16: 2.0**-6}  # Triton's interpreter truncates where a GPU rounds to nearest
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}

CASES = {
    "mean": {},
    "ignored rows, pad columns": {"ignore_index": -100, "valid_vocab": True},
    "label smoothing": {"label_smoothing": 0.1},
    "loss scale 65,536 in the gradient": {"grad_scale": 65536.0},
    "gradient in place": {"inplace_grad": True},
}


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    rows, width = SHAPES[device.type]
    for case, options in CASES.items():
        logits = (torch.randn(rows, width, device=device) * 4).to(dtype)
        options, smoothing = dict(options), options.get("label_smoothing", 0.0)
        valid = width - 47 if options.pop("valid_vocab", False) else width
        targets = torch.randint(0, valid, (rows,), device=device)
        if "ignore_index" in options:
            targets[::3] = -100
        count = int((targets != -100).sum())
        if "grad_scale" in options:
            options["grad_scale"] /= count
        factor = options.get("grad_scale", 1.0 / count)
        exact_loss, exact = _loss_and_gradient(logits.double(), targets, valid, smoothing, factor)
        eager_loss, eager = _loss_and_gradient(logits.float(), targets, valid, smoothing, factor)
        leaf = logits.clone().requires_grad_()
        inplace = options.get("inplace_grad", False)
        loss = cross_entropy(leaf * 1 if inplace else leaf, targets, valid_vocab=valid, impl=impl, **options)
        loss.backward()
        yield Judged(case, "loss", *of_bound((loss.double() - exact_loss / count).abs(),
                                             ((eager_loss - exact_loss) / count).abs().item()
                                             + 2.0**-22 * abs(exact_loss.item() / count) + 1e-7))  # fmt: skip
        ulp = (INTERPRETED_ULP if device.type == "cpu" else ULP)[dtype]
        theirs = (eager.to(dtype).double() - exact).abs().max()
        bound = theirs + ulp * exact.abs() + 2.0**-23 * factor + TINY[dtype]
        yield Judged(case, "gradient", *of_bound((leaf.grad.double() - exact).abs(), bound))


def _loss_and_gradient(logits, targets, valid, smoothing, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the row losses and `factor` times its gradient, in the dtype of `logits`."""
    z = logits.detach().clone().requires_grad_()
    total = F.cross_entropy(z[:, :valid], targets, label_smoothing=smoothing, reduction="sum")
    (grad,) = torch.autograd.grad(total, z, torch.full_like(total, factor))
    return total.detach().double(), grad
