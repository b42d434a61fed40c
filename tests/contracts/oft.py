"""OFT, by Neumann's series and exactly, and with its constraints."""

import peft
from kinds import STACK
from oracle import EMBEDDING, LINEAR, POINTWISE, TRANSPOSED, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import OFTConfig

CASES = (LINEAR, WITHOUT_BIAS, POINTWISE, EMBEDDING)
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
        beyond=(TRANSPOSED, STACK) if name == "oft" else (TRANSPOSED,),
        llama={"target_modules": ["q_proj", "down_proj"]},
        refuses={"both ways": "its operations read it both as"},
    )
    for name, options in OPTIONS.items()
]
