"""A graph follows the numbers that modules hold, and checks all else that code has read from them; never ignores it."""

from __future__ import annotations

import copy
import enum
import functools
import pickle
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import GuardError, LoraConfig, TraceError, explain, get_peft_model, trace
from graphpeft.graph import ops
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("tracing")

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
FACTOR = 2.5


class Scaled(nn.Module):
    """Computes with a number, and decides on a flag."""

    heads = 2

    def __init__(self, scale: float = 1.0, use: bool = True):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.scale, self.use, self.kind, self.bound = scale, use, "plain", None
        self.options = {"shift": 3}

    def forward(self, x):
        y = F.linear(x, self.w).view(*x.shape[:-1], self.heads, -1).flatten(-2) * self.scale
        if self.bound is not None:
            y = y.clamp(max=self.bound)
        y = y + self.options["shift"] if self.kind == "plain" else y
        return y if self.use else -y


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(1.0), Scaled(0.5)).eval()


def traced_two() -> Any:
    return trace(two(), (X,))


# what is followed


def test_a_number_of_a_module_is_read_in_each_run():
    traced, model = traced_two(), cast(Any, two())
    model[0].scale = traced.get_submodule("0").scale = 5.0
    model[1].scale = traced.get_submodule("1").scale = -3
    assert torch.equal(traced(X), model(X))


def test_two_modules_of_a_class_have_each_their_own_number():
    traced = traced_two()
    assert (traced.get_submodule("0").scale, traced.get_submodule("1").scale) == (1.0, 0.5)
    assert torch.equal(traced(X), two()(X))


@pytest.mark.parametrize("value", [torch.tensor(2.0), nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))])
def test_a_number_may_become_a_tensor(value):
    traced, model = traced_two(), two()
    model[1].scale = value
    traced.get_submodule("1").scale = value
    assert torch.equal(traced(X), model(X))


def test_a_whole_number_that_is_a_factor_is_followed_too():
    model: Any = nn.Sequential(Scaled(3))
    traced: Any = trace(model, (X,))
    model[0].scale = traced.get_submodule("0").scale = 0.5
    assert torch.equal(traced(X), model(X))


def test_numbers_computed_from_numbers_are_followed():
    class Inverse(nn.Module):
        rate, power = 4.0, 0.5

        def forward(self, x):
            return x * (1 / self.rate**self.power)

    model = Inverse()
    traced: Any = trace(model, (X,))
    model.rate = traced.rate = 9.0
    assert torch.equal(traced(X), model(X))


def test_a_number_behind_a_property_is_followed():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = 4.0

        @property
        def halved(self):
            return self.whole / 2

        def forward(self, x):
            return x * self.halved

    model = Halved()
    traced: Any = trace(model, (X,))
    model.whole = traced.whole = 10.0
    assert torch.equal(traced(X), model(X))


# what is checked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use", False),
        ("kind", "other"),
        ("bound", 1.0),
        ("heads", 4),
        ("scale", None),
        ("options", {"shift": 4}),
        ("missing", 1),
    ],
)
def test_another_answer_than_that_of_the_trace_raises(name, value):
    class Asking(Scaled):
        def forward(self, x):
            return super().forward(x) if getattr(self, "missing", None) is None else x

    torch.manual_seed(0)
    model = nn.Sequential(Asking(), Asking())
    traced: Any = trace(model, (X,))
    assert torch.equal(traced(X), model(X))
    setattr(traced.get_submodule("1"), name, value)
    with pytest.raises(GuardError, match=rf"1\.{name}\b"):
        traced(X)


class Shifted(Scaled):
    def forward(self, x):
        x = super().forward(x)
        return x + cast(Any, self).shift if hasattr(self, "shift") else x


@pytest.mark.parametrize("kind", ["number", "parameter", "buffer"])
def test_an_attribute_that_code_has_looked_for_and_that_is_set_later_raises(kind):
    traced: Any = trace(nn.Sequential(Shifted()), (X,))
    traced(X)
    place = traced.get_submodule("0")
    if kind == "buffer":
        place.register_buffer("shift", torch.ones(4))
    else:
        place.shift = 1.0 if kind == "number" else nn.Parameter(torch.ones(4))
    with pytest.raises(GuardError, match=r"0\.shift is set"):
        traced(X)


def test_the_error_names_the_line_and_both_values():
    traced = traced_two()
    traced.get_submodule("1").use = False
    with pytest.raises(
        GuardError, match=r"1\.use in `return y if self\.use else -y` \(test_trace_reads\.py:\d+\).*True .*False"
    ):
        traced(X)
    traced.get_submodule("1").use = True
    assert torch.equal(traced(X), two()(X))


def test_a_decision_on_a_number_makes_it_a_setting():
    class Dropped(nn.Module):
        p = 0.0

        def forward(self, x):
            return x if self.p == 0.0 else x * (1 - self.p)

    traced: Any = trace(Dropped(), (X,))
    traced.p = 0.5
    with pytest.raises(GuardError, match=r"self\.p == 0\.0"):
        traced(X)


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@pytest.mark.parametrize(
    ("value", "other"),
    [((2, 2), (4, 1)), (Mode.FAST, Mode.SLOW), (torch.float64, torch.float32), (torch.device("cpu"), "meta"), (3j, 1j)],
    ids=str,
)
def test_other_plain_values_are_checked(value, other):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = value

        def forward(self, x):
            return x * len(str(self.held))

    traced: Any = trace(nn.Sequential(Holding()), (X,))
    traced(X)
    traced.get_submodule("0").held = other
    with pytest.raises(GuardError, match=r"0\.held"):
        traced(X)


def test_a_read_only_in_training_is_checked_in_training_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.kind = "shifted"

        def forward(self, x):
            if self.training and self.kind == "shifted":
                x = x + 1
            return x

    model = nn.Sequential(Noisy()).eval()
    traced: Any = trace(model, (X,))
    traced.get_submodule("0").kind = "other"
    assert torch.equal(traced(X), X)
    with pytest.raises(GuardError, match=r"0\.kind"):
        traced.train()(X)


def test_what_the_forward_sets_itself_is_no_setting():
    class Setting(nn.Module):
        def forward(self, x):
            self.steps = 2
            return x * self.steps

    traced: Any = trace(nn.Sequential(Setting()), (X,))
    assert traced.kept == {}
    assert torch.equal(traced(X), 2 * X)


def test_a_module_that_stays_a_call_reads_its_own_attributes():
    class Deciding(Scaled):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    model = nn.Sequential(Deciding(), Scaled())
    traced: Any = trace(model, (X,))
    assert list(traced.kept) == ["0"]
    each: Any
    for each in (model, traced):
        each.get_submodule("0").use, each.get_submodule("0").scale = False, 3.0
    assert torch.equal(traced(X), model(X))


def test_a_number_of_a_layer_is_followed():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.25)

        def forward(self, x):
            return self.dropout(x) * (1 - self.dropout.p)

    model: Any = nn.Sequential(Around()).eval()
    traced: Any = trace(model, (X,))
    model[0].dropout.p = traced.get_submodule("0.dropout").p = 0.75
    assert torch.equal(traced(X), model(X))


def test_a_name_that_a_traced_model_needs_itself_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = 0.5

        def forward(self, x):
            return x * self.kept

    with pytest.raises(TraceError, match="kept; rename"):
        trace(Named(), (X,))


# the report


def test_the_report_tells_what_is_followed_what_is_checked_and_what_is_frozen():
    shift = 0.25

    class Reading(Scaled):
        def forward(self, x):
            return super().forward(x) * FACTOR + shift

    report: Any = trace(nn.Sequential(Reading(), Reading()), (X,)).report
    assert report.numbers == ("0.scale", "1.scale")
    assert report.settings["1.use"] is True
    assert report.settings["0.heads"] == 2
    text = str(report)
    assert "0.scale and 1 more of this name" in text
    assert "0.kind and 1 more of this name: 'plain'" in text
    assert "0.options (dict)" in text
    assert f"the global FACTOR of {__name__} (2.5)" in text
    assert "the variable shift around" in text
    assert "torch" not in text.partition("frozen")[2]


def test_attributes_that_are_read_from_the_dictionary_of_a_module_are_told():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 2.0

        def forward(self, x):
            return x * vars(self)["scale"]

    assert "0.__dict__ (dict)" in str(trace(nn.Sequential(Reading()), (X,)).report)
    assert "__dict__" not in str(traced_two().report)


# what is done with the result


def changed(traced: Any) -> Any:
    traced.get_submodule("0").scale = 5.0
    return traced


def expected_of_changed() -> torch.Tensor:
    model: Any = two()
    model[0].scale = 5.0
    return model(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda traced: pickle.loads(pickle.dumps(traced))])
def test_copies_have_attributes_of_their_own(copied):
    traced = traced_two()
    other = copied(traced)
    assert torch.equal(changed(other)(X), expected_of_changed())
    other.get_submodule("1").use = False
    with pytest.raises(GuardError):
        other(X)
    assert torch.equal(traced(X), two()(X))


def test_a_compiled_trace_follows_and_checks():
    traced = traced_two()
    compiled: Any = torch.compile(traced, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), traced(X))
    changed(traced)
    assert torch.equal(compiled(X), expected_of_changed())
    traced.get_submodule("1").use = False
    with pytest.raises(Exception, match=r"1\.use"):
        compiled(X)


def test_a_trace_is_exported():
    program = torch.export.export(changed(traced_two()), (X,))
    torch.testing.assert_close(program.module()(X), expected_of_changed())


def test_a_trace_of_a_trace_follows_and_checks():
    again: Any = trace(nn.Sequential(traced_two()), (X,))
    again.get_submodule("0.0").scale = 5.0
    assert torch.equal(again(X), expected_of_changed())
    again.get_submodule("0.1").use = False
    with pytest.raises(GuardError, match=r"0\.1\.use"):
        again(X)


def test_an_adapted_trace_follows_and_checks():
    config = LoraConfig(target_parameters=["0.w", "1.w"], r=2, lora_alpha=6, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(two(), config)
    torch.manual_seed(1)
    traced = get_peft_model(traced_two(), config)
    laws.require_close(traced(X), model(X), 1e-6, "the adapted trace")
    for each in (model, traced):
        each.get_submodule("0").scale = 5.0
    laws.require_close(traced(X), model(X), 1e-6, "the adapted trace")
    traced.get_submodule("1").use = False
    with pytest.raises(GuardError, match=r"1\.use"):
        traced(X)


def test_a_layer_whose_options_are_numbers_is_adapted_in_a_trace():
    class ScaledEmbedding(nn.Embedding):
        def __init__(self):
            super().__init__(6, 4)
            self.scale = 3.0

        def forward(self, input):
            return super().forward(input) * self.scale

    def build():
        torch.manual_seed(0)
        return nn.Sequential(ScaledEmbedding())

    ids = torch.tensor([[1, 5, 2]])
    config = LoraConfig(target_modules=["0"], r=2, lora_alpha=6, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(build(), config)
    torch.manual_seed(1)
    traced: Any = get_peft_model(trace(build(), (ids,)), config)
    model[0].scale = traced.get_submodule("0").scale = 0.5
    laws.require_close(traced(ids), model(ids), 1e-6, "the adapted trace")


def test_a_trace_of_an_adapted_model_follows_the_scale_of_the_adapter():
    config = LoraConfig(target_modules=["0"], r=2, lora_alpha=6, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    traced: Any = trace(model, (X,))
    (path,) = [path for path in traced.report.numbers if "scal" in path]
    owner, _, name = path.rpartition(".")
    for each in (model, traced):
        setattr(each.get_submodule(owner), name, 7.0)
    laws.require_close(traced(X), model(X), 1e-6, "the traced model")


# what is of a class, and modules in the places of others


class WithDefaults(nn.Module):
    """Has a number and a flag of its class."""

    scale, is_on = 1.5, True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * self.scale if self.is_on else x


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_is_of_a_class_is_read_from_the_class(copied, monkeypatch):
    model: Any = nn.Sequential(WithDefaults(), WithDefaults())
    traced = copied(trace(model, (X,)))
    monkeypatch.setattr(WithDefaults, "scale", -4.0)
    assert torch.equal(traced(X), model(X))
    model[1].scale = traced.get_submodule("1").scale = 3.0
    assert torch.equal(traced(X), model(X))
    monkeypatch.setattr(WithDefaults, "is_on", False)
    with pytest.raises(GuardError, match=r"0\.is_on in "):
        traced(X)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_another_module_in_the_place_of_one_is_read_with_its_numbers_and_flags(copied):
    model: Any = nn.Sequential(WithDefaults(), WithDefaults())
    model[0].is_on = model[1].is_on = True
    traced = copied(trace(model, (X,)))
    for put in (lambda other: setattr(traced, "1", other), lambda other: traced.add_module("1", other)):
        other: Any = WithDefaults()
        model[1] = other
        other.scale = -2.0
        put(other)
        assert torch.equal(traced(X), model(X))
    other.is_on = False
    for _ in range(2):
        with pytest.raises(GuardError, match=r"1\.is_on in "):
            traced(X)
    other.is_on = True
    assert torch.equal(traced(X), model(X))
    delattr(traced, "1")
    with pytest.raises(GuardError, match="the module 1 is gone, whose"):
        traced(X)


# numbers of which little is computed, or that are none


class ReadInVain(nn.Module):
    """Reads numbers of which its output doesn't depend."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.linear, self.eps, self.count = nn.Linear(4, 4), eps, 3

    def forward(self, x):
        eps, _ = self.eps, self.count
        assert eps is not None
        return self.linear(x)


@pytest.mark.parametrize("eps", [1e-5, float("nan"), float("inf"), -0.0])
def test_a_number_of_which_nothing_is_computed_is_of_no_account(eps):
    model: Any = nn.Sequential(ReadInVain(eps), ReadInVain())
    traced = trace(model, (X,), strict=True)
    model[0].eps = 7.0
    assert torch.equal(traced(X), model(X))


class WithLimit(nn.Module):
    """Has a limit if that is a number."""

    def __init__(self):
        super().__init__()
        self.w, self.limit = nn.Parameter(torch.randn(4, 4)), float("nan")

    def forward(self, x):
        return F.linear(x, self.w) if self.limit != self.limit else F.linear(x, self.w).clamp(max=self.limit)


def test_a_float_that_is_no_number_is_the_same_as_another_such():
    model: Any = WithLimit()
    x, expected = X, model(X)
    traced: Any = trace(model, (x,))
    get_peft_model(model, LoraConfig(r=2, target_modules=["w"]))
    for module in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), traced):
        module.limit = -float("nan")
        assert torch.equal(module(x), expected)
        module.limit = 0.5
        with pytest.raises(GuardError, match="limit"):
            module(x)


# arguments that a call can do without


class WithOptions(nn.Module):
    """Computes with arguments that have defaults of many kinds."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    # a default that can change is one of the cases
    def forward(self, x, scale=2.0, sizes=(1, 2), dtype=torch.float32, table={"k": 3}, *, times=2, phase=1.0):  # noqa: B006
        y = F.linear(x, self.w) * scale + sizes[0] / sizes[1]
        return y.to(dtype) * table["k"] ** times + phase


OTHERS = {
    "scale": 0.5,
    "sizes": (3, 2),
    "dtype": torch.float64,
    "table": {"k": 5},
    "times": 3,
    "phase": -1.0,
}


def given_example(name):
    return {"x": X, name: OTHERS[name]}


@pytest.mark.parametrize("name", OTHERS)
def test_another_argument_than_the_default_of_the_trace_is_refused_or_followed(name):
    model = WithOptions()
    base, other = model(X), model(X, **{name: OTHERS[name]})
    assert not torch.equal(other.to(base.dtype), base)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["w"]))
    by_example, without = [trace(model, (X,))], [trace(model), adapted]
    is_number = isinstance(OTHERS[name], float)
    for graph in (*by_example, *without):
        assert torch.equal(graph(X), base)
    for graph in by_example if is_number else (*by_example, *without):
        with pytest.raises(GuardError, match=f"the argument '{name}'"):
            graph(X, **{name: OTHERS[name]})
    # no example says that such a number is left out in each call
    for graph in without if is_number else ():
        assert torch.equal(graph(X, **{name: OTHERS[name]}), other)
    with_example = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["w"]), example_inputs=given_example(name)
    )
    for graph in (trace(model, given_example(name)), with_example):
        assert torch.equal(graph(X, **{name: OTHERS[name]}), other)


def test_a_tensor_in_the_place_of_a_default_is_refused():
    graph: Any = trace(WithOptions(), (X,))
    with pytest.raises(GuardError, match="the argument 'scale'"):
        graph(X, torch.tensor([0.5, 1.0, 1.5, 2.0]))


def decides(x, w, scale=2.0):
    return F.linear(x, w) if scale > 1 else F.linear(x, w) * scale


class Deciding(nn.Module):
    """Decides on a number that has a default."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, scale=2.0):
        return decides(x, self.w, scale)


def test_a_decision_on_a_number_that_was_left_out_is_checked():
    model = Deciding()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["w"]))
    assert torch.equal(adapted(X, 3.0), model(X, 3.0))
    with pytest.raises(GuardError, match="scale > 1"):
        adapted(X, 0.5)


class AskingAttributes(nn.Module):
    """Asks what a number that has a default is, by an attribute that tensors have."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, scale=2.0):
        y = F.linear(x, self.w) * scale
        return y + 100 if hasattr(scale, "dim") else y


def test_a_tensor_in_the_place_of_a_number_that_was_left_out_is_refused():
    model = AskingAttributes()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["w"]))
    for scale in (3.0, 3):
        assert torch.equal(adapted(X, scale), model(X, scale))
    with pytest.raises(GuardError, match=r"the argument 'scale': that is a tensor .*and was a number"):
        adapted(X, torch.tensor(3.0))


def doubling(forward):
    """Doubles what a call without the keyword `scale` returns."""

    @functools.wraps(forward)
    def decorated(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * (1 if "scale" in kwargs else 2)

    return decorated


class Decorated(Deciding):
    """Tells a number that is given from one that is left out."""

    forward = doubling(Deciding.forward)


def given_twice(module, args, kwargs, output):
    return output * (1 if "scale" in kwargs else 2)


def test_a_number_that_was_left_out_stays_so_where_code_could_tell_the_difference():
    hooked = Deciding()
    hooked.register_forward_hook(given_twice, with_kwargs=True)
    for model, make in ((Decorated(), trace), (Decorated(), adapted_at_w), (hooked, trace)):
        made = make(copy.deepcopy(model))
        assert torch.equal(made(X), model(X))
        with pytest.raises(GuardError, match="the argument 'scale'"):
            made(X, scale=3.0)


class Strided(nn.Module):
    """Convolves with a stride that has a default."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 3))

    def forward(self, x, stride=1):
        return F.conv1d(x, self.w, stride=stride)


def test_a_whole_number_that_was_left_out_is_known_to_what_it_is_given_to():
    [row] = explain(Strided(), LoraConfig(r=2, target_modules=["w"])).adapted
    assert row.site.op is ops.Convolution
    assert row.site.fixed == ("stride=1",)


def test_explain_names_the_arguments_that_have_one_value_alone():
    config = LoraConfig(r=2, target_modules=["w"])
    report = explain(WithOptions(), config)
    [row] = report.adapted
    assert row.site.fixed == ("sizes=(1, 2)", "dtype=torch.float32", "table={'k': 3}", "times=2")
    assert "the model  sizes=(1, 2), dtype=torch.float32, table={'k': 3}, times=2" in str(report)
    assert "give example_inputs that pass it" in str(report)
    given = explain(WithOptions(), config, example_inputs=(X, 2.0, (3, 2)))
    assert given.adapted[0].site.fixed == (*row.site.fixed[1:], "phase=1.0")
    report = explain(Deciding(), config)
    assert report.adapted[0].site.fixed == ()
    assert "give example_inputs" not in str(report)


def test_explain_names_no_arguments_of_layers_and_of_graphs():
    layer = nn.ConvTranspose1d(4, 4, 3)
    for model, name in ((layer, "weight"), (trace(WithOptions()), "w")):
        config = LoraConfig(r=2, target_modules=None, target_parameters=[name])
        assert explain(nn.Sequential(model), config).adapted[0].site.fixed == ()


def adapted_at_w(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["w"]))


class Upwards(nn.Module):
    """Tells a layer of PyTorch's the size of its output, as U-Nets do."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=[12, 12])


def test_a_layer_is_recorded_as_the_example_inputs_of_the_model_call_it():
    model, x = Upwards(), torch.randn(2, 4, 5, 5)
    base = model(x)
    get_peft_model(model, LoraConfig(r=2, target_modules=["up"]), example_inputs=(x,))
    assert torch.equal(model(x), base)


# questions that a value can't answer which isn't known


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))


class SameObject(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if x.contiguous() is x else 3)


class NeedsNoGradient(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if x.requires_grad is False else 3)


class SameDtype(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if x.dtype is torch.float32 else 3)


class InTable(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * {3: 5.0}.get(x.shape[0], 9.0)


class InText(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if str(x.dtype) == "torch.float32" else 3)


class OfKind(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if isinstance(x.shape, tuple) else 3)


class HasAttribute(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if hasattr(x, "lengths") else 3)


class IsNoView(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if x._base is None else 3)


class HasNoGradient(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if x.grad is None else 3)


@pytest.mark.parametrize(
    "cls", [SameObject, NeedsNoGradient, SameDtype, InTable, InText, OfKind, HasAttribute, HasNoGradient, IsNoView]
)
@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["without inputs", "with inputs"])
def test_a_fresh_adapter_changes_no_answer_of_an_argument(cls, example_inputs):
    model = cls()
    base = model(X)
    get_peft_model(model, LoraConfig(r=2, target_modules=["w"]), example_inputs=example_inputs)
    assert torch.equal(model(X), base)


# whether parameters are the same


class Tied(nn.Module):
    def __init__(self, is_tied):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if is_tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        y = self.second(self.first(x))
        return y * 3 if self.second.weight is self.first.weight else y


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_that_asks_whether_weights_are_tied_gets_the_answer(is_tied):
    model = Tied(is_tied)
    assert torch.equal(trace(model, (X,), strict=True)(X), model(X))


class AmongAll(Asking):
    def forward(self, x):
        return F.linear(x, self.w) * (2 if next(self.parameters()) is self.w else 3)


def test_a_question_which_of_all_parameters_one_is_is_refused():
    with pytest.raises(TraceError, match="compares one of all parameters with others by `is`"):
        trace(AmongAll(), (X,))


def test_a_trace_of_a_whole_trace_follows_and_checks():
    model: Any = nn.Sequential(WithDefaults(), WithDefaults())
    again: Any = trace(trace(model, (X,)), (X,))
    assert torch.equal(again(X), model(X))
    getattr(again, "0").scale = 3.0
    model[0].scale = 3.0
    assert torch.equal(again(X), model(X))
    getattr(again, "0").is_on = False
    with pytest.raises(GuardError, match=r"0\.is_on"):
        again(X)


class Hashed(nn.Module):
    """Has a hash of its own that reads attributes, as metrics of torchmetrics have."""

    def __init__(self) -> None:
        super().__init__()
        self.states = ["a", "b"]

    def __hash__(self) -> int:
        return hash((id(self), *getattr(self, "states", ())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(self.states)


def test_a_module_may_have_a_hash_that_reads_its_attributes() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Hashed()), torch.ones(2, 4)
    traced = trace(model, (x,))
    assert torch.equal(traced(x), model(x))
    assert not traced.kept
