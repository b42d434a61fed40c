"""Any order of calls on an adapted model gives the outputs, active adapters and trained parameters that PEFT gives.

The same calls go to a model of each library, with equal values. Where the two differ on purpose the rule says why.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import graphpeft

LIBRARIES = (peft, graphpeft)
NAMES = ("a", "b", "c", "d")
LINEAR = ["lin0", "lin1"]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"r": 4, "lora_alpha": 12, "target_modules": LINEAR}),
    ("LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": [*LINEAR, "emb", "conv"], "use_rslora": True}),
    ("LoraConfig", {"r": 2, "lora_alpha": 7, "target_modules": ["lin0", "emb"], "modules_to_save": ["head"]}),
    ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    ("LoraConfig", {"r": 4, "target_modules": ["lin0"], "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin0": 9}}),
    ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["lin0"], "lora_bias": True}),
    ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["lin1"]}),
    ("LoHaConfig", {"r": 3, "alpha": 7, "target_modules": [*LINEAR, "conv"]}),
    ("LoKrConfig", {"r": 3, "alpha": 7, "target_modules": LINEAR}),
    ("OFTConfig", {"oft_block_size": 2, "target_modules": LINEAR}),
    ("VeraConfig", {"r": 4, "target_modules": ["lin1"]}),
    ("DeloraConfig", {"r": 4, "target_modules": LINEAR}),
    ("GraloraConfig", {"r": 4, "target_modules": ["lin0"], "gralora_k": 2}),
    ("MissConfig", {"r": 2, "target_modules": LINEAR}),
    ("RoadConfig", {"target_modules": LINEAR, "group_size": 2}),
    ("FourierFTConfig", {"n_frequency": 10, "target_modules": LINEAR}),
]
# PEFT's layers of other methods leave `adapter_names` out without a word
MIXED = ("LoraConfig", "RoadConfig")


class Net(nn.Module):
    """A layer of each kind that methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.lin0 = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 6, 3, padding=1)
        self.lin1 = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.lin0(self.emb(ids))).mT).mT
        return self.head(x + self.lin1(x))


class Lifecycle(RuleBasedStateMachine):
    """A model of each library, PEFT's first."""

    @initialize(method=st.sampled_from(METHODS), seed=st.integers(0, 99))
    def adapt(self, method: tuple[str, dict[str, Any]], seed: int) -> None:
        self.cls, self.options = method
        note(f"{self.cls}({self.options})")
        torch.manual_seed(seed)
        base, self.x = Net(), torch.randint(0, 11, (3, 4))
        self.models = [
            library.get_peft_model(copy.deepcopy(base), getattr(library, self.cls)(**self.options), "a")
            for library in LIBRARIES
        ]
        self.names = ["a"]
        self.give_values("a", seed)

    def give_values(self, name: str, seed: int) -> None:
        """Gives an adapter equal values that aren't its first ones; tensors that layers share keep theirs."""
        generator = torch.Generator().manual_seed(seed)
        theirs = peft.get_peft_model_state_dict(self.models[0], adapter_name=name)
        values = {
            key: value
            if "vera_A" in key or "vera_B" in key
            else value + torch.randn(value.shape, generator=generator) / 9
            for key, value in theirs.items()
        }
        for library, model in zip(LIBRARIES, self.models, strict=True):
            library.set_peft_model_state_dict(model, values, adapter_name=name)

    def each(self, call: Callable[[Any], Any]) -> list[Any]:
        return [call(model) for model in self.models]

    def equal(self, call: Callable[[Any], Tensor]) -> None:
        theirs, ours = self.each(call)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def chosen(self, places: Iterable[int], among: list[str] | None = None) -> list[str]:
        names = among or self.names
        return list(dict.fromkeys(names[place % len(names)] for place in places))

    @property
    def merged(self) -> list[str]:
        return self.models[1].get_model_status().merged_adapters

    @property
    def active(self) -> list[str]:
        return self.models[1].active_adapters

    @precondition(lambda self: not self.merged)
    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 99))
    def add(self, name: str, seed: int) -> None:
        if name in self.names:
            return
        more = {"r": 5, "lora_alpha": 3} if self.cls == "LoraConfig" and seed % 2 else {}
        for library, model in zip(LIBRARIES, self.models, strict=True):
            model.add_adapter(name, getattr(library, self.cls)(**self.options | more))
        self.names.append(name)
        self.give_values(name, seed)

    @rule(places=st.lists(st.integers(0, 9), min_size=1, max_size=2), is_frozen=st.booleans())
    def activate(self, places: list[int], is_frozen: bool) -> None:
        names = self.chosen(places)
        if self.options.get("modules_to_save"):
            names = names[:1]  # two that train one tensor can't act together here
        self.each(lambda model: model.base_model.set_adapter(names, inference_mode=is_frozen))
        theirs, ours = self.each(lambda model: model.get_nb_trainable_parameters()[0])
        # PEFT gives what it combines another rank than its config has, and leaves copies of modules trainable
        assert ours == theirs or "w" in names or self.options.get("modules_to_save")

    @precondition(lambda self: not self.merged)
    @rule(is_safe=st.booleans())
    def merge(self, is_safe: bool) -> None:
        # one of several that act and isn't merged goes on acting here, and doesn't in PEFT
        self.each(lambda model: model.merge_adapter(safe_merge=is_safe))

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.each(lambda model: model.unmerge_adapter())

    @precondition(lambda self: len(self.names) > 1)
    @rule(place=st.integers(0, 9))
    def delete(self, place: int) -> None:
        (name,) = self.chosen([place])
        if self.merged and name in (*self.merged, *self.active):
            return
        self.each(lambda model: model.delete_adapter(name))
        self.names.remove(name)

    @precondition(lambda self: self.cls == "LoraConfig" and len(self.names) > 1 and not self.merged)
    @rule(kind=st.sampled_from(["linear", "cat", "svd"]), weight=st.sampled_from([0.5, -1.5, 2.0]))
    def combine(self, kind: str, weight: float) -> None:
        configs = [self.models[1].peft_config[name] for name in self.names[:2]]
        is_plain = (
            not (configs[0].use_dora or configs[0].lora_bias or configs[0].use_rslora) and configs[0].r == configs[1].r
        )
        if "w" in self.names or not is_plain or self.options.get("modules_to_save"):
            return  # what PEFT refuses, fails at, or scales by √r too much
        self.each(lambda model: model.add_weighted_adapter(self.names[:2], [weight, 0.7], "w", combination_type=kind))
        self.names.append("w")

    @rule(is_training=st.booleans())
    def set_mode(self, is_training: bool) -> None:
        self.each(lambda model: model.train(is_training))

    @rule()
    def train(self) -> None:
        self.activate([0], False)
        self.each(self._step)

    def _step(self, model: Any) -> None:
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(2):
            model(self.x).square().mean().backward()
            nn.utils.clip_grad_norm_(trained, 0.1)  # or a method with a large scale leaves the finite numbers
            optimizer.step()
            optimizer.zero_grad()

    @precondition(lambda self: not self.merged)
    @rule(place=st.integers(0, 9), is_swapped=st.booleans(), is_trainable=st.booleans())
    def save_and_load(self, place: int, is_swapped: bool, is_trainable: bool) -> None:
        (name,) = self.chosen([place])
        if "l" in self.names or name == "w":
            return
        with tempfile.TemporaryDirectory() as folder:
            written = [Path(folder) / library.__name__ for library in LIBRARIES]
            for model, path in zip(self.models, written, strict=True):
                model.save_pretrained(str(path), selected_adapters=[name])
            for model, path in zip(self.models, reversed(written) if is_swapped else written, strict=True):
                model.load_adapter(str(path / name), "l", is_trainable=is_trainable)
        self.names.append("l")

    @rule()
    def copy_models(self) -> None:
        self.models = [copy.deepcopy(model) for model in self.models]

    @precondition(lambda self: not self.merged)
    @rule()
    def disable(self) -> None:
        def outputs(model: Any) -> Tensor:
            with model.disable_adapter():
                return model(self.x)

        self.equal(outputs)

    @precondition(lambda self: self.cls in MIXED and not self.options.get("use_dora") and not self.merged)
    @rule(places=st.lists(st.integers(0, 9), min_size=3, max_size=3))
    def mix(self, places: list[int]) -> None:
        among = [*self.names, "__base__"]
        names = [among[place % len(among)] for place in places]
        self.each(lambda model: model.eval())
        self.equal(lambda model: model(self.x, adapter_names=names))

    @rule(is_safe=st.booleans())
    def unload(self, is_safe: bool) -> None:
        self.equal(lambda model: copy.deepcopy(model).merge_and_unload(safe_merge=is_safe)(self.x))

    @invariant()
    def outputs_are_equal(self) -> None:
        self.equal(lambda model: model(self.x))

    @invariant()
    def states_are_equal(self) -> None:
        theirs, ours = self.each(lambda model: (list(model.active_adapters), sorted(model.peft_config)))
        assert ours == theirs


TestLifecycle = pytest.mark.filterwarnings("ignore")(Lifecycle.TestCase)
TestLifecycle.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
