"""A run's files between two machines: all of them arrive, whole or not at all, and nothing else does."""

import dataclasses
import hashlib

import pytest

from harness.matrix import ray_node
from harness.matrix.ray_node import Item, ParcelError
from instrument.results.folder import OutputError

RUN = "gpt2_clm-fp32_true-s0-01234567"


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


def carry(source, items, target, spoil=lambda wanted, data: data):
    """Bring the listed files over; returns what was asked for."""
    asked, receiving = [], ray_node.receive(target, RUN, items)
    try:
        wanted = next(receiving, None)
        while wanted is not None:
            asked.append(wanted)
            try:
                wanted = receiving.send(spoil(wanted, ray_node.chunk(source, items, wanted)))
            except StopIteration:
                wanted = None
    finally:
        receiving.close()
    return asked


def files_in(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_arrives_as_it_is_in_chunks_and_its_row_comes_last(node, tmp_path):
    items = ray_node.contents(node, RUN)
    asked = carry(node, items, tmp_path / "here")
    sent = {
        path: content
        for path, content in files_in(node).items()
        if RUN in path.split("/") or path == "machine.json" or path.startswith(("traces/", f"training_logs/run_{RUN}."))
    }
    del sent[f"runs/{RUN}/.claim"]
    assert files_in(tmp_path / "here") == sent and len(sent) == 7
    assert asked[-1] == (f"runs/{RUN}/run.json", 0)
    assert [offset for path, offset in asked if "tensors" in path] == [0, 4 << 20, 8 << 20, 12 << 20]


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
    carry(node, ray_node.contents(node, RUN), here)
    found = files_in(here)
    assert found["machine.json"] == b"old" and found["runs/other/run.json"] == b"old" and found[f"runs/{RUN}/.claim"] == b"old"
    assert not [path for path in found if "checkpoint-1" in path or "forensics" in path or "step2" in path]
    assert not (here / "runs" / RUN / "checkpoint-1").exists()


def test_a_parcel_that_breaks_off_leaves_no_row_and_no_half_file(node, tmp_path):
    items, here = ray_node.contents(node, RUN), tmp_path / "here"
    carry(node, items, here)
    for stop_at in range(len(carry(node, items, here))):
        receiving, wanted = ray_node.receive(here, RUN, items), None
        for n in range(stop_at + 1):
            wanted = next(receiving) if n == 0 else receiving.send(ray_node.chunk(node, items, wanted))
        receiving.close()
        assert not (here / "runs" / RUN / "run.json").exists()
        assert not [path for path in files_in(here) if path.endswith(".ddb-tmp")]
        carry(node, items, here)
        assert (here / "runs" / RUN / "run.json").read_bytes() == b"row\n"


@pytest.mark.parametrize(
    "spoil",
    [lambda w, data: data[:-1] + b"?", lambda w, data: data + b"more", lambda w, data: b""],
    ids=["changed", "longer", "nothing"],
)
def test_what_is_not_what_was_listed_is_refused(node, tmp_path, spoil):
    with pytest.raises(ParcelError, match="differs|bytes came"):
        carry(node, ray_node.contents(node, RUN), tmp_path / "here", spoil)
    assert not (tmp_path / "here" / "runs" / RUN / "run.json").exists()


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
    with pytest.raises(ParcelError, match="has no place"):
        next(ray_node.receive(here, RUN, [Item(path, 1, hashlib.sha256(b"x").hexdigest())]))
    assert files_in(tmp_path) == {f"here/runs/{RUN}/run.json": b"row"}


@pytest.mark.parametrize("link", [f"runs/{RUN}/checkpoint-3", f"runs/{RUN}", "training_logs"])
def test_links_are_not_followed_on_either_side(node, tmp_path, link):
    items, here, outside = ray_node.contents(node, RUN), tmp_path / "here", tmp_path / "outside"
    outside.mkdir()
    (here / link).parent.mkdir(parents=True)
    (here / link).symlink_to(outside)
    with pytest.raises((ParcelError, OutputError), match="is a link"):
        carry(node, items, here)
    assert not list(outside.iterdir())
    (node / "runs" / RUN / "secret").symlink_to("/etc/passwd")
    assert not [item for item in ray_node.contents(node, RUN) if "secret" in item.path]


def test_only_what_is_listed_can_be_read(node):
    items = ray_node.contents(node, RUN)
    for path in ("runs/other/run.json", "../x", "/etc/passwd"):
        with pytest.raises(ParcelError, match="not in the parcel"):
            ray_node.chunk(node, items, (path, 0))


def test_a_file_listed_twice_or_with_a_negative_size_is_refused(node, tmp_path):
    items = ray_node.contents(node, RUN)
    for bad in ([*items, items[0]], [dataclasses.replace(items[0], size_bytes=-1)]):
        with pytest.raises(ParcelError, match="has no place"):
            next(ray_node.receive(tmp_path / "here", RUN, bad))
