"""The changes of a counterfactual: which configuration each applies to, which cause it confirms, one module in fp32, and a
stored optimizer state as another implementation keeps it (against bitsandbytes' own decoding).
"""

from dataclasses import replace

import pytest
import torch

from bench_cases import DTYPE_CONFIGS
from bench_cases.lookup import UnknownId
from harness.inspect.changes import change_of, changes_of, confirms, enclosing_modules, with_fp32_moments
from harness.inspect.rerun import in_fp32
from harness.settings import SettingsError
from instrument.replay.snapshot import Snapshot
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


class TwoProducts(torch.nn.Module):
    """The first product leaves fp16's range, the second brings it back."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.constant_(self.up.weight, 300.0)
        torch.nn.init.constant_(self.down.weight, 1e-3)

    def forward(self, x, *, scale=1.0):
        return {"out": (self.down(self.up(x)) * scale,)}


def test_a_module_in_fp32_has_the_range_of_fp32_inside_and_its_own_dtype_outside():
    model = torch.nn.ModuleDict({"inner": TwoProducts()})
    x, exact = torch.full((2, 4), 60.0), 60 * 300 * 4 * 1e-3 * 4
    half = model.half()["inner"]
    assert not half(x.half())["out"][0].isfinite().all()  # 72,000 in between
    with in_fp32(model, "inner", torch.float16) as seen:
        (out,) = half(x.half(), scale=2.0)["out"]
        out.float().sum().backward()
    assert out.dtype == torch.float16 and torch.allclose(out.float(), torch.full((2, 4), 2 * exact), rtol=2e-3)
    assert seen.calls == 1 and float(seen.largest) == pytest.approx(2 * exact, rel=1e-3)
    assert half.up.weight.dtype == half.up.weight.grad.dtype == torch.float16 and half.up.weight.grad.isfinite().all()
    assert "forward" not in vars(half) and not half(x.half())["out"][0].isfinite().all()  # as before


def test_under_autocast_a_module_in_fp32_hands_on_fp32():
    model = torch.nn.ModuleDict({"inner": TwoProducts()})
    x = torch.full((2, 4), 60.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model["inner"](x)["out"][0].dtype == torch.bfloat16
        with in_fp32(model, "inner", None):
            (out,) = model["inner"](x)["out"]
    assert out.dtype == torch.float32 and torch.equal(out, model["inner"](x)["out"][0])


def test_8bit_moments_are_decoded_as_bitsandbytes_does():
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    model = torch.nn.Linear(100, 90)  # 9,000 weights: 8-bit; 90 biases: 32-bit
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(8, 100)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    wide = with_fp32_moments(Snapshot(3, model, optimizer).named())
    for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        theirs = dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert torch.equal(wide.tensors[f"optimizer/weight/{name}"], theirs) and theirs.abs().max() > 0
        assert torch.equal(wide.tensors[f"optimizer/bias/{name}"], optimizer.state[model.bias][f"state{number}"])
    assert float(wide.tensors["optimizer/weight/step"]) == 3 and not wide.aliases
    made = torch.optim.AdamW(model.parameters())
    Snapshot.from_named(replace(wide, groups=[{}]), model, made).restore()
    assert sorted(made.state[model.weight]) == ["exp_avg", "exp_avg_sq", "step"]
