"""``inspect RUN --repro FILE.py``: a script that runs the failing op with torch alone, its tensors beside it.

The folder may be a stranger's: what goes into the script passes the schema `Culprit` first (names by pattern, dtypes, words and
ops by list) and is written by ``repr``, so that no string of the folder becomes code.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

import kernels
from harness.settings import SettingsError
from instrument.results.files import copy, replace
from instrument.results.layout import RunFiles
from instrument.results.measurements import ForensicsRecord
from instrument.results.read import RunUnreadable
from instrument.results.schemas import RunRecord
from instrument.results.signature import is_own

METADATA_KEY, SCHEMA = "culprit", 1
Name = Annotated[str, Meta(pattern=r"(?a)^[A-Za-z_]\w*\Z")]
"""A Python identifier in ASCII: of an op, an overload, an argument."""
TensorName = Annotated[str, Meta(pattern=r"(?a)^[A-Za-z_]\w*(\.\d+)*\Z")]
"""An argument, or a place in one that is a list."""
Dtype = Literal[
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "complex32", "complex64", "complex128", "bool", "uint8", "uint16", "uint32", "uint64"),
    *("int8", "int16", "int32", "int64"),
]
LEAVES = {
    "float": Literal["nan", "inf", "-inf"],
    "device": Annotated[str, Meta(pattern=r"(?a)^(cpu|cuda|meta)(:\d+)?\Z")],
    "dtype": Dtype,
    "layout": Literal["strided"],
    "memory_format": Literal["contiguous_format", "preserve_format", "channels_last", "channels_last_3d"],
    "tensor": TensorName,
}
"""Arguments that JSON cannot name, by their only key."""
WORDS = frozenset(
    "none tanh floor trunc sum mean prod amax amin add multiply max min left right fro nuc U L reflect constant replicate "
    "circular linear lower higher midpoint nearest bilinear bicubic trilinear area valid same reduced complete r ortho forward "
    "backward ij xy relu silu gels gelsd gelsy gelss gesvd gesvdj gesvda upper".split()
)
"""Strings that ops on tensors take: a rounding mode, a reduction. A file's name is none of them."""
FP16_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
"""The products that a CPU without fp16 arithmetic computes in fp32 and rounds (`harness.fp16_products`)."""
OURS = {
    "logit_stats": "logit_stats",
    "unscale": "unscale",
    "scale": "unscale",
    "cross_entropy": "cross_entropy",
    "stats": "multi_tensor_stats",
    "activation": "activation_stats",
    "bce": "bce_with_logits",
    "resolvent_mix": "resolvent_mix",
    "selective_scan": "selective_scan",
}
"""Custom ops of this project: what follows ``dtype_dynamics_`` in their namespace -> the folder in ``kernels/``."""
OUR_NAMESPACES = tuple(f"dtype_dynamics_{name}" for name in OURS)
PLAIN_NAMESPACES = ("aten", "prims")
FLOAT_SOFTMAX = ("aten::_softmax", "aten::_log_softmax")
"""Their third argument asks for fp32 out of fp16, which float64 refuses."""
LAYOUT = (
    "tensors[{name!r}] = tensors[{name!r}].new_empty_strided(tensors[{name!r}].shape, {stride}).copy_(tensors[{name!r}])"
    "  # laid out as it was\n"
)
CALL = "torch.ops.{namespace}.{name}.{overload}({args}, **kwargs)"
SCRIPT = '''\
"""$sentence.

Written by `python -m harness inspect $run_id --repro`. $needs
What $op read, as it was before it ran, is in the .safetensors file of the same name.
Exit code 0: it fails as it did in the run; 1: it does not.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map
$imports
device = $device
if device == "cuda" and not torch.cuda.is_available():
    sys.exit("This op failed on a GPU and there is none here. Set device = 'cpu' to try it there, where rounding differs.")
$switches
tensors = load_file(Path(__file__).with_suffix(".safetensors"), device=device)
${layout}args = $args
kwargs = $kwargs
shape, dtype, counts = $failed  # what came out in the run
version = $version  # of torch in the run


def op(*args, **kwargs):
$call


def float64_op(*args, **kwargs):
    return $wide_call


def wide(leaf):
    if torch.is_tensor(leaf) and leaf.is_floating_point():
        return leaf.double()
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf


def without_zeros(leaf):
    leaf = wide(leaf)
    return torch.where(leaf == 0, 1e-30, leaf) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf


def output(op, args, kwargs):
    """Of what the op writes or returns: the first tensor of the failed one's shape that is not finite, if any."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, (args, kwargs))
    returned = op(*args, **kwargs)
    written = [t for t in tree_leaves([$written]) if torch.is_tensor(t) and t.is_floating_point()]
    written = [t for t in written if tuple(t.shape) == shape]
    return next((t for t in written if not t.isfinite().all()), written[0])


def count(t):
    return {"nan": int(t.isnan().sum()), "inf": int((t == float("inf")).sum()), "-inf": int((t == float("-inf")).sum())}


def listed(counts):
    names = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
    return ", ".join(f"{n:,} {names[kind]}" for kind, n in counts.items() if n) or "none"


def show(name, t):
    finite = t[t.isfinite()]
    largest = f"{finite.abs().max().item():.6g}" if finite.numel() else "none finite"
    what = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
    print(f"  {name:<11} {what:<22} largest |x| {largest:<12} zeros {(t == 0).sum():<9,} not finite {(~t.isfinite()).sum():,}")


print("$op, torch", torch.__version__, "on", device)
for name in $names:
    if tensors[name].is_floating_point():
        show(name, tensors[name])
out = output(op, args, kwargs)
show("-> output", out)
bad, at_failure, zero = ~out.isfinite(), None, 0
try:
    exact = output(float64_op, *tree_map(wide, (args, kwargs)))
    show("-> float64", exact)
    at_failure = exact[bad]
    zero = int((~at_failure.isfinite() & output(float64_op, *tree_map(without_zeros, (args, kwargs)))[bad].isfinite()).sum())
except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
    print("  float64 has no such op:", str(error).splitlines()[0])

print()
if not bad.any():
    sys.exit(f"It stays finite here; in the run, with torch {version}: {listed(counts)}.")
print(f"{bad.sum():,} of {out.numel():,} elements are not finite: {listed(count(out))}.")
if any(torch.is_tensor(t) and t.is_floating_point() and not t.isfinite().all() for t in tree_leaves((args, kwargs))):
    print("An input is not finite already.")
if zero:
    print(f"In {zero:,} of them the op divides by exactly 0; nothing overflowed.")
elif at_failure is not None and at_failure.isfinite().any():
    largest = at_failure[at_failure.isfinite()].abs().max().item()
    print(f"Overflow: float64 gives finite numbers there, up to {largest:.6g}; {str(out.dtype)[6:]} ends at "
          f"{torch.finfo(out.dtype).max:.6g}.")
elif at_failure is not None:
    print("An invalid operation: float64 gives nothing finite there either.")
if (count(out), out.dtype) != (counts, dtype):
    sys.exit(f"Not as in the run, with torch {version}: {listed(counts)} in {str(dtype)[6:]}.")
print("The same as in the run, kind by kind.")
'''


class Failed(msgspec.Struct, forbid_unknown_fields=True):
    """What came out of the op. ``counts``: elements by the kind of non-finite value."""

    shape: tuple[int, ...]
    dtype: Dtype
    numel: int
    counts: dict[Literal["nan", "inf", "-inf"], int]


class Culprit(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What was kept of the failing op (`harness.forensics.evidence`), without its tensors. ``overwritten``: the arguments that
    it writes, by place or name; ``divisor``: in older files."""

    schema: int
    left_out: str | None
    op: Annotated[str, Meta(pattern=r"(?a)^[A-Za-z_]\w*::[A-Za-z_]\w*\Z")] = "aten::none"
    overload: Name | Literal[""] = ""
    args: list[Any] = []
    kwargs: dict[Name, Any] = {}
    device: Literal["cpu", "cuda"] = "cpu"
    strides: dict[TensorName, tuple[int, ...]] = {}
    overwritten: list[int | Name] = []
    divisor: Annotated[int, Meta(ge=0)] | None = None
    failed: Failed | None = None

    def __post_init__(self) -> None:
        if self.left_out is None and self.failed is None:
            raise ValueError("nothing is known of what the op returned")
        for value in (*self.args, *self.kwargs.values()):
            _require_plain(value)


def _require_plain(value: Any) -> None:
    """Raise ValueError for an argument that no `_literal` is for."""
    if isinstance(value, list):
        for item in value:
            _require_plain(item)
    elif isinstance(value, dict):
        ((kind, name),) = value.items()
        msgspec.convert(name, LEAVES[kind])
    elif isinstance(value, str) and value not in WORDS:
        raise ValueError(f"{value[:40]!r} is no word that an op takes")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is written as a number")


def write_repro(
    run: RunFiles, record: RunRecord | None, found: ForensicsRecord | None, script: Path, *, trust: bool = False
) -> tuple[Path, Path]:
    """Write ``script`` and its tensors; returns both paths. Raises `SettingsError` when this run has no op to show,
    `RunUnreadable` for an op that is none. ``trust``: import the package of an op that another's run names."""
    if script.suffix != ".py":
        raise SettingsError(f"--repro {script}: give a file that ends in .py; its tensors go beside it as .safetensors")
    if found is None:
        raise SettingsError(f"{run.run_id}: no failure of it was replayed, so there is no op to run again")
    culprit = read_culprit(run)
    if culprit.left_out:
        raise SettingsError(f"{run.run_id}: the failing op cannot be run alone: {culprit.left_out}")
    _require_known(run, record, culprit, trust)
    tensors = script.with_suffix(".safetensors")
    try:
        copy(run.culprit, tensors)
        replace(script, script_text(run.run_id, record, found, culprit).encode())
    except OSError as error:
        raise SettingsError(f"--repro {script}: cannot write {error.filename}: {error.strerror}") from error
    return script, tensors


def _require_known(run: RunFiles, record: RunRecord | None, culprit: Culprit, trust: bool) -> None:
    namespace = culprit.op.partition("::")[0]
    if namespace in PLAIN_NAMESPACES:
        import torch

        schemas = torch._C._jit_get_schemas_for_operator(culprit.op)
        if not any((schema.overload_name or "default") == (culprit.overload or "default") for schema in schemas):
            raise RunUnreadable(f"{run.culprit}: {culprit.op} {culprit.overload} is no op of torch {torch.__version__}")
    elif not (namespace in OUR_NAMESPACES or trust or (record is not None and is_own(record))):
        raise SettingsError(
            f"{run.run_id} does not carry your signature: somebody else made it. Its script would import the package "
            f"{namespace}; --trust-run allows it"
        )


def read_culprit(run: RunFiles) -> Culprit:
    """What was kept of the failing op, without its tensors."""
    path = run.culprit
    if not path.is_file():
        raise SettingsError(f"{run.run_id}: its culprit's operands were not kept ({path} is not there); run it again")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            culprit = json.loads((file.metadata() or {})[METADATA_KEY])
            names = set(file.keys())
        if culprit["schema"] > SCHEMA:
            raise RunUnreadable(f"{path}: schema {culprit['schema']} is newer than this version reads ({SCHEMA})")
        found = msgspec.convert(culprit, Culprit)
        if missing := (set(_argument_names(found)) | set(found.strides)) - names:
            raise ValueError(f"the tensor {min(missing)} is not in it")
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise RunUnreadable(f"{path}: not the operands of an op: {error}") from error
    return found


def script_text(run_id: str, record: RunRecord | None, found: ForensicsRecord, culprit: Culprit) -> str:
    """The script, from the facts of the op."""
    namespace, _, name = culprit.op.partition("::")
    flags = record.flags if record is not None else {}
    failed = culprit.failed
    needs, imports = _needs(namespace)
    plain = CALL.format(namespace=namespace, name=name, overload=culprit.overload or "default", args="*args")
    wide = plain.replace("*args,", "*args[:2], False,") if culprit.op in FLOAT_SOFTMAX else plain
    return Template(SCRIPT).substitute(
        sentence=textwrap.fill(_safe(found.sentence), 110),
        run_id=run_id,
        op=f"{namespace}.{name}",
        needs=needs,
        imports=imports,
        device=repr(culprit.device),
        switches="\n".join(_switches(flags, culprit.device)),
        layout="".join(LAYOUT.format(name=name, stride=stride) for name, stride in culprit.strides.items()),
        args=f"({''.join(f'{_literal(value)}, ' for value in culprit.args)})",
        kwargs="{" + ", ".join(f"{key!r}: {_literal(value)}" for key, value in culprit.kwargs.items()) + "}",
        failed=f"{failed.shape!r}, torch.{failed.dtype}, {failed.counts!r}",
        call=_run_call(plain, culprit, flags),
        wide_call=wide,
        written=", ".join([*(f"{'kwargs' if isinstance(p, str) else 'args'}[{p!r}]" for p in culprit.overwritten), "returned"]),
        names=repr(_argument_names(culprit)),
        version=repr(str(record.env.get("torch_version", "unknown") if record else "unknown")),
    )


def _safe(text: str) -> str:
    """Text that may stand in a docstring, and cannot end it."""
    return "".join(c if c.isprintable() else " " for c in text).replace("\\", "/").replace('"', "'")


def _needs(namespace: str) -> tuple[str, str]:
    """What a script needs beside torch: a sentence, and its import."""
    if namespace in PLAIN_NAMESPACES:
        return "Needs torch and safetensors alone.", ""
    module, sentence = namespace, f"The op comes with {namespace}, which must be installed."
    if namespace in OUR_NAMESPACES:
        module = f"{kernels.__name__}.{OURS[namespace.removeprefix('dtype_dynamics_')]}"
        sentence = "The op is this project's own: run the script where the project can be imported."
    return sentence, f"\nimport {module}  # noqa: F401 (registers the op)"


def _run_call(plain: str, culprit: Culprit, flags: dict[str, Any]) -> str:
    """The body of ``op``: the op as it ran."""
    on_cpu = culprit.device == "cpu" and flags.get("fp16_products") != "hardware"
    if not (on_cpu and culprit.op in FP16_PRODUCTS and culprit.failed.dtype == "float16"):
        return f"    return {plain}"
    return (
        "    # The run's CPU has no fp16 arithmetic: its products ran in fp32 and were rounded once, as tensor cores do.\n"
        "    args = [a.float() if torch.is_tensor(a) else a for a in args]\n"
        f"    return {plain}.half()"
    )


def _switches(flags: dict[str, Any], device: str) -> list[str]:
    """The run's own settings of what changes an op's rounding."""
    switches = flags.get("switches") or {}
    if device == "cpu":
        threads = switches.get("threads")
        return [f"torch.set_num_threads({threads:d})"] if isinstance(threads, int) and threads > 0 else []
    allowed = ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation")
    names = {"fp32_precision": "fp32_precision"} | {f"allow_{key}": key for key in allowed}
    return [
        f"torch.backends.cuda.matmul.{name} = {value!r}"
        for name, key in names.items()
        if isinstance(value := switches.get(key), (bool, str))
    ]


def _literal(value: Any) -> str:
    """A kept argument as Python."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, dict):
        return repr(value)
    ((kind, name),) = value.items()
    if kind == "tensor":
        return f"tensors[{name!r}]"
    if kind == "float":
        return f"float({name!r})"
    return "device" if kind == "device" else f"torch.{name}"


def _argument_names(culprit: Culprit) -> list[str]:
    """The tensors' names in the order of the op's arguments."""

    def names(value: Any):
        if isinstance(value, list):
            for item in value:
                yield from names(item)
        elif isinstance(value, dict) and "tensor" in value:
            yield value["tensor"]

    return list(names([culprit.args, list(culprit.kwargs.values())]))
