"""Every microsecond of a hand-made trace ends in its one place, on a CPU and on CUDA."""

import subprocess
import sys

import pytest

from instrument.trace.time_table import OUTSIDE, time_table


def op(name, ts, dur, tid=1, **arguments):
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": arguments}


def annotation(name, ts, dur):
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": {}}


def kernel(name, ts, dur, correlation, external_id=None, cat="kernel"):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "pid": 0,
        "tid": 7,
        "args": {"correlation": correlation, "External id": external_id},
    }


def launch(ts, correlation):
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": ts,
        "dur": 1,
        "pid": 1,
        "tid": 1,
        "args": {"correlation": correlation},
    }


def seconds_us(table):
    return {kind: {phase: round(s * 1e6, 6) for phase, s in row.items()} for kind, row in table["seconds"].items()}


HOST = [
    annotation("ddb.window", 0, 1000),
    annotation("ddb.phase.forward", 10, 290),
    annotation("ddb.phase.backward", 300, 300),
    annotation("ddb.phase.optimizer", 600, 200),
    annotation("Optimizer.step#AdamW.step", 610, 100),
    op("aten::linear", 20, 50),
    op("aten::addmm", 25, 40, **{"Sequence number": 3, "Fwd thread id": 0}),
    op("aten::empty", 30, 5),  # a helper of addmm
    op("aten::scaled_dot_product_attention", 100, 80, **{"Sequence number": 4, "Fwd thread id": 0}),
    op("aten::bmm", 110, 60, **{"Sequence number": 4, "Fwd thread id": 0}),
    op("aten::copy_", 120, 10),
    op("autograd::engine::evaluate_function: BmmBackward0", 310, 90, tid=2, **{"Sequence number": 4, "Fwd thread id": 1}),
    op("BmmBackward0", 315, 80, tid=2, **{"Sequence number": 4, "Fwd thread id": 1}),
    op("aten::bmm", 320, 70, tid=2),
    op("autograd::engine::evaluate_function: AddmmBackward0", 410, 50, tid=2, **{"Sequence number": 3, "Fwd thread id": 1}),
    op("aten::mm", 420, 30, tid=2),
    op("aten::_foreach_mul_", 620, 30),
    op("aten::mm", 660, 20),  # within optimizer.step
    op("aten::zero_", 720, 10),  # zero_grad: in the phase, not in the step
    op("aten::add", 900, 20),  # between phases
    op("aten::add", 905, 20, tid=2),  # beside it on another thread
    op("mystery", 950, 5),
]


def test_self_times_of_the_host_by_class_and_phase():
    table = time_table(HOST)
    assert table["source"] == "cpu_self_time"
    assert seconds_us(table) == {
        "matmul": {"forward": 50, "backward": 50},
        "attention": {"forward": 80, "backward": 90},
        "elementwise": {OUTSIDE: 40},
        "optimizer": {"optimizer": 50},
        "copy": {"optimizer": 10},
        "other": {OUTSIDE: 5},
    }
    assert table["sum_s"] == pytest.approx(375e-6) == pytest.approx(sum(sum(r.values()) for r in table["seconds"].values()))
    assert table["overlap_s"] == pytest.approx(15e-6) and table["busy_s"] == pytest.approx(360e-6)
    assert table["wall_s"] == pytest.approx(1e-3) and table["idle_s"] == pytest.approx(640e-6)
    assert table["phase_wall_s"] == pytest.approx({"forward": 290e-6, "backward": 300e-6, "optimizer": 200e-6})


def test_kernels_belong_to_the_phase_of_their_launch_and_to_their_ops_class():
    device = [
        launch(30, 1),
        kernel("ampere_sgemm", 400, 100, 1, external_id=11),  # runs when the host is in backward
        launch(115, 2),
        kernel("ampere_sgemm", 510, 40, 2, external_id=12),  # a matmul inside attention
        launch(625, 3),
        kernel("void multi_tensor_apply_kernel<...>", 560, 20, 3, external_id=13),
        launch(905, 4),
        kernel("Memcpy DtoH", 590, 10, 4, cat="gpu_memcpy"),
        kernel("cross_entropy_rows", 600, 10, 99),  # its launch is not in the trace
        kernel("void mystery_kernel()", 605, 10, 1, external_id=11),
    ]  # named by its op; overlaps the one before
    host = [
        dict(event, args={**event["args"], "External id": number}) if (event["name"], event["ts"]) == key else event
        for event in HOST
        for key, number in [
            (next((k for k in WHERE if k == (event["name"], event["ts"])), None), WHERE.get((event["name"], event["ts"])))
        ]
    ]
    table = time_table([*host, *device])
    assert table["source"] == "cuda_kernel_durations"
    assert seconds_us(table) == {
        "matmul": {"forward": 110},
        "attention": {"forward": 40},
        "optimizer": {"optimizer": 20},
        "copy": {OUTSIDE: 10},
        "ours": {OUTSIDE: 10},
    }
    assert table["overlap_s"] == pytest.approx(5e-6) and table["sum_s"] == pytest.approx(190e-6)


WHERE = {("aten::addmm", 25): 11, ("aten::bmm", 110): 12, ("aten::_foreach_mul_", 620): 13}


def test_the_largest_are_listed_with_shapes_and_dtypes():
    inputs = {"Input Dims": [[2, 3], [3, 4], []], "Input type": ["float", "c10::BFloat16", "Scalar"]}
    table = time_table(
        [
            annotation("ddb.phase.loss", 0, 100),
            op("aten::mm", 1, 9, **inputs),
            op("aten::mm", 20, 5, **inputs),
            op("aten::mm", 30, 40),
        ],
        top=2,
    )
    assert table["top"] == [
        {
            "name": "aten::mm",
            "class": "matmul",
            "phase": "loss",
            "count": 1,
            "total_s": pytest.approx(40e-6),
            "input_shapes": None,
            "input_dtypes": None,
        },
        {
            "name": "aten::mm",
            "class": "matmul",
            "phase": "loss",
            "count": 2,
            "total_s": pytest.approx(14e-6),
            "input_shapes": [[2, 3], [3, 4]],
            "input_dtypes": ["float", "c10::BFloat16"],
        },
    ]
    assert table["wall_s"] is None and table["idle_s"] is None


def test_no_events_give_an_empty_table():
    assert time_table([])["seconds"] == {} and time_table([])["sum_s"] == 0


@pytest.mark.process
def test_tables_can_be_made_without_torch():
    code = (
        "import sys, instrument.trace.time_table, instrument.trace.tracks, tests.instrument.chrome_format; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
