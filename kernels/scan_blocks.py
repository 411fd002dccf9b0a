"""How the scans along a sequence (`resolvent_mix`, `selective_scan`) are cut, and what their operators share.

A sequence is cut into chunks of `CHUNK` tokens, and the state at the start of each is kept for the backward pass. Where one
token holds few numbers, torch's calls cost more than their arithmetic: then many chunks advance together, one token of
each at a time, after a first pass that finds the states at their starts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from kernels.dispatch import FLOAT_DTYPES, check_same_device, register

CHUNK = 64
"""Tokens between two kept states."""
FEW_CHUNKS = 6
"""So many chunks at once do not pay for the first pass: the tokens are walked one by one."""
SEGMENTS = 64
"""At most so many programs share one sequence on a GPU."""
ROOM = 2**19
"""Numbers in all states that are under way on a GPU. The backward pass recomputes a chunk of each, into at most 128 MiB."""
SCAN_DTYPES = (*FLOAT_DTYPES, torch.float64)


def chunks_of(tokens: int) -> int:
    return (tokens + CHUNK - 1) // CHUNK


def blocks(tokens: int, numbers: int, together: int) -> Iterator[tuple[int, int, int]]:
    """(first token, chunks, tokens a chunk) of what is worked on at once, in order.

    numbers   that one token holds
    together  numbers that one call should hold: enough to outweigh the call, few enough to stay in a cache
    """
    most, start = together // max(1, numbers), 0
    if most > FEW_CHUNKS:
        while (left := tokens - start) >= CHUNK * (FEW_CHUNKS + 1):
            chunks = min(most, left // CHUNK)
            yield start, chunks, CHUNK
            start += chunks * CHUNK
    for first in range(start, tokens, CHUNK):
        yield first, 1, min(CHUNK, tokens - first)


def token_major(x: torch.Tensor, block: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Tokens of a block of x (batch, tokens, width) as (tokens of a chunk, chunks, batch, width), contiguous, in `dtype`."""
    start, chunks, length = block
    x = x[:, start : start + chunks * length].unflatten(1, (chunks, length))
    return x.permute(2, 1, 0, 3).to(dtype, memory_format=torch.contiguous_format)


def put_back(out: torch.Tensor, block: tuple[int, int, int], x: torch.Tensor) -> None:
    """The reverse of `token_major`: write x into the tokens of a block of `out`."""
    start, chunks, length = block
    out[:, start : start + chunks * length].unflatten(1, (chunks, length)).copy_(x.permute(2, 1, 0, 3))


def scan_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What a scan is computed in: fp32, whatever is stored; float64 where any argument is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def segments_of(tokens: int, numbers: int) -> tuple[int, int]:
    """(segments, tokens a segment) of a sequence on a GPU: whole chunks, as even as they go.

    numbers  in the states of all sequences at one token
    """
    segments = max(1, min(SEGMENTS, ROOM // numbers, chunks_of(tokens)))
    length = CHUNK * -(-chunks_of(tokens) // segments)
    return -(-tokens // length), length


def check_scan(
    op: str, impl: str, shapes: Mapping[str, tuple[torch.Tensor, Sequence[str]]], state: Sequence[str]
) -> dict[str, int]:
    """The size of every dimension, given name -> (tensor, names of its dimensions), and of those in `state`, scan dtype only.

    TypeError for what is no tensor or another dtype, ValueError for another shape, an empty tensor or another device.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (x, dimensions) in shapes.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in SCAN_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {str(x.dtype)[6:]}")
        if x.dim() != len(dimensions):
            raise ValueError(f"{op}: {name} must have the shape ({', '.join(dimensions)}), got {tuple(x.shape)}")
        for size, dimension in zip(x.shape, dimensions, strict=True):
            due, first = (int(dimension), "") if dimension.isdecimal() else sizes.setdefault(dimension, (size, name))
            if size != due:
                said = f"where {first} has {due}" if first else f"must be {due}"
                raise ValueError(
                    f"{op}: {name} has {size} for {dimension}, {said}: ({', '.join(dimensions)}) = {tuple(x.shape)}"
                )
        if x.numel() == 0:
            raise ValueError(f"{op}: {name} is empty: {tuple(x.shape)}; at least one of everything is needed")
    tensors = {name: x for name, (x, _) in shapes.items()}
    check_same_device(op, next(iter(tensors.values())).device, **tensors)
    dtype = scan_dtype(*tensors.values())
    for name in state:
        if tensors[name].dtype != dtype:
            raise TypeError(f"{op}: {name} is kept in {str(dtype)[6:]}, got {str(tensors[name].dtype)[6:]}")
    if impl == "triton" and dtype == torch.float64:
        raise TypeError(f"{op}: impl='triton' computes in float32; float64 needs impl='torch'")
    return {dimension: size for dimension, (size, _) in sizes.items()}


def register_scan(
    library: torch.library.Library,
    schemas: tuple[str, str],
    forward: tuple[Callable, Callable],
    backward: tuple[Callable, Callable],
    flops: tuple[Callable, Callable],
):
    """Register a scan and its backward pass as operators, autocast off inside, and return the first.

    schemas   of `scan` and `scan_backward`; both end with `str impl`. The last output of `scan` holds the states at the
              starts of the chunks, has no gradient, and enters `scan_backward` after the inputs, before the gradients
    forward, backward, flops  (run, fake) of each, and the FLOPs of each by shapes
    """

    def without_autocast(run):
        def quiet(*args):
            with torch.autocast(args[0].device.type, enabled=False):
                return run(*args)

        return quiet

    (run, fake), (run_back, fake_back) = forward, backward
    scan = register(library, f"scan{schemas[0]}", without_autocast(run), fake, flops[0])
    scan_backward = register(library, f"scan_backward{schemas[1]}", without_autocast(run_back), fake_back, flops[1])

    def keep(ctx, inputs, output):
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors, output[-1])

    def differentiate(ctx, *gradients):
        return *scan_backward(*ctx.saved_tensors, *gradients[:-1], ctx.impl), None

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"{library.ns}: the backward pass has no derivative of its own")

    torch.library.register_autograd(f"{library.ns}::scan", differentiate, setup_context=keep, lib=library)
    torch.library.register_autograd(f"{library.ns}::scan_backward", refuse, setup_context=lambda *_, **__: None, lib=library)
    return scan
