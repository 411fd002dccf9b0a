"""What the page says beside its figures: citations, commands, cards, tables of measurements."""

from types import SimpleNamespace

import msgspec
import pytest

from instrument.records import RunRecord, decode
from report.bench.simulate import simulate
from report.dossier import measurements
from report.dossier.citations import RowNumbers, in_order
from report.dossier.failure_cards import MOST_CARDS, failure_cards
from report.dossier.reproduce import command, commands, versions
from report.dossier.runs_table import run_href, run_rows


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
    made = msgspec.structs.replace(runs[0], flags={}, config={
        "preset": "tiny", "lr": 0.004, "data": "my dir; rm -rf x", "compile": True, "bucket_by_length": False,
        "attention": "auto"})
    assert command(made) == ("python -m harness case gpt2_clm fp32_true --seed 0 --preset tiny --data 'my dir; rm -rf x' "
                             "--lr 0.004 --sdpa auto --compile")


def test_options_of_a_command_are_options_of_the_harness():
    from harness.arguments import parser
    from report.dossier.reproduce import OPTIONS

    parsed = parser().parse_args(["case", "gpt2_clm", "fp32_true", "--seed", "0", "--compile", "--bucket-by-length",
                                  *(word for option, value in zip(OPTIONS.values(), (
                                      "tiny", "embedded", "scratch", "0.1", "8", "4", "64", "9", "0.0", "auto"), strict=True)
                                    for word in (option, value))])
    assert parsed.lr == 0.1 and parsed.max_steps == 9


def test_what_this_harness_did_not_make_has_no_command(runs):
    numbers = RowNumbers(runs)
    assert commands(runs, numbers) == {"rows": [], "foreign": [("1–84", "row-1")]}


def test_versions_that_differ_are_all_told(runs):
    rows = [msgspec.structs.replace(run, env={"torch_version": f"2.1{i % 2}", "memory_bytes": 25e9, "secret": "x"})
            for i, run in enumerate(runs[:3])]
    assert versions(rows, {}) == [("torch", "2.10 (2 rows); 2.11 (1 rows)"), ("memory", "25.0 GB")]
    assert versions([], {"python": "3.11"}) == [("python", "3.11")]


@pytest.mark.parametrize("run_id", ["../../etc/passwd", "a/b", "javascript:x", "a..b", "ä", "x y"])
def test_a_run_id_that_is_no_plain_name_is_no_link(run_id):
    assert run_href(run_id) is None
    assert run_href("gpt2_clm-amp_bf16-s0-00c0ffee") == "../runs/gpt2_clm-amp_bf16-s0-00c0ffee/run.json"


def test_absent_numbers_are_dashes_and_sort_last(runs):
    row = run_rows([msgspec.structs.replace(runs[0], f1_micro=None, val_loss=float("nan"))], RowNumbers(runs))[0]
    cells = {cell.text: cell.value for cell in row["cells"]}
    assert cells["–"] == "" and cells["NaN"] == "" and not any(cell.value == "-1" for cell in row["cells"])


def test_mfu_is_the_median_over_seeds_in_per_cent(runs):
    rows = [msgspec.structs.replace(run, mfu=value, mfu_measured_peak=None) for run, value in
            zip([runs[0], runs[1]], (0.2, 0.4), strict=True)]
    (row,) = measurements.mfu_rows(rows)
    assert row[:3] == ["gpt2_clm", "fp32_true", "30.0"] and row[6:] == ["–", "–"]
    assert measurements.mfu_rows([msgspec.structs.replace(runs[0], **dict.fromkeys(
        [name for name in RunRecord.__struct_fields__ if name.startswith("mfu")]))]) == []


def test_kernel_classes_are_shares_of_the_profile(runs):
    run = msgspec.structs.replace(runs[0], flags={"time_by_kernel": {"matmul": 3.0, "optimizer": {"time_s": 1.0}}})
    heads, rows = measurements.kernel_classes([run, runs[4]])
    assert heads == ["matmul", "optimizer"] and rows == [["gpt2_clm", "fp32_true", "75.0", "25.0"]]
    assert measurements.kernel_classes(runs[:2]) == ([], [])


@pytest.mark.parametrize("document", [None, {}, {"rows": "text"}, {"rows": [3, None]}])
def test_a_benchmark_that_is_none_is_no_table(document):
    assert measurements.bench_table(document, (("op", ""),)) == []


def test_a_benchmark_is_printed_in_its_units():
    rows = measurements.bench_table({"rows": [{"op": "ce", "time_s": 2.5e-6, "bytes_per_s": 1.5e12, "met": True}]},
                                    (("op", ""), ("time_s", "us"), ("bytes_per_s", "GB/s"), ("met", ""), ("pairs", "")))
    assert rows == [["ce", "2.5", "1,500", "yes", "–"]]


def card_of(runs, **fields):
    empty = {"run_id": runs[0].run_id, "sentence": "died", "cause": None, "remedies": (), "chain": (), "kernels": (),
             "trace_file": None}
    folder = SimpleNamespace(by_id={run.run_id: run for run in runs})
    return failure_cards([SimpleNamespace(**empty | fields)], folder, RowNumbers(runs))["cards"][0]


def test_a_card_tells_remedy_chain_and_kernels(runs):
    card = card_of(runs, remedies=({"change": "eps 1e-4", "survives": True, "step_time_ratio": 1.04, "bytes_ratio": 1.0,
                                    "confirms": None}, {"change": "clip", "survives": None, "why": "no GPU"}),
                   chain=({"module": "h.0", "tensor": "param", "phase": "optimizer", "op": "div", "kind": "inf",
                           "dtype": "fp16", "shape": [2, 3]},),
                   kernels=({"name": "aten::div", "duration_s": 2e-6, "phase": "optimizer"},))
    assert card["remedies"] == ["eps 1e-4: survives, step time 1.04x, memory 1.00x", "clip: not tried, no GPU"]
    assert card["chain"] == ["h.0.param (optimizer, div, inf, fp16, [2, 3])"]
    assert card["kernels"] == ["aten::div, 2 us, optimizer"]


def test_many_failures_are_counted_and_not_all_printed(runs):
    many = [SimpleNamespace(run_id=run.run_id, sentence="died", cause="", remedies=None, chain=None, kernels=None,
                            trace_file=None) for run in runs[:MOST_CARDS + 3]]
    cards = failure_cards(many, SimpleNamespace(by_id={}), RowNumbers(runs))
    assert len(cards["cards"]) == MOST_CARDS and cards["further"] == 3
