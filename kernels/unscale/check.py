"""What `python -m kernels check` asks of unscale_and_stats_: torch's own GradScaler kernel bit for bit, and the norm."""

from collections.abc import Iterator

import torch

from kernels.check import Judged, of_bound
from kernels.multi_tensor_stats.check import SHAPES
from kernels.unscale.op import unscale_and_stats_

INV_SCALES = (2.0**-16, 1 / 30_000)


def checks(device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Judged]:
    if dtype == torch.float16:  # refused, as GradScaler does
        return
    for inv_scale in INV_SCALES:
        for bad in (None, float("inf")):
            grads = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES[device.type]]
            if bad is not None:
                grads[1].view(-1)[7] = bad
            theirs, found_inf = [g.clone() for g in grads], torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(theirs, found_inf, torch.tensor(inv_scale, device=device))
            out = unscale_and_stats_(grads, torch.tensor(inv_scale, device=device), impl=impl)
            case = f"1/scale {inv_scale:.3g}, {'finite' if bad is None else 'one Inf'}"
            unequal = sum(int((~((g == t) | (g.isnan() & t.isnan()))).sum()) for g, t in zip(grads, theirs, strict=True))
            yield Judged(case, "unscaled gradients", float(unequal), 0.0, "elements that differ")
            yield Judged(case, "found_inf", abs(out.found_inf.item() - found_inf.item()), 0.0, "its distance from torch's")
            if bad is None:
                norm = torch.stack([t.double().norm() for t in theirs]).norm().item()
                yield Judged(case, "norm", *of_bound(torch.tensor([abs(out.total_norm.item() - norm) / norm]), 1e-6))
