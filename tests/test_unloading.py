"""An unloaded model has the active adapters' copies of `modules_to_save`, as in PEFT, and else what the base has."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import CLASSIFIER, MLP, llama_config, output
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, PeftWarning, export, get_peft_model, trace
from graphpeft.testing.snapshots import require_restored

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.quick("model"),
]

IDS = torch.tensor([[1, 4, 2], [3, 3, 6]])


class Net(nn.Module):
    """A small model with buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(3), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embed(ids))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(library: Any, **options: Any) -> Any:
    return library.get_peft_model(net(), library.LoraConfig(r=2, target_modules=["up"], **options))


def add(model: Any, library: Any, name: str, **options: Any) -> None:
    model.add_adapter(name, library.LoraConfig(r=2, target_modules=["up"], **options))


def choose(model: Any, *names: str) -> None:
    # PEFT's model takes one name, and what is inside of it several
    chooser: Any = model.base_model if type(model) is peft.PeftModel else model
    chooser.set_adapter(list(names))


@torch.no_grad()
def train(model: Any, by: float = 1) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += by


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


BASE = state(net())


def changed(found: dict[str, Tensor]) -> set[str]:
    """Returns the modules whose tensors aren't the base's."""
    assert found.keys() == BASE.keys()
    return {name.rpartition(".")[0] for name, tensor in found.items() if not torch.equal(tensor, BASE[name])}


def one(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head", "norm"])
    train(model)
    return model.unload()


def one_with_statistics(library: Any) -> Any:
    model = adapted(library, modules_to_save=["norm"]).train()
    model(IDS)
    return model.unload()


def first_of_two(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    add(model, library, "other", modules_to_save=["head"])
    return model.unload()


def second_of_two(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    add(model, library, "other", modules_to_save=["head"])
    model.set_adapter("other")
    train(model, 2)
    return model.unload()


def one_that_is_not_active(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    add(model, library, "other")
    model.set_adapter("other")
    return model.unload()


def two_that_are_active(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    add(model, library, "other", modules_to_save=["norm"])
    choose(model, "default", "other")
    train(model)
    return model.unload()


def disabled(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    (model.base_model.disable_adapter_layers if library is peft else model.disable_adapters)()
    return model.unload()


def disabled_for_a_while(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    with model.disable_adapter():
        unloaded = model.unload()
    return unloaded


def deleted(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    train(model)
    model.delete_adapter("default")
    return model.unload()


@pytest.mark.filterwarnings("ignore:.*was active and is deleted")
def the_rest_of_two(library: Any) -> Any:
    model = adapted(library, modules_to_save=["head"])
    add(model, library, "other", modules_to_save=["head"])
    model.set_adapter("other")
    train(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    return model.unload()


def rows(library: Any) -> Any:
    model = adapted(library, trainable_token_indices={"embed": [1, 2]})
    train(model)
    return model.unload()


def rows_and_a_head(library: Any) -> Any:
    model = adapted(library, trainable_token_indices={"embed": [1, 2]}, modules_to_save=["head"])
    train(model)
    return model.unload()


HEAD = {"head.0", "head.1"}
SCENES: list[tuple[Callable[[Any], Any], set[str]]] = [
    (one, HEAD | {"norm"}),
    (one_with_statistics, {"norm"}),
    (first_of_two, HEAD),
    (second_of_two, HEAD),
    (one_that_is_not_active, set()),
    (two_that_are_active, HEAD | {"norm"}),
    (disabled, HEAD),
    (disabled_for_a_while, HEAD),
    (deleted, set()),
    (the_rest_of_two, HEAD),
    (rows, set()),
    (rows_and_a_head, HEAD),
]


@pytest.mark.filterwarnings("ignore:'default' was active and is deleted")
@pytest.mark.parametrize(("scene", "left"), [pytest.param(*each, id=each[0].__name__) for each in SCENES])
def test_unloading_leaves_what_pefts_leaves(scene: Callable[[Any], Any], left: set[str]) -> None:
    ours, theirs = scene(graphpeft), scene(peft)
    require_restored(ours, net())
    assert changed(state(ours)) == left
    expected = state(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(ours).items())
    assert torch.equal(output(ours.eval(), (IDS,)), output(theirs.eval(), (IDS,)))


def test_a_loaded_adapter_leaves_its_copies(tmp_path: Path) -> None:
    model = adapted(peft, modules_to_save=["head"])
    train(model)
    model.save_pretrained(str(tmp_path))
    ours, theirs = (of.from_pretrained(net(), str(tmp_path)).unload() for of in (PeftModel, peft.PeftModel))
    assert changed(state(ours)) == changed(state(theirs)) == HEAD
    assert torch.equal(output(ours, (IDS,)), output(theirs, (IDS,)))


def test_no_adapter_that_is_active_leaves_the_base() -> None:
    model = adapted(graphpeft, modules_to_save=["head"])
    train(model)
    model.set_adapter([])
    assert changed(state(model.unload())) == set()


def test_a_traced_model_is_unloaded_alike() -> None:
    unloaded = []
    for base in (MLP.build(), trace(MLP.build(), MLP.inputs())):
        model: Any = get_peft_model(base, LoraConfig(target_modules=["up"], modules_to_save=["head"]))
        train(model)
        unloaded.append(model.unload())
    assert torch.equal(output(unloaded[0], MLP.inputs()), output(unloaded[1], MLP.inputs()))
    assert not torch.equal(output(unloaded[0], MLP.inputs()), output(MLP.build(), MLP.inputs()))


def test_the_head_that_a_task_brings_along_stays() -> None:
    model: Any = get_peft_model(CLASSIFIER.build(), CLASSIFIER.config(task_type="SEQ_CLS"))
    train(model)
    trained = {name: tensor.clone() for name, tensor in model.named_parameters() if name.endswith("default.weight")}
    unloaded = model.unload()
    assert trained
    for name, tensor in trained.items():
        assert torch.equal(unloaded.get_parameter(name.replace(".default", "")), tensor)


def test_the_copies_are_the_models_own_parameters_and_adapt_again() -> None:
    model = adapted(graphpeft, modules_to_save=["head"])
    train(model)
    unloaded = model.unload()
    expected = output(unloaded, (IDS,))
    again: Any = get_peft_model(unloaded, LoraConfig(r=2, target_modules=["up", "head.0"]))
    assert torch.equal(output(again, (IDS,)), expected)
    assert torch.equal(output(again.unload(), (IDS,)), expected)


def test_a_module_that_somebody_has_put_there_stays() -> None:
    model, other = adapted(graphpeft, modules_to_save=["head"]), nn.Linear(6, 4)
    model._modules["head"] = other
    assert model.unload().head is other
    assert "default.weight" not in dict(other.named_parameters())


def tied() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=True)).eval()


@pytest.mark.parametrize(("saved", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_a_copy_of_a_tied_module_leaves_the_other_one_alone(saved: str, other: str) -> None:
    found = []
    for library in (graphpeft, peft):
        model = library.get_peft_model(tied(), library.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved]))
        train(model)
        told = pytest.warns(PeftWarning, match="Setting config.tie_word_embeddings to False")
        with told if library is graphpeft else contextlib.nullcontext():
            found.append(model.unload())
    ours, theirs = found
    assert ours.config.tie_word_embeddings is False
    assert torch.equal(ours.get_submodule(other).weight, tied().lm_head.weight)
    assert not torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)
    expected = state(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(ours).items())


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_copy_of_a_tied_module_is_merged_and_leaves_the_other_one_alone(saved: list[str], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
    model: Any = get_peft_model(tied(), config)
    train(model)
    with torch.no_grad():
        model.get_submodule("lm_head" if saved[0] == "lm_head" else "model.embed_tokens").default.weight.mul_(2)
    before = model(IDS).logits
    with pytest.raises(AdaptError, match="is tied to"):
        model.merge_adapter()
    with pytest.warns(PeftWarning, match="Setting config.tie_word_embeddings to False"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_copies_that_are_kept_tied_stay_tied() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model: Any = get_peft_model(tied(), config)
    train(model)
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight
    assert torch.equal(unloaded.lm_head.weight, tied().lm_head.weight + 1)


# where PEFT does otherwise


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_the_bases_where_peft_has_trained_these_themselves(bias: str) -> None:
    left = {}
    for library in (graphpeft, peft):
        model = adapted(library, bias=bias, modules_to_save=["head"])
        train(model)
        left[library] = changed(state(model.unload()))
    assert left == {graphpeft: HEAD, peft: HEAD | ({"up", "norm"} if bias == "all" else {"up"})}


def test_merged_adapters_are_unmerged_where_pefts_stay_in_the_weights() -> None:
    left = {}
    for library in (graphpeft, peft):
        model = adapted(library, modules_to_save=["head"])
        train(model)
        model.merge_adapter()
        left[library] = changed(state(model.unload()))
    assert left == {graphpeft: HEAD, peft: HEAD | {"up"}}


def test_merging_named_adapters_leaves_no_copies_of_the_active_one() -> None:
    model = adapted(graphpeft, modules_to_save=["head"])
    train(model)
    add(model, graphpeft, "other", init_lora_weights=False)
    assert changed(state(model.merge_and_unload(adapter_names=["other"]))) == {"up"}


def test_an_exported_base_is_the_base(tmp_path: Path) -> None:
    model = adapted(graphpeft, modules_to_save=["head"])
    train(model)
    before = copy.deepcopy(state(model))
    export(model, (IDS,), tmp_path / "model", "safetensors", "baked")
    assert changed(load_file(tmp_path / "model" / "model.safetensors")) == set()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
