"""What fits and in which order: pure arithmetic, so its properties are tried on many made-up calibrations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS
from harness.campaign.plan import (
    CASE_ORDER,
    LADDER,
    Block,
    CampaignPlan,
    Cost,
    Variant,
    kind,
    make_plan,
    order,
    representatives,
    spread,
)
from harness.campaign.terminal import CASES_ABREAST, show_plan
from harness.settings import SettingsError
from instrument.results.schemas import RunRecord

SEVEN = [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix]
COST = st.builds(Cost, st.floats(0, 60), st.floats(1e-3, 2), st.just("measured"), st.booleans(), st.integers(0, 2))


def planned(costs, budget_s, labels=("gpt2_multi_cls", "gpt2_clm"), configs=("fp32_true", "amp_fp16"), **asked):
    asked = {"max_steps": None, "seeds": None, **asked}
    return make_plan(costs, labels, configs, budget_s=budget_s, preset_steps=1000, preset_seeds=(0, 1, 2), **asked)


def flat(step_s, fixed_s=0.0, **more):
    return {
        (label, config): Cost(fixed_s, step_s, "measured", **more)
        for label in ("gpt2_multi_cls", "gpt2_clm")
        for config in ("fp32_true", "amp_fp16")
    }


@given(st.lists(COST, min_size=4, max_size=4), st.floats(0, 1e5), st.floats(1, 10))
def test_what_is_said_to_fit_fits_and_more_time_never_plans_less(costs, budget_s, factor):
    table = dict(zip(flat(1.0), costs, strict=True))
    plan, more = planned(table, budget_s), planned(table, budget_s * factor)
    assert plan.fits == (plan.estimated_s <= budget_s)
    rungs = [(round(share * 1000), (0, 1, 2)[:n]) for share, n in LADDER]
    assert rungs.index((more.max_steps, more.seeds)) >= rungs.index((plan.max_steps, plan.seeds))
    following = rungs[rungs.index((plan.max_steps, plan.seeds)) + 1 :]
    dearer = [planned(table, 0, max_steps=s, seeds=list(seeds)).estimated_s for s, seeds in following]
    if plan.fits:
        assert all(seconds > budget_s for seconds in dearer[-1:])
    assert sum(block.estimated_s for block in plan.blocks) == pytest.approx(plan.estimated_s)


def test_every_cell_comes_once_and_no_configuration_is_always_first():
    plan = planned(flat(1e-3), 1e9)
    assert (plan.max_steps, plan.seeds, plan.fits) == (1000, (0, 1, 2), True)
    cells = [(block.case, block.seed, config) for block in plan.blocks for config in block.configs]
    assert len(cells) == len(set(cells)) == 2 * 3 * 2
    assert {block.configs[0] for block in plan.blocks} == {"fp32_true", "amp_fp16"}


def test_fewer_steps_of_everything_come_before_a_second_seed():
    seconds = [planned(flat(0.01), budget).estimated_s for budget in range(1, 200)]
    assert seconds == sorted(seconds)
    plans = [planned(flat(0.01), budget) for budget in range(1, 200)]
    assert {plan.seeds for plan in plans if plan.max_steps < 100} == {(0,)}
    assert [block.case for block in plans[-1].blocks[:2]] == ["gpt2_multi_cls", "gpt2_clm"]


def test_too_little_time_plans_the_least_and_says_so():
    plan = planned(flat(1.0), 10)
    assert (plan.max_steps, plan.seeds, plan.fits) == (30, (0,), False) and "not even this much fits" in plan.why


def test_a_case_that_could_not_be_calibrated_is_planned_and_nothing_is_said_to_fit():
    costs = flat(1.0)
    del costs["gpt2_clm", "amp_fp16"]
    plan = planned(costs, 1e9)
    assert plan.estimated_s is None and not plan.fits and "nobody knows" in plan.why
    assert [block.estimated_s is None for block in plan.blocks] == [False, True]


def test_steps_and_seeds_that_were_given_are_kept():
    plan = planned(flat(1.0), 10, max_steps=7, seeds=[5, 6])
    assert (plan.max_steps, plan.seeds) == (7, (5, 6)) and plan.why == "steps and seeds were given"


def test_a_death_costs_few_steps_and_its_controls_in_full():
    cost = Cost(fixed_s=2.0, step_s=0.1, source="measured", died=True, controls=2)
    assert cost.seconds(1000) == pytest.approx(2 + 1 + 2 * 102)
    assert cost.seconds(4) == pytest.approx(2 + 0.4 + 2 * 2.4)


def test_the_order_has_both_losses_of_both_architectures_first():
    labels = [*CASES, "gpt2_clm@512"]
    first = [CASES[Variant.parse(label).case] for label in order(labels)[:4]]
    assert len({(case.architecture.id, case.task.loss) for case in first}) == 4
    assert sorted(order(labels)) == sorted(labels) and order(["new_one", "gpt2_clm"]) == ["gpt2_clm", "new_one"]
    assert {Variant.parse(label).case for label in CASE_ORDER} == {c.id for c in CASES.values() if c.in_default_matrix}


@pytest.mark.parametrize("label", ["gpt2_clm@", "gpt2_clm@x", "gpt2_clm@0", "gpt2_clm@-4"])
def test_a_length_that_is_none_is_refused(label):
    with pytest.raises(SettingsError, match="after @ a number of tokens"):
        Variant.parse(label)


def test_one_configuration_of_each_kind_is_calibrated():
    assert representatives(SEVEN) == ["fp32_true", "amp_bf16", "fp16_naive"]
    assert representatives(["amp_fp16", "bf16_pure", "amp_bf16_8bit"]) == ["amp_fp16", "bf16_pure"]
    assert {kind(config) for config in DTYPE_CONFIGS} == {"fp32", "autocast", "pure"}


def row(config, status="completed", total_s=10.0, step_s=0.5, steps=8):
    return RunRecord(
        run_id=f"gpt2_clm-{config}-s0-00000000",
        case="gpt2_clm",
        scenario="A",
        arch="gpt2",
        task="clm",
        loss="softmax_ce",
        loss_reduction="mean",
        dtype_config=config,
        seed=0,
        preset="full",
        device="x",
        data_source="embedded",
        weights_source="scratch",
        status=status,
        steps_done=steps,
        divergence_step=1 if status == "diverged" else None,
        max_steps=8,
        batch_size=32,
        micro_batch=16,
        seq_len=512,
        step_time_p50_s=step_s,
        flags={"timings_s": {"total": total_s, "steps": 6.0}},
    )


def test_a_rows_total_without_its_steps_is_what_every_run_costs():
    cost = Cost.of_row(row("fp32_true"))
    assert (cost.fixed_s, cost.step_s, cost.died) == (4.0 + 10 - 8 * 0.5, 0.5, False)
    died = Cost.of_row(row("fp16_naive", "diverged", step_s=None, steps=4))
    assert (died.died, died.controls, died.step_s) == (True, 2, 1.5)
    assert Cost.of_row(row("fp32_true", "oom")) is None
    assert Cost.of_row(row("amp_bf16_8bit", "unsupported", step_s=None)).seconds(1000) == 1.0


def test_what_was_not_calibrated_costs_what_its_kind_does():
    known = {
        ("gpt2_clm", "fp32_true"): Cost(4, 1.0, "measured"),
        ("gpt2_clm", "amp_bf16"): Cost(4, 0.2, "measured"),
        ("gpt2_clm", "fp16_naive"): Cost(4, 0.1, "measured", died=True, controls=2),
    }
    found = {config: cost for (_, config), cost in spread(known, ["gpt2_clm"], SEVEN).items()}
    assert found["amp_fp16"].step_s == 0.2 and found["amp_fp16"].source == "as amp_bf16"
    assert found["bf16_pure"].step_s == 0.1 and not found["bf16_pure"].died and found["bf16_pure"].controls == 0
    assert set(found) == set(SEVEN)
    slower = spread({("gpt2_clm", "fp32_true"): Cost(4, 1.0, "measured")}, ["gpt2_clm"], SEVEN)
    assert slower["gpt2_clm", "bf16_pure"].step_s == 1.0, "an upper bound stands in"
    assert spread({}, ["gpt2_clm"], SEVEN) == {}


def test_a_case_that_the_calibration_did_not_reach_costs_what_the_dearest_does():
    known = {("a", "fp32_true"): Cost(4, 1.0, "measured"), ("b", "fp32_true"): Cost(4, 2.0, "measured")}
    found = spread(known, ["a", "b", "c"], ["fp32_true", "amp_bf16"])
    assert found["c", "fp32_true"].step_s == 2.0 and found["c", "amp_bf16"].source == "as b" and len(found) == 6
    assert found["a", "fp32_true"].step_s == 1.0


def test_the_control_has_the_classifiers_length():
    assert PRESETS["full"].sequence_length("gpt2_clm") != 512 == PRESETS["full"].sequence_length("roberta_mlm")


def test_the_plan_is_readable_on_a_small_terminal(capsys, monkeypatch):
    """Every case and every configuration, within 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    costs = {
        (case, config): Cost(1.0, 1.234, "measured" if config == "fp32_true" else "estimated", died=config == "fp16_naive")
        for case in CASES
        for config in DTYPE_CONFIGS
    }
    blocks = tuple(Block(case, 0, tuple(DTYPE_CONFIGS), 60_000.0) for case in CASES)
    plan = CampaignPlan(1_000, (0,), blocks, 1e5, 1e5, True, "it fits")
    show_plan(plan, costs, list(DTYPE_CONFIGS), list(CASES))
    lines = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in lines if "  plan: 1,000 steps, seed 0, 8 blocks of 14 configurations" in line]
    assert max(len(line) for line in lines if line is not sentence and "milliseconds" not in line) <= 80
    assert ["fp16_naive", *["~1234", "x"] * CASES_ABREAST] in [line.split() for line in lines]
    last = ["8", "roberta_multi_cls_labelsum", "0", "1000.0", "min", "8000.0", "min", "fp32_true"]
    assert last in [line.split() for line in lines]
