"""Screen one: a table per case, the recommended row marked, and every unknown said."""

from report.dossier.decision import case_sections
from report.dossier.rows import RowNumbers
from report.verdict import verdict

LM = "gpt2_clm"


def sections(folder):
    return case_sections(verdict(folder), folder, RowNumbers(folder.runs))


def test_a_row_a_configuration_with_the_recommended_one_marked_and_the_runner_up_named(plant):
    speeds = {"amp_bf16": 2.0, "bf16_pure": 3.0}
    folder = plant(
        (LM,), ("fp32_true", "amp_bf16", "bf16_pure"), change=lambda _, config, __: {"speed": speeds.get(config, 1.0)}
    )
    (case,) = sections(folder)
    assert [row["config"] for row in case["rows"]] == ["fp32_true", "amp_bf16", "bf16_pure"]
    assert [row["chosen"] for row in case["rows"]] == [False, False, True]
    assert case["answer"].startswith("Use bf16_pure: ") and "runner-up amp_bf16" in case["answer"]
    row = case["rows"][2]
    assert row["speed"].startswith(("2.9", "3.0")) and row["memory"] == "10.0 GB" and row["headroom"].endswith("bits")
    assert row["quality"][0].startswith("perplexity") and row["difference"][0].startswith("loss") and row["rows"]


def test_a_time_that_does_not_count_says_why_and_not_a_dash(plant):
    busy = {"system_cpu_percent_median": 100.0, "process_cpu_percent_median": 29.0}
    config = {"untimed_steps": 5, "lr": 1e-3, "device": "cpu", "threads": 1, "bucket_by_length": False}
    folder = plant((LM,), ("fp32_true", "amp_bf16"), change=lambda *_: {"flags": {"hardware": busy}, "config": config})
    assert {row["speed"] for row in sections(folder)[0]["rows"]} == {"contended"}


def test_an_unhealthy_reference_leaves_what_was_measured(plant):
    folder = plant(
        (LM,), ("fp32_true", "amp_bf16"), change=lambda _, config, __: {"end": 9.5, "speed": 1 + (config != "fp32_true")}
    )
    (case,) = sections(folder)
    row = case["rows"][1]
    assert case["use"] is None and row["verdict"] == "measured, not judged" and row["speed"].startswith("2.00")


def test_intervals_print_with_their_value_s_digits(plant):
    folder = plant((LM,), ("fp32_true", "amp_bf16"), change=lambda *_: {"speed": 1.0})
    text = sections(folder)[0]["rows"][1]["speed"]
    value, low, high = text.replace("x", "").replace("[", "").replace("]", "").replace(",", "").replace("\u00a0", " ").split()
    assert low != high and len({len(part.partition(".")[2]) for part in (value, low, high)}) == 1
