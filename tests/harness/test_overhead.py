"""The overhead benchmark's arithmetic and arms, at sizes that take no time. No test judges a speed."""

import json
import math
from importlib.util import find_spec

import pytest
import torch

from harness import overhead
from harness.cli import main

pytestmark = pytest.mark.slow


def test_ratios_are_to_the_bare_step_of_the_same_round():
    seconds = {name: [1.0, 2.0, 4.0] for name in overhead.ARMS} | {
        "light": [1.02, 2.04, 4.08],
        "debug_underflow_overflow": [2.0, 4.0, 8.0],
    }
    figures = {f.name: f for f in overhead._figures(seconds, "", {"what": "x", "notes": {"light": "holds"}}, 1.03)}
    assert figures["light"].median == pytest.approx(1.02) and figures["light"].met and figures["light"].note == "holds"
    assert figures["debug_underflow_overflow"].median == 2.0 and figures["debug_underflow_overflow"].met is None
    assert figures["added_debug_over_light"].median == pytest.approx(50.0)
    assert "0.00% wide, under the 1%" in figures["bare_again"].note


def test_an_interval_that_is_too_wide_says_so():
    seconds = {name: [1.0, 1.0, 1.0] for name in overhead.ARMS} | {"bare_again": [0.9, 1.0, 1.1]}
    figures = {f.name: f for f in overhead._figures(seconds, "", {"what": "x", "notes": {}}, None)}
    assert "not under" in figures["bare_again"].note


def test_no_round_begins_after_the_time_that_was_given_and_one_always_counts(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: float(next(clock)))  # a second passes at every look
    taken = []
    steps = iter(lambda: taken.append(0), 1)
    for at_most_s, rounds in ((0.0, 1), (20.0, 6)):
        taken.clear()
        wall_s, cpu_s = overhead._rounds({"bare": steps, "light": steps}, 50, 1, at_most_s)
        assert at_most_s or len(taken) == 2 * 2, "one round to warm up, and one that counts"
        assert len(wall_s["bare"]) == len(wall_s["light"]) == len(cpu_s["light"]), at_most_s
        assert 1 <= len(wall_s["bare"]) <= rounds, at_most_s


def test_every_arm_takes_turns_and_the_order_is_reversed():
    taken = []

    def arm(name):
        while True:
            taken.append(name)
            yield

    names = ("bare", "light", "full")
    wall_s, cpu_s = overhead._rounds({name: arm(name) for name in names}, 5, 2)
    often = ("bare", "light")
    assert taken == [*names, *names[::-1], *names, *names[::-1], *often, *often[::-1], *often, *names[::-1]]
    assert {len(v) for v in (*wall_s.values(), *cpu_s.values())} == {5}
    assert [v is None for v in wall_s["full"]] == [False, True, True, True, False]


def test_the_arms_do_the_same_work(plan, tmp_path, monkeypatch):
    small = plan("gpt2_clm", "fp32_true", max_steps=50)
    monkeypatch.setattr(overhead, "_settings", lambda device: small)
    trained = {}
    prepare = overhead.Precision.prepare
    monkeypatch.setattr(
        overhead.Precision, "prepare", lambda self, model: trained.setdefault(len(trained), prepare(self, model))
    )
    arms, facts, close = overhead.make_arms(torch.device("cpu"), tmp_path)
    assert set(arms) == set(overhead.ARMS) and facts["steps_a_turn"] == 1
    for _ in range(3):
        for arm in arms.values():
            next(arm)
    close()
    reference, *others = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in trained.values()]
    assert len(others) == 6
    for weights in others:  # the fused loss and our clipping round differently
        assert float((weights - reference).abs().mean()) < 1e-4 * math.sqrt(float(reference.square().mean()))
    assert "MB on the host" in facts["notes"]["light"]


def test_the_figures_are_written_for_the_dossier(tmp_path, monkeypatch):
    monkeypatch.setattr(
        overhead,
        "make_arms",
        lambda device, folder: (
            {name: iter(lambda: None, 1) for name in overhead.ARMS},
            {"what": "x", "notes": {}, "steps_a_turn": 1},
            lambda: None,
        ),
    )
    overhead.measure(3, tmp_path)
    stored = json.loads((tmp_path / "overhead.json").read_text())
    assert stored["pairs"] == 3 and len(stored["wall_s"]["light"]) == 3
    assert {row["name"] for row in stored["rows"]} >= {"light", "light_cpu", "bare_again"}


def test_about_ten_million_parameters_on_a_cpu():
    settings = overhead._settings(torch.device("cpu"))
    sizes = settings.case.architecture.sizes["tiny"]
    assert (sizes["n_embd"], sizes["n_layer"]) == (256, 12) and settings.log_every == 1


def test_the_command_prints_its_figures(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "measure", lambda pairs, out, at_most_s: [overhead.log_write(pairs)])
    assert main(["bench", "overhead", "--pairs", "3", "--json"]) == main(["bench", "--pairs", "3", "--json"]) == 0
    printed = capsys.readouterr()
    for line in printed.out.splitlines():
        found = json.loads(line)
        assert [row["name"] for row in found["rows"]] == ["log_write"] and found["machine"]["usable_cores"] >= 1
    assert "bench overhead" in printed.err and "log_write" in printed.err


@pytest.mark.parametrize("name", [*overhead.ELSEWHERE, "speed"])
def test_another_benchmark_is_refused_with_the_command_that_runs_it(name, capsys):
    assert main(["bench", name]) == 2
    module, said = overhead.ELSEWHERE.get(name, "").split(" ")[:1], capsys.readouterr().err
    assert f"no benchmark {name!r}; allowed: overhead" in said
    assert name == "speed" or f"`python -m {overhead.ELSEWHERE[name]}`" in said
    assert all(find_spec(f"{m}.__main__") for m in module if m)
