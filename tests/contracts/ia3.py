"""(IA)³, of inputs and of outputs."""

import peft
from kinds import STACK
from matrix_uses import USES
from oracle import CONV_2D, CONV_3D, GROUPED, MATRICES, POINTWISE

from contracts.contract import Contract
from graphpeft import IA3Config

OF_OUTPUTS = {"feedforward_modules": []}
OF_INPUTS = {"feedforward_modules": ["0"]}
LLAMA = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

CONTRACTS = [
    Contract(
        "ia3",
        IA3Config,
        peft.IA3Config,
        OF_OUTPUTS,
        (*MATRICES, CONV_2D, POINTWISE, CONV_3D),
        (GROUPED, STACK, USES),
        sized=OF_OUTPUTS,
        refuses={"both ways": "its operations read it both as"},
    ),
    Contract(
        "ia3-inputs", IA3Config, peft.IA3Config, OF_INPUTS, (*MATRICES, CONV_2D, CONV_3D), (GROUPED,), llama=LLAMA
    ),
    Contract(
        "ia3-inputs-of-uses",
        IA3Config,
        peft.IA3Config,
        {"feedforward_modules": USES.targets["target_modules"]},
        (),
        (USES,),
    ),
    Contract("ia3-drawn", IA3Config, peft.IA3Config, OF_OUTPUTS | {"init_ia3_weights": False}, (*MATRICES,)),
]
