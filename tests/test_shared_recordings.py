"""Blocks with layers inside share a recording of a call if all that it depends on is equal, and else have their own.

Each pair below is of one class. A fact that `tracing/module_graphs.py` forgets gives the second block the graph of the
first. No
later call has a recording of an earlier one, whatever code reads by then.
"""

from __future__ import annotations

import collections
import os
import types
import weakref
from collections.abc import Callable
from typing import Any

import counting
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft import AdaptError, GuardError, LoraConfig, get_peft_model

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


COUNTS: Any = collections.defaultdict(int)
FACTORS: Any = weakref.WeakKeyDictionary()
"""A number for a module, wherever code looks it up."""


class FactorOf:
    """A number for each module, kept outside of it."""

    def __get__(self, block: Any, _: Any = None) -> Any:
        return FACTORS.get(block, 1)

    def __set__(self, block: Any, value: int) -> None:
        FACTORS[block] = value


def factor_of(x: Tensor, module: nn.Module) -> int:
    return FACTORS.get(module, 1)


class Reader(nn.Module):
    """A block that hands itself and its input to a function."""

    doubles, factor = False, FactorOf()

    def __init__(self) -> None:
        super().__init__()
        self.w, self.zero, self.text = nn.Parameter(torch.randn(4, 4)), 0.0, ""
        self.first = nn.Linear(4, 4)
        self.inner, self.pair = Inner(), nn.ModuleList([nn.Linear(4, 4), self.first])
        self.again = self.first
        self.register_buffer("table", torch.zeros(2, 4))
        self.act, self.space = torch.cos, types.SimpleNamespace(factor=3.0)


SPACE = types.SimpleNamespace(on=False, factor=1.0)
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


def assert_adapted_together(blocks: tuple[nn.Module, ...]) -> None:
    """Asserts that fresh adapters change no output of blocks that may share a recording."""
    x = torch.randn(3, 4)
    expected = [block(x) for block in blocks]
    get_peft_model(nn.ModuleList(blocks), LoraConfig(r=2, target_modules=["w"]))
    for block, output in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block(x), output)


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
    "what no name shows": (
        lambda block, x: object.__getattribute__(block, "zero") * x,
        lambda block: setattr(block, "zero", 2.0),
    ),
    "a name with underscores around": (
        lambda block, x: getattr(block, "__factor__", 1) * x,
        lambda block: setattr(block, "__factor__", 2),
    ),
    "a dictionary of all attributes": (
        lambda block, x: vars(block)["zero"] * x,
        lambda block: setattr(block, "zero", 2.0),
    ),
    "the object itself": (lambda block, x: x * (id(block) % 7), lambda block: None),
    "what a table has for it": (lambda block, x: FACTORS.get(block, 1) * x, lambda block: FACTORS.update({block: 2})),
    "what a table with a default has for it": (
        lambda block, x: COUNTS[block] * x + x,
        lambda block: COUNTS.update({block: 2}),
    ),
    "whether it is among others": (
        lambda block, x: 2 * x if block in FACTORS else x,
        lambda block: FACTORS.update({block: 2}),
    ),
    "what a table has for a layer": (
        lambda block, x: FACTORS[block.inner] * x if block.inner in FACTORS else x,
        lambda block: FACTORS.update({block.inner: 2}),
    ),
    "what a table has for an alias": (
        lambda block, x: factor_of(x, block.again) * x,
        lambda block: FACTORS.update({block.again: 2}),
    ),
    "a descriptor": (lambda block, x: block.factor * x, lambda block: setattr(block, "factor", 2)),
    "a function": (lambda block, x: block.act(x), lambda block: setattr(block, "act", torch.sin)),
    "an object": (lambda block, x: block.space.factor * x, lambda block: setattr(block, "space", SPACE)),
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
    blocks = readers(read)
    change(blocks[not is_changed_first])
    assert_adapted_together(blocks)


def test_a_block_that_finds_itself_in_a_list_has_its_own_graph() -> None:
    one, other = blocks = readers(lambda block, x: (1 + block.several.index(block)) * x)
    vars(one)["several"] = vars(other)["several"] = [one, other]
    assert_adapted_together(blocks)


def test_a_layer_may_have_a_tensor_by_a_name_that_convolutions_have() -> None:
    blocks = readers(lambda block, x: block.pair[0].stride.sum() * x)
    for number, block in enumerate(blocks):
        block.get_submodule("pair.0").stride = torch.tensor([1.0, number])
    assert_adapted_together(blocks)


class Looking(nn.Module):
    """A block that looks rows up and multiplies by the table."""

    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=max_norm)

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(self.table(rows), self.table.weight)


@pytest.mark.parametrize("norms", [(None, 0.1), (0.1, None)])
def test_a_table_that_shortens_its_rows_is_an_error_beside_one_that_does_not(norms: tuple[float | None, ...]) -> None:
    model = get_peft_model(nn.ModuleList(map(Looking, norms)), LoraConfig(r=2, target_modules=["table"]))
    rows = torch.tensor([0, 1])
    with pytest.raises(AdaptError, match="what an adapter of LORA does there is no change of its weight"):
        model[norms.index(0.1)](rows)
    model[norms.index(None)](rows)


class Hiding(Inner):
    """A layer with a method that reads an attribute by no name."""

    def hidden(self) -> Any:
        return object.__getattribute__(self, "scale")


def test_a_block_whose_layer_reads_an_attribute_by_no_name_has_its_own_graph() -> None:
    one, other = readers(lambda block, x: block.inner.hidden() * x)
    one.inner, other.inner = Hiding(), Hiding()
    other.inner.scale = 2.0
    assert_adapted_together((one, other))


class MakingUp(Reader):
    """A block whose class answers for an attribute that it lacks."""

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "zero") if name == "made_up" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.made_up * F.linear(x, self.w)


def test_a_block_whose_class_makes_attributes_up_has_its_own_graph() -> None:
    one, other = MakingUp(), MakingUp()
    one.zero, other.zero = 1.0, 2.0
    assert_adapted_together((one, other))


def turned(x: Tensor) -> Tensor:
    return x


class Holding(nn.Module):
    """A block that uses the weight of its layer, or calls the layer, in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def used(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Choosing(nn.Module):
    """A block that computes with a weight by a factor that it reads from an object."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.options = nn.Parameter(torch.randn(4, 4)), types.SimpleNamespace(on=1, doubled=1)

    def factor(self) -> Any:
        return self.options.on

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.factor() * x, self.w)


SPACE_OF_ALL = types.SimpleNamespace(on=False)
ANEW: dict[str, tuple[Read, Callable[[pytest.MonkeyPatch], object]]] = {
    "a global of a layer's method": (
        lambda block, x: block.inner.signed(x),
        lambda patch: patch.setitem(globals(), "TURN", -1.0),
    ),
    "a global's attribute": (
        lambda _, x: 2 * x if SPACE_OF_ALL.on else x,
        lambda patch: patch.setattr(SPACE_OF_ALL, "on", True),
    ),
    "an attribute of the block's class": (
        lambda block, x: 2 * x if type(block).doubles else x,
        lambda patch: patch.setattr(Reader, "doubles", True),
    ),
    "a function": (lambda _, x: turned(x), lambda patch: patch.setitem(globals(), "turned", lambda x: -x)),
    "a setting of the process": (
        lambda _, x: 2 * x if os.environ.get("DOUBLES") else x,
        lambda patch: patch.setenv("DOUBLES", "1"),
    ),
}
"""What code reads beside its module, and how that changes."""


@pytest.mark.every
@pytest.mark.parametrize("what", ANEW)
def test_what_has_changed_between_two_calls_is_read_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = ANEW[what]
    before, after = readers(read)
    x = torch.randn(3, 4)
    assert_adapted_as_it_is(before, x)
    change(monkeypatch)
    assert_adapted_as_it_is(after, x)


@pytest.mark.parametrize("replaced", ["forward", "used"])
def test_code_that_was_replaced_between_two_calls_is_read_anew(replaced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    get_peft_model(Holding(), config)
    monkeypatch.setattr(Holding, replaced, lambda self, x: F.linear(x, self.layer.weight))
    block, x = Holding(), torch.randn(3, 4)
    before = block(x)
    adapted: Any = get_peft_model(block, config)
    outputs = adapted(x)
    assert not torch.allclose(outputs, before)
    torch.testing.assert_close(adapted.merge_and_unload()(x), outputs)


def test_a_method_that_was_replaced_between_two_calls_is_asked_anew_for_the_options_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LoraConfig(r=2, target_modules=["w"])
    get_peft_model(Choosing(), config)
    monkeypatch.setattr(Choosing, "factor", lambda self: self.options.doubled + 1)
    block, x = Choosing(), torch.randn(3, 4)
    adapted: Any = get_peft_model(block, config)
    adapted(x)
    block.options.doubled = 2
    with pytest.raises(GuardError, match=r"options\.doubled"):
        adapted(x)


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
    assert (again.recordings, switched.recordings) == (0, 0)


def test_a_weight_without_any_adapter_left_has_its_site_found_anew() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        layer = getattr(self, self.name)
        return F.linear(x, layer.weight) if self.reads else layer(x)

    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    block: Any = type("Own", (Holding,), {"forward": forward, "name": "layer", "reads": False})()
    model: Any = get_peft_model(nn.Sequential(block, nn.Linear(4, 4)), config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    block.reads, x = True, torch.randn(3, 4)
    before = model(x)
    model.add_adapter("again", config)
    model.set_adapter("again")
    assert not torch.allclose(model(x), before)


class Deciding(Block):
    """A block that decides on its input, so that it can't be recorded without an example."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_equal_blocks_that_cannot_be_recorded_are_tried_once() -> None:
    def tries(number: int) -> int:
        model = nn.Sequential(*(Deciding() for _ in range(number)))
        return counting.counted(lambda: get_peft_model(model, LoraConfig(target_modules=["one"]))).recordings

    assert tries(6) == tries(1) == 0  # a layer inside is adapted without the block


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
