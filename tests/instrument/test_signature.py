"""Rows are signed by the user who made them, with a key that no results folder holds."""

import threading

import msgspec
import pytest

from instrument.results import signature
from instrument.results.schemas import RunRecord, decode, encode
from instrument.results.signature import is_own, key_file, signature_of


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def a_run(**changes):
    texts = dict.fromkeys(
        "case scenario arch task loss loss_reduction dtype_config preset device data_source weights_source".split(), "x"
    )
    numbers = dict.fromkeys("seed max_steps batch_size micro_batch seq_len".split(), 1)
    return RunRecord(**{**texts, **numbers, "run_id": "r", "status": "completed", **changes})


def signed(**changes):
    record = a_run(config={"lr": 1e-3, "case": {"id": "x", "betas": (0.9, 0.95), "rate": 1.0}}, **changes)
    return msgspec.structs.replace(record, flags=record.flags | {"signature": signature_of(record)})


def test_a_row_stays_its_makers_through_a_file():
    record = signed()
    assert is_own(record) and is_own(decode(encode(record), type(record)))
    assert key_file().stat().st_mode & 0o777 == 0o600 and [key_file()] == list(key_file().parent.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "another"},
        {"seed": 7},
        {"case": "other"},
        {"config": {"lr": 2e-3}},
        {"flags": {}},
        {"flags": {"signature": "é"}},
    ],
)
def test_a_row_that_was_changed_is_nobodys(change):
    assert not is_own(msgspec.structs.replace(signed(), **change))


def test_another_users_row_is_not_mine(tmp_path, monkeypatch):
    theirs = signed()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "me"))
    assert not is_own(theirs) and not key_file().exists(), "reading makes no key"


def test_without_a_place_for_a_key_a_row_is_unsigned(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert signature_of(a_run()) is None and not is_own(a_run())


def test_a_damaged_key_signs_nothing(state):
    key_file().parent.mkdir()
    key_file().write_bytes(b"")
    assert signature_of(a_run()) is None


def test_processes_that_begin_together_agree_on_one_key(monkeypatch):
    """Each has found no key; the first to place its own wins."""
    barrier, keys = threading.Barrier(8), []

    def make():
        barrier.wait()
        keys.append(signature._new_key())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1
