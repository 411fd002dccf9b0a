"""`python -m kernels check`: everything right on this device, and a planted fault in each op is found."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from kernels import __main__ as command
from kernels import check

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy under Triton's interpreter
ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", check.MODULES)
def test_every_op_is_right(op, impl):
    rows = list(check.run(DEVICE, impl, [op], ["fp32", "bf16"] if impl == "torch" else ["fp32"]))
    assert rows and all(row.status == "right" for row in rows), [row for row in rows if row.status != "right"]


def test_a_count_that_is_one_off_is_wrong(monkeypatch):
    from kernels import list_cases as judged

    honest = judged.multi_tensor_stats

    def off_by_one(tensors, **options):
        stats = honest(tensors, **options)
        stats.zeros[0] += 1
        return stats

    monkeypatch.setattr(judged, "multi_tensor_stats", off_by_one)
    rows = list(check.run(DEVICE, "torch", ["multi_tensor_stats"], ["fp32"]))
    assert {row.status for row in rows if row.quantity == "counts"} == {"wrong"}
    assert {row.status for row in rows if row.quantity == "norms"} == {"right"}


@pytest.mark.parametrize("op, name", [("cross_entropy", "cross_entropy"), ("bce_with_logits", "bce_with_logits")])
@pytest.mark.parametrize("factor", [1.003, float("nan")])
def test_a_gradient_that_is_slightly_off_is_wrong(monkeypatch, op, name, factor):
    from importlib import import_module

    judged = import_module(check.MODULES[op])
    honest = getattr(judged, name)

    def off(logits, *args, **options):
        return honest(Scaled.apply(logits), *args, **options)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    monkeypatch.setattr(judged, name, off)
    rows = [row for row in check.run(DEVICE, "torch", [op], ["fp32"]) if row.quantity == "gradient"]
    assert rows and all(row.status == "wrong" for row in rows)
    if factor != factor:
        assert all(row.error is None and row.note for row in rows), "a NaN is no number in strict JSON"


def test_an_op_that_raises_is_failed_and_hides_no_other(monkeypatch, tmp_path, capsys):
    from kernels import list_cases as judged

    def broken(*args, **options):
        raise RuntimeError("no code for this device\nand a long tail")

    monkeypatch.setattr(judged, "unscale_and_stats_", broken)
    out = tmp_path / "check.json"
    code = command.main(["check", "--op", "unscale", "exponent_histogram", "--device", "cpu", "--out", str(out), "--json"])
    document = json.loads(out.read_text())
    assert code == 3 and json.loads(capsys.readouterr().out) == document
    status = {(row["op"], row["status"]) for row in document["rows"]}
    assert status == {("unscale", "failed"), ("exponent_histogram", "right")} and document["not_right"] == 2
    assert document["rows"][0]["note"] == "RuntimeError: no code for this device"


def test_ops_in_processes_of_their_own_and_one_that_crashes_is_tried_again_alone(monkeypatch):
    row, began, lock = check.CheckRow("", "fp32", "cpu", "auto", "", "loss", "right"), [], threading.Barrier(3)

    def run(words, **options):
        op = words[words.index("--op") + 1]
        began.append(op)
        if len(began) <= 3:
            lock.wait(60)  # all three are under way at the same time
        if op == "scale" or (op == "unscale" and began.count(op) == 1):  # the latter because another process had the GPU
            return subprocess.CompletedProcess(words, -11, "", "torn\nSegmentation fault\n")
        return subprocess.CompletedProcess(words, 0, json.dumps({"rows": [asdict(replace(row, op=op))]}), "")

    monkeypatch.setattr(check.subprocess, "run", run)
    rows = {row.op: row for row in check.run_apart("cpu", ops=["scale", "logit_stats", "unscale"], dtypes=["fp32"], jobs=3)}
    assert rows["logit_stats"] == replace(row, op="logit_stats") and rows["unscale"].status == "right"
    assert rows["scale"].status == "failed" and rows["scale"].note == "its process ended with -11: Segmentation fault"
    assert sorted(began) == ["logit_stats", "scale", "scale", "unscale", "unscale"]


@pytest.mark.process
def test_jobs_judge_what_one_process_judges(capsys):
    arguments = ["check", "--op", "scale", "exponent_histogram", "--dtype", "fp32", "--device", "cpu", "--json"]
    assert command.main(arguments) == command.main([*arguments, "--jobs", "2"]) == 0
    one, several = (json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert sorted(map(str, one["rows"])) == sorted(map(str, several["rows"])) and one["judged"] == several["judged"] > 2
    assert command.main([*arguments, "--jobs", "0"]) == 2


def test_a_device_that_is_not_here_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["check", "--device", "cuda"]) == 5
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.process
def test_the_file_is_made_to_its_end_when_nobody_reads_the_table(tmp_path):
    end, pipe = os.pipe()
    os.close(end)
    arguments = ["check", "--op", "scale", "--device", "cpu", "--dtype", "fp32", "--json"]
    command = [sys.executable, "-m", "kernels", *arguments, "--out", str(tmp_path / "check.json")]
    try:
        unread = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=pipe, timeout=300, check=False)
    finally:
        os.close(pipe)
    whole = subprocess.run(command[:-2], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert unread.returncode == whole.returncode == 0
    found, due = json.loads((tmp_path / "check.json").read_bytes()), json.loads(whole.stdout)
    assert found["judged"] == due["judged"] > 2 and len(found["rows"]) == due["judged"]
