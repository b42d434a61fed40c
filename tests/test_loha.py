"""LoHa on whole models, in training, on layers that PEFT doesn't adapt, and as plain LoRA."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from kinds import Dropping, Kernels
from models import GPT2, LLAMA, call, result
from oracle import CONV_1D, CONV_2D, LINEAR, TRANSPOSED, Case, by_both_libraries, moved
from peft.tuners.lora.conversion import convert_to_lora as convert_by_peft
from quantised import by_bitsandbytes
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    LoHaConfig,
    get_peft_model,
    get_peft_model_state_dict,
    own_weight,
    rescale_adapter_scale,
)
from graphpeft.methods.loha import hadamard

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through", "ignore:Converting a PEFT")

DRAWN: dict[str, Any] = {"r": 2, "alpha": 3, "init_weights": False}


def drawn(**options: Any) -> LoHaConfig:
    return LoHaConfig(**{**DRAWN, **options})


def by_both(base: nn.Module, **options: Any) -> tuple[Any, Any]:
    return by_both_libraries(base, "LoHaConfig", {**DRAWN, **options})


def test_layers_that_transformers_stores_turned_have_factors_as_linear_layers_have():
    model: Any = get_peft_model(GPT2.build(), LoHaConfig(r=2))
    rows, columns = model.transformer.h[0].attn.c_attn.weight.T.shape
    adapter = model.transformer.h[0].attn.c_attn.default
    assert (adapter.hada_w1_a.shape, adapter.hada_w1_b.shape) == ((rows, 2), (2, columns))


def test_patterns_give_layers_other_ranks_and_alphas_in_any_order(tmp_path: Any):
    options = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        # PEFT sorts the keys of its files, where another of them matches first
        "rank_pattern": {"q_proj": 3, "1.self_attn.q_proj": 5, ".*down_proj": 1},
        "alpha_pattern": {"v_proj": 7, "layers.0.self_attn.v_proj": 2},
    }
    theirs, ours = by_both(LLAMA.build(), **options)
    shapes = [
        {k: t.shape for k, t in lib.get_peft_model_state_dict(m).items()}
        for lib, m in ((peft, theirs), (graphpeft, ours))
    ]
    assert shapes[0] == shapes[1]
    ours.save_pretrained(tmp_path)
    expected = result(call(theirs.eval(), LLAMA.inputs()))
    for library in (peft, graphpeft):
        loaded = library.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
        torch.testing.assert_close(result(call(loaded, LLAMA.inputs())), expected)


@pytest.mark.parametrize(
    "options",
    [{"rank_dropout": 0.3}, {"module_dropout": 0.5}, {"rank_dropout": 0.3, "module_dropout": 0.4}],
    ids=str,
)
def test_training_draws_the_random_numbers_that_pefts_draws(options: dict[str, Any]):
    torch.manual_seed(0)
    theirs, ours = by_both(Dropping(), target_modules=["0", "3", "4"], **options)
    x, found = torch.randn(2, 4, 5, 5), []
    for seed in range(20):
        outputs = []
        for model in (theirs.train(), ours.train()):
            model.zero_grad()
            torch.manual_seed(seed)
            outputs.append(model(x))
        torch.testing.assert_close(outputs[1], outputs[0])
        found.append(outputs[1].detach())
    assert len({tensor.sum().item() for tensor in found}) > 10
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_without_dropout_nothing_is_drawn():
    model: Any = get_peft_model(LINEAR.build(), drawn(target_modules=["0"])).train()
    (x,) = LINEAR.inputs()
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_a_step_with_dropout_are_pefts():
    torch.manual_seed(0)
    theirs, ours = by_both(Dropping(), target_modules=["0", "3", "4"], rank_dropout=0.3)
    gradients, x = [], torch.randn(2, 4, 5, 5)
    for library, model in ((peft, theirs), (graphpeft, ours)):
        torch.manual_seed(5)
        model.train()(x).square().sum().backward()
        keys = library.get_peft_model_state_dict(model)
        values = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(dict(zip(keys, values, strict=True)))
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_rank_dropout_that_leaves_no_row_leaves_no_change_where_pefts_is_no_number():
    theirs, ours = by_both(LINEAR.build(), target_modules=["0"], rank_dropout=0.999)
    (x,) = LINEAR.inputs()
    assert theirs.train()(x).isnan().all()
    assert torch.equal(ours.train()(x), LINEAR.build()(x))


@pytest.mark.parametrize("case", [CONV_1D, CONV_2D], ids=str)
def test_cores_have_the_gradients_of_their_outputs_where_pefts_has_not(case: Case):
    # LyCORIS, and so PEFT, takes the other product's core for the gradient of each A
    theirs, ours = by_both(case.build(), target_modules=["0"], use_effective_conv2d=True)
    for model in (theirs, ours):
        model(*case.inputs()).square().sum().backward()
    adapter, of_peft = ours[0].default, theirs.base_model.model[0]
    for name, parameter in adapter.named_parameters():
        is_right = torch.allclose(getattr(of_peft, name)["default"].grad, parameter.grad, atol=1e-5)
        assert is_right == (not name.endswith("_a")), name
    ours.double()
    names = [name for name, _ in adapter.named_parameters()]
    values = tuple(parameter.detach().clone().requires_grad_() for parameter in adapter.parameters())
    (x,) = case.inputs()

    def outputs(*given: Tensor) -> Tensor:
        replaced = {f"0.default.{name}": tensor for name, tensor in zip(names, given, strict=True)}
        return torch.func.functional_call(ours, replaced, x.double())

    assert torch.autograd.gradcheck(outputs, values)


def test_the_backward_keeps_the_factors_and_none_of_their_products():
    kept: list[Tensor] = []
    factors = [torch.randn(shape, requires_grad=True) for shape in ((30, 2), (2, 40), (30, 2), (2, 40))]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = hadamard(*factors)
    assert sorted(map(len, kept)) == [2, 2, 30, 30]
    a, b, c, d = factors
    torch.testing.assert_close(made, (a @ b) * (c @ d))
    double = [factor.detach().double().requires_grad_() for factor in factors]
    small = [double[0][:3], double[1][:, :4], double[2][:3], double[3][:, :4]]
    assert torch.autograd.gradgradcheck(hadamard, [tensor.detach().requires_grad_() for tensor in small])


def test_each_expert_has_factors_of_its_own():
    torch.manual_seed(0)
    model: Any = get_peft_model(Kernels(), drawn(target_modules=["experts"]))
    a, b, c, d = (getattr(model.default, f"experts_hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    before = own_weight(model, "experts").detach().clone()
    assert (a.shape, b.shape) == ((2, 5, 2), (2, 2, 7))
    assert a.abs().max() > 0.6  # as of a matrix of two columns, and not as of a kernel of two inputs
    model.merge_adapter()
    for number in range(2):
        change = (a[number] @ b[number]) * (c[number] @ d[number]) * 1.5
        torch.testing.assert_close(model.experts[number], before[number] + change)


@pytest.mark.parametrize("cores", [False, True])
def test_weights_of_groups_are_pefts_active_and_merged(cores: bool):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2)), torch.randn(2, 6, 5, 5)
    theirs, ours = by_both(base, target_modules=["0"], use_effective_conv2d=cores)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs(x))


def test_a_padding_that_peft_ignores_is_the_layers():
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), torch.randn(2, 4, 5, 5)
    theirs, ours = by_both(base, target_modules=["0"])
    assert not torch.allclose(theirs(x), theirs.merge_and_unload()(x), atol=1e-3)
    torch.testing.assert_close(ours(x), ours.merge_and_unload()(x))


def test_beside_half_precision_the_change_is_pefts_bit_for_bit():
    (x,) = LINEAR.inputs()
    theirs, ours = by_both(LINEAR.build().bfloat16(), target_modules=["0"])
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
    assert ours[0].default.hada_w1_a.dtype == torch.float32


def test_a_scale_can_be_another_for_a_while():
    model: Any = get_peft_model(LINEAR.build(), drawn(target_modules=["0"]))
    doubled: Any = get_peft_model(LINEAR.build(), drawn(target_modules=["0"], alpha=6))
    graphpeft.set_peft_model_state_dict(doubled, get_peft_model_state_dict(model))
    with rescale_adapter_scale(model, 2):
        torch.testing.assert_close(model(*LINEAR.inputs()), doubled(*LINEAR.inputs()))


@pytest.mark.parametrize("rank", [2, 1.0])
def test_it_is_converted_to_the_lora_that_peft_makes_of_it(rank: float):
    theirs, ours = by_both(LINEAR.build(), target_modules=["0"])
    _, expected = convert_by_peft(theirs, rank)
    config, found = graphpeft.convert_to_lora(ours, rank)
    assert found.keys() == expected.keys()
    A, B = (f"base_model.model.0.lora_{name}.weight" for name in "AB")
    torch.testing.assert_close(found[B] @ found[A], expected[B] @ expected[A])
    if rank == 1.0:
        plain = get_peft_model(LINEAR.build(), config)
        graphpeft.set_peft_model_state_dict(plain, found)
        torch.testing.assert_close(plain(*LINEAR.inputs()), ours(*LINEAR.inputs()))


def test_rows_of_a_batch_have_different_adapters():
    model: Any = moved(get_peft_model(TRANSPOSED.build(), drawn(target_modules=["0"])))
    model.add_adapter("other", drawn(target_modules=["0"], r=3))
    (x,) = TRANSPOSED.inputs()
    found = model(x, adapter_names=["default", "other", "__base__", "default"])
    for row, name in enumerate(["default", "other", None, "default"]):
        model.set_adapter(name or [])
        torch.testing.assert_close(found[row], model(x)[row])


def test_a_compiled_training_step_with_dropout_is_one_graph():
    model: Any = get_peft_model(LINEAR.build(), drawn(target_modules=["0"], module_dropout=0.5)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = LINEAR.inputs()
    found = {compiled(x).sum().item() for _ in range(12)}
    assert len(found) == 2


def test_one_exported_graph_serves_adapters_with_and_without_dropout(tmp_path: Any):
    model: Any = get_peft_model(LINEAR.build(), drawn(target_modules=["0"], rank_dropout=0.2, module_dropout=0.1))
    model.add_adapter("other", drawn(target_modules=["0"]))
    report = graphpeft.export(model, LINEAR.inputs(), tmp_path / "model.pt2", "pt2", adapters="inputs")
    assert len(report.files) == 3


def test_what_has_no_operation_has_no_dropout():
    config = drawn(target_modules=["kernel"], rank_dropout=0.1)
    with pytest.raises(AdaptError, match="no one operation uses its kernel; set rank_dropout and module_dropout to 0"):
        get_peft_model(Kernels(), config)


def test_a_vector_is_refused():
    with pytest.raises(AdaptError, match=r"its weight of shape \(6,\) is no matrix"):
        get_peft_model(nn.Sequential(nn.LayerNorm(6)), LoHaConfig(target_modules=["0"]))


def test_quantised_layers_are_refused():
    base = by_bitsandbytes(__import__("bitsandbytes").nn.LinearNF4)()
    with pytest.raises(AdaptError, match=r"its weight is quantised .*, and LOHA adapts weights that are plain numbers"):
        get_peft_model(base, LoHaConfig(target_modules=["0"]))


def test_a_combination_is_refused_since_it_is_no_such_product():
    model: Any = get_peft_model(LINEAR.build(), LoHaConfig(target_modules=["0"]))
    model.add_adapter("second", LoHaConfig(target_modules=["0"]))
    with pytest.raises(AdaptError, match="LOHA has no way to combine adapters"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 0}, "r must be a positive integer"),
        ({"rank_dropout": 1.5}, "rank_dropout must be a probability"),
        ({"module_dropout": -0.1}, "module_dropout must be a probability"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.* must be a positive integer"),
    ],
)
def test_values_that_can_not_be_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        LoHaConfig(**options)


@pytest.mark.parametrize("has_cores", [False, True])
def test_it_trains_under_autocast(has_cores: bool):
    torch.manual_seed(0)
    x, found = torch.randn(2, 4, 6, 6), []
    config = drawn(target_modules=["0"], use_effective_conv2d=has_cores)
    model: Any = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3)), config)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            y = model(x)
        y.float().square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
    for half, single in zip(*found, strict=True):
        torch.testing.assert_close(half, single, atol=0.05, rtol=0.1)
