"""What is intact stays, what is torn goes beside, the index comes back, and doing it twice changes nothing (deaths,
cuts and flipped bits: `test_bench_reliability`)."""

import json
import random
import shutil
from pathlib import Path

import pytest

from harness import cli
from harness.exit_codes import BAD_DATA, ENVIRONMENT, OK, USAGE
from harness.run.execute import execute
from instrument.results import files
from instrument.results.claims import claim
from instrument.results.contents import NoResults, load
from instrument.results.folder import indexed_rows, write_index
from instrument.results.repair import repair_folder
from instrument.results.schemas import EvaluationRecord, RunRecord, encode
from tests.soak.reliability.logs_and_claims import flipped
from tests.soak.reliability.logs_and_claims import step as step_record

pytestmark = pytest.mark.slow

STEPS = 12


def run_record(run_id: str, **changed) -> RunRecord:
    fields = {
        "run_id": run_id,
        "case": "gpt2_clm",
        "scenario": "A",
        "arch": "gpt2",
        "task": "clm",
        "loss": "cross_entropy",
        "loss_reduction": "mean",
        "dtype_config": "fp32_true",
        "seed": 0,
        "preset": "tiny",
        "device": "cpu-planted",
        "data_source": "embedded",
        "weights_source": "scratch",
        "status": "completed",
        "steps_done": STEPS,
        "max_steps": STEPS,
        "batch_size": 4,
        "micro_batch": 4,
        "seq_len": 32,
        "flags": {"simulated": True},
    }
    return RunRecord(**fields | changed)


def plant(out: Path, *run_ids: str, **changed) -> None:
    """Runs as the harness writes them, and the index."""
    for run_id in run_ids:
        steps = b"".join(encode(step_record(step)) + b"\n" for step in range(1, STEPS + 1))
        evaluation = EvaluationRecord(
            step=0,
            val_loss=3.0,
            perplexity=None,
            f1_micro=None,
            f1_macro=None,
            f1_micro_tuned=None,
            tuned_threshold=None,
            labels_absent=None,
            samples=4,
            targets=4,
            duration_s=0.1,
        )
        files.replace(out / "training_logs" / f"run_{run_id}.jsonl", steps)
        files.replace(out / "runs" / run_id / "evaluations.jsonl", encode(evaluation) + b"\n")
        files.replace(out / "runs" / run_id / "run.json", encode(run_record(run_id, **changed)) + b"\n")
    write_index(out)


@pytest.fixture
def out(tmp_path) -> Path:
    plant(tmp_path / "results", "a", "b")
    return tmp_path / "results"


def log_of(out: Path) -> Path:
    return out / "training_logs" / "run_a.jsonl"


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def repaired(out: Path):
    """The repair; a second one must find nothing to do."""
    first = repair_folder(out)
    after = bytes_of(out)
    second = repair_folder(out)
    assert second.changed == [] and bytes_of(out) == after
    return first


def state(done, file: str):
    return next(state for state in done.files if state.file == file)


def test_a_folder_in_order_is_only_read(out):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")}
    done = repair_folder(out)
    assert done.changed == [] and not done.is_damaged and done.runs == 2
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.rglob("*")} == before
    assert state(done, "training_logs/run_a.jsonl").intact == STEPS


@pytest.mark.parametrize("step", [1, pytest.param(0, marks=pytest.mark.soak)], ids=["sample", "every byte"])
def test_a_log_on_disk_that_was_cut_is_mended_and_read(out, step):
    content = log_of(out).read_bytes()[:2000]
    for length in range(1, len(content)) if step == 0 else (1, 200, len(content) // 2, len(content) - 1):
        log_of(out).write_bytes(content[:length])
        (out / "training_logs" / "run_a.jsonl.torn").unlink(missing_ok=True)
        load(out).steps("a")  # the report reads it as it is
        repaired(out)
        kept, aside = log_of(out).read_bytes(), out / "training_logs" / "run_a.jsonl.torn"
        assert kept + (aside.read_bytes()[:-1] if aside.exists() else b"") in (content[:length], content[:length] + b"\n")


def flip(content: bytes, rng: random.Random, bits: int) -> bytes:
    return flipped(content, *(rng.randrange(len(content) * 8) for _ in range(bits)))


@pytest.mark.parametrize("trials", [15, pytest.param(500, marks=pytest.mark.soak)])
def test_bits_flipped_anywhere_in_a_folder_crash_neither_repair_nor_report(out, trials):
    rng = random.Random(7)
    whole = bytes_of(out)
    for _ in range(trials):
        for name in ("training_logs/run_a.jsonl", "results.jsonl", "runs/a/run.json", "runs/a/evaluations.jsonl"):
            (out / name).write_bytes(flip(whole[name], rng, rng.choice([1, 1, 3, 40])))
        for _ in range(2):  # before and after
            try:
                assert load(out).defects is not None
            except NoResults:
                pass
            repaired(out)
        assert (out / "runs/b/run.json").read_bytes() == whole["runs/b/run.json"]
        assert encode(run_record("b")) in (out / "results.jsonl").read_bytes().splitlines()
        for path in [*out.rglob("*")]:
            if path.is_file() and str(path.relative_to(out)) not in whole:
                path.unlink()
        for name, content in whole.items():
            (out / name).write_bytes(content)


def test_two_lines_that_lost_the_newline_between_them_are_both_won_back(out):
    whole = log_of(out).read_bytes()
    middle = whole.index(b"\n", len(whole) // 2)
    log_of(out).write_bytes(whole[:middle] + b"\x0b" + whole[middle + 1 :])
    done = repaired(out)
    assert log_of(out).read_bytes() == whole and not done.is_damaged
    assert state(done, "training_logs/run_a.jsonl").rejoined == 2


def test_zeros_that_a_power_cut_left_are_cut_and_the_line_after_them_kept(out):
    whole = log_of(out).read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    log_of(out).write_bytes(whole[:last] + b"\0" * 4096 + whole[last:])
    repaired(out)
    assert log_of(out).read_bytes() == whole


def test_a_damaged_line_goes_beside_and_counts_as_lost(out):
    lines = log_of(out).read_bytes().splitlines(keepends=True)
    bad = lines[4].replace(b":", b";", 1)
    log_of(out).write_bytes(b"".join([*lines[:4], bad, *lines[5:]]))
    done = repaired(out)
    found = state(done, "training_logs/run_a.jsonl")
    assert (found.intact, found.lost, found.torn) == (STEPS - 1, 1, 0) and done.is_damaged
    assert log_of(out).read_bytes() == b"".join(lines[:4] + lines[5:])
    assert (out / "training_logs" / "run_a.jsonl.torn").read_bytes() == bad


def test_a_row_of_another_schema_stays_where_it_is(out):
    newer = b'{"schema":99,"step":13}\n'
    with log_of(out).open("ab") as log:
        log.write(newer)
    done = repaired(out)
    assert log_of(out).read_bytes().endswith(newer) and state(done, "training_logs/run_a.jsonl").foreign == 1
    assert done.is_damaged


def test_repeated_rows_go_and_differing_rows_of_a_step_stay(out):
    other = encode(step_record(3, loss=9.0)) + b"\n"
    lines = log_of(out).read_bytes().splitlines(keepends=True)
    log_of(out).write_bytes(b"".join([*lines, lines[2], lines[3], other]))
    done = repaired(out)
    assert log_of(out).read_bytes() == b"".join([*lines, other])
    assert state(done, "training_logs/run_a.jsonl").repeated == 2 and not done.is_damaged


def test_lost_steps_are_known_from_the_run_s_own_row(out):
    lines = log_of(out).read_bytes().splitlines(keepends=True)
    log_of(out).write_bytes(b"".join(lines[:7]))
    done = repaired(out)
    assert state(done, "training_logs/run_a.jsonl").lost == STEPS - 7 and done.is_damaged
    log_of(out).unlink()
    assert state(repaired(out), "training_logs/run_a.jsonl").lost == STEPS


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "a row too few", "a row twice", "garbage"])
def test_the_index_comes_back_byte_for_byte(out, damage):
    index = out / "results.jsonl"
    whole = index.read_bytes()
    rows = whole.splitlines(keepends=True)
    damaged = {
        "empty": b"",
        "torn": whole[:-20],
        "a row too few": rows[0],
        "a row twice": whole + rows[0],
        "garbage": b"\xff\n",
    }
    index.unlink() if damage == "missing" else index.write_bytes(damaged[damage])
    repaired(out)
    assert index.read_bytes() == whole
    assert load(out).defects == ()


def test_an_unreadable_row_is_written_again_from_the_index(out):
    row = out / "runs" / "a" / "run.json"
    whole = row.read_bytes()
    row.write_bytes(whole[:50])
    done = repaired(out)
    assert row.read_bytes() == whole and not done.is_damaged
    assert (out / "runs" / "a" / "run.json.torn").read_bytes() == whole[:50] + b"\n"


def test_a_run_that_was_started_over_is_in_the_index_no_more_and_its_old_row_is_kept_aside(out):
    (out / "runs" / "a" / "run.json").unlink()
    repaired(out)
    assert (out / "results.jsonl").read_bytes() == encode(run_record("b")) + b"\n"
    assert (out / "results.jsonl.torn").read_bytes() == encode(run_record("a")) + b"\n"


def test_rows_whose_runs_have_no_folder_here_stay_in_the_index(out):
    """Somebody copied the index alone: it is all there is."""
    whole = (out / "results.jsonl").read_bytes()
    shutil.rmtree(out / "runs" / "a")
    log_of(out).unlink()
    assert not repaired(out).changed
    write_index(out)
    assert (out / "results.jsonl").read_bytes() == whole


def test_a_run_in_use_is_left_alone(out):
    log_of(out).write_bytes(log_of(out).read_bytes()[:-5])
    before = log_of(out).read_bytes()
    with claim(out, "a"):
        done = repair_folder(out)
        assert done.in_use == ["a"] and log_of(out).read_bytes() == before
    assert repaired(out).changed == ["training_logs/run_a.jsonl"]


def test_cutting_the_end_keeps_the_file_that_a_writer_has_open(out):
    before = log_of(out).stat().st_ino
    log_of(out).write_bytes(log_of(out).read_bytes() + b'{"sch')
    repaired(out)
    assert log_of(out).stat().st_ino == before


def test_what_dead_writers_left_is_removed_and_what_live_ones_write_is_not(out):
    left = out / "runs" / "a" / f".run.json.x{files.TEMPORARY}"
    left.write_bytes(b"half")
    with files.replacing(out / "machine.json") as temporary:
        done = repair_folder(out)
        assert not left.exists() and temporary.exists() and done.changed == [f"runs/a/{left.name}"]


def test_shards_merge_into_what_one_folder_would_hold(tmp_path):
    plant(tmp_path / "whole", "a", "b", "c", "d")
    plant(tmp_path / "one", "a", "b")
    plant(tmp_path / "two", "b", "c")
    plant(tmp_path / "three", "d")
    (tmp_path / "three" / "runs" / "unfinished").mkdir()
    code = cli.main(["repair", str(tmp_path / "one"), "--merge", str(tmp_path / "two"), str(tmp_path / "three")])
    assert code == OK
    ignored = {".index.lock"}
    assert {k: v for k, v in bytes_of(tmp_path / "one").items() if k not in ignored} == {
        k: v for k, v in bytes_of(tmp_path / "whole").items() if k not in ignored
    }
    before = bytes_of(tmp_path / "one")
    cli.main(["repair", str(tmp_path / "one"), "--merge", str(tmp_path / "two")])
    assert bytes_of(tmp_path / "one") == before


def test_a_merge_follows_no_links_and_keeps_its_own_rows(tmp_path, capsys):
    plant(tmp_path / "one", "a")
    plant(tmp_path / "two", "a", "b", val_loss=1.5)
    (tmp_path / "secret").write_bytes(b"hunter2")
    (tmp_path / "two" / "runs" / "b" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "two" / "runs" / "c").symlink_to(tmp_path / "two" / "runs" / "b")
    ours = (tmp_path / "one" / "runs" / "a" / "run.json").read_bytes()
    cli.main(["repair", str(tmp_path / "one"), "--merge", str(tmp_path / "two")])
    assert (tmp_path / "one" / "runs" / "a" / "run.json").read_bytes() == ours
    assert "has another row of this run" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "one" / "runs").iterdir()) == ["a", "b"]
    assert not any(b"hunter2" in content for content in bytes_of(tmp_path / "one").values())


def test_folders_of_two_devices_are_not_merged(tmp_path, capsys):
    plant(tmp_path / "one", "a")
    plant(tmp_path / "two", "b", device="cpu-other")
    before = bytes_of(tmp_path / "one")
    assert cli.main(["repair", str(tmp_path / "one"), "--merge", str(tmp_path / "two")]) == USAGE
    assert "a results folder holds one device" in capsys.readouterr().err and bytes_of(tmp_path / "one") == before


def test_the_command_says_what_it_did_and_exits_accordingly(out, capsys):
    assert cli.main(["repair", str(out)]) == OK
    assert capsys.readouterr().err.endswith(f"{out}: 2 finished runs, 30 lines intact, 0 lost; nothing to mend\n")
    log_of(out).write_bytes(log_of(out).read_bytes() + b'{"torn')
    assert cli.main(["repair", str(out), "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert said["changed"] == ["training_logs/run_a.jsonl"] and not said["damaged"]
    log_of(out).write_bytes(b"garbage\n")
    assert cli.main(["repair", str(out)]) == BAD_DATA
    err = capsys.readouterr().err
    assert "training_logs/run_a.jsonl" in err and "run.json says 12 steps, and 0 are here" in err


@pytest.mark.parametrize("folder", ["missing", "file", "somebody's"])
def test_what_is_no_results_folder_is_refused_in_one_sentence(tmp_path, capsys, folder):
    (tmp_path / "file").write_bytes(b"")
    theirs = tmp_path / "somebody's" / f".theirs{files.TEMPORARY}"
    theirs.parent.mkdir()
    theirs.write_bytes(b"kept")
    assert cli.main(["repair", str(tmp_path / folder)]) == USAGE
    assert capsys.readouterr().err.count("\n") == 1 and theirs.exists()


def test_merging_into_a_new_folder_makes_it(tmp_path):
    plant(tmp_path / "one", "a")
    assert cli.main(["repair", str(tmp_path / "new"), "--merge", str(tmp_path / "one")]) == OK
    assert [run.run_id for run in load(tmp_path / "new").runs] == ["a"]


def test_a_folder_that_cannot_be_written_is_exit_5(out, capsys, monkeypatch):
    (out / "results.jsonl").write_bytes(b"")

    def full(*_):
        raise OSError(28, "No space left on device", str(out / "results.jsonl"))

    monkeypatch.setattr(files, "replace", full)
    assert cli.main(["repair", str(out)]) == ENVIRONMENT
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1


def test_hostile_lines_crash_nothing(out):
    hostile = [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1e999999",
        b"\xff\xfe\n\x00",
        b'{"schema":1,"run_id":"../../../etc/cron"}',
        b'{"schema":1,"nonfinite":[],"step":1}',
        b'{"schema":1,"nonfinite":{"a.b.c":"nan"}}',
        b"null",
        b'"text"',
        b"9" * 5000,
    ]
    for name in ("training_logs/run_a.jsonl", "results.jsonl", "runs/a/run.json", "runs/a/evaluations.jsonl"):
        with (out / name).open("ab") as file:
            file.write(b"\n".join(hostile))
    done = repaired(out)
    assert done.runs == 2 and state(done, "training_logs/run_a.jsonl").intact == STEPS
    assert {path.name for path in out.parent.iterdir()} == {"results"}
    assert load(out).steps("a")["step"].tolist() == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_runs_and_their_repair_need_no_locks_of_the_file_system(plan, tmp_path, no_locks):
    rows = [execute(plan("gpt2_single_cls", config, max_steps=1), tmp_path) for config in ("fp32_true", "amp_bf16")]
    assert sorted(indexed_rows(tmp_path)) == sorted(row.run_id for row in rows)
    (tmp_path / "results.jsonl").unlink()
    assert cli.main(["repair", str(tmp_path)]) == 0
    assert len(indexed_rows(tmp_path)) == 2
