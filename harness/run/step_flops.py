"""A run's FLOPs and MFU: by closed form where the architecture is in the registry, else counted and fitted, once before the
run's first step and outside of all timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from bench_cases import ARCHITECTURES, Case, DtypeConfig
from bench_cases.models import ModelRequest
from harness.measured_rates import rates_measured_here
from harness.settings import RunSettings
from instrument.flop_counter import ModelCounter, Uncountable
from instrument.flops import CLOSED_FORMS, ProductDtypes, RowFlops, StepFlops, fit, product_dtypes, sizes_of
from instrument.mfu import Peaks, Utilisation, datasheet_peaks


def step_flops(
    model: nn.Module, case: Case, config: DtypeConfig, *, attention: str, outputs: int, seq_len: int, micro_batch: int
) -> StepFlops:
    """FLOPs of this model's steps under a configuration. ``attention``: the SDPA backend that runs (``math``, ``efficient``,
    ...); ``outputs``: columns of its head that mean something (`meaningful_outputs`); ``seq_len``: the longest rows;
    ``micro_batch``: rows a forward pass.

    An architecture of the registry has a closed form, which costs nothing and which the tests hold equal to the count; any
    other is counted once at a few lengths and with one, two and three rows. Raises `instrument.flop_counter.Uncountable`.
    """
    dtypes, causal = dtypes_of(model, config, attention), case.architecture.causal and model.attention is not None
    row = closed_row_flops(model, case, outputs)
    if row is not None:
        return StepFlops(row, dtypes, causal=causal, source="closed form")
    row, once, source = counted_row_flops(model, case, outputs, seq_len)
    return StepFlops(row, dtypes, causal=causal, source=source, once=once, rows_a_pass=micro_batch)


def attention_backend(model: nn.Module, sdpa: str) -> str:
    """What runs this model's attention: the ``sdpa`` backend, its own (``eager``), or ``none`` where it has no attention."""
    return sdpa if model.attention == "sdpa" else model.attention or "none"


def dtypes_of(model: nn.Module, config: DtypeConfig, attention: str) -> ProductDtypes:
    """The dtypes of this model's products; an architecture without SDPA runs attention as it runs the rest."""
    backend = attention_backend(model, attention)
    return product_dtypes(config.compute, config.head, tf32=config.tf32, attention=backend)


def meaningful_outputs(request: ModelRequest) -> int:
    """Columns of the head without those that pad the vocabulary."""
    return request.vocabulary if request.outputs is None else request.outputs


def closed_row_flops(model: nn.Module, case: Case, outputs: int) -> RowFlops | None:
    """By closed form, or None where there is none: an architecture from outside, though it may bear a known name,
    or a new one of the registry."""
    form = CLOSED_FORMS.get((case.architecture.id, case.task.id))
    if form is None or case.architecture not in ARCHITECTURES.values():
        return None
    return form(sizes_of(getattr(model, model.encoder_name).config, outputs))


Parts = Callable[[int], tuple[int, int, int]]


def counted_row_flops(model: nn.Module, case: Case, outputs: int, seq_len: int) -> tuple[Parts, Parts | None, str]:
    """By counting a few lengths: FLOPs of a row, of what a pass costs once (None: nothing, rows do not touch each other), and
    how they were found. An architecture whose FLOPs are no polynomial of the length (chunked attention) is counted again at
    every length that occurs, outside of all timing."""
    counter = counter_of(model, case, outputs)
    lengths = probe_lengths(seq_len)
    once = {length: counter.once_parts(length) for length in lengths}
    parts = {length: counter.row_parts(length) for length in lengths}
    fits = [fit({length: part[which] for length, part in parts.items()}) for which in (0, 1, 2)]
    touch = any(map(any, once.values()))
    also = ", and what a pass costs once" if touch else ""
    if None in fits:
        return counter.row_parts, counter.once_parts if touch else None, f"counted at every length that occurs{also}"
    source = f"counted at lengths {', '.join(map(str, parts))}, and a polynomial between them{also}"
    return RowFlops(*fits), counter.once_parts if touch else None, source


def counter_of(model: nn.Module, case: Case, outputs: int) -> ModelCounter:
    """A counter of model FLOPs: without the pad columns of a language model's head."""
    return ModelCounter(model, valid_outputs=outputs if case.task.head != "classification" else None)


def probe_lengths(seq_len: int) -> list[int]:
    """Four or five lengths up to ``seq_len`` (at least 4), the odd one beside the even one."""
    return sorted({2, seq_len // 3, seq_len // 2, seq_len - 1, seq_len})


def utilisation(
    settings: RunSettings,
    model: nn.Module,
    request: ModelRequest,
    machine: Mapping[str, object],
    out: Path,
    *,
    attention: str,
    threads: int,
) -> Utilisation:
    """The run's `Utilisation`. ``model`` may be prepared already or not, but not compiled; ``machine`` is
    `instrument.environment.capture`'s; ``attention`` the SDPA backend and ``threads`` what torch uses on a CPU;
    ``out`` the results folder, whose ``machine.json`` may hold measured rates."""
    rates, remark = rates_measured_here(out, machine, None if settings.device == "cuda" else threads)
    known = {"measured": rates, "measured_remark" if rates else "measured_unknown": remark}
    peaks = Peaks(**datasheet_peaks(machine.get("gpu")), **known).of_many(settings.world)
    try:
        flops = step_flops(
            model,
            settings.case,
            settings.config,
            attention=attention,
            outputs=meaningful_outputs(request),
            seq_len=settings.seq_len,
            micro_batch=settings.micro_batch,
        )
    except Uncountable as error:
        return Utilisation(None, peaks, not_counted=str(error))
    return Utilisation(flops, peaks)
