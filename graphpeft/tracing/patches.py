"""What is exchanged in PyTorch and in the model while a trace runs, and put back after it.

Functions that make tensors from numbers don't ask their arguments' ``__torch_function__`` and must make new ones in
each run, ``Module.training`` is a plain attribute, and assigning to a module would change it: for the time of a trace
these go through the tracer.
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
from graphpeft.graph import guards, masks
from graphpeft.graph.contexts import enter_autocast, leave_autocast
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.errors import TraceError
from graphpeft.graph.facts import writes_by_method
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
"""Functions of `torch` that may give tensors which share the memory of what they were made of."""

_SIZED = (
    "as_strided", "broadcast_shapes", "broadcast_to", "narrow", "permute", "reshape", "roll", "select", "tile", "topk",
    "tril", "triu", "unflatten",
)  # fmt: skip
"""Functions of `torch` that read the numbers which they are given before they ask whose call it is."""

_SWITCHES = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled")
"""Functions of `torch` that tell what is switched on around a call."""

_SEEDS = ("get_rng_state", "manual_seed", "seed", "set_rng_state")
"""Functions of `torch` that read and set where its random numbers begin."""

_DTYPE_FACTS = ("finfo", "iinfo")
"""Functions of `torch` that tell about dtypes."""


@contextlib.contextmanager
def recording(tracer: Recorder, root: nn.Module) -> Iterator[Recording]:
    """Sends to `tracer` what `fx` alone can't see while `root` is traced; `root` is afterwards as it was."""
    with contextlib.ExitStack() as stack:
        reach = Reach(root)
        in_users_code = Exchanges(stack)
        exchange_named(root, in_users_code, functools.partial(_in_users_code, tracer))
        for module, name in masks.mask_functions_seen_by(root):
            recorded = _recorded(tracer, getattr(module, name), masks.attention_mask, name)
            in_users_code.attribute(module, name, recorded)
        # what was exchanged in the user's own code is no change
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
    """Takes away what PyTorch itself would go through thousands of times in a trace, without anything to record."""
    truthful, builtins.isinstance = builtins.isinstance, ask  # type: ignore[assignment]
    try:
        # a mode that the forward has entered goes first, and stays where it is
        is_first = current_function_mode() is calls
        with function_mode_set_aside() if is_first else contextlib.nullcontext():
            yield
    finally:
        builtins.isinstance = truthful


class _RecordsCalls(TorchFunctionMode):
    """Records functions that make tensors by another name than that in `torch`, and those on tensors without a proxy.

    Such are the tensors of ``self.parameters()``, and those in lists and dictionaries.
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
        if any(issubclass(kind, fx.Proxy) for kind in types) or func.__name__ in _OF_THE_OBJECT:
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
                return result  # what a constant is like
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._tracer.proxy_of, (args, kwargs))
        if func.__name__ == "__get__":
            return getattr(args[0], func.__self__.__name__)
        if func.__name__ == "__set__":
            return setattr(args[0], func.__self__.__name__, args[1])
        if getattr(torch.Tensor, func.__name__, None) is func:
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


_OF_THE_OBJECT = ("__repr__", "__format__", "__deepcopy__", "__reduce_ex__")
"""Methods of tensors that say nothing in terms of PyTorch's functions."""


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)


def _recorded(
    tracer: Recorder, function: Callable[..., Any], target: Callable[..., Any], *first: Any
) -> Callable[..., Any]:
    """Returns `function` as one that records a call of `target`, with `first` before its own arguments."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", target, (*first, *args), kwargs)

    return record


def _in_users_code(tracer: Recorder, value: Any) -> Any:
    """Returns what the model's code finds in the place of a value that it names."""
    if not draws(value):
        return _refusing_type_checks(tracer, uncached(value))
    recorded = _recorded(tracer, value, value)

    @functools.wraps(value)
    def call(*args: Any, **kwargs: Any) -> Any:
        # what a method draws is what its module's own code draws
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
        # PyTorch's own code switches such things on and off by what this answers
        asking = sys._getframe(1).f_code.co_filename
        if tracer.is_running or asking.startswith(_PYTORCH) or guards.is_machinery(asking):
            return function(*args)
        if function is _IS_GRAD_ENABLED and (regions.are_open or not function()):
            return function()  # within a region of the model's own, since a trace begins with gradients
        # equal modules may be adapted while other things are switched on
        tracer.session.specialised = True
        answer = tracer.session.gradients if function.__name__ == "is_grad_enabled" else function(*args)
        asked = tracer.create_proxy("call_function", function, args, {})
        # a trace runs with gradients, whatever is switched on around it
        asked.node.meta[VALUE] = answer
        tracer.decide(asked, answer)
        return answer

    return decide


_IS_GRAD_ENABLED = torch.is_grad_enabled
_PYTORCH = os.path.dirname(torch.__file__)


def _truthful_isinstance() -> Callable[[Any, Any], bool]:
    ask = builtins.isinstance

    # a proxy can't answer by its __class__: PyTorch's argument parsers ask for it too, and would read it as a tensor
    def isinstance(instance: Any, classes: Any) -> bool:
        if ask(instance, classes):
            return True
        # by far the most that is asked is about other things
        if type(instance) is not ValueProxy or instance.tracer.is_running:
            return False
        if VALUE in instance.node.meta:
            answer = ask(instance.node.meta[VALUE], classes)
            if instance.node.op == "placeholder":
                # the name of the kind is a string, which the tracer checks in each run
                instance.tracer.create_proxy("call_function", guards.kind, (instance,), {})
            return answer
        if guards.is_machinery(sys._getframe(1).f_code.co_filename):
            return False
        raise instance.tracer.undecided()

    return isinstance


def _truthful_callable() -> Callable[[Any], bool]:
    ask = builtins.callable

    # as numbers and tensors are not, and proxies are
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
    """Returns the function of a class method in place of `apply`, a class method of Python or, since 2.15, of C."""

    def record(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if tracer.is_running or not any(builtins.isinstance(leaf, fx.Proxy) for leaf in given):
            return apply.__get__(None, function)(*args, **kwargs)
        # a module is known to the graph; of a function it would hold the model's own modules, out of reach
        if any(callable(leaf) and not builtins.isinstance(leaf, fx.Proxy | nn.Module) for leaf in given):
            message = f"{function.__name__} is given a function, whose code a graph can't hold"
            raise tracer.failing(TraceError(message))
        return tracer.create_proxy("call_function", Applied(function), args, kwargs)

    return record


def _decided_grad_mode(tracer: Recorder) -> Callable[..., None]:
    """Decides for ``torch.set_grad_enabled(self.training)``, whose argument PyTorch would hand on to a graph."""
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
    """Records where regions under ``torch.autocast`` begin and end; the example runs under it, too."""
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
    """Returns a function of the user's that asks for the class of a value as one that refuses to in a recording."""
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
    # a forward that asks is refused before it is recorded, as what is found otherwise than by its name
    return type_check_in(function) if is_of_a_user and function.__name__ not in ("forward", "__call__") else None


def _record_scripted(tracer: Recorder, exchanges: Exchanges) -> None:
    """Records a function of ``torch.jit.script`` as one call: its code is PyTorch's own, which takes no proxies."""
    call = torch.jit.ScriptFunction.__call__

    def record(function: torch.jit.ScriptFunction, *args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if tracer.is_running or not any(builtins.isinstance(leaf, fx.Proxy | torch.Tensor) for leaf in given):
            return call(function, *args, **kwargs)
        return tracer.create_proxy("call_function", Scripted(function, cast(str, function.name)), args, kwargs)

    exchanges.attribute(torch.jit.ScriptFunction, "__call__", record)


def _inline_compiled(exchanges: Exchanges) -> None:
    """Lets modules and functions of ``torch.compile`` run the code that was compiled, which is what a graph is of."""
    options = compiler_options()
    if options is not None:
        exchanges.attribute(options, "error_on_nested_fx_trace", False)
