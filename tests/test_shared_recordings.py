"""Blocks with layers inside share a recording if all that the recording depends on is equal, and else have their own.

Each pair below is of one class. A fact that `tracing/lift.py` forgets gives the second block the graph of the first.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import counting
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model
from graphpeft.tracing.globals_read import Weak, globals_read

FLAGS: dict[str, Any] = {}
SIGN, TURN = 1.0, 1.0


class Inner(nn.Module):
    """A layer whose code reads a global."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if SIGN > 0 else -self.linear(x)

    def signed(self, x: Tensor) -> Tensor:
        return TURN * x

    @property
    def sign(self) -> float:
        return TURN


class Indexed(Inner):
    """A layer that says what indexing it gives."""

    def __getitem__(self, x: Tensor) -> Tensor:
        return TURN * x


class Plain(nn.Module):
    """A layer of somebody's own that says nothing of how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Block(nn.Module):
    """A block that decides on lists, dictionaries, absent attributes, classes and tensors of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.one, self.two, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), Plain()
        self.more = nn.ModuleList([nn.Linear(4, 4)])
        self.names, self.options = ["one"], {"times": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.w)
        for name in self.names:
            x = x + torch.relu(getattr(self, name)(x))
        for layer in self.more:
            x = torch.tanh(layer(x)) if isinstance(layer, nn.Linear) else x + layer(x)
        if self.options["times"] > 1:
            x = 2 * x
        if hasattr(self, "extra"):
            x = x + 1
        if self.inner.scale > 1:
            x = 3 * x
        return F.linear(self.inner(x), self.two.weight, self.two.bias)


def changed(change: Callable[[Any], object]) -> Callable[[], Block]:
    def make() -> Block:
        block = Block()
        change(block)
        return block

    return make


class Twin(nn.Module):
    """Another class with the tensors of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def shares_a_weight(block: Any) -> None:
    block.two.weight = block.w


def sets_a_forward(block: Any) -> None:
    block.inner.forward = lambda x: x + 5


OTHERS: dict[str, Callable[[], Block]] = {
    "another list of names": changed(lambda block: block.names.append("two")),
    "another dictionary": changed(lambda block: block.options.update(times=2)),
    "a dictionary that holds itself": changed(lambda block: block.options.update(times=2, own=block.options)),
    "pairs in place of a dictionary": changed(lambda block: setattr(block, "extra", [("times", 1)])),
    "an attribute that is None": changed(lambda block: setattr(block, "extra", None)),
    "a module that is None": changed(lambda block: block.register_module("extra", None)),
    "another number in a layer": changed(lambda block: setattr(block.inner, "scale", 2.0)),
    "one more layer": changed(lambda block: block.more.append(nn.Linear(4, 4))),
    "a layer of another class": changed(lambda block: block.more.__setitem__(0, Twin())),
    "a layer without a bias": changed(lambda block: setattr(block.two, "bias", None)),
    "tied weights": changed(shares_a_weight),
    "a forward of its own in a layer": changed(sets_a_forward),
}


def assert_recorded_as_alone(*makers: Callable[[], Block]) -> None:
    """Asserts that adapted blocks compute the same if each has a class of its own, which shares no recording."""
    outputs = []
    # nothing has recorded these classes
    together = [type("Together", (Block,), {})] * len(makers)
    alone = [type("Alone", (Block,), {}) for _ in makers]
    for classes in (together, alone):
        torch.manual_seed(1)
        model: Any = nn.Sequential(*(make() for make in makers))
        for block, cls in zip(model, classes, strict=True):
            block.__class__ = cls
        x = torch.randn(3, 4)
        before = model(x)
        get_peft_model(model, LoraConfig(r=2, target_modules=["w"], init_lora_weights=False))
        outputs.append(model(x))
        assert not torch.allclose(outputs[-1], before)
    assert torch.equal(*outputs)


@pytest.mark.every
@pytest.mark.parametrize("other", OTHERS)
def test_a_block_that_differs_isnt_given_the_graph_of_another(other: str) -> None:
    assert_recorded_as_alone(Block, OTHERS[other])
    assert_recorded_as_alone(OTHERS[other], Block)


class Factor(str):
    """A text with an attribute."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 3


class Reader(nn.Module):
    """A block that hands itself and its input to a function."""

    doubles = False

    def __init__(self) -> None:
        super().__init__()
        self.w, self.zero, self.text = nn.Parameter(torch.randn(4, 4)), 0.0, ""
        self.first = nn.Linear(4, 4)
        self.inner, self.pair = Inner(), nn.ModuleList([nn.Linear(4, 4), self.first])
        self.again = self.first
        self.register_buffer("table", torch.zeros(2, 4))


Read = Callable[[Any, Tensor], Tensor]


def readers(read: Read) -> tuple[nn.Module, nn.Module]:
    """Returns two blocks of a class that nothing has recorded."""
    cls = type("Reader", (Reader,), {"forward": lambda self, x: read(self, F.linear(x, self.w))})
    return cls(), cls()


def assert_adapted_as_it_is(block: nn.Module, x: Tensor, target: str = "w") -> None:
    """Asserts that a fresh adapter changes nothing, by a graph that may be another block's."""
    expected = block(x)
    adapted: Any = get_peft_model(nn.Sequential(block), LoraConfig(r=2, target_modules=[target]))
    torch.testing.assert_close(adapted(x), expected)


READS: dict[str, tuple[Read, Callable[[Any], object]]] = {
    "the hooks of a layer": (
        lambda block, x: 2 * x if block.pair[0]._forward_hooks else x,
        lambda block: block.pair[0].register_forward_hook(lambda *_: None),
    ),
    "how many tensors are inside": (
        lambda block, x: len(list(block.pair.parameters())) * x,
        lambda block: setattr(block.pair[1], "weight", block.pair[0].weight),
    ),
    "which layer another name stands for": (
        lambda block, x: block.again(x),
        lambda block: setattr(block, "again", block.pair[0]),
    ),
    "a name in the list of all": (
        lambda block, x: 2 * x if "more" in dir(block) else x,
        lambda block: setattr(block, "more", 1),
    ),
    "what a text has": (
        lambda block, x: getattr(block.text, "factor", 1) * x,
        lambda block: setattr(block, "text", Factor()),
    ),
    "the mode of a layer": (lambda block, x: 2 * x if block.inner.training else x, lambda block: block.inner.eval()),
    "how many rows a tensor has": (
        lambda block, x: len(block.table) * x,
        lambda block: setattr(block, "table", torch.zeros(3, 4)),
    ),
    "whether a tensor has numbers": (
        lambda block, x: 2 * x if block.table.is_floating_point() else x,
        lambda block: setattr(block, "table", torch.zeros(2, 4, dtype=torch.int64)),
    ),
    "the class of a tensor": (
        lambda block, x: 2 * x if isinstance(block.table, torch.nn.Buffer) else x,
        lambda block: setattr(block, "table", nn.Buffer(torch.zeros(2, 4))),
    ),
    "the sign of zero": (
        lambda block, x: 2 * x if str(block.zero).startswith("-") else x,
        lambda block: setattr(block, "zero", -0.0),
    ),
}
"""What code reads, and what the other block has there."""


@pytest.mark.every
@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize("is_changed_first", [False, True])
def test_a_block_in_which_code_would_read_another_value_has_its_own_graph(what: str, is_changed_first: bool) -> None:
    read, change = READS[what]
    blocks, x = readers(read), torch.randn(3, 4)
    change(blocks[not is_changed_first])
    for block in blocks:
        assert_adapted_as_it_is(block, x)


class Switch:
    """An object whose attribute code reads."""

    on = False

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * x if self.on else x


def turned(x: Tensor) -> Tensor:
    return x


DEFAULTS = {"factor": 1}


def by_default(x: Tensor, options: dict[str, int] = DEFAULTS) -> Tensor:
    return options["factor"] * x


class Keeping:
    """A class by whose name code calls a function."""

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        return x


class Turning:
    """Another one."""

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        return -x


class Multiplying:
    """A class with a method that reads a global."""

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        return TURN * x


def made_reading() -> Any:
    activation, space, kind = torch.tanh, SPACE, Keeping
    return lambda _, x: activation(x), lambda _, x: 2 * x if space.on else x, lambda _, x: kind.turned(x)


def doubling_by_the_process(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(function)
    def doubling(x: Tensor) -> Tensor:
        return 2 * function(x) if os.environ.get("DOUBLES") else function(x)

    return doubling


@doubling_by_the_process
def decorated(x: Tensor) -> Tensor:
    return x


def by_another_name(_: nn.Module, x: Tensor, default: Any = None) -> Tensor:
    space = SPACE if default is None else default
    return 2 * x if space.on else x


def importing(_: nn.Module, x: Tensor) -> Tensor:
    from test_shared_recordings import TURN

    return TURN * x


BUILT_IN, LAYER, PARTIAL = torch.tanh, nn.Hardshrink(), functools.partial(torch.mul, 2.0)
PART, KIND = slice(0, 2), Keeping
SWITCH, SPACE, SETS, LIST, NOTHING = Switch(), types.SimpleNamespace(on=False), {0}, [0], None
NESTED, (INSIDE, AROUND_SPACE, AROUND_CLASS) = types.SimpleNamespace(space=SPACE), made_reading()
WITH_SPACE = types.FunctionType(by_another_name.__code__, globals(), argdefs=(SPACE,))
METHOD, WITH_OBJECT = SWITCH.doubled, functools.partial(Switch.doubled, SWITCH)
COUNTER: Counter[str] = Counter()
VIEW, GET, EVENT, REFERENCE = types.MappingProxyType(FLAGS), FLAGS.get, threading.Event(), weakref.ref(SWITCH)
INNER: Any = types.ModuleType("a_package.inner")
INNER.on = False
PACKAGE: Any = types.ModuleType("a_package")
PACKAGE.inner = INNER
GLOBALS: dict[str, tuple[Read, Callable[[pytest.MonkeyPatch], object]]] = {
    "by the forward of a layer": (
        lambda block, x: block.inner.forward(x),
        lambda patch: patch.setitem(globals(), "SIGN", -1.0),
    ),
    "by a method of a layer": (
        lambda block, x: block.inner.signed(x),
        lambda patch: patch.setitem(globals(), "TURN", -1.0),
    ),
    "by a property of a layer": (
        lambda block, x: block.inner.sign * x,
        lambda patch: patch.setitem(globals(), "TURN", -1.0),
    ),
    "in a dictionary": (lambda _, x: 2 * x if FLAGS else x, lambda patch: patch.setitem(FLAGS, "on", True)),
    "in a counter": (lambda _, x: 2 * x if COUNTER["on"] else x, lambda patch: patch.setitem(COUNTER, "on", 1)),
    "in a view of a dictionary": (
        lambda _, x: 2 * x if VIEW.get("on") else x,
        lambda patch: patch.setitem(FLAGS, "on", True),
    ),
    "by a dictionary's method": (
        lambda _, x: 2 * x if GET("on") else x,
        lambda patch: patch.setitem(FLAGS, "on", True),
    ),
    "in an event": (
        lambda _, x: 2 * x if EVENT.is_set() else x,
        lambda patch: patch.setattr(EVENT, "_flag", True),
    ),
    "by a weak reference": (
        lambda _, x: 2 * x if getattr(REFERENCE(), "on", False) else x,
        lambda patch: patch.setattr(SWITCH, "on", True),
    ),
    "in a set": (lambda _, x: 2 * x if 1 in SETS else x, lambda patch: patch.setitem(globals(), "SETS", {0, 1})),
    "in a list": (lambda _, x: 2 * x if LIST[0] else x, lambda patch: patch.setitem(globals(), "LIST", [1])),
    "of a class": (
        lambda _, x: 2 * x if Switch.on else x,
        lambda patch: patch.setattr(Switch, "on", True),
    ),
    "of the block's class": (
        lambda block, x: 2 * x if type(block).doubles else x,
        lambda patch: patch.setattr(Reader, "doubles", True),
    ),
    "by a method of a class": (
        lambda _, x: Multiplying.turned(x),
        lambda patch: patch.setitem(globals(), "TURN", -1.0),
    ),
    "of a class that a function around has": (
        AROUND_CLASS,
        lambda patch: patch.setattr(Keeping, "turned", lambda x: -x),
    ),
    "in a Python module in another": (
        lambda _, x: 2 * x if PACKAGE.inner.on else x,
        lambda patch: patch.setattr(PACKAGE.inner, "on", True),
    ),
    "that is a function": (
        lambda _, x: turned(x),
        lambda patch: patch.setitem(globals(), "turned", lambda x: -x),
    ),
    "that is a function of PyTorch": (
        lambda _, x: BUILT_IN(x),
        lambda patch: patch.setitem(globals(), "BUILT_IN", torch.sigmoid),
    ),
    "that is a layer of PyTorch": (lambda _, x: LAYER(x), lambda patch: patch.setattr(LAYER, "lambd", 2.0)),
    "that has arguments of its own": (
        lambda _, x: PARTIAL(x),
        lambda patch: patch.setitem(globals(), "PARTIAL", functools.partial(torch.mul, 5.0)),
    ),
    "that is a method of an object": (
        lambda _, x: METHOD(x),
        lambda patch: patch.setattr(SWITCH, "on", True),
    ),
    "that has an object's method with arguments": (
        lambda _, x: WITH_OBJECT(x),
        lambda patch: patch.setattr(SWITCH, "on", True),
    ),
    "that is a slice": (lambda _, x: x[:, PART], lambda patch: patch.setitem(globals(), "PART", slice(1, 3))),
    "that is a class": (lambda _, x: KIND.turned(x), lambda patch: patch.setitem(globals(), "KIND", Turning)),
    "that a function around has": (
        INSIDE,
        lambda patch: patch.setattr(INSIDE.__closure__[0], "cell_contents", torch.sigmoid),
    ),
    "by an import in it": (
        importing,
        lambda patch: patch.setattr(sys.modules[__name__], "TURN", -1.0),
    ),
    "of the process": (
        lambda _, x: 2 * x if os.environ.get("DOUBLES") else x,
        lambda patch: patch.setenv("DOUBLES", "1"),
    ),
    "of the process, by a decorator": (
        lambda _, x: decorated(x),
        lambda patch: patch.setenv("DOUBLES", "1"),
    ),
    "as a default": (
        lambda _, x: by_default(x),
        lambda patch: patch.setitem(DEFAULTS, "factor", 3),
    ),
    "of an object": (lambda _, x: 2 * x if SWITCH.on else x, lambda patch: patch.setattr(SWITCH, "on", True)),
    "of a namespace": (lambda _, x: 2 * x if SPACE.on else x, lambda patch: patch.setattr(SPACE, "on", True)),
    "of a namespace by another name": (by_another_name, lambda patch: patch.setattr(SPACE, "on", True)),
    "of a namespace in a namespace": (
        lambda _, x: 2 * x if NESTED.space.on else x,
        lambda patch: patch.setattr(SPACE, "on", True),
    ),
    "of a namespace that a function around has": (AROUND_SPACE, lambda patch: patch.setattr(SPACE, "on", True)),
    "of a namespace that is a default": (
        lambda block, x: WITH_SPACE(block, x),
        lambda patch: patch.setattr(SPACE, "on", True),
    ),
    "of PyTorch, in a function inside": (
        lambda _, x: max(torch.get_num_threads() for _ in range(1)) * x,
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 7),
    ),
    "that was None": (
        lambda _, x: x if NOTHING is None else 2 * x,
        lambda patch: patch.setitem(globals(), "NOTHING", 1),
    ),
}
"""What code reads of globals, and how that changes."""


@pytest.mark.every
@pytest.mark.parametrize("what", GLOBALS)
def test_a_global_that_has_changed_is_read_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = GLOBALS[what]
    before, after = readers(read)
    x = torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    change(monkeypatch)
    assert_adapted_as_it_is(after, x)


class Above(Reader):
    """A block from which another derives."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Below(Above):
    """That one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class OfPyTorch(nn.Linear):
    """A layer that derives from one of PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


@pytest.mark.parametrize(("above", "target", "make"), [(Above, "w", Below), (nn.Linear, "0", lambda: OfPyTorch(4, 4))])
def test_the_forward_of_a_class_above_is_read_anew(
    above: type[nn.Module], target: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, x = make(), make(), torch.randn(3, 4)
    assert_adapted_as_it_is(before, x, target)
    own: Any = above.forward
    monkeypatch.setattr(above, "forward", lambda self, x: -own(self, x))
    assert_adapted_as_it_is(after, x, target)


def test_an_operator_of_a_layer_reads_globals_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = readers(lambda block, x: block.inner[x])
    before.inner, after.inner = Indexed(), Indexed()
    x = torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    monkeypatch.setitem(globals(), "TURN", -1.0)
    assert_adapted_as_it_is(after, x)


@pytest.mark.every
def test_equal_blocks_are_recorded_once_and_not_again_by_later_calls() -> None:
    def config() -> LoraConfig:
        return LoraConfig(r=2, target_modules=["w", "one"], init_lora_weights=False)

    def recordings(number: int) -> int:
        # a class that nothing has recorded
        own = type("Own", (Block,), {})
        model = nn.Sequential(*(own() for _ in range(number)))
        return counting.counted(lambda: get_peft_model(model, config())).recordings

    assert recordings(6) == recordings(1) > 0
    model: Any = get_peft_model(nn.Sequential(Block(), Block()), config())
    again = counting.counted(lambda: model.add_adapter("again", config()))
    switched = counting.counted(lambda: model.set_adapter("again"))
    another = counting.counted(lambda: get_peft_model(nn.Sequential(Block(), Block()), config()))
    assert (again.recordings, switched.recordings, another.recordings) == (0, 0, 0)


@pytest.mark.parametrize("name", ["factor", "_factor"])
def test_an_attribute_that_was_set_on_a_tensor_is_no_attribute_of_its_example(name: str) -> None:
    before, after = readers(lambda block, x: x * getattr(block.table, name, 1))
    x = torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    setattr(after.table, name, 3)
    assert_adapted_as_it_is(after, x)


def test_a_check_for_a_buffer_is_recorded() -> None:
    before, after = readers(lambda block, x: 2 * x if isinstance(block.table, nn.Buffer) else x)
    after.table = nn.Buffer(torch.zeros(2, 4))
    x = torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    assert_adapted_as_it_is(after, x)


def test_a_class_of_the_same_name_above_hides_no_attribute() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.linear(x, self.w)
        return 2 * x if type(self).doubles else x

    own: Any = type("Reader", (Reader,), {"forward": forward, "doubles": False})
    before, after, x = own(), own(), torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    own.doubles = True
    assert_adapted_as_it_is(after, x)


def test_what_a_class_may_be_held_by_is_referred_to_weakly() -> None:
    class Own(Reader):
        @property
        def factor(self) -> int:
            return 2

        @staticmethod
        def turned(x: Tensor) -> Tensor:
            return -x

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.turned(F.linear(x, self.w))

    read = [value for name, value in globals_read(Own) if name.startswith(("factor", "turned"))]
    assert len(read) == 2
    assert all(type(value) is Weak for value in read)
