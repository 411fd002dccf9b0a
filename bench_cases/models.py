"""Model builders: an encoder from `transformers`, a head, and the cut between them.

The cut matters because a configuration may run the head in another dtype than the encoder.
*Head* means every module behind the last encoder output. For language models it is the
library's own head, obtained by running the task model with its encoder replaced by a
pass-through; so the cut is right for any architecture. Classification heads are ours, since
no pretrained weights hold them: GPT-2's is one projection, RoBERTa's dense, tanh, projection.

torch and transformers are imported inside the functions, as every room below `harness` does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bench_cases.architectures import Architecture
from bench_cases.tasks import Task

if TYPE_CHECKING:
    from torch import nn

VOCABULARY_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this, so that matrix products stay aligned."""


class ModelError(Exception):
    """A model that cannot be built as asked; says what was given and what is allowed."""


class WeightsUnavailable(Exception):
    """Pretrained weights that cannot be reached."""


@dataclass(frozen=True)
class ModelRequest:
    """What to build.

    ``vocabulary`` is the tokenizer's size; the embedding holds `padded_vocabulary` of it.
    ``outputs`` is the number of labels or classes, None for language models. ``weights`` is
    ``scratch``, ``pretrained`` (the architecture's hub id) or a folder.
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        name, encoder, head = build(request)
        model = SplitModel(name, encoder, head, pooling=_pooling(request)).float().train()
        if request.dropout == 0:
            _require_no_dropout(model, request)
    return model


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters, in registration order."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _builder(name: str):
    """The builder named ``module:function`` or ``path/to/file.py:function``."""
    if ".py:" in name:
        from bench_cases.own_file import load_object

        return load_object(name)
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _pooling(request: ModelRequest) -> str | None:
    """Which position a classification head reads: the last real token, or the first."""
    if request.task.head != "classification":
        return None
    return "last" if request.architecture.causal else "first"


def build_transformers(request: ModelRequest) -> tuple[str, nn.Module, nn.Module]:
    """Builder for every `transformers` architecture: (encoder name, encoder, head)."""
    import transformers

    from bench_cases.split_model import ClassificationHead, LibraryHead

    auto = {"causal_lm": transformers.AutoModelForCausalLM, "masked_lm": transformers.AutoModelForMaskedLM,
            "classification": transformers.AutoModel}[request.task.head]
    config = _configuration(request)
    library_model = _scratch(auto, config) if request.weights == "scratch" else _load(auto, config, request)
    name = library_model.base_model_prefix
    encoder = library_model if request.task.head == "classification" else getattr(library_model, name)
    # It reads token ids back to the host in every forward pass, to warn of what our collator cannot do.
    encoder.warn_if_padding_and_no_attention_mask = lambda *_: None
    if request.task.head != "classification":
        return name, encoder, LibraryHead(library_model)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its output would be computed, take gradients nowhere, and be dropped
    head = ClassificationHead(_encoded_width(encoder), request.outputs, deep=not request.architecture.causal,
                              std=getattr(config, "initializer_range", 0.02))
    return name, encoder, head


def _encoded_width(encoder: nn.Module) -> int:
    """Width of the encoder's output, by running it: some project down at the end (OPT-350m)."""
    import torch

    with torch.no_grad():  # in evaluation mode: some encoders drop whole layers at random in training
        return encoder.eval()(input_ids=torch.ones(1, 2, dtype=torch.int64))[0].shape[-1]


def _configuration(request: ModelRequest) -> Any:
    """The library's configuration object with our sizes, vocabulary, dropout and attention."""
    from transformers import AutoConfig

    architecture = request.architecture
    if request.weights == "scratch":
        config = _default_configuration(architecture)
        config.update(dict(architecture.sizes.get(request.preset, {})))
        config.vocab_size = padded_vocabulary(request.vocabulary)
        for name, value in (("pad_token_id", request.pad_id), ("bos_token_id", request.bos_id),
                            ("eos_token_id", request.eos_id)):
            if hasattr(config, name):
                setattr(config, name, value)
    else:
        source = architecture.hub_id if request.weights == "pretrained" else request.weights
        config = reach(lambda: AutoConfig.from_pretrained(source), source)
        if config.model_type != _default_configuration(architecture).model_type:
            raise ModelError(f"weights {source!r} are a {config.model_type}, and the case wants "
                             f"{architecture.id}")
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("_pdrop")) and isinstance(value, (int, float)) \
                and not isinstance(value, bool):
            setattr(config, name, request.dropout)
    for name in ("classifier_dropout", "classifier_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, request.dropout)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
    return config


def _default_configuration(architecture: Architecture) -> Any:
    """The configuration of an architecture's full size: the library's own defaults with the declared
    position table, or, for a model from outside (which declares no sizes), its own configuration."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not architecture.sizes:
        return reach(lambda: AutoConfig.from_pretrained(architecture.hub_id), architecture.hub_id)
    config = CONFIG_MAPPING[architecture.id]()
    setattr(config, architecture.position_key, architecture.max_positions + architecture.position_offset)
    return config


def _is_folder(name: str) -> bool:
    from pathlib import Path

    return Path(name).is_dir()


def _scratch(auto: Any, config: Any) -> nn.Module:
    try:
        return auto.from_config(config)
    except ValueError as error:
        raise ModelError(f"{config.model_type} cannot be built for this task: {error}") from error


def _load(auto: Any, config: Any, request: ModelRequest) -> nn.Module:
    """Weights from the hub or a folder, the embedding resized to the padded vocabulary."""
    import torch

    source = request.architecture.hub_id if request.weights == "pretrained" else request.weights
    extra = request.vocabulary - config.vocab_size
    if not -VOCABULARY_MULTIPLE < extra <= 8:
        raise ModelError(f"weights {source!r} know {config.vocab_size} tokens and the data's tokenizer "
                         f"{request.vocabulary}: pretrained weights need their own tokenizer "
                         f"(put it into DIR/{request.architecture.id}/, or use --weights scratch)")
    model = reach(lambda: auto.from_pretrained(source, config=config, dtype=torch.float32), source)
    model.resize_token_embeddings(padded_vocabulary(request.vocabulary), mean_resizing=False)
    return model


def reach(load, source: str) -> Any:
    """Run a loader of `transformers`; say plainly what to do when the source cannot be had."""
    if source.startswith(("/", "./", "../", "~")) and not _is_folder(source):
        raise WeightsUnavailable(f"no folder {source!r} with a model; use --weights scratch, or --weights DIR "
                                 "with config.json and model.safetensors")
    try:
        return load()
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise WeightsUnavailable(f"model {source!r} cannot be loaded ({first_line}); use --weights scratch, "
                                 f"or --weights DIR with config.json and model.safetensors") from error


def _require_no_dropout(model: nn.Module, request: ModelRequest) -> None:
    """Prove by computation that nothing random is left: two training-mode passes agree."""
    import torch

    ids = torch.arange(request.vocabulary - 8, request.vocabulary).view(1, 8)  # no special tokens
    with torch.no_grad():
        first, second = (model(ids, last_token=torch.tensor([7])) for _ in range(2))
    if not torch.equal(first, second):
        raise ModelError(f"{request.architecture.id} still drops units at random with dropout 0")
