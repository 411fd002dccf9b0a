"""Every claim reaches every verdict, from data planted for it and nothing else."""

import math

import pytest

from instrument.results.schemas import FirstNonfinite
from report.hypotheses import judge
from report.hypotheses.evidence import (
    NOT_DECIDED,
    REFUTED,
    SUPPORTED,
    Evidence,
    decide,
    decide_count,
    everywhere,
    somewhere,
    unanimous,
)
from report.statistics import Interval

SINGLE, MULTI, LM = "gpt2_single_cls", "gpt2_multi_cls", "gpt2_clm"


def of(folder, name):
    return {finding.id: finding for finding in judge(folder)}[name]


def first(phase):
    return FirstNonfinite(
        step=1,
        microbatch=None,
        phase=phase,
        phase_surfaced=phase,
        module="h.0",
        op=None,
        tensor="param",
        source_tensor=None,
        kind="nan",
        dtype="float16",
        cause=None,
        input_absmax=None,
        headroom_bits=None,
    )


# The rules of deciding.


@pytest.mark.parametrize(
    ("low", "high", "n", "verdict"),
    [
        (0.1, 0.3, 3, SUPPORTED),
        (0.01, 0.03, 3, SUPPORTED),
        (-0.3, -0.1, 3, REFUTED),
        (-0.01, 0.01, 3, REFUTED),
        (0.001, 0.01, 3, REFUTED),
        (-0.2, 0.2, 3, NOT_DECIDED),
        (0.1, 0.3, 2, NOT_DECIDED),
        (math.nan, math.nan, 1, NOT_DECIDED),
    ],
)
def test_an_interval_decides_when_it_excludes_nothing_or_every_effect_worth_the_name(low, high, n, verdict):
    assert decide(Interval((low + high) / 2, low, high, n), smallest=0.02) == verdict


@pytest.mark.parametrize(
    ("hits", "n", "verdict"),
    [(3, 3, SUPPORTED), (0, 3, REFUTED), (2, 3, NOT_DECIDED), (2, 2, NOT_DECIDED), (0, 0, NOT_DECIDED)],
)
def test_all_or_none_of_three_seeds_decide(hits, n, verdict):
    assert decide_count(hits, n) == verdict


def test_how_places_are_joined():
    def places(*verdicts):
        return [Evidence("", verdict, Interval(0, 0, 0, 3), "") for verdict in verdicts]

    split = places(SUPPORTED, REFUTED)
    assert (unanimous(split), everywhere(split), somewhere(split)) == (NOT_DECIDED, REFUTED, SUPPORTED)
    half = places(SUPPORTED, NOT_DECIDED)
    assert (unanimous(half), everywhere(half), somewhere(half)) == (NOT_DECIDED, NOT_DECIDED, SUPPORTED)
    assert unanimous([]) == everywhere([]) == somewhere([]) == NOT_DECIDED


def test_nothing_is_decided_without_data_and_what_would_decide_is_said(plant):
    findings = judge(plant((LM,), ("fp32_true",)))
    assert [f.id for f in findings] == ["H1", "H2", "H3", "P1", "P2", "P3", "P4"]
    assert {f.verdict for f in findings} == {NOT_DECIDED}
    assert all(f.would_decide and "Not tested" in f.sentence and f.effect is None and f.n == 0 for f in findings)


# H1: fp16_naive trains on single-label and diverges on multi-label.


def fp16(plant, dead, phase="forward", seeds=(0, 1, 2), cases=(SINGLE, MULTI)):
    """``dead(case, config, seed)`` says which runs die, in ``phase``."""
    return plant(
        cases,
        ("fp32_true", "fp16_naive", "fp16_naive_fp32_states"),
        seeds,
        lambda case, config, seed: {"diverges_at": 4, "first": first(phase)} if dead(case, config, seed) else {},
    )


def test_h1_is_supported_when_only_multi_label_dies(plant):
    finding = of(fp16(plant, lambda case, config, seed: config == "fp16_naive" and case == MULTI), "H1")
    assert finding.verdict == SUPPORTED and finding.effect == 1.0 and finding.n == 3 and finding.would_decide == ""
    assert (finding.low, finding.high) == pytest.approx((0.2924, 1.0), abs=1e-3)  # Clopper-Pearson of 3 of 3
    assert len(finding.run_ids) == 6 and finding.plot == "G"


def test_h1_is_refuted_when_both_tasks_survive(plant):
    assert of(fp16(plant, lambda *_: False), "H1").verdict == REFUTED


def test_h1_is_not_decided_by_one_of_three_seeds_or_by_two_seeds(plant):
    def dead(case, config, seed):
        return config == "fp16_naive" and case == MULTI

    assert of(fp16(plant, lambda c, f, s: dead(c, f, s) and s == 0), "H1").verdict == NOT_DECIDED


def test_h1_looks_at_the_control_when_adamws_epsilon_kills_both(plant):
    def naive(case, config, seed):
        return config == "fp16_naive"

    finding = of(fp16(plant, naive, "optimizer"), "H1")
    assert finding.verdict == REFUTED and "control with fp32 AdamW states" in finding.sentence
    inverted = of(fp16(plant, lambda c, f, s: f == "fp16_naive" or (f != "fp32_true" and c == MULTI), "optimizer"), "H1")
    assert inverted.verdict == SUPPORTED and "fp16_naive_fp32_states" in inverted.run_ids[0]
    assert any("fp16_naive_fp32_states" in line and "3 of 3 diverged" in line for line in inverted.details)


def test_h1_is_judged_under_both_reductions_and_a_split_decides_nothing(plant):
    cases = (SINGLE, MULTI, "gpt2_multi_cls_labelsum")
    dead = ("gpt2_multi_cls_labelsum", "fp16_naive")
    finding = of(fp16(plant, lambda case, config, seed: (case, config) == dead, cases=cases), "H1")
    assert finding.verdict == NOT_DECIDED and "split" in finding.sentence
    assert "supported for gpt2, label_sum; refuted for gpt2, mean" in finding.sentence


# H2: bf16_pure gains more on RoBERTa than on GPT-2.


def architectures(plant, roberta_gain, gpt2_gain, seeds=(0, 1, 2), **roberta):
    def change(case, config, seed):
        gain = roberta_gain if "roberta" in case else gpt2_gain
        return ({"speed": gain(seed) if callable(gain) else gain} if config == "bf16_pure" else {}) | (
            roberta if "roberta" in case else {}
        )

    return plant((MULTI, "roberta_multi_cls"), ("fp32_true", "bf16_pure"), seeds, change)


@pytest.mark.parametrize(
    ("roberta", "gpt2", "verdict"),
    [(3.0, 2.0, SUPPORTED), (2.0, 3.0, REFUTED), (2.0, 2.0, REFUTED), (lambda seed: 1.5 + seed, 2.0, NOT_DECIDED)],
)
def test_h2_compares_the_gains(plant, roberta, gpt2, verdict):
    finding = of(architectures(plant, roberta, gpt2), "H2")
    assert finding.verdict == verdict and "attention: math" in finding.sentence and "length 64" in finding.sentence
    if verdict == SUPPORTED:
        assert finding.effect == pytest.approx(1.5, rel=0.01) and finding.low < finding.effect < finding.high


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seq_len": 128}, "sequence length 64 against 128"),
        ({"weights_source": "pretrained"}, "weights scratch against pretrained"),
        ({"attention_backend": "flash"}, "attention backend"),
    ],
)
def test_h2_refuses_pairs_that_differ_in_more_than_the_architecture(plant, change, says):
    finding = of(architectures(plant, 3.0, 2.0, **change), "H2")
    assert finding.verdict == NOT_DECIDED and any(says in line for line in finding.details)


def test_h2_takes_the_control_variant_of_equal_length_where_there_is_one(plant):
    def language_models(case, config, seed):
        speed = {"gpt2_clm": 2.0, "roberta_mlm": 3.0}[case] if config == "bf16_pure" else 1.0
        return {"speed": speed, "seq_len": 1_024 if case == LM else 512}

    configs = ("fp32_true", "bf16_pure", "amp_bf16")
    alone = of(plant((LM, "roberta_mlm"), configs, change=language_models), "H2")
    assert alone.verdict == NOT_DECIDED and any("1024 against 512" in line for line in alone.details)
    matched = of(
        plant(
            (LM,),
            configs[:2],
            change=lambda case, config, seed: (
                language_models(case, config, seed) | {"seq_len": 512, "run_id": f"{case}-{config}-s{seed}-00000512"}
            ),
        ),
        "H2",
    )
    assert matched.verdict == SUPPORTED and "length 512" in matched.sentence
    assert all("00000512" in run_id for run_id in matched.run_ids if LM in run_id)


# H3: GPT-2 classification needs more precision.


@pytest.mark.parametrize(
    ("gpt2", "roberta", "verdict"),
    [
        (lambda s: True, lambda s: False, SUPPORTED),
        (lambda s: False, lambda s: True, REFUTED),
        (lambda s: False, lambda s: False, REFUTED),
        (lambda s: s == 0, lambda s: False, NOT_DECIDED),
    ],
)
def test_h3_counts_failures_seed_by_seed(plant, gpt2, roberta, verdict):
    finding = of(
        plant(
            (SINGLE, "roberta_single_cls"),
            ("fp32_true", "bf16_pure", "amp_bf16"),
            change=lambda case, config, seed: (
                {"diverges_at": 20} if config == "bf16_pure" and (gpt2 if "gpt2" in case else roberta)(seed) else {}
            ),
        ),
        "H3",
    )
    assert finding.verdict == verdict
    if verdict == SUPPORTED:
        assert finding.effect == pytest.approx(0.5) and "only on GPT-2: bf16_pure" in finding.sentence


def test_h3_does_not_judge_by_an_unhealthy_reference(plant):
    finding = of(
        plant(
            (SINGLE, "roberta_single_cls"),
            ("fp32_true", "bf16_pure"),
            change=lambda case, config, seed: {"end": 9.9} if "roberta" in case else {"gap": 5.0 * (config == "bf16_pure")},
        ),
        "H3",
    )
    assert finding.verdict == NOT_DECIDED and any("unhealthy" in line for line in finding.details)


# P1: classification heads overflow fp16.


@pytest.mark.parametrize(
    ("logit", "seeds", "verdict"),
    [
        (lambda s: 70_000.0, (0, 1, 2), SUPPORTED),
        (lambda s: 30.0 + s, (0, 1, 2), REFUTED),
        (lambda s: 70_000.0 if s else 30.0, (0, 1, 2), NOT_DECIDED),
        (lambda s: 70_000.0, (0, 1), NOT_DECIDED),
    ],
)
def test_p1_counts_seeds_whose_logits_left_fp16(plant, logit, seeds, verdict):
    finding = of(
        plant(
            (SINGLE, MULTI),
            ("fp32_true", "amp_bf16"),
            seeds,
            lambda case, config, seed: {"logit": logit(seed)} if case == MULTI else {},
        ),
        "P1",
    )
    assert finding.verdict == verdict and finding.unit == "share of 65,504"


def test_p1_says_nothing_about_language_models(plant):
    finding = of(plant((LM,), ("fp32_true",), change=lambda *_: {"logit": 70_000.0}), "P1")
    assert finding.verdict == NOT_DECIDED and finding.run_ids == ()


# P2: bf16_pure is top-left.


def top_left(plant, speed=3.0, peak=10**10, **rest):
    return plant(
        (LM,),
        ("fp32_true", "amp_bf16", "bf16_pure"),
        change=lambda case, config, seed: (
            (
                {"speed": speed(seed) if callable(speed) else speed, "peak_allocated_bytes": peak}
                if config == "bf16_pure"
                else {"speed": 2.0 if config == "amp_bf16" else 1.0}
            )
            | rest
        ),
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, SUPPORTED),
        ({"speed": 1.5}, REFUTED),
        ({"peak": 10**11}, REFUTED),
        ({"speed": lambda seed: 1.0 + seed}, NOT_DECIDED),
        ({"peak": None}, NOT_DECIDED),
    ],
)
def test_p2_needs_speed_and_memory(plant, given, verdict):
    finding = of(top_left(plant, **given), "P2")
    assert finding.verdict == verdict and "amp_bf16" in finding.sentence


def test_p2_is_refuted_by_one_case_of_two(plant):
    folder = plant(
        (LM, MULTI),
        ("fp32_true", "amp_bf16", "bf16_pure"),
        change=lambda case, config, seed: {
            "speed": {"amp_bf16": 2.0, "bf16_pure": 3.0 if case == LM else 1.5}.get(config, 1.0)
        },
    )
    finding = of(folder, "P2")
    assert finding.verdict == REFUTED and finding.sentence.startswith(MULTI)


# P3: classification's MFU is lower and noisier.


@pytest.mark.parametrize(
    ("real", "mfu", "verdict"),
    [
        (lambda s: 0.6, 0.2, SUPPORTED),
        (lambda s: 1.0, 0.2, REFUTED),
        (lambda s: 0.6, None, NOT_DECIDED),
        (lambda s: (0.5, 0.999, 1.0)[s], 0.2, NOT_DECIDED),
    ],
)
def test_p3_needs_both_parts(plant, real, mfu, verdict):
    finding = of(
        plant(
            (LM, MULTI),
            ("fp32_true", "amp_bf16"),
            change=lambda case, config, seed: {"mfu": mfu, "real": real(seed) if case == MULTI else 1.0},
        ),
        "P3",
    )
    assert finding.verdict == verdict
    if verdict == SUPPORTED:
        assert finding.effect == pytest.approx(0.6, rel=0.02)


# P4: the best configuration changes with the task.


@pytest.mark.parametrize(
    ("classification", "seeds", "verdict"),
    [
        ({"amp_bf16": 3.0, "bf16_pure": 2.0}, (0, 1, 2), SUPPORTED),
        ({"amp_bf16": 2.0, "bf16_pure": 3.0}, (0, 1, 2), REFUTED),
        ({"amp_bf16": 3.01, "bf16_pure": 3.0}, (0, 1, 2), REFUTED),
        ({"amp_bf16": 3.0, "bf16_pure": 2.0}, (0, 1), NOT_DECIDED),
    ],
)
def test_p4_asks_whether_one_configuration_serves_both(plant, classification, seeds, verdict):
    language = {"amp_bf16": 2.0, "bf16_pure": 3.0}
    finding = of(
        plant(
            (LM, MULTI),
            ("fp32_true", "amp_bf16", "bf16_pure"),
            seeds,
            lambda case, config, seed: {"speed": (language if case == LM else classification).get(config, 1.0)},
        ),
        "P4",
    )
    assert finding.verdict == verdict


def test_p4_does_not_crown_a_configuration_that_trains_worse(plant):
    finding = of(
        plant(
            (LM, MULTI),
            ("fp32_true", "amp_bf16", "bf16_pure"),
            change=lambda case, config, seed: {
                "speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0),
                "gap": 5.0 * (config == "bf16_pure" and case == MULTI),
            },
        ),
        "P4",
    )
    assert "bf16_pure" not in finding.sentence.split("on Cls-Multi")[-1]
    assert not any("bf16_pure" in run_id and MULTI in run_id for run_id in finding.run_ids)


def test_swapping_the_planted_data_swaps_the_verdict(plant):
    """No sentence is tied to a hoped-for outcome: the same code on mirrored data says the opposite."""
    there, back = of(architectures(plant, 3.0, 2.0), "H2"), of(architectures(plant, 2.0, 3.0), "H2")
    assert (there.verdict, back.verdict) == (SUPPORTED, REFUTED)
    assert there.effect == pytest.approx(1 / back.effect, rel=0.01)
