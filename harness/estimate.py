"""``case ... --dry-run``: the resolved run, its model, and an estimate of its memory and time.

The estimate runs one micro-batch, forward and loss, on fake tensors: they have shapes, dtypes and devices but no memory. What
autograd keeps is then counted, in the dtypes of the configuration and with its attention backend, for any architecture; FLOPs
are those of `harness.commands.flops`. Nothing is written into the results folder.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import psutil

from harness.failure import sentence
from harness.fake_model import Trace
from harness.options import option_words
from harness.settings import SETTINGS, RunSettings
from instrument.results.folder import finished_run
from instrument.results.schemas import strict_json
from instrument.terminal import count, facts_table, stderr_console


def print_estimate(settings: RunSettings, out: Path, as_json: bool) -> None:
    """Text on standard error, and one JSON object on standard output when asked."""
    findings = estimate(settings, out)
    stderr_console().print(facts_table(lines(findings)))
    if as_json:
        print(strict_json(findings))


def estimate(settings: RunSettings, out: Path) -> dict[str, object]:
    """The resolved run as plain data. Memory and time are null when the device cannot run it (the reason
    stands in ``unsupported``) or when its model cannot be traced (``not_estimated``: its forward pass
    asks for values, as some models of other people do). Raises what a run would raise about its data."""
    from bench_cases.models import ModelError, WeightsUnavailable
    from harness.fake_model import data_facts, duration, shapes_of, trace
    from harness.precision import Precision, Unsupported
    from harness.run.step_flops import meaningful_outputs, step_flops

    facts = data_facts(settings)
    unknown = dict.fromkeys(("unsupported", "not_estimated", "memory", "time"))
    findings = resolved(settings, out) | {"model": facts.as_row()} | unknown
    try:
        precision = Precision.of(settings)
    except Unsupported as error:
        return findings | {"unsupported": str(error)}
    try:
        traced = trace(settings, facts, precision)
        findings["model"] |= traced.as_row()
        findings["memory"] = memory(settings, traced)
        sizes = {"outputs": meaningful_outputs(facts.request), "seq_len": settings.seq_len, "micro_batch": settings.micro_batch}
        model = shapes_of(facts.request)
        flops = step_flops(model, settings.case, settings.config, attention=precision.attention, **sizes)
        findings["time"] = duration(settings, traced, flops)
    except (ModelError, WeightsUnavailable):
        raise
    except Exception as error:
        findings["not_estimated"] = sentence(error)
    finally:
        precision.close()
    return findings


CONFIGURATION = ("weights", "compute", "head", "loss", "optimizer", "eps", "scaler", "clip", "tf32")


def resolved(settings: RunSettings, out: Path) -> dict[str, object]:
    """What would run, and whether it already has."""
    config, done = dataclasses.asdict(settings.config), finished_run(out, settings.run_id)
    return {
        "run_id": settings.run_id,
        "case": settings.case.id,
        "task": settings.case.task.name,
        "architecture": settings.case.architecture.name,
        "loss": settings.case.task.loss,
        "loss_reduction": settings.case.loss_reduction,
        "dtype_config": settings.config.id,
        "configuration": {name: config[name] for name in CONFIGURATION} | {"autocast": settings.config.autocast},
        "data_source": settings.data,
        "weights_source": settings.weights,
        "tokens_per_step": settings.batch_size * settings.seq_len,
        "seed": settings.seed,
        "warmup_steps": settings.warmup_steps,
        **{name: getattr(settings, name) for name in SETTINGS if name not in ("data", "weights")},
        "results_folder": str(out),
        "already_done": done and {"status": done.status, "steps_done": done.steps_done},
    }


SHOWN = (
    *("preset", "device", "data", "weights", "lr", "batch_size", "micro_batch"),
    *("seq_len", "max_steps", "threads", "attention"),
)
"""Settings that have their place in `lines`; the others are one line of options, where they are not at their defaults."""


def lines(found: dict) -> list[tuple[str, str]]:
    """The findings as (name, text)."""
    config, model, done = found["configuration"], found["model"], found["already_done"]
    cast = f"{config['autocast']} autocast" if config["autocast"] else config["compute"]
    scaling = "dynamic loss scaling" if config["scaler"] else "no loss scaling"
    more = (", norm in fp16" if config["clip"] == "fp16" else "") + (", TF32" if config["tf32"] else "")
    micro = f"in micro-batches of {found['micro_batch']}"
    changed = {name: found.get(name) for name, s in SETTINGS.items() if name not in SHOWN and found.get(name) != s.default}
    there = "" if done is None else f" (already there: {done['status']}, {count(done['steps_done'], 'step')})"
    size = f"vocabulary {model['vocabulary']:,}"
    if "n_params" in model:
        outputs = f", {model['outputs']} outputs" if model["outputs"] else ""
        size = f"{model['n_params']:,} parameters, {model['embedding_params']:,} of them embeddings; {size} "
        size += f"padded to {model['padded_vocabulary']:,}{outputs}"
    dtypes = f"weights {config['weights']}, compute {cast}, head {config['head']}, loss {config['loss']}"
    adamw = f"AdamW {config['optimizer']} eps {config['eps']:g}"
    rows_a_step, threads = count(found["batch_size"], "sequence"), found["threads"] or "all"
    where = f"{found['device']}, preset {found['preset']}, seed {found['seed']}"
    rows = [
        ("run", found["run_id"]),
        ("case", f"{found['case']}: {found['architecture']}, {found['task']}, {found['loss']} ({found['loss_reduction']})"),
        ("configuration", f"{found['dtype_config']}: {dtypes}, {adamw}, {scaling}{more}"),
        ("data, weights", f"{found['data_source']}, {found['weights_source']}"),
        ("model", f"{size} ({model['shape_source']})"),
        ("step", f"{rows_a_step} of at most {found['seq_len']} = {found['tokens_per_step']:,} tokens, {micro}"),
        ("schedule", f"{count(found['max_steps'], 'step')}, peak rate {found['lr']:g}, warm-up {found['warmup_steps']}"),
        ("device", f"{where}, threads {threads}, attention {found['attention']}"),
        *([("settings", shlex.join(words))] if (words := option_words(changed)) else []),
        ("results", found["results_folder"] + there),
    ]
    for reason in ("unsupported", "not_estimated"):
        if found[reason]:
            return [*rows, (reason.replace("_", " "), found[reason])]
    memory, time = found["memory"], found["time"]
    parts = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:,.1f} MB" for name, count in memory["parts_bytes"].items())
    rows += [("memory, estimate", f"{memory['peak_bytes'] / 1e9:.2f} GB: {parts}"), ("", memory["rule"])]
    if time["total_s"] is None:
        return [*rows, ("time, estimate", f"unknown: {time['rule']}")]
    step = f"{time['step_s'] * 1e3:,.1f} ms a step of {time['flops_per_step'] / 1e9:,.2f} GFLOP"
    parts = f"{step}, evaluation {time['evaluation_s']:,.1f} s; without start-up and data"
    return [*rows, ("time, estimate", f"{time['total_s']:,.1f} s: {parts}"), ("", time["rule"])]


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4_096, 256
"""bitsandbytes keeps tensors below this many elements in 32 bits, and one fp32 scale a block."""
LATER_BYTES = {"perplexity": 60_000_000, "f1": 150_000_000}
"""What a CPU run's process comes to hold besides, by its metric: scratch of the product library and the
allocator, and for F1 scikit-learn. Measured on tiny runs, 55 to 66 and 130 to 155 MB."""
RULE = (
    "weights, gradients and optimizer states by the configuration's dtypes; activations and logits as autograd "
    "keeps them for one micro-batch of the longest sequences; the larger of those and the optimizer's own "
    "temporaries"
)


def memory(settings: RunSettings, traced: Trace) -> dict[str, object]:
    """``parts_bytes``, ``peak_bytes`` (on a CPU with what this process holds already, which is what a run's
    process holds when it begins; on CUDA what the allocator hands out, without the context) and ``rule``."""
    weight_bytes = BYTES[settings.config.weights]
    parts = {
        "weights": traced.n_params * weight_bytes,
        "gradients": traced.n_params * weight_bytes,
        "optimizer_states": optimizer_state_bytes(settings.config.optimizer, weight_bytes, traced),
        "activations": traced.activation_bytes,
        "logits": traced.logit_bytes,
        "optimizer_temporaries": temporary_bytes(settings.config.optimizer, weight_bytes, traced.n_params),
    }
    lasting = parts["weights"] + parts["gradients"] + parts["optimizer_states"]
    peak = lasting + max(parts["activations"] + parts["logits"], parts["optimizer_temporaries"])
    rule = RULE + "; without the CUDA context"
    if settings.device == "cpu":
        held = {"process": psutil.Process().memory_info().rss, "libraries_later": LATER_BYTES[settings.case.task.metric]}
        parts, peak = parts | held, peak + sum(held.values())
        rule = RULE + "; plus this process as it is now and what libraries take later"
    return {"parts_bytes": parts, "peak_bytes": peak, "rule": rule}


def optimizer_state_bytes(optimizer: str, weight_bytes: int, traced: Trace) -> int:
    """Both moments of AdamW."""
    if optimizer == "8bit":
        return sum(2 * (4 * n if n < EIGHT_BIT_FROM else n + 4 * -(-n // EIGHT_BIT_BLOCK)) for n, _ in traced.parameters)
    element = {"fp32_states": 4, "stochastic_rounding": 2}.get(optimizer, weight_bytes)
    return 2 * element * traced.n_params


def temporary_bytes(optimizer: str, weight_bytes: int, n_params: int) -> int:
    """What a step holds at its height: foreach the denominators; the wide ones fp32 copies of weights,
    gradients and both moments, and the denominators."""
    return {"foreach": weight_bytes, "fp32_states": 20, "stochastic_rounding": 20}.get(optimizer, 0) * n_params
