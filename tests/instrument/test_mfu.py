"""Cards are known by whole names, with dense peaks; MFU takes the right denominator for every FLOP, or none."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instrument.flops import LengthPolynomial, ProductDtypes, RowFlops, StepFlops
from instrument.mfu import (
    CARDS,
    DENOMINATORS,
    PRODUCT_DTYPES,
    Peaks,
    Utilisation,
    capability_support,
    datasheet_peaks,
    figures,
    known_card,
    weighted_peak,
)
from instrument.results.schemas import StepRecord


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
    assert known_card("NVIDIA RTX A6000").peaks() == {"fp32": 38.7e12, "tf32": 77.4e12, "fp16": 154.8e12, "bf16": 154.8e12}
    assert known_card("Tesla V100-SXM2-16GB").peaks() == {"fp32": 15.7e12, "fp16": 125e12}


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
    peaks = card.peaks()
    assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
    assert peaks["fp16"] / peaks.get("tf32", peaks["fp16"] / 2) == pytest.approx(2, rel=0.02)
    assert peaks.get("fp32", 0.0) < peaks["fp16"]  # the one on CUDA cores


def test_what_a_card_has_not_is_not_in_its_peaks():
    assert set(known_card("Tesla T4").peaks()) == {"fp32", "fp16"}
    assert set(known_card("NVIDIA B200").peaks()) == {"fp16", "bf16"}  # fp32 and TF32 are published as ranges
    assert set(known_card("NVIDIA H200").peaks()) == set(PRODUCT_DTYPES)


FIELDS = [name + suffix for suffix in ("", "_real_tokens") for name in DENOMINATORS]
H200 = Peaks(**datasheet_peaks("NVIDIA H200"), measured={"bf16": 700e12, "fp32": 50e12})
UNIT = 10**12  # so that no figure drowns in approx's absolute tolerance
ROW = RowFlops(*(LengthPolynomial(*terms).times(UNIT) for terms in ((0, 100), (0, 0, 1), (10,))))


def step(number, *, samples=2, seq_len=8, time_s=1.0):
    tokens = samples * seq_len
    return StepRecord(
        step=number,
        loss=1.0,
        lr=1e-3,
        grad_norm=1.0,
        grad_absmax=1.0,
        grad_nonfinite=0,
        grad_underflow_frac=0.0,
        logit_absmax=1.0,
        logit_nonfinite=0,
        logit_over_fp16=0,
        loss_scale=None,
        step_skipped=False,
        step_time_s=time_s,
        samples=samples,
        tokens=tokens,
        real_tokens=tokens,
        seq_len=seq_len,
    )


def run_of(dtypes=("bf16", "bf16", "bf16"), peaks=H200):
    return Utilisation(StepFlops(ROW, ProductDtypes(*dtypes), causal=True, source="closed form"), peaks)


def test_a_mixed_run_at_full_speed_in_every_dtype_has_an_mfu_of_one():
    """Two seconds of bf16 and three of fp32, each at its peak: the arithmetic mean of the peaks would say 0.75."""
    work = {"bf16": int(2 * 989e12), "fp32": int(3 * 67e12)}
    found = figures(work, work, 5.0, H200)
    assert found["mfu"] == pytest.approx(1.0)
    assert found["mfu_bf16_peak"] == pytest.approx(sum(work.values()) / 5 / 989e12)
    assert found["mfu_measured_peak"] == pytest.approx((2 * 989 / 700 + 3 * 67 / 50) / 5)


@given(st.dictionaries(st.sampled_from(["fp32", "tf32", "fp16", "bf16"]), st.integers(1, 10**18), min_size=1))
def test_the_weighted_peak_lies_between_the_peaks_of_its_dtypes(flops):
    peaks = {"fp32": 67e12, "tf32": 494.5e12, "fp16": 989e12, "bf16": 989e12}
    own = [peaks[dtype] for dtype in flops]
    assert min(own) * (1 - 1e-9) <= weighted_peak(flops, peaks) <= max(own) * (1 + 1e-9)


def test_a_dtype_without_a_known_peak_leaves_no_figure_rather_than_a_part_of_one():
    assert weighted_peak({"bf16": 5, "fp32": 1}, {"bf16": 1e12}) is None
    assert weighted_peak({"bf16": 5, "fp32": 0}, {"bf16": 1e12}) == pytest.approx(1e12)
    assert weighted_peak({"bf16": 5}, None) is None and weighted_peak({}, {"bf16": 1.0}) is None


def test_an_unknown_card_has_no_mfu_and_says_so_and_a_known_one_names_its_source():
    peaks = Peaks(**datasheet_peaks("NVIDIA H999"))
    assert set(figures({"bf16": 1}, {"bf16": 1}, 1.0, peaks).values()) == {None}
    run = run_of(peaks=peaks)
    assert "'NVIDIA H999'" in run.missing()["datasheet_unknown"] and "none is guessed" in run.missing()["datasheet_unknown"]
    assert run.warning() == run.missing()["datasheet_unknown"] and run_of().warning() is None
    assert run_of(peaks=Peaks(**datasheet_peaks(None))).warning() is None
    assert H200.datasheet_source.startswith("H200 SXM, dense: ")


def test_a_cpu_is_held_against_its_measured_rate_alone():
    found = figures({"fp32": 50}, {"fp32": 25}, 1.0, Peaks(**datasheet_peaks(None), measured={"fp32": 100.0}))
    assert found == dict.fromkeys(FIELDS) | {"mfu_measured_peak": 0.5, "mfu_measured_peak_real_tokens": 0.25}


def test_a_card_without_bf16_has_no_bf16_denominator_and_one_without_fp32_no_own_figure():
    t4 = figures({"fp16": 65}, {"fp16": 65}, 1.0, Peaks(**datasheet_peaks("Tesla T4")))
    assert t4["mfu"] is not None and t4["mfu_bf16_peak"] is None
    b200 = run_of(("fp32", "fp32", "fp32"), Peaks(**datasheet_peaks("NVIDIA B200"), measured_unknown="not measured"))
    filled = b200.fill(step(1), [8, 8])
    assert filled.mfu is None and filled.mfu_bf16_peak is not None
    assert b200.missing()["datasheet_unknown"] == "the datasheet has no rate for fp32 products"


def test_a_step_without_a_time_has_flops_and_no_mfu():
    for time_s in (None, 0.0):
        filled = run_of().fill(step(1, time_s=time_s), [8, 8])
        assert filled.flops == 2 * (100 * 8 + 64 + 10) * UNIT and filled.mfu is None


def test_real_tokens_are_charged_by_their_documents_own_lengths():
    filled = run_of().fill(step(1, samples=2, seq_len=8), [8, 2])
    assert filled.mfu_real_tokens / filled.mfu == pytest.approx((874 + 214) / (2 * 874))


def test_the_summary_is_total_over_total_of_the_timed_steps():
    run = run_of()
    records = [step(1, time_s=100.0), step(2, time_s=1.0), step(3, seq_len=4, time_s=3.0), step(4, time_s=None)]
    filled = [run.fill(record, [record.seq_len] * 2) for record in records]
    found = run.summary(filled, untimed_steps=1)
    per_step = [sum(run.step_flops.of(2, length).values()) for length in (8, 8, 4, 8)]
    assert found["flops_per_step"] == round(sum(per_step) / 4)
    assert found["mfu"] == pytest.approx((per_step[1] + per_step[2]) / 4.0 / 989e12)
    assert found["mfu"] != pytest.approx((filled[1].mfu + filled[2].mfu) / 2)  # a mean of ratios
    assert found["peak_flops_per_s"] == 989e12 and found["peak_flops_source"] == H200.datasheet_source
    assert set(found) == {*FIELDS, "flops_per_step", "peak_flops_per_s", "peak_flops_source"}


def test_a_run_that_diverged_before_any_timed_step_has_flops_and_no_mfu():
    run = run_of()
    found = run.summary([run.fill(step(1), [8, 8])], untimed_steps=3)
    assert found["flops_per_step"] > 0 and all(found[name] is None for name in FIELDS) and found["peak_flops_per_s"] is None


def test_what_cannot_be_counted_is_null_with_its_reason():
    run = Utilisation(None, H200, not_counted="the op own.scan has no FLOP formula")
    assert run.fill(step(1), [8, 8]) == step(1) and run.summary([step(1)], 0) == {}
    assert run.flags() == {"flops": {"not_counted": "the op own.scan has no FLOP formula"}}


def test_flags_say_how_the_figures_came_about():
    flags = run_of(("bf16", "bf16", "fp32"), Peaks(**datasheet_peaks(None), measured={"bf16": 4.0})).flags()["flops"]
    assert flags["source"] == "closed form" and flags["causal_attention"] == "full"
    assert flags["dtypes"] == {"encoder": "bf16", "attention": "bf16", "head": "fp32"}
    assert "CPU" in flags["datasheet_unknown"] and flags["measured_unknown"] == "the measurement has no rate for fp32 products"


@pytest.mark.process
def test_the_room_below_needs_no_torch():
    code = "import sys, instrument.mfu, instrument.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
