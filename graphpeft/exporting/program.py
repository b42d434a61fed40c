"""Exports a prepared model to an ``ExportedProgram``, with dynamic sizes of its inputs."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import string
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import TensorArgument

from graphpeft._torch import OpOverload, argument_names, pytree
from graphpeft.exporting import caches
from graphpeft.exporting.carriers import Prepared
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example, names
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.traced_model import stands_for
from graphpeft.wording import number_of

Dynamic = bool | Mapping[str, Any] | tuple[Any, ...] | list[Any]
"""True: all sizes that the model doesn't fix are dynamic. False: none is. Or ``dynamic_shapes`` of ``torch.export``."""


class Input(NamedTuple):
    """A tensor that an exported model takes.

    Attributes:
        name: The name.
        shape: The shape, with symbols for dynamic sizes.
    """

    name: str
    shape: tuple[Any, ...]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The dynamic dimensions."""
        return tuple(dim for dim, size in enumerate(self.shape) if isinstance(size, torch.SymInt))


class Program(NamedTuple):
    """An exported model.

    Attributes:
        exported: PyTorch's program.
        inputs: The program's inputs: first the inputs of the model, then the inputs of adapters.
    """

    exported: ExportedProgram
    inputs: tuple[Input, ...]

    def limit_to_example(self) -> None:
        """Limits the dynamic sizes that have no limit to those with which the program was traced."""
        limits: dict[Any, Any] = self.exported.range_constraints
        for size in (size for one in self.inputs for size in one.shape if isinstance(size, torch.SymInt)):
            limit = limits.get(size.node.expr)
            if limit is not None and not limit.upper.is_Integer:
                limits[size.node.expr] = type(limit)(limit.lower, size.node.hint)

    def shapes(self) -> list[str]:
        """Returns the shape of each input, with a letter for each dynamic size, and its limits where it comes first."""
        sizes = [size.node.expr for one in self.inputs for size in one.shape if isinstance(size, torch.SymInt)]
        letters = _letters(symbol for size in sizes for symbol in sorted(size.free_symbols, key=str))
        limits = dict(self.exported.range_constraints)
        return [_tuple_of(_text(size, letters, limits) for size in one.shape) for one in self.inputs]

    def draws(self) -> list[str]:
        """Returns the operators that draw random numbers, each with the path of the module that calls it."""
        nodes = [node for node in self.exported.graph.nodes if node.op == "call_function" and _draws(node)]
        return list(dict.fromkeys(f"{node.target} in {path_of(node) or 'the model'}" for node in nodes))


def _letters(symbols: Iterable[Any]) -> dict[Any, Any]:
    import sympy  # here, since importing it takes longer than importing this library

    rounds = (f"{letter}{number or ''}" for number in itertools.count() for letter in string.ascii_lowercase)
    return {
        symbol: sympy.Symbol(name, integer=True) for symbol, name in zip(dict.fromkeys(symbols), rounds, strict=False)
    }


def _text(size: Any, letters: Mapping[Any, Any], limits: dict[Any, Any]) -> str:
    """Returns a size as text; takes its limits out of `limits`, so that they are told once."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    text, limit = str(size.node.expr.subs(letters, simultaneous=True)), limits.pop(size.node.expr, None)
    if limit is None or not size.node.expr.is_Symbol:  # which has the limits of its symbols
        return text
    # PyTorch's own lowest limit is 2, with which a program runs on a size of 1, too
    least, most = limit.lower > 2, limit.upper.is_Integer
    return f"{f'{limit.lower} ≤ ' if least else ''}{text}{f' ≤ {limit.upper}' if most else ''}"


def _tuple_of(sizes: Iterable[str]) -> str:
    listed = list(sizes)
    return f"({', '.join(listed)}{',' if len(listed) == 1 else ''})"


def path_of(node: fx.Node) -> str:
    """Returns the path of the module whose forward a node of a program comes from."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return path.partition("@")[0]  # the number of the call follows


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = argument_names(node.target)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    # dropout in evaluation, by itself and in attentions
    return given.get("train", True) is not False and not ("dropout_p" in names and not given.get("dropout_p"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides deprecation warnings inside the context, which come from PyTorch's own code; shows other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        yield


def exported(prepared: Prepared, example: Example, dynamic: Dynamic) -> Program:
    """Exports a prepared model by PyTorch's exporter."""
    full = prepared.cases[0].full(example).apart()
    prepared.root.name_arguments(full.kwargs)
    shapes = _spec(prepared, example, full, dynamic)
    try:
        program = _traced(prepared.root, full, shapes)
    except (GuardError, TraceError):
        raise
    except Exception as error:
        raise ExportError(_refusal(error, prepared.model)) from error
    _limit_symbols_alone(program)
    more = full.kwargs.keys() - example.kwargs.keys()
    found = names(prepared.root.forward, full, [name for name in more if isinstance(full.kwargs[name], Mapping)])
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = {node.name: node.meta["val"] for node in nodes}
    specs = program.graph_signature.input_specs
    given = [spec.arg.name for spec in specs if spec.kind.name == "USER_INPUT" and isinstance(spec.arg, TensorArgument)]
    inputs = [Input(own, tuple(map(_size, values[node].shape))) for own, node in zip(found, given, strict=True)]
    return Program(program, tuple(inputs))


def _traced(root: nn.Module, full: Example, shapes: Any) -> ExportedProgram:
    """Returns PyTorch's program, made by running the model's code or, where this fails, by reading its bytecode."""

    def run(strict: bool) -> ExportedProgram:
        with torch.no_grad(), quiet():
            return torch.export.export(root, full.args, full.kwargs, dynamic_shapes=shapes, strict=strict)

    try:
        return run(strict=False)
    except Exception as error:
        if not _depends_on_values(error):
            raise
        # Python's int() needs a number; read from its bytecode, int(lengths.max().item()) can be a symbol
        with contextlib.suppress(Exception), warnings.catch_warnings():
            # during a call, the adapter's attributes hold the arguments
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
            return run(strict=True)
        raise


def _limit_symbols_alone(program: ExportedProgram) -> None:
    """Takes the limits of sums and products off, which PyTorch has of sizes that it takes for 2 or more."""
    limits: dict[Any, Any] = program.range_constraints
    for size in [size for size in limits if not size.is_Symbol]:
        del limits[size]


def _size(size: Any) -> Any:
    """Returns a fixed size as a number, and a dynamic size as it is."""
    return int(size) if isinstance(size, torch.SymInt) and size.node.expr.is_Integer else size


def _spec(prepared: Prepared, example: Example, full: Example, dynamic: Dynamic) -> Any:
    """Returns the argument ``dynamic_shapes`` of PyTorch's exporter."""
    signature = inspect.signature(prepared.root.forward)
    arguments = signature.bind(*full.args, **full.kwargs).arguments
    more = full.kwargs.keys() - example.kwargs.keys()
    own = {name: value for name, value in arguments.items() if name not in more}
    if isinstance(dynamic, bool):
        spec = pytree.tree_map(_open if dynamic else _fixed, own)
        spec = caches.open_sizes(own, spec) if dynamic else spec
    elif isinstance(dynamic, Mapping):
        spec = {name: None for name, value in own.items() if not Example((value,), {}).tensors} | dict(dynamic)
    elif len(dynamic) == len(own):
        spec = dict(zip(own, dynamic, strict=True))
    else:
        raise ExportError(
            f"dynamic has {number_of(len(dynamic), 'entry', 'entries')} for the arguments "
            f"{', '.join(own)}; give one for each"
        )
    of_adapters = {
        name: pytree.tree_map(_stacked if "adapter_rows" in more else _fixed, full.kwargs[name]) for name in more
    }
    return spec | of_adapters


def _open(leaf: Any) -> Any:
    return dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, Tensor) else None


def _stacked(_: Any) -> Any:
    return {0: Dim.AUTO}


def _fixed(_: Any) -> None:
    return None


def _refusal(error: Exception, model: nn.Module) -> str:
    text = str(error).strip()
    if "in output, which is not a known type" in text:
        return (
            f"torch.export can't return what the model does: {text.split(', which')[0]}. Pass an example with which it "
            "returns tensors alone, such as use_cache=False; to generate with a cache, see `generation_inputs`"
        )
    refused = f"torch.export can't export the model: {in_short(error)}{_place(error, model)}"
    if _depends_on_values(error):
        return (
            f"{refused}. The model decides by values of tensors there, and a program has one way: let it compute both, "
            "as by torch.where, or call torch.cond"
        )
    return (
        f"{refused}. Its example_inputs must be of the kind that the model is called with; dynamic=False keeps all "
        "sizes as they are"
    )


def _depends_on_values(error: Exception) -> bool:
    return "data-dependent" in str(error)


def _place(error: Exception, model: nn.Module) -> str:
    """Returns the innermost module whose code was running, and the line of its code."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        module: Any = frame.f_locals.get("self")
        if id(module) in paths and frame.f_code.co_filename != inspect.getfile(nn.Module):
            line = linecache.getline(frame.f_code.co_filename, number).strip()
            name = f"{paths[id(module)] or 'the model'} ({stands_for(module).__name__})"
            found = f", at `{line}` of {name}" if line else f", in {name}"
    return found
