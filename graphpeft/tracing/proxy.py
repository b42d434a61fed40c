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

from graphpeft.tracing.graph_module import VALUE

if TYPE_CHECKING:
    from graphpeft.tracing.tracer import ValueTracer

_STATIC = {"ndim", "dtype", "device", "layout"}
"""Tensor attributes that are answered with plain values: code passes them to functions that refuse proxies."""

_TRACED = (torch.Tensor, tuple, list, dict, int, float)
"""Types of attributes that stay proxies, so that they can differ from run to run."""


class ValueProxy(fx.Proxy):
    """A proxy with an example value at ``node.meta["val"]``; without one it behaves as ``fx.Proxy``."""

    tracer: ValueTracer

    def __getattr__(self, name: str) -> Any:
        if VALUE not in self.node.meta:
            return super().__getattr__(name)
        with self.tracer.real_calls():
            attribute = getattr(self.node.meta[VALUE], name)
        if callable(attribute) and not isinstance(attribute, torch.Tensor):
            return functools.partial(self._call_method, name)
        if self.node.op == "get_attr" and not isinstance(attribute, torch.Tensor):
            self.tracer.specialised = True
            if isinstance(attribute, int | torch.Size):
                return attribute  # a parameter's shape doesn't depend on the inputs
        read = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if name not in _STATIC and isinstance(attribute, _TRACED) and not isinstance(attribute, bool):
            return read
        self.tracer.decide(read, attribute)
        return attribute

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> fx.Proxy:
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
        # numbers are keys of caches
        if isinstance(self.node.meta.get(VALUE), int | torch.Size):
            return self._decide(hash)
        return super().__hash__()

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __iter__(self) -> Iterator[Any]:
        if VALUE not in self.node.meta:
            return super().__iter__()
        if isinstance(self.node.meta[VALUE], dict):
            return iter(list(self.node.meta[VALUE]))
        items = [self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in range(len(self))]
        return iter(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def keys(self) -> Any:
        """Returns the keys of a mapping, as ``**mapping`` asks for them."""
        return self.node.meta[VALUE].keys() if VALUE in self.node.meta else super().keys()

    def _decide(self, question: Any) -> Any:
        """Answers `question` (a function of the value) with the example's answer, and notes the decision."""
        asked = self.tracer.create_proxy("call_function", question, (self,), {})
        if VALUE not in asked.node.meta:
            raise self.tracer.undecided()
        answer = asked.node.meta[VALUE]
        self.tracer.decide(asked, answer)
        return answer
