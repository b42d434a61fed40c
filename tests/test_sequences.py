"""Random sequences of what users do with adapters, beside a reference that holds explicit weights."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpeft
from graphpeft import LoraConfig

LAYERS = ("embed", "up", "down", "head")
IDS = torch.tensor([[1, 4, 2], [3, 3, 6], [0, 5, 1]])
CONFIGS = (
    LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"]),
    LoraConfig(r=4, lora_alpha=3, target_modules=["head", "up"], use_rslora=True),
    LoraConfig(r=1, lora_alpha=4, target_modules=["embed", "up"]),
    LoraConfig(r=3, lora_alpha=2, target_modules=["down", "head"], bias="lora_only"),
    LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"], use_dora=True),
    LoraConfig(r=2, lora_alpha=1, target_modules=["up"], modules_to_save=["head"]),
    LoraConfig(r=2, lora_alpha=6, target_modules=["up"], trainable_token_indices={"embed": [1, 4]}),
)


class Net(nn.Module):
    """A small model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(7, 6), nn.Linear(6, 8)
        self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).mean(1)
        return self.head(h + self.down(torch.tanh(self.up(h))))


def computed(ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Returns what the model computes with these weights."""
    h = weights["embed.weight"][ids].mean(1)
    inner = torch.tanh(h @ weights["up.weight"].T + weights["up.bias"])
    h = h + inner @ weights["down.weight"].T + weights["down.bias"]
    return h @ weights["head.weight"].T + weights["head.bias"]


@dataclasses.dataclass
class Explicit:
    """An adapter as numbers.

    Attributes:
        tensors: Its tensors by their names in its file, without the prefix.
        scale: By what B A is multiplied.
        rows: The indices of its rows.
    """

    tensors: dict[str, Tensor]
    scale: float
    rows: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, name: str) -> Explicit:
        """Returns the numbers of an adapter."""
        config = model.peft_config[name]
        saved = graphpeft.get_peft_model_state_dict(model, adapter_name=name)
        tensors = {key.removeprefix("base_model.model."): value.detach().clone() for key, value in saved.items()}
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return cls(tensors, scale, tuple((config.trainable_token_indices or {"embed": ()})["embed"]))

    @property
    def is_plain(self) -> bool:
        """Whether it only adds to weights."""
        return not self.replaced and not any("magnitude" in name for name in self.tensors)

    @property
    def replaced(self) -> set[str]:
        """The tensors of the model that it replaces; for rows, each row."""
        names = {name.replace(".base_layer", "") for name in self.tensors if "lora" not in name and "token" not in name}
        return names | {f"row {row}" for row in self.rows}

    def change(self, layer: str) -> Tensor | None:
        """Returns s B A of a layer."""
        if f"{layer}.lora_embedding_A" in self.tensors:
            A, B = (self.tensors[f"{layer}.lora_embedding_{factor}"] for factor in "AB")
            return self.scale * (B @ A).T
        if f"{layer}.lora_A.weight" in self.tensors:
            A, B = (self.tensors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            return self.scale * B @ A
        return None


class Reference:
    """What the model should be: its weights, its adapters, and which of these act."""

    def __init__(self, model: nn.Module) -> None:
        self.base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.adapters: dict[str, Explicit] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.is_disabled = False

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        """Returns the weights with some adapters, in their order."""
        own, found = dict(self.base), dict(self.base)
        for adapter in (self.adapters[name] for name in names):
            for name, tensor in adapter.tensors.items():
                if name.replace(".base_layer", "") in own and "lora" not in name:
                    own[name.replace(".base_layer", "")] = tensor
            if adapter.rows:
                values = adapter.tensors["embed.token_adapter.trainable_tokens_delta"]
                own["embed.weight"] = own["embed.weight"].index_copy(0, torch.tensor(adapter.rows), values)
        found = dict(own)
        for adapter in (self.adapters[name] for name in names):
            for layer in LAYERS:
                change, weight = adapter.change(layer), f"{layer}.weight"
                if change is None:
                    continue
                found[weight] = found[weight] + change
                magnitude = adapter.tensors.get(f"{layer}.lora_magnitude_vector")
                if magnitude is not None:
                    lengths = (own[weight] + change).norm(dim=1).detach()
                    found[weight] = (magnitude / lengths).unsqueeze(1) * found[weight]
        return found

    @property
    def acting(self) -> list[str]:
        """The adapters that act, in their order."""
        return [*self.merged, *(() if self.is_disabled else (n for n in self.active if n not in self.merged))]

    def output(self) -> Tensor:
        """Returns what the model should compute."""
        return computed(IDS, self.weights(self.acting))

    def conflict(self, names: list[str]) -> bool:
        """Returns whether two of the adapters replace the same tensor, so that they can't act together."""
        replaced = [name for adapter in names for name in self.adapters[adapter].replaced]
        return len(set(replaced)) < len(replaced)

    def activate(self, names: list[str]) -> None:
        """Makes adapters active; what is merged is unmerged if that changes something."""
        if names != self.active:
            self.merged = []
        self.active = names

    def step(self, target: Tensor, rate: float) -> None:
        """Takes a step of gradient descent on what is trained."""
        trained = {
            (name, key): tensor.requires_grad_()
            for name in ([] if self.is_disabled else self.active)
            for key, tensor in self.adapters[name].tensors.items()
            if name not in self.merged or "lora" not in key
        }
        if not trained:
            return
        loss = (self.output() - target).square().sum()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for tensor, gradient in zip(trained.values(), gradients, strict=True):
            tensor.requires_grad_(False)
            if gradient is not None:
                tensor -= rate * gradient


REFUSED = graphpeft.AdaptError


class Run:
    """A sequence of operations on a model and on its reference.

    Args:
        seed: The seed of the sequence.
        folder: Where adapters are saved.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.folder, self.count = random.Random(seed), folder, 0
        torch.manual_seed(seed)
        self.model: Any = Net().double()
        self.original = copy.deepcopy(self.model)
        self.reference = Reference(self.model)
        self.done: list[str] = []
        self.adapt()

    def new_name(self) -> str:
        """Returns a name that was never used."""
        self.count += 1
        return f"n{self.count}"

    def some(self, most: int = 3) -> list[str]:
        """Returns some adapters, in any order."""
        names = list(self.reference.adapters)
        return self.chance.sample(names, self.chance.randint(1, min(most, len(names))))

    def fill(self, name: str) -> None:
        """Gives an adapter values that have an effect, and notes them."""
        values = graphpeft.get_peft_model_state_dict(self.model, adapter_name=name)
        values = {key: value + torch.randn_like(value) / 3 for key, value in values.items()}
        graphpeft.set_peft_model_state_dict(self.model, values, name)
        self.reference.adapters[name] = Explicit.of(self.model, name)

    # operations

    def adapt(self) -> None:
        name = self.new_name()
        graphpeft.get_peft_model(self.model, copy.deepcopy(self.chance.choice(CONFIGS)), name)
        self.reference.activate([name])
        self.fill(name)

    def add(self) -> None:
        name = self.new_name()
        self.model.add_adapter(name, copy.deepcopy(self.chance.choice(CONFIGS)))
        self.fill(name)

    def choose(self) -> None:
        names = self.some()
        if self.reference.conflict(names):
            with pytest.raises(REFUSED, match="only one of them can be active"):
                self.model.set_adapter(names)
            return
        self.model.set_adapter(names)
        self.reference.activate(names)
        self.reference.merged = []

    def disable(self) -> None:
        self.model.disable_adapters()
        self.reference.is_disabled, self.reference.merged = True, []

    def enable(self) -> None:
        self.model.enable_adapters()
        self.reference.is_disabled = False

    def disable_for_a_while(self) -> None:
        with self.model.disable_adapter():
            self.reference.merged = []
            torch.testing.assert_close(self.model(IDS), computed(IDS, self.reference.base))

    def merge(self) -> None:
        reference = self.reference
        names = self.chance.choice((reference.active, self.some()))
        names = [name for name in names if name not in reference.merged]
        involved = [reference.adapters[name] for name in {*names, *reference.active, *reference.merged}]
        try:
            self.model.merge_adapter(names)
        except REFUSED:
            assert reference.is_disabled or not all(adapter.is_plain for adapter in involved)
            return
        assert not reference.is_disabled
        ordered = [name for name in reference.active if name in names]
        reference.merged = [*reference.merged, *ordered, *(name for name in names if name not in ordered)]

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.reference.merged = []

    def delete(self) -> None:
        reference, [name] = self.reference, self.some(1)
        if name in reference.merged:
            with pytest.raises(REFUSED, match="merged into the weights"):
                self.model.delete_adapter(name)
            return
        others = [other for other in reference.adapters if other != name]
        if not others:
            return
        self.model.delete_adapter(name)
        reference.activate(others[:1] if reference.active == [name] else [n for n in reference.active if n != name])
        del reference.adapters[name]

    def combine(self) -> None:
        reference, names, name = self.reference, self.some(), self.new_name()
        weights = [self.chance.uniform(-1, 1) for _ in names]
        sources = [reference.adapters[source] for source in names]
        try:
            self.model.add_weighted_adapter(names, weights, name, "cat")
        except REFUSED:
            assert not all(source.is_plain for source in sources)
            return
        reference.adapters[name] = made = Explicit.of(self.model, name)
        for layer in LAYERS:
            changes = [(source.change(layer), weight) for source, weight in zip(sources, weights, strict=True)]
            there = [change * weight for change, weight in changes if change is not None]
            change = made.change(layer)
            assert (change is None) == (not there)
            if change is not None:
                torch.testing.assert_close(change, sum(there))

    def save_and_load(self) -> None:
        [name], other = self.some(1), self.new_name()
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        self.model.load_adapter(self.folder / name, other, is_trainable=True)
        self.reference.adapters[other] = copy.deepcopy(self.reference.adapters[name])

    def swap(self) -> None:
        reference, [source], [name] = self.reference, self.some(1), self.some(1)
        self.model.save_pretrained(self.folder, selected_adapters=[source])
        beside = [other for other in reference.active if other != name]
        try:
            graphpeft.hotswap_adapter(self.model, self.folder / source, name)
        except REFUSED:
            assert name in reference.merged or reference.conflict([source, *beside])
            return
        assert name not in reference.merged
        reference.adapters[name] = copy.deepcopy(reference.adapters[source])
        # another adapter than one of the same form comes to weights that nothing is merged into
        assert self.model.merged_adapters in ([], reference.merged)
        reference.merged = self.model.merged_adapters

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def step(self) -> None:
        reference, target = self.reference, torch.randn(3, 4, dtype=torch.float64)
        self.model.zero_grad()
        loss = (self.model(IDS) - target).square().sum()
        if loss.requires_grad:
            loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        self.model.zero_grad()
        reference.step(target, 0.01)

    def unload(self) -> None:
        left = dict(self.reference.base)
        for name in self.reference.active:
            tensors = Explicit.of(self.model, name).tensors
            if "head.weight" in tensors:  # by modules_to_save
                left |= {key: tensors[key] for key in ("head.weight", "head.bias")}
        restored = self.model.unload()
        assert list(restored.state_dict()) == list(self.original.state_dict())
        assert [type(module) for module in restored.modules()] == [type(module) for module in self.original.modules()]
        for name, tensor in restored.state_dict().items():
            assert torch.equal(tensor, left[name])
        self.reference = Reference(restored)
        self.adapt()

    def merge_for_good(self) -> None:
        reference = self.reference
        acting = [*reference.merged, *(name for name in reference.active if name not in reference.merged)]
        expected = reference.weights(acting)
        merged = self.model.merge_and_unload()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])
        self.reference = Reference(merged)
        self.adapt()

    def mix(self) -> None:
        reference = self.reference
        names = [self.chance.choice([*reference.adapters, "__base__"]) for _ in IDS]
        try:
            found = self.model(IDS, adapter_names=names)
        except REFUSED:
            assert reference.merged
            return
        for row, name in enumerate(names):
            named = [name] if name != "__base__" and not reference.is_disabled else []
            torch.testing.assert_close(found[row], computed(IDS, reference.weights(named))[row])

    def compile(self) -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(self.model)(IDS), self.reference.output())

    # the sequence

    def do(self, operation: str) -> None:
        """Does one operation, after which the model is what the reference says."""
        self.done.append(operation)
        with warnings.catch_warnings():
            # of what is unmerged, merged already, or active after another one was deleted
            warnings.simplefilter("ignore", UserWarning)
            getattr(self, operation)()
        reference = self.reference
        assert self.model.active_adapters == reference.active
        assert self.model.merged_adapters == reference.merged
        assert list(self.model.peft_config) == list(reference.adapters)
        with torch.no_grad():
            torch.testing.assert_close(self.model(IDS), reference.output())


OPERATIONS = (
    "adapt", "add", "choose", "choose", "choose", "disable", "enable", "enable", "disable_for_a_while", "merge",
    "merge", "unmerge", "delete", "combine", "save_and_load", "copy", "step", "step", "unload", "merge_for_good", "mix",
    "mix", "swap",
)  # fmt: skip


def assert_sequence(seed: int, folder: Path, *last: str) -> None:
    """Ten operations, and some last ones, give what the reference says."""
    run = Run(seed, folder)
    try:
        for operation in [*run.chance.choices(OPERATIONS, k=10), *last]:
            run.do(operation)
    except BaseException as error:
        raise AssertionError(f"sequence {seed}: {', '.join(run.done)}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("group", range(4))
def test_what_is_done_with_adapters_has_the_effect_of_their_numbers(group: int, tmp_path: Path) -> None:
    for seed in range(10 * group, 10 * group + 10):
        assert_sequence(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("group", range(40))
def test_what_is_done_often_with_adapters_has_the_effect_of_their_numbers(group: int, tmp_path: Path) -> None:
    for seed in range(1000 + 50 * group, 1000 + 50 * group + 50):
        assert_sequence(seed, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_has_the_effect_of_these_numbers(tmp_path: Path) -> None:
    assert_sequence(5000, tmp_path, "compile")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(5001, 5030))
def test_compiled_models_have_the_effect_of_these_numbers(seed: int, tmp_path: Path) -> None:
    assert_sequence(seed, tmp_path, "compile")
