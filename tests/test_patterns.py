"""The first pattern that fits gives a rank or α, and what that was in the model it is in every reader of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from models import VIT, llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from graphpeft import (
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    LoHaConfig,
    LoraConfig,
    LoraPerCallConfig,
    PeftModel,
    TargetedConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    trace,
)
from graphpeft.rules.options import Number, Turned
from graphpeft.targeting.patterns import Pattern
from graphpeft.testing import laws

pytestmark = [
    # what PEFT warns of is PEFT's
    pytest.mark.filterwarnings("ignore:::peft"),
    # PEFT uses the key, and looks for it among modules alone
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


class Nested(nn.Module):
    """Layers whose names are ends of one another."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.inner = Nested(depth - 1) if depth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.up(x)))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Products(nn.Module):
    """Weights whose names are ends of one another, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Product(), nn.ModuleDict({"one": Product(), "up": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.two["up"](torch.tanh(self.two["one"](torch.tanh(self.one(x)))))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.over = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.mha(x, x, x)[0]
        return self.over["mha"](x, x, x)[0]


class Twice(nn.Module):
    """A layer that is called twice, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"up": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["up"](self.up(torch.tanh(self.up(x))))


class Case(NamedTuple):
    """A model, and what is adapted in it.

    Attributes:
        name: What it is called.
        make: Builds it.
        inputs: Its inputs.
        options: What names the targets.
        one: A pattern for one of them.
        warning: What PEFT warns of when it reads the file.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    options: dict[str, Any]
    one: str
    warning: str | None = None

    def build(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()

    def __str__(self) -> str:
        return self.name


def _numbers(*shape: int) -> Any:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


def llama() -> nn.Module:
    return LlamaForCausalLM(llama_config(use_cache=False))


IDS = {"input_ids": torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(1))}
CASES = [
    Case("layers", Nested, _numbers(4, 6), {"target_modules": ["up"]}, r"inner\.up"),
    Case("weights", Products, _numbers(4, 6), {"target_modules": [], "target_parameters": ["one.w"]}, r"^one\.w"),
    Case("both", Products, _numbers(4, 6), {"target_modules": ["up"], "target_parameters": ["one.w"]}, r"two\.one\.w"),
    Case("attentions", Attending, _numbers(2, 5, 8), {"target_modules": ["mha"]}, "^mha"),
    Case(
        "replicated-layers",
        llama,
        IDS,
        {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]},
        r"layers\.2\..*",
    ),
    Case(
        "parts",
        VIT.build,
        VIT.inputs(),
        {"target_modules": ["qkv", "fc1"], "target_parts": {"qkv": ["q", "k", "v"]}},
        r"blocks\.1\..*",
        warning="target_parts",
    ),
]
PATTERNS: dict[str, Callable[[str], dict[str, Any]]] = {
    "alpha": lambda one: {"alpha_pattern": {one: 8, ".*": 1}},
    "rank": lambda one: {"rank_pattern": {one: 5, ".*": 3}},
    "both": lambda one: {"rank_pattern": {one: 2, ".*": 3}, "alpha_pattern": {one: 0.7, "(.*)": 7.3}},
    "rslora": lambda one: {"rank_pattern": {one: 3, ".*": 4}, "alpha_pattern": {one: 0.7}, "use_rslora": True},
}
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_pattern = pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)


def adapted(case: Case, patterns: Callable[[str], dict[str, Any]]) -> Any:
    config = LoraConfig(r=2, lora_alpha=5, **case.options, **patterns(case.one))
    return laws.perturbed(get_peft_model(case.build(), config, example_inputs=case.inputs))


def ranks_and_scales(model: Any) -> list[tuple[Any, ...]]:
    return [
        (a.site.label, {name: spec.shape for name, spec in a.specs.items()}, a.constants)
        for a in model.adapter_report().adapted
    ]


def reorder(folder: Path, backwards: bool) -> None:
    """Rewrites the patterns of a file by their keys."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = dict(sorted(config[name].items(), reverse=backwards))
    path.write_text(json.dumps(config))


@each_pattern
@each_case
@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_saved_has_the_same_ranks_and_scales_in_whichever_order_patterns_are_read(
    case: Case, patterns: Callable[[str], dict[str, Any]], backwards: bool, tmp_path: Path
) -> None:
    model = adapted(case, patterns)
    assert len({str(found[1:]) for found in ranks_and_scales(model)}) > 1
    model.save_pretrained(tmp_path)
    reorder(tmp_path, backwards)
    again = PeftModel.from_pretrained(case.build(), tmp_path, example_inputs=case.inputs)
    assert ranks_and_scales(again) == ranks_and_scales(model)
    require_close(laws.run(again, case.inputs), laws.run(model, case.inputs))


@each_pattern
@each_case
def test_peft_reads_the_same_ranks_and_scales_and_writes_them_for_us(
    case: Case, patterns: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    model = adapted(case, patterns)
    expected = laws.run(model, case.inputs)
    model.save_pretrained(tmp_path / "ours")
    if case.warning is not None:
        with pytest.warns(UserWarning, match=case.warning):
            theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path / "ours")).eval()
    else:
        theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path / "ours")).eval()
    require_close(laws.run(theirs, case.inputs), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(case.build(), tmp_path / "theirs", example_inputs=case.inputs)
    require_close(laws.run(again, case.inputs), expected)


def require_close(found: Any, expected: Any) -> None:
    laws.require_close(getattr(found, "logits", found), getattr(expected, "logits", expected), 1e-6, "what is loaded")


@each_pattern
def test_adapters_of_calls_are_saved_with_their_own_ranks_and_scales(
    patterns: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    inputs = _numbers(4, 6)

    def traced() -> nn.Module:
        torch.manual_seed(0)
        return trace(Twice().eval(), inputs)

    config = LoraPerCallConfig(r=2, lora_alpha=5, target_modules=["up"], **patterns(r"up\.call_2"))
    model = laws.perturbed(get_peft_model(traced(), config))
    assert len({str(found[1:]) for found in ranks_and_scales(model)}) > 1
    model.save_pretrained(tmp_path)
    for backwards in (False, True):
        reorder(tmp_path, backwards)
        again: Any = PeftModel.from_pretrained(traced(), tmp_path)
        assert ranks_and_scales(again) == ranks_and_scales(model)
        laws.require_equal(laws.run(again, inputs), laws.run(model, inputs), "what is loaded")


def test_ranks_that_eva_finds_are_those_of_their_layer_alone() -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up"], init_lora_weights="eva")
    model = get_peft_model(Nested(), config)
    found = {"up": torch.randn(3, 6), "inner.up": torch.randn(1, 6), "inner.inner.up": torch.randn(2, 6)}
    initialize_lora_eva_weights(model, eva_state_dict=found)
    adapted = {a.site.name: a for a in model.adapter_report().adapted}
    assert {name: a.specs["lora_A"].shape[0] for name, a in adapted.items()} == {k: len(A) for k, A in found.items()}
    assert {a.constants["lora_scaling"] for a in adapted.values()} == {2}


def test_a_file_has_patterns_for_what_differs_alone(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"up": 3, "inner.up": 5}, "alpha_pattern": {"^up": 7, ".*": 4}}
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["up"], **patterns)
    get_peft_model(Nested(), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["rank_pattern"], saved["alpha_pattern"]) == ({}, {"^up$": 7})


def test_a_config_by_itself_is_read_with_its_patterns_in_their_order(tmp_path: Path) -> None:
    LoraConfig(target_modules=["up"], alpha_pattern={"up": 8, ".*": 1}).save_pretrained(tmp_path)
    assert list(LoraConfig.from_pretrained(tmp_path).alpha_pattern) == ["up", ".*"]  # type: ignore[attr-defined]


# of any method


@dataclass(kw_only=True)
class ByNameConfig(TargetedConfig):
    """Of a method that declares which of its options have patterns."""

    peft_type: ClassVar[str] = "BY_NAME"
    patterns: ClassVar[Mapping[str, str]] = {"factor": "factor_pattern"}

    factor: Number = 1.0
    factor_pattern: dict[str, Number] = field(default_factory=dict)
    is_turned: Turned = False


def test_options_that_a_method_declares_have_values_by_patterns_in_a_model_and_in_its_file() -> None:
    config = ByNameConfig(factor_pattern={"up": 2.0, "inner.up": 3.0})
    assert config.target_options.patterns == {"factor_pattern": {"up": 2.0, "inner.up": 3.0}}
    sites = [SimpleNamespace(name=name, transposed=True) for name in ("up", "inner.up", "down")]
    assert [config.value_at("factor", site) for site in sites] == [2.0, 2.0, 1.0]
    in_file: Any = config.for_file(sites)
    assert in_file.factor_pattern == {"^up$": 2.0, r"^inner\.up$": 2.0}
    assert in_file.is_turned
    assert not config.is_turned
    sites[0].transposed = False
    assert not config.for_file(sites).is_turned  # type: ignore[attr-defined]
    assert not config.for_file([]).is_turned  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (LoraConfig, "rank_pattern"),
        (LoHaConfig, "alpha_pattern"),
        (HiraConfig, "rank_pattern"),
        (DeloraConfig, "lambda_pattern"),
        (FourierFTConfig, "n_frequency_pattern"),
    ],
)
def test_null_in_a_file_is_no_patterns(method: type[Any], option: str) -> None:
    assert getattr(method(**{option: None}), option) == {}


@pytest.mark.parametrize("use", ["match", "fullmatch", "search", "sub"])
def test_each_use_of_a_pattern_has_a_time_after_which_it_ends(use: str) -> None:
    pattern: Any = Pattern("a.*", "a.*", "target_modules")
    seconds: list[float] = []

    def timed(*_: str, timeout: float) -> None:
        seconds.append(timeout)

    pattern._compiled = SimpleNamespace(**{use: timed})
    getattr(pattern, use)(*["name"] * (2 if use == "sub" else 1))
    assert len(seconds) == 1
    assert 0 < seconds[0] < 1
