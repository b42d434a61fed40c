"""A module's own tensors, where its attributes give them with the changes of adapters.

While an adapter acts on a layer, its attribute ``weight`` gives the weight with the adapter's change. The graph with
that adapter's nodes reads the own weight, and so does code that moves, shards or saves a model.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.autograd.function import FunctionCtx

from graphpeft._torch import CODE_OF_CALLS, CODE_OF_FUNCTIONAL_CALLS, CONTEXT_OF, CheckpointFunction, symbolic_tracing
from graphpeft.graph.call_values import PerCall
from graphpeft.graph.errors import GuardError
from graphpeft.graph.paths import STATE
from graphpeft.peft_errors import PeftWarning

STAND_INS = "_graphpeft_stand_ins"
"""The attribute of a class that has the readers of overrides, by the names of the tensors for which they stand in."""

_OWN = "graphpeft_own"
"""The key of ``node.meta`` of a node that reads a tensor without the changes that other readers get."""

_READER = "_graphpeft_own_tensor"
"""The name of `own_tensor` in the code of graphs."""


class ReadChanged(property):
    """The attribute of a class that gives a tensor of a module with the changes of adapters."""


def own_weight(layer: nn.Module, name: str = "weight") -> torch.Tensor:
    """Returns a layer's own weight, without the changes of the adapters that act on it.

    While an adapter acts, the attribute ``layer.weight`` gives the changed weight; ``parameters()`` has the own one.

    Args:
        layer: A module, adapted or not.
        name: The name of the weight in the module.

    Returns:
        The parameter of the base model, or the tensor that the layer computes it as; an adapter's tensor where one is
        read in the weight's place, as the copies of `modules_to_save` are.

    Raises:
        AttributeError: If the module has no such tensor.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> own_weight(model[0]) is dict(model.named_parameters())["0.weight"]
        True
    """
    found = own_tensor(layer, name)
    if not isinstance(found, torch.Tensor):
        raise AttributeError(f"{name} of a {type(layer).__name__} is no tensor")
    return found


def own_tensor(module: Any, name: str) -> Any:
    """Returns a tensor of a module as its attribute would give it without the changes of adapters."""
    stand_in = getattr(type(module), STAND_INS, {}).get(name)
    if stand_in is not None:
        return stand_in(module)
    own = module._parameters.get(name)
    # asked here, too, since that saves each forward a call
    if own is not None and not torch.compiler.is_compiling() and _READ_LAST.get(module, {}).get(name) != id(own):
        look_around(module, name, own)
    return base_tensor(module, name) if own is None else own


def base_tensor(module: Any, name: str) -> Any:
    """Returns the same of the base, where an adapter's tensor is read in its place."""
    own = module._parameters.get(name)
    if own is None:
        own = module._buffers.get(name)
    return _held(module, name) if own is None else own


def _held(module: Any, name: str) -> Any:
    # FSDP and hooks that compute a weight set it as a plain attribute, parametrizations as a property of the class
    if name in vars(module):
        return vars(module)[name]
    for cls in type(module).__mro__:
        found = vars(cls).get(name)
        if found is not None and not isinstance(found, ReadChanged):
            return found.__get__(module)
    if name in module._parameters:
        return None
    return nn.Module.__getattr__(module, name)  # which raises the usual error, or finds a buffer


_READ_LAST: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
"""The identities of the parameters that were read last, by module and name: those need no look at frames."""

_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that were warned of a function without a backward."""


def look_around(module: Any, name: str, own: Any) -> None:
    """Looks at the calls around the first read of a parameter in an adapted model.

    A functional call around the whole model gives the model other weights; the adapters act on these.
    """
    if _READ_LAST.get(module, {}).get(name) == id(own):
        return
    is_called, is_given, function, frame = False, False, None, sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        is_given = is_given or code is CODE_OF_FUNCTIONAL_CALLS
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            # isinstance would ask an adapted layer for its class
            function = first if issubclass(type(first), FunctionCtx) else function
        is_called = is_called or code in CODE_OF_CALLS
        if code in CODE_OF_CALLS and STATE in vars(model := frame.f_locals["self"]):
            if is_given:
                raise GuardError(
                    f"the model calls {_path(module, model)} by torch.func.functional_call, which gives it weights; "
                    "merging would lose what an adapter changes in these, so leave it out of the adapter's targets"
                )
            if function is not None:
                if not module.training:
                    return  # to look again in training
                _warn_without_backward(module, model, function)
            break
        frame = frame.f_back
    # reads while no module is called, as while one is adapted, say nothing of its calls
    if is_called:
        _READ_LAST.setdefault(module, {})[name] = id(own)


def _warn_without_backward(module: nn.Module, model: nn.Module, function: Any) -> None:
    """Warns once of a model that calls a layer in a function whose backward won't run."""
    kind = getattr(type(function), CONTEXT_OF)
    # PyTorch itself warns of its checkpoints
    if any(function.needs_input_grad) or kind is CheckpointFunction or model in _WARNED:
        return
    warnings.warn(
        f"{_path(module, model)} is called in {kind.__name__}, a torch.autograd.Function. None of its inputs requires "
        "a gradient, so that its backward doesn't run, and adapters inside get no gradient: let inputs require "
        "gradients, as enable_input_require_grads() does; check_learning(model, batch) tells what learns",
        PeftWarning,
        stacklevel=2,
    )
    # not before, since a warning may be an error, and the next forward would run without a word
    _WARNED.add(model)


def _path(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, known in model.named_modules() if known is module)


def let_read_own(node: fx.Node) -> None:
    """Lets a node read its tensor without the changes that other readers get."""
    node.meta[_OWN] = True


def as_own(graph: fx.Graph, source: str, variables: dict[str, Any]) -> str:
    """Returns the source of a graph with its reads of own tensors, and adds what these need to its globals."""
    paths = {node.name: f"self.{node.target}" for node in graph.nodes if _OWN in node.meta}
    if not paths:
        return source
    variables[_READER] = own_tensor
    lines = source.split("\n")
    for number, line in enumerate(lines):
        path = paths.pop(line.lstrip().partition(" ")[0], None)
        if path is not None:
            (around, _, name), (assigned, _, read) = path.rpartition("."), line.partition(" = ")
            _, freed, others = read.partition(";")
            lines[number] = f'{assigned} = {_READER}({_readable(around)}, "{name}"){freed}{others}'
    return "\n".join(lines)


def _readable(path: str) -> str:
    first, *names = path.split(".")
    for name in names:
        first = f"{first}.{name}" if name.isidentifier() else f'getattr({first}, "{name}")'
    return first


def _reads_own(graph: fx.Graph, path: Any) -> bool:
    return any(_OWN in node.meta for node in graph.nodes if node.op == "get_attr" and node.target == path)


_MEANING_OWN = (
    *("torch.distributed.", "torch.fx.graph_module.", "torch.nn.utils.", "accelerate.", "deepspeed."),
    *("transformers.modeling_utils.", "transformers.core_model_loading.", "transformers.initialization."),
    *("transformers.trainer.", "transformers.trainer_utils.", "transformers.trainer_pt_utils."),
)
"""Packages whose code asks a layer for its weight to move, shard, tie, replace or save it."""


_METHODS_ON_OWN = frozenset(
    (
        *("_save_to_state_dict", "_load_from_state_dict", "__getstate__", "__setstate__"),
        *("_apply", "extra_repr", "reset_parameters", "_reset_parameters"),
        *("_init_flat_weights", "_weights_have_changed", "flatten_parameters"),
    )
)
"""Methods of a module's class in which it means its own tensors: what saves, loads, moves, fills and shows them."""


def on_own(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Lets a module give its own tensors to whoever asks, for the duration of the context."""
    return _ON_OWN.during((*(_ON_OWN.get() or ()), module))


def is_on_own(module: nn.Module) -> bool:
    """Returns whether a module gives its own tensors to whoever asks, in the present call."""
    running = _ON_OWN.get()
    return running is not None and any(each is module for each in running)


_ON_OWN: PerCall[tuple[nn.Module, ...]] = PerCall("layers on their own weights", "run the compiled model in a thread")


_ON_THE_WAY = ("__getattr__", "__setattr__", "_set_attribute", "register_parameter")
_LIBRARIES = ("torch.", "graphpeft.")
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
"""Frames of their own before Python 3.12."""


def _is_on_the_way(frame: Any) -> bool:
    # the code of a dressed class has the class's name behind that of the function
    name, home = frame.f_code.co_name.partition(" ")[0], frame.f_globals.get("__name__", "")
    return name in _COMPREHENSIONS or (name in _ON_THE_WAY and home.startswith(_LIBRARIES))


class Asker:
    """The code that asks a module's attribute for a tensor, or sets one."""

    def __init__(self, depth: int) -> None:
        frame: Any = sys._getframe(depth + 1)
        while _is_on_the_way(frame):
            frame = frame.f_back
        self._frame, self._home = frame, frame.f_globals.get("__name__", "")

    def means_own(self, module: nn.Module) -> bool:
        """Returns whether it means the module's own tensor, without changes."""
        if self._home == "torch.fx.interpreter":
            # it runs a graph node by node
            running = self._frame.f_locals
            return _reads_own(running["self"].graph, running.get("target"))
        if self.takes_parameters:
            return not is_in_forward()
        if self._frame.f_code.co_name in _METHODS_ON_OWN and self._is_of(module):
            return True
        return f"{self._home}.".startswith(_MEANING_OWN)

    def _is_of(self, module: nn.Module) -> bool:
        first = self._frame.f_code.co_varnames[:1]
        return bool(first) and self._frame.f_locals.get(first[0]) is module

    @property
    def takes_parameters(self) -> bool:
        """Whether it is ``get_parameter``, which takes no other tensor."""
        return self._frame.f_code is nn.Module.get_parameter.__code__

    @property
    def chooses_kernels(self) -> bool:
        """Whether it is a layer of PyTorch, which runs its fast path on plain tensors alone."""
        return self._home.startswith("torch.nn.modules.") and not torch.is_grad_enabled()


def is_keeping(cls: Any) -> bool:
    """Returns whether the caller's caller is a method of `cls` that keeps a module's state, and computes nothing."""
    frame = sys._getframe(2)
    return frame.f_code.co_name != "forward" and frame.f_globals.get("__name__") == cls.__module__


def is_in_forward() -> bool:
    """Returns whether a module is being called."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code in CODE_OF_CALLS:
            return True
        frame = frame.f_back
    return False


# reads in graphs that are recorded


def recording_reads() -> contextlib.AbstractContextManager[None]:
    """Lets layers' attributes be read as they are without adapters, for a graph that has the layers and reads them."""
    return _RECORDING_READS.during(True)


def is_recording_reads() -> bool:
    """Returns whether such a graph is recorded."""
    return _RECORDING_READS.get() is True


_RECORDING_READS: PerCall[bool] = PerCall("recordings of graphs", "record the graph before it is compiled")


_GETATTR = nn.Module.__getattr__


def is_traced_by_fx() -> bool:
    """Returns whether a tracer of torch.fx records the reads of modules' attributes."""
    present: Any = nn.Module.__getattr__
    return present is not _GETATTR and getattr(present, "__globals__", None) is vars(symbolic_tracing)


def own_in_fx_graph(module: nn.Module, name: str) -> Any:
    """Returns what records a read of a module's own tensor where a tracer of torch.fx runs the module's code."""
    is_registered = name in module._parameters or name in module._buffers
    if is_registered and (is_recording_reads() or name not in getattr(type(module), STAND_INS, {})):
        return nn.Module.__getattr__(module, name)
    return own_tensor(module, name)


def fx_tracer(module: nn.Module, own: Any) -> Any:
    """Returns the tracer that records a read of a module's tensor, or None."""
    if isinstance(own, fx.Proxy):
        return own.tracer
    # what a hook has computed is no proxy, but what it is computed from is one
    others = (nn.Module.__getattr__(module, name) for name, each in module._parameters.items() if each is not None)
    return next((other.tracer for other in others if isinstance(other, fx.Proxy)), None)


def read_in_fx_graph(tracer: Any, function: Callable[[nn.Module, str], Any], module: nn.Module, name: str) -> fx.Proxy:
    """Records a function that reads a tensor of a layer; so a graph has the layer, and not only its tensor."""
    layer = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_function", function, (layer, name), {})


def own_of_kept(layer: nn.Module, name: str) -> Any:
    """Returns an own tensor of a layer for a graph that also calls a module with the layer, as it is adapted."""
    tracer = fx_tracer(layer, own_in_fx_graph(layer, name)) if is_traced_by_fx() else None
    return own_tensor(layer, name) if tracer is None else read_in_fx_graph(tracer, own_of_kept, layer, name)


def read_own_of_kept(graphs: Iterable[fx.Graph], model: nn.Module) -> None:
    """Lets graphs read own tensors of layers that modules have which they call."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for graph in graphs:
        called = tuple([f"{node.target}." for node in graph.nodes if node.op == "call_module"])
        for node in [node for node in graph.nodes if node.op == "get_attr" and str(node.target).startswith(called)]:
            path, _, name = str(node.target).rpartition(".")
            if isinstance(getattr(type(modules.get(path)), name, None), ReadChanged):
                with graph.inserting_before(node):
                    layer = graph.create_node("get_attr", path)
                    own = graph.create_node("call_function", own_of_kept, (layer, name))
                own.meta = node.meta
                node.replace_all_uses_with(own)
                graph.erase_node(node)
