"""The campaign's file, its stages as processes, and the pack. No training here."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.campaign import pack as packing
from harness.campaign import stages
from harness.campaign.call import CampaignState, only_call
from harness.campaign.command import ASKED, require_ours
from harness.campaign.plan import Cost, make_plan
from harness.campaign.stages import LEAST_S, SHARES, Stage, StageExit, after_the_runs, before_the_plan, outcome, runs
from harness.options import NOT_TIMED, OPS
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.folder import OutputError
from kernels.bench import MODULES
from kernels.check import MODULES as CHECKED

NOTHING = dict.fromkeys(ASKED)


def python(tmp_path, code, *, limit_s=60.0, call_s=60.0, grace_s=20.0, stop=None, echo=lambda line: None):
    (tmp_path / "stage_of_a_test.py").write_text(code)
    pids = []
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        ended = stages.run_process(
            ["stage_of_a_test"],
            tmp_path / "logs" / "x",
            limit_s=limit_s,
            call_s=call_s,
            grace_s=grace_s,
            stop=stop or Stop(),
            report=lambda pid, s: pids.append(pid),
            echo=echo,
        )
    finally:
        del os.environ["PYTHONPATH"]
    return ended, pids[0]


@pytest.mark.process
def test_a_stage_that_ends_by_itself(tmp_path):
    lines = []
    code = "import sys; print('{}'); print('one\\ntwo', file=sys.stderr); sys.exit(3)"
    ended, _ = python(tmp_path, code, echo=lines.append)
    assert (ended.exit_code, ended.cut, ended.last_line, lines) == (3, None, "two", ["one", "two"])
    assert (tmp_path / "logs" / "x.out").read_text() == "{}\n"


@pytest.mark.process
@pytest.mark.parametrize("limits, why", [({"limit_s": 0.5}, "limit"), ({"call_s": 0.5}, "call")])
def test_a_stage_out_of_time_is_asked_and_given_time(tmp_path, limits, why):
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), "
        "print('saved', file=sys.stderr), sys.exit(75)))\ntime.sleep(600)"
    )
    ended, _ = python(tmp_path, code, **limits)
    assert ended.cut == why and (ended.exit_code, ended.last_line) in ((75, "saved"), (-15, "it said nothing"))


@pytest.mark.process
def test_a_stage_that_does_not_listen_is_killed_with_what_it_started(tmp_path):
    code = (
        "import signal, subprocess, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\nchild.wait()"
    )
    ended, pid = python(tmp_path, code, limit_s=2.0, grace_s=0.3)
    assert ended.exit_code == -signal.SIGKILL
    child = int(ended.last_line)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


@pytest.mark.process
def test_a_signal_to_the_campaign_reaches_the_stage(tmp_path):
    stop = Stop()
    stop.request("SIGTERM")
    ended, _ = python(tmp_path, "import time; time.sleep(600)", stop=stop)
    assert ended.cut == "signal"


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is a signal on Linux only")
def test_a_stage_hears_that_its_campaign_was_killed(tmp_path):
    (tmp_path / "stage_of_a_test.py").write_text(
        "import signal, sys, time\nprint('up', file=sys.stderr, flush=True)\ntry:\n    time.sleep(600)\nfinally:\n    pass"
    )
    parent = (
        "import sys; from pathlib import Path; from harness.campaign import stages; from harness.run.signals import Stop\n"
        "stages.run_process(['stage_of_a_test'], Path(sys.argv[1]) / 'x', limit_s=600, call_s=600, grace_s=1, stop=Stop(), "
        "report=lambda pid, s: print(pid, flush=True))"
    )
    campaign = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.getcwd()))},
    )
    pid = int(campaign.stdout.readline())
    campaign.kill()
    campaign.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


@pytest.mark.process
def test_an_orphan_is_ended_and_another_process_of_that_number_is_left_alone(monkeypatch):
    monkeypatch.setattr(stages, "ROOMS", ("timeit",))
    orphan = subprocess.Popen(
        [sys.executable, "-m", "timeit", "-n", "1", "import time; time.sleep(600)"], start_new_session=True
    )
    time.sleep(0.3)
    assert stages.end_orphan(orphan.pid, 5.0) and not psutil.pid_exists(orphan.pid)
    orphan.wait(20)
    other = subprocess.Popen([sys.executable, "-m", "json.tool"], stdin=subprocess.PIPE, start_new_session=True)
    time.sleep(0.3)
    assert not stages.end_orphan(other.pid, 1.0) and not stages.end_orphan(None, 1.0) and other.poll() is None
    other.kill()
    other.wait()
    assert not stages.end_orphan(other.pid, 1.0)


@pytest.mark.parametrize(
    "exit_code, cut, resumes, state",
    [
        (0, None, False, "done"),
        (0, "call", True, "done"),
        (75, "call", True, "pending"),
        (-15, "call", False, "pending"),
        (-15, "limit", False, "cut"),
        (3, None, True, "done"),
        (3, None, False, "failed"),
        (75, None, True, "pending"),
        (-11, None, True, "failed"),
        (5, None, False, "failed"),
        (130, "signal", False, "pending"),
    ],
)
def test_how_a_stage_is_counted(exit_code, cut, resumes, state):
    stage = Stage("x", "run", ("harness",), resumes=resumes)
    found, note = outcome(stage, StageExit(exit_code, 1.0, cut, "last line"))
    assert found == state and (note is None or state != "done" or "rows" in note)


def test_the_file_is_of_one_campaign(tmp_path):
    state = CampaignState.open(tmp_path, {**NOTHING, "data": "embedded"}, 30.0)
    state.update("doctor", state="done", spent_s=12.5)
    again = CampaignState.open(tmp_path, NOTHING, 99.0)
    assert again.settled("doctor") and again.spent_s == 12.5 and again.total_s == 1800.0
    with pytest.raises(SettingsError, match=r"--data is DIR, and the campaign in .* was begun with embedded; leave it out"):
        CampaignState.open(tmp_path, {**NOTHING, "data": "DIR"}, 30.0)
    with pytest.raises(SettingsError, match=r"--max-steps is 7, .* begun with the default"):
        CampaignState.open(tmp_path, {**NOTHING, "max_steps": 7}, 30.0)
    changed = CampaignState.open(tmp_path, {**NOTHING, "price_per_hour": 2.5, "skip": ["fit"]}, 30.0)
    assert changed.asked["price_per_hour"] == 2.5 and changed.asked["skip"] == ["fit"] and changed.asked["data"] == "embedded"
    (tmp_path / "campaign.json").write_text('{"torn')
    with pytest.raises(OutputError, match="is no campaign's file"):
        CampaignState.open(tmp_path, NOTHING, 30.0)


def test_one_call_at_a_time(tmp_path):
    refused = pytest.raises(OutputError, match=f"another campaign \\(process {os.getpid()}\\)")
    with only_call(tmp_path), refused, only_call(tmp_path):
        pass
    with only_call(tmp_path):
        pass


def test_every_kernel_has_its_place_and_every_group_its_share():
    assert set(OPS) == {*MODULES, *NOT_TIMED} == set(CHECKED)
    assert sum(SHARES.values()) < 1 and set(LEAST_S) == set(SHARES)


def test_the_stages_in_order(tmp_path):
    labels = ["gpt2_multi_cls", "gpt2_clm", "gpt2_clm@512"]
    stages = before_the_plan(NOTHING, tmp_path, labels, ["fp32_true", "fp16_naive"], 1800)
    per_op = [*["check"] * len(OPS), *["bench"] * (len(OPS) - len(NOT_TIMED))]
    assert [s.group for s in stages] == ["doctor", *per_op, "overhead", "calibrate", "calibrate"]
    control = stages[-1].command
    assert stages[-1].name == "calibrate@512" and control[control.index("--seq-len") + 1] == "512"
    skip = {**NOTHING, "skip": ["doctor", "check", "bench", "overhead"]}
    skipped = before_the_plan(skip, tmp_path, ["gpt2_clm"], ["fp32_true"], 9)
    assert [s.name for s in skipped] == ["calibrate"]


def test_in_a_short_campaign_the_matrix_comes_before_the_speeds(tmp_path):
    def groups(total_s):
        given = NOTHING, tmp_path, ["gpt2_clm", "roberta_mlm"], ["fp32_true"], total_s
        return [dict.fromkeys(s.group for s in part(*given)) for part in (before_the_plan, after_the_runs)]

    speeds = ["bench", "overhead"]
    assert list(map(list, groups(1800))) == [["doctor", "check", *speeds, "calibrate"], ["overflow", "fit"]]
    assert list(map(list, groups(240))) == [["doctor", "check", "calibrate"], ["overflow", *speeds, "fit"]]


def test_the_runs_rotate_and_the_first_block_is_alone(tmp_path):
    labels = ["gpt2_multi_cls", "gpt2_clm", "roberta_mlm", "gpt2_clm@512", "gpt2_single_cls"]
    configs = ["fp32_true", "amp_bf16"]
    costs = {(label, config): Cost(1, 0.1, "measured") for label in labels for config in configs}
    plan = make_plan(costs, labels, configs, budget_s=1e9, preset_steps=10, preset_seeds=(0, 1), max_steps=5, seeds=[0, 1])
    found = runs({**NOTHING, "data": "embedded"}, tmp_path, plan)
    assert [s.name for s in found] == [
        "run-gpt2_multi_cls-s0",
        "run-gpt2_clm-s0",
        "run-gpt2_clm@512-s0",
        "run-gpt2_single_cls-s0",
        "run-gpt2_multi_cls-s1",
        "run-gpt2_clm@512-s1",
        "run-gpt2_single_cls-s1",
    ]
    second = found[1].command
    assert second[second.index("--cases") + 1 : second.index("--configs")] == ("gpt2_clm", "roberta_mlm")
    assert second[second.index("--configs") + 1] == "amp_bf16" and second[second.index("--max-steps") + 1] == "5"
    assert "--data" in second and "--seq-len" not in second and len({s.name for s in found}) == len(found)


def results(folder, runs=3, steps=40):
    """A made-up results folder of a campaign."""
    for index in range(runs):
        run_id = f"gpt2_clm-fp16_naive-s{index}-00000000"
        (folder / "runs" / run_id).mkdir(parents=True)
        cause = ("underflow_then_divide", "overflow", None)[index % 3]
        row = {"run_id": run_id, "first_nonfinite": cause and {"cause": cause}}
        (folder / "runs" / run_id / "run.json").write_text(json.dumps(row))
        (folder / "runs" / run_id / "culprit.safetensors").write_bytes(os.urandom(1000))
        (folder / "runs" / run_id / "activations.jsonl").write_bytes(os.urandom(3000).hex().encode() + b"\n")
        (folder / "training_logs").mkdir(exist_ok=True)
        (folder / "training_logs" / f"run_{run_id}.jsonl").write_text('{"step": 1}\n' * steps)
        (folder / "traces").mkdir(exist_ok=True)
        (folder / "traces" / f"{run_id}-step1.json.gz").write_bytes(os.urandom(500 + index))
    for name in ("results.jsonl", "machine.json", "campaign.json", "kernels.json"):
        (folder / name).write_text("{}\n")
    return folder


def test_a_pack_holds_what_is_worth_keeping_and_the_same_bytes_each_time(tmp_path):
    source = results(tmp_path / "results")
    packed = packing.pack(source, tmp_path / "out")
    names = {str(path.relative_to(packed.folder)) for path in packed.folder.rglob("*") if path.is_file()}
    assert "training_logs/run_gpt2_clm-fp16_naive-s0-00000000.jsonl.gz" in names and "campaign.json" in names
    assert [name for name in names if name.startswith("traces/")] == ["traces/gpt2_clm-fp16_naive-s1-00000000-step1.json.gz"]
    assert not any("culprit" in name or name.endswith("activations.jsonl") for name in names)
    log = packed.folder / "training_logs" / "run_gpt2_clm-fp16_naive-s0-00000000.jsonl.gz"
    assert gzip.decompress(log.read_bytes()) == b'{"step": 1}\n' * 40
    assert packed.size_bytes == sum((packed.folder / name).stat().st_size for name in names) and packed.files == len(names)
    first = {name: (packed.folder / name).read_bytes() for name in names}
    packing.pack(source, tmp_path / "out")
    assert {name: (packed.folder / name).read_bytes() for name in names} == first


def test_what_does_not_fit_is_left_out_and_said_and_too_much_is_refused(tmp_path):
    source = results(tmp_path / "results")
    whole = packing.pack(source, tmp_path / "out")
    packed = packing.pack(source, tmp_path / "out", limit_bytes=whole.size_bytes - 1)
    assert packed.size_bytes < whole.size_bytes and packed.left_out[0].startswith("2 files runs/*-s[1-9]*-*/activations")
    assert len(list((tmp_path / "out").glob("runs/*/activations.jsonl.gz"))) == 1, "the lowest seed's stays"
    with pytest.raises(packing.PackTooLarge, match="and 0 MB are allowed; the largest file is"):
        packing.pack(source, tmp_path / "out", limit_bytes=100)
    assert (tmp_path / "out" / "campaign.json").exists(), "a pack that is refused leaves the one before"


def test_a_campaign_resumes_from_its_pack(tmp_path):
    source = results(tmp_path / "results")
    packing.pack(source, tmp_path / "out")
    assert packing.unpack(tmp_path / "out", tmp_path / "elsewhere")
    assert not packing.unpack(tmp_path / "out", tmp_path / "elsewhere")
    packing.pack(tmp_path / "elsewhere", tmp_path / "again")
    assert (tmp_path / "elsewhere" / "training_logs" / "run_gpt2_clm-fp16_naive-s0-00000000.jsonl").is_file()
    tree = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "out", tmp_path / "again")
    ]
    assert tree[0] == tree[1]


def test_the_overflow_that_was_made_on_purpose_is_packed_where_no_run_overflowed(tmp_path):
    source = results(tmp_path / "results", runs=1)
    assert packing.overflow_trace(source).name.startswith("gpt2_clm-fp16_naive-s0"), "a replayed failure at least"
    run_id = "roberta_mlm-amp_fp16_unscaled-s0-00000000"
    folder = source / "campaign" / "overflow"
    (folder / "runs" / run_id).mkdir(parents=True)
    (folder / "runs" / run_id / "run.json").write_text(json.dumps({"first_nonfinite": {"cause": "overflow"}}))
    (folder / "traces").mkdir()
    (folder / "traces" / f"{run_id}-step3.json.gz").write_bytes(b"x" * 9000)
    assert packing.overflow_trace(source).name == f"{run_id}-step3.json.gz"
    assert (packing.pack(source, tmp_path / "out").folder / "traces" / f"{run_id}-step3.json.gz").is_file()


def test_a_link_in_a_results_folder_is_not_packed(tmp_path):
    source = results(tmp_path / "results")
    secret = tmp_path / "secret"
    secret.write_text("a token")
    (source / "machine.json").unlink()
    (source / "machine.json").symlink_to(secret)
    (source / "training_logs" / "run_y.jsonl").symlink_to(secret)
    folder = packing.pack(source, tmp_path / "out").folder
    assert not (folder / "machine.json").exists() and not (folder / "training_logs" / "run_y.jsonl.gz").exists()


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path):
    require_ours(tmp_path / "new")
    require_ours(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds something that no campaign wrote"):
        require_ours(tmp_path)
    (tmp_path / "campaign.json").write_text("{}")
    require_ours(tmp_path)


def test_the_kernels_parts_become_one_file(tmp_path):
    parts = tmp_path / "campaign"
    parts.mkdir()
    for op, wrong in (("a", 0), ("b", 2)):
        (parts / f"check-{op}.json").write_text(json.dumps({"schema": 1, "judged": 3, "not_right": wrong, "rows": [op]}))
    packing.merge_documents(tmp_path, "check", "kernel_check.json")
    packing.merge_documents(tmp_path, "bench", "kernels.json")
    merged = json.loads((tmp_path / "kernel_check.json").read_text())
    assert merged == {"schema": 1, "judged": 6, "not_right": 2, "rows": ["a", "b"]}
    assert not (tmp_path / "kernels.json").exists()
