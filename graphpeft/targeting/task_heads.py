"""Whether a Transformers model has a head of the task that a config names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphpeft.graph.traced_model import stands_for
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.peft_names import HEADS, TaskType

_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForQuestionAnsweringSimple": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "Model": TaskType.FEATURE_EXTRACTION,
}
"""The tasks of Transformers' classes by the ends of their names, of which the first that fits counts."""


def lacking_head(config: PeftConfig, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns that a Transformers model lacks the head which a config's task trains, with a way out, or None.

    Classes of a user's own aren't judged: nobody knows what their heads are called.

    Args:
        config: The config as it was given.
        modules: The model's modules by path.
    """
    task = config.task_type
    heads = HEADS.get(task, ()) if task is not None else ()
    cls = stands_for(modules[""])
    if task is None or not _is_of_transformers(cls) or not heads or any(path.endswith(heads) for path in modules):
        return None
    own = _task_of(cls, modules[""])
    if own is not task:
        fitting = "leave task_type None" if own is None else f"set task_type {own.value}, which is that of the class"
        auto = next(end for end, known in _TASKS.items() if known is task)
        way_out = f"so none is trained; {fitting}, or load a model with the head by AutoModel{auto}"
    elif config.modules_to_save:
        return None  # the head has another name there, which the user knows
    else:
        way_out = f"so its own stays frozen unless modules_to_save names it, out of {_beside_base(modules[''])}"
    return f"task_type {task.value} is for a head called {' or '.join(heads)}, and {cls.__name__} has none, {way_out}"


def _beside_base(model: nn.Module) -> list[str]:
    """Returns the modules beside that which a Transformers model calls its base."""
    base = getattr(model, "base_model_prefix", None)
    return [
        name for name, child in model.named_children() if name != base and next(child.parameters(), None) is not None
    ]


def _is_of_transformers(cls: type) -> bool:
    """Returns whether a class is that of a model of Transformers, or of a repository on the Hub."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__]
    return names[0][0] in ("transformers", "transformers_modules") and ("transformers", "PreTrainedModel") in names


def _task_of(cls: type, model: nn.Module) -> TaskType | None:
    if cls.__name__.endswith("ForConditionalGeneration"):
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return TaskType.SEQ_2_SEQ_LM if both else TaskType.CAUSAL_LM
    return next((task for end, task in _TASKS.items() if cls.__name__.endswith(end)), None)
