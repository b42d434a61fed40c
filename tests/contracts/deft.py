"""DEFT, with both ways to find directions, and as PaRa."""

import peft
from oracle import BEYOND, CONV_2D, MATRICES

from contracts.contract import Contract
from graphpeft import DeftConfig

OPTIONS = {
    "deft": {},
    "deft-drawn": {"alpha": 5, "deft_dropout": 0.3, "init_weights": False, "init_scale": 2.0},
    "deft-qr": {"decomposition_method": "qr", "alpha": 3},
    "deft-para": {"para": True, "bias": "deft_only"},
}

CONTRACTS = [
    Contract(
        name,
        DeftConfig,
        peft.DeftConfig,
        {"r": 2, **options},
        (*MATRICES,),
        beyond=(*BEYOND, CONV_2D) if name in ("deft", "deft-qr") else (),
    )
    for name, options in OPTIONS.items()
]
