"""A campaign's plan, stages, file, calls and pack, on made-up machines and stages that take no time. No training here."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import psutil
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS
from harness import cli
from harness.campaign import command, stages
from harness.campaign.command import begun
from harness.campaign.pack import PackTooLarge, pack, require_ours, unpack
from harness.campaign.plan import (
    ASKED,
    CASE_ORDER,
    LADDER,
    Cost,
    calibrated,
    case_and_length,
    costs_of_all,
    kind,
    make_plan,
    probe,
    representatives,
)
from harness.campaign.stages import GROUPS, outcome, run_process, stages_of
from harness.exit_codes import exit_code_of
from harness.options import NOT_TIMED, OPS
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.folder import OutputError
from instrument.results.schemas import RunRecord
from kernels.bench import MODULES
from kernels.check import MODULES as CHECKED

NOTHING = dict.fromkeys(ASKED)
SEVEN = [c.id for c in DTYPE_CONFIGS.values() if c.in_default_matrix]
COST = st.builds(Cost, st.floats(0, 60), st.floats(1e-3, 2), st.integers(1, 3))
MACHINE = {
    **{"device": "cpu", "slug": "cpu-x", "preset": "tiny", "preset_steps": 1000, "preset_seeds": [0, 1, 2]},
    **{"labels": ["gpt2_multi_cls", "gpt2_clm"], "configs": ["fp32_true", "amp_fp16"], "data": "embedded"},
    **{"weights": "scratch", "environment": {"cpu": "x"}, "estimates": []},
}
CELLS = [(label, config) for label in MACHINE["labels"] for config in MACHINE["configs"]]


def planned(costs, budget_s, **asked):
    return make_plan(costs, MACHINE, {**NOTHING, **asked}, budget_s)


@given(st.lists(COST, min_size=4, max_size=4), st.floats(0, 1e5), st.floats(1, 10))
def test_what_is_said_to_fit_fits_and_more_time_never_plans_less(costs, budget_s, factor):
    table = dict(zip(CELLS, costs, strict=True))
    rungs = [(round(share * 1000), [0, 1, 2][:n]) for share, n in LADDER]
    plan, more = planned(table, budget_s), planned(table, budget_s * factor)
    place, further = (rungs.index((p["max_steps"], p["seeds"])) for p in (plan, more))
    assert plan["fits"] == (plan["estimated_s"] <= budget_s) and further >= place
    assert plan["estimated_s"] == pytest.approx(len(plan["seeds"]) * sum(c.seconds(plan["max_steps"]) for c in costs))
    if plan["fits"] and place + 1 < len(rungs):
        steps, seeds = rungs[-1]
        assert planned(table, 0, max_steps=steps, seeds=seeds)["estimated_s"] > budget_s
    assert plan["fits"] or place == 0


def test_the_plan_of_too_little_time_of_unknown_costs_and_of_what_was_given():
    flat = dict.fromkeys(CELLS, Cost(0.0, 1.0))
    least = planned(flat, 10)
    assert (least["max_steps"], least["seeds"], least["fits"]) == (30, [0], False) and "not even this much" in least["why"]
    unknown = planned({CELLS[0]: Cost(0.0, 1.0)}, 1e9)
    assert unknown["estimated_s"] is None and not unknown["fits"] and unknown["max_steps"] == 30
    asked = planned(flat, 10, max_steps=7, seeds=[5, 6])
    assert (asked["max_steps"], asked["seeds"], asked["estimated_s"]) == (7, [5, 6], 56.0)
    whole = planned(flat, 1e9)
    assert (whole["max_steps"], whole["seeds"], whole["fits"]) == (1000, [0, 1, 2], True)
    plans = [planned(dict.fromkeys(CELLS, Cost(0.0, 0.01)), budget) for budget in range(1, 200)]
    assert {tuple(p["seeds"]) for p in plans if p["max_steps"] < 100} == {(0,)}, "a second seed comes after steps for all"


def test_the_order_has_both_losses_of_both_architectures_first():
    assert len({(CASES[name].architecture.id, CASES[name].task.loss) for name in CASE_ORDER[:4]}) == 4
    assert CASE_ORDER[4] == "gpt2_clm@512" and PRESETS["full"].sequence_length("gpt2_clm") != 512
    assert PRESETS["full"].sequence_length("roberta_mlm") == 512


@pytest.mark.parametrize("label", ["gpt2_clm@", "gpt2_clm@x", "gpt2_clm@0", "gpt2_clm@-4"])
def test_a_length_that_is_none_is_refused(label):
    with pytest.raises(SettingsError, match="after @ a number of tokens"):
        case_and_length(label)


def test_one_configuration_of_each_kind_is_calibrated():
    assert sorted(representatives(SEVEN)) == ["amp_bf16", "fp16_naive", "fp32_true"]
    assert sorted(representatives(["amp_fp16", "bf16_pure"])) == ["amp_fp16", "bf16_pure"]
    assert {kind(config) for config in DTYPE_CONFIGS} == {"fp32", "autocast", "pure"}


def row(config, status="completed", total_s=10.0, step_s=0.5, steps=8, seq_len=512):
    names = {"arch": "gpt2", "task": "clm", "loss": "softmax_ce", "loss_reduction": "mean", "preset": "full", "device": "x"}
    sizes = {"max_steps": 8, "batch_size": 32, "micro_batch": 16, "seq_len": seq_len, "steps_done": steps}
    sources = {"data_source": "embedded", "weights_source": "scratch", "step_time_p50_s": step_s}
    where = {"run_id": f"gpt2_clm-{config}-s0-00000000", "case": "gpt2_clm", "scenario": "A", "dtype_config": config, "seed": 0}
    diverged = 1 if status == "diverged" else None
    flags = {"timings_s": {"total": total_s, "steps": 6.0}}
    return RunRecord(**names, **sizes, **sources, **where, status=status, divergence_step=diverged, flags=flags)


def test_a_rows_total_without_its_steps_is_what_every_run_costs_and_a_death_brings_its_controls():
    assert Cost.of_row(row("fp32_true")) == Cost(4.0 + 10 - 8 * 0.5, 0.5)
    died = Cost.of_row(row("fp16_naive", "diverged", step_s=None, steps=4))
    assert (died.runs, died.step_s) == (3, 1.5) and died.seconds(100) == pytest.approx(3 * (died.fixed_s + 150))
    assert Cost.of_row(row("fp32_true", "oom")) is None
    assert Cost.of_row(row("amp_bf16_8bit", "unsupported", step_s=None)).seconds(1000) == 1.0
    rows = [row("fp32_true"), row("amp_bf16", seq_len=64)]
    assert set(calibrated(rows, ["gpt2_clm", "gpt2_clm@512"])) == {("gpt2_clm@512", "fp32_true"), ("gpt2_clm", "amp_bf16")}


def test_what_was_not_calibrated_costs_what_the_dearest_most_like_it_does():
    known = {
        ("a", "fp32_true"): Cost(4, 1.0),
        ("a", "amp_bf16"): Cost(4, 0.2),
        ("a", "fp16_naive"): Cost(4, 0.1, runs=3),
        ("b", "fp32_true"): Cost(4, 2.0),
        ("b", "amp_bf16"): Cost(1, 0.0),
    }
    found = costs_of_all(known, ["a", "b", "c"], SEVEN)
    assert found.items() >= known.items() and len(found) == 3 * 7
    assert found["a", "amp_fp16"].step_s == 0.2 and found["a", "bf16_pure"] == Cost(4, 0.1)
    assert found["b", "amp_fp16"].step_s == 2.0, (
        "its own case before its own kind, and what is unsupported stands in for nothing"
    )
    assert found["c", "fp32_true"].step_s == 2.0 and found["c", "fp16_naive"].runs == 3
    assert costs_of_all({}, ["a"], SEVEN) == {}


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
    def groups(total_s, **asked):
        machine = {**MACHINE, "labels": ["gpt2_clm", "roberta_mlm", "gpt2_clm@512"]}
        plan = {"max_steps": 5, "seeds": [0]}
        before = stages_of({**NOTHING, **asked}, machine, tmp_path, total_s)
        everything = stages_of({**NOTHING, **asked}, machine, tmp_path, total_s, plan)
        assert everything[: len(before)] == before and len({s.name for s in everything}) == len(everything)
        return before, list(dict.fromkeys(s.group for s in everything))

    before, everything = groups(1800)
    assert everything == ["doctor", "check", "bench", "overhead", "calibrate", "run", "overflow", "fit"] == list(GROUPS)
    assert before[-1].name == "calibrate@512" and before[-1].command[before[-1].command.index("--seq-len") + 1] == "512"
    assert groups(240)[1] == ["doctor", "check", "calibrate", "run", "overflow", "bench", "overhead", "fit"]
    assert groups(240, skip=["doctor", "check", "bench", "overhead", "overflow", "fit"])[1] == ["calibrate", "run"]
    assert set(OPS) == {*MODULES, *NOT_TIMED} == set(CHECKED)
    assert sum(share for name, (share, _, _) in GROUPS.items() if name != "run") < 1


def test_the_runs_rotate_and_the_first_case_is_alone(tmp_path):
    labels = ["gpt2_multi_cls", "gpt2_clm", "roberta_mlm", "gpt2_clm@512", "gpt2_single_cls"]
    machine = {**MACHINE, "labels": labels, "configs": ["fp32_true", "amp_bf16"]}
    plan = {"max_steps": 5, "seeds": [0, 1]}
    found = [s for s in stages_of({**NOTHING, "data": "embedded"}, machine, tmp_path, 60, plan) if s.group == "run"]
    seed_0 = ["run-gpt2_multi_cls-s0", "run-gpt2_clm-s0", "run-gpt2_clm@512-s0", "run-gpt2_single_cls-s0"]
    assert [s.name for s in found] == [*seed_0, "run-gpt2_multi_cls-s1", "run-gpt2_clm@512-s1", "run-gpt2_single_cls-s1"]
    second = found[1].command
    assert second[second.index("--cases") + 1 : second.index("--configs")] == ("gpt2_clm", "roberta_mlm")
    assert second[second.index("--configs") + 1] == "amp_bf16" and second[second.index("--max-steps") + 1] == "5"
    assert "--data" in second and "--seq-len" not in second


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
    ended = run_process(["stage_of_a_test"], files, {"limit": limit_s}, grace_s, stop or Stop(), pids.append)
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
        "import sys; from pathlib import Path; from harness.campaign import stages; from harness.run.signals import Stop\n"
        "stages.run_process(['stage_of_a_test'], [Path(sys.argv[1]) / n for n in 'xy'], {'limit': 600}, 1, Stop(), "
        "lambda pid: print(pid, flush=True))"
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
    path.write_text(json.dumps({"asked": {**NOTHING, "data": "embedded"}}))
    with pytest.raises(SettingsError, match=r"--data is DIR, and the campaign in .* was begun with embedded; leave it out"):
        begun(path, {**NOTHING, "data": "DIR"})
    with pytest.raises(SettingsError, match=r"--max-steps is 7, .* begun with the default"):
        begun(path, {**NOTHING, "max_steps": 7})
    changed = begun(path, {**NOTHING, "price_per_hour": 2.5, "skip": ["fit"]})["asked"]
    assert changed["price_per_hour"] == 2.5 and changed["skip"] == ["fit"] and changed["data"] == "embedded"
    path.write_text('{"torn')
    with pytest.raises(OutputError, match="is no campaign's file"):
        begun(path, NOTHING)


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """``campaign(*options)`` on a machine that was found out already; stages take no time: ``campaign.ends`` says how each
    ends, by the beginning of its name, and ``campaign.ran`` which ran."""
    machine = {**MACHINE, "labels": ["gpt2_clm"], "configs": ["fp32_true"]}
    monkeypatch.setattr(command, "find_machine", lambda asked, estimates: machine)

    def call(*more):
        return cli.main(["campaign", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), *more])

    def run(words, files, limits_s, grace_s, stop, started):
        files[1].parent.mkdir(parents=True, exist_ok=True)
        files[1].write_text(f"last line of {files[1].stem}\n")
        call.ran.append(files[1].stem)
        call.times[files[1].stem] = limits_s, grace_s
        started(4_000_000)
        return next((end for name, end in call.ends.items() if files[1].stem.startswith(name)), (0, None))

    monkeypatch.setattr(stages, "run_process", run)
    call.ran, call.ends, call.times = [], {}, {}
    call.state = lambda: json.loads((tmp_path / "results" / "campaign.json").read_text())
    return call


def test_a_stage_that_fails_costs_only_itself(campaign, capsys):
    campaign.ends = {"check": (-11, None), "overhead": (0, "limit")}
    assert campaign("--ops", "unscale", "--skip", "fit") == 3
    assert campaign.ran == ["doctor", "check", "bench", "overhead", "calibrate", "run-gpt2_clm-s0"]
    found = campaign.state()["stages"]
    assert found["check"]["state"] == "failed" and "signal 11: last line of check" in found["check"]["note"]
    assert found["overhead"]["state"] == "cut" and found["bench"]["state"] == "done"
    assert "failed: check" in capsys.readouterr().err
    campaign.ran.clear()
    assert campaign() == 3 and campaign.ran == [], "what is settled is not run again"
    assert campaign("--retry-failed") == 3 and campaign.ran == ["check"]


def test_a_call_without_minutes_leaves_everything_to_the_next_and_the_plan_is_made_once(campaign, capsys):
    campaign.ends = {"run-": (75, "the call's end")}
    assert campaign("--minutes", "0.05", "--total-minutes", "30") == 75 and campaign.ran == []
    assert "left to do: doctor" in capsys.readouterr().err
    assert campaign("--minutes", "10") == 75, "the runs were stopped by the end of the call"
    state = campaign.state()
    assert state["total_minutes"] == 30 and state["stages"]["run-gpt2_clm-s0"]["state"] == "pending"
    campaign.ends = {}
    assert campaign("--minutes", "10") == 0
    assert campaign.state()["plan"] == state["plan"] and [call["end"] for call in campaign.state()["calls"]][-1] == "done"


def test_a_small_call_keeps_time_free_for_a_dossier_only_where_there_can_be_one(campaign):
    assert campaign("--minutes", "2", "--ops", "unscale", "--skip", "fit", "bench") == 0
    for name, dossier_s in (("doctor", 0.0), ("calibrate", 0.0), ("run-gpt2_clm-s0", command.DOSSIER_S["cpu"])):
        limits_s, grace_s = campaign.times[name]
        assert 100 < limits_s["the call's end"] + grace_s + dossier_s <= 120, name


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
    monkeypatch.setattr(command, "finished_runs", lambda out: rows if "calibration" not in str(out) else [])
    monkeypatch.setattr(command, "pack", lambda results, out: "")
    monkeypatch.setattr(stages, "run_process", run)
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
