"""WaveFT, with wavelets and without."""

import peft
from oracle import BEYOND, CONV_2D, LINEAR, MATRICES, Case
from torch import nn, randn

from contracts.contract import Contract
from graphpeft import WaveFTConfig

OF_ODD_SIZES = Case("of-odd-sizes", lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh()), lambda: (randn(4, 7),))
OPTIONS = {
    "waveft": {},
    "waveft-drawn": {"init_weights": False, "random_loc_seed": 5, "bias": "waveft_only"},
    "waveft-elements": {"use_idwt": False},
}

CONTRACTS = [
    Contract(
        name,
        WaveFTConfig,
        peft.WaveFTConfig,
        {"n_frequency": 11, "scaling": 5.0, **options},
        (LINEAR,) if name == "waveft-drawn" else (*MATRICES, OF_ODD_SIZES),
        beyond=(*BEYOND, CONV_2D) if name == "waveft" else (),
    )
    for name, options in OPTIONS.items()
]
