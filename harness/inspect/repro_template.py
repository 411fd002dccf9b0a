"""The script that ``inspect --repro`` writes; ``$words`` are filled in by `harness.inspect.repro_script`."""

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
divisor = $divisor  # what the op divides by


def op(*args, **kwargs):
$call


def float64_op(*args, **kwargs):
    return $wide_call


def wide(leaf):
    if torch.is_tensor(leaf) and leaf.is_floating_point():
        return leaf.double()
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf


def output(op, args, kwargs):
    """Of what the op writes or returns: the first tensor of the failed one's shape that is not finite, if any."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, (args, kwargs))
    returned = op(*args, **kwargs)
    written = [t for t in tree_leaves([$written]) if torch.is_tensor(t) and t.is_floating_point()]
    written = [t for t in written if tuple(t.shape) == shape]
    return next((t for t in written if not t.isfinite().all()), written[0])


def count(t):
    return {"nan": int(t.isnan().sum()), "inf": int((t == float("inf")).sum()), "-inf": int((t == float("-inf")).sum())}


def words(counts):
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
bad, at_failure = ~out.isfinite(), None
try:
    exact = output(float64_op, *tree_map(wide, (args, kwargs)))
    show("-> float64", exact)
    at_failure = exact[bad]
except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
    print("  float64 has no such op:", str(error).splitlines()[0])

print()
if not bad.any():
    sys.exit(f"It stays finite here; in the run, with torch $version: {words(counts)}.")
print(f"{bad.sum():,} of {out.numel():,} elements are not finite: {words(count(out))}.")
zero = int(((divisor == 0) & bad).sum()) if torch.is_tensor(divisor) else 0
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
    sys.exit(f"Not as in the run, with torch $version: {words(counts)} in {str(dtype)[6:]}.")
print("The same as in the run, kind by kind.")
'''
