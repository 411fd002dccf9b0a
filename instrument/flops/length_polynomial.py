"""Training FLOPs of one row as a function of its length: a + b L + c L^2. Torch-free.

Exact integers or fractions, never floats: a count is a count. ``b L`` is what runs token by token,
``c L^2`` attention's scores and their use, ``a`` what runs once a row (a pooled head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class LengthPolynomial:
    """FLOPs(L) = constant + linear L + quadratic L^2."""

    constant: Fraction | int = 0
    linear: Fraction | int = 0
    quadratic: Fraction | int = 0

    def __call__(self, length: int) -> int:
        """FLOPs of one row of ``length`` tokens."""
        value = self.constant + self.linear * length + self.quadratic * length * length
        if value != int(value):
            raise ValueError(f"{value} FLOPs at length {length}: not a whole number, so not a count")
        return int(value)

    def times(self, factor: int) -> LengthPolynomial:
        """The same for ``factor`` as many FLOPs."""
        return LengthPolynomial(self.constant * factor, self.linear * factor, self.quadratic * factor)


@dataclass(frozen=True)
class RowFlops:
    """FLOPs of one row, forward and backward, in the parts that may run in different dtypes: the encoder's
    projections, its attention (scores and their use), and the head."""

    encoder: LengthPolynomial
    attention: LengthPolynomial
    head: LengthPolynomial

    def __call__(self, length: int) -> tuple[int, int, int]:
        """(encoder, attention, head) of one row of ``length`` tokens."""
        return self.encoder(length), self.attention(length), self.head(length)


def fit(flops_at: Mapping[int, int]) -> LengthPolynomial | None:
    """The polynomial through the three shortest lengths, or None when a further one does not lie on it.

    At least four lengths: three points always lie on some parabola.
    """
    if len(flops_at) < 4:
        raise ValueError(f"{len(flops_at)} lengths prove nothing; at least 4 are needed")
    (x0, y0), (x1, y1), (x2, y2), *others = sorted(flops_at.items())
    first, second = Fraction(y1 - y0, x1 - x0), Fraction(y2 - y1, x2 - x1)
    quadratic = (second - first) / (x2 - x0)
    linear = first - quadratic * (x0 + x1)
    found = LengthPolynomial(y0 - linear * x0 - quadratic * x0 * x0, linear, quadratic)
    on_it = all(found.constant + found.linear * x + found.quadratic * x * x == y for x, y in others)
    return found if on_it else None
