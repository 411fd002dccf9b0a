"""Model FLOPs of a training step by the dtype in which they run. Torch-free.

Rows do not touch each other, so a step costs the sum over its rows; micro-batches change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from instrument.flops.length_polynomial import RowFlops


class ProductDtypes(NamedTuple):
    """In what the products of each part run: ``fp32``, ``tf32``, ``fp16`` or ``bf16``."""

    encoder: str
    attention: str
    head: str


def product_dtypes(compute: str, head: str, *, tf32: bool, attention: str) -> ProductDtypes:
    """From a configuration's declaration and its attention backend. Autocast computes every product in
    ``compute``, but the ``math`` backend widens 16-bit queries, keys and values to fp32 first. TF32 is a kind
    of its own, since its products run at another rate. CUDA's ``efficient`` backend makes each fp32 product of
    three TF32 ones (CUTLASS FastF32, from capability 8.0): one fp32 product is what it is for, so fp32 it counts."""
    wide = "tf32" if tf32 else "fp32"
    encoder = wide if compute == "fp32" else compute
    return ProductDtypes(encoder, wide if attention == "math" else encoder, wide if head == "fp32" else head)


@dataclass(frozen=True)
class StepFlops:
    """``row``: FLOPs of one row's (encoder, attention, head) at a length; a `RowFlops` where they follow
    polynomials, else a function that counts. ``source`` says where they come from."""

    row: RowFlops | Callable[[int], tuple[int, int, int]]
    dtypes: ProductDtypes
    causal: bool
    source: str

    def of(self, samples: int, seq_len: int) -> dict[str, int]:
        """``samples`` rows, each padded to ``seq_len``: what ran, by dtype."""
        return self._by_dtype([tuple(samples * part for part in self._parts(seq_len))])

    def real(self, lengths: Iterable[int]) -> dict[str, int]:
        """Rows of these true lengths, as if no padding had run: sums of L and of L^2 over the documents."""
        return self._by_dtype([self._parts(length) for length in lengths])

    def causal_half(self, samples: int, seq_len: int) -> int | None:
        """FLOPs with attention counted half, since a causal model needs half of its scores. None where
        attention is not causal, and where it is no multiple of L^2, so that half of it means nothing."""
        if not self.causal or not isinstance(self.row, RowFlops) or self.row.attention.linear or self.row.attention.constant:
            return None
        return sum(self.of(samples, seq_len).values()) - samples * self.row.attention(seq_len) // 2

    def _parts(self, length: int) -> tuple[int, int, int]:
        if length not in self._known:
            self._known[length] = self.row(length)
        return self._known[length]

    @cached_property
    def _known(self) -> dict[int, tuple[int, int, int]]:
        return {}

    def _by_dtype(self, rows: Iterable[tuple[int, int, int]]) -> dict[str, int]:
        found = dict.fromkeys(self.dtypes, 0)
        for parts in rows:
            for dtype, flops in zip(self.dtypes, parts, strict=True):
                found[dtype] += flops
        return found
