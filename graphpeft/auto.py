"""`AutoPeftModel…`: a saved adapter on the base model that its config names, by Transformers' Auto classes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from graphpeft.adapters.plan import AdaptError
from graphpeft.model.peft_model import PeftModel
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.given_config import ConfigLike
from graphpeft.rules.peft_names import TaskType
from graphpeft.wording import shown

_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")
"""Libraries from which a file may name a class, as in PEFT: importing a library runs its code."""

_HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


class AutoPeftModel:
    """Loads an adapter together with its base model, by the class that the adapter's config names.

    A model keeps its own class, so the result is the adapted base model. For an adapter with a task, use the subclass
    for that task.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)).save_pretrained("base")
        >>> model = LlamaForCausalLM.from_pretrained("base")
        >>> get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
        >>> type(AutoPeftModelForCausalLM.from_pretrained("adapter")).__name__
        'LlamaForCausalLM'
    """

    auto_class: ClassVar[str | None] = None
    """The name of Transformers' class that loads the base; None for the class that the config names."""

    task_type: ClassVar[TaskType | None] = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} isn't called; call {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: ConfigLike | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads the base model that the adapter's config names, and the adapter on it.

        Args:
            pretrained_model_name_or_path: The adapter: a folder, or a repository on the Hub.
            adapter_name: The adapter's name in the model.
            is_trainable: Whether the adapter is trained further; if False, the model is in evaluation mode.
            config: A config that replaces the file's.
            revision: The adapter's revision on the Hub.
            import_allowlist: Libraries from which the config may name the base's class; None for PEFT's list.
            **kwargs: Arguments of the base's ``from_pretrained``, such as `dtype`; options of the Hub are used for the
                adapter, too. Code from the base's repository runs only with ``trust_remote_code=True``.

        Returns:
            The adapted base model.

        Raises:
            AdaptError: If the config names no base model, its task is that of another class, or it names a class that
                isn't in the allowed libraries or loads no model.
            FileNotFoundError: If a file of the adapter is missing.
            CheckpointError: If a file of the adapter is damaged, or doesn't fit the base.
        """
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        if revision is not None:
            hub_options["revision"] = revision
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub_options)
        if not saved.base_model_name_or_path:
            raise AdaptError(
                "the adapter's config doesn't say what its base model is; load that, and the adapter on it"
            )
        base_class = cls._base_class(saved, _LIBRARIES if import_allowlist is None else import_allowlist)
        base_options = {name: value for name, value in kwargs.items() if name != "subfolder"}
        if _is_of_transformers(base_class):
            base_options.setdefault("trust_remote_code", False)
        if saved.revision is not None:
            base_options["revision"] = saved.revision
        base = base_class.from_pretrained(saved.base_model_name_or_path, **base_options)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **hub_options
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, libraries: Sequence[str]) -> Any:
        if config.task_type is not None and config.task_type is not cls.task_type:
            name = _BY_TASK[config.task_type].__name__
            raise AdaptError(f"the adapter's task is {config.task_type.value}; load it by {name}.from_pretrained")
        if cls.auto_class is not None and config.task_type is not None:
            return getattr(importlib.import_module("transformers"), cls.auto_class)
        if config.auto_mapping is None:
            raise AdaptError("the adapter's config names neither a task nor the class of its base; load that yourself")
        library, name = (config.auto_mapping.get(key) for key in ("parent_library", "base_model_class"))
        if not (isinstance(library, str) and isinstance(name, str) and library and name):
            raise AdaptError(
                f"auto_mapping of the adapter's config names no class by parent_library and base_model_class, but "
                f"{shown(config.auto_mapping)}; load the base yourself"
            )
        if not any(library == allowed or library.startswith(f"{allowed}.") for allowed in libraries):
            raise AdaptError(
                f"the adapter's config wants to import {library!r}, which runs its code; if you trust it, pass "
                f"import_allowlist=[{library!r}]"
            )
        try:
            base_class = getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise AdaptError(f"auto_mapping of the adapter's config names {library}.{name}: {error}") from error
        if not hasattr(base_class, "from_pretrained"):
            raise AdaptError(
                f"auto_mapping of the adapter's config names {library}.{name}, which loads no model; load the base "
                "yourself"
            )
        return base_class


def _is_of_transformers(cls: type) -> bool:
    """Returns whether a class is one of Transformers', which ask interactively unless `trust_remote_code` is given."""
    return any(base.__module__.partition(".")[0] == "transformers" for base in cls.__mro__)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads a model that generates text, with its adapter, by ``AutoModelForCausalLM``.

    Examples:
        >>> AutoPeftModelForCausalLM.task_type
        <TaskType.CAUSAL_LM: 'CAUSAL_LM'>
    """

    auto_class = "AutoModelForCausalLM"
    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads a model with an encoder and a decoder, with its adapter, by ``AutoModelForSeq2SeqLM``.

    Examples:
        >>> AutoPeftModelForSeq2SeqLM.task_type
        <TaskType.SEQ_2_SEQ_LM: 'SEQ_2_SEQ_LM'>
    """

    auto_class = "AutoModelForSeq2SeqLM"
    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads a model that classifies texts, with its adapter, by ``AutoModelForSequenceClassification``.

    Examples:
        >>> AutoPeftModelForSequenceClassification.task_type
        <TaskType.SEQ_CLS: 'SEQ_CLS'>
    """

    auto_class = "AutoModelForSequenceClassification"
    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads a model that classifies tokens, with its adapter, by ``AutoModelForTokenClassification``.

    Examples:
        >>> AutoPeftModelForTokenClassification.task_type
        <TaskType.TOKEN_CLS: 'TOKEN_CLS'>
    """

    auto_class = "AutoModelForTokenClassification"
    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads a model that answers questions, with its adapter, by ``AutoModelForQuestionAnswering``.

    Examples:
        >>> AutoPeftModelForQuestionAnswering.task_type
        <TaskType.QUESTION_ANS: 'QUESTION_ANS'>
    """

    auto_class = "AutoModelForQuestionAnswering"
    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads a model without a head, with its adapter, by ``AutoModel``.

    Examples:
        >>> AutoPeftModelForFeatureExtraction.task_type
        <TaskType.FEATURE_EXTRACTION: 'FEATURE_EXTRACTION'>
    """

    auto_class = "AutoModel"
    task_type = TaskType.FEATURE_EXTRACTION


_BY_TASK: dict[TaskType, type[AutoPeftModel]] = {
    kind.task_type: kind for kind in AutoPeftModel.__subclasses__() if kind.task_type is not None
}


def class_for(config: PeftConfig) -> type[AutoPeftModel]:
    """Returns the class that loads adapters with the task of `config`."""
    return AutoPeftModel if config.task_type is None else _BY_TASK[config.task_type]
