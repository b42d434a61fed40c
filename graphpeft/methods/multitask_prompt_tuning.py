"""Multitask prompt tuning: virtual tokens that all tasks share, each task scaling them by a low-rank matrix of its own.

    tokens = E ∘ (U[task] V[task])                E (tokens, dim), U (tasks, tokens, ranks), V (tasks, ranks, dim)

The model gets one more argument, `task_ids`, of shape (batch,). Source: Wang et al., "Multitask Prompt Tuning Enables
Parameter-Efficient Transfer Learning", arXiv 2303.02861; the same numbers as PEFT's
``tuners/multitask_prompt_tuning/model.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError, read_pickle, read_safetensors
from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompt_tuning import TokenTable
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY, Encoder
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.rules.options import Editable, Index, Size
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.wording import joined

_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


class MultitaskPromptTuningInit(str, enum.Enum):
    """The ways to initialise the virtual tokens of `MultitaskPromptTuningConfig`.

    Examples:
        >>> MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS == "AVERAGE_SOURCE_TASKS"
        True
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@register
@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptLearningConfig):
    """The options of multitask prompt tuning; the names, defaults and meanings are PEFT's.

    Source: Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv 2303.02861.

    Attributes:
        prompt_tuning_init: ``"RANDOM"`` or ``"TEXT"``, as in `PromptTuningConfig`; or from a trained file: the average
            of its tasks (``"AVERAGE_SOURCE_TASKS"``), one of them (``"EXACT_SOURCE_TASK"``), or its shared
            tokens alone (``"ONLY_SOURCE_SHARED"``).
        prompt_tuning_init_text: The text.
        prompt_tuning_init_state_dict_path: The trained file.
        prompt_tuning_init_task: The index of its task.
        tokenizer_name_or_path: The tokenizer for the text.
        tokenizer_kwargs: Options of ``AutoTokenizer.from_pretrained``.
        num_ranks: The rank of a task's matrix.
        num_tasks: The number of tasks.

    Raises:
        ValueError: For a value that an option can't have, and for options that are lacking.

    Examples:
        >>> config = MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8, num_tasks=3)
        >>> config.num_ranks
        1
    """

    peft_type: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING

    prompt_tuning_init: Literal["TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"] = (
        "RANDOM"
    )
    prompt_tuning_init_text: str | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: Index | None = 0
    tokenizer_name_or_path: Editable[str | None] = None
    tokenizer_kwargs: Editable[dict[str, Any] | None] = None
    num_ranks: Size = 1
    num_tasks: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = {"TEXT": ("tokenizer_name_or_path", "prompt_tuning_init_text")}
        needed |= dict.fromkeys(_FROM_SOURCE, ("prompt_tuning_init_state_dict_path",))
        for name in needed.get(self.prompt_tuning_init, ()):
            if not getattr(self, name):
                raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} needs {name}")

    def check(self) -> None:
        """Raises ValueError for options that can't be."""
        super().check()
        if self.prompt_scope is not None:
            raise ValueError("prompt_scope has no place for task_ids; use prompt tuning")

    def resolved(self, model: nn.Module) -> MultitaskPromptTuningConfig:
        """Returns the config with the sizes of the model filled in.

        Raises:
            ValueError: If the decoder is to have virtual tokens too, which PEFT gives it in training alone.
        """
        config = super().resolved(model)
        assert isinstance(config, MultitaskPromptTuningConfig)
        if config.num_transformer_submodules != 1:
            raise ValueError("a multitask prompt goes into the encoder alone; set num_transformer_submodules=1")
        return config

    @property
    def holds_table(self) -> bool:
        """Never: the tokens depend on the task."""
        return False

    def encoder(self) -> Encoder:
        """Returns the encoder of a task's virtual tokens."""
        return TaskTokens()


@dataclass(frozen=True)
class TaskTokens(Encoder):
    """Virtual tokens that are scaled for each task."""

    asks: ClassVar[tuple[str, ...]] = ("task_ids",)

    def parameters(self, config: MultitaskPromptTuningConfig) -> Mapping[str, ParameterSpec]:
        """Returns the shared tokens and the tasks' matrices."""
        cols = (config.num_tasks, config.total_tokens, config.num_ranks)
        rows = (config.num_tasks, config.num_ranks, config.token_dim or 0)
        return {
            "prefix_task_cols": ParameterSpec(cols, "prefix_task_cols"),
            "prefix_task_rows": ParameterSpec(rows, "prefix_task_rows"),
            **TokenTable().parameters(config),
        }

    @torch.no_grad()
    def initialise(
        self, parameters: Mapping[str, Tensor], config: MultitaskPromptTuningConfig, embedding: nn.Module
    ) -> None:
        """Draws them in the order in which PEFT does, and copies values of a trained file."""
        begins = "TEXT" if config.prompt_tuning_init == "TEXT" else "RANDOM"
        TokenTable(begins).initialise(parameters, config, embedding)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            parameters[name].normal_(0, 0.02)
        if config.prompt_tuning_init in _FROM_SOURCE:
            for name, value in _of_source(config).items():
                if value.shape != parameters[name].shape:
                    raise ValueError(
                        f"{name} of {config.prompt_tuning_init_state_dict_path} has shape {tuple(value.shape)}, not "
                        f"{tuple(parameters[name].shape)}; set num_virtual_tokens, num_ranks and num_tasks to fit"
                    )
                parameters[name].copy_(value)

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the virtual tokens of each row's task, (batch, tokens, dim)."""
        table, cols, rows = (parameters[name] for name in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
        return of_tasks(table, cols, rows, asked["task_ids"])


@recorded
def of_tasks(table: Tensor, cols: Tensor, rows: Tensor, task_ids: Tensor | None) -> Tensor:
    """Returns the virtual tokens of tasks, (batch, tokens, dim).

    Args:
        table: The shared tokens, (tokens, dim).
        cols: U, (tasks, tokens, ranks).
        rows: V, (tasks, ranks, dim).
        task_ids: The task of each row of the batch, (batch,).
    """
    if task_ids is None:
        raise ValueError("pass task_ids, the number of each row's task, to a model with a multitask prompt")
    return table * (cols.index_select(0, task_ids) @ rows.index_select(0, task_ids))


def _of_source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """Returns the first values from a trained file."""
    path = config.prompt_tuning_init_state_dict_path or ""
    saved = read_safetensors(path).tensors if path.endswith(".safetensors") else read_pickle(path)
    tasks = () if config.prompt_tuning_init == "ONLY_SOURCE_SHARED" else ("prefix_task_cols", "prefix_task_rows")
    lacking = [name for name in (EMBEDDINGS_KEY, *tasks) if name not in saved]
    if lacking:
        raise CheckpointError(f"{path} lacks {joined(lacking)}; name the file of a multitask prompt")
    found = {"prompt_embeddings": saved[EMBEDDINGS_KEY]}
    for name in tasks:
        averaged = config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS"
        found[name] = (
            saved[name].mean(0, keepdim=True) if averaged else saved[name][[config.prompt_tuning_init_task or 0]]
        )
    return found
