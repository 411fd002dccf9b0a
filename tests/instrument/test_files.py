"""Replacing is one step, abandoned files are known from live ones, and nothing writes past this module."""

import ast
import errno
import os
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from instrument.results import files
from tests import crash_hook

ROOT = Path(__file__).resolve().parents[2]


def test_replacing_leaves_no_temporary_file_and_keeps_the_old_on_failure(tmp_path):
    path = tmp_path / "run.json"
    files.replace(path, b"old")
    files.replace(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(TypeError):
        files.replace(path, "text is not bytes")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_replacing_takes_writers_that_make_a_new_file(tmp_path):
    """As libraries do that rename on their own."""
    with files.replacing(tmp_path / "tensors") as temporary:
        (tmp_path / "theirs").write_bytes(b"content")
        os.replace(tmp_path / "theirs", temporary)
    assert (tmp_path / "tensors").read_bytes() == b"content"


def test_the_order_is_write_sync_rename_sync_of_the_folder(tmp_path, monkeypatch):
    did = []

    def note(name: str, real, *args):
        is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
        did.append("sync of the folder" if is_folder else name)
        return real(*args)

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, partial(note, name, getattr(os, name)))
    files.replace(tmp_path / "run.json", b"content")
    assert did == ["write", "fsync", "replace", "sync of the folder"]


def test_the_names_of_new_folders_are_on_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    files.make_folder(tmp_path / "out" / "runs" / "a")
    assert synced == [str(tmp_path), str(tmp_path / "out"), str(tmp_path / "out" / "runs")]


def test_an_index_lock_from_the_future_becomes_stale(tmp_path, no_locks, monkeypatch):
    (soft := tmp_path / ".index.lock.soft").write_text("4194000\nanother-host\n")
    os.utime(soft, (time.time() + 1e6,) * 2)
    monkeypatch.setattr(files, "SOFT_LOCK_S", 0.1)
    with files.locked(tmp_path / ".index.lock"):
        pass


def test_a_temporary_file_is_abandoned_only_when_its_writer_is_gone(tmp_path):
    with files.replacing(tmp_path / "run.json") as temporary:
        assert not files.is_abandoned(temporary)
        left = tmp_path / f".run.json.abc{files.TEMPORARY}"
        left.write_bytes(b"half")
        assert files.is_abandoned(left)


def test_a_folder_appears_whole_in_the_old_one_s_place_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint-5"
    for content in (b"old", b"new"):
        with files.placing_folder(path) as writing:
            (writing / "tensors").write_bytes(content)
            assert not files.is_abandoned(writing)
    with pytest.raises(RuntimeError), files.placing_folder(path) as writing:
        (writing / "tensors").write_bytes(b"half")
        raise RuntimeError
    assert (path / "tensors").read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    files.remove_folder(path)
    files.remove_folder(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_killed_at_any_operation_a_folder_is_whole_or_absent_and_the_rest_is_swept(tmp_path):
    for nth in range(1, 50):
        out = tmp_path / str(nth)
        out.mkdir()
        for content in (b"old", b"new"):
            pid = os.fork()
            if pid == 0:
                crash_hook.crash_at(nth if content == b"new" else 0)
                with files.placing_folder(out / "state") as writing:
                    for name in ("a", "b"):
                        (writing / name).write_bytes(content)
                os._exit(0)
            exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        files.sweep(out)
        assert {p.name for p in out.iterdir()} <= {"state"}
        found = {p.read_bytes() for p in (out / "state").glob("*")} if (out / "state").exists() else set()
        assert found in ({b"old"}, {b"new"}, set()), nth
        if exit_code == 0:
            assert found == {b"new"}
            return
    pytest.fail("the sweep did not come to its end")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where this process and its children put temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.mark.process
def test_a_temporary_folder_is_swept_when_its_process_was_killed_and_not_before(temporary):
    pid = os.fork()
    if pid == 0:
        with files.temporary_folder("theirs") as theirs:
            (theirs / "deep").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = temporary.iterdir()
    with pytest.raises(RuntimeError), files.temporary_folder("mine") as mine:
        assert files.sweep(temporary) == [left] and not left.exists() and mine.is_dir()
        raise RuntimeError
    assert not list(temporary.iterdir())


def test_a_temporary_folder_that_is_swept_before_it_is_locked_is_made_again(temporary, monkeypatch):
    make, opened, made = tempfile.mkdtemp, os.open, []

    def swept(*args, **kwargs):
        made.append(make(*args, **kwargs))
        if len(made) == 1:
            files.sweep(temporary)
        return made[-1]

    def swept_later(path, flags, *more, **named):
        fd = opened(path, flags, *more, **named)
        if flags & os.O_DIRECTORY and len(made) == 2:
            files.sweep(temporary)
        return fd

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    monkeypatch.setattr(os, "open", swept_later)
    with files.temporary_folder("mine") as mine:
        assert len(made) == 3 and mine == Path(made[2]) and mine.is_dir()


def make_a_temporary_folder(place):
    with files.temporary_folder("mine") as mine:
        (mine / "file").write_bytes(b"content")


def place_a_folder(place):
    with files.placing_folder(place / "checkpoint-1") as writing:
        (writing / "file").write_bytes(b"content")


def test_a_sweep_passes_by_what_is_no_file_and_what_it_may_not_delete(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / f".pipe{files.TEMPORARY}")  # to open one is to wait for its other end
    theirs, ours = tmp_path / f".theirs{files.TEMPORARY}", tmp_path / f".ours{files.TEMPORARY}"
    theirs.touch()
    ours.touch()
    unlink = Path.unlink

    def refused(path, *args, **kwargs):
        if path == theirs:
            raise PermissionError(errno.EPERM, "not ours", str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", refused)
    assert files.sweep(tmp_path) == [ours] and theirs.exists() and not ours.exists()


@pytest.mark.parametrize(
    "make", [make_a_temporary_folder, place_a_folder, lambda place: files.replace(place / "run.json", b"content")]
)
def test_what_is_swept_while_it_is_made_is_there_for_its_maker(temporary, make):
    over = threading.Event()

    def sweeping():
        while not over.is_set():
            files.sweep(temporary)

    sweepers = [threading.Thread(target=sweeping) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        for _ in range(100):
            make(temporary)
    finally:
        over.set()
        for thread in sweepers:
            thread.join()


@pytest.mark.parametrize("plant", ["file", "folder", "outside", "missing", "link to a link"])
def test_what_is_read_lies_in_the_folder(tmp_path, plant):
    root, outside = tmp_path / "results", tmp_path / "outside"
    (root / "runs" / "a").mkdir(parents=True)
    outside.mkdir()
    (outside / "run.json").write_bytes(b"{}")
    path = root / "runs" / "a" / "run.json"
    path.write_bytes(b"{}")
    assert files.plain_inside(root, path)
    if plant == "file":
        path.unlink()
        path.symlink_to(outside / "run.json")
    elif plant == "folder":
        path = root / "runs" / "b" / "run.json"
        (root / "runs" / "b").symlink_to(outside)
    elif plant == "outside":
        path = root / "runs" / ".." / ".." / "outside" / "run.json"
    elif plant == "missing":
        path.unlink()
    else:
        (root / "links").symlink_to(root / "runs")
        path = root / "links" / "a" / "run.json"
    assert not files.plain_inside(root, path)


def test_copying_refuses_links(tmp_path):
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        files.copy(tmp_path / "link", tmp_path / "copy")
    files.copy(tmp_path / "secret", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"s"


WRITERS = {
    "write_text",
    "write_bytes",
    "savefig",
    "save_file",
    "to_csv",
    "touch",
    "rename",
    "replace",
    "unlink",
    "truncate",
    "ftruncate",
    "symlink",
    "link",
    "copyfile",
    "copytree",
    "copy",
    "copy2",
    "move",
    "rmtree",
    "mkstemp",
    "save",
    "dump",
}
"""Names of calls that write, move or delete files (where they belong to os, shutil, tempfile, json, numpy, torch or a path)."""
MODULES = {"os", "shutil", "tempfile", "json", "np", "torch", "pickle"}
ALLOWED = {
    "instrument/results/files.py": "is the module",
    "instrument/results/log.py": "is the module's other half",
    "instrument/results/claims.py": "a claim is made by a hard link and changes hands in place: its lock is on the file",
    "instrument/terminal.py": "/dev/null, for the words that nobody reads",
    "harness/supervisor/worker.py": "a process's standard output and error, which libraries write",
    "harness/forensics/stored.py": "writes a folder under a temporary name and renames it whole",
    "harness/campaign/pack.py": "fills a temporary folder that is placed whole, and temporary files of the module",
    "harness/campaign/command.py": "the lines that it prints, appended to its log",
    "harness/supervisor/child_process.py": "a command's standard output and error",
    "instrument/results/signature.py": "the user's key, no result: linked into place whole",
    "harness/run/heartbeat.py": "a temporary file that a process' stacks go through",
    "report/latex.py": "copies the bibliography into the appendix",
    "report/plots/write.py": "draws into memory",
    "benchmarks/verdicts.py": "a page and a figure of docs/, made again by one command",
    "benchmarks/report.py": "JSON to standard output",
    "benchmarks/simulated_results.py": "makes a benchmark's input",
    "benchmarks/plain_script.py": "is the naive script that the benchmark compares with",
    "bench_cases/data/__init__.py": "the data cache",
    "bench_cases/data/cache.py": "the data cache, no result: a folder renamed whole",
    "bench_cases/data/hub.py": "the data cache",
    "bench_cases/data/tokenized.py": "the data cache",
    "kernels/__main__.py": "below this room: it replaces its file on its own",
}


def direct_writes(source: str) -> list[int]:
    """Lines with a call that writes, moves or deletes a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, words = (
            node.func,
            [
                arg.value
                for arg in (*node.args, *(k.value for k in node.keywords))
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ],
        )
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else None
        if name == "open":
            flags = ast.unparse(node)
            if (
                any(set(word) <= set("rwxabt+U") and set(word) & set("wxa+") for word in words)
                or "O_WRONLY" in flags
                or "O_RDWR" in flags
                or "O_CREAT" in flags
            ):
                found.append(node.lineno)
        elif name in WRITERS and (
            name
            in (
                "write_text",
                "write_bytes",
                "savefig",
                "save_file",
                "to_csv",
                "touch",
                "unlink",
                "copyfile",
                "copytree",
                "rmtree",
                "mkstemp",
                "ftruncate",
            )
            or owner in MODULES
        ):
            found.append(node.lineno)
    return found


def test_the_scan_finds_what_it_is_for():
    for planted in (
        "p.write_text('x')",
        "open(p, 'w')",
        "p.open('ab')",
        "os.open(p, os.O_CREAT)",
        "os.replace(a, b)",
        "shutil.copy(a, b)",
        "figure.savefig(p)",
        "save_file(t, p)",
        "gzip.open(p, 'wt')",
        "torch.save(x, p)",
        "gzip.open(p, mode='xb')",
    ):
        assert direct_writes(planted) == [1], planted
    for harmless in (
        "p.read_text()",
        "open(p)",
        "p.open('rb')",
        "text.replace('a', 'b')",
        "replace(path, data)",
        "copy.copy(x)",
        "gzip.open(p, 'rt')",
    ):
        assert not direct_writes(harmless), harmless


def test_nothing_writes_files_past_this_module():
    offenders, used = [], set()
    for room in ("harness", "instrument", "report", "bench_cases", "kernels", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name, lines = str(path.relative_to(ROOT)), direct_writes(path.read_text(encoding="utf-8"))
            if lines and (allowed := {name, str(path.parent.relative_to(ROOT))} & set(ALLOWED)):
                used |= allowed
            else:
                offenders += [f"{name}:{line}" for line in lines]
    assert not offenders, "write through instrument.results.files, or allow it here with a reason"
    assert used == set(ALLOWED), "the list of exceptions names a file that writes nothing"


def test_without_locks_of_the_file_system_one_thread_or_process_at_a_time(tmp_path, no_locks):
    inside, most = [], []

    def hold():
        for _ in range(5):
            with files.locked(tmp_path / ".index.lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 20 and max(most) == 1 and os.listdir(tmp_path) == [".index.lock"]


def test_a_lock_that_a_dead_process_left_is_taken(tmp_path, no_locks, monkeypatch):
    soft = tmp_path / ".index.lock.soft"
    soft.write_text("4194000\nanother-host\n")
    os.utime(soft, (0, 0))
    with files.locked(tmp_path / ".index.lock"):
        assert soft.exists()
    assert not soft.exists()


def test_another_error_of_a_lock_is_no_missing_lock(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="Input/output"), files.locked(tmp_path / ".index.lock"):
        pass


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_an_error_of_an_open_file_names_the_file(tmp_path, monkeypatch, call):
    """`os.fsync` and `os.write` know a descriptor alone; without a name the error ended in a traceback."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as raised:
        files.replace(tmp_path / "row.json", b"{}")
    assert str(raised.value.filename).startswith(str(tmp_path)) and not [*tmp_path.iterdir()]
