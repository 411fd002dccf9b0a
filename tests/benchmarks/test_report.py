"""The bench measures what it says, on data that are marked as made up."""

import pytest

from benchmarks.report import BenchFailed, measure, measured, show, spend
from benchmarks.simulated_results import simulate
from instrument.results.contents import load


def test_simulated_runs_are_a_valid_marked_folder(tmp_path):
    assert len(simulate(tmp_path / "a", seeds=1, steps=20)) == 42
    folder = load(tmp_path / "a")
    assert folder.marks == ("SIMULATED",) and not folder.defects and len(folder.runs) == 42
    assert all(len(folder.steps(run.run_id)["step"]) == run.steps_done for run in folder.runs)


def test_simulating_twice_gives_the_same_files(tmp_path):
    for name in "ab":
        simulate(tmp_path / name, seeds=1, steps=8)
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.process
def test_a_process_is_measured_with_its_children():
    size = 60_000_000
    code = (
        "import subprocess, sys, time; x = bytearray(60_000_000); "
        "subprocess.run([sys.executable, '-c', 'import time; y = bytearray(60_000_000); time.sleep(.5)'])"
    )
    spent = spend("-c", code)
    assert spent.wall_s >= 0.5 and 2 * size < spent.peak_bytes < 4 * size


@pytest.mark.process
def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(BenchFailed, match="broken on purpose"):
        spend("-c", "raise SystemExit('broken on purpose')")


@pytest.mark.parametrize("value,limit,met", [(1.0, 2.0, True), (3.0, 2.0, False), (3.0, None, None)])
def test_a_target_is_met_missed_or_not_set(value, limit, met, capsys):
    row = measured("a figure", "ratio", [value], limit)
    assert row.met is met
    show([row])
    words = capsys.readouterr().err
    assert ("met" in words, "missed" in words) == (met is True, met is False)


@pytest.mark.soak
def test_the_whole_measurement_runs(tmp_path):
    pytest.importorskip("weasyprint")
    rows = {row.name: row for row in measure(tmp_path, 1, seeds=1, steps=20)}
    assert rows["HTML"].median > 0 and 0 < rows["8 figures / plain script"].median < 5
