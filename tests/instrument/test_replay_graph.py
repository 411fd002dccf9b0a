"""The rule that finds the culprit, on graphs written down by hand."""

import pytest

from instrument.replay.graph import NAN, NEG_INF, POS_INF, Edge, Node, StepGraph


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
                constant=constant,
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
    for name in "abcde":
        edge = b.op(name, [edge])
    assert [n.op for n in b.graph.ancestors(edge, 3)] == ["e", "d", "c"]
