"""Folders from elsewhere: whatever a file of a run is replaced by, a command that reads it ends soon, with an exit code and in
one sentence."""

import json
import os
import shutil
import signal
import traceback
from pathlib import Path
from random import Random

import pytest

from harness.cli import main
from harness.run.execute import execute
from instrument.results.layout import RunFiles

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
