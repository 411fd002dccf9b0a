"""An awkward model and a loop around it, for tests of the watch."""

import torch
from torch import nn

from instrument import Watch


class Net(nn.Module):
    """Defined in another order than it runs in."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)  # called twice: before the fault and behind it
        self.head, self.b, self.a = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x):
        x = self.drop(torch.tanh(self.a(x)))
        return self.head(self.drop(torch.tanh(self.b(x))))


def batch(step):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def watched(run_step, model, optimizer, steps=range(1, 6), replay=True, **options):
    """Run ``run_step(step, watch)`` under a watch and close it."""
    torch.manual_seed(1)
    watch = Watch(model, optimizer, every=1, replay=(lambda step: run_step(step, watch)) if replay else None, **options)
    for step in steps:
        with watch.step(step):
            run_step(step, watch)
    watch.read()
    watch.close()
    return watch


def place(watch):
    found = watch.first_nonfinite
    return None if found is None else (found.step, found.phase, found.module)


def square_root_of_zero(parameter):
    """Zero, with a gradient of 0 * inf."""
    return (parameter.sum() * 0).abs().sqrt()


def state_of(model, optimizer):
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return [t.clone() for t in (*model.parameters(), *model.buffers(), *states)]
