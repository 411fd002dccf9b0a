"""The definition, in torch's own operators."""

import torch


def reference_scale_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply by `factor` (fp32, 0-dim) in place: the product in fp32, rounded to each tensor's dtype. Any device."""
    for x in tensors:
        x.copy_(x.float() * factor)
