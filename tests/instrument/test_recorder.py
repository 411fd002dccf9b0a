"""The recorder puts every op into its phase and module; the rule finds the culprit on graphs written down by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from instrument.replay.graph import NAN, NEG_INF, POS_INF, Edge, Node, StepGraph
from instrument.replay.ops import kinds_of
from instrument.replay.recorder import OpRecorder


class Builder:
    """``op(name, reads=[...], kinds=0)`` adds a node and returns its edge as others read it."""

    def __init__(self):
        self.graph = StepGraph()

    def op(self, name, reads=(), kinds=0, phase="forward", module=None, constant=False):
        index = len(self.graph.nodes)
        self.graph.add(
            Node(
                index=index,
                op=name,
                phase=phase,
                module=module or name,
                microbatch=0,
                inputs=tuple(reads),
                storage=100 + index,
                kinds=kinds,
                dtype="float16",
                shape=(2,),
                constant=kinds if constant else 0,
            )
        )
        return Edge(index, 100 + index, kinds)


OUTSIDE = Edge(None, 1, 0)


def test_the_earliest_op_with_finite_inputs_is_named_and_what_it_spread_to():
    b = Builder()
    fine = b.op("embed", [OUTSIDE])
    bad = b.op("addmm", [fine], POS_INF)
    nan = b.op("norm", [bad], NAN)
    loss = b.op("loss", [nan], NAN)
    culprit = b.graph.culprit([loss])
    assert culprit.node.op == "addmm"
    assert [n.op for n in culprit.chain] == ["addmm", "norm", "loss"] and culprit.spread == 3


def test_finite_values_have_no_culprit():
    b = Builder()
    assert b.graph.culprit([b.op("loss", [b.op("embed", [OUTSIDE])])]) is None


def test_an_infinity_that_died_out_is_absorbed_and_not_blamed():
    b = Builder()
    x = b.op("fc", [OUTSIDE])
    cube = b.op("pow", [x], POS_INF, module="act")
    out = b.op("tanh", [cube], module="act")  # tanh(inf) = 1
    late = b.op("proj", [out], POS_INF)
    culprit = b.graph.culprit([b.op("loss", [late], NAN)])
    assert culprit.node.op == "proj" and [n.op for n in culprit.absorbed] == ["pow"]


def test_a_gradient_leads_back_through_what_was_saved_for_backward():
    b = Builder()
    bad = b.op("exp", [OUTSIDE], POS_INF)
    loss = b.op("loss", [b.op("clamp", [bad])])
    seed = b.op("ones", [loss], phase="backward")
    gradient = b.op("exp_backward", [seed, bad], NAN, phase="backward")  # 0 * inf, from the saved output
    culprit = b.graph.culprit([gradient])
    assert culprit.node.op == "exp" and culprit.node.phase == "forward"


def test_masks_hold_minus_infinity_on_purpose():
    b = Builder()
    mask = b.op("masked_fill", [OUTSIDE], NEG_INF, constant=True)
    wider = b.op("expand_copy", [mask], NEG_INF)
    scores = b.op("bmm", [OUTSIDE], POS_INF)
    added = b.op("add", [scores, wider], NAN)
    assert b.graph.culprit([b.op("softmax", [added], NAN)]).node.op == "bmm"


def test_a_row_that_is_masked_altogether_is_the_softmaxs_fault():
    b = Builder()
    mask = b.op("masked_fill", [OUTSIDE], NEG_INF, constant=True)
    added = b.op("add", [b.op("bmm", [OUTSIDE]), mask], NEG_INF)
    culprit = b.graph.culprit([b.op("softmax", [added], NAN)])
    assert culprit.node.op == "softmax" and not culprit.absorbed


def test_minus_infinity_that_nobody_wrote_down_is_followed_where_nothing_stronger_explains():
    b = Builder()
    overflow = b.op("addmm", [OUTSIDE], NEG_INF)
    assert b.graph.culprit([b.op("norm", [overflow], NAN)]).node.op == "addmm"


def test_a_nan_explains_before_a_minus_infinity_does():
    """-inf may be a mask that nobody recognised, NaN never is: so the NaN's producer is named, though it ran later."""
    b = Builder()
    low = b.op("log", [OUTSIDE], NEG_INF)
    nan = b.op("rsqrt", [OUTSIDE], NAN)
    added = b.op("add", [low, nan], NAN | NEG_INF)
    culprit = b.graph.culprit([b.op("loss", [added], NAN)])
    assert culprit.node.op == "rsqrt" and [n.op for n in culprit.absorbed] == ["log"]


@pytest.mark.parametrize("kinds", [NAN, POS_INF, NAN | NEG_INF])
def test_nan_and_plus_infinity_explain_before_minus_infinity_even_an_earlier_one(kinds):
    b = Builder()
    minus = b.op("log", [OUTSIDE], NEG_INF)
    strong = b.op("bmm", [OUTSIDE], kinds)
    assert b.graph.culprit([b.op("add", [minus, strong], NAN)]).node.op == "bmm"


def test_meant_infinities_are_named_only_where_nothing_else_went_wrong():
    b = Builder()
    limit = b.op("full", (), POS_INF, constant=True)
    product = b.op("mul", [OUTSIDE], POS_INF)
    assert b.graph.culprit([b.op("minimum", [limit, product], POS_INF)]).node.op == "mul"
    alone = b.op("expand_copy", [limit], POS_INF)
    assert b.graph.culprit([b.op("sum", [alone], POS_INF)]).node.op == "full"
    assert b.graph.culprit([b.op("sum", [alone], POS_INF), b.op("log", [OUTSIDE], NEG_INF)]).node.op == "log"


def test_a_mask_s_infinity_that_is_passed_on_is_followed_and_nan_of_it_is_not():
    b = Builder()
    mask = b.op("masked_fill", [OUTSIDE], NEG_INF, constant=True)
    assert b.graph.culprit([b.op("mean", [mask], NEG_INF)]).node.op == "masked_fill"
    assert b.graph.culprit([b.op("softmax", [mask], NAN)]).node.op == "softmax"


def test_plus_infinity_that_was_written_down_explains_before_a_mask():
    b = Builder()
    mask = b.op("scalar_tensor", [OUTSIDE], NEG_INF, constant=True)
    factor = b.op("mul", [OUTSIDE], POS_INF, constant=True)
    assert b.graph.culprit([b.op("add", [mask, factor], NAN)]).node.op == "mul"
    b.graph.nodes[factor.writer].kinds = factor.kinds = NEG_INF  # x * inf, where all of x is negative: no mask
    assert b.graph.culprit([b.op("layer_norm", [factor], NAN)]).node.op == "mul"


def test_an_infinity_in_a_weight_is_a_fault_and_in_a_buffer_meant():
    b = Builder()
    weight, buffer = Edge(None, 7, POS_INF, given=False), Edge(None, 8, POS_INF)
    product = b.op("mul", [OUTSIDE], POS_INF)
    assert b.graph.culprit([b.op("min", [buffer, product], POS_INF)]).node.op == "mul"
    assert b.graph.culprit([b.op("min", [weight, product], POS_INF)]).storage == 7
    assert b.graph.culprit([b.op("min", [buffer], POS_INF)]).storage == 8


def test_of_several_failures_the_first_in_execution_is_named():
    b = Builder()
    gradient = b.op("mul", [OUTSIDE], POS_INF, phase="backward")
    loss = b.op("log", [OUTSIDE], NAN)
    assert b.graph.culprit([loss, gradient]).node.op == "mul"


def test_a_mask_that_is_handed_in_is_no_fault_and_a_nan_that_is_handed_in_is():
    b = Builder()
    handed_mask, handed_nan = Edge(None, 7, NEG_INF), Edge(None, 8, NAN)
    softmax = b.op("softmax", [b.op("add", [OUTSIDE, handed_mask], NEG_INF)])
    assert b.graph.culprit([softmax]) is None
    culprit = b.graph.culprit([b.op("mul", [handed_nan], NAN)])
    assert culprit.node is None and culprit.storage == 8 and culprit.spread == 1


@pytest.mark.parametrize("n", [1, 3])
def test_producers_that_fail_alike_are_counted(n):
    b = Builder()
    updates = [b.op("addcdiv", [OUTSIDE], NAN, phase="optimizer", module=f"m{i}") for i in range(n)]
    culprit = b.graph.culprit(updates)
    assert culprit.node.module == "m0" and culprit.alike == n - 1


def test_ancestors_come_newest_first_and_stop_at_the_limit():
    b = Builder()
    edge = OUTSIDE
    for name in "abcdef":
        edge = b.op(name, [edge])
    assert [n.op for n in b.graph.ancestors(b.graph.nodes[-1], 3)] == ["e", "d", "c"]


def record(model, run, optimizer=None, **options):
    recorder = OpRecorder(model, optimizer, **options)
    with recorder.recording():
        run(recorder)
    return recorder


def ops(recorder, phase):
    return [(n.op, n.module) for n in recorder.graph.nodes if n.phase == phase]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ((1.0, -2.0), 0),
        ((float("nan"), 1.0), NAN),
        ((float("-inf"), 0.0), NEG_INF),
        ((float("inf"), float("-inf"), float("nan")), 7),
        ((float("inf"),), POS_INF),
    ],
)
def test_the_kinds_of_a_tensor(dtype, values, kinds):
    assert kinds_of(torch.tensor(values).to(dtype)) == kinds
    assert kinds_of(torch.tensor([1, 2])) == 0 and kinds_of(torch.empty(0)) == 0


def test_forward_backward_and_optimizer_ops_have_their_phase_and_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step(recorder):
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    recorder = record(model, step, optimizer)
    assert ops(recorder, "forward")[:3] == [("aten.ones", None), ("aten.addmm", "0"), ("aten.tanh", "1")] or ops(
        recorder, "forward"
    )[:3] == [("aten.addmm", "0"), ("aten.tanh", "1"), ("aten.addmm", "2")]
    assert ("aten.mean", None) in ops(recorder, "loss")
    backward = ops(recorder, "backward")
    assert backward.index(("aten.tanh_backward", "1")) > backward.index(("aten.mm", "2"))
    assert {module for op, module in backward if op == "aten.mm"} == {"0", "2"}
    assert any(op == "aten._foreach_norm" for op, _ in ops(recorder, "clip"))
    addcdiv = [n for n in recorder.graph.nodes if n.op == "aten._foreach_addcdiv_"]
    assert [n.module for n in addcdiv] == ["0", "0", "2", "2"] and [n.element for n in addcdiv] == [0, 1, 2, 3]
    assert {recorder.names[n.storage] for n in addcdiv} == {(name, "param") for name, _ in model.named_parameters()}


def test_a_checkpointed_module_is_named_in_backward_and_counts_as_one_micro_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Model()
    recorder = record(model, lambda _: model(torch.ones(2, 4)).sum().backward())
    again = [n for n in recorder.graph.nodes if n.phase == "backward" and n.op == "aten.addmm"]
    assert again and again[0].module == "inner.0"
    assert {n.microbatch for n in recorder.graph.nodes} - {None} == {0}


def test_micro_batches_are_counted_and_evaluations_are_not():
    model = nn.Linear(2, 1)

    def step(recorder):
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            with torch.no_grad():
                model(torch.ones(1, 2))

    recorder = record(model, step)
    assert {n.microbatch for n in recorder.graph.nodes if n.phase == "backward"} == {0, 1}


def test_only_the_failed_position_of_a_list_op_is_named():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=True)

    def step(recorder):
        model(torch.ones(1, 2)).sum().backward()
        model[1].weight.grad.fill_(torch.finfo(torch.float32).max)
        model[1].weight.data.fill_(-torch.finfo(torch.float32).max)
        optimizer.step()

    recorder = record(model, step, optimizer)
    culprit = recorder.graph.culprit(recorder.failed["param"])
    assert culprit.node.module == "1" and culprit.node.phase == "optimizer" and culprit.alike == 0


def test_writing_a_part_keeps_what_the_rest_came_from():
    model = nn.Linear(2, 2)

    def step(recorder):
        x = model(torch.ones(2, 2))
        whole = torch.zeros(4)
        whole[0:2] = torch.log(-x[0].abs())  # NaN
        whole[2:4] = x[1]
        recorder.loss(whole.sum())

    recorder = record(model, step)
    assert recorder.graph.culprit(recorder.failed["loss"]).node.op == "aten.log"


def test_memory_that_nobody_has_written_is_not_blamed():
    model = nn.Linear(2, 2)

    def step(recorder):
        scratch = torch.empty(4)
        torch.full((4,), float("nan"), out=torch.empty(4))
        scratch.copy_(torch.ones(4))
        recorder.loss(model(scratch.view(2, 2)).sum() / 0.0)

    recorder = record(model, step)
    assert recorder.graph.culprit(recorder.failed["loss"]).node.op == "aten.div"


def test_the_second_pass_keeps_what_the_op_read_before_it_wrote():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=True)
    start = [p.detach().clone() for p in model.parameters()]

    def step(recorder):
        for p, value in zip(model.parameters(), start, strict=True):
            p.data.copy_(value)
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    first = record(model, step, optimizer)
    update = next(n for n in first.graph.nodes if n.phase == "optimizer" and n.element == 1)
    second = record(model, step, optimizer, capture=frozenset([update.index]))
    func, args, _ = second.captured[update.index]
    assert func._schema.name == "aten::_foreach_add_"
    assert torch.equal(args[0][0], start[1]) and len(args[0]) == 1 and not torch.equal(model.bias, start[1])


def test_no_hook_stays():
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="boom"):
        record(model, lambda _: (_ for _ in ()).throw(RuntimeError("boom")), optimizer, scaler=scaler)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert "unscale_" not in vars(scaler)
