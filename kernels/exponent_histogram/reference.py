"""The definition in plain torch, and the fast path of the CPU."""

import torch

from kernels.exponent_histogram import counts as c


def reference_histogram(x: torch.Tensor, words: torch.Tensor) -> None:
    """Add the counts of x to `words`: float64 comparisons with exact powers of two. Slow, obvious, any device."""
    a = x.detach().reshape(-1).double()
    edges = torch.tensor([2.0**k for k in range(c.LOWEST, c.HIGHEST + 2)], dtype=torch.float64, device=a.device)
    finite = a[a.isfinite() & (a != 0)].abs()
    where = torch.bucketize(finite, edges, right=True)  # 0: below the first edge
    words[c.BELOW_RANGE : c.ABOVE_RANGE + 1] += torch.bincount(where, minlength=len(edges) + 1)
    words[c.ZEROS] += (a == 0).sum()
    words[c.NAN] += a.isnan().sum()
    words[c.POS_INF] += (a == float("inf")).sum()
    words[c.NEG_INF] += (a == -float("inf")).sum()


def host_histogram(x: torch.Tensor, words: torch.Tensor, piece: int = 1 << 17) -> None:
    """The same on the CPU, from exponent fields, in pieces that stay in the cache."""
    x = x.detach().reshape(-1)
    fields = torch.zeros(256, dtype=torch.int64)
    for part in x.split(piece) if x.numel() else ():
        part = part.float() if part.dtype == torch.float16 else part  # subnormal fp16 become normal
        if part.dtype == torch.float32:
            field = (part.view(torch.int32) >> 23) & 0xFF
        else:
            field = (part.view(torch.int16) >> 7) & 0xFF
        fields += torch.bincount(field, minlength=256)
    zeros = x.numel() - torch.count_nonzero(x)
    first = 127 + c.LOWEST
    words[c.ZEROS] += zeros
    words[c.BELOW_RANGE] += fields[:first].sum() - zeros
    words[c.FIRST_BIN : c.ABOVE_RANGE] += fields[first : 127 + c.HIGHEST + 1]
    words[c.ABOVE_RANGE] += fields[127 + c.HIGHEST + 1 : 255].sum()
    if fields[255]:
        nan, positive = x.isnan().sum(), (x == float("inf")).sum()
        words[c.NAN] += nan
        words[c.POS_INF] += positive
        words[c.NEG_INF] += fields[255] - nan - positive
