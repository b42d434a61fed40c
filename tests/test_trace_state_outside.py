"""What a forward keeps outside of its modules: a graph does without it, or the module stays a call."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import random
import threading
import types
import weakref
from collections import OrderedDict, UserDict
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_modules import X, module_of
from torch import fx, nn

from graphpeft import AdaptError, GuardError, LoraConfig, TraceError, get_peft_model, trace
from graphpeft.code.reach import Reach
from graphpeft.testing import laws
from graphpeft.tracing.module_graphs import Recordings


def proxies_in(value: Any) -> bool:
    """Returns whether a container holds a traced value."""
    parts = value.values() if isinstance(value, dict) else value
    return any(isinstance(part, fx.Proxy) for part in parts)


def assert_stays_a_call(build, *reasons: str) -> None:
    """Checks that what `build` makes stays a call with this reason and answers as the model, and is refused as a root.

    Args:
        build: Makes a module whose state is that of no other one.
        reasons: What the error has to say.
    """
    traced: Any = trace(nn.Sequential(build()), (X,))
    kept = traced.kept
    assert list(kept) == ["0"]
    assert all(reason in kept["0"] for reason in reasons), kept
    traced = trace(nn.Sequential(build()), (X,))
    answers = [traced(x) for x in (X, 2 * X, X)]
    model = build()
    for answer, x in zip(answers, (X, 2 * X, X), strict=True):
        laws.require_equal(answer, model(x), "the traced model")
    model = build()
    with pytest.raises(TraceError) as refused:
        trace(model, (X,))
    assert all(reason in str(refused.value) for reason in reasons), refused.value
    model_answers = [model(x) for x in (X, 2 * X, X)]
    for answer, expected in zip(model_answers, answers, strict=True):
        laws.require_equal(answer, expected, "a model whose trace was refused")


# globals of Python modules

COUNT = 0
SEEN: list[Any] = []
CACHE: dict[Any, Any] = {}
CONFIG: dict[str, Any] = {"state": {"calls": 0}}
TOTAL = torch.zeros(8)
LAST: Any = None
MADE: int


def counting_globally(self, x):
    global COUNT
    COUNT += 1
    return x * COUNT


def collecting_globally(self, x):
    SEEN.append(x.mean())
    return x * len(SEEN)


def counting_in_a_helper(self, x):
    return x * _counted()


def _counted():
    CONFIG["state"]["calls"] += 1
    return CONFIG["state"]["calls"]


def remembering_globally(self, x):
    global LAST
    y = x if LAST is None else x + LAST
    LAST = x.mean()
    return y


def making_a_global(self, x):
    global MADE
    try:
        MADE += 1
    except NameError:
        MADE = 1
    return x * MADE


@pytest.fixture(autouse=True)
def _fresh_globals():
    reset_globals()
    yield
    reset_globals()


def reset_globals():
    globals().update(COUNT=0, LAST=None, NUMBERS=None)
    Drawn.named = None
    globals().pop("MADE", None)
    SEEN.clear()
    CACHE.clear()
    CONFIG["state"] = {"calls": 0}
    TOTAL.zero_()


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (counting_globally, "COUNT"),
        (collecting_globally, "SEEN"),
        (counting_in_a_helper, "CONFIG"),
        (remembering_globally, "LAST"),
        (making_a_global, "MADE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_global_that_changes_with_each_call_keeps_the_module_a_call(forward, name):
    def build():
        reset_globals()
        return module_of(forward)

    assert_stays_a_call(build, f"Made's forward changes the global {name} of", __name__, "for its next call")


def test_a_trace_leaves_globals_as_they_are():
    for forward in (
        counting_globally,
        collecting_globally,
        counting_in_a_helper,
        remembering_globally,
        making_a_global,
    ):
        trace(nn.Sequential(module_of(forward)), (X,))
    assert (COUNT, SEEN, CONFIG, LAST, "MADE" in globals()) == (0, [], {"state": {"calls": 0}}, None, False)


def test_a_global_cache_of_what_follows_from_sizes_is_computed_in_each_run():
    def forward(self, x):
        if x.shape[1] not in CACHE:
            CACHE[x.shape[1]] = torch.arange(x.shape[1])[:, None] * 1.0
        return x + CACHE[x.shape[1]]

    model = module_of(forward)
    traced: Any = trace(nn.Sequential(model), (X,))
    assert traced.kept == {}
    assert CACHE == {}
    assert traced.report.not_kept == (f"the global CACHE of the Python module {__name__}",)
    for x in (X, X[:1], X):
        assert torch.equal(traced(x), model(x))


class Making(OrderedDict):
    """Makes something new of what it holds, as the table of activations in Transformers does."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


TABLE = Making(relu=nn.ReLU)


def test_a_table_that_makes_what_it_gives_does_not_change():
    model = module_of(lambda self, x: TABLE["relu"](x))
    traced: Any = trace(nn.Sequential(model), (X,))
    assert traced.kept == {}
    assert torch.equal(traced(X), X.relu())


def test_all_modules_that_share_a_global_stay_calls():
    layers = [module_of(counting_globally) for _ in range(3)]
    traced: Any = trace(nn.Sequential(nn.Linear(8, 8), *layers), (X,))
    assert list(traced.kept) == ["1", "2", "3"]
    reader = module_of(lambda self, x: x * COUNT)
    traced = trace(nn.Sequential(layers[0], reader), (X,))
    assert list(traced.kept) == ["0", "1"]
    assert torch.equal(traced(X), X)
    assert torch.equal(traced(X), X * 2 * 2)


def test_a_global_tensor_that_is_written_in_place_is_that_of_the_graph():
    def forward(self, x):
        TOTAL.add_(x.sum((0, 1)))
        return x + TOTAL

    model = module_of(forward)
    traced: Any = trace(nn.Sequential(model), (X,))
    assert torch.equal(TOTAL, torch.zeros(8))
    answers = traced(X), traced(X)
    TOTAL.zero_()
    for answer in answers:
        laws.require_equal(answer, model(X), "the traced model")


# closures


def closed_over(kind: str) -> Any:
    """Returns a module whose forward changes a variable of the function that made it."""
    n, seen, state = 0, [], {"n": 0}

    def rebinding(self, x):
        nonlocal n
        n += 1
        return x * n

    def appending(self, x):
        seen.append(x.mean())
        return x * len(seen)

    def setting(self, x):
        state["n"] += 1
        return x * state["n"]

    return {"n": rebinding, "seen": appending, "state": setting}[kind]


@pytest.mark.parametrize("name", ["n", "seen", "state"])
def test_a_closure_that_changes_with_each_call_keeps_the_module_a_call(name):
    says = f"Made's forward changes the variable {name} around "
    assert_stays_a_call(lambda: module_of(closed_over(name)), says)

    def on_the_instance():
        model = module_of(lambda self, x: x)
        model.forward = functools.partial(closed_over(name), model)
        return model

    assert_stays_a_call(on_the_instance, says)
    assert_stays_a_call(lambda: module_of(lambda self, x: self.f(self, x), f=closed_over(name)), says)


def test_a_default_argument_that_is_filled_keeps_the_module_a_call():
    def build():
        def forward(self, x, seen=[]):  # noqa: B006
            seen.append(1)
            return x * len(seen)

        return module_of(lambda self, x: forward(self, x))

    assert_stays_a_call(build, "changes the defaults of the function ", "build.<locals>.forward for its next call")


def test_an_attribute_of_a_function_that_counts_keeps_the_module_a_call():
    def build():
        def forward(self, x):
            itself.calls += 1
            return x * itself.calls

        itself: Any = forward
        itself.calls = 0
        return module_of(forward)

    assert_stays_a_call(
        build, "changes the attribute calls of the function ", "build.<locals>.forward for its next call"
    )


# classes


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * self.calls


class Caching(nn.Module):
    cache: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, x):
        Caching.cache["n"] = Caching.cache.get("n", 0) + 1
        return x * self.cache["n"]


class Derived(Counting):
    pass


class Helper:
    calls = 0

    def scaled(self, x):
        Helper.calls += 1
        return x * Helper.calls


def test_an_attribute_of_a_class_that_changes_with_each_call_keeps_the_module_a_call():
    def build(make: Any):
        Counting.calls = Helper.calls = 0
        if "calls" in vars(Derived):
            del Derived.calls
        Caching.cache.clear()
        return make()

    assert_stays_a_call(lambda: build(Counting), "changes the class attribute Counting.calls for its next call")
    assert_stays_a_call(lambda: build(Derived), "changes the class attribute Derived.calls for its next call")
    assert_stays_a_call(lambda: build(Caching), "changes the class attribute Caching.cache for its next call")
    held = functools.partial(module_of, lambda self, x: self.helper.scaled(x))
    assert_stays_a_call(lambda: build(lambda: held(helper=Helper())), "the class attribute Helper.calls")
    made = functools.partial(module_of, lambda self, x: Helper().scaled(x))
    assert_stays_a_call(lambda: build(made), "the class attribute Helper.calls")


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Names(list):
    """A list with attributes."""

    n = 0


VARIABLE: ContextVar[int] = ContextVar("VARIABLE", default=0)


class Duration(datetime.timedelta):
    """Has members of a class written in C, which can't be set."""


def test_objects_whose_members_cannot_be_set_are_watched_as_a_whole():
    def longer(self, x):
        self.took = Duration(seconds=self.took.seconds + 1)
        return x * self.took.seconds

    assert_stays_a_call(lambda: module_of(longer, took=Duration(0)), "assigns self.took for its next call")


def test_what_pytest_keeps_is_not_followed():
    def forward(self, x):
        assert x.shape[1] == 5  # pytest has rewritten this
        return x

    assert any("@" in name for name in forward.__code__.co_names)
    found = {each.of["__name__"] for each in Reach(module_of(forward)).namespaces if isinstance(each.of, dict)}
    assert found <= {__name__, "_pytest.assertion.rewrite"}


def test_objects_of_any_kind_that_change_with_each_call_keep_the_module_a_call():
    def counting(self, x):
        self.counter.n += 1
        return x * self.counter.n

    def in_a_context(self, x):
        VARIABLE.set(VARIABLE.get() + 1)
        return x * VARIABLE.get()

    def in_bytes(self, x):
        self.counter[0] += 1
        return x * self.counter[0]

    def by_the_dictionary(self, x):
        globals()["COUNT"] += 1
        return x * globals()["COUNT"]

    def fresh(code):
        VARIABLE.set(0)
        reset_globals()
        return module_of(code)

    assert_stays_a_call(lambda: module_of(counting, counter=Slotted()), "changes its Slotted.n for its next call")
    assert_stays_a_call(lambda: module_of(counting, counter=Names()), "changes its Names.n for its next call")
    assert_stays_a_call(lambda: module_of(in_bytes, counter=bytearray(1)), "changes self.counter for its next call")
    assert_stays_a_call(lambda: fresh(in_a_context), "changes the global VARIABLE of")
    assert_stays_a_call(lambda: fresh(by_the_dictionary), "changes the global COUNT of")


IDS: set[int] = set()


def counting_in_a_set(self, x):
    IDS.add(len(IDS))
    return x * len(IDS)


def test_a_set_that_grows_with_each_call_keeps_the_module_a_call():
    def build():
        IDS.clear()
        return module_of(counting_in_a_set)

    assert_stays_a_call(build, "changes the global IDS of")


def exchanging_in_a_set(self, x):
    number = IDS.pop()
    IDS.add(number + 1)
    return x * number


def test_a_set_whose_items_are_exchanged_in_each_call_keeps_the_module_a_call():
    def build():
        IDS.clear()
        IDS.add(1)
        return module_of(exchanging_in_a_set)

    assert_stays_a_call(build, "changes the global IDS of")


def test_a_trace_leaves_a_set_as_it_is():
    IDS.clear()
    IDS.update((7, 8))
    trace(nn.Sequential(module_of(counting_in_a_set)), (X,))
    assert {7, 8} == IDS


class Key:
    """What weak references can refer to."""


KEYS = [Key() for _ in range(100)]


def counting_in_an_attribute(held, x):
    held.n += 1
    return x * held.n


def counting_by_keys(held, x):
    held[KEYS[len(held)]] = 1
    return x * len(held)


def counting_members(held, x):
    held.add(KEYS[len(held)])
    return x * len(held)


def local() -> Any:
    made: Any = threading.local()
    made.n = 0
    return made


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (local, counting_in_an_attribute),
        (lambda: argparse.Namespace(n=0), counting_in_an_attribute),
        (lambda: types.SimpleNamespace(n=0), counting_in_an_attribute),
        (weakref.WeakKeyDictionary, counting_by_keys),
        (weakref.WeakSet, counting_members),
        (UserDict, counting_by_keys),
    ],
    ids=["local", "Namespace", "SimpleNamespace", "WeakKeyDictionary", "WeakSet", "UserDict"],
)
def test_a_holder_of_the_standard_library_that_changes_with_each_call_keeps_the_module_a_call(make, count):
    def build():
        held = make()
        return module_of(lambda self, x: count(held, x))

    assert_stays_a_call(build, "for its next call")


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


def test_a_module_that_is_none_of_the_models_and_changes_keeps_what_calls_it_a_call():
    def build():
        return module_of(lambda self, x: self.teachers[0](x), teachers=[Outside()])

    assert_stays_a_call(build, "changes its Outside.n for its next call")


@pytest.mark.parametrize("where", ["object", "closure", "class"])
def test_a_tensor_held_anywhere_that_is_written_in_place_is_that_of_the_graph(where):
    total = torch.zeros(8)
    held: Any = {"object": Helper(), "class": Helper, "closure": None}[where]
    if held is not None:
        held.total = total

    def forward(self, x):
        kept = total if held is None else held.total
        kept.add_(x.sum((0, 1)))
        return x + kept

    model = module_of(forward)
    traced: Any = trace(nn.Sequential(model), (X,))
    assert traced.kept == {}
    assert torch.equal(total, torch.zeros(8))
    answers = [traced(X), traced(X)]
    assert torch.equal(total, X.sum((0, 1)) * 2)
    total.zero_()
    laws.require_equal(answers, [model(X), model(X)], "the traced model")


# arrays, iterators, generators


def test_an_array_that_is_written_in_place_keeps_the_module_a_call():
    def forward(self, x):
        self.counts[x.shape[0]] += 1
        return x * float(self.counts.sum())

    def in_a_list(self, x):
        self.counts[0][1] += 1
        return x * float(self.counts[0].sum())

    assert_stays_a_call(lambda: module_of(forward, counts=np.zeros(4)), "changes self.counts for its next call")
    assert_stays_a_call(lambda: module_of(in_a_list, counts=[np.zeros(4)]), "changes self.counts for its next call")


def drawing(self, x):
    return x * next(self.it)


def looping(self, x):
    for n in self.it:
        return x * n


def test_an_iterator_that_a_forward_draws_from_keeps_the_module_a_call():
    for forward in (drawing, looping):
        for make in (itertools.count, lambda: itertools.cycle([1, 2]), lambda: iter([5, 6, 7, 8, 9])):
            says = "can draw from self.it, an iterator"
            assert_stays_a_call(lambda: module_of(forward, it=make()), says)  # noqa: B023


def test_an_iterator_that_no_forward_draws_from_is_of_no_account():
    model = module_of(lambda self, x: x + 1, it=iter([1, 2]))
    assert trace(nn.Sequential(model), (X,)).kept == {}
    assert next(model.it) == 1

    class Numbered(nn.Module):
        ids = itertools.count()

        def __init__(self):
            super().__init__()
            self.id = next(self.ids)

        def forward(self, x):
            return x + self.id

    assert trace(nn.Sequential(Numbered()), (X,)).kept == {}


class Drawn:
    """Has iterators that code names."""

    named: Any = None

    def __init__(self):
        self.it = itertools.count()

    def scaled(self, x):
        return x * next(self.it)


@pytest.mark.parametrize(
    ("forward", "make", "says"),
    [
        (lambda self, x: x * next(vars(self)["it"]), itertools.count, "self.it"),
        (lambda self, x: x * next(getattr(self, "".join("it"))), itertools.count, "self.it"),
        (lambda self, x: x * next(self.it["a"][0]), lambda: {"a": [itertools.count()]}, "self.it"),
        (lambda self, x: x * self.it(), lambda: functools.partial(next, itertools.count()), "self.it"),
        (lambda self, x: x * self.it(), lambda: itertools.count().__next__, "self.it"),
        (lambda self, x: self.it.scaled(x), Drawn, "its Drawn.it"),
        (lambda self, x: x * next(Drawn.named), lambda: None, "the class attribute Drawn.named"),
    ],
    ids=["vars", "getattr", "containers", "partial", "method", "object", "class"],
)
def test_however_a_forward_can_draw_from_an_iterator_the_module_stays_a_call(forward, make, says):
    def build():
        Drawn.named = itertools.count()
        return module_of(forward, it=make())

    assert_stays_a_call(build, f"can draw from {says}, an iterator")


def test_a_module_that_draws_from_the_iterator_of_one_inside_stays_a_call():
    inner = functools.partial(module_of, lambda self, x: x)
    build = lambda: module_of(lambda self, x: self.inner(x) * next(self.inner.it), inner=inner(it=itertools.count()))  # noqa: E731
    assert_stays_a_call(build, "can draw from self.it, an iterator")


def test_an_iterator_that_the_forward_makes_is_drawn_from_in_each_run():
    def forward(self, x):
        self.it = iter([2, 3])
        return x * next(self.it)

    model = module_of(lambda self, x: x * next(iter([2, 3])))
    assert trace(nn.Sequential(model), (X,)).kept == {}
    kept: Any = trace(nn.Sequential(module_of(forward)), (X,)).kept
    assert "assigns self.it for its next call" in kept["0"]


def test_a_generator_that_a_forward_draws_from_is_refused_by_name():
    model = module_of(drawing, it=(n for n in (1, 2, 3)))
    with pytest.raises(TraceError, match=r"can draw from self\.it"):
        trace(model, (X,))
    with pytest.raises(TraceError, match=r"can draw from self\.it, a generator, which can't be copied"):
        trace(nn.Sequential(model), (X,))
    assert [next(model.it) for _ in range(3)] == [1, 2, 3]


NUMBERS: Any = None


def test_a_global_iterator_that_a_forward_draws_from_keeps_the_module_a_call():
    def build():
        globals()["NUMBERS"] = itertools.count()
        return module_of(lambda self, x: x * next(NUMBERS))

    assert_stays_a_call(build, "can draw from the global NUMBERS", "an iterator")


def test_a_random_generator_of_a_modules_own_keeps_the_module_a_call():
    def numpys(self, x):
        return x * float(self.rng.random())

    assert_stays_a_call(
        lambda: module_of(lambda self, x: x * self.rng.random(), rng=random.Random(0)), "changes self.rng"
    )
    for make in (np.random.default_rng, np.random.RandomState):
        assert_stays_a_call(lambda: module_of(numpys, rng=make(0)), "changes self.rng")  # noqa: B023


# what others read


def test_what_a_forward_leaves_outside_for_others_keeps_it_a_call():
    store: dict[str, Any] = {}

    def forward(self, x):
        store["pooled"] = x.mean(1)
        return x + 1

    traced: Any = trace(nn.Sequential(module_of(forward)), (X,))
    assert "changes the variable store around" in traced.kept["0"]
    assert store == {}
    traced(2 * X)
    assert torch.equal(store["pooled"], 2 * X.mean(1))


# hooks


class Extractor:
    """Keeps what modules return."""

    def __init__(self):
        self.features: dict[str, Any] = {}

    def keep(self, name, module, args, out):
        self.features[name] = out.detach()

    def __call__(self, module, args, out):
        self.last = out


@pytest.mark.parametrize("at", ["layer", "module", "hook of its own", "callable"])
def test_a_module_whose_hook_keeps_what_it_returns_stays_a_call(at):
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8))
    kept: list[Any] = []
    extractor = Extractor()
    if at == "layer":
        model[0].register_forward_hook(lambda module, args, out: kept.append(out))
    elif at == "module":
        model[1].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    elif at == "callable":
        model[1].register_forward_hook(extractor)
    else:
        model[1].register_forward_hook(functools.partial(extractor.keep, "one"))
    traced: Any = trace(model, (X,))
    assert list(traced.kept) == ["0" if at == "layer" else "1"]
    assert not kept
    assert vars(extractor) == {"features": {}}
    for given in (X, 2 * X):
        traced(given)
        now = kept[-1:] or [*extractor.features.values(), getattr(extractor, "last", None)]
        model(given)
        expected = kept[-1:] or [*extractor.features.values(), getattr(extractor, "last", None)]
        laws.require_equal(now[0] if now[0] is not None else now[1], expected[0], "what the hook kept")


def test_a_hook_of_the_root_that_keeps_something_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    kept: list[Any] = []
    model.register_forward_hook(lambda module, args, out: kept.append(out))
    with pytest.raises(TraceError, match=r"the variable kept around .*<lambda>"):
        trace(model, (X,))
    assert kept == []


def test_a_hook_of_all_modules_that_keeps_something_is_refused():
    kept: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: kept.append(out))
    try:
        with pytest.raises(TraceError, match="the variable kept around"):
            trace(nn.Sequential(nn.Linear(8, 8)), (X,))
    finally:
        handle.remove()
    assert kept == []


def test_a_hook_that_only_computes_is_traced():
    factor = 3.0
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_hook(lambda module, args, out: out * factor)
    traced: Any = trace(model, (X,))
    assert traced.kept == {}
    assert torch.equal(traced(X), model(X))


# the same for single modules


def test_a_region_whose_forward_changes_something_outside_runs_its_own_code_or_is_refused():
    def counting(self, x):
        global COUNT
        COUNT += 1
        return F.linear(x, self.w) * COUNT

    def filling(self, x):
        SEEN.append(x)
        return F.linear(x, self.w) * len(SEEN)

    for code, name in ((counting, "COUNT"), (filling, "SEEN")):
        model = nn.Sequential(module_of(code, w=nn.Parameter(torch.randn(8, 8))))
        expected = [model(X), model(X)]
        reset_globals()
        before = laws.snapshot(model)
        with pytest.raises(TraceError, match=f"changes the global {name} of"):
            Recordings().lift(model[0])
        with pytest.raises(AdaptError):
            get_peft_model(model, LoraConfig(r=2, target_modules=["w"], lora_dropout=0.5))
        laws.require_unchanged(model, before, "a refused adaptation")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["w"]))
        assert (COUNT, SEEN) == (0, [])
        laws.require_equal([adapted(X), adapted(X)], expected, "the adapted model")


# identity


def changed_by_a_method(x):
    y = x.clone()
    return x * 2 if y.add_(1) is y and x.add_(1) is x else x * 3


def changed_by_a_function(x):
    y = x * 1
    return x * 2 if F.relu_(y) is y and F.relu(y, inplace=True) is y and torch.add(y, 1, out=y) is y else x * 3


def changed_by_an_operator(x):
    y = z = x * 1
    y += 1
    return x * 2 if y is z else x * 3


def of_the_same_dtype(x):
    return x * 2 if x.to(torch.float32) is x and x.contiguous() is x else x * 3


def of_a_tuple(x):
    parts = x.unbind(1)
    return x * 2 if parts[0] is parts[0] and parts[0] is not parts[1] else x * 3


def new(x):
    y = x * 1
    return x * 2 if y.mul(2) is y or y.detach() is y else x * 3


@pytest.mark.parametrize(
    "code", [changed_by_a_method, changed_by_a_function, changed_by_an_operator, of_the_same_dtype, of_a_tuple, new]
)
def test_what_returns_its_argument_returns_the_same_object(code):
    model = module_of(lambda self, x: code(x))
    traced = trace(nn.Sequential(model), (X,))
    assert torch.equal(traced(X.clone()), model(X.clone()))


def test_whether_a_call_returns_its_argument_is_checked():
    model = module_of(lambda self, x: of_the_same_dtype(x))
    traced: Any = trace(nn.Sequential(model), (X,))
    with pytest.raises(GuardError, match="contiguous"):
        traced(X.mT.contiguous().mT)


def test_what_is_written_in_place_by_a_module_that_stays_a_call_after_all_is_forgotten():
    def forward(self, x):
        x.add_(1)
        return x * 2 if x.sum() > 0 else x

    model = module_of(lambda self, x: self.inner(x) + x, inner=module_of(forward))
    traced: Any = trace(model, (X,))
    assert list(traced.kept) == ["inner"]
    assert torch.equal(traced(X.clone()), model(X.clone()))
