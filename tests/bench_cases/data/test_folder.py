"""A user's folder or file: what works as it is, and an error with file and line for what does not."""

import gzip
import json

import numpy as np
import pytest

from bench_cases.data import DataError, folder, load_data

GOOD = {"id": "a", "text": "some words", "labels": ["x"], "split": "train"}


def load(source, cache_dir, task="multi_cls", **options):
    return load_data(str(source), arch="gpt2", task=task, cache_dir=cache_dir, **options)


def test_a_folder_works_without_tokenizers(law_folder, cache_dir):
    data = load(law_folder, cache_dir)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 30, "validation": 10, "test": 0}
    assert data.label_names[:2] == ("3003", "c_871b5612")
    # "rare-35" is a label of no training document.
    assert data.facts["unseen_label_uses_dropped"] == 1 and "rare-35" not in data.label_names
    assert data.classes[0] == 0 and data.n_classes == 1 and (data.single_targets == 0).all()


def test_text_without_splits_is_split_by_content(law_folder, cache_dir):
    data = load(law_folder, cache_dir, task="clm")
    assert data.facts["documents"] == {"train": 27, "validation": 3, "test": 0}
    assert data.n_labels == 0 and data.n_classes == 0


def test_a_split_does_not_depend_on_the_order_of_lines(tmp_path, write_jsonl, cache_dir):
    from bench_cases.data import folder as jsonl

    rows = [{"text": f"text number {i}"} for i in range(50)]
    one = jsonl.read(write_jsonl(tmp_path / "a.jsonl", rows))
    two = jsonl.read(write_jsonl(tmp_path / "b.jsonl", rows[::-1]))
    assert {d.text: d.split for d in one} == {d.text: d.split for d in two}
    assert sum(d.split == "validation" for d in one) == 5


def test_a_single_file_with_named_fields(tmp_path, write_jsonl, cache_dir):
    rows = [{"body": f"text number {i} about law", "tags": "one" if i % 2 else ["two", "one"]} for i in range(20)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    data = load(path, cache_dir, text_field="body", label_field="tags")
    assert data.label_names == ("one", "two")
    with pytest.raises(DataError, match=r"mine\.jsonl:1: lacks the field 'text'; it has 'body', 'tags'"):
        load(path, cache_dir)


def test_mojibake_and_odd_text_are_kept(tmp_path, write_jsonl, cache_dir):
    odd = "caf\u00c3\u00a9 \u2028 \u0000 \U0001f600 </s> <|endoftext|> "
    rows = [{**GOOD, "id": str(i), "text": odd + str(i), "split": "train" if i else "validation"} for i in range(9)]
    folder = tmp_path / "odd"
    folder.mkdir()
    write_jsonl(folder / "eurlex.jsonl", rows)
    data = load(folder, cache_dir)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    tokens = np.asarray(data.tokens[: data.offsets[1]]).tolist()
    assert tokenizer.decode(tokens, skip_special_tokens=False) == odd + "0"
    assert not set(tokens) & set(data.special.ids), "text that looks like a special token is text"


BAD_LINES = {
    "not JSON": (b'{"id": "a"', r"not JSON"),
    "not an object": (b"[1, 2]", r"a JSON list; every line must be one JSON object"),
    "a number": (b"3", r"a JSON number"),
    "no text": (b'{"id": "a", "labels": ["x"], "split": "train"}', r"lacks the field 'text'"),
    "no labels": (b'{"id": "a", "text": "t", "split": "train"}', r"lacks the field 'labels'"),
    "no id": (b'{"text": "t", "labels": ["x"], "split": "train"}', r"lacks the field 'id'"),
    "text is a number": (b'{"id": "a", "text": 7, "labels": ["x"]}', r"'text' is a JSON number; a string is needed"),
    "text is null": (b'{"id": "a", "text": null, "labels": ["x"]}', r"'text' is a JSON null"),
    "empty document": (b'{"id": "a", "text": " \\n", "labels": ["x"]}', r"empty document"),
    "without labels": (b'{"id": "a", "text": "t", "labels": []}', r"document without labels"),
    "labels are numbers": (
        b'{"id": "a", "text": "t", "labels": ["x", 12]}',
        r"label 12 in 'labels' is a JSON number; label ids are strings",
    ),
    "label is a number": (b'{"id": "a", "text": "t", "labels": 12}', r"label ids are strings"),
    "label is true": (b'{"id": "a", "text": "t", "labels": [true]}', r"JSON boolean"),
    "labels are an object": (b'{"id": "a", "text": "t", "labels": {}}', r"a list of strings or one string is needed"),
    "empty label": (b'{"id": "a", "text": "t", "labels": [""]}', r"empty label id"),
    "unknown split": (
        b'{"id": "a", "text": "t", "labels": ["x"], "split": "dev2"}',
        r'split "dev2" is none of train, validation, test',
    ),
    "split missing here only": (b'{"id": "a", "text": "t", "labels": ["x"]}', r"no 'split', unlike .*eurlex.jsonl:1"),
    "id twice": (b'{"id": "first", "text": "t", "labels": ["x"], "split": "train"}', r"id 'first' stands in .*eurlex.jsonl:1"),
    "not UTF-8": (b'{"id": "a", "text": "caf\xe9", "labels": ["x"]}', r"byte 25 \(0xe9\) is not UTF-8"),
    "half a surrogate": (b'{"id": "a", "text": "\\ud800", "labels": ["x"]}', r"half a surrogate pair"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_by_file_and_line(bad, suffix, tmp_path, cache_dir):
    line, message = BAD_LINES[bad]
    first = json.dumps({**GOOD, "id": "first"}).encode()
    raw = first + b"\n\n" + line + b"\n"
    path = tmp_path / f"eurlex{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    with pytest.raises(DataError, match=message.replace("eurlex.jsonl:", f"eurlex{suffix}:")) as caught:
        load(tmp_path, cache_dir)
    assert f"eurlex{suffix}:3: " in str(caught.value) and "\n" not in str(caught.value)
    assert not [p for p in cache_dir.rglob("*") if p.is_file()], "nothing half-written stays"


def test_a_cut_off_gzip_file(tmp_path, write_jsonl, law_rows, cache_dir):
    path = write_jsonl(tmp_path / "eurlex.jsonl.gz", law_rows)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a whole gzip file"):
        load(tmp_path, cache_dir)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="not a whole gzip file"):
        load(tmp_path, cache_dir)


def test_a_folder_without_the_files(tmp_path, write_jsonl, cache_dir):
    with pytest.raises(DataError, match=r"lacks eurlex\.jsonl or eurlex\.jsonl\.gz"):
        load(tmp_path, cache_dir)
    write_jsonl(tmp_path / "openwebtext.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match="it has openwebtext, which serves other tasks"):
        load(tmp_path, cache_dir)
    with pytest.raises(DataError, match="allowed are embedded, hub, hub:REPO, a folder"):
        load(tmp_path / "nowhere", cache_dir)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.jsonl\.gz"):
        load(tmp_path / "x.csv", cache_dir)


def test_files_without_enough_documents(tmp_path, write_jsonl, cache_dir):
    path = write_jsonl(tmp_path / "mine.jsonl", [])
    with pytest.raises(DataError, match="holds no documents"):
        load(path, cache_dir)
    write_jsonl(path, [GOOD])
    with pytest.raises(DataError, match="no validation documents"):
        load(path, cache_dir)


def test_bad_arguments(cache_dir):
    with pytest.raises(DataError, match="task 'translate' names no data"):
        load("embedded", cache_dir, task="translate")


@pytest.mark.parametrize(
    "have,lacks", [([], "every tokenizer file"), (["vocab.json"], r"merges\.txt"), (["merges.txt"], r"vocab\.json")]
)
def test_a_tokenizer_folder_with_missing_files(have, lacks, law_folder, cache_dir):
    folder = law_folder / "gpt2"
    folder.mkdir()
    for name in have:
        (folder / name).write_text("{}")
    with pytest.raises(DataError, match=f"gpt2 lacks {lacks}"):
        load(law_folder, cache_dir)
    with pytest.raises(DataError, match=f"gpt2 lacks {lacks}"):
        load("embedded", cache_dir, tokenizer=str(folder))


def test_a_tokenizer_that_encodes_nothing(law_folder, cache_dir):
    folder = law_folder / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(DataError, match="does not encode plain English"):
        load(law_folder, cache_dir)


@pytest.mark.parametrize(
    "arch,task,vocab,specials",
    [("gpt2", "multi_cls", 50_258, (50_257, None, 50_256, None)), ("roberta", "mlm", 50_265, (1, 0, 2, 50_264))],
)
def test_real_data_as_they_are(shared_data, cache_dir, arch, task, vocab, specials):
    data = load_data(str(shared_data), arch=arch, task=task, max_documents=60, validation_documents=10, cache_dir=cache_dir)
    special = data.special
    assert data.valid_vocab == vocab
    assert (special.pad, special.bos, special.eos, special.mask) == specials
    assert data.facts["documents"]["train"] == 60 and data.facts["documents"]["validation"] == 10
    assert int(data.tokens.max()) < vocab and data.tokens.dtype == np.uint16
    assert not data.is_special[data.tokens].any()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_has_a_longest_length(tmp_path, monkeypatch, suffix):
    """Nothing of that length is read into memory, from a zipped file neither; one byte less is a line."""
    (path := tmp_path / f"a{suffix}").touch()
    write = gzip.open if suffix.endswith("gz") else open
    monkeypatch.setattr(folder, "LONGEST_LINE_BYTES", 100)
    for size_bytes in (100, 101):
        start, end = b'{"text": "a"}\n{"text": "', b'"}\n'
        with write(path, "wb") as file:
            file.write(start + b"x" * (size_bytes - len(start) - len(end) + len(b'{"text": "a"}\n')) + end)
        if size_bytes == 100:
            assert len(list(folder.lines(path))) == 2
        else:
            with pytest.raises(DataError, match=r"a.jsonl(.gz)?:2: is longer than"):
                list(folder.lines(path))
