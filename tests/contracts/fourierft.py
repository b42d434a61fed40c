"""FourierFT."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, MATRICES

from contracts.contract import Contract
from graphpeft import FourierFTConfig

OPTIONS = {"n_frequency": 7, "scaling": 20.0}

CONTRACTS = [
    Contract("fourierft", FourierFTConfig, peft.FourierFTConfig, OPTIONS, (*MATRICES,), beyond=(*BEYOND, CONV_2D)),
    Contract(
        "fourierft-zero",
        FourierFTConfig,
        peft.FourierFTConfig,
        {"n_frequency": 48, "scaling": 20.0, "init_weights": True, "random_loc_seed": 5, "bias": "fourier_only"},
        (LINEAR,),
    ),
]
