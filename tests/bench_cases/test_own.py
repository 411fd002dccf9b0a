"""Cases from outside the project."""

from dataclasses import replace

import pytest

from bench_cases import CASES, DTYPE_CONFIGS, BadDeclaration, UnknownId
from bench_cases.own import case_for_model, find_case
from harness.settings import Request, resolve

OWN = """
from bench_cases import CASES
from dataclasses import replace
CASE = replace(CASES["gpt2_clm"], id="gpt2_clm_mine", lr=replace(CASES["gpt2_clm"].lr, scratch=5e-4))
NOT_A_CASE = 3
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "mycase.py"
    path.write_text(OWN)
    return path


def test_a_case_from_a_file(own_file):
    case = find_case(f"{own_file}:CASE")
    assert case.id == "gpt2_clm_mine" and case.lr.scratch == 5e-4


def test_how_a_case_was_named_is_kept_and_changes_no_run_id(own_file, tmp_path):
    case = find_case(f"{own_file}:CASE")
    assert case.spelled == (f"{own_file}:CASE",) and CASES["gpt2_clm"].spelled == ()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 256}')
    assert case_for_model(str(tmp_path), "clm").spelled == ("--model", str(tmp_path), "--task", "clm")
    run, again = (
        resolve(c, DTYPE_CONFIGS["amp_fp16"], 0, Request(), device="cpu", data_fingerprint="")
        for c in (case, replace(case, spelled=("elsewhere.py:CASE",)))
    )
    assert run.run_id == again.run_id and "spelled" not in run.as_config()["case"]


def test_what_is_wrong_with_a_file_is_said(own_file, tmp_path):
    with pytest.raises(UnknownId, match="has no 'OTHER'"):
        find_case(f"{own_file}:OTHER")
    with pytest.raises(BadDeclaration, match="is of type int; it must be a bench_cases.Case"):
        find_case(f"{own_file}:NOT_A_CASE")
    with pytest.raises(UnknownId, match=r"no file .*nothing.py"):
        find_case(f"{tmp_path}/nothing.py:CASE")
    with pytest.raises(BadDeclaration, match="names a file and no case in it"):
        find_case(f"{own_file}:")
    leaves = tmp_path / "leaves.py"
    leaves.write_text("raise SystemExit(3)")
    with pytest.raises(BadDeclaration, match="leaves.py cannot be imported: SystemExit: 3"):
        find_case(f"{leaves}:CASE")
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('boom')")
    with pytest.raises(BadDeclaration, match="RuntimeError: boom"):
        find_case(f"{broken}:CASE")


def test_a_model_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(BadDeclaration, match=r"no config.json"):
        case_for_model(str(tmp_path), "clm")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadDeclaration, match="not JSON"):
        case_for_model(str(tmp_path), "clm")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadDeclaration, match="names no model_type"):
        case_for_model(str(tmp_path), "clm")
