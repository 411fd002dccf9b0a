"""Fused Triton kernels with their plain-torch definitions beside them: one folder for each op, parts that ops share, and
the commands that compile, check and bench them all. Nothing here knows what a run is.

`from kernels import cross_entropy` imports torch (and, on CUDA, Triton) only
when a name is first used; `import kernels` alone imports neither, so that a
command line that merely lists things starts in milliseconds.

An op and the file that holds it share one name, and importing a submodule
normally overwrites the attribute of its parent package. Here the op wins:
`kernels.cross_entropy` is always the function, whatever was imported first.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.activation_stats import ActivationReading as ActivationReading
    from kernels.activation_stats import ActivationRing as ActivationRing
    from kernels.activation_stats import activation_stats as activation_stats
    from kernels.bce_with_logits import bce_with_logits as bce_with_logits
    from kernels.cross_entropy import cross_entropy as cross_entropy
    from kernels.exponent_histogram import ExponentHistogram as ExponentHistogram
    from kernels.exponent_histogram import exponent_histogram as exponent_histogram
    from kernels.logit_stats import LogitStats as LogitStats
    from kernels.logit_stats import logit_stats as logit_stats
    from kernels.multi_tensor_stats import TensorStats as TensorStats
    from kernels.multi_tensor_stats import multi_tensor_stats as multi_tensor_stats
    from kernels.multi_tensor_stats.reference import StatsReading as StatsReading
    from kernels.resolvent_mix import resolvent_mix as resolvent_mix
    from kernels.selective_scan import selective_scan as selective_scan
    from kernels.unscale import scale_ as scale_
    from kernels.unscale import unscale_and_stats_ as unscale_and_stats_

# Public name -> the module that defines it. By hand, in the order of the README.
_EXPORTS = {
    "LogitStats": "kernels.logit_stats",
    "logit_stats": "kernels.logit_stats",
    "cross_entropy": "kernels.cross_entropy",
    "bce_with_logits": "kernels.bce_with_logits",
    "multi_tensor_stats": "kernels.multi_tensor_stats",
    "TensorStats": "kernels.multi_tensor_stats",
    "StatsReading": "kernels.multi_tensor_stats.reference",
    "unscale_and_stats_": "kernels.unscale",
    "scale_": "kernels.unscale",
    "exponent_histogram": "kernels.exponent_histogram",
    "ExponentHistogram": "kernels.exponent_histogram",
    "activation_stats": "kernels.activation_stats",
    "ActivationRing": "kernels.activation_stats",
    "ActivationReading": "kernels.activation_stats",
    "resolvent_mix": "kernels.resolvent_mix",
    "selective_scan": "kernels.selective_scan",
}

__all__ = list(_EXPORTS)


class _Package(ModuleType):
    def __setattr__(self, name, value):
        if name in _EXPORTS and isinstance(value, ModuleType):
            return  # the import system binding a submodule over the op of the same name
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _EXPORTS:
            raise AttributeError(f"module 'kernels' has no attribute {name!r}")
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self):
        return sorted({*super().__dir__(), *_EXPORTS})


sys.modules[__name__].__class__ = _Package
