"""``flops``: every case and preset equal to its closed form, dtypes as autocast gives them, the command, a run's figures."""

import json

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS
from bench_cases.models import ModelRequest, build_model
from bench_cases.own import case_for_model
from harness.cli import main
from harness.commands.flops import count, groups
from harness.fake_model import conversions_left_out, converted, data_facts, shape_only, shapes_of
from harness.loop import LoopOptions, train
from harness.measured_rates import merge_measured
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.run.step_flops import (
    closed_row_flops,
    counted_row_flops,
    meaningful_outputs,
    probe_lengths,
    step_flops,
    utilisation,
)
from harness.settings import Request, resolve
from instrument.environment import capture
from instrument.flop_counter import ModelCounter, Uncountable
from instrument.flops import CLOSED_FORMS
from instrument.watch.meter import StepMeter

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SAMPLE = ("gpt2_clm", "roberta_multi_cls")
"""Of the cases, at the larger presets; `make soak` takes all."""


def sized(case, preset, config="fp32_true", **asked):
    return resolve(
        CASES[case],
        DTYPE_CONFIGS[config],
        0,
        Request(preset=preset, data="hub", weights="scratch", **asked),
        device="cpu",
        data_fingerprint="",
    )


@pytest.mark.parametrize(
    ("case", "preset"),
    [
        (case, preset) if preset == "tiny" or case in SAMPLE else pytest.param(case, preset, marks=pytest.mark.soak)
        for case in CASES
        for preset in PRESETS
    ],
)
def test_the_count_equals_the_closed_form(case, preset):
    settings = sized(case, preset)
    found = count(settings.case, settings.config, settings)
    assert found["flops_per_step"] == found["closed_form_flops"] > 0 and found["closed_form_equal"] is True
    assert found["backward_flops"] == 2 * found["forward_flops"]
    assert found["flops_per_step"] == sum(found["by_module"].values()) == sum(found["by_dtype"].values())


@pytest.mark.parametrize(
    "case",
    [
        "gpt2_clm",
        "roberta_single_cls",
        *(pytest.param(case, marks=pytest.mark.soak) for case in ("roberta_mlm", "gpt2_multi_cls")),
    ],
)
def test_fitting_a_few_lengths_finds_the_closed_form_again(case):
    settings = sized(case, "tiny", seq_len=64)
    request = data_facts(settings).request
    model, outputs = shapes_of(request), meaningful_outputs(request)
    fitted, once, source = counted_row_flops(model, settings.case, outputs, settings.seq_len)
    assert fitted == closed_row_flops(model, settings.case, outputs) and "64" in source
    assert once is None  # proven with one, two and three rows


@pytest.mark.parametrize("longest", [4, 5, 6, 7, 64, 1_023])
def test_probe_lengths_are_enough_to_prove_a_polynomial(longest):
    assert 4 <= len(probe_lengths(longest)) <= 5 and 0 < min(probe_lengths(longest)) <= max(probe_lengths(longest)) == longest


def test_an_architecture_of_the_registry_without_a_closed_form_is_counted(monkeypatch):
    settings = sized("roberta_single_cls", "tiny", seq_len=16)
    request = data_facts(settings).request
    model, outputs = shapes_of(request), meaningful_outputs(request)
    known = step_flops(model, settings.case, settings.config, attention="math", outputs=outputs, seq_len=16, micro_batch=2)
    monkeypatch.delitem(CLOSED_FORMS, ("roberta", "single_cls"))
    counted = step_flops(model, settings.case, settings.config, attention="math", outputs=outputs, seq_len=16, micro_batch=2)
    assert known.source == "closed form" and counted.source.startswith("counted at lengths 2, 5, 8, 15, 16")
    assert counted.of(3, 16) == known.of(3, 16) and counted.real([3, 9]) == known.real([3, 9])


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "pad_token_id": 0}
LIBRARY_MODELS = {
    "deberta_v2": (
        "DebertaV2Config",
        "mlm",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "fnet": ("FNetConfig", "mlm", {}),
    "mixtral": ("MixtralConfig", "clm", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "clm",
        {"num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8},
    ),
    "longformer": ("LongformerConfig", "mlm", {"attention_window": 4}),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.soak) if name == "qwen3_moe" else name for name in LIBRARY_MODELS])
def library_model(request, tmp_path):
    """(id, case, the model in fp32 with no pad columns)."""
    kind, task, more = LIBRARY_MODELS[request.param]
    getattr(transformers, kind)(**SMALL, intermediate_size=48, **more).save_pretrained(tmp_path)
    case = case_for_model(str(tmp_path), task)
    return (
        request.param,
        case,
        build_model(ModelRequest(case.architecture, case.task, "full", 256, 0, 1, 2, None, "scratch", 0.0, 0)),
    )


def test_a_step_of_any_library_model_costs_what_torch_counts_as_it_runs(library_model):
    """By `torch.utils.flop_counter.FlopCounterMode` over two real micro-batches of three rows, forward and backward: with what
    a pass costs once (DeBERTa's relative positions) and whichever experts the tokens were routed to."""
    name, case, model = library_model
    sizes = {"attention": "math", "outputs": 256, "seq_len": 16, "micro_batch": 3}
    if name == "longformer":
        with pytest.raises(Uncountable, match="depends on values that it reads back"):
            step_flops(model, case, DTYPE_CONFIGS["fp32_true"], **sizes)
        return
    found = step_flops(model, case, DTYPE_CONFIGS["fp32_true"], **sizes)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counted, sdpa_kernel([SDPBackend.MATH]):
        for seed in (0, 1):
            tokens = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(seed))
            model(tokens, None, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert sum(found.of(6, 16).values()) == counted.get_total_flops()
    assert (found.once is not None) == (name == "deberta_v2")
    assert sum(found.real([16] * 6).values()) == counted.get_total_flops()


def test_rows_that_touch_each_other_are_not_counted_as_if_they_did_not():
    class Touching(torch.nn.Module):
        attention = "sdpa"

        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(8, 4)

        def forward(self, tokens, mask, last):
            flat = self.embedding(tokens).flatten(0, 1)  # every token attends to those of all rows
            return (flat @ flat.T @ flat).view(*tokens.shape, 4)

    with pytest.raises(Uncountable, match="rows touch each other: one, two and three rows of 5 tokens cost"):
        ModelCounter(Touching()).once_parts(5)


def test_pad_columns_are_in_no_numerator_and_said():
    settings = sized("gpt2_clm", "tiny")
    found = count(settings.case, settings.config, settings)
    pad = found["padded_vocabulary"] - found["vocabulary"]
    assert pad == 46 and found["pad_column_flops"] == 3 * 2 * 8 * 128 * 128 * pad


class DtypesSeen(TorchDispatchMode):
    """FLOPs by the dtype of a product's operands."""

    def __init__(self):
        super().__init__()
        self.flops = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func._overloadpacket in flop_registry:
            dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[args[-1].dtype]
            done = flop_registry[func._overloadpacket](*args, **kwargs or {}, out_val=result)
            self.flops[dtype] = self.flops.get(dtype, 0) + done
        return result


@pytest.mark.process
@pytest.mark.parametrize("config", ["fp32_true", "amp_fp16", "amp_bf16", "fp16_naive", "bf16_pure", "amp_bf16_fp32_head"])
@pytest.mark.parametrize("case", ["gpt2_clm", "roberta_multi_cls"])
def test_the_declared_dtypes_are_those_that_autocast_gives(plan, case, config):
    """A run's own precision, forward and backward, on tensors that know their dtypes and hold no numbers."""
    settings = plan(case, config)
    facts = data_facts(settings)
    precision = Precision(settings.config, CPU, threads=1)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), conversions_left_out(), DtypesSeen() as seen:
            model = converted(build_model(shape_only(facts.request)).eval(), precision)
            seen.flops.clear()
            tokens, last = torch.zeros(4, 32, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
            with precision.forward():
                logits = model(tokens, None, last)
            logits.backward(torch.empty_like(logits))
    finally:
        precision.close()
    columns = meaningful_outputs(facts.request) if facts.request.outputs else facts.as_row()["padded_vocabulary"]
    assert seen.flops == step_flops(
        model, settings.case, settings.config, attention=precision.attention, outputs=columns, seq_len=32, micro_batch=4
    ).of(4, 32)


def test_the_command_prints_a_table_and_its_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["flops", "gpt2_clm", "--preset", "full", "--config", "amp_bf16_fp32_head", "--batch-size", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["batch_size"], found["seq_len"], found["vocabulary"]) == (2, 1_024, 50_258)
    assert found["sizes"] == {"layers": 12, "width": 768, "inner": 3_072, "outputs": 50_258}
    assert found["dtype_config"] == "amp_bf16_fp32_head" and found["attention"] == "efficient"  # a full run is one for a GPU
    scores = found["by_module"]["transformer.h.11.attn"]
    assert scores == 3 * 2 * 4 * 1_024**2 * 768
    assert found["by_dtype"]["fp32"] == found["by_module"]["head.model.lm_head"] == 3 * 2 * 2 * 1_024 * 768 * 50_258
    assert found["flops_per_step"] - found["causal_half_flops_per_step"] == 12 * scores // 2
    lines = printed.err.splitlines()
    assert all(len(line) <= 80 for line in lines) and any("12 x attn (scores)" in line for line in lines)
    assert "equal to the closed form" in printed.err and "all in fp32" in printed.err and "half: " in printed.err


def test_groups_hold_what_the_modules_hold():
    settings = sized("roberta_mlm", "tiny", config="amp_bf16_fp32_head")
    products = count(settings.case, settings.config, settings)["products"]
    merged = groups(products)
    assert {group["layers"] for group in merged} == {1, 2} and len(merged) == 9
    for name in ("forward_flops", "backward_flops"):
        assert sum(group[name] for group in merged) == sum(row[name] for row in products)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt2_clmm"], "unknown case 'gpt2_clmm'"),
        ([], "given: none"),
        (["gpt2_clm", "amp_bf16"], "goes with --config"),
        (["gpt2_clm", "--config", "nope"], "unknown dtype configuration 'nope'"),
        (["gpt2_clm", "--preset", "tiny", "--seq-len", "9999"], "seq_len 9999 is longer"),
        (["gpt2_clm", "--preset", "tiny", "--batch-size", "0"], "batch_size is 0"),
        (["gpt2_clm", "--model", "x", "--task", "clm"], "beside the model"),
    ],
)
def test_a_wrong_command_gets_one_clear_line(capsys, words, message):
    assert main(["flops", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def own_model(tmp_path, **config):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_model_from_outside_is_counted(capsys, tmp_path):
    folder = own_model(
        tmp_path,
        model_type="opt",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=48,
        max_position_embeddings=64,
        vocab_size=500,
        word_embed_proj_dim=32,
    )
    code = main(
        [
            "flops",
            "--model",
            folder,
            "--task",
            "multi_cls",
            "--preset",
            "tiny",
            "--data",
            "embedded",
            "--batch-size",
            "2",
            "--seq-len",
            "16",
            "--json",
        ]
    )
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == 0 and found["closed_form_flops"] is None and "no closed form" in printed.err
    by_hand = 2 * 16 * 2 * (2 * (4 * 32 * 32 + 2 * 32 * 48)) + 2 * 2 * 4 * 16 * 16 * 32 + 2 * 2 * 32 * found["outputs"]
    assert found["forward_flops"] == by_hand
    assert found["flops_per_step"] - found["causal_half_flops_per_step"] == 3 * 2 * 2 * 4 * 16 * 16 * 32 // 2


def test_sizes_reach_the_model(capsys):
    words = ["flops", "gpt2_clm", "--preset", "tiny", "--data", "embedded", "--size", "n_layer=3", "--size", "n_embd=64"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sizes"]["layers"], found["sizes"]["width"], found["closed_form_equal"]) == (3, 64, True)


def test_a_mamba_has_no_attention_and_its_row_says_what_flops_says(capsys, tmp_path):
    """By hand, forward, a row of L tokens and a layer: the convolution pads K - 1 on both sides, the scan's use of states is a
    product, and the head is as wide as the vocabulary."""
    folder = own_model(tmp_path, model_type="mamba", hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=500)
    own = ["--model", folder, "--task", "clm", "--preset", "tiny", "--data", "embedded", "--batch-size", "2", "--seq-len", "16"]
    assert main(["flops", *own, "--config", "amp_bf16", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    d, i, n, r, k, length = 32, 64, 4, 2, 4, 16
    layer = length * (2 * d * 2 * i + 2 * i * (r + 2 * n) + 2 * r * i + 2 * i * d + 2 * i * n) + 2 * k * i * (length + k - 1)
    forward = 2 * (2 * layer + length * 2 * d * found["vocabulary"])
    assert found["forward_flops"] == forward and found["flops_per_step"] == 3 * forward
    assert {row["kind"] for row in found["products"]} == {"projection"} and set(found["by_dtype"]) == {"bf16"}
    assert found["attention"] == "none" and found["causal_attention"] is found["causal_half_flops_per_step"] is None
    assert "with no attention" in printed.err and printed.err.count("attention") == 1 and "scores" not in printed.err

    words = [*own, "--max-steps", "1", "--documents", "200", "--validation-documents", "2", "--out", str(tmp_path / "out")]
    assert main(["case", *words, "amp_bf16", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["flops_per_step"] == found["flops_per_step"]
    assert (row["attention_backend"], row["attention_dtype"]) == ("none", None)


@pytest.mark.parametrize(("case", "config"), [("gpt2_clm", "amp_bf16"), ("roberta_multi_cls", "amp_bf16_fp32_head")])
def test_a_runs_steps_get_their_figures(plan, tmp_path, case, config):
    settings = plan(case, config, max_steps=3)
    data = load_run_data(settings)
    model, batches = build_model(model_request(settings, data)), make_batches(settings, data)
    machine = capture(CPU)
    merge_measured(tmp_path, machine, {"matmul": [{"dtype": d, "threads": 1, "flops_per_s": 1e11} for d in ("fp32", "bf16")]})
    precision = Precision(settings.config, CPU, threads=1)
    run = utilisation(settings, model, model_request(settings, data), machine, tmp_path, attention="math", threads=1)
    model = precision.prepare(model)
    optimizer = precision.make_optimizer(lr=settings.lr, weight_decay=0.0, seed=0)
    meter = StepMeter(model, optimizer, CPU, window=1, micro_batches=2, warmup_steps=1)
    options = LoopOptions(
        max_steps=3,
        warmup_steps=1,
        micro_batch=2,
        peak_lr=1e-3,
        max_norm=1.0,
        valid_vocab=data.valid_vocab if case == "gpt2_clm" else None,
    )
    readings = list(train(settings.case, model, optimizer, batches, precision, meter, options))
    filled = [run.fill(record, batches.step(record.step).lengths.tolist()) for reading in readings for record in reading.steps]
    precision.close()
    for record in filled:
        assert record.flops > 0 and record.mfu is None and record.mfu_bf16_peak is None
        assert record.mfu_measured_peak == pytest.approx(record.flops / record.step_time_s / 1e11)
        padded = record.real_tokens < record.tokens
        assert (record.mfu_measured_peak_real_tokens < record.mfu_measured_peak) is padded
    summary = run.summary(filled, untimed_steps=1)
    assert summary["flops_per_step"] == round(sum(record.flops for record in filled) / 3)
    assert summary["mfu_measured_peak"] == pytest.approx(
        sum(r.flops for r in filled[1:]) / sum(r.step_time_s for r in filled[1:]) / 1e11
    )
    assert run.flags()["flops"]["source"] == "closed form" and "CPU" in run.flags()["flops"]["datasheet_unknown"]


def test_a_run_of_an_uncountable_model_has_null_and_the_reason(plan, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise Uncountable("the op own.scan has no FLOP formula")

    settings = plan("gpt2_clm", "fp32_true")
    monkeypatch.setattr("harness.run.step_flops.step_flops", refuse)
    run = utilisation(
        settings, torch.nn.Linear(1, 1), data_facts(settings).request, capture(CPU), tmp_path, attention="math", threads=1
    )
    assert run.step_flops is None and run.missing() == {"not_counted": "the op own.scan has no FLOP formula"}
