"""What a forward pass ran, below autograd and autocast: of which kind its attention is, in which dtype its last product."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OpsSeen(TorchDispatchMode):
    """``attention``: ``sdpa`` where an attention kernel ran, ``eager`` where a softmax over scores did, else None.
    ``product_dtype``: of the last matrix product's result, None before any."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: str | None = None
        self.product_dtype: torch.dtype | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func._overloadpacket.__name__
        if is_attention(name, result) and self.attention != "sdpa":
            self.attention = "sdpa" if "attention" in name else "eager"
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.product_dtype = result.dtype
        return result


def is_attention(name: str, result: object) -> bool:
    """Whether an op weights positions by each other: an attention kernel, or a softmax over scores, which have three
    dimensions or more (a router's over experts has two)."""
    return "attention" in name or ("softmax" in name and isinstance(result, torch.Tensor) and result.ndim >= 3)
