"""A model for counting, where no run has built one."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench_cases.models import ModelError, ModelRequest, build_model
from harness.estimate.model import conversions_left_out, shape_only


def shapes_of(request: ModelRequest) -> nn.Module:
    """The model of a request as a run would build it, without memory or weights; in full where its code
    asks for values while it is built (OPT throws dice over its layers)."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), conversions_left_out():
            return build_model(shape_only(request))
    except ModelError:
        return build_model(shape_only(request))
