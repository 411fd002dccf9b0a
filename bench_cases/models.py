"""Models: what is asked for, building it in fp32, proving it fit for the comparison. The builders import torch, this not.

A model is an encoder, a head, and the cut between them, since a configuration may run the head in another dtype than the
encoder. *Head* means every module after the last encoder output. For language models it is the library's own head, obtained by
running the task model with its encoder replaced by a pass-through; so the cut is right for any architecture. Classification
heads are ours, since no pretrained weights hold them: GPT-2's is one projection, RoBERTa's dense, tanh, projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_cases.architectures import Architecture, Task
from bench_cases.lookup import first_line, load_object

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench_cases.split_model import SplitModel

VOCABULARY_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, so that matrix products stay aligned."""
WAYS_OUT = "use --weights scratch, or --weights DIR with config.json and model.safetensors"


class ModelError(Exception):
    """A model that cannot be built as asked; says what was given and what is allowed."""


class WeightsUnavailable(Exception):
    """A model that cannot be reached or read; the message says what to do."""


@dataclass(frozen=True)
class ModelRequest:
    """What to build.

    ``vocabulary`` is the tokenizer's size; the embedding holds `padded_vocabulary` of it. ``outputs`` is the number of labels
    or classes, None for language models. ``weights`` is ``scratch``, ``pretrained`` (the architecture's hub id) or a folder.
    ``seq_len`` is the longest sequence that the model must take. ``prior``: what the bias of a classification head's last layer
    begins with, one number an output; None: the head's own beginning, and a bias only where it has one. ``size``: what is asked
    for beside the preset's sizes, of a model from scratch.
    """

    architecture: Architecture
    task: Task
    preset: str
    vocabulary: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    outputs: int | None
    weights: str
    dropout: float
    seed: int
    seq_len: int = 1
    prior: tuple[float, ...] | None = None
    size: Mapping[str, int] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Any]:
        """What is not at the library's default: the preset's sizes and those asked for."""
        return {**self.architecture.sizes.get(self.preset, {}), **self.size}


def padded_vocabulary(size: int) -> int:
    """``size`` rounded up to a multiple of `VOCABULARY_MULTIPLE`."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build_model(request: ModelRequest) -> nn.Module:
    """The model in fp32 on the CPU, in training mode: a `split_model.SplitModel`.

    Seeded by ``request.seed`` alone, so every configuration of a case starts from the same
    weights. Raises `ModelError` or `WeightsUnavailable`.
    """
    import torch

    from bench_cases.split_model import SplitModel

    build = _builder(request.architecture.build)
    pooling = None  # or which position a classification head reads: the last real token, or the first
    if request.task.head == "classification":
        pooling = "last" if request.architecture.causal else "first"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        try:
            name, encoder, head = build(request)
            model = SplitModel(name, encoder, head, pooling=pooling).float().train()
            prove(model, request)
        except (ModelError, WeightsUnavailable):
            raise
        except Exception as error:  # an architecture that does not fit shows itself in many ways
            raise ModelError(
                f"{request.architecture.name} cannot be trained for {request.task.id} here: {first_line(error)}"
            ) from error
    return model


def prove(model: SplitModel, request: ModelRequest) -> None:
    """Prove by computation what the comparison rests on; raises `ModelError`.

    Nothing random is left when dropout is 0: two training-mode passes agree. A causal language
    model does not see the future: another last token leaves the earlier logits alone. And see whether the model attends.
    """
    import torch

    from bench_cases.ops_seen import OpsSeen

    ids = torch.arange(request.vocabulary - 8, request.vocabulary).view(1, 8)  # no special tokens
    last = torch.tensor([7])
    with torch.no_grad():
        with OpsSeen() as seen:
            first = model(ids, last_token=last)
        model.attention = seen.attention and (model.attention or seen.attention)
        if request.dropout == 0 and not torch.equal(first, model(ids, last_token=last)):
            raise ModelError(f"{request.architecture.name} still drops units at random with dropout 0")
        if request.task.head == "causal_lm" and request.dropout == 0:
            changed = ids.clone()
            changed[0, -1] = ids[0, 0]
            if not torch.allclose(first[0, :-1], model(changed)[0, :-1], rtol=0, atol=1e-5):
                raise ModelError(f"{request.architecture.name} sees the tokens it is to predict: it is no causal model")


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter (tied ones once) by name, on the CPU, in registration order. Of a sharded model the whole ones, gathered
    one by one: all ranks call it."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().contiguous()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all `whole_parameters`; all ranks call it."""
    import torch

    digest = hashlib.sha256()
    for name, value in whole_parameters(model):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _builder(name: str):
    """The builder named ``module:function`` or ``path/to/file.py:function``."""
    if ".py:" in name:
        return load_object(name)
    module, _, function = name.partition(":")
    room, _, rest = module.partition(".")
    if room == "bench_cases":  # so it stands in every record, also where this package is a part of `ddbench`
        return getattr(import_module(f".{rest}", __package__), function)
    return getattr(import_module(module), function)


def reach(load: Callable[[], Any], source: str, ways_out: str = WAYS_OUT) -> Any:
    """``load()``, whose source is a folder or a hub id; raises `WeightsUnavailable`.

    The hub is asked one quick question first: the library itself would retry for minutes.
    """
    from bench_cases.data import DataError, DataUnavailable, hub

    if not Path(source).is_dir():
        if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
            raise WeightsUnavailable(f"no folder {source!r} with a model; {ways_out}")
        try:
            hub.commit_of("model", source, "main")
        except (DataError, DataUnavailable) as error:
            cause = first_line(error.__cause__ or error)
            raise WeightsUnavailable(
                f"there is no folder {source!r} here, and the hub gives no model of that name ({cause}); {ways_out}"
            ) from error
    try:
        return load()
    except Exception as error:  # OS, value, JSON and safetensors errors alike mean: not to be had
        raise WeightsUnavailable(f"model {source!r} cannot be loaded ({first_line(error)}); {ways_out}") from error
