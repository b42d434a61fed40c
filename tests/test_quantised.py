"""LoRA on quantised layers, and on layers whose forward has a gradient of its own."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn.modules import Embedding8bit, Linear4bit
from oracle import (
    Case,
    assert_close,
    assert_files_go_both_ways,
    assert_trains_alike,
    by_peft,
    by_us,
    outputs,
    perturb,
    tensors,
)
from quantised import CASES as QUANTISED
from quantised import by_bitsandbytes, by_torchao
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

from graphpeft import AdaptError, IA3Config, LoraConfig, check_learning, explain, get_peft_model, hotswap_adapter, trace
from graphpeft.sites.quantised import is_quantised
from graphpeft.testing import laws, verify

pytestmark = [
    # PEFT can merge torchao's weights only in a model that Transformers has loaded
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    pytest.mark.filterwarnings("ignore:no gradient goes through a Linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights:UserWarning"),
]


NAMES = (
    "torchao int8",
    "torchao int8 bfloat16",
    "torchao int8 of inputs, too",
    "bitsandbytes int8",
    "bitsandbytes int8 bfloat16",
    "bitsandbytes fp4",
    "bitsandbytes nf4, packed as floats",
    "bitsandbytes nf4 without bias",
)
CASES = [case for case in QUANTISED if case.name in NAMES]
each_kind = pytest.mark.parametrize("case", CASES, ids=str)


def perturbed(case: Case, **options: Any) -> tuple[Any, Any]:
    ours, theirs = by_us(case, **options), by_peft(case, **options)
    for model in (ours, theirs):
        perturb(model)
    return ours, theirs


@each_kind
def test_a_fresh_adapter_is_the_identity_and_has_the_tensors_of_peft(case):
    ours, theirs = by_us(case), by_peft(case)
    assert torch.equal(outputs(ours, case), outputs(case.build(), case))
    expected = tensors(theirs)
    assert tensors(ours).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(ours).items())
    assert {tensor.dtype for tensor in tensors(ours).values()} == {torch.float32}


@each_kind
def test_it_computes_and_trains_as_peft_does(case):
    assert_trains_alike(*perturbed(case, lora_dropout=0.3), case)


@each_kind
def test_without_autocast_its_tensors_have_the_dtype_that_peft_gives_them(case):
    dtype = {t.dtype for t in tensors(by_peft(case)).values()}
    ours = get_peft_model(case.build(), LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    theirs = torch.bfloat16 if "torchao" in case.name and "bfloat16" in case.name else torch.float32
    assert ours.get_parameter("0.default.lora_A").dtype == theirs
    assert dtype == {torch.float32}


@each_kind
def test_files_go_both_ways(case, tmp_path):
    # a number is rounded to another code where its last bit differs, as sums have it that another processor adds
    tolerance = 1e-3 if "of inputs" in case.name else 1e-6
    assert_files_go_both_ways(*perturbed(case), case, tmp_path, tolerance)


@each_kind
def test_its_gradients_are_those_of_the_formula(case):
    ours = by_us(case)
    perturb(ours)
    (x,) = case.inputs()
    layer = ours[0]
    layer(x).float().square().sum().backward()
    A, B = (layer.get_parameter(f"default.lora_{name}") for name in "AB")
    A2, B2 = (tensor.detach().clone().requires_grad_() for tensor in (A, B))
    base = outputs_of_base(case, x)
    branch = x.to(A2.dtype) @ A2.T @ B2.T * layer.default.lora_scaling
    (base + branch).to(x.dtype).float().square().sum().backward()
    for found, expected in ((A, A2), (B, B2)):
        assert_close(found.grad, expected.grad, 1e-5)


def outputs_of_base(case: Case, x: torch.Tensor) -> torch.Tensor:
    model: Any = case.build()
    with torch.no_grad():
        return model[0](x)


@each_kind
def test_its_weight_stays_the_very_object_and_is_there_when_the_adapter_goes(case):
    model: Any = case.build()
    weights = [model[index].weight for index in (0, 2)]
    before = outputs(model, case)
    get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    perturb(model)
    assert not torch.equal(outputs(model, case), before)
    assert all(
        model[index].weight is weight and not weight.requires_grad
        for index, weight in zip((0, 2), weights, strict=True)
    )
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), before)
    model.unload()
    assert torch.equal(outputs(model, case), before)
    assert all(model[index].weight is weight for index, weight in zip((0, 2), weights, strict=True))
    assert [type(layer) for layer in model] == [type(layer) for layer in case.build().children()]


@each_kind
def test_copies_and_pickles_hold_the_adapter_as_far_as_the_library_lets_them(case):
    model = by_us(case)
    perturb(model)
    expected = outputs(model, case)
    assert torch.equal(outputs(copy.deepcopy(model), case), expected)
    if "torchao" not in case.name:  # whose quantised models can't be pickled
        assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), case), expected)
    if "4" in case.name:  # which only Transformers can load
        return
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    state.seek(0)
    again = by_us(case)
    again.load_state_dict(torch.load(state, weights_only=False))
    assert torch.equal(outputs(again, case), expected)


@each_kind
@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        *({"init_lora_weights": name} for name in ("pissa", "olora", "mica", "orthogonal", "corda", "lora_ga", "eva")),
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_what_reads_the_weight_is_refused_by_name(case, options):
    report = explain(case.build(), LoraConfig(target_modules=["0"], **options))
    name, value = next(iter(options.items()))
    assert [refusal.reason.partition(" is for layers")[0] for refusal in report.refused] == [f"{name}={value!r}"]
    assert f"is quantised ({type(case.build()[0].weight).__name__})" in report.refused[0].reason  # type: ignore[index]


@each_kind
def test_its_weight_is_no_parameter_to_adapt_or_to_train(case):
    named = explain(case.build(), LoraConfig(target_parameters=["0.weight"]))
    assert "its weight is quantised" in named.refused[0].reason
    assert "name the module that computes with it in target_modules" in named.refused[0].reason
    whole = explain(case.build(), LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert [(refusal.name, "can't be trained" in refusal.reason) for refusal in whole.refused] == [("2", True)]


@each_kind
def test_a_traced_model_is_adapted_alike(case):
    model = case.build()
    before = outputs(model, case)
    traced: Any = trace(model, case.inputs())
    assert torch.equal(outputs(traced, case), before)
    assert torch.equal(outputs(model, case), before)
    ours = by_us(case)
    torch.manual_seed(2)
    get_peft_model(traced, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
    for adapted in (ours, traced):
        perturb(adapted)
    assert_close(outputs(traced, case), outputs(ours, case), 0)
    assert tensors(traced).keys() == tensors(ours).keys()


@each_kind
def test_rows_of_a_batch_have_different_adapters_as_in_peft(case):
    ours, theirs = perturbed(case)
    options = {"r": 3, "target_modules": ["0", "2"]}
    ours.add_adapter("second", LoraConfig(**options))
    theirs.add_adapter("second", peft.LoraConfig(**options))
    for index, name in itertools.product((0, 2), "AB"):
        own = ours[index].get_parameter(f"second.lora_{name}").data.normal_()
        getattr(theirs.base_model.model[index], f"lora_{name}")["second"].weight.data.copy_(own)
    names = ["default", "second", "__base__", "second"]
    (x,) = case.inputs()
    with torch.no_grad():
        expected = theirs.eval()(x, adapter_names=names)
        assert_close(ours.eval()(x, adapter_names=names), expected, 1e-6 if x.dtype == torch.float32 else 1e-2)
    ours.train()(x, adapter_names=names).float().square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@each_kind
@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_adapters_are_combined_as_in_peft(case, kind):
    ours, theirs = perturbed(case)
    options = {"r": 2, "lora_alpha": 5, "target_modules": ["0", "2"]}
    ours.add_adapter("second", LoraConfig(**options))
    theirs.add_adapter("second", peft.LoraConfig(**options))
    for index, name in itertools.product((0, 2), "AB"):
        own = ours[index].get_parameter(f"second.lora_{name}").data.normal_()
        getattr(theirs.base_model.model[index], f"lora_{name}")["second"].weight.data.copy_(own)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "second"], [0.7, -1.3], "new", kind)
        model.set_adapter("new")
    tolerance = 1e-5 if case.inputs()[0].dtype == torch.float32 else 2e-2
    assert_close(outputs(ours, case), outputs(theirs, case), tolerance)


@each_kind
def test_adapters_are_added_chosen_and_swapped(case, tmp_path):
    model = by_us(case)
    perturb(model)
    first = outputs(model, case)
    model.save_pretrained(tmp_path)
    other = by_us(case)
    other.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    other.set_adapter("second")
    assert torch.equal(outputs(other, case), outputs(case.build(), case))
    other.set_adapter("default")
    hotswap_adapter(other, tmp_path, "default")
    assert torch.equal(outputs(other, case), first)


@each_kind
def test_all_laws_hold_that_the_library_keeps(case):
    config = LoraConfig(r=2, target_modules={"2"}, lora_dropout=0.1)
    found = verify(case.build(), config, case.inputs(), progress=False, quiet=True)
    assert found.holds, found
    # torchao's models can't be pickled, and those of 4 bits can't load their own state dict
    is_left_out = "torchao" in case.name or "4" in case.name
    assert ("since the base itself" in found.verdicts[7].why) == is_left_out, found


def test_a_layer_without_a_gradient_for_its_input_is_warned_of():
    model = by_torchao(Int8DynamicActivationInt8WeightConfig)()
    with pytest.warns(UserWarning, match=r"no gradient goes through a Linear, such as 0, to what is in front of it"):
        get_peft_model(model, LoraConfig(target_modules=["0", "2"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(by_torchao(Int8WeightOnlyConfig)(), LoraConfig(target_modules=["0", "2"]))
        get_peft_model(
            by_torchao(Int8DynamicActivationInt8WeightConfig)(),
            LoraConfig(target_modules=["0", "2"], inference_mode=True),
        )


def test_of_weights_of_one_class_the_one_that_hands_no_gradient_on_is_warned_of():
    weight_alone, inputs_too = (
        by_torchao(kind)() for kind in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig)
    )
    model = nn.Sequential(weight_alone.get_submodule("0"), nn.Tanh(), inputs_too.get_submodule("0"))
    with pytest.warns(UserWarning, match=r"no gradient goes through a Linear, such as 2, to what is in front of it"):
        get_peft_model(model, LoraConfig(target_modules=["0", "2"]))


def test_a_quantised_embedding_is_refused_by_name():
    model = nn.Sequential(Embedding8bit(20, 8)).to("cpu")
    report = explain(model, LoraConfig(target_modules=["0"]), example_inputs=(torch.randint(0, 20, (2, 3)),))
    assert [refusal.reason for refusal in report.refused] == [
        "a Embedding8bit is given a torch.int64, where an adapter needs a tensor with features"
    ]
    rows = explain(model, LoraConfig(target_modules=["0"], trainable_token_indices={"0": [1]}))
    assert "its weight is quantised (Int8Params), and no rows of it can be trained" in rows.refused[-1].reason


def test_the_class_of_a_weight_tells_that_it_is_quantised_and_not_its_dtype():
    class Named(nn.Parameter):
        """A parameter that is no more than one."""

    assert not is_quantised(nn.Parameter(torch.zeros(2)))
    assert not is_quantised(Named(torch.zeros(2)))
    assert not is_quantised(nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    assert not is_quantised(nn.LazyLinear(2).weight)
    assert is_quantised(nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    assert all(is_quantised(case.build()[0].weight) for case in CASES)  # type: ignore[index]


def test_a_complex_weight_is_adapted_and_merged_as_any_other():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 4, dtype=torch.complex64))
    x = torch.randn(3, 6, dtype=torch.complex64)
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    laws.perturbed(model)
    expected = model(x)
    expected.abs().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert (model.merge_and_unload()(x) - expected).abs().max() < 1e-5


# a gradient of one's own, and a wrapper


class WithWeight(torch.autograd.Function):
    """A linear operation that gives its weight a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].flatten(0, -2).T @ x.flatten(0, -2)


class ForInputAlone(WithWeight):
    """One whose author knows that the weight is frozen."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.saved_tensors[1], None


class ByHand(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], features: int = 6, declares: bool = True) -> None:
        super().__init__()
        if declares:
            self.in_features = self.out_features = features
        self.function = function
        self.weight = nn.Parameter(torch.randn(features, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)  # type: ignore[return-value]


def test_a_layer_whose_backward_leaves_the_weight_out_is_adapted_at_its_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), ByHand(ForInputAlone), nn.Linear(6, 3))
    report = explain(model, LoraConfig(target_modules=["0", "1"]))
    assert [adapted.site.op.__name__ for adapted in report.adapted] == ["Linear", "Leaf"]
    found = verify(model, LoraConfig(r=2, target_modules={"0", "1"}), (torch.randn(4, 6),), progress=False, quiet=True)
    assert found.holds, found


def test_one_whose_backward_has_it_is_adapted_at_its_weight_and_merges():
    torch.manual_seed(0)
    model = nn.Sequential(ByHand(WithWeight), nn.Linear(6, 3))
    assert [a.site.op.__name__ for a in explain(model, LoraConfig(target_modules=["0"])).adapted] == ["Weight"]
    x = torch.randn(4, 6)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["0"]))
    laws.perturbed(adapted)
    expected = adapted(x)
    assert_close(adapted.merge_and_unload()(x), expected, 1e-5)


def test_none_is_merged_into_codes_past_one_that_multiplies_what_the_layer_gives():
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": ["0"]}
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options)
    model: Any = get_peft_model(by_bitsandbytes(Linear4bit)(), config, adapter_name="u")
    model.add_adapter("w", IA3Config(feedforward_modules=[], init_ia3_weights=False, **options))
    model.set_adapter(["w", "u"])
    x = torch.randn(4, 64)
    before = model(x)
    with pytest.raises(AdaptError, match=r"change of 0.weight by 'w' depends on .* name 'u' before 'w' in set_adapter"):
        model.merge_adapter(["u"])
    assert torch.equal(model(x), before)


def test_a_weight_without_a_gradient_is_no_parameter_to_adapt():
    model = nn.Sequential(ByHand(ForInputAlone))
    report = explain(model, LoraConfig(target_parameters=["0.weight"]))
    assert [refusal.reason for refusal in report.refused] == [
        "the function that its forward calls has no gradient for its weight"
    ]


class Drawing(ByHand):
    """A layer that drops elements while it is trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.5, True))


def test_looking_for_a_gradient_draws_no_random_numbers_and_leaves_none():
    model = nn.Sequential(Drawing(WithWeight), nn.Linear(6, 3))
    before, state = laws.snapshot(model), torch.get_rng_state()
    explain(model, LoraConfig(target_modules=["0"]))
    assert torch.equal(torch.get_rng_state(), state)
    laws.require_unchanged(model, before, "explain")


class Wrapper(nn.Module):
    """A layer around another one, which PEFT knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.in_features, self.out_features = 6, 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu()


@pytest.mark.parametrize("build", [Wrapper, lambda: ByHand(ForInputAlone)], ids=["a wrapper", "a backward by hand"])
def test_a_layer_that_peft_refuses_gets_the_gradients_of_the_formula(build):
    torch.manual_seed(0)
    model: Any = nn.Sequential(build())
    with pytest.raises(ValueError, match=r"is not supported\. Currently, only the following"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"]))
    x = torch.randn(5, 6)
    base = model(x).detach()
    layer = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))[0]
    laws.perturbed(model)
    model(x).square().sum().backward()
    A, B = (layer.get_parameter(f"default.lora_{name}") for name in "AB")
    A2, B2 = (tensor.detach().clone().requires_grad_() for tensor in (A, B))
    (base + 2 * x @ A2.T @ B2.T).square().sum().backward()
    for found, expected in ((A, A2), (B, B2)):
        assert_close(found.grad, expected.grad, 1e-5)


def parts_of(parameter: Any) -> list[torch.Tensor]:
    """Returns the tensors of which a parameter is made, as bytes, since codes may be packed as NaNs."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    parts = [getattr(parameter, name) for name in names] or [parameter]
    return [part.detach().view(torch.uint8) for part in parts]


def kept_beside_codes(model: Any) -> list[dict[str, Any]]:
    """Returns what the states hold that bitsandbytes keeps beside codes."""
    held = [getattr(layer, name, None) for layer in (model[0], model[2]) for name in ("quant_state", "state")]
    return [{**vars(state)} for state in held if state is not None]


@each_kind
@pytest.mark.parametrize("training", [False, True])
def test_explain_tells_what_learns_and_the_layers_stay_as_they_are(case: Case, training: bool) -> None:
    model, inputs = case.build().train(training), case.inputs()
    held = [{**vars(module)} for module in model.modules()]
    parameters = {name: (each, [part.clone() for part in parts_of(each)]) for name, each in model.named_parameters()}
    places = [part.data_ptr() for each in model.parameters() for part in parts_of(each)]
    beside = kept_beside_codes(model)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"])
    report = explain(model, config, example_inputs=inputs)
    expected = check_learning(get_peft_model(case.build().train(training), config), inputs)
    told = [(site.label, {name: tensor.state for name, tensor in site.tensors.items()}) for site in expected.sites]
    assert [
        (site.label, {name: tensor.state for name, tensor in site.tensors.items()}) for site in report.learning.sites
    ] == told
    assert all(vars(module) == kept for module, kept in zip(model.modules(), held, strict=True))
    for name, parameter in model.named_parameters():
        own, values = parameters[name]
        assert parameter is own
        assert all(map(torch.equal, parts_of(parameter), values))
    assert [part.data_ptr() for each in model.parameters() for part in parts_of(each)] == places
    after = kept_beside_codes(model)
    assert all(now[name] is value for now, then in zip(after, beside, strict=True) for name, value in then.items())
    assert torch.equal(outputs(model, case), outputs(case.build().train(training), case))
