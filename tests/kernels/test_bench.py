"""The bench: its statistics, its bookkeeping, and that it never invents a number."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch

from kernels import __main__ as command
from kernels import bench
from kernels.bench import BenchArm, median_interval

pytestmark = pytest.mark.slow


def samples(calls):
    """Time as a function of the arm, so that ratios are known: an arm is its own duration."""
    return [getattr(call, "seconds", 0.5) for call in calls]


def arm(name, seconds=1.0, bytes_moved=0):
    def setup():
        def call():
            pass

        call.seconds = seconds
        return call

    return BenchArm("op", "case", name, setup, bytes_moved)


def broken():
    raise ImportError("No module named 'liger_kernel'")


def rows_of(arms, pairs=10):
    return {row.arm: row for row in bench._run_case(arms, samples, "cpu", pairs)}


def test_median_interval_covers_the_median_95_times_in_100():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        _, low, high = median_interval([rng.expovariate(1.0) for _ in range(32)])
        covered += low <= math.log(2) <= high
    assert covered / 400 >= 0.93


def test_median_interval_of_few_values_is_their_range():
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    assert median_interval([1.0, 3.0]) == (2.0, 1.0, 3.0)
    assert median_interval([float(i) for i in range(1, 33)]) == (16.5, 10.0, 23.0)


def test_a_case_has_ours_the_others_itself_again_and_a_copy():
    rows = rows_of([arm("ours", bytes_moved=160_000), arm("slow", seconds=3.0)])
    assert list(rows) == ["ours", "slow", "again", "copy"]
    assert all(row.status == "measured" and row.pairs >= 10 for row in rows.values())
    assert rows["slow"].time_over_ours == 3.0 and rows["again"].time_over_ours == 1.0
    assert rows["ours"].time_over_ours is None and rows["ours"].time_s == 1.0
    assert (rows["ours"].share_of_copy_low, rows["ours"].share_of_copy, rows["ours"].share_of_copy_high) == (0.5,) * 3
    assert rows["ours"].bytes_per_s == 160_000 and rows["slow"].bytes_per_s is None


def test_an_arm_that_cannot_run_is_a_row_that_says_why():
    rows = rows_of([arm("ours"), BenchArm("op", "case", "liger", broken, 0)])
    assert rows["liger"].status == "failed" and "liger_kernel" in rows["liger"].note and rows["liger"].time_s is None
    rows = rows_of([BenchArm("op", "case", "ours", broken, 0), arm("eager")])
    assert rows["ours"].status == rows["eager"].status == "failed" and "again" not in rows


def test_unmeasured_rows_hold_no_number():
    for row in bench.unmeasured("cuda", ops=["cross_entropy", "bce_with_logits", "logit_stats"]):
        assert row.status == "unmeasured" and row.time_s is None and row.share_of_copy is None


def test_the_cuda_cases_cover_what_was_asked():
    cases = {(a.op, a.case) for arms in bench.collect("cuda", ["cross_entropy"]) for a in arms}
    for width in (4096, 32768, 50304, 128256):
        for dtype in ("fp32", "bf16", "fp16"):
            assert ("cross_entropy", f"{dtype} 8192x{width}") in cases


def test_the_headline_is_measured_first_and_bf16_before_the_rest():
    cases = [(arms[0].op, arms[0].case) for arms in bench.collect("cuda")]
    assert cases[0] == bench.HEADLINE == ("cross_entropy", "bf16 8192x50304") and len(set(cases)) == len(cases)
    dtypes = [case.split()[0] for _, case in cases]
    assert "bf16" not in dtypes[dtypes.index("fp32") :] and {op for op, case in cases if case.startswith("bf16")} == {
        *bench.MODULES
    }


def test_a_shape_picks_its_cases_and_an_unknown_one_names_those_there_are():
    def cases(*shapes, ops):
        return [arms[0].case for arms in bench.collect("cuda", ops, ["bf16"], list(shapes))]

    assert cases("8192x50304", ops=["cross_entropy"]) == ["bf16 8192x50304"]
    assert cases("gpt2-124m", ops=["scale", "multi_tensor_stats"]) == ["bf16 gpt2-124m gradients"] * 2
    assert cases("8192x768", ops=["activation_stats"]) == ["bf16 13 outputs 8192x768"]
    with pytest.raises(ValueError, match="no case of these ops has the shape '8192x50305' on cuda; one of .*8192x50304"):
        cases("8192x50305", ops=["cross_entropy"])


def test_a_bench_that_was_cut_resumes_with_the_cases_it_lacks(tmp_path, monkeypatch, capsys):
    out, ran = tmp_path / "kernels.json", []

    def run(cases, device, pairs):
        for arms in cases:
            ran.append(arms[0].case)
            if len(ran) == 3:
                raise KeyboardInterrupt
            yield from (bench.BenchRow(a.op, a.case, a.name, device, "measured", time_s=1.0) for a in arms)

    def main(*more):
        ran.clear()
        return command.main(["bench", "--op", "logit_stats", "--device", "cpu", "--pairs", "2", "--out", str(out), *more])

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert not json.loads(out.read_text())["complete"] and ran == ["bf16 128x50304", "fp32 128x50304", "fp16 128x50304"]
    with pytest.raises(KeyboardInterrupt):
        main("--pairs", "3")
    assert len(ran) == 3, "another protocol's rows are none of its own"
    document = json.loads(out.read_text())
    document["rows"].pop()  # killed between two rows of a case
    out.write_text(json.dumps(document | {"protocol": document["protocol"] | {"pairs": 2}}))
    assert main() == 0 and ran == ["fp32 128x50304", "fp16 128x50304"]
    document = json.loads(out.read_text())
    assert document["complete"] and [r["case"] for r in document["rows"] if r["device"] == "cpu"] == [
        case for case in ("bf16 128x50304", "fp32 128x50304", "fp16 128x50304") for _ in range(2)
    ]
    with pytest.raises(KeyboardInterrupt):
        main()
    assert len(ran) == 3, "a complete file is measured anew"


def test_unknown_op():
    with pytest.raises(ValueError, match="unknown op"):
        bench.collect("cpu", ["softmax"])


@pytest.mark.process
def test_command_line(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "kernels", "bench", "--op", "logit_stats", "--dtype", "bf16", "--device", "cpu"]
    done = subprocess.run([*command, "--pairs", "2", "--json", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads(out.read_text()) == document
    assert document["schema"] == bench.SCHEMA and document["machine"]["torch"] == torch.__version__
    assert {row["status"] for row in document["rows"] if row["device"] == "cpu"} == {"measured"}
    assert "logit_stats" in done.stderr
    if not torch.cuda.is_available():
        assert {row["status"] for row in document["rows"] if row["device"] == "cuda"} == {"unmeasured"}
        assert subprocess.run([*command[:-1], "cuda"], capture_output=True).returncode == 5


@pytest.mark.process
def test_importing_kernels_imports_neither_torch_nor_triton():
    code = "import sys, kernels, kernels.bench, kernels.compile; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]


@pytest.mark.process
def test_the_op_wins_over_the_package_of_the_same_name():
    code = "import kernels.cross_entropy.reference; print(callable(kernels.cross_entropy), hasattr(kernels, 'get_kernel'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["True", "False"]


def test_pairs_are_taken_a_b_b_a():
    order = []

    def recorded(calls):
        order.append([call.seconds for call in calls])
        return samples(calls)

    list(bench._run_case([arm("ours", 1.0), arm("other", 2.0)], recorded, "cpu", 4))
    assert order == [[1.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]] * 2
