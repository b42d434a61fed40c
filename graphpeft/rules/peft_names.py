"""Names in PEFT's files: of its methods, of tasks, and of the heads that PEFT trains for tasks."""

from __future__ import annotations

import enum

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose file format is written, recorded in configs as PEFT records its own."""


class PeftType(str, enum.Enum):
    """The methods of PEFT 0.21.2, by the names in its files; `registered` returns the methods that exist here.

    Examples:
        >>> LoraConfig.peft_type == PeftType.LORA == "LORA"
        True
    """

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class TaskType(str, enum.Enum):
    """The task of an adapted model, as in PEFT.

    Examples:
        >>> LoraConfig(task_type="CAUSAL_LM").task_type
        <TaskType.CAUSAL_LM: 'CAUSAL_LM'>
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""The heads that PEFT trains beside the adapter, by task (`PeftModelFor…` in its ``peft_model.py``)."""

TASK_HEADS = frozenset(name for names in HEADS.values() for name in names)
