"""A model without a mask neither waits for the device nor attends through one that hides nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig

from bench_cases import ARCHITECTURES, TASKS
from bench_cases.models import ModelRequest, build_model
from bench_cases.own import case_for_model

VOCABULARY, LENGTH = 1_000, 12
WAITS = frozenset({"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"})
CASES = [("gpt2", "clm"), ("gpt2", "multi_cls"), ("roberta", "mlm"), ("roberta", "single_cls")]


def built(arch, task):
    outputs = 7 if task.endswith("cls") else None
    return build_model(
        ModelRequest(
            ARCHITECTURES[arch],
            TASKS[task],
            "tiny",
            VOCABULARY,
            pad_id=1,
            bos_id=0,
            eos_id=2,
            outputs=outputs,
            weights="scratch",
            dropout=0.0,
            seed=0,
        )
    )


def batch():
    return torch.randint(3, VOCABULARY, (2, LENGTH)), None, torch.tensor([3, LENGTH - 1])


class ReadBack(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: numbers read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func._schema.name.partition("::")[2] in WAITS
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_a_number_that_is_read():
    with ReadBack() as counter:
        assert torch.ones(2).all()
    assert counter.waits == 1


@pytest.mark.parametrize(("arch", "task"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_no_pass_reads_a_number_back(arch, task, padded):
    model, (ids, mask, last) = built(arch, task), batch()
    if padded and arch == "roberta":
        mask = (torch.arange(LENGTH) < torch.tensor([[9], [LENGTH]]))[:, None, None, :]
    with ReadBack() as counter:
        model(ids, mask, last).sum().backward()
    assert counter.waits == 0


@pytest.mark.parametrize(("arch", "task"), [("gpt2", "clm"), ("roberta", "mlm")])
def test_a_compiled_model_attends_without_a_mask(arch, task):
    seen = []

    def record(graph, inputs):
        seen.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    model = built(arch, task)
    torch.compile(model, backend=record)(*batch())
    assert len(seen) == 2 and all(node.kwargs["attn_mask"] is None for node in seen)
    assert {node.kwargs["is_causal"] for node in seen} == {arch == "gpt2"}


def test_a_window_that_hides_something_is_kept(tmp_path):
    """Mistral's sliding window: the last token of one layer sees the last four and no more."""
    MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=4,
    ).save_pretrained(tmp_path)
    case = case_for_model(str(tmp_path), "clm")
    model = build_model(ModelRequest(case.architecture, case.task, "tiny", VOCABULARY, 1, 0, 2, None, "scratch", 0.0, 0))
    ids = torch.randint(5, VOCABULARY, (1, LENGTH))
    for changed, sees in ((LENGTH - 2, True), (LENGTH - 4, True), (LENGTH - 5, False), (0, False)):
        other = ids.clone()
        other[0, changed] = 5 + (other[0, changed] + 1) % 900
        assert torch.equal(model(ids)[0, -1], model(other)[0, -1]) != sees
