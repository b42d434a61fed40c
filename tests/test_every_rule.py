"""The laws hold for every class of rules that there is."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import experts
import pytest
import torch
import torch.nn.functional as F
from contracts import CONTRACTS
from models import LLAMA, call
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphpeft.methods
from graphpeft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    TaskType,
    WeightDecomposedConfig,
    get_peft_model,
    optimize,
)
from graphpeft.graph.template import template_of
from graphpeft.passes import PASSES
from graphpeft.testing import assert_copies_stay_adapted, assert_two_adapters_act_together, laws

pytestmark = pytest.mark.quick("rules", "testing")


@functools.cache
def rules() -> dict[str, type]:
    """Returns the classes of rules, and of their parts, without bases, in ``graphpeft.methods``, by name."""
    found = {}
    for info in pkgutil.walk_packages(graphpeft.methods.__path__, "graphpeft.methods."):
        if info.name.startswith("graphpeft.methods.prompts"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and _is_rule(value):
                assert name not in found
                found[name] = value
    return found


def _is_rule(value: type) -> bool:
    is_one = hasattr(value, "enter") or (hasattr(value, "initialise") and hasattr(value, "parameters"))
    return is_one and not inspect.isabstract(value)


class Weights(nn.Module):
    """A table, a matrix and a stack of matrices, all of them plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 6) / 3)
        self.matrix = nn.Parameter(torch.randn(6, 6) / 3)
        self.stack = nn.Parameter(torch.randn(2, 6, 6) / 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table) * torch.softmax(self.matrix, 0).sum(1)
        return torch.einsum("bti,eoi->bto", x, self.stack)


class Rounded(nn.Module):
    """A linear layer whose weight is no floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 6
        self.register_buffer("numbers", torch.randint(-4, 4, (6, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers.float() / 8)  # type: ignore[operator]


class Modulated(nn.Module):
    """A convolution whose kernels its inputs scale, as in StyleGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 5, 3, 1) / 4)

    def forward(self, x: Tensor) -> Tensor:
        style = torch.sigmoid(x.mean((0, 2)))[:, None, None]
        return F.conv2d(x[..., None], self.kernel * style)[..., 0].tanh()


class Tied(nn.Module):
    """A head that has the table of an embedding as its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


class Case(NamedTuple):
    """A model in which a rule is used.

    Attributes:
        make: Builds it.
        config: A config that uses the rule there.
        inputs: Its inputs.
        is_verified: Whether the contract of the method has the laws for it already.
    """

    make: Callable[[], nn.Module]
    config: PeftConfig
    inputs: Any
    is_verified: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()


def lora(make: Callable[[], nn.Module], inputs: Tensor, target: str = "0", **options: Any) -> Case:
    return Case(make, LoraConfig(r=2, target_modules=[target], **options), (inputs,))


VECTORS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
GROUPED = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[0, 8, 3, 3, 1], [2, 2, 5, 7, 4]])
TEXT = {"input_ids": torch.arange(3, 13).view(2, 5), "use_cache": False}
IN_FRONT: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 3}


def prompt(config_class: Any, **options: Any) -> Case:
    inputs = TEXT | ({"task_ids": torch.tensor([1, 0])} if "num_tasks" in options else {})
    return Case(LLAMA.make, config_class(**IN_FRONT | options), inputs)


class Told(nn.Module):
    """A layer in a model that is told tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return torch.tanh(self.layer(x))


def of_contracts() -> dict[str, Case]:
    """Returns a case for each class of rules that the contracts of methods use, and for each class of its parts."""
    found: dict[str, Case] = {}
    for contract in CONTRACTS:
        for each in (*contract.beyond, *contract.cases):
            case = Case(each.make, contract.our_config(each), each.inputs(), is_verified=each in contract.beyond)
            for adapted in get_peft_model(each.build(), case.config).adapter_report().adapted:
                for part in parts_of(adapted.rule):
                    if part.__name__ in rules():
                        found.setdefault(part.__name__, case)
    return found


def parts_of(rule: Any) -> Iterator[type]:
    """Yields the class of a rule, and those of its parts."""
    yield type(rule)
    if dataclasses.is_dataclass(rule):
        for field in dataclasses.fields(rule):
            yield from parts_of(getattr(rule, field.name))


CASES = {
    **of_contracts(),
    "Poly": Case(
        Told,
        PolyConfig(r=2, n_tasks=3, target_modules=["layer"]),
        {"x": VECTORS, "task_ids": torch.tensor([2, 0])},
    ),
    "LoraLinear": lora(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), VECTORS),
    "LoraConvolution": lora(lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.Tanh()), VECTORS),
    "LoraWithinGroups": lora(lambda: nn.Sequential(nn.Conv1d(6, 9, 3, groups=3, padding=1), nn.Tanh()), GROUPED),
    "LoraEmbedding": lora(lambda: nn.Sequential(nn.Embedding(9, 6), nn.Tanh()), TOKENS),
    "LoraTable": lora(Weights, TOKENS, "table"),
    "LoraMatrix": lora(Weights, TOKENS, "matrix"),
    "LoraExperts": lora(Weights, TOKENS, "stack"),
    "LoraParts": lora(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh()), VECTORS, target_parts={"0": [[0, 3], [6, 9]]}),
    "LoraKernels": lora(Modulated, VECTORS, "kernel"),
    "LoraLeaf": lora(lambda: nn.Sequential(Rounded(), nn.Tanh()), VECTORS),
    "Dora": lora(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), VECTORS, use_dora=True),
    "WeightDecomposed": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
        WeightDecomposedConfig(direction=LoHaConfig(r=2, alpha=3, target_modules=["0"])),
        (VECTORS,),
    ),
    "Activated": Case(LLAMA.make, LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[4, 5]), TEXT),
    "LoraTied": lora(Tied, TOKENS, "head", ensure_weight_tying=True),
    "TokenTable": prompt(PromptTuningConfig),
    "MLP": prompt(PromptEncoderConfig, encoder_hidden_size=8),
    "LSTM": prompt(PromptEncoderConfig, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    "PrefixTable": prompt(PrefixTuningConfig),
    "Projection": prompt(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8),
    "AdaptionPrompt": Case(LLAMA.make, AdaptionPromptConfig(adapter_len=3, adapter_layers=1), TEXT),
    "Cartridge": prompt(CartridgeConfig),
    "Shadow": Case(LLAMA.make, ShadowConfig(r=3), TEXT),
    "XLora": Case(experts.Text, experts.config(experts.TEXT, hidden_size=8), {"input_ids": TEXT["input_ids"]}),
    "TaskTokens": prompt(MultitaskPromptTuningConfig, num_tasks=2),
    "Context": Case(
        LLAMA.make,
        CPTConfig(task_type=TaskType.CAUSAL_LM, cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 3]),
        TEXT,
    ),
}
CASES["PrependedContext"] = CASES["Context"]

each_rule = pytest.mark.parametrize("name", CASES)


def test_every_class_of_rules_has_a_case() -> None:
    used = {base.__name__ for name in CASES for base in rules()[name].__mro__}
    # what reads codes or rounds has its laws elsewhere: in test_quantised_dora.py, test_hira.py, test_merge_aware.py;
    # a router has no values of its own: test_arrow.py
    assert set(rules()) - used == {"Arrow", "DoraLeaf", "HiraLeaf", "Rounded", "RoundedLeaf"}


@each_rule
def test_the_case_of_a_rule_uses_it(name: str) -> None:
    case = CASES[name]
    model = get_peft_model(case.build(), case.config, example_inputs=case.inputs)
    used = [part for adapted in model.adapter_report().adapted for part in parts_of(adapted.rule)]
    assert rules()[name] in used


LAWS = (
    laws.assert_fresh_adapter_changes_no_output,
    laws.assert_only_the_adapter_is_trained,
    laws.assert_adapted_is_base_with_delta,
    laws.assert_saved_is_loaded,
    laws.assert_traced_is_adapted_alike,
    laws.assert_dry_runs_change_nothing,
    assert_copies_stay_adapted,
    assert_two_adapters_act_together,
)


def speaks_of(law: Any, case: Case) -> bool:
    """Returns whether a law speaks of a case."""
    if law is laws.assert_fresh_adapter_changes_no_output:
        return bool(case.config.starts_as_identity)
    if law is assert_two_adapters_act_together and getattr(case.config, "kasa_config", None):
        return False  # both have another weight in the place of the module's own
    if law is laws.assert_only_the_adapter_is_trained and isinstance(case.config, ShadowConfig):
        return False  # as in PEFT, nothing reads the state behind the last layer
    if law is assert_two_adapters_act_together and isinstance(case.config, PrefixTuningConfig | CartridgeConfig):
        return False  # the second one could not tell where a sequence begins, and is refused
    # a prompt in front of a Transformers model isn't for its graph
    return law is not laws.assert_traced_is_adapted_alike or isinstance(case.inputs, tuple)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        pytest.param(name, law, id=f"{name}-{law.__name__}")
        for name, case in CASES.items()
        if not case.is_verified
        for law in LAWS
        if speaks_of(law, case)
    ],
)
def test_a_law_holds(name: str, law: Any) -> None:
    case = CASES[name]
    law(case.build, case.config, case.inputs)


# no sum with a factor: the default backend of torch.compile in PyTorch 2.13 makes an addmm of it, without the factor

SUMS = ("add", "add_", "sub", "sub_", "rsub")


class FactorsSeen(TorchDispatchMode):
    """Records the sums with a factor among PyTorch's operators, as a compiler does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SUMS and (len(args) > 2 or (kwargs or {}).get("alpha", 1) != 1):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


def is_of_a_batch(rule: Any) -> bool:
    """Returns whether a rule can't be one of several in a batch."""
    return bool(rule.reads_whole_batch or rule.call_inputs)


def sums_with_factors(graph: fx.Graph) -> list[str]:
    names = {node: getattr(node.target, "__name__", str(node.target)).split(".")[0] for node in graph.nodes}
    return [node.format_node() or "" for node in graph.nodes if names[node] in SUMS and "alpha" in node.kwargs]


ALL = [each.name for each in PASSES]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        pytest.param(name, passes, id=f"{name}-{'+'.join(passes) or 'plain'}")
        for name, case in CASES.items()
        # a prompt has no branch that a pass could change
        for passes in ([], ALL, *([each] for each in ALL if isinstance(case.inputs, tuple)))
    ],
)
def test_no_rule_and_no_pass_leaves_a_factor_in_a_sum(name: str, passes: list[str]) -> None:
    case = CASES[name]
    model = get_peft_model(case.build(), case.config, example_inputs=case.inputs)
    optimize(model, passes)
    templates = [template for module in model.modules() if (template := template_of(module)) is not None]
    found = [line for template in templates for graph in template.graphs for line in sums_with_factors(graph)]
    assert not found
    with FactorsSeen() as seen:
        call(model, case.inputs)
        if isinstance(case.inputs, tuple) and not any(
            is_of_a_batch(each.rule) for each in model.adapter_report().adapted
        ):
            model(*case.inputs, adapter_names=["default", *["__base__"] * (len(case.inputs[0]) - 1)])
    assert not seen.found
