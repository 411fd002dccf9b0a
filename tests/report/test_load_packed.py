"""A packed folder reads as the plain one; what is wrong with a gzip file is a defect and costs no other run."""

import gzip

import numpy as np
import pytest

from instrument.results import lines as packed_logs
from instrument.results.contents import load

RUN = "gpt2_clm-amp_bf16-s0-0badcafe"


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
