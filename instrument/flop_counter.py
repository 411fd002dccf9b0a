"""Counts a model's products on fake tensors on the meta device: no memory, no arithmetic, any size.

Torch's own `FlopCounterMode` gives the same total, but not the modules: its tracker credits a module
that returns its input (a dropout that is off) with the whole model's backward pass. Here a
product of the backward pass belongs to the module whose forward pass saved its operands.

SDPA on meta decomposes into its two products. On a CPU the flash kernel would count 0 (pytorch#195460).
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench_cases.ops_seen import is_attention


def convolution_backward(
    out_grad, x, weight, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted
):
    """FLOPs of a convolution's gradients: that of the input and that of the weight (``wanted``) each cost what the forward pass
    cost, where every position of the output (transposed: of the input) meets the whole weight, zeros of the padding included.
    Torch's formula (2.13) takes every input channel to meet every output channel, whatever the groups."""
    positions = (x if transposed else out_grad).shape[2:]
    return 2 * x.shape[0] * math.prod(positions) * weight.numel() * sum(wanted[:2])


FORMULAS = {
    torch.ops.aten.mv: lambda matrix, vector: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * matrix.numel(),
    torch.ops.aten.dot: lambda left, right: 2 * left.numel(),
    torch.ops.aten.convolution_backward: convolution_backward,
}
"""Of products that torch's table lacks or counts wrong."""
KNOWN_NAMESPACES = ("aten", "prims", "prim", "profiler")
PRODUCT_NAMES = re.compile(r"(^|_)(mm|linear|attention|conv(olution|\dd)?)($|_)")
"""torch's own ops that multiply: one without a formula (a grouped product) must not count 0 in silence."""
BATCHED = ("bmm", "baddbmm")
HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]


class Uncountable(Exception):
    """A model whose FLOPs cannot be counted; the reason is the message."""


@dataclass(frozen=True)
class Products:
    """The products of one kind in one module. ``kind``: ``attention`` (batched products around a softmax, as scores and
    their use are) or ``projection`` (all others: with a weight, convolutions included, and what a scan multiplies)."""

    module: str
    kind: str
    forward_flops: int
    backward_flops: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def part(self) -> str:
        """``encoder``, ``attention`` or ``head``: what a configuration may give dtypes of their own."""
        if self.module == "head" or self.module.startswith("head."):
            return "head"
        return "attention" if self.kind == "attention" else "encoder"


class ModelCounter:
    """Counts training FLOPs of a model that is called as ``model(input_ids, attention_mask, last_token)``.

    ``valid_outputs`` cuts pad columns off the head of a language model; None counts all that runs.
    The model is left as it is: what is counted is a copy without data. Raises `Uncountable`.
    """

    def __init__(self, model: nn.Module, *, valid_outputs: int | None = None) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._valid_outputs = valid_outputs
        self._known: dict[tuple[int, int], tuple[Products, ...]] = {}
        with _reasons(), self._fake:
            self._twin = without_data(model).eval()  # dropout costs no product, and some models throw dice in training
            _multiply_each_tokens_experts(self._twin)
            if valid_outputs is not None:
                cut_pad_columns(self._twin, valid_outputs)
            self._tally = Tally(self._twin)

    def count(self, rows: int, length: int) -> tuple[Products, ...]:
        """Products of one forward and backward pass over ``rows`` rows of ``length`` tokens, in the order
        in which the modules ran. Kept by shape."""
        if (rows, length) not in self._known:
            with _reasons():
                self._known[rows, length] = self._run(rows, length)
        return self._known[rows, length]

    def row_parts(self, length: int) -> tuple[int, int, int]:
        """FLOPs of what one more row costs: its (encoder, attention, head)."""
        return tuple(two - one for one, two in zip(self._parts(1, length), self._parts(2, length), strict=True))

    def once_parts(self, length: int) -> tuple[int, int, int]:
        """FLOPs of what a pass costs once, however many rows it has. Raises `Uncountable` where three rows do not cost what
        follows from one and two: where rows touch each other."""
        one, two, three = (self._parts(rows, length) for rows in (1, 2, 3))
        if any(a + c != 2 * b for a, b, c in zip(one, two, three, strict=True)):
            raise Uncountable(
                f"rows touch each other: one, two and three rows of {length} tokens cost {sum(one):,}, {sum(two):,} and "
                f"{sum(three):,} FLOPs, which is no sum over rows"
            )
        return tuple(2 * a - b for a, b in zip(one, two, strict=True))

    def _parts(self, rows: int, length: int) -> tuple[int, int, int]:
        products = self.count(rows, length)
        return tuple(sum(p.flops for p in products if p.part == part) for part in ("encoder", "attention", "head"))

    def _run(self, rows: int, length: int) -> tuple[Products, ...]:
        with self._fake, torch.enable_grad(), self._tally as tally:
            tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
            logits = self._twin(tokens, None, torch.zeros(rows, dtype=torch.int64, device="meta"))
            if self._valid_outputs is not None and logits.shape[-1] != self._valid_outputs:
                raise Uncountable(
                    f"the head has {logits.shape[-1]} columns, of which {self._valid_outputs} mean something, "
                    "and no layer that makes them was found to cut the others off"
                )
            with tally.backward():
                logits.backward(torch.empty_like(logits))
        self._twin.zero_grad(set_to_none=True)
        return tally.products()


def _multiply_each_tokens_experts(twin: nn.Module) -> None:
    """Let a mixture of experts of `transformers` multiply every token with the weights of the k experts that it is routed to,
    whichever they are: what it costs without data, and with any. Its other ways sort tokens by their experts."""
    for module in twin.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "batched_mm"


class Tally(TorchDispatchMode):
    """Adds up the FLOPs of the ops that pass, by the module that runs or, in a backward pass, ran."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._stack: list[str] = [""]
        self._in_backward = False
        self._experts = {n for n, m in model.named_modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)

    def __enter__(self) -> Tally:
        self._flops: dict[tuple[str, bool], list[int]] = defaultdict(lambda: [0, 0])
        self._softmaxes: set[str] = set()
        self._stack[:] = [""]
        self._in_backward = False
        self._saved.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._saved.__exit__(*error)

    @contextmanager
    def backward(self):
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def products(self) -> tuple[Products, ...]:
        found: dict[tuple[str, str], list[int]] = {}
        for (module, batched), flops in self._flops.items():
            kind = "attention" if batched and module in self._softmaxes else "projection"
            found[module, kind] = [a + b for a, b in zip(flops, found.get((module, kind), (0, 0)), strict=True)]
        return tuple(Products(module, kind, *flops) for (module, kind), flops in found.items())

    def _enter(self, name: str, *_) -> None:
        self._stack.append(name)

    def _leave(self, *_) -> None:
        self._stack.pop()

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
        return tensor, self._stack[-1]

    def _unpack(self, saved: tuple[torch.Tensor, str]) -> torch.Tensor:
        tensor, self._stack[-1] = saved
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op, module = func._overloadpacket, self._stack[-1]
        if is_attention(op.__name__, result):
            self._softmaxes |= {
                module,
                module.rpartition(".")[0],
            }  # where the softmax is a module, it is a part of its parent's
        if op in FORMULAS:
            flops = FORMULAS[op](*args, **kwargs)
        elif op in flop_registry:
            flops = flop_registry[op](*args, **kwargs, out_val=result)
        elif func.namespace in KNOWN_NAMESPACES and not PRODUCT_NAMES.search(op.__name__):
            return result
        else:
            raise Uncountable(
                f"the op {func.namespace}.{op.__name__} has no FLOP formula "
                "(torch.utils.flop_counter.register_flop_formula gives it one)"
            )
        if flops:
            batched = op.__name__ in BATCHED and module not in self._experts  # theirs are products with weights
            self._flops[module, batched or "attention" in op.__name__][self._in_backward] += flops
        return result


@contextmanager
def _reasons():
    """Models of other people fail on tensors without data in many ways: each becomes an `Uncountable`, and
    torch does not log a second account of it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    except Uncountable:
        raise
    except DataDependentOutputException as error:
        raise Uncountable(f"what the model computes depends on values that it reads back ({error.func})") from error
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        raise Uncountable(f"the model does not run on tensors without data ({type(error).__name__}: {message})") from error
    finally:
        log.disabled = before


def without_data(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes, dtypes and ties, but no memory, and whose modules have no hooks (a
    watch's would watch the count): for use inside a `FakeTensorMode`."""
    empty: dict[int, object] = {id(getattr(module, hooks)): OrderedDict() for module in model.modules() for hooks in HOOKS}
    for tensor in (*model.parameters(), *model.buffers()):
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(model, empty)


def cut_pad_columns(model: nn.Module, valid_outputs: int) -> None:
    """Shorten the head's last linear layer to its first ``valid_outputs`` columns. The embedding that it
    may be tied to keeps its rows: look-ups cost no product."""
    layers = [m for m in model.head.modules() if isinstance(m, nn.Linear) and m.out_features >= valid_outputs]
    if not layers:
        return  # the logits' own width then says whether anything is missing
    layer = layers[-1]
    layer.weight = nn.Parameter(layer.weight.detach()[:valid_outputs])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[:valid_outputs])
    layer.out_features = valid_outputs
