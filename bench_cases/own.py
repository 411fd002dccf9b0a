"""A case from outside the project: a Python file's object, or a `transformers` model. Torch-free until a hub is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_cases.architectures import TASKS, Architecture
from bench_cases.cases import CASES, Case, LearningRates
from bench_cases.lookup import BadDeclaration, load_object, lookup
from bench_cases.models import reach

OWN_LEARNING_RATES = LearningRates(tiny=1e-3, scratch=3e-4, pretrained=5e-5)
UNLIMITED_POSITIONS = 1 << 20


def find_case(name: str) -> Case:
    """A registered case by id, or ``path/to/file.py:NAME``; raises `UnknownId` or `BadDeclaration`."""
    if name.endswith(".py"):
        raise BadDeclaration(f"{name} names a file and no case in it; the form is path/to/file.py:NAME")
    if ".py:" not in name:
        return lookup("case", name, CASES)
    found = load_object(name)
    if not isinstance(found, Case):
        raise BadDeclaration(f"{name} is of type {type(found).__name__}; it must be a bench_cases.Case")
    return replace(found, spelled=(name,))


def case_for_model(model: str, task_id: str) -> Case:
    """A case for any `transformers` model: a folder with ``config.json``, or a hub id."""
    task = lookup("task", task_id, TASKS)
    config = _configuration(model)
    arch = str(config["model_type"]).replace("-", "_")
    roberta_like = "roberta" in arch or arch == "camembert"
    positions = config.get("max_position_embeddings") or config.get("n_positions") or UNLIMITED_POSITIONS
    architecture = Architecture(
        id=arch,
        name=str(config["model_type"]),
        causal=_is_causal(str(config["model_type"]), task_id),
        hub_id=model,
        max_positions=positions - (2 if roberta_like else 0),
        tokenizer=model if _has_tokenizer(model) else None,
    )
    return Case(
        f"{arch}_{task.id}",
        "own",
        architecture,
        task,
        OWN_LEARNING_RATES,
        in_default_matrix=False,
        spelled=("--model", model, "--task", task_id),
    )


def _configuration(model: str) -> dict[str, Any]:
    folder = Path(model)
    if folder.exists():
        file = folder / "config.json"
        if odd := next(
            (path for path in sorted(folder.rglob("*")) if path.exists() and not (path.is_file() or path.is_dir())), None
        ):
            raise BadDeclaration(f"--model {model}: {odd.name} is no plain file")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadDeclaration(f"--model {model}: no config.json in this folder") from None
        except (ValueError, RecursionError) as error:
            raise BadDeclaration(f"{file}: not JSON ({error})") from error
    else:
        from transformers import AutoConfig

        config = reach(
            lambda: AutoConfig.from_pretrained(model, trust_remote_code=False),
            model,
            "give --model DIR with a config.json, or a hub id that can be reached",
        ).to_dict()
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadDeclaration(f"--model {model}: its config.json names no model_type")
    return config


def _is_causal(model_type: str, task_id: str) -> bool:
    """Masked LMs are bidirectional, causal LMs causal; for classification the library's tables tell."""
    if task_id in ("clm", "mlm"):
        return task_id == "clm"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _has_tokenizer(model: str) -> bool:
    folder = Path(model)
    return not folder.exists() or any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
    )
