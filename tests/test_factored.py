"""The methods whose change is a product of factors that are made from shared tensors: what all of them can do."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from matrix_uses import LAYERS
from oracle import moved
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphpeft
from graphpeft import PeftModel

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
    Method("RandLoraConfig", {"r": 3, "init_weights": False}, "randlora_only", is_for_quantised=True),
    Method("VBLoRAConfig", {"r": 3, "num_vectors": 9, "vector_length": 2}, "vblora_only"),
    Method("UniLoraConfig", {"r": 3, "theta_d_length": 11, "init_theta_d_bound": 1.0}, "unilora_only"),
    Method("TinyLoraConfig", {"u": 5, "init_weights": "uniform", "init_v_bound": 1.0}, "tinylora_only"),
    Method("PveraConfig", {"r": 3, "init_weights": False}, "pvera_only", is_for_quantised=True),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


TARGETS = LAYERS.targets["target_modules"]


def build() -> nn.Module:
    return LAYERS.build()


def inputs() -> Tensor:
    return LAYERS.inputs()[0]


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
def test_an_adapter_becomes_plain_lora(method: Method, tmp_path: Path):
    model = moved(method.adapted(graphpeft, build(), target_modules=["0", "2"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphpeft.save_as_lora(tmp_path, model, rank=1.0)
    plain = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(plain(inputs()), model(inputs()), atol=1e-4, rtol=1e-4)
