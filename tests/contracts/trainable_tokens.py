"""Trainable tokens."""

import peft
from oracle import EMBEDDING

from contracts.contract import Contract
from graphpeft import TrainableTokensConfig

CONTRACTS = [
    Contract(
        "trainable-tokens",
        TrainableTokensConfig,
        peft.TrainableTokensConfig,
        {"token_indices": [3, 1]},
        (EMBEDDING,),
        llama={"target_modules": ["embed_tokens"]},
        sized={"target_modules": ["embed_tokens"], "token_indices": list(range(16))},
        refuses={
            "both ways": "nothing in Sequential matches",
            "together": "both train rows of 0; only one of them can be active",
            "merge beside": r"has another tensor, or other rows, in the place of 0\.weight",
        },
    ),
]
