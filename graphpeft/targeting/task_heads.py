"""Whether a Transformers model has a head of the task that a config names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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


def lacking_head(config: PeftConfig, modules: Mapping[str, nn.Module], trained: Collection[str]) -> str | None:
    """Returns that a Transformers model lacks the head which a config's task trains, or has one that it doesn't train.

    Classes of a user's own aren't judged: nobody knows what their heads are called.
    """
    task = config.task_type
    heads = HEADS.get(task, ()) if task is not None else ()
    cls = stands_for(modules[""])
    if task is None or not _is_of_transformers(cls):
        return None
    own = _task_of(cls, modules[""])
    if not heads:
        return _frozen_head(task, own, cls, modules, trained)
    if any(path.endswith(heads) for path in modules):
        return None
    if own is not task:
        fitting = "leave task_type None" if own is None else f"set task_type {own.value}, which is that of the class"
        auto = next(end for end, known in _TASKS.items() if known is task)
        way_out = f"so none is trained; {fitting}, or load a model with the head by AutoModel{auto}"
    elif config.modules_to_save:
        return None  # the head has another name there, which the user knows
    else:
        way_out = f"so its own stays frozen unless modules_to_save names it, out of {_beside_base(modules[''])}"
    return f"task_type {task.value} is for a head called {' or '.join(heads)}, and {cls.__name__} has none, {way_out}"


def _frozen_head(
    task: TaskType, own: TaskType | None, cls: type, modules: Mapping[str, nn.Module], trained: Collection[str]
) -> str | None:
    """Returns that a task without a head of its own leaves that of a model's class frozen, or None."""
    heads = HEADS.get(own, ()) if own is not None else ()
    found = [path for path, module in modules.items() if heads and path.endswith(heads) and _has_parameters(module)]
    frozen = [path for path in found if not any(f"{other}.".startswith(f"{path}.") for other in trained)]
    if not frozen or own is None:
        return None
    return (
        f"task_type {task.value} trains no head, and {cls.__name__} has one, {frozen[0]}, which stays frozen as it was "
        f"loaded or drawn; set task_type {own.value}, which is that of the class, or name it in modules_to_save"
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _beside_base(model: nn.Module) -> list[str]:
    """Returns the modules beside that which a Transformers model calls its base."""
    base = getattr(model, "base_model_prefix", None)
    return [name for name, child in model.named_children() if name != base and _has_parameters(child)]


def _is_of_transformers(cls: type) -> bool:
    """Returns whether a class is that of a model of Transformers, or of a repository on the Hub."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__]
    return names[0][0] in ("transformers", "transformers_modules") and ("transformers", "PreTrainedModel") in names


def _task_of(cls: type, model: nn.Module) -> TaskType | None:
    if cls.__name__.endswith("ForConditionalGeneration"):
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return TaskType.SEQ_2_SEQ_LM if both else TaskType.CAUSAL_LM
    return next((task for end, task in _TASKS.items() if cls.__name__.endswith(end)), None)
