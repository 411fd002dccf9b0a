"""``inspect``: which run is meant, what its files say, and the screen."""

import json
import math
import shlex
import shutil
from io import StringIO
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

from bench_cases import CASES, DTYPE_CONFIGS
from harness.cli import main
from harness.commands.inspect import InspectScreen
from harness.inspect.findings import gather
from harness.inspect.tables import BACKWARD, BARS, FORWARD, LIMIT, histogram_lines, history_chart, number
from harness.options import parser
from harness.planning import plan_run
from harness.run.execute import execute
from harness.settings import Request
from instrument.results.layout import RunNotFound, locate
from instrument.results.measurements import ForensicsRecord, Link, Magnitude, Remedy
from instrument.results.schemas import RunRecord, decode, encode, strict_json

pytestmark = pytest.mark.slow

SMALL = {
    "preset": "tiny",
    "data": "embedded",
    "batch_size": 4,
    "micro_batch": 2,
    "seq_len": 32,
    "validation_documents": 4,
    "documents": 400,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with a run that died of its optimizer and a healthy one; (folder, failed, healthy)."""
    out = tmp_path_factory.mktemp("results")

    def run(case, config, **asked):
        settings = plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**SMALL, **asked), torch.device("cpu"))
        return execute(settings, out)

    return out, run("gpt2_multi_cls", "fp16_naive", max_steps=3), run("gpt2_clm", "amp_fp16", max_steps=6)


def copied(results, tmp_path):
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(results[0], tmp_path / "copy"), results[1], results[2]


def screen(found, width):
    """The lines that a person sees."""
    out = StringIO()
    InspectScreen(Console(file=out, width=width, highlight=False)).show(found)
    return out.getvalue().splitlines()


def planted(out, record, **changes):
    """Rewrite the run's forensics record."""
    path = out / "runs" / record.run_id / "forensics.json"
    path.write_bytes(encode(msgspec.structs.replace(decode(path.read_bytes(), ForensicsRecord), **changes)))
    return gather(locate(record.run_id, out))


# -- which run ---------------------------------------------------------------------------------


def test_a_run_is_found_by_id_beginning_and_path(results, monkeypatch):
    out, failed, _ = results
    wanted = locate(failed.run_id, out)
    assert wanted.path.is_dir() and wanted.run_id == failed.run_id
    assert locate("gpt2_multi", out) == wanted
    for path in (wanted.path, wanted.path / "run.json"):
        assert locate(str(path), None).path == wanted.path.resolve()
    monkeypatch.chdir(wanted.path)
    assert locate(".", None).run_id == failed.run_id


def test_without_a_folder_all_results_are_searched(results, tmp_path, monkeypatch):
    shutil.copytree(results[0], tmp_path / "results" / "cpu-here")
    monkeypatch.chdir(tmp_path)
    assert locate("gpt2_multi", None).out.name == "cpu-here"
    shutil.copytree(results[0], tmp_path / "results" / "gpu-there")
    with pytest.raises(RunNotFound, match="several results folders: results/cpu-here, results/gpu-there; choose with --out"):
        locate("gpt2_multi", None)


def test_the_whole_id_wins_over_longer_ones(tmp_path):
    for name in ("case-a-s0-11111111", "case-a-s0-11111111-again"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert locate("case-a-s0-11111111", tmp_path).run_id == "case-a-s0-11111111"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "begins 2 runs"),
        ("gpt2_multi_cls-fp61", "near: gpt2_multi_cls-fp16_naive"),
        ("fp16_naive", "near: gpt2_multi_cls-fp16"),
        ("", "no run ''"),
        ("nowhere/at/all", "is no folder"),
        ("/", "not a run's folder"),
    ],
)
def test_a_name_that_is_no_run_is_one_line_and_exit_2(name, words, results, capsys):
    assert main(["inspect", name, "--out", str(results[0])]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_an_empty_folder_says_what_out_is(tmp_path, capsys):
    assert main(["inspect", "x", "--out", str(tmp_path)]) == 2
    assert "--out names the results folder that holds runs/" in capsys.readouterr().err


# -- what the files say --------------------------------------------------------------------------


def test_json_is_the_record_and_more(results, capsys):
    out, failed, _ = results
    assert main(["inspect", failed.run_id, "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(said.out, parse_constant=refuse)
    stored = json.loads((out / "runs" / failed.run_id / "forensics.json").read_bytes())
    for name in ("first_nonfinite", "chain", "operands", "output", "histograms", "kernels", "history", "matched", "remedies"):
        assert found[name] == stored[name]
    assert found["verdict"] == stored["sentence"] and found["status"] == "diverged" and not said.err
    assert found["first_nonfinite"]["source_tensor"] == "exp_avg_sq"


def test_non_finite_numbers_are_named():
    assert strict_json({"a": [math.nan, math.inf, {"b": -math.inf}], "c": 1.5}) == '{"a":["nan","inf",{"b":"-inf"}],"c":1.5}'


def test_the_smallest_headroom_is_that_of_the_log(results):
    out, _, healthy = results
    found = gather(locate(healthy.run_id, out))["smallest_headroom"]
    rows = [json.loads(line) for line in (out / "runs" / healthy.run_id / "activations.jsonl").read_text().splitlines()]
    limits = {"float16": 65504.0, "float32": torch.finfo(torch.float32).max}
    assert found["own_dtype"]["headroom_bits"] == pytest.approx(
        min(math.log2(limits[r["dtype"]] / r["absmax"]) for r in rows if r["absmax"])
    )
    top = max(rows, key=lambda r: r["absmax"])
    assert (found["float16"]["module"], found["float16"]["absmax"]) == (top["module"], top["absmax"])


def test_a_healthy_run_says_so(results, capsys):
    out, _, healthy = results
    assert main(["inspect", healthy.run_id, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    skipped = {0: "no step", 1: "1 step"}.get(healthy.scaler_skips, f"{healthy.scaler_skips} steps")
    assert "Healthy: 6 steps" in said and f"the loss scaler skipped {skipped}" in said and "bits (" in said


@pytest.mark.parametrize(
    ("status", "sentence"),
    [("oom", "oom after 2 steps: out of memory"), ("hung", "hung after 2 steps"), ("unsupported", "unsupported after 2 steps")],
)
def test_other_ends_have_their_sentence(status, sentence, results, tmp_path):
    out, _, healthy = copied(results, tmp_path)
    path = out / "runs" / healthy.run_id / "run.json"
    record = decode(path.read_bytes(), RunRecord)
    path.write_bytes(encode(msgspec.structs.replace(record, status=status, steps_done=2, error="out of memory")))
    found = gather(locate(healthy.run_id, out))
    assert found["verdict"].startswith(sentence) and any(sentence in line.lower() for line in screen(found, 80))


def test_a_run_without_an_end_is_reported(results, tmp_path):
    out, failed, healthy = copied(results, tmp_path)
    for run in (failed, healthy):
        (out / "runs" / run.run_id / "run.json").unlink()
        found = gather(locate(run.run_id, out))
        assert "still running or was killed" in found["verdict"] and "chain" not in found and screen(found, 80)


def test_what_an_earlier_run_left_is_not_shown(results, tmp_path):
    out, failed, healthy = copied(results, tmp_path)
    shutil.copy(out / "runs" / failed.run_id / "forensics.json", out / "runs" / healthy.run_id)
    assert gather(locate(healthy.run_id, out))["verdict"].startswith("healthy")
    first = msgspec.structs.replace(failed.first_nonfinite, step=2)
    assert "chain" not in planted(out, failed, first_nonfinite=first)


def test_a_failure_that_was_not_replayed_is_reported(results, tmp_path):
    out, failed, _ = copied(results, tmp_path)
    (out / "runs" / failed.run_id / "forensics.json").unlink()
    found = gather(locate(failed.run_id, out))
    assert "step 1, optimizer" in found["verdict"] and "not replayed" in found["verdict"]
    assert "Remedies" not in screen(found, 80)


@pytest.mark.parametrize("name", ["run.json", "forensics.json", "events.jsonl", "activations.jsonl"])
def test_a_broken_file_is_named_with_exit_4(name, results, tmp_path, capsys):
    out, failed, _ = copied(results, tmp_path)
    (out / "runs" / failed.run_id / name).write_text('{"schema": 1, "wrong": 0}\n')
    assert main(["inspect", failed.run_id, "--out", str(out)]) == 4
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1


# -- the screen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_has_every_section_and_fits(width, results):
    out, failed, _ = results
    found = gather(locate(failed.run_id, out))
    lines = screen(found, width)
    text = "\n".join(lines)
    for words in (
        "The road of the value",
        "What aten._foreach_addcdiv_ read",
        "tensor2",
        "→ output",
        "divided by exactly 0",
        "Largest |x| of",
        "65,504",
        "Exponents of what it read",
        "fp16 normal",
        "2^-24",
        "Ops around the failure",
        "Remedies",
        "--try all",
        "ui.perfetto.dev",
        "--repro repro.py",
    ):
        assert words in text
    to_copy = ("python -m harness inspect", str(out))
    assert all(len(line) <= width for line in lines if not any(part in line for part in to_copy))
    assert sum(line.lstrip().startswith("→  ") for line in lines) == 1, "one culprit among the ops"


def test_a_long_chain_remedies_and_absorbed_ops_are_shown(results, tmp_path):
    out, failed, _ = copied(results, tmp_path)
    link = Link(
        phase="forward",
        module="roberta.encoder.layer.10.attention.output.dense",
        op="aten.addmm",
        tensor=None,
        kind="inf",
        dtype="float16",
        shape=[512, 768],
    )
    remedies = (
        Remedy(
            change="eps",
            survives=True,
            steps=20,
            failed_at=None,
            step_time_ratio=1.02,
            bytes_ratio=1.0,
            confirms="underflow_then_divide",
        ),
        Remedy(
            change="scaler",
            survives=None,
            steps=0,
            failed_at=None,
            step_time_ratio=None,
            bytes_ratio=None,
            confirms=None,
            why="GradScaler refuses [fp16] gradients",
        ),
        Remedy(change="fp32_head", survives=False, steps=3, failed_at=1, step_time_ratio=1.1, bytes_ratio=1.2, confirms=None),
    )
    found = planted(out, failed, chain=(link,) * 30, absorbed=(link,), remedies=remedies)
    lines = screen(found, 80)
    text = " ".join(" ".join(lines).split())
    assert "and 18 more" in text and "Absorbed" in text and "…" in text
    assert "survives 20 steps" in text and "fails again at step 1" in text and "[fp16] gradients" in text and "1.02x" in text
    assert "--try all" not in text


def test_its_commands_are_for_pasting_wherever_the_results_lie(results, tmp_path):
    out = shutil.copytree(results[0], tmp_path / "my results")
    found = gather(locate(results[1].run_id, out))
    commands = [shlex.split(line) for line in screen(found, 80) if "python -m harness inspect" in line]
    assert [parser().parse_args(words[3:]).out for words in commands] == [out, out]


def test_a_replay_that_differs_is_reported(results, tmp_path):
    out, failed, _ = copied(results, tmp_path)
    assert "near case" in "\n".join(screen(planted(out, failed, matched=False), 80))


def test_history_reaches_back_into_the_log(results, tmp_path):
    out, failed, _ = copied(results, tmp_path)
    module = gather(locate(failed.run_id, out))["history"][0]["module"]
    later = (Magnitude(step=50, module=module, absmax_fwd=3.0, absmax_bwd=None),)
    found = planted(out, failed, history=later)
    assert {row["step"] for row in found["earlier_history"]} == {1}
    assert any("before step 50" in line for line in screen(found, 80))


# -- charts --------------------------------------------------------------------------------------


def rows(*values, key="absmax_fwd", other="absmax_bwd"):
    return [{"step": step, "module": "m", key: value, other: None} for step, value in enumerate(values, start=10)]


def marks(lines, mark):
    """(row, column) of a mark."""
    found = ((r, c) for r, line in enumerate(lines) for c, char in enumerate(line.plain) if char == mark)
    return sorted(found, key=lambda point: point[1])


def test_a_rising_series_rises_to_the_limit():
    lines = history_chart(rows(*(2.0**k for k in range(2, 16)), 65504.0), 78)
    points = marks(lines, FORWARD)
    assert len(points) == 15 and [r for r, _ in points] == sorted((r for r, _ in points), reverse=True)
    limit_row = next(i for i, line in enumerate(lines) if LIMIT in line.plain)
    assert points[-1][0] == limit_row and "65,504" in lines[limit_row].plain
    assert "step 10" in lines[-1].plain and lines[-1].plain.rstrip().endswith("step 24")
    assert max(len(line.plain) for line in lines) <= 78


def test_equal_ratios_are_equal_distances():
    points = marks(history_chart(rows(1e-4, 1e-2, 1.0, 1e2), 78, limit=1e4), FORWARD)
    assert [b[0] - a[0] for a, b in zip(points, points[1:], strict=False)] == [-2, -2, -2]


def test_values_beyond_the_limit_lie_above_it():
    lines = history_chart(rows(1.0, 1e9), 60)
    limit_row = next(i for i, line in enumerate(lines) if LIMIT in line.plain)
    assert marks(lines, FORWARD)[-1][0] < limit_row


@pytest.mark.parametrize("values", [(), (None,), (0.0, 0.0)])
def test_nothing_to_draw_draws_nothing(values):
    assert history_chart(rows(*values), 78) == []


@pytest.mark.parametrize("steps", [1, 2, 700])
def test_any_number_of_steps_fits(steps):
    history = rows(*[3.0] * steps) + rows(*[1e-7] * steps, key="absmax_bwd", other="absmax_fwd")
    lines = history_chart(history, 78)
    assert max(len(line.plain) for line in lines) <= 78 and marks(lines, FORWARD) and marks(lines, BACKWARD)


def test_bars_stand_over_their_exponents():
    counts = [0] * 81
    counts[40 + 15] = 1000  # 2^15 .. 2^16: the last of fp16's range
    lines = [line.plain for line in histogram_lines([{"tensor": "x", "lowest": -40, "counts": counts, "zeros": 3}], 78)]
    bar = next(i for i, char in enumerate(lines[0]) if char in BARS)
    assert lines[0][bar] == BARS[-1] and lines[1][bar] == "┤" and "3 zeros" in lines[0]
    counts[40 - 24] = 1
    lines = [line.plain for line in histogram_lines([{"tensor": "x", "lowest": -40, "counts": counts, "zeros": 0}], 78)]
    assert lines[0].index(BARS[0]) == lines[1].index("╶") == lines[2].index("2^-24")


def test_a_wide_histogram_is_folded_to_the_width():
    counts = [1] * 81
    lines = [line.plain for line in histogram_lines([{"tensor": "x", "lowest": -40, "counts": counts, "zeros": 0}], 60)]
    assert max(map(len, lines)) <= 60 and sum(char in BARS for char in lines[0]) >= 27


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), (0.0, "0"), (65504.0, "65,504"), (1.9e4, "19,000"), (0.5, "0.5"), (3.4e38, "3.40e+38"), (1e-7, "1.00e-07")],
)
def test_numbers_in_few_characters(value, words):
    assert number(value) == words


# -- the stack of a crash ------------------------------------------------------------------------

TRACEBACK = """Traceback (most recent call last):
  File "{root}/harness/run/trainer.py", line 69, in run
    self._evaluate(0)
  File "/usr/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1884, in _call_impl
    result = forward_call(*args, **kwargs)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/home/me/my model.py", line 7, in strike
    torch.ones(2, 3) @ torch.ones(2, 3)
    ~~~~~~~~~~~~~~~~~^~~~~~~~~~~~~~~~~~
  File "/usr/lib/python3.11/site-packages/torch/_tensor.py", line 40, in wrapped
    return f(*args, **kwargs)
RuntimeError: mat1 and mat2 shapes cannot be multiplied

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "{root}/harness/run.py", line 87, in _execute_claimed
    Attempt(settings).run()
KeyError: 'after it'
"""
DUMP = [
    'File "/home/me/my model.py", line 7 in strike',
    'File "/usr/lib/python3.11/site-packages/torch/x.py", line 3 in f',
    'File "<frozen runpy>", line 88 in _run_code',
]


def crashed(results, tmp_path, **flags):
    """What is found of a run that ended in an error with these flags."""
    out, _, healthy = copied(results, tmp_path)
    path = out / "runs" / healthy.run_id / "run.json"
    path.write_bytes(
        encode(
            msgspec.structs.replace(
                decode(path.read_bytes(), RunRecord),
                status="error",
                steps_done=2,
                flags=flags,
                error="RuntimeError: mat1 and mat2 shapes cannot be multiplied",
            )
        )
    )
    return gather(locate(healthy.run_id, out)), path.parent


def test_a_crash_shows_our_and_the_models_frames_and_where_it_struck(results, tmp_path):
    """Of a chain of exceptions, the one that the row names; libraries' frames only where they are the innermost."""
    root = Path(__file__).resolve().parents[2]
    found, folder = crashed(results, tmp_path, traceback=TRACEBACK.replace("{root}", str(root)))
    assert [(f["file"].rpartition("/")[2], f["line"], f["function"], f["code"]) for f in found["stack"]["frames"]] == [
        ("trainer.py", 69, "run", "self._evaluate(0)"),
        ("my model.py", 7, "strike", "torch.ones(2, 3) @ torch.ones(2, 3)"),
        ("_tensor.py", 40, "wrapped", "return f(*args, **kwargs)"),
    ]
    lines = screen(found, 40)
    assert "  harness/run/trainer.py:69 in run" in lines and "  /home/me/my model.py:7 in strike" in lines
    assert f"  the whole stack: flags.traceback in {folder / 'run.json'}" in lines


def test_a_crash_below_python_shows_the_dumped_frames(results, tmp_path):
    found, folder = crashed(results, tmp_path, death={"cause": "segfault", "stack": DUMP})
    assert [f["function"] for f in found["stack"]["frames"]] == ["strike"] and found["stack"]["frames"][0]["code"] is None
    assert "  /home/me/my model.py:7 in strike" in screen(found, 80)
    assert f"  the whole stack: {folder / 'output.log'}" in screen(found, 80)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"traceback": "no frame"},
        {"traceback": 3},
        {"death": {"cause": "killed"}},
        {"death": []},
        {"death": {"stack": [3]}},
        {"death": {"stack": []}},
    ],
)
def test_a_row_without_a_stack_has_no_such_section(results, tmp_path, flags):
    found, _ = crashed(results, tmp_path, **flags)
    assert "stack" not in found and "whole stack" not in "\n".join(screen(found, 80))
