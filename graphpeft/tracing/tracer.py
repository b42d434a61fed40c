"""Records a forward once, as a graph whose nodes carry the values that the example inputs give them.

After each recorded call the same call runs on fake tensors, so that shapes, dtypes and Python objects are known and the
code's decisions on them can be followed, see `proxy` and `guards`. What can't be recorded truthfully (a decision on
tensor values, a write under ``no_grad`` into what may require grad, a forward that changes its module) keeps the module
that does it as one call of the graph, and `Session.kept` says why.
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

from graphpeft.code.identity_checks import compares_objects, is_identity_compared, may_be_compared
from graphpeft.code.namespaces import Attribute, Namespace
from graphpeft.graph import guards
from graphpeft.graph.calls import CALLS, Call
from graphpeft.graph.contexts import leave_autocast, leave_gradients
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.errors import OUT_OF_MEMORY, NeedsInputsError, TraceError
from graphpeft.graph.facts import above, writes
from graphpeft.graph.template import SIMPLE, VALUE
from graphpeft.tracing import no_grad
from graphpeft.tracing.arguments import Arguments, ExampleCall
from graphpeft.tracing.caches import forget_traced_values
from graphpeft.tracing.decisions import TAKES_OUT, Decisions, may_lack, needs_inputs_error
from graphpeft.tracing.examples import Examples
from graphpeft.tracing.node_arguments import plain_key, refuse_argument, refuse_object_with_traced_values, traced_fields
from graphpeft.tracing.proxy import ValueProxy
from graphpeft.tracing.random_numbers import no_random_python_numbers
from graphpeft.tracing.recorder import ErrorT
from graphpeft.tracing.session import RecordAgain, Session
from graphpeft.tracing.type_checks import refuse_type_checks

_GUARDS = (guards.expect, guards.expect_present)
"""Functions that check a decision."""

_EFFECTS = (operator.setitem, leave_autocast, leave_gradients)
"""Functions that are called for what they do; that they return None decides nothing."""


class ValueTracer(fx.Tracer):
    """Records the forward of one module, each time anew.

    Args:
        keeps_whole: Tells of a submodule whether its call stays one node of the graph.

    Attributes:
        session: What the trace has found out so far.
        examples: The values of its nodes in the example.
    """

    proxy_buffer_attributes = True

    def __init__(self, keeps_whole: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.session = Session(keeps_whole)
        self.examples = Examples(self.session)
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self._thread: int | None = None
        self._call: ExampleCall | None = None
        self.begin()

    def begin(self) -> None:
        """Forgets what belongs to a recording."""
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
        """Makes ready to record calls of the session's root in this thread, with `Tracer.trace`.

        Args:
            entry: What is called: the root's forward, or what runs its hooks as well.
            call: Example arguments, or None to trace without example values.
        """
        self._call, self._entry = call, entry
        # layers of torch.nn don't ask whether their input is there, and are called too often to ask for them
        self._may_be_absent = not type(self.session.root).__module__.startswith("torch.nn.modules")
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._forget_proxies()

    def _forget_proxies(self) -> None:
        """Forgets what stands for values, and lets caches forget it that others look into."""
        self._attributes, self._copies, self._objects, self._before_writes = {}, {}, {}, []
        # an error holds what the code had that raised it
        has_left_some = (
            self.session.has_hashed if sys.exc_info()[0] else any(proxy() is not None for proxy in self._proxies)
        )
        self._proxies, self.session.has_hashed = [], False
        if has_left_some:
            forget_traced_values()

    def note_assignment(self, module: nn.Module, name: str) -> None:
        """Notes which module's code assigns an attribute."""
        path = self._calls[-1].path if self._calls else ""
        self.session.assigners.setdefault(Attribute(Namespace.of_object(module), name), []).append(path)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes the arguments of the call that is recorded, see `arguments`."""
        positional, keywords = Arguments(self, self._call).make()

        def call() -> Any:
            result = self._entry(*positional, **keywords)
            self._refuse_to_go_on()
            return result

        return call, []

    def give(self, placeholder: fx.Proxy, example: Any) -> None:
        """Notes the example argument that a placeholder stands for."""
        self.examples.give(placeholder.node, example)
        self._objects.setdefault(id(placeholder.node.meta[VALUE]), placeholder)

    def present(self, proxy: fx.Proxy, decision: str) -> fx.Proxy:
        """Puts a check into the graph that a value which the example has isn't None in a run."""
        if self._may_be_absent:
            self.create_proxy("call_function", guards.expect_present, (proxy, decision), {})
        return proxy

    # what is recorded

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Returns the proxy that stands for `node`."""
        proxy = ValueProxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        """Records one call, with the calls of modules in which it is."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta[CALLS] = self._calls
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Records one call and runs it on the example values; a result of None or a string is a plain value."""
        if self._thread is None:
            raise TraceError("a value of an earlier trace is used: the model has kept it, outside of its modules")
        try:
            return self._recorded_call(kind, target, args, kwargs, *rest, **more)
        except Exception as error:
            self.failing(error)
            raise

    def failing(self, error: ErrorT) -> ErrorT:
        """Notes an error that the model's code may catch, and returns it.

        That a call fails, here and not in another run, is a decision that no check can hold.
        """
        self._failure, self._failing_line = error, guards.deciding_line()
        return error

    def _refuse_to_go_on(self) -> None:
        """Raises if the code that has just returned has caught an error of what it recorded."""
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
        if target in _GUARDS:
            proxy.node.meta[VALUE] = None  # what is checked is what the example has
            return proxy
        self._has_drawn |= draws(target)
        self._evaluate(proxy.node)
        if writes(target) and proxy.node.all_input_nodes:
            self._decisions.forget_about(proxy.node.all_input_nodes[0])
        value = proxy.node.meta.get(VALUE, proxy)
        if target not in _EFFECTS and (is_identity_compared(value) or _is_asked_about(value, kind, target)):
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
        """Returns what stands for the result of a call that is an earlier value, and no new one.

        What an operation in place returns is the very proxy that it has written into: so ``x.add_(1) is x``, and
        whoever has `x` sees what was written. Whether others, such as ``x.to(dtype)``, return what they were given
        depends on the run. So that is a decision, where the code may ask for it.
        """
        if _writes_itself(result.node):
            self._before_writes.append((earlier, earlier.node))
            earlier.node = result.node
            return earlier
        if not compares_objects(guards.deciding_frame().f_code):
            return result
        self.decide(self.create_proxy("call_function", operator.is_, (result, earlier), {}), True)
        return earlier

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Gives a proxy for a parameter or buffer that a forward reads."""
        if self.is_running or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.session.name_of(attr_val)
        if name is None:
            return attr_val
        # a parameter that several modules have is each one's own weight, which an adapter may change alone
        is_own = (
            self.session.looked_up is not None
            and self.session.looked_up[0] is attr_val
            and isinstance(attr_val, nn.Parameter)
        )
        path = self.session.looked_up[1] if self.session.looked_up is not None and is_own else name
        if path != name and compares_objects(guards.deciding_frame().f_code):
            path = name  # code that asks whether weights are tied gets one proxy for them
        return self.attribute(path)

    def attribute(self, name: str) -> Any:
        """Returns the proxy of the root's attribute at the path `name`, or its value if that is None or a string.

        Each is read once.
        """
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Records the call of a submodule: its own calls if it can be inlined, else one call of it."""
        # a module that the model doesn't have was made by the forward itself, such as a loss
        if self.is_running or self.submodule_paths is None or m not in self.submodule_paths:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.session.keeps_whole(m):
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
                # who has changed it, the module itself or another one before, shows if its code isn't run
                self.session.stateful[path] = str(error)
                raise self.failing(RecordAgain()) from error
            self._forget_after(before)
            self._failure = failure
            return self._kept(m, path, str(error), args, kwargs)

    def _changed_inside(self, m: nn.Module) -> list[Attribute]:
        """Returns what the recording has changed so far of all that a submodule's forward can reach."""
        assert self.session.recording is not None
        with self.examples.real_calls(makes_tensors=False):
            return self.session.recording.before.changed(m)

    def _kept(self, m: nn.Module, path: str, reason: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Records one call of a submodule, whose code has changed nothing."""
        for attribute in self._changed_inside(m):
            what = attribute.described(m)
            kind = type(m).__name__
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
        call = Call.of(path, self.session.called[path], m.forward, args, kwargs)
        self.session.called[path] += 1
        around, self._calls = self._calls, (*self._calls, call)
        try:
            result = call_m(*args, **kwargs)
            self._refuse_to_go_on()
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
        # what isn't a proxy, such as None, is read and checked once more
        read = {name: value for name, value in self._attributes.items() if isinstance(value, fx.Proxy)}
        self._attributes = {name: proxy for name, proxy in read.items() if proxy.node in alive}
        self._copies = {name: proxy for name, proxy in self._copies.items() if proxy.node in alive}

    def create_arg(self, a: Any) -> Any:
        """Turns an object seen as an argument into one that a node can hold."""
        if isinstance(a, fx.Proxy):
            return a.node if a.node.graph is self.graph else self._of_the_state(a.node)
        # most arguments are of these types, about which fx asks a dozen questions
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
            # one that holds nothing traced is an object of the user's, such as a config: keep its identity
            values = traced_fields(a)
            return self.create_proxy("call_function", type(a), (), values).node if values else self._constant(a)
        if type(a).__module__ == "numpy" and isinstance(a, int | float):
            return float(a) if isinstance(a, float) else int(a)  # generated code doesn't know numpy's names
        if isinstance(a, dict) and type(a) is dict:
            # a proxy that is a key has been hashed, and so decided on
            return super().create_arg({plain_key(key): value for key, value in a.items()})
        refuse_argument(a)
        if isinstance(a, dict):
            return self.create_proxy("call_function", type(a), (dict(a),), {}).node
        try:
            return super().create_arg(a)
        except NotImplementedError:
            refuse_object_with_traced_values(a)
            return self._constant(a)

    def _of_the_state(self, node: fx.Node) -> fx.Node:
        """Returns what stands for a value that an earlier recording has left on a module."""
        if self.session.left is None:
            raise TraceError("a value of an earlier trace is used: the model has kept it, outside of its modules")
        if node not in self.session.left:
            name = f"_left_{len(self.session.left)}"
            self.session.left[node] = self.create_node("get_attr", name, (), {})
            self.session.left[node].meta[VALUE] = node.meta.get(VALUE)
        return self.session.left[node]

    def proxy_of(self, tensor: torch.Tensor) -> fx.Proxy:
        """Returns the proxy that stands for a tensor of a module, or for one that a graph keeps as a constant."""
        return self.proxy(cast(fx.Node, self.create_arg(tensor)))

    def _constant(self, value: Any) -> fx.Node:
        with self.examples.real_calls(makes_tensors=False):
            name = self.session.constants.name_of(value, self.session.is_made_anew)
        if not self.session.is_made_anew(value):
            return self.attribute(name).node
        # a copy in each run, since the forward may have made the tensor, and may write into it
        if name not in self._copies:
            self._copies[name] = self.create_proxy("call_method", "clone", (self.attribute(name),), {})
        return self._copies[name].node

    # example values

    @property
    def is_running(self) -> bool:
        """Whether nothing is recorded just now: code runs on example values, or in another thread."""
        return self.examples.is_running or self._thread != threading.get_ident()

    @property
    def is_of_this_thread(self) -> bool:
        """Whether a trace goes on in this thread."""
        return self._thread == threading.get_ident()

    @property
    def is_recording(self) -> bool:
        """Whether a trace goes on in this thread, and what is called now is recorded."""
        return self._thread is not None and not self.is_running

    # decisions

    def decide(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> None:
        """Puts a check into the graph that `proxy`, which nothing else uses from now on, is `answer` in every run."""
        if not self.check(proxy, answer, decision) and not proxy.node.users:
            self.graph.erase_node(proxy.node)

    def check(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> bool:
        """Puts a check into the graph that `proxy` is `answer` in every run; tells whether there was none so far."""
        node = proxy.node
        if self._has_drawn and any(draws(source.target) for source in above(node)):
            message = f"{guards.deciding_line()} decides on numbers that Python's random or NumPy draws"
            raise self.failing(TraceError(message))
        # once in each call of a module, since an edit may give that call another value
        if not self._decisions.note(node, answer, self._calls[-1] if self._calls else None):
            return False
        self.create_proxy("call_function", guards.expect, (proxy, answer, decision or guards.deciding_line()), {})
        return True

    def undecided(self, error: Exception | None = None) -> NeedsInputsError:
        """Returns the error for a decision on a value that isn't known."""
        return self.failing(needs_inputs_error(self.session.root, error))


def _writes_itself(node: fx.Node) -> bool:
    return writes(node.target) or "out" in node.kwargs or node.kwargs.get("inplace") is True


def _is_asked_about(value: Any, kind: str, target: Any) -> bool:
    """Returns whether the code that takes a value out of something, or gets it from a method, may ask so for it."""
    is_taken = kind == "call_method" or target is operator.getitem
    return is_taken and may_be_compared(value, guards.deciding_frame().f_code)
