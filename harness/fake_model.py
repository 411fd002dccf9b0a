"""A run's model on fake tensors, which have no memory: its size, what autograd keeps of one micro-batch, and from its products
and this device's rate how long a run takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench_cases.models import ModelError, ModelRequest, build_model, padded_vocabulary
from harness.loss import training_loss
from harness.measured_rates import sample, threads_restored
from harness.precision import DTYPES, Precision
from harness.run.execute import load_run_data, model_request
from harness.settings import RunSettings, asked_sizes
from instrument.flops import StepFlops
from instrument.mfu import known_card, weighted_peak
from instrument.terminal import count

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
    from transformers import CONFIG_MAPPING

    architecture = settings.case.architecture
    vocabulary = HUB_VOCABULARIES.get(architecture.id) or CONFIG_MAPPING[architecture.id]().vocab_size
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
        prior=None if settings.case.head_prior == "none" else (0.0,) * HUB_LABELS,
        size=asked_sizes(settings.size),
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
                kind, valid_vocab = settings.case.task.loss, None if facts.request.outputs else facts.vocabulary
                if kind == "bce_with_logits":
                    targets = torch.zeros(logits.shape, device=logits.device)
                else:
                    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
                training_loss(logits, targets, loss=kind, dtype=precision.loss_dtype, normalizer=1, valid_vocab=valid_vocab)
        in_head_dtype = logits.numel() * logits.element_size()
        loss_bytes, loss_elements = loss.without(forward.storages() | {_storage(logits)})
        return Trace(
            tuple((p.numel(), p.ndim) for p in model.parameters()),
            sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()),
            forward.without({_storage(logits)})[0],
            2 * in_head_dtype + 2 * loss_bytes,
            forward.without(set())[1] + loss_elements,
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

    def without(self, storages: set[int]) -> tuple[int, int]:
        """Bytes, and numbers in them, of what was kept in no other storage than these."""
        kept = [(t.untyped_storage().nbytes(), t.element_size()) for key, t in self._tensors.items() if key not in storages]
        return sum(nbytes for nbytes, _ in kept), sum(nbytes // size for nbytes, size in kept)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


GPU_EFFICIENCY = 0.4
"""Share of a card's dense peak that a plain eager training step reaches: an assumption, shown with the estimate."""
TANH_PER_ELEMENT = 2.0
"""What a step spends on one kept number besides products, in units of one fp32 tanh: chosen on tiny runs on two
shared cores of an EPYC. Three fp32_true runs tried afterwards took 1.2 to 1.4 times the estimated step."""


def duration(settings: RunSettings, traced: Trace, step_flops: StepFlops) -> dict[str, object]:
    """``flops_per_step`` (rows of full length), the rate and its source, ``step_s``, ``evaluation_s``, ``total_s``
    (without start-up and data). Null seconds for a GPU whose peak is not known."""
    by_dtype = step_flops.of(settings.batch_size, settings.seq_len)
    flops = sum(by_dtype.values())
    found: dict[str, object] = {"flops_per_step": flops, "step_s": None, "evaluation_s": None, "total_s": None}
    micro_batches = settings.batch_size // settings.micro_batch
    forwards = evaluations(settings) * -(-settings.validation_documents // settings.micro_batch)
    if settings.device == "cuda":
        rate, source = gpu_rate(by_dtype, torch.cuda.get_device_name())
        found |= {"rate_flops_per_s": rate, "rule": source}
        if rate is None:
            return found
        step_s = flops / rate
    else:
        rate, tanh_s = cpu_product_rate(settings), cpu_tanh_s()
        step_s = flops / rate + TANH_PER_ELEMENT * tanh_s * traced.kept_elements * micro_batches
        each = f"products, and {TANH_PER_ELEMENT:g} tanh for every number that autograd keeps"
        rule = f"{each}, both as measured here on one thread, over {count(torch.get_num_threads(), 'thread')}"
        found |= {"rate_flops_per_s": rate, "tanh_s": tanh_s, "rule": rule}
    evaluation_s = forwards * step_s / micro_batches / 3  # the forward pass is a third of a step
    return found | {"step_s": step_s, "evaluation_s": evaluation_s, "total_s": step_s * settings.max_steps + evaluation_s}


def evaluations(settings: RunSettings) -> int:
    """At the start, at the end, and every ``eval_every`` steps between."""
    between = (settings.max_steps - 1) // settings.eval_every if settings.eval_every else 0
    return 2 + between


def gpu_rate(flops: Mapping[str, int], name: str) -> tuple[float | None, str]:
    """(FLOP/s, rule) of a card for work by dtype; None for one whose peak is not known."""
    card, dtypes = known_card(name), " and ".join(flops)
    peak = weighted_peak(flops, card and card.peaks())
    if peak is None:
        return None, f"no published peak is known for {name!r} in {dtypes}, and none is guessed"
    return GPU_EFFICIENCY * peak, f"{GPU_EFFICIENCY:.0%} (assumed) of the {card.name}'s dense {dtypes} peak"


def cpu_product_rate(settings: RunSettings, budget_s: float = 0.1) -> float:
    """FLOP/s of a product of the run's own kind: 512 rows, 256 by 1,024, random numbers."""
    dtype = DTYPES[settings.config.compute]
    left, right = torch.randn(512, 256).to(dtype), torch.randn(256, 1024).to(dtype)
    return 2 * 512 * 256 * 1024 / _on_all_threads_s(lambda: left @ right, budget_s)


def cpu_tanh_s(budget_s: float = 0.05) -> float:
    """Seconds for one number of an fp32 tanh over 2^18 numbers."""
    numbers = torch.randn(1 << 18)
    return _on_all_threads_s(lambda: torch.tanh(numbers), budget_s) / (1 << 18)


def _on_all_threads_s(work: Callable[[], object], budget_s: float) -> float:
    """Seconds on one thread, divided by the run's threads: threads that wait for each other on a busy machine measure its
    scheduler, and a product on two of them came out 40 times too slow. The shortest repetition: longer ones measure what else
    runs here."""
    with threads_restored() as threads:
        torch.set_num_threads(1)
        return min(sample(work, torch.device("cpu"), budget_s)) / threads


def shapes_of(request: ModelRequest) -> nn.Module:
    """The model of a request as a run would build it, without memory or weights; in full where its code
    asks for values while it is built (OPT throws dice over its layers)."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), conversions_left_out():
            return build_model(shape_only(request))
    except ModelError:
        return build_model(shape_only(request))
