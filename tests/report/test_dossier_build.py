"""The whole dossier of a small simulated campaign: order, links, self-containment, determinism, hostile content."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import msgspec
import pytest

from benchmarks.simulated_results import simulate
from instrument.results.contents import load
from instrument.results.schemas import RunRecord, decode, encode
from report.dossier import build
from report.dossier.page import PdfUnavailable

pytestmark = pytest.mark.slow

SECTIONS = ["decision", "trust", "summary", "hypotheses", "failures", "time", "hardware", "runs", "methods", "reproduce"]
NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "$\\frac{$",
    "a\x00b",
    "\u202eevil",
    "{{ 7*7 }}{% raw %}",
    "file:///etc/passwd",
    "x" * 1_000_000,
    "'\"><svg onload=alert(1)>",
    "=1+1",
)


class Page(HTMLParser):
    """Ids, hrefs, and every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if attrs.get(name) is not None]


@pytest.fixture(scope="module")
def page(built):
    return Page((built / "dossier" / "index.html").read_text())


def test_sections_come_in_order(page):
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == SECTIONS
    contents = [attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs.get("href", "")[1:] in SECTIONS]
    assert contents[: len(SECTIONS) + 1] == ["#decision", *(f"#{name}" for name in SECTIONS)]


def test_ids_are_unique_and_every_link_inside_leads_somewhere(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    inside = [href[1:] for href in [*page.values("href"), *page.values("xlink:href")] if href.startswith("#")]
    assert len(inside) > 100 and set(inside) <= set(ids)


def test_links_to_files_lead_to_files_that_are_there(page, built, simulated):
    outside = {href for href in page.values("href") if not href.startswith(("#", "data:"))}
    assert outside and all(href.startswith("../") for href in outside)
    for href in outside:
        assert (built / "dossier" / href).resolve().exists() or (simulated / href[3:]).exists(), href


def test_the_page_loads_nothing_and_forbids_it(page):
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "'unsafe-eval'" not in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)
    assert not page.values("src") and not [tag for tag, _ in page.elements if tag in ("iframe", "object", "embed", "form")]
    assert sum(tag == "script" for tag, _ in page.elements) == 1


def test_every_claim_cites_rows_and_every_row_is_there(page, simulated):
    n = len(load(simulated).runs)
    rows = [attrs["id"] for tag, attrs in page.elements if tag == "tr" and "id" in attrs]
    assert rows == [f"row-{number}" for number in range(1, n + 1)]
    assert sum(href.startswith("#row-") for href in page.values("href")) > 20


def test_figures_carry_the_mark_and_all_eight_are_inline(page, built):
    labels = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    assert {label[:2] for label in labels} >= {f"{letter}:" for letter in "ABCDEFGH"}
    for letter in "ABCDEFGH":
        svg = next(built.glob(f"plots/{letter.lower()}_*.svg")).read_text()
        assert "SIMULATED" in svg and "@font-face" in svg
        assert next(built.glob(f"plots/{letter.lower()}_*.csv")).stat().st_size > 40


def test_what_is_not_measured_says_so_in_a_line(page):
    words = " ".join("".join(page.words).split())
    for missing in (
        "no run holds a profile",
        "kernels.json is not in this folder",
        "no run holds a hardware.jsonl",
        "no run holds an activations.jsonl",
        "overhead.json is not in this folder",
    ):
        assert missing in words, missing


def test_the_summary_is_strict_json_with_the_same_claims(built):
    def refuse(name):
        raise AssertionError(name)

    summary = json.loads((built / "summary.json").read_text(), parse_constant=refuse)
    assert [finding["id"] for finding in summary["findings"]] == ["H1", "H2", "H3", "P1", "P2", "P3", "P4"]
    assert summary["marks"] == ["SIMULATED"] and set("ABCDEFGH") <= set(summary["figures"])


@pytest.mark.process
def test_another_process_gives_the_same_bytes(simulated, built, tmp_path):
    command = [sys.executable, "-m", "report", "build", str(simulated), "--out", str(tmp_path), "--no-pdf", "--format", "svg"]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    for path in sorted(path for path in built.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(built)).read_bytes(), path.name


def test_originals_are_not_touched(simulated, built):
    assert not (simulated / "plots").exists() and not (simulated / "dossier").exists()


def plant_hostile_rows(place) -> None:
    """Every free-text field of every run holds something nasty; so do extra files."""
    lines = []
    for number, path in enumerate(sorted((place / "runs").glob("*/run.json"))):
        nasty = NASTY[number % len(NASTY)]
        row = decode(path.read_bytes(), RunRecord)
        row = msgspec.structs.replace(
            row,
            error=nasty,
            device=NASTY[0],
            data_source=nasty[:9_000],
            weights_source=nasty[:9_000],
            env={"gpu": nasty, nasty[:200]: nasty},
            flags=row.flags
            | {
                "trace": {"steps": 1},
                "time_by_kernel": {
                    "source": nasty,
                    "idle_s": nasty,
                    "seconds": {nasty: {nasty: 1.0}, "copy": nasty},
                    "top": [{"name": nasty, "total_s": 1.0, "phase": nasty, "input_shapes": [nasty]}],
                },
            },
            peak_flops_source=nasty,
            config={**row.config, "preset": nasty, "lr": nasty},
        )
        if row.dtype_config == "amp_fp16":
            row = msgspec.structs.replace(row, dtype_config=f"amp_fp16{nasty}")
        path.write_bytes(encode(row) + b"\n")
        lines.append(encode(row) + b"\n")
    (place / "results.jsonl").write_bytes(b"".join(lines) + b'{"torn')
    dead = next(path for path in sorted((place / "runs").iterdir()) if "gpt2_clm-fp16_naive" in path.name)
    (dead / "forensics.json").write_text(
        json.dumps(
            {
                "sentence": NASTY[0],
                "trace_file": NASTY[2],
                "remedies": [{"change": NASTY[1], "survives": True, "step_time_ratio": "x"}],
                "chain": [{"module": NASTY[0], "phase": NASTY[3]}],
                "kernels": [{"name": NASTY[9], "duration_s": 1e-6}, "text"],
            }
        )
    )
    (place / "predictions").mkdir()
    (place / "predictions" / "gpt2_clm.json").write_text(
        json.dumps(
            {
                "references": [
                    {
                        "configs": [
                            {
                                "run_id": dead.name,
                                "ends": {"kind": NASTY[0], "module": NASTY[1], "step": 1},
                                "happened": NASTY[9],
                                "outcomes": [{"kind": nasty, "verdict": "predicted and happened"} for nasty in NASTY],
                            }
                        ]
                    }
                ]
            }
        )
    )
    (place / "overhead.json").write_text(
        json.dumps(
            {
                "device": NASTY[0],
                "what": NASTY[3],
                "simulated": True,
                "rows": [{"name": nasty, "unit": "ratio", "median": 1.0, "note": nasty} for nasty in NASTY],
                "wall_s": {"bare": [1.0, 2.0], "light": [1.0, 2.0]},
            }
        )
    )
    (place / "kernels.json").write_text(json.dumps({"rows": [{"op": NASTY[0], "case": NASTY[1], "time_s": 1e-6}, 3]}))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile") / "results"
    simulate(place, seeds=1, steps=60)
    plant_hostile_rows(place)
    return build(load(place), place, pdf=False, formats=("svg",), dpi=72)


@pytest.mark.process
def test_hostile_content_stays_text(hostile):
    path = next(path for path in hostile.paths if path.name == "index.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    handlers = [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not handlers and not page.values("src")
    assert not [href for href in page.values("href") if href.split(":")[0] in ("javascript", "file", "http", "https")]
    assert "alert(1)" in " ".join(page.words) and "{{ 7*7 }}" in " ".join(page.words)
    assert path.stat().st_size < 6e6 and "\x00" not in path.read_text() and "\u202e" not in path.read_text()


@pytest.mark.process
def test_hostile_cells_are_neutralised_and_defects_counted(hostile):
    cells = [
        cell
        for path in hostile.paths
        if path.suffix == ".csv"
        for line in path.read_text().splitlines()
        for cell in line.split(",")
    ]
    assert not [cell for cell in cells if re.match(r'"?[=@]', cell) or re.match(r'"?[+-][^\d.i]', cell)]
    assert any("results.jsonl" in str(defect) for defect in hostile.defects)


@pytest.mark.process
def test_a_folder_with_one_dead_run_gives_a_smaller_dossier_that_says_what_is_missing(tmp_path):
    simulate(tmp_path / "r", seeds=1, steps=8)
    keep = "gpt2_clm-fp16_naive-s0-00000000"
    lines = [line for line in (tmp_path / "r" / "results.jsonl").read_text().splitlines(keepends=True) if keep in line]
    (tmp_path / "r" / "results.jsonl").write_text("".join(lines))
    for path in (tmp_path / "r" / "runs").iterdir():
        if path.name != keep:
            (path / "run.json").unlink()
    result = build(load(tmp_path / "r"), tmp_path / "out", pdf=False, formats=("svg",), dpi=72)
    page = Page(next(path for path in result.paths if path.name == "index.html").read_text())
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == SECTIONS
    words = " ".join("".join(page.words).split())
    assert "No recommendation: there is no fp32_true run to judge by" in words
    assert sum(attrs.get("class") == "missing" for _, attrs in page.elements) >= 6


@pytest.mark.process
def test_the_report_draws_without_torch():
    code = (
        "import sys, report.dossier, report.dossier.page; "
        "print([name for name in ('torch', 'triton', 'transformers', 'weasyprint') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_without_weasyprint_nothing_is_written_and_the_way_out_is_named(simulated, tmp_path, monkeypatch):
    monkeypatch.setattr("report.dossier.page.find_spec", lambda name: None)
    with pytest.raises(PdfUnavailable, match="--no-pdf"):
        build(load(simulated), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_speeds_of_runs_that_no_figure_counts_stand_in_no_table(plant, tmp_path):
    folder = plant(
        ("gpt2_clm",), ("fp32_true", "amp_bf16"), (0,), lambda case, config, seed: {"steps": 8} if config == "amp_bf16" else {}
    )
    build(folder, tmp_path / "out", pdf=False, formats=("svg",))
    page = (tmp_path / "out" / "dossier" / "index.html").read_text()
    utilisation = page[page.index("Model FLOPs utilisation") : page.index("Not measured here")]
    assert "fp32_true" in utilisation and "amp_bf16" not in utilisation
