"""Compares an adapter of LoRA with PEFT's on one small layer of each kind, and on whole models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import pytest
import torch
from models import call, result
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import PeftWarning


class Case(NamedTuple):
    """A model that both libraries adapt.

    Attributes:
        name: What it is called.
        make: Builds it, with random weights.
        make_inputs: Makes its inputs: a tuple of positional or a dict of keyword arguments.
        targets: What to adapt in it.
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[], Any]
    targets: Mapping[str, Any] = MappingProxyType({"target_modules": ["0"]})

    def build(self) -> nn.Module:
        """Builds the model; each call gives equal weights."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> Any:
        """Makes the inputs; each call gives equal ones."""
        torch.manual_seed(1)
        return self.make_inputs()

    def __str__(self) -> str:
        return self.name


def _layer(name: str, make: Callable[[], nn.Module], make_inputs: Callable[[], Tensor]) -> Case:
    return Case(name, lambda: nn.Sequential(make(), nn.Tanh()), lambda: (make_inputs(),))


def _conv1d() -> Conv1D:
    layer = Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


LINEAR = _layer("linear", lambda: nn.Linear(6, 8), lambda: torch.randn(4, 3, 6))
WITHOUT_BIAS = _layer("without-bias", lambda: nn.Linear(6, 8, bias=False), lambda: torch.randn(4, 6))
TRANSPOSED = _layer("transformers-conv1d", _conv1d, lambda: torch.randn(4, 3, 6))
CONV_1D = _layer("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9))
CONV_2D = _layer("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9, 9))
POINTWISE = _layer("pointwise", lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5))
CONV_3D = _layer("conv3d", lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 3, 3))
EMBEDDING = _layer("embedding", lambda: nn.Embedding(9, 6), lambda: torch.randint(0, 9, (2, 5)))
BACK = _layer("back", lambda: nn.ConvTranspose1d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 5))
GROUPED = _layer("grouped", lambda: nn.Conv1d(6, 8, 3, groups=2, padding=1), lambda: torch.randn(2, 6, 5))


class Odd(nn.Module):
    """Weights that PEFT's layers don't have: in groups, plain parameters, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.w = nn.Parameter(torch.randn(8, 12) / 3)
        self.stack = nn.Parameter(torch.randn(2, 6, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Runs all of them."""
        return torch.einsum("bti,eoi->bto", torch.tanh(self.grouped(x)).mT @ self.w, self.stack)


class Attention(nn.Module):
    """An attention of PyTorch's, whose weights aren't layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attends to all positions."""
        return self.attention(x, x, x)[0]


ODD = Case("odd", Odd, lambda: (torch.randn(2, 6, 9),), {"target_modules": ["grouped", "w", "stack"]})
ATTENTION = Case("attention", Attention, lambda: (torch.randn(2, 5, 8),), {"target_modules": ["attention"]})
BEYOND = (ODD, ATTENTION)

MATRICES = [LINEAR, WITHOUT_BIAS, TRANSPOSED]
CONVOLUTIONS = [CONV_1D, CONV_2D, POINTWISE, CONV_3D]


def by_peft(case: Any, seed: int = 2, **options: Any) -> Any:
    """Returns the model of a case, adapted by PEFT."""
    model = case.build()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft_config(case, **options)).eval()


def by_us(case: Any, seed: int = 2, **options: Any) -> Any:
    """Returns the model of a case, adapted by this library."""
    model = case.build()
    torch.manual_seed(seed)
    return graphpeft.get_peft_model(model, config(case, **options))


def by_both_libraries(base: nn.Module, config: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Returns two copies of a model, adapted by PEFT and by this library, with equal values."""
    models = []
    for library in (peft, graphpeft):
        torch.manual_seed(2)
        models.append(library.get_peft_model(copy.deepcopy(base), getattr(library, config)(**options)))
    return models[0], models[1]


def config(case: Any, **options: Any) -> graphpeft.LoraConfig:
    """Returns a config for a case."""
    return graphpeft.LoraConfig(**_options(case, options))


def peft_config(case: Any, **options: Any) -> peft.LoraConfig:
    """Returns the same as a config of PEFT."""
    return peft.LoraConfig(**_options(case, options))


def _options(case: Any, options: dict[str, Any]) -> dict[str, Any]:
    targets = case.targets if isinstance(case, Case) else case.lora
    return {"r": 2, "lora_alpha": 3, **targets, **options}


def tensors(model: Any) -> dict[str, Tensor]:
    """Returns an adapter's tensors by their names in the file, whichever library it is of."""
    read = graphpeft.get_peft_model_state_dict if isinstance(model, graphpeft.PeftModel) else None
    return (read or peft.get_peft_model_state_dict)(model)


def perturb(model: nn.Module) -> None:
    """Gives all that is trained other values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def moved(model: Any, seed: int = 3) -> Any:
    """Moves all that is trained, so that no adapter is the identity, and returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.eval()


def outputs(model: nn.Module, case: Any) -> Tensor:
    """Returns what a model computes, without gradients, with the random numbers of one seed."""
    torch.manual_seed(4)
    with torch.no_grad():
        return result(call(model, case.inputs()))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Checks that two tensors differ by `tolerance`, relative to their size, at the most."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def assert_same_tensors(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    """Checks that the tensors of two adapters have the same names, shapes and values."""
    found, expected = tensors(ours), tensors(theirs)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}
    for name, tensor in expected.items():
        assert_close(found[name], tensor, tolerance)


def gradients(model: Any, case: Any) -> dict[str, Tensor]:
    """Returns the gradients of a training step, by the tensors' names in the file."""
    names = {tensor.data_ptr(): name for name, tensor in tensors(model).items()}
    model.train()
    torch.manual_seed(5)
    result(call(model, case.inputs())).square().mean().backward()
    model.eval()
    return {names[p.data_ptr()]: p.grad for p in model.parameters() if p.requires_grad and p.grad is not None}


def assert_trains_alike(ours: Any, theirs: Any, case: Any, tolerance: float = 1e-6) -> None:
    """Checks that a training step gives both models the same outputs and gradients."""
    assert_close(outputs(ours.train(), case), outputs(theirs.train(), case), tolerance)
    found, expected = gradients(ours, case), gradients(theirs, case)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 10 * tolerance)


def assert_files_go_both_ways(ours: Any, theirs: Any, case: Any, folder: Path, tolerance: float = 1e-6) -> None:
    """Checks that either library loads what the other one saves, and computes the same."""
    ours.save_pretrained(folder / "ours")
    loaded = peft.PeftModel.from_pretrained(case.build(), folder / "ours").eval()
    assert_close(outputs(loaded, case), outputs(ours, case), tolerance)
    theirs.save_pretrained(str(folder / "theirs"))
    loaded = graphpeft.PeftModel.from_pretrained(case.build(), folder / "theirs")
    assert_close(outputs(loaded, case), outputs(theirs, case), tolerance)
    again = graphpeft.PeftModel.from_pretrained(case.build(), folder / "ours")
    assert_close(outputs(again, case), outputs(ours, case), tolerance)


def assert_converts_by_the_recipe_of_peft(ours: Any, theirs: Any, case: Any, folder: Path) -> None:
    """Checks that PEFT's recipe for plain LoRA gives PEFT's files, which both libraries load on the base.

    The recipe sets `init_lora_weights` before it saves the first values, and leaves it so.
    """
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.peft_config["default"].init_lora_weights = True
        told = pytest.warns(PeftWarning, match="taken a part of the weights") if model is ours else nullcontext()
        with told:
            model.save_pretrained(str(folder / name / "first"))
        perturb(model)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    expected = outputs(ours, case)
    for name, model in (("ours", ours), ("theirs", theirs)):
        path = str(folder / name / "first")
        model.save_pretrained(str(folder / name / "plain"), path_initial_model_for_weight_conversion=path)
    for stage in ("first", "plain"):
        found, wanted = (load_file(folder / name / stage / "adapter_model.safetensors") for name in ("ours", "theirs"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    read = [json.loads((folder / name / "plain" / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    # PEFT writes options that have no effect any more, and warns of them when it reads the file
    assert read[0] == read[1] | {"corda_config": None, "lora_ga_config": None}
    for name in ("ours", "theirs"):
        plain = folder / name / "plain"
        loaded = graphpeft.PeftModel.from_pretrained(case.build(), plain)
        assert_close(outputs(loaded, case), expected, 1e-5)
        assert_close(outputs(peft.PeftModel.from_pretrained(case.build(), plain).eval(), case), expected, 1e-5)


def assert_merges_and_unloads(ours: Any, theirs: Any, case: Any, tolerance: float = 1e-6) -> None:
    """Checks that merging gives PEFT's weights, and that unloading gives the base back, bit for bit."""
    base = case.build()
    merged = copy.deepcopy(ours).merge_and_unload()
    assert_close(outputs(merged, case), outputs(ours, case), 10 * tolerance)
    if theirs is not None:
        expected = copy.deepcopy(theirs).merge_and_unload().state_dict()
        assert merged.state_dict().keys() == expected.keys()
        for name, tensor in merged.state_dict().items():
            assert_close(tensor, expected[name], tolerance)
    with ours.disable_adapter():
        assert torch.equal(outputs(ours, case), outputs(base, case))
    unloaded = ours.unload()
    assert type(unloaded) is type(base)
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in unloaded.state_dict().items())
    assert torch.equal(outputs(unloaded, case), outputs(base, case))
