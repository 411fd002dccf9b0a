"""Small corpora in files, and a cache that belongs to one test."""

import gzip
import json

import pytest


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def write_jsonl():
    """Writes rows as JSON Lines, compressed where the name says so, and returns the path."""

    def write(path, rows):
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
        return path

    return write


@pytest.fixture(scope="session")
def law_rows():
    """Labelled documents of uneven length, three quarters of them training documents."""
    rows = []
    for i in range(40):
        labels = ["3003"] + (["c_871b5612"] if i % 2 else []) + ([f"rare-{i}"] if i % 7 == 0 else [])
        text = f"Regulation {i} on " + "cereals and sugar in the common market " * (1 + i % 5)
        rows.append({"id": f"d{i}", "text": text, "labels": labels, "split": "train" if i < 30 else "validation"})
    return rows


@pytest.fixture
def law_folder(tmp_path, write_jsonl, law_rows):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "eurlex.jsonl.gz", law_rows)
    write_jsonl(folder / "openwebtext.jsonl", [{"text": f"A page about thing {i}. " * (3 + i % 4)} for i in range(30)])
    return folder
