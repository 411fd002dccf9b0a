"""Injection trials: the scoring itself, a sample of the 500, and all of them in the soak."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from instrument.results.schemas import FirstNonfinite
from tests.soak.forensics import trials
from tests.soak.forensics.planted_models import MODELS, PLANTS, build
from tests.soak.forensics.trials import measure

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def test_a_sample_of_injected_faults_is_named_right():
    results = list(trials.injection_trials(30, seed=3))
    assert [r.as_row() for r in results if r.why_wrong] == []
    assert {r.trial.plant for r in results} == set(PLANTS) and {r.trial.model for r in results} == set(MODELS)
    assert {r.expected[1] for r in results if r.expected} == {"forward", "backward", "unscale", "optimizer"}


def test_healthy_runs_are_left_alone_with_infinities_inside():
    results = list(trials.healthy_trials(16, seed=3))
    assert [r.as_row() for r in results if r.why_wrong or r.named] == []
    assert any(r.infinities for r in results)


def test_the_absorbed_infinity_of_gelu_new_is_among_the_healthy():
    trial = trials.Trial(
        seed=1, model="gpt2", dtype="float16", attention="eager", micro_batches=1, plant=None, module=None, step=1
    )
    result = trials.run_trial(trial)
    assert result is not None and result.why_wrong == "" and result.infinities > 0


def test_wrong_answers_are_found_out():
    trial = trials.Trial(
        seed=1,
        model="branches",
        dtype="float32",
        attention="sdpa",
        micro_batches=1,
        plant="forward_nan",
        module="twice",
        step=2,
    )
    right = replace_replay(
        FirstNonfinite.surfaced(2, "forward", "output", "nan", module="twice", op="aten.copy_", cause="invalid")
    )
    expected = (2, "forward", "twice", "aten.copy_")
    judge = trials._judge
    assert judge(trial, expected, right) == ""
    assert judge(trial, expected, None) == "named nothing"
    assert judge(trial, None, right) == "named a healthy run"
    assert judge(trial, expected, replace_replay(FirstNonfinite.surfaced(3, "forward", "output", "nan", module="twice")))
    assert judge(trial, expected, replace_replay(FirstNonfinite.surfaced(2, "backward", "output", "nan", module="twice")))
    assert judge(trial, expected, replace_replay(FirstNonfinite.surfaced(2, "forward", "output", "nan", module="deep.0")))
    assert (
        judge(trial, expected, FirstNonfinite.surfaced(2, "forward", "output", "nan", module="twice"))
        == "the replay did not match"
    )
    assert judge(trial, (*expected[:3], "aten.log"), right) == "op aten.copy_, not aten.log"
    assert judge(replace(trial, plant="overflow_weight"), expected, right) == "cause invalid, not overflow"


def replace_replay(found):
    import msgspec

    return msgspec.structs.replace(found, replay={"matched": True})


def test_the_twin_knows_a_fault_that_does_no_harm():
    """A NaN in a module's output that nothing reads: `pooler`-like dead ends must not be named."""
    trial = trials.Trial(
        seed=5,
        model="branches",
        dtype="float32",
        attention="sdpa",
        micro_batches=1,
        plant="forward_inf",
        module="deep.1",
        step=2,
    )
    result = trials.run_trial(trial)
    assert result.expected == (2, "forward", "deep.1", "aten.copy_") and result.why_wrong == ""


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_the_same_each_time_and_small(kind):
    first, second = (build(kind, torch.float32, "eager", 7) for _ in range(2))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert torch.equal(first.loss_of(first.model, 1, 0), second.loss_of(second.model, 1, 0))
    assert not torch.equal(first.loss_of(first.model, 1, 0), first.loss_of(first.model, 2, 0))
    assert sum(p.numel() for p in first.model.parameters()) < 50_000


def test_the_score_is_printed_with_what_was_wrong(monkeypatch):
    real = list(trials.injection_trials(4, seed=9))
    monkeypatch.setattr(trials, "injection_trials", lambda n, device: iter([replace(real[0], why_wrong="because"), *real[1:]]))
    monkeypatch.setattr(trials, "healthy_trials", lambda n, device: iter(real[:1]))
    figures = {figure.name: figure for figure in measure(4)}
    assert figures["right"].median == 0.75 and figures["right"].met is False and "3 of 4" in figures["right"].note
    assert figures["wrong: because"].n == 1 and figures["healthy_left_alone"].median == 1.0


@pytest.mark.soak
def test_all_five_hundred_and_two_hundred_healthy():
    results = list(trials.injection_trials(500)) + list(trials.healthy_trials(200))
    assert [r.as_row() for r in results if r.why_wrong] == []
    assert min(Counter(r.trial.plant for r in results if r.trial.plant).values()) >= 20
