"""Ahead-of-time compilation of every kernel for every GPU generation, on a machine without a GPU.

    python -m kernels compile [--arch sm_75 ...] [--op NAME ...] [--json]

Each op module with Triton kernels exposes `compile_specs() -> list[CompileSpec]`. What is
printed is read from the machine code itself, with the `cuobjdump` that the triton wheel
carries: registers, shared memory, stack, and every instruction that touches global or
local memory.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# Modules that expose compile_specs(), by hand, in the order of the README.
MODULES = (
    "kernels.logit_stats",
    "kernels.fused_loss_kernel",
    "kernels.cross_entropy",
    "kernels.bce_with_logits",
    "kernels.multi_tensor_stats",
    "kernels.unscale",
    "kernels.scale",
    "kernels.exponent_histogram",
    "kernels.activation_stats",
)


@dataclass(frozen=True)
class CompileSpec:
    """One kernel as it is really launched: its types, constants and alignment.

    kernel       name printed in the table, e.g. "cross_entropy_forward"
    dtype        label printed in the table, e.g. "bf16"
    fn           zero-argument callable that returns the `triton.JITFunction` (imports triton when called)
    signature    argument name -> Triton type of every non-constexpr argument: "*bf16", "*i64", "i32", "fp32"
    constexprs   argument name -> value of every constexpr argument
    divisible    names of arguments (pointers, strides, sizes) known to be multiples of 16,
                 as they are for the real vocabulary and strides
    streaming    the kernel reads or writes big tensors: a test demands 128-bit global accesses
    shape        the real shape the constants stand for, printed in the table
    maxnreg      limit of registers a thread that the launch sets, None: the compiler's choice
    """

    kernel: str
    dtype: str
    fn: Callable[[], object]
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    streaming: bool = False
    shape: str = ""
    maxnreg: int | None = None


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

    def as_row(self) -> dict:
        return asdict(self)


class CompileError(RuntimeError):
    """A tool or package that compilation needs is missing, or refused its input."""


def collect(ops: list[str] | None = None) -> list[CompileSpec]:
    """The specs of all op modules, or of those named ("cross_entropy")."""
    names = {module.rpartition(".")[2]: module for module in MODULES}
    for op in ops or ():
        if op not in names:
            raise ValueError(f"unknown op {op!r}; one of {', '.join(names)}")
    return [spec for op in (ops or names) for spec in import_module(names[op]).compile_specs()]


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
    return Compiled(
        kernel=spec.kernel,
        arch=arch,
        dtype=spec.dtype,
        shape=spec.shape,
        registers=registers,
        spills=local,
        shared_bytes=shared_bytes,
        stack_bytes=stack,
        load_bits=max(loads, default=0),
        store_bits=max(stores, default=0),
        loads={str(bits): n for bits, n in sorted(loads.items())},
        stores={str(bits): n for bits, n in sorted(stores.items())},
        num_warps=spec.num_warps,
        streaming=spec.streaming,
    )


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
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as e:
        raise CompileError(f"compilation needs the triton package: {e}") from e
    fn = spec.fn()
    if not isinstance(fn, triton.JITFunction):
        raise CompileError("Triton runs as an interpreter here (TRITON_INTERPRET); unset it to compile")
    constexprs = {**spec.constexprs}
    order = {name: i for i, name in enumerate(fn.arg_names)}
    unknown = (set(spec.signature) | set(constexprs)) ^ set(order)
    if unknown:
        raise CompileError(f"{spec.kernel}: arguments of the kernel and of its spec differ: {sorted(unknown)}")
    source = ASTSource(
        fn=fn,
        signature={name: "constexpr" if name in constexprs else spec.signature[name] for name in fn.arg_names},
        constexprs={(order[name],): value for name, value in constexprs.items()},
        attrs={(order[name],): [["tt.divisibility", 16]] for name in spec.divisible if name not in constexprs},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    if spec.maxnreg is not None:
        options["maxnreg"] = spec.maxnreg
    kernel = triton.compile(source, target=target, options=options)
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
