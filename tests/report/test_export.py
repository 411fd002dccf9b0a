"""The formats of other tools hold the tables' own numbers, escaped for where they go."""

import csv
import json
import re
import shutil
import subprocess
import sys
import types

import pandas as pd
import pytest

from report.errors import MissingTool, need
from report.export import EXPORTERS, points
from report.latex import escape, identifier
from report.tables import c_throughput

HOSTILE = '=HYPERLINK("http://x")'


def test_csv_holds_every_table_the_rows_and_the_findings(small, tmp_path):
    paths = EXPORTERS["csv"](small, tmp_path / "out")
    names = {path.stem for path in paths}
    assert {"runs", "findings", "a_stability_matrix", "h_rank_correlation", "d_grad_norm_heartbeat_summary"} <= names
    written = pd.read_csv(tmp_path / "out" / "c_throughput.csv")
    expected = c_throughput.table(small).data
    assert written["relative"].tolist() == pytest.approx(expected["relative"].tolist(), nan_ok=True)
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 12


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_cells_that_a_spreadsheet_would_run_are_neutralised(plant, tmp_path, start):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,), lambda *_: {"status": "error", "error": start + "cmd|' /C calc'!A0"})
    EXPORTERS["csv"](folder, tmp_path / "out")
    for file in (tmp_path / "out").glob("*.csv"):
        for row in csv.reader(file.open(encoding="utf-8")):
            for cell in row:
                assert not cell.startswith(("=", "+", "@")) and not re.match(r"-(?![\d.])", cell), (file.name, cell)
    assert "cmd|" in (tmp_path / "out" / "runs.csv").read_text()


def test_tex_escapes_whatever_comes_from_files():
    text = escape("a_b & 50% $\\frac{$ #1 {x} ~^ <tag> \u202e ✓ –\n")
    assert text == (
        r"a\_b \& 50\% \$\textbackslash{}frac\{\$ \#1 \{x\} \textasciitilde{}\textasciicircum{} "
        r"\textless{}tag\textgreater{} ? ? --"
    )
    assert text.isascii() and identifier("a_b") == r"\texttt{a\_\allowbreak{}b}"
    assert len(escape("x" * 1_000_000)) == 2_000


def test_latex_tables_have_a_cell_for_every_column(small, tmp_path):
    for path in EXPORTERS["latex"](small, tmp_path):
        text = path.read_text()
        declared = re.search(r"\\begin\{tabular\}\{(.*)\}\n", text)[1]
        columns = len(re.sub(r"p\{[^}]*\}", "p", declared))
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert rows and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {columns}, path.name


def test_the_appendix_names_only_figures_and_tables_that_are_there(plant, tmp_path, monkeypatch):
    def draw_all(tables, folder, formats, dpi, done):  # the real pictures take seconds; the soak test compiles them
        for table in tables.values():
            (folder / f"{table.name}.pdf").touch()

    monkeypatch.setattr("report.plots.draw.draw_all", draw_all)
    folder = plant(("gpt2_clm",), ("fp32_true", "amp_bf16"), (0, 1))
    paths = EXPORTERS["appendix"](folder, tmp_path / "out")
    tex = (tmp_path / "out" / "appendix.tex").read_text()
    figures, inputs = re.findall(r"\\includegraphics\[[^]]*\]\{([^}]*)\}", tex), re.findall(r"\\input\{([^}]*)\}", tex)
    assert len(figures) >= 4 and len(inputs) == 4
    assert all((tmp_path / "out" / f"{name}.pdf").is_file() for name in figures)
    assert all((tmp_path / "out" / f"{name}.tex").is_file() for name in inputs)
    cited = set(re.findall(r"\\cite\{([^}]*)\}", tex))
    assert cited == set(re.findall(r"@article\{([^,]*),", (tmp_path / "out" / "references.bib").read_text()))
    assert tex.count(r"\begin{") == tex.count(r"\end{") and "SIMULATED" in tex
    assert tmp_path / "out" / "appendix.tex" in paths


@pytest.mark.process
@pytest.mark.soak
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_the_appendix_compiles(plant, tmp_path):
    folder = plant(
        ("gpt2_clm", "gpt2_multi_cls"),
        ("fp32_true", "amp_bf16", "fp16_naive"),
        (0, 1),
        lambda case, config, seed: {"diverges_at": 3} if config == "fp16_naive" else {"weights_source": "$\\frac{$_&%#"},
    )
    EXPORTERS["appendix"](folder, tmp_path / "out")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "appendix.tex"]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2_000:]


def test_bencher_has_values_with_their_bounds(small, tmp_path):
    (path,) = EXPORTERS["bencher"](small, tmp_path)
    metrics = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    metric = metrics["planted/gpt2_clm/bf16_pure"]["speed_over_fp32_true"]
    assert set(metric) == {"value", "lower_value", "upper_value"}
    assert metric["lower_value"] < metric["value"] < metric["upper_value"] and metric["value"] == pytest.approx(3.0, rel=0.01)
    assert set(metrics["planted/gpt2_clm/fp32_true"]["speed_over_fp32_true"]) == {"value"}


def test_a_replay_leaves_out_what_is_not_finite(plant):
    folder = plant(("gpt2_clm",), ("fp16_naive",), (0,), lambda *_: {"diverges_at": 3})
    found = list(points(folder, folder.runs[0]))
    assert [step for step, _, _ in found] == [1, 2, 3]
    assert "grad_norm" in found[1][2] and "grad_norm" not in found[2][2] and "loss_scale" not in found[0][2]
    assert found[0][1] < found[2][1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_with_its_extra(small, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    for module in [m for m in sys.modules if m.startswith(name + ".")]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingTool, match=rf"{name}, which is not installed.*\[track\]"):
        EXPORTERS[name](small, tmp_path)


def test_tensorboard_reads_back_what_was_written(plant, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    (path,) = EXPORTERS["tensorboard"](folder, tmp_path / "out")
    events = EventAccumulator(str(path)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 61))
    assert [event.value for event in losses] == pytest.approx(folder.steps(folder.runs[0].run_id)["loss"].tolist())


def test_wandb_receives_every_step_once_and_stays_offline(plant, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **given: calls.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    EXPORTERS["wandb"](folder, tmp_path / "out")
    assert calls[0]["mode"] == "offline" and calls[0]["id"] == folder.runs[0].run_id and calls[-1] == "finished"
    assert [step for step, _ in calls[1:-1]] == list(range(1, 61))


def test_every_format_of_the_command_line_has_an_exporter():
    from report.arguments import EXPORTS

    assert tuple(EXPORTERS) == EXPORTS
    with pytest.raises(MissingTool):
        need("no_such_module_here", "dev", "this test")
