"""The benchmarks' structure, arithmetic and fairness checks, at sizes that take no time. No test judges a speed."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from benchmarks import report, trainer, trainer_arms, whole_runs
from benchmarks.__main__ import main
from harness import figures
from harness.planning import plan_run
from harness.settings import Request

pytestmark = pytest.mark.slow

SMALL = {"max_steps": 3, "batch_size": 4, "micro_batch": 2, "seq_len": 16, "documents": 400, "validation_documents": 4}


def test_a_figure_knows_its_interval_and_its_target():
    made = figures.summarize("x", "y", [1.0, 2.0, 3.0, 4.0, 5.0], "ratio", at_least=3.0)
    assert (made.n, made.median, made.minimum, made.maximum, made.mean, made.met) == (5, 3, 1, 5, 3, True)
    assert made.high95 - made.mean == pytest.approx(2.776445 * 1.5811388 / 5**0.5, rel=1e-6)
    one = figures.summarize("x", "y", [2.0], "s", at_most=1.0)
    assert one.low95 is None and one.met is False
    assert figures.summarize("x", "y", [2.0], "s").met is None
    with pytest.raises(ValueError, match="nothing was measured"):
        figures.summarize("x", "y", [], "s")


@pytest.mark.process
def test_help_is_light():
    assert whole_runs.heavy_imports() == []


@pytest.mark.process
def test_a_child_reports_its_time_memory_and_failure():
    done = whole_runs.run_python("-c", "x = b'1' * 100_000_000; print(len(x))")
    assert done.stdout == "100000000\n" and done.wall_s > 0 and done.cpu_s > 0
    assert 1e8 < done.peak_rss_bytes < 1.5e8  # and not this process's own, which holds torch
    with pytest.raises(whole_runs.ChildFailed, match=r"(?s)exit code 3.*because"):
        whole_runs.run_python("-c", "import sys; sys.stderr.write('because'); sys.exit(3)")


def test_the_parts_of_a_run_add_up_to_its_wall_time():
    parts = whole_runs.break_down({"data": 1.0, "model": 2.0, "steps": 3.0, "evaluation": 0.5, "total": 6.6}, 8.0)
    assert parts == {"startup_s": 1.5, "data_s": 1.0, "model_s": 2.0, "steps_s": 3.0, "evaluation_s": 0.5, "wall_s": 8.0}


@pytest.mark.process
def test_run_and_matrix_read_what_their_commands_left(monkeypatch):
    def run_python(*arguments, **_):
        out = arguments[arguments.index("--out") + 1]
        if "matrix" in arguments:
            with open(f"{out}/results.jsonl", "w") as rows:
                rows.writelines(json.dumps({"status": s}) + "\n" for s in ["completed"] * 36 + ["diverged"] * 6)
        record = {"status": "completed", "flags": {"timings_s": {"data": 1, "model": 1, "steps": 1, "evaluation": 1}}}
        return whole_runs.Finished(5.0, 4.0, 10**9, json.dumps(record))

    monkeypatch.setattr(whole_runs, "run_python", run_python)
    measured = {f.name: f for f in whole_runs.measure_run(2)}
    assert measured["startup_s"].median == 1 and measured["cpu_s"].median == 4
    assert measured["wall_s"].met and measured["peak_rss_bytes"].met
    measured = {f.name: f for f in whole_runs.measure_matrix(1)}
    assert measured["rows"].met and measured["rows"].note == "36 completed, 6 diverged" and measured["wall_s"].met


@pytest.mark.process
def test_a_run_that_did_not_complete_is_no_measurement(monkeypatch):
    monkeypatch.setattr(
        whole_runs,
        "run_python",
        lambda *_, **__: whole_runs.Finished(1.0, 1.0, 1, json.dumps({"status": "diverged", "error": "loss is nan"})),
    )
    with pytest.raises(whole_runs.ChildFailed, match="diverged: loss is nan"):
        whole_runs.measure_run(1)


@pytest.fixture
def arms(one_thread):
    """Both arms of a tiny comparison, run once a module."""
    if not hasattr(arms, "done"):
        pytest.importorskip("accelerate")
        settings = plan_run(
            CASES["gpt2_multi_cls"],
            DTYPE_CONFIGS["fp32_true"],
            0,
            Request(preset="tiny", data="embedded", device="cpu", **SMALL),
            torch.device("cpu"),
        )
        arms.done = trainer_arms.run_both(trainer_arms.work_for(settings))
    return copy.deepcopy(arms.done)


def test_both_arms_do_the_same_work(arms):
    ours, theirs = arms
    assert len(ours.losses) == len(ours.wall_s) == len(theirs.cpu_s) == SMALL["max_steps"]
    assert trainer.require_same_work(ours, theirs) < 1e-6
    assert ours.losses[0] != ours.losses[-1]  # they trained


def test_the_fairness_check_fails_loudly(arms):
    ours, theirs = arms
    shorter = SimpleNamespace(losses=theirs.losses[:-1], weights=theirs.weights)
    with pytest.raises(trainer.UnfairComparison, match="3 steps and the Trainer 2"):
        trainer.require_same_work(ours, shorter)
    other = SimpleNamespace(losses=[*theirs.losses[:-1], theirs.losses[-1] * 1.01], weights=theirs.weights)
    with pytest.raises(trainer.UnfairComparison, match="step 3 by"):
        trainer.require_same_work(ours, other)
    broken = SimpleNamespace(losses=[float("nan")] * 3, weights=theirs.weights)
    with pytest.raises(trainer.UnfairComparison):
        trainer.require_same_work(ours, broken)
    moved = SimpleNamespace(losses=theirs.losses, weights=[w * 1.01 for w in theirs.weights])
    with pytest.raises(trainer.UnfairComparison, match="final weights"):
        trainer.require_same_work(ours, moved)


def test_a_different_rate_in_one_arm_is_noticed(one_thread, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(trainer_arms, "learning_rate", lambda *_, **__: 0.5)
    with pytest.raises(trainer.UnfairComparison):
        trainer.measure(1, ("gpt2_clm",), **SMALL)


def test_the_trainer_benchmark_gives_its_rows(one_thread):
    pytest.importorskip("accelerate")
    measured = {f.name: f for f in trainer.measure(2, ("gpt2_clm",), **SMALL)}
    assert list(measured) == ["gpt2_clm_ours", "gpt2_clm_trainer", "gpt2_clm_ratio", "gpt2_clm_cpu_ratio"]
    ratio = measured["gpt2_clm_ratio"]
    assert ratio.n == 2 and ratio.at_least == 1.0 and ratio.met is not None and "losses agree" in ratio.note


def test_without_accelerate_the_command_says_so_and_ends_with_5(monkeypatch, capsys):
    monkeypatch.setattr(trainer.util, "find_spec", lambda name: None)
    assert main(["trainer", "--json"]) == 5
    printed = capsys.readouterr()
    assert "pip install accelerate" in printed.err and json.loads(printed.out)["rows"] == []


def test_an_unfair_comparison_ends_with_3_and_the_others_still_run(monkeypatch, capsys):
    def unfair(_):
        raise trainer.UnfairComparison("the arms' losses differ")

    monkeypatch.setattr(trainer, "measure", unfair)
    monkeypatch.setattr(
        whole_runs, "measure_help", lambda repeats: [figures.summarize("help", "a", [0.1], "ratio", at_most=0.15)]
    )
    assert main(["trainer", "help", "--json"]) == 3
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [row["met"] for row in document["rows"]] == [True] and document["machine"]["usable_cores"] >= 1
    assert "the arms' losses differ" in printed.err and "met" in printed.err


def test_what_can_be_asked_for(monkeypatch, capsys):
    asked = []
    for module, name in ((whole_runs, "help"), (whole_runs, "run"), (whole_runs, "matrix")):
        monkeypatch.setattr(module, f"measure_{name}", lambda repeats, name=name: asked.append((name, repeats)) or [])
    monkeypatch.setattr(trainer, "measure", lambda repeats: asked.append(("trainer", repeats)) or [])
    monkeypatch.setattr(report, "bench_command", lambda repeats, as_json: asked.append(("report", repeats, as_json)) or 0)
    assert main([]) == main(["trainer", "help", "--repeats", "2"]) == main(["report"]) == 0
    assert asked[:4] == [("help", 5), ("run", 5), ("matrix", 1), ("trainer", 5)]
    assert asked[4:] == [("help", 2), ("trainer", 2), ("report", 3, False)]
    for words, sentence in ((["speed"], "allowed: help, run, matrix, trainer; or report"), (["--repeats", "0"], "from 1")):
        with pytest.raises(SystemExit) as refused:
            main(words)
        assert refused.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


def test_units_are_converted_only_where_they_are_shown():
    rows = figures.cells(figures.summarize("run", "peak", [1.25e9, 1.25e9], "bytes", at_most=1.5e9, note="a [b]"))
    assert rows[1] == "1.250 GB" and rows[5] == "<= 1.500 GB" and rows[6] == r"[green]met[/]  a \[b]"
    assert figures.spelled(0.5, "ratio") == "0.500" and figures.spelled(42, "count") == "42"
