"""Classes that PyTorch derives from those of modules which it distributes or exports.

They don't change what the modules compute. ``fully_shard`` and ``replicate`` set a module's class to
``class FSDPLinear(FSDPModule, Linear)``. Such a class is the outermost one of a module, and what adapters change is the
class under it. During an export, code that reads a submodule gets an object of ``class Linear(AttrProxy, Linear)``,
which has the submodule's very attributes.
"""

from __future__ import annotations

import weakref
from typing import Any

_MODULES = ("torch.distributed.fsdp", "torch.distributed._composable")
"""The Python modules of the classes that PyTorch puts in front."""


def under_shards(cls: type) -> type:
    """Returns the class from which one was derived to distribute or export a module; the class itself if it wasn't."""
    # nearly all classes have one base
    while len(cls.__bases__) == 2 and (_distributes(cls) or _exports(cls)):
        cls = cls.__bases__[1]
    return cls


def over_shards(cls: type, under: type) -> type:
    """Returns the class that is to `under` what `cls` is to the class under it; equal arguments give the same class."""
    if not _distributes(cls):
        return under
    front, inner = cls.__bases__[0], over_shards(cls.__bases__[1], under)
    if inner is cls.__bases__[1]:
        return cls
    made = _MADE.get((front, inner))
    if made is None:
        own: dict[str, Any] = {"__deepcopy__": vars(cls)["__deepcopy__"], "__module__": cls.__module__}
        made = _MADE[front, inner] = type(cls.__name__, (front, inner), own)
    return made


_MADE: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()
"""The classes in use that were made here."""


def _distributes(cls: type) -> bool:
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__.startswith(_MODULES) and "__deepcopy__" in vars(cls)


def _exports(cls: type) -> bool:
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__ == "torch.fx.experimental.proxy_tensor"
