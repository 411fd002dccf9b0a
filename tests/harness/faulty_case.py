"""GPT-2 with a fault that one micro-batch sets off, on whichever process runs it and whenever it is run again.

``FAULT``: what happens; ``FAULT_SUM``: the sum of that micro-batch's token ids.
"""

import os
import signal
import time
from dataclasses import replace

import torch

from bench_cases import CASES
from bench_cases.transformers_models import build_transformers


def build(request):
    """GPT-2 with the fault that the environment asks for."""
    what, at = os.environ["FAULT"], int(os.environ["FAULT_SUM"])
    name, encoder, head = build_transformers(request)
    hot = False

    def before(module, args, kwargs):
        nonlocal hot
        hot = torch.is_grad_enabled() and int(kwargs["input_ids"].sum()) == at
        if hot and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if hot and what == "hang":
            time.sleep(1_000)
        if hot and what == "raise":
            raise ValueError("a bad value")
        if hot and what == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def behind_mlp(module, args, output):
        return output * 1e30 * 1e30 if hot and what == "overflow" else output

    encoder.register_forward_pre_hook(before, with_kwargs=True)
    encoder.h[1].mlp.register_forward_hook(behind_mlp)
    if what == "sum":  # 20,000 from every micro-batch
        encoder.h[1].mlp.c_proj.bias.register_hook(lambda gradient: torch.full_like(gradient, 2e4))
    return name, encoder, head


CASE = replace(CASES["gpt2_clm"], id="gpt2_clm_faulty",
               architecture=replace(CASES["gpt2_clm"].architecture, build=f"{os.path.abspath(__file__)}:build"))
