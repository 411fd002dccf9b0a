"""Every claim reaches every verdict, from data planted for it and nothing else."""

from types import SimpleNamespace

import pytest

from instrument.results.schemas import FirstNonfinite
from report.hypotheses import judge
from report.hypotheses.evidence import (
    NOT_DECIDED,
    REFUTED,
    SUPPORTED,
    Evidence,
    everywhere,
    somewhere,
    unanimous,
    verdict_of,
)
from report.hypotheses.evidence import finding as finding_of
from report.hypotheses.p1_to_p4 import _lengths
from report.significance import UNTESTED, Test
from report.statistics import Interval
from report.tables.choice import case_tables

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


def test_how_places_are_joined():
    def places(*verdicts):
        tests = {SUPPORTED: (Test(0.01), Test(1.0)), REFUTED: (Test(1.0), Test(0.01)), NOT_DECIDED: (UNTESTED, UNTESTED)}
        return [Evidence("", *tests[verdict], Interval(0, 0, 0, 3), "") for verdict in verdicts]

    def joined(evidence):
        return [verdict_of(*rule(evidence)) for rule in (unanimous, everywhere, somewhere)]

    assert joined(places(SUPPORTED, REFUTED)) == [NOT_DECIDED, REFUTED, SUPPORTED]
    assert joined(places(SUPPORTED, NOT_DECIDED)) == [NOT_DECIDED, NOT_DECIDED, SUPPORTED]
    assert joined(places(SUPPORTED, NOT_DECIDED, NOT_DECIDED)) == [NOT_DECIDED] * 3  # one of three may be chance
    assert joined(places(SUPPORTED, SUPPORTED)) == [SUPPORTED] * 3 and joined([]) == [NOT_DECIDED] * 3
    assert verdict_of(Test(0.01), Test(0.01)) == NOT_DECIDED


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


def test_what_was_not_seen_in_three_seeds_is_not_refuted(plant):
    """A true share of 30 % gives 0 of 3 in a third of all worlds."""
    finding = of(fp16(plant, lambda *_: False), "H1")
    assert finding.verdict == NOT_DECIDED and "not seen in 3 seeds" in finding.sentence and "[0.00, 0.71]" in finding.sentence
    assert finding.seeds == 36 and "about 36 seeds" in finding.would_decide  # 0.9^36 < 0.025


def test_h1_needs_the_reference(plant):
    folder = plant(
        (SINGLE, MULTI),
        ("fp16_naive",),
        change=lambda case, config, seed: {"diverges_at": 4} if case == MULTI else {},
    )
    finding = of(folder, "H1")
    assert finding.verdict == NOT_DECIDED and any("no healthy fp32_true of" in line for line in finding.details)


def test_h1_is_not_decided_by_one_of_three_seeds_or_by_two_seeds(plant):
    def dead(case, config, seed):
        return config == "fp16_naive" and case == MULTI

    assert of(fp16(plant, lambda c, f, s: dead(c, f, s) and s == 0), "H1").verdict == NOT_DECIDED


def test_h1_looks_at_the_control_when_adamws_epsilon_kills_both(plant):
    def naive(case, config, seed):
        return config == "fp16_naive"

    finding = of(fp16(plant, naive, "optimizer"), "H1")
    assert finding.verdict == NOT_DECIDED and "control with fp32 AdamW states" in finding.sentence
    inverted = of(fp16(plant, lambda c, f, s: f == "fp16_naive" or (f != "fp32_true" and c == MULTI), "optimizer"), "H1")
    assert inverted.verdict == SUPPORTED and "fp16_naive_fp32_states" in inverted.run_ids[0]
    assert any("fp16_naive_fp32_states" in line and "3 of 3 diverged" in line for line in inverted.details)


def test_h1_is_judged_under_both_reductions_and_one_of_two_decides_nothing(plant):
    cases = (SINGLE, MULTI, "gpt2_multi_cls_labelsum")
    dead = ("gpt2_multi_cls_labelsum", "fp16_naive")
    finding = of(fp16(plant, lambda case, config, seed: (case, config) == dead, cases=cases), "H1")
    assert finding.verdict == NOT_DECIDED
    assert any(line.startswith("gpt2, label_sum: supported") for line in finding.details)
    assert any(line.startswith("gpt2, mean: not decided") for line in finding.details)


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
        ({"weights_source": "pretrained"}, "weights source pretrained against scratch"),
        ({"attention_backend": "flash"}, "attention backend"),
        ({"batch_size": 32}, "batch size 32 against 8"),
        ({"env": {"gpu": "H100"}}, "GPU H100 against None"),
        ({"env": {"torch_version": "2.9"}}, "torch 2.9 against None"),
        ({"env": {"transformers_version": "5.1"}}, "transformers 5.1 against None"),
        ({"env": {"cpu": "AMD EPYC 9654"}}, "processor AMD EPYC 9654 against None"),
        ({"preset": "long"}, "preset full against long"),
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

FIVE = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("gpt2", "roberta", "seeds", "verdict"),
    [
        (lambda s: True, lambda s: False, FIVE, SUPPORTED),
        (lambda s: False, lambda s: True, FIVE, REFUTED),
        (lambda s: True, lambda s: False, (0, 1, 2), NOT_DECIDED),  # Fisher: p = 0.05 for one of two configurations
        (lambda s: False, lambda s: False, FIVE, NOT_DECIDED),
        (lambda s: s == 0, lambda s: False, FIVE, NOT_DECIDED),
    ],
)
def test_h3_compares_failures_by_configuration(plant, gpt2, roberta, seeds, verdict):
    finding = of(
        plant(
            (SINGLE, "roberta_single_cls"),
            ("fp32_true", "bf16_pure", "amp_bf16"),
            seeds,
            change=lambda case, config, seed: (
                {"diverges_at": 20} if config == "bf16_pure" and (gpt2 if "gpt2" in case else roberta)(seed) else {}
            ),
        ),
        "H3",
    )
    assert finding.verdict == verdict
    if verdict == SUPPORTED:
        assert finding.effect == 1.0 and "bf16_pure: NaN @ 20, optimizer in 5 of 5 on GPT-2" in finding.sentence


def test_h3_does_not_cancel_opposite_failures_and_lists_8_bit_and_controls_apart(plant):
    def change(case, config, seed):
        gpt2 = {"amp_fp16": {"diverges_at": 9}, "fp16_naive_eps1e4": {"diverges_at": 9}}
        roberta = {"amp_bf16_8bit": {"gap": 3.0}}
        return dict((gpt2 if "gpt2" in case else roberta).get(config, {}))

    configs = ("fp32_true", "amp_fp16", "amp_bf16", "amp_bf16_8bit", "fp16_naive_eps1e4")
    finding = of(plant((SINGLE, "roberta_single_cls"), configs, FIVE, change), "H3")
    assert finding.verdict == SUPPORTED and "amp_fp16" in finding.sentence and "8bit" not in finding.sentence
    apart = [line for line in finding.details if "apart" in line]
    assert len(apart) == 2 and any("amp_bf16_8bit" in line and "+100.0" in line for line in apart)


def test_h3_is_open_where_configurations_point_both_ways(plant):
    def change(case, config, seed):
        return {"diverges_at": 9} if config == ("amp_fp16" if "gpt2" in case else "amp_bf16") else {}

    finding = of(plant((SINGLE, "roberta_single_cls"), ("fp32_true", "amp_fp16", "amp_bf16"), range(6), change), "H3")
    assert finding.verdict == NOT_DECIDED


def test_h3_does_not_judge_by_an_unhealthy_reference(plant):
    finding = of(
        plant(
            (SINGLE, "roberta_single_cls"),
            ("fp32_true", "bf16_pure"),
            change=lambda case, config, seed: {"end": 9.9} if "roberta" in case else {"gap": 5.0 * (config == "bf16_pure")},
        ),
        "H3",
    )
    assert finding.verdict == NOT_DECIDED and any(
        "no healthy fp32_true of roberta_single_cls" in line for line in finding.details
    )


# P1: classification heads overflow fp16.


@pytest.mark.parametrize(
    ("logit", "seeds", "verdict"),
    [
        (lambda s: 70_000.0, (0, 1, 2), SUPPORTED),
        (lambda s: 30.0 + s, (0, 1, 2), NOT_DECIDED),
        (lambda s: 70_000.0 if s else 30.0, (0, 1, 2), NOT_DECIDED),
        (lambda s: 70_000.0, (0, 1), SUPPORTED),
        (lambda s: 70_000.0, (0,), NOT_DECIDED),
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
    if given.get("peak", 1) is not None:
        assert "the leanest rival (amp_bf16) 15.0 GB" in finding.sentence


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
    assert finding.verdict == SUPPORTED and "where bf16_pure is avoided: loss +166.7" in finding.sentence


def test_swapping_the_planted_data_swaps_the_verdict(plant):
    """No sentence is tied to a hoped-for outcome: the same code on mirrored data says the opposite."""
    there, back = of(architectures(plant, 3.0, 2.0), "H2"), of(architectures(plant, 2.0, 3.0), "H2")
    assert (there.verdict, back.verdict) == (SUPPORTED, REFUTED)
    assert there.effect == pytest.approx(1 / back.effect, rel=0.01)


# What decides nothing about GPUs.


@pytest.mark.parametrize("toy", [{"preset": "tiny"}, {"device": "cpu-some"}])
def test_a_tiny_or_cpu_folder_decides_nothing_about_gpus(plant, toy):
    def change(case, config, seed):
        return toy | ({"logit": 70_000.0} if "cls" in case else {}) | ({"speed": 3.0} if config == "bf16_pure" else {})

    folder = plant((LM, MULTI, SINGLE, "roberta_multi_cls"), ("fp32_true", "amp_bf16", "bf16_pure"), change=change)
    findings = judge(folder)
    assert {finding.verdict for finding in findings} == {NOT_DECIDED}
    shown = of(folder, "P1")
    assert "decides nothing about GPUs" in shown.sentence and "with 3 of 3 seeds" in shown.sentence
    assert shown.would_decide.startswith("a GPU with the full preset")


def test_p4_agrees_with_the_decision_about_a_configuration_that_failed(plant):
    """It was fastest on both by leaving out the runs that died."""

    def change(case, config, seed):
        if config == "bf16_pure" and case == MULTI:
            return {"diverges_at": 9}
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0)}

    folder = plant((LM, MULTI), ("fp32_true", "amp_bf16", "bf16_pure"), change=change)
    finding = of(folder, "P4")
    assert {table.case: table.use for table in case_tables(folder)} == {LM: "bf16_pure", MULTI: "amp_bf16"}
    assert finding.verdict == SUPPORTED and finding.sentence.startswith(
        "gpt2_clm / gpt2_multi_cls: of what completed and is not avoided, bf16_pure has the highest mean speed on gpt2_clm, amp"
    )
    assert "failed: NaN @ 9" in finding.sentence


def test_a_configuration_that_is_avoided_for_its_quality_has_lost_in_p2_as_in_p4(plant):
    def change(case, config, seed):
        gap = (0.189, 0.19, 0.191)[seed] if (case, config) == (LM, "bf16_pure") else 0
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0), "gap": gap}

    folder = plant((LM, MULTI), ("fp32_true", "amp_bf16", "bf16_pure"), change=change)
    assert (of(folder, "P2").verdict, of(folder, "P4").verdict) == (REFUTED, SUPPORTED)
    assert "bf16_pure is avoided: loss +0.190" in of(folder, "P2").sentence


def test_p4_calls_nothing_the_fastest_that_ties(plant):
    finding = of(plant((LM, MULTI), ("fp32_true", "amp_bf16")), "P4")
    assert finding.verdict == REFUTED and "highest mean speed on both" in finding.sentence
    assert "fastest" not in finding.sentence


@pytest.mark.parametrize("name", ["P3", "P4"])
def test_claims_that_join_cases_need_the_same_machine(plant, name):
    def change(case, config, seed):
        given = {"real": 0.6, "env": {"gpu": "another"}} if case == MULTI else {}
        speeds = {"amp_bf16": 3.0, "bf16_pure": 2.0} if case == MULTI else {"amp_bf16": 2.0, "bf16_pure": 3.0}
        return {"speed": speeds.get(config, 1.0)} | given

    finding = of(plant((LM, MULTI), ("fp32_true", "amp_bf16", "bf16_pure"), change=change), name)
    assert finding.verdict == NOT_DECIDED and any("GPU" in line and "not compared" in line for line in finding.details)


# What is left out, and what is asked for.


def test_h1_counts_the_seeds_that_both_tasks_have(plant):
    def change(case, config, seed):
        stressed = (case, config) == (MULTI, "fp16_naive")
        return None if stressed and seed == 2 else {"diverges_at": 4} if stressed else {}

    assert of(plant((SINGLE, MULTI), ("fp32_true", "fp16_naive"), change=change), "H1").n == 2


def test_h2_needs_a_case_of_both_architectures(plant):
    finding = of(plant(("roberta_single_cls",), ("fp32_true", "bf16_pure")), "H2")
    assert finding.verdict == NOT_DECIDED and "Not tested" in finding.sentence


@pytest.mark.parametrize("missing", [None, {"status": "unsupported"}])
def test_h3_compares_configurations_that_ended_on_both_architectures(plant, missing):
    def change(case, config, seed):
        if (case, config) == ("roberta_single_cls", "amp_fp16"):
            return missing and dict(missing)
        return {"diverges_at": 4} if case == SINGLE and config != "fp32_true" else {}

    finding = of(plant((SINGLE, "roberta_single_cls"), ("fp32_true", "amp_fp16", "bf16_pure"), change=change), "H3")
    assert "bf16_pure: " in finding.sentence and "amp_fp16" not in finding.sentence


def test_h3_is_refuted_where_roberta_loses_more_quality(plant):
    def change(case, config, seed):
        return {"gap": 5.0} if (case, config) == ("roberta_single_cls", "bf16_pure") else {}

    finding = of(plant((SINGLE, "roberta_single_cls"), ("fp32_true", "bf16_pure"), change=change), "H3")
    assert finding.verdict == REFUTED, finding.sentence


def test_p1_is_not_tested_without_logits(plant):
    finding = of(plant((SINGLE,), ("fp32_true",), change=lambda *_: {"logit": float("nan")}), "P1")
    assert finding.verdict == NOT_DECIDED and "Not tested" in finding.sentence


def test_a_finding_asks_for_the_fewest_seeds_that_would_decide_it():
    evidence = [Evidence("place", UNTESTED, UNTESTED, Interval(0.5, 0.0, 1.0, 3), "A sentence.")]
    tests = Test(0.4, lambda level: 9), Test(0.6, lambda level: 5)
    base = SimpleNamespace(about_toys=lambda ids: False)
    assert finding_of(base, "H1", "claim", "G", "share", evidence, lambda _: tests, "runs").seeds == 5


def test_other_lengths_of_the_two_tasks_are_noted():
    short, long = ({0: SimpleNamespace(seq_len=n)} for n in (128, 512))
    assert _lengths(short, long) == " (sequence length 128 against 512)" and _lengths(long, long) == ""


@pytest.mark.parametrize("dead", [1, 3])
@pytest.mark.parametrize("name", ["P2", "P4"])
def test_a_faster_rival_is_out_of_the_race_once_its_failures_are_shown_and_not_by_one_of_three(plant, name, dead):
    """amp_fp16 is the fastest and dies in 1 of 3 seeds: nine in ten of its runs may well complete."""

    def change(case, config, seed):
        dies = {"diverges_at": 4} if config == "amp_fp16" and seed < dead else {}
        return {"speed": {"amp_fp16": 4.0, "bf16_pure": 3.0, "amp_bf16": 2.0}.get(config, 1.0)} | dies

    folder = plant((LM, MULTI), ("fp32_true", "amp_fp16", "amp_bf16", "bf16_pure"), change=change)
    finding = of(folder, name)
    decided = SUPPORTED if name == "P2" else REFUTED
    assert finding.verdict == (decided if dead == 3 else NOT_DECIDED)
    assert ("how often is not resolved: amp_fp16 in 1 of 3 seeds" in finding.sentence) == (dead == 1)


@pytest.mark.parametrize("dead", [True, False])
def test_h3_counts_the_seeds_that_both_architectures_have(plant, dead):
    def change(case, config, seed):
        if "roberta" in case:
            return None if seed == 4 else {}
        return {"diverges_at": 9} if dead and config == "bf16_pure" else {}

    assert of(plant((SINGLE, "roberta_single_cls"), ("fp32_true", "bf16_pure"), FIVE, change), "H3").n == 4


def test_p2_is_not_refuted_by_memory_that_runs_of_one_process_shared(plant):
    """The smallest peak of a shared process may still hold what another run left there."""

    def change(case, config, seed):
        peak = {"amp_bf16": 5 * 10**9, "bf16_pure": 10**10}.get(config, 2 * 10**10)
        shared = {"flags": {"simulated": True, "imported": {"memory_shares_process": True}}} if config == "bf16_pure" else {}
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0), "peak_allocated_bytes": peak} | shared

    finding = of(plant((LM,), ("fp32_true", "amp_bf16", "bf16_pure"), change=change), "P2")
    assert finding.verdict == NOT_DECIDED and "not compared: runs shared a process" in finding.sentence


@pytest.mark.parametrize("missing", [None, {"samples_per_s": None}])
def test_p4_is_not_refuted_by_a_configuration_that_was_timed_on_one_task_alone(plant, missing):
    """bf16_pure keeps its quality wherever it ran, but how fast it is on the other task nobody knows."""

    def change(case, config, seed):
        if (case, config) == (MULTI, "bf16_pure"):
            return missing and dict(missing)
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0)}

    finding = of(plant((LM, MULTI), ("fp32_true", "amp_bf16", "bf16_pure"), change=change), "P4")
    assert finding.verdict == NOT_DECIDED, finding.sentence


def test_a_claim_that_the_data_support_and_refute_needs_no_number_of_seeds(plant):
    """amp_fp16 dies on GPT-2 alone and bf16_pure on RoBERTa alone, with 8 seeds of 8."""
    dead = {(SINGLE, "amp_fp16"), ("roberta_single_cls", "bf16_pure")}
    change = lambda case, config, seed: {"diverges_at": 9} if (case, config) in dead else {}  # noqa: E731
    found = of(plant((SINGLE, "roberta_single_cls"), ("fp32_true", "amp_fp16", "bf16_pure"), range(8), change), "H3")
    assert (found.verdict, found.seeds) == (NOT_DECIDED, None) and "more seeds alone would not decide" in found.would_decide


def test_a_claim_names_the_same_number_of_seeds_in_its_sentence_and_in_its_field():
    few = Test(0.5, lambda level: 3)
    evidence = Evidence("somewhere", few, UNTESTED, Interval(1.0, 0.5, 2.0, 8), "so it was")
    base = SimpleNamespace(about_toys=lambda run_ids: False)
    found = finding_of(base, "P9", "a claim", "A", "unit", [evidence], unanimous, "runs")
    assert found.seeds == 9 and found.would_decide.endswith("about 9 seeds would decide")


def test_h3_gives_a_loss_in_percent_and_f1_in_points(plant):
    def change(case, config, seed):
        worse = config == "amp_fp16" and case == SINGLE
        return {"gap": 0.6 * worse + 0.001 * seed}

    cases, configs = (SINGLE, "roberta_single_cls"), ("fp32_true", "amp_fp16")
    assert "(+20.0 [+20.0, +20.0] % more loss) on GPT-2" in of(plant(cases, configs, change=change), "H3").sentence
    scored = plant(cases, configs, change=lambda case, config, seed: {"f1": 0.5 if "amp" in config else 0.6}, name="scored")
    assert "(+10.0 [+10.0, +10.0] points of micro-F1 lost) on GPT-2" in of(scored, "H3").sentence


def test_p2_counts_a_rival_whose_speed_nobody_knows(plant):
    def folder(peak, name):
        def change(case, config, seed):
            hidden = {"flags": {"hardware": {"contended": True}}, "peak_allocated_bytes": peak} if config == "amp_fp16" else {}
            return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0)} | hidden

        return plant((LM,), ("fp32_true", "amp_fp16", "amp_bf16", "bf16_pure"), change=change, name=name)

    lean, heavy = of(folder(5 * 10**9, "lean"), "P2"), of(folder(15 * 10**9, "heavy"), "P2")
    assert (lean.verdict, heavy.verdict) == (REFUTED, NOT_DECIDED)
    assert "the speed of amp_fp16 is not known" in heavy.sentence


def test_p2_names_a_case_where_bf16_pure_was_not_run(plant):
    folder = plant(
        (LM, SINGLE),
        ("fp32_true", "bf16_pure"),
        change=lambda case, config, seed: None if (case, config) == (SINGLE, "bf16_pure") else {},
    )
    assert any(line.startswith(f"{SINGLE} is not judged: bf16_pure was not timed") for line in of(folder, "P2").details)


def test_p4_calls_no_failure_unresolved_that_it_takes_for_shown(plant):
    def change(case, config, seed):
        return {"diverges_at": 9} if (case, config) == (MULTI, "fp16_naive") and seed < 6 else {}

    found = of(plant((SINGLE, MULTI), ("fp32_true", "fp16_naive"), range(20), change), "P4")
    assert found.verdict == REFUTED and "not resolved" not in found.sentence


def test_p4_does_not_call_avoided_what_was_not_timed(plant):
    def change(case, config, seed):
        busy = {"flags": {"hardware": {"contended": True}}} if (case, config) == (MULTI, "bf16_pure") else {}
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0)} | busy

    found = of(plant((LM, MULTI), ("fp32_true", "amp_bf16", "bf16_pure"), change=change), "P4")
    assert found.verdict == NOT_DECIDED and found.sentence.endswith("where bf16_pure was not timed.")
