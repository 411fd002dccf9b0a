"""What is mutated, which tests ought to notice, and the mutants that must die whatever the sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """``files`` (globs from the root) share a quota of the sample; ``tests`` are pytest's arguments, globs among them."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


WATCH = ("tests/instrument/test_meter.py", "tests/instrument/test_watch.py", "tests/instrument/test_watch_awkward.py")
ROOMS = {
    "precision": Room(("harness/precision.py", "harness/fp16_products.py"), ("tests/harness/test_precision.py",)),
    "loop": Room(
        ("harness/loop.py", "harness/evaluate.py", "harness/loss.py"),
        ("tests/harness/test_loop.py", "tests/harness/test_loss.py", "tests/harness/test_evaluate.py"),
    ),
    "optimizer": Room(
        ("harness/optimizer.py",),
        ("tests/harness/test_optimizer.py", "tests/harness/test_loop.py::test_the_loop_follows_a_plain_torch_loop"),
    ),
    "collate": Room(
        ("bench_cases/collate.py",), ("tests/bench_cases/test_collate.py", "tests/bench_cases/data/test_batches.py")
    ),
    "kernels": Room(("kernels/*/reference.py",), ("tests/kernels", "-k", "not triton and not compile")),
    "watch": Room(("instrument/watch/*.py",), WATCH),
    "replay": Room(
        ("instrument/replay/*.py",),
        (
            "tests/instrument/test_recorder.py",
            "tests/instrument/test_replays.py",
            "tests/instrument/test_pathologies.py",
            *WATCH,
        ),
    ),
    "tables": Room(
        ("report/tables/*.py",),
        (
            "tests/report/test_tables_*.py",
            "tests/report/test_verdict.py",
            "tests/report/test_choice.py",
            "tests/report/test_plots_machine.py",
        ),
    ),
    "statistics": Room(
        ("report/statistics.py", "report/significance.py"),
        ("tests/report/test_statistics.py", "tests/report/test_significance.py"),
    ),
    "hypotheses": Room(("report/hypotheses/*.py",), ("tests/report/test_hypotheses.py",)),
}

PLANTED = (
    (
        "the seed of dropout without the step",
        "harness/loop.py",
        "options.seed * 1_000_003 + step",
        "options.seed * 1_000_003",
    ),
    ("evaluation without eval()", "harness/evaluate.py", "    model.eval()\n", ""),
    (
        "states of stochastic rounding to nearest",
        "harness/optimizer.py",
        "                self._store([s[name] for s in states], values)",
        "                _WideAdamW._store(self, [s[name] for s in states], values)",
    ),
    (
        "overflow of optimizer states ignored",
        "instrument/watch/counters.py",
        '        self._row |= self._first_bad("state", self._state_tensors)\n',
        "",
    ),
    (
        "activation statistics of the last micro-batch only",
        "kernels/activation_stats/reference.py",
        "floats[ABSMAX] = max(floats[ABSMAX], absmax)",
        "floats[ABSMAX] = absmax",
    ),
    (
        "flush share over all values",
        "instrument/watch/taps.py",
        "None if cell.zeros is None else cell.numel - cell.zeros",
        "None if cell.zeros is None else cell.numel",
    ),
    (
        "earlier non-finite values forgotten in headroom",
        "instrument/watch/taps.py",
        "r.nan + r.inf + (old.nonfinite if old else 0)",
        "r.nan + r.inf",
    ),
    ("NaN before -inf in the rule of blame", "instrument/replay/graph.py", "if edge.kinds != NEG_INF] or faults", "]"),
    (
        "all zero denominators counted",
        "instrument/replay/diagnosis.py",
        "(~exact.isfinite() & nudged(0).isfinite())",
        "nudged(0).isfinite()",
    ),
    (
        "<= at the edge of underflow",
        "kernels/multi_tensor_stats/reference.py",
        "(a_raw < underflow_below)",
        "(a_raw <= underflow_below)",
    ),
    (
        "_foreach_mul_ always",
        "harness/precision.py",
        "torch._foreach_mul_ if self.weights_dtype == torch.float32 else scale_",
        "torch._foreach_mul_",
    ),
    (
        "oneDNN's bf16 switch inert",
        "harness/precision.py",
        "    for backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn):",
        "    for backend in ():",
    ),
)
"""(what it is, file, text that stands there once, what stands there instead): each has a test that proves the behaviour."""
