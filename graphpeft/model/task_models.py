"""PEFT's names for adapted models of a task, for ``isinstance`` and for `from_pretrained`.

An adapted model keeps its own class, which derives from `PeftModel`; it is an instance of the class here that stands
for the task of its first adapter.
"""

from __future__ import annotations

from typing import Any

from graphpeft.model.peft_model import PeftModel
from graphpeft.rules.peft_names import TaskType


class _OfTask(type):
    """The class of classes whose instances are adapted models of a task."""

    task: TaskType

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, PeftModel) and getattr(type(instance), "_graphpeft_task", None) == cls.task


class PeftModelForCausalLM(PeftModel, metaclass=_OfTask):
    """Stands for adapted causal language models.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForCausalLM)
        False
    """

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel, metaclass=_OfTask):
    """Stands for adapted sequence-to-sequence language models.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForSeq2SeqLM)
        False
    """

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel, metaclass=_OfTask):
    """Stands for adapted classifiers of sequences.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForSequenceClassification)
        False
    """

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel, metaclass=_OfTask):
    """Stands for adapted classifiers of tokens.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForTokenClassification)
        False
    """

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel, metaclass=_OfTask):
    """Stands for adapted models that answer questions.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForQuestionAnswering)
        False
    """

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel, metaclass=_OfTask):
    """Stands for adapted models that extract features.

    Examples:
        >>> config = LoraConfig(target_modules=["0"])
        >>> isinstance(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config), PeftModelForFeatureExtraction)
        False
    """

    task = TaskType.FEATURE_EXTRACTION


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[Any]] = {
    cls.task.value: cls
    for cls in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}
"""The class that stands for the models of a task, by the task.

Examples:
    >>> MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"].__name__
    'PeftModelForCausalLM'
"""
