"""The builder for `transformers` architectures: encoder, head, the library's configuration, and no idle attention masks.

torch and transformers are imported inside the functions. A row of ours is one sequence, and a batch without a mask is a batch
without padding (`collate.Batch`). The library cannot know that. Its causal models look at the positions for several sequences
packed into a row, and in every eager forward pass read the answer back: a wait for the device in every micro-batch. Under
`torch.compile`, where nothing can be read, they attend through a mask of (1, 1, L, L) instead of ``is_causal`` (transformers
5.23 for those positions, 5.17 always, and its encoders as well): that costs twice the attention and another kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench_cases.architectures import Architecture
from bench_cases.models import VOCABULARY_MULTIPLE, ModelError, ModelRequest, padded_vocabulary, reach

if TYPE_CHECKING:
    import torch
    from torch import nn


def leave_out_idle_masks() -> None:
    """Keep `transformers` from building masks that would hide nothing. Once a process, before a model of the library runs."""
    from transformers import AttentionMaskInterface, masking_utils

    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    AttentionMaskInterface.register("sdpa", mask_if_it_hides)


def mask_if_it_hides(**asked: Any) -> torch.Tensor | None:
    """The library's own `sdpa_mask`, but None at once where it may be left out and nothing is padded or out of reach.

    For None a causal model's attention runs with ``is_causal``, an encoder's over everything. The arguments are the
    library's, which gives them by name; a prebuilt mask does not come here.
    """
    from transformers.masking_utils import sdpa_mask

    may_be_left_out = asked.get("allow_is_causal_skip", True) or asked.get("allow_is_bidirectional_skip", False)
    hides = asked.get("attention_mask") is not None or asked.get("local_size") is not None
    hides |= asked["q_length"] != asked["kv_length"]
    return None if may_be_left_out and not hides else sdpa_mask(**asked)


def build_transformers(request: ModelRequest) -> tuple[str, nn.Module, nn.Module]:
    """Builder for every `transformers` architecture: (encoder name, encoder, head)."""
    import transformers

    from bench_cases.split_model import ClassificationHead, LibraryHead

    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "masked_lm": transformers.AutoModelForMaskedLM,
        "classification": transformers.AutoModel,
    }[request.task.head]
    config = _configuration(request)
    if request.task.head == "causal_lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT's family sees the future otherwise
    library_model = _scratch(auto, config, request) if request.weights == "scratch" else _load(auto, config, request)
    name = library_model.base_model_prefix
    encoder = library_model if request.task.head == "classification" else getattr(library_model, name)
    # It reads token ids back to the host in every forward pass, to warn of what our collator cannot do.
    encoder.warn_if_padding_and_no_attention_mask = lambda *_: None
    leave_out_idle_masks()
    if request.task.head != "classification":
        return name, encoder, LibraryHead(library_model)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # its output would be computed, take gradients nowhere, and be dropped
    assert request.outputs is not None  # labels or classes, which every classification task has
    std = getattr(config, "initializer_range", 0.02)
    head = ClassificationHead(
        _encoded_width(encoder), request.outputs, deep=not request.architecture.causal, std=std, prior=request.prior
    )
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
        config = _sized_configuration(architecture, request.sizes)
        config.vocab_size = padded_vocabulary(request.vocabulary)
        for name in ("pad", "bos", "eos"):
            if hasattr(config, f"{name}_token_id"):
                setattr(config, f"{name}_token_id", getattr(request, f"{name}_id"))
    else:
        source = architecture.hub_id if request.weights == "pretrained" else request.weights
        config = reach(lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), source)
        if config.model_type != _sized_configuration(architecture, {}).model_type:
            raise ModelError(f"weights {source!r} are a {config.model_type}, and the case wants {architecture.id}")
    for name, value in config.to_dict().items():
        is_share = "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_share or name in ("classifier_dropout", "classifier_dropout_prob"):  # which may be None
            setattr(config, name, request.dropout)
    rows = getattr(config, architecture.position_key, None)
    if rows is not None and (positions := rows - architecture.position_offset) < request.seq_len:
        whose = request.weights if request.weights != "scratch" else architecture.name
        raise ModelError(f"seq_len {request.seq_len} is longer than the {positions} positions of {whose}")
    config.use_cache = False
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
    return config


def _sized_configuration(architecture: Architecture, sizes: Mapping[str, Any]) -> Any:
    """The configuration of an architecture with sizes given to its constructor, so that what the library derives from them (a
    Mamba's ``intermediate_size``) follows. The others are the library's defaults with the declared position table, or, for a
    model from outside (which declares no sizes), those of its own configuration."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if architecture.sizes:
        positions = architecture.max_positions + architecture.position_offset
        config = CONFIG_MAPPING[architecture.id](**{architecture.position_key: positions, **sizes})
    else:
        config = reach(lambda: AutoConfig.from_pretrained(architecture.hub_id, trust_remote_code=False), architecture.hub_id)
        allowed = [k for k, v in config.to_dict().items() if type(v) is int and k != "vocab_size" and not k.endswith("_id")]
        if unknown := [key for key in sizes if key not in allowed]:
            raise ModelError(f"--size {unknown[0]} is no size of {architecture.name}; allowed: {', '.join(sorted(allowed))}")
        config = type(config).from_dict({**_independent_fields(config), **sizes}) if sizes else config
    for key, value in sizes.items():
        if getattr(config, key) != value:
            raise ModelError(f"{key} of {architecture.name} is not to be chosen: it is {getattr(config, key)}")
    return config


def _independent_fields(config: Any) -> dict[str, Any]:
    """A configuration's fields without those that its constructor gives by itself: defaults, and what follows from others."""
    whole = config.to_dict()
    fields = dict(whole)
    for name in whole:
        fewer = {key: value for key, value in fields.items() if key != name}
        try:
            if type(config).from_dict(fewer).to_dict() == whole:
                fields = fewer
        except Exception:  # in many ways, by library: it cannot do without this one
            continue
    return fields


def _scratch(auto: Any, config: Any, request: ModelRequest) -> nn.Module:
    """From a configuration, with scaled-dot-product attention where the architecture has it.

    Without it, masks would have to be added to scores: only models that need no mask run so.
    """
    try:
        return auto.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    if request.task.head == "classification" and not request.architecture.causal:
        raise ModelError(f"{config.model_type} has no scaled-dot-product attention, which padded documents need here")
    return auto.from_config(config, attn_implementation="eager", trust_remote_code=False)


def _load(auto: Any, config: Any, request: ModelRequest) -> nn.Module:
    """Weights from the hub or a folder, the embedding resized to the padded vocabulary."""
    import torch

    source = request.architecture.hub_id if request.weights == "pretrained" else request.weights
    extra = request.vocabulary - config.vocab_size
    if not -VOCABULARY_MULTIPLE < extra <= 8:
        raise ModelError(
            f"weights {source!r} know {config.vocab_size} tokens and the data's tokenizer "
            f"{request.vocabulary}: pretrained weights need their own tokenizer "
            f"(put it into DIR/{request.architecture.id}/, or use --weights scratch)"
        )
    model = reach(
        lambda: auto.from_pretrained(
            source, config=config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, weights_only=True
        ),
        source,
    )
    model.resize_token_embeddings(padded_vocabulary(request.vocabulary), mean_resizing=False)
    return model
