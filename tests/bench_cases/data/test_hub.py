"""The hub's loading code, offline: a local folder in the hub's layout, a script-only set, a hub that is away."""

import os
import subprocess
import sys
import time

import pytest

from bench_cases.data import DataError, DataUnavailable, fingerprint, hub, load_data

NAMES = ["100163", "100168", "100169"]
README = (
    "---\nconfigs:\n- config_name: eurlex\n  data_files:\n"
    + "".join(f"  - split: {split}\n    path: eurlex/{split}-*\n" for split in ("train", "validation", "test"))
    + "---\n"
)


@pytest.fixture(autouse=True)
def hub_home(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


def lex_glue(folder, sizes=(12, 4, 4)):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, List, Value

    (folder / "eurlex").mkdir(parents=True)
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=NAMES))})
    for split, n in zip(("train", "validation", "test"), sizes, strict=True):
        labels = [[0, 1 + i % 2] if i % 4 else [] for i in range(n)]
        rows = {"text": [f"Council regulation {i} on {split}" if i else "" for i in range(n)], "labels": labels}
        table = Dataset.from_dict(rows, features=features).data.table
        pq.write_table(pa.table(table), folder / "eurlex" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(README)
    return folder


def test_a_stand_in_repository(tmp_path, cache_dir):
    options = {"arch": "other", "task": "multi_cls", "cache_dir": cache_dir}
    source = f"hub:{lex_glue(tmp_path / 'repo')}"
    data = load_data(source, **options)
    # Names, not ClassLabel numbers, by frequency. The empty document of each split is left out.
    assert data.label_names == ("100163", "100169", "100168")
    assert data.facts["documents"] == {"train": 11, "validation": 3, "test": 3}
    assert data.facts["empty_documents_excluded"] == 3
    # Documents that end with no label are legal here: a row of negatives, and no single-label target.
    assert data.facts["documents_without_labels"]["train"] == 2 == data.facts["single_label_excluded"]["train"]
    # Downloaded once: with the repository changed under another request, our copy is not asked.
    snapshots = list((cache_dir / "hub").iterdir())
    load_data(source, **options, max_documents=5)
    assert list((cache_dir / "hub").iterdir()) == snapshots


def test_a_local_folder_that_changes_is_read_again(tmp_path):
    import shutil

    options = {"arch": "other", "task": "multi_cls"}
    repo = lex_glue(tmp_path / "repo")
    before = fingerprint(f"hub:{repo}", **options)
    shutil.rmtree(repo)
    lex_glue(repo, (13, 4, 4))
    assert fingerprint(f"hub:{repo}", **options) != before


def test_openwebtext_is_streamed_and_split(tmp_path, cache_dir, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The library waits 5 s for Arrow's threads at the end of a shuffled stream.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    folder = tmp_path / "owt" / "plain_text"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"web page {i}" for i in range(60)]}), folder / "train-00000-of-00001.parquet")
    options = {"arch": "other", "task": "clm", "max_documents": 30, "validation_documents": 5}
    data = load_data(f"hub:{folder.parent}", cache_dir=cache_dir, **options)
    assert data.facts["documents"] == {"train": 30, "validation": 5, "test": 0}
    again = load_data(f"hub:{folder.parent}", cache_dir=tmp_path / "other", **options)
    assert data.fingerprint == again.fingerprint, "the shuffle is seeded"


def test_a_script_only_repository_falls_back_to_its_parquet_branch(tmp_path, cache_dir, monkeypatch):
    import datasets

    real, repo, calls = datasets.load_dataset, lex_glue(tmp_path / "repo"), []

    def load_dataset(name, config=None, revision=None, data_dir=None, **options):
        calls.append(revision)
        if revision != hub.PARQUET_BRANCH:
            raise RuntimeError("Dataset scripts are no longer supported, but found lex_glue.py")
        return real(str(repo), data_dir, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "commit_of", lambda *a: "c0ffee")
    monkeypatch.setattr(hub, "KNOWN", {**hub.KNOWN, "eurlex": (hub.Repository("coastalcph/lex_glue", "eurlex"),)})
    data = load_data("hub", arch="other", task="multi_cls", cache_dir=cache_dir)
    assert calls == ["main", hub.PARQUET_BRANCH] and data.facts["commit"] == "c0ffee"


def test_a_label_count_that_is_not_the_known_one(tmp_path, cache_dir, monkeypatch):
    import datasets

    real, repo = datasets.load_dataset, lex_glue(tmp_path / "repo")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: real(str(repo), "eurlex"))
    monkeypatch.setattr(hub, "commit_of", lambda *a: "c0ffee")
    with pytest.raises(DataError, match="3 labels, 100 expected"):
        load_data("hub", arch="other", task="multi_cls", cache_dir=cache_dir)


def test_names(cache_dir):
    eurlex = hub.Wanted.parse("hub", "eurlex", None, None)
    assert (eurlex.repository.name, eurlex.repository.config, eurlex.documents) == ("coastalcph/lex_glue", "eurlex", None)
    other = hub.Wanted.parse("hub:NLP-AUEB/eurlex@abc", "eurlex", None, None)
    assert (other.repository.config, other.revision) == ("eurlex57k", "abc")
    with pytest.raises(DataError, match="a repository must follow"):
        hub.Wanted.parse("hub:", "eurlex", None, None)


AWAY = """
import sys
from bench_cases.data import DataUnavailable, load_data
own = {"task": "clm", "source": "embedded", "tokenizer": "openai-community/gpt2"}
for options in ({"task": "multi_cls"}, {"task": "clm"}, own):
    try:
        load_data(options.pop("source", "hub"), arch="gpt2", **options)
    except DataUnavailable as error:
        print(error)
        assert "--data embedded" in str(error) and "--data DIR" in str(error) and len(str(error).splitlines()) == 1
    else:
        sys.exit("no error")
"""


@pytest.mark.process
@pytest.mark.parametrize("how", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=["closed", "offline"])
def test_a_hub_that_cannot_be_reached_is_a_quick_clear_error(how, tmp_path):
    start = time.perf_counter()
    where = {"HF_HOME": str(tmp_path / "home"), "DDB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", AWAY], capture_output=True, text=True, env={**os.environ, **where, **how}, timeout=120
    )
    print(f"\n{time.perf_counter() - start:.1f} s\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_unavailable_is_no_bad_data():
    assert not issubclass(DataUnavailable, DataError)
