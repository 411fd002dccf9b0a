"""The command line: exit codes, one-line errors, JSON on standard output."""

import json
import subprocess
import sys
import time

import pytest

from report import errors
from report.cli import main


def run(capsys, *argv):
    code = main(list(map(str, argv)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def strict(text):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_exit_codes_are_the_harness_own():
    from harness import exit_codes as theirs

    ours = {name: value for name, value in vars(errors).items() if name.isupper()}
    assert ours and all(getattr(theirs, name) == value for name, value in ours.items())


@pytest.mark.parametrize("command", ["verdict", "validate", "build", "compare", "export"])
def test_a_missing_folder_is_a_usage_error_in_one_line(capsys, tmp_path, command):
    rest = {"compare": [tmp_path / "other"], "export": ["--to", "csv"]}.get(command, [])
    code, out, err = run(capsys, command, tmp_path / "nothing", *rest)
    assert code == 2 and out == "" and err.count("\n") == 1 and "does not exist" in err and "results/" in err


@pytest.mark.parametrize("command", ["verdict", "validate", "build"])
def test_a_folder_without_a_valid_run_is_bad_data(capsys, tmp_path, command):
    (tmp_path / "results.jsonl").write_text("{torn")
    code, _, err = run(capsys, command, tmp_path)
    assert code == 4 and "no valid run" in err


def test_validate_exits_4_with_a_list_when_anything_is_wrong_and_0_otherwise(capsys, small):
    assert run(capsys, "validate", small.path)[::2] == (0, "12 valid runs, 0 defects\n")
    (small.path / "machine.json").write_text("[]")
    log = next((small.path / "training_logs").iterdir())
    log.write_bytes(log.read_bytes()[:-5])
    code, out, err = run(capsys, "validate", small.path, "--json")
    assert code == 4 and err == ""
    content = strict(out)
    assert content["runs"] == 12 and [d["line"] for d in content["defects"]] == [None, 60]
    code, _, err = run(capsys, "validate", small.path)
    assert code == 4 and f"{log.name}:60: " in err


def test_validate_lists_what_is_wrong_with_a_folder_of_rubbish(capsys, tmp_path):
    (tmp_path / "results.jsonl").write_text("{torn\n[]\n")
    code, out, _ = run(capsys, "validate", tmp_path, "--json")
    assert code == 4 and len(strict(out)["defects"]) == 2


def test_verdict_speaks_words_or_json(capsys, small):
    code, out, err = run(capsys, "verdict", small.path)
    assert code == 0 and err == "" and "2 seeds" in out and "claims" in out
    content = strict(run(capsys, "verdict", small.path, "--json")[1])
    assert content["cases"][0]["use"] is None and content["marks"] == ["SIMULATED"] and content["n_seeds"] == 2


def test_compare_and_export_speak_json(capsys, small, plant, tmp_path):
    other = plant(("gpt2_clm",), ("fp32_true",), change=lambda *_: {"device": "other"}, name="other")
    content = strict(run(capsys, "compare", small.path, other.path, "--json")[1])
    assert content["devices"] == ["planted", "other"] and any(row["over_first"] for row in content["rows"])
    content = strict(run(capsys, "export", small.path, "--to", "bencher", "--out", tmp_path / "b", "--json")[1])
    assert content["paths"] == [str(tmp_path / "b" / "bencher.json")]


def test_export_goes_beside_the_results_by_default(capsys, small):
    code, _, err = run(capsys, "export", small.path, "--to", "latex")
    assert code == 0 and (small.path / "export" / "latex" / "stability.tex").is_file() and "export/latex" in err


def test_an_importer_without_logs_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "import", "dtype-bench", tmp_path, "--out", tmp_path.parent / "never")
    assert code == 2 and "no run of dtype-bench" in err and not (tmp_path.parent / "never").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["build", "x", "--format", "bmp"], "none of svg, png, pdf, eps"),
        (["build", "x", "--dpi", "0"], "above 0"),
        (["verdict", "x", "--price-per-hour", "-1"], "no price above 0"),
        (["build", "x", "--price-per-hour", "nan"], "no price above 0"),
        (["build", "x", "--currency", "1 EUR"], "no currency's word"),
        (["export", "x"], "--to"),
        (["export", "x", "--to", "xml"], "invalid choice"),
        ([], "command"),
        (["import", "x"], "invalid choice"),
    ],
)
def test_wrong_options_say_what_is_allowed(capsys, argv, says):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "verdict", "validate", "compare", "import", "export"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0 and "usage: python -m report" in capsys.readouterr().out


@pytest.mark.process
def test_help_loads_neither_pandas_nor_matplotlib():
    code = (
        "import sys; from report.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('pandas', 'matplotlib', 'numpy', 'torch', 'rich')))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 5


def test_a_defect_of_ours_is_not_hidden(monkeypatch, small):
    monkeypatch.setattr("report.verdict.verdict_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["verdict", str(small.path)])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["verdict", "--currency", "EUR"], "--currency EUR says nothing without --price-per-hour"),
        (["build", "--heartbeat", "fp8"], "no run of fp8 for the heartbeat; this folder has fp32_true"),
    ],
)
def test_options_that_contradict_the_folder_or_each_other_are_refused_before_anything_is_written(capsys, small, argv, says):
    code, _, err = run(capsys, argv[0], small.path, *argv[1:])
    assert code == 2 and says in err and len(err.splitlines()) == 1 and not (small.path / "plots").exists()


@pytest.mark.process
def test_a_price_stands_on_the_page_and_in_the_summary(capsys, plant):
    folder = plant(("gpt2_clm",), ("fp32_true", "bf16_pure"), change=lambda *_: {})
    assert (
        run(
            capsys,
            "build",
            folder.path,
            "--no-pdf",
            "--format",
            "svg",
            "--price-per-hour",
            "2.5",
            "--currency",
            "EUR",
            "--heartbeat",
            "bf16_pure",
        )[0]
        == 0
    )
    assert "EUR per million samples" in (folder.path / "dossier" / "index.html").read_text()
    saved = json.loads((folder.path / "summary.json").read_text())["verdict"]
    assert (saved["price_per_hour"], saved["currency"]) == (2.5, "EUR")
    assert "bf16_pure" in (folder.path / "plots" / "d_grad_norm_heartbeat.csv").read_text()


@pytest.mark.process
def test_without_weasyprint_the_page_is_built_and_a_line_says_what_is_missing(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setattr("report.dossier.page.find_spec", lambda name: None)
    code, out, err = run(capsys, "build", small.path, "--format", "svg", "--out", tmp_path)
    assert "not decided: H1 needs single- and multi-label runs" in err
    assert code == 0 and (tmp_path / "dossier" / "index.html").is_file() and not (tmp_path / "dossier" / "dossier.pdf").exists()
    assert err.startswith("report: no dossier.pdf: no PDF without WeasyPrint: install weasyprint")
    assert str(tmp_path / "dossier" / "index.html") in err and "--no-pdf" in err


@pytest.mark.parametrize("words", [["build", "--no-pdf"], ["export", "--to", "csv"]])
def test_a_file_where_the_output_should_go_is_one_sentence(capsys, small, tmp_path, words):
    (tmp_path / "file").write_text("mine")
    assert main([words[0], str(small.path), *words[1:], "--out", str(tmp_path / "file")]) == errors.ENVIRONMENT
    said = capsys.readouterr().err
    assert said.startswith(f"report: cannot use {tmp_path / 'file'}") and said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
