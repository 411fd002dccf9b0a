"""Switches are proven by computation: a proof that cannot fail is none."""

import pytest
import torch

from harness import precision

CPU = torch.device("cpu")


def test_fp32_products_are_fp32_on_the_cpu():
    record = precision.set_switches(CPU, tf32=False, threads=1)
    assert record["verified"] == ["fp32_products"]
    assert record["fp32_precision"] == "ieee" and record["threads"] == 1
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


def test_the_proof_notices_a_product_that_rounds(monkeypatch):
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: whole(a.bfloat16(), b.bfloat16()).float())
    assert precision.tf32_rounds(CPU)
    with pytest.raises(precision.SwitchError, match="fp32_products"):
        precision.set_switches(CPU, tf32=False, threads=0)


def test_the_accumulation_proof_tells_fp32_from_fp16_partial_sums(monkeypatch):
    assert precision.accumulates_in_fp32(CPU, torch.float32)

    def in_pieces(a, b):
        parts = [torch.mm(a[:, s : s + 4_096].float(), b[s : s + 4_096].float()).half() for s in range(0, a.shape[1], 4_096)]
        return torch.stack(parts).sum(0, dtype=torch.float16)

    monkeypatch.setattr(torch.Tensor, "__matmul__", in_pieces)
    assert not precision.accumulates_in_fp32(CPU, torch.float16)


def test_the_accumulation_proof_allows_what_a_tensor_core_drops(monkeypatch):
    """Aligning 24 bits to the largest summand loses the last ones of a small one: that is no sum in fp16."""
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (whole(a.double(), b.double()) + 4_096.0).to(a.dtype))
    assert precision.accumulates_in_fp32(CPU, torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_switches_hold_on_the_gpu():
    gpu = torch.device("cuda")
    assert set(precision.set_switches(gpu, tf32=False, threads=0)["verified"]) == {"fp32_products", "fp16_accumulates_in_fp32"}
    precision.set_switches(gpu, tf32=True, threads=0)
    precision.set_switches(gpu, tf32=False, threads=0)
