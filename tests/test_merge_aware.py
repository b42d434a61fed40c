"""With `merged_quantiser`, a model computes in training what it computes when it is merged and rounded."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracle import CONV_2D, EMBEDDING, LINEAR, TRANSPOSED, Case, outputs
from quantised import CASES as QUANTISED
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, get_peft_model, get_peft_model_state_dict, own_weight
from graphpeft.sites import quantisers
from graphpeft.testing import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:no gradient goes through a Linear:UserWarning"),
]

WEIGHT_ONLY = [case for case in QUANTISED if "int8" not in case.name and "inputs" not in case.name]
OF_INPUTS = [case for case in QUANTISED if "bitsandbytes int8" in case.name or "inputs" in case.name]


def to_seven_steps(weight: Tensor) -> Tensor:
    """Rounds to seven steps between zero and the largest magnitude."""
    step = weight.abs().max() / 7
    return (weight / step).round() * step


def adapted(case: Case, quantiser: Any = to_seven_steps, seed: int = 2, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"]}
    return get_peft_model(case.build(), LoraConfig(**settings | options, merged_quantiser=quantiser))


@pytest.mark.parametrize("case", [LINEAR, TRANSPOSED, CONV_2D, EMBEDDING], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_writes_the_very_weight_with_which_the_forward_computes(case: Case, dtype: torch.dtype):
    torch.manual_seed(2)
    base: Any = case.build().to(dtype)
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["0"], merged_quantiser=to_seven_steps
    )
    model = get_peft_model(copy.deepcopy(base), config)
    plain: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    graphpeft.set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    change = copy.deepcopy(plain).float().merge_and_unload()[0].weight - base[0].weight.float()
    expected = to_seven_steps((base[0].weight.float() + change).to(dtype)).detach()
    merged = copy.deepcopy(model).merge_and_unload()
    step = expected.abs().max() / 7
    assert (merged[0].weight - to_seven_steps(merged[0].weight)).abs().max() <= 1e-6 * step
    assert ((merged[0].weight - expected).abs() > 0.1 * step).float().mean() < 0.05  # but for ties of roundings
    x = tuple(value.to(dtype) if value.is_floating_point() else value for value in case.inputs())
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(*x), merged(*x), rtol=tolerance, atol=tolerance)
    before = model(*x)
    model.merge_adapter()
    assert torch.equal(own_weight(model[0]), merged[0].weight)
    model.unmerge_adapter()
    assert torch.equal(model(*x), before)
    assert torch.equal(own_weight(model[0]), base[0].weight)


def test_the_gradient_is_that_of_the_formula_with_the_rounding_as_identity():
    model, (x,) = adapted(LINEAR), LINEAR.inputs()
    layer, branch = model[0], model[0].default
    model(x).sum().backward()
    A, B = (tensor.detach().clone().requires_grad_() for tensor in (branch.lora_A, branch.lora_B))
    changed = own_weight(layer).detach() + 1.5 * B @ A
    rounded = changed + (to_seven_steps(changed) - changed).detach()
    torch.tanh(F.linear(x, rounded, layer.bias)).sum().backward()
    torch.testing.assert_close(branch.lora_A.grad, A.grad)
    torch.testing.assert_close(branch.lora_B.grad, B.grad)


def test_what_was_measured_in_training_is_what_is_merged():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(256, 16)
    target = x @ torch.randn(16, 8)

    def loss_when_rounded(quantiser: Any) -> tuple[float, float]:
        torch.manual_seed(1)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], merged_quantiser=quantiser)
        model = get_peft_model(copy.deepcopy(base), config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        trained = F.mse_loss(model(x), target).item()
        merged = model.merge_and_unload()
        with torch.no_grad():
            merged[0].weight.copy_(to_seven_steps(merged[0].weight))
        return trained, F.mse_loss(merged(x), target).item()

    trained, merged = loss_when_rounded(to_seven_steps)
    assert merged == pytest.approx(trained, rel=1e-4)
    trained, merged = loss_when_rounded(None)
    assert merged > 1.2 * trained


@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=str)
def test_a_quantised_layer_computes_with_the_codes_that_merging_gives_it(case: Case):
    model = adapted(case, "own", target_modules=["0", "2"])
    numbers = [quantisers.codes_of(copy.deepcopy(model).merge_and_unload()[index]).numbers() for index in (0, 2)]
    (x,) = case.inputs()
    first, second = (number.to(x.dtype) for number in numbers)
    expected = F.linear(torch.tanh(F.linear(x, first, model[0].bias)), second, model[2].bias)
    tolerance = 1e-5 if x.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(outputs(model, case), expected.detach(), rtol=tolerance, atol=tolerance)
    model(x).float().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.filterwarnings("ignore:merged_quantiser=.* is a function, which a file can't hold")
@pytest.mark.parametrize("case", [LINEAR, CONV_2D], ids=str)
def test_every_law_holds_but_that_a_file_has_no_function(case: Case):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], merged_quantiser=to_seven_steps)
    verification = verify(case.build(), config, case.inputs(), progress=False, quiet=True)
    assert [failure.why.partition(":")[0] for failure in verification.failures] == [
        "what is loaded for training differs from saved"
    ], verification


@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=str)
def test_every_law_holds_for_quantised_layers(case: Case):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], merged_quantiser="own")
    verification = verify(case.build(), config, case.inputs(), progress=False, quiet=True)
    # neither library can have its layers pickled, or their state dict loaded
    assert {failure.law for failure in verification.failures} <= {"8 copies stay adapted"}, verification


def test_beside_own_layers_with_plain_weights_are_plain_lora():
    ours, plain = adapted(LINEAR, "own"), adapted(LINEAR, None)
    assert torch.equal(outputs(ours, LINEAR), outputs(plain, LINEAR))


def test_files_are_those_of_plain_lora(tmp_path: Path):
    model, plain = adapted(LINEAR), adapted(LINEAR, None)
    with pytest.warns(graphpeft.PeftWarning, match="to_seven_steps.* is a function, which a file can't hold"):
        model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(LINEAR.build(), tmp_path)
    assert loaded.peft_config["default"].merged_quantiser is None
    assert torch.equal(outputs(loaded, LINEAR), outputs(plain, LINEAR))
    theirs = peft.PeftModel.from_pretrained(LINEAR.build(), str(tmp_path))
    torch.testing.assert_close(outputs(theirs, LINEAR), outputs(plain, LINEAR))
    config = LoraConfig.from_pretrained(tmp_path)
    config.merged_quantiser = to_seven_steps
    trained_on = graphpeft.PeftModel.from_pretrained(LINEAR.build(), tmp_path, config=config, is_trainable=True)
    assert torch.equal(outputs(trained_on, LINEAR), outputs(model, LINEAR))


def test_a_file_holds_own(tmp_path: Path):
    model = adapted(WEIGHT_ONLY[0], "own")
    model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(WEIGHT_ONLY[0].build(), tmp_path)
    assert loaded.peft_config["default"].merged_quantiser == "own"
    assert torch.equal(outputs(loaded, WEIGHT_ONLY[0]), outputs(model, WEIGHT_ONLY[0]))


def test_a_lambda_and_a_copy_of_the_model_round_alike():
    model = adapted(LINEAR, lambda weight: (weight * 4).round() / 4)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied, LINEAR), outputs(model, LINEAR))


def test_an_adapter_that_acts_before_is_rounded_together_with_it():
    model = adapted(LINEAR, None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter(
        "rounded",
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, merged_quantiser=to_seven_steps),
    )
    model.set_adapter(["default", "second", "rounded"])
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(outputs(model, LINEAR), outputs(merged, LINEAR), rtol=1e-5, atol=1e-5)
    assert torch.allclose(merged[0].weight, to_seven_steps(merged[0].weight), atol=1e-6)


def test_rows_of_a_mixed_batch_have_their_own_rounded_weight():
    model = adapted(LINEAR)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    (x,) = LINEAR.inputs()
    found = model(x, adapter_names=["default", "second", "__base__", "default"])
    for row, name in ((0, "default"), (1, "second"), (3, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], model(x)[row])


@pytest.mark.parametrize("quantisers_of", [(None, "own"), ("own", None), ("own", "own")], ids=str)
def test_adapters_of_one_quantised_layer_all_act_in_either_order(quantisers_of: tuple[Any, Any]):
    case = next(case for case in WEIGHT_ONLY if case.name == "bitsandbytes nf4")
    model = adapted(case, quantisers_of[0])
    config = LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, target_modules=["0"])
    config.merged_quantiser = quantisers_of[1]
    model.add_adapter("second", config)
    (x,) = case.inputs()
    own = case.build()
    changes = []
    for name in ("default", "second"):
        model.set_adapter(name)
        changes.append(model[0](x) - own[0](x))  # pyright: ignore[reportIndexIssue]
    model.set_adapter(["default", "second"])
    torch.testing.assert_close(model[0](x), own[0](x) + changes[0] + changes[1], rtol=1e-4, atol=1e-4)  # pyright: ignore
    model(x).sum().backward()
    for name in ("default", "second"):
        assert model.get_parameter(f"0.{name}.lora_A").grad.abs().sum() > 0


@pytest.mark.compiled
# PyTorch's compiler looks for gradients of what it is given where it goes on after what it can't follow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", [LINEAR, *WEIGHT_ONLY], ids=str)
def test_compiled_it_rounds_and_trains_alike(case: Case):
    found = {}
    for compiles in (False, True):
        model = adapted(case, "own" if case in WEIGHT_ONLY else to_seven_steps)
        output = (torch.compile(model) if compiles else model)(*case.inputs())
        output.float().square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[compiles] = {"output": output.detach(), **gradients}
    tolerance = 1e-4 if found[False]["output"].dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found[True], found[False], rtol=tolerance, atol=tolerance)


def test_a_pickled_weight_that_has_lost_how_it_was_quantised_is_refused():
    case = next(case for case in WEIGHT_ONLY if case.name == "bitsandbytes nf4")
    pickled = pickle.loads(pickle.dumps(adapted(case, "own")))
    with pytest.raises(quantisers.QuantisingError, match="the weight was pickled, and has lost how it was quantised"):
        pickled(*case.inputs())


@pytest.mark.parametrize("case", WEIGHT_ONLY[:3], ids=str)
def test_dequantised_it_has_the_rounded_numbers(case: Case):
    model = adapted(case, "own")
    active = outputs(model, case)
    plain = copy.deepcopy(model).merge_and_unload(dequantize=True)
    torch.testing.assert_close(outputs(plain, case), active, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (
            lambda weight: weight[:1],
            r"a tensor of shape \(1, 6\) and torch.float32 for the weight of 0, of shape \(8, 6\)",
        ),
        (lambda weight: weight.double(), ".*torch.float64 for the weight of 0"),
        (lambda weight: weight / 0, "infinities or NaNs for the weight of 0"),
        (lambda weight: None, "a NoneType for the weight of 0"),
    ],
)
def test_a_function_that_returns_no_such_weight_is_refused(returned: Any, reason: str):
    with pytest.raises(AdaptError, match=f"merged_quantiser gives {reason}"):
        adapted(LINEAR, returned)


def test_what_a_graph_can_not_name_is_no_function():
    with pytest.raises(ValueError, match="and no function; write a function that calls it"):
        LoraConfig(merged_quantiser=functools.partial(to_seven_steps))


def test_what_can_not_be_merged_is_refused_when_it_is_adapted():
    config = LoraConfig(r=4, target_modules=["0"], merged_quantiser=to_seven_steps)
    with pytest.raises(
        AdaptError, match="merged_quantiser is for weights into which an adapter can be merged: its feat"
    ):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), config)


def test_its_scale_is_multiplied_as_loras():
    model = adapted(LINEAR)
    with graphpeft.rescale_adapter_scale(model, 0.5):
        halved = outputs(model, LINEAR)
    model[0].default.lora_scaling /= 2
    assert torch.equal(outputs(model, LINEAR), halved)


def test_adapters_that_round_differently_are_not_combined():
    model = adapted(LINEAR)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(AdaptError, match="merged_quantiser isn't the same in all of them"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", "cat")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout drops elements .* merged_quantiser leaves no branch"),
        ({"use_dora": True}, "use_dora=True isn't for merged_quantiser"),
        ({"lora_bias": True}, "lora_bias=True isn't for merged_quantiser"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' isn't for merged_quantiser"),
    ],
)
def test_what_has_no_part_in_a_rounded_sum_is_refused(options: dict[str, Any], reason: str):
    with pytest.raises(AdaptError, match=reason):
        adapted(LINEAR, **options)


def test_what_is_no_function_is_refused():
    with pytest.raises(
        ValueError, match="merged_quantiser is 4, and no function; give a function of a weight, or 'own'"
    ):
        LoraConfig(merged_quantiser=4)


def test_a_function_is_not_for_a_weight_that_has_a_quantiser():
    with pytest.raises(AdaptError, match="merged_quantiser is for weights that can be quantised anew, by 'own'"):
        adapted(WEIGHT_ONLY[0])


@pytest.mark.parametrize("case", OF_INPUTS, ids=str)
def test_layers_that_quantise_their_inputs_are_refused(case: Case):
    with pytest.raises(AdaptError, match="it quantises its inputs, too"):
        adapted(case, "own")
