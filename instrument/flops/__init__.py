"""Model FLOPs: what the model's products cost, counted and by closed form.

*Model FLOPs* are those of matrix products, attention included, forward and backward. Embedding
look-ups, elementwise work, the loss and the optimizer count nothing; the head counts, without
the columns that only pad the vocabulary (they run, but nobody needs them, so they are no use of
the machine). The MLM head runs on every position, so every position counts.

Causal attention counts in full, as PaLM's appendix B, nanoGPT, torchtitan and torch's own
`FlopCounterMode` do: it is what the default attention backends multiply, and what published MFU
figures mean. llm.c and FlashAttention count half; `StepFlops.causal_half` gives that figure.
"""

from instrument.flops.formula import (
    CLOSED_FORMS,
    LengthPolynomial,
    ProductDtypes,
    RowFlops,
    Sizes,
    StepFlops,
    fit,
    product_dtypes,
    sizes_of,
)

__all__ = [
    "CLOSED_FORMS",
    "LengthPolynomial",
    "ProductDtypes",
    "RowFlops",
    "Sizes",
    "StepFlops",
    "fit",
    "product_dtypes",
    "sizes_of",
]
