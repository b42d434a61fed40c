"""Methods of a user's own: what the kit says of right and wrong rules, and which sites they can have."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LLAMA
from torch import nn
from transformers import BertConfig, BertModel

import graphpeft.testing
from graphpeft import (
    AdaptError,
    BoundaryRule,
    LoraConfig,
    Mergeable,
    OperationRule,
    ParameterSpec,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    RunsByRow,
    TargetedConfig,
    WeightRule,
    explain,
    feeding,
    get_peft_model,
    get_peft_model_state_dict,
    ops,
    register,
    trace,
)
from graphpeft.testing import LawError, assert_copies_stay_adapted, assert_two_adapters_act_together, laws, verify
from graphpeft.testing.generated_models import targets_of
from graphpeft.testing.strategies import adaptations

X = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)
NOT_WEIGHTS = "what it computes isn't linear"


# right and wrong rules


@dataclass(frozen=True)
class Scale(OperationRule):
    """The output times (1 + a learned number for each feature)."""

    def check(self, site: Any, config: Any) -> str | None:
        return "its features are in another dimension" if site.op is ops.Convolution else None

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"factor": ParameterSpec((site.out_features,), key="factor")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].zero_()

    def rewrite(self, y: Any, factor: Any) -> Any:
        return (y + y * factor).to(y.dtype)

    def unmergeable(self, site: Any) -> str | None:
        return NOT_WEIGHTS


@register
@dataclass(kw_only=True)
class ScaleConfig(TargetedConfig):
    peft_type: ClassVar[str] = "SCALE"
    adapts_leaves: ClassVar[bool] = True

    rule: ClassVar[Any] = Scale()

    @property
    def starts_as_identity(self) -> bool:
        return True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return self.rule if site.name.endswith("guilty") else Scale()


@dataclass(frozen=True)
class ChangesFromTheStart(Scale):
    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].fill_(0.5)


@dataclass(frozen=True)
class LeavesOneUntrained(Scale):
    def rewrite(self, y: Any, factor: Any) -> Any:
        return y + y * factor.detach()


@dataclass(frozen=True)
class SaysAnotherDelta(Scale, Mergeable):
    def rewrite(self, x: Any, y: Any, factor: Any) -> Any:  # type: ignore[override]
        return y + x.sum(-1, keepdim=True) * factor

    def unmergeable(self, site: Any) -> str | None:
        return None

    def delta(self, weight: Any, factor: Any) -> Any:
        return 2 * factor[:, None].expand_as(weight)


DRAWN = itertools.count(1)


@dataclass(frozen=True)
class DrawsAConstant(Scale):
    def constants(self, site: Any, config: Any) -> dict[str, float]:
        return {"number": float(next(DRAWN))}

    def rewrite(self, y: Any, factor: Any, number: Any) -> Any:  # type: ignore[override]
        return y + y * factor * number


@dataclass(frozen=True)
class KnowsOneSpelling(Scale):
    def rewrite(self, y: Any, factor: Any) -> Any:
        # a layer in a flat graph is the call of a module
        return y + y * factor * (2 if y.node.op == "call_module" else 1)


@dataclass(frozen=True)
class ChangesTheModule(Scale):
    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].zero_()
        module.weight.mul_(2)  # type: ignore[operator, union-attr]


@dataclass(frozen=True)
class CallsWhatNoCopyHas(Scale):
    def rewrite(self, y: Any, factor: Any) -> Any:
        def scaled(value: Any, by: Any) -> Any:
            return value + value * by

        return y.tracer.create_proxy("call_function", scaled, (y, factor), {})


@dataclass(frozen=True)
class HasAnotherShape(Scale):
    def rewrite(self, y: Any, factor: Any) -> Any:
        return y @ factor[1:]


@dataclass(frozen=True)
class ForgetsTheAdapterBefore(WeightRule, Scale):
    """Multiplies the module's own weight in the graph, and the weight so far where it is merged."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def rewrite(self, y: Any, plain: Any, factor: Any) -> Any:  # type: ignore[override]
        return (y + plain * factor).to(y.dtype)

    def unmergeable(self, site: Any) -> str | None:
        return None

    def delta(self, weight: Any, factor: Any) -> Any:
        return weight * factor.unsqueeze(1)


WRONG: dict[Any, tuple[Any, str, str]] = {
    ChangesFromTheStart(): (
        laws.assert_fresh_adapter_changes_no_output,
        "a fresh adapter changes the output",
        "add = ",
    ),
    LeavesOneUntrained(): (
        laws.assert_only_the_adapter_is_trained,
        "no gradient, or one of zeros, for guilty.factor: ",
        "detach = ",
    ),
    SaysAnotherDelta(): (laws.assert_adapted_is_base_with_delta, "adapted isn't base with deltas", "sum_1 = "),
    DrawsAConstant(): (laws.assert_saved_is_loaded, "what is loaded for training differs", "mul_1 = "),
    KnowsOneSpelling(): (laws.assert_traced_is_adapted_alike, "the traced model's outputs differ", "mul = "),
    ChangesTheModule(): (laws.assert_dry_runs_change_nothing, "changes the tensor guilty.weight", "mul = "),
    CallsWhatNoCopyHas(): (assert_copies_stay_adapted, "scaled", "scaled = "),
    ForgetsTheAdapterBefore(): (
        assert_two_adapters_act_together,
        "'second' behind 'default': merged differs from active",
        "mul = ",
    ),
    HasAnotherShape(): (laws.assert_only_the_adapter_is_trained, "RuntimeError: size mismatch", "matmul = "),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("first", "guilty", "third"):
        model.add_module(name, nn.Linear(6, 6))
    return model


def config_with(rule: Any, monkeypatch: pytest.MonkeyPatch) -> ScaleConfig:
    monkeypatch.setattr(ScaleConfig, "rule", rule)
    return ScaleConfig(target_modules=["first", "guilty", "third"])


ADAPTERS = [
    laws.assert_fresh_adapter_changes_no_output,
    laws.assert_only_the_adapter_is_trained,
    laws.assert_adapted_is_base_with_delta,
    laws.assert_saved_is_loaded,
    laws.assert_traced_is_adapted_alike,
    laws.assert_dry_runs_change_nothing,
    assert_copies_stay_adapted,
    assert_two_adapters_act_together,
]


@pytest.mark.parametrize("law", ADAPTERS, ids=lambda law: law.__name__)
def test_a_right_rule_passes_every_law(law):
    law(build, ScaleConfig(target_modules=["first", "guilty", "third"]), X)


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: type(rule).__name__)
def test_the_law_that_a_wrong_rule_breaks_names_its_site_and_its_nodes(rule, monkeypatch):
    law, what, line = WRONG[rule]
    with pytest.raises(LawError) as caught:
        law(build, config_with(rule, monkeypatch), X)
    message = str(caught.value)
    assert what in message
    assert f"at the site guilty (Linear, 6 → 6), by {rule!r} of SCALE\nin the graph of guilty:\n" in message
    assert f"\n    {line}" in message
    assert "linear = " in message  # the operation that the rule adapts
    assert "third" not in message


def test_every_law_of_adapters_has_a_wrong_rule():
    assert {law for law, *_ in WRONG.values()} == set(ADAPTERS)


# wrong spellings and traces


class Halved(nn.Module):
    """A linear layer, spelled as the sum of two halves, or as one product."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "transposed":
            return x @ self.w
        return F.linear(x, self.w) if self.spelling == "whole" else torch.softmax(self.w, 0)[0] * x


def halved(spelling: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("guilty", Halved(spelling))
    return model


def test_a_spelling_that_computes_something_else_is_caught_with_its_site() -> None:
    config = LoraConfig(r=2, target_modules=["guilty.w"])
    laws.assert_spellings_are_adapted_alike(lambda: halved("whole"), [lambda: halved("whole")], config, X)
    with pytest.raises(LawError, match=r"(?s)another spelling's outputs differ.*at the site guilty\.w .*matmul = "):
        laws.assert_spellings_are_adapted_alike(lambda: halved("whole"), [lambda: halved("transposed")], config, X)


def test_a_spelling_with_other_sites_is_caught_with_both_reports() -> None:
    config = LoraConfig(r=2, target_modules=r".*\.(w|extra)")

    def other() -> nn.Module:
        model = halved("whole")
        model.add_module("odd", Halved("whole"))
        return model

    with pytest.raises(LawError, match=r"(?s)sites differ: \[\('guilty\.w', \(6, 6\)\)\] and those of.*odd\.w"):
        laws.assert_spellings_are_adapted_alike(lambda: halved("whole"), [other], config, X)


class Layered(nn.Module):
    """Two layers around an activation, with a number that is counted."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = torch.tanh(y) * 2
        self.count.add_(1)
        return self.last(y) + x.shape[0]


def layered() -> nn.Module:
    torch.manual_seed(0)
    return Layered().eval()


def edited(target: str, mend: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """Returns a tracer that changes one node of what it records."""

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        traced: Any = trace(model, *args, **kwargs)
        for graph in traced.graphs:
            [node] = [node for node in graph.nodes if target in (node.target, getattr(node.target, "__name__", ""))]
            mend(graph, node)
        traced.recompile()
        return traced

    return wrong


def computes_something_else(graph: Any, node: Any) -> None:
    node.target = torch.sigmoid


def forgets_a_layer(graph: Any, node: Any) -> None:
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def holds_a_size(graph: Any, node: Any) -> None:
    node.args = (node.args[0], 4)


def stops_the_gradient(graph: Any, node: Any) -> None:
    with graph.inserting_after(node):
        detached = graph.call_method("detach", (node,))
    node.replace_all_uses_with(detached)
    detached.args = (node,)


def leaves_a_trace(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    model.first.was_traced = True  # type: ignore[union-attr]
    return trace(model, *args, **kwargs)


WRONG_TRACES: dict[str, tuple[Any, str, str]] = {
    "another function": (edited("tanh", computes_something_else), "by ", "    tanh = torch.sigmoid(first)"),
    "without a layer": (edited("last", forgets_a_layer), "by ", "    add = "),
    "with the size of the example": (edited("add", holds_a_size), "by ", "    add = last + 4"),
    "that leaves an attribute": (leaves_a_trace, "tracing changes the attributes of first", ""),
}


@pytest.mark.parametrize("wrong", WRONG_TRACES)
def test_a_wrong_trace_is_caught_with_its_nodes(wrong: str) -> None:
    tracer, what, line = WRONG_TRACES[wrong]
    others = (torch.randn(2, 6),)
    laws.assert_traced_is_the_model(layered, X, others)
    with pytest.raises(LawError) as caught:
        laws.assert_traced_is_the_model(layered, X, others, tracer=tracer)
    assert what in str(caught.value)
    assert line in str(caught.value)


WRONG_STEPS: dict[str, tuple[Any, str]] = {
    "another function": (edited("tanh", computes_something_else), "the outputs: by "),
    "without a gradient": (edited("tanh", stops_the_gradient), "the gradients, at ['input 0']: None, not a tensor"),
    "without a buffer": (edited("add_", forgets_a_layer), "the buffers, at ['count']: by 1"),
    "that leaves an attribute": (leaves_a_trace, "tracing changes the attributes of first"),
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_trace_that_leaves_something_else_is_caught_with_what(wrong: str) -> None:
    tracer, what = WRONG_STEPS[wrong]
    laws.assert_traced_trains_as_the_model(layered, X)
    with pytest.raises(LawError, match=re.escape(what)):
        laws.assert_traced_trains_as_the_model(layered, X, tracer=tracer)


LAWS_OF_MODELS = {
    laws.assert_spellings_are_adapted_alike,
    laws.assert_traced_is_the_model,
    laws.assert_traced_trains_as_the_model,
}
"""The laws that what is wrong breaks above, beside `ADAPTERS`."""


def test_every_law_is_broken_by_something_wrong() -> None:
    named = {getattr(graphpeft.testing, name) for name in graphpeft.testing.__all__ if name.startswith("assert_")}
    # those of rewrites are broken in test_verify_rewrite.py
    of_rewrites = {law for law in named if law.__name__.startswith("assert_rewrit")}
    assert named - of_rewrites == {*ADAPTERS, *LAWS_OF_MODELS}


def test_a_rule_that_is_no_value_is_refused_with_the_mend(monkeypatch):
    class Unhashable(Scale):
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(AdaptError, match=r"Unhashable can't be a rule: .* dataclass with frozen=True"):
        explain(build(), config_with(Unhashable(), monkeypatch))


def test_what_no_name_explains_is_refused_when_a_model_is_adapted(monkeypatch):
    class Misspelt(Scale):
        def rewrite(self, y: Any, facotr: Any) -> Any:  # type: ignore[override]
            return y + y * facotr

    with pytest.raises(AdaptError, match=r"SCALE: rewrite of Misspelt asks for 'facotr', and there is .*factor, .*"):
        explain(build(), config_with(Misspelt(), monkeypatch))


def test_what_has_a_default_may_lack(monkeypatch):
    class MayBeShifted(Scale):
        def rewrite(self, y: Any, factor: Any, shift: Any = 0) -> Any:  # type: ignore[override]
            return y + y * factor + shift

    assert explain(build(), config_with(MayBeShifted(), monkeypatch)).adapted


def test_a_rule_without_what_its_bases_need_cannot_be_created():
    class Lacks(OperationRule, Mergeable):
        def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
            return {}

    lacks: Any = Lacks
    with pytest.raises(TypeError, match=r"abstract .*delta.*initialise.*rewrite"):
        lacks()


def test_a_slip_in_the_function_for_rows_is_refused_when_a_model_is_adapted_too(monkeypatch):
    class Misspelt(Scale, RunsByRow):
        def by_row(self, y: Any, facotr: Any) -> Any:
            return y + y * facotr

    with pytest.raises(AdaptError, match="by_row of Misspelt asks for 'facotr'"):
        explain(build(), config_with(Misspelt(), monkeypatch))


@pytest.mark.parametrize(("name", "base"), [("delta", "Mergeable"), ("by_row", "RunsByRow")])
def test_a_function_that_nobody_would_call_is_refused_with_its_base(name, base, monkeypatch):
    rule = dataclass(frozen=True)(type("Wrong", (Scale,), {name: lambda self, **_: None}))
    with pytest.raises(AdaptError, match=f"Wrong has {name} and isn't {base}; let it inherit from that"):
        explain(build(), config_with(rule(), monkeypatch))


def test_what_only_looks_like_a_rule_is_refused(monkeypatch):
    with pytest.raises(
        AdaptError, match="Looks is no rule; let it inherit from OperationRule, InputRule or BoundaryRule"
    ):
        explain(build(), config_with(type("Looks", (), dict(vars(Scale)))(), monkeypatch))


# the table


def test_verify_says_of_each_law_what_became_of_it(capsys):
    model = build()
    before = laws.snapshot(model)
    found = verify(model, ScaleConfig(target_modules=["guilty"]), X, (torch.randn(2, 6),), progress=False)
    laws.require_unchanged(model, before, "verify")
    assert found.holds
    assert [verdict.outcome for verdict in found.verdicts] == ["holds"] * 9
    assert found.verdicts[2].why == f"guilty can't be merged: {NOT_WEIGHTS}"
    assert capsys.readouterr().out == f"{found}\n"


def test_verify_says_where_a_law_fails(monkeypatch):
    found = verify(build(), config_with(ChangesFromTheStart(), monkeypatch), X, progress=False, quiet=True)
    assert [verdict.law[0] for verdict in found.failures] == ["1"]
    assert not found.holds
    assert "at the site guilty" in str(found)


def test_the_ninth_law_alone_sees_that_an_adapter_forgets_the_one_before(monkeypatch):
    config = config_with(ForgetsTheAdapterBefore(), monkeypatch)
    found = verify(build(), config, X, (torch.randn(2, 6),), progress=False, quiet=True)
    assert [(verdict.law[0], verdict.outcome) for verdict in found.verdicts if verdict.outcome != "holds"] == [
        ("9", "fails")
    ]


class Deciding(nn.Module):
    """A model that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


def test_verify_says_which_laws_do_not_apply_and_why():
    config = LoraConfig(target_modules=["layer"], init_lora_weights=False)
    found = verify(Deciding(), config, X, progress=False, quiet=True)
    silent = {verdict.law[0]: verdict.why for verdict in found.verdicts if verdict.outcome == "doesn't apply"}
    assert found.holds
    assert silent["1"] == "LoraConfig.starts_as_identity is False"
    assert silent.keys() == {"1", "5", "7"}
    assert all(silent[law].startswith("the model can't be traced: ") for law in "57")


def test_verify_says_what_is_refused():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    found = verify(model, LoraConfig(target_modules=["0"]), X, progress=False, quiet=True)
    assert found.holds
    assert (found.verdicts[2].outcome, found.verdicts[2].why[:13]) == ("doesn't apply", "it is refused")
    assert "0.weight is tied to 1.weight" in found.verdicts[2].why


def test_the_runtime_does_not_import_the_kit_with_which_a_model_is_verified_without_hypothesis():
    code = """
import sys
import graphpeft
assert "graphpeft.testing" not in sys.modules
import graphpeft.testing
assert "hypothesis" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@given(drawn=adaptations("SCALE"))
@settings(max_examples=10)
def test_a_method_that_the_kit_does_not_know_gets_configs_by_its_targets(drawn):
    case, config = drawn
    assert isinstance(config, ScaleConfig)
    assert config.target_modules
    laws.assert_only_the_adapter_is_trained(case.build, config, case.inputs)


# names of one's own


def test_a_method_of_ones_own_is_saved_and_loaded(tmp_path):
    model = laws.perturbed(get_peft_model(build(), ScaleConfig(target_modules=["guilty"])))
    model.save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), ScaleConfig)
    assert torch.equal(PeftModel.from_pretrained(build(), tmp_path)(*X), model(*X))
    assert list(get_peft_model_state_dict(model)) == ["base_model.model.guilty.factor"]


def test_a_method_of_ones_own_has_no_default_targets_but_its_own(monkeypatch):
    model = LLAMA.build()
    with pytest.raises(AdaptError, match="no default target_modules are known for model_type 'llama'"):
        explain(model, ScaleConfig())
    monkeypatch.setattr(ScaleConfig, "default_targets", {"llama": ("k_proj", "down_proj")})
    report = explain(model, ScaleConfig())
    assert {adapted.site.name.rpartition(".")[2] for adapted in report.adapted} == {"k_proj", "down_proj"}


# beside other methods


@dataclass(frozen=True)
class ScalesTheWeight(Scale, Mergeable):
    def unmergeable(self, site: Any) -> str | None:
        return None

    def delta(self, weight: Any, factor: Any) -> Any:
        return weight * factor.unsqueeze(1)


@dataclass(frozen=True)
class ScalesTheOutput(WeightRule, Scale):
    """(IA)³'s rule of a layer: what it computes, its bias among it, times (1 + a number for each feature)."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def unmergeable(self, site: Any) -> str | None:
        return None

    def delta(self, weight: Any, factor: Any) -> Any:
        return weight * factor.unsqueeze(1)

    def bias_delta(self, bias: Any, factor: Any) -> Any:
        return bias * factor


@pytest.mark.parametrize("bias", [True, False])
def test_a_rule_that_scales_the_bias_too_keeps_every_law(bias, monkeypatch):
    def built() -> nn.Module:
        model = build()
        if not bias:
            model.get_submodule("guilty").register_parameter("bias", None)
        return model

    config = config_with(ScalesTheOutput(), monkeypatch)
    found = verify(built(), config, X, (torch.randn(2, 6),), progress=False, quiet=True)
    assert [verdict.outcome for verdict in found.verdicts] == ["holds"] * 9


@pytest.mark.parametrize("order", [("scale", "lora"), ("lora", "scale")])
def test_a_bias_is_scaled_with_what_adapters_before_have_added(order, monkeypatch):
    config_with(ScalesTheOutput(), monkeypatch)
    model = laws.perturbed(get_peft_model(build(), ScaleConfig(target_modules=["guilty"]), "scale"))
    model.add_adapter(
        "lora", LoraConfig(r=2, lora_alpha=3, target_modules=["guilty"], init_lora_weights=False, lora_bias=True)
    )
    laws.perturbed(model)
    model.set_adapter(list(order))
    expected = model(*X)
    model.merge_adapter(list(order))
    torch.testing.assert_close(model(*X), expected)
    model.unmerge_adapter()
    assert torch.equal(model(*X), expected)


def test_what_scales_a_weight_is_merged_alone_only_if_that_keeps_the_order(monkeypatch):
    base = build()
    base.get_submodule("guilty").register_parameter("bias", None)
    config_with(ScalesTheWeight(), monkeypatch)
    model = laws.perturbed(get_peft_model(base, ScaleConfig(target_modules=["guilty"]), "scale"))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["guilty"], init_lora_weights=False))
    for first, second in (("scale", "lora"), ("lora", "scale")):
        model.set_adapter([first, second])
        expected = model(*X)
        with pytest.raises(AdaptError, match=f"'{second}' can't be merged without '{first}'"):
            model.merge_adapter([second])
        assert torch.equal(model(*X), expected)
        model.merge_adapter([first])
        torch.testing.assert_close(model(*X), expected)
        with pytest.warns(UserWarning, match=f"{first} are merged already; {second} are merged beside them"):
            model.merge_adapter([second])
        torch.testing.assert_close(model(*X), expected)
        model.unmerge_adapter()
        assert torch.equal(model(*X), expected)


def test_a_method_that_says_nothing_of_it_has_no_combinations():
    model = get_peft_model(build(), ScaleConfig(target_modules=["guilty"]))
    with pytest.raises(AdaptError, match="SCALE has no way to combine adapters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_two_methods_cannot_have_one_name():
    with pytest.raises(ValueError, match=r"LORA is the method of .*LoraConfig already; choose another peft_type"):

        @register
        @dataclass(kw_only=True)
        class Other(TargetedConfig):
            peft_type: ClassVar[str] = "LORA"


def test_a_method_needs_a_name_and_a_dataclass():
    with pytest.raises(TypeError, match="Nameless must be a dataclass whose peft_type is the name of its method"):

        @register
        class Nameless(TargetedConfig):
            pass


@dataclass(frozen=True)
class Shift(BoundaryRule):
    """A learned number added to what a module returns."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec((1,), key=f"{site.owner}.shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["shift"].zero_()

    def leave(self, output: Any, shift: Any) -> Any:
        return output + shift


@register
@dataclass(kw_only=True)
class ShiftConfig(PromptTuningConfig):
    peft_type: ClassVar[str] = "SHIFT"  # type: ignore[assignment]

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Shift()


def test_a_rule_at_a_boundary_needs_only_what_it_changes():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    x = torch.randn(2, 3, 6)
    before = model(x)
    get_peft_model(model, ShiftConfig(num_virtual_tokens=1, token_dim=6, prompt_scope=["0"]))
    model.get_parameter("0.default.shift").data.fill_(2.0)
    assert torch.equal(model(x), before + 2)


# calls of modules as sites


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes)
        return F.linear(x, codes.to(x.dtype)) / 100

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.saved_tensors[0].to(grads[0].dtype) / 100, None


class Coded(nn.Module):
    """A layer whose weight is integers, by an operation of its own."""

    def __init__(self, in_features: int, out_features: int, declares: bool = True, is_parameter: bool = False) -> None:
        super().__init__()
        if declares:
            self.in_features, self.out_features = in_features, out_features
        codes = torch.randint(-100, 100, (out_features, in_features), dtype=torch.int8)
        self.is_parameter = is_parameter
        if is_parameter:
            self.weight = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer("codes", codes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self.weight if self.is_parameter else self.codes)  # type: ignore[return-value]


class Wrapped(nn.Module):
    """A wrapper around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.in_features = self.out_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch wants another package to do it
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6)), {nn.Linear})


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a weight of integers in a buffer": lambda: Coded(6, 6),
    "one in a parameter": lambda: Coded(6, 6, is_parameter=True),
    "a layer without declared features": lambda: Coded(6, 6, declares=False),
    "a wrapper": Wrapped,
    "a quantised layer of PyTorch's": lambda: quantised()[0],  # type: ignore[index]
    "the second of two around each other": lambda: nn.Sequential(Wrapped()),
}


def with_layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    model.add_module("guilty", LAYERS[name]())
    model.add_module("last", nn.Linear(6, 3))
    return model


@pytest.mark.filterwarnings("ignore")  # of PyTorch's quantised layers, which warn wherever they are copied
@pytest.mark.parametrize("config", [LoraConfig(r=2, lora_dropout=0.2), ScaleConfig()], ids=lambda config: config.method)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_a_weight_is_adapted_by_its_call(name, config):
    chosen = copy.copy(config)
    # no gradient goes through PyTorch's quantised layers to what is before them
    chosen.target_modules = {"guilty.0"} if "two" in name else {"guilty"} if "PyTorch" in name else {"0", "guilty"}
    found = verify(with_layer(name), chosen, X, (torch.randn(2, 6),), progress=False, quiet=True)
    assert found.holds, found
    assert [verdict.law for verdict in found.verdicts if verdict.outcome != "holds"] == []
    report = explain(with_layer(name), chosen, example_inputs=X)
    assert [(site.site.op.__name__, site.site.size) for site in report.adapted][-1] == ("Leaf", "6 → 6")


def test_a_calls_branch_is_not_merged():
    model = get_peft_model(with_layer("a wrapper"), LoraConfig(target_modules=["guilty"]))
    with pytest.raises(AdaptError, match="guilty of adapter 'default' can't be merged: it is the call of a module"):
        model.merge_and_unload()


def test_a_module_that_does_not_tell_its_features_needs_example_inputs():
    report = explain(with_layer("a layer without declared features"), LoraConfig(target_modules=["guilty"]))
    assert [refusal.reason for refusal in report.refused] == [
        "a Coded declares no in_features and out_features; pass example_inputs, which show them"
    ]


def test_a_container_is_no_layer_and_nor_is_an_activation():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.GELU())
    for each in (model, trace(model, X)):
        report = explain(each, LoraConfig(target_modules=r"\d"), example_inputs=X)
        assert [refusal.reason for refusal in report.refused] == [
            "a Sequential has no parameter called weight; name modules inside it, such as 0.0",
            "a GELU has no parameter called weight",
        ]


def test_branches_of_calls_around_each_other_come_in_their_order():
    class Around(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Wrapped()  # type: ignore[assignment]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Around())

    for names in (["0", "0.layer"], ["0.layer", "0"]):
        config = ScaleConfig(target_modules="|".join(names))
        laws.assert_traced_is_adapted_alike(build, config, X)
        model: Any = build()
        traced: Any = trace(build(), X)
        for number, name in enumerate(names):
            for adapted in (model, traced):
                get_peft_model(adapted, ScaleConfig(target_modules=name), str(number))
        for adapted in (model, traced):
            adapted.set_adapter(["0", "1"])
            laws.perturbed(adapted)
        assert torch.allclose(model(*X), traced(*X))


# sites by a predicate


def test_where_narrows_what_a_config_names_and_the_file_names_what_was_found(tmp_path):
    model: Any = timm.create_model("test_vit")
    config = LoraConfig(r=2, target_modules="all-linear")
    report = explain(model, config, where=lambda site: site.in_features == 192)
    names = {f"blocks.{number}.mlp.fc2" for number in range(6)}
    assert {site.site.name for site in report.adapted} == names
    get_peft_model(model, config, where=lambda site: site.in_features == 192)
    assert config.target_modules == "all-linear"
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(saved, LoraConfig)
    assert saved.target_modules == names
    PeftModel.from_pretrained(timm.create_model("test_vit"), tmp_path)


def test_where_that_holds_nowhere_is_an_error():
    with pytest.raises(AdaptError, match="where holds for none of first, guilty"):
        get_peft_model(build(), LoraConfig(target_modules=["first", "guilty"]), where=lambda site: False)


def test_where_narrows_scopes_of_prompts_too():
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6)))
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=6, prompt_scope=r"\d")
    get_peft_model(model, config, where=lambda site: site.owner == "1")
    assert model.peft_config["default"].prompt_scope == ["1"]


@given(data=st.data())
def test_where_chooses_any_of_the_sites(data):
    case, _ = data.draw(adaptations("LORA"))
    model = case.build()
    names = data.draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    config = LoraConfig(r=1, target_modules="|".join(map(re.escape, targets_of(model))))
    every = [site.site.name for site in explain(model, config, example_inputs=case.inputs).adapted]
    wanted = [name for name in every if name in names]
    if wanted:
        get_peft_model(model, config, example_inputs=case.inputs, where=lambda site: site.name in names)
        again = explain(case.build(), model.peft_config["default"], example_inputs=case.inputs)
        assert [site.site.name for site in again.adapted] == wanted


# sites by a pattern


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_the_layers_that_feed_attentions_are_found_by_the_dataflow(attention, role):
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "attn_implementation": attention}
    config = BertConfig(vocab_size=50, **size)
    model = BertModel(config).eval()
    traced = trace(model, {"input_ids": torch.randint(50, (2, 5))})
    assert feeding(traced, role) == [f"encoder.layer.{number}.attention.self.{role}" for number in range(2)]


def test_one_projection_feeds_all_roles():
    traced = trace(timm.create_model("test_vit").eval(), (torch.randn(1, 3, 160, 160),))
    names = [f"blocks.{number}.attn.qkv" for number in range(6)]
    assert feeding(traced, "query") == feeding(traced, "key") == feeding(traced, "value") == names


def test_what_feeds_an_attention_is_refused_where_it_is_inside_a_layer():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(ValueError, match="attention is a MultiheadAttention, whose projections are inside it"):
        feeding(trace(Attending(), (torch.randn(1, 3, 8),)), "query")
    with pytest.raises(ValueError, match="no linear operation of a Sequential feeds the query of an attention"):
        feeding(trace(build(), X), "query")


# boundaries of modules that a config names


@dataclass(frozen=True)
class Gate(BoundaryRule):
    """Shifts what a module is given, and multiplies what it returns."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"gate": ParameterSpec((1,), key="gate"), "shift": ParameterSpec((1,), key="shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["gate"].fill_(2)
        parameters["shift"].fill_(0.5)

    def enter(self, inputs: Any, shift: Any) -> Any:
        return {"x": inputs["x"] + shift}

    def leave(self, output: Any, gate: Any) -> Any:
        return output * gate


@register
@dataclass(kw_only=True)
class GateConfig(TargetedConfig):
    peft_type: ClassVar[str] = "GATE_OF_BLOCKS"
    adapts_boundaries: ClassVar[bool] = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Gate()


class GatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.layer(x))


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(GatedBlock(), nn.Tanh(), GatedBlock()).eval()


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_config_adapts_the_boundaries_of_the_modules_that_it_names(is_traced: bool, tmp_path: Any) -> None:
    base, x = two_blocks(), X[0]
    model: Any = get_peft_model(
        trace(two_blocks(), X) if is_traced else two_blocks(), GateConfig(target_modules=["0", "2"])
    )
    expected = base[2](torch.tanh(base[0](x + 0.5) * 2) + 0.5) * 2
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(two_blocks(), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    assert sorted(get_peft_model_state_dict(model)) == [
        f"base_model.model.{path}.{name}" for path in ("0", "2") for name in ("gate", "shift")
    ]
    with pytest.raises(AdaptError, match="changes what modules are given or return, not weights"):
        model.merge_adapter()
    assert torch.equal(model.unload()(x), base(x))


def test_a_module_that_is_never_called_has_no_boundary() -> None:
    model = nn.ModuleDict({"inner": nn.ModuleList([GatedBlock()])})
    with pytest.raises(AdaptError, match=r"inner.*never called"):
        get_peft_model(model, GateConfig(target_modules=["inner"]))
    assert type(model["inner"]) is nn.ModuleList
