"""``diff``: where two runs part, and with what certainty."""

import json
import math
import shutil
from io import StringIO

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console

from bench_cases import CASES, DTYPE_CONFIGS
from harness.cli import main
from harness.commands.diff import show
from harness.diff import EPSILONS_APART, FEWEST_STEPS, compare, mean_with_interval, relative
from harness.planning import plan_run
from harness.run.execute import execute
from harness.settings import Request
from instrument.results.measurements import ModuleRecord
from instrument.results.read import load
from instrument.results.schemas import RunRecord, StepRecord, decode, encode
from kernels.float_formats import FP32

pytestmark = pytest.mark.slow

SMALL = {
    "preset": "tiny",
    "data": "embedded",
    "batch_size": 4,
    "micro_batch": 2,
    "seq_len": 32,
    "validation_documents": 4,
    "documents": 400,
    "max_steps": 12,
}


def ran(out, config, seed=0, case="gpt2_clm", **asked):
    settings = plan_run(CASES[case], DTYPE_CONFIGS[config], seed, Request(**SMALL | asked), torch.device("cpu"))
    return execute(settings, out).run_id


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs of one case; name -> path of the run's folder."""
    out, again = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("again")
    return {
        "fp32": out / "runs" / ran(out, "fp32_true"),
        "bf16": out / "runs" / ran(out, "amp_bf16"),
        "seed 1": out / "runs" / ran(out, "fp32_true", seed=1),
        "again": again / "runs" / ran(again, "fp32_true"),
    }


def compared(a, b):
    return compare(load([str(a), str(b)], None))


def lines_of(found, width=80):
    out = StringIO()
    show(found, Console(file=out, width=width, highlight=False))
    return out.getvalue().splitlines()


@pytest.fixture
def spoiled(results, tmp_path):
    """``spoiled(steps=..., modules=..., record=...)``: a copy of the fp32 run with every record of a kind passed
    through a function."""

    def make(steps=None, modules=None, record=None):
        folder = results["fp32"]
        out = shutil.copytree(folder.parent.parent, tmp_path / "spoiled", dirs_exist_ok=True)
        copy = out / "runs" / folder.name
        for path, kind, change in (
            (out / "training_logs" / f"run_{folder.name}.jsonl", StepRecord, steps),
            (copy / "activations.jsonl", ModuleRecord, modules),
            (copy / "run.json", RunRecord, record),
        ):
            if change is not None:
                lines = path.read_bytes().splitlines()
                path.write_bytes(b"".join(encode(change(decode(line, kind))) + b"\n" for line in lines))
        return copy

    return make


def replaced(when, **changes):
    """A function that changes the records for which ``when`` holds; a change is a value or a function of the old one."""

    def change(record):
        if not when(record):
            return record
        new = {name: value(getattr(record, name)) if callable(value) else value for name, value in changes.items()}
        return msgspec.structs.replace(record, **new)

    return change


# -- the same ------------------------------------------------------------------------------------


def test_the_same_run_twice_has_no_difference(results, capsys):
    assert main(["diff", str(results["fp32"]), str(results["fp32"])]) == 0
    assert "the same run: no difference" in capsys.readouterr().out


def test_the_same_settings_twice_have_no_difference(results):
    found = compared(results["fp32"], results["again"])
    assert found["no_difference"] and found["paired"] and not found["same_run"]
    assert found["first_difference"] is None and found["first_module_difference"] is None and found["comparable_windows"] > 10
    assert (found["loss"]["mean"], found["loss"]["low95"], found["loss"]["high95"], found["loss"]["n"]) == (0, 0, 0, 12)
    assert any("No difference" in line for line in lines_of(found))


# -- where they part -----------------------------------------------------------------------------


def test_a_difference_is_found_in_its_step_and_judged_by_the_rule(results, spoiled):
    rule = EPSILONS_APART * FP32.eps
    within = compared(results["fp32"], spoiled(steps=replaced(lambda s: s.step == 5, loss=lambda x: x * (1 + rule / 2))))
    assert within["rounding"]["relative"] == rule and not within["no_difference"]
    assert within["first_difference"]["step"] == 5 and within["first_beyond_rounding"] is None
    assert any("no more than rounding over 12" in line for line in lines_of(within))
    beyond = compared(results["fp32"], spoiled(steps=replaced(lambda s: s.step >= 7, grad_norm=lambda x: x * (1 + rule * 2))))
    assert beyond["first_beyond_rounding"]["step"] == 7
    assert [f["name"] for f in beyond["first_beyond_rounding"]["fields"]] == ["grad_norm"]
    assert any("beyond rounding from step 7" in line for line in lines_of(beyond))


def test_a_skipped_step_is_no_rounding(results, spoiled):
    found = compared(results["fp32"], spoiled(steps=replaced(lambda s: s.step == 3, step_skipped=True)))
    assert found["first_beyond_rounding"]["step"] == 3


def test_a_loss_that_is_nan_is_beyond_rounding_and_left_out_of_the_mean(results, spoiled):
    found = compared(results["fp32"], spoiled(steps=replaced(lambda s: s.step == 9, loss=math.nan)))
    assert found["first_beyond_rounding"]["step"] == 9
    assert found["loss"]["n"] == 11 and found["loss"]["left_out"] == 1 and found["loss"]["mean"] == 0
    assert "without 1 step whose loss is not finite" in " ".join(line.strip() for line in lines_of(found))


def test_the_first_module_is_the_first_of_the_model(results, spoiled):
    names = ("transformer.h.1.ln_1", "transformer.h.0.mlp.c_proj", "transformer", "transformer.h.0", "head")
    change = replaced(lambda m: m.module in names and m.direction == "fwd", absmax=lambda x: x * 2)
    found = compared(results["fp32"], spoiled(modules=change))
    assert found["first_module_beyond_rounding"]["module"] == "transformer.h.0.mlp.c_proj"
    back = replaced(lambda m: m.module in names and m.direction == "bwd" and m.first_step == 1, absmax=lambda x: x * 2)
    found = compared(results["fp32"], spoiled(modules=back))["first_module_beyond_rounding"]
    assert (found["direction"], found["module"]) == ("bwd", "head")


def test_windows_of_unequal_length_are_compared_where_they_can_be(results, spoiled):
    """A run that failed early has short windows."""

    def cut(factor):
        return spoiled(
            modules=replaced(
                lambda m: m.first_step == 1 and m.step > 6 and m.direction == "fwd",
                step=6,
                absmax_step=lambda s: min(s, 6),
                absmax=lambda x: x * factor,
            )
        )

    surpassed = compared(results["fp32"], cut(2.0))["first_module_beyond_rounding"]
    assert surpassed["relative"] == pytest.approx(0.5) and (surpassed["first_step"], surpassed["step"]) == (1, 6)
    whole, short = compared(results["fp32"], results["again"]), compared(results["fp32"], cut(0.999))
    assert 0 < short["comparable_windows"] < whole["comparable_windows"], "a later maximum says nothing of the first six"


def test_gradients_are_compared_without_the_loss_scale(results, spoiled):
    steps = replaced(lambda s: True, loss_scale=1024.0)
    modules = replaced(lambda m: m.direction == "bwd", absmax=lambda x: x * 1024)
    found = compared(results["fp32"], spoiled(steps=steps, modules=modules))
    assert found["first_module_difference"] is None


def test_two_dtypes_part_and_the_coarser_sets_the_rule(results):
    found = compared(results["fp32"], results["bf16"])
    assert found["paired"] and found["rounding"]["relative"] == EPSILONS_APART * torch.finfo(torch.bfloat16).eps
    assert found["first_difference"]["step"] == 1
    beyond = found["first_beyond_rounding"]
    assert beyond is None or beyond["step"] >= 1
    assert {row["name"] for row in found["settings"]} >= {"dtype_config", "config.compute", "config.head"}


@pytest.mark.parametrize(
    ("x", "y", "apart"),
    [
        (1.0, 1.0, 0.0),
        (0.0, 0.0, 0.0),
        (1.0, 2.0, 0.5),
        (2.0, 1.0, 0.5),
        (-1.0, 1.0, 2.0),
        (0.0, 5e-324, 1.0),
        (None, None, 0.0),
        (None, 1.0, math.inf),
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (math.inf, -math.inf, math.inf),
        (math.nan, 1.0, math.inf),
    ],
)
def test_relative_difference(x, y, apart):
    assert relative(x, y) == relative(y, x) == apart


# -- not the same experiment -----------------------------------------------------------------------


def test_another_seed_is_said_first(results):
    found = compared(results["fp32"], results["seed 1"])
    assert not found["paired"] and {"seed", "init_sha256"} <= {row["name"] for row in found["not_paired_because"]}
    said = " ".join(line.strip() for line in lines_of(found))
    assert said.index("Not the same experiment (seed 0 / 1") < said.index("Settings that differ") and "(not paired)" in said


@pytest.mark.parametrize("change", [{"case": "roberta_mlm"}, {"data_sha256": "0" * 64}, {"init_sha256": None}])
def test_another_case_other_batches_and_an_unknown_start_are_no_pairs(change, results, spoiled):
    found = compared(results["fp32"], spoiled(record=replaced(lambda r: True, **change)))
    assert [row["name"] for row in found["not_paired_because"]] == list(change) and not found["no_difference"]


def test_a_run_without_an_end_is_one_line(results, spoiled, capsys):
    folder = spoiled()
    (folder / "run.json").unlink()
    assert main(["diff", str(results["fp32"]), str(folder)]) == 2
    said = capsys.readouterr().err
    assert "has not ended" in said and said.count("\n") == 1


def test_a_run_that_logged_no_step_is_compared_by_what_there_is(results, spoiled):
    folder = spoiled(record=replaced(lambda r: True, status="error", error="it broke", steps_done=0, train_loss_final=None))
    (folder.parent.parent / "training_logs" / f"run_{folder.name}.jsonl").write_bytes(b"")
    found = compared(results["fp32"], folder)
    said = " ".join(line.strip() for line in lines_of(found))
    assert not found["no_difference"] and "no step in common" in said and "no common step has a finite loss" in said
    assert "no timed step in common" in said and "error" in said


def test_a_changed_case_of_the_same_name_is_a_setting(results, spoiled):
    change = replaced(lambda r: True, config=lambda c: c | {"case": c["case"] | {"weight_decay": 0.5}, "lr": 1.0})
    assert [row["name"] for row in compared(results["fp32"], spoiled(record=change))["settings"]] == ["case.weight_decay", "lr"]


def test_a_record_without_dtypes_is_refused(results, spoiled, capsys):
    folder = spoiled(record=replaced(lambda r: True, config={}))
    assert main(["diff", str(results["fp32"]), str(folder)]) == 4
    assert "names no dtype" in capsys.readouterr().err


# -- statistics ------------------------------------------------------------------------------------


def test_a_constant_difference_has_an_interval_of_no_width(results, spoiled):
    found = compared(results["fp32"], spoiled(steps=replaced(lambda s: True, loss=lambda x: x + 0.25)))
    assert found["loss"]["mean"] == pytest.approx(0.25)
    assert found["loss"]["high95"] - found["loss"]["low95"] < 1e-6


def test_a_step_time_twice_as_long_is_a_ratio_of_two(results, spoiled):
    found = compared(results["fp32"], spoiled(steps=replaced(lambda s: True, step_time_s=lambda x: x * 2)))
    times, tokens = found["speed"]["step_time_ratio"], found["speed"]["real_tokens_per_s_ratio"]
    assert times["mean"] == pytest.approx(2) and times["low95"] == pytest.approx(2) and times["high95"] == pytest.approx(2)
    assert tokens["mean"] == pytest.approx(0.5)
    untimed = load([str(results["fp32"])] * 2, None)[0].record.config["untimed_steps"]
    assert times["n"] == 12 - untimed


def test_too_few_steps_have_no_interval():
    assert mean_with_interval([1.0] * (FEWEST_STEPS - 1))["low95"] is None
    assert mean_with_interval([])["mean"] is None
    assert mean_with_interval([1.0] * FEWEST_STEPS)["low95"] == 1.0


def test_blocks_cover_where_single_steps_would_not():
    """Autocorrelated noise (0.6 from step to step) around 0: the 95 % interval must hold 0 nearly that often."""
    random, trials, n = np.random.default_rng(0), 400, 400
    noise = random.standard_normal((trials, n))
    for step in range(1, n):
        noise[:, step] += 0.6 * noise[:, step - 1]
    blocks = [mean_with_interval(list(row)) for row in noise]
    covered = np.mean([b["low95"] <= 0 <= b["high95"] for b in blocks])
    single = np.mean(np.abs(noise.mean(1)) <= 1.97 * noise.std(1, ddof=1) / math.sqrt(n))
    assert single < 0.75 and 0.89 <= covered <= 0.98


# -- costs -----------------------------------------------------------------------------------------


def with_table(steps, **seconds):
    table = {"source": "cpu_self_time", "seconds": {kind: {"forward": s / 2, "backward": s / 2} for kind, s in seconds.items()}}
    return lambda flags: flags | {"time_by_kernel": table, "trace": {"file": "x.json.gz", "failure": None, "steps": steps}}


def test_time_by_kernel_needs_a_trace_in_both_and_says_so(results, spoiled):
    traced = spoiled(record=replaced(lambda r: True, flags=with_table(2, matmul=1.0)))
    found = compared(results["fp32"], traced)
    assert found["time_by_kernel"] == {"missing_in": ["a"], "rows": []}
    assert any("run it with --trace" in line for line in lines_of(found, 120))


def test_time_by_kernel_is_shares_and_seconds_a_step(spoiled, results, tmp_path):
    a = spoiled(record=replaced(lambda r: True, flags=with_table(2, matmul=3.0, copy=1.0)))
    b = shutil.copytree(a.parent.parent, tmp_path / "b") / "runs" / a.name
    record = decode((b / "run.json").read_bytes(), RunRecord)
    flags = with_table(4, matmul=2.0, ours=2.0)(record.flags)
    (b / "run.json").write_bytes(encode(msgspec.structs.replace(record, flags=flags)))
    rows = {row["class"]: row for row in compared(a, b)["time_by_kernel"]["rows"]}
    assert set(rows) == {"matmul", "copy", "ours"}
    assert (rows["matmul"]["share_a"], rows["matmul"]["share_b"]) == (0.75, 0.5)
    assert (rows["matmul"]["s_per_step_a"], rows["matmul"]["s_per_step_b"]) == (1.5, 0.5)
    assert (rows["copy"]["share_b"], rows["copy"]["s_per_step_b"]) == (0.0, 0.0)


def test_memory_is_side_by_side(results, spoiled):
    found = compared(results["fp32"], results["bf16"])["memory"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["weights_bytes"]["a"] == rows["weights_bytes"]["b"] > 0 and not found["split_missing_in"]
    bare = spoiled(record=replaced(lambda r: True, flags=lambda flags: {k: v for k, v in flags.items() if k != "memory_split"}))
    found = compared(results["fp32"], bare)
    assert found["memory"]["split_missing_in"] == ["b"] and any("no split in b" in line for line in lines_of(found, 120))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [("fp32", "bf16"), ("fp32", "seed 1"), ("fp32", "again")])
def test_the_screen_fits_80_columns(pair, results):
    lines = lines_of(compared(*(results[name] for name in pair)))
    assert len(lines) > 10 and all(len(line) <= 80 for line in lines[2:])


def test_json_is_strict_and_whole(results, spoiled, capsys):
    folder = spoiled(steps=replaced(lambda s: s.step == 9, loss=math.inf))
    assert main(["diff", str(results["fp32"]), str(folder), "--json"]) == 0

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["first_beyond_rounding"]["fields"][0]["b"] == "inf"
    assert {
        "settings",
        "environment",
        "first_difference",
        "first_module_beyond_rounding",
        "loss",
        "speed",
        "time_by_kernel",
        "memory",
        "outcome",
        "paired",
        "no_difference",
    } <= set(found)
