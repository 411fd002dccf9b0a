"""Counted nouns, sentences for what the disk refuses, and readers that go away (`| head`)."""

import ast
import errno
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.text import Text

from instrument.terminal import NO_ROOM, READER_GONE, count, plain_table, rich_console, sentence_of

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "instrument", "kernels", "bench_cases", "report")


@pytest.mark.parametrize(
    ("n", "nouns", "text"),
    [
        (0, ("run",), "0 runs"),
        (1, ("run",), "1 run"),
        (2, ("run",), "2 runs"),
        (12_000, ("row",), "12,000 rows"),
        (1, ("process", "processes"), "1 process"),
        (3, ("process", "processes"), "3 processes"),
    ],
)
def test_one_is_singular_and_all_else_is_not(n, nouns, text):
    assert count(n, *nouns) == text


def test_no_text_of_the_program_leaves_the_plural_open():
    """``run(s)`` and ``process(es)`` are for programs that cannot count."""
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    texts = [(file, node.value) for file, node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [(file, file.read_text()) for file in (ROOT / "templates").rglob("*.j2")]
    assert len(texts) > 5_000
    assert [(file, text) for file, text in texts if re.search(r"\w\((s|es)\)", text)] == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:
        (tmp_path / "file" / "x").mkdir()
    assert sentence_of(refused.value) == f"cannot use {tmp_path / 'file' / 'x'}: Not a directory"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "x"),
        OSError(errno.ENOSPC, "full"),
        OSError("message"),
        BrokenPipeError(errno.EPIPE, "broken", "x"),
        KeyError("x"),
    ],
)
def test_all_else_is_not_the_disk_s(error):
    assert sentence_of(error) is None


PRINTS = """
import sys
from instrument.terminal import reader_may_leave
with reader_may_leave() as reader:
    reader.needed = {needed}
    for n in range(3):
        print("line", n, file=sys.{stream})
    {flush}
    open("made", "w").close()
sys.exit(3)
"""


def unread(arguments, folder, **streams):
    """Run a program whose ``stdout`` and ``stderr`` nobody reads, but for those given; (exit status, what it said there)."""
    end, pipe = os.pipe()
    os.close(end)
    try:
        streams = {"stdout": pipe, "stderr": pipe} | streams
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            check=False,
            timeout=300,
            **streams,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        )
    finally:
        os.close(pipe)
    return done.returncode, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("flush", ["pass", "sys.stdout.flush()"])
def test_a_command_that_makes_something_continues_to_its_own_end(tmp_path, stream, flush):
    streams = {"stderr": subprocess.PIPE} if stream == "stdout" else {}
    code, said = unread(["-c", PRINTS.format(needed=False, stream=stream, flush=flush)], tmp_path, **streams)
    assert code == 3 and not said and (tmp_path / "made").exists()


@pytest.mark.process
@pytest.mark.parametrize(("flush", "made"), [("pass", True), ("sys.stdout.flush()", False)])
def test_a_command_that_only_prints_ends_there_in_silence(tmp_path, flush, made):
    """What is small enough to wait in a buffer is found unread at the end."""
    code, said = unread(["-c", PRINTS.format(needed=True, stream="stdout", flush=flush)], tmp_path, stderr=subprocess.PIPE)
    assert (code, said) == (READER_GONE, b"") and (tmp_path / "made").exists() == made


@pytest.mark.process
def test_without_a_stream_nothing_is_said(tmp_path):
    program = "import sys; sys.stdout = None\n" + PRINTS.format(needed=True, stream="stdout", flush="pass")
    code, _ = unread(["-c", program], tmp_path)
    assert code == 3


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ["harness", "list"],
        ["harness", "list", "--json"],
        ["harness", "--help"],
        ["harness", "case", "--help"],
        ["report", "--help"],
        ["kernels", "--help"],
    ],
)
def test_commands_end_like_other_tools(tmp_path, arguments):
    code, said = unread(["-m", *arguments], tmp_path, stderr=subprocess.PIPE)
    assert code in (READER_GONE, -13) and said == b""


@pytest.mark.process
@pytest.mark.parametrize(("needed", "code"), [(True, NO_ROOM), (False, 3)])
def test_a_full_disk_under_the_output_has_its_own_status(tmp_path, needed, code):
    with open("/dev/full", "w") as full:
        done, said = unread(
            ["-c", PRINTS.format(needed=needed, stream="stdout", flush="sys.stdout.flush()")],
            tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done == code and said == b"standard output cannot be written: No space left on device\n"
    assert (tmp_path / "made").exists() is not needed


@pytest.mark.process
def test_streams_that_are_closed_from_the_beginning_discard_what_is_written(tmp_path):
    arguments = [sys.executable, "-m", "harness", "list", "--json"]
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *arguments], cwd=ROOT, check=False, capture_output=True)
        assert done.returncode == 0 and done.stderr == b"", closed


@pytest.mark.process
@pytest.mark.parametrize(("needed", "code"), [(True, READER_GONE), (False, 3)])
def test_a_terminal_that_vanishes_is_a_reader_that_leaves(tmp_path, needed, code):
    theirs, ours = os.openpty()
    os.close(theirs)
    try:
        program = PRINTS.format(needed=needed, stream="stdout", flush="sys.stdout.flush()")
        done, said = unread(["-c", program], tmp_path, stdout=ours, stderr=subprocess.PIPE)
    finally:
        os.close(ours)
    assert (done, said) == (code, b"") and (tmp_path / "made").exists() is not needed


@pytest.mark.parametrize("colours", [False, True])
def test_nothing_that_a_text_holds_acts_on_a_terminal(colours):
    """Not as a plain text, in a table, as a `Text` nor as markup; what rich itself writes for colours stays."""
    for text in (
        "\x1b[2J",
        "\x9b2J",
        "a\rb",
        "\x1b]8;;http://x\x07y",
        "[link=http://x]y[/link]",
        "[/link]",
        "\u202e",
        "[bold",
        "\x07",
    ):
        shown = StringIO()
        console = rich_console(file=shown, force_terminal=colours, width=80)
        (table := plain_table("what")).add_row(text)
        for what in (text, Text(text), table):
            console.print(what, style="red")
        left = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()) if colours else shown.getvalue()
        assert left.replace("\n", "").isprintable(), (text, left)


def test_every_console_is_made_in_one_place():
    """But for a picture, which is no terminal."""
    made = {
        str(path.relative_to(ROOT)): re.findall(r"(?<![\w.])Console\([^\n]*", path.read_text(encoding="utf-8"))
        for room in ("harness", "instrument", "report", "kernels", "bench_cases")
        for path in (ROOT / room).rglob("*.py")
    }
    found = [f"{name}: {call}" for name, calls in made.items() for call in calls if "Console(console.Console)" not in call]
    assert [one for one in found if "record=True" not in one] == []
