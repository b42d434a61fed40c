"""FRoD's bases, which layers of a category share, and what follows from them where a file is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix_uses import LAYERS
from models import LLAMA, Experts
from oracle import LINEAR, assert_close, call, moved, outputs, result
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key
from safetensors.torch import load_file, save_file
from torch import nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, FrodConfig, LoraConfig, PeftModel, PeftWarning, get_peft_model
from graphpeft.methods.frod.mixing import mixed, mixed_product, sorted_places
from graphpeft.methods.frod.projections import _block_of, category_of

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

LAYERS_OF = {"target_modules": ["q_proj", "down_proj"], "sparse_rate": 0.1, "init_weights": False}


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "0",
        "classifier.dense",
        "encoder.layer.0.attention.self.query",
        "encoder.layer.11.attention.output.dense",
        "encoder.layer.11.output.dense",
        "output.dense",
        "vision_model.encoder.layers.3.self_attn.q_proj",
        "model.layers.7.fc",
        "blocks.2.layers.4.mlp.fc1",
        "model.layers",
        "h.5",
        "model.layers.x.9.fc",
    ],
)
def test_a_name_has_the_category_and_the_block_that_it_has_in_peft(name: str):
    assert category_of(name) == _category_from_key(name)
    assert _block_of(name, 77) == _layer_index_from_key(name, 77)


def llamas(**options: Any) -> tuple[Any, Any]:
    """Returns Llamas with adapters of this library and of PEFT, by equal seeds."""
    made = []
    for library, config in ((graphpeft, FrodConfig), (peft, peft.FrodConfig)):
        base = LLAMA.build()
        torch.manual_seed(6)
        made.append(library.get_peft_model(base, config(**LAYERS_OF, progressbar=False, **options)))  # type: ignore[attr-defined]
    return made[0], made[1]


@pytest.mark.parametrize("key", [0, 3])
def test_layers_of_a_category_share_pefts_basis_and_places(key: int):
    ours, theirs = llamas(projection_prng_key=key)
    expected = peft.get_peft_model_state_dict(theirs)
    found = graphpeft.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    assert {name for name in found if name.startswith("base_model.frod_V")} == {
        "base_model.frod_V.self_attn_q_proj",
        "base_model.frod_V.mlp_down_proj",
    }
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    first, second = (ours.model.layers[place].self_attn.q_proj.default for place in (0, 1))
    assert first.frod_V is second.frod_V
    assert first.frod_s_indices is second.frod_s_indices
    assert first.frod_U is not second.frod_U
    assert_close(result(call(ours.eval(), LLAMA.inputs())), result(call(theirs.eval(), LLAMA.inputs())), 1e-5)


def test_the_change_is_none_at_first_bit_for_bit_also_in_half_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        (x,) = LINEAR.inputs()
        base = LINEAR.build().to(dtype)
        expected = base(x.to(dtype))
        assert torch.equal(get_peft_model(base, FrodConfig(target_modules=["0"]))(x.to(dtype)), expected)


def saved(folder: Path, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config = FrodConfig(sparse_rate=0.3, init_weights=False, **LAYERS.targets, **options)
    model = moved(get_peft_model(LAYERS.build(), config))
    model.save_pretrained(folder)
    return model, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("way", ["loaded", "set", "beside a merged one"])
def test_the_basis_of_a_file_counts_and_not_what_this_machine_would_make(way: str, tmp_path: Path):
    model, values = saved(tmp_path)
    expected = outputs(model, LAYERS)
    for place in ("0", "2", "4"):
        # eigenvectors have the sign that a machine gives them
        signs = torch.ones(len(values[f"base_model.frod_V.{place}"]))
        signs[::2] = -1
        rows, columns = values[f"base_model.frod_s_indices.{place}"]
        values[f"base_model.frod_V.{place}"] *= signs
        values[f"base_model.model.{place}.frod_lambda_s_values"] *= signs[rows] * signs[columns]
    save_file(values, tmp_path / "adapter_model.safetensors")
    if way == "loaded":
        again: Any = PeftModel.from_pretrained(LAYERS.build(), tmp_path)
    else:
        again = get_peft_model(LAYERS.build(), copy.deepcopy(model.peft_config["default"]))
        if way != "set":
            again.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False, **LAYERS.targets))
            again.set_adapter("lora")
            again.merge_adapter()
        graphpeft.set_peft_model_state_dict(again, values)
        if way != "set":
            again.unmerge_adapter()
            again.set_adapter("default")
    assert_close(outputs(again.eval(), LAYERS), expected, 1e-5)


def test_what_no_file_has_is_made_again(tmp_path: Path):
    model, values = saved(tmp_path, save_projection=False)
    assert not any("frod_V" in key or "frod_s_" in key for key in values)
    again: Any = PeftModel.from_pretrained(LAYERS.build(), tmp_path)
    assert torch.equal(outputs(again.eval(), LAYERS), outputs(model, LAYERS))


def test_an_adapter_that_comes_beside_a_merged_one_has_the_basis_of_the_base():
    alone: Any = get_peft_model(LAYERS.build(), FrodConfig(**LAYERS.targets))
    other: Any = moved(get_peft_model(LAYERS.build(), LoraConfig(r=2, **LAYERS.targets)))
    other.merge_adapter()
    other.add_adapter("frod", FrodConfig(**LAYERS.targets))
    for place in (0, 2, 4):
        for name, value in alone[place].default.named_parameters():
            assert torch.equal(other[place].frod.get_parameter(name), value)


def test_places_stay_whole_numbers():
    model: Any = get_peft_model(LAYERS.build(), FrodConfig(**LAYERS.targets)).half()
    assert model[0].default.frod_s_indices.dtype == model[0].default.frod_s_size.dtype == torch.int64
    assert not model[0].default.frod_s_indices.requires_grad


def test_a_matrix_without_places_has_its_diagonal_alone_and_is_trained():
    theirs = moved(peft.get_peft_model(LAYERS.build(), peft.FrodConfig(**LAYERS.targets, sparse_rate=0.0)))
    ours: Any = get_peft_model(LAYERS.build(), FrodConfig(**LAYERS.targets, sparse_rate=0.0))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    for model in (ours, theirs):
        model(*LAYERS.inputs()).square().mean().backward()
    layer = theirs.base_model.model[0]
    assert ours[0].default.frod_lambda_s_values.shape == (0,)
    assert_close(ours[0].default.frod_lambda_l.grad, layer.frod_lambda_l["default"].grad, 1e-5)


def test_elements_at_one_place_add_up():
    places = torch.tensor([[0, 0, 1], [1, 1, 0]])
    made = mixed(torch.tensor([5.0, 6.0]), torch.tensor([1.0, 2.0, 4.0]), places)
    assert made.tolist() == [[5, 3], [4, 6]]


def test_stacks_of_matrices_share_one_basis():
    torch.manual_seed(0)
    config = FrodConfig(sparse_rate=0.2, target_modules=["up"])
    adapter: Any = get_peft_model(Experts(), config).default
    assert adapter.up_frod_V.ndim == 2
    assert adapter.up_frod_U.ndim == 3


@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_inputs_that_depend_on_each_other_are_as_in_peft(kind: str, tmp_path: Path):
    base = nn.Sequential(nn.Linear(4, 8))
    with torch.no_grad():
        base[0].weight[:, 1] = base[0].weight[:, 0] if kind == "equal" else 0  # type: ignore[index]
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.FrodConfig(target_modules=["0"])))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 4)
    assert_close(ours(x), theirs(x), 1e-4)


def test_a_basis_that_does_not_span_a_weight_is_refused(tmp_path: Path):
    _, values = saved(tmp_path)
    values["base_model.frod_V.2"][:, :3] = 0
    save_file(values, tmp_path / "adapter_model.safetensors")
    base = LAYERS.build()
    with pytest.raises(CheckpointError, match="doesn't fit 2: frod_V doesn't span its weight, of category '2'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert all("default" not in module._modules for module in base.modules())


def test_layers_of_a_category_with_other_numbers_of_inputs_are_refused():
    base = nn.ModuleDict({str(n): nn.ModuleDict({"fc": nn.Linear(4 + n, 8)}) for n in range(2)})
    with pytest.raises(AdaptError, match=r"1\.fc and 0\.fc can't share frod_V.*target them with an adapter each"):
        get_peft_model(base, FrodConfig(target_modules=["fc"]))


@pytest.mark.parametrize(
    ("key", "value"), [("frod_s_indices", torch.full((2, 10), 6)), ("frod_s_size", torch.tensor([6, 7]))]
)
def test_a_file_with_places_in_another_matrix_is_refused(key: str, value: torch.Tensor, tmp_path: Path):
    _, values = saved(tmp_path)
    values[f"base_model.{key}.0"] = value
    save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="it has places in another matrix than one of 6×6"):
        PeftModel.from_pretrained(LAYERS.build(), tmp_path)


def test_another_adapter_has_the_same_seed_and_saves_what_the_first_one_saves():
    model: Any = get_peft_model(LAYERS.build(), FrodConfig(**LAYERS.targets))
    options: list[dict[str, Any]] = [{"projection_prng_key": 1}, {"save_projection": False}]
    for option in options:
        with pytest.raises(AdaptError, match=next(iter(option))):
            model.add_adapter("other", FrodConfig(**LAYERS.targets, **option))
    model.add_adapter("other", FrodConfig(**LAYERS.targets))


def test_the_option_to_move_weights_has_no_effect_and_says_so():
    with pytest.warns(PeftWarning, match="runtime_offload_base_weight=True has no effect: weights stay where they are"):
        get_peft_model(LINEAR.build(), FrodConfig(target_modules=["0"], runtime_offload_base_weight=True))


def test_defaults_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING as THEIRS

    ours = FrodConfig.default_targets
    assert {kind: names if isinstance(names, str) else list(names) for kind, names in ours.items()} == THEIRS


def test_the_backward_keeps_no_matrix_of_the_size_of_the_mixing_one():
    h = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    diagonal, values = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (7, 4))
    places = torch.tensor([[0, 2, 2, 6], [1, 3, 3, 0]])  # one of them twice
    order = sorted_places(places, 7)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = mixed_product(h, diagonal, values, places, *order)
    kept_shapes = [h.shape, diagonal.shape, values.shape, places.shape, *(tensor.shape for tensor in order)]
    assert [tensor.shape for tensor in kept] == kept_shapes
    torch.testing.assert_close(made, h @ mixed(diagonal, values, places).mT)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        for given in (h, h[0, 0].detach().requires_grad_()):
            own = (given, diagonal, values)
            assert check(lambda *given: mixed_product(*given, places, *order), own, check_batched_grad=True)


@pytest.mark.parametrize("shape", [(2, 3, 40), (40,), (0, 40)])
def test_few_elements_are_multiplied_one_by_one_with_the_same_results(shape: tuple[int, ...]):
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    diagonal, values = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (40, 6))
    places = torch.tensor([[39, 2, 2, 6, 0, 2], [1, 3, 3, 0, 39, 1]])
    made, expected = (
        mixed_product(h, diagonal, values, places, *sorted_places(places, 40)),
        h @ mixed(diagonal, values, places).mT,
    )
    torch.testing.assert_close(made, expected)
    weights = torch.randn_like(made)
    for ours, theirs in zip(
        torch.autograd.grad((made * weights).sum(), (h, diagonal, values)),
        torch.autograd.grad((expected * weights).sum(), (h, diagonal, values)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    own = (h, diagonal, values)
    order = sorted_places(places, 40)
    assert not h.numel() or torch.autograd.gradgradcheck(lambda *given: mixed_product(*given, places, *order), own)


def test_a_call_without_a_batch_is_trained():
    x, models = torch.randn(6), [get_peft_model(LINEAR.build(), FrodConfig(target_modules=["0"])) for _ in range(2)]
    for model, given in zip(models, (x, x[None]), strict=True):
        model(given).square().sum().backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in models]
    assert grads[0]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["one", "two", "rows", "dropout"])
def test_double_precision_is_computed_under_autocast_as_without(kind: str, dtype: torch.dtype):
    """Autocast leaves double precision alone."""

    def trained(enabled: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(6)
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
        config = FrodConfig(
            target_modules=["0", "2"], init_weights=False, frod_dropout=0.5 if kind == "dropout" else 0.0
        )
        get_peft_model(model, config)
        if kind != "one":
            model.add_adapter("other", config)
        if kind == "two":
            model.set_adapter(["default", "other"])
        names = {"adapter_names": ["default", "other", "__base__"]} if kind == "rows" else {}
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=enabled):
            y = model(x, **names)
            y.square().sum().backward()
        return y, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for found, expected in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_product_of_two_dtypes_that_autocast_leaves_raises_as_without_an_adapter():
    plain = nn.Linear(8, 8).double()
    for layer in (plain, get_peft_model(nn.Sequential(copy.deepcopy(plain)), FrodConfig(target_modules=["0"]))):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="must have the same dtype"):
            layer(torch.randn(3, 8))
