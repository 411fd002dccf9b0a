"""`resolvent_mix`: against dense inverses and its definition in float64, its adjoint by finite differences, and its bounds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import resolvent_mix, scan_blocks
from kernels.resolvent_mix import _scan, reference
from kernels.scan_cases import resolvent_inputs
from tests.kernels.truth import DEVICE, DTYPES, with_gradients, worst_of

STATE = 4  # of the inputs, the first that is the state's


def inputs(batch=2, tokens=40, channels=3, dtype=torch.float64, state=True, seed=0):
    torch.manual_seed(seed)
    made = [x.to(dtype) for x in resolvent_inputs(batch, tokens, channels, torch.float64, "cpu")]
    return made if state else made[:STATE]


def call(u, h, t, eta, g=None, y=None, impl="torch"):
    out, state = resolvent_mix(u, h, t, eta, None if g is None else (g, y), impl=impl)
    return out, *state


@pytest.mark.parametrize("tokens", [1, 40, 64 * 7 + 3])
def test_outputs_are_last_rows_of_dense_inverses(tokens):
    u, h, t, eta = inputs(1, tokens, 2, state=False)
    out, (g, y) = resolvent_mix(u, h, t, eta)
    for c in range(2):
        matrix = torch.diag(torch.complex(h[0, :, c], -eta[c].expand(tokens)))
        matrix += torch.diag(t[0, 1:, c], 1) + torch.diag(t[0, 1:, c], -1)
        for i in (1, tokens // 2 + 1, tokens - 1 or 1, tokens):
            inverse = torch.linalg.inv(matrix[:i, :i])[-1]
            want = inverse @ u[0, :i, c].to(inverse.dtype)
            assert abs(torch.complex(out[0, i - 1, c], out[0, i - 1, 2 + c]) - want) < 1e-12 * max(1, abs(want))
        assert abs(torch.complex(*g[0, :, c]) - inverse[-1]) < 1e-12 * abs(inverse[-1])
    assert torch.equal(torch.cat([*y[0]]), out[0, -1])


@pytest.mark.parametrize("tokens", [1, 64, 63 + 64 * 8, 64 * 20 + 1])
def test_chunks_equal_the_definition_with_every_gradient(tokens):
    given = inputs(2, tokens)
    assert worst_of(with_gradients(call, given), with_gradients(reference.definition, given)) < 1e-11
    single = [x.float() for x in given]
    wide = [x.double() for x in single]
    assert worst_of(with_gradients(call, single), with_gradients(reference.definition, wide)) < 2e-5


def test_gradients_by_finite_differences(small_chunks):
    leaves = [x.requires_grad_() for x in inputs(1, 11, 2)]
    assert torch.autograd.gradcheck(call, leaves)


def test_a_second_derivative_is_refused():
    u, h, t, eta = (x.requires_grad_() for x in inputs(1, 3, 1, state=False))
    (grad,) = torch.autograd.grad(call(u, h, t, eta)[0].sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        grad.sum().backward()


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_no_token_reads_what_comes_after_it(factor):
    given = inputs(1, 64 * 12, 3, torch.float32)
    out = call(*given)[0]
    for place in (0, 64 * 5 + 7, 64 * 12 - 1):
        for changed in range(3):
            other = [x.clone() for x in given]
            other[changed][:, place] = 0.5 * other[changed][:, place] + 0.3 * (factor if changed != 2 else 1)
            moved = call(*other)[0]
            assert torch.equal(moved[:, :place], out[:, :place]) and not torch.equal(moved[:, place], out[:, place])


@pytest.mark.parametrize("tokens, cut", [(64 * 16, 64 * 8), (64 * 9 + 5, 71)])
def test_two_parts_with_a_carried_state_equal_the_whole(tokens, cut):
    given = inputs(2, tokens, 3, torch.float32)

    def in_parts(u, h, t, eta, g, y):
        first, state = resolvent_mix(u[:, :cut], h[:, :cut], t[:, :cut], eta, (g, y))
        rest, state = resolvent_mix(u[:, cut:], h[:, cut:], t[:, cut:], eta, state)
        return torch.cat([first, rest], 1), *state

    assert worst_of(with_gradients(in_parts, given), with_gradients(call, given)) < 5e-6
    assert worst_of(in_parts(*given), call(*given)) < 1e-6


def long_sequence_is_bounded(tokens, dtype):
    u, h, t, eta, g, y = inputs(1, tokens, 4, torch.float32)
    eta = torch.tensor([2.0**-7, 0.02, 0.3, 1.0])
    leaves = [x.to(dtype).requires_grad_() for x in (u, h, t)]
    out, state = resolvent_mix(*leaves, eta, None)
    assert out.dtype == dtype and out.isfinite().all() and all(x.isfinite().all() and x.dtype == torch.float32 for x in state)
    assert (state[0].square().sum(1).sqrt() <= 1.001 / eta).all()
    out.float().square().mean().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype and x.grad.any() for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_thousand_tokens_stay_finite(dtype):
    long_sequence_is_bounded(2**14, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_tokens_stay_finite(dtype):
    long_sequence_is_bounded(2**20, dtype)


@pytest.mark.parametrize("of_h, of_u", [(1e6, 1.0), (1.0, 1e-30), (1.0, 1e30), (1e-3, 1.0)])
def test_products_of_a_chunk_are_rescaled(of_h, of_u):
    """Without it an fp32 product of 64 tokens would leave the range."""
    u, h, t, eta = inputs(1, 64 * 8, 3, torch.float32, state=False)
    given = [u * of_u, h * of_h, t, eta]
    wide = [x.double() for x in given]
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    assert worst_of(call(*given), reference.definition(*wide, zero, zero)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 11), (torch.bfloat16, 6), (torch.float16, 1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_against_float64(small_chunks, dtype, tokens):
    """Three segments, the last of them not whole, two, and one; channels that fill no block."""
    given = [x.to(dtype) if i < 3 else x for i, x in enumerate(inputs(2, tokens, 3, torch.float32))]
    given = [x.to(DEVICE) for x in given]
    segments = scan_blocks.segments_of(tokens, 24)
    assert segments == {11: (3, 4), 6: (2, 4), 1: (1, 4)}[tokens]
    got = with_gradients(lambda *x: call(*x, impl="triton"), given)
    want = with_gradients(reference.definition, [x.double() for x in given])
    assert [x.dtype for x in got] == [dtype, *[torch.float32] * 2, *[dtype] * 3, *[torch.float32] * 3]
    assert worst_of(got, want) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_storage_dtypes_may_be_mixed_and_the_scan_is_fp32():
    u, h, t, eta, g, y = inputs(1, 100, 3, torch.float32)
    out, _, _ = call(u.bfloat16(), h, t.half(), eta, g, y)
    exact = reference.definition(*(x.double() for x in (u.bfloat16(), h, t.half(), eta, g, y)))[0]
    assert torch.equal(out, exact.float().bfloat16()) or worst_of([out], [exact]) < 2.0**-8
    with torch.autocast("cpu", torch.bfloat16):
        under = with_gradients(call, (u, h, t, eta, g, y))
    assert all(map(torch.equal, under, with_gradients(call, (u, h, t, eta, g, y))))


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"u": [1.0]}, TypeError, "u must be a tensor, got list"),
        ({"h": torch.ones(2, 5, 3, dtype=torch.int64)}, TypeError, "h must be float32, .* got int64"),
        ({"t": torch.ones(2, 5)}, ValueError, r"t must have the shape \(batch, tokens, channels\), got \(2, 5\)"),
        ({"t": torch.ones(2, 4, 3)}, ValueError, "t has 4 for tokens, where u has 5"),
        ({"eta": torch.ones(4)}, ValueError, "eta has 4 for channels, where u has 3"),
        ({"u": torch.ones(2, 0, 3)}, ValueError, r"u is empty: \(2, 0, 3\)"),
        ({"state": torch.ones(2, 2, 3)}, TypeError, r"state must be the pair \(g, y\), got Tensor"),
        ({"state": (torch.ones(2, 2, 3), torch.ones(2, 1, 3))}, ValueError, "state y has 1 for 2, must be 2"),
        ({"state": (torch.ones(2, 2, 3).half(),) * 2}, TypeError, "state g is kept in float32, got float16"),
        ({"eta": torch.ones(3, device="meta")}, ValueError, "eta is on meta, the first argument on cpu"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, got 'cuda'"),
        ({"impl": "triton", "eta": torch.ones(3).double()}, TypeError, "float64 needs impl='torch'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given(change, error, said):
    given = {"u": torch.ones(2, 5, 3), "h": torch.ones(2, 5, 3), "t": torch.ones(2, 5, 3), "eta": torch.ones(3)} | change
    with pytest.raises(error, match=f"resolvent_mix: .*{said}"):
        resolvent_mix(**given)


def test_the_counter_sees_19_flops_a_token_and_channel_and_twice_that_backward():
    u, h, t, eta = (x.requires_grad_() for x in inputs(2, 10, 3, torch.float32, state=False))
    with FlopCounterMode(display=False) as counter:
        out, _ = resolvent_mix(u, h, t, eta)
        assert counter.get_total_flops() == 19 * 2 * 10 * 3
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 19 * 2 * 10 * 3


@pytest.mark.slow
def test_the_operator_keeps_its_word_and_compiles_whole():
    given = [x.requires_grad_() for x in inputs(2, 70, 3, torch.float32)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dtype_dynamics_resolvent_mix.scan.default, (*given, "torch"), test_utils=checks)
    weights = [torch.randn_like(x) for x in _scan(*given, "torch")]
    arguments = (*(x.detach() for x in given), *(x.detach() for x in _scan(*given, "torch")[3:]), *weights[:3], "torch")
    torch.library.opcheck(torch.ops.dtype_dynamics_resolvent_mix.scan_backward.default, arguments, test_utils=checks)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: call(*(2 * y for y in x)), backend="aot_eager", fullgraph=True)
    eager = with_gradients(lambda *x: call(*(2 * y for y in x)), given)
    assert all(map(torch.equal, with_gradients(compiled, given), eager))
