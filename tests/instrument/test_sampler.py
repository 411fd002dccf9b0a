"""The sampler survives every failure of NVML and of the host, drops late answers, and writes what it read."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pynvml
import pytest

from instrument.results.lines import read
from instrument.results.measurements import HardwareRecord
from instrument.sampler import gpu
from instrument.sampler.gpu import FIELDS, GpuSensors, Patience, company_of
from instrument.sampler.sampler import HostSensors, Rapl, Sampler

CALLS = (
    "nvmlInit",
    "nvmlShutdown",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
)
OPENING = ("nvmlInit", "nvmlDeviceGetHandleByUUID")
CODES = sorted(value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_"))
ALL_FIELDS = {field for fields in FIELDS.values() for field in fields}


class FakeNvml:
    """A GPU at 200 W since the library was made. ``fail`` maps a call to an exception, ``hang`` holds calls
    that never answer, ``odd`` calls that answer None."""

    def __init__(self, fail=None, hang=(), odd=()):
        self.fail, self.hang, self.odd = fail or {}, hang, odd
        self.began_s = time.monotonic()
        self.asked = []

    def __getattr__(self, name):
        if name not in CALLS:
            raise AttributeError(name)

        def call(*_):
            self.asked.append(name)
            if name in self.hang:
                threading.Event().wait()
            if name in self.fail:
                raise self.fail[name]
            return None if name in self.odd else self.answer(name)

        return call

    def answer(self, name):
        return {
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetTotalEnergyConsumption": int(200e3 * (time.monotonic() - self.began_s)),
            "nvmlDeviceGetPowerUsage": 200_000,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=60, used=40),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=90, memory=30),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetClockInfo": 1_980,
            "nvmlDeviceGetCurrentClocksEventReasons": 4,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 4,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7, usedGpuMemory=30)],
            "nvmlDeviceGetGraphicsRunningProcesses": [],
        }.get(name)


@pytest.fixture
def nvml(monkeypatch):
    def install(**how):
        library = FakeNvml(**how)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        return library

    return install


def test_every_error_code_at_every_call_is_a_null_and_a_reason(nvml):
    assert len(CODES) > 25
    for call in CALLS:
        for code in CODES:
            nvml(fail={call: pynvml.NVMLError(code)})
            sensors = GpuSensors("a", patience=Patience(wait_s=20.0, limit_s=60.0))  # no test of patience
            for _ in range(2):
                found, unknown = sensors.read()
                assert set(found) | set(unknown) == ALL_FIELDS and not set(found) & set(unknown), (call, code)
                assert all(unknown.values()), (call, code)
            sensors.company()
            sensors.close()
            if call in OPENING:
                assert not found
            else:
                assert "gpu_is_mig" in found
                failed = next((fields for name, fields in FIELDS.items() if name == call), ())
                # the clock events have two names, so one of them may fail unnoticed
                assert set(unknown) == (set() if "Clocks" in call else set(failed)), (call, code)


@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("nvmlInit", "nvmlShutdown")])
def test_an_answer_that_makes_no_sense_is_a_null_and_a_reason(nvml, call):
    nvml(odd=(call,))
    sensors = GpuSensors("a")
    found, unknown = sensors.read()
    assert set(found) | set(unknown) == ALL_FIELDS
    sensors.company()
    sensors.close()


@pytest.fixture
def clock_s(monkeypatch):
    """The clock of `Patience`, which stands still: how long a busy machine takes to answer is not tested."""
    now_s = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now_s[0], thread_time=time.thread_time))
    return now_s


def wait_until(condition):
    until_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_hangs_costs_one_wait_and_is_not_asked_again(nvml, call, clock_s):
    library = nvml(hang=(call,))
    sensors = GpuSensors("a", patience=Patience(wait_s=60.0, limit_s=70.0))
    is_asked = call in FIELDS or call in OPENING  # the others are not asked by `read`
    if is_asked:
        sensors.patience.wait_s = 0.01
        while sensors.read()[0] or library.asked.count(call) == 0:  # opened, then stuck
            time.sleep(0.002)
        sensors.patience.wait_s = 60.0
        clock_s[0] += 71.0
    began_s = time.monotonic()
    for _ in range(20):
        found, unknown = sensors.read()
    assert time.monotonic() - began_s < 50
    assert library.asked.count(call) == is_asked  # and the other calls still answer
    if call in OPENING:
        assert not found and "not asked again" in unknown["gpu_power_w"]
    elif call in FIELDS:
        assert set(unknown) == set(FIELDS[call]) and "not asked again" in unknown[FIELDS[call][0]]
    else:
        assert not unknown


def test_a_mark_during_a_look_is_followed_by_another(tmp_path, monkeypatch):
    looking = threading.Event()
    look = HostSensors.read

    def slowly(self):
        looking.set()
        time.sleep(0.05)
        return look(self)

    monkeypatch.setattr(HostSensors, "read", slowly)
    sampler = Sampler(tmp_path / "hardware.jsonl", period_s=10).start()
    sampler.mark("timed", "begin")
    time.sleep(0.2)
    looking.clear()
    sampler.mark("other", "begin")
    assert looking.wait(60)
    sampler.mark("timed", "end")  # while the sampler is busy, and then it is stopped
    assert sampler.stop(window="timed")["window_s"] > 0.1
    records = list(read(tmp_path / "hardware.jsonl", HardwareRecord))
    assert records[-1].time_s >= max(mark.time_s for record in records for mark in record.marks)


@pytest.mark.process
def test_a_process_that_never_stops_its_sampler_ends_at_once(tmp_path):
    code = f"""
from pathlib import Path
from instrument.sampler.sampler import Sampler
Sampler(Path({str(tmp_path)!r}) / "hardware.jsonl", period_s=0.01).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.process
def test_a_process_with_hung_nvml_ends_at_once(tmp_path):
    """No join, no atexit handler waits for the stuck thread."""
    code = f"""
import sys, time, threading, types
sys.modules["pynvml"] = types.SimpleNamespace(nvmlInit=lambda: threading.Event().wait())
from pathlib import Path
from instrument.sampler.sampler import Sampler
sampler = Sampler(Path({str(tmp_path)!r}) / "hardware.jsonl", gpu_uuid="a").start()
time.sleep(0.1)
began = time.monotonic()
summary = sampler.stop()
print(time.monotonic() - began, summary["unknown"]["gpu_power_w"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 20 and "opening NVML" in done.stdout and not done.stderr


def test_records_and_marks_are_written_and_summed_up(tmp_path, nvml):
    nvml()
    sampler = Sampler(tmp_path / "hardware.jsonl", gpu_uuid="GPU-a", period_s=0.02).start()
    path, looks = tmp_path / "hardware.jsonl", lambda: path.read_bytes().count(b"\n") if path.exists() else 0
    wait_until(lambda: looks() > 0)
    began_s = time.monotonic()
    sampler.mark("timed", "begin")
    time.sleep(0.15)
    wait_until(lambda: looks() > 5)
    sampler.mark("timed", "end")
    lasted_s = time.monotonic() - began_s
    summary = sampler.stop(window="timed", timeout_s=60.0)
    records = list(read(tmp_path / "hardware.jsonl", HardwareRecord))
    times = [record.time_s for record in records]
    assert times == sorted(times) and len(records) >= 6
    assert all(abs((r.unix_s - r.time_s) - (records[0].unix_s - records[0].time_s)) < 0.5 for r in records)
    assert [mark.edge for record in records for mark in record.marks] == ["begin", "end"]
    assert records[-1].time_s >= max(mark.time_s for record in records for mark in record.marks)
    assert records[-1].gpu_power_w == 200 and records[-1].process_rss_bytes > 1e6
    assert summary["window_s"] == pytest.approx(lasted_s, abs=0.1)
    assert summary["energy_j"] is None and "is not stated" in summary["why"]  # a window this short
    assert summary["peak_device_bytes"] == 40 and summary["gpu_power_mean_w"] == 200
    assert summary["contended"] is None and "another namespace" in summary["company"]["end"]["why"]
    assert summary["throttled"] is False and summary["clock_event_reasons"] == {"sw_power_cap": 1.0}
    assert summary["sampler_failure"] is None and 0 < summary["sampler_cpu_s_per_sample"] < 0.05
    json.dumps(summary, allow_nan=False)


def test_marks_at_every_step_do_not_make_the_sampler_busy(tmp_path):
    sampler = Sampler(tmp_path / "hardware.jsonl").start()
    began_s, marks = time.monotonic(), 0
    while time.monotonic() < began_s + 0.45 or marks <= 50:
        sampler.mark("step", "begin")
        sampler.mark("step", "end")
        marks += 2
        time.sleep(0.002)
    lasted_s = time.monotonic() - began_s
    assert sampler.stop()["samples"] <= 4 + lasted_s / 0.1  # one for 0.1 s, and the first, the last, the regular
    assert sum(len(record.marks) for record in read(tmp_path / "hardware.jsonl", HardwareRecord)) == marks > 50


def test_a_reason_is_written_once(tmp_path, nvml):
    nvml(fail={"nvmlDeviceGetPowerUsage": pynvml.NVMLError(3)})
    sampler = Sampler(tmp_path / "hardware.jsonl", gpu_uuid="a", period_s=0.01).start()
    wait_until(lambda: sampler.path.exists() and sampler.path.read_bytes().count(b"\n") > 2)
    sampler.stop()
    reasons = [
        record.unknown["gpu_power_w"]
        for record in read(tmp_path / "hardware.jsonl", HardwareRecord)
        if "gpu_power_w" in record.unknown
    ]
    assert len(reasons) == 1 and reasons[0].startswith("NVML:")


def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    sampler = Sampler(tmp_path / "runs" / "hardware.jsonl").start()
    sampler.mark("timed", "begin")
    summary = sampler.stop(window="timed")
    assert summary["contended"] is None
    assert summary["samples"] == 0 and summary["sampler_failure"] and summary["why"] == "the sampler wrote no record"


def test_an_earlier_runs_looks_are_not_summed_up(tmp_path):
    path = tmp_path / "hardware.jsonl"
    sampler = Sampler(path, period_s=0.01).start()
    time.sleep(0.05)
    sampler.stop()
    assert Sampler(path).start().stop()["samples"] <= 3


def test_other_processes_are_claimed_no_further_than_the_listing_goes():
    mine, other, unsized = ({"pid": pid, "used_bytes": used} for pid, used in ((5, 10), (6, 20), (7, None)))
    assert company_of([mine, other], 5) == {"others": 1, "others_bytes": 20, "why": None}
    assert company_of([mine], 5)["others"] == 0
    assert company_of([mine, unsized], 5)["others_bytes"] is None
    assert company_of([other, unsized], 5)["others"] == 1  # one of them may be this process
    assert company_of([other], 5)["others"] is None and company_of([], 5)["others"] is None


@pytest.mark.process
def test_records_can_be_read_without_torch():
    code = "import sys, instrument.results.measurements, instrument.sampler.summary; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rapl_counts_packages_and_survives_the_wrap(tmp_path):
    for zone, name, energy in (
        ("intel-rapl:0", "package-0", 900),
        ("intel-rapl:1", "package-1", 0),
        ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:2", "psys", 7),
    ):
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("999\n")
    rapl = Rapl(tmp_path)
    assert rapl.read() == {"cpu_energy_counter_j": 0.0}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")  # 100 to the top, one to 0, 100 more
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("30\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("500\n")
    assert rapl.read()["cpu_energy_counter_j"] == pytest.approx(230e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(OSError, match="energy_uj of intel-rapl:1"):
        rapl.read()
    with pytest.raises(OSError, match="no RAPL"):
        Rapl(tmp_path / "nowhere").read()


def test_shares_of_the_processor_are_of_what_it_did(tmp_path):
    host, outer = HostSensors(tmp_path), (time.monotonic(), time.process_time())
    found, unknown = host.read()
    assert "process_cpu_percent" in unknown and "process_cpu_percent" not in found
    inner = (time.monotonic(), time.process_time())
    while time.monotonic() < inner[0] + 0.3:
        pass
    inner_s, inner_busy_s = time.monotonic() - inner[0], time.process_time() - inner[1]
    found, unknown = host.read()
    outer_s, outer_busy_s = time.monotonic() - outer[0], time.process_time() - outer[1]
    assert 99 * inner_busy_s / outer_s <= found["process_cpu_percent"] <= 101 * outer_busy_s / inner_s
    assert 0 <= found["system_cpu_percent"] <= 100
    assert "less than 0.1 s" in host.read()[1]["process_cpu_percent"]


def test_a_call_that_answers_late_is_dropped_and_its_late_answer_is_not_used(clock_s):
    patience, round_1 = Patience(wait_s=0.05, limit_s=1.0), threading.Event()
    release = threading.Event()
    slow = {"slow": lambda: (round_1.set(), release.wait()) and "old", "quick": lambda: "now"}
    assert patience.ask(slow)[0] == {} and round_1.wait(60)
    clock_s[0] += 1.5
    release.set()
    patience.wait_s = 60.0
    wait_until(lambda: patience.given_up)
    answers, reasons = patience.ask(slow)
    assert answers == {"quick": "now"} and "not asked again" in reasons["slow"]


def test_a_thread_that_was_replaced_asks_nothing_more(clock_s):
    patience = Patience(wait_s=0.05, limit_s=1.0)
    stuck, release, asked = threading.Event(), threading.Event(), []
    questions = {"stuck": lambda: (stuck.set(), release.wait()), "next": lambda: asked.append(threading.current_thread())}
    patience.ask(questions)
    assert stuck.wait(60)
    replaced = patience._thread
    clock_s[0] += 1.5
    patience.wait_s = 60.0
    patience.ask(questions)  # gives up, on a new thread
    release.set()
    replaced.join(60)
    assert len(asked) == 1 and asked != [replaced] and not replaced.is_alive()
