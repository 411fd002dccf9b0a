"""A list of tensors as an argument of one launch: its checks, its flat views, and its tables on the device.

Shared by multi_tensor_stats, unscale, scale and activation_stats; torch only, no Triton. A list is cut into tiles of
at most TILE elements of one tensor; a program takes one tile. The tables of a list are kept under (addresses, sizes,
dtypes): the same list next step uploads nothing. When only addresses change (gradients freed by
`zero_grad(set_to_none=True)` and allocated elsewhere) the small table of tensors is uploaded again, from pinned
memory and without a sync. Nothing keeps the tensors themselves alive.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.dispatch import FLOAT_DTYPES, check_float, check_same_device

TILE = 1 << 14  # elements
KEPT = 32  # lists whose tables are kept, least recently used first out
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TENSOR_COLUMNS = 8  # of the table of tensors: address, elements, first tile, tiles, dtype code; the rest pads
TILE_FLOATS, TILE_INTS = 2, 8  # partial results: sumsq, absmax | nan, inf, zeros, flush, subnormal, below, bad before


def check_tensors(op: str, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """Dense floating-point tensors on one device, or an error that names the first that is not."""
    for index, x in enumerate(tensors):
        if isinstance(x, torch.Tensor) and x.dtype in FLOAT_DTYPES and x.device == device and x.layout is torch.strided:
            continue  # the names are put together only for a message
        check_float(op, f"tensors[{index}]", x)
        if x.layout is not torch.strided:
            raise TypeError(f"{op}: tensors[{index}] must be dense, got layout {x.layout}")
        check_same_device(op, device, **{f"tensors[{index}]": x})


def flat(x: torch.Tensor) -> torch.Tensor:
    """All elements as one dimension, in storage order where they are dense in memory; otherwise a copy.

    The statistics do not depend on the order. `flat(x).data_ptr() == x.data_ptr()` tells a view from a copy.
    """
    if x.is_contiguous():
        return x.view(-1)
    size = 1
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length != 1 and stride != size:
            return x.reshape(-1).contiguous()  # reshape alone may return a view with gaps
        size *= length
    return x.as_strided((x.numel(),), (1,))


def flats_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors that hold the same elements, for reading."""
    return [x if x.is_contiguous() else flat(x.detach()) for x in tensors]


def copy_back(tensors: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> None:
    """Write `flats`, changed in place, to those `tensors` of which they are copies and not views."""
    for x, changed in zip(tensors, flats, strict=True):
        if changed.data_ptr() != x.data_ptr():
            x.copy_(changed.view(x.shape))


def increment_versions(tensors: Sequence[torch.Tensor]) -> None:
    """For what was written through raw pointers, on a CPU through numpy: autograd did not see it."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


@dataclass(frozen=True)
class TensorTables:
    """The tables of one list on one device and stream, and how they came about."""

    tensors: torch.Tensor  # int64 (n, TENSOR_COLUMNS)
    tiles: torch.Tensor  # int64 (tiles, 2): tensor | elements << 32, first element
    floats: torch.Tensor
    ints: torch.Tensor
    tickets: torch.Tensor  # int32 (n + 1,): zero between launches
    tensor_bad: torch.Tensor
    present: tuple[bool, ...]  # fp32, bf16, fp16
    reused: str  # "all": nothing was uploaded; "tiles": addresses only; "nothing"
    staging: tuple[torch.Tensor, ...]  # pinned memory that an upload reads

    @property
    def n_tiles(self) -> int:
        return self.tiles.shape[0]

    @property
    def dtypes(self) -> dict[str, bool]:
        """Which dtypes a kernel needs code for, as its constants."""
        return dict(zip(("FP32", "BF16", "FP16"), self.present, strict=True))


_tables: OrderedDict[tuple, TensorTables] = OrderedDict()
_layouts: OrderedDict[tuple, TensorTables] = OrderedDict()
last_tables: TensorTables | None = None  # of the most recent launch in this process: for tests
launches = 0  # kernels started by this process: for tests


def launched(tables: TensorTables) -> TensorTables:
    """Take note of a launch over `tables`."""
    global last_tables, launches
    last_tables, launches = tables, launches + 1
    return tables


def tables_of(flats: Sequence[torch.Tensor], device: torch.device) -> TensorTables:
    """The tables of a list of flat tensors, from the cache where nothing has changed."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = tuple([x.data_ptr() for x in flats])
    shape_key = (str(device), stream, TILE, tuple([(x.numel(), x.dtype) for x in flats]))
    key = (addresses, shape_key)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key] if _tables[key].reused == "all" else _keep(_tables, key, replace(_tables[key], reused="all"))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "multi_tensor_stats: this list has no tables yet, and a CUDA graph is being captured. Call it once on the "
            "same tensors before the capture, and keep them"
        )
    layout_key = (shape_key, tuple([_head(a, x.dtype) if x.numel() else 0 for a, x in zip(addresses, flats, strict=True)]))
    tensor_rows, tile_rows = _cut(addresses, flats)
    tensors, staged = _upload(tensor_rows, device)
    if layout_key in _layouts:
        tables = replace(_layouts[layout_key], tensors=tensors, reused="tiles", staging=(staged,))
    else:
        tiles, staged_tiles = _upload(tile_rows, device)
        tables = TensorTables(
            tensors,
            tiles,
            floats=torch.empty((len(tile_rows), TILE_FLOATS), dtype=torch.float64, device=device),
            ints=torch.empty((len(tile_rows), TILE_INTS), dtype=torch.int32, device=device),
            tickets=torch.zeros(len(flats) + 1, dtype=torch.int32, device=device),
            tensor_bad=torch.empty(len(flats), dtype=torch.int32, device=device),
            present=tuple(any(x.dtype == d for x in flats) for d in DTYPE_CODES),
            reused="nothing",
            staging=(staged, staged_tiles),
        )
        _keep(_layouts, layout_key, tables)
    return _keep(_tables, key, tables)


def _keep(cache: OrderedDict, key: tuple, tables: TensorTables) -> TensorTables:
    cache[key] = tables
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return tables


def _head(address: int, dtype: torch.dtype) -> int:
    """Elements before the first 16-byte boundary: they form a tile of their own."""
    return -address % 16 // dtype.itemsize


def _cut(addresses: tuple[int, ...], flats: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Numpy tables of tensors and of tiles; a tensor without elements has one empty tile, which writes its row.

    A tile starts on 16 bytes unless it is shorter than that.
    """
    table = np.zeros((len(flats), TENSOR_COLUMNS), np.int64)
    parts = []
    n_tiles = 0
    for row, (address, x) in enumerate(zip(addresses, flats, strict=True)):
        numel = x.numel()
        head = min(_head(address, x.dtype), numel) if numel else 0
        starts = np.arange(head, max(numel, head + 1), TILE)
        if head and numel > head:
            starts = np.concatenate(([0], starts))
        elif head:
            starts = np.zeros(1, np.int64)
        lengths = np.diff(np.append(starts, numel))
        parts.append(np.stack((row | lengths << 32, starts), axis=1))
        table[row, :5] = address, numel, n_tiles, len(starts), DTYPE_CODES[x.dtype]
        n_tiles += len(starts)
    return table, np.concatenate(parts).astype(np.int64)


def _upload(table: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.from_numpy(table)
    if device.type != "cuda":
        return host, host
    host = host.pin_memory()
    return host.to(device, non_blocking=True), host
