"""What changes in the base while adapters are merged is kept by whatever unmerges; the rest comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import graphpeft
from graphpeft import AdaptError, LoraConfig, OFTConfig, PeftModel, get_peft_model, own_weight
from graphpeft.adapters import merged_weights
from graphpeft.adapters.merged_weights import Originals
from graphpeft.adapters.tensors import fingerprint
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
    pytest.mark.filterwarnings("ignore:.* merged already; .* are merged beside them"),
]

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))


def merged(library: Any = graphpeft, **options: Any) -> Any:
    config = library.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **options})
    torch.manual_seed(1)
    model = library.get_peft_model(net(), config).eval()
    model.merge_adapter()
    return model


def added(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach() + torch.linspace(0.1, 0.5, weight.numel()).view_as(weight)


def write(model: Any) -> None:
    with torch.no_grad():
        own_weight(model[0]).copy_(added(own_weight(model[0])))


def write_data(model: Any) -> None:
    model[0].weight.data.copy_(added(model[0].weight))


def give_data(model: Any) -> None:
    model[0].weight.data = added(model[0].weight)


def assign(model: Any) -> None:
    model[0].weight = nn.Parameter(added(model[0].weight))


def exchange_rows(model: Any) -> None:
    model[0].weight.data = model[0].weight.data[[1, 0, 2, 3, 4, 5]]


def write_bias(model: Any) -> None:
    model[0].bias.data.add_(1.0)


def train(model: Any) -> None:
    model[0].weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


CHANGES = [write, write_data, give_data, assign, exchange_rows, write_bias, train]
by_each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def disable(model: Any) -> None:
    with model.disable_adapter():
        pass


WAYS: dict[str, Callable[[Any], Any]] = {
    "unmerge": lambda model: model.unmerge_adapter(),
    "activate": lambda model: model.set_adapter("default"),
    "disable": disable,
}


@pytest.mark.parametrize("way", WAYS)
@by_each_change
@pytest.mark.filterwarnings("ignore:.* are merged, and are unmerged first")
def test_a_change_of_a_merged_weight_is_kept_by_what_unmerges(change: Callable[[Any], None], way: str) -> None:
    model = merged()
    change(model)
    expected = model(X)
    WAYS[way](model)
    torch.testing.assert_close(model(X), expected)
    assert not torch.allclose(model(X), merged()(X), atol=1e-3)


@by_each_change
def test_a_change_of_a_merged_weight_is_in_the_unloaded_model(change: Callable[[Any], None]) -> None:
    model = merged()
    change(model)
    expected = model(X)
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(X), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_training_a_merged_weight_ends_as_with_peft() -> None:
    found = []
    for library in (graphpeft, peft):
        model = merged(library)
        weight = model[0].weight if library is graphpeft else model.base_model.model[0].base_layer.weight
        weight.requires_grad_(True)
        optimizer = torch.optim.SGD([weight], lr=0.5)
        model(X).square().sum().backward()
        optimizer.step()
        model.unmerge_adapter()
        found.append(model(X))
    torch.testing.assert_close(*found)


def test_a_further_adapter_is_merged_beside_a_change() -> None:
    model = merged()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    write(model)
    expected = copy.deepcopy(model)
    model.merge_adapter(["b"])
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), expected(X))


def test_what_is_made_of_the_weights_is_made_of_the_changed_ones() -> None:
    model = merged()
    write(model)
    as_unmerged = copy.deepcopy(model)
    as_unmerged.unmerge_adapter()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    for each in (model, as_unmerged):
        torch.manual_seed(3)
        each.add_adapter("p", config)
    torch.testing.assert_close(model[0].p.lora_A, as_unmerged[0].p.lora_A)


def test_base_weights_are_read_with_the_change(tmp_path: Path) -> None:
    model = merged(target_modules=["0"], modules_to_save=["2"])
    write(model)
    found = graphpeft.get_base_model_state_dict(model)
    torch.testing.assert_close(found["0.weight"], added(net().get_parameter("0.weight")), atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    model.unmerge_adapter()
    own_weight(loaded[0]).data.copy_(own_weight(model[0]))
    torch.testing.assert_close(loaded(X), model(X))


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16], ids=str)
def test_a_cast_while_merged_is_no_change(cast: torch.dtype) -> None:
    model, base = merged(), net().to(cast)
    model.to(cast)
    model.unload()
    assert torch.equal(model(X.to(cast)), base(X.to(cast)))


def test_what_changed_before_a_cast_is_kept() -> None:
    model = merged()
    write(model)
    model.double()
    expected = model(X.double())
    model.unmerge_adapter()
    torch.testing.assert_close(model(X.double()), expected, atol=1e-6, rtol=1e-6)


def test_a_change_that_depends_on_the_weight_cannot_be_taken_out_of_another_one() -> None:
    model = get_peft_model(net(), OFTConfig(oft_block_size=2, target_modules=["0"], init_weights=False)).eval()
    model.merge_adapter()
    write(model)
    expected = model(X)
    with pytest.raises(AdaptError, match=r"0.weight has changed since 'default' .* merge_and_unload\(\) leaves"):
        model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    assert torch.equal(model.merge_and_unload()(X), expected)


def test_an_adapter_that_cannot_be_taken_out_is_saved_and_merged_beside_another(tmp_path: Path) -> None:
    model: Any = get_peft_model(net(), OFTConfig(oft_block_size=2, target_modules=["0"], init_weights=False)).eval()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.set_adapter(["default", "b"])
    model.merge_adapter(["default"])
    write(model)
    expected = model(X)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_looking_at_a_changed_weight_changes_nothing(tmp_path: Path) -> None:
    model, before = merged(), net()
    kept = model[0].weight.detach().clone()
    model[0].weight.data.zero_()
    model.save_pretrained(tmp_path)
    graphpeft.get_base_model_state_dict(model)
    assert not torch.equal(Originals(model, model._peft_adapters)["0", "weight"], before.get_parameter("0.weight"))
    model[0].weight.data.copy_(kept)
    model.unmerge_adapter()
    assert torch.equal(own_weight(model[0]), before.get_parameter("0.weight"))


def test_a_changed_weight_is_not_freed_of_another_change_than_was_merged() -> None:
    model = merged()
    model[0].default.lora_B.data.add_(1.0)
    with model.disable_adapter():  # the weights are those that are kept
        assert torch.equal(model(X), net()(X))
    model.merge_adapter()
    write(model)
    model[0].default.lora_B.data.add_(1.0)
    with pytest.raises(AdaptError, match="so have tensors of merged adapters"):
        model.unmerge_adapter()


def test_the_tensors_of_merged_adapters_are_read_once_for_all_changed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(count: int) -> int:
        model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r"\d+", init_lora_weights=False))
        model.merge_adapter()
        for layer in model:
            layer.weight.data.add_(1.0)
        calls: list[torch.Tensor] = []
        monkeypatch.setattr(merged_weights, "fingerprint", lambda value: calls.append(value) or fingerprint(value))
        model.unmerge_adapter()
        monkeypatch.undo()
        return len(calls)

    assert read(6) == 2 * read(3)


def test_a_change_is_taken_out_in_the_models_precision() -> None:
    found = []
    for is_on in (False, True):
        model = merged()
        write(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            model.unmerge_adapter()
        found.append(model[0].weight)
    assert torch.equal(*found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.* are merged, and are unmerged first")
def test_a_merged_weight_that_is_pruned_has_a_reason(way: str) -> None:
    model = merged()
    prune.l1_unstructured(model[0], "weight", 0.5)
    expected = model(X)
    with pytest.raises(AdaptError, match=r"0\.weight is no parameter any more, as after pruning"):
        WAYS[way](model)
    assert torch.equal(model(X), expected)
    prune.remove(model[0], "weight")
    WAYS[way](model)
    torch.testing.assert_close(model(X), expected)


def test_nothing_is_left_on_an_unmerged_module() -> None:
    model = merged()
    before = set(vars(net()[0]))
    model.unmerge_adapter()
    model.unload()
    assert set(vars(model[0])) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (1025, 1031)], ids=str)
def test_a_fingerprint_tells_one_changed_number_and_two_exchanged_ones(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tensor = drawn > 0.5 if dtype is torch.bool else (drawn * 100).to(dtype)
    first = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == first
    assert fingerprint(tensor.t().contiguous().t() if tensor.ndim == 2 else tensor) == first
    if tensor.numel() > 1:
        flat = tensor.reshape(-1)
        other = flat.clone()
        other[-1] = ~flat[-1] if dtype is torch.bool else flat[-1] + 2
        assert fingerprint(other) != first
        unlike = int((flat != flat[0]).nonzero()[0])
        exchanged = flat.clone()
        exchanged[0], exchanged[unlike] = flat[unlike], flat[0]
        assert fingerprint(exchanged) != first


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["1"], "modules_to_save": ["0"]},
        {"target_modules": ["0"], "init_lora_weights": "pissa"},
        {"target_modules": ["0"], "init_lora_weights": "olora"},
        {"target_modules": ["0"]},
    ],
    ids=["modules_to_save", "pissa", "olora", "plain"],
)
def test_an_adapter_with_a_weight_of_its_own_is_merged_beside_one_that_is_in_that_weight(
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(4, 6), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(**{"r": 2, **options}))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    both = copy.deepcopy(model)
    both.set_adapter(["a", "b"])
    model.set_adapter("a")
    model.merge_adapter(["a"])
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["b"])(x), both(x), atol=1e-5, rtol=1e-4)


def test_a_change_of_the_base_is_one_of_the_residual_of_an_adapter_that_is_merged_later() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    laws.perturbed(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"))
    both, x = copy.deepcopy(model), torch.randn(3, 8)
    both.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    merged = model.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(merged(x), both(x))


def test_weights_that_were_tied_while_adapters_are_merged_are_not_taken_apart() -> None:
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    model.merge_adapter()
    model[1].weight = model[0].weight
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(AdaptError, match=r"1\.weight and 0\.weight were tied since adapters were merged into them"):
        model.unmerge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"target_modules": ["1"], "modules_to_save": ["0"]}], ids=str)
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_bias_that_was_taken_away_is_told_where_an_adapter_has_another(merge: str, options: dict[str, Any]) -> None:
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(**{"target_modules": ["0"], **options})
    )
    model[0].bias = None
    with pytest.raises(AdaptError, match=r"0\.default\.bias of adapter 'default' is gone, since it or its module"):
        getattr(model, merge)()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("first", ["inside", "around"])
def test_adapters_of_two_models_are_not_merged_into_one_weight_at_a_time(merge: str, first: str) -> None:
    whole: Any = nn.Sequential(net(), nn.ReLU())
    models = {
        "inside": get_peft_model(whole[0], LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "inside"),
        "around": get_peft_model(whole, LoraConfig(r=2, target_modules=["0.0"], init_lora_weights=False), "around"),
    }
    one = models.pop(first)
    (other,) = models.values()
    before = whole(X)
    one.merge_adapter()
    with pytest.raises(AdaptError, match=r"another model, around this one or inside of it, is merged into"):
        getattr(other, merge)()
    torch.testing.assert_close(whole(X), before)
    one.merge_and_unload()
    getattr(other, merge)()
    torch.testing.assert_close(whole(X), before)
