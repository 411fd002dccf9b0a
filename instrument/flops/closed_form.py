"""Model FLOPs of the registered architectures from their sizes alone. Torch-free.

Written from the architectures' papers, apart from the counter: the two check each other, and must
be *equal*. A product of (m, k) with (k, n) is 2 m k n FLOPs; the backward pass runs two such
products for each, so training is 3 times the forward pass. Per token and layer:

    GPT-2    qkv 2 D 3D, output 2 D D, MLP 2 (2 D F); scores and their use 2 (2 L D)
    RoBERTa  q, k, v 3 (2 D D), output 2 D D, MLP 2 (2 D F); scores and their use 2 (2 L D)

with D the width, F the MLP's inner width, L the row's length. The number of heads cancels out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from instrument.flops.length_polynomial import LengthPolynomial, RowFlops

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


def _gpt2_layer(sizes: Sizes) -> int:
    width, inner = sizes.width, sizes.inner
    return 2 * width * 3 * width + 2 * width * width + 2 * (2 * width * inner)


def _roberta_layer(sizes: Sizes) -> int:
    width, inner = sizes.width, sizes.inner
    return 3 * (2 * width * width) + 2 * width * width + 2 * (2 * width * inner)


def gpt2_clm(sizes: Sizes) -> RowFlops:
    """One projection to the vocabulary, at every position."""
    return _row(sizes, _gpt2_layer(sizes), LengthPolynomial(linear=2 * sizes.width * sizes.outputs))


def gpt2_classification(sizes: Sizes) -> RowFlops:
    """One projection to the labels, once a document."""
    return _row(sizes, _gpt2_layer(sizes), LengthPolynomial(2 * sizes.width * sizes.outputs))


def roberta_mlm(sizes: Sizes) -> RowFlops:
    """Dense and the projection to the vocabulary, at every position, masked or not."""
    head = 2 * sizes.width * sizes.width + 2 * sizes.width * sizes.outputs
    return _row(sizes, _roberta_layer(sizes), LengthPolynomial(linear=head))


def roberta_classification(sizes: Sizes) -> RowFlops:
    """Dense and the projection to the labels, once a document."""
    head = 2 * sizes.width * sizes.width + 2 * sizes.width * sizes.outputs
    return _row(sizes, _roberta_layer(sizes), LengthPolynomial(head))


# By (architecture id, task id). An architecture without an entry is counted.
CLOSED_FORMS: dict[tuple[str, str], Callable[[Sizes], RowFlops]] = {
    ("gpt2", "clm"): gpt2_clm,
    ("gpt2", "multi_cls"): gpt2_classification,
    ("gpt2", "single_cls"): gpt2_classification,
    ("roberta", "mlm"): roberta_mlm,
    ("roberta", "multi_cls"): roberta_classification,
    ("roberta", "single_cls"): roberta_classification,
}


def sizes_of(config: Any, outputs: int) -> Sizes:
    """The sizes in a `transformers` configuration of a GPT-2 or a RoBERTa."""
    if config.model_type == "gpt2":
        return Sizes(config.n_layer, config.n_embd, config.n_inner or 4 * config.n_embd, outputs)
    return Sizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size, outputs)
