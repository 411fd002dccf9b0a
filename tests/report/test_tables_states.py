"""A: every state is reached by planted data, at its threshold, and only there, and in every process."""

import os
import subprocess
import sys

import msgspec
import pytest

from instrument.results.contents import Folder
from report.tables import a_stability
from report.tables.judgement import judge_runs
from report.tables.selection import select
from report.tables.trust import trust
from tests.report.conftest import ADAMW

LM, CLS = "gpt2_clm", "gpt2_single_cls"
CONFIGS = ("fp32_true", "amp_bf16")


def cell(folder, case=LM, config="amp_bf16"):
    data = a_stability.table(folder).data
    (row,) = data[(data["case"] == case) & (data["dtype_config"] == config)].to_dict("records")
    return row


def only(**given):
    """Arguments for amp_bf16's runs alone."""
    return lambda case, config, seed: dict(given) if config == "amp_bf16" else {}


@pytest.mark.parametrize(
    ("case", "given", "state"),
    [
        (LM, {"gap": 0.019}, "completed"),
        (LM, {"gap": 0.021}, "poor"),
        (LM, {"gap": -3.0}, "completed"),
        (CLS, {"gap": 0.049 * 3}, "completed"),
        (CLS, {"gap": 0.051 * 3}, "poor"),
        (LM, {"gap": 4.0}, "poor"),
    ],
)
def test_poor_is_shown_to_be_worse_by_more_than_the_margin(plant, case, given, state):
    assert cell(plant((case,), CONFIGS, change=only(**given)), case)["state"] == state


@pytest.mark.parametrize(
    ("reference", "ours", "state"),
    [(0.50, 0.495, "completed"), (0.50, 0.48, "poor"), (0.02, 0.0, "completed"), (0.05, 0.02, "poor")],
)
def test_f1_a_point_down_is_poor_unless_the_reference_has_learned_nothing(plant, reference, ours, state):
    folder = plant((CLS,), CONFIGS, change=lambda case, config, seed: {"f1": ours if config == "amp_bf16" else reference})
    assert cell(folder, CLS)["state"] == state


def test_one_bad_seed_of_three_shows_nothing(plant):
    folder = plant((LM,), CONFIGS, change=lambda case, config, seed: {"gap": 4.0 * (seed == 1)} if config == "amp_bf16" else {})
    row = cell(folder)
    assert (row["state"], row["n_bad"], row["line1"], row["line2"]) == ("completed", 0, "+1.33 nats", "3 seeds")


def test_a_death_names_kind_step_phase_and_seeds(plant):
    folder = plant(
        (LM,),
        CONFIGS,
        change=lambda case, config, seed: {"diverges_at": 50 + seed} if config == "amp_bf16" and seed < 2 else {},
    )
    row = cell(folder)
    assert (row["state"], row["step"], row["line1"], row["line2"]) == ("diverged", 50, "NaN @ 50–51", "optim, 2/3")
    assert a_stability.table(folder).title == "amp_bf16 diverges in 1 of 1 case."


def test_an_explosion_with_finite_values_is_called_that(plant):
    assert cell(plant((LM,), CONFIGS, change=only(diverges_at=30, first=None)))["line1"] == "loss↑ @ 30"


def test_smaller_differences_that_the_seeds_resolve_stay_green_and_are_annotated(plant):
    resolved = cell(plant((LM,), CONFIGS, change=only(gap=0.01), name="a"))
    assert resolved["state"] == "completed" and resolved["line1"] == "+0.01 nats*"
    noisy = cell(
        plant(
            (LM,),
            CONFIGS,
            name="b",
            change=lambda case, config, seed: {"gap": 0.1 * (seed - 1)} if config == "amp_bf16" else {},
        )
    )
    assert noisy["state"] == "completed" and noisy["line1"] == "0.00 nats"


def test_an_unhealthy_reference_leaves_its_case_unjudged_and_others_alone(plant):
    folder = plant((LM, CLS), CONFIGS, change=lambda case, config, seed: {"end": 9.5} if case == LM else {})
    assert cell(folder)["state"] == "unjudged" and cell(folder)["line2"] == "unhealthy ref"
    assert cell(folder, config="fp32_true")["line1"] == "not healthy"
    assert cell(folder, CLS)["state"] == "completed" and cell(folder, CLS, "fp32_true")["line2"].startswith("healthy")
    assert "1 case not judged" in a_stability.table(folder).title


def test_a_reference_that_diverged_is_unhealthy(plant):
    folder = plant((LM,), CONFIGS, change=lambda case, config, seed: {"diverges_at": 20} if config == "fp32_true" else {})
    assert cell(folder)["state"] == "unjudged" and cell(folder, config="fp32_true")["state"] == "diverged"


def test_without_a_reference_nothing_is_judged(plant):
    folder = plant((LM,), ("amp_bf16",))
    assert cell(folder)["state"] == "unjudged" and cell(folder)["line2"] == "no reference"
    assert a_stability.table(folder).title.startswith("Not decided")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"init_sha256": "other"}, "initial weights"),
        ({"data_sha256": None}, "batches"),
        ({"attention_backend": "flash"}, "flash"),
        ({"flags": {"simulated": True, "switches": {"fp16_accumulation": True}}}, "fp16_accumulation"),
        ({"env": {"gpu": "another"}}, "GPU"),
    ],
)
def test_rows_that_differ_in_more_than_the_configuration_are_not_compared(plant, row, says):
    folder = plant((LM,), CONFIGS, change=only(**row))
    judged = judge_runs(folder).by_id["gpt2_clm-amp_bf16-s0-0badcafe"]
    assert judged.state == "unjudged" and says in judged.reason
    check = trust(folder)[0]
    assert check.ok is False and len(check.run_ids) == 3


@pytest.mark.parametrize(
    ("status", "state"),
    [("oom", "failed"), ("hung", "failed"), ("error", "failed"), ("preempted", "unfinished"), ("unsupported", "unsupported")],
)
def test_other_ends_have_their_own_state(plant, status, state):
    folder = plant((LM,), CONFIGS, change=only(status=status, val_loss=None))
    assert cell(folder)["state"] == state


def test_what_was_ended_from_outside_says_nothing_of_the_configuration(plant):
    def ended(*seeds, **given):
        return plant(
            (LM,),
            CONFIGS,
            name="x".join(map(str, seeds)) + "".join(given),
            change=lambda case, config, seed: {"val_loss": None, **given} if config == "amp_bf16" and seed in seeds else {},
        )

    killed = {"status": "error", "flags": {"death": {"cause": "killed", "goes_on": True}}}
    for given in ({"status": "preempted"}, killed):
        some, every = cell(ended(1, **given)), ended(0, 1, 2, **given)
        assert (some["state"], some["n_seeds"], some["line2"]) == ("completed", 2, "2 seeds")
        assert (cell(every)["state"], cell(every)["line1"]) == ("unfinished", "unfinished")
        assert "amp_bf16" not in a_stability.table(every).title
    assert cell(ended(1, status="error"))["state"] == "failed"


def test_a_reference_that_was_stopped_is_none(plant):
    folder = plant(
        (LM,),
        CONFIGS,
        change=lambda case, config, seed: {"status": "preempted", "val_loss": None} if config == "fp32_true" else {},
    )
    assert cell(folder)["line2"] == "no reference"
    (health,) = [check for check in trust(folder) if check.name == "reference"]
    assert health.ok is None and "No fp32_true run has completed" in health.sentence


def test_default_configurations_that_were_not_run_are_missing(plant):
    folder = plant((LM,), CONFIGS)
    assert cell(folder, config="bf16_pure")["state"] == "missing" and cell(folder, config="bf16_pure")["n_seeds"] == 0


def test_every_cell_differs_from_every_other_state_by_its_sign():
    assert len(set(a_stability.SIGNS.values())) == len(a_stability.SIGNS) == 8


def test_other_settings_of_a_case_are_named_and_not_averaged(plant, add_row):
    folder = plant((LM,), CONFIGS)
    record = folder.by_id["gpt2_clm-amp_bf16-s0-0badcafe"]
    selection = select(
        add_row(
            folder,
            msgspec.structs.replace(
                record, run_id="gpt2_clm-amp_bf16-s0-feedbeef", config=record.config | {"lr": 0.5}, steps_done=0
            ),
        )
    )
    assert len(selection.runs) == 6
    assert selection.excluded == (
        ("gpt2_clm-amp_bf16-s0-feedbeef", "other settings than the 6 runs shown of its case: lr 0.5 instead of 0.001"),
    )


def test_of_two_variants_with_as_many_runs_the_one_with_more_steps_is_shown(plant):
    folder = plant((LM,), CONFIGS[:1])
    there = folder.runs[0].max_steps
    for steps in (there // 2, 9 * there):
        others = [
            msgspec.structs.replace(run, run_id=run.run_id[:-8] + "feedbeef", max_steps=steps, steps_done=0)
            for run in folder.runs
        ]
        both = Folder(folder.path, (*folder.runs, *others), [])
        assert {run.max_steps for run in select(both).runs} == {max(steps, there)}


@pytest.mark.parametrize(
    "change",
    [
        {"diverges_at": 50, "first": msgspec.structs.replace(ADAMW, phase="backward")},
        {"diverges_at": 50, "first": None},
        {"gap": 4.0},
        {"gap": 0.1},
        {"gap": -0.001},
        {"status": "unsupported"},
        {"status": "oom", "val_loss": None},
        {"init_sha256": "other"},
    ],
)
def test_no_cell_is_wider_than_a_column_of_eight_cases(plant, change):
    """13 characters with the sign, so that nothing ends in an ellipsis; what rounds to 0 has no sign."""
    folder = plant(
        (LM, CLS),
        CONFIGS,
        change=lambda case, config, seed: ({"end": 9.5} if case == CLS else {}) if config == "fp32_true" else dict(change),
    )
    for row in a_stability.table(folder).data.to_dict("records"):
        assert len(f"{row['sign']} {row['line1']}") <= 13 and len(row["line2"]) <= 13, row
        assert "-0.00" not in row["line1"]


CODE = """
import hashlib, sys
from pathlib import Path
from report.hypotheses import judge
from instrument.results.contents import load
from report.tables import all_tables
from report.tables.trust import trust
from report.verdict import verdict_text
folder = load(Path(sys.argv[1]))
said = [(t.title, t.caption, t.data.to_csv(), t.summary.to_csv(), t.excluded) for t in all_tables(folder).values()]
print(hashlib.sha256(repr((said, judge(folder), trust(folder), verdict_text(folder))).encode()).hexdigest())
"""


@pytest.mark.process
@pytest.mark.soak
def test_the_order_of_sets_changes_nothing(small):
    command = [sys.executable, "-c", CODE, str(small.path)]
    said = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True).stdout
        for seed in "012"
    }
    assert len(said) == 1 and len(said.pop()) > 60
