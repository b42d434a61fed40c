"""Models that hold or call what is none of their own code: objects of any class, other packages, compiled code."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import warnings
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import ExportError, LoraConfig, NeedsInputsError, TraceError, export, get_peft_model, trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # Dynamo asks for it
]

T = TypeVar("T")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def assert_adapted_and_traced(model: nn.Module, *targets: str) -> Any:
    """Asserts that the traced model equals the model, and that an adapter acts at each target; returns the traced."""
    base = model(X)
    traced: Any = trace(model, (X,))
    assert torch.equal(traced(X), base)
    assert traced.kept == {}
    for target in targets:
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        found = adapted(X)
        assert not torch.allclose(found, base)
        torch.testing.assert_close(adapted.merge_adapter() or adapted(X), found)
        adapted.unmerge_adapter()
        adapted.unload()
        torch.testing.assert_close(model(X), base)
    return traced


# objects whose classes answer by code of their own


class Raising(tuple):
    """A tuple of which one must not ask for its length, as e3nn's ``Irreps`` are."""

    __slots__ = ()

    def __len__(self):
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def __eq__(self, other: object):
        raise NotImplementedError

    __hash__ = tuple.__hash__


class RaisingList(list):
    __len__ = __iter__ = __eq__ = __copy__ = __bool__ = property(lambda self: self.missing)  # type: ignore


class RaisingDict(dict):
    __len__ = __iter__ = items = keys = values = __copy__ = copy = property(lambda self: self.missing)  # type: ignore


class Lazy:
    """Loads what it stands for when it is asked for any attribute; here it can't."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]  # a property in its place is the case
        raise RuntimeError("not loaded")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not loaded")


class Slotted:
    __slots__ = ("hidden", "value")


class HidesSlot(Slotted):
    """Computes what is a slot of its base class, as classes of sympy do; another value each time."""

    __slots__ = ()
    hidden = property(lambda self: object())  # type: ignore


class Ordered(collections.OrderedDict):
    pass


class Holding(nn.Module):
    def __init__(self, held: Any):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.held = held

    def forward(self, x):
        return self.head(F.linear(x, self.layer.weight)) * (1.5 if self.held is not None else 1.0)


class OutOfContext:
    """Stands for an object that isn't there now, as werkzeug's LocalProxy does."""

    @property
    def __class__(self):  # type: ignore[override]  # a property in its place is the case
        raise RuntimeError("working outside of the context")


PRESENT = OutOfContext()


class NamingOne(Holding):
    def forward(self, x):
        return super().forward(x) if PRESENT is not None else x


HELD: dict[str, Any] = {
    "list of one that isn't there": lambda: [PRESENT],
    "tuple": lambda: Raising((1, 2)),
    "tuple in a list": lambda: {"deep": [Raising((1, 2))]},
    "list": lambda: RaisingList([1, Raising((3,))]),
    "dictionary": lambda: RaisingDict(of=RaisingList([2])),
    "ordered dictionary": lambda: Ordered(of=RaisingList([2])),
    "lazy object": Lazy,
    "list of lazy objects": lambda: [Lazy()],
    "hidden slot": HidesSlot,
}


@pytest.mark.parametrize("kind", HELD)
def test_objects_are_asked_nothing_that_runs_code_of_their_own(kind: str):
    assert_adapted_and_traced(Holding(HELD[kind]()), "layer", "head")


def test_a_global_is_asked_nothing_that_runs_code_of_its_own():
    assert_adapted_and_traced(NamingOne(None), "layer", "head")


def test_what_a_forward_puts_into_an_ordered_dictionary_is_taken_out_again():
    class Keeping(Holding):
        def forward(self, x):
            self.held[f"call {len(self.held)}"] = x
            return self.layer(x)

    model = nn.Sequential(Keeping(Ordered(first=1)), nn.Linear(4, 4))
    trace(model, (X,))
    held: Any = model[0].held
    assert list(held.items()) == list(reversed(list(reversed(held.items())))) == [("first", 1)]


EXPRESSION: Any = sympy.Symbol("x") ** 2 + sympy.Rational(1, 3)


def test_objects_of_other_packages_stay_as_they_are():
    class Symbolic(Holding):
        def forward(self, x):
            return self.head(F.linear(x, self.layer.weight)) * float(EXPRESSION.subs("x", 2))

    assert_adapted_and_traced(Symbolic(sympy.pi), "layer", "head")


# questions for a class


def _described(value):
    return f"a {value.__class__}" if value.__class__ is not torch.Tensor else "a tensor"


def _checked(value):
    return value if type(value) is torch.Tensor else value * 0


class Printing(nn.Module):
    """Asks for a class in helpers: a function, a method, and one of the base class."""

    def __init__(self, verbose: bool = False, checked: bool = False):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.verbose, self.checked = verbose, checked

    def show(self, value):
        print(type(value), _described(value))  # noqa: T201

    def forward(self, x):
        if self.verbose:
            self.show(x)
        return _checked(F.linear(x, self.layer.weight)) if self.checked else F.linear(x, self.layer.weight)


def test_a_question_for_a_class_that_is_never_asked_is_of_no_account():
    assert_adapted_and_traced(nn.Sequential(Printing(), nn.Linear(4, 4), Printing()), "layer", "1")


@pytest.mark.parametrize(
    ("options", "asking"), [({"verbose": True}, r"Printing\.show"), ({"checked": True}, "_checked")]
)
def test_a_question_for_a_class_that_is_asked_is_refused_by_name(options: Any, asking: str, capsys: Any):
    with pytest.raises(TraceError, match=f"{asking} asks for the class of a value"):
        trace(Printing(**options), (X,))
    traced: Any = trace(nn.Sequential(Printing(**options), nn.Linear(4, 4)), (X,))
    assert list(traced.kept) == ["0"]
    assert _checked(X) is X


class AskingFirst(nn.Module):
    def forward(self, x):
        return x * 2 if type(x) is torch.Tensor else x


class OfTheBaseClass(AskingFirst):
    def forward(self, x):
        return super().forward(x)


def _doubled(function: Any) -> Any:
    def call(self, x):
        return 2 * function(self, x)

    return call


class Decorated(nn.Module):
    @_doubled
    def forward(self, x):
        return x if type(x) is torch.Tensor else x * 0


_CHECKED_LATER = functools.partial(_checked)


class ByPartial(nn.Module):
    def forward(self, x):
        return 2 * _CHECKED_LATER(x)


class ByProperty(nn.Module):
    @property
    def check(self):
        return _checked

    @property
    def kind(self):
        return type(self.x)

    def forward(self, x):
        self.x = x
        return 2 * x if self.kind is torch.Tensor else x


@pytest.mark.parametrize("cls", [AskingFirst, OfTheBaseClass, Decorated, ByPartial, ByProperty])
def test_a_question_for_a_class_is_seen_however_the_code_is_found(cls: Any):
    traced: Any = trace(nn.Sequential(cls(), nn.Identity()), (X,))
    assert torch.equal(traced(X), 2 * X)
    assert list(traced.kept) == ["0"]


def test_a_traced_value_can_be_called_if_the_value_can():
    class Called(Holding):
        def forward(self, x):
            scale = self.held() if callable(self.held) else self.held
            return self.head(F.linear(x, self.layer.weight)) * scale

    class CalledIfPossible(nn.Module):
        def forward(self, x):
            return x() if callable(x) else x * 2

    assert_adapted_and_traced(Called(1.5), "layer", "head")
    assert torch.equal(trace(CalledIfPossible(), (X,))(X), X * 2)
    with pytest.raises(NeedsInputsError):
        trace(CalledIfPossible())


# scripted and compiled code


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scripts are deprecated, and used all the same

    @torch.jit.script
    def quick_gelu(x: torch.Tensor, by: float = 1.7) -> torch.Tensor:
        return x * torch.sigmoid(by * x)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(quick_gelu(F.linear(x, self.layer.weight), by=1.5))


def test_a_scripted_function_is_one_node():
    traced = assert_adapted_and_traced(Scripted(), "layer", "head")
    nodes = [node.name for node in traced.graph.nodes if node.op == "call_function" and "gelu" in node.name]
    assert len(nodes) == 1
    assert torch.equal(pickle.loads(pickle.dumps(traced))(X), traced(X))
    larger = torch.randn(7, 4).requires_grad_()
    traced(larger).sum().backward()
    assert larger.grad is not None
    assert not torch.equal(larger.grad, torch.zeros(7, 4))


def _beside(other: Any) -> nn.Module:
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.other = other
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.other(F.linear(x, self.layer.weight)))

    return Beside()


def _inner() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).eval()


def test_layers_beside_a_scripted_module_are_adapted():
    for other in (torch.jit.script(_inner()), torch.jit.trace(_inner(), X)):
        assert_adapted_and_traced(_beside(other), "layer", "head")


@pytest.mark.parametrize("script", [torch.jit.script, lambda inner: torch.jit.trace(inner, X)], ids=["script", "trace"])
def test_weights_of_a_scripted_module_are_frozen_and_no_targets(script: Any):
    model: Any = _beside(script(_inner()))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    model.unload()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_was_compiled_is_part_of_a_graph():
    inner = _inner()
    by_itself = _inner()
    by_itself.compile(backend="eager")
    for other, target in ((torch.compile(inner, backend="eager"), "other.0"), (by_itself, "other.0")):
        model = _beside(other)
        assert_adapted_and_traced(model, "layer", "head", target)


def test_a_compiled_function_is_part_of_a_graph():
    double = torch.compile(lambda x: x * 2, backend="eager")

    class Doubling(Holding):
        def forward(self, x):
            return self.head(double(F.linear(x, self.layer.weight)))

    assert_adapted_and_traced(Doubling(None), "layer", "head")


def test_a_compiled_model_is_traced_as_what_was_compiled():
    compiled: Any = torch.compile(_inner(), backend="eager")
    with pytest.raises(TraceError, match=r"trace model\._orig_mod, the Sequential itself"):
        trace(compiled, (X,))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_with_the_way_out(tmp_path: Path):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TraceError, match=r"is a ScriptModule.*; trace the module that it was made from"):
        trace(scripted, (torch.ones(2, 4),))
    with pytest.raises(ExportError, match=r"is a ScriptModule.*; export the module that it was made from"):
        export(scripted, (torch.ones(2, 4),), tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


# classes that keep the attributes of instances elsewhere


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class WithSlots:
    __slots__ = ()


class Plain:
    pass


class AbstractMixing(ABC, Mixing):
    pass


class GenericMixing(Generic[T], Mixing):
    pass


class SlottedMixing(WithSlots, Mixing):
    pass


class PlainMixing(Plain, Mixing):
    pass


class InheritedMixing(AbstractMixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("cls", [AbstractMixing, GenericMixing, SlottedMixing, PlainMixing, InheritedMixing])
def test_a_class_with_any_first_base_is_adapted(cls: Any):
    torch.manual_seed(0)
    base = nn.Sequential(cls(), nn.Linear(4, 4))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["w", "1"], init_lora_weights=False))
    x = torch.randn(3, 4)
    expected = model(x)
    assert not torch.allclose(expected, base(x))
    assert isinstance(model[0], cls)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), expected)
    assert type(model.unload()[0]) is cls
    assert torch.equal(model(x), base(x))


def made(cls: type) -> type:
    class Result(cls):
        def __reduce__(self) -> Any:
            return _of_made, (cls,), self.__dict__.copy()

    return Result


def _of_made(cls: type) -> Any:
    one: Any = made(cls)
    return one.__new__(one)


class OfItsType(nn.Linear):
    def __reduce__(self) -> Any:
        return type(self), (4, 4), self.__dict__


def test_a_class_that_is_built_by_its_type_is_pickled_adapted():
    model: Any = get_peft_model(
        nn.Sequential(OfItsType(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(X), model(X))
    assert type(copied.unload()[0]) is OfItsType


def test_a_class_with_a_pickle_of_its_own_is_pickled_adapted():
    model = nn.Sequential(made(nn.Linear)(4, 4), nn.Linear(4, 2))
    pickle.loads(pickle.dumps(model))
    model: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(X), model(X))
        assert not torch.equal(copied.unload()(X), model(X))
