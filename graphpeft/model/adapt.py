"""The functions that adapt a model, or tell what adapting it would do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.adapting import (
    Where,
    add_new,
    plan_for,
    replicate_layers,
    warn_of_mistakes,
)
from graphpeft.dry_runs import trial
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.learning import LearningReport, check_learning
from graphpeft.model.earlier_optimizers import watch
from graphpeft.model.given_model import check_model
from graphpeft.model.peft_model import give_methods
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.rules.report import Report
from graphpeft.sites.quantised import is_quantised
from graphpeft.sites.quantisers import codes_of, is_known
from graphpeft.transaction import undone_by
from graphpeft.wording import shortened


def explain(
    model: nn.Module,
    config: ConfigLike,
    adapter_name: str = "default",
    *,
    example_inputs: ExampleInputs | None = None,
    where: Where | None = None,
) -> Report:
    """Tells what `get_peft_model` would do to a model, which it leaves unchanged.

    Args:
        model: Any PyTorch module, or a graph that `trace` returned.
        config: A config of this library or of PEFT; its class is the method.
        adapter_name: The name that the adapter would have.
        example_inputs: A tuple of positional or a dict of keyword arguments with which the whole model can be called.
            It is needed where the forward of a module that uses a weight functionally branches on its inputs. With
            it, the report tells which sites would learn, see `check_learning`; the batch runs twice for that.
        where: A predicate that narrows down the sites which the config names, such as
            ``lambda site: site.out_features == 64``.

    Returns:
        The sites that would be adapted, those that would be refused with the reasons, and the number of parameters.

    Raises:
        AdaptError: If the config asks for something that isn't supported, the adapter can't have this name, or the
            model has adapters of the PEFT library.
        TypeError: If `model` is no module, or `config` no config.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        >>> explain(model, LoraConfig(r=2, target_modules=["0"]))
        LORA adapter 'default': 1 site, 48 parameters
        <BLANKLINE>
        site  op      size    graph of  parameters    share
        ────  ──────  ──────  ────────  ──────────  ───────
        0     Linear  8 → 16  0                 48  100.0 %
    """
    check_model(model)
    ours = as_config(config)
    with trial(model):
        replicate_layers(model, ours)
        plan = plan_for(model, ours, adapter_name, example_inputs, autocast_adapter_dtype=True, where=where)
        warn_of_mistakes(ours, plan)
    plan.report.plan = plan
    trains = plan.sites or plan.report.fully_trained
    if example_inputs is not None and trains:
        refused = "the model can't be adapted while a target is refused" if plan.report.refused else None
        plan.report.learning = refused or _learning(model, ours, adapter_name, example_inputs, where)
    return plan.report


def _learning(
    model: nn.Module, config: PeftConfig, adapter_name: str, example_inputs: ExampleInputs, where: Where | None
) -> LearningReport | str:
    """Returns how the adapter would learn, or why that can't be told; the model stays as it is."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return "the model has no values"
    with torch.inference_mode(False), trial(model), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # each was given once
        _compute_on_copied_codes(model)
        add_new(model, config, adapter_name, example_inputs, True, where, activates=True, methods=give_methods)
        try:
            return check_learning(model, example_inputs)
        except Exception as error:  # of the model's own code, on inputs that were meant for a trace
            return shortened(f"{type(error).__name__}: {error}")


def get_peft_model(
    model: nn.Module,
    peft_config: ConfigLike,
    adapter_name: str = "default",
    mixed: bool = False,  # noqa: ARG001
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    example_inputs: ExampleInputs | None = None,
    where: Where | None = None,
) -> Any:
    """Adapts a model in place, and gives it the methods of `PeftModel`.

    The model stays the same object of the same class. A model that has adapters already gets another one, which becomes
    the active one.

    Args:
        model: Any PyTorch module, or a graph that `trace` returned.
        peft_config: A config of this library or of PEFT; its class is the method.
        adapter_name: The adapter's name.
        mixed: Accepted for compatibility with PEFT; a model takes adapters of any methods, with and without it.
        autocast_adapter_dtype: Whether an adapter of a float16 or bfloat16 weight has tensors in float32.
        revision: The base model's revision on the Hub, which the adapter's config records.
        low_cpu_mem_usage: Whether the new tensors have no values: they are on the meta device, until
            `set_peft_model_state_dict` or `load_adapter` brings a file's values.
        example_inputs: A tuple of positional or a dict of keyword arguments with which the whole model can be called.
            It is needed where the forward of a module that uses a weight functionally branches on its inputs.
        where: A predicate that narrows down the sites which the config names, such as
            ``lambda site: site.out_features == 64``. It isn't saved; the saved config names the sites that it chose.

    Returns:
        `model` itself.

    Raises:
        AdaptError: If nothing in the model matches the config, a target can't be adapted, the adapter can't have this
            name, or the model has adapters of the PEFT library. The model is unchanged then.
        TypeError: If `model` is no module, or `peft_config` no config.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"])) is model
        True
        >>> model.print_trainable_parameters()
        trainable params: 88 || all params: 300 || trainable%: 29.3333
    """
    check_model(model)
    config = as_config(peft_config)
    if revision is not None:
        config = _with_revision(config, revision)
    add_new(
        model,
        config,
        adapter_name,
        example_inputs,
        autocast_adapter_dtype,
        where,
        activates=True,
        is_empty=low_cpu_mem_usage,
        methods=give_methods,
    )
    watch(model)
    return model


def _with_revision(config: PeftConfig, revision: str) -> PeftConfig:
    if config.revision not in (None, revision):
        warnings.warn(
            f"the config's revision {config.revision!r} is replaced by {revision!r}", PeftWarning, stacklevel=3
        )
    changed = copy.copy(config)
    changed.revision = revision
    return changed


def _compute_on_copied_codes(model: nn.Module) -> None:
    """Gives quantised layers copies of their tensors, and of values beside these, until the transaction is undone.

    A library's first call may pack a weight anew.
    """
    for module in model.modules():
        if any(tensor is not None and is_quantised(tensor) for tensor in module._parameters.values()):
            _copy_content(module)


def _copy_content(module: nn.Module) -> None:
    content: dict[str, Any] = vars(module)
    # before the weight is another one
    beside = codes_of(module).beside if is_known(module) else {}
    undone_by(_refill, content, dict(content))
    for kind in ("_parameters", "_buffers"):
        content[kind] = {name: copy.deepcopy(tensor) for name, tensor in content[kind].items()}
    weight = content["_parameters"].get("weight")
    for name, value in beside.items():
        # where the weight has it, too, it is one and the same
        content[name] = getattr(weight, name, None) or copy.copy(value)


def _refill(content: dict[str, Any], kept: dict[str, Any]) -> None:
    content.clear()
    content.update(kept)
