"""A run's files on their way to another machine: all of them arrive, whole or not at all, and nothing else does."""

import dataclasses
import errno
import hashlib

import numpy as np
import pytest

from instrument.results import transfer
from instrument.results.folder import OutputError
from instrument.results.transfer import PackedFile, TransferError, pack, unpack

RUN = "gpt2_clm-fp32_true-s0-01234567"


def packed_file(path, content=b"x"):
    return PackedFile(path, hashlib.sha256(content).hexdigest(), np.frombuffer(content, np.uint8))


@pytest.fixture
def node(tmp_path):
    """A results folder with a run in it, a bigger file, an empty one, a hidden one, and another run."""
    out = tmp_path / "node"
    for path, content in {
        "machine.json": b"{}",
        f"training_logs/run_{RUN}.jsonl": b"a\nb\n",
        f"runs/{RUN}/run.json": b"row\n",
        f"runs/{RUN}/checkpoint-3/tensors.safetensors": bytes(range(256)) * 50_000,
        f"runs/{RUN}/events.jsonl": b"",
        f"runs/{RUN}/.claim": b"theirs",
        f"traces/{RUN}.json.gz": b"t",
        f"traces/{RUN}-step4.json.gz": b"u",
        "runs/other/run.json": b"other",
        "results.jsonl": b"row\n",
        f"training_logs/run_{RUN}0.jsonl": b"another's",
    }.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    return out


def files_in(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_arrives_as_it_is(node, tmp_path):
    unpack(tmp_path / "here", RUN, pack(node, RUN))
    sent = {
        path: content
        for path, content in files_in(node).items()
        if RUN in path.split("/") or path == "machine.json" or path.startswith(("traces/", f"training_logs/run_{RUN}."))
    }
    del sent[f"runs/{RUN}/.claim"]
    assert files_in(tmp_path / "here") == sent and len(sent) == 7


def test_what_the_run_had_before_goes_and_the_rest_stays(node, tmp_path):
    here = tmp_path / "here"
    for path in (
        f"runs/{RUN}/checkpoint-1/tensors.safetensors",
        f"runs/{RUN}/forensics.json",
        f"runs/{RUN}/.claim",
        "runs/other/run.json",
        "machine.json",
        f"traces/{RUN}-step2.json.gz",
    ):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(b"old")
    unpack(here, RUN, pack(node, RUN))
    found = files_in(here)
    assert found["machine.json"] == b"old" and found["runs/other/run.json"] == b"old" and found[f"runs/{RUN}/.claim"] == b"old"
    assert not [path for path in found if "checkpoint-1" in path or "forensics" in path or "step2" in path]
    assert not (here / "runs" / RUN / "checkpoint-1").exists()


def test_what_breaks_off_leaves_no_row_and_no_half_file(node, tmp_path, monkeypatch):
    """The disk is full at the first file, the second and so on; the row comes last."""
    here, write = tmp_path / "here", transfer.files.replace
    unpack(here, RUN, pack(node, RUN))
    for room in range(len(pack(node, RUN)) - 1):
        written = []

        def full(path, data, room=room, written=written):
            if len(written) == room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
            write(path, data)

        monkeypatch.setattr(transfer.files, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            unpack(here, RUN, pack(node, RUN))
        assert not (here / "runs" / RUN / "run.json").exists() and here / "runs" / RUN / "run.json" not in written
        monkeypatch.setattr(transfer.files, "replace", write)
    unpack(here, RUN, pack(node, RUN))
    assert (here / "runs" / RUN / "run.json").read_bytes() == b"row\n"


@pytest.mark.parametrize("content", [b"a\nb?", b"a\nb\nmore", b""], ids=["changed", "longer", "nothing"])
def test_what_is_not_what_was_sent_is_refused_before_anything_is_touched(node, tmp_path, content):
    here = tmp_path / "here"
    unpack(here, RUN, pack(node, RUN))
    before = files_in(here)
    spoiled = [
        dataclasses.replace(one, data=np.frombuffer(content, np.uint8)) if "training_logs" in one.path else one
        for one in pack(node, RUN)
    ]
    with pytest.raises(TransferError, match="differs"):
        unpack(here, RUN, spoiled)
    assert files_in(here) == before


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "/etc/passwd",
        "runs/other/run.json",
        f"runs/{RUN}",
        f"runs/{RUN}/../other/x",
        f"runs/{RUN}/./x",
        f"runs/{RUN}/.claim",
        f"runs/{RUN}/.x/y",
        f"runs//{RUN}/x",
        f"training_logs/run_{RUN}0.jsonl",
        "results.jsonl",
        f"traces/{RUN}-step1x.json.gz",
        "machine-json",
        f"runs/{RUN}/a\nb",
        f"runs/{RUN}/a\\b",
        f"runs/{RUN}/x/",
        "",
        ".",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_touched(tmp_path, path):
    here = tmp_path / "here"
    (here / "runs" / RUN).mkdir(parents=True)
    (here / "runs" / RUN / "run.json").write_bytes(b"row")
    with pytest.raises(TransferError, match="has no place"):
        unpack(here, RUN, [packed_file(path)])
    assert files_in(tmp_path) == {f"here/runs/{RUN}/run.json": b"row"}


@pytest.mark.parametrize("link", [f"runs/{RUN}/checkpoint-3", f"runs/{RUN}", "training_logs"])
def test_links_are_not_followed_on_either_side(node, tmp_path, link):
    packed, here, outside = pack(node, RUN), tmp_path / "here", tmp_path / "outside"
    outside.mkdir()
    (here / link).parent.mkdir(parents=True)
    (here / link).symlink_to(outside)
    with pytest.raises((TransferError, OutputError), match="is a link"):
        unpack(here, RUN, packed)
    assert not list(outside.iterdir())
    (node / "runs" / RUN / "secret").symlink_to("/etc/passwd")
    assert not [one for one in pack(node, RUN) if "secret" in one.path]


def test_a_file_that_comes_twice_is_refused(node, tmp_path):
    packed = pack(node, RUN)
    with pytest.raises(TransferError, match="has no place"):
        unpack(tmp_path / "here", RUN, [*packed, packed[0]])
