"""The costs that the ops state by hand, against what their Triton kernels do: the interpreter counts every byte that is read or
written, and every multiplication. (Not the additions of reductions, which it leaves to numpy.)
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from triton.runtime import interpreter

from kernels import (
    ActivationRing,
    LogitStats,
    activation_stats,
    bce_with_logits,
    cross_entropy,
    logit_stats,
    multi_tensor_stats,
    scale_,
    unscale_and_stats_,
)

(activation_stats_cost, bce_with_logits_cost, cross_entropy_cost, logit_stats_cost, multi_tensor_stats_cost, unscale_cost) = (
    import_module(f"kernels.{name}")
    for name in ("activation_stats", "bce_with_logits", "cross_entropy", "logit_stats", "multi_tensor_stats", "unscale")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not count what a kernel reads"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy under Triton's interpreter
]
ROWS, WIDTH, TILE = 4, 4096, 1024
NUMELS, DTYPES = [8192, 4096], [torch.float32, torch.bfloat16]
SIZES = [dtype.itemsize for dtype in DTYPES]
ARITHMETIC = ("add", "subtract", "multiply", "divide", "exp")


class Executed:
    """What kernels did: bytes read and written, and floating-point operations on blocks of elements, by numpy's name."""

    def __init__(self) -> None:
        self.accesses, self.operations = [], Counter()

    @property
    def bytes(self) -> int:
        return sum(len(addresses) * size for addresses, size in self.accesses)

    def bytes_within(self, tensors: list[torch.Tensor]) -> int:
        """In the memory of `tensors`, an access as often as it happened."""
        ranges = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors]
        return sum(
            int(((addresses >= start) & (addresses < start + length)).sum()) * size
            for addresses, size in self.accesses
            for start, length in ranges
        )


@contextmanager
def executed() -> Iterator[Executed]:
    done, builder = Executed(), interpreter.InterpreterBuilder
    load, store, binary, unary = (
        getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "binary_op", "unary_op")
    )

    def access(pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        done.accesses.append((pointers.data[mask.data.astype(bool)], size))

    def counted_load(self, pointers, mask, *rest):
        access(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        access(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def operation(x, function):
        if x.data.dtype.kind == "f" and x.data.size > 128:  # not the sums of a thread or a row
            done.operations[function.__name__] += x.data.size

    def counted_binary(self, left, right, function):
        operation(left, function)
        return binary(self, left, right, function)

    def counted_unary(self, x, function):
        operation(x, function)
        return unary(self, x, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(builder, "binary_op", counted_binary)
        patch.setattr(builder, "unary_op", counted_unary)
        yield done


def a_list() -> list[torch.Tensor]:
    """Whole blocks, so that no lane is masked."""
    return [torch.randn(n).to(dtype) for n, dtype in zip(NUMELS, DTYPES, strict=True)]


def test_statistics_of_a_list():
    tensors = a_list()
    with executed() as done:
        multi_tensor_stats(tensors, impl="triton")
    assert done.bytes_within(tensors) == multi_tensor_stats_cost.bytes_moved(NUMELS, SIZES)
    assert 2 * done.operations["multiply"] == multi_tensor_stats_cost.flops(NUMELS)  # each square is added


def test_statistics_of_outputs():
    tensors, ring = a_list(), ActivationRing(2)
    ring.tick()
    with executed() as done:
        activation_stats(tensors, ring.at(range(2)), impl="triton")
    assert done.bytes_within(tensors) == activation_stats_cost.bytes_moved(NUMELS, SIZES)
    assert 2 * done.operations["multiply"] == activation_stats_cost.flops(NUMELS)


def test_scale():
    tensors = a_list()
    with executed() as done:
        scale_(tensors, torch.tensor(0.5), impl="triton")
    assert done.bytes_within(tensors) == unscale_cost.bytes_moved(NUMELS, SIZES)
    assert done.operations["multiply"] == unscale_cost.scale_flops(NUMELS)


@pytest.mark.parametrize("clip", [False, True])
def test_unscale(clip):
    tensors = a_list()
    with executed() as done:
        unscale_and_stats_(tensors, torch.tensor(0.5), impl="triton", clip=clip, max_norm=1e-3)
    assert done.bytes_within(tensors) == unscale_cost.bytes_moved(NUMELS, SIZES, clip)
    assert done.operations["multiply"] + sum(NUMELS) == unscale_cost.flops(NUMELS, clip)  # each square is added


def test_logit_stats():
    x, stats = torch.randn(ROWS, WIDTH), LogitStats("cpu")
    logit_stats(2 * x, stats, impl="triton")
    with executed() as done:  # a tile with a new largest is read again, for its place
        logit_stats(x, stats, impl="triton")
    assert done.bytes_within([x]) == logit_stats_cost.bytes_moved(ROWS, WIDTH, 4)
    assert not set(ARITHMETIC) & set(done.operations)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("op, labels", [("cross_entropy", None), ("bce_with_logits", None), ("bce_with_logits", 8)])
def test_losses(op, labels, deferred):
    """A row of this width is read once. Labels of a row are read once a tile, from a cache but the first time. The rest of
    the slack, 32 bytes a row: its loss, read again to be added up, and its target's logit."""
    logits = torch.randn(ROWS, WIDTH).half().requires_grad_()
    if op == "cross_entropy":
        loss_of, cost, targets, of_targets = cross_entropy, cross_entropy_cost, torch.randint(0, WIDTH, (ROWS,)), {}
    else:
        loss_of, cost, targets = bce_with_logits, bce_with_logits_cost, torch.zeros(ROWS, WIDTH, dtype=torch.half)
        of_targets = {"dense_target_bytes": 2}
    if labels:
        targets, of_targets = torch.randint(0, WIDTH, (ROWS, labels)), {"labels_per_row": labels}
    with executed() as forward:
        loss = loss_of(logits, targets, impl="triton", grad_scale=None if deferred else 1.0)
    with executed() as backward:
        loss.backward()
    passes = {"forward": forward, "backward": backward} if deferred else {"fused": forward}
    for mode, done in passes.items():
        due = cost.bytes_moved(ROWS, WIDTH, 2, mode, **of_targets)
        assert due <= done.bytes <= due + ROWS * (32 + 8 * (labels or 0) * WIDTH // TILE), mode
        if op == "bce_with_logits":
            flops = sum(done.operations[name] for name in ARITHMETIC)
            assert cost.flops(ROWS, WIDTH, mode) == pytest.approx(flops, rel=0.01), mode
    if not deferred:
        assert backward.bytes < 0.01 * forward.bytes
