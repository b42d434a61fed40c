"""Records a forward once, as a graph whose nodes carry example values.

Each recorded call also runs on fake tensors, so that code can decide on shapes, dtypes and Python objects, see `proxy`
and `guards`. A module whose forward no graph can represent (a decision on tensor values, a write under ``no_grad`` into
a tensor that may require grad, a change of the module) stays one call of the graph; `Session.kept` holds the reason.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, cast

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.identity_checks import compares_objects, is_identity_compared
from graphpeft.code.namespaces import Attribute, Namespace
from graphpeft.graph import guards
from graphpeft.graph.calls import CALLS, Call
from graphpeft.graph.contexts import leave_autocast, leave_gradients
from graphpeft.graph.dependencies import above, writes
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.errors import OUT_OF_MEMORY, NeedsInputsError, TraceError
from graphpeft.graph.template import LINE, SIMPLE, VALUE
from graphpeft.tracing import no_grad
from graphpeft.tracing.arguments import Arguments, ExampleCall, with_identities
from graphpeft.tracing.caches import forget_traced_values
from graphpeft.tracing.decisions import (
    TAKES_OUT,
    Decisions,
    asks_for_gradient,
    is_about_own_tensor,
    may_be_identity_compared,
    may_lack,
    may_write,
    needs_inputs_error,
    writes_itself,
)
from graphpeft.tracing.examples import Examples
from graphpeft.tracing.node_arguments import plain_key, refuse_argument, refuse_object_with_traced_values, traced_fields
from graphpeft.tracing.proxy import ValueProxy
from graphpeft.tracing.random_numbers import no_random_python_numbers
from graphpeft.tracing.recorder import ErrorT
from graphpeft.tracing.session import RecordAgain, Session
from graphpeft.tracing.type_checks import refuse_type_checks

_EFFECTS = (operator.setitem, leave_autocast, leave_gradients)
"""Functions called for their side effects, whose result None needs no check."""


class ValueTracer(fx.Tracer):
    """Records the forward of one module, in one or several recordings.

    Attributes:
        session: The findings of the trace so far.
        examples: The example values of the nodes.
    """

    proxy_buffer_attributes = True

    def __init__(self, keeps_whole: Callable[[nn.Module], bool], one_more: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.session = Session(keeps_whole, one_more)
        self.examples = Examples(self.session)
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self._thread: int | None = None
        self._call: ExampleCall | None = None
        self.begin()

    def begin(self) -> None:
        """Starts a recording: resets the state of the last recording."""
        self._decisions = Decisions()
        self._calls: tuple[Call, ...] = ()
        self._attributes: dict[str, fx.Proxy] = {}
        self._copies: dict[str, fx.Proxy] = {}
        self._objects: dict[int, fx.Proxy] = {}
        self._before_writes: list[tuple[fx.Proxy, fx.Node]] = []
        self._failure: BaseException | None = None
        self._failing_line = ""
        self._has_drawn = False
        self.session.begin_recording()
        self.examples.begin()

    # the trace

    @contextlib.contextmanager
    def tracing(self, entry: Callable[..., Any], call: ExampleCall | None) -> Iterator[None]:
        """Makes this thread record calls of the session's root by ``Tracer.trace`` inside the context."""
        self._call, self._entry = call, entry
        # layers of torch.nn don't test their input for None, and a check in each of their many calls would be slow
        self._may_be_absent = not type(self.session.root).__module__.startswith("torch.nn.modules")
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._forget_proxies()

    def _forget_proxies(self) -> None:
        """Drops all proxies, and clears the caches that still hold some."""
        self._attributes, self._copies, self._objects, self._before_writes = {}, {}, {}, []
        # the traceback of an error keeps proxies alive, so live proxies show nothing then
        are_alive = any(proxy() is not None for proxy in self._proxies)
        has_left_some = self.session.has_hashed if sys.exc_info()[0] else are_alive
        self._proxies, self.session.has_hashed = [], False
        if has_left_some:
            forget_traced_values()

    def note_assignment(self, module: nn.Module, name: str) -> None:
        """Stores that the code of the current module assigns an attribute of `module`."""
        path = self._calls[-1].path if self._calls else ""
        self.session.assigners.setdefault(Attribute(Namespace.of_object(module), name), []).append(path)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes the arguments of the recorded call, see `arguments`."""
        positional, keywords = Arguments(self, self._call).make()

        def call() -> Any:
            result = self._entry(*positional, **keywords)
            self._raise_caught_error()
            return result

        return call, []

    def give(self, placeholder: fx.Proxy, example: Any) -> None:
        """Stores the example argument of a placeholder."""
        self.examples.give(placeholder.node, example)
        self._objects.setdefault(id(placeholder.node.meta[VALUE]), placeholder)

    def present(self, proxy: fx.Proxy, decision: str) -> fx.Proxy:
        """Adds a check that a value isn't None in a run, as in the example; returns `proxy`."""
        if self._may_be_absent:
            self.create_proxy("call_function", guards.expect_present, (proxy, decision), {})
        return proxy

    # recording

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Returns a proxy of `node`."""
        proxy = ValueProxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        """Makes a node, and stores in its metadata the module calls around it and the line of the model's code."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta[CALLS] = self._calls
        node.meta[LINE] = guards.calling_place()
        if self.session.one_more is not None:
            self.session.one_more()
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Records one call and runs it on example values; returns a proxy, or the value if that is None or a string."""
        if self._thread is None:
            raise TraceError("a value of an earlier trace is used: the model has kept it, outside of its modules")
        try:
            return self._recorded_call(kind, target, args, kwargs, *rest, **more)
        except Exception as error:
            self.failing(error)
            raise

    def failing(self, error: ErrorT) -> ErrorT:
        """Stores an error, since the model's code may catch it, and returns the error.

        If the code goes on after an error, it decides on this failure, which no check can represent.
        """
        self._failure, self._failing_line = error, guards.deciding_line()
        return error

    def _raise_caught_error(self) -> None:
        """Raises if the code that has just returned has caught an error of a recorded call."""
        if isinstance(self._failure, NeedsInputsError | RecordAgain):
            raise self._failure
        if self._failure is not None:
            message = f"its code goes on after an error of {self._failing_line}, which a graph can't hold"
            raise TraceError(f"{message}: {self._failure}")

    def _recorded_call(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled() and (writes(target) or kwargs.get("out") is not None):
            args, kwargs = no_grad.arguments_of_write(self, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind in ("placeholder", "output"):
            return proxy
        if target in guards.CHECKS:
            proxy.node.meta[VALUE] = None  # a check passes for the example, so it needn't run
            return proxy
        self._has_drawn |= draws(target)
        self._evaluate(proxy.node)
        if may_write(proxy.node):
            for given in proxy.node.all_input_nodes:
                self._decisions.forget_about(given)
        value = proxy.node.meta.get(VALUE, proxy)
        if target not in _EFFECTS and (is_identity_compared(value) or may_be_identity_compared(value, kind, target)):
            self.decide(proxy, value)
            return value
        if target in TAKES_OUT and may_lack(proxy.node, self.session.kept):
            self.present(proxy, f"what {guards.deciding_line()} takes out of an object")
        if not torch.is_grad_enabled():
            return no_grad.as_without_grad(proxy)
        same = self._objects.setdefault(id(value), proxy) if isinstance(value, torch.Tensor) else proxy
        return proxy if same is proxy else self._same_object(same, proxy)

    def _evaluate(self, node: fx.Node) -> None:
        """Runs a recorded call on the example values."""
        if torch.is_grad_enabled():
            self.examples.evaluate(node)
            return
        before = no_grad.versions(node)
        self.examples.evaluate(node)
        if before != no_grad.versions(node):
            raise no_grad.writes_error()

    def _same_object(self, earlier: fx.Proxy, result: fx.Proxy) -> fx.Proxy:
        """Returns the proxy of a call's result that is the same object as an earlier value.

        An in-place operation returns the proxy that it has written into: ``x.add_(1) is x``, and later uses of `x` see
        the write. Whether other functions, such as ``x.to(dtype)``, return their input itself depends on the run. So
        this is a decision, if the code compares objects.
        """
        if writes_itself(result.node):
            self._before_writes.append((earlier, earlier.node))
            earlier.node = result.node
            return earlier
        if not compares_objects(guards.deciding_frame().f_code):
            return result
        self.decide(self.create_proxy("call_function", operator.is_, (result, earlier), {}), True)
        return earlier

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Returns the proxy of a parameter or buffer that a forward reads; other attributes as they are."""
        if self.is_running or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.session.name_of(attr_val)
        if name is None:
            return attr_val
        # modules that share a parameter get a proxy each, since an adapter may change the weight of one module only
        is_own = (
            self.session.looked_up is not None
            and self.session.looked_up[0] is attr_val
            and isinstance(attr_val, nn.Parameter)
        )
        path = self.session.looked_up[1] if self.session.looked_up is not None and is_own else name
        if path != name and compares_objects(guards.deciding_frame().f_code):
            path = name  # code that compares tied weights by `is` needs the same proxy for both
        return self.attribute(path)

    def attribute(self, name: str) -> Any:
        """Returns the proxy of the root's attribute at the path `name`, or its value if this is None or a string.

        A graph reads each attribute once.
        """
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns False: a graph either has what a layer's adapters compute, or reads the layer's attributes."""
        return False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Records the call of a submodule: the calls of its forward if it can be inlined, else one ``call_module``."""
        # the forward itself has made a module that isn't in the model, such as a loss
        if self.is_running or self.submodule_paths is None or m not in self.submodule_paths:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.session.keeps_whole(m):
            if not path:
                raise self.failing(TraceError(f"a {type(m).__name__} calls itself, which a graph of it can't do"))
            return self.create_proxy("call_module", path, args, kwargs)
        if path in self.session.stateful:
            return self._kept(m, path, self.session.stateful[path], args, kwargs)
        before, failure = next(iter(reversed(self.graph.nodes))), self._failure
        try:
            with no_random_python_numbers() if self.session.watches_draws else contextlib.nullcontext():
                return self._inlined(m, forward, args, kwargs)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if self._call is None:
                raise
            if self._changed_inside(m):
                # this module or an earlier one has changed it; recording again without this module's code shows which
                self.session.stateful[path] = str(error)
                raise self.failing(RecordAgain()) from error
            self._forget_after(before)
            self._failure = failure
            return self._kept(m, path, str(error), args, kwargs)

    def _changed_inside(self, m: nn.Module) -> list[Attribute]:
        """Returns the state that a submodule's forward can reach and that the recording has changed so far."""
        assert self.session.recording is not None
        with self.examples.real_calls(makes_tensors=False):
            return self.session.recording.before.changed(m)

    def _kept(self, m: nn.Module, path: str, reason: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Records a submodule as one call, after checking that none of its state has changed."""
        for attribute in self._changed_inside(m):
            what, kind = attribute.described(m), type(m).__name__
            message = f"a forward changes {what} for a {kind} that stays a call, which a graph can't hold"
            raise self.failing(TraceError(message))
        self.session.kept[path] = reason
        result = self.create_proxy("call_module", path, args, kwargs)
        return self.present(result, f"what {path!r} returns") if isinstance(result, fx.Proxy) else result

    def _inlined(self, m: nn.Module, call_m: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        assert self.session.recording is not None
        refuse_type_checks(m)
        self.session.recording.refuse_iterators(m)
        path = self.path_of_module(m)
        args, kwargs = with_identities(self, m, args, kwargs)
        call = Call.of(path, self.session.called[path], m.forward, args, kwargs)
        self.session.called[path] += 1
        around, self._calls = self._calls, (*self._calls, call)
        try:
            result = call_m(*args, **kwargs)
            self._raise_caught_error()
        finally:
            self._calls = around
        call.returns(result)
        return result

    def _forget_after(self, node: fx.Node) -> None:
        while (last := next(iter(reversed(self.graph.nodes)))) is not node:
            self.graph.erase_node(last)
        alive = set(self.graph.nodes)
        while self._before_writes and self._before_writes[-1][0].node not in alive:
            written, before = self._before_writes.pop()
            written.node = before
        self._objects = {key: proxy for key, proxy in self._objects.items() if proxy.node in alive}
        self._decisions.keep_of(alive)
        # the check of a plain value, such as None, may be erased, so the value is read and checked again
        read = {name: value for name, value in self._attributes.items() if isinstance(value, fx.Proxy)}
        self._attributes = {name: proxy for name, proxy in read.items() if proxy.node in alive}
        self._copies = {name: proxy for name, proxy in self._copies.items() if proxy.node in alive}

    def create_arg(self, a: Any) -> Any:
        """Converts an argument of a recorded call to an object that a node can hold."""
        if isinstance(a, fx.Proxy):
            return a.node if a.node.graph is self.graph else self._state_node(a.node)
        # the fast path: most arguments are of these types, and fx makes many other type tests first
        if type(a) in SIMPLE:
            return a
        if type(a) in (tuple, list):
            return type(a)([self.create_arg(part) for part in a])
        if isinstance(a, torch.Tensor):
            name = self.session.name_of(a)
            return self.attribute(name).node if name is not None else self._constant(a)
        if isinstance(a, nn.Module):
            return self.attribute(self.path_of_module(a)).node
        if is_dataclass(a) and not isinstance(a, type):
            # a dataclass object without proxies is an object of the user, such as a config: keep its identity
            values = traced_fields(a)
            return self.create_proxy("call_function", type(a), (), values).node if values else self._constant(a)
        if type(a).__module__ == "numpy" and isinstance(a, int | float):
            return float(a) if isinstance(a, float) else int(a)  # generated code doesn't know numpy's names
        if isinstance(a, dict) and type(a) is dict:
            return super().create_arg({plain_key(key): value for key, value in a.items()})
        refuse_argument(a)
        if isinstance(a, dict):
            return self.create_proxy("call_function", type(a), (dict(a),), {}).node
        try:
            return super().create_arg(a)
        except NotImplementedError:
            refuse_object_with_traced_values(a)
            return self._constant(a)

    def _state_node(self, node: fx.Node) -> fx.Node:
        """Returns the node that reads a value of the first recording, which the forward has stored as state."""
        if self.session.left is None:
            raise TraceError("a value of an earlier trace is used: the model has kept it, outside of its modules")
        if node not in self.session.left:
            name = f"_left_{len(self.session.left)}"
            self.session.left[node] = self.create_node("get_attr", name, (), {})
            self.session.left[node].meta[VALUE] = node.meta.get(VALUE)
        return self.session.left[node]

    def proxy_of(self, tensor: torch.Tensor) -> fx.Proxy:
        """Returns the proxy of a module's tensor, or of another tensor, which becomes a constant of the graph."""
        return self.proxy(cast(fx.Node, self.create_arg(tensor)))

    def _constant(self, value: Any) -> fx.Node:
        with self.examples.real_calls(makes_tensors=False):
            name = self.session.constants.name_of(value, self.session.is_made_anew)
        if not self.session.is_made_anew(value):
            return self.attribute(name).node
        # a copy in each run, since the forward has made the tensor, and may write into it
        if name not in self._copies:
            self._copies[name] = self.create_proxy("call_method", "clone", (self.attribute(name),), {})
        return self._copies[name].node

    @property
    def is_running(self) -> bool:
        """Whether calls aren't recorded now: code runs on example values, or in another thread."""
        return self.examples.is_running or self._thread != threading.get_ident()

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread is tracing."""
        return self._thread == threading.get_ident()

    @property
    def is_recording(self) -> bool:
        """Whether this thread is tracing and records its calls now."""
        return self._thread is not None and not self.is_running

    def decide(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> None:
        """Adds a check that `proxy` is `answer` in every run. The caller must not use `proxy` afterwards."""
        if not self.check(proxy, answer, decision) and not proxy.node.users:
            self.graph.erase_node(proxy.node)

    def check(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> bool:
        """Adds a check that `proxy` is `answer` in every run; returns whether the check is new."""
        node = proxy.node
        self.session.specialised = self.session.specialised or is_about_own_tensor(node)
        if self._has_drawn and any(draws(source.target) for source in above(node)):
            raise self.failing(TraceError(f"{guards.deciding_line()} decides on numbers that Python or NumPy draws"))
        if self._calls and asks_for_gradient(node):
            # as a call, the module answers in each run; the graph would refuse runs with gradients, or those without
            raise self.failing(TraceError(f"{guards.deciding_line()} asks whether a value requires a gradient"))
        # one check in each module call, since an edit of the graph may change the value in one call only
        if not self._decisions.note(node, answer, self._calls[-1] if self._calls else None):
            return False
        self.create_proxy("call_function", guards.expect, (proxy, answer, decision or guards.deciding_line()), {})
        return True

    def undecided(self, error: Exception | None = None) -> NeedsInputsError:
        """Returns the error for a decision on an unknown value."""
        return self.failing(needs_inputs_error(self.session.root, error))
