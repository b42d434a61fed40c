"""The methods whose change is a product of factors that are made from shared tensors: what all of them can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import CONTRACTS
from contracts.contract import Contract
from matrix_uses import LAYERS, build, inputs
from oracle import moved
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphpeft
from graphpeft import PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")

NAMES = ["vera-drawn", "randlora-drawn", "vblora", "unilora", "tinylora-drawn", "pvera-drawn"]
FACTORED = [contract for contract in CONTRACTS if str(contract) in NAMES]
each_method = pytest.mark.parametrize("contract", FACTORED, ids=str)


def test_each_name_is_that_of_a_contract() -> None:
    assert {str(contract) for contract in FACTORED} == {*NAMES}


@each_method
def test_an_operation_never_makes_the_whole_change(contract: Contract) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), contract.our_config(LAYERS, target_modules=["0"]))
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


@pytest.mark.filterwarnings("ignore:::graphpeft")
@each_method
def test_an_adapter_becomes_plain_lora(contract: Contract, tmp_path: Path) -> None:
    model = moved(get_peft_model(build(), contract.our_config(LAYERS, target_modules=["0", "2"], bias="none")))
    graphpeft.save_as_lora(tmp_path, model, rank=1.0)
    plain = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(plain(inputs()), model(inputs()), atol=1e-4, rtol=1e-4)
