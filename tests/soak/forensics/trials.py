"""Injection trials: plant a fault at random, train, and see whether the watch names it.

What should be named is decided without the watch: a twin of the run, without any instrument, says
in which step something that must stay finite (loss, gradients of an update, parameters, states)
first is not; the plant says which module and phase. A fault that harms nothing (an infinity that
``tanh`` maps to 1) must not be named at all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from harness.figures import Figure, summarize
from instrument.replay.recorder import OpRecorder
from instrument.results.schemas import FirstNonfinite
from instrument.watch.watch import Watch
from tests.soak.forensics.planted_models import MODELS, PLANTS, Planted, Subject, build, make_gelu_overflow, plant

STEPS = 4
CAUSES = {"overflow_weight": "overflow", "underflow_then_divide": "underflow_then_divide"}
"""Of a plant; of every other, which writes a NaN or an infinity down, ``invalid``."""
LIVING_STATES = ("state_nan", "state_inf")


@dataclass(frozen=True)
class Trial:
    """One draw. ``plant`` None: a healthy run."""

    seed: int
    model: str
    dtype: str
    attention: str
    micro_batches: int
    plant: str | None
    module: str | None
    step: int
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """``expected`` and ``named`` are (step, phase, module, op) or None; ``why_wrong`` is empty when they agree.
    ``infinities``: of a healthy run, how many ops of its last step had an infinite output all the same."""

    trial: Trial
    expected: tuple | None
    named: tuple | None
    cause: str | None
    op: str | None
    why_wrong: str
    infinities: int = 0

    def as_row(self) -> dict[str, object]:
        return {
            **asdict(self.trial),
            "expected": self.expected,
            "named": self.named,
            "cause": self.cause,
            "op": self.op,
            "why_wrong": self.why_wrong,
        }


def injection_trials(n: int, seed: int = 0, device: str = "cpu") -> Iterator[Result]:
    """``n`` runs with a planted fault; a draw whose plant cannot do what it should is drawn again."""
    done, draw = 0, seed * 1_000_003
    while done < n:
        draw += 1
        result = run_trial(_draw(draw, device))
        if result is not None:
            done += 1
            yield result


def healthy_trials(n: int, seed: int = 0, device: str = "cpu") -> Iterator[Result]:
    """``n`` runs with nothing planted, masks and absorbed infinities among them: nothing must be named."""
    done, draw = 0, 500_000 + seed * 1_000_003
    while done < n:
        draw += 1
        result = run_trial(_draw(draw, device, healthy=True))
        if result is not None:
            done += 1
            yield result


def _draw(seed: int, device: str, healthy: bool = False) -> Trial:
    chance = random.Random(f"trial {seed}")
    model = chance.choice(MODELS)
    dtype = chance.choice(["float32", "float32", "bfloat16", "float16"])
    attention = chance.choice(["eager", "sdpa"])
    kind = None if healthy else chance.choice(PLANTS)
    micro_batches = chance.choice([1, 1, 2])
    subject = build(model, getattr(torch, dtype), attention, seed)
    step = chance.randint(2 if kind in LIVING_STATES else 1, STEPS)
    module = None if healthy else chance.choice(candidates(kind, subject.model))
    return Trial(seed, model, dtype, attention, micro_batches, kind, module, step, device)


def candidates(kind: str, model: nn.Module) -> list[str]:
    """The modules that a fault can be planted in."""
    called = [(name, m) for name, m in model.named_modules() if name and not isinstance(m, nn.ModuleList)]
    if kind == "overflow_weight":
        return [
            name
            for name, m in called
            if getattr(m, "weight", None) is not None and m.weight.ndim == 2 and not isinstance(m, nn.Embedding)
        ]
    if kind in ("forward_nan", "forward_inf", "backward_nan", "backward_inf"):
        return [name for name, _ in called]
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}  # tied weights: the first
    return [name for name, _ in called if name in owners]


def run_trial(trial: Trial) -> Result | None:
    """Run one trial; None when the draw does not do what it should (redraw)."""
    expected = _expected(trial)
    if expected == "redraw":
        return None
    watched = _Run(trial)
    watch = Watch(watched.subject.model, watched.optimizer, replay=watched.step, every=trial.seed % 3)
    watched.watch = watch
    for step in range(1, STEPS + 1):
        with watch.step(step):
            watched.step(step)
        if watch.first_nonfinite is not None:
            break
    found = watch.first_nonfinite
    watch.close()
    named = None if found is None else (found.step, found.phase, found.module, found.op)
    infinities = watched.infinities() if trial.plant is None else 0
    return Result(trial, expected, named, found and found.cause, found and found.op, _judge(trial, expected, found), infinities)


def _judge(trial: Trial, expected: tuple | None, found: FirstNonfinite | None) -> str:
    """Why the answer is wrong; empty when it is right."""
    if (expected is None) != (found is None):
        return "named a healthy run" if expected is None else "named nothing"
    if found is None:
        return ""
    if not (found.replay or {}).get("matched"):
        return "the replay did not match"
    if (found.step, found.phase, found.module) != expected[:3]:
        return "another step, phase or module"
    if found.op != expected[3]:
        return f"op {found.op}, not {expected[3]}"
    wanted = CAUSES.get(trial.plant, "invalid")
    return "" if found.cause == wanted else f"cause {found.cause}, not {wanted}"


class _Run:
    """A training run with its fault armed."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.subject: Subject = build(trial.model, getattr(torch, trial.dtype), trial.attention, trial.seed, trial.device)
        if trial.plant is None and trial.model == "gpt2" and trial.dtype == "float16":
            make_gelu_overflow(self.subject.model)
        parameters = [p for p in self.subject.model.parameters() if p.requires_grad]
        eps = 1e-3 if trial.dtype == "float16" else 1e-8  # anything smaller is zero in fp16, and a fault of its own
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=eps, foreach=True)
        self.planted: Planted = (
            Planted("", None)
            if trial.plant is None
            else plant(trial.plant, self.subject.model, self.optimizer, trial.module, trial.step)
        )
        self.watch: Watch | None = None

    def step(self, step: int) -> bool:
        """One training step; True when loss and the updating gradients were finite."""
        self.planted.begin(step)
        losses = []
        for microbatch in range(self.trial.micro_batches):
            loss = self.subject.loss_of(self.subject.model, step, microbatch)
            losses.append(loss.detach() if self.watch is None else self.watch.loss(loss).detach())
            loss.backward()
        with self.watch.phase("unscale") if self.watch else nullcontext():
            factor = self.planted.unscale_by(step)
            if factor != 1.0:
                self._unscale(factor)
        self.planted.before_update(step)
        gradients = [p.grad for p in self.subject.model.parameters() if p.grad is not None]
        fine = all(bool(t.isfinite().all()) for t in (*losses, *gradients))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return fine

    def _unscale(self, factor: float) -> None:
        """A defective unscaling of one module's gradients."""
        where = dict(self.subject.model.named_modules())[self.trial.module]
        for parameter in where.parameters(recurse=False):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def infinities(self) -> int:
        """How many ops of one more step write something infinite."""
        self.watch = None
        recorder = OpRecorder(self.subject.model, self.optimizer)
        with recorder.recording():
            self.step(STEPS + 1)
        return sum(node.kinds > 0 for node in recorder.graph.nodes)

    def finite(self) -> bool:
        """Whether parameters and states are finite."""
        states = [v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.is_floating_point()]
        return all(bool(t.isfinite().all()) for t in (*self.subject.model.parameters(), *states))


def _expected(trial: Trial) -> tuple | str | None:
    """(step, phase, module, op) that must be named, None when nothing must be; by a twin without a watch."""
    twin = _Run(trial)
    seen: list[str] = []
    if trial.plant == "overflow_weight":
        _note_first_bad_module(twin.subject.model, seen)
    failed = None
    for step in range(1, STEPS + 1):
        seen.clear()
        if not twin.step(step) or not twin.finite():
            failed = step
            break
    if trial.plant is None:
        return "redraw" if failed else None  # not a healthy run after all
    if failed is None:
        return "redraw" if trial.plant in ("overflow_weight", "unscale", "underflow_then_divide", *LIVING_STATES) else None
    if failed != trial.step:
        return "redraw"  # ill before the fault, or of it later
    if trial.plant == "overflow_weight" and seen[:1] != [trial.module]:
        return "redraw"  # the large weight did harm further on: where, this twin cannot say
    return failed, twin.planted.phase, twin.planted.module, twin.planted.op


def _note_first_bad_module(model: nn.Module, seen: list[str]) -> None:
    """Collect the modules with a non-finite output, in the order in which they return."""

    def note(name: str):
        def hook(module, args, output):
            tensors = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else [output]
            if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
                seen.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))


HEALTHY_SHARE = 0.4
"""Healthy runs for every injected one: 200 for 500."""


def measure(trials: int) -> list[Figure]:
    """The share of ``trials`` injected faults that were named right (step, phase, module, op, cause), by plant and together,
    and of healthy runs in which nothing was named."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    injected = list(injection_trials(trials, device=device))
    healthy = list(healthy_trials(max(1, round(trials * HEALTHY_SHARE)), device=device))
    figures = []
    for name in dict.fromkeys(result.trial.plant for result in sorted(injected, key=lambda r: r.trial.plant)):
        figures.append(_share(f"right_{name}", [r for r in injected if r.trial.plant == name]))
    wrong = [r for r in (*injected, *healthy) if r.why_wrong]
    figures.append(_share("right", injected, at_least=1.0, note=_summary(injected)))
    figures.append(
        _share(
            "healthy_left_alone",
            healthy,
            at_least=1.0,
            note=(f"{sum(r.infinities > 0 for r in healthy)} of {len(healthy)} held infinities that died out or a mask's"),
        )
    )
    figures += [summarize("forensics", f"wrong: {r.why_wrong}", [1.0], "count", note=str(r.as_row())) for r in wrong[:20]]
    return figures


def _share(name: str, results: list, *, at_least: float | None = None, note: str = "") -> Figure:
    right = [0.0 if r.why_wrong else 1.0 for r in results]
    return summarize(
        "forensics",
        name,
        [sum(right) / len(right)],
        "ratio",
        at_least=at_least,
        note=note or f"{int(sum(right))} of {len(right)}",
    )


def _summary(injected: list) -> str:
    models = Counter(r.trial.model for r in injected)
    right = sum(not r.why_wrong for r in injected)
    harmless = sum(r.expected is None for r in injected)
    return f"{right} of {len(injected)}; {harmless} did no harm and were left alone; " + ", ".join(
        f"{name} {count}" for name, count in sorted(models.items())
    )
