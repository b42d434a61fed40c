"""Configs that see all their sites, or change while they are trained: AdaLoRA, beside PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import torch.nn.functional as F
from models import LLAMA, output
from oracle import perturb
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    FileForm,
    Mergeable,
    OperationRule,
    ParameterSpec,
    PeftType,
    SiteParameters,
    TargetedConfig,
    get_peft_model,
    register,
)
from graphpeft.rules import registry

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


@dataclass(frozen=True)
class AdaLora(OperationRule, Mergeable):
    """ΔW = s · B (E ⊙ A)."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        mask = (config.rank_pattern or {}).get(f"{site.name}.lora_E")
        r = config.init_r if mask is None else sum(mask)
        shapes = {"lora_A": (r, site.in_features), "lora_E": (r, 1), "lora_B": (site.out_features, r)}
        return {name: ParameterSpec(shape, key=name) for name, shape in shapes.items()}

    def constants(self, site: Any, config: Any) -> dict[str, float]:
        return {"s": config.lora_alpha / (config.init_r + 1e-5)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        for name in ("lora_A", "lora_E", "lora_B"):
            nn.init.normal_(parameters[name])
        torch.randn(1)  # PEFT's `ranknum`
        nn.init.zeros_(parameters["lora_E"])
        for name in ("lora_A", "lora_B"):
            nn.init.normal_(parameters[name], 0, 0.02)

    def rewrite(self, x: Any, y: Any, lora_A: Any, lora_E: Any, lora_B: Any, s: Any) -> Any:
        return y + F.linear(F.linear(x, lora_A * lora_E), lora_B) * s

    def delta(self, lora_A: Any, lora_E: Any, lora_B: Any, s: Any) -> Any:
        return lora_B @ (lora_A * lora_E) * s


@dataclass(kw_only=True)
class AdaLoraConfig(TargetedConfig):
    """The options that train; PEFT takes its defaults for the others."""

    peft_type: ClassVar[PeftType] = PeftType.ADALORA
    changed_by_training: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})

    lora_alpha: int = 8
    init_r: int = 4
    target_r: int = 2
    tinit: int = 1
    tfinal: int = 2
    deltaT: int = 1  # noqa: N815
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = 8
    rank_pattern: dict[str, list[bool]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._averages: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    @property
    def starts_as_identity(self) -> bool:
        return True

    def rule_for(self, site: Any, dtype: torch.dtype) -> AdaLora:
        return AdaLora()

    def penalty(self, sites: Sequence[SiteParameters]) -> Tensor:
        factors = [p for _, at in sites for p in (at["lora_A"], at["lora_B"].T)]
        norms = [torch.norm(p @ p.T - torch.eye(len(p))) for p in factors]
        return self.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, step: int, sites: Sequence[SiteParameters]) -> None:
        end = self.total_step - self.tfinal
        if step < end:
            self._averages = {
                (site.name, name): self._averaged((site.name, name), parameter)
                for site, parameters in sites
                for name, parameter in parameters.items()
            }
        left = max(0.0, 1 - (step - self.tinit) / (end - self.tinit))
        budget = int((self.init_r - self.target_r) * len(sites) * left**3 + self.target_r * len(sites))
        if self.tinit < step <= end and (step % self.deltaT == 0 or step == end):
            scores = {site.name: self._scores(site.name) for site, _ in sites}
            least = torch.cat(list(scores.values())).kthvalue(self.init_r * len(sites) - budget).values
            self.rank_pattern = {f"{name}.lora_E": (score > least).tolist() for name, score in scores.items()}
        kept = self.rank_pattern or {}
        for site, parameters in sites if kept else ():
            parameters["lora_E"][~torch.tensor(kept[f"{site.name}.lora_E"])] = 0

    def _averaged(self, key: tuple[str, str], parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        if parameter.grad is None:
            raise ValueError(f"{key[1]} of {key[0]} has no gradient; call it before the gradients are set to zero")
        importance = (parameter * parameter.grad).abs()
        mean, spread = self._averages.get(key, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
        mean = self.beta1 * mean + (1 - self.beta1) * importance
        return mean, self.beta2 * spread + (1 - self.beta2) * (importance - mean).abs()

    def _scores(self, name: str) -> Tensor:
        a, e, b = (torch.mul(*self._averages[name, local]) for local in ("lora_A", "lora_E", "lora_B"))
        return e.flatten() + a.mean(dim=1) + b.mean(dim=0)

    def file_form(self, site: Any, name: str, spec: ParameterSpec) -> FileForm | None:
        kept = torch.tensor((self.rank_pattern or {}).get(f"{site.name}.lora_E", [True] * self.init_r))
        axis = 1 if name == "lora_B" else 0
        if kept.all() or spec.shape[axis] == kept.sum():
            return None
        places = kept.nonzero().flatten()
        shape = tuple(len(places) if at == axis else size for at, size in enumerate(spec.shape))

        def unpack(tensor: Tensor) -> Tensor:
            return torch.zeros(spec.shape, dtype=tensor.dtype).index_copy(axis, places, tensor)

        return FileForm(shape, lambda tensor: tensor.index_select(axis, places), unpack)


@dataclass(frozen=True)
class Numbered(OperationRule):
    """y · (1 + the site's place among all sites)."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"factor": ParameterSpec((), key="factor")}

    def constants(self, site: Any, config: Any) -> dict[str, float]:
        return {"place": config.places[site.name]}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        nn.init.ones_(parameters["factor"])

    def rewrite(self, y: Any, factor: Any, place: Any) -> Any:
        return y * (factor + place)


@dataclass(kw_only=True)
class NumberedConfig(TargetedConfig):
    peft_type: ClassVar[Any] = "NUMBERED"
    asked: ClassVar[list[int]] = []

    def __post_init__(self) -> None:
        super().__post_init__()
        self.places: dict[str, int] = {}

    def prepared(self, sites: Sequence[Any]) -> NumberedConfig:
        if len(sites) > 3:
            raise ValueError("there are numbers for three sites at most; name fewer in target_modules")
        self.asked.append(len(sites))
        config = NumberedConfig(target_modules=self.target_modules)
        config.places = {site.name: place for place, site in enumerate(sites)}
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> Numbered:
        return Numbered()


@pytest.fixture(autouse=True)
def _methods(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers both methods for the time of a test."""
    for config_class in (AdaLoraConfig, NumberedConfig):
        registry._REGISTRY.pop(config_class.peft_type, None)
        monkeypatch.setattr(config_class, "__init__", config_class.__init__)
        register(config_class)
    NumberedConfig.asked.clear()


# prepared


def layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


X = torch.ones(2, 4)


def test_a_config_sees_all_sites_once_before_its_rules(tmp_path: Path) -> None:
    model = get_peft_model(layers(3), NumberedConfig(target_modules=["0", "1", "2"]))
    assert NumberedConfig.asked == [3]
    expected = X
    for place, layer in enumerate(layers(3).children()):
        expected = layer(expected) * (1 + place)
    torch.testing.assert_close(model(X), expected)
    model.save_pretrained(tmp_path)
    assert "places" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert torch.equal(graphpeft.PeftModel.from_pretrained(layers(3), tmp_path)(X), model(X))


def test_a_config_sees_the_sites_that_are_meant() -> None:
    config = NumberedConfig(target_modules=["0", "1", "2"])
    model = get_peft_model(layers(3), config, where=lambda site: site.name != "0")
    assert NumberedConfig.asked == [2]
    first, second, third = layers(3).children()
    torch.testing.assert_close(model(X), third(second(first(X))) * 2)
    assert config.places == {}


def test_what_cannot_be_prepared_is_refused() -> None:
    model = layers(4)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(AdaptError, match="numbers for three sites at most"):
        get_peft_model(model, NumberedConfig(target_modules=["0", "1", "2", "3"]))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


# AdaLoRA

OPTIONS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",  # without, PEFT adds no penalty
    "target_modules": ["q_proj", "v_proj"],
    **{name: getattr(AdaLoraConfig, name) for name in ("init_r", "target_r", "tinit", "tfinal", "total_step")},
}


def adapted(library: Any) -> Any:
    model = LLAMA.build()
    torch.manual_seed(1)
    return library.get_peft_model(model, (AdaLoraConfig if library is graphpeft else peft.AdaLoraConfig)(**OPTIONS))


def losses(model: Any, allocate: Any) -> Iterator[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for step in range(1, AdaLoraConfig.total_step + 1):
        inputs = LLAMA.inputs(step)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        yield loss.item()


def trained(library: Any) -> tuple[Any, list[float]]:
    model = adapted(library)
    allocate = (model if library is graphpeft else model.base_model).update_and_allocate
    return model.train(), list(losses(model, allocate))


@pytest.mark.filterwarnings("ignore:adapter_config.json has keys")  # an option of LoRA's
def test_adalora_trains_as_pefts_and_files_go_both_ways(tmp_path: Path) -> None:
    (ours, our_losses), (theirs, their_losses) = trained(graphpeft), trained(peft)
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=1e-5)
    for model, folder in ((ours.eval(), "ours"), (theirs.eval(), "theirs")):
        model.save_pretrained(str(tmp_path / folder))
    configs = [json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    ranks = [sum(kept) for kept in configs[0]["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks)
    inputs = LLAMA.inputs()
    expected = output(theirs, inputs)
    assert (expected - output(LLAMA.build(), inputs)).abs().max() > 1e-3
    loaded = [
        ours,
        peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "ours")).eval(),
        graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "theirs"),
        graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "ours"),
    ]
    for model in loaded:
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    found, wanted = (graphpeft.get_peft_model_state_dict(model) for model in loaded[2:])
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in wanted.items()}


def test_a_packed_file_goes_back_into_the_model_that_was_trained(tmp_path: Path) -> None:
    model, _ = trained(graphpeft)
    inputs = LLAMA.inputs()
    expected, saved = output(model.eval(), inputs), graphpeft.get_peft_model_state_dict(model)
    perturb(model)
    graphpeft.set_peft_model_state_dict(model, saved)
    torch.testing.assert_close(output(model, inputs), expected)


def test_the_penalty_is_added_where_the_adapter_acts_and_is_trained() -> None:
    inputs = LLAMA.inputs()
    model = adapted(graphpeft)

    def loss() -> float:
        return model(**inputs, labels=inputs["input_ids"]).loss.item()

    base: Any = LLAMA.build()
    plain = base(**inputs, labels=inputs["input_ids"]).loss.item()
    sites = [
        SiteParameters(a.site, {n: model.get_submodule(a.site.owner).get_parameter(a.names[n]) for n in a.specs})
        for a in model.adapter_report().adapted
    ]
    penalty = model.peft_config["default"].penalty(sites).item()
    assert penalty > 0.1
    assert loss() == pytest.approx(plain + penalty)
    with model.disable_adapter():
        assert loss() == pytest.approx(plain)
    assert isinstance(model(**inputs, labels=inputs["input_ids"], return_dict=False), tuple)
    model.set_adapter("default", inference_mode=True)
    assert loss() == pytest.approx(plain)


def test_a_step_that_fails_or_is_interrupted_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(graphpeft)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.peft_config["default"]
    attributes = dict(vars(config))
    with pytest.raises(
        AdaptError, match=r"lora_\w of .* has no gradient; call it before the gradients are set to zero"
    ):
        model.update_and_allocate(1)

    def interrupted(self: Any, step: int, sites: Sequence[SiteParameters]) -> None:
        self.rank_pattern, self.new = {}, 1
        for parameter in sites[0].parameters.values():
            parameter.fill_(7)
        raise KeyboardInterrupt

    monkeypatch.setattr(AdaLoraConfig, "after_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.update_and_allocate(1)
    assert vars(config) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_a_method_that_changes_there_is_nothing_to_update() -> None:
    model = get_peft_model(LLAMA.build(), LLAMA.config())
    assert not hasattr(model, "update_and_allocate")
