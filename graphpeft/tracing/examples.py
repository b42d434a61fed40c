"""Example values of a recording's nodes: each call runs on fake tensors, which have no data.

So shapes, dtypes and Python objects are known while a forward is traced. If code needs a number that depends on the
example's masks or ids, the calls run on these real tensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.node import map_arg

from graphpeft._torch import GROUPED_MM, DisableTorchFunction, DisableTorchFunctionSubclass, fake_tensor, pytree
from graphpeft.graph import guards
from graphpeft.graph.dependencies import above_with_writes, varies, writes
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.errors import TraceError
from graphpeft.graph.holders import has_own_modules
from graphpeft.graph.template import SIMPLE, VALUE
from graphpeft.tracing.gradients import Applied
from graphpeft.tracing.known_values import Call, KnownValues, call_of, facts
from graphpeft.tracing.random_numbers import random_python_states_kept
from graphpeft.tracing.session import Session
from graphpeft.tracing.snapshot import unchanged

_READS = frozenset(getattr(operator, name) for name in operator.__all__) | {
    getattr,
    len,
    int,
    float,
    tuple,
    guards.kind,
}
"""Functions that only call methods of their arguments."""

_NUMBERS = (*SIMPLE, torch.Size)
"""Types of values that hold no tensor."""

_PLAIN = (*_NUMBERS, fake_tensor.FakeTensor)
"""Types of values without a ``__torch_function__`` that changes calls."""


class Examples:
    """The example values of one tracer's nodes, stored in ``node.meta``.

    Attributes:
        is_running: Whether code now runs on example values, so that its calls aren't recorded.
        given: The example arguments by placeholder.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self._known = KnownValues()
        self.is_running = False
        self.given: dict[fx.Node, Any] = {}

    def begin(self) -> None:
        """Starts a recording: forgets the example arguments, and makes earlier results available."""
        self.given = {}
        self._known.begin()

    def give(self, placeholder: fx.Node, example: Any) -> None:
        """Stores the example argument of a placeholder."""
        placeholder.meta[VALUE] = faked(example, self.fake)
        self.given[placeholder] = example

    @contextlib.contextmanager
    def real_calls(self, makes_tensors: bool = True) -> Iterator[None]:
        """Runs code on example values, without recording its calls."""
        was, self.is_running = self.is_running, True
        try:
            set_aside = (
                self._session.recording.set_aside() if self._session.recording is not None else contextlib.nullcontext()
            )
            with set_aside, self._mode if makes_tensors else contextlib.nullcontext():
                yield
        finally:
            self.is_running = was

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a fake tensor: `tensor` without its data."""
        with DisableTorchFunction():
            if tensor.is_leaf:
                return self._mode.from_tensor(tensor)
            with fake_tensor.unset_fake_temporarily():
                leaf = tensor.detach().requires_grad_()
            # in-place writes into a computed tensor are allowed, but not into a leaf that requires grad
            with self.real_calls(), torch.enable_grad():
                return self._mode.from_tensor(leaf).clone()

    def evaluate(self, node: fx.Node) -> None:
        """Runs the call of `node` on the example values of its arguments, if all are known."""
        if any(VALUE not in argument.meta for argument in node.all_input_nodes):
            return
        call = self._call(node)
        for known in self._known.take(call) if call is not None else ():
            node.meta[VALUE] = known
            return
        args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta[VALUE])
        with self.real_calls(makes_tensors=_may_make_tensors(node)):
            try:
                written = args[0] if args and writes(node.target) else None
                before = facts(written)
                node.meta[VALUE] = self._run(node, args, kwargs)
                if facts(written) != before:
                    self._known.forget()
                elif call is not None:
                    self._known.note(call, node.meta[VALUE])
            except fake_tensor.UnsupportedFakeTensorException as error:
                raise TraceError(f"{guards.deciding_line()} can't run on example values: {error}") from error
            except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
                if node.op == "call_module":
                    node.meta[VALUE] = self._run_on_numbers(str(node.target), args, kwargs)
                else:
                    node.meta[VALUE] = self._from_whole_numbers(node)
            except Exception:
                # a module that stays a call, since tracing it failed, may fail on fake tensors, too
                if node.op != "call_module" or node.target not in self._session.kept:
                    raise
                node.meta[VALUE] = self._run_on_numbers(str(node.target), args, kwargs)

    def _call(self, node: fx.Node) -> Call | None:
        """Returns the call of `node` on its example values, if it calls a function or layer of PyTorch; else None."""
        if node.op != "call_module":
            return call_of(node, None) if node.op in ("call_function", "call_method") else None
        layer = self._session.modules[str(node.target)]
        return call_of(node, layer) if _is_simple_layer(layer) and node.target not in self._session.kept else None

    def _from_whole_numbers(self, node: fx.Node) -> Any:
        """Computes a value from the real example arguments, if it depends on integer and boolean arguments alone.

        Masks, ids and lengths differ little between calls, so a check of a decision on them holds in most calls. A
        decision on a layer's output would fail its check in most calls.
        """
        sources = above_with_writes(node)
        # `node` itself may draw random numbers by the values of a mask; no value can depend on numbers drawn before
        if any(_prevents_evaluation(source) for source in sources if source is not node or not draws(node.target)):
            raise TraceError(f"{guards.deciding_line()} depends on the values of a tensor")
        values: dict[fx.Node, Any] = {}

        def value_of(source: fx.Node) -> Any:
            if source in values:
                return values[source]
            return pytree.tree_map_only(torch.Tensor, _empty, source.meta[VALUE])

        with fake_tensor.unset_fake_temporarily():
            for source in (other for other in node.graph.nodes if other in sources):
                if source in self.given:
                    values[source] = pytree.tree_map_only(torch.Tensor, torch.clone, self.given[source])
                elif source.op == "get_attr":
                    values[source] = source.meta[VALUE]
                else:
                    args, kwargs = map_arg((source.args, source.kwargs), value_of)
                    values[source] = self._computed(source, args, kwargs)
        return faked(values[node], self.fake)

    def _computed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return (
                self._session.constants.values[target]
                if target in self._session.constants.values
                else _attribute_at(self._session.root, target)
            )
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        with random_python_states_kept() if draws(target) else contextlib.nullcontext():
            return target(*args, **kwargs)

    def _run_on_numbers(self, path: str, args: Any, kwargs: Any) -> Any:
        """Runs a copy of a submodule on tensors of ones, to learn the structure of its output.

        The output's shapes may differ from the example's; the graph checks decisions on them in each run.
        """
        unchanged_by_it = unchanged(self._session.modules[path])
        with fake_tensor.unset_fake_temporarily(), torch.random.fork_rng(devices=[]), unchanged_by_it:
            module = copy.deepcopy(self._session.modules[path])
            for inner, copied in zip(self._session.modules[path].modules(), module.modules(), strict=True):
                copied.training = self._session.mode_of(inner)
            ones = pytree.tree_map_only(torch.Tensor, lambda t: torch.ones(t.shape, dtype=t.dtype), (args, kwargs))
            value = module(*ones[0], **ones[1])
        return pytree.tree_map_only(torch.Tensor, self.fake, value)

    def _with_fakes(self, module: nn.Module) -> nn.Module:
        """Copies a module with fake tensors in place of its tensors, including tensors in lists and dictionaries."""
        tensors = {id(tensor): self.fake(tensor) for tensor in (*module.parameters(), *module.buffers())}
        with tensors_copied_by(self.fake):
            return copy.deepcopy(module, tensors)

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            value = self._computed(node, args, kwargs)
            return self.fake(value) if isinstance(value, torch.Tensor) else value
        if node.op == "call_module":
            module = self._session.modules[target]
            if isinstance(module, torch.jit.ScriptModule):
                assert self._session.recording is not None
                with self._session.recording.outside():
                    return self._run_on_numbers(target, args, kwargs)
            # on fresh fake tensors, so that writes into buffers are lost
            if target not in self._session.kept and _is_simple_layer(module):
                layer = _with_other_tensors(module, self.fake)
                with _without_torch_function(
                    node, (*layer._parameters.values(), *layer._buffers.values()), is_known=True
                ):
                    return layer(*args, **kwargs)
            # in a copy, since another thread may run the module
            with random_python_states_kept(), unchanged(module), _slow_path():
                return self._with_fakes(module)(*args, **kwargs)
        with _without_torch_function(node, (), not isinstance(target, Applied)):
            return FAKES[target](*args, **kwargs) if target in FAKES else self._computed(node, args, kwargs)


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """Disables PyTorch's fast path of attention, whose output is a fake tensor where the slow path's is None."""
    is_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_on)


def _attribute_at(root: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root)


def faked(example: Any, fake: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns a copy of an example with fake tensors, so that code can run on it without changing the example."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return fake(leaf)
        return leaf if isinstance(leaf, SIMPLE) else copy.deepcopy(leaf)

    # covers tensors inside objects, and results of computations, which deepcopy refuses
    with tensors_copied_by(fake):
        return pytree.tree_map(copied, example)


@contextlib.contextmanager
def tensors_copied_by(fake: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Makes ``copy.deepcopy`` in this thread replace tensors by `fake(tensor)`, also inside lists and objects."""
    thread, copy_tensor = threading.get_ident(), torch.Tensor.__deepcopy__

    def fake_here(tensor: torch.Tensor, memo: Any) -> torch.Tensor:
        return fake(tensor) if threading.get_ident() == thread else copy_tensor(tensor, memo)

    with mock.patch.object(torch.Tensor, "__deepcopy__", fake_here):
        yield


def _is_simple_layer(module: nn.Module) -> bool:
    """Returns whether `module` is a PyTorch layer without submodules or lists of tensors (RNNs hold such a list)."""
    is_own = type(module).__module__.startswith("torch.nn.modules.")
    return is_own and not has_own_modules(module) and not isinstance(module, nn.RNNBase)


def _with_other_tensors(layer: nn.Module, other: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Returns a copy of a simple layer with other tensors, which is faster than ``torch.func.functional_call``."""
    copied = object.__new__(type(layer))
    copied.__dict__.update(layer.__dict__, training=layer.training)
    for kind in ("_parameters", "_buffers"):
        tensors = layer.__dict__[kind].items()
        copied.__dict__[kind] = {name: tensor if tensor is None else other(tensor) for name, tensor in tensors}
    return copied


def _may_make_tensors(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return False
    values = (argument.meta[VALUE] for argument in node.all_input_nodes)
    return node.target not in _READS or not all(type(value) in _NUMBERS for value in values)


def _without_torch_function(
    node: fx.Node, tensors: Iterable[Any], is_known: bool
) -> contextlib.AbstractContextManager[Any]:
    """Returns a context for a node's call on example values, which skips ``__torch_function__`` where that is safe.

    Fake tensors don't change calls in ``__torch_function__``, so skipping the dispatch to it only saves time.
    """
    values = (*(argument.meta[VALUE] for argument in node.all_input_nodes), *tensors)
    is_plain = is_known and all(type(value) in _PLAIN for value in values)
    return DisableTorchFunctionSubclass() if is_plain else contextlib.nullcontext()


def _prevents_evaluation(node: fx.Node) -> bool:
    """Returns whether a node's value comes from a float argument, a module's tensor or output, or random numbers."""
    leaves = pytree.tree_leaves(node.meta.get(VALUE))
    if node.op == "get_attr":
        # a module's tensors may differ in each run, and writing into a constant would change it
        return any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if node.op == "placeholder":
        return any(isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()) for t in leaves)
    return varies(node)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    # the shapes of aten::_grouped_mm, whose fake kernel accepts only bfloat16
    if mat_a.ndim == 2 and mat_b.ndim == 2:
        assert offs is not None
        return mat_a.new_empty(offs.shape[0], mat_a.shape[0], mat_b.shape[1])
    return mat_a.new_empty(*mat_a.shape[:-1], mat_b.shape[-1])


FAKES: dict[Any, Callable[..., Any]] = dict.fromkeys(GROUPED_MM, _grouped_mm)
"""Fake implementations by function."""
