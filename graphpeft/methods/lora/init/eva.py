"""EVA as users call it, with PEFT's names: collects directions of layers' inputs, and gives them to an adapter."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphpeft.adapters import hotswap, lifecycle
from graphpeft.adapters.adapting import planned, refuse
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, adapters_of
from graphpeft.adapters.tensors import overwrite
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.modes import in_mode
from graphpeft.methods.lora.factors import rank_at
from graphpeft.methods.lora.init.calibration import targeted_layers
from graphpeft.methods.lora.init.eva_batches import Batches, first_tensor
from graphpeft.methods.lora.init.eva_directions import find_directions, options_of
from graphpeft.targeting import pattern_values
from graphpeft.transaction import transaction

_PREFIX = "base_model.model."


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a dictionary of arguments, and returns its output."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Returns the places of the tokens that count: those in the attention mask, and with a label.

    Returns:
        Integers, (number, 2): the row and the place in it.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError("the inputs aren't a dictionary, as a language model's are; pass prepare_model_inputs_fn=None")
    options = options_of(peft_config)
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:  # noqa: ARG001
    """Returns a layer's inputs at the tokens that count.

    Args:
        layer_input: The input, (batch, tokens, features), or the arguments that begin with it.
        model_input: The places of the tokens, (number, 2).
        layer_name: The layer's path, for functions of one's own that tell layers apart.

    Returns:
        Rows, (number, features).
    """
    return first_tensor(layer_input)[model_input.T.unbind()]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[[Any, Any, str], Tensor]
    | Mapping[str, Callable[[Any, Any, str], Tensor]]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Collects the principal directions of layers' inputs.

    Args:
        model: The model, adapted or not; it isn't changed.
        dataloader: Batches, which are run in turn until the directions agree.
        peft_config: The `LoraConfig`; the adapter's if None.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Makes of a batch and the config the second argument of the next function; None for a
            copy of the batch.
        prepare_layer_inputs_fn: Makes rows, (number, features), of a layer's inputs, of the result of the function
            before, and of the layer's path; or such functions by path. None takes all rows.
        adapter_name: The adapter.
        gather_distributed_inputs: Must be False where several processes train: each collects its own inputs.
        show_progress_bar: Whether to show how many layers' directions agree.

    Returns:
        The directions in single precision, (rank, features), by the layer's path, with PEFT's prefix if the model is
        adapted. A layer can have none.

    Raises:
        AdaptError: If the batches are too small, or a layer isn't run.
        ValueError: If there is no config, there are no batches, or the inputs of several processes are to be gathered.

    Examples:
        >>> model, batches = nn.Sequential(nn.Linear(8, 4)), [torch.randn(32, 8) for _ in range(4)]
        >>> directions = get_eva_state_dict(
        ...     model,
        ...     batches,
        ...     LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva"),
        ...     forward_fn=lambda model, batch: model(batch),
        ...     prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None,
        ...     show_progress_bar=False,
        ... )
        >>> {path: tuple(rows.shape) for path, rows in directions.items()}
        {'0': (2, 8)}
    """
    if gather_distributed_inputs and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "gather_distributed_inputs=True isn't supported: each process measures what it runs. Let one measure, and "
            "give all the eva_state_dict"
        )
    state = adapters_of(model)
    config = peft_config
    if config is None:
        if state is None or adapter_name not in state.by_name:
            raise ValueError("peft_config is needed for a model without an adapter")
        config = state.by_name[adapter_name].config
    layers = targeted_layers(model, config)
    batches = Batches(model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
    paused = lifecycle.Paused(model) if state is not None else contextlib.nullcontext()
    with paused, in_mode(model, training=False):
        found = find_directions(layers, batches, show_progress_bar)
    prefix = _PREFIX if state is not None else ""
    return {prefix + path: rows for path, rows in found.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    *arguments: Any,
    **options: Any,
) -> None:
    """Gives an adapter with ``init_lora_weights="eva"`` its ranks and its A, and B = 0.

    All else of the adapter stays, such as copies of modules that it trains fully.

    Args:
        model: An adapted model.
        dataloader: Batches; not needed with `eva_state_dict`.
        eva_state_dict: The result of `get_eva_state_dict`.
        arguments: The arguments of `get_eva_state_dict` behind `peft_config`.
        options: The same by name. The adapter `adapter_name` has to be the only active one.

    Raises:
        AdaptError: If the batches are too small, a layer isn't run, or the directions are of another model; the adapter
            is as it was.
        ValueError: If the model or the adapter isn't of this kind, or neither batches nor directions are given.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva")
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> initialize_lora_eva_weights(
        ...     model,
        ...     [torch.randn(32, 8) for _ in range(4)],
        ...     forward_fn=lambda model, batch: model(batch),
        ...     prepare_model_inputs_fn=None,
        ...     prepare_layer_inputs_fn=None,
        ...     show_progress_bar=False,
        ... )
    """
    given = inspect.signature(get_eva_state_dict).bind(model, dataloader, None, *arguments, **options)
    given.apply_defaults()
    name, state = given.arguments["adapter_name"], adapters_of(model)
    if state is None or name not in state.by_name:
        raise ValueError(f"the {type(model).__name__} has no adapter {name!r}; adapt it with get_peft_model first")
    if state.active != [name]:
        raise ValueError(f"{state.active} are active; make {name!r} the only one, with set_adapter")
    adapter = state.by_name[name]
    if getattr(adapter.config, "init_lora_weights", None) != "eva":
        raise ValueError(f"adapter {name!r} hasn't init_lora_weights='eva'; adapt the model with that")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("pass a dataloader, or the eva_state_dict of get_eva_state_dict")
        eva_state_dict = get_eva_state_dict(*given.args, **given.kwargs)
    _adapt_again(model, name, adapter, {key.removeprefix(_PREFIX): rows for key, rows in eva_state_dict.items()})


def _adapt_again(model: nn.Module, name: str, adapter: Adapter, directions: Mapping[str, Tensor]) -> None:
    """Exchanges an adapter for one with the ranks of `directions` and with these as A."""
    has_dtypes_of_weights = all(adapted.dtype == adapted.site.dtype for adapted in adapter.sites)
    with warnings.catch_warnings():
        # there were warnings when the model was adapted
        warnings.simplefilter("ignore")
        config = _with_ranks(adapter, directions)
        plan = planned(model, config, name, autocast_adapter_dtype=not has_dtypes_of_weights)
    refuse(plan)
    exchanged = Adapter.of(plan)
    values = {
        (adapted.site.owner, adapted.names["lora_A"]): directions[adapted.site.name] for adapted in exchanged.sites
    }
    at_sites = {(adapted.site.owner, own) for adapted in adapter.sites for own in adapted.names.values()}
    kept = {*adapter.tensor_names(name)} & {*exchanged.tensor_names(name)} - at_sites
    for path, attribute in kept | adapter.overwritten.keys():
        values[path, attribute] = tensor_at(plan.modules[path], attribute).detach().clone()
    with transaction(model):
        state = hotswap.exchange(model, name, plan)
        overwrite(plan.modules, state.by_name[name], name, values)


def _with_ranks(adapter: Adapter, directions: Mapping[str, Tensor]) -> Any:
    """Returns an adapter's config with the ranks of `directions`, and without the layers that got none."""
    config: Any = adapter.config
    paths = [adapted.site.name for adapted in adapter.sites]
    lacking = [path for path in paths if path not in directions]
    if lacking:
        raise AdaptError(f"the eva_state_dict lacks {lacking[0]}; it is of another model or config")
    changed = copy.deepcopy(config)
    ranks = {path: len(directions[path]) for path in paths if len(directions[path])}
    changed.target_modules, changed.rank_pattern, changed.alpha_pattern = set(ranks), {}, {}
    changed.layers_to_transform = changed.layers_pattern = None
    for path, rank in ranks.items():
        before = rank_at(path, config)
        alpha = pattern_values.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        if options_of(config).adjust_scaling_factors and rank != before:
            alpha *= rank / before
        if rank != config.r:
            changed.rank_pattern[pattern_values.pattern_of(path)] = rank
        if alpha != config.lora_alpha:
            changed.alpha_pattern[pattern_values.pattern_of(path)] = alpha
    return changed
