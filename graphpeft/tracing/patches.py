"""What is exchanged in PyTorch and in the model while a trace runs, and put back after it.

Functions that make tensors from numbers don't ask their arguments' ``__torch_function__`` and must make new ones in
each run, ``Module.training`` is a plain attribute, and assigning to a module would change it: for the time of a trace
these go through the tracer.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpeft.tracing import guards, masks
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import VALUE
from graphpeft.tracing.proxy import ValueProxy

if TYPE_CHECKING:
    from graphpeft.tracing.tracer import ValueTracer

_FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range",
    "normal", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
"""Functions of `torch` that make tensors from numbers."""

_SHARING = ("as_tensor", "asarray", "from_numpy")
"""Functions of `torch` that may give tensors which share the memory of what they were made of."""

_DTYPE_FACTS = ("finfo", "iinfo")
"""Functions of `torch` that tell about dtypes."""


@contextlib.contextmanager
def recording(tracer: ValueTracer, root: nn.Module) -> Iterator[None]:
    """Sends to `tracer` what `fx` alone can't see while `root` is traced; `root` is afterwards as it was."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged(root))
        makers = [getattr(torch, name) for name in (*_FACTORIES, *_SHARING)]
        stack.enter_context(_RecordsMakers(tracer, makers))
        for name in _SHARING:
            recorded = _copied_if_constant(tracer, getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, recorded))
        for name in (*_FACTORIES, *_DTYPE_FACTS):
            function = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _recorded(tracer, function, function)))
        stack.enter_context(mock.patch.object(nn.Module, "training", _training(tracer, root), create=True))
        stack.enter_context(mock.patch.object(nn.Module, "__setattr__", _refused_assignment(tracer, root)))
        stack.enter_context(mock.patch.object(builtins, "isinstance", _truthful_isinstance()))
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", _refused_autocast(tracer)))
        for module, name in masks.mask_functions_seen_by(root):
            recorded = _recorded(tracer, getattr(module, name), masks.attention_mask, name)
            stack.enter_context(mock.patch.object(module, name, recorded))
        yield


class _RecordsMakers(TorchFunctionMode):
    """Records functions that make tensors when they are called by another name than that in `torch`."""

    def __init__(self, tracer: ValueTracer, makers: list[Callable[..., Any]]) -> None:
        super().__init__()
        self._tracer, self._makers = tracer, makers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._makers and not self._tracer.is_running:
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_random_python_numbers() -> Iterator[None]:
    """Raises if the code within draws from Python's or NumPy's generator: a graph would repeat the drawn numbers."""
    with random_python_states_kept():
        before = _random_python_states()
        yield
        if _random_python_states() != before:
            raise TraceError("it draws random numbers with Python's random or NumPy, which a graph can't hold")


@contextlib.contextmanager
def random_python_states_kept() -> Iterator[None]:
    """Sets Python's and NumPy's generators back at the end."""
    python, numpy = _random_python_states()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)


def _random_python_states() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, tuple(keys.tolist()), *rest)


def _recorded(
    tracer: ValueTracer, function: Callable[..., Any], target: Callable[..., Any], *first: Any
) -> Callable[..., Any]:
    """Returns `function` as one that records a call of `target`, with `first` before its own arguments."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", target, (*first, *args), kwargs)

    return record


def _copied_if_constant(tracer: ValueTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        made = tracer.create_proxy("call_function", function, args, kwargs)
        is_constant = not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        return made.clone() if is_constant else made

    return record


def _truthful_isinstance() -> Callable[[Any, Any], bool]:
    ask = builtins.isinstance

    # a proxy can't answer by its __class__: PyTorch's argument parsers ask for it too, and would read it as a tensor
    def isinstance(instance: Any, classes: Any) -> bool:
        if ask(instance, classes):
            return True
        if not ask(instance, ValueProxy) or instance.tracer.is_running:
            return False
        if VALUE in instance.node.meta:
            answer = ask(instance.node.meta[VALUE], classes)
            if instance.node.op == "placeholder":
                kind = guards.kind(instance.node.meta[VALUE])
                instance.tracer.decide(
                    instance.tracer.create_proxy("call_function", guards.kind, (instance,), {}), kind
                )
            return answer
        if guards.is_machinery(sys._getframe(1).f_code.co_filename):
            return False
        raise instance.tracer.undecided()

    return isinstance


def _training(tracer: ValueTracer, root: nn.Module) -> property:
    paths = {module: path for path, module in root.named_modules()}

    def get(module: nn.Module) -> Any:
        path = paths.get(module)
        if tracer.is_running or path is None:
            return module.__dict__["training"]
        return tracer.attribute(f"{path}.training" if path else "training")

    def put(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    return property(get, put)


def _refused_assignment(tracer: ValueTracer, root: nn.Module) -> Callable[..., None]:
    assign = nn.Module.__setattr__
    modules = set(root.modules())

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.is_running and module in modules:
            raise TraceError(f"{type(module).__name__}'s forward assigns self.{name}, which a graph can't hold")
        assign(module, name, value)

    return refuse


def _refused_autocast(tracer: ValueTracer) -> Callable[..., Any]:
    enter = torch.autocast.__enter__

    def refuse(context: Any) -> Any:
        if not tracer.is_running:
            raise TraceError("a region under torch.autocast can't be held by a graph")
        return enter(context)

    return refuse


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Puts back, at the end, whatever was assigned or cached on the modules of `root`."""
    before = [(module, dict(module.__dict__), _containers(module)) for module in root.modules()]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                _refill(container, content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = list(module.__dict__.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting += value
        elif isinstance(value, dict | list | set | deque) and not any(value is known for known, _ in found):
            found.append((value, copy.copy(value)))
            waiting += value.values() if isinstance(value, dict) else value
    return found


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)
