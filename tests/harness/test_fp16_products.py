"""fp16 products in fp32, rounded once: equal to the exact product within the stated bound."""

import pytest
import torch

from harness import fp16_products


def operands(m, k, n, scale=1.0):
    torch.manual_seed(m * k * n)
    return (torch.randn(m, k) * scale).half(), torch.randn(k, n).half()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 5), (64, 256, 32), (16, 4_096, 8)])
def test_a_product_is_the_exact_one_within_fp32_accumulation_and_one_rounding(m, k, n):
    left, right = operands(m, k, n)
    exact = left.double() @ right.double()
    bound = 2.0**-11 * exact.abs() + k * 2.0**-24 * (left.double().abs() @ right.double().abs()) + 2.0**-25
    with fp16_products.installed():
        results = {
            "mm": left @ right,
            "bmm": torch.bmm(left[None], right[None])[0],
            "linear": torch.nn.functional.linear(left, right.T.contiguous()),
            "addmm": torch.addmm(torch.zeros(n).half(), left, right),
        }
    for name, result in results.items():
        assert result.dtype == torch.float16
        worst = ((result.double() - exact).abs() / bound).max().item()
        assert worst <= 1, f"{name}: {worst:.3f} times the bound"


def test_addmm_rounds_once_not_twice():
    left, right = torch.tensor([[1.0]]).half(), torch.tensor([[2.0**-11]]).half()
    bias = torch.tensor([[1.0 + 2.0**-10]]).half()
    with fp16_products.installed():
        got = torch.addmm(bias, left, right)
    exact = bias.double() + left.double() @ right.double()  # a tie between two fp16 numbers
    assert got.double().item() == exact.half().double().item()


def test_overflow_stays_overflow_and_partial_sums_may_exceed_fp16():
    left = torch.tensor([[300.0, 300.0]]).half()
    with fp16_products.installed():
        assert (left @ torch.tensor([[300.0], [300.0]]).half()).isinf().all()
        assert (left @ torch.tensor([[300.0], [-300.0]]).half()).item() == 0


def test_other_dtypes_keep_their_kernels_bit_for_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        left, right = torch.randn(33, 65).to(dtype), torch.randn(65, 17).to(dtype)
        bias = torch.randn(17).to(dtype)
        before = left @ right, torch.addmm(bias, left, right, beta=0.5, alpha=2.0)
        with fp16_products.installed():
            after = left @ right, torch.addmm(bias, left, right, beta=0.5, alpha=2.0)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_flow_through():
    layer = torch.nn.Linear(8, 4).half()
    x = torch.randn(2, 3, 8).half().requires_grad_()
    with fp16_products.installed():
        layer(x).float().square().sum().backward()
    wide = torch.nn.Linear(8, 4)
    wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    y = x.detach().float().requires_grad_()
    wide(y).square().sum().backward()
    torch.testing.assert_close(x.grad.float(), y.grad, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(layer.weight.grad.float(), wide.weight.grad, rtol=5e-3, atol=5e-3)


def test_the_override_ends_with_its_block():
    left, right = operands(64, 512, 64)
    native = left @ right
    with fp16_products.installed():
        pass
    assert torch.equal(left @ right, native)
