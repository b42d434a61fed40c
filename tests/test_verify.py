"""`verify` on adapters without sites of weights, and on models that return caches; starts within rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import GPT2, LLAMA, MLP, T5, Example
from torch import nn
from torch.nn import functional as F

from graphpeft import (
    BoundaryRule,
    DeltaRule,
    LoraConfig,
    ParameterSpec,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TableRows,
    TargetedConfig,
    TaskType,
    get_peft_model,
    ops,
    recorded,
    register,
)
from graphpeft.rules.options import Size
from graphpeft.testing import (
    assert_adapted_is_base_with_delta,
    assert_fresh_adapter_changes_no_output,
    laws,
    verify,
)
from graphpeft.testing.comparing import LawError, require_equal
from graphpeft.testing.variants import with_other_sizes

TOKENS = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": TOKENS, "use_cache": False}
FRONT: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 3}


def outcomes(found: Any) -> dict[str, str]:
    return {verdict.law[0]: verdict.outcome for verdict in found.verdicts}


# adapters without sites


@register
@dataclass(kw_only=True)
class WholeConfig(PeftConfig):
    """Trains modules whole, and rows of embeddings, and adapts nothing."""

    peft_type: ClassVar[str] = "WHOLE"
    starts_as_identity: ClassVar[bool] = True  # type: ignore[misc]
    loses: ClassVar[bool] = False

    trainable_token_indices: list[int] | None = None

    def find_sites(self, finder: Any, report: Any) -> list[Any]:
        return []

    def find_rows(self, modules: Any, report: Any) -> dict[str, TableRows]:
        indices = self.trainable_token_indices
        return {} if indices is None else {"model.embed_tokens": TableRows(tuple(indices))}

    def for_file(self, sites: Sequence[Any]) -> PeftConfig:
        return dataclasses.replace(self, modules_to_save=None) if self.loses else super().for_file(sites)


@pytest.mark.parametrize(
    ("example", "config", "inputs"),
    [
        (MLP, WholeConfig(modules_to_save=["head"]), MLP.inputs()),
        (LLAMA, WholeConfig(trainable_token_indices=[3, 7]), TEXT),
    ],
    ids=["modules", "rows"],
)
def test_all_laws_speak_of_an_adapter_that_trains_tensors_whole_but_that_of_two(
    example: Example, config: PeftConfig, inputs: Any
):
    found = verify(example.build(), config, inputs, progress=False, quiet=True)
    assert outcomes(found) == dict.fromkeys("12345678", "holds") | {"9": "doesn't apply"}, found
    assert "only one of them can be active" in found.verdicts[8].why


def test_a_fault_of_an_adapter_without_sites_is_told_with_what_it_trains(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WholeConfig, "loses", True)
    found = verify(MLP.build(), WholeConfig(modules_to_save=["head"]), MLP.inputs(), progress=False, quiet=True)
    assert not found.holds
    assert all("the adapter has no site; it trains head.weight, head.bias" in each.why for each in found.failures)


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_a_prompt_of_a_transformers_model_keeps_the_laws_that_speak_of_it(config_class: Any):
    found = verify(LLAMA.build(), config_class(**FRONT), TEXT, progress=False, quiet=True)
    assert found.holds, found
    # a prefix fills the cache, by which another one would know where a sequence begins
    refused = {"9"} if config_class is PrefixTuningConfig else set()
    assert {law for law, outcome in outcomes(found).items() if outcome != "holds"} == {"1", "5", *refused}
    assert found.verdicts[4].why.startswith("it is refused: can't adapt the model: a TracedModel has no get_input_emb")


# caches


@pytest.mark.parametrize("example", [LLAMA, GPT2, T5], ids=str)
def test_a_cache_in_the_output_is_compared_by_what_it_holds(example: Example):
    inputs = {name: value for name, value in example.inputs().items() if name != "use_cache"}
    found = verify(example.build(), example.config(r=2), inputs, progress=False, quiet=True)
    assert found.holds, found
    assert {law for law, outcome in outcomes(found).items() if outcome != "holds"} == {"5", "7"}
    assert "pass use_cache=False in example_inputs" in found.verdicts[4].why


def test_caches_that_hold_other_keys_are_told_apart_with_the_place():
    model = LLAMA.build()
    one, other = (model(TOKENS, use_cache=True) for _ in range(2))
    require_equal(one, other, "a law")
    [cache] = [value for value in other.values() if hasattr(value, "layers")]
    cache.layers[1].keys[0, 0, 0, 0] += 1
    with pytest.raises(LawError, match=r"a law, at \['\w+'\].*\['layers'\].*\['keys'\]: by 1"):
        require_equal(one, other, "a law")


@dataclass
class Pair:
    """What a model may return that no pytree knows."""

    left: torch.Tensor
    right: torch.Tensor


def test_a_dataclass_of_tensors_is_compared_by_its_fields():
    one, other = (Pair(torch.zeros(2), torch.ones(2)) for _ in range(2))
    require_equal(one, other, "a law")
    other.right[0] = 3
    with pytest.raises(LawError, match=r"a law, at .*\['right'\]: by 2"):
        require_equal(one, other, "a law")


def test_a_cache_in_the_inputs_is_the_same_in_each_run():
    model = LLAMA.build()
    with torch.no_grad():
        filled = model(TOKENS, use_cache=True)
    [(name, cache)] = [(name, value) for name, value in filled.items() if hasattr(value, "layers")]
    inputs = {"input_ids": TOKENS, name: cache}
    require_equal(laws.run(model, inputs), laws.run(model, inputs), "a law")


# how a fresh adapter starts


@dataclass(frozen=True)
class TwoReflections(DeltaRule):
    """W (1 − 2 u uᵀ)(1 − 2 v vᵀ), which is W where u = v and numbers are exact."""

    starts_apart: bool

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {name: ParameterSpec((site.in_features,), key=name) for name in "uv"}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["u"].normal_()
        parameters["v"].copy_(parameters["u"] + (0.01 if self.starts_apart else 0.0))

    def delta(self, weight: Any, u: Any, v: Any) -> Any:
        turned = weight.to(u.dtype)
        for each in (u, v):
            turned = turned - 2 * ((turned @ each).unsqueeze(1) * each) / (each * each).sum()
        return turned - weight


@register
@dataclass(kw_only=True)
class ReflectionsConfig(TargetedConfig):
    peft_type: ClassVar[str] = "REFLECTIONS"
    starts_as_identity: ClassVar[Any] = "within rounding"  # type: ignore[misc]
    starts_apart: bool = False

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return TwoReflections(self.starts_apart)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


X = (torch.randn(3, 16, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_method_that_starts_as_the_identity_within_rounding_keeps_all_laws(dtype: torch.dtype):
    config = ReflectionsConfig(target_modules=["0", "2"])
    found = verify(layers().to(dtype), config, (X[0].to(dtype),), progress=False, quiet=True)
    assert set(outcomes(found).values()) == {"holds"}, found


def test_the_first_law_asks_for_as_much_as_the_config_claims(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LawError, match="a fresh adapter changes the output"):
        assert_fresh_adapter_changes_no_output(layers, ReflectionsConfig(target_modules=["0"], starts_apart=True), X)
    monkeypatch.setattr(ReflectionsConfig, "starts_as_identity", True)
    with pytest.raises(LawError, match=r"a fresh adapter changes the output: by .*e-0\d"):
        assert_fresh_adapter_changes_no_output(layers, ReflectionsConfig(target_modules=["0"]), X)


def test_a_fresh_lora_changes_no_bit_in_half_precision_either():
    model, expected = layers().bfloat16(), layers().bfloat16()(X[0].bfloat16())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    assert torch.equal(adapted(X[0].bfloat16()), expected)


# further inputs


@dataclass(frozen=True)
class Gate(BoundaryRule):
    """gate · output, with a fault in batches of another size than two, if it is to have one."""

    has_fault: bool = False

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"gate": ParameterSpec((config.features,), key="gate")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["gate"].fill_(1)

    def leave(self, output: Any, gate: Any) -> Any:
        return of_two(output * gate) if self.has_fault else output * gate


@recorded
def of_two(output: torch.Tensor) -> torch.Tensor:
    return output if len(output) == 2 else 2 * output


@register
@dataclass(kw_only=True)
class GateConfig(TargetedConfig):
    peft_type: ClassVar[str] = "TEST_GATE"
    adapts_boundaries: ClassVar[bool] = True
    starts_as_identity: ClassVar[Any] = True  # type: ignore[misc]

    features: Size = 4
    repeats: Size = 1
    has_fault: bool = False

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Gate(self.has_fault)


TWO, FIVE = ((torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch)),) for batch in (2, 5))


def test_a_fault_on_further_inputs_alone_is_told_with_their_number():
    config = GateConfig(target_modules=["2"], has_fault=True)
    found = verify(layers(), config, TWO, FIVE, progress=False, quiet=True)
    assert {failure.law[0] for failure in found.failures} >= {"1", "3"}
    assert "a fresh adapter changes the output, at ['inputs 1']: by " in found.failures[0].why


# sizes and copies that are the model's own affair


def test_a_second_adapter_has_other_sizes_only_of_tensors_and_only_those_that_the_model_takes():
    other = with_other_sizes(GateConfig(target_modules=["2"]), layers(), TWO)
    assert (other.features, other.repeats) == (4, 1)  # type: ignore[attr-defined]
    assert with_other_sizes(LoraConfig(r=2, target_modules=["2"]), layers(), TWO).r == 3  # type: ignore[attr-defined]
    found = verify(layers(), GateConfig(target_modules=["2"]), TWO, progress=False, quiet=True)
    assert found.holds, found


def test_a_base_that_can_not_be_pickled_has_no_pickles_that_could_break_a_law():
    model = layers()
    model.tells = lambda: "a function that no module has"  # type: ignore[assignment]
    found = verify(model, LoraConfig(r=2, target_modules=["0"]), X, progress=False, quiet=True)
    assert found.holds, found
    assert found.verdicts[7].outcome == "holds"
    assert "not by pickle, since the base itself: " in found.verdicts[7].why
    assert "deepcopy" not in found.verdicts[7].why


# the author's equation


def lora(weight: Any, lora_A: Any, lora_B: Any, config: Any) -> Any:
    return weight + config.lora_alpha / config.r * lora_B @ lora_A


def lora_of_inputs(x: Any, weight: Any, bias: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
    return F.linear(x, weight, bias) + lora_scaling * x @ lora_A.T @ lora_B.T


def reflected(weight: Any, u: Any, v: Any) -> Any:
    one = torch.eye(weight.shape[1])
    return weight @ (one - 2 * u[:, None] * u / u.dot(u)) @ (one - 2 * v[:, None] * v / v.dot(v))


def gated(layer: Any, inputs: Any, gate: Any) -> Any:
    return layer(**inputs) * gate


LORA = LoraConfig(r=2, lora_alpha=3, bias="all", target_modules=["0", "2"])


@pytest.mark.parametrize(
    ("reference", "config", "dtype"),
    [
        (lora, LORA, torch.float32),
        (lora, LORA, torch.bfloat16),
        (lora_of_inputs, LORA, torch.float32),
        (lora_of_inputs, LORA, torch.bfloat16),
        (gated, GateConfig(target_modules=["2"]), torch.float32),
    ],
)
def test_a_reference_that_is_the_rules_equation_holds(reference: Any, config: Any, dtype: torch.dtype):
    assert_adapted_is_base_with_delta(lambda: layers().to(dtype), config, (X[0].to(dtype),), reference=reference)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda weight, lora_A, lora_B: weight + lora_B @ lora_A, "the adapted model isn't what the reference gives"),
        (lambda x, layer: layer(x), r"the output of 0 isn't what the reference gives: by "),
        (lambda weight: weight.T, r"the reference returns a weight of shape \(16, 32\), and that of 0 has \(32, 16\)"),
        (lambda weight, lora_a: weight, "asks for 'lora_a', and there is .*lora_A, "),
    ],
)
def test_another_equation_is_told_apart_with_the_layer(wrong: Any, what: str):
    with pytest.raises(LawError, match=what):
        assert_adapted_is_base_with_delta(layers, LORA, X, reference=wrong)


def detached(weight: Any, lora_A: Any, lora_B: Any, config: Any) -> Any:
    return lora(weight, lora_A.detach(), lora_B, config)


def rounded(x: Any, weight: Any, bias: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
    return lora_of_inputs(x, weight, bias, lora_A, lora_B, lora_scaling).round(decimals=6)


@pytest.mark.parametrize(("wrong", "what"), [(detached, "lora_A of 0"), (rounded, "lora_A of 0")])
def test_an_equation_with_other_gradients_is_told_apart_with_the_tensor(wrong: Any, what: str):
    with pytest.raises(LawError, match=f"hasn't the gradients that the reference gives.*{what}"):
        assert_adapted_is_base_with_delta(layers, LORA, X, reference=wrong)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.w)


def test_a_weight_that_no_layer_has_is_compared_by_its_changed_value_and_not_by_an_output():
    config = ReflectionsConfig(target_modules=["w"])
    assert_adapted_is_base_with_delta(Functional, config, X, reference=reflected)
    with pytest.raises(LawError, match="the reference asks for x, and w is no call of a layer; ask for weight instead"):
        assert_adapted_is_base_with_delta(Functional, config, X, reference=lambda x: x)


# single layers


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())


def test_the_table_says_which_single_layers_are_checked_and_why_others_are_not():
    found = verify(layers(), ReflectionsConfig(target_modules=["0"]), X, progress=False, quiet=True)
    forms = "a linear layer without a bias, on inputs of 3 dimensions; a weight that is stored as (in, out)"
    assert f"laws 1 to 3 also on: {forms}; a linear layer in bfloat16\nnot on an embedding: " in str(found)
    assert "\nnot on a convolution of one dimension: " in str(found)
    assert "\nnot on an embedding: " in str(found)
    found = verify(
        images(), LoraConfig(r=2, target_modules=["0"]), (torch.randn(2, 3, 9, 9),), progress=False, quiet=True
    )
    forms = "a convolution without a bias; a convolution in bfloat16; a convolution; a convolution of one dimension"
    assert f"\nlaws 1 to 3 also on: {forms}\n" in str(found)
    assert found.holds, found


# what it costs


def test_the_model_is_traced_once(monkeypatch: pytest.MonkeyPatch):
    import sys

    module: Any = sys.modules["graphpeft.testing.verify"]
    calls, trace = [], module.trace
    monkeypatch.setattr(module, "trace", lambda *args: (calls.append(args), trace(*args))[1])
    assert verify(MLP.build(), LoraConfig(r=2, target_modules=["up"]), MLP.inputs(), progress=False, quiet=True).holds
    assert len(calls) == 1
