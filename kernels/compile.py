"""Ahead-of-time compilation of every kernel for every GPU generation, on a machine without a GPU.

    python -m kernels compile [--arch sm_75 ...] [--op NAME ...] [--json]

Each module with Triton kernels has a function that lists `CompileSpec`s. A spec comes from a launcher that is called
with tensors of the real shape but without memory (device "meta"): the kernel's own signature and the arguments of that
call say its types, constants and alignment, by Triton's rules. What is printed is read from the machine code itself, with
the `cuobjdump` that the triton wheel carries: registers, shared memory, stack, and every instruction that touches global
or local memory.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

from kernels.bench import known
from kernels.float_formats import float_format

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# Op -> the function that lists its kernels, by hand, in the order of the README.
MODULES = {
    "logit_stats": "kernels.logit_stats.triton_kernel:compile_specs",
    "fused_loss_kernel": "kernels.fused_loss_kernel:compile_specs",
    "cross_entropy": "kernels.cross_entropy.triton_kernel:compile_specs",
    "bce_with_logits": "kernels.bce_with_logits.triton_kernel:compile_specs",
    "multi_tensor_stats": "kernels.multi_tensor_stats.triton_kernel:compile_specs",
    "unscale": "kernels.unscale.triton_kernel:unscale_specs",
    "scale": "kernels.unscale.triton_kernel:scale_specs",
    "activation_stats": "kernels.activation_stats.triton_kernel:compile_specs",
    "resolvent_mix": "kernels.resolvent_mix.triton_kernel:compile_specs",
    "selective_scan": "kernels.selective_scan.triton_kernel:compile_specs",
}


@dataclass(frozen=True)
class CompileSpec:
    """One kernel as it is really launched: its types, constants and alignment.

    kernel, dtype, shape  printed in the table: "cross_entropy_rows", "bf16", the real shape that the constants stand for
    fn           the `triton.JITFunction`
    signature    argument name -> Triton type: "*bf16", "*i64", "i32", "fp32", or "constexpr"
    constexprs   argument name -> value of every constexpr argument
    divisible    names of arguments (pointers, strides, sizes) known to be multiples of 16
    options      what the launch sets beside arguments: num_warps, maxnreg
    streaming    the kernel reads or writes big tensors: a test demands 128-bit global accesses
    """

    kernel: str
    dtype: str
    shape: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    divisible: tuple[str, ...]
    options: Mapping[str, int]
    streaming: bool


@dataclass(frozen=True)
class Compiled:
    """One kernel in one dtype for one generation, as its machine code says.

    spills        instructions that load or store local memory (0: no spill, no local array)
    stack_bytes   stack frame per thread
    load_bits     widest global load, store_bits: widest global store (0: none)
    loads, stores instructions per width in bits, e.g. {"128": 12, "64": 1}
    """

    kernel: str
    arch: str
    dtype: str
    shape: str
    registers: int
    spills: int
    shared_bytes: int
    stack_bytes: int
    load_bits: int
    store_bits: int
    loads: dict[str, int]
    stores: dict[str, int]
    num_warps: int
    streaming: bool


class CompileError(RuntimeError):
    """A tool or package that compilation needs is missing, or refused its input."""


def collect(ops: list[str] | None = None) -> list[CompileSpec]:
    """The specs of all op modules, or of those named ("cross_entropy")."""
    ops = known(ops, MODULES)
    if find_spec("triton") is None:
        raise CompileError("compilation needs the triton package, which is not installed")
    return [spec for op in ops for spec in resolve_name(MODULES[op])()]


def as_launched(
    labels: Sequence[tuple[str, str, str]], launch: Callable, *args, streaming: bool = True, **options
) -> list[CompileSpec]:
    """The specs of the kernels that `launch(*args, **options)` starts, which is called but starts none of them.

    labels     (kernel, dtype, shape) of each, in order
    streaming  whether they read or write big tensors
    """
    from triton.runtime.jit import JITFunction

    from kernels.dispatch import interpreted

    if interpreted():
        raise CompileError("Triton runs as an interpreter here (TRITON_INTERPRET); unset it to compile")
    calls: list[tuple[Any, tuple, dict]] = []

    def note(kernel, *arguments, grid, warmup, **named):
        calls.append((kernel, arguments, named))

    with mock.patch.object(JITFunction, "run", note):
        launch(*args, **options)
    return [_spec(*label, streaming, *call) for label, call in zip(labels, calls, strict=True)]


def _spec(name: str, dtype: str, shape: str, streaming: bool, fn, arguments: tuple, named: dict) -> CompileSpec:
    """From one call of a kernel, as Triton itself specialises it: None and 1 are constants, multiples of 16 are known."""
    values = dict(zip(fn.arg_names, arguments, strict=False)) | {n: v for n, v in named.items() if n in fn.arg_names}
    signature, constexprs, divisible = {}, {}, []
    for parameter in fn.params:
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _triton_type(value)
        place = value.storage_offset() * value.element_size() if hasattr(value, "data_ptr") else value
        if specialised and type(place) is int and place % 16 == 0:
            divisible.append(parameter.name)
    options = {n: v for n, v in named.items() if n not in fn.arg_names}
    return CompileSpec(name, dtype, shape, fn, signature, constexprs, tuple(divisible), options, streaming)


def _triton_type(value) -> str:
    if hasattr(value, "data_ptr"):
        known = float_format(value.dtype)
        return "*" + (known.name if known else str(value.dtype).removeprefix("torch.").replace("int", "i"))
    if isinstance(value, float):
        return "fp32"
    return "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_all(archs: list[str] | None = None, ops: list[str] | None = None) -> Iterator[Compiled]:
    """Compile every spec for every architecture, in order. CompileError when Triton runs as an interpreter."""
    for spec in collect(ops):
        for arch in archs or ARCHS:
            yield compile_one(spec, arch)


def compile_one(spec: CompileSpec, arch: str) -> Compiled:
    """One spec for one architecture such as "sm_90"."""
    cubin, shared_bytes = _cubin(spec, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = _cuobjdump(file.name)
    loads, stores, local = read_sass(dump)
    registers, stack = (int(re.search(rf"{name}:(\d+)", dump).group(1)) for name in ("REG", "STACK"))
    widest = (max(widths, default=0) for widths in (loads, stores))
    counted = ({str(bits): n for bits, n in sorted(widths.items())} for widths in (loads, stores))
    return Compiled(
        spec.kernel, arch, spec.dtype, spec.shape, registers, local, shared_bytes, stack, *widest, *counted,
        spec.options["num_warps"], spec.streaming,
    )  # fmt: skip


def read_sass(sass: str) -> tuple[Counter[int], Counter[int], int]:
    """(global loads by width in bits, global stores by width, local-memory instructions) of a disassembly."""
    loads, stores, local = Counter(), Counter(), 0
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE):
        name, *parts = opcode.split(".")
        if name in ("LDL", "STL"):
            local += 1
        elif name in ("LDG", "LDGSTS"):
            loads[_width(parts)] += 1
        elif name == "STG":
            stores[_width(parts)] += 1
    return loads, stores, local


def _width(parts: list[str]) -> int:
    for part in parts:
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32


def _cubin(spec: CompileSpec, arch: str) -> tuple[bytes, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = {name: i for i, name in enumerate(spec.fn.arg_names)}
    source = ASTSource(
        fn=spec.fn,
        signature=spec.signature,
        constexprs={(order[name],): value for name, value in spec.constexprs.items()},
        attrs={(order[name],): [["tt.divisibility", 16]] for name in spec.divisible},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel = triton.compile(source, target=target, options={"enable_fp_fusion": True, **spec.options})
    return kernel.asm["cubin"], kernel.metadata.shared


def _cuobjdump(path: str) -> str:
    """Resource usage and machine code, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        return subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as e:
        raise CompileError(f"the triton package carries no cuobjdump at {tool}") from e
    except subprocess.CalledProcessError as e:
        raise CompileError(f"cuobjdump failed: {e.stderr.strip()}") from e
