"""RoAd, in its three variants."""

import peft
import torch
from oracle import CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import RoadConfig

CASES = (LINEAR, WITHOUT_BIAS)
GROUPED = Case("grouped", lambda: nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=2)), lambda: (torch.randn(2, 4, 5),))

CONTRACTS = [
    Contract(
        "road",
        RoadConfig,
        peft.RoadConfig,
        {"group_size": 4},
        CASES,
        beyond=(TRANSPOSED, GROUPED),
        refuses={"both ways": "its operations read it both as|features don't fall into groups"},
    ),
    Contract("road-2", RoadConfig, peft.RoadConfig, {"variant": "road_2", "group_size": 2}, CASES, beyond=(CONV_2D,)),
    Contract(
        "road-4", RoadConfig, peft.RoadConfig, {"variant": "road_4", "group_size": 8, "init_weights": False}, CASES
    ),
]
