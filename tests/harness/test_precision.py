"""Every configuration runs as declared or is refused with the reason; switches are proven by computation; fp16 products
in fp32 are rounded once.
"""

from functools import partial

import pytest
import torch

from bench_cases import DTYPE_CONFIGS, Architecture, Case
from bench_cases.architectures import CLM
from bench_cases.models import build_model
from bench_cases.own import OWN_LEARNING_RATES
from harness import fp16_products, precision
from harness.loss import MeasuringGradScaler, training_loss
from harness.planning import plan_run
from harness.precision import DTYPES, Precision, SwitchError, Unsupported, refuse_what_the_device_lacks
from harness.run.execute import execute, load_run_data, make_batches, model_request
from harness.settings import Request
from instrument.flop_counter import Uncountable
from kernels import scale_

CPU = torch.device("cpu")
INF = torch.tensor(float("inf"))


def test_fp32_products_are_fp32_on_the_cpu():
    record = precision.set_switches(CPU, tf32=False, threads=1)
    assert record["verified"] == ["fp32_products"]
    assert record["fp32_precision"] == "ieee" and record["threads"] == 1
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


SWITCHES = {
    (torch.backends, "fp32_precision"): "tf32",
    (torch.backends.cuda.matmul, "fp32_precision"): "tf32",
    (torch.backends.cudnn.conv, "fp32_precision"): "tf32",
    (torch.backends.cudnn.rnn, "fp32_precision"): "tf32",
    (torch.backends.mkldnn.matmul, "fp32_precision"): "bf16",
    (torch.backends.mkldnn.conv, "fp32_precision"): "bf16",
    (torch.backends.mkldnn.rnn, "fp32_precision"): "bf16",
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"): True,
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"): True,
    (torch.backends.cuda.matmul, "allow_fp16_accumulation"): True,
    (torch.backends.cudnn, "benchmark"): True,
}
"""The switches of torch that change numerics, each with a value that no run may inherit."""


def test_no_switch_is_inherited():
    """What a library or an earlier run of the process left on is off afterwards, and recorded as off."""
    for (backend, name), value in SWITCHES.items():
        setattr(backend, name, value)
        assert getattr(backend, name) == value
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    record = precision.set_switches(CPU, tf32=False, threads=0)
    for (backend, name), value in SWITCHES.items():
        assert getattr(backend, name) == ("ieee" if isinstance(value, str) else False), (backend, name)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    off = {name: value for name, value in record.items() if name not in ("threads", "verified")}
    assert off.pop("fp32_precision") == "ieee" and set(off.values()) == {False} and len(off) == 5


def test_onednn_is_not_asked_to_round_products_to_bf16(capfd):
    """By its own log: a CPU with AMX rounds where it is asked to, any other computes in fp32 all the same."""

    def log_of_a_product() -> str:
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            torch.ones(64, 64) @ torch.ones(64, 64)
        return capfd.readouterr().out

    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = log_of_a_product()
    precision.set_switches(CPU, tf32=False, threads=0)
    assert "fpmath:bf16" not in log_of_a_product()
    if "fpmath:bf16" not in before:
        pytest.skip("this CPU's products do not go through oneDNN")


def test_the_proof_notices_a_product_that_rounds(monkeypatch):
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: whole(a.bfloat16(), b.bfloat16()).float())
    assert precision.tf32_rounds(CPU)
    with pytest.raises(precision.SwitchError, match="fp32_products"):
        precision.set_switches(CPU, tf32=False, threads=0)


def test_the_accumulation_proof_distinguishes_fp32_from_fp16_partial_sums(monkeypatch):
    assert precision.accumulates_in_fp32(CPU, torch.float32)

    def in_pieces(a, b):
        parts = [torch.mm(a[:, s : s + 4_096].float(), b[s : s + 4_096].float()).half() for s in range(0, a.shape[1], 4_096)]
        return torch.stack(parts).sum(0, dtype=torch.float16)

    monkeypatch.setattr(torch.Tensor, "__matmul__", in_pieces)
    assert not precision.accumulates_in_fp32(CPU, torch.float16)


def test_the_accumulation_proof_notices_a_single_element(monkeypatch):
    """A kernel may accumulate in fp16 at the edge of a tile only."""
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.zeros(64, 64).index_put_([torch.tensor(3)] * 2, INF))
    assert not precision.accumulates_in_fp32(CPU, torch.float16)


def test_the_accumulation_proof_allows_what_a_tensor_core_drops(monkeypatch):
    """Aligning 24 bits to the largest summand loses the last ones of a small one: that is no sum in fp16."""
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (whole(a.double(), b.double()) + 4_096.0).to(a.dtype))
    assert precision.accumulates_in_fp32(CPU, torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_switches_hold_on_the_gpu():
    gpu = torch.device("cuda")
    assert set(precision.set_switches(gpu, tf32=False, threads=0)["verified"]) == {"fp32_products", "fp16_accumulates_in_fp32"}
    precision.set_switches(gpu, tf32=True, threads=0)
    precision.set_switches(gpu, tf32=False, threads=0)


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


ON_CPU = [name for name, config in DTYPE_CONFIGS.items() if not config.tf32]


def made(plan, config, case="gpt2_clm"):
    settings = plan(case, config)
    data = load_run_data(settings)
    precision = Precision(settings.config, CPU, threads=1)
    model = precision.prepare(build_model(model_request(settings, data)))
    return precision, model, make_batches(settings, data).step(1)


@pytest.mark.parametrize("name", ON_CPU)
def test_weights_logits_and_gradients_have_the_declared_dtypes(plan, name):
    precision, model, batch = made(plan, name)
    config = DTYPE_CONFIGS[name]
    try:
        assert {p.dtype for p in model.parameters()} == {DTYPES[config.weights]}
        with precision.forward():
            logits = model(batch.input_ids, batch.attention_mask, batch.last_token)
        precision.check_logits(logits)
        assert logits.dtype == DTYPES[config.head]
        logits.float().sum().backward()
        assert {p.grad.dtype for p in model.parameters()} == {DTYPES[config.weights]}
        assert (precision.scaler is not None) == config.scaler
        assert precision.autocast_name == ("cpu" if config.autocast else None)
        assert precision.attention == "math"
    finally:
        precision.close()


def test_the_fp32_head_is_genuine(plan):
    """Its logits are fp32, differ from bf16's, and are nearer to an fp32 head on the same features."""
    logits = {}
    for name in ("amp_bf16", "amp_bf16_fp32_head"):
        precision, model, batch = made(plan, name)
        with precision.forward():
            logits[name] = model(batch.input_ids).detach()
    assert logits["amp_bf16"].dtype == torch.bfloat16 and logits["amp_bf16_fp32_head"].dtype == torch.float32
    assert not torch.equal(logits["amp_bf16"].float(), logits["amp_bf16_fp32_head"])
    assert not torch.equal(logits["amp_bf16_fp32_head"].bfloat16().float(), logits["amp_bf16_fp32_head"])
    with precision.forward():
        features = model.transformer(input_ids=batch.input_ids)[0].float()
    exact = features.double() @ model.transformer.wte.weight.double().T
    error = {name: (value.double() - exact).abs().max().item() for name, value in logits.items()}
    assert error["amp_bf16_fp32_head"] < 1e-5 < error["amp_bf16"]


SMALL_MAMBA2 = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "num_hidden_layers": 1}
MAMBA2 = Case(
    "mamba2_clm",
    "own",
    Architecture("mamba2", "Mamba-2", True, "", max_positions=512, sizes={"tiny": SMALL_MAMBA2 | {"chunk_size": 8}}),
    CLM,
    OWN_LEARNING_RATES,
)


def uncounted(*_, **__):
    raise Uncountable("not here")


@pytest.mark.parametrize("name", [name for name in ON_CPU if DTYPE_CONFIGS[name].head != "fp32"])
def test_a_model_that_widens_its_logits_runs_and_its_row_says_so(tmp_path, monkeypatch, name):
    """Mamba-2 returns ``lm_head(...).float()``: the loss gets what the head's product gave, in the declared dtype."""
    sizes = {"max_steps": 2, "batch_size": 2, "seq_len": 8, "documents": 400, "validation_documents": 4}
    asked = Request(preset="tiny", data="embedded", instrument="off", **sizes)
    settings, reached = plan_run(MAMBA2, DTYPE_CONFIGS[name], 0, asked, CPU), []
    monkeypatch.setattr("harness.run.step_flops.step_flops", uncounted)  # which would take longer than the run
    monkeypatch.setattr("harness.loop.training_loss", lambda x, *a, **o: reached.append(x) or training_loss(x, *a, **o))
    record = execute(settings, tmp_path)
    assert record.status == ("diverged" if name in ("fp16_naive", "fp16_naive_clip16") else "completed"), record.error
    assert record.logits_dtype == "fp32" and record.attention_backend == "none" and record.loss_initial > 7
    assert {x.dtype for x in reached} == {DTYPES[DTYPE_CONFIGS[name].head]}


def test_a_head_in_another_dtype_is_noticed_though_its_logits_are_fp32(plan):
    precision, model, _ = made(plan, "bf16_pure")
    model.head.model.lm_head = WideHead(model.head.model.lm_head.weight)
    precision.observe_head(model)
    with pytest.raises(SwitchError, match=r"logits are torch.float32 of a product in torch.float32, declared torch.bfloat16"):
        precision.check_logits(model(torch.zeros(1, 4, dtype=torch.int64)))


class WideHead(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden):
        return hidden.float() @ self.weight.float().T


def test_wrong_logits_are_noticed(plan):
    precision, _, _ = made(plan, "amp_bf16_fp32_head")
    with pytest.raises(SwitchError, match=r"amp_bf16_fp32_head: logits are torch.bfloat16"):
        precision.check_logits(torch.zeros(1, dtype=torch.bfloat16))


def test_the_scaler_multiplies_before_rounding_and_divides_in_the_measuring_pass(plan):
    def gradients(name):
        precision, model, batch = made(plan, name)
        optimizer = precision.make_optimizer(lr=1e-3, weight_decay=0.0, seed=0)
        scale = precision.loss_scale()
        with precision.forward():
            logits = model(batch.input_ids)
        loss = training_loss(
            logits, batch.targets, loss="cross_entropy", dtype=torch.float32, normalizer=batch.n_targets, loss_scale=scale
        )
        loss.backward()
        stats = precision.measure_gradients(optimizer)
        precision.close()
        grads = torch.cat([p.grad.flatten() for p in precision.parameters])
        assert stats.total_norm.item() == pytest.approx(grads.double().norm().item(), rel=1e-6)
        return scale, loss, grads

    scale, scaled_loss, scaled = gradients("amp_fp16")
    none, plain_loss, plain = gradients("amp_fp16_unscaled")
    assert scale.item() == 65_536.0 and none is None
    assert scaled_loss.item() == plain_loss.item()  # the loss itself is never scaled
    torch.testing.assert_close(scaled, plain, rtol=0.02, atol=1e-4)


def test_the_measuring_scaler_skips_and_backs_off_like_the_stock_one():
    def run(scaler_class):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        adamw = torch.optim.AdamW(layer.parameters())
        scaler = scaler_class("cpu", init_scale=1024.0)
        scaler.measured = list(layer.parameters())
        history = []
        for step in range(4):
            adamw.zero_grad()
            scaler.scale(layer(torch.ones(2, 4)).square().sum()).backward()
            if step == 1:
                layer.weight.grad[0, 0] = float("inf")
            scaler.unscale_(adamw)
            scaler.step(adamw)
            scaler.update()
            history.append((scaler.get_scale(), layer.weight.detach().clone()))
        return history

    for (scale, weight), (stock_scale, stock_weight) in zip(run(MeasuringGradScaler), run(torch.amp.GradScaler), strict=True):
        assert scale == stock_scale and torch.equal(weight, stock_weight)


def test_an_infinite_gradient_skips_the_update_and_halves_the_scale():
    precision = Precision(DTYPE_CONFIGS["amp_fp16"], CPU, threads=1)
    precision.close()
    (weight,) = precision.prepare(torch.nn.Linear(2, 1, bias=False)).parameters()
    optimizer = precision.make_optimizer(lr=0.1, weight_decay=0.0, seed=0)
    for gradient, moves, scale_after in ((float("inf"), False, 2.0**15), (1.0, True, 2.0**15), (float("nan"), False, 2.0**14)):
        precision.loss_scale()
        before, weight.grad = weight.detach().clone(), torch.full_like(weight, gradient)
        precision.measure_gradients(optimizer)
        precision.update(optimizer)
        assert torch.equal(weight, before) != moves and precision.loss_scale().item() == scale_after


def test_clipping_scales_to_the_norm_and_never_up(plan):
    precision, _, _ = made(plan, "fp32_true")
    for factor in (100.0, 1e-6):
        for p in precision.parameters:
            p.grad = torch.full_like(p, factor)
        before = torch.cat([p.grad.flatten() for p in precision.parameters]).double()
        precision.clip(before.norm(), 1.0)
        after = torch.cat([p.grad.flatten() for p in precision.parameters]).double()
        assert after.norm().item() == pytest.approx(min(1.0, before.norm().item()), rel=1e-5)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("name", ["fp32_true", "bf16_pure", "fp16_naive"])
def test_clipping_multiplies_by_an_fp32_factor(plan, monkeypatch, name, impl):
    """Gradients of every dtype times the same number, rounded once; 2^-30 is 0 in fp16, and 1/3 another number in bf16."""
    monkeypatch.setattr("harness.precision.scale_", partial(scale_, impl=impl))
    precision, _, _ = made(plan, name)
    precision.close()
    precision.parameters = precision.parameters[:3]
    for norm in (3.0, 2.0**30):
        for p in precision.parameters:
            p.grad = torch.randn_like(p) * 1e4
        factor = torch.tensor(1.0 / (norm + 1e-6), dtype=torch.float64).float()
        want = [(p.grad.double() * factor.double()).float().to(p.dtype) for p in precision.parameters]
        precision.clip(torch.tensor(norm, dtype=torch.float64), 1.0)
        assert all(torch.equal(p.grad, w) for p, w in zip(precision.parameters, want, strict=True))
        assert all(p.grad.count_nonzero() for p in precision.parameters)


def test_clipping_never_rounds_the_factor_to_16_bits(monkeypatch):
    """`torch._foreach_mul_` of CUDA, played on the CPU: there a factor on the device is first rounded to the tensors'
    dtype, so that 2^-26 is 0 in fp16. Only fp32 gradients may go through it."""

    def as_on_cuda(tensors, factor):
        for x in tensors:
            x.mul_(factor.to(x.dtype))

    monkeypatch.setattr(torch, "_foreach_mul_", as_on_cuda)
    monkeypatch.setattr("harness.precision.scale_", partial(scale_, impl="triton"))
    for name in ("fp32_true", "bf16_pure", "fp16_naive"):
        precision = Precision(DTYPE_CONFIGS[name], CPU, threads=1)
        precision.prepare(torch.nn.Linear(3, 2))
        precision.close()
        for p in precision.parameters:
            p.grad = torch.full_like(p, 2.0**13)
        precision.clip(torch.tensor(2.0**26), 1.0)
        for p in precision.parameters:
            assert p.grad.double().eq(2.0**-13).all(), name


def test_clipping_in_fp16_overflows_where_fp32_does_not(plan):
    """An fp16 norm is infinite and silently zeroes every gradient."""
    for name, survives in (("fp16_naive", True), ("fp16_naive_clip16", False)):
        precision, _, _ = made(plan, name)
        for p in precision.parameters:
            p.grad = torch.full_like(p, 100.0)
        exact = torch.cat([p.grad.flatten() for p in precision.parameters]).double().norm()
        norm = precision.clip(exact, 1.0)
        precision.close()
        assert bool(norm.isfinite()) == survives
        assert any(p.grad.ne(0).any() for p in precision.parameters) == survives


def test_fp16_on_this_cpu_is_recorded(plan):
    precision, _, _ = made(plan, "amp_fp16")
    precision.close()
    assert precision.flags["fp16_products"] in ("hardware", "fp32, rounded once to fp16")
    assert precision.flags["switches"]["fp32_precision"] == "ieee"


def test_tf32_does_not_exist_on_a_cpu():
    with pytest.raises(Unsupported, match="TF32 is a mode of NVIDIA tensor cores"):
        refuse_what_the_device_lacks(DTYPE_CONFIGS["fp32_tf32"], CPU)


def test_a_configuration_that_the_device_lacks_is_refused_before_any_switch_is_set(monkeypatch):
    monkeypatch.setattr(precision, "set_switches", lambda *_, **__: pytest.fail("switches were set"))
    with pytest.raises(Unsupported, match="TF32 is a mode"):
        Precision(DTYPE_CONFIGS["fp32_tf32"], CPU)


@pytest.mark.parametrize(
    ("capability", "refused"),
    [
        ((5, 2), {"fp16", "bf16", "tf32"}),
        ((5, 3), {"bf16", "tf32"}),
        ((7, 5), {"bf16", "tf32"}),
        ((8, 0), set()),
        ((9, 0), set()),
    ],
)
def test_a_gpu_refuses_what_its_generation_lacks(monkeypatch, capability, refused):
    monkeypatch.setattr(precision.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(precision.torch.cuda, "get_device_name", lambda device: "Some GPU")
    for config in DTYPE_CONFIGS.values():
        used = {config.weights, config.compute, config.head} | ({"tf32"} if config.tf32 else set())
        lacks = used & refused
        if lacks:
            with pytest.raises(Unsupported, match="Some GPU"):
                refuse_what_the_device_lacks(config, torch.device("cuda"))
        else:
            refuse_what_the_device_lacks(config, torch.device("cuda"))


def test_the_plan_names_a_missing_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from harness.planning import choose_device
    from harness.settings import SettingsError

    with pytest.raises(SettingsError, match="torch sees no GPU here"):
        choose_device("cuda")


def test_compiled_fp16_on_this_cpu_is_refused_not_emulated():
    if fp16_products.cpu_has_fp16_arithmetic():
        pytest.skip("this CPU multiplies fp16")
    with pytest.raises(Unsupported, match="run without --compile"):
        Precision(DTYPE_CONFIGS["amp_fp16"], CPU, compiled=True)


def test_an_attention_backend_that_cannot_serve_is_unsupported_and_other_errors_are_not():
    precision = Precision(DTYPE_CONFIGS["fp32_true"], CPU, threads=1)
    with pytest.raises(Unsupported, match="math attention backend cannot run fp32.*--sdpa"), precision.forward():
        raise RuntimeError("No available kernel. Aborting execution.")
    with pytest.raises(RuntimeError, match="shapes"), precision.forward():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("hardware", [True, False])
def test_products_stand_in_for_those_of_fp16_just_where_the_cpu_has_none(monkeypatch, hardware):
    installed, install = [], fp16_products.install
    monkeypatch.setattr(fp16_products, "cpu_has_fp16_arithmetic", lambda: hardware)
    monkeypatch.setattr(fp16_products, "install", lambda: installed.append(install()) or installed[-1])
    made = Precision(DTYPE_CONFIGS["amp_fp16"], torch.device("cpu"), threads=1)
    made.close()
    assert len(installed) == (not hardware)
    assert made.flags["fp16_products"] == ("hardware" if hardware else "fp32, rounded once to fp16")


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("model name\t: fphp\nflags\t\t: fpu sse2 avx512_fp16\n", True),
        ("Features\t: fp asimd asimdhp\n", True),
        ("model name\t: amx_fp16 fphp\nflags\t\t: fpu sse2 avx2 f16c\n", False),
    ],
)
def test_fp16_arithmetic_is_read_from_the_flags_of_the_cpu(monkeypatch, cpuinfo, found):
    monkeypatch.setattr(fp16_products.Path, "read_text", lambda path: cpuinfo)
    assert fp16_products.cpu_has_fp16_arithmetic() is found
