"""The table of cards: known by whole names, and no sparse or half-precision-accumulation peak in it."""

import pytest

from instrument.gpus import CARDS, PRODUCT_DTYPES, capability_support, known_card


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA H200", "H200 SXM"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_its_whole_name_only(name, card):
    found = known_card(name)
    assert (found and found.name) == card


def test_reference_cards_and_peaks():
    assert [card.name for card in CARDS if card.reference] == ["RTX A6000", "A40"]
    a6000, v100 = known_card("NVIDIA RTX A6000"), known_card("Tesla V100-SXM2-16GB")
    assert a6000.peak("bf16") == 154.8e12 and a6000.peak("fp32", tf32=True) == 77.4e12 and a6000.peak("fp32") == 38.7e12
    assert v100.peak("bf16") is None and v100.peak("fp16") == 125e12


@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ((7, 0), {"fp16"}),
        ((7, 5), {"fp16"}),
        ((8, 6), {"fp16", "bf16", "tf32"}),
        ((8, 9), {"fp16", "bf16", "tf32", "fp8"}),
        ((6, 1), set()),
    ],
)
def test_what_a_capability_supports(capability, able):
    assert {name for name, yes in capability_support(*capability).items() if yes} == able


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_dtypes_peaks_stand_in_the_proportions_of_tensor_cores(card):
    """A sparse figure is twice the dense one, so one that slipped in breaks a proportion."""
    assert card.source and "sparse" not in card.source.replace("sparse figures halved", "")
    if card.bf16_flops_per_s is not None:
        assert card.fp16_flops_per_s == card.bf16_flops_per_s
    if card.tf32_flops_per_s is not None:
        assert card.fp16_flops_per_s / card.tf32_flops_per_s == pytest.approx(2, rel=0.02)
    if card.fp8_flops_per_s is not None:
        assert card.fp8_flops_per_s / card.fp16_flops_per_s == pytest.approx(2, rel=0.03)
    if card.fp32_flops_per_s is not None:
        assert card.fp32_flops_per_s < card.fp16_flops_per_s  # the one on CUDA cores


def test_what_a_card_has_not_is_not_in_its_peaks():
    assert set(known_card("Tesla T4").peaks()) == {"fp32", "fp16"}
    assert set(known_card("NVIDIA B200").peaks()) == {"fp16", "bf16"}  # fp32 and TF32 are published as ranges
    assert set(known_card("NVIDIA H200").peaks()) == set(PRODUCT_DTYPES)
