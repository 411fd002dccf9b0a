"""The dry run: what it resolves, what it counts, and that it leaves no trace."""

import json

import pytest
import torch

from harness import estimate as estimate_memory
from harness import fake_model as estimate_time
from harness.estimate import estimate, print_estimate
from harness.fake_model import data_facts, trace
from harness.precision import Precision
from harness.run.execute import execute, load_run_data, model_request
from instrument.flops import ProductDtypes, StepFlops


def traced(settings):
    precision = Precision(settings.config, torch.device("cpu"), threads=1)
    try:
        return trace(settings, data_facts(settings), precision)
    finally:
        precision.close()


def test_the_resolved_run_is_spelled_out_and_nothing_is_written(plan, tmp_path, capsys):
    settings = plan("gpt2_multi_cls", "amp_fp16", max_steps=7)
    print_estimate(settings, tmp_path / "out", as_json=True)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["run_id"] == settings.run_id and found["tokens_per_step"] == 4 * 32 and found["max_steps"] == 7
    assert found["configuration"]["autocast"] == "fp16" and found["configuration"]["scaler"] is True
    assert found["model"]["padded_vocabulary"] % 128 == 0 and found["model"]["shape_source"] == "from the data"
    assert found["already_done"] is None and found["unsupported"] is None
    assert "estimate" in printed.err and settings.run_id in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["gpt2_clm", "roberta_mlm", "gpt2_multi_cls", "roberta_single_cls"])
def test_the_traced_model_is_the_model_that_runs(plan, case):
    from bench_cases.models import build_model

    settings = plan(case, "fp32_true")
    model = build_model(model_request(settings, load_run_data(settings)))
    assert traced(settings).n_params == sum(p.numel() for p in model.parameters())


def test_flops_are_those_of_the_flops_command(plan, tmp_path):
    from harness.commands.flops import count

    settings = plan("gpt2_clm", "fp32_true")
    counted = count(settings.case, settings.config, settings)["flops_per_step"]
    assert estimate(settings, tmp_path)["time"]["flops_per_step"] == counted


def test_kept_bytes_follow_the_dtype(plan):
    settings = plan("gpt2_clm", "fp32_true")
    wide, narrow = traced(settings), traced(plan("gpt2_clm", "bf16_pure"))
    assert wide.n_params == narrow.n_params
    assert 0.4 < narrow.activation_bytes / wide.activation_bytes < 0.75
    logits = settings.micro_batch * settings.seq_len * data_facts(settings).as_row()["padded_vocabulary"]
    assert wide.logit_bytes >= 2 * 4 * logits and narrow.logit_bytes >= 2 * 2 * logits  # and their gradient


def test_memory_parts_are_in_the_configurations_own_dtypes(plan):
    parts = {}
    for config in ("fp32_true", "bf16_pure", "amp_bf16_8bit", "fp16_naive_fp32_states"):
        settings = plan("gpt2_clm", config)
        found = traced(settings)
        parts[config] = estimate_memory.memory(settings, found)["parts_bytes"]
    n = found.n_params
    assert (parts["fp32_true"]["weights"], parts["fp32_true"]["optimizer_states"]) == (4 * n, 8 * n)
    assert (parts["bf16_pure"]["weights"], parts["bf16_pure"]["optimizer_states"]) == (2 * n, 4 * n)
    assert parts["fp16_naive_fp32_states"]["optimizer_states"] == 8 * n
    assert 2 * n < parts["amp_bf16_8bit"]["optimizer_states"] < 2.3 * n


def test_8_bit_states_are_what_bitsandbytes_allocates(plan, tmp_path):
    settings = plan("gpt2_clm", "amp_bf16_8bit", max_steps=1)
    counts = execute(settings, tmp_path).flags["optimizer_states"]
    found = traced(settings)
    small = sum(n for n, _ in found.parameters if n < estimate_memory.EIGHT_BIT_FROM)
    assert counts == {"uint8": 2 * (found.n_params - small), "float32": 2 * small}


def test_a_run_that_is_done_is_said_to_be(plan, tmp_path):
    settings = plan("gpt2_single_cls", "fp32_true", max_steps=1)
    execute(settings, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert estimate(settings, tmp_path)["already_done"] == {"status": "completed", "steps_done": 1}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_the_device_cannot_run_is_unsupported_with_the_reason(plan, tmp_path, capsys):
    found = estimate(plan("gpt2_clm", "fp32_tf32"), tmp_path)
    assert "TF32" in found["unsupported"] and found["memory"] is None and found["time"] is None
    print_estimate(plan("gpt2_clm", "fp32_tf32"), tmp_path, as_json=False)
    assert "unsupported" in capsys.readouterr().err


def test_a_model_that_cannot_be_traced_still_has_its_run_resolved(plan, tmp_path, monkeypatch, capsys):
    def trace(*_):
        raise RuntimeError("asks for a value\nand more")

    monkeypatch.setattr("harness.fake_model.trace", trace)
    print_estimate(plan("gpt2_clm", "fp32_true"), tmp_path, as_json=True)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["not_estimated"] == "RuntimeError: asks for a value" and found["memory"] is None
    assert found["run_id"] and "not estimated" in printed.err


def test_time_adds_steps_and_evaluations(plan, monkeypatch):
    settings = plan("gpt2_clm", "fp32_true", max_steps=10, eval_every=3)
    found = traced(settings)
    monkeypatch.setattr(estimate_time, "cpu_product_rate", lambda _: 1e9)
    monkeypatch.setattr(estimate_time, "cpu_tanh_s", lambda: 0.0)
    flops = StepFlops(lambda length: (2_000_000 * length, 0, 0), ProductDtypes("fp32", "fp32", "fp32"), True, "planted")
    time = estimate_time.duration(settings, found, flops)
    assert time["flops_per_step"] == settings.batch_size * settings.seq_len * 2_000_000
    assert time["step_s"] == pytest.approx(time["flops_per_step"] / 1e9)
    assert estimate_time.evaluations(settings) == 5
    forwards = 5 * -(-settings.validation_documents // settings.micro_batch)
    one_forward_s = time["step_s"] / (settings.batch_size // settings.micro_batch) / 3
    assert time["evaluation_s"] == pytest.approx(forwards * one_forward_s)
    assert time["total_s"] == pytest.approx(10 * time["step_s"] + time["evaluation_s"])


def test_an_unknown_gpu_has_no_time_and_a_known_one_states_its_rule():
    rate, rule = estimate_time.gpu_rate({"bf16": 10}, "NVIDIA H200")
    assert rate == pytest.approx(0.4 * 989e12) and "40%" in rule
    rate, rule = estimate_time.gpu_rate({"bf16": 10}, "NVIDIA H999")
    assert rate is None and "none is guessed" in rule
    assert estimate_time.gpu_rate({"bf16": 10}, "Tesla T4")[0] is None  # it has no bf16
    mixed, rule = estimate_time.gpu_rate({"bf16": 989, "fp32": 67}, "NVIDIA H200")
    assert mixed == pytest.approx(0.4 * (989 + 67) / 2 * 1e12) and "bf16 and fp32" in rule


def test_hub_data_are_not_downloaded_and_said_to_be_assumed(plan):
    from dataclasses import replace

    settings = replace(plan("roberta_multi_cls", "fp32_true"), data="hub")
    facts = data_facts(settings)
    assert facts.as_row() == {
        "vocabulary": 50_265,
        "padded_vocabulary": 50_304,
        "outputs": 100,
        "shape_source": "assumed: a dry run downloads nothing",
    }
