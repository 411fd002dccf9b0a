"""Hooks that stay behind when what carries them is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable


class Hook:
    """Calls ``call``; its copy does nothing: ``copy.deepcopy(model)`` (an average of weights) and
    ``torch.save(model)`` take a module's hooks along, and with a plain method the whole watch."""

    def __init__(self, call: Callable) -> None:
        self._call = call

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return _left_behind, ()


def _left_behind() -> Callable:
    return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    """What a copied hook does."""
