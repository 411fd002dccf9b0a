"""The reliability trials: a sample of every kind loses nothing (all of them under `make soak`), and they notice what they are
there to notice.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from harness.exit_codes import OK, RUN_FAILED, USAGE
from instrument.results.folder import log_paths
from tests.soak.reliability import failing_calls, processes, ranks, same_run, trials
from tests.soak.reliability.__main__ import main
from tests.soak.reliability.trials import FILE, KINDS, Kind, Tally, Trial, chosen_kinds, tally

pytestmark = pytest.mark.process

SAMPLES = {
    "crash": 0.001,
    "crash-again": 0.001,
    "crash-twice": 0.01,
    "crash-repair": 0.2,
    "crash-index": 0.2,
    "kill": 0.01,
    "signal": 0.1,
    "full-disk": 0.05,
    "read-only": 0.3,
    "gone": 0.1,
    "cut": 0.2,
    "bit": 0.05,
    "claims": 0.05,
    "writers": 0.05,
}
ELSEWHERE = {"calls", "secrets", "death", "nodes", "lost-node", "ranks", "lost-rank"}
"""A sample of them is made in `test_hostile`, `test_pool`, `engines/test_ray_pool` and `test_parallel`."""


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_loses_nothing(name, tmp_path):
    found = tally(name, "", KINDS[name].load()(SAMPLES[name], tmp_path))
    assert found.losses == [] and found.trials > 0


WRITER = """import sys; from pathlib import Path
from instrument.results.claims import claim; from instrument.results.files import replace
from instrument.results.log import Appender
with claim(Path(sys.argv[1]), "a"):
    log = Appender(Path(sys.argv[1], "log"))
    for line in (b"first\\n", b"second\\n"):
        log.append(line); print(line.decode().strip(), flush=True)
    log.close()
    replace(Path(sys.argv[1], "whole"), b"new")
"""
"""Claims a run, appends two lines, says so, and replaces a file."""


@pytest.mark.parametrize(
    "fault",
    [name if name in ("EIO", "cut short") else pytest.param(name, marks=pytest.mark.soak) for name in failing_calls.FAULTS],
)
def test_a_call_that_fails_is_cut_or_kills_loses_no_acknowledged_line(tmp_path, fault):
    """The library does what it says, at some calls of what writes all results."""
    if (library := failing_calls.compiled(tmp_path)) is None:
        pytest.skip("no C compiler")
    (page := tmp_path / "orders").write_bytes(bytes(failing_calls.HEAD.size + 2048))
    orders = failing_calls.Orders(page)
    environment = os.environ | {failing_calls.LIBRARY: str(library), failing_calls.ORDERS: str(page)}
    count = 1
    for nth in (0, *range(1 + len(fault) % 3, 99, 9)):
        if nth > count:
            break
        (out := tmp_path / f"out-{nth}").mkdir()
        (out / "whole").write_bytes(b"old")
        orders.give(out, fault, nth)
        ended = subprocess.run([sys.executable, "-c", WRITER, out], env=environment, capture_output=True, text=True)
        calls, hit = orders.count()
        count = count if nth else calls
        assert bool(hit) == bool(nth), (fault, nth, count)
        said = ended.stdout.split()
        assert (out / "log").exists() or not said
        lines = (out / "log").read_text().split("\n") if said else []
        assert lines[: len(said)] == said and all(line in ("first", "second", "") for line in lines[:-1])
        assert (out / "whole").read_bytes() == (b"new" if ended.returncode == 0 else b"old") or hit in (
            "fsync",
            "flock",
            "unlink",
        )
        assert (ended.returncode == -9) == (fault == "SIGKILL" and nth > 0)
        if fault in ("EINTR", "ENOLCK", "cut short"):
            assert ended.returncode == 0, ended.stderr


def test_ranks_that_go_another_way_are_a_loss():
    def steps(*losses):
        return [SimpleNamespace(step=n, loss=loss, grad_norm=1.0) for n, loss in enumerate(losses, start=1)]

    alone = steps(*[2.0] * ranks.STEPS)
    assert ranks._differences(alone, steps(*[2.0 + 1e-5] * ranks.STEPS)) == []
    for others, says in (
        (steps(*[2.0] * 5, 2.0 + 3e-5), "step 6: loss"),
        (steps(*[2.0] * 5, None), "step 6: loss is None"),
        (steps(*[2.0] * 5, float("nan")), "step 6: loss is nan"),
        (steps(2.0), "1 and 6 of 6 steps"),
        ([], "0 and 6 of 6 steps"),
    ):
        (loss,) = ranks._differences(alone, others)
        assert loss.startswith(says)


def test_a_launch_that_hangs_leaves_no_process(tmp_path, monkeypatch):
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]], start_new_session=True)"
    for longest_s in (2.0, 15.0, 90.0):  # a busy machine takes its time to start it
        monkeypatch.setattr(ranks, "LONGEST_S", longest_s)
        assert ranks._launched(["-c", program, str(tmp_path / "pid")]) is None
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
    with suppress(psutil.NoSuchProcess):
        child, until_s = psutil.Process(int((tmp_path / "pid").read_text())), time.monotonic() + 10.0
        while child.status() != psutil.STATUS_ZOMBIE:  # killed, and gone as soon as the kernel gets to it
            assert time.monotonic() < until_s
            time.sleep(0.05)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_all_trials_lose_nothing(name, tmp_path):
    found = tally(name, "", KINDS[name].load()(1.0, tmp_path))
    print(found.as_row())
    assert found.losses == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Settings, what it reported and the results folder of a run that nothing happened to."""
    settings, out = processes.small(max_steps=4, eval_every=2), tmp_path_factory.mktemp("whole") / "out"
    return settings, same_run.completed(processes.run(settings, out)), out


def lines_of(out, settings):
    path = out / log_paths(settings.run_id)["steps"]
    return path, path.read_bytes().splitlines(keepends=True)


def a_row_dropped(out, settings):
    path, lines = lines_of(out, settings)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def a_row_changed(out, settings):
    path, lines = lines_of(out, settings)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"lr":', b'"lr":1'), *lines[3:]]))


def a_row_twice(out, settings):
    path, lines = lines_of(out, settings)
    path.write_bytes(b"".join([*lines, lines[-1]]))


def a_torn_end(out, settings):
    with lines_of(out, settings)[0].open("ab") as log:
        log.write(b'{"schema":1,"st')


def other_weights(out, settings):
    for path in (out / "runs" / settings.run_id / "run.json", out / "results.jsonl"):
        row = json.loads(path.read_bytes())
        path.write_text(json.dumps(row | {"final_weights_sha256": "0" * 64}) + "\n")


def no_index(out, settings):
    (out / "results.jsonl").unlink()


def the_index_twice(out, settings):
    path = out / "results.jsonl"
    path.write_bytes(path.read_bytes() * 2)


def another_index(out, settings):
    path = out / "results.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps_done":4', b'"steps_done":3'))


def no_row(out, settings):
    (out / "runs" / settings.run_id / "run.json").unlink()


def a_checkpoint_left(out, settings):
    (out / "runs" / settings.run_id / "checkpoint-2").mkdir()


DEFECTS = {
    a_row_dropped: "acknowledged and lost: steps, step 3",
    a_row_changed: "they part at row 3",
    a_row_twice: "steps: 5 rows, and 4 of the whole run",
    a_torn_end: "a log cannot be read",
    other_weights: "final_weights_sha256 is 000",
    no_index: "the index has 0 rows of the run",
    the_index_twice: "the index has 2 rows of the run",
    another_index: "the index has another row than run.json",
    no_row: "run.json is missing",
    a_checkpoint_left: "left over: runs/",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_what_is_wrong_with_a_run_is_noticed(whole, tmp_path, defect):
    settings, ended, out = whole
    assert ended.steps == 4 and len(ended.acknowledged) >= 7
    broken = shutil.copytree(out, tmp_path / "out")
    assert same_run.finished_well(settings, broken, out, [ended]) == []
    defect(broken, settings)
    assert any(DEFECTS[defect] in loss for loss in same_run.finished_well(settings, broken, out, [ended]))


def test_of_a_dead_run_the_last_part_s_rows_must_be_there_and_of_those_before_what_its_checkpoint_has(whole, tmp_path):
    settings, ended, out = whole
    dead = shutil.copytree(out, tmp_path / "out")
    (dead / "runs" / settings.run_id / "run.json").unlink()
    assert same_run.lost_rows([ended], settings.run_id, dead) == []
    a_row_dropped(dead, settings)
    assert same_run.lost_rows([ended], settings.run_id, dead) == ["acknowledged and lost: steps, step 3"]
    later = processes.ProcessResult()
    assert same_run.lost_rows([ended, later], settings.run_id, dead) == []  # it starts over
    (dead / "runs" / settings.run_id / "checkpoint-4").mkdir()
    assert same_run.lost_rows([ended, later], settings.run_id, dead) == ["acknowledged and lost: steps, step 3"]
    a_torn_end(dead, settings)
    assert same_run.torn_lines(settings.run_id, dead) == 1


def test_a_repair_that_is_not_idempotent_is_noticed(whole, tmp_path, monkeypatch):
    out, real = shutil.copytree(whole[2], tmp_path / "out"), same_run.repair_folder

    def restless(folder):
        (folder / os.urandom(4).hex()).touch()
        return real(folder)

    assert same_run.repaired(out) == []
    monkeypatch.setattr(same_run, "repair_folder", restless)
    assert same_run.repaired(out) == ["repair is not idempotent: []"]


def test_a_run_that_hangs_is_ended(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "HUNG_S", 0.05)
    ended = processes.run(whole[0], tmp_path / "out")
    assert ended.exit_code is None and same_run.resumes_well(whole[0], tmp_path / "out", whole[2], [])


def planted(share, folder):
    """Two trials of ten, and one that loses."""
    yield Trial("first", counts={"lines": 3}, stands_for=10)
    yield Trial("second", ["a line", "another"] if share == 1.0 else [], {"lines": 4}, stands_for=10)


@pytest.mark.parametrize(("share", "code", "lost"), [(1.0, RUN_FAILED, ["second: a line", "second: another"]), (0.5, OK, [])])
def test_losses_are_counted_shown_and_exit_3(tmp_path, monkeypatch, capsys, share, code, lost):
    monkeypatch.setattr(Kind, "load", lambda kind: planted)
    assert main(["--trials-share", str(share), "--only", "cut", "crash", "--out", str(tmp_path), "--json"]) == code
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    assert [row["name"] for row in rows] == ["crash", "cut"]
    assert rows[0]["trials"] == 20 and rows[0]["lost"] == lost and rows[0]["counts"] == {"lines": 7}
    assert ("lost: second: a line" in printed.err) == bool(lost) and "death at every file operation" in printed.err
    stored = json.loads((tmp_path / FILE).read_bytes())
    assert (stored["trials"], stored["losses"], stored["share"]) == (40, 2 * len(lost), share) and stored["kinds"] == rows


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "nonsense"], "no kind of trial 'nonsense'; allowed: crash, crash-again"),
        (["--trials-share", "0"], "'0'; allowed: above 0, up to 1"),
        (["--trials-share", "nan"], "'nan'; allowed: above 0, up to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(words, sentence, capsys):
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == USAGE and sentence in capsys.readouterr().err


def test_every_kind_is_there():
    assert [kind.name for kind in chosen_kinds(["kill", "crash"])] == ["crash", "kill"]
    assert len(chosen_kinds([])) == len(KINDS) and all(callable(kind.load()) for kind in KINDS.values())
    assert set(SAMPLES) | ELSEWHERE == set(KINDS)


def test_a_kind_s_row_fits_a_small_terminal(monkeypatch):
    shown = StringIO()
    monkeypatch.setattr(trials, "CONSOLE", Console(file=shown, width=80, highlight=False))
    tally = Tally("ray_nodes", "a node of two is killed " * 6, trials=1_000, seconds_s=123.4)
    tally.counts["run again"] = 1_000
    with trials.Screen() as screen:
        screen.done(tally)
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and len(lines) == 5
    assert lines[0].split() == ["reliability", "trials", "lost", "seconds"]
    assert lines[1].split() == ["ray_nodes", "1,000", "0", "123"] and len(lines[0]) == len(lines[1])
    assert " ".join(" ".join(lines[2:]).split()) == "a node of two is killed " * 6 + "1,000 run again"
