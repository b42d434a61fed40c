"""Proxies with example values, which support all Python operations.

``isinstance``, ``len``, iteration, ``if`` and attributes use the example value. If other inputs could change the
answer, it is a decision, and the tracer adds a check to the graph.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from graphpeft.code.identity_checks import tests_identity
from graphpeft.code.source import is_logging_call
from graphpeft.graph import guards
from graphpeft.graph.dependencies import IN_PLACE, InPlace
from graphpeft.graph.errors import TraceError
from graphpeft.graph.template import VALUE
from graphpeft.tracing.recorder import Recorder

_STATIC = {"ndim", "layout"}
"""Tensor attributes that return plain values."""

_MAY_BE_NONE = {"grad", "grad_fn", "_base", "names"}
"""Tensor attributes that only some tensors have."""

_OF_CLASS = ("_is_param", "_is_buffer")
"""Tensor attributes by which `isinstance` recognises parameters and buffers."""

_TRACED = (torch.Tensor, tuple, list, dict, int, float, torch.dtype, torch.device)
"""Types of attributes that stay proxies, since they can differ between runs."""


_WRITTEN_OUT = (int, float, complex, torch.Size, torch.dtype, torch.device)
"""Types of values whose text is a decision."""


class ValueProxy(fx.Proxy):
    """A proxy with an example value at ``node.meta["val"]``; without one it behaves as ``fx.Proxy``."""

    tracer: Recorder

    def __getattr__(self, name: str) -> Any:
        if VALUE not in self.node.meta:
            return self._attribute_of_a_tensor(name)
        value = self.node.meta[VALUE]
        if isinstance(value, torch.Tensor) and callable(getattr(type(value), name, None)):
            return functools.partial(self._call_method, name)
        # Python itself asks for names with two underscores
        if name not in _OF_CLASS and not name.startswith("__") and not hasattr(torch.Tensor, name):
            self._refuse_own_attribute(name)
        with self.tracer.examples.real_calls():
            attribute = getattr(value, name)
        if name == "grad_fn":
            return None if self.is_leaf else attribute  # a graph can check `is_leaf`
        if name in _OF_CLASS:
            return attribute  # no check, since an adapted parameter isn't an nn.Parameter in a run
        if isinstance(value, dict) and name in ("items", "values"):
            return functools.partial(self._pairs if name == "items" else self._values)
        if callable(attribute) and not isinstance(attribute, torch.Tensor):
            return functools.partial(self._call_method, name)
        if self.node.op == "get_attr" and not isinstance(attribute, torch.Tensor):
            self.tracer.session.specialised = True
            if isinstance(attribute, int | torch.Size) and not isinstance(attribute, bool):
                return attribute  # a parameter's shape doesn't depend on the inputs
        read = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if not isinstance(read, fx.Proxy):
            return read  # None or a string, for which the tracer has added a check
        if name in ("dtype", "device") and tests_identity(sys._getframe(1).f_code):
            self.tracer.decide(read, attribute)
            return attribute
        if name not in _STATIC and isinstance(attribute, _TRACED) and not isinstance(attribute, bool):
            return read
        self.tracer.decide(read, attribute)
        return attribute

    def _refuse_own_attribute(self, name: str) -> None:
        """Raises TraceError if somebody has set an attribute on a tensor of the module, whose example has none."""
        held = self.tracer.session.own_tensor(self.node)
        self.tracer.session.specialised |= held is not None
        if hasattr(held, name):
            message = (
                f"{guards.deciding_line()} reads {name} of {self.node.target}, an attribute that this tensor has and "
                "others lack, which a graph can't hold; set it on the module"
            )
            raise self.tracer.failing(TraceError(message))

    def _attribute_of_a_tensor(self, name: str) -> Any:
        """Returns an attribute that every tensor has, of an unknown value; code may test other attributes for None."""
        of_tensors = getattr(torch.Tensor, name, None)
        if name in _MAY_BE_NONE or (of_tensors is None and not name.startswith("_")):
            raise self.tracer.undecided()
        if callable(of_tensors) or name.startswith("_"):
            return super().__getattr__(name)
        if tests_identity(guards.deciding_frame().f_code):
            raise self.tracer.undecided()  # the attribute may be True or False, which code compares by `is`
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self._call_method("requires_grad_", value)
            return
        if name not in ("node", "tracer"):
            message = f"{guards.deciding_line()} sets an attribute of a traced value, which a graph can't hold"
            raise self.tracer.failing(TraceError(message))
        super().__setattr__(name, value)

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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy  # its caller is NumPy, so it is installed

        value = self.node.meta.get(VALUE)
        if not isinstance(value, int | float | torch.Size):
            message = f"{guards.deciding_line()} gives a traced value to NumPy, which a graph can't hold"
            raise self.tracer.failing(TraceError(message))
        return numpy.array(self._decide(tuple if isinstance(value, tuple) else type(value)), dtype)

    def __hash__(self) -> int:
        # code uses these values as keys of caches and tables
        value = self.node.meta.get(VALUE)
        if isinstance(value, int | float | torch.Size | torch.dtype | torch.device):
            if not self.tracer.is_running:
                self.tracer.check(self, value)
                self.tracer.session.has_hashed = True
            return hash(value)
        if VALUE not in self.node.meta and not guards.is_machinery(sys._getframe(1).f_code.co_filename):
            raise self.tracer.undecided()
        return super().__hash__()

    def __str__(self) -> str:
        return self._as_text(str)

    def __repr__(self) -> str:
        return self._as_text(repr)

    def __format__(self, format_spec: str) -> str:
        return self._as_text(format, format_spec)

    def _as_text(self, function: Any, *options: str) -> str:
        # code makes names of layers and keys of tables from numbers; the text of a tensor is only printed
        is_unknown = VALUE not in self.node.meta
        if self.tracer.is_recording and (is_unknown or isinstance(self.node.meta[VALUE], _WRITTEN_OUT)):
            asking = sys._getframe(2)
            is_logged = asking.f_globals.get("__name__") in ("logging", "warnings")
            if not is_logged and not is_logging_call(asking.f_code, asking.f_lineno):
                if is_unknown and not guards.is_machinery(asking.f_code.co_filename):
                    raise self.tracer.undecided()
                return self.tracer.create_proxy("call_function", function, (self, *options), {})
        return fx.Proxy.__repr__(self)

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __iter__(self) -> Iterator[Any]:
        if VALUE not in self.node.meta:
            return super().__iter__()
        if isinstance(self.node.meta[VALUE], dict):
            return iter(self.keys())
        return iter([self[index] for index in range(len(self))])

    def __reversed__(self) -> Any:
        # a reversed tensor is a tensor, not an iterator
        if isinstance(self.node.meta.get(VALUE), torch.Tensor):
            return self._call_method("__reversed__")
        return reversed(list(self))

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, other), {})

    def __rdivmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (other, self), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def keys(self) -> Any:
        """Returns the keys of a mapping; ``**mapping`` calls this."""
        return self._decide(tuple) if VALUE in self.node.meta else super().keys()

    def _pairs(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self.keys()]

    def _values(self) -> list[Any]:
        return [self[key] for key in self.keys()]

    def __getitem__(self, key: Any) -> Any:
        if VALUE not in self.node.meta and isinstance(key, str):
            raise self.tracer.undecided()  # the value is no tensor, and the item may be None
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def _decide(self, question: Any) -> Any:
        """Returns `question(value)` for the example value, and adds a check of this answer."""
        asked = self.tracer.create_proxy("call_function", question, (self,), {})
        if VALUE not in asked.node.meta:
            raise self.tracer.undecided()
        answer = asked.node.meta[VALUE]
        self.tracer.decide(asked, answer)
        return answer


def _in_place(name: str, otherwise: Any) -> Any:
    function, method = getattr(operator, name), f"__{name}__"

    # without these methods, `y += 1` would make a new tensor, and other names of `y` would keep the old one
    def apply(self: ValueProxy, other: Any) -> Any:
        if VALUE not in self.node.meta:
            target: Any = InPlace(function)
        else:
            target = function if hasattr(type(self.node.meta[VALUE]), method) else otherwise
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return apply


for _name, _otherwise in IN_PLACE.items():
    setattr(ValueProxy, f"__{_name}__", _in_place(_name, _otherwise))
