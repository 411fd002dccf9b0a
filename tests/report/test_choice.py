"""Each cell's verdict, from folders built to mislead it."""

import math
from types import SimpleNamespace

import msgspec
import pytest

from instrument.results.contents import load
from report.statistics import Interval
from report.tables import a_stability, b_efficiency, c_throughput, h_rank
from report.tables.cell_text import HEADS, cell_texts, difference_text
from report.tables.cells import COMPLETED, Cell, Quality, _rounding
from report.tables.choice import _best, _best_quality, all_cells, case_tables, conservatism
from report.tables.judgement import MARGIN_SPEED
from report.tables.trust import trust
from report.verdict import verdict, verdict_text
from tests.report.conftest import write_index, write_run

LM, CLS, MULTI = "gpt2_clm", "gpt2_single_cls", "gpt2_multi_cls"
SPEEDS = {"amp_bf16": 2.0, "bf16_pure": 3.0}
THREE = ("fp32_true", "amp_bf16", "bf16_pure")


def table(folder, case=LM):
    return {found.case: found for found in case_tables(folder)}[case]


def by_seed(**of_config):
    """``config=(a, b, c)``: what is added to each seed's final loss; speeds are those of `SPEEDS`."""
    return lambda case, config, seed: {"speed": SPEEDS.get(config, 1.0), "gap": of_config.get(config, (0, 0, 0))[seed]}


# Line 1: a scatter of 0.3 nats and no effect is no reason to avoid.


def test_a_bad_seed_among_seeds_that_scatter_is_not_resolved(plant):
    found = table(plant((LM,), THREE, change=by_seed(amp_bf16=(0.36, 0.1, -0.1), bf16_pure=(-0.3, 0.2, 0.4))))
    assert {cell.dtype_config: cell.verdict for cell in found.cells} == {
        "fp32_true": "recommended",
        "amp_bf16": "not resolved",
        "bf16_pure": "not resolved",
    }
    why = found.cell("amp_bf16").why
    assert why == "loss not resolved by 3 seeds against a margin of 0.02 nats; about 59 seeds would decide"
    assert cell_texts(found.cell("amp_bf16"))["difference"] == "loss +0.120 [-0.453, +0.693] nats"
    assert {row["state"] for row in a_stability.table(plant((LM,), THREE, name="same")).data.to_dict("records")} == {
        "completed",
        "missing",
    }


# Line 2: the reason given is the reason.


def test_the_reason_is_that_nothing_else_is_shown_to_train_as_well_not_that_nothing_else_completed(plant):
    found = table(plant((LM,), THREE, change=by_seed(amp_bf16=(0.36, 0.1, -0.1), bf16_pure=(-0.3, 0.2, 0.4))))
    assert found.use == "fp32_true" and found.reason == "no other configuration is shown to train as well"
    assert all(cell.state == "completed" for cell in found.cells)


# Line 8: the margin, both F1s, and the lossless alternative.


def test_a_loss_of_0_19_nats_in_every_seed_is_avoided_beside_one_without(plant):
    found = table(plant((LM,), THREE, change=by_seed(bf16_pure=(0.189, 0.19, 0.191))))
    assert found.use == "amp_bf16" and found.cell("bf16_pure").verdict == "avoid"
    assert "worse than the margin of 0.02 nats" in found.cell("bf16_pure").why


def test_macro_f1_is_judged_beside_micro_f1_and_both_stand_beside_the_most_frequent_answer(plant):
    def change(case, config, seed):
        lost = config == "bf16_pure"
        return {"speed": SPEEDS.get(config, 1.0), "f1": 0.6 + 0.001 * seed, "f1_macro": (0.05 if lost else 0.30) + 0.001 * seed}

    found = table(plant((CLS,), THREE, change=change), CLS)
    assert found.use == "amp_bf16" and found.cell("bf16_pure").verdict == "avoid"
    assert found.cell("bf16_pure").why.startswith("macro-F1 -25.0")
    assert "micro-F1 0.60" in cell_texts(found.cell("amp_bf16"))["quality"]
    assert "macro-F1 0.30" in cell_texts(found.cell("amp_bf16"))["quality"]


@pytest.mark.parametrize(("constant", "verdict"), [(0.20, "not resolved"), (0.10, "avoid")])
def test_f1_judges_only_where_the_reference_scores_more_than_the_most_frequent_answer(plant, constant, verdict):
    """A reference that gives the most frequent answer says nothing of a configuration that does not."""

    def change(case, config, seed):
        lost = config == "bf16_pure"
        score = (0.10 if lost else 0.20) + 0.0001 * seed
        return {"f1": score, "f1_micro_majority": constant, "gap": (0.3, -0.3, 0.2)[seed] * lost}

    cell = table(plant((CLS,), THREE, change=change), CLS).cell("bf16_pure")
    assert cell.verdict == verdict and f"most frequent answer {constant:.2f}" in cell_texts(cell)["quality"]
    assert cell.qualities[0].judged is (verdict == "avoid")


def test_a_classifier_that_beats_the_most_frequent_answer_has_learnt_whatever_its_loss(plant):
    little = {"start": 0.100, "end": 0.095, "f1": 0.30}
    assert table(plant((MULTI,), THREE, change=lambda *_: little | {"f1_micro_majority": 0.29}), MULTI).unhealthy
    assert not table(plant((MULTI,), THREE, change=lambda *_: little | {"f1_micro_majority": 0.2}, name="b"), MULTI).unhealthy


def test_a_loss_within_the_margin_that_the_seeds_resolve_names_the_lossless_alternative(plant):
    found = table(plant((LM,), THREE, change=by_seed(bf16_pure=(0.0099, 0.01, 0.0101))))
    assert (found.use, found.runner_up, found.lossless) == ("bf16_pure", "amp_bf16", "amp_bf16")


# Line 10: among ties quality, then memory, then the more conservative dtype.


def test_an_unresolved_speed_with_a_resolved_loss_is_not_recommended(plant):
    def change(case, config, seed):
        return {"speed": (0.7, 1.8, 4.8)[seed], "gap": (0.0099, 0.01, 0.0101)[seed]} if config == "bf16_pure" else {}

    found = table(plant((LM,), ("fp32_true", "bf16_pure"), change=change))
    assert found.use == "fp32_true" and "by quality over bf16_pure" in found.reason


def test_dtypes_from_the_most_conservative_to_the_least():
    order = ["fp32_true", "fp32_tf32", "amp_bf16_fp32_head", "amp_bf16", "amp_fp16", "amp_bf16_8bit", "bf16_pure", "fp16_naive"]
    assert sorted(reversed(order), key=conservatism) == order
    assert max([*order, "posit8"], key=conservatism) == "posit8"


# Lines 11 and 12: what an unhealthy reference leaves, and one state for all.


def test_under_an_unhealthy_reference_cells_are_measured_and_not_judged(plant):
    folder = plant((LM,), THREE, change=lambda case, config, seed: {"end": 9.5, "speed": SPEEDS.get(config, 1.0)})
    cell = table(folder).cell("bf16_pure")
    assert (cell.state, cell.verdict) == ("unhealthy reference", "not judged") and cell.why.startswith("measured, not judged")
    texts = cell_texts(cell)
    assert texts["speed"] == "2.997x [2.992, 3.001]" and texts["peak memory"] == "10.0 GB" and "perplexity" in texts["quality"]


def test_every_figure_has_the_state_speed_and_memory_of_the_cell(plant):
    folder = plant((LM, CLS), THREE, change=lambda case, config, seed: {"speed": SPEEDS.get(config, 1.0)})
    speeds = c_throughput.table(folder).data.set_index(["case", "dtype_config"])
    memory = b_efficiency.table(folder).data.set_index(["case", "dtype_config"])
    states = a_stability.table(folder).data.set_index(["case", "dtype_config"])
    decided = {found.case: found for found in verdict(folder).cases}
    for key, cell in all_cells(folder).items():
        assert (
            speeds.loc[key, "relative"] == pytest.approx(cell.speed.value) and memory.loc[key, "peak_bytes"] == cell.peak_bytes
        )
        assert states.loc[key, "state"] == cell.state == "completed" and states.loc[key, "n_seeds"] == cell.n
    assert decided[LM].peak_bytes == all_cells(folder)[LM, "bf16_pure"].peak_bytes


# Line 13: one statistic.


def test_a_cell_has_one_number_for_its_difference(plant):
    folder = plant((LM,), THREE, change=by_seed(bf16_pure=(0.0, 0.1, 0.2)))
    (row,) = a_stability.table(folder).data.query("dtype_config == 'bf16_pure'").to_dict("records")
    cell = table(folder).cell("bf16_pure")
    assert row["line1"] == "+0.10 nats" and cell_texts(cell)["difference"].startswith("loss +0.100 [")


# Line 15: copies, and a reference that learnt nothing.


def copied(folder, config, **changes):
    """Seed 0's run of a configuration again, as seeds 1 and 2."""
    source = next(run for run in folder.runs if run.dtype_config == config and run.seed == 0)
    log = (folder.path / "training_logs" / f"run_{source.run_id}.jsonl").read_bytes()
    for seed in (1, 2):
        record = msgspec.structs.replace(source, run_id=source.run_id.replace("-s0-", f"-s{seed}-"), seed=seed, **changes)
        write_run(folder.path, record, [], folder.evaluations(source.run_id))
        (folder.path / "training_logs" / f"run_{record.run_id}.jsonl").write_bytes(log)
    write_index(folder.path)
    return load(folder.path)


def test_copied_seeds_count_once(plant):
    folder = plant((LM,), THREE, (0,), lambda case, config, seed: {"speed": SPEEDS.get(config, 1.0)})
    for config in THREE:
        folder = copied(folder, config)
    found = table(folder)
    assert found.use is None and [cell.n for cell in found.cells] == [1, 1, 1] and found.reason.startswith("1 seed")
    assert any("a copy of" in reason for _, reason in a_stability.table(folder).excluded)


def test_equal_weights_are_copies_whatever_the_log_says(plant):
    folder = plant((LM,), THREE, change=lambda case, config, seed: {"final_weights_sha256": f"{config}"})
    assert [cell.n for cell in table(folder).cells] == [1, 1, 1]


@pytest.mark.parametrize(
    ("case", "start", "end", "healthy"),
    [
        (LM, 10.747, 10.746, False),
        (LM, 10.747, 10.72, False),
        (LM, 10.747, 10.70, True),
        (CLS, 0.70, 0.65, False),
        (CLS, 0.70, 0.60, True),
    ],
)
def test_a_reference_that_learnt_nothing_is_unhealthy(plant, case, start, end, healthy):
    found = table(plant((case,), THREE, change=lambda *_: {"start": start, "end": end}), case)
    assert (found.unhealthy is None) is healthy and (healthy or "learnt nothing" in found.reason)


# Line 17: a row a case.


def test_every_case_has_its_own_speed(plant):
    def change(case, config, seed):
        return {"speed": {LM: 2.0, "roberta_mlm": 4.0}[case] if config == "bf16_pure" else 1.0}

    decided = {found.case: found for found in verdict(plant((LM, "roberta_mlm"), THREE, change=change)).cases}
    assert decided[LM].relative_speed == pytest.approx(2.0, rel=0.01)
    assert decided["roberta_mlm"].relative_speed == pytest.approx(4.0, rel=0.01)


# Line 6: the title compares with the leader.


def test_the_title_of_h_names_as_first_only_what_ties_with_the_leader(plant):
    def change(case, config, seed):
        fast = {"amp_bf16": (3.0, 3.3, 3.6), "bf16_pure": (2.4, 3.2, 3.0), "amp_fp16": (2.4, 2.7, 3.0)}
        slow = {"amp_bf16": (2.0, 2.0, 2.0), "bf16_pure": (2.1, 2.1, 2.1), "amp_fp16": (3.0, 3.0, 3.0)}
        return {"speed": (fast if case == LM else slow).get(config, (1.0,) * 3)[seed]}

    title = h_rank.table(plant((LM, CLS), (*THREE, "amp_fp16"), change=change)).title
    assert (
        title.startswith("Of the 4 that finished both sides, the fastest changes with the task: amp_bf16 and bf16_pure")
        and "amp_fp16 for classification" in title
    )


# Other states.


def test_a_run_that_stalled_failed(plant):
    stalled = {"flags": {"simulated": True, "stalled": {"since_step": 4, "why": "weights"}}}
    folder = plant((LM,), THREE, change=lambda case, config, seed: dict(stalled) if config == "bf16_pure" else {})
    cell = table(folder).cell("bf16_pure")
    assert (cell.state, cell.verdict, cell.n_failed) == ("stalled", "avoid", 3)
    folder = plant((LM,), THREE, change=lambda case, config, seed: dict(stalled) if config == "fp32_true" else {}, name="ref")
    assert "stalled" in table(folder).unhealthy


def test_a_finished_run_without_a_finite_loss_failed(plant):
    folder = plant((LM,), THREE, change=lambda case, config, seed: {"val_loss": math.inf} if config == "bf16_pure" else {})
    assert table(folder).cell("bf16_pure").state == "failed"


def test_one_failed_seed_is_not_recommended_and_says_what_failed(plant):
    folder = plant(
        (LM,),
        THREE,
        change=lambda case, config, seed: (
            {"speed": SPEEDS.get(config, 1.0)} | ({"diverges_at": 40} if config == "bf16_pure" and seed == 1 else {})
        ),
    )
    cell = table(folder).cell("bf16_pure")
    assert table(folder).use == "amp_bf16" and (cell.verdict, cell.n_failed, cell.n) == ("failed", 1, 3)
    assert cell.why == "NaN @ 40, optimizer in 1 of 3 seeds [0.01, 0.91]: it failed here; how often is not resolved"


def test_a_toy_says_that_it_is_one_and_ram_breaks_no_tie(plant):
    def change(case, config, seed):
        given = {
            "device": "cpu-some",
            "peak_allocated_bytes": None,
            "peak_rss_bytes": 10**9 if config == "bf16_pure" else 2 * 10**9,
        }
        return given | {"speed": (2.9, 3.0, 3.1)[seed] if config == "amp_bf16" else 3.0 if config == "bf16_pure" else 1.0}

    found = table(plant((LM,), THREE, change=change))
    assert found.use == "amp_bf16" and "more conservative" in found.reason
    assert found.reason.endswith("a processor says nothing about a GPU")
    assert cell_texts(found.cell("amp_bf16"))["peak memory"] == "2.00 GB resident"


def test_headroom_is_doublings_to_65504(plant):
    found = table(plant((LM,), THREE, change=lambda *_: {"logit": 65_504 / 8})).cell("amp_bf16")
    assert found.headroom_bits == pytest.approx(3.0) and cell_texts(found)["headroom"] == "3.0 bits (largest logit 8,188)"


def test_every_text_of_a_cell_is_said_once_for_page_and_terminal(plant):
    folder = plant((LM, MULTI), THREE, change=lambda case, config, seed: {"diverges_at": 9} if config == "bf16_pure" else {})
    for cell in all_cells(folder).values():
        texts = cell_texts(cell)
        assert tuple(texts) == HEADS and all(isinstance(text, str) and text for text in texts.values())
        assert "nan" not in " ".join(texts.values()).replace("NaN", "")


def test_a_difference_has_its_unit_its_interval_and_its_absence():
    def text(name, unit, *difference):
        return difference_text(Quality(name, unit, 1.0, None, Interval(*difference), {}, 0.0))

    assert text("perplexity", "nats", 0.12, -0.44, 0.67, 3) == "loss +0.120 [-0.440, +0.670] nats"
    assert text("loss", "share", 0.05, math.nan, math.nan, 1) == "loss +5.0 %"
    assert text("micro-F1", "F1", -0.02, -0.03, -0.01, 3) == "micro-F1 -2.0 [-3.0, -1.0] points"
    assert text("perplexity", "nats", math.nan, math.nan, math.nan, 0) == "loss: no difference measured"


# Speeds that are not known, and what a correction changes.


def contended(case, config, seed, which):
    hardware = {"contended": which(config, seed), "throttled": False}
    return {"speed": SPEEDS.get(config, 1.0), "flags": {"simulated": True, "hardware": hardware}}


def test_a_speed_that_nobody_could_measure_is_as_fast_as_nothing(plant):
    found = table(plant((LM,), THREE, change=lambda *cell: contended(*cell, lambda config, seed: config == "bf16_pure")))
    assert found.use == "amp_bf16"
    assert found.cell("bf16_pure").why.startswith("its speed beside amp_bf16 is known from 0 seeds")


def test_one_undisturbed_seed_ties_with_nothing(plant):
    found = table(
        plant((LM,), THREE, change=lambda *cell: contended(*cell, lambda config, seed: config == "bf16_pure" and seed > 0))
    )
    assert (found.use, found.runner_up) == ("amp_bf16", "fp32_true")
    assert found.cell("bf16_pure").why.startswith("its speed beside amp_bf16 is known from 1 seed")


def test_under_a_disturbed_reference_the_reason_is_the_missing_speed(plant):
    found = table(plant((LM,), THREE, change=lambda *cell: contended(*cell, lambda config, seed: config == "fp32_true")))
    missing = "fp32_true was timed undisturbed in 0 of 3 seeds"
    assert (found.use, found.reason) == (None, missing)
    assert [cell.why for cell in found.cells] == [missing, *[f"its quality holds; {missing}"] * 2]


def test_a_speed_that_scatters_is_not_called_as_fast(plant):
    speeds = {"bf16_pure": (0.7, 1.8, 4.8)}
    found = table(plant((LM,), ("fp32_true", "bf16_pure"), change=lambda case, c, s: {"speed": speeds.get(c, (1, 1, 1))[s]}))
    other = next(cell for cell in found.cells if cell.dtype_config != found.use)
    assert other.why.startswith(f"not separated from {found.use} in speed by 3 seeds")


def test_what_only_the_correction_leaves_open_is_not_called_unresolved_against_the_margin(plant):
    """An interval that is printed beside it excludes the margin."""
    gaps = {"bf16_pure": (0.096, 0.114, 0.132)}  # +0.114 [+0.069, +0.159]
    configs = ("fp32_true", "fp32_tf32", "amp_bf16", "amp_fp16", "bf16_pure", "amp_bf16_fp32_head")
    found = table(plant((LM,), configs, change=by_seed(**gaps))).cell("bf16_pure")
    low = found.qualities[0].difference.low
    assert found.verdict == "not resolved" and low > 0.02
    assert found.why.startswith("loss +0.114 [") and found.why.endswith(
        "worse than the margin of 0.02 nats by itself, but not corrected for the measures and configurations of the case"
    )


# What the second attack found: reasons that were not the reason, and comparisons that nobody could make.


def reason(plant, configs=THREE, change=None, name="results"):
    found = table(plant((LM,), configs, change=change, name=name))
    return found.use, found.reason


def test_what_trains_as_well_and_is_slower_is_the_reason_for_fp32(plant):
    """On a processor 16-bit is slower and trains as well: it is not avoided for its quality."""
    slow = {"amp_bf16": 0.5, "bf16_pure": 0.4}
    found = reason(plant, change=lambda case, config, seed: {"speed": slow.get(config, 1.0), "gap": 0.0001 * seed})
    assert found == ("fp32_true", "what trains as well is slower: amp_bf16 and bf16_pure")


def test_each_rival_that_ties_in_speed_is_named_with_what_it_lost_by(plant):
    """amp_fp16 needs least and loses by quality; fp32_true needs most and loses by memory."""
    memory = {"fp32_true": 20, "amp_fp16": 8, "amp_bf16": 15, "amp_bf16_8bit": 15}

    def change(case, config, seed):
        gap = (0.012 if config == "amp_fp16" else 0.0) + 0.0001 * seed
        return {"gap": gap, "peak_allocated_bytes": memory[config] * 10**9}

    use, why = reason(plant, tuple(memory), change)
    assert use == "amp_bf16"
    assert why == (
        "tied in speed; chosen by quality over amp_fp16, by memory over fp32_true, by the more conservative dtype over "
        "amp_bf16_8bit"
    )


def test_a_noisy_leader_does_not_make_fp32_tie_with_what_is_shown_to_be_faster(plant):
    speeds = {"bf16_pure": (0.7, 2.0, 5.0), "amp_bf16": (1.5, 1.5, 1.5)}

    def change(case, config, seed):
        return {"speed": speeds.get(config, (1, 1, 1))[seed], "peak_allocated_bytes": 10**10}

    assert reason(plant, change=change) == ("amp_bf16", "tied in speed; chosen by the more conservative dtype over bf16_pure")


def test_speeds_of_other_seeds_are_compared_and_no_tie(plant):
    """amp_bf16 ran with seeds 0 to 2, bf16_pure with 3 to 5: 2.00x [1.99, 2.00] beside 3.00x [2.99, 3.01]."""

    def change(case, config, seed):
        ran = {"amp_bf16": seed < 3, "bf16_pure": seed > 2}.get(config, True)
        return {"speed": SPEEDS.get(config, 1.0), "peak_allocated_bytes": 10**10} if ran else None

    found = table(plant((LM,), THREE, range(6), change))
    assert (found.use, found.reason) == ("bf16_pure", "the fastest that is shown to train as well")
    assert found.cell("amp_bf16").why.startswith("bf16_pure is 1.50x as fast")


def test_the_fastest_is_not_called_so_without_naming_what_was_not_timed(plant):
    folder = plant((LM,), THREE, change=lambda *cell: contended(*cell, lambda config, seed: config == "bf16_pure"))
    assert table(folder).reason == "the fastest that is shown to train as well; not timed in 3 seeds: bf16_pure"


def test_a_failure_that_is_not_resolved_is_not_the_reason_to_avoid(plant):
    def change(case, config, seed):
        dies = {"diverges_at": 40} if (config, seed) == ("bf16_pure", 3) else {}
        return {"speed": {"amp_bf16": 2.0, "bf16_pure": 0.5}.get(config, 1.0)} | dies

    cell = table(plant((LM,), THREE, range(10), change)).cell("bf16_pure")
    assert cell.verdict == "avoid" and cell.why.startswith("slower than fp32_true: 0.4999x [0.4995, 0.5002]; NaN @ 40")


def test_what_fp32_does_too_is_no_reason_to_avoid(plant):
    found = table(plant((LM,), THREE, change=lambda case, config, seed: {"diverges_at": 9} if config != "amp_bf16" else {}))
    assert [cell.verdict for cell in found.cells] == ["failed", "not judged", "failed"]
    assert found.reason == "fp32_true: failed, NaN @ 9, optimizer in 3 of 3 seeds"


@pytest.mark.parametrize("end", [3.0, 9.9])
def test_two_deaths_of_two_weigh_the_same_under_an_unhealthy_reference(plant, end):
    """The correction is for all configurations of the case, judged or not."""
    configs = ("fp32_true", "amp_bf16", "amp_fp16", "fp16_naive", "bf16_pure", "amp_bf16_8bit")
    folder = plant((LM,), configs, (0, 1), lambda case, c, s: {"diverges_at": 2} if c == "fp16_naive" else {"end": end})
    assert table(folder).cell("fp16_naive").verdict == "failed"


OUT_OF_MEMORY = {"status": "oom", "error": "CUDA out of memory", "val_loss": None, "samples_per_s": None}


def test_fp32_without_memory_in_one_seed_excuses_that_seed_alone(plant):
    def change(case, config, seed):
        return OUT_OF_MEMORY if config == "bf16_pure" or seed == 1 else {}

    found = table(plant((LM,), THREE, range(5), change))
    assert (found.cell("amp_bf16").state, found.cell("amp_bf16").n) == ("completed", 4)
    cell = found.cell("bf16_pure")
    assert (cell.state, cell.n_failed, cell.n) == ("failed", 4, 4)


def test_a_reference_without_any_loss_is_not_called_healthy(plant):
    folder = plant((LM,), THREE, change=lambda *_: {"val_loss": None, "train_loss_final": None})
    assert table(folder).use is None and table(folder).unhealthy == "no loss says whether it learnt (seed 2)"
    assert not next(check for check in trust(folder) if check.name == "reference").ok


def test_a_seed_without_validation_does_not_hide_what_the_others_lost(plant):
    """Validation is 1 nat worse in both seeds that have one; the training loss is that of fp32_true."""

    def change(case, config, seed):
        worse = {"val_loss": None if seed == 1 else 4.0, "train_loss_final": 3.0}
        return {"speed": SPEEDS.get(config, 1.0)} | (worse if config == "bf16_pure" else {})

    folder = plant((LM,), THREE, change=lambda *cell: change(*cell) | {"flags": {}})
    cell = table(folder).cell("bf16_pure")
    assert table(folder).use == "amp_bf16" and cell.verdict == "not resolved"
    assert cell_texts(cell)["difference"].startswith("loss +1.000")
    assert "--seeds 0 1 2 3" in verdict(folder).next_command  # a fourth seed, not those that are there


@pytest.mark.parametrize("score", [None, math.nan])
def test_a_measure_that_fp32_has_and_a_configuration_has_not_is_open(plant, score):
    def change(case, config, seed):
        return {"speed": SPEEDS.get(config, 1.0), "f1": 0.6, "f1_macro": score if config == "bf16_pure" else 0.4}

    found = table(plant((CLS,), THREE, change=change), CLS)
    assert found.use == "amp_bf16" and found.cell("bf16_pure").verdict == "not resolved"
    assert "macro-F1 not measured" in cell_texts(found.cell("bf16_pure"))["quality"]


@pytest.mark.parametrize(
    "row",
    [
        {"val_loss": 1e200},
        {"val_loss": -1.7e308},
        {"samples_per_s": 0.0},
        {"samples_per_s": 1e-300},
        {"f1": 1e200},
        {"train_loss_final": 1e300, "val_loss": None},
    ],
)
@pytest.mark.parametrize("case", [LM, CLS])
def test_no_number_of_a_row_breaks_the_verdict(plant, case, row):
    def change(case, config, seed):
        given = {key: value * (1 + seed) if value else value for key, value in row.items()}
        return {"f1": 0.5} | (given if config == "bf16_pure" else {})

    found = table(plant((case,), THREE, change=change), case)
    assert found.use != "bf16_pure" or (case == LM and "f1" in row)  # which a language model has not


def test_a_classifier_whose_reference_has_no_loss_left_is_not_divided_by_it(plant):
    folder = plant((CLS,), THREE, change=lambda case, config, seed: {"val_loss": 0.0 if config == "fp32_true" else 1e-4})
    assert table(folder, CLS).cell("amp_bf16").verdict == "not resolved"


def test_memory_that_is_a_bound_is_one_in_every_sentence(plant):
    shared = {"flags": {"imported": {"memory_shares_process": True}}}
    folder = plant((LM,), THREE, change=lambda case, config, seed: shared | {"speed": SPEEDS.get(config, 1.0)})
    assert table(folder).cell("amp_bf16").why.endswith("at most 15.0 GB against at most 10.0 GB")
    assert "at most 10.0 GB, loss" in " ".join(verdict_text(folder).split("\nplanted")[1].split())


def test_the_price_of_tokens_leaves_out_disturbed_runs_as_that_of_samples_does(plant):
    def change(case, config, seed):
        busy = config == "amp_bf16" and seed > 2
        found = contended(case, config, seed, lambda *_: busy) | {"real_tokens_per_s": 1280.0 if busy else 12_800.0}
        return found | ({"gap": 1.0} if config == "bf16_pure" else {})

    (found,) = verdict(plant((LM,), THREE, range(5), change)).cases
    assert found.use == "amp_bf16" and found.hours_per_billion_real_tokens == pytest.approx(1e9 / 12_800 / 3600)


def test_titles_of_b_c_and_h_do_not_crown_what_is_avoided_or_not_resolved(plant):
    def change(case, config, seed):
        return {"speed": SPEEDS.get(config, 1.0), "gap": 0.19 + 0.001 * seed if (case, config) == (LM, "bf16_pure") else 0.0}

    folder = plant((LM, CLS), THREE, change=change)
    fastest = (
        "Of those that neither failed nor train worse and are shown to be faster than fp32_true, amp_bf16 and bf16_pure lead"
    )
    assert c_throughput.table(folder).title.startswith(fastest)
    assert h_rank.table(folder).title.startswith("Of the 2 that finished both sides, amp_bf16 is first")
    noisy = plant(
        (LM,), THREE[::2], change=lambda c, f, s: {"speed": (0.7, 1.8, 4.8)[s] if f != "fp32_true" else 1}, name="noisy"
    )
    assert b_efficiency.table(noisy).title.startswith("By mean values bf16_pure alone")
    slow = plant((LM,), THREE, change=lambda case, config, seed: {"speed": 1.0 if config == "fp32_true" else 0.5}, name="slow")
    assert c_throughput.table(slow).title == "Every configuration is slower than fp32_true in 1 case (0.50x at best)."
    dead = plant((LM,), THREE[::2], change=lambda c, f, s: {"diverges_at": 60} if f != "fp32_true" and s else {}, name="dead")
    assert "every configuration that was timed beside fp32_true failed" in c_throughput.table(dead).title


# Levels, and numbers at their edge.


def made(config, *worse, speeds=(1.0, 1.0, 1.0), **given):
    """A cell that completed, from its log speeds and how much worse it trains, by seed."""
    quality = Quality("perplexity", "nats", 1.0, None, Interval(0, 0, 0, 3), dict(enumerate(worse)), 0.02)
    known = {"speed": Interval(math.exp(sum(speeds) / 3), 0, 9, 3), "log_speed": dict(enumerate(speeds))}
    return Cell(LM, "LM-Decoder", "gpt2", config, COMPLETED, "", 3, qualities=(quality,) if worse else (), **known | given)


def scattered(mean, t):
    """Three values around ``mean`` whose t statistic against 0 is ``t``."""
    return mean - mean * math.sqrt(3) / t, mean, mean + mean * math.sqrt(3) / t


@pytest.mark.parametrize(("t", "reason"), [(5.45, "the fastest that is shown"), (4.7, "tied in speed")])
def test_a_leader_is_compared_with_each_other_candidate_at_a_part_of_the_family_level(t, reason):
    """Two comparisons, 2 % each: t = 5.45 is p = 0.016 with three seeds, t = 4.7 is 0.021."""
    slower = tuple(1.0 - MARGIN_SPEED - lead for lead in scattered(0.1, t))
    cells = made("bf16_pure"), made("amp_bf16", speeds=slower), made("fp32_true", speeds=(-2.0, -2.01, -2.02))
    assert _best(cells)[1].startswith(reason)


@pytest.mark.parametrize(("t", "left"), [(5.13, 3), (6.5, 2)])
def test_the_best_quality_is_compared_over_all_pairs(t, left):
    """Three pairs, 1.3 % each: t = 5.13 is p = 0.018, t = 6.5 is 0.011."""
    cells = made("bf16_pure", 0.0, 0.0, 0.0), made("amp_bf16", *scattered(0.1, t)), made("amp_fp16", 0.0, 0.001, -0.001)
    assert len(_best_quality(cells)) == left


def test_logits_that_are_all_zero_have_no_headroom():
    assert math.isnan(made("amp_bf16", largest_logit=0.0).headroom_bits)


def test_the_rounding_of_f1_is_that_of_the_last_evaluation():
    evaluations = [SimpleNamespace(step=step, samples=samples) for step, samples in ((0, 8), (5, 10), (9, 100))]
    assert _rounding(SimpleNamespace(evaluations=lambda _: evaluations), [SimpleNamespace(run_id="")]) == pytest.approx(
        1 / (math.sqrt(12) * 100)
    )
