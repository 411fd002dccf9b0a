"""The doctor's findings as data: on this machine, and on machines that are only pretended."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench_cases import DTYPE_CONFIGS
from harness import doctor
from harness.doctor import device as doctor_device
from harness.doctor import host as doctor_host
from harness.doctor import terminal as doctor_terminal
from instrument.gpus import CARDS, capability_support, known_card
from instrument.nvml import Nvml


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
        answers = {"nvmlInit": None, "nvmlShutdown": None, "nvmlSystemGetDriverVersion": b"580.1",
                   "nvmlSystemGetCudaDriverVersion_v2": 13000, "nvmlDeviceGetCount": 1,
                   "nvmlDeviceGetHandleByUUID": "handle",
                   "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=60, used=40),
                   "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7, usedGpuMemory=30),
                                                            SimpleNamespace(pid=9, usedGpuMemory=None)],
                   "nvmlDeviceGetGraphicsRunningProcesses": [], "nvmlDeviceGetPowerManagementLimit": 700_000,
                   "nvmlDeviceGetMigMode": (0, 0), "nvmlDeviceGetComputeMode": 3}

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
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=100, uuid="abc"))


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
    rows = doctor_device.configurations(torch.device("cpu"), "8-bit AdamW needs bitsandbytes (gone)")
    refused = {row["config"] for row in rows if not row["supported"]}
    assert refused == {"fp32_tf32", "amp_bf16_8bit"}


def test_a_device_that_cannot_multiply_ends_with_the_environments_code(findings, monkeypatch, capsys):
    broken = findings | {"products": {"fp32": "RuntimeError: no kernel image"}}
    broken["will_not_work"] = doctor.will_not_work(broken)
    monkeypatch.setattr(doctor, "examine", lambda out: broken)
    assert doctor.doctor_command(argparse.Namespace(out=None, json=True)) == 5
    printed = capsys.readouterr()
    assert json.loads(printed.out)["products"]["fp32"].startswith("RuntimeError") and "no kernel" in printed.err


def test_products_of_a_broken_device_are_reasons_not_crashes(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("device lost")))
    assert doctor_device.products(torch.device("cpu"))["fp32"] == "RuntimeError: device lost"


def test_a_gpu_is_described_by_name_and_by_nvml(monkeypatch, findings):
    pretend_h200(monkeypatch, FakeNvml())
    with Nvml() as nvml:
        gpu, = doctor_device.gpus(nvml)
        driver = nvml.driver()
    assert driver == {"version": "580.1", "cuda": "13.0", "gpu_count": 1, "unknown": {}}
    assert (gpu["card"], gpu["reference_card"], gpu["has_code"]) == ("H200 SXM", False, True)
    assert gpu["supports"] == {"fp16": True, "bf16": True, "tf32": True, "fp8": True}
    assert gpu["nvml"]["processes"] == [{"pid": 7, "used_bytes": 30}, {"pid": 9, "used_bytes": None}]
    assert gpu["nvml"]["power_limit_w"] == 700 and gpu["nvml"]["unknown"] == {}
    whats = [row["what"] for row in doctor.will_not_work(findings | {"gpus": [gpu], "why_no_gpu": None})]
    assert any("two runs at a time" in what for what in whats) and any("fair timing" in what for what in whats)
    assert any("not a reference card" in text for _, text in doctor_terminal.gpu_lines(gpu))


def test_an_nvml_call_that_fails_is_null_with_its_reason(monkeypatch):
    pretend_h200(monkeypatch, FakeNvml(missing=["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"]))
    with Nvml() as nvml:
        facts = doctor_device.gpus(nvml)[0]["nvml"]
    assert facts["memory_free_bytes"] is None and facts["processes"] is None and facts["compute_mode"] == "exclusive_process"
    assert facts["unknown"]["processes"] == "NVML: Not Supported"


@pytest.mark.parametrize(("nvml", "reason"), [(FakeNvml(missing=["nvmlInit"]), "NVML: Not Supported"),
                                              (None, "nvidia-ml-py is not installed")])
def test_without_nvml_everything_is_null_with_the_same_reason(monkeypatch, nvml, reason):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None makes the import fail
    with Nvml() as opened:
        assert opened.unavailable == reason
        assert opened.driver()["version"] is None and set(opened.device("GPU-x")["unknown"].values()) == {reason}


def test_versions_are_compared_with_the_tested_ones(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text(f"# tested\ntorch=={torch.__version__.partition('+')[0]}\nnumpy==0.1\n")
    rows = {row["library"]: row for row in doctor_host.library_versions(file)}
    assert rows["torch"]["note"] is None and rows["numpy"]["note"] == "differs from the tested version"
    assert all(row["tested"] is None for row in doctor_host.library_versions(tmp_path / "absent"))


def test_container_limits_are_read_and_no_limit_is_null(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert doctor_host.quota_cores(tmp_path / "cpu.max") == 1.5
    assert doctor_host.memory(tmp_path / "memory.max")["limit_bytes"] == 1000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_host.quota_cores(tmp_path / "cpu.max") is None and doctor_host.quota_cores(tmp_path / "none") is None


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    facts = doctor_host.disk(tmp_path / "a" / "b")
    assert facts["free_bytes"] > 0 and facts["writable"] and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert not doctor_host.disk(tmp_path / "file")["writable"]


@pytest.mark.parametrize(("name", "card"), [
    ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA A40", "A40"), ("NVIDIA H200", "H200 SXM"), ("Tesla T4", "T4"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H200 NVL", None), ("NVIDIA L40", None), ("", None)])
def test_a_card_is_known_by_its_whole_name_only(name, card):
    found = known_card(name)
    assert (found and found.name) == card


def test_reference_cards_and_peaks():
    assert [card.name for card in CARDS if card.reference] == ["RTX A6000", "A40"]
    a6000, v100 = known_card("NVIDIA RTX A6000"), known_card("Tesla V100-SXM2-16GB")
    assert a6000.peak("bf16") == 154.8e12 and a6000.peak("fp32", tf32=True) == 77.4e12 and a6000.peak("fp32") == 38.7e12
    assert v100.peak("bf16") is None and v100.peak("fp16") == 125e12


@pytest.mark.parametrize(("capability", "able"), [((7, 0), {"fp16"}), ((7, 5), {"fp16"}), ((8, 6), {"fp16", "bf16", "tf32"}),
                                                  ((8, 9), {"fp16", "bf16", "tf32", "fp8"}), ((6, 1), set())])
def test_what_a_capability_supports(capability, able):
    assert {name for name, yes in capability_support(*capability).items() if yes} == able


@pytest.mark.parametrize(("capability", "built_for", "runs"), [
    ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_80"], False), ((12, 0), ["compute_90"], True),
    ((9, 0), ["sm_90a"], True), ((10, 0), ["sm_90a", "compute_90a"], False), ((8, 9), [], False)])
def test_which_cards_a_build_has_code_for(capability, built_for, runs):
    assert doctor_device.has_code_for(capability, built_for) is runs


def test_the_projects_own_constraints_are_found():
    rows = {row["library"]: row for row in doctor_host.library_versions()}
    assert rows["torch"]["tested"] is not None
