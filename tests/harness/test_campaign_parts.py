"""A campaign's plan, stages, file, calls and pack, on made-up machines and stages that take no time. No training here."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS
from harness import cli
from harness.campaign import command
from harness.campaign.command import SCHEMA, begun
from harness.campaign.pack import PackTooLarge, pack, require_ours, unpack
from harness.campaign.plan import (
    ASKED,
    CASE_ORDER,
    GROUPS,
    LADDER,
    PILOT_STEPS,
    costs_of,
    length_of,
    make_plan,
    outcome,
    pilot_of,
    probe,
    stages_of,
)
from harness.exit_codes import exit_code_of
from harness.matrix.spending import START_UP_S
from harness.options import NOT_TIMED, OPS
from harness.run.signals import Stop
from harness.settings import SettingsError
from harness.supervisor import child_process
from instrument.results.folder import OutputError
from instrument.results.schemas import RunRecord
from kernels.bench import MODULES
from kernels.check import MODULES as CHECKED

NOTHING = dict.fromkeys(ASKED)
SEVEN = [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix]
COST = st.tuples(st.floats(0, 60), st.floats(1e-3, 2))
MACHINE = {
    **{"device": "cpu", "slug": "cpu-x", "preset": "full", "preset_steps": 1000, "preset_seeds": [0, 1, 2], "jobs": 1},
    **{"labels": ["gpt2_multi_cls", "gpt2_clm"], "configs": ["fp32_true", "amp_fp16"], "data": "embedded"},
    **{"weights": "scratch", "environment": {"cpu": "x"}, "estimates": []},
}
CELLS = [(label, config) for label in MACHINE["labels"] for config in MACHINE["configs"]]


def planned(costs, budget_s, **asked):
    return make_plan(costs, {**MACHINE, **asked.pop("machine", {})}, {**NOTHING, **asked}, budget_s)


@given(st.lists(COST, min_size=4, max_size=4), st.floats(0, 1e5), st.floats(1, 10), st.integers(1, 3))
def test_what_is_said_to_fit_fits_and_more_time_never_plans_less(costs, budget_s, factor, jobs):
    table = dict(zip(CELLS, costs, strict=True))
    rungs = [(max(PILOT_STEPS, round(share * 1000)), [0, 1, 2][:n]) for share, n in LADDER]
    plan, more = (planned(table, s, machine={"jobs": jobs}) for s in (budget_s, budget_s * factor))
    place, further = (rungs.index((p["max_steps"], p["seeds"])) for p in (plan, more))
    assert plan["fits"] == (plan["estimated_s"] <= budget_s) and further >= place
    one_seed_s = [
        sum(fixed_s + steps * step_s for fixed_s, step_s in costs) / jobs for steps in (plan["max_steps"], PILOT_STEPS)
    ]
    pilot_s = one_seed_s[1] if plan["max_steps"] > PILOT_STEPS else 0
    assert plan["estimated_s"] == pytest.approx(pilot_s + len(plan["seeds"]) * one_seed_s[0]), "the pilot was run, too"
    assert plan["fits"] or place == 0


def test_the_plan_of_too_little_time_of_unknown_costs_and_of_what_was_given():
    flat = dict.fromkeys(CELLS, (0.0, 1.0))
    least = planned(flat, 10)
    assert (least["max_steps"], least["seeds"], least["fits"]) == (80, [0], False) and "not even this much" in least["why"]
    unknown = planned({}, 1e9)
    assert unknown["estimated_s"] is None and not unknown["fits"] and (unknown["max_steps"], unknown["seeds"]) == (80, [0])
    asked = planned(flat, 10, max_steps=7, seeds=[5, 6])
    assert (asked["max_steps"], asked["seeds"], asked["estimated_s"]) == (7, [5, 6], 56.0)
    whole = planned(flat, 1e9)
    assert (whole["max_steps"], whole["seeds"], whole["fits"]) == (1000, [0, 1, 2], True)
    assert planned(flat, 1e9, machine={"preset_steps": 60})["max_steps"] == 60, "a preset that is shorter than the pilot"


def test_every_plan_gives_a_speed_and_several_seeds_come_before_more_steps():
    from report.tables.speed import FEWEST_STEPS

    assert PILOT_STEPS - PRESETS["full"].untimed_steps >= FEWEST_STEPS
    plans = [planned(dict.fromkeys(CELLS, (0.0, 0.01)), budget) for budget in range(1, 200)]
    assert min(plan["max_steps"] for plan in plans) == PILOT_STEPS
    assert {len(plan["seeds"]) for plan in plans if plan["max_steps"] > PILOT_STEPS} == {3}
    assert pilot_of(MACHINE, {**NOTHING, "seeds": [5, 6]}) == {"max_steps": 80, "seeds": [5]}


def test_the_order_has_both_losses_of_both_architectures_first():
    assert len({(CASES[name].architecture.id, CASES[name].task.loss) for name in CASE_ORDER[:4]}) == 4
    assert CASE_ORDER[4] == "gpt2_clm@512" and PRESETS["full"].sequence_length("gpt2_clm") != 512
    assert PRESETS["full"].sequence_length("roberta_mlm") == 512


@pytest.mark.parametrize("label", ["gpt2_clm@", "gpt2_clm@x", "gpt2_clm@0", "gpt2_clm@-4"])
def test_a_length_that_is_none_is_refused(label):
    with pytest.raises(SettingsError, match="after @ a number of tokens"):
        length_of(label)


def row(config, status="completed", total_s=10.0, step_s=0.5, steps=8, seq_len=512):
    names = {"arch": "gpt2", "task": "clm", "loss": "softmax_ce", "loss_reduction": "mean", "preset": "full", "device": "x"}
    sizes = {"max_steps": 80, "batch_size": 32, "micro_batch": 16, "seq_len": seq_len, "steps_done": steps}
    sources = {"data_source": "embedded", "weights_source": "scratch", "step_time_p50_s": step_s}
    where = {"run_id": f"gpt2_clm-{config}-s0-00000000", "case": "gpt2_clm", "scenario": "A", "dtype_config": config, "seed": 0}
    diverged = 1 if status == "diverged" else None
    flags = {"timings_s": {"total": total_s, "steps": 6.0}}
    return RunRecord(**names, **sizes, **sources, **where, status=status, divergence_step=diverged, flags=flags)


def test_a_rows_total_without_its_steps_is_what_every_run_costs_and_a_diverged_one_brings_its_controls():
    machine = {**MACHINE, "labels": ["gpt2_clm", "gpt2_clm@512"], "configs": ["fp32_true", "amp_bf16", "fp16_naive"]}

    def cost(row):
        return costs_of([row], machine, NOTHING)

    assert cost(row("fp32_true")) == {("gpt2_clm@512", "fp32_true"): (START_UP_S + 10 - 8 * 0.5, 0.5)}
    assert cost(row("amp_bf16", seq_len=64)).keys() == {("gpt2_clm", "amp_bf16")}
    fixed_s, step_s = cost(row("fp16_naive", "diverged", step_s=None, steps=4))["gpt2_clm@512", "fp16_naive"]
    assert step_s == 3 * 6.0 / 4 and fixed_s == 3 * (START_UP_S + 4)
    assert cost(row("fp32_true", "oom")) == cost(row("bf16_pure")) == {}, "failed, and not of this campaign"
    assert costs_of([row("fp32_true")], machine, {**NOTHING, "max_steps": 81}) == {}, "another plan's"


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"data": "nowhere"}, "no such folder or file"),
        ({"cases": ["gpt3_clm"]}, "gpt3_clm"),
        ({"configs": ["fp4"]}, "fp4"),
        ({"cases": ["gpt2_clm@9999"]}, "longer than the"),
        ({"device": "cuda"}, "torch sees no GPU here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(asked, words):
    with pytest.raises(Exception, match=words) as raised:
        probe({**NOTHING, "preset": "tiny", **asked}, estimates=False)
    assert exit_code_of(raised.value) in (2, 4) and "\n" not in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))  # it comes from a process of its own
    assert str(again) == str(raised.value) and type(again) is type(raised.value)


def test_a_hub_that_does_not_answer_ends_it_before_anything_is_written(monkeypatch):
    from bench_cases.data import hub

    def silence(kind, name, revision):
        raise hub.unavailable(name, ConnectionError("no route"))

    monkeypatch.setattr(hub, "commit_of", silence)
    with pytest.raises(Exception, match="no route.*--data DIR") as raised:
        probe({**NOTHING, "preset": "tiny", "data": "hub", "cases": ["gpt2_multi_cls"]}, estimates=False)
    assert exit_code_of(raised.value) == 5


def test_the_matched_control_joins_the_full_preset_only():
    for preset, sizes, labels in (("tiny", {}, 6), ("full", {}, 7), ("full", {"seq_len": 64}, 6)):
        asked = {**NOTHING, "preset": preset, "data": "embedded", "documents": 300, **sizes}
        found = probe(asked, estimates=False)
        assert len(found["labels"]) == labels and ("gpt2_clm@512" in found["labels"]) == (labels == 7)
        assert len(found["configs"]) == 7 and found["preset"] == preset


def test_the_stages_in_order(tmp_path):
    def groups(total_s, device="cuda", **asked):
        machine = {**MACHINE, "labels": ["gpt2_clm", "roberta_mlm", "gpt2_clm@512"], "device": device}
        plan = {"max_steps": 80, "seeds": [0, 1]}
        before = stages_of({**NOTHING, **asked}, machine, tmp_path, total_s)
        everything = stages_of({**NOTHING, **asked}, machine, tmp_path, total_s, plan)
        assert everything[: len(before)] == before and len({s.name for s in everything}) == len(everything)
        assert {s.group for s in everything} <= GROUPS.keys()
        return before, list(dict.fromkeys(s.name.partition("-")[0] for s in everything))

    before, everything = groups(1800)
    assert everything == ["doctor", "bench", "run", "check", "overhead", "overflow", "fit"]
    first, check, *_, last, overhead = before[2:]
    assert (first.name, check.name, overhead.name) == ("run-gpt2_clm-s0", "check", "overhead")
    assert last.name == "run-gpt2_clm@512-s0" and last.command[last.command.index("--seq-len") + 1] == "512"
    assert groups(240, "cpu")[1] == ["doctor", "run", "check", "overhead", "overflow", "bench", "fit"]
    assert groups(240, skip=["doctor", "check", "bench", "overhead", "overflow", "fit"])[1] == ["run"]
    assert set(OPS) == {*MODULES, *NOT_TIMED} == set(CHECKED)
    assert sum(share for name, (share, _, _) in GROUPS.items() if name != "run") < 1


def test_the_runs_rotate_and_the_first_case_is_alone(tmp_path):
    labels = ["gpt2_multi_cls", "gpt2_clm", "roberta_mlm", "gpt2_clm@512", "gpt2_single_cls"]
    machine = {**MACHINE, "labels": labels, "configs": ["fp32_true", "amp_bf16"]}

    def runs(plan):
        return [s for s in stages_of({**NOTHING, "data": "embedded"}, machine, tmp_path, 60, plan) if s.group == "run"]

    found = runs({"max_steps": 80, "seeds": [0, 1]})
    cases = ["gpt2_multi_cls", "gpt2_clm", "gpt2_clm@512", "gpt2_single_cls"]
    assert [s.name for s in found] == [f"run-{case}-s{seed}" for seed in (0, 1) for case in cases]
    second = found[1].command
    assert second[second.index("--cases") + 1 : second.index("--configs")] == ("gpt2_clm", "roberta_mlm")
    assert second[second.index("--configs") + 1] == "amp_bf16" and second[second.index("--max-steps") + 1] == "80"
    assert "--data" in second and "--seq-len" not in second
    assert runs(None) == found[:4], "the pilot is part of a plan with its steps"
    longer = runs({"max_steps": 200, "seeds": [0, 1]})
    assert longer[:4] == found[:4] and [s.name for s in longer[4:6]] == [f"run-{case}-s0-200-steps" for case in cases[:2]]


@pytest.mark.parametrize(
    "exit_code, cut, resumes, state",
    [
        *[(0, None, False, "done"), (0, "SIGTERM", True, "done"), (75, "the call's end", True, "pending")],
        *[(-15, "the call's end", False, "pending"), (-15, "limit", False, "cut"), (3, None, True, "done")],
        *[(3, None, False, "failed"), (75, None, True, "pending"), (-11, None, True, "failed"), (5, None, False, "failed")],
        (130, "SIGINT", False, "pending"),
    ],
)
def test_how_a_stage_is_counted(exit_code, cut, resumes, state):
    assert outcome(exit_code, cut, resumes=resumes)[0] == state


def execute(tmp_path, monkeypatch, code, limit_s=60.0, grace_s=20.0, stop=None):
    (tmp_path / "stage_of_a_test.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files, pids = (tmp_path / "x.json", tmp_path / "logs" / "x.log"), []
    python = [sys.executable, "-m", "stage_of_a_test"]
    ended = child_process.run_command(python, files, {"limit": limit_s}, grace_s, stop or Stop(), pids.append)
    assert len(pids) == 1
    return *ended, *(path.read_text() if path.exists() else None for path in files)


@pytest.mark.process
def test_a_stage_ends_by_itself_or_is_asked_and_given_time(tmp_path, monkeypatch):
    code = "import sys; print('{}'); print('one\\ntwo', file=sys.stderr); sys.exit(3)"
    assert execute(tmp_path, monkeypatch, code) == (3, None, "{}\n", "one\ntwo\n")
    listens = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), "
        "print('saved', file=sys.stderr), sys.exit(75)))\ntime.sleep(600)"
    )
    exit_code, cut, out, log = execute(tmp_path, monkeypatch, listens, limit_s=1.0)
    assert cut == "limit" and out is None and (exit_code == -15 or (exit_code == 75 and log.endswith("saved\n")))
    stop = Stop()
    stop.request("SIGTERM")
    assert execute(tmp_path, monkeypatch, "import time; time.sleep(600)", stop=stop)[1] == "SIGTERM"


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.process
def test_a_stage_that_does_not_listen_is_killed_with_what_it_started(tmp_path, monkeypatch):
    code = (
        "import signal, subprocess, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\nchild.wait()"
    )

    class OnceItLogged:
        requested = property(lambda _: "SIGTERM" if "\n" in (tmp_path / "logs" / "x.log").read_text() else None)

    exit_code, _, _, log = execute(tmp_path, monkeypatch, code, grace_s=0.3, stop=OnceItLogged())
    assert exit_code == -signal.SIGKILL
    wait_until(lambda: gone(int(log)))


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is a signal on Linux only")
def test_a_stage_hears_that_its_campaign_was_killed(tmp_path):
    (tmp_path / "stage_of_a_test.py").write_text("import time; time.sleep(600)")
    parent = (
        "import sys; from pathlib import Path; from harness.supervisor.child_process import run_command; "
        "from harness.run.signals import Stop\n"
        "files = [Path(sys.argv[1]) / name for name in 'xy']\n"
        "command = [sys.executable, '-m', 'stage_of_a_test']\n"
        "run_command(command, files, {'limit': 600}, 1, Stop(), lambda pid: print(pid, flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.getcwd()))}
    command = [sys.executable, "-c", parent, str(tmp_path)]
    campaign = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(campaign.stdout.readline())
    campaign.kill()
    campaign.wait()
    wait_until(lambda: gone(pid))


def test_the_file_is_of_one_campaign(tmp_path):
    path = tmp_path / "campaign.json"
    assert begun(path, NOTHING) is None
    file = command.CampaignFile(began="", asked={**NOTHING, "data": "embedded"}, total_minutes=3, machine=MACHINE)
    path.write_bytes(msgspec.json.encode(file))
    with pytest.raises(SettingsError, match=r"--data is DIR, and the campaign in .* was begun with embedded; leave it out"):
        begun(path, {**NOTHING, "data": "DIR"})
    with pytest.raises(SettingsError, match=r"--max-steps is 7, .* begun with the default"):
        begun(path, {**NOTHING, "max_steps": 7})
    changed = begun(path, {**NOTHING, "price_per_hour": 2.5, "skip": ["fit"]}).asked
    assert changed["price_per_hour"] == 2.5 and changed["skip"] == ["fit"] and changed["data"] == "embedded"
    plain = json.loads(path.read_bytes())
    for damaged in ('{"torn', "[]", "{}", json.dumps(plain | {"stages": {"run": {"state": "asleep"}}}), json.dumps(plain)[:-9]):
        path.write_text(damaged)
        with pytest.raises(OutputError, match="is no campaign's file"):
            begun(path, NOTHING)


OLD_STAGE = {"state": "cut", "spent_s": 12.5, "exit_code": -15, "note": "its share of the time was over", "pid": 4711}
OLD = {"schema": 1, "began": "2026-11-20T18:00:00+00:00", "asked": NOTHING, "total_minutes": 27.0, "machine": MACHINE}
OLD |= {"plan": {"max_steps": 30, "seeds": [0], "variants": []}, "calls": [], "stages": {"bench-cross_entropy": OLD_STAGE}}


def test_an_earlier_versions_campaign_is_refused_with_a_way_out_and_left_as_it_is(campaign, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "campaign.json").write_text(json.dumps(OLD))
    assert campaign() == 5 and campaign.ran == []
    message = capsys.readouterr().err
    assert f"schema 1; here {SCHEMA}" in message and "new folders with --results and --out" in message
    assert campaign.state() == OLD


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """``campaign(*options)`` on a machine that was found out already; stages take no time: ``campaign.ends`` says how each
    ends, by the beginning of its name, and ``campaign.ran`` which ran."""
    machine = {**MACHINE, "labels": ["gpt2_clm"], "configs": ["fp32_true"], "preset_seeds": [0]}
    monkeypatch.setattr(command, "find_machine", lambda asked, estimates: machine)

    def call(*more):
        return cli.main(["campaign", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *more])

    def run(words, files, limits_s, grace_s, stop, started):
        files[1].parent.mkdir(parents=True, exist_ok=True)
        files[1].write_text(f"last line of {files[1].stem}\n")
        call.ran.append(files[1].stem)
        call.times.setdefault(files[1].stem, []).append((limits_s, grace_s))
        started(4_000_000)
        ends = next((end for name, end in call.ends.items() if files[1].stem.startswith(name)), [(0, None)])
        return ends.pop(0) if len(ends) > 1 else ends[0]

    monkeypatch.setattr(command, "run_command", run)
    call.ran, call.ends, call.times, call.machine, call.results = [], {}, {}, machine, tmp_path / "results"
    call.state = lambda: json.loads((tmp_path / "results" / "campaign.json").read_text())
    return call


def test_a_stage_that_fails_costs_only_itself(campaign, capsys):
    campaign.ends = {"check": [(-11, None)]}
    assert campaign("--ops", "unscale", "--skip", "fit") == 3
    assert campaign.ran == ["doctor", "run-gpt2_clm-s0", "check", "overhead", "bench"]
    found = campaign.state()["stages"]
    assert found["check"]["state"] == "failed" and "signal 11: last line of check" in found["check"]["note"]
    assert found["overhead"]["state"] == found["bench"]["state"] == "done"
    assert "failed: check" in capsys.readouterr().err
    campaign.ran.clear()
    assert campaign() == 3 and campaign.ran == [], "what is settled is not run again"
    assert campaign("--retry-failed") == 3 and campaign.ran == ["check"]


def test_a_stage_that_is_cut_resumes_after_the_others_with_twice_the_limit(campaign):
    campaign.machine["device"] = "cuda"  # where the bench comes first
    campaign.ends = {"bench": [(-15, "limit"), (-15, "limit"), (0, None)], "overhead": [(-15, "limit")]}
    assert campaign("--skip", "fit", "check") == 3
    turns = ["doctor", "bench", "run-gpt2_clm-s0", "overhead", "bench", "overhead", "bench", "overhead"]
    assert campaign.ran == turns
    limits_s = [limits_s["limit"] for limits_s, _ in campaign.times["bench"]]
    assert limits_s == [limits_s[0], 2 * limits_s[0], 4 * limits_s[0]]
    found = campaign.state()["stages"]
    assert found["bench"]["state"] == "done", "what resumes may be cut as often as it takes"
    assert found["overhead"]["state"] == "failed" and "it did not end in 3 turns" in found["overhead"]["note"]


def test_a_stage_that_is_too_long_for_every_call_does_not_keep_a_campaign_from_its_end(campaign):
    campaign.ends = {"overhead": [(-15, "the call's end")]}
    assert [campaign("--minutes", "3", "--skip", "fit", "check") for _ in range(4)] == [75, 75, 3, 3]
    found = campaign.state()["stages"]
    assert found["overhead"]["state"] == "failed" and found["bench"]["state"] == "done"


def test_a_stage_that_was_cut_last_is_left_to_the_next_call(campaign):
    campaign.ends = {"bench": [(-15, "limit"), (-15, "the call's end"), (0, None)]}
    assert campaign("--skip", "fit", "check", "overhead") == 75
    assert campaign.state()["stages"]["bench"]["state"] == "pending"
    assert campaign() == 0 and campaign.state()["stages"]["bench"]["cuts"] == 1


def test_a_call_without_minutes_leaves_everything_to_the_next_and_the_plan_is_made_once(campaign, capsys):
    campaign.ends = {"run-": [(75, "the call's end")]}
    assert campaign("--minutes", "0.05", "--total-minutes", "30") == 75 and campaign.ran == []
    assert "left to do: doctor" in capsys.readouterr().err
    assert campaign("--minutes", "10") == 75, "the runs were stopped by the end of the call"
    state = campaign.state()
    assert state["total_minutes"] == 30 and state["stages"]["run-gpt2_clm-s0"]["state"] == "pending" and state["plan"] is None
    campaign.ends = {"overflow": [(75, "the call's end")], "fit": [(75, "the call's end")]}
    assert campaign("--minutes", "10") == 75 and (plan := campaign.state()["plan"])["max_steps"] == 80
    campaign.ends = {}
    assert campaign("--minutes", "10") == 0
    assert campaign.state()["plan"] == plan and [call["end"] for call in campaign.state()["calls"]][-1] == "done"


def test_a_small_call_keeps_time_free_for_a_dossier_only_where_there_can_be_one(campaign):
    assert campaign("--minutes", "2", "--ops", "unscale", "--skip", "fit", "bench") == 0
    for name, dossier_s in (("doctor", 0.0), ("run-gpt2_clm-s0", command.DOSSIER_S["cpu"]), ("check", 0.0)):
        [(limits_s, grace_s)] = campaign.times[name]
        assert 100 < limits_s["the call's end"] + grace_s + dossier_s <= 120, name


def test_a_dossier_that_takes_longer_than_a_call_leaves_half_of_it_to_the_stages(campaign, monkeypatch):
    """A machine that is busy with something else: without this no call would ever do anything but build a dossier."""
    campaign.ends = {"check": [(-15, "the call's end")]}
    monkeypatch.setattr(command, "finished_runs", lambda out: ["a run"])
    assert campaign("--minutes", "3", "--skip", "fit") == 75
    state = campaign.state()
    state["stages"]["dossier"]["last_s"] = 1e4
    command.replace(campaign.results / "campaign.json", json.dumps(state).encode())
    assert campaign("--minutes", "3") == 75
    limits_s, grace_s = campaign.times["check"][-1]
    assert limits_s["the call's end"] + grace_s == pytest.approx(90, abs=5)


def test_something_worth_reading_is_packed_after_every_call(campaign, tmp_path):
    campaign.ends = {"run-": [(75, "SIGTERM")], "doctor": [(0, None)]}
    assert campaign("--skip", "fit") == 75, "no run has ended"
    log = (tmp_path / "out" / "campaign" / "logs" / "campaign.log").read_text()
    assert "doctor: done" in log and "run-gpt2_clm-s0: pending" in log
    assert (tmp_path / "out" / "campaign" / "logs" / "doctor.log").read_text() == "last line of doctor\n"
    assert json.loads((tmp_path / "out" / "campaign.json").read_bytes()) == campaign.state()


NEEDS_S = {"doctor": 55.0, "bench": 400.0, "check": 90.0, "overhead": 150.0, "overflow": 30.0, "fit": 300.0, "dossier": 25.0}


class LentGpu:
    """A clock that is planted, and stages that take what they were seen to take on an H200: seconds of every group's command
    when nothing stops it, and of every run. A stage that resumes keeps what it has done."""

    START_S, RUN_S = 15.0, 22.0

    def __init__(self):
        self.now_s, self.done_s, self.rows, self.ran = 1000.0, {}, [], []

    def run(self, words, files, limits_s, grace_s, stop, started):
        name, group = files[1].stem, files[1].stem.partition("-")[0]
        self.ran.append(name)
        if group == "run":
            needs_s, left_s = self.runs(words, limits_s["the call's end"])
        else:
            needs_s, left_s = NEEDS_S[group] - self.done_s.get(name, 0.0), min(limits_s.values())
        self.now_s += min(needs_s, left_s)
        if GROUPS[group][-1]:
            self.done_s[name] = self.done_s.get(name, 0.0) + min(needs_s, left_s)
        if needs_s <= left_s:
            return 0, None
        return (-15, "limit") if limits_s["limit"] < limits_s["the call's end"] else (75, "the call's end")

    def runs(self, words, left_s):
        """As many runs of a matrix as there is time for; one under way is stopped after a checkpoint, within the grace."""
        cases = words[words.index("--cases") + 1 : words.index("--configs")]
        configs, seed = words[words.index("--configs") + 1 : words.index("--seeds")], words[words.index("--seeds") + 1]
        length = words[words.index("--seq-len") + 1] if "--seq-len" in words else None
        todo = [run for case in cases for config in configs if (run := (case, config, seed, length)) not in self.rows]
        fit = max(0, int((left_s - self.START_S) // self.RUN_S))
        self.rows += todo[:fit]
        return self.START_S + len(todo) * self.RUN_S, left_s


def test_a_lent_gpu_gives_the_headline_in_the_first_call_runs_in_each_and_the_whole_matrix_in_the_time(campaign, monkeypatch):
    """Three calls of nine minutes, and as many more as it takes: on a clock that is planted."""
    gpu = LentGpu()
    campaign.machine.update(
        MACHINE, device="cuda", configs=SEVEN, labels=[*CASE_ORDER, "gpt2_single_cls", "roberta_single_cls"]
    )
    monkeypatch.setattr(command.time, "monotonic", lambda: gpu.now_s)
    monkeypatch.setattr(command, "run_command", gpu.run)
    monkeypatch.setattr(command, "finished_runs", lambda out: gpu.rows)
    monkeypatch.setattr(command, "costs_of", lambda rows, machine, asked: {})
    packed = []
    monkeypatch.setattr(command, "pack", lambda results, out: packed.append(len(gpu.rows)) or "")
    calls = []
    for _ in range(10):
        began_s, gpu.ran = gpu.now_s, []
        code = campaign("--minutes", "9", "--total-minutes", "27")
        calls.append((list(gpu.ran), len(gpu.rows)))
        assert gpu.now_s - began_s <= 9 * 60, "a call keeps its minutes"
        assert packed[-1] == len(gpu.rows) and gpu.ran[-1] == "dossier", "something worth reading after every call"
        if code == 0:
            break
    ran, rows = calls[0]
    assert ran[:4] == ["doctor", "bench", "run-gpt2_multi_cls-s0", "dossier"] and rows >= 7
    assert calls[2][1] >= 5 * 7 and calls[3][1] == 7 * 7, (
        "the 2 x 2 of losses and architectures, with the control, in 27 minutes"
    )
    assert code == 0 and len(calls) < 8 and campaign.state()["stages"]["bench"]["state"] == "done"


def test_two_dossiers_and_what_grows_between_them_stay_within_the_minutes(campaign, monkeypatch):
    """On a clock that is planted: whatever is run takes all that it may."""
    now_s, rows, ran = [1000.0], [], []

    def run(words, files, limits_s, grace_s, stop, started):
        name = files[1].stem
        rows.extend(range(10 * name.startswith("run-")))
        now_s[0] += limits_s["the call's end"] + grace_s if name.startswith("run-") else 28.0 if name == "dossier" else 1.0
        ran.append(name)
        return (75, "the call's end") if name.startswith("run-") else (0, None)

    monkeypatch.setattr(command.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(command, "finished_runs", lambda out: rows)
    monkeypatch.setattr(command, "pack", lambda results, out: "")
    monkeypatch.setattr(command, "run_command", run)
    assert campaign("--minutes", "5", "--ops", "unscale") == 75
    assert now_s[0] <= 1300.0 and ran.count("dossier") == 1


def test_a_kill_at_any_write_of_the_file_costs_at_most_the_stage_under_way(campaign, monkeypatch):
    class Killed(BaseException):
        pass

    write, campaigns = command.replace, 0
    for at in range(1, 40):
        writes = []

        def until(path, data, at=at, writes=writes):
            writes.append(path)
            if len(writes) == at:
                raise Killed
            write(path, data)

        monkeypatch.setattr(command, "replace", until)
        try:
            assert campaign("--skip", "doctor", "fit") == 0
            break
        except Killed:
            campaigns += 1
    assert campaigns > 5 and {stage["state"] for stage in campaign.state()["stages"].values()} == {"done"}
    assert len(campaign.ran) <= 5 + campaigns, "no stage that was written as done is run again"


def test_one_call_at_a_time(campaign, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    with FileLock(tmp_path / "results" / ".campaign.lock"):
        assert campaign() == 5 and "another campaign works in" in capsys.readouterr().err
    assert campaign() == 0


def results(folder, runs=3, steps=40):
    """A made-up results folder of a campaign."""
    for index in range(runs):
        run_id = f"gpt2_clm-fp16_naive-s{index}-00000000"
        for name in (f"runs/{run_id}", "training_logs", "traces"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "runs" / run_id / "run.json").write_text(json.dumps({"run_id": run_id}))
        (folder / "runs" / run_id / "culprit.safetensors").write_bytes(os.urandom(1000))
        (folder / "runs" / run_id / "activations.jsonl").write_bytes(os.urandom(3000).hex().encode() + b"\n")
        (folder / "training_logs" / f"run_{run_id}.jsonl").write_text('{"step": 1}\n' * steps)
        (folder / "traces" / f"{run_id}-step1.json.gz").write_bytes(os.urandom(500 + index))
    for name in ("results.jsonl", "machine.json", "campaign.json", "kernels.json"):
        (folder / name).write_text("{}\n")
    return folder


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_pack_holds_what_is_worth_keeping_the_same_bytes_each_time_and_a_campaign_resumes_from_it(tmp_path):
    source, out = results(tmp_path / "results"), tmp_path / "out"
    line, files = pack(source, out), tree(out)
    log = "training_logs/run_gpt2_clm-fp16_naive-s0-00000000.jsonl"
    assert gzip.decompress(files[log + ".gz"]) == b'{"step": 1}\n' * 40 and "campaign.json" in files
    assert [name for name in files if name.startswith("traces/")] == ["traces/gpt2_clm-fp16_naive-s0-00000000-step1.json.gz"]
    assert not any("culprit" in name or name.endswith("activations.jsonl") for name in files)
    assert line == f"{len(files)} files, {sum(map(len, files.values())) / 1e6:.1f} MB, in {out}"
    pack(source, out)
    assert tree(out) == files
    assert unpack(out, tmp_path / "elsewhere") and not unpack(out, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / log).read_bytes() == (source / log).read_bytes()
    pack(tmp_path / "elsewhere", tmp_path / "again")
    assert tree(tmp_path / "again") == files


def test_what_does_not_fit_is_left_out_and_said_and_too_much_is_refused(tmp_path):
    source, out = results(tmp_path / "results"), tmp_path / "out"
    pack(source, out)
    size = sum(map(len, tree(out).values()))
    line = pack(source, out, limit_bytes=size - 1)
    assert sum(map(len, tree(out).values())) < size and "left out: runs/*-s[1-9]*-*/activations" in line
    assert len(list(out.glob("runs/*/activations.jsonl.gz"))) == 1, "the lowest seed's stays"
    with pytest.raises(PackTooLarge, match="and 0 MB are allowed; the largest file is"):
        pack(source, out, limit_bytes=100)
    assert (out / "campaign.json").exists(), "a pack that is refused leaves the one before"


def test_the_overflow_that_was_made_on_purpose_is_the_trace_that_is_packed(tmp_path):
    source = results(tmp_path / "results")
    (source / "campaign" / "overflow" / "traces").mkdir(parents=True)
    (source / "campaign" / "overflow" / "traces" / "roberta_mlm-step3.json.gz").write_bytes(b"x" * 9000)
    pack(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "traces") == ["roberta_mlm-step3.json.gz"]


def test_a_link_in_a_results_folder_is_not_packed(tmp_path):
    source, secret = results(tmp_path / "results"), tmp_path / "secret"
    secret.write_text("a token")
    (source / "machine.json").unlink()
    (source / "machine.json").symlink_to(secret)
    (source / "training_logs" / "run_y.jsonl").symlink_to(secret)
    pack(source, tmp_path / "out")
    assert not {"machine.json", "training_logs/run_y.jsonl.gz"} & tree(tmp_path / "out").keys()


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path):
    require_ours(tmp_path / "new")
    require_ours(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds something that no campaign wrote"):
        require_ours(tmp_path)
    (tmp_path / "campaign.json").write_text("{}")
    require_ours(tmp_path)
