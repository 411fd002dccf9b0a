"""Kernel tests run on every device there is: under Triton's interpreter on a CPU (tests/conftest.py
chooses it), compiled on CUDA."""

from importlib import import_module

import pytest
import torch
from triton.runtime import interpreter

from kernels import scan_blocks, small_loss


@pytest.fixture(autouse=True, scope="session")
def interpreter_counts_in_any_numpy():
    """Triton 3.6's interpreter counts a loop by ``int`` of an array of one element, which NumPy 2.4 and later refuse;
    later interpreters squeeze it first, and so does this."""
    with pytest.MonkeyPatch.context() as patch:
        original = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "cpu"])
def device(request):
    """The device on which Triton kernels run in this process."""
    return torch.device(request.param)


@pytest.fixture(params=["torch", "chunked", "triton"])
def impl(request, monkeypatch):
    """What a loss is asked for; "chunked" is "torch" without its own way for the small logits of these tests."""
    if request.param == "chunked":
        monkeypatch.setattr(small_loss, "SMALL", {})
        return "torch"
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Scans in chunks of 4 tokens, many at once: what long sequences do, at lengths that a test affords."""
    for name in ("resolvent_mix", "selective_scan"):
        for module in ("reference", "triton_kernel"):
            monkeypatch.setattr(import_module(f"kernels.{name}.{module}"), "CHUNK", 4)
    monkeypatch.setattr(scan_blocks, "CHUNK", 4)
    monkeypatch.setattr(scan_blocks, "FEW_CHUNKS", 1)


with torch.device("meta"):  # torch keeps the functions that it finds when this first meets one: the real ones, please
    torch.empty(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """`torch.empty` and its kin return NaN (integers: a huge value), so that an element nobody wrote shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
