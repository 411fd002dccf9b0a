"""``inspect --try``: one change at a time from the stored snapshot, with the unchanged run as the control."""

import json
import shutil

import msgspec
import pytest
import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.cli import main
from harness.forensics.stored import read_state
from harness.inspect.changes import change_of, without_options
from harness.inspect.counterfactual import last_step, try_changes
from harness.inspect.rerun import rebuild
from harness.planning import plan_run
from harness.run.execute import execute
from harness.settings import Request, SettingsError
from instrument.replay.snapshot import Snapshot
from instrument.results.files import replace as replace_file
from instrument.results.lines import read
from instrument.results.measurements import ForensicsRecord
from instrument.results.schemas import RunRecord, StepRecord, decode, encode

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


def failed_run(out, case, config, **asked):
    settings = plan_run(CASES[case], DTYPE_CONFIGS[config], 0, Request(**SMALL, **asked), torch.device("cpu"))
    record = execute(settings, out)
    assert record.status == "diverged", record.error
    return out / "runs" / record.run_id


@pytest.fixture(scope="module")
def optimizer_failure(tmp_path_factory):
    return failed_run(tmp_path_factory.mktemp("optimizer"), "gpt2_single_cls", "fp16_naive")


@pytest.fixture(scope="module")
def overflow(tmp_path_factory):
    return failed_run(tmp_path_factory.mktemp("overflow"), "roberta_mlm", "amp_fp16_unscaled", lr=3.0)


@pytest.fixture
def copied(tmp_path):
    """``copied(folder)``: a run's results folder of its own, to be changed."""

    def make(folder):
        shutil.copytree(folder.parent.parent, tmp_path / "out")
        return tmp_path / "out" / "runs" / folder.name

    return make


def test_an_epsilon_that_is_lost_is_confirmed_by_what_removes_it_and_by_nothing_else(optimizer_failure, copied):
    run = copied(optimizer_failure)
    trial = try_changes(run, ["all"])
    tried = {r.change: r for r in trial.remedies}
    assert trial.reproduced and trial.last_step == 8  # 20 steps, but the run has 8
    assert {name: r.survives for name, r in tried.items()} == {
        "fp32_head": False,
        "eps": True,
        "fp32_states": True,
        "scaler": None,
    }
    assert trial.confirmed_by == ["eps", "fp32_states"] and tried["eps"].confirms == "underflow_then_divide"
    assert tried["fp32_head"].failed_at == 1 and "underflow then divide in optimizer" in tried["fp32_head"].why
    assert "pytorch#74739" in tried["scaler"].why and tried["scaler"].steps == 0
    assert tried["eps"].bytes_ratio == 1 and tried["fp32_states"].bytes_ratio > 1.05  # fp32 moments weigh more
    kept = decode((run / "forensics.json").read_bytes(), ForensicsRecord)
    assert kept.remedies == trial.remedies and kept.sentence == trial.sentence


@pytest.mark.parametrize(("change", "config"), [("eps", "fp16_naive_eps1e4"), ("fp32_states", "fp16_naive_fp32_states")])
def test_a_change_trains_bit_for_bit_as_the_configuration_that_declares_it(optimizer_failure, tmp_path, change, config):
    """Independent: the same case under the declared configuration, from its beginning."""
    settings = plan_run(CASES["gpt2_single_cls"], DTYPE_CONFIGS[config], 0, Request(**SMALL), torch.device("cpu"))
    execute(settings, tmp_path)
    expected = [s.loss for s in read(tmp_path / "training_logs" / f"run_{settings.run_id}.jsonl", StepRecord)]
    rebuilt = rebuild(decode((optimizer_failure / "run.json").read_bytes(), RunRecord))
    made = change_of(change, rebuilt.settings.config, rebuilt.model)
    training = rebuilt.training(made.config)
    try:
        state = without_options(read_state(optimizer_failure, rebuilt.settings.run_id))
        Snapshot.from_named(state, training.model, training.optimizer).restore()
        assert [training.again(step).steps[-1].loss for step in range(1, 9)] == expected
    finally:
        training.precision.close()


def test_fp32_head_is_the_head_module_in_fp32(overflow, copied):
    head, module = try_changes(copied(overflow), ["fp32_head", "fp32:head"], steps=4).remedies
    assert (head.survives, head.failed_at, head.why) == (module.survives, module.failed_at, module.why)


def test_trying_again_replaces_a_remedy_and_keeps_the_others(optimizer_failure, copied):
    run = copied(optimizer_failure)
    try_changes(run, ["scaler", "eps"], steps=2)
    try_changes(run, ["eps"], steps=3)
    kept = decode((run / "forensics.json").read_bytes(), ForensicsRecord).remedies
    assert [(r.change, r.steps) for r in kept] == [("scaler", 0), ("eps", 3)]


def test_an_overflow_is_confirmed_by_the_smallest_module_around_it_that_helps(overflow, copied):
    trial = try_changes(copied(overflow), ["all"])
    culprit = trial.first_nonfinite.module
    tried = {r.change: r for r in trial.remedies}
    assert trial.first_nonfinite.cause == "overflow" and f"fp32:{culprit}" in tried and trial.confirmed_by
    (helped,) = trial.confirmed_by
    assert culprit.startswith(helped.removeprefix("fp32:"))
    assert all(not r.survives for name, r in tried.items() if name != helped)
    failed = [r for r in trial.remedies if r.survives is False and r.change.startswith("fp32:")]
    assert all("overflow in forward" in r.why for r in failed)  # where it fails now, by name
    assert tried["eps"].survives is None and "fp32" in tried["eps"].why


def test_without_a_control_that_fails_again_nothing_is_confirmed(optimizer_failure, copied):
    run = copied(optimizer_failure)
    forensics = decode((run / "forensics.json").read_bytes(), ForensicsRecord)
    other = msgspec.structs.replace(forensics, first_nonfinite=msgspec.structs.replace(forensics.first_nonfinite, step=2))
    replace_file(run / "forensics.json", encode(other))
    trial = try_changes(run, ["eps"])
    assert not trial.reproduced and trial.control_failed_at == 1
    assert trial.remedies[0].survives and trial.remedies[0].confirms is None and "proves nothing" in trial.remedies[0].why


def test_the_steps_must_reach_the_failure():
    assert (last_step(0, 4, 60, None), last_step(50, 90, 1000, None), last_step(0, 4, 6, None)) == (20, 95, 6)
    assert last_step(10, 12, 60, 2) == 12
    with pytest.raises(SettingsError, match=r"--steps 1 ends before the failure.*give at least 2"):
        last_step(10, 12, 60, 1)


def test_on_the_command_line(optimizer_failure, copied, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = copied(optimizer_failure)
    out = ["--out", str(run.parent.parent)]
    assert main(["inspect", run.name, *out, "--try", "eps", "scaler", "--steps", "2"]) == 0
    shown = capsys.readouterr().err
    assert "survives 2 steps" in shown and "not tried" in shown and "confirmed: underflow" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["inspect", run.name, *out, "--try", "eps", "--steps", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["confirmed_by"] == ["eps"] and row["reproduced"] and row["remedies"][0]["survives"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--try", "epss"], 2, "'epss' is no change"),
        (["--try", "fp32:transformer.h.9"], 2, "near: transformer.h."),
        (["--steps", "2"], 2, "--steps goes with --try"),
        (["--try", "eps", "--steps", "0"], 2, "at least 1"),
        (["--try", "eps", "--repro", "x.py"], 2, "give one of them"),
    ],
)
def test_wrong_commands_say_what_is_allowed(optimizer_failure, capsys, arguments, code, message):
    assert main(["inspect", optimizer_failure.name, "--out", str(optimizer_failure.parent.parent), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_healthy_run_has_nothing_to_try(plan, tmp_path, capsys):
    record = execute(plan("gpt2_single_cls", "fp32_true", max_steps=1), tmp_path)
    assert main(["inspect", record.run_id, "--out", str(tmp_path), "--try", "eps"]) == 2
    assert "--try is for runs that ended in a non-finite value" in capsys.readouterr().err
