"""Finds where a pattern is met in a graph, and says of the places where it almost is what stopped it.

PyTorch's ``SubgraphMatcher`` compares targets and positions of arguments, and says only whether all agree. Here the
operands of a commuting function change places, one node has several forms, an argument may be a constant, and a miss
has a reason. For these, matching is unification with backtracking: a state says what each node of the pattern is, and
each step yields all states that extend it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft.graph.dependencies import is_random, reads_metadata_only, separates
from graphpeft.graph.ops.linear import transpose_of
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import VALUE
from graphpeft.rewrites.pattern import Alternative, layer
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.spellings import COMMUTES
from graphpeft.rewrites.values import MISSING, Form, is_constant, is_tensor, same, shown, spread, value_of


@dataclass(frozen=True)
class State:
    """The values of a pattern's nodes in a graph, so far.

    Attributes:
        known: The value of each node of the pattern.
        nodes: The nodes of the graph that the pattern's operations are.
        assumes: The attributes, by path, whose present values have decided, with these values.
        layers: The nodes that call the pattern's layers.
    """

    known: Mapping[fx.Node, Any] = field(default_factory=dict)
    nodes: frozenset[fx.Node] = frozenset()
    assumes: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[layer, fx.Node] = field(default_factory=dict)

    def knowing(self, pattern: fx.Node, value: Any) -> State:
        """Returns this state with the value of a node of the pattern."""
        return State({**self.known, pattern: value}, self.nodes, self.assumes, self.layers)

    def through(self, form: Form, value: Any) -> State:
        """Returns this state with an operation as one of the pattern's."""
        nodes = self.nodes | {*form.inside, *([value] if isinstance(value, fx.Node) else [])}
        return State(self.known, nodes, {**self.assumes, **form.assumes}, self.layers)


class Occurrence(NamedTuple):
    """A place where a pattern is met.

    Attributes:
        result: The node of the value that is replaced.
        alternative: The way in which it is met.
        number: The place of this way among all ways.
        state: The values of the pattern's nodes there.
    """

    result: fx.Node
    alternative: Alternative
    number: int
    state: State

    @property
    def values(self) -> dict[str, Any]:
        """The values of the pattern's arguments, by name."""
        return {name: self.state.known[node] for name, node in self.alternative.open.items()}

    @property
    def key(self) -> tuple[Any, ...]:
        """The key that tells occurrences in a graph apart."""
        names = tuple(sorted(node.name for node in self.state.nodes))
        values = tuple((name, shown(value)) for name, value in self.values.items())
        return self.number, self.result.name, names, values, tuple(sorted(self.state.assumes.items()))

    def assuming(self, assumed: Mapping[str, Any]) -> Occurrence:
        """Returns this occurrence, which depends on further attributes, by path."""
        assumes = {**self.state.assumes, **assumed}
        return self._replace(state=State(self.state.known, self.state.nodes, assumes, self.state.layers))


_MOST_STATES = 100
"""The most ways of meeting a pattern at one node that are tried; operands that commute double them."""

Judge = Callable[[Occurrence], tuple[str | None, Mapping[str, Any]]]
"""Returns why an occurrence doesn't count, or None, and the attributes, by path, whose values have decided on that."""


class Stop(NamedTuple):
    """Why a pattern isn't met at a node.

    Attributes:
        matched: The number of the pattern's operations that are met.
        node: The node that stopped it.
        reason: The reason.
    """

    matched: int
    node: fx.Node
    reason: str


class Matcher:
    """Tries one alternative of a pattern at nodes of a graph."""

    def __init__(self, alternative: Alternative, reader: Reader) -> None:
        self._alternative, self._reader = alternative, reader
        self.stop: Stop | None = None

    def states(self, node: fx.Node, pattern: fx.Node | None = None) -> Iterator[State]:
        """Yields all ways in which `node` is one of the pattern, or its result; `stop` then says what came nearest."""
        self.stop = None
        yield from self._value(pattern or self._alternative.result, node, State(), node)

    def _missed(self, state: State, node: fx.Node, reason: str) -> None:
        matched = sum(each.op != "placeholder" for each in state.known)
        if self.stop is None or matched > self.stop.matched:
            self.stop = Stop(matched, node, reason)

    def _value(self, pattern: fx.Node, value: Any, state: State, user: fx.Node) -> Iterator[State]:
        """Yields the states in which `value`, which the node `user` uses, is that of a node of the pattern."""
        if pattern in state.known:
            if same(state.known[pattern], value):
                yield state
            else:
                name = pattern.name
                self._missed(
                    state, user, f"uses {shown(value)}, where {name} of the pattern is {shown(state.known[pattern])}"
                )
        elif pattern.op == "placeholder":
            if pattern.name in self._alternative.constants and is_tensor(value, self._reader.read):
                reason = f"uses {shown(value)}, which is a tensor or may be one, where {pattern.name} is none"
                self._missed(state, user, reason)
            else:
                yield state.knowing(pattern, value)
        elif isinstance(pattern.target, layer):
            yield from self._layer(pattern, pattern.target, value, state, user)
        else:
            yield from self._operation(pattern, value, state, user)

    def _operation(self, pattern: fx.Node, value: Any, state: State, user: fx.Node) -> Iterator[State]:
        wanted, forms = self._alternative.form(pattern), self._reader.forms(value)
        at = value if isinstance(value, fx.Node) else user
        fitting = [form for form in forms if form.function == wanted.function]
        if not fitting and wanted.function == "pow":
            fitting = [square for form in forms if (square := _as_square(form)) is not None]
        if not fitting:
            spelled = forms[0].name if forms else "a value that it is given" if value is at else shown(value)
            reason = self._reader.reasons.get(at, f"is {spelled}, where the pattern has {wanted.name}")
            self._missed(state, at, reason)
        if fitting and is_random(wanted.name) and any(value is known for known in state.known.values()):
            self._missed(state, at, f"draws once, where the pattern draws twice by {wanted.name}")
            return
        for form in fitting:
            through = state.knowing(pattern, value).through(form, value)
            for names in _orders(wanted, form, self._reader):
                yield from self._arguments(wanted, form, names, through, at)

    def _arguments(
        self, wanted: Form, form: Form, names: list[tuple[Any, Any]], state: State, at: fx.Node
    ) -> Iterator[State]:
        """Yields the states in which the arguments agree, each of the pattern's with one of the graph's."""
        if not names:
            yield state
            return
        (name, other), *rest = names
        # an argument that one of them doesn't have is the other's default
        sought, value = _given(name, wanted, other, form), _given(other, form, name, wanted)
        for following in self._argument(name, sought, value, state, at, wanted.lengths.get(name)):
            yield from self._arguments(wanted, form, rest, following, at)

    def _argument(
        self, name: Any, wanted: Any, value: Any, state: State, at: fx.Node, length: int | None = None
    ) -> Iterator[State]:
        wanted = value_of(wanted)
        if isinstance(wanted, fx.Node):
            if value is MISSING:
                self._missed(state, at, f"has no {name}")
            # a sum of any two values is no linear layer with a bias, though that is spelled out as one
            elif wanted.op != "placeholder" or not isinstance(value, Form) or name == "weight":
                yield from self._value(wanted, value, state, at)
        elif isinstance(wanted, tuple) and not is_constant(wanted):
            if isinstance(value, tuple) and len(value) == len(wanted):
                pairs = list(zip(wanted, value, strict=True))
                yield from self._parts(name, pairs, state, at)
            else:
                self._missed(state, at, f"has {shown(value)} as {name}, where the pattern has {len(wanted)} values")
        else:
            yield from self._constant(name, wanted, value, state, at, length)

    def _parts(self, name: Any, pairs: list[tuple[Any, Any]], state: State, at: fx.Node) -> Iterator[State]:
        if not pairs:
            yield state
            return
        for following in self._argument(name, *pairs[0], state, at):
            yield from self._parts(name, pairs[1:], following, at)

    def _constant(
        self, name: Any, wanted: Any, value: Any, state: State, at: fx.Node, length: int | None
    ) -> Iterator[State]:
        present = self._reader.constant(value)
        each, present_each = spread(wanted, length), spread(present, length)
        if same(each, present_each) and not _promotes(each, present_each, at):
            path = self._reader.path(value) if present is not value else None
            read = {path: present} if path is not None else {}
            yield State(state.known, state.nodes, {**state.assumes, **read}, state.layers)
        else:
            operand = f"argument {name}" if isinstance(name, int) else name
            self._missed(state, at, f"has {shown(present)} as {operand}, where the pattern has {shown(wanted)}")

    def _layer(self, pattern: fx.Node, wanted: layer, value: Any, state: State, user: fx.Node) -> Iterator[State]:
        at = value if isinstance(value, fx.Node) else user
        if not isinstance(value, fx.Node) or value.op != "call_module":
            self._missed(state, at, f"is no call of a module, where the pattern has {wanted.__name__}")
            return
        assert self._reader.root is not None
        module = self._reader.root.get_submodule(str(value.target))
        if not isinstance(module, wanted.classes):
            self._missed(state, at, f"calls a {type(module).__name__}, where the pattern has {wanted.__name__}")
            return
        known = state.layers.get(wanted)
        if known is not None and known.target != value.target:
            self._missed(state, at, f"calls {value.target}, where the pattern calls {known.target}")
            return
        called = _call(wanted, value)
        through = state.knowing(pattern, value).through(called, value)
        through = State(through.known, through.nodes, through.assumes, {**state.layers, wanted: value})
        form = _call(wanted, pattern)
        yield from self._arguments(form, called, [(name, name) for name in _names(form, called)], through, at)


def _promotes(one: Any, other: Any, node: fx.Node) -> bool:
    """Returns whether two equal numbers give a node other dtypes, as 2 and 2.0 do with tensors of whole numbers."""
    examples = [each.meta.get(VALUE) for each in node.all_input_nodes]
    are_whole = [each for each in examples if isinstance(each, torch.Tensor) and not each.is_floating_point()]
    return type(one) is not type(other) and bool(are_whole)


def _given(name: Any, form: Form, other_name: Any, other: Form) -> Any:
    value = form.given(name)
    return other.defaults.get(other_name, MISSING) if value is MISSING else value


def _call(wanted: layer, node: fx.Node) -> Form:
    arguments: dict[Any, Any] = dict(enumerate(value_of(node.args)))
    return Form(wanted, arguments | {name: value_of(value) for name, value in node.kwargs.items()}, {}, {})


def _names(wanted: Form, form: Form) -> list[Any]:
    return list(dict.fromkeys((*wanted.arguments, *form.arguments)))


def _orders(wanted: Form, form: Form, reader: Reader) -> Iterator[list[tuple[Any, Any]]]:
    """Yields which argument of the pattern is which of the graph's: as they are; with the operands exchanged."""
    names = _names(wanted, form)
    yield [(name, name) for name in names]
    operands = [name for name in names if name not in ("alpha", "out")]
    values = [each.given(name) for each in (wanted, form) for name in operands]
    has_order = wanted.given("alpha") not in (1, MISSING) or any(reader.is_sequence(value) for value in values)
    if wanted.function in COMMUTES and len(operands) == 2 and not has_order:
        exchanged = {operands[0]: operands[1], operands[1]: operands[0]}
        yield [(name, exchanged.get(name, name)) for name in names]


def _as_square(form: Form) -> Form | None:
    """Returns ``x * x`` as a power."""
    x, other = form.arguments.get("input"), form.arguments.get("other")
    if form.function != "mul" or not same(x, other):
        return None
    return Form("pow", {"input": x, "exponent": 2}, {}, form.assumes, form.inside)


def occurrences(
    alternatives: tuple[Alternative, ...], reader: Reader, judge: Judge
) -> tuple[list[Occurrence], list[tuple[fx.Node, int, Stop]]]:
    """Returns where a pattern is met, in the order of the graph, and where it almost is.

    Of places that share an operation, the last counts: what it computes may include what the others do.
    """
    found: list[Occurrence] = []
    misses: list[tuple[fx.Node, int, Stop]] = []
    taken: dict[fx.Node, fx.Node] = {}
    for node in reversed(reader.graph.nodes):
        if node.op == "placeholder" or TAG in node.meta:
            continue
        occurrence, stop, size = _at(node, alternatives, reader, judge, taken)
        if occurrence is not None:
            found.append(occurrence)
            taken.update((each, node) for each in occurrence.state.nodes)
        elif stop is not None:
            misses.append((node, size, stop))
    return found[::-1], [*_unfinished(alternatives, reader), *misses[::-1]]


def _unfinished(alternatives: tuple[Alternative, ...], reader: Reader) -> Iterator[tuple[fx.Node, int, Stop]]:
    """Yields where all of a pattern is met but its last operation."""
    for node, alternative in itertools.product(reader.graph.nodes, alternatives):
        matcher = Matcher(alternative, reader)
        for operand in alternative.result.all_input_nodes:
            state = next(matcher.states(node, operand), None) if operand.op != "placeholder" else None
            if state is None:
                continue
            matched = sum(each.op != "placeholder" for each in state.known)
            for user in [user for user in node.users if user.op != "output"]:
                if next(matcher.states(user), None) is None and matcher.stop is not None and not matcher.stop.matched:
                    yield user, alternative.size, matcher.stop._replace(matched=matched)


def _at(
    node: fx.Node, alternatives: tuple[Alternative, ...], reader: Reader, judge: Judge, taken: Mapping[fx.Node, fx.Node]
) -> tuple[Occurrence | None, Stop | None, int]:
    nearest: Stop | None = None
    size = 0
    for number, alternative in enumerate(alternatives):
        matcher, refused = Matcher(alternative, reader), None
        for state in itertools.islice(matcher.states(node), _MOST_STATES):
            occurrence = Occurrence(node, alternative, number, state)
            conflict = _conflict(occurrence, reader, taken)
            if conflict is None:
                reason, assumed = judge(occurrence)
                if reason is None:
                    return occurrence.assuming(assumed), None, 0
                conflict = Stop(alternative.size, node, reason)
            refused = refused or conflict
        stop = refused or matcher.stop
        if stop is not None and stop.matched and (nearest is None or stop.matched > nearest.matched):
            nearest, size = stop, alternative.size
    return None, nearest, size


def _conflict(occurrence: Occurrence, reader: Reader, taken: Mapping[fx.Node, fx.Node]) -> Stop | None:
    """Returns why the operations of an occurrence can't be replaced by others, if they can't."""
    nodes, result, size = occurrence.state.nodes, occurrence.result, occurrence.alternative.size
    for node in reader.graph.nodes:
        if node not in nodes:
            continue
        if node in taken:
            return Stop(size, node, f"is part of the match at {taken[node].name}")
        if TAG in node.meta:
            return Stop(size, node, "belongs to an adapter; rewrite the model before you adapt it")
        others = [user.name for user in node.users if user not in nodes]
        if node is not result and others and not _can_stay(node, nodes):
            return Stop(size, node, f"is used by {', '.join(others)}, too")
    for node in _between(reader.graph, nodes, result):
        if separates(node, reader.root or nn.Module()):
            return Stop(size, node, "may write to tensors, or changes autocast or gradients, amid the operations")
    return None


def _can_stay(node: fx.Node, nodes: frozenset[fx.Node]) -> bool:
    """Returns whether a node may stay for its other users, since it computes next to nothing.

    Such a node reads the dtype or the shape of a value, or transposes what the module holds, as ``self.weight.T`` does.
    """
    if reads_metadata_only(node):
        return nodes.isdisjoint(node.all_input_nodes)
    return transpose_of(node) is not None and all(each.op == "get_attr" for each in node.all_input_nodes)


def _between(graph: fx.Graph, nodes: frozenset[fx.Node], result: fx.Node) -> Iterator[fx.Node]:
    """Yields the other nodes from the first of `nodes` on up to `result`."""
    is_inside = False
    for node in graph.nodes:
        if node is result:
            return
        is_inside = is_inside or node in nodes
        if is_inside and node not in nodes:
            yield node
