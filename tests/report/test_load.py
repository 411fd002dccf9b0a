"""A folder is read whole, fast and once, packed or not; what is wrong with it is listed and never averaged."""

import gzip
import json
import math
import os

import msgspec
import numpy as np
import pytest

from instrument.results import lines as packed_logs
from instrument.results.contents import NoResults, column_dtypes, load, read_columns
from instrument.results.schemas import SCHEMA, RecordError, StepRecord, decode, encode

RUN = "gpt2_clm-amp_bf16-s0-0badcafe"


def files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def whats(folder):
    return [defect.what for defect in folder.defects]


def test_a_clean_folder_has_no_defects(small):
    assert len(small.runs) == 12 and small.defects == () and small.device == "planted" and small.marks == ("SIMULATED",)


def test_columns_equal_the_records_one_by_one(small):
    columns = small.steps(RUN)
    lines = (small.path / "training_logs" / f"run_{RUN}.jsonl").read_bytes().splitlines()
    for field in column_dtypes(StepRecord):
        expected = [getattr(decode(line, StepRecord), field) for line in lines]
        found = columns[field]
        assert len(found) == len(expected) == 60
        for a, b in zip(found.tolist(), expected, strict=True):
            assert (b is None and math.isnan(a)) or a == b, field
    assert columns["step"].dtype == np.int64 and columns["step_skipped"].dtype == bool
    assert columns["flops"].dtype == np.float64  # an integer that may be null


def test_null_nan_and_infinity_are_distinguished(small):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    step = decode(lines[0], StepRecord)
    changed = msgspec.structs.replace(step, loss=math.nan, grad_norm=math.inf, grad_absmax=None)
    log.write_bytes(encode(changed) + b"\n" + b"".join(lines[1:]))
    columns = load(small.path).steps(RUN)
    assert math.isnan(columns["loss"][0]) and columns["grad_norm"][0] == math.inf and math.isnan(columns["grad_absmax"][0])
    assert columns["loss"][1] == decode(lines[1], StepRecord).loss


def test_columns_are_read_only_and_an_unmeasured_one_takes_no_memory(small):
    columns = small.steps(RUN)
    with pytest.raises(ValueError):
        columns["loss"][0] = 0.0
    assert columns["mfu_measured_peak"].base is not None and columns["mfu_measured_peak"].strides == (0,)


@pytest.mark.parametrize(
    ("damage", "line", "says"),
    [
        (lambda b: b[:-20], 60, "torn last line"),
        (lambda b: b.replace(b'"step":7,', b'"step":\xff,', 1), 7, "not JSON"),
        (lambda b: b.replace(b'"lr":0.001', b'"lr":"fast"', 1), 1, "lr"),
        (lambda b: b.replace(b'"schema":1', b'"schema":99', 1), 1, "schema 99"),
        (lambda b: b.replace(b'"loss":', b'"gain":', 1), 1, "StepRecord"),
        (lambda b: b.replace(b'"nonfinite":{}', b'"nonfinite":{"loss":"nan"}', 1), 1, "nonfinite map"),
        (lambda b: b.replace(b'"nonfinite":{}', b'"nonfinite":{"nothing":"nan"}', 1), 1, "nonfinite map"),
        (lambda b: b.replace(b"\n", b"\n[]\n", 1), 2, "object"),
        (lambda b: b.replace(b'"lr":0.001', b'"lr":"\\ud800"', 1), 1, ""),
        (lambda b: b.replace(b'"step":7,', b'"step":' + b"9" * 30 + b",", 1), 7, "step is too large"),
        (lambda b: b.replace(b'"grad_nonfinite":0', b'"grad_nonfinite":' + b"9" * 400, 1), 1, "too large"),
        (lambda b: b.replace(b'"nonfinite":{}', b'"nonfinite":' + b"[" * 100_000, 1), 1, "recursion"),
        (lambda b: b.replace(b'"loss":', b'"loss":1e999,"more":', 1), 1, "out of range"),
    ],
)
def test_a_damaged_line_is_listed_with_its_number_and_the_others_stay(small, damage, line, says):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    log.write_bytes(damage(log.read_bytes()))
    before = files(small.path)
    folder = load(small.path)
    (defect,) = folder.defects
    assert defect.file == f"training_logs/run_{RUN}.jsonl" and defect.line == line and says in defect.what
    assert len(folder.steps(RUN)["step"]) in (59, 60)
    assert files(small.path) == before


def test_a_megabyte_in_a_broken_line_is_listed_in_a_line(small):
    file = small.path / "runs" / RUN / "run.json"
    file.write_bytes(file.read_bytes().replace(b'"status":"completed"', b'"status":"' + b"x" * 1_000_000 + b'"'))
    folder = load(small.path)
    assert all(len(str(defect)) < 500 and "\n" not in str(defect) for defect in folder.defects) and folder.defects


def test_a_step_that_comes_twice_counts_once(small):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:10] + lines[5:]))
    folder = load(small.path)
    assert folder.steps(RUN)["step"].tolist() == list(range(1, 61))
    assert whats(folder) == ["5 rows repeat a step; the first row of each counts"]


def test_a_log_that_lost_steps_or_is_missing_is_noticed(small):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:30]))
    assert whats(load(small.path)) == ["holds 30 steps, and its row says 60"]
    log.unlink()
    assert whats(load(small.path)) == ["is missing, and its row says 60"]


def test_a_run_id_that_comes_twice_in_the_index_is_one_run(small):
    index = small.path / "results.jsonl"
    index.write_bytes(index.read_bytes() + index.read_bytes().splitlines(keepends=True)[0])
    folder = load(small.path)
    assert len(folder.runs) == 12 and len(folder.defects) == 1 and "more than once" in folder.defects[0].what


def test_a_copied_run_folder_is_left_out(small):
    copy = small.path / "runs" / "copy-of-it"
    copy.mkdir()
    (copy / "run.json").write_bytes((small.path / "runs" / RUN / "run.json").read_bytes())
    folder = load(small.path)
    assert len(folder.runs) == 12 and "a copy" in folder.defects[0].what


def test_the_runs_own_row_wins_over_the_index(small):
    index = small.path / "results.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"samples_per_s":', b'"samples_per_s":9', 1))
    folder = load(small.path)
    assert all(run.samples_per_s < 1_000 for run in folder.runs) and "differs" in folder.defects[0].what


def test_an_index_alone_is_enough_and_said(small):
    for file in (small.path / "runs").glob("*/run.json"):
        file.unlink()
    folder = load(small.path)
    assert len(folder.runs) == 12 and len(folder.defects) == 12


def test_an_index_row_cannot_lead_out_of_the_folder(small):
    index = small.path / "results.jsonl"
    row = index.read_bytes().splitlines(keepends=True)[0]
    index.write_bytes(index.read_bytes() + row.replace(RUN.encode(), b"../../etc/x"))
    folder = load(small.path)
    assert len(folder.runs) == 12 and any("no safe file name" in what for what in whats(folder))


def test_runs_of_another_device_are_left_out(small):
    file = small.path / "runs" / RUN / "run.json"
    file.write_bytes(file.read_bytes().replace(b'"device":"planted"', b'"device":"elsewhere"'))
    folder = load(small.path)
    assert RUN not in folder.by_id and folder.device == "planted" and any("elsewhere" in what for what in whats(folder))


def test_missing_and_empty_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(NoResults, match="does not exist") as missing:
        load(tmp_path / "nothing")
    assert missing.value.missing
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(NoResults, match="no valid run") as empty:
        load(tmp_path)
    assert not empty.value.missing and "is empty" in str(empty.value)


def test_side_files_that_are_no_objects_are_defects(small):
    (small.path / "machine.json").write_text("{")
    (small.path / "kernels.json").write_text("[1]")
    (small.path / "overhead.json").write_text('{"rows": []}')
    folder = load(small.path)
    assert folder.machine == {} and folder.kernels is None and folder.overhead == {"rows": []}
    assert {defect.file for defect in folder.defects} == {"machine.json", "kernels.json"}


def test_hardware_readings_become_columns(small):
    file = small.path / "runs" / RUN / "hardware.jsonl"
    rows = [
        {"schema": SCHEMA, "time_s": 0.5, "unix_s": 1e9, "gpu_power_w": None, "gpu_clock_event_reasons": ["sw_power_cap"]},
        {"schema": SCHEMA, "time_s": 1.0, "unix_s": 1e9, "gpu_power_w": 300},
        {"schema": 99, "time_s": 2, "unix_s": 1e9},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    folder = load(small.path)
    columns = folder.hardware(RUN)
    assert columns["time_s"].tolist() == [0.5, 1.0] and math.isnan(columns["gpu_power_w"][0])
    assert columns["gpu_clock_event_reasons"].tolist() == [["sw_power_cap"], None] and columns["marks"].shape == (2,)
    assert [defect.line for defect in folder.defects] == [3, 4]
    assert folder.hardware(folder.runs[0].run_id) is None or folder.runs[0].run_id == RUN


def test_the_fast_reader_agrees_with_the_careful_one_on_random_damage(small, tmp_path):
    """Flip each of many bytes: the reader must keep exactly the lines that `decode` accepts."""
    lines = (small.path / "training_logs" / f"run_{RUN}.jsonl").read_bytes().splitlines(keepends=True)[:3]
    text = b"".join(lines)
    random = np.random.default_rng(0)
    for at in random.integers(0, len(text), 150):
        damaged = text[:at] + bytes([text[at] ^ int(random.integers(1, 256))]) + text[at + 1 :]
        file = tmp_path / "log.jsonl"
        file.write_bytes(damaged)
        good = []
        for line in file.open("rb"):
            try:
                good.append(decode(line, StepRecord).step)
            except (RecordError, ValueError):
                pass
        columns, defects = read_columns(file, StepRecord, "log.jsonl")
        assert columns["step"].tolist() == good
        assert len(defects) == sum(1 for _ in file.open("rb")) - len(good)


@pytest.mark.parametrize(
    ("row", "marks"),
    [
        ({"preset": "tiny", "data_source": "embedded"}, ("TINY PRESET", "EMBEDDED DATA", "SIMULATED")),
        ({"flags": {"imported": {"source": "x"}}}, ("IMPORTED",)),
        ({"config": {"device": "cpu"}}, ("CPU", "SIMULATED")),
        ({"device": "cpu-amd-epyc", "config": {}, "flags": {}}, ("CPU",)),
        ({"flags": {}}, ()),
    ],
)
def test_marks_say_what_a_reader_must_know(plant, row, marks):
    assert plant(("gpt2_clm",), ("fp32_true",), (0,), lambda *_: row).marks == marks


def test_pipes_are_not_opened(small):
    """Reading one would wait for ever."""
    os.mkfifo(small.path / "kernels.json")
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    log.unlink()
    os.mkfifo(log)
    folder = load(small.path)
    assert len(folder.steps(RUN)["step"]) == 0 and folder.kernels is None
    assert sum("no plain file" in what for what in whats(folder)) == 2


def zip_all(path):
    for log in [*path.glob("training_logs/*.jsonl"), *path.glob("runs/*/*.jsonl")]:
        log.with_name(f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes()))
        log.unlink()


def test_a_packed_folder_reads_as_the_plain_one(small):
    plain = {run.run_id: (small.steps(run.run_id), small.evaluations(run.run_id)) for run in small.runs}
    zip_all(small.path)
    folder = load(small.path)
    assert folder.runs == small.runs and folder.defects == ()
    for run_id, (steps, evaluations) in plain.items():
        assert folder.evaluations(run_id) == evaluations and evaluations
        for field, column in folder.steps(run_id).items():
            np.testing.assert_array_equal(column, steps[field])


def test_activations_are_read_from_gzip_too(small):
    rows = b'{"module": "h.0", "step": 1}\n[]\n{"module": "h.1"}'
    (small.path / "runs" / RUN / "activations.jsonl.gz").write_bytes(gzip.compress(rows))
    folder = load(small.path)
    assert [row["module"] for row in folder.activations(RUN)] == ["h.0", "h.1"]
    assert [str(d) for d in folder.defects] == [f"runs/{RUN}/activations.jsonl.gz:2: is a list and not an object"]


def test_the_plain_log_counts_where_both_are(small):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    log.with_name(f"{log.name}.gz").write_bytes(b"not gzip")
    assert load(small.path).defects == ()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda b: b[:-30], "not a whole gzip file"),
        (lambda b: b[:60] + bytes([b[60] ^ 0xFF]) + b[61:], "not a whole gzip file"),
        (lambda b: b"{}\n", "not a whole gzip file"),
        (lambda b: b"", "holds 0 steps"),
    ],
)
def test_a_damaged_gzip_file_is_a_defect_of_its_run_alone(small, damage, says):
    zip_all(small.path)
    log = small.path / "training_logs" / f"run_{RUN}.jsonl.gz"
    log.write_bytes(damage(log.read_bytes()))
    folder = load(small.path)
    assert folder.defects and all(RUN in d.file for d in folder.defects) and any(says in d.what for d in folder.defects)
    assert len(folder.runs) == 12 and len(folder.steps("gpt2_clm-fp32_true-s0-0badcafe")["step"]) == 60


def test_a_small_file_does_not_unpack_to_everything(small, monkeypatch):
    monkeypatch.setattr(packed_logs, "LARGEST_BYTES", 100_000)
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    for content in (b"x" * 10_000_000, b"{}\n" * 3_000_000):
        log.unlink(missing_ok=True)
        log.with_name(f"{log.name}.gz").write_bytes(gzip.compress(content))
        folder = load(small.path)
        assert any("unpacks to more than" in d.what for d in folder.defects)


def test_a_link_is_not_followed_because_it_ends_in_gz(small, tmp_path):
    log = small.path / "training_logs" / f"run_{RUN}.jsonl"
    outside = tmp_path / "outside.gz"
    outside.write_bytes(gzip.compress(log.read_bytes()))
    log.unlink()
    log.with_name(f"{log.name}.gz").symlink_to(outside)
    folder = load(small.path)
    assert len(folder.steps(RUN)["step"]) == 0 and any("is a link" in d.what for d in folder.defects)
