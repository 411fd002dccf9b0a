"""The doctor's findings as data: on this machine, and on machines that are only pretended."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench_cases import DTYPE_CONFIGS
from harness import doctor as machine_checks
from harness import measured_rates
from harness.commands import doctor
from harness.measured_rates import merge_measured, rates_measured_here
from instrument.nvml import Nvml
from instrument.results.folder import OutputError


@pytest.fixture(scope="module")
def findings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return doctor.examine(None)


class FakeNvml:
    """What pynvml offers, of a machine with one GPU; ``missing`` names calls that fail."""

    def __init__(self, missing=()):
        self.missing = set(missing)

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": b"580.1",
            "nvmlSystemGetCudaDriverVersion_v2": 13000,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=60, used=40),
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=7, usedGpuMemory=30),
                SimpleNamespace(pid=9, usedGpuMemory=None),
            ],
            "nvmlDeviceGetGraphicsRunningProcesses": [],
            "nvmlDeviceGetPowerManagementLimit": 700_000,
            "nvmlDeviceGetMigMode": (0, 0),
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetComputeMode": 3,
        }

        def call(*_):
            if name in self.missing:
                raise OSError("Not Supported")
            return answers[name]

        return call


def pretend_h200(monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=100, uuid="abc"),
    )


def test_a_cpu_machine_is_described_with_reasons(findings):
    assert findings["device"] == "cpu" and findings["why_no_gpu"] and findings["gpus"] == []
    assert findings["products"] == {"fp32": None, "bf16": None, "fp16": None}
    assert set(findings["attention"]) == {"math", "flash"} and findings["attention"]["math"]["fp16_masked"] is None
    assert findings["memory"]["total_bytes"] > findings["memory"]["available_bytes"] > 0
    assert findings["disk"]["free_bytes"] > 0 and findings["cpu"]["usable_cores"] >= 1
    json.dumps(findings, allow_nan=False)


def test_every_configuration_has_a_verdict_and_every_refusal_a_reason(findings):
    rows = {row["config"]: row for row in findings["configurations"]}
    assert list(rows) == list(DTYPE_CONFIGS)
    assert not rows["fp32_tf32"]["supported"] and "TF32" in rows["fp32_tf32"]["reason"]
    assert rows["fp32_true"]["supported"] and rows["fp32_true"]["reason"] is None
    assert any(row["what"] == "configuration fp32_tf32" for row in findings["will_not_work"])
    if not findings["cpu"]["fp16_instructions"]:
        assert "rounded" in rows["fp16_naive"]["remark"]


def test_without_bitsandbytes_the_8_bit_configuration_is_refused(findings):
    rows = machine_checks.configurations(torch.device("cpu"), "8-bit AdamW needs bitsandbytes (gone)")
    refused = {row["config"] for row in rows if not row["supported"]}
    assert refused == {"fp32_tf32", "amp_bf16_8bit"}


def test_a_device_that_cannot_multiply_ends_with_the_environments_code(findings, monkeypatch, capsys):
    broken = findings | {"products": {"fp32": "RuntimeError: no kernel image"}}
    broken["will_not_work"] = doctor.will_not_work(broken)
    monkeypatch.setattr(doctor, "examine", lambda out: broken)
    assert doctor.doctor_command(argparse.Namespace(out=None, json=True, measure=False)) == 5
    printed = capsys.readouterr()
    assert json.loads(printed.out)["products"]["fp32"].startswith("RuntimeError") and "no kernel" in printed.err


def test_products_of_a_broken_device_are_reasons_not_crashes(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("device lost")))
    assert machine_checks.products(torch.device("cpu"))["fp32"] == "RuntimeError: device lost"


def test_a_gpu_is_described_by_name_and_by_nvml(monkeypatch, findings):
    pretend_h200(monkeypatch, FakeNvml())
    with Nvml() as nvml:
        (gpu,) = machine_checks.gpus(nvml)
        driver = nvml.driver()
    assert driver == {"version": "580.1", "cuda": "13.0", "gpu_count": 1, "unknown": {}}
    assert (gpu["card"], gpu["reference_card"], gpu["has_code"]) == ("H200 SXM", False, True)
    assert gpu["supports"] == {"fp16": True, "bf16": True, "tf32": True, "fp8": True}
    assert gpu["nvml"]["processes"] == [{"pid": 7, "used_bytes": 30}, {"pid": 9, "used_bytes": None}]
    assert gpu["nvml"]["power_limit_w"] == 700 and gpu["nvml"]["unknown"] == {}
    whats = [row["what"] for row in doctor.will_not_work(findings | {"gpus": [gpu], "why_no_gpu": None})]
    assert any("two runs at a time" in what for what in whats) and any("fair timing" in what for what in whats)
    assert any("not a reference card" in text for _, text in doctor.gpu_lines(gpu))


def test_an_nvml_call_that_fails_is_null_with_its_reason(monkeypatch):
    pretend_h200(monkeypatch, FakeNvml(missing=["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"]))
    with Nvml() as nvml:
        facts = machine_checks.gpus(nvml)[0]["nvml"]
    assert facts["memory_free_bytes"] is None and facts["processes"] is None and facts["compute_mode"] == "exclusive_process"
    assert facts["unknown"]["processes"] == "NVML: Not Supported"


@pytest.mark.parametrize(
    ("nvml", "reason"), [(FakeNvml(missing=["nvmlInit"]), "NVML: Not Supported"), (None, "nvidia-ml-py is not installed")]
)
def test_without_nvml_everything_is_null_with_the_same_reason(monkeypatch, nvml, reason):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None makes the import fail
    with Nvml() as opened:
        assert opened.unavailable == reason
        assert opened.driver()["version"] is None and set(opened.device("GPU-x")["unknown"].values()) == {reason}


def test_versions_are_compared_with_the_tested_ones(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text(f"# tested\ntorch=={torch.__version__.partition('+')[0]}\nnumpy==0.1\n")
    rows = {row["library"]: row for row in machine_checks.library_versions(file)}
    assert rows["torch"]["note"] is None and rows["numpy"]["note"] == "differs from the tested version"
    assert all(row["tested"] is None for row in machine_checks.library_versions(tmp_path / "absent"))


def test_container_limits_are_read_and_no_limit_is_null(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine_checks.quota_cores(tmp_path / "cpu.max") == 1.5
    assert machine_checks.memory(tmp_path / "memory.max")["limit_bytes"] == 1000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine_checks.quota_cores(tmp_path / "cpu.max") is None and machine_checks.quota_cores(tmp_path / "none") is None


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    facts = machine_checks.disk(tmp_path / "a" / "b")
    assert facts["free_bytes"] > 0 and facts["writable"] and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert not machine_checks.disk(tmp_path / "file")["writable"]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 0), ["compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((8, 9), [], False),
    ],
)
def test_which_cards_a_build_has_code_for(capability, built_for, runs):
    assert machine_checks.has_code_for(capability, built_for) is runs


def test_the_projects_own_constraints_are_found():
    rows = {row["library"]: row for row in machine_checks.library_versions()}
    assert rows["torch"]["tested"] is not None


HERE = {"cpu": "AMD EPYC", "gpu": None, "python": "3.11"}
RATES = {
    "date": "2026-01-01T00:00:00+00:00",
    "matmul": [
        {"dtype": "fp32", "threads": 1, "flops_per_s": 100.0},
        {"dtype": "bf16", "threads": 1, "flops_per_s": 400.0},
        {"dtype": "fp32", "threads": 8, "flops_per_s": 700.0},
    ],
    "copy": [],
}


def test_measured_rates_are_plausible_and_leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setitem(measured_rates.SIZES, "cpu", (64, 128))
    monkeypatch.setitem(measured_rates.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(measured_rates, "BUDGET_S", 0.01)
    before = torch.get_num_threads()
    found = measured_rates.measure(torch.device("cpu"))
    assert torch.get_num_threads() == before and 0 <= found["cpu_busy_before_frac"] <= 1
    assert {(row["dtype"], row["threads"]) for row in found["matmul"]} == {
        (dtype, threads) for dtype in ("fp32", "bf16", "fp16") for threads in {1, before}
    }
    for row in found["matmul"]:
        assert row["samples"] >= measured_rates.AT_LEAST and row["size"] in (64, 128)
        assert 1e6 < row["p10_flops_per_s"] <= row["flops_per_s"] <= row["p90_flops_per_s"] < 1e15
    by_hand = next(row for row in found["copy"] if row["threads"] == 1)
    assert by_hand["block_bytes"] == 1 << 20 and 1e7 < by_hand["bytes_per_s"] < 1e13
    torch.testing.assert_close(torch.full((2, 2), 2.0).half() @ torch.eye(2).half(), torch.full((2, 2), 2.0).half())


def test_fp16_is_measured_as_the_harness_runs_it(monkeypatch):
    monkeypatch.setattr(measured_rates, "BUDGET_S", 0.0)
    monkeypatch.setitem(measured_rates.SIZES, "cpu", (32,))
    for in_hardware, how in ((True, "native"), (False, "fp32, rounded once to fp16")):
        monkeypatch.setattr(measured_rates.fp16_products, "cpu_has_fp16_arithmetic", lambda answer=in_hardware: answer)
        assert measured_rates.matmul_rate(torch.device("cpu"), "fp16", 1)["how"] == how


def test_what_does_not_fit_into_memory_ends_with_the_largest_that_did(monkeypatch):
    def sample(work, device):
        if work().shape[0] > 32:
            raise torch.OutOfMemoryError("full")
        return [0.1] * 10

    monkeypatch.setitem(measured_rates.SIZES, "cpu", (32, 64))
    monkeypatch.setattr(measured_rates, "sample", sample)
    assert measured_rates.matmul_rate(torch.device("cpu"), "fp32", 1)["size"] == 32
    monkeypatch.setitem(measured_rates.SIZES, "cpu", (64,))
    assert measured_rates.matmul_rate(torch.device("cpu"), "fp32", 1) is None


def test_rates_are_the_median_and_the_spread_its_deciles():
    found = measured_rates.rates("flops_per_s", 100.0, [float(s) for s in range(1, 12)])
    assert found == {"flops_per_s": pytest.approx(100 / 6), "p10_flops_per_s": 10.0, "p90_flops_per_s": 50.0, "samples": 11}


def test_measured_rates_join_what_machine_json_holds_and_are_found_again(tmp_path):
    merge_measured(tmp_path, HERE, RATES)
    merge_measured(tmp_path, HERE | {"python": "4"}, RATES | {"date": "later"})
    facts = json.loads((tmp_path / "machine.json").read_text())
    assert facts["python"] == "3.11" and facts["measured"]["date"] == "later"  # older rates go, other facts stay
    assert rates_measured_here(tmp_path, HERE, 1) == ({"fp32": 100.0, "bf16": 400.0}, None)
    assert rates_measured_here(tmp_path, HERE, 8)[0] == {"fp32": 700.0}


def test_rates_measured_beside_other_work_say_that_they_are_too_low(tmp_path):
    merge_measured(tmp_path, HERE, RATES | {"cpu_busy_before_frac": 0.05})
    assert rates_measured_here(tmp_path, HERE, 8) == ({"fp32": 700.0}, None)
    merge_measured(tmp_path, HERE, RATES | {"cpu_busy_before_frac": 0.6})
    rates, remark = rates_measured_here(tmp_path, HERE, 8)
    assert rates == {"fp32": 700.0} and "took 60% of the CPU" in remark and "too low" in remark


def test_rates_that_do_not_hold_here_are_refused_with_the_reason(tmp_path):
    assert "doctor --measure" in rates_measured_here(tmp_path, HERE, 1)[1]
    merge_measured(tmp_path, HERE, RATES)
    assert rates_measured_here(tmp_path, HERE, 4) == (
        None,
        "rates were measured on 1 and 8 CPU threads, and this run uses 4 CPU threads",
    )
    assert "this run uses the GPU" in rates_measured_here(tmp_path, HERE, None)[1]
    other = HERE | {"gpu": "NVIDIA H200"}
    assert "gpu none, and this one has NVIDIA H200" in rates_measured_here(tmp_path, other, None)[1]
    with pytest.raises(OutputError, match="choose another folder"):
        merge_measured(tmp_path, other, RATES)
    (tmp_path / "machine.json").write_text("{")
    assert "not JSON" in rates_measured_here(tmp_path, HERE, 1)[1]
    with pytest.raises(OutputError, match="not JSON"):
        merge_measured(tmp_path, HERE, RATES)


def test_matmul_rates_writes_the_file_and_says_so(findings, monkeypatch, tmp_path, capsys):
    row = {
        "dtype": "fp16",
        "threads": 1,
        "flops_per_s": 1.5e11,
        "p10_flops_per_s": 1.4e11,
        "p90_flops_per_s": 1.6e11,
        "samples": 9,
        "size": 512,
        "how": "fp32, rounded once to fp16",
    }
    copy = {"threads": 1, "bytes_per_s": 3e10, "p10_bytes_per_s": 2e10, "p90_bytes_per_s": 4e10, "samples": 9}
    monkeypatch.setattr(doctor, "examine", lambda out: dict(findings))
    monkeypatch.setattr(doctor, "measure", lambda device: {"cpu_busy_before_frac": 0.5, "matmul": [row], "copy": [copy]})
    assert doctor.doctor_command(argparse.Namespace(out=tmp_path, json=True, measure=True)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["measured"]["matmul"] == [row]
    assert "150.0 GFLOP/s" in printed.err and "30.0 GB/s" in printed.err and "rounded once" in printed.err
    assert "too low" in printed.err
    assert json.loads((tmp_path / "machine.json").read_text())["measured"]["matmul"] == [row]


def test_repetitions_on_a_gpu_are_timed_between_events_and_fill_the_budget(monkeypatch):
    """A clock that only work advances, by 10 ms; no GPU is needed for the arithmetic."""
    clock = {"ms": 0.0, "waits": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock["ms"]

        def elapsed_time(self, after):
            return after.ms - self.ms

    def work():
        clock["ms"] += 10

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.update(waits=clock["waits"] + 1))
    times_s = measured_rates.sample(work, torch.device("cuda"), 0.3)
    assert times_s == pytest.approx([0.01] * 30) and clock["waits"] == 2, "one wait for the first repetition, one for the rest"
    assert len(measured_rates.sample(work, torch.device("cuda"), 0.01)) == measured_rates.AT_LEAST
