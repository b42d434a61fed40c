"""The methods whose change is a product of factors that are made from shared tensors: what all of them can do."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from models import BERT, GPT2, LLAMA, T5, Example, call, result
from oracle import Case
from test_quantised import by_bitsandbytes
from test_written_methods import moved
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import PeftModel, get_peft_model_state_dict
from graphpeft.testing import verify

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}")
    for begins in ("fan_in_fan_out is set to False", "no gradient goes through")
]
"""Warnings of PEFT's, and one of what is meant here."""


class Method(NamedTuple):
    """A method with options for small layers, all of whose sizes are multiples of 2.

    Attributes:
        name: The name of its config class.
        options: The options, by which a fresh adapter changes outputs.
        biases: The value of `bias` by which the adapted layers' are trained.
        is_for_quantised: Whether PEFT has it for quantised layers.
    """

    name: str
    options: dict[str, Any]
    biases: str
    is_for_quantised: bool = False

    def config(self, library: Any = graphpeft, **options: Any) -> Any:
        return getattr(library, self.name)(**self.options | options)

    def adapted(self, library: Any, base: nn.Module, **options: Any) -> Any:
        """Returns a copy of a model with a new adapter."""
        torch.manual_seed(2)
        return library.get_peft_model(copy.deepcopy(base), self.config(library, **options))

    def __str__(self) -> str:
        return self.name.removesuffix("Config")


METHODS = [
    Method("VeraConfig", {"r": 3, "init_weights": False}, "vera_only", is_for_quantised=True),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


class Layers(nn.Sequential):
    """Layers of several sizes, one of which stores its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh(), Conv1D(10, 4))


TARGETS = ["0", "2", "4"]


def build(cls: type[nn.Module] = Layers) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def inputs() -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", [LLAMA, GPT2, BERT, T5], ids=str)
@each_method
def test_defaults_name_the_targets_that_pefts_do(method: Method, example: Example):
    theirs, ours = (method.adapted(library, example.build()).eval() for library in (peft, graphpeft))
    assert get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    expected = result(call(theirs, example.inputs()))
    torch.testing.assert_close(result(call(ours, example.inputs())), expected)
    assert not torch.equal(expected, result(call(example.build(), example.inputs())))


@each_method
def test_a_training_step_has_pefts_outputs_gradients_and_random_numbers(method: Method):
    found = []
    dropout = f"{method.biases.removesuffix('_only')}_dropout"
    for library in (peft, graphpeft):
        model = method.adapted(library, build(), target_modules=TARGETS, **{dropout: 0.3}).train()
        torch.manual_seed(5)
        output = model(inputs())
        output.square().sum().backward()
        gradients = sorted((p.grad for p in model.parameters() if p.requires_grad), key=lambda g: (g.shape, g.sum()))
        found.append((output, gradients, torch.get_rng_state()))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    assert torch.equal(found[1][2], found[0][2])


@each_method
def test_biases_that_are_trained_go_both_ways(method: Method, tmp_path: Path):
    for bias in ("all", method.biases):
        folder = tmp_path / bias
        models = [moved(method.adapted(lib, build(), target_modules=["0"], bias=bias)) for lib in (peft, graphpeft)]
        for model, library, name in ((models[0], graphpeft, "theirs"), (models[1], peft, "ours")):
            model.save_pretrained(str(folder / name))
            loaded = library.PeftModel.from_pretrained(build(), str(folder / name)).eval()
            torch.testing.assert_close(loaded(inputs()), model(inputs()))
        theirs, ours = peft.get_peft_model_state_dict(models[0]), get_peft_model_state_dict(models[1])
        assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}


class Uses(nn.Module):
    """Weights that PEFT's layers can't adapt: of convolutions, stacks of experts, and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)
        self.turned = nn.ConvTranspose1d(8, 6, 2, groups=2)
        self.w, self.experts = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.named = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(self.grouped(self.one(x).tanh()).tanh()).tanh() @ self.w
        h = torch.einsum("bcd,edf->bcf", h, self.experts)
        return torch.einsum("bcd,do->bco", h, self.named)


class Attention(nn.Module):
    """An attention whose queries, keys and values have one weight, which PyTorch reads by a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("cls", "targets", "shape"),
    [
        (Layers, TARGETS, (4, 3, 6)),
        (Uses, ["one", "grouped", "turned", "w", "experts", "named"], (2, 4, 9)),
        (Attention, ["self_attn", "linear1"], (2, 5, 8)),
    ],
    ids=["layers", "other-uses", "attention"],
)
@each_method
def test_every_law_holds(method: Method, cls: type[nn.Module], targets: list[str], shape: tuple[int, ...]):
    verification = verify(
        build(cls), method.config(target_modules=targets), (torch.randn(shape),), progress=False, quiet=True
    )
    assert verification.holds, verification


@each_method
def test_rows_of_a_batch_have_adapters_of_their_own(method: Method):
    model = moved(method.adapted(graphpeft, build(), target_modules=TARGETS))
    model.add_adapter("other", method.config(target_modules=["0", "4"]))
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = moved(model, seed=len(name))(inputs())
    expected["__base__"] = build()(inputs())
    names = ["default", "other", "__base__", "default"]
    found = model(inputs(), adapter_names=names)
    torch.testing.assert_close(found, torch.stack([expected[name][row] for row, name in enumerate(names)]))


@pytest.mark.parametrize("method", [method for method in METHODS if method.is_for_quantised], ids=str)
def test_quantised_layers_have_pefts_outputs(method: Method, tmp_path: Path):
    case = Case("4 bits", by_bitsandbytes(__import__("bitsandbytes").nn.LinearNF4), lambda: (torch.randn(3, 64),))
    theirs = moved(method.adapted(peft, case.build(), target_modules=["0", "2"]))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(case.build(), tmp_path).eval()
    torch.testing.assert_close(ours(*case.inputs()), theirs(*case.inputs()))


@each_method
def test_an_operation_never_makes_the_whole_change(method: Method):
    model = method.adapted(graphpeft, nn.Sequential(nn.Linear(64, 64)), target_modules=["0"])
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **kwargs or {})
            if isinstance(made, Tensor) and "mm" in str(func):
                sizes.append(made.numel())
            return made

    with Sizes():
        model(torch.randn(2, 64))
    assert sizes
    assert max(sizes) < 64 * 64


@each_method
def test_a_bfloat16_base_is_merged_within_its_rounding(method: Method):
    model = moved(method.adapted(graphpeft, build().to(torch.bfloat16), target_modules=TARGETS))
    x = inputs().to(torch.bfloat16)
    active = model(x)
    assert active.dtype == torch.bfloat16
    torch.testing.assert_close(model.merge_and_unload()(x), active, atol=0.06, rtol=0.03)


@each_method
def test_an_adapter_becomes_plain_lora(method: Method, tmp_path: Path):
    model = moved(method.adapted(graphpeft, build(), target_modules=["0", "2"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphpeft.save_as_lora(tmp_path, model, rank=4)
    plain = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(plain(inputs()), model(inputs()), atol=1e-4, rtol=1e-4)
