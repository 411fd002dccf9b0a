"""Tokenised data are cached by content and never wrongly reused."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from bench_cases.data import DataError, cache, fingerprint, load_data


def load(source, cache_dir, **options):
    return load_data(str(source), **{"arch": "gpt2", "task": "multi_cls", "cache_dir": cache_dir, **options})


def entries(cache_dir):
    return {p.name for p in (cache_dir / "tokenized").iterdir()}


def test_the_same_request_is_built_once(law_folder, cache_dir):
    first = load(law_folder, cache_dir)
    stamp = os.stat(first.folder / "meta.json").st_mtime_ns
    again = load(law_folder, cache_dir, task="single_cls")
    assert again.folder == first.folder and os.stat(again.folder / "meta.json").st_mtime_ns == stamp
    assert again.fingerprint == first.fingerprint and len(entries(cache_dir)) == 1
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_anything_that_matters_gives_another_entry(law_folder, cache_dir, write_jsonl, law_rows, tmp_path):
    seen = {load(law_folder, cache_dir).folder}

    def is_new(**options):
        folder = load(law_folder, cache_dir, **options).folder
        assert folder not in seen
        seen.add(folder)

    is_new(arch="roberta")
    is_new(max_documents=20)
    is_new(validation_documents=5)
    is_new(arch="roberta", max_documents=20)
    rows = [{**row, "body": row["text"].upper()} for row in law_rows]
    write_jsonl(law_folder / "eurlex.jsonl.gz", rows)
    is_new()
    is_new(text_field="body")
    rows[3]["text"] = rows[3]["text"].replace("cereals", "cereal5", 1)
    write_jsonl(law_folder / "eurlex.jsonl.gz", rows)
    is_new()
    # A tokenizer of one's own, and then one byte of it changed.
    own = tmp_path / "own"
    own.mkdir()
    text = (load(law_folder, cache_dir).folder / "tokenizer.json").read_text()
    (own / "tokenizer.json").write_text(text)
    (own / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}')
    is_new(tokenizer=str(own))
    (own / "tokenizer.json").write_text(text + " ")
    is_new(tokenizer=str(own))


def test_fingerprint_names_the_data_without_building_them(law_folder, cache_dir):
    options = {"arch": "gpt2", "task": "multi_cls"}
    before = fingerprint(str(law_folder), **options)
    assert not cache_dir.exists()
    assert before == fingerprint(str(law_folder), **options)
    assert before != fingerprint(str(law_folder), **options, max_documents=3)
    path = law_folder / "eurlex.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert before != fingerprint(str(law_folder), **options)
    assert fingerprint("embedded", **options) != fingerprint("embedded", arch="gpt2", task="clm")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "meta", "foreign"])
def test_a_damaged_entry_is_built_again(damage, law_folder, cache_dir):
    data = load(law_folder, cache_dir)
    folder, good = data.folder, np.array(data.tokens)
    path = folder / ("meta.json" if damage in ("meta", "foreign") else "tokens.npy")
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
    elif damage == "foreign":
        raw = json.dumps({"key": "0" * 64, "files": {}}).encode()
    else:
        raw = raw[: len(raw) // 2]
    path.unlink()
    if damage != "remove":
        path.write_bytes(bytes(raw))
    again = load(law_folder, cache_dir)
    np.testing.assert_array_equal(again.tokens, good)
    assert cache.read(again.folder, json.loads((again.folder / "meta.json").read_text())["key"]) is not None
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")], "no remains beside it"


def _build(source, cache_dir, barrier, results):
    barrier.wait()
    results.put(load(source, cache_dir).fingerprint)


@pytest.mark.process
def test_two_processes_build_at_once(law_folder, cache_dir):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_build, args=(law_folder, cache_dir, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    fingerprints = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(fingerprints) == 1 and len(entries(cache_dir)) == 1


def test_a_builder_that_fails_leaves_nothing(cache_dir):
    def build(work):
        (work / "half").write_text("x")
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        cache.obtain("tokenized", {"a": 1}, build, cache_dir)
    assert list((cache_dir / "tokenized").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written .*DDB_CACHE"):
        load("embedded", tmp_path / "file")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DDB_CACHE", "a")
    assert str(cache.root()) == "a" and cache.root(tmp_path) == tmp_path
    monkeypatch.delenv("DDB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "b")
    assert cache.root().as_posix() == "b/datatype-dynamics-bench"


PROBE = """
import sys, time
start = time.perf_counter()
from bench_cases.data import load_data
data = load_data("embedded", arch="gpt2", task="multi_cls")
print(f"{time.perf_counter() - start:.3f} s")
heavy = {"torch", "transformers", "datasets", "tokenizers", "bench_cases.data.embedded"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.mark.process
def test_a_cached_entry_needs_no_library_and_no_generator():
    load_data("embedded", arch="gpt2", task="multi_cls")
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    print("\nfrom the cache in", done.stdout.strip())
    assert done.returncode == 0, done.stderr
