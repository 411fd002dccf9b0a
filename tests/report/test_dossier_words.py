"""What the page says beside its figures: citations, commands, cards, tables of measurements, what fits."""

import json
import re
import shlex
from types import SimpleNamespace

import msgspec
import pytest

from benchmarks.simulated_results import simulate
from harness.options import parser
from instrument.results.contents import load
from instrument.results.schemas import RunRecord, decode
from report.dossier import build, measurements
from report.dossier.context import header
from report.dossier.failure_cards import MOST_CARDS, MOST_LINKS, failure_cards, sparkline
from report.dossier.measurements import ABSENT, FIT_HEADS, fit_rows
from report.dossier.rows import RowNumbers, commands, in_order, run_href, run_rows
from report.dossier.system import system_block
from report.harness_commands import command, matrix_commands, setting_arguments
from report.tables.failures import Failure, FailureGroup, failure_groups
from report.tables.machine import kernel_time
from tests.report.conftest import ADAMW


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("words") / "results"
    ids = simulate(place, seeds=2, steps=12)
    return [decode((place / "runs" / run_id / "run.json").read_bytes(), RunRecord) for run_id in ids]


def test_rows_are_numbered_by_case_configuration_and_seed(runs):
    ordered = in_order(reversed(runs))
    assert [run.run_id for run in ordered] == [run.run_id for run in runs]  # the simulation writes them in order
    numbers = RowNumbers(runs)
    assert numbers[runs[0].run_id] == 1 and numbers[runs[-1].run_id] == len(runs) == 84


def test_neighbours_are_cited_as_ranges_and_strangers_not_at_all(runs):
    numbers = RowNumbers(runs)
    cited = numbers.cite([runs[i].run_id for i in (7, 3, 4, 5, 83)] + ["unknown", runs[3].run_id])
    assert [tuple(citation) for citation in cited] == [("4–6", "row-4"), ("8", "row-8"), ("84", "row-84")]
    assert numbers.cite([]) == []


def test_a_command_spells_out_every_setting_and_is_safe_to_paste(runs):
    made = msgspec.structs.replace(
        runs[0],
        flags={},
        config={
            "preset": "tiny",
            "lr": 0.004,
            "data": "my dir; rm -rf x",
            "compile": True,
            "bucket_by_length": False,
            "attention": "auto",
        },
    )
    assert command(made) == (
        "python -m harness case gpt2_clm fp32_true --seed 0 --preset tiny --lr 0.004 "
        "--data 'my dir; rm -rf x' --compile --sdpa auto"
    )
    several = msgspec.structs.replace(made, config={"preset": "tiny", "world": 8, "parallel": "fsdp"})
    assert command(several) == (
        "torchrun --nproc-per-node 8 -m harness case gpt2_clm fp32_true --seed 0 --preset tiny --parallel fsdp"
    )


def test_what_this_harness_did_not_make_has_no_command(runs):
    numbers = RowNumbers(runs)
    assert commands(runs, numbers) == {"matrix": [], "rows": [], "foreign": [("1–84", "row-1")], "unnamed": []}


OWN = """
from dataclasses import replace
from bench_cases import CASES
CASE = replace(CASES["gpt2_multi_cls"], id="gpt2_multi_cls_mine")
"""
MODEL = '{"model_type": "gpt2", "n_positions": 256}'


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a case and a model of one's own, whose names need quoting."""
    (tmp_path / "my cases").mkdir()
    (tmp_path / "my cases" / "mine.py").write_text(OWN)
    (tmp_path / "modèle").mkdir()
    (tmp_path / "modèle" / "config.json").write_text(MODEL)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "asked",
    [
        ["gpt2_clm"],
        ["my cases/mine.py:CASE"],
        ["--model", "modèle", "--task", "multi_cls"],
        [
            "my cases/mine.py:CASE",
            "--documents",
            "70",
            "--validation-documents",
            "8",
            "--threads",
            "2",
            "--batch-size",
            "6",
            "--eval-every",
            "3",
            "--lr",
            "1e-4",
            "--max-steps",
            "9",
            "--compile",
            "--text-field",
            "my text",
        ],
        ["gpt2_clm", *"--instrument full --log-every 7 --trace 2 --memory-snapshot --mtbf 3600".split()],
    ],
)
def test_a_command_pasted_makes_the_same_run(runs, elsewhere, asked):
    """Whatever a case is called, and whatever was asked for: the row's own command resolves to the row's settings, also to
    those that are in no run id, on the row's kind of device."""
    settings = resolved(["python", "-m", "harness", "case", *asked, "--dtype-config", "amp_fp16", "--seed", "7"])
    row = msgspec.structs.replace(
        runs[0],
        case=settings.case.id,
        dtype_config="amp_fp16",
        seed=7,
        preset="tiny",
        batch_size=settings.batch_size,
        config=settings.as_config(),
        max_steps=settings.max_steps,
        instrument=settings.instrument,
        flags={"unhashed": settings.unhashed()}
        | ({"case_spelled": list(settings.case.spelled)} if settings.case.spelled else {}),
    )
    assert resolved(shlex.split(command(row))) == settings and "--device cpu" in command(row)
    [(line, _)] = matrix_commands([row])
    of_matrix = parser().parse_args(shlex.split(line)[3:])
    of_case = parser().parse_args(shlex.split(command(row))[3:])
    spelled = {name: getattr(of_matrix, name) for name in ("device", *settings.unhashed())}
    assert spelled == {name: getattr(of_case, name) for name in spelled} | (
        {} if "--log-every" in line else {"log_every": None}
    ), "a log that is as the command line would choose it is left out"


def test_a_row_that_was_made_before_its_unhashed_settings_were_kept_has_its_command(runs):
    old = msgspec.structs.replace(runs[0], flags={}, instrument="full", config={"preset": "tiny", "device": "cuda"})
    line = "python -m harness case gpt2_clm fp32_true --seed 0 --preset tiny --device cuda --instrument full"
    assert command(old) == line
    odd = msgspec.structs.replace(old, flags={"unhashed": ["x"]})
    assert command(odd) == line


def resolved(words):
    """What `harness case` would run for a command line."""
    import torch

    from harness import options as arguments
    from harness.commands.case import asked_case, asked_config
    from harness.planning import plan_run

    options = arguments.parser().parse_args(words[3:])
    return plan_run(asked_case(options), asked_config(options), options.seed, arguments.request(options), torch.device("cpu"))


@pytest.mark.parametrize("said", [None, [], ["a", 3], "x.py:C", ["x.py:C\nrm"], ["y" * 500]])
def test_an_own_case_whose_name_is_not_known_has_no_command(runs, said):
    row = msgspec.structs.replace(
        runs[0], case="mine", flags={} if said is None else {"case_spelled": said}, config={"preset": "tiny"}
    )
    assert command(row) is None
    assert commands([row], RowNumbers([row])) == {"matrix": [], "rows": [], "foreign": [], "unnamed": [("1", "row-1")]}


@pytest.mark.parametrize("value", [[], {"lr": 3}, None, "x"])
def test_a_row_with_broken_settings_still_has_its_command(runs, value):
    broken = dict.fromkeys(("case", "documents", "text_field", "threads"), value)
    assert command(msgspec.structs.replace(runs[0], flags={}, config={"preset": "tiny"} | broken)) is not None


def system_of(runs, machine=None, **fields):
    return dict(
        system_block(SimpleNamespace(runs=[msgspec.structs.replace(run, **fields) for run in runs], machine=machine or {}))
    )


def test_the_system_is_described_and_what_nobody_recorded_is_a_question_mark(runs):
    block = system_of(runs[:2], env={"cpu": "EPYC", "cpu_sockets": 2, "cpu_cores": 64, "cpu_count": 128, "memory_bytes": 25e9})
    assert block["Processor"] == "EPYC" and block["Sockets, cores"] == "2 sockets, 64 cores, 128 threads"
    assert block["Memory"] == "25.0 GB" and block["Storage"] == block["Operating system"] == block["Measured ceiling"] == "?"
    gpu = system_of(
        runs[:1], env={"gpu": "H200", "gpu_count": 8, "gpu_pcie_generation": 5, "gpu_pcie_lanes": 16, "gpu_nvlinks": 18}
    )
    assert gpu["Accelerator"] == "H200" and gpu["Its links"] == "PCIe 5 x16, 18 NVLinks" and gpu["Driver"] == "?"


def test_fp32_products_of_attention_and_documents_that_were_left_out_stand_in_the_header(plant):
    def change(case, config, seed):
        compute, attends = "fp32" if config == "fp32_true" else "bf16", case != "roberta_mlm"
        return {
            "attention_dtype": "fp32" if attends else None,
            "attention_backend": "math" if attends else "none",
            "config": {"config": {"compute": compute}},
            "flags": {"data": {"single_label_excluded": {"train": 1_200, "validation": 3, "test": 0}}},
        }

    plain = dict(header(plant(("gpt2_multi_cls",), ("fp32_true",), (0,)))["facts"])
    assert not {"Attention's products", "Documents without a class, left out"} & plain.keys()
    facts = dict(
        header(plant(("gpt2_single_cls", "gpt2_multi_cls"), ("fp32_true", "amp_bf16", "bf16_pure"), (0,), change))["facts"]
    )
    assert facts["Attention's products"] == "fp32 (math) under amp_bf16 and bf16_pure"
    free = dict(header(plant(("gpt2_clm", "roberta_mlm"), ("amp_bf16",), (0,), change))["facts"])
    assert free["Attention's products"] == "fp32 (math) under amp_bf16 and bf16_pure; no attention in roberta_mlm"
    assert facts["Documents without a class, left out"] == "gpt2_single_cls: 1,200 train, 3 validation"


def test_systems_that_differ_are_all_listed(runs):
    rows = [msgspec.structs.replace(run, env={"torch_version": f"2.1{i % 2}", "secret": "x"}) for i, run in enumerate(runs[:3])]
    block = system_of(rows)
    assert block["torch"] == "2.10 (2 rows); 2.11 (1 row)" and "x" not in block.values()


def test_whether_a_run_was_disturbed_is_known_unknown_or_read_from_the_processor(runs):
    def state(**hardware):
        return system_of(runs[:2], flags={"hardware": hardware}, config={"device": "cpu", "threads": 1})["State"]

    assert state(throttled=None, contended=None) == "throttled ? and contended ?"
    busy = {"system_cpu_percent_median": 100.0}
    assert state(**busy, process_cpu_percent_median=29.0) == "throttled ? and contended 2 of 2 rows"
    assert state(**busy, process_cpu_percent_median=99.0) == "throttled ? and contended 0 of 2 rows"
    assert state(system_cpu_percent_median=60.0, process_cpu_percent_median=29.0) == "throttled ? and contended 0 of 2 rows"
    assert state(throttled=False, contended=False) == "throttled 0 of 2 rows and contended 0 of 2 rows"


def test_the_best_measured_rate_is_named_and_a_busy_machine_is_a_warning(runs):
    rows = [{"dtype": "fp32", "flops_per_s": rate} for rate in (2e10, 3e10)]
    measured = {"matmul": rows, "copy": [{"bytes_per_s": 9e9}], "cpu_busy_before_frac": 1.0}
    block = system_of(runs[:1], {"measured": measured})
    assert block["Measured ceiling"] == "fp32 30 GFLOP/s, copy 9 GB/s (other work took 100 % of the CPU: too low)"


@pytest.mark.parametrize("run_id", ["../../etc/passwd", "a/b", "javascript:x", "a..b", "ä", "x y"])
def test_a_run_id_that_is_no_plain_name_is_no_link(run_id):
    assert run_href(run_id) is None
    assert run_href("gpt2_clm-amp_bf16-s0-00c0ffee") == "../runs/gpt2_clm-amp_bf16-s0-00c0ffee/run.json"


def test_absent_numbers_are_dashes_and_sort_last(runs):
    row = run_rows([msgspec.structs.replace(runs[0], f1_micro=None, val_loss=float("nan"))], RowNumbers(runs))[0]
    cells = {cell.text: cell.value for cell in row["cells"]}
    assert cells["–"] == "" and cells["NaN"] == "" and not any(cell.value == "-1" for cell in row["cells"])


def test_a_value_that_begins_with_a_dash_is_no_option():
    assert setting_arguments("data", "-m.jsonl") == ["--data=-m.jsonl"] and setting_arguments("lr", 0.1) == ["--lr", "0.1"]
    assert setting_arguments("compile", True) == ["--compile"]


def test_mfu_is_the_median_over_seeds_in_per_cent_a_table_a_denominator(runs):
    rows = [
        msgspec.structs.replace(run, mfu=value, mfu_real_tokens=value / 2, mfu_bf16_peak=None, mfu_measured_peak=None)
        for run, value in zip([runs[0], runs[1]], (0.2, 0.4), strict=True)
    ]
    (table,) = measurements.mfu_tables(rows)
    assert table["heads"] == ["configuration", "gpt2_clm"] and table["rows"] == [["fp32_true", "30.0 (real 15.0)"]]
    none = dict.fromkeys(name for name in RunRecord.__struct_fields__ if name.startswith("mfu"))
    assert measurements.mfu_tables([msgspec.structs.replace(runs[0], **none)]) == []


PROFILE = {
    "source": "cpu_self_time",
    "wall_s": 5.0,
    "sum_s": 4.0,
    "idle_s": 1.0,
    "seconds": {"optimizer": {"optimizer": 1.0}, "matmul": {"forward": 1.0, "backward": 2.0}},
    "top": [
        {
            "name": "aten::mm",
            "class": "matmul",
            "phase": "backward",
            "count": 6,
            "total_s": 0.5,
            "input_shapes": [[4, 8], [8, 2]],
        }
    ],
}


def test_kernel_classes_are_milliseconds_a_step_and_shares_of_kernel_time(runs):
    run = msgspec.structs.replace(runs[0], flags={"time_by_kernel": PROFILE, "trace": {"steps": 2}})
    table = kernel_time(SimpleNamespace(runs=[run, runs[4]], device="x", marks=()))
    heads, rows = measurements.kernel_classes(table.data)
    assert heads == ["matmul", "optimizer", "idle"]  # in the order of the classes, whatever that of the file
    assert rows == [["gpt2_clm", "fp32_true", "1,500 (75 %)", "500 (25 %)", "500"]]
    assert measurements.top_kernels(table.summary) == [
        ["gpt2_clm", "fp32_true", "aten::mm", "matmul", "backward", "3", "250", "[4, 8], [8, 2]"]
    ]
    assert "matmul in 1 of 1 profile" in table.title and "75 %" in table.title
    bare = PROFILE | {"top": [{"name": "k", "total_s": 1.0}, {"class": "matmul", "total_s": 1.0}]}
    run = msgspec.structs.replace(runs[0], flags={"time_by_kernel": bare, "trace": {"steps": 2}})
    top = measurements.top_kernels(kernel_time(SimpleNamespace(runs=[run], device="x", marks=())).summary)
    assert [row[2:5] for row in top] == [["k", "–", "–"], ["–", "matmul", "–"]]  # what is not recorded is a dash, and no "nan"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"time_by_kernel": PROFILE},
        {"time_by_kernel": PROFILE, "trace": {"steps": 0}},
        {"time_by_kernel": PROFILE, "trace": {"steps": "3"}},
        {"time_by_kernel": "text", "trace": {"steps": 2}},
        {"time_by_kernel": {"seconds": {"matmul": 3.0}}, "trace": {"steps": 2}},
    ],
)
def test_a_profile_without_steps_or_seconds_is_not_measured(runs, flags):
    run = msgspec.structs.replace(runs[0], flags=flags)
    table = kernel_time(SimpleNamespace(runs=[run], device="x", marks=()))
    assert "not measured" in table.empty and measurements.kernel_classes(table.data) == ([], [])


@pytest.mark.parametrize("document", [None, {}, {"rows": "text"}, {"rows": [3, None]}])
def test_a_benchmark_that_is_none_is_no_table(document):
    assert measurements.kernel_rows(document) == []


def test_a_benchmark_is_printed_in_its_units():
    rows = measurements.kernel_rows({"rows": [{"op": "ce", "time_s": 2.5e-6, "bytes_per_s": 1.5e12, "note": True}]})
    assert [dict(zip(measurements.KERNEL_HEADS, row, strict=True)) for row in rows] == [
        dict.fromkeys(measurements.KERNEL_HEADS, "–") | {"op": "ce", "time (us)": "2.5", "GB/s": "1,500", "note": "yes"}
    ]


def card_of(runs, **fields):
    failure = Failure(runs[0], "died", None, **fields)
    return failure_cards([FailureGroup((failure,), failure, ())], RowNumbers(runs))["cards"][0]


def test_failures_of_one_producer_and_cause_are_one_card_that_cites_its_controls(plant):
    """18 alike runs with their controls, of which one died too, and a run of another cause beside them."""
    cases, controls = ("gpt2_clm", "gpt2_multi_cls", "roberta_mlm"), ("fp16_naive_eps1e4", "fp16_naive_fp32_states")
    other = msgspec.structs.replace(ADAMW, phase="forward", tensor="output", source_tensor=None, cause="overflow", kind="inf")

    def change(case, config, seed):
        if config == "fp16_naive" or (config, case, seed) == (controls[0], "gpt2_clm", 0):
            first = msgspec.structs.replace(ADAMW, module=f"{case}.wte")
            return {"diverges_at": 1 + seed, "first": other if (case, seed) == ("roberta_mlm", 5) else first}
        return {}

    folder = plant(cases, ("fp32_true", "fp16_naive", *controls), range(6), change)
    groups = failure_groups(folder)
    assert sorted((group.example.run.dtype_config, len(group.members)) for group in groups) == [
        ("fp16_naive", 1),
        ("fp16_naive", 17),
        (controls[0], 1),
    ]
    card = failure_cards(groups, RowNumbers(folder.runs))["cards"][0]
    assert card["where"] == "17 runs in 3 cases" and len(card["places"]) == 3
    assert card["places"][0] == ["gpt2_clm", "0, 1, 2, 3, 4, 5", "1 to 6", "gpt2_clm.wte.param", "nan"]
    assert [control["text"] for control in card["controls"]] == [
        f"{controls[0]} survived in 16 of 17 of the same cases and seeds",
        f"{controls[1]} survived in 17 of 17 of the same cases and seeds",
    ]
    assert all(control["rows"] for control in card["controls"])


def test_a_control_that_was_not_run_is_not_said_to_have_survived(plant):
    folder = plant(
        ("gpt2_clm",), ("fp32_true", "fp16_naive"), (0,), lambda _, config, __: {"diverges_at": 1} if "naive" in config else {}
    )
    (group,) = failure_groups(folder)
    (card,) = failure_cards((group,), RowNumbers(folder.runs))["cards"]
    assert {control["text"].split(" ", 1)[1] for control in card["controls"]} == {"was not run beside them"}


def test_a_card_shows_remedies_in_columns(runs):
    card = card_of(
        runs,
        remedies=(
            {
                "change": "eps 1e-4",
                "survives": True,
                "steps": 20,
                "step_time_ratio": 1.04,
                "bytes_ratio": 1.0,
                "confirms": "underflow_then_divide",
            },
            {"change": "clip", "survives": None, "why": "no GPU"},
            {"change": "scaler", "survives": False, "failed_at": 6, "why": "2 of 5 skipped", "step_time_ratio": True},
        ),
    )
    assert card["remedies"] == [
        ["eps 1e-4", "yes, 20 steps", "1.04x", "1.00x", "confirms underflow then divide"],
        ["clip", "not tried", "–", "–", "no GPU"],
        ["scaler", "no, diverges at step 6", "–", "–", "2 of 5 skipped"],
    ]


def test_a_chain_is_numbered_and_its_rest_counted(runs):
    link = {"module": "h.0", "tensor": "h.0.weight", "phase": "optimizer", "op": "div", "kind": "inf", "dtype": "fp16"}
    card = card_of(runs, chain=(link, {"phase": "forward", "module": None}, *[link] * 9))
    assert card["chain"][0] == ["1", "optimizer", "h.0.weight", "div", "inf", "fp16"]
    assert card["chain"][1] == ["2", "forward", "–", "–", "–", "–"]
    assert len(card["chain"]) == MOST_LINKS and card["chain_further"] == 11 - MOST_LINKS


@pytest.mark.parametrize(
    ("here", "n", "shown"),
    [
        (5, 20, range(2, 9)),
        (0, 20, range(0, 4)),
        (19, 20, range(16, 20)),
        (None, 20, range(13, 20)),
        (1, 2, range(0, 2)),
        (None, 0, range(0)),
    ],
)
def test_the_culprit_stands_marked_between_its_neighbours(runs, here, n, shown):
    card = card_of(
        runs,
        kernels=tuple(
            {"name": f"k{at}", "here": at == here, "nonfinite": at == 7, "duration_s": 2e-6, "shapes": [[2, 3]] * 3}
            for at in range(n)
        ),
    )
    assert [kernel["cells"][1] for kernel in card["kernels"]] == [f"k{at}" for at in shown]
    assert [kernel["cells"][1] for kernel in card["kernels"] if kernel["here"]] == ([] if here is None else [f"k{here}"])
    assert all(kernel["cells"][4:6] == ["2", "[2, 3], [2, 3] and 1 more"] for kernel in card["kernels"])


def test_magnitudes_are_drawn_from_three_steps_on(runs):
    rows = [{"step": step, "absmax_fwd": 2.0**step, "absmax_bwd": None if step < 3 else 0.5} for step in (1, 2, 3)]
    output, gradient = card_of(runs, history=tuple(rows))["history"]
    assert output["text"] == "output: 2 at step 1, 8 at step 3" and output["line"].count("<polyline") == 1
    assert gradient == {"text": "gradient: 0.5 at step 3", "line": None}
    assert card_of(runs, history=tuple(rows[:2]))["history"][0]["line"] is None
    assert card_of(runs, history=({"step": "x", "absmax_fwd": 1}, {"step": 1, "absmax_fwd": float("nan")}))["history"] == []


def test_a_sparkline_rises_with_the_logarithm_and_puts_zero_on_the_ground():
    line = sparkline([(1, 0.0), (2, 1.0), (3, 4.0), (4, 16.0)], "a < b")
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]*)"', line)[1].split()]
    assert heights[0] == heights[1] > heights[2] > heights[3]
    assert heights[1] - heights[2] == pytest.approx(heights[2] - heights[3], abs=0.2) and "a &lt; b" in line
    assert sparkline([(1, 0.0), (2, 0.0)], "x") is None and sparkline([(1, 3.0)], "x") is None


def test_many_groups_are_counted_and_not_all_printed(runs):
    many = [FailureGroup((found := Failure(run, "died", None),), found, ()) for run in runs[: MOST_CARDS + 3]]
    cards = failure_cards(many, RowNumbers(runs))
    assert len(cards["cards"]) == MOST_CARDS and cards["further"] == 3


FOUND = {
    "case": "gpt2_clm",
    "config": "amp_bf16",
    "seq_len": 1024,
    "status": "found",
    "largest_batch": 96,
    "within_rows": 4,
    "peak_bytes": 131_000_000_000,
    "tokens_per_s": 400_000.0,
    "real_tokens_per_s": 360_000.0,
    "limited_by": "oom: OutOfMemoryError",
    "at_32": {"real_tokens_per_s": 300_000.0},
}


def cells(row, price=None):
    return dict(zip(FIT_HEADS, fit_rows({"rows": [row]}, price)[0], strict=False))


def test_a_row_in_words():
    found = cells(FOUND, price=3.6)
    assert (found["rows"], found["within"], found["peak GB"], found["real tokens/s"]) == ("96", "4", "131", "360,000")
    assert fit_rows({"rows": [FOUND]}, 3.6)[0][9:11] == ["2.78", "3.33"]  # 0.001 a second: 1e9 / 360,000 s cost 2.78
    assert fit_rows({"rows": [FOUND]}, None)[0][9:11] == [ABSENT, ABSENT]


def test_what_is_not_a_number_is_absent():
    assert cells({**FOUND, "status": "at_least"})["rows"] == "≥ 96"
    none = cells({"case": "x", "config": "y", "status": "none_fits", "largest_batch": None})
    assert none["rows"] == "none fits" and none["peak GB"] == none["tokens/s"] == none["the next batch met"] == ABSENT
    hostile = {**FOUND, "largest_batch": "many", "peak_bytes": -1, "tokens_per_s": True, "at_32": 7, "limited_by": "<b>" * 999}
    found = cells(hostile)
    assert found["rows"] == "found" and found["peak GB"] == found["tokens/s"] == ABSENT
    assert len(found["the next batch met"]) <= 161
    assert fit_rows(None) == fit_rows({"rows": 5}) == fit_rows({"rows": [3]}) == []


@pytest.mark.process
def test_it_stands_in_the_dossier(plant, tmp_path):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    for content, says in ((None, "python -m harness fit CASE"), ({"rows": [FOUND]}, "131")):
        if content:
            (folder.path / "fit.json").write_text(json.dumps(content))
        build(load(folder.path), tmp_path / "out", pdf=False, formats=("svg",))
        page = (tmp_path / "out" / "dossier" / "index.html").read_text()
        assert "What fits" in page and says in page[page.index("What fits") :]
