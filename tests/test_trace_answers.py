"""What code asks of traced values is answered as in the model, or the module that asks stays a call."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphpeft import GuardError, TraceError, trace

pytestmark = pytest.mark.quick("tracing")

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def module_of(forward: Any) -> Any:
    """Returns a module with this forward."""
    return type("Made", (nn.Module,), {"forward": forward})()


def assert_answers_as(model: nn.Module, *inputs: Any, others: tuple[Any, ...]) -> None:
    """Asserts that the model's graph gives what the model gives, and refuses inputs that it would take otherwise."""
    traced: Any = trace(model, inputs)
    assert not traced.kept
    assert torch.equal(traced(*inputs), model(*inputs))
    with pytest.raises(GuardError):
        traced(*others)


# the class of a value


def by_type(self, x):
    return x * 2 if type(x) is torch.Tensor else x


def by_type_of_a_variable(self, x):
    kind = type(x + 1)
    return x * 2 if kind is torch.Tensor else x


def doubled_by_type(value):
    return value * 2 if type(value) is torch.Tensor else value


def by_type_in_a_function(self, x):
    return doubled_by_type(x)


def by_class(self, x):
    return x * 2 if x.__class__ is torch.Tensor else x


def by_match(self, x):
    match x:
        case torch.Tensor():
            return x * 2
    return x


def by_match_of_a_shape(self, x):
    match x.shape:
        case (_, 5, _):
            return x * 2
    return x


@pytest.mark.parametrize(
    ("forward", "question"),
    [
        (by_type, r"type\(x\)"),
        (by_type_of_a_variable, r"type\(x \+ 1\)"),
        (by_type_in_a_function, r"type\(value\)"),
        (by_class, r"x.__class__"),
        (by_match, "match x"),
        (by_match_of_a_shape, "match x.shape"),
    ],
)
def test_a_question_for_the_class_of_a_value_keeps_the_module_a_call(forward, question):
    model = nn.Sequential(module_of(forward))
    traced: Any = trace(model, (X,))
    assert traced.kept.keys() == {"0"}
    assert torch.equal(traced(X), 2 * X)
    with pytest.raises(TraceError, match=f"asks for the class of a value by `{question}`.*isinstance"):
        trace(model[0], (X,))


def all_of(self, x):
    for function in self.functions.values():
        x = function(x)
    return x


def halved_by_match(value):
    match value:
        case torch.Tensor():
            return value / 2
    return value


@pytest.mark.parametrize(
    ("function", "question"),
    [
        (doubled_by_type, r"type\(value\)"),
        (functools.partial(lambda factor, value: factor * value if type(value) is torch.Tensor else value, 2), "type"),
        (lambda value: 4 * halved_by_match(value), "match value"),
    ],
    ids=["in a container", "partial", "in what that calls"],
)
def test_so_does_one_in_a_function_that_the_module_holds(function, question):
    model: Any = nn.Sequential(module_of(all_of))
    model[0].functions = {"first": function}
    traced: Any = trace(model, (X,))
    assert traced.kept.keys() == {"0"}
    assert torch.equal(traced(X), 2 * X)
    with pytest.raises(TraceError, match=f"asks for the class of a value by `{question}"):
        trace(model[0], (X,))


def test_so_does_one_in_a_hook():
    model = nn.Sequential(nn.Sequential(nn.Tanh()))
    model[0].register_forward_hook(lambda module, args, output: doubled_by_type(output))
    traced: Any = trace(model, (X,))
    assert traced.kept.keys() == {"0"}
    assert torch.equal(traced(X), model(X))


def test_the_class_of_what_a_module_holds_or_of_what_a_message_tells_is_no_question():
    def forward(self, x):
        if x.ndim != 3:
            raise ValueError(f"three dimensions, not those of a {type(x)}")
        for layer in self.children():
            x = layer(x) if type(layer) is nn.Linear else x
        match x.ndim:
            case 3:
                return x + len(type(self).__name__)
        return x

    model = module_of(forward)
    model.layer = nn.Linear(8, 8)
    traced: Any = trace(nn.Sequential(model), (X,))
    assert not traced.kept
    assert torch.equal(traced(X), model(X))


# which object a value is


class Kind(enum.Enum):
    DOUBLED = 1
    PLAIN = 2


def test_a_member_of_an_enum_is_told_by_identity():
    def by_argument(self, x, kind):
        return x * 2 if kind is Kind.DOUBLED else x

    def by_item(self, x, options):
        return x * {Kind.DOUBLED: 2, Kind.PLAIN: 1}[options["kind"]]

    assert_answers_as(module_of(by_argument), X, Kind.DOUBLED, others=(X, Kind.PLAIN))
    assert_answers_as(module_of(by_item), X, {"kind": Kind.DOUBLED}, others=(X, {"kind": Kind.PLAIN}))


@pytest.mark.parametrize(
    ("one", "other"),
    [(True, False), (torch.float64, torch.float32), (torch.relu, torch.tanh)],
    ids=["flag", "dtype", "function"],
)
def test_an_argument_for_which_code_asks_by_identity_is_a_decision(one, other):
    def by_argument(self, x, given):
        return x * 2 if given is one else x

    def by_item(self, x, options):
        return x * 2 if options[0] is one else x

    assert_answers_as(module_of(by_argument), X, one, others=(X, other))
    assert_answers_as(module_of(by_item), X, [one], others=(X, [other]))


def test_whether_two_arguments_are_one_tensor_is_a_decision():
    def forward(self, query, key):
        return query * 2 if key is query else query + key

    assert_answers_as(module_of(forward), X, X, others=(X, X.clone()))
    assert_answers_as(module_of(forward), X, X.clone(), others=(X, X))


class _Asks(nn.Module):
    def forward(self, query, key):
        return query * 2 if key is query else query + key


class _Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = _Asks()

    def forward(self, query, key):
        return self.inner(query, key)


def _product(query, key):
    return query * 2 if key is query else query + key


class _AsksInFunction(nn.Module):
    def forward(self, query, key):
        return _product(query, key)


@pytest.mark.parametrize("model", [_Asks(), _Around(), _AsksInFunction()], ids=["itself", "inside", "in a function"])
def test_a_module_may_ask_whether_arguments_of_the_model_are_one_tensor(model):
    assert_answers_as(model, X, X, others=(X, X.clone()))
    assert_answers_as(model, X, X.clone(), others=(X, X))
    traced: Any = trace(model)
    assert torch.equal(traced(X, 2 * X), model(X, 2 * X))
    with pytest.raises(GuardError, match="whether the argument 'key' is 'query'"):
        traced(X, X)


def _asked_in_a_function(x, given, one):
    return x * 2 if given is one else x


@pytest.mark.parametrize(
    ("one", "other"), [(float("inf"), 2.0), (float("nan"), 2.0), ([1, 2], [3]), ((1.5, 2), (3,))], ids=repr
)
@pytest.mark.parametrize("where", ["forward", "function", "module"])
def test_an_object_that_code_names_is_told_by_identity(one, other, where):
    def forward(self, x, given=one):
        return x * 2 if given is one else x

    def by_function(self, x, given=one):
        return _asked_in_a_function(x, given, one)

    def by_module(self, x, given=one):
        return self.inner(x, given)

    model = module_of({"forward": forward, "function": by_function, "module": by_module}[where])
    model.inner = module_of(forward) if where == "module" else None
    assert_answers_as(model, X, one, others=(X, other))
    assert_answers_as(model, X, other, others=(X, one))
    for traced in (trace(model), trace(model, (X,))):
        assert torch.equal(traced(X), model(X))
        with pytest.raises(GuardError):
            traced(X, other)


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor
    bias: torch.Tensor | None = None


def test_an_attribute_of_an_argument_that_is_absent_in_a_later_call_is_noticed():
    def forward(self, inputs):
        return torch.nn.functional.linear(inputs.x, self.weight, inputs.bias)

    model = module_of(forward)
    model.weight = nn.Parameter(torch.ones(8, 8))
    assert_answers_as(model, Inputs(X, torch.ones(8)), others=(Inputs(X),))


# errors that code catches


def test_code_that_goes_on_after_an_error_keeps_the_module_a_call():
    def by_size(self, x):
        try:
            return x.view(4, -1) * 2
        except RuntimeError:
            return x.flatten()

    def by_key(self, x):
        try:
            return x + self.offsets[x.dtype]
        except KeyError:
            return x.flatten()

    for forward in (by_size, by_key):
        model = module_of(forward)
        model.offsets = {}
        traced: Any = trace(nn.Sequential(model), (torch.ones(3, 3),))
        for inputs in (torch.ones(3, 3), torch.ones(4, 2)):
            assert torch.equal(traced(inputs), model(inputs))


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_code_that_catches_what_a_trace_refuses_keeps_the_module_a_call(caught):
    def by_try(self, x):
        try:
            return x * x.sum().item()
        except caught:
            return x

    def by_suppression(self, x):
        with contextlib.suppress(caught):
            x = x * x.sum().item()
        return x

    for forward in (by_try, by_suppression):
        model = nn.Sequential(module_of(forward))
        traced: Any = trace(model, (X,))
        assert "depends on the values of a tensor" in traced.kept["0"]
        assert torch.equal(traced(X), model(X))
        with pytest.raises(TraceError, match=r"goes on after an error of `.*x.sum\(\).item\(\)"):
            trace(model[0], (X,))


def test_code_that_catches_everything_around_a_module_that_changes_is_a_call():
    def changing(self, x):
        self.calls += 1
        return x * float(x.sum())

    def around(self, x):
        try:
            return self.inner(x)
        except BaseException:
            return x

    def model() -> Any:
        outer = module_of(around)
        outer.inner = module_of(changing)
        outer.inner.calls = 0
        return nn.Sequential(outer)

    traced: Any = trace(model(), (X,))
    assert torch.equal(traced(X), model()(X))


def test_an_error_of_a_module_that_stays_a_call_is_none_of_what_is_around_it():
    def failing(self, x):
        return x * x.sum().item()

    def around(self, x):
        return self.inner(x) + 1

    model = module_of(around)
    model.inner = module_of(failing)
    traced: Any = trace(model, (X,))
    assert traced.kept.keys() == {"inner"}


def test_an_error_of_the_model_itself_names_the_line_of_its_code():
    def failing(self, x):
        return torch.vmap(self.layer)(x)

    model = module_of(failing)
    model.layer = nn.Linear(8, 8)
    with pytest.raises(TraceError, match=r"Made's forward fails at `return torch.vmap\(self.layer\)\(x\)`"):
        trace(model, (X,))


def test_what_a_mode_without_a_graph_would_keep_is_not_reported():
    def deciding(self, x):
        return x * 2 if self.training and x.sum() > 0 else x

    def around(self, x):
        x = self.inner(x)
        return x * x.sum().item() if self.training else x

    model = module_of(around)
    model.inner = module_of(deciding)
    traced: Any = trace(model.eval(), (X,))
    assert traced.other_mode_error is not None
    assert not traced.kept


def test_example_inputs_that_do_not_fit_the_forward_are_refused():
    with pytest.raises(TraceError, match="example_inputs don't fit Linear's forward: too many positional arguments"):
        trace(nn.Linear(8, 8), (X, X))


# what may be there in one call and not in another


def test_what_a_module_that_stays_a_call_returns_must_be_there():
    def returning(self, x):
        return (x.sign(), x) if (x > 0).any() else None

    def returning_parts(self, x):
        return (x, x.sign() if (x > 0).any() else None)

    def around(self, x):
        result = self.inner(x)
        return x if result is None else result[0]

    def around_parts(self, x):
        x, bias = self.inner(x)
        return torch.nn.functional.linear(x, torch.eye(8), bias)

    for outer, inner in ((around, returning), (around_parts, returning_parts)):
        model = module_of(outer)
        model.inner = module_of(inner)
        inputs = torch.ones(8)
        traced: Any = trace(model, (inputs,))
        assert torch.equal(traced(inputs), model(inputs))
        with pytest.raises(GuardError, match="that is None now"):
            traced(-inputs)


def test_whether_a_parameter_is_trained_is_a_decision():
    def forward(self, x):
        return x * self.scale if self.scale.requires_grad else x

    model = module_of(forward)
    model.scale = nn.Parameter(torch.full((8,), 2.0))
    traced: Any = trace(model, (X,))
    assert torch.equal(traced(X), 2 * X)
    model.scale.requires_grad_(False)
    with pytest.raises(GuardError, match="requires_grad"):
        traced(X)


# random numbers


def seeded(self, x):
    torch.manual_seed(0)
    return x + torch.rand(8)


def with_its_state_kept(self, x):
    with torch.random.fork_rng():
        return x + torch.rand(8)


@pytest.mark.parametrize("forward", [seeded, with_its_state_kept])
def test_a_forward_that_sets_the_state_of_random_numbers_stays_a_call(forward):
    model = nn.Sequential(module_of(forward), nn.Dropout())
    state = torch.get_rng_state()
    traced: Any = trace(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert "sets the state of random numbers" in traced.kept["0"]
    torch.manual_seed(1)
    expected = model(X)
    torch.manual_seed(1)
    assert torch.equal(traced(X), expected)


def test_a_generator_of_random_numbers_keeps_the_module_a_call():
    def forward(self, x):
        return x + torch.rand(8, generator=torch.Generator().manual_seed(0))

    model = nn.Sequential(module_of(forward))
    traced: Any = trace(model, (X,))
    assert "torch.Generator" in traced.kept["0"]
    assert torch.equal(traced(X), model(X))


# values that leave the graph


def test_numpy_computes_with_numbers_and_shapes():
    def forward(self, x):
        return x * float(np.sqrt(x.shape[0])) * int(np.prod(x.shape))

    assert_answers_as(module_of(forward), X, others=(torch.ones(3, 5, 8),))


def test_an_array_of_a_tensor_keeps_the_module_a_call():
    def forward(self, x):
        return x * float(np.asarray(x).sum())

    model = nn.Sequential(module_of(forward))
    traced: Any = trace(model, (X,))
    assert "gives a traced value to NumPy" in traced.kept["0"]
    assert torch.equal(traced(X), model(X))


def test_a_size_may_be_a_key_of_what_a_forward_returns():
    def forward(self, x):
        return {x.shape[1]: x * 2}

    traced: Any = trace(module_of(forward), (X,))
    assert torch.equal(traced(X)[5], X * 2)
    with pytest.raises(GuardError):
        traced(torch.ones(2, 6, 8))


def test_a_generator_that_a_forward_returns_is_refused():
    def forward(self, x):
        yield x * 2

    with pytest.raises(TraceError, match="a generator goes through the graph"):
        trace(module_of(forward), (X,))


def test_a_call_that_is_more_than_the_forward_is_refused_and_recorded_inside():
    class Calling(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Calling(8, 8)
    with pytest.raises(TraceError, match="Calling has a __call__ of its own"):
        trace(model, (X,))
    around = nn.Sequential(model)
    assert torch.equal(trace(around, (X,))(X), around(X))


def test_an_attention_without_weights_gives_none_for_them_without_gradients_too():
    def forward(self, x):
        with torch.no_grad():
            y, weights = self.attention(x, x, x, need_weights=False)
        return y if weights is None else 100 * y

    model: Any = module_of(forward)
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model.eval()
    x = torch.randn(2, 5, 8)
    assert torch.allclose(trace(model, (x,))(x), model(x), atol=1e-6)
