"""The matrix: planned in a fair order, run in processes of their own, resumed, followed up."""

import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console

from bench_cases import CASES
from harness import options as arguments
from harness.matrix.command import checked_jobs, local_jobs
from harness.matrix.plan import controls_of, plan_matrix
from harness.matrix.screen import cell_text, stability_cells, stability_table
from harness.settings import SettingsError
from harness.supervisor.pool import Pool
from instrument.results.folder import finished_runs
from instrument.results.schemas import FirstNonfinite, RunRecord
from tests.harness.commands import TWO_STEPS, Forked

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def options(*words):
    return arguments.parser().parse_args(["matrix", *words])


@pytest.fixture
def harness(tmp_path):
    """``harness(*words)``: exit code, standard output and standard error of a command, which is a process."""

    def run(*words):
        process = Forked(words, tmp_path / "command")
        printed, errors = process.communicate(timeout=300)
        return process.returncode, printed, errors

    return run


def test_the_default_plan_is_six_cases_by_seven_configurations_rotated():
    runs = plan_matrix(options(*TWO_STEPS), CPU)
    assert len({run.run_id for run in runs}) == 42
    blocks = [runs[start : start + 7] for start in range(0, 42, 7)]
    assert all(len({run.case.id for run in block}) == 1 for block in blocks)  # a case's configurations side by side
    assert len({block[0].config.id for block in blocks}) == 6  # and none of them always first
    assert [block[0].case.id for block in blocks] == [c.id for c in CASES.values() if c.in_default_matrix]


def test_seeds_multiply_and_all_means_all():
    assert len(plan_matrix(options(*TWO_STEPS, "--seeds", "0", "1", "--cases", "gpt2_clm"), CPU)) == 14
    assert len(plan_matrix(options(*TWO_STEPS, "--cases", "all", "--configs", "all"), CPU)) == 8 * 14


def test_a_run_asked_for_twice_is_planned_once():
    twice = plan_matrix(
        options(*TWO_STEPS, "--cases", "gpt2_clm", "gpt2_clm", "--configs", "fp32_true", "--seeds", "0", "0"), CPU
    )
    assert len(twice) == 1


def test_jobs_follow_cores_and_threads(plan):
    assert local_jobs([plan("gpt2_clm", "fp32_true", threads=1)], CPU) >= 1
    assert local_jobs([plan("gpt2_clm", "fp32_true", threads=0)], CPU) == 1
    assert checked_jobs(options("--jobs", "3")) == 3
    with pytest.raises(SettingsError, match="jobs is 0"):
        checked_jobs(options("--jobs", "0"))


def test_controls_change_the_configuration_only(plan):
    settings = plan("gpt2_clm", "fp16_naive", seed=4)
    controls = controls_of(settings)
    assert [c.config.id for c in controls] == ["fp16_naive_eps1e4", "fp16_naive_fp32_states"]
    assert all(
        (c.case, c.seed, c.lr, c.data_fingerprint) == (settings.case, 4, settings.lr, settings.data_fingerprint)
        for c in controls
    )


@pytest.mark.process
def test_runs_are_resumed_followed_up_and_summed_up(tmp_path, harness):
    words = ["matrix", *TWO_STEPS, "--cases", "gpt2_clm", "--configs", "fp32_true", "fp16_naive", "--out", str(tmp_path)]
    code, printed, errors = harness(*words, "--jobs", "2", "--json")
    assert code == 0, errors
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {row["dtype_config"]: row["status"] for row in rows} == {
        "fp32_true": "completed",
        "fp16_naive": "diverged",
        "fp16_naive_eps1e4": "completed",
        "fp16_naive_fp32_states": "completed",
    }
    assert "✗ inf @1 optim" in errors and "Stability: 4 runs" in errors
    assert len({row["init_sha256"] for row in rows}) == 1
    assert len(finished_runs(tmp_path)) == 4
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/run.json")}
    code, _, errors = harness(*words)
    assert code == 0 and "nothing to do: all 4 runs are done" in errors
    assert "Stability: 4 runs" in errors
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/run.json")} == before
    for path in before:  # as if the matrix had been interrupted between a divergence and its controls
        if "fp16_naive_" in str(path):
            path.unlink()
    planned = json.loads(harness(*words, "--dry-run", "--json")[1])
    assert len(planned["todo"]) == 2 and len(planned["done"]) == 2


@pytest.mark.process
def test_a_run_in_a_process_equals_the_same_run_alone(tmp_path, harness):
    common = [*TWO_STEPS, "--json"]
    harness("matrix", *common, "--cases", "roberta_mlm", "--configs", "amp_bf16", "--out", str(tmp_path / "m"))
    harness("case", "roberta_mlm", "amp_bf16", *common, "--out", str(tmp_path / "c"))
    (one,), (other,) = finished_runs(tmp_path / "m"), finished_runs(tmp_path / "c")
    assert one.run_id == other.run_id and one.final_weights_sha256 == other.final_weights_sha256 is not None


@pytest.mark.process
def test_a_process_that_dies_is_a_row_and_the_next_run_is_unaffected(plan, tmp_path, monkeypatch):
    pool = Pool([plan("gpt2_clm", "fp32_true", seed=s, max_steps=200) for s in (0, 1)], tmp_path, jobs=1)
    ended = []

    def kill_the_first():
        for run in pool.running:
            if run.settings.seed == 0 and run.last_step is not None:
                os.kill(run.child.pid, signal.SIGKILL)
            if run.settings.seed == 1 and run.last_step is not None:
                os.kill(run.child.pid, signal.SIGABRT)

    for one in pool.run(kill_the_first, seconds_between_ticks=0.05):
        ended.append(one)
    assert [one.failure for one in ended] == [None, None]
    assert "killed by SIGKILL" in ended[0].record.error and "killed by SIGABRT" in ended[1].record.error
    assert {row.run_id: row.status for row in finished_runs(tmp_path)} == {one.settings.run_id: "error" for one in ended}


def a_row(**changes) -> RunRecord:
    plain = dict(
        run_id="x",
        case="gpt2_clm",
        scenario="A",
        arch="gpt2",
        task="clm",
        loss="cross_entropy",
        loss_reduction="mean",
        dtype_config="fp32_true",
        seed=0,
        preset="tiny",
        device="cpu",
        data_source="e",
        weights_source="s",
        status="completed",
        max_steps=1,
        batch_size=1,
        micro_batch=1,
        seq_len=1,
        val_loss=3.0,
    )
    return RunRecord(**{**plain, **changes})


def test_a_cell_shows_the_worst_seed_and_how_many_share_it():
    assert cell_text([a_row()]) == ("✓ 3", "", "completed")
    assert cell_text([a_row(f1_micro=0.5)]) == ("✓ 3", "F1 0.50", "completed")
    diverged = a_row(seed=1, status="diverged", divergence_step=9)
    assert cell_text([a_row(), diverged, a_row(seed=2)]) == ("✗ 1/3 loss up @9", "", "diverged")
    assert cell_text([a_row(status="preempted"), diverged, a_row(seed=2)]) == ("✗ 1/3 loss up @9", "", "diverged")
    assert cell_text([a_row(status="unsupported", val_loss=None)])[0] == "– unsupported"
    three = [a_row(seed=n, val_loss=loss) for n, loss in enumerate((9.0, 1.0, 5.0))]
    assert cell_text(three) == ("✓ 3/3 5", "", "completed")
    order = list(stability_cells([a_row(dtype_config="fp16_naive"), a_row(case="roberta_mlm"), a_row()]))
    assert order == [("fp32_true", "gpt2_clm"), ("fp32_true", "roberta_mlm"), ("fp16_naive", "gpt2_clm")]


def test_the_matrix_of_six_cases_fits_80_columns():
    rows = [
        a_row(case=case, dtype_config=config, f1_micro=0.5, val_loss=0.0719)
        for case in list(CASES)[:6]
        for config in ("fp32_true", "fp16_naive_fp32_states")
    ]
    rows.append(
        a_row(
            dtype_config="fp16_naive",
            status="diverged",
            divergence_step=1_000,
            first_nonfinite=FirstNonfinite(
                step=1,
                microbatch=None,
                phase="optimizer",
                phase_surfaced="optimizer",
                module="m",
                op=None,
                tensor="param",
                source_tensor=None,
                kind="inf",
                dtype="float16",
                cause=None,
                input_absmax=None,
                headroom_bits=None,
            ),
        )
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(stability_table(rows, "Stability"))
    text = console.export_text()
    assert "…" not in text and "fp16_naive_fp32_states" in text and "✗ inf" in text and "@1000" in text and "optim" in text
