"""Who owns, who updates, and who updates in backward: facts about parameters that must not live on the parameters.

Attributes on a ``Parameter`` are lost by ``deepcopy``, break pickling when they hold references, and go stale when a module
moves its buffers. These tables hold weak references both ways, so nothing is kept alive and nothing is saved.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_owners = WeakIdKeyDictionary()
_updaters = WeakIdKeyDictionary()
_in_backward = WeakIdKeyDictionary()


def _get(table: Any, parameter: Tensor) -> Any:
    reference = table.get(parameter)
    return None if reference is None else reference()


def set_owner(parameter: Tensor, module: Any) -> None:
    """Remember the ``MBAEmbedding`` whose table ``parameter`` is: optimizers read its counts and padding row."""
    if _get(_owners, parameter) is not module:
        _owners[parameter] = weakref.ref(module)


def owner(parameter: Tensor) -> Any:
    return _get(_owners, parameter)


def set_updater(parameter: Tensor, optimizer: Any) -> None:
    """Remember that an optimizer of ``din_kernels.optim``, which skips padding itself, updates ``parameter``."""
    _updaters[parameter] = weakref.ref(optimizer)


def updater(parameter: Tensor) -> Any:
    return _get(_updaters, parameter)


def set_in_backward(parameter: Tensor, optimizer: Any) -> None:
    """Switch update-in-backward on for ``parameter`` (off with ``None``)."""
    if optimizer is None:
        _in_backward.pop(parameter, None)
    else:
        _in_backward[parameter] = weakref.ref(optimizer)


def in_backward(parameter: Tensor) -> Any:
    return _get(_in_backward, parameter)
