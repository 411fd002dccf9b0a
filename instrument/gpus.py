"""GPU models that are known by name: their dense tensor-core peaks, and what a capability means.

Torch-free. Peaks are NVIDIA's own for dense products with fp32 accumulation, in FLOP/s per dtype
and per GPU. Most datasheets print the sparse figure, twice as high; GeForce papers print fp16
accumulation first: neither stands here. None where the card has no such unit, or where NVIDIA
states no single figure. A model that is not listed has no peak: nothing is guessed, so it gets no
estimate of time and no MFU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TERA = 1e12
PRODUCT_DTYPES = ("fp32", "tf32", "fp16", "bf16")
"""Kinds of products that a configuration can run; TF32 is a kind of its own, since it has its own rate."""


@dataclass(frozen=True)
class Card:
    """One model. ``pattern`` must match the whole name that the driver reports; ``source`` is the
    document of NVIDIA's that the peaks are from."""

    name: str
    pattern: str
    fp32_flops_per_s: float | None
    tf32_flops_per_s: float | None
    fp16_flops_per_s: float
    bf16_flops_per_s: float | None
    fp8_flops_per_s: float | None
    source: str
    reference: bool = False

    def peak(self, compute: str, *, tf32: bool = False) -> float | None:
        """FLOP/s of products in ``compute`` (``fp32``, ``bf16``, ``fp16``)."""
        return getattr(self, "tf32_flops_per_s" if tf32 and compute == "fp32" else f"{compute}_flops_per_s")

    def peaks(self) -> dict[str, float]:
        """FLOP/s by kind of product, without those that the card has not."""
        known = {dtype: getattr(self, f"{dtype}_flops_per_s") for dtype in PRODUCT_DTYPES}
        return {dtype: value for dtype, value in known.items() if value is not None}


def _card(
    name: str,
    pattern: str,
    fp32: float | None,
    tf32: float | None,
    fp16: float,
    bf16: float | None,
    fp8: float | None,
    source: str,
    *,
    reference: bool = False,
) -> Card:
    """A card from TFLOP/s."""
    values = (None if value is None else value * TERA for value in (fp32, tf32, fp16, bf16, fp8))
    return Card(name, pattern, *values, source=source, reference=reference)


AMPERE, ADA, HOPPER = "GA102 whitepaper", "Ada GPU architecture whitepaper", "H100 datasheet, sparse figures halved"
CARDS: tuple[Card, ...] = (
    _card("RTX A6000", r"(NVIDIA )?RTX A6000", 38.7, 77.4, 154.8, 154.8, None, AMPERE, reference=True),
    _card("A40", r"(NVIDIA )?A40", 37.4, 74.8, 149.7, 149.7, None, "A40 datasheet", reference=True),
    _card("V100 SXM2", r"(NVIDIA |Tesla )?V100-SXM[23]-(16|32)GB", 15.7, None, 125, None, None, "V100 datasheet"),
    _card("V100 PCIe", r"(NVIDIA |Tesla )?V100-PCIE-(16|32)GB", 14, None, 112, None, None, "V100 datasheet"),
    _card("T4", r"(NVIDIA |Tesla )?T4", 8.1, None, 65, None, None, "T4 datasheet"),
    _card(
        "A100", r"(NVIDIA )?A100(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe| PCIe 80GB)", 19.5, 156, 312, 312, None, "A100 datasheet"
    ),
    _card("RTX 3090", r"(NVIDIA )?GeForce RTX 3090", 35.6, 35.6, 71, 71, None, AMPERE),
    _card("RTX 4090", r"(NVIDIA )?GeForce RTX 4090", 82.6, 82.6, 165.2, 165.2, 330.3, ADA),
    _card("L4", r"(NVIDIA )?L4", 30.3, 60, 121, 121, 242, "L4 datasheet, sparse figures halved"),
    _card("L40S", r"(NVIDIA )?L40S", 91.6, 183, 362, 362, 733, "L40S datasheet"),
    _card("H100 SXM", r"(NVIDIA )?H100( SXM5)?( 80GB HBM[23]e?)", 67, 494.5, 989, 989, 1979, HOPPER),
    _card("H100 PCIe", r"(NVIDIA )?H100 PCIe", 51, 378, 756, 756, 1513, HOPPER),
    _card("H100 NVL", r"(NVIDIA )?H100 NVL", 60, 417.5, 835.5, 835.5, 1671, HOPPER),
    _card("H200 SXM", r"(NVIDIA )?H200", 67, 494.5, 989, 989, 1979, "H200 datasheet, sparse figures halved"),
    # Its fp32 and TF32 peaks are published as 75 to 80 and 1,100 to 1,125, by system: no single figure, so none.
    _card("B200", r"(NVIDIA )?B200", None, None, 2250, 2250, 4500, "HGX B200 datasheet, sparse figures halved"),
)


def known_card(name: str) -> Card | None:
    """The card with this driver name; None for any other, a MIG slice or a laptop variant included."""
    return next((card for card in CARDS if re.fullmatch(card.pattern, name.strip())), None)


def capability_support(major: int, minor: int) -> dict[str, bool]:
    """What a compute capability does in hardware: tensor-core dtypes, as NVIDIA's CUDA
    programming guide lists them (fp16 from 7.0, bf16 and TF32 from 8.0, fp8 from 8.9)."""
    capability = (major, minor)
    return {
        "fp16": capability >= (7, 0),
        "bf16": capability >= (8, 0),
        "tf32": capability >= (8, 0),
        "fp8": capability >= (8, 9),
    }
