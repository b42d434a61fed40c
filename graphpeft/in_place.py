"""Gives a module instance another class in place, and its own class back.

A dressed module's class is ``class Name(*bases of its layers, Original)``, so the instance keeps its identity, its
attributes and its ``isinstance`` answers, as ``torch.nn.utils.parametrize`` does it. A layer is what one concern adds:
a forward that comes from a graph, the methods of ``PeftModel``, parameters that read as an adapter's. A module wears at
most one layer of each kind, and equal dresses share one class. Dressed modules can be pickled and deep-copied.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

KINDS = ("methods", "graph", "tensors")
"""The kinds of layers, the outermost first: a model's methods see the graph's forward, which reads the tensors."""


class Layer:
    """What one concern adds to a module's class.

    Layers are values that many modules share, compared by identity.

    Args:
        kind: One of `KINDS`.
        bases: Classes that the dressed class inherits from, before the original class.
        namespace: Attributes of the dressed class itself.
        recipe: A picklable callable and its arguments, which build the layer again.
        for_copy: Returns the layer that a copy of the module wears; the same one if None.
    """

    __slots__ = ("_for_copy", "bases", "kind", "namespace", "recipe")

    def __init__(
        self,
        kind: str,
        bases: tuple[type, ...],
        namespace: Mapping[str, Any],
        recipe: tuple[Any, tuple[Any, ...]],
        for_copy: Callable[[], Layer] | None = None,
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.bases, self.namespace, self.recipe = kind, bases, namespace, recipe
        self._for_copy = for_copy

    def for_copy(self) -> Layer:
        """Returns the layer that a copy of the module wears."""
        return self._for_copy() if self._for_copy is not None else self

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe


class Dressed:
    """The first base of every dressed class: knows the original class, and how to be copied and pickled."""

    _original_class: ClassVar[type]
    _layers: ClassVar[tuple[Layer, ...]]

    def _state(self) -> dict[str, Any]:
        # Python 3.10 has no object.__getstate__
        get_state = getattr(self, "__getstate__", None)
        return get_state() if get_state is not None else self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_dressed, (self._original_class, self._layers), self._state()

    def __copy__(self) -> Dressed:
        copied = self._new_empty()
        copied.__setstate__(dict(self._state()))  # type: ignore[attr-defined]
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Dressed:
        copied = self._new_empty()
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self._state(), memo))  # type: ignore[attr-defined]
        return copied

    def _new_empty(self) -> Dressed:
        return _new_dressed(self._original_class, tuple(layer.for_copy() for layer in self._layers))


def _new_dressed(original: type, layers: tuple[Layer, ...]) -> Any:
    return object.__new__(dressed_class(original, layers))


@functools.lru_cache(maxsize=4096)
def dressed_class(original: type, layers: tuple[Layer, ...]) -> type:
    """Returns the class of instances of `original` that wear `layers` (outermost first); equal calls share it."""
    added = (Dressed, *(base for layer in layers for base in layer.bases))
    # a base that the original class has already would contradict the method resolution order
    bases = (*(base for base in added if not issubclass(original, base)), original)

    def fill(namespace: dict[str, Any]) -> None:
        for layer in reversed(layers):
            namespace.update(layer.namespace)
        # libraries dispatch on a model's class name, so the dressed class keeps it
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            _original_class=original,
            _layers=layers,
        )

    return types.new_class(original.__name__, bases, exec_body=fill)


def original_class(module: nn.Module) -> type:
    """Returns the class that `module` had before it was dressed."""
    return getattr(type(module), "_original_class", type(module))


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """Returns the layers that `module` wears, the outermost first."""
    return getattr(type(module), "_layers", ())


def layer_of(module: nn.Module, kind: str) -> Layer | None:
    """Returns the layer of `kind` that `module` wears, or None."""
    return next((layer for layer in layers_of(module) if layer.kind == kind), None)


def put_on(module: nn.Module, layer: Layer) -> None:
    """Dresses `module` in `layer`, in place of the one of that kind that it wears."""
    worn = (*(other for other in layers_of(module) if other.kind != layer.kind), layer)
    module.__class__ = dressed_class(original_class(module), tuple(sorted(worn, key=_place)))


def take_off(module: nn.Module, kind: str) -> None:
    """Undresses `module` of its layer of `kind`; without layers it has its original class again."""
    worn = tuple(layer for layer in layers_of(module) if layer.kind != kind)
    module.__class__ = dressed_class(original_class(module), worn) if worn else original_class(module)


def _place(layer: Layer) -> int:
    return KINDS.index(layer.kind)
