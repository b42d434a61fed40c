"""Patches PyTorch and the model during a trace, to record calls that `torch.fx` alone misses.

Some examples: factory functions such as ``torch.zeros`` don't call ``__torch_function__`` of their arguments, but must
make new tensors in each run; ``Module.training`` is a plain attribute; assigning to a module would change the model.

`isinstance` is exchanged, too: PyTorch's parsers in C take an object whose `__class__` is a tensor's for one with
memory.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import torch
import torch.fx as fx
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpeft._torch import (
    autocast_options,
    compiler_options,
    current_function_mode,
    fake_tensor,
    function_mode_set_aside,
    pytree,
)
from graphpeft.code.reach import Reach, is_of_a_library
from graphpeft.graph import guards
from graphpeft.graph.contexts import enter_autocast, leave_autocast
from graphpeft.graph.dependencies import writes_by_method
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts import transformers_masks
from graphpeft.graph.recomputing import checkpoints_bound_by
from graphpeft.graph.template import VALUE
from graphpeft.tracing.caches import uncached
from graphpeft.tracing.exchanges import Exchanges
from graphpeft.tracing.gradient_regions import GradientRegions, record_gradient_regions
from graphpeft.tracing.gradients import Applied
from graphpeft.tracing.imports import imports_run
from graphpeft.tracing.iterators import drawing_modules
from graphpeft.tracing.module_exchanges import exchange_of_modules
from graphpeft.tracing.named_functions import exchange_named
from graphpeft.tracing.proxy import ValueProxy
from graphpeft.tracing.recorder import Recorder
from graphpeft.tracing.scripted import Scripted
from graphpeft.tracing.session import Recording
from graphpeft.tracing.snapshot import Snapshot
from graphpeft.tracing.type_checks import type_check_in, type_check_message
from graphpeft.transaction import at_end_of

_FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range",
    "normal", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
"""Functions of `torch` that make tensors from numbers."""

_SHARING = ("as_tensor", "asarray", "from_numpy")
"""Functions of `torch` whose results may share memory with their inputs."""

_SIZED = (
    "as_strided", "broadcast_shapes", "broadcast_to", "narrow", "permute", "reshape", "roll", "select", "tile", "topk",
    "tril", "triu", "unflatten",
)  # fmt: skip
"""Functions of `torch` that convert their number arguments before they dispatch to ``__torch_function__``."""

_SWITCHES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled")
"""Functions of `torch` that return which modes are on."""

_SEEDS = ("get_rng_state", "manual_seed", "seed", "set_rng_state")
"""Functions of `torch` that read and set the state of its random generator."""

_DTYPE_FACTS = ("finfo", "iinfo")
"""Functions of `torch` that return properties of dtypes."""


@contextlib.contextmanager
def recording(tracer: Recorder, root: nn.Module) -> Iterator[Recording]:
    """Patches PyTorch and the code of `root` to report to `tracer`; restores them and `root`'s state at the end."""
    # PyTorch keeps the functions of `torch` that it lists first; patched ones would keep the model in memory
    torch.overrides.get_overridable_functions()
    with contextlib.ExitStack() as stack:
        reach = Reach(root)
        in_users_code = Exchanges(stack)
        exchange_named(root, in_users_code, functools.partial(_in_users_code, tracer))
        for module, name in transformers_masks.mask_functions_seen_by(root):
            recorded = _recorded(tracer, getattr(module, name), transformers_masks.attention_mask, name)
            in_users_code.attribute(module, name, recorded)
        # after the patches of the user's code, which aren't side effects of the forward
        before = Snapshot(reach)
        at_end_of(stack, before.put_back)
        calls = stack.enter_context(_RecordsCalls(tracer))
        exchanges = Exchanges(stack)
        ask = builtins.isinstance
        for name in _SHARING:
            recorded = _copied_if_constant(tracer, getattr(torch, name))
            exchanges.attribute(torch, name, recorded)
        for name in (*_FACTORIES, *_SIZED, *_DTYPE_FACTS):
            function = getattr(torch, name)
            exchanges.attribute(torch, name, _recorded(tracer, function, function))
        regions = record_gradient_regions(tracer, exchanges)
        for name in _SWITCHES:
            exchanges.attribute(torch, name, _decided_switch(tracer, regions, getattr(torch, name)))
        for module, name in itertools.product((torch, torch.random), _SEEDS):
            exchanges.attribute(module, name, _refused_seed(tracer, getattr(module, name)))
        exchange_of_modules(tracer, root, exchanges)
        exchanges.attribute(builtins, "isinstance", _truthful_isinstance())
        exchanges.attribute(builtins, "callable", _truthful_callable())
        _record_autocast(tracer, exchanges)
        apply = _recorded_apply(tracer, vars(torch.autograd.Function)["apply"])
        exchanges.attribute(torch.autograd.Function, "apply", classmethod(apply))
        exchanges.attribute(torch.set_grad_enabled, "__init__", _decided_grad_mode(tracer))
        stack.enter_context(checkpoints_bound_by(_refused_recomputation(tracer)))
        _record_scripted(tracer, exchanges)
        _inline_compiled(exchanges)
        set_aside = functools.partial(_set_aside, calls, ask)

        @contextlib.contextmanager
        def outside() -> Iterator[None]:
            with (
                tracer.examples.real_calls(makes_tensors=False),
                fake_tensor.unset_fake_temporarily(),
                in_users_code.taken_back(),
                exchanges.taken_back(),
            ):
                yield

        stack.enter_context(imports_run(outside, lambda: tracer.is_of_this_thread))
        yield Recording(before, drawing_modules(reach), set_aside, outside)


@contextlib.contextmanager
def _set_aside(calls: TorchFunctionMode, ask: Callable[[Any, Any], bool]) -> Iterator[None]:
    """Removes the slowest patches inside the context, for PyTorch's internal code, where nothing is recorded."""
    truthful, builtins.isinstance = builtins.isinstance, ask  # type: ignore[assignment]
    try:
        # a mode that the forward has entered is above this one on the stack, and must stay there
        is_first = current_function_mode() is calls
        with function_mode_set_aside() if is_first else contextlib.nullcontext():
            yield
    finally:
        builtins.isinstance = truthful


class _RecordsCalls(TorchFunctionMode):
    """Records factory functions called by other names than in `torch`, and functions of tensors that have no proxy.

    Tensors from ``self.parameters()`` and tensors in lists and dictionaries have no proxy.
    """

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self._tracer = tracer
        self._makers = frozenset(getattr(torch, name) for name in (*_FACTORIES, *_SHARING))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tracer.is_running:
            return func(*args, **kwargs)
        if func in self._makers:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        # proxies record by themselves
        if any(issubclass(kind, fx.Proxy) for kind in types) or func.__name__ in _OBJECT_METHODS:
            return func(*args, **kwargs)
        if not any(map(_is_tensor, pytree.tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        return self._on_proxies(func, args, kwargs)

    def _on_proxies(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        if not any(self._tracer.session.name_of(tensor) is not None for tensor in tensors) and not (
            writes_by_method(func.__name__) or "out" in kwargs
        ):
            result = func(*args, **kwargs)
            if not any(map(_is_tensor, pytree.tree_leaves(result))):
                return result  # a property of a constant tensor, such as its shape
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._tracer.proxy_of, (args, kwargs))
        if func.__name__ == "__get__":
            return getattr(args[0], func.__self__.__name__)
        if func.__name__ == "__set__":
            return setattr(args[0], func.__self__.__name__, args[1])
        if getattr(torch.Tensor, func.__name__, None) is func:
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


_OBJECT_METHODS = ("__repr__", "__format__", "__deepcopy__", "__reduce_ex__")
"""Methods of tensors that compute no tensor."""


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)


def _recorded(
    tracer: Recorder, function: Callable[..., Any], target: Callable[..., Any], *first: Any
) -> Callable[..., Any]:
    """Wraps `function` to record a call of `target`, with `first` before the other arguments."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", target, (*first, *args), kwargs)

    return record


def _in_users_code(tracer: Recorder, value: Any) -> Any:
    """Returns the replacement of a value that the model's code finds by name, or the value itself."""
    if not draws(value):
        return _refusing_type_checks(tracer, uncached(value))
    recorded = _recorded(tracer, value, value)

    @functools.wraps(value)
    def call(*args: Any, **kwargs: Any) -> Any:
        # a method of a module runs unrecorded; its draws count as draws of the module's code
        given = (*args, *kwargs.values())
        is_method = any(builtins.isinstance(argument, nn.Module) for argument in given)
        return (value if is_method else recorded)(*args, **kwargs)

    return call


def _copied_if_constant(tracer: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        made = tracer.create_proxy("call_function", function, args, kwargs)
        is_constant = not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        return made.clone() if is_constant else made

    return record


def _decided_switch(tracer: Recorder, regions: GradientRegions, function: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(function)
    def decide(*args: Any) -> bool:
        # PyTorch's own code uses the answer to set and reset modes
        asking = sys._getframe(1).f_code.co_filename
        if tracer.is_running or asking.startswith(_PYTORCH) or guards.is_machinery(asking):
            return function(*args)
        if function is _IS_GRAD_ENABLED and (regions.are_open or not function()):
            return function()  # a trace starts with gradients, so this is a region of the model
        # equal modules may be traced while other modes are on
        tracer.session.specialised = True
        answer = tracer.session.gradients if function.__name__ == "is_grad_enabled" else function(*args)
        asked = tracer.create_proxy("call_function", function, args, {})
        # a trace always runs with gradients, so evaluating the node may give another answer
        asked.node.meta[VALUE] = answer
        tracer.decide(asked, answer)
        return answer

    return decide


_IS_GRAD_ENABLED = torch.is_grad_enabled
_PYTORCH = os.path.dirname(torch.__file__)


def _truthful_isinstance() -> Callable[[Any, Any], bool]:
    ask = builtins.isinstance

    # a proxy can't override __class__: PyTorch's argument parsers read it too, and would take the proxy for a tensor
    def isinstance(instance: Any, classes: Any) -> bool:
        if ask(instance, classes):
            return True
        # the fast path: most checks are of other objects
        if type(instance) is not ValueProxy or instance.tracer.is_running:
            return False
        if VALUE in instance.node.meta:
            held = instance.tracer.session.own_tensor(instance.node)
            instance.tracer.session.specialised |= held is not None
            answer = ask(instance.node.meta[VALUE] if held is None else held, classes)
            if instance.node.op == "placeholder":
                # `kind` returns a string, for which the tracer adds a check
                instance.tracer.create_proxy("call_function", guards.kind, (instance,), {})
            return answer
        if guards.is_machinery(sys._getframe(1).f_code.co_filename):
            return False
        raise instance.tracer.undecided()

    return isinstance


def _truthful_callable() -> Callable[[Any], bool]:
    ask = builtins.callable

    # a proxy defines __call__, but numbers and tensors aren't callable
    def callable(value: Any) -> bool:
        if type(value) is not ValueProxy or value.tracer.is_running:
            return ask(value)
        if VALUE in value.node.meta:
            return ask(value.node.meta[VALUE])
        if guards.is_machinery(sys._getframe(1).f_code.co_filename):
            return True
        raise value.tracer.undecided()

    return callable


def _refused_seed(tracer: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refuse(*args: Any) -> Any:
        if tracer.is_running:
            return function(*args)
        message = f"{guards.deciding_line()} sets the state of random numbers, which a graph can't hold"
        raise tracer.failing(TraceError(message))

    return refuse


def _recorded_apply(tracer: Recorder, apply: Any) -> Callable[..., Any]:
    """Wraps `apply`, a classmethod in Python (in C since PyTorch 2.15), to record its calls."""

    def record(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if tracer.is_running or not any(builtins.isinstance(leaf, fx.Proxy) for leaf in given):
            return apply.__get__(None, function)(*args, **kwargs)
        # a function could hold modules of the model, which adapters couldn't reach; a module itself is an attribute
        if any(callable(leaf) and not builtins.isinstance(leaf, fx.Proxy | nn.Module) for leaf in given):
            message = f"{function.__name__} is given a function, whose code a graph can't hold"
            raise tracer.failing(TraceError(message))
        return tracer.create_proxy("call_function", Applied(function), args, kwargs)

    return record


def _decided_grad_mode(tracer: Recorder) -> Callable[..., None]:
    """Makes ``torch.set_grad_enabled(self.training)`` a decision, since PyTorch would pass the proxy on."""
    init = torch.set_grad_enabled.__init__

    def decide(context: Any, mode: Any) -> None:
        init(context, mode if tracer.is_running else bool(mode))

    return decide


def _refused_recomputation(tracer: Recorder) -> Callable[..., Any]:
    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        if tracer.is_running:
            return function
        message = f"{guards.deciding_line()} is computed again for gradients, which a graph can't hold"
        raise tracer.failing(TraceError(message))

    return refuse


def _record_autocast(tracer: Recorder, exchanges: Exchanges) -> None:
    """Records the begin and end of regions under ``torch.autocast``; example values run under it, too."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    inside: list[tuple[torch.autocast, fx.Proxy]] = []

    def record_enter(context: Any) -> Any:
        if tracer.is_running:
            return enter(context)
        inside.append((context, tracer.create_proxy("call_function", enter_autocast, autocast_options(context), {})))
        return context

    def record_leave(context: Any, *error: Any) -> Any:
        if tracer.is_running or not inside or inside[-1][0] is not context:
            return leave(context, *error)
        tracer.create_proxy("call_function", leave_autocast, (inside.pop()[1],), {})
        return None

    exchanges.attribute(torch.autocast, "__enter__", record_enter)
    exchanges.attribute(torch.autocast, "__exit__", record_leave)


def _refusing_type_checks(tracer: Recorder, function: Any) -> Any:
    """Wraps a user function that reads the class of a value to raise during a recording; returns others as they are."""
    check = _type_check_of(function)
    if check is None:
        return function

    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        raise tracer.failing(TraceError(type_check_message(function.__qualname__, check)))

    return refuse


def _type_check_of(function: Any) -> str | None:
    is_of_a_user = type(function) is FunctionType and not is_of_a_library(function.__module__)
    # `refuse_type_checks` covers forwards, and functions that aren't found by name, before the recording
    return type_check_in(function) if is_of_a_user and function.__name__ not in ("forward", "__call__") else None


def _record_scripted(tracer: Recorder, exchanges: Exchanges) -> None:
    """Records a function of ``torch.jit.script`` as one call, since scripted code accepts no proxies."""
    call = torch.jit.ScriptFunction.__call__

    def record(function: torch.jit.ScriptFunction, *args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if tracer.is_running or not any(builtins.isinstance(leaf, fx.Proxy | torch.Tensor) for leaf in given):
            return call(function, *args, **kwargs)
        return tracer.create_proxy("call_function", Scripted(function, cast(str, function.name)), args, kwargs)

    exchanges.attribute(torch.jit.ScriptFunction, "__call__", record)


def _inline_compiled(exchanges: Exchanges) -> None:
    """Makes modules and functions of ``torch.compile`` run their original code, which the trace records."""
    options = compiler_options()
    if options is not None:
        exchanges.attribute(options, "error_on_nested_fx_trace", False)
