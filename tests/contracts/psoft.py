"""PSOFT, with its rotation exact, by Neumann's series, and without."""

import peft
from oracle import BACK, BEYOND, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import PsoftConfig

CASES = (LINEAR, WITHOUT_BIAS)
BASE = {"r": 3, "psoft_alpha": 2}
OPTIONS = {
    "psoft-drawn": {"psoft_dropout": 0.3, "init_weights": False, "ab_svd_init": "pissa_init"},
    "psoft-neumann": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3, "psoft_mag_a": False},
    "psoft-free": {"psoft_orth": False, "init_weights": False, "psoft_svd": "lowrank", "random_seed": 5},
}

CONTRACTS = [
    Contract(
        "psoft",
        PsoftConfig,
        peft.PsoftConfig,
        BASE,
        CASES,
        beyond=(*BEYOND, TRANSPOSED, CONV_2D, BACK),
        refuses={"onnx": "ONNX has no operator for aten._linalg_solve_ex"},
    ),
    *(Contract(name, PsoftConfig, peft.PsoftConfig, BASE | options, CASES) for name, options in OPTIONS.items()),
]
