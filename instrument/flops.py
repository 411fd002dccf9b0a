"""Model FLOPs: what a model's matrix products cost, by closed form from the sizes alone, by row length and by dtype.
Torch-free.

*Model FLOPs* are those of matrix products, attention included, forward and backward. Embedding look-ups, elementwise
work, the loss and the optimizer count nothing; the head counts, without the columns that only pad the vocabulary. The
MLM head runs on every position, so every position counts. Causal attention counts in full, as PaLM's appendix B,
nanoGPT, torchtitan and torch's own `FlopCounterMode` do: it is what the default attention backends multiply, and what
published MFU figures mean. llm.c and FlashAttention count half; `StepFlops.causal_half` gives that figure.

The closed forms are written from the architectures' papers, apart from `instrument.flop_counter`: the two check each other, and
must be *equal*. A product of (m, k) with (k, n) is 2 m k n FLOPs; the backward pass runs two such products for each, so
training is 3 times the forward pass. Per token and layer:

    GPT-2    qkv 2 D 3D, output 2 D D, MLP 2 (2 D F); scores and their use 2 (2 L D)
    RoBERTa  q, k, v 3 (2 D D), output 2 D D, MLP 2 (2 D F); scores and their use 2 (2 L D)

with D the width, F the MLP's inner width, L the row's length. The number of heads cancels out. A row costs a + b L + c L^2, in
exact integers or fractions: ``b L`` is what runs token by token, ``c L^2`` attention's scores and their use, ``a`` what runs
once a row (a pooled head). In these two rows do not touch each other, so a step costs the sum over its rows; micro-batches
change nothing. Of any other model that is counted (`harness.run.step_flops`): what a forward pass costs once, however many rows
it has (DeBERTa's relative positions), is counted once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple


@dataclass(frozen=True)
class LengthPolynomial:
    """FLOPs(L) = constant + linear L + quadratic L^2."""

    constant: Fraction | int = 0
    linear: Fraction | int = 0
    quadratic: Fraction | int = 0

    def __call__(self, length: int) -> int:
        value = self.constant + self.linear * length + self.quadratic * length * length
        if value != int(value):
            raise ValueError(f"{value} FLOPs at length {length}: not a whole number, so not a count")
        return int(value)

    def times(self, factor: int) -> LengthPolynomial:
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


TRAINING = 3
"""Forward once, backward twice (the gradient of the input and that of the weight)."""


@dataclass(frozen=True)
class Sizes:
    """``outputs``: columns of the head that mean something: the tokenizer's vocabulary (never the
    padded one), or the labels."""

    layers: int
    width: int
    inner: int
    outputs: int


def _row(sizes: Sizes, per_token_and_layer: int, head: LengthPolynomial) -> RowFlops:
    """Training FLOPs of one row from forward FLOPs of a token's projections in a layer, and of the head."""
    scores = 2 * 2 * sizes.width
    return RowFlops(
        encoder=LengthPolynomial(linear=sizes.layers * per_token_and_layer).times(TRAINING),
        attention=LengthPolynomial(quadratic=sizes.layers * scores).times(TRAINING),
        head=head.times(TRAINING),
    )


def _gpt2(sizes: Sizes, head: LengthPolynomial) -> RowFlops:
    width, inner = sizes.width, sizes.inner
    return _row(sizes, 2 * width * 3 * width + 2 * width * width + 2 * (2 * width * inner), head)


def _roberta(sizes: Sizes, head: LengthPolynomial) -> RowFlops:
    width, inner = sizes.width, sizes.inner
    return _row(sizes, 3 * (2 * width * width) + 2 * width * width + 2 * (2 * width * inner), head)


def _projection(sizes: Sizes) -> int:
    """Forward FLOPs of the head of a GPT-2 at one position: one projection to the vocabulary or the labels."""
    return 2 * sizes.width * sizes.outputs


def _dense_and_projection(sizes: Sizes) -> int:
    """Of a RoBERTa's."""
    return 2 * sizes.width * sizes.width + 2 * sizes.width * sizes.outputs


# By (architecture id, task id): a language model's head runs at every position, masked or not, a classifier's once a document.
# An architecture without an entry is counted.
CLOSED_FORMS: dict[tuple[str, str], Callable[[Sizes], RowFlops]] = {
    ("gpt2", "clm"): lambda sizes: _gpt2(sizes, LengthPolynomial(linear=_projection(sizes))),
    ("gpt2", "multi_cls"): lambda sizes: _gpt2(sizes, LengthPolynomial(_projection(sizes))),
    ("gpt2", "single_cls"): lambda sizes: _gpt2(sizes, LengthPolynomial(_projection(sizes))),
    ("roberta", "mlm"): lambda sizes: _roberta(sizes, LengthPolynomial(linear=_dense_and_projection(sizes))),
    ("roberta", "multi_cls"): lambda sizes: _roberta(sizes, LengthPolynomial(_dense_and_projection(sizes))),
    ("roberta", "single_cls"): lambda sizes: _roberta(sizes, LengthPolynomial(_dense_and_projection(sizes))),
}


def sizes_of(config: Any, outputs: int) -> Sizes:
    """The sizes in a `transformers` configuration of a GPT-2 or a RoBERTa."""
    if config.model_type == "gpt2":
        return Sizes(config.n_layer, config.n_embd, config.n_inner or 4 * config.n_embd, outputs)
    return Sizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size, outputs)


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
    polynomials, else a function that counts. ``once``: what a forward and backward pass costs besides, however many of the
    ``rows_a_pass`` it has; None: nothing. ``source`` says where they come from."""

    row: Callable[[int], tuple[int, int, int]]
    dtypes: ProductDtypes
    causal: bool
    source: str
    once: Callable[[int], tuple[int, int, int]] | None = None
    rows_a_pass: int = 1

    def of(self, samples: int, seq_len: int) -> dict[str, int]:
        """``samples`` rows, each padded to ``seq_len``: what ran, by dtype."""
        rows = [tuple(samples * part for part in self._parts(seq_len))]
        return self._by_dtype(rows + self._passes(samples, seq_len))

    def real(self, lengths: Sequence[int]) -> dict[str, int]:
        """Rows of these true lengths, as if no padding had run: sums of L and of L^2 over the documents; a pass is as long as
        its longest row."""
        rows = [self._parts(length) for length in lengths]
        return self._by_dtype(rows + self._passes(len(lengths), max(lengths, default=0)))

    def _passes(self, samples: int, seq_len: int) -> list[tuple[int, int, int]]:
        """What the passes over ``samples`` rows cost once each."""
        if self.once is None or not samples:
            return []
        if (once := ("once", seq_len)) not in self._known:
            self._known[once] = self.once(seq_len)
        return [self._known[once]] * -(-samples // self.rows_a_pass)

    def causal_half(self, samples: int, seq_len: int) -> int | None:
        """FLOPs with attention counted half, since a causal model needs half of its scores. None where
        attention is not causal, and where it is no multiple of L^2, so that half of it means nothing."""
        if not self.causal or self.once is not None or not isinstance(self.row, RowFlops):
            return None
        if self.row.attention.linear or self.row.attention.constant:
            return None
        return sum(self.of(samples, seq_len).values()) - samples * self.row.attention(seq_len) // 2

    def _parts(self, length: int) -> tuple[int, int, int]:
        if (row := ("row", length)) not in self._known:
            self._known[row] = self.row(length)
        return self._known[row]

    @cached_property
    def _known(self) -> dict[tuple[str, int], tuple[int, int, int]]:
        return {}

    def _by_dtype(self, rows: Iterable[tuple[int, int, int]]) -> dict[str, int]:
        found = dict.fromkeys(self.dtypes, 0)
        for parts in rows:
            for dtype, flops in zip(self.dtypes, parts, strict=True):
                found[dtype] += flops
        return found
