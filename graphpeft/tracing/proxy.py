"""Proxies that know the value they stand for in the example, so that Python code can ask them anything.

``isinstance``, ``len``, iteration, ``if`` and attributes are answered from the value. An answer that other inputs could
change is a decision, and the tracer puts a check of it into the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from graphpeft.tracing import guards
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import VALUE

if TYPE_CHECKING:
    from graphpeft.tracing.tracer import ValueTracer

IN_PLACE = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
"""The operators of `operator` that change their first argument."""

_STATIC = {"ndim", "layout"}
"""Tensor attributes that are answered with plain values."""

_TRACED = (torch.Tensor, tuple, list, dict, int, float, torch.dtype, torch.device)
"""Types of attributes that stay proxies, so that they can differ from run to run."""


class ValueProxy(fx.Proxy):
    """A proxy with an example value at ``node.meta["val"]``; without one it behaves as ``fx.Proxy``."""

    tracer: ValueTracer

    def __getattr__(self, name: str) -> Any:
        if VALUE not in self.node.meta:
            return super().__getattr__(name)
        value = self.node.meta[VALUE]
        if isinstance(value, torch.Tensor) and callable(getattr(type(value), name, None)):
            return functools.partial(self._call_method, name)
        with self.tracer.real_calls():
            attribute = getattr(value, name)
        if isinstance(value, dict) and name in ("items", "values"):
            return functools.partial(self._pairs if name == "items" else self._values)
        if callable(attribute) and not isinstance(attribute, torch.Tensor):
            return functools.partial(self._call_method, name)
        if self.node.op == "get_attr" and not isinstance(attribute, torch.Tensor):
            self.tracer.specialised = True
            if isinstance(attribute, int | torch.Size):
                return attribute  # a parameter's shape doesn't depend on the inputs
        read = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if not isinstance(read, fx.Proxy):
            return read  # None or a string, which the tracer has noted already
        if name not in _STATIC and isinstance(attribute, _TRACED) and not isinstance(attribute, bool):
            return read
        self.tracer.decide(read, attribute)
        return attribute

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self._call_method("requires_grad_", value)
            return
        if name not in ("node", "tracer"):
            raise TraceError(f"{guards.deciding_line()} sets an attribute of a traced value, which a graph can't hold")
        super().__setattr__(name, value)

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        self.tracer.specialised |= self.node.op == "get_attr" and name in ("size", "dim", "numel", "stride")
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return self._decide(operator.truth)

    def __len__(self) -> int:
        return self._decide(len)

    def __int__(self) -> int:
        return self._decide(int)

    def __index__(self) -> int:
        return self._decide(operator.index)

    def __float__(self) -> float:
        return self._decide(float)

    def __hash__(self) -> int:
        # such values are keys of caches and tables
        value = self.node.meta.get(VALUE)
        if isinstance(value, int | float | torch.Size | torch.dtype | torch.device):
            self.tracer.decide(self, value)
            return hash(value)
        return super().__hash__()

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __iter__(self) -> Iterator[Any]:
        if VALUE not in self.node.meta:
            return super().__iter__()
        if isinstance(self.node.meta[VALUE], dict):
            return iter(self.keys())
        return iter([self[index] for index in range(len(self))])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def keys(self) -> Any:
        """Returns the keys of a mapping, as ``**mapping`` asks for them."""
        return self._decide(tuple) if VALUE in self.node.meta else super().keys()

    def _pairs(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self.keys()]

    def _values(self) -> list[Any]:
        return [self[key] for key in self.keys()]

    def __getitem__(self, key: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def _decide(self, question: Any) -> Any:
        """Answers `question` (a function of the value) with the example's answer, and notes the decision."""
        asked = self.tracer.create_proxy("call_function", question, (self,), {})
        if VALUE not in asked.node.meta:
            raise self.tracer.undecided()
        answer = asked.node.meta[VALUE]
        self.tracer.decide(asked, answer)
        return answer


_WRITERS = (operator.setitem, *(getattr(operator, name) for name in IN_PLACE))


def writes(target: Any) -> bool:
    """Tells whether a call of `target`, a node's function or the name of a method, changes its first argument."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return target in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _in_place(function: Any) -> Any:
    # without these, `y += 1` would make a new value and leave the other names of `y` behind
    def apply(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in IN_PLACE:
    setattr(ValueProxy, f"__{_name}__", _in_place(getattr(operator, _name)))
