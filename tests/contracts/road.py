"""RoAd, in its three variants."""

import peft
from kinds import ADDED, ATTENTION, STACK
from oracle import BACK, CONV_2D, LINEAR, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import RoadConfig

CASES = (LINEAR, WITHOUT_BIAS)

CONTRACTS = [
    Contract(
        "road",
        RoadConfig,
        peft.RoadConfig,
        {"group_size": 4},
        CASES,
        beyond=(TRANSPOSED, BACK, ADDED, ATTENTION),
        refuses={"both ways": "its operations read it both as|features don't fall into groups"},
    ),
    Contract(
        "road-2", RoadConfig, peft.RoadConfig, {"variant": "road_2", "group_size": 2}, CASES, beyond=(CONV_2D, STACK)
    ),
    Contract(
        "road-4",
        RoadConfig,
        peft.RoadConfig,
        {"variant": "road_4", "group_size": 8, "init_weights": False},
        CASES,
        beyond=(ADDED, ATTENTION),
    ),
]
