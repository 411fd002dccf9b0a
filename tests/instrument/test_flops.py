"""Counting: equal to the closed form and to torch's own counter, right by module, and never silently short."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel

from instrument.flop_counter import ModelCounter, Uncountable
from instrument.flops import (
    CLOSED_FORMS,
    LengthPolynomial,
    ProductDtypes,
    RowFlops,
    Sizes,
    StepFlops,
    fit,
    product_dtypes,
    sizes_of,
)
from kernels import bce_with_logits, cross_entropy

pytestmark = pytest.mark.slow

FP32 = ProductDtypes("fp32", "fp32", "fp32")
FEW, ODD = st.integers(1, 3), st.integers(1, 40)


class Model(nn.Module):
    """Called as the harness calls its models: an encoder, a pooling rule, a head."""

    def __init__(self, encoder, head, pooled):
        super().__init__()
        self.encoder, self.head, self.pooled = encoder, head, pooled

    def forward(self, input_ids, attention_mask=None, last_token=None):
        hidden = self.encoder(input_ids)
        hidden = hidden if torch.is_tensor(hidden) else hidden[0]
        return self.head(hidden[:, 0] if self.pooled else hidden)


class Branches(nn.Module):
    """What real models do: a module called twice, one that returns its input, a branch that is dropped,
    in-line products between modules, and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice, self.gate, self.dropped = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.off, self.conv = nn.Dropout(0.5), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids):
        x = self.embed(ids)
        self.dropped(x)
        x = self.off(self.twice(torch.tanh(self.twice(x))))
        x = x * torch.sigmoid(self.gate(x)) + torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def branches():
    return Model(Branches(), nn.Linear(6, 5), pooled=False)


def total(products):
    return sum(p.flops for p in products)


def torchs_own_count(model, rows, length):
    with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
        model.eval()(torch.zeros(rows, length, dtype=torch.int64)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 4), (3, 7)])
def test_the_total_is_torchs_own_on_real_tensors(shape):
    assert total(ModelCounter(branches()).count(*shape)) == torchs_own_count(branches(), *shape)


def test_every_product_belongs_to_the_module_that_ran_it():
    found = {(p.module, p.kind): p for p in ModelCounter(branches()).count(2, 4)}
    forward = {key: p.forward_flops for key, p in found.items()}
    assert forward == {
        ("encoder.dropped", "projection"): 2 * 8 * 36,
        ("encoder.twice", "projection"): 2 * 2 * 8 * 36,
        ("encoder.gate", "projection"): 2 * 8 * 36,
        ("encoder", "attention"): 2 * 2 * 2 * 4 * 4 * 6,
        ("encoder.conv", "projection"): 2 * 3 * 8 * 36,
        ("head", "projection"): 2 * 8 * 6 * 5,
    }
    backward = {key: p.backward_flops for key, p in found.items()}
    assert backward.pop(("encoder.dropped", "projection")) == 0  # its output goes nowhere
    assert backward == {key: 2 * forward[key] for key in backward}


class Convolved(nn.Module):
    """Tokens as a picture of ``channels`` x 4 x (length / 4), or a line of ``channels`` x length, and a convolution over it."""

    def __init__(self, convolution):
        super().__init__()
        self.channels, self.plane = convolution.in_channels, isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
        self.embed, self.conv = nn.Embedding(11, self.channels), convolution

    def forward(self, ids):
        picture = self.embed(ids).transpose(1, 2)
        return self.conv(picture.unflatten(-1, (4, -1)) if self.plane else picture).flatten(2).transpose(1, 2)


def by_matrix_products(conv, x):
    """The convolution's output as one matrix product a group of the input's patches (transposed: of the output's)."""
    x, weight = (x, conv.weight) if x.ndim == 4 else (x.unsqueeze(2), conv.weight.unsqueeze(2))

    def pair(values, first):
        return (first, *values)[-2:]

    patches = dict(
        kernel_size=pair(conv.kernel_size, 1),
        dilation=pair(conv.dilation, 1),
        padding=pair(conv.padding, 0),
        stride=pair(conv.stride, 1),
    )
    groups, expected = conv.groups, conv(x if conv.weight.ndim == 4 else x.squeeze(2)).detach()
    if conv.transposed:
        matrix = weight.unflatten(0, (groups, -1)).flatten(2).transpose(1, 2)
        columns = (matrix @ x.flatten(2).unflatten(1, (groups, -1))).flatten(1, 2)
        out = F.fold(columns, expected.shape[2:] if expected.ndim == 4 else (1, expected.shape[-1]), **patches)
    else:
        columns = F.unfold(x, **patches).unflatten(1, (groups, -1))
        out = (weight.unflatten(0, (groups, -1)).flatten(2) @ columns).flatten(1, 2)
    torch.testing.assert_close(out.flatten(2), expected.flatten(2), rtol=1e-4, atol=1e-5)
    return out


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("channels", "out", "more"),
    [
        (6, 4, {}),
        (6, 6, {"groups": 6, "padding": 2}),  # depthwise, as a Mamba's
        (6, 12, {"groups": 3, "stride": 2, "padding": 1}),
        (4, 6, {"groups": 2, "dilation": 2, "stride": 3, "padding": 2}),
    ],
)
def test_a_convolution_costs_its_matrix_products_forward_and_backward(kind, channels, out, more):
    convolved = Convolved(kind(channels, out, 3, bias=False, **more))
    if convolved.conv.transposed and more.get("stride"):
        convolved.conv.output_padding = (1,) * (2 if convolved.plane else 1)
    for inputs in (True, False):  # with and without the gradient of the input
        convolved.embed.requires_grad_(inputs)
        counted = {p.module: p for p in ModelCounter(Model(convolved, nn.Identity(), pooled=False)).count(2, 32)}[
            "encoder.conv"
        ]
        x = torch.randn(2, channels, *((4, 8) if convolved.plane else (32,)), requires_grad=inputs)
        with FlopCounterMode(display=False) as forward:
            out = by_matrix_products(convolved.conv, x)
        forward = forward.get_flop_counts()["Global"]
        forward = sum(flops for op, flops in forward.items() if "mm" in str(op))
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert (counted.forward_flops, counted.backward_flops) == (forward, backward.get_total_flops())
    assert counted.kind == "projection"


def test_batched_products_without_a_softmax_are_no_attention():
    """As a state-space model's: its output is a batched product of states."""

    class Scan(Branches):
        def forward(self, ids):
            x = self.embed(ids)
            return x.unsqueeze(-1) @ x.unsqueeze(-2) @ self.twice(x).unsqueeze(-1)

    class Halves(nn.Module):  # the softmax is a module of its own, as DeBERTa's once was
        def __init__(self):
            super().__init__()
            self.embed, self.softmax = nn.Embedding(11, 6), nn.Softmax(-1)

        def forward(self, ids):
            x = self.embed(ids)
            return self.softmax(x @ x.transpose(1, 2)) @ x

    for encoder, kinds in ((Scan, {"projection"}), (Halves, {"attention"})):
        products = ModelCounter(Model(encoder(), nn.Identity(), pooled=False)).count(2, 4)
        assert {p.kind for p in products if p.module == "encoder"} == kinds, encoder


def test_frozen_weights_cost_what_they_run():
    model = branches()
    model.encoder.requires_grad_(False)
    assert [p.backward_flops for p in ModelCounter(model).count(1, 4) if p.part != "head"] == [0] * 5
    (head,) = (p for p in ModelCounter(model).count(1, 4) if p.part == "head")
    assert head.backward_flops == head.forward_flops  # the gradient of its weight only


def test_hooks_of_a_watch_are_not_run_and_not_copied():
    model, seen = branches(), []
    model.head.register_forward_hook(lambda *_: seen.append("forward"))
    model.encoder.register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True)
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert total(ModelCounter(model).count(1, 4)) == total(ModelCounter(branches()).count(1, 4)) and not seen
    assert len(model.head._forward_hooks) == 1


def test_the_model_itself_is_left_alone():
    model = branches().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ModelCounter(model, valid_outputs=3).count(2, 4)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=15, deadline=None)
@given(
    layers=FEW,
    heads=FEW,
    depth=st.integers(1, 9),
    inner=ODD,
    outputs=ODD,
    rows=FEW,
    length=st.integers(1, 16),
    architecture=st.sampled_from(["gpt2", "roberta"]),
    pooled=st.booleans(),
)
def test_closed_form_equals_count_at_random_sizes(layers, heads, depth, inner, outputs, rows, length, architecture, pooled):
    width = heads * depth
    if architecture == "gpt2":
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_inner=inner, vocab_size=50, n_positions=16)
        encoder, head = GPT2Model(config), nn.Linear(width, outputs)
    else:
        config = RobertaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=inner,
            vocab_size=50,
            max_position_embeddings=18,
        )
        encoder = RobertaModel(config, add_pooling_layer=False)
        head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, outputs))
    task = "single_cls" if pooled else {"gpt2": "clm", "roberta": "mlm"}[architecture]
    row = CLOSED_FORMS[architecture, task](sizes_of(config, outputs))
    flops = StepFlops(row, ProductDtypes("fp32", "bf16", "fp16"), True, "closed form").of(rows, length)
    products = ModelCounter(Model(encoder, head, pooled)).count(rows, length)
    for dtype, part in (("fp32", "encoder"), ("bf16", "attention"), ("fp16", "head")):
        assert flops[dtype] == sum(p.flops for p in products if p.part == part)


def test_the_full_gpt2_costs_what_its_parameters_say():
    """6 N + 12 L H Q T of PaLM's appendix B, N the weights of all products (no biases, norms, positions)."""
    layers, width, vocabulary, length = 12, 768, 50_257, 1_024
    row = CLOSED_FORMS["gpt2", "clm"](Sizes(layers, width, 4 * width, vocabulary))
    weights = layers * 12 * width**2 + vocabulary * width
    assert sum(row(length)) == length * (6 * weights + 12 * layers * width * length)


def test_pad_columns_are_cut_and_a_head_that_hides_them_is_refused():
    whole, cut = (total(ModelCounter(branches(), valid_outputs=n).count(1, 4)) for n in (5, 3))
    assert whole - cut == 3 * 2 * 4 * 6 * 2
    hidden = branches()
    hidden.head = nn.Sequential(nn.Linear(6, 5), nn.Upsample(size=8))
    with pytest.raises(Uncountable, match="8 columns, of which 3"):
        ModelCounter(hidden, valid_outputs=3).count(1, 4)


def test_a_head_as_wide_as_its_padded_vocabulary_is_cut_at_its_last_layer():
    model = branches()
    model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert {p.module: p.forward_flops for p in ModelCounter(model, valid_outputs=4).count(1, 1) if p.part == "head"} == {
        "head.0": 72,
        "head.1": 48,
    }


@torch.library.custom_op("ddb_test::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1


shift.register_fake(torch.empty_like)
shift.register_autograd(lambda ctx, grad: grad)


def test_an_op_without_a_formula_is_named_not_counted_as_nothing():
    model = branches()
    model.head = nn.Sequential(model.head)
    model.head[0].forward = lambda x: shift(x)
    with pytest.raises(Uncountable, match="ddb_test.shift has no FLOP formula"):
        ModelCounter(model).count(1, 4)
    register_flop_formula(torch.ops.ddb_test.shift)(lambda *_, **__: 7)
    (head,) = (p for p in ModelCounter(model).count(1, 4) if p.part == "head")
    assert head.forward_flops == 7


def test_a_grouped_product_without_a_formula_is_named_too():
    model = branches()
    weights = torch.ones(2, 16, 16, dtype=torch.bfloat16)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    model.head.forward = lambda x: torch._grouped_mm(
        F.pad(x[0], (0, 10)).bfloat16(), weights.to(x.device), offs=ends.to(x.device)
    )
    with pytest.raises(Uncountable, match="mm has no FLOP formula"):
        ModelCounter(model).count(1, 4)


def test_a_model_that_asks_for_values_is_uncountable_with_the_reason():
    model = branches()
    model.head.forward = lambda x: x * x.sum().item()
    with pytest.raises(Uncountable, match="depends on values that it reads back"):
        ModelCounter(model).count(1, 4)


def test_attention_is_counted_whatever_backend_is_pinned():
    """The CPU's flash kernel counts 0 in torch's counter (pytorch#195460); without data there is no such kernel."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16, attn_implementation="sdpa")
    model = Model(GPT2Model(config), nn.Linear(8, 3), pooled=False)
    expected = CLOSED_FORMS["gpt2", "clm"](Sizes(1, 8, 32, 3))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel([backend]):
            assert total(ModelCounter(model).count(2, 16)) == 2 * sum(expected(16))


def test_the_fused_losses_are_no_model_flops():
    logits = torch.randn(4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(logits, torch.arange(4), normalizer=4).backward()
        bce_with_logits(logits, torch.ones(4, 8), normalizer=32).backward()
    assert counter.get_total_flops() == 0


@given(st.tuples(*[st.integers(0, 10**15)] * 3), st.sets(st.integers(1, 4096), min_size=4, max_size=6))
def test_a_polynomial_is_found_again_exactly(coefficients, lengths):
    true = LengthPolynomial(*coefficients)
    assert fit({length: true(length) for length in lengths}) == true
    bent = {length: true(length) + (length == max(lengths)) for length in lengths}
    assert fit(bent) is None


def test_three_lengths_prove_no_polynomial():
    with pytest.raises(ValueError, match="at least 4"):
        fit({1: 1, 2: 2, 3: 3})


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_real_flops_are_the_sums_of_l_and_of_l_squared(lengths):
    flops = StepFlops(
        RowFlops(LengthPolynomial(0, 7), LengthPolynomial(0, 0, 4), LengthPolynomial(5)),
        ProductDtypes("bf16", "bf16", "fp32"),
        True,
        "planted",
    )
    assert flops.real(lengths) == {"bf16": 7 * sum(lengths) + 4 * sum(n * n for n in lengths), "fp32": 5 * len(lengths)}
    longest, rows = max(lengths), len(lengths)
    assert flops.real([longest] * rows) == flops.of(rows, longest)  # nothing padded
    assert flops.of(rows, longest)["bf16"] == sum(flops.of(1, longest)["bf16"] for _ in lengths)  # micro-batches of 1
    assert flops.causal_half(rows, longest) == sum(flops.of(rows, longest).values()) - rows * 2 * longest**2


def test_half_is_for_causal_attention_and_known_polynomials_only():
    row = RowFlops(LengthPolynomial(0, 7), LengthPolynomial(0, 0, 4), LengthPolynomial())
    window = RowFlops(LengthPolynomial(0, 7), LengthPolynomial(0, 64), LengthPolynomial())
    assert StepFlops(row, FP32, True, "").causal_half(2, 8) == 2 * (7 * 8 + 2 * 64)
    assert StepFlops(row, FP32, False, "").causal_half(2, 8) is None
    assert StepFlops(window, FP32, True, "").causal_half(2, 8) is None
    assert StepFlops(lambda length: (length, 0, 0), FP32, True, "").causal_half(2, 8) is None


def test_a_count_at_every_length_is_made_once_a_length():
    asked = []
    flops = StepFlops(lambda length: (asked.append(length) or length, 0, 1), FP32, False, "counted")
    assert flops.real([4, 8, 4]) == {"fp32": 19} and flops.of(2, 8) == {"fp32": 18} and asked == [4, 8]


def test_which_products_run_in_which_dtype():
    assert product_dtypes("fp32", "fp32", tf32=True, attention="math") == ("tf32", "tf32", "tf32")
    assert product_dtypes("bf16", "fp32", tf32=False, attention="efficient") == ("bf16", "bf16", "fp32")
    assert product_dtypes("fp16", "fp16", tf32=False, attention="math") == ("fp16", "fp32", "fp16")  # it widens them
    assert product_dtypes("fp16", "fp16", tf32=False, attention="eager") == ("fp16", "fp16", "fp16")
