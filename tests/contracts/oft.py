"""OFT, by Neumann's series and exactly, and with its constraints."""

import peft
import torch
from kinds import ATTENTION, MATRIX, STACK
from oracle import EMBEDDING, LINEAR, POINTWISE, TRANSPOSED, WITHOUT_BIAS, Case
from torch import nn

from contracts.contract import Contract
from graphpeft import OFTConfig

CASES = (LINEAR, WITHOUT_BIAS, POINTWISE, EMBEDDING)
WITHIN_GROUPS = Case(
    "within-groups",
    lambda: nn.Sequential(
        nn.Conv1d(8, 12, 1, groups=2, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Unflatten(2, (7, 1)),
        nn.ConvTranspose2d(12, 4, 1, stride=2, groups=2),
    ),
    lambda: (torch.randn(2, 8, 5),),
    {"target_modules": ["0", "3"]},
)
BEYOND = (TRANSPOSED, STACK, MATRIX, ATTENTION, WITHIN_GROUPS)
BLOCKS = {"oft_block_size": 2}
OPTIONS = {
    "oft": BLOCKS,
    "oft-exact": BLOCKS | {"use_cayley_neumann": False, "bias": "oft_only"},
    "oft-drawn": {"oft_block_size": 0, "r": 1, "init_weights": False, "num_cayley_neumann_terms": 8},
    "oft-shared": BLOCKS | {"block_share": True},
    "oft-constrained": BLOCKS | {"coft": True, "eps": 0.3},
}

CONTRACTS = [
    Contract(
        name,
        OFTConfig,
        peft.OFTConfig,
        options,
        CASES,
        beyond=BEYOND if name in ("oft", "oft-shared") else (TRANSPOSED,),
        llama={"target_modules": ["q_proj", "down_proj"]},
        refuses={"both ways": "its operations read it both as"},
    )
    for name, options in OPTIONS.items()
]
