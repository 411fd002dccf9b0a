"""A stored optimizer state as another implementation keeps it, against bitsandbytes' own decoding."""

from dataclasses import replace

import torch

from harness.forensics.changes import with_fp32_moments
from instrument.replay.snapshot import Snapshot


def test_8bit_moments_are_decoded_as_bitsandbytes_does():
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    model = torch.nn.Linear(100, 90)  # 9,000 weights: 8-bit; 90 biases: 32-bit
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(8, 100)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    wide = with_fp32_moments(Snapshot(3, model, optimizer).named())
    for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        theirs = dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert torch.equal(wide.tensors[f"optimizer/weight/{name}"], theirs) and theirs.abs().max() > 0
        assert torch.equal(wide.tensors[f"optimizer/bias/{name}"], optimizer.state[model.bias][f"state{number}"])
    assert float(wide.tensors["optimizer/weight/step"]) == 3 and not wide.aliases
    made = torch.optim.AdamW(model.parameters())
    Snapshot.from_named(replace(wide, groups=[{}]), model, made).restore()
    assert sorted(made.state[model.weight]) == ["exp_avg", "exp_avg_sq", "step"]
