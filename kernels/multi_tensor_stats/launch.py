"""The launcher: cuts a list into pieces, keeps the tables on the device, and starts the kernel.

The tables of a list are kept under (addresses, sizes, dtypes): the same list next step uploads nothing. When
only addresses change (gradients freed by `zero_grad(set_to_none=True)` and allocated elsewhere) the small table
of tensors is uploaded again, from pinned memory and without a sync. Nothing keeps the tensors themselves alive.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from kernels.multi_tensor_stats import triton_kernel as k
from kernels.multi_tensor_stats.stats import WORDS
from kernels.multi_tensor_stats.thresholds import bit_limit, round_up_fp32

PIECE = 1 << 14  # elements
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
ROWS = 8  # 16-byte loads in flight per thread (fp32; half as many blocks of twice the elements for 16 bits)
TAIL, JOIN = 256, 64
KEPT = 32  # lists whose tables are kept, least recently used first out
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Plan:
    """The tables of one list on one device and stream, and how they came about."""

    tensors: torch.Tensor  # int64 (n, TENSOR_WORDS): address, elements, first piece, pieces, dtype
    pieces: torch.Tensor  # int64 (pieces, 2): tensor | elements << 32, first element
    floats: torch.Tensor
    ints: torch.Tensor
    tickets: torch.Tensor  # int32 (n + 1,): zero between launches
    tensor_bad: torch.Tensor
    present: tuple[bool, bool, bool]  # fp32, bf16, fp16
    reused: str  # "all": nothing was uploaded; "pieces": addresses only; "nothing"
    staging: tuple[torch.Tensor, ...]  # pinned memory that an upload reads

    @property
    def n_pieces(self) -> int:
        return self.pieces.shape[0]


_plans: OrderedDict[tuple, Plan] = OrderedDict()
_layouts: OrderedDict[tuple, Plan] = OrderedDict()
last_plan: Plan | None = None  # of the most recent launch in this process: for tests
launches = 0  # kernels started by this process: for tests


def plan_for(flats: list[torch.Tensor], device: torch.device) -> Plan:
    """The tables of a list of flat tensors, from the cache where nothing has changed."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = tuple([x.data_ptr() for x in flats])
    shape_key = (str(device), stream, PIECE, tuple([(x.numel(), x.dtype) for x in flats]))
    key = (addresses, shape_key)
    if key in _plans:
        _plans.move_to_end(key)
        return _plans[key] if _plans[key].reused == "all" else _keep(_plans, key, replace(_plans[key], reused="all"))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "multi_tensor_stats: this list has no tables yet, and a CUDA graph is being captured. Call it once on the "
            "same tensors before the capture, and keep them"
        )
    layout_key = (shape_key, tuple([_head(a, x.dtype) if x.numel() else 0 for a, x in zip(addresses, flats, strict=True)]))
    table, pieces = _tables(addresses, flats, PIECE)
    tensors, staged = _upload(table, device)
    if layout_key in _layouts:
        plan = replace(_layouts[layout_key], tensors=tensors, reused="pieces", staging=(staged,))
    else:
        on_device, staged_pieces = _upload(pieces, device)
        present = tuple(any(x.dtype == d for x in flats) for d in DTYPES)
        ints = {"dtype": torch.int32, "device": device}
        plan = Plan(
            tensors,
            on_device,
            floats=torch.empty((len(pieces), k.P_FLOATS), dtype=torch.float64, device=device),
            ints=torch.empty((len(pieces), k.P_INTS), **ints),
            tickets=torch.zeros(len(flats) + 1, **ints),
            tensor_bad=torch.empty(len(flats), **ints),
            present=present,
            reused="nothing",
            staging=(staged, staged_pieces),
        )
        _keep(_layouts, layout_key, plan)
    return _keep(_plans, key, plan)


def _keep(cache: OrderedDict, key: tuple, plan: Plan) -> Plan:
    cache[key] = plan
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return plan


def _head(address: int, dtype: torch.dtype) -> int:
    """Elements before the first 16-byte boundary: they form a piece of their own."""
    return -address % 16 // BYTES[dtype]


def _tables(addresses: tuple[int, ...], flats: list[torch.Tensor], piece: int) -> tuple[np.ndarray, np.ndarray]:
    """Numpy tables of tensors and of pieces; a tensor without elements has one empty piece, which writes its row."""
    table = np.zeros((len(flats), k.TENSOR_WORDS), np.int64)
    parts = []
    n_pieces = 0
    for row, (address, x) in enumerate(zip(addresses, flats, strict=True)):
        numel = x.numel()
        head = min(_head(address, x.dtype), numel) if numel else 0
        starts = np.arange(head, max(numel, head + 1), piece)
        if head and numel > head:
            starts = np.concatenate(([0], starts))
        elif head:
            starts = np.zeros(1, np.int64)
        lengths = np.diff(np.append(starts, numel))
        parts.append(np.stack((row | lengths << 32, starts), axis=1))
        table[row, :5] = address, numel, n_pieces, len(starts), DTYPES[x.dtype]
        n_pieces += len(starts)
    return table, np.concatenate(parts).astype(np.int64)


def _upload(table: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.from_numpy(table)
    if device.type != "cuda":
        return host, host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host


def rows(store: bool) -> int:
    """Loads in flight per thread: half as many where a store follows each, or registers spill."""
    return ROWS // 2 if store else ROWS


def packs(below_at: torch.Tensor | None, below: float) -> bool:
    """Whether 16-bit tensors take the packed loop: its threshold is a host number that fp16 patterns can order."""
    return below_at is None and 0 <= below <= 2.0**100


@lru_cache(maxsize=64)
def below_patterns(below: float) -> tuple[int, int]:
    """The threshold's bits in both halves of an int32, in bf16 and in fp16."""
    limits = (bit_limit(min(max(below, 0.0), 2.0**100), dtype) for dtype in (torch.bfloat16, torch.float16))
    return tuple(limit * 0x10001 for limit in limits)


def launch_stats(
    tensors: list[torch.Tensor],
    words: torch.Tensor,
    below_at: torch.Tensor | None,
    below: float,
    counts: bool,
    inv_scale_at: torch.Tensor | None = None,
    inv_scale: float = 1.0,
    max_norm: float | None = None,
    scale: bool = False,
    store: bool = False,
) -> Plan | None:
    """One launch for the whole list (none for an empty one). Returns its plan."""
    from kernels.multi_tensor_stats.op import flat

    global last_plan, launches
    last_plan = None
    if not tensors:
        words.zero_()
        words[-1, -2] = -1  # first_nonfinite_index: none
        words.view(torch.float32)[-1, -1] = 1.0  # clip_factor
        return None
    flats = [x if x.is_contiguous() else flat(x.detach()) for x in tensors]
    plan = plan_for(flats, words.device)
    f64, f32 = words.view(torch.float64), words.view(torch.float32)
    fp32, bf16, fp16 = plan.present
    with torch.cuda.device_of(words):
        k.stats_kernel[(plan.n_pieces,)](
            plan.tensors, plan.pieces, plan.floats, plan.ints, plan.tickets, plan.tensor_bad, words, f64, f32,
            f32 if inv_scale_at is None else inv_scale_at, f32 if below_at is None else below_at,
            float(inv_scale), round_up_fp32(below), *below_patterns(below),
            -1.0 if max_norm is None else float(max_norm), len(tensors),
            ROWS=rows(store), THREADS=THREADS, TAIL=TAIL, JOIN=JOIN,
            TENSOR_WORDS=k.TENSOR_WORDS, P_FLOATS=k.P_FLOATS, P_INTS=k.P_INTS, WORDS=WORDS,
            FP32=fp32, BF16=bf16, FP16=fp16, SCALE=scale, STORE=store, COUNTS=counts,
            INV_SCALE_AT=inv_scale_at is not None, BELOW_AT=below_at is not None,
            PACKED=packs(below_at, below), num_warps=NUM_WARPS,
        )  # fmt: skip
    last_plan, launches = plan, launches + 1
    return plan
