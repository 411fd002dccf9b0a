"""Lines are whole, files are replaced in one step, and a bad line is named."""

import threading

import pytest

from instrument.log import JsonlLog, read, replace
from instrument.records import EventRecord, RecordError


def event(step: int) -> EventRecord:
    return EventRecord(step=step, kind="warning", detail={"text": "x" * 500})


def test_what_is_written_is_read_back_in_order(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    with JsonlLog(path) as log:
        for step in range(20):
            log.write(event(step))
    with JsonlLog(path) as log:  # appends
        log.write(event(20))
    assert [record.step for record in read(path, EventRecord)] == list(range(21))
    with JsonlLog(path, fresh=True):
        pass
    assert path.read_bytes() == b""


def test_concurrent_writers_never_mix_lines(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(start):
        with JsonlLog(path) as log:
            for step in range(start, start + 100):
                log.write(event(step))

    threads = [threading.Thread(target=write, args=(k * 100,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.step for record in read(path, EventRecord)) == list(range(400))


def test_a_bad_line_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "events.jsonl"
    with JsonlLog(path) as log:
        log.write(event(1))
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "st')
    with pytest.raises(RecordError, match=r"events\.jsonl:2: not JSON"):
        list(read(path, EventRecord))


def test_replacing_leaves_no_temporary_file_and_keeps_the_old_on_failure(tmp_path):
    path = tmp_path / "run.json"
    replace(path, b"old")
    replace(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError):
        replace(path, "text is not bytes")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
