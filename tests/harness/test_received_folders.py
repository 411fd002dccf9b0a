"""Folders from elsewhere: whatever a file of a run is replaced by, a command that reads it ends soon, with an exit code and in
one sentence."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import traceback
from pathlib import Path
from random import Random

import pytest

from harness.cli import main
from harness.run.execute import execute
from instrument.results.layout import LOGS, RunFiles
from instrument.results.measurements import ForensicsRecord
from instrument.results.schemas import RecordError, RunRecord, StepRecord, decode

pytestmark = pytest.mark.slow
LONGEST_S = 20
REPLAYED = ("run.json", "forensics.json", "snapshot.json", "tensors.safetensors")
DEEP = b"[" * 100_000 + b"]" * 100_000
CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "deep list": DEEP,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[]\n",
    "a number": b"17\n",
    "null": b"null\n",
    "a huge number": b'{"schema": 1' + b"0" * 5_000 + b"}\n",
    "not UTF-8": b'{"schema": 1, "run_id": "\xff\xfe"}\n',
    "half a character": b'{"schema": 1, "run_id": "\\ud800"}\n',
}
WRONG = [None, True, -1, 1 << 70, 1e308, "", "nan", "\x1b[31m[/link]\n", "x" * 10_000, [], [[]], {}, {"": None}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plan):
    """A results folder with a run that diverged, its snapshot and operands, and one that completed; and both."""
    out = tmp_path_factory.mktemp("received")
    died = execute(plan("gpt2_multi_cls", "fp16_naive", max_steps=2), out)
    lived = execute(plan("gpt2_multi_cls", "fp32_true", max_steps=2), out)
    assert (died.status, lived.status) == ("diverged", "completed")
    return out, RunFiles(out, died.run_id), RunFiles(out, lived.run_id)


@pytest.fixture
def read(folder, tmp_path, capsys):
    """``read(file, damage)``: put the damage in the place of a run's file (its path in the results folder), and run the
    commands that read it."""
    out, died, lived = folder
    place = tmp_path / "out"
    shutil.copytree(out, place)
    commands = [
        ["inspect", died.run_id, "--out"],
        ["inspect", died.run_id, "--json", "--out"],
        ["inspect", lived.run_id, "--out"],
        ["inspect", died.run_id, "--repro", str(tmp_path / "alone.py"), "--out"],
        ["inspect", died.run_id, "--try", "eps", "--steps", "1", "--out"],
        ["diff", died.run_id, lived.run_id, "--out"],
        ["diff", died.run_id, lived.run_id, "--json", "--out"],
        ["predict", "gpt2_multi_cls", "--out"],
    ]

    def give(file, damage, *, replay=True):
        original = (place / file).read_bytes()
        (place / file).unlink()
        damage(place / file)
        try:
            for words in commands:
                if "--try" in words and not (replay and Path(file).name in REPLAYED):
                    continue
                signal.signal(signal.SIGALRM, _too_long)
                signal.alarm(LONGEST_S)
                try:
                    code = main([*words, str(place)])
                except Exception as error:
                    frame = traceback.extract_tb(error.__traceback__)[-1]
                    crashes.setdefault(f"{frame.filename}:{frame.lineno} {type(error).__name__}: {error}"[:200], words[0])
                    continue
                finally:
                    signal.alarm(0)
                err = capsys.readouterr().err
                assert code in (0, 2, 4, 5), (words, code, err)
                assert code == 0 or (err.startswith("harness: ") and err.count("\n") == 1 and err[:-1].isprintable()), (
                    words,
                    err,
                )
        finally:
            shutil.rmtree(place / file) if (place / file).is_dir() else (place / file).unlink(missing_ok=True)
            (place / file).write_bytes(original)

    crashes = {}
    yield give
    assert not crashes, "tracebacks"


def _too_long(*_):
    raise TimeoutError("the command waits")


def files_of(run):
    """Every file of the run, seen from the results folder."""
    log = run.log("steps")
    return sorted(run.name(path) for path in (*run.path.rglob("*"), log) if path.is_file())


def test_a_pipe_is_waited_for_by_nobody(folder, read):
    files = files_of(folder[1])
    assert {"run.json", "snapshot.json", "culprit.safetensors", "forensics.json"} <= {Path(file).name for file in files}
    for file in files:
        read(file, os.mkfifo)


DAMAGE = [Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: None]
DAMAGE += [lambda path, content=content: path.write_bytes(content) for content in CONTENTS.values()]


@pytest.mark.parametrize("share", [0.06, pytest.param(1.0, marks=pytest.mark.soak)])
def test_what_is_no_record(folder, read, share):
    random = Random(0)
    for file in files_of(folder[1]) + files_of(folder[2]):
        for damage in DAMAGE:
            if random.random() < share:
                read(file, damage)


def changed(value, random):
    """``value`` with one of its leaves, or a key, replaced."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.9:
        value = value.copy()
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        value[key] = changed(value[key], random)
        if isinstance(value, dict) and random.random() < 0.05:
            value["\x1b]8;;" + key] = value.pop(key)
        return value
    return random.choice(WRONG)


@pytest.mark.parametrize("trials", [12, pytest.param(300, marks=pytest.mark.soak)])
def test_values_of_other_types(folder, read, trials):
    random = Random(0)
    out, died, lived = folder
    texts = [file for file in files_of(died) + files_of(lived) if file.endswith((".json", ".jsonl"))]
    for trial in range(trials):
        file = texts[trial % len(texts)]
        lines = (out / file).read_text().splitlines() if file.endswith("l") else [(out / file).read_text()]
        if lines:
            place = random.randrange(len(lines))
            lines[place] = json.dumps(changed(json.loads(lines[place]), random))
            read(file, lambda path, lines=lines: path.write_text("\n".join(lines) + "\n"), replay=False)


PARTS = [
    "\x1b[31m", "\x1b]8;;http://x\x07", "\x9b2J", "\x00", "\r", "\n", "\n\\\\input{/etc/passwd}\n", "[/link]", "[link=http://x]y",
    "[bold", "]", "=1+1", ";=cmd()", "\t@x", "-1|'", "<script>x()</script>", "&lt;", "'", '"', "`id`", "$(id)", "; id #",
    "%s{0}", "{{x}}", "((x))", "\u202e", "\u2028", "\ufeff", "☃", "\\\\", "x" * 300, "../../x",
]  # fmt: skip


def hostile(n, seed):
    """``n`` strings that mean something in a terminal, HTML, LaTeX, CSV, Python, a shell or a template."""
    random = Random(seed)
    return ["".join(random.choices(PARTS, k=random.randint(1, 4))) for _ in range(n)]


KINDS = {"run": RunRecord, "results": RunRecord, "forensics": ForensicsRecord, "run_": StepRecord} | LOGS
IDENTITIES = {
    "run_id",
    "case",
    "dtype_config",
    "status",
    "preset",
    "arch",
    "task",
    "seed",
    "weights",
    "compute",
    "head",
    "loss",
}
"""Without which a run is nothing that could be shown."""


DEVICE = "a\n\\input{/etc/passwd}\x1b[31m;=1+1[/link]<script>x()</script>"


def poisoned(value, texts, whole, valid):
    """Put a hostile text in the place of every text in ``value`` where the ``whole`` is still ``valid`` then."""
    for key in value if isinstance(value, dict) else range(len(value)):
        before = value[key]
        if isinstance(before, (dict, list)):
            poisoned(before, texts, whole, valid)
        elif isinstance(before, str) and key not in IDENTITIES:
            value[key] = DEVICE if key == "device" else next(texts)
            if not valid(json.dumps(whole).encode()):
                value[key] = before
    return value


def is_valid(file):
    """Whether a line is one of a file's."""
    kind = KINDS.get("run_" if Path(file).name.startswith("run_") else Path(file).name.partition(".")[0])

    def valid(line):
        try:
            return kind is None or bool(decode(line, kind))
        except RecordError:
            return False

    return valid


@pytest.mark.process
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 20))])
def test_hostile_texts_in_every_field_act_nowhere(folder, tmp_path, capsys, seed):
    """No escape sequence on a terminal, no markup of rich or HTML, no command of LaTeX, no formula of a spreadsheet."""
    from report.cli import main as report

    out, died, lived = folder
    place, texts = shutil.copytree(out, tmp_path / "out"), itertools.cycle(hostile(200, seed))
    for file in [*files_of(died), *files_of(lived), "machine.json", "results.jsonl"]:
        if file.endswith((".json", ".jsonl")) and Path(file).name != "snapshot.json":
            lines = (place / file).read_text().splitlines() if file.endswith("l") else [(place / file).read_text()]
            rows = [poisoned(row := json.loads(line), texts, row, is_valid(file)) for line in lines]
            (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes = {}
    csvs, tex, page = tmp_path / "csv", tmp_path / "tex", tmp_path / "page"
    for command, words in (
        (main, ["inspect", died.run_id, "--out", place]),
        (main, ["inspect", died.run_id, "--json", "--out", place]),
        (main, ["inspect", died.run_id, "--try", "eps", "--steps", "1", "--out", place]),
        (main, ["diff", died.run_id, lived.run_id, "--out", place]),
        (main, ["predict", "gpt2_multi_cls", "--out", place]),
        (main, ["repair", place]),
        (report, ["verdict", place]),
        (report, ["validate", place]),
        (report, ["compare", place, out]),
        (report, ["export", place, "--to", "csv", "--out", csvs]),
        (report, ["export", place, "--to", "latex", "--out", tex]),
        (report, ["build", place, "--no-pdf", "--format", "svg", "--out", page]),
    ):
        code = command([str(word) for word in words])
        said = capsys.readouterr()
        assert code in (0, 2, 4, 5), (words, code, said.err)
        for line in (said.out + said.err).split("\n"):
            assert not re.search("[\x00-\x1f\x7f]", line), (words, line)
            assert words[-1] == "--json" or "--json" in words or line.isprintable(), (words, line)
        codes[" ".join(map(str, words[:3:2]))] = (code, said.err[-300:] if code else "")
    refused = {words: said for words, said in codes.items() if said[0] and words != "inspect --try"}
    assert not refused, "\n".join(map(str, refused.items()))
    for file in csvs.rglob("*.csv"):
        with file.open(newline="", encoding="utf-8") as opened:
            for delimiter in ",;":
                opened.seek(0)
                cells = [cell for row in csv.reader(opened, delimiter=delimiter) for cell in row]
                if delimiter == ",":
                    assert not [cell for cell in cells if re.match(r"\s*([=+@]|-(?![\d.]))", cell)], file
    for file in tex.rglob("*.tex"):
        assert "\\input{" not in file.read_text() and file.read_text().isascii() and file.read_text().count("\n%") == 0
    for file in page.rglob("index.html"):
        assert "<script>x()" not in file.read_text() and "\x1b" not in file.read_text()
