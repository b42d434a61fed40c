"""LoRA, DoRA and the variants; the rest of LoRA's options have tests of their own."""

import peft
from matrix_uses import LAYERS
from oracle import CONV_1D, CONV_2D, CONVOLUTIONS, EMBEDDING, LINEAR, MATRICES, WITHOUT_BIAS

from contracts.contract import Contract
from graphpeft import LoraConfig

BLOCKS = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2, "match_strict": False}
BLOCKS_OF_A = {"target_modules_bd_a": ["0"], "nblocks": 2}
BLOCKS_OF_B = {"target_modules_bd_b": ["0"], "nblocks": 2}


def _variant(name: str, **options: object) -> Contract:
    own = {"r": 4, "lora_alpha": 3, **options}
    return Contract(name, LoraConfig, peft.LoraConfig, own, (LINEAR, WITHOUT_BIAS))


DORA = {"r": 2, "lora_alpha": 3, "use_dora": True}
DRAWN_SCALED_BY_ROOT = {"init_lora_weights": False, "use_rslora": True, "bias": "lora_only"}
GAUSSIAN_WITH_DROPOUT = {"init_lora_weights": "gaussian", "lora_dropout": 0.4}

IN_PLACE = {"together": "both have another tensor in the place of 0.weight"}

CONTRACTS = [
    Contract("lora", LoraConfig, peft.LoraConfig, {"r": 2, "lora_alpha": 3}, (*MATRICES, CONV_1D, CONV_2D, EMBEDDING)),
    Contract("dora", LoraConfig, peft.LoraConfig, DORA, (*MATRICES, *CONVOLUTIONS, EMBEDDING), tolerance=1e-6),
    Contract(
        "dora-drawn",
        LoraConfig,
        peft.LoraConfig,
        DORA | DRAWN_SCALED_BY_ROOT,
        (*MATRICES, CONV_2D, EMBEDDING),
        tolerance=1e-6,
    ),
    Contract(
        "dora-dropout",
        LoraConfig,
        peft.LoraConfig,
        DORA | GAUSSIAN_WITH_DROPOUT,
        (*MATRICES, *CONVOLUTIONS),
        tolerance=1e-6,
    ),
    _variant("bdlora", use_bdlora=BLOCKS)._replace(cases=(LAYERS,)),
    _variant("bdlora-a", use_bdlora=BLOCKS_OF_A),
    _variant("kasa", kasa_config={})._replace(refuses=IN_PLACE),
    _variant("kasa-dropout", kasa_config={}, lora_dropout=0.4, init_lora_weights="gaussian")._replace(refuses=IN_PLACE),
    _variant("monteclora", monteclora_config={"buffer_size": 3})._replace(cases=MATRICES, trains_alike=False),
    # PEFT takes the bias of a B for a shard of a tensor
    _variant("kasa-bias", kasa_config={}, lora_bias=True)._replace(cases=(), beyond=(LINEAR,), refuses=IN_PLACE),
    _variant("monteclora-bias", monteclora_config={"buffer_size": 2}, lora_bias=True)._replace(
        cases=(), beyond=(LINEAR,)
    ),
    _variant("velora", velora_config={"num_groups": 4, "scale": 0.7}),
    _variant("velora-once", velora_config={"num_groups": 3, "init_type": "batch_average_once"}, lora_dropout=0.4),
    _variant("velora-random", velora_config={"num_groups": 2, "init_type": "random"}),
    _variant("bdlora-b", use_bdlora=BLOCKS_OF_B, lora_dropout=0.4),
]
