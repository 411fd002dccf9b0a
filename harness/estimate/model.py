"""One micro-batch on fake tensors: what the model is, and what autograd keeps."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench_cases.models import ModelRequest, build_model, padded_vocabulary
from harness.loss import training_loss
from harness.precision import Precision
from harness.run import load_run_data, model_request
from harness.settings import RunSettings

HUB_VOCABULARIES = {"gpt2": 50_258, "roberta": 50_265}
HUB_LABELS = 100
"""lex_glue's EUR-Lex. A dry run downloads nothing, so these stand for the hub's data."""


@dataclass(frozen=True)
class DataFacts:
    """What the model's shape takes from the data; ``source`` says whether that is known or assumed."""

    vocabulary: int
    request: ModelRequest
    source: str

    def as_row(self) -> dict[str, object]:
        return {
            "vocabulary": self.vocabulary,
            "padded_vocabulary": padded_vocabulary(self.vocabulary),
            "outputs": self.request.outputs,
            "shape_source": self.source,
        }


@dataclass(frozen=True)
class Trace:
    """``parameters``: (elements, dimensions) of each. ``activation_bytes``: what autograd keeps of
    the model's forward pass, 16-bit copies of weights under autocast included. ``logit_bytes``: the
    logits, what the loss keeps of them, and their gradients, once in each of their dtypes.
    ``kept_elements``: numbers in both."""

    parameters: tuple[tuple[int, int], ...]
    embedding_params: int
    activation_bytes: int
    logit_bytes: int
    kept_elements: int

    @property
    def n_params(self) -> int:
        return sum(elements for elements, _ in self.parameters)

    def as_row(self) -> dict[str, object]:
        return {"n_params": self.n_params, "embedding_params": self.embedding_params}


def data_facts(settings: RunSettings) -> DataFacts:
    """From the data themselves, or assumed for the hub's."""
    if not settings.data.startswith("hub"):
        data = load_run_data(settings)
        return DataFacts(data.valid_vocab, model_request(settings, data), "from the data")
    architecture = settings.case.architecture
    vocabulary = HUB_VOCABULARIES.get(architecture.id) or _library_vocabulary(architecture.id)
    labelled = settings.case.task.collate in ("multi_cls", "single_cls")
    request = ModelRequest(
        architecture=architecture,
        task=settings.case.task,
        preset=settings.preset,
        vocabulary=vocabulary,
        pad_id=1 if architecture.id == "roberta" else 0,
        bos_id=0,
        eos_id=2,
        outputs=HUB_LABELS if labelled else None,
        weights=settings.weights,
        dropout=settings.dropout,
        seed=settings.seed,
    )
    return DataFacts(vocabulary, request, "assumed: a dry run downloads nothing")


def trace(settings: RunSettings, facts: DataFacts, precision: Precision) -> Trace:
    """Run one micro-batch of the longest sequences without memory or arithmetic."""
    with FakeTensorMode(allow_non_fake_inputs=True), conversions_left_out():
        # Evaluation mode: what autograd keeps is the same without dropout, and some models (OPT) throw dice in training.
        model = converted(build_model(shape_only(facts.request)).eval(), precision)
        shape = (settings.micro_batch, settings.seq_len)
        ids = torch.zeros(shape, dtype=torch.int64, device=precision.device)
        last = torch.zeros(shape[:1], dtype=torch.int64, device=precision.device)
        own = {_storage(value) for value in (*model.parameters(), *model.buffers(), ids, last)}
        forward, loss = Kept(own), Kept(own)
        with forward, precision.forward():
            logits = model(ids, None, last)
        with loss:
            if precision.loss_dtype != torch.float32:  # the fused fp32 losses keep the gradient alone, counted below
                training_loss(
                    logits,
                    _targets(settings, logits),
                    loss=settings.case.task.loss,
                    dtype=precision.loss_dtype,
                    normalizer=1,
                    valid_vocab=None if facts.request.outputs else facts.vocabulary,
                )
        in_head_dtype = logits.numel() * logits.element_size()
        before = forward.storages() | {_storage(logits)}
        return Trace(
            tuple((p.numel(), p.ndim) for p in model.parameters()),
            sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()),
            forward.bytes(excluding={_storage(logits)}),
            2 * in_head_dtype + 2 * loss.bytes(excluding=before),
            forward.elements(excluding=set()) + loss.elements(excluding=before),
        )


def shape_only(request: ModelRequest) -> ModelRequest:
    """The request without its weights and without the proof that dropout is off, which fake tensors
    cannot give. Weights from a folder keep that folder's sizes."""
    changes: dict[str, object] = {"weights": "scratch", "dropout": 0.5}
    if request.weights != "scratch":
        changes["preset"] = "full"
        if request.weights != "pretrained":
            changes["architecture"] = dataclasses.replace(request.architecture, hub_id=request.weights, sizes={})
    return dataclasses.replace(request, **changes)


@contextmanager
def conversions_left_out():
    """`Module.to` and `float` do nothing inside: torch cannot convert a module of fake tensors in place
    (``Cannot swap t1 because it has weakref``); `converted` does it instead."""
    apply = nn.Module._apply
    nn.Module._apply = lambda module, *_, **__: module
    try:
        yield
    finally:
        nn.Module._apply = apply


def converted(model: nn.Module, precision: Precision) -> nn.Module:
    """Prepared as a run prepares it: tensors in the weights' dtype on the run's device, tied ones tied."""
    made: dict[int, torch.Tensor] = {}

    def convert(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            dtype = precision.weights_dtype if value.is_floating_point() else value.dtype
            empty = torch.empty(value.shape, dtype=dtype, device=precision.device)
            made[id(value)] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
        return made[id(value)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: convert(value) for name, value in table.items() if value is not None})
    return precision.prepare(model)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Collects what autograd saves while it is open; views of one storage count once."""

    def __init__(self, own: set[int]) -> None:
        self._own = own
        self._tensors: dict[int, torch.Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in self._own:
            self._tensors.setdefault(_storage(tensor), tensor)  # held, so that no address is used twice
        return tensor

    def storages(self) -> set[int]:
        return set(self._tensors)

    def bytes(self, *, excluding: set[int]) -> int:
        return sum(tensor.untyped_storage().nbytes() for key, tensor in self._tensors.items() if key not in excluding)

    def elements(self, *, excluding: set[int]) -> int:
        return sum(
            tensor.untyped_storage().nbytes() // tensor.element_size()
            for key, tensor in self._tensors.items()
            if key not in excluding
        )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _targets(settings: RunSettings, logits: torch.Tensor) -> torch.Tensor:
    if settings.case.task.loss == "bce_with_logits":
        return torch.zeros(logits.shape, device=logits.device)
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _library_vocabulary(architecture: str) -> int:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture]().vocab_size
