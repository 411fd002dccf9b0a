"""The declarations keep the design's tables, check themselves, and know their neighbours."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from bench_cases import CASES, DTYPE_CONFIGS, PRESETS, BadDeclaration, UnknownId, lookup
from bench_cases.architectures import MLM
from bench_cases.lookup import index


def test_the_six_cases_and_the_label_sum_twins():
    default = [case.id for case in CASES.values() if case.in_default_matrix]
    assert default == [
        "gpt2_clm",
        "roberta_mlm",
        "gpt2_multi_cls",
        "roberta_multi_cls",
        "gpt2_single_cls",
        "roberta_single_cls",
    ]
    assert [CASES[name].scenario for name in default] == list("ABCDEF")
    twins = {name: case for name, case in CASES.items() if case.loss_reduction == "label_sum"}
    assert set(twins) == {"gpt2_multi_cls_labelsum", "roberta_multi_cls_labelsum"}
    for name, twin in twins.items():
        original = CASES[name.removesuffix("_labelsum")]
        assert replace(twin, id=original.id, loss_reduction="mean", in_default_matrix=True) == original


def test_the_seven_configurations_read_as_designed():
    default = [config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix]
    assert default == ["fp32_true", "amp_fp16", "amp_bf16", "fp16_naive", "bf16_pure", "amp_bf16_8bit", "amp_bf16_fp32_head"]
    rows = {c.id: (c.weights, c.autocast, c.head, c.loss, c.optimizer, c.scaler) for c in DTYPE_CONFIGS.values()}
    assert rows["fp32_true"] == ("fp32", None, "fp32", "fp32", "foreach", False)
    assert rows["amp_fp16"] == ("fp32", "fp16", "fp16", "fp32", "foreach", True)
    assert rows["fp16_naive"] == ("fp16", None, "fp16", "fp16", "foreach", False)
    assert rows["amp_bf16_8bit"] == ("fp32", "bf16", "bf16", "fp32", "8bit", False)
    assert rows["amp_bf16_fp32_head"] == ("fp32", "bf16", "fp32", "fp32", "foreach", False)
    assert {c.eps for c in DTYPE_CONFIGS.values()} == {1e-8, 1e-4}


def test_every_control_exists_and_differs_in_one_field():
    naive = DTYPE_CONFIGS["fp16_naive"]
    for name in naive.controls:
        control = DTYPE_CONFIGS[name]
        changed = [
            field
            for field in ("weights", "compute", "head", "loss", "optimizer", "eps", "scaler", "clip", "tf32")
            if getattr(control, field) != getattr(naive, field)
        ]
        assert len(changed) == 1, (name, changed)


@pytest.mark.parametrize(("wanted", "near"), [("gpt2_multi", "gpt2_multi_cls"), ("robertamlm", "roberta_mlm")])
def test_an_unknown_id_lists_the_nearest(wanted, near):
    with pytest.raises(UnknownId, match=f"unknown case '{wanted}'.*nearest: .*{near}"):
        lookup("case", wanted, CASES)


def test_an_id_near_to_nothing_lists_what_is_allowed():
    with pytest.raises(UnknownId, match="allowed: tiny, full"):
        lookup("preset", "zzzz", PRESETS)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ("amp_bf16", {"head": "fp16"}, "head runs in bf16 or in fp32"),
        ("fp16_naive", {"scaler": True}, "loss scaler refuses 16-bit gradients"),
        ("fp16_naive", {"head": "fp32"}, "fp32 head needs fp32 weights"),
        ("fp32_true", {"loss": "bf16"}, "bf16 loss needs bf16 logits"),
        ("amp_bf16", {"tf32": True}, "tf32 concerns fp32"),
        ("fp32_true", {"weights": "fp64"}, "'fp64' is none of"),
        ("fp32_true", {"optimizer": "lion"}, "'lion' is none of"),
        ("fp32_true", {"optimizer": "stochastic_rounding"}, "defined for bf16 weights"),
        ("bf16_pure", {"compute": "fp16"}, "autocast needs fp32 weights"),
        ("fp32_true", {"eps": 0.0}, "not positive"),
        ("fp32_true", {"id": "../x"}, "letters, digits"),
    ],
)
def test_a_contradicting_configuration_is_refused_when_made(config, changes, reason):
    with pytest.raises(BadDeclaration, match=reason):
        replace(DTYPE_CONFIGS[config], **changes)


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("gpt2_clm", {"loss_reduction": "label_sum"}, "needs the loss bce_with_logits"),
        ("gpt2_clm", {"id": "other"}, "must begin with 'gpt2_clm'"),
        ("gpt2_clm", {"task": MLM, "id": "gpt2_mlm"}, "needs a bidirectional architecture"),
    ],
)
def test_a_contradicting_case_is_refused_when_made(case, changes, reason):
    with pytest.raises(BadDeclaration, match=reason):
        replace(CASES[case], **changes)


def test_a_preset_checks_itself():
    with pytest.raises(BadDeclaration, match="micro_batch must divide"):
        replace(PRESETS["tiny"], micro_batch=3)


def test_an_id_declared_twice_is_refused():
    case = CASES["gpt2_clm"]
    with pytest.raises(BadDeclaration, match="declared twice"):
        index([case, case])


def test_declarations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        CASES["gpt2_clm"].id = "x"


def test_sequences_fit_every_preset():
    for preset in PRESETS.values():
        for case in CASES.values():
            assert preset.sequence_length(case.id) <= case.architecture.positions(preset.id)
    assert PRESETS["full"].sequence_length("gpt2_clm") == 1_024


@pytest.mark.process
def test_importing_the_declarations_imports_no_torch():
    code = "import sys, bench_cases; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
