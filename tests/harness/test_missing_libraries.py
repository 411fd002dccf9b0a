"""On a machine without the optional libraries: configurations and chapters are missing there, nothing else."""

import gzip
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

BLOCKER = """
import importlib.machinery, importlib.metadata, os
BLOCKED = set(os.environ["BLOCKED"].split())
find, distribution = importlib.machinery.PathFinder.find_spec, importlib.metadata.distribution
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in BLOCKED else find(name, path, target)
def absent(name):
    if name in BLOCKED:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
importlib.machinery.PathFinder.find_spec, importlib.metadata.distribution = staticmethod(find_spec), absent
"""
OPTIONAL = "datasets bitsandbytes weasyprint tyro ray wandb tensorboard"


@pytest.fixture
def without(tmp_path):
    """``without("datasets ...", "harness", "case", ...)``: a command where these packages are not installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)

    def run(names, *arguments):
        path = os.pathsep.join((str(tmp_path / "site"), os.getcwd()))
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "BLOCKED": names},
        )

    return run


@pytest.fixture
def folder(tmp_path):
    """A data folder such as a person brings to a machine without a network."""
    data = tmp_path / "data"
    data.mkdir()
    words = "the council shall adopt measures on fishing quotas and customs duties within the meaning of article"
    rows = [{"id": str(n), "text": f"{words} {n} " * 8, "labels": [f"l{n % 3}", f"l{n % 5}"]} for n in range(60)]
    for name, fields in (("eurlex", ("id", "text", "labels")), ("openwebtext", ("text",))):
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({field: row[field] for field in fields}) + "\n" for row in rows)
    return data


def test_a_data_folder_needs_no_optional_library(without, folder, tmp_path):
    out = tmp_path / "out"
    sizes = ("--preset", "tiny", "--max-steps", "3", "--batch-size", "2", "--seq-len", "16", "--validation-documents", "2")
    done = without(
        OPTIONAL,
        "harness",
        "matrix",
        "--cases",
        "gpt2_multi_cls",
        "--configs",
        "fp32_true",
        "amp_bf16_8bit",
        *sizes,
        "--data",
        str(folder),
        "--out",
        str(out),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = {row["dtype_config"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["fp32_true"]["status"] == "completed" and rows["fp32_true"]["env"]["datasets_version"] is None
    assert rows["amp_bf16_8bit"]["status"] == "unsupported" and "needs bitsandbytes" in rows["amp_bf16_8bit"]["error"]

    built = without(OPTIONAL, "report", "build", str(out), "--format", "svg")
    assert built.returncode == 0 and "no dossier.pdf: no PDF without WeasyPrint" in built.stderr, built.stderr
    html = (out / "dossier" / "index.html").read_text()
    assert "unsupported" in html and not (out / "dossier" / "dossier.pdf").exists()


def test_a_campaign_without_the_hubs_library_says_what_to_give_instead(without, tmp_path):
    done = without("datasets", "harness", "campaign", "--preset", "full", "--device", "cpu", "--results", str(tmp_path / "r"))
    assert done.returncode == 5 and "--data hub needs the package datasets" in done.stderr and "--data DIR" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", [("harness", "campaign", "--preset", "tiny"), ("report", "verdict", ".")])
def test_a_core_library_that_is_missing_is_one_sentence(without, command):
    done = without("msgspec", *command)
    assert done.returncode == 5 and "the package msgspec is not installed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
