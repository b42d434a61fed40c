"""Traces a whole model into one flat graph module that shares the model's parameters.

Layers of ``torch.nn`` stay ``call_module`` nodes. Their modules are copies that share the original's tensors, so that
edits of the graph module don't change the model. All other code is inlined into calls of functions and methods.
"""

from __future__ import annotations

import copy
import dis
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphpeft._torch import call_with_hooks
from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward, read_anew
from graphpeft.graph import in_place
from graphpeft.graph.calls import calls_of
from graphpeft.graph.dependencies import value_inputs
from graphpeft.graph.errors import TraceError
from graphpeft.graph.holders import has_own_modules
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.own_tensors import read_own_of_kept
from graphpeft.graph.settings import Reads, Settings, Watch
from graphpeft.graph.template import GraphForward, Graphs, Template, wear_template
from graphpeft.graph.traced_model import Place, TracedModel, module_told
from graphpeft.progress import counted
from graphpeft.tracing.attributes import ABSENT, MACHINERY, is_plain
from graphpeft.tracing.constant_attributes import make_settings
from graphpeft.tracing.mode_discovery import own_modes
from graphpeft.tracing.modes import Recorded, in_each_mode
from graphpeft.tracing.record import ONE_TRACE_AT_A_TIME, record_forward
from graphpeft.tracing.tracer import ValueTracer

INLINED = "inlined"
"""Marks a module whose forward is inlined, like the op of a node."""


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None, *, strict: bool = False) -> fx.GraphModule:
    """Returns one flat graph module of `model`, with the model's signature, which shares the model's tensors.

    If the model's code branches on training mode, the result has a graph for each mode, see `graphs`. The result
    computes what the model does for every call that takes the same decisions in Python code; any other call raises
    `GuardError`. Plain attributes (numbers, flags, strings) that the code reads from modules are attributes of the
    result's modules at the same paths. The result uses a new number that you set there; if the code has decided on the
    attribute, a new value raises `GuardError`. The model isn't changed.

    Args:
        model: Any module.
        example_inputs: A tuple of positional or a dict of keyword arguments. Without it, the model is traced
            symbolically.
        strict: Whether to raise an error for a module that can't be inlined, or for a mode that can't be traced;
            otherwise the module stays a call, and the result's `report` gives the reason.

    Returns:
        The graph module.

    Raises:
        NeedsInputsError: If the model decides on its inputs and `example_inputs` is missing.
        TraceError: If no graph can represent the model's own forward; with `strict`, also for the errors named there.

    Examples:
        >>> graph = trace(nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2))))
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
        ['0', '1.0', '1.1']
    """
    read_anew()
    _refuse_own_call(model)
    args, kwargs = split_inputs(example_inputs)
    with ONE_TRACE_AT_A_TIME:
        with counted("tracing", "nodes") as one_more:
            recorded, tracer = _recorded(model, args, kwargs, one_more)
        if strict and tracer.session.kept:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in tracer.session.kept.items())
            raise TraceError(f"not all of the model becomes a graph: {reasons}")
        if strict and recorded.other_mode_error is not None:
            raise recorded.other_mode_error
        return _graph_module(model, recorded, tracer)


def _refuse_own_call(model: nn.Module) -> None:
    """Raises TraceError if a call of the model runs more than its hooks and forward, since only these are recorded."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        raise TraceError(
            f"the model is compiled; trace model._orig_mod, the {type(compiled).__name__} itself, and compile its graph"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a ScriptModule, which no Python code runs; trace the module that it was made from"
        )
    call = in_place.original_class(model).__call__
    if call is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise TraceError(
            f"{type(model).__name__} has a __call__ of its own, and a graph is of the forward; put what it does into "
            "that, or trace a module that calls this one"
        )


def is_layer(module: nn.Module) -> bool:
    """Returns whether `module` is a layer of ``torch.nn`` or a scripted module, which stays one call."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, GraphForward) or not in_place.original_class(module).__module__.startswith("torch.nn."):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return isinstance(module, nn.MultiheadAttention) or not has_own_modules(module)


def _recorded(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    one_more: Callable[[], object],
    inlined: frozenset[nn.Module] = frozenset(),
) -> tuple[Recorded, ValueTracer]:
    """Records a model; its layers stay calls, except the layers `inlined`; `one_more` is called for each node."""
    tracer = ValueTracer(lambda module: is_layer(module) and module not in inlined, one_more)
    # a call of the model runs the model's hooks, too
    entry = functools.partial(call_with_hooks, model)
    recorded = in_each_mode(model, lambda modes: record_forward(tracer, model, entry, args, kwargs, modes))
    read = _layers_read(model, recorded.graphs)
    if read <= inlined:
        return recorded, tracer
    # recorded again with these layers inlined, so that the graph shows all uses of their weights
    return _recorded(model, args, kwargs, one_more, inlined | read)


def _layers_read(model: nn.Module, graphs: Graphs) -> set[nn.Module]:
    """Returns the layers that graphs call and whose tensors they also read directly, such as for a fused kernel."""
    nodes = [node for graph in graphs for node in graph.nodes]
    called = {model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    used = (node for node in nodes if node.op == "get_attr" and any(node in value_inputs(user) for user in node.users))
    places = (str(node.target).rpartition(".") for node in used)
    owners = {model.get_submodule(path) for path, _, name in places if name != "training"}
    # nn.MultiheadAttention has a layer inside
    return {module for module in called if is_layer(module) and not owners.isdisjoint(module.modules())}


def _graph_module(model: nn.Module, recorded: Recorded, tracer: ValueTracer) -> fx.GraphModule:
    root = TracedModel.of(model)
    root.kept = dict(tracer.session.kept)
    root.not_kept = tuple(tracer.session.not_kept)
    root.other_mode_error = str(recorded.other_mode_error) if recorded.other_mode_error is not None else None
    root.config = getattr(model, "config", None)
    root.input_embedding = _path_of(model, module_told(model, "get_input_embeddings"))
    root.output_head = _path_of(model, module_told(model, "get_output_embeddings"))
    reads = [make_settings(graph, tracer.session.lines_of_reads) for graph in recorded.graphs]
    _refuse_reserved_names(reads)
    # built once for all copies of layers, of which a model has hundreds
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # changes are in the graphs, and a layer in a module that stays a call has them, too
    read_own_of_kept(recorded.graphs, model)
    for kind, path in _in_order(model, recorded.graphs):
        if kind == INLINED:
            _container(root, model, path)
        elif kind == "call_module":
            _place(root, model, path, _sharing_copy(model.get_submodule(path), tensors))
        elif path in tracer.session.constants.values:
            setattr(root, path, tracer.session.constants.values[path])
        elif path.rpartition(".")[2] == "training":
            _container(root, model, path.rpartition(".")[0])
        else:
            _share_attribute(root, model, path, tensors)
    _add_settings(root, model, recorded.graphs, reads, list(tracer.session.read_once))
    root._graphpeft_read_once = tuple(
        f"{path} ({type(value).__name__})" for path, value in _distinct(tracer.session.read_once)
    )
    root._graphpeft_frozen = _frozen(model, recorded.graphs)
    modules = dict(root.named_modules())
    for path, modes in own_modes(model).items():
        if isinstance(place := modules.get(path), Place):
            place._graphpeft_own_modes = modes
    wear_template(root, Template(recorded.graphs, shared=False))
    return root  # type: ignore[return-value]


_RESERVED = frozenset((*dir(GraphForward), *TracedModel.__annotations__)) - MACHINERY
"""Attribute names that a traced model needs itself."""


def _refuse_reserved_names(reads: list[Reads]) -> None:
    taken = sorted(_RESERVED.intersection(path for read in reads for path in read.numbers))
    if taken:
        raise TraceError(f"it has attributes that a traced model needs itself: {', '.join(taken)}; rename them")


def _add_settings(root: nn.Module, model: nn.Module, graphs: Graphs, reads: list[Reads], read_once: list[str]) -> None:
    """Adds the check of its settings to each graph, and the settings as attributes to the modules of `root`."""
    reads = [read._replace(settings=tuple(s for s in read.settings if s.path not in _RESERVED)) for read in reads]
    for path in dict.fromkeys(setting.path for read in reads for setting in read.settings):
        owner_path, _, name = path.rpartition(".")
        owner = _container(root, model, owner_path)
        if isinstance(owner, Place):
            _have_plain(owner, model.get_submodule(owner_path), name)
    modules = dict(root.named_modules())
    unread = [path for path in read_once if path not in _RESERVED and _is_unread(modules, path)]
    watch = _watching(modules, {*unread, *(setting.path for read in reads for setting in read.settings)})
    for number, (graph, read) in enumerate(zip(graphs, reads, strict=True)):
        if read.settings or read.numbers or unread:
            Settings.add(graph, root, f"{_SETTINGS}_{number}" if number else _SETTINGS, read, unread, watch)


def _watching(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Watch:
    """Returns a watch that counts changes of attributes and submodules of the places in `modules`."""
    watch, names = Watch(), dict[str, set[str]]()
    for path in paths:
        owner, _, name = path.rpartition(".")
        names.setdefault(owner, set()).add(name)
    for path, place in modules.items():
        if isinstance(place, Place):
            place._graphpeft_watch, place._graphpeft_watched = watch, frozenset(names.get(path, ()))
    return watch


_SETTINGS = "_graphpeft_settings"


def _is_unread(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Returns whether the place at a path's owner in a traced model lacks the attribute at this path."""
    owner_path, _, name = path.rpartition(".")
    owner = modules.get(owner_path)
    held = (owner.__dict__, owner._parameters, owner._buffers, owner._modules) if isinstance(owner, Place) else ()
    return owner is not None and bool(held) and all(name not in names for names in held)


def _distinct(read_once: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the containers and objects in `read_once`, each with its first path."""
    first: dict[int, tuple[str, Any]] = {}
    for path, value in read_once.items():
        if value is not ABSENT and not isinstance(value, Tensor | nn.Module):
            first.setdefault(id(value), (path, value))
    return list(first.values())


def _frozen(model: nn.Module, graphs: Graphs) -> tuple[str, ...]:
    paths = {"", *(call.path for graph in graphs for node in graph.nodes for call in calls_of(node))}
    classes = dict.fromkeys(in_place.original_class(model.get_submodule(path)) for path in sorted(paths))
    values = {name: value for cls in classes for name, value in plain_globals(cls).items()}
    return tuple(f"{name} ({value!r})" for name, value in values.items())


def _in_order(model: nn.Module, graphs: Graphs) -> list[tuple[str, str]]:
    """Returns kinds and paths of all modules and attributes that the graphs use, in the order of the model.

    PEFT names an adapter's tensors and draws their values in this order, so a traced model must keep it.
    """
    modules = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    tensors = {path: index for index, (path, _) in enumerate(model.named_parameters(remove_duplicate=False))}

    def place(used: tuple[str, str]) -> tuple[int, str, int]:
        kind, path = used
        module = path if path in modules else path.rpartition(".")[0]
        return modules[module], kind, tensors.get(path, len(tensors))

    nodes = [node for graph in graphs for node in graph.nodes]
    used = dict.fromkeys((node.op, str(node.target)) for node in nodes if node.op in ("call_module", "get_attr"))
    inlined = dict.fromkeys((INLINED, call.path) for node in nodes for call in calls_of(node))
    return sorted(used | inlined, key=place)


def _path_of(model: nn.Module, told: nn.Module | None) -> str | None:
    paths = (path for path, module in model.named_modules() if told is not None and module is told)
    return next(paths, None)


def _container(root: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """Returns the module of `root` at `path`; adds missing places, made from the modules of `model`."""
    here, original = root, model
    for name in path.split(".") if path else ():
        original = original.get_submodule(name)
        if name not in here._modules:
            here.add_module(name, Place.of(original))
        here = here.get_submodule(name)
    return here


def _place(root: nn.Module, model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    _container(root, model, owner)._modules[name] = module


def _share_attribute(root: nn.Module, model: nn.Module, path: str, tensors: dict[int, Tensor]) -> None:
    owner_path, _, name = path.rpartition(".")
    owner, original = _container(root, model, owner_path), model.get_submodule(owner_path)
    if name in original._parameters:
        owner._parameters[name] = original._parameters[name]
    elif name in original._buffers:
        owner.register_buffer(name, original._buffers[name], name not in original._non_persistent_buffers_set)
    elif name in original._modules:
        owner._modules[name] = _sharing_copy(original.get_submodule(name), tensors)
    else:
        _have_plain(owner, original, name)


def _have_plain(place: nn.Module, original: nn.Module, name: str) -> None:
    """Gives `place` a plain attribute of `original` or of its class."""
    if isinstance(place, Place) and name not in vars(original):
        place._graphpeft_of_class |= {name}
    else:
        setattr(place, name, getattr(original, name))


def _sharing_copy(module: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """Copies a module but not its `tensors`, so that additions to the copy don't change the original.

    The copy shares the original's hooks, so that they report to the same objects.
    """
    inside = set(module.modules())
    hooks = {
        id(hook): hook
        for part in inside
        for held in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        for hook in held.values()
        if getattr(getattr(hook, "func", hook), "__self__", None) not in inside
    }
    # shared, since scripted modules can't be changed
    scripted = {id(part): part for part in inside if isinstance(part, torch.jit.ScriptModule)}
    return copy.deepcopy(module, {**tensors, **hooks, **scripted})


def plain_globals(cls: type) -> dict[str, Any]:
    """Returns the plain globals and closure variables that a forward reads, each by a description of its name."""
    found = {name: value for function in functions_in_forward(cls) for name, value in _read_by(function)}
    return {name: value for name, value in found.items() if value is not None and is_plain(value)}


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the globals of a user's that a function reads, and its closure variables."""
    for name, attributes in _globals_named_in(function.__code__).items():
        value: Any = function.__globals__.get(name)
        where = function.__globals__.get("__name__")
        if issubclass(type(value), ModuleType):
            found = {attribute: vars(value).get(attribute) for attribute in attributes if attribute is not None}
            where = value.__name__
        else:
            found = {name: value}
        if not is_of_a_library(where):
            yield from ((f"the global {each} of {where}", read) for each, read in found.items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the variable {name} around {function.__qualname__}", cell.cell_contents
        except ValueError:
            continue  # an empty cell


@functools.cache
def _globals_named_in(code: CodeType) -> dict[str, dict[str | None, None]]:
    """Returns the globals that `code` reads, by name, with the attributes that it reads of each, or None for itself."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    found: dict[str, dict[str | None, None]] = {}
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            takes = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            attribute = following.argval if takes and following is not None else None
            found.setdefault(instruction.argval, {})[attribute] = None
    for constant in code.co_consts:
        for name, attributes in _globals_named_in(constant).items() if isinstance(constant, CodeType) else ():
            found.setdefault(name, {}).update(attributes)
    return found
