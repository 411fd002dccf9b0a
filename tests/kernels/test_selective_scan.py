"""`selective_scan`: against a loop over every number in float64, against `transformers`' Mamba, and by finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import scan_blocks, selective_scan
from kernels.scan_cases import selective_inputs
from kernels.selective_scan import _scan, reference
from tests.kernels.truth import DEVICE, DTYPES, with_gradients, worst_of


def inputs(batch=2, tokens=40, channels=3, states=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [x.to(dtype) for x in selective_inputs(batch, tokens, channels, states, torch.float32, "cpu")]


def call(*given, impl="torch"):
    return selective_scan(*given, impl=impl)


def test_outputs_are_those_of_a_loop_over_every_number():
    u, delta, A, B, C, D, state = inputs(1, 64 * 7 + 3, 2, 3)
    out, left = selective_scan(u, delta, A, B, C, D)
    carried, _ = selective_scan(u, delta, A, B, C, D, state)
    for c in range(2):
        for initial, got in (([0.0] * 3, out), (state[0, c].tolist(), carried)):
            h, errors = list(initial), []
            for i in range(u.shape[1]):
                x, step = u[0, i, c].item(), delta[0, i, c].item()
                h = [math.exp(step * A[c, s].item()) * h[s] + step * x * B[0, i, s].item() for s in range(3)]
                want = sum(h[s] * C[0, i, s].item() for s in range(3)) + D[c].item() * x
                errors.append(abs(got[0, i, c].item() - want))
            assert max(errors) < 1e-13
            if got is out:
                assert left[0, c].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 64, 63 + 64 * 8, 64 * 20 + 1])
def test_chunks_equal_the_definition_with_every_gradient(tokens):
    given = inputs(2, tokens)
    assert worst_of(with_gradients(call, given), with_gradients(reference.definition, given)) < 1e-12
    single = [x.float() for x in given]
    wide = [x.double() for x in single]
    assert worst_of(with_gradients(call, single), with_gradients(reference.definition, wide)) < 2e-6


def test_gradients_by_finite_differences(small_chunks):
    leaves = [x.requires_grad_() for x in inputs(1, 11, 2, 2)]
    assert torch.autograd.gradcheck(call, leaves)


def test_mamba_of_transformers_is_reproduced_with_every_gradient():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=8, time_step_rank=2)
    mixer = modeling.MambaMixer(config, layer_idx=0).eval()
    with torch.no_grad():
        mixer.A_log.copy_(torch.arange(1.0, 5).repeat(32, 1).log())
        mixer.D.fill_(1.0)
        mixer.dt_proj.bias.uniform_(-5, -1)

    def ours(hidden):
        x, gate = mixer.in_proj(hidden).transpose(1, 2).chunk(2, 1)
        x = F.silu(mixer.conv1d(x)[..., : hidden.shape[1]]).transpose(1, 2)
        step, B, C = mixer.x_proj(x).split([2, 4, 4], -1)
        y, _ = selective_scan(x, F.softplus(mixer.dt_proj(step)), -mixer.A_log.exp(), B, C, mixer.D)
        return mixer.out_proj(y * F.silu(gate.transpose(1, 2)))

    hidden, weights = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 50, 16)
    leaves = [hidden, *mixer.parameters()]
    theirs, mine = mixer(hidden), ours(hidden)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert worst_of([mine.detach()], [theirs.detach()]) < 1e-6
    wanted, got = (torch.autograd.grad((out * weights).sum(), leaves) for out in (theirs, mine))
    assert worst_of(got, wanted) < 2e-6


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_no_token_reads_what_comes_after_it(factor):
    given = inputs(1, 64 * 12, 3, 4, torch.float32)
    out = call(*given)[0]
    for place in (0, 64 * 5 + 7, 64 * 12 - 1):
        for changed in (0, 1, 3, 4):  # u, delta, B, C
            other = [x.clone() for x in given]
            other[changed][:, place] = (0.5 * other[changed][:, place] + 0.3) * factor
            moved = call(*other)[0]
            assert torch.equal(moved[:, :place], out[:, :place]) and not torch.equal(moved[:, place], out[:, place])


@pytest.mark.parametrize("tokens, cut", [(64 * 16, 64 * 8), (64 * 9 + 5, 71)])
def test_two_parts_with_a_carried_state_equal_the_whole(tokens, cut):
    given = inputs(2, tokens, 3, 4, torch.float32)

    def in_parts(u, delta, A, B, C, D, state):
        first, state = selective_scan(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, state)
        rest, state = selective_scan(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, state)
        return torch.cat([first, rest], 1), state

    assert worst_of(with_gradients(in_parts, given), with_gradients(call, given)) < 1e-6


def long_sequence_is_bounded(tokens, dtype):
    u, delta, A, B, C, D, _ = inputs(1, tokens, 2, 2, torch.float32)
    leaves = [x.to(dtype).requires_grad_() for x in (u, delta, B, C)]
    out, state = selective_scan(leaves[0], leaves[1], A, leaves[2], leaves[3], D)
    assert out.dtype == dtype and out.isfinite().all() and state.isfinite().all() and state.dtype == torch.float32
    out.float().square().mean().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype and x.grad.any() for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_thousand_tokens_stay_finite(dtype):
    long_sequence_is_bounded(2**14, dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_tokens_stay_finite(dtype):
    long_sequence_is_bounded(2**20, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 11), (torch.bfloat16, 6), (torch.float16, 1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_against_float64(small_chunks, monkeypatch, dtype, tokens):
    """Three segments, the last of them not whole, two, and one; two blocks of channels, three states of four."""
    from kernels.selective_scan import triton_kernel

    monkeypatch.setattr(triton_kernel, "TILE", 8)
    made = inputs(2, tokens, 3, 3, torch.float32)
    given = [(x.to(dtype) if i in (0, 1, 3, 4) else x).to(DEVICE) for i, x in enumerate(made)]
    assert scan_blocks.segments_of(tokens, 18) == {11: (3, 4), 6: (2, 4), 1: (1, 4)}[tokens]
    got = with_gradients(lambda *x: call(*x, impl="triton"), given)
    want = with_gradients(reference.definition, [x.double() for x in given])
    fp32 = torch.float32
    assert [x.dtype for x in got] == [dtype, fp32, dtype, dtype, fp32, dtype, dtype, fp32, fp32]
    assert worst_of(got, want) < (2e-6 if dtype == fp32 else torch.finfo(dtype).eps)


def test_storage_dtypes_may_be_mixed_and_the_scan_is_fp32():
    u, delta, A, B, C, D, state = inputs(1, 100, 3, 4, torch.float32)
    mixed = u.bfloat16(), delta, A, B.half(), C.bfloat16(), D, state
    out, left = call(*mixed)
    exact, exact_left = reference.definition(*(x.double() for x in mixed))
    assert worst_of([out], [exact]) < 2.0**-8 and worst_of([left], [exact_left]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        under = with_gradients(call, mixed)
    assert all(map(torch.equal, under, with_gradients(call, mixed)))


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"delta": 0.1}, TypeError, "delta must be a tensor, got float"),
        ({"B": torch.ones(2, 5, 4, dtype=torch.int64)}, TypeError, "B must be float32, .* got int64"),
        ({"A": torch.ones(3)}, ValueError, r"A must have the shape \(channels, states\), got \(3,\)"),
        ({"C": torch.ones(2, 5, 3)}, ValueError, "C has 3 for states, where A has 4"),
        ({"D": torch.ones(4)}, ValueError, "D has 4 for channels, where u has 3"),
        ({"u": torch.ones(0, 5, 3)}, ValueError, r"u is empty: \(0, 5, 3\)"),
        ({"state": torch.ones(2, 4, 3)}, ValueError, "state has 4 for channels, where u has 3"),
        ({"state": torch.ones(2, 3, 4).bfloat16()}, TypeError, "state is kept in float32, got bfloat16"),
        ({"D": torch.ones(3, device="meta")}, ValueError, "D is on meta, the first argument on cpu"),
        ({"impl": "triton", "D": torch.ones(3).double()}, TypeError, "float64 needs impl='torch'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given(change, error, said):
    u, B = torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    given = {"u": u, "delta": u, "A": -torch.ones(3, 4), "B": B, "C": B, "D": torch.ones(3)} | change
    with pytest.raises(error, match=f"selective_scan: .*{said}"):
        selective_scan(**given)


def test_the_counter_sees_7_in_and_3_i_flops_a_token_and_twice_that_backward():
    given = [x.requires_grad_() for x in inputs(2, 10, 3, 4, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        out, _ = selective_scan(*given)
        assert counter.get_total_flops() == 2 * 10 * (7 * 3 * 4 + 3 * 3)
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * (7 * 3 * 4 + 3 * 3)


@pytest.mark.slow
def test_the_operator_keeps_its_word_and_compiles_whole():
    given = [x.requires_grad_() for x in inputs(2, 70, 3, 4, torch.float32)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.dtype_dynamics_selective_scan.scan.default, (*given, "torch"), test_utils=checks)
    plain = [x.detach() for x in given]
    out, left, starts = _scan(*plain, "torch")
    arguments = (*plain, starts, torch.randn_like(out), torch.randn_like(left), "torch")
    torch.library.opcheck(torch.ops.dtype_dynamics_selective_scan.scan_backward.default, arguments, test_utils=checks)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: call(*(0.5 * y for y in x)), backend="aot_eager", fullgraph=True)
    eager = with_gradients(lambda *x: call(*(0.5 * y for y in x)), given)
    assert all(map(torch.equal, with_gradients(compiled, given), eager))
