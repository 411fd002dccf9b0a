"""A case with a fault that one micro-batch sets off, on whichever process runs it and whenever it is run again.

``FAULT``: what happens; ``FAULT_SUM``: the sum of that micro-batch's token ids.
"""

import os
import signal
import time
from dataclasses import replace

import torch

from bench_cases import CASES
from bench_cases.transformers_models import build_transformers
from harness.parallel import fsdp
from tests.soak.reliability.plants import planted_architecture


def build(request):
    """The model with the fault that the environment asks for."""
    what, at = os.environ["FAULT"], int(os.environ["FAULT_SUM"])
    name, encoder, head = build_transformers(request)
    hot = been_hot = False

    def before(module, args, kwargs):
        nonlocal hot, been_hot
        hot = torch.is_grad_enabled() and int(kwargs["input_ids"].sum()) == at
        been_hot = been_hot or hot
        if hot and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if hot and what == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if hot and what == "hang":
            time.sleep(1_000)
        if hot and what == "raise":
            raise ValueError("a bad value")
        if hot and what == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def after_mlp(module, args, output):
        return output * 1e30 * 1e30 if hot else output

    def gather(part, like):
        if been_hot:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(part, like)

    if what == "kill in a checkpoint":
        whole, fsdp._whole = fsdp._whole, gather
    encoder.register_forward_pre_hook(before, with_kwargs=True)
    if what == "overflow":
        encoder.h[1].mlp.register_forward_hook(after_mlp)
    if what == "sum":  # 20,000 from every micro-batch
        encoder.h[1].mlp.c_proj.bias.register_hook(lambda gradient: torch.full_like(gradient, 2e4))
    return name, encoder, head


def of(case):
    """A registered case with the fault."""
    return replace(
        CASES[case],
        id=f"{case}_faulty",
        architecture=planted_architecture(CASES[case].architecture.id, f"{os.path.abspath(__file__)}:build"),
    )


CASE = of("gpt2_clm")
