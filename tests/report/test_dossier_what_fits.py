"""What fits, as the dossier prints it: nothing that was not measured has a number."""

import json

from instrument.results.contents import load
from report.dossier import build
from report.dossier.measurements import ABSENT
from report.dossier.what_fits import HEADS, fit_rows

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
    return dict(zip(HEADS, fit_rows({"rows": [row]}, price)[0], strict=False))


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


def test_it_stands_in_the_dossier(plant, tmp_path):
    folder = plant(("gpt2_clm",), ("fp32_true",), (0,))
    for content, says in ((None, "python -m harness fit CASE"), ({"rows": [FOUND]}, "131")):
        if content:
            (folder.path / "fit.json").write_text(json.dumps(content))
        build(load(folder.path), tmp_path / "out", pdf=False, formats=("svg",))
        page = (tmp_path / "out" / "dossier" / "index.html").read_text()
        assert "What fits" in page and says in page[page.index("What fits") :]
