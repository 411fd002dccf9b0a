"""``predict``: what an fp32 run alone says of the 16-bit runs beside it, on real tiny runs."""

import json
from dataclasses import replace

import msgspec
import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.cli import main
from harness.planning import plan_run
from harness.predict import arithmetic_of, predictions
from harness.run.execute import execute
from harness.settings import Request
from instrument.prediction import FALSE_ALARM, HIT, MISSED

pytestmark = pytest.mark.slow

SMALL = {
    "preset": "tiny",
    "data": "embedded",
    "max_steps": 8,
    "batch_size": 4,
    "micro_batch": 2,
    "seq_len": 32,
    "validation_documents": 4,
    "documents": 400,
    "threads": 1,
}


def run(out, case, config, **asked):
    settings = plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**SMALL | asked), torch.device("cpu"))
    return execute(settings, out)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The case that dies of its optimizer, and one whose learning rate makes it overflow."""
    out = tmp_path_factory.mktemp("predict")
    for config in ("fp32_true", "fp16_naive", "amp_fp16", "fp16_naive_eps1e4"):
        run(out, "gpt2_multi_cls", config)
    for config in ("fp32_true", "amp_fp16_unscaled", "bf16_pure", "fp16_naive_eps1e4"):
        run(out, "roberta_mlm", config, lr=3.0, instrument="full")
    return out


def by_config(found):
    (reference,) = found.references
    return {row.config: row for row in reference.configs}


def verdicts(row):
    return {o.kind: o.verdict for o in row.outcomes}


def test_the_optimizers_death_and_amps_survival_are_predicted_from_fp32_alone(results):
    found = predictions("gpt2_multi_cls", "gpt2_multi_cls", results)
    rows = by_config(found)
    naive, amp, raised = rows["fp16_naive"], rows["amp_fp16"], rows["fp16_naive_eps1e4"]
    assert (naive.ends.kind, naive.ends.step, naive.ended_at) == ("division_by_zero", 1, 1)
    assert verdicts(naive)["division_by_zero"] == verdicts(naive)["states_flush"] == HIT
    assert amp.ends is None and amp.status == "completed" and amp.hazards == []
    assert raised.ends is None and raised.status == "completed" and verdicts(raised)["states_flush"] == HIT
    assert not {FALSE_ALARM, MISSED} & set(found.counts) and found.counts[HIT] == 3
    unrun = rows["fp16_naive_clip16"]
    assert unrun.run_id is None and unrun.ends.kind == "division_by_zero" and unrun.outcomes == []


def test_nothing_of_the_other_runs_goes_into_the_prediction(results, tmp_path):
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(results, alone)
    for folder in (alone / "runs").iterdir():
        if "fp32_true" not in folder.name:
            shutil.rmtree(folder)
    with_runs, without = (by_config(predictions("gpt2_multi_cls", "", out)) for out in (results, alone))
    assert {c: r.hazards for c, r in with_runs.items()} == {c: r.hazards for c, r in without.items()}
    assert all(row.run_id is None and row.outcomes == [] for row in without.values())


def test_a_forward_overflow_is_predicted_with_its_module(results):
    found = predictions("roberta_mlm", "roberta_mlm", results)
    rows = by_config(found)
    unscaled = rows["amp_fp16_unscaled"]
    assert unscaled.ends.kind == "overflow_forward" and unscaled.happened == "overflow_forward"
    (outcome,) = [o for o in unscaled.outcomes if o.kind == "overflow_forward"]
    assert outcome.verdict == HIT and outcome.named
    assert unscaled.happened_in in {h.module for h in unscaled.hazards}
    raised = rows["fp16_naive_eps1e4"]  # NaN has reached its states, so nobody can count their zeros
    assert raised.happened == "overflow_forward" and "states_flush" not in verdicts(raised)
    assert "states_flush" in {h.kind for h in raised.hazards} and "states_flush" in verdicts(rows["bf16_pure"])
    assert rows["bf16_pure"].ends is None and rows["bf16_pure"].status == "completed"
    modules = {(m.module, m.direction): m for m in found.references[0].modules}
    beyond = modules[unscaled.happened_in, "fwd"]
    assert beyond.absmax > 65504 and beyond.bits_fp16 < 0 < beyond.bits_bf16 and beyond.bits_fp16_scaled is None


def test_another_learning_rate_is_another_experiment(results, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(results, out)
    record = run(out, "gpt2_multi_cls", "bf16_pure", lr=0.1, max_steps=1)
    assert predictions("gpt2_multi_cls", "gpt2_multi_cls", out).without_reference == [record.run_id]


def test_no_fp32_run_names_the_command_that_makes_one(tmp_path, capsys):
    run(tmp_path, "gpt2_clm", "amp_bf16", max_steps=1)
    assert main(["predict", "gpt2_clm", "--out", str(tmp_path)]) == 2
    assert f"python -m harness case gpt2_clm fp32_true --out {tmp_path}" in capsys.readouterr().err


def test_an_unmeasured_fp32_run_and_a_broken_file_are_named(tmp_path, capsys):
    record = run(tmp_path, "gpt2_clm", "fp32_true", max_steps=1, instrument="off")
    assert main(["predict", "gpt2_clm", "--out", str(tmp_path)]) == 2
    assert "--instrument off" in capsys.readouterr().err
    (tmp_path / "runs" / record.run_id / "activations.jsonl").write_text('{"schema": 1}\n')
    assert main(["predict", "gpt2_clm", "--out", str(tmp_path)]) == 4
    assert "activations.jsonl:1" in capsys.readouterr().err


def test_on_the_command_line(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["predict", "roberta_mlm", "--out", str(results)]) == 0
    captured = capsys.readouterr()
    assert "was among the predicted ones" in captured.err and captured.out == ""
    assert max(map(len, captured.err.splitlines())) <= 80
    assert main(["predict", "gpt2_multi_cls", "--out", str(results), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["counts"][HIT] == 3 and len(row["references"][0]["configs"]) == len(
        [c for c in DTYPE_CONFIGS.values() if c.compute != "fp32"]
    )


def test_what_decides_of_a_configuration_is_read_from_its_declaration():
    made = {name: arithmetic_of(config) for name, config in DTYPE_CONFIGS.items()}
    assert (made["fp16_naive"].states, made["fp16_naive"].update, made["fp16_naive"].mixed) == ("fp16", "fp16", False)
    assert (made["fp16_naive_fp32_states"].states, made["fp16_naive_fp32_states"].update) == ("fp32", "fp32")
    assert (made["bf16_pure_sr"].states, made["bf16_pure_sr"].update) == ("bf16", "fp32")
    assert made["amp_bf16_8bit"].states == "8bit" and made["amp_fp16"].loss_scale == 65536
    assert made["amp_fp16_unscaled"] == replace(made["amp_fp16"], loss_scale=None)
    assert made["amp_bf16_fp32_head"] == replace(made["amp_bf16"], head="fp32")
    assert msgspec.to_builtins(made["fp16_naive_clip16"])["clip"] == "fp16"
