"""Predicted against observed: read tolerantly, counted exactly, said where it is missing."""

import json

import pytest

from harness.predict import Predictions
from instrument.prediction import KINDS as HAZARD_KINDS
from instrument.prediction import VERDICTS as OUTCOME_VERDICTS
from instrument.results.contents import load
from report.dossier.prediction import HIT, KINDS, MISSED, NEITHER, VERDICTS, predicted, prediction_text

CASE, CONFIGS = "gpt2_clm", ("fp32_true", "amp_fp16", "fp16_naive", "amp_bf16")


@pytest.fixture
def folder(plant):
    return plant((CASE,), CONFIGS, (0,), lambda case, config, seed: {"diverges_at": 1} if config == "fp16_naive" else {})


def of(config, *outcomes, **fields):
    return {
        "config": config,
        "hazards": [],
        "ends": None,
        "run_id": f"{CASE}-{config}-s0-0badcafe",
        "happened": None,
        "outcomes": [{"kind": kind, "verdict": verdict} for kind, verdict in outcomes],
    } | fields


ZERO = {"kind": "division_by_zero", "step": 1, "module": "wte"}
DIED = of(
    "fp16_naive",
    ("division_by_zero", HIT),
    ("scaler_skip", NEITHER),
    hazards=[ZERO, ZERO | {"step": 7}],
    ends=ZERO,
    happened="division_by_zero",
    ended_at=1,
    happened_in="wte",
)
SKIPPED = of("amp_fp16", ("scaler_skip", MISSED))
CALM = of("amp_bf16", ("scaler_skip", NEITHER))


def with_prediction(folder, *configs, name=CASE, **content):
    path = folder.path / "predictions"
    path.mkdir(exist_ok=True)
    (path / f"{name}.json").write_text(json.dumps({"case": CASE, "references": [{"configs": configs}]} | content))
    return load(folder.path)


def test_the_words_are_those_of_the_harness():
    assert VERDICTS == OUTCOME_VERDICTS and set(KINDS) == {*HAZARD_KINDS, "other"}
    assert {"case", "references", "counts"} <= set(Predictions.__struct_fields__)


def test_outcomes_are_counted_and_an_end_stands_beside_its_prediction(folder):
    found = predicted(with_prediction(folder, DIED, SKIPPED, CALM))
    assert found.counts == {VERDICTS[0]: 1, VERDICTS[1]: 0, VERDICTS[2]: 1, VERDICTS[3]: 0, VERDICTS[4]: 2}
    assert found.missing == () and found.ends.to_dict("records") == [
        {
            "case": CASE,
            "dtype_config": "fp16_naive",
            "seed": 0,
            "run_id": DIED["run_id"],
            "predicted": "division_by_zero",
            "predicted_step": 1,
            "predicted_module": "wte",
            "happened": "division_by_zero",
            "happened_step": 1,
            "happened_module": "wte",
        }
    ]


def test_the_matrix_says_hit_miss_and_nothing(folder):
    folder = with_prediction(folder, DIED, SKIPPED, CALM)
    words = prediction_text(predicted(folder), folder)
    assert words["heads"] == ("configuration", CASE)
    assert words["rows"] == [["amp_fp16", "✗ scaler skip"], ["amp_bf16", "– nothing"], ["fp16_naive", "✓ division by zero @ 1"]]
    assert words["ends"] == [
        [CASE, "fp16_naive", "0", "division by zero @ 1, wte", "division by zero @ 1, wte", "✓ predicted and happened"]
    ]
    assert "1 hazard predicted and seen" in words["sentence"] and words["missing"] == []


def test_seeds_are_counted_in_their_cell(plant):
    folder = plant((CASE,), ("fp32_true", "amp_fp16"), (0, 1, 2))
    runs = [
        of("amp_fp16", ("scaler_skip", HIT if seed else NEITHER), run_id=f"{CASE}-amp_fp16-s{seed}-0badcafe")
        for seed in range(3)
    ]
    folder = with_prediction(folder, *runs)
    assert prediction_text(predicted(folder), folder)["rows"] == [["amp_fp16", "✓ scaler skip 2/3"]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ends": ZERO, "happened": None}, "! predicted and did not happen"),
        ({"ends": None, "happened": "overflow_forward", "ended_at": 3}, "✗ happened and was not predicted"),
        ({"ends": ZERO, "happened": "overflow_forward", "ended_at": 3}, "✗ another end than predicted"),
    ],
)
def test_a_wrong_prediction_of_the_end_is_not_hidden(folder, fields, says):
    folder = with_prediction(folder, of("fp16_naive", ("scaler_skip", NEITHER)) | fields)
    assert prediction_text(predicted(folder), folder)["ends"][0][-1] == says


def test_a_case_that_nobody_asked_about_names_the_command(plant):
    real = plant((CASE,), CONFIGS, (0,), lambda *_: {"flags": {}})
    assert predicted(real).missing == (CASE,)
    (line,) = prediction_text(predicted(real), real)["missing"]
    assert f"not measured: python -m harness predict {CASE} --out " in line
    mine = plant((CASE,), CONFIGS, (0,), lambda *_: {"flags": {"case_spelled": ["my dir/mine.py:C"]}, "case": "mine"}, "mine")
    assert ": python -m harness predict 'my dir/mine.py:C' --out " in prediction_text(predicted(mine), mine)["missing"][0]
    lone = plant((CASE,), ("amp_fp16",), (0,), lambda *_: {"flags": {}}, "lone")
    assert predicted(lone).missing == () and "no run can be compared" in prediction_text(predicted(lone), lone)["missing"][0]


@pytest.mark.parametrize(
    "content",
    [
        {"references": None},
        {"references": [3, {"configs": "x"}]},
        {"references": [{"configs": [None, {"run_id": 3}, {"run_id": "../x"}, of("amp_fp16", outcomes="x")]}]},
        {
            "references": [
                {
                    "configs": [
                        of("amp_fp16", ("scaler_skip", "<b>")),
                        of("amp_fp16", (None, HIT)),
                        of("amp_fp16", hazards=[3, {"kind": []}, {"kind": "scaler_skip", "step": "1"}]),
                    ]
                }
            ]
        },
    ],
)
def test_what_is_no_prediction_is_left_out(folder, content):
    found = predicted(with_prediction(folder, **content))
    assert found.outcomes.empty and found.ends.empty


def test_a_run_of_another_folder_or_given_twice_counts_once(folder):
    foreign = of("amp_fp16", ("scaler_skip", HIT), run_id=f"{CASE}-amp_fp16-s9-0badcafe")
    assert predicted(with_prediction(folder, SKIPPED, SKIPPED, foreign)).counts[MISSED] == 1


def test_a_torn_file_is_a_defect_and_not_a_prediction(folder):
    (folder.path / "predictions").mkdir()
    (folder.path / "predictions" / f"{CASE}.json").write_text('{"references": [')
    folder = load(folder.path)
    assert predicted(folder).outcomes.empty and any("predictions/" in str(defect) for defect in folder.defects)


def test_hostile_words_are_shortened_and_stay_words(folder):
    evil = "<script>alert(1)</script>\u202e" + "x" * 10_000
    folder = with_prediction(
        folder, of("fp16_naive", (evil, HIT), ends={"kind": evil, "module": evil, "step": 1}, happened=evil, happened_in=evil)
    )
    words = prediction_text(predicted(folder), folder)
    cells = [cell for row in (*words["rows"], *words["ends"]) for cell in row]
    assert max(map(len, cells)) < 150 and not any("\u202e" in cell for cell in cells)
