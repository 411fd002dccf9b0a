"""Names, links, secrets and code that somebody planted: refused, not followed, not kept, not run."""

import ast
import base64
import gzip
import json
import os
import zlib
from pathlib import Path

import pytest

from bench_cases.data.documents import DataError
from bench_cases.data.tokenizer import TokenizerSpec, _from_library
from bench_cases.lookup import BadDeclaration
from bench_cases.own import case_for_model
from harness import cli
from harness.exit_codes import USAGE
from harness.inspect.findings import _trace
from instrument.results.contents import NoResults, load
from instrument.results.folder import OutputError, RunFolder, finished_run, finished_runs
from instrument.results.layout import RunFiles, RunNotFound, locate
from instrument.results.read import RunUnreadable, run_record
from instrument.results.schemas import RecordError, RunRecord, StepRecord, decode
from tests.harness.commands import Forked
from tests.soak.reliability.planted_secrets import SECRETS, hits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "instrument", "report", "bench_cases", "kernels")


def sources() -> list[tuple[str, ast.AST]]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def calls(tree: ast.AST, *names: str):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_no_code_comes_with_models_or_tensors():
    found = 0
    for path, tree in sources():
        for node, given in calls(tree, "from_pretrained"):
            found += 1
            assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
        for node, given in calls(tree, "load"):
            if ast.unparse(node.func) == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", path
    assert found >= 5, "the scan saw no model being loaded"


def test_a_model_folder_with_code_in_it_runs_none_of_it(tmp_path, capsys):
    """``auto_map`` makes transformers import a file of the folder, where it may."""
    model, ran = tmp_path / "model", tmp_path / "the code ran"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nfrom transformers import GPT2Config as Evil\n")
    (model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "evil.Evil",
                    "AutoModelForCausalLM": "evil.Evil",
                    "AutoTokenizer": ["evil.Evil", None],
                },
                "vocab_size": 300,
            }
        )
    )
    code = cli.main(
        [
            "case",
            "--model",
            str(model),
            "--task",
            "clm",
            "fp32_true",
            "--preset",
            "tiny",
            "--data",
            "embedded",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code != 0 and not ran.exists()
    assert len(capsys.readouterr().err) > 0


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", ".hidden", "a b", "x" * 300])
def test_a_case_whose_name_is_no_file_name_is_refused(tmp_path, capsys, name):
    (tmp_path / "own.py").write_text(
        f"from dataclasses import replace\nfrom bench_cases import CASES\nEVIL = replace(CASES['gpt2_clm'], id={name!r})\n"
    )
    code = cli.main(
        [
            "case",
            f"{tmp_path / 'own.py'}:EVIL",
            "fp32_true",
            "--preset",
            "tiny",
            "--data",
            "embedded",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == USAGE
    assert "id must be 1 to 80 letters, digits and underscores" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["own.py"]


def test_a_model_type_cannot_name_files_either(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "../../escaped"}')
    with pytest.raises(BadDeclaration, match="letters, digits and underscores"):
        case_for_model(str(tmp_path), "clm")


def row(run_id: str = "a", **changed) -> bytes:
    fields = {
        "schema": 1,
        "run_id": run_id,
        "case": "gpt2_clm",
        "scenario": "A",
        "arch": "gpt2",
        "task": "clm",
        "loss": "cross_entropy",
        "loss_reduction": "mean",
        "dtype_config": "fp32_true",
        "seed": 0,
        "preset": "tiny",
        "device": "cpu",
        "data_source": "embedded",
        "weights_source": "scratch",
        "status": "completed",
        "max_steps": 1,
        "batch_size": 1,
        "micro_batch": 1,
        "seq_len": 8,
    }
    return json.dumps(fields | changed).encode() + b"\n"


@pytest.mark.parametrize("run_id", ["../../x", "/etc/passwd", "..", "", "a/b", "a\n", "x" * 300])
def test_a_row_with_an_unsafe_id_is_no_row(run_id):
    decode(row(), RunRecord)
    with pytest.raises(RecordError, match="no safe file name"):
        decode(row(run_id), RunRecord)


def test_run_folders_refuse_unsafe_ids_and_links(tmp_path):
    with pytest.raises(ValueError, match="no safe file name"):
        RunFolder(tmp_path / "out", "../x")
    for link in ("runs", "training_logs", "runs/a"):
        out = tmp_path / link.replace("/", "-")
        (out / link).parent.mkdir(parents=True)
        (tmp_path / "outside").mkdir(exist_ok=True)
        (out / link).symlink_to(tmp_path / "outside")
        with pytest.raises(OutputError, match="is a link, and links in a results folder are not followed"):
            RunFolder(out, "a")
        assert not list((tmp_path / "outside").iterdir())


@pytest.fixture
def linked(tmp_path) -> Path:
    """A results folder with a real run ``real`` and, outside, a run that links of all kinds lead to."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    for folder, run_id in ((out, "real"), (outside, "a")):
        (folder / "runs" / run_id).mkdir(parents=True)
        (folder / "runs" / run_id / "run.json").write_bytes(row(run_id, status="completed"))
        (folder / "training_logs").mkdir()
    (outside / "runs" / "a" / "events.jsonl").write_bytes(
        b'{"schema":1,"step":1,"kind":"warning","detail":{"secret":"outside"}}\n'
    )
    (out / "runs" / "a").symlink_to(outside / "runs" / "a")
    (out / "runs" / "b").mkdir()
    (out / "runs" / "b" / "run.json").symlink_to(outside / "runs" / "a" / "run.json")
    (out / "runs" / "real" / "events.jsonl").symlink_to(outside / "runs" / "a" / "events.jsonl")
    (out / "machine.json").symlink_to(outside / "runs" / "a" / "run.json")
    return out


def test_links_in_a_results_folder_are_not_followed_by_the_harness(linked):
    assert [record.run_id for record in finished_runs(linked)] == ["real"]
    assert finished_run(linked, "a") is None and finished_run(linked, "../outside") is None
    with pytest.raises(RunNotFound):
        locate("a", linked)
    with pytest.raises(RunUnreadable, match="is a link"):
        run_record(RunFiles(linked, "b"))


def test_links_in_a_results_folder_are_not_followed_by_the_report(linked):
    folder = load(linked)
    assert [run.run_id for run in folder.runs] == ["real"] and folder.machine == {}
    assert folder.events("real") == []
    named = {defect.file for defect in folder.defects if "is a link" in defect.what}
    assert named == {"runs/a/run.json", "runs/b/run.json", "runs/real/events.jsonl", "machine.json"}
    (linked / "runs" / "real" / "run.json").unlink()
    with pytest.raises(NoResults):
        load(linked)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../machine.json", "link"])
def test_a_file_name_in_a_log_leads_nowhere_else(tmp_path, name):
    (tmp_path / "traces").mkdir()
    (tmp_path / "machine.json").write_text("{}")
    (tmp_path / "traces" / "link").symlink_to("/etc/passwd")
    (tmp_path / "traces" / "a.json.gz").write_bytes(b"")
    run = RunFiles(tmp_path, "a")
    assert _trace(run, name) is None and _trace(run, "a.json.gz") == str(tmp_path / "traces" / "a.json.gz")


@pytest.mark.process
def test_secrets_of_the_environment_are_in_no_artefact(tmp_path):
    """A real run that diverges, so that snapshot, forensics and trace are written too; every byte is looked at."""
    out = tmp_path / "out"
    words = [
        "case",
        "gpt2_multi_cls",
        "fp16_naive",
        "--preset",
        "tiny",
        "--data",
        "embedded",
        "--max-steps",
        "3",
        "--batch-size",
        "4",
        "--micro-batch",
        "2",
        "--seq-len",
        "32",
        "--documents",
        "400",
        "--validation-documents",
        "4",
        "--trace",
        "1",
        "--out",
        str(out),
        "--json",
    ]
    process = Forked(words, tmp_path / "command", {**os.environ, **SECRETS})
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    run_id = json.loads(printed)["run_id"]
    (tmp_path / "empty").mkdir()
    artefacts = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {
        "run.json",
        "results.jsonl",
        "machine.json",
        f"run_{run_id}.jsonl",
        "hardware.jsonl",
        "forensics.json",
        "tensors.safetensors",
        "culprit.safetensors",
        f"{run_id}-step1.json.gz",
    } <= {p.name for p in artefacts}
    for path, content in (artefacts | {Path("stdout"): printed.encode(), Path("stderr"): errors.encode()}).items():
        assert hits(content) == [], path
    steps = (out / "training_logs" / f"run_{run_id}.jsonl").read_bytes().splitlines()
    assert steps and all(decode(line, StepRecord) for line in steps)


def test_the_search_for_secrets_finds_them_packed_too():
    secret = SECRETS["HF_TOKEN"].encode()
    stream = b"%PDF-1.7\n1 0 obj\n<< /Filter /FlateDecode >>\nstream\n" + zlib.compress(secret) + b"\nendstream\n"
    uri = b"data:image/png;base64," + base64.b64encode(b"-" * 31 + secret)
    for content in (secret, b"the name HF_TOKEN alone", gzip.compress(secret), stream, uri):
        assert hits(b"." * (content is secret) + content) == ["holds HF_TOKEN"]
    assert hits(b"nothing") == []


def test_no_result_reads_the_environment_as_a_whole():
    """The variables that are read are named ones; copies of all go to child processes only."""
    allowed = {
        "benchmarks/whole_runs.py",
        "tests/soak/reliability/planted_secrets.py",
        "tests/soak/reliability/ranks.py",
        "benchmarks/report.py",
    }
    named = ("os.environ.get", "os.environ.setdefault", "os.environ.pop", "os.environ[")
    for path, tree in sources():
        for parent in ast.walk(tree) if path not in allowed else ():
            for child in ast.iter_child_nodes(parent):
                if isinstance(child, ast.Attribute) and ast.unparse(child) == "os.environ":
                    assert ast.unparse(parent).startswith(named), f"{path}:{child.lineno}"


def test_a_data_folder_with_a_tokenizer_s_code_runs_none_of_it(tmp_path):
    ran = tmp_path / "the code ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with pytest.raises(DataError):
        _from_library(TokenizerSpec(str(tmp_path), {"kind": "folder"}))
    assert not ran.exists()
