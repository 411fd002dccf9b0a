"""One module in fp32: fp32's range inside, and what runs around it left alone."""

import pytest
import torch

from harness.forensics.changed_run import in_fp32


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
