"""GraLoRA, with products of the whole and without."""

import peft
from kinds import MATRIX, ROUNDED, STACK
from oracle import LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import GraloraConfig

CASES = (LINEAR, WITHOUT_BIAS, TRANSPOSED)
BEYOND = (MATRIX, ROUNDED)
OPTIONS = {
    "gralora": {},
    "gralora-drawn": {"init_weights": False},
    "gralora-hybrid": {"hybrid_r": 3},
    "gralora-hybrid-drawn": {"hybrid_r": 1, "init_weights": False, "gralora_k": 1},
}


def contract(name: str, options: dict[str, object], beyond: tuple[object, ...]) -> Contract:
    given = {"r": 4, "alpha": 3, **options}
    return Contract(name, GraloraConfig, peft.GraloraConfig, given, CASES, beyond)  # type: ignore[arg-type]


CONTRACTS = [
    *(contract(name, options, (*BEYOND, STACK)) for name, options in OPTIONS.items()),
    # a stack has no input that dropout could drop
    contract("gralora-dropout", {"hybrid_r": 3, "gralora_dropout": 0.4}, BEYOND),
]
