"""Which change applies to whom, and which cause it confirms."""

import pytest
import torch

from bench_cases import DTYPE_CONFIGS
from bench_cases.lookup import UnknownId
from harness.forensics.changes import change_of, changes_of, confirms, enclosing_modules
from harness.settings import SettingsError
from instrument.results.schemas import FirstNonfinite


def first(cause, phase, module=None):
    return FirstNonfinite(
        step=1,
        microbatch=None,
        phase=phase,
        phase_surfaced=phase,
        module=module,
        op=None,
        tensor="output",
        source_tensor=None,
        kind="inf",
        dtype=None,
        cause=cause,
        input_absmax=None,
        headroom_bits=None,
    )


@pytest.mark.parametrize(
    ("change", "what", "confirmed"),
    [
        ("eps", first("underflow_then_divide", "optimizer"), True),
        ("fp32_states", first("underflow_then_divide", "optimizer"), True),
        ("fp32_head", first("underflow_then_divide", "optimizer"), False),
        ("eps", first("overflow", "optimizer"), False),
        ("fp32_states", first("overflow", "optimizer"), True),
        ("scaler", first("overflow", "forward", "a"), False),
        ("scaler", first("overflow", "backward", "a.b"), True),
        ("scaler", first("invalid", "backward", "a.b"), False),
        ("fp32:a.b", first("overflow", "forward", "a.b"), True),
        ("fp32:a", first("overflow", "backward", "a.b"), True),
        ("fp32:a.b.c", first("overflow", "forward", "a.b"), False),
        ("fp32:a", first("overflow", "forward", "ab"), False),
        ("fp32_head", first("overflow", "forward", "head.dense"), True),
        ("fp32_head", first("overflow", "forward", "header"), False),
        ("fp32_head", first("overflow", "loss"), True),
        ("fp32:a", first("from_input", "forward", "a"), False),
        ("fp32:a", first(None, "forward", "a"), False),
        ("eps", first("overflow", "clip"), False),
    ],
)
def test_which_remedy_confirms_which_cause(change, what, confirmed):
    assert confirms(change, what) == (what.cause if confirmed else None)


def test_every_change_applies_or_says_why_not():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    able = {
        name: [c.name for c in changes_of(["all"], config, model, first("overflow", "optimizer")) if c.why_not is None]
        for name, config in DTYPE_CONFIGS.items()
    }
    assert able["fp32_true"] == able["amp_bf16_fp32_head"] == able["fp32_tf32"] == []
    assert able["amp_fp16"] == able["amp_bf16"] == able["amp_bf16_fused_adamw"] == ["fp32_head"]
    assert able["amp_fp16_unscaled"] == ["fp32_head", "scaler"]
    assert able["fp16_naive"] == able["fp16_naive_clip16"] == ["fp32_head", "eps", "fp32_states"]
    assert able["fp16_naive_eps1e4"] == able["bf16_pure"] == able["bf16_pure_sr"] == ["fp32_head", "fp32_states"]
    assert able["fp16_naive_fp32_states"] == ["fp32_head"]
    assert able["amp_bf16_8bit"] == ["fp32_head", "eps", "fp32_states"]


def test_names_that_are_no_change_and_no_module_are_refused_with_what_is_near():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(SettingsError, match=r"'fp32_haed' is no change; allowed: fp32_head, eps"):
        changes_of(["fp32_haed"], DTYPE_CONFIGS["fp16_naive"], model, first("overflow", "optimizer"))
    with pytest.raises(UnknownId, match="'fp32:1': the model has no such module; near: 0"):
        change_of("fp32:1", DTYPE_CONFIGS["fp16_naive"], model)


def test_a_list_of_modules_is_never_called_and_not_tried_on_the_way_out():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])})
    assert enclosing_modules(model, "layers.0.0") == ["layers.0"]
