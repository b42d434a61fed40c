"""EVA: A starts with the principal directions of a layer's inputs, and layers whose inputs have more get a larger rank.

    X = U S Vᵀ, all inputs of a layer:     A = the first rows of Vᵀ (divided by √S with `whiten`),  B = 0

The ranks of all layers add up to what they were: the directions that explain most of the variance get them, `rho` · r
in one layer at the most. Directions are found by incremental PCA, until those of two batches agree. Source: Paischer et
al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170; Ross et al., "Incremental
Learning for Robust Visual Tracking"; the numbers are those of PEFT's ``tuners/lora/eva.py`` and
``utils/incremental_pca.py``, but for `whiten`: of layers with equal inputs, PEFT divides all but the first repeatedly.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from graphpeft._torch import pytree
from graphpeft.adapters import lifecycle
from graphpeft.adapters.plan import AdaptError, make_plan
from graphpeft.adapters.state import Adapters, adapters_of
from graphpeft.adapters.tensors import set_trainable
from graphpeft.methods.lora.beginning import Beginning, First, refused_rank
from graphpeft.methods.lora.factors import rank_at
from graphpeft.methods.lora.measured import in_mode, targeted_layers
from graphpeft.rules.options import Within, check_options
from graphpeft.targeting import targets
from graphpeft.transaction import transaction

PREFIX = "base_model.model."
_SEED = 42
_UNUSUAL_RHO = 1000


@dataclass
class EvaConfig:
    """The options of EVA; the names, defaults and meanings are PEFT's.

    Attributes:
        rho: The factor by which a layer's rank can grow.
        tau: From which cosine on two directions agree.
        use_label_mask: Whether tokens without a label are left out.
        label_mask_value: The label of such tokens.
        whiten: Whether A is divided by the roots of the singular values.
        adjust_scaling_factors: Whether α grows with a layer's rank.

    Example:
        >>> config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5))
    """

    rho: Annotated[float, Within("at least 1 and finite", 1, 2**20)] = 2.0
    tau: Annotated[float, Within("a cosine, 0 ≤ tau ≤ 1", 0, 1)] = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Eva:
    """What A and B are until `initialize_lora_eva_weights` has measured: random, and zero."""

    replaces_weight = takes_product = False
    b_is_trained = True
    is_measured = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the number of inputs."""
        return refused_rank((shape[1], shape[1]), rank)

    def first(self, given: Beginning) -> First:
        """Returns A as it was drawn, and zero."""
        return First(given.drawn, given.weight.new_zeros(given.weight.shape[0], given.rank))


# what users can exchange


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with a dictionary of arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Returns the places, (number, 2), of the tokens that count: those of the attention mask, and with a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError("the inputs aren't a dictionary, as a language model's are; pass prepare_model_inputs_fn=None")
    options: EvaConfig = peft_config.eva_config or EvaConfig()
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:  # noqa: ARG001
    """Returns a layer's inputs, (number, features), at the places of the tokens that count."""
    return _tensor_of(layer_input)[model_input.T.unbind()]


def _all_rows(layer_input: Any, *_: Any) -> Tensor:
    return _tensor_of(layer_input).flatten(0, -2)


def _tensor_of(layer_input: Any) -> Tensor:
    return layer_input if isinstance(layer_input, Tensor) else layer_input[0]


# measuring


class _Directions:
    """The principal directions of what has been seen so far.

    Args:
        count: How many.
        tau: From which cosine on they are what they were.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.components: Tensor | None = None
        self.singular_values = self.explained = torch.zeros(0)
        self.is_settled = torch.zeros(count, dtype=torch.bool)
        self._mean: Any = None
        self._variance: Any = None
        self._seen = torch.tensor([0])

    def add(self, rows: Tensor) -> None:
        """Takes more rows in, unless there are fewer than directions."""
        if len(rows) < self.count:
            return
        before = self.components
        self._fit(rows.to(torch.float32, copy=True))
        if before is not None and self.components is not None:
            self.is_settled = F.cosine_similarity(self.components, before) >= self.tau

    def _fit(self, rows: Tensor) -> None:
        seen = self._seen.to(rows.device)
        mean, variance, total = _moments(rows, self._mean, self._variance, seen)
        if self.components is None:
            # in single precision, and later in double: the random numbers of a decomposition depend on that
            rows = (rows - mean).to(rows.dtype)
        else:
            own_mean = rows.mean(dim=0)
            shift = torch.sqrt((seen.double() / total) * len(rows)) * (self._mean - own_mean)
            rows = torch.vstack((self.singular_values.view(-1, 1) * self.components, rows - own_mean, shift))
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(_SEED)
            _, S, V = torch.svd_lowrank(rows, q=2 * self.count, niter=4)
        Vt = V.mH
        signs = torch.sign(Vt[torch.arange(len(Vt)), Vt.abs().argmax(dim=1)])
        self.components = (Vt * signs.view(-1, 1))[: self.count]
        self.singular_values = S[: self.count]
        self.explained = (S**2 / torch.sum(variance * total))[: self.count]
        self._mean, self._variance, self._seen = mean, variance, total


def _moments(rows: Tensor, mean: Any, variance: Any, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, variance and number of all rows, from those of the earlier ones."""
    new = torch.tensor([len(rows)], device=rows.device)
    total = seen + new
    new_sum = rows.sum(dim=0, dtype=torch.float64)
    centred = rows - new_sum / new
    correction = centred.sum(dim=0, dtype=torch.float64).square()
    spread = centred.square().sum(dim=0, dtype=torch.float64) - correction / new
    if mean is None:
        return new_sum / total, spread / total, total
    old_sum, ratio = mean * seen, seen.double() / new
    spread = variance * seen + spread + ratio / total * (old_sum / ratio - new_sum).square()
    return (old_sum + new_sum) / total, spread / total, total


@dataclass
class _Measurement:
    """The directions of all layers, of which several may have the same inputs.

    Attributes:
        most: How many directions each layer can have.
        first_with: For each layer, the first with the same inputs.
        directions: Those of the first ones.
        budget: The sum of all ranks.
    """

    most: dict[str, int]
    first_with: dict[str, str]
    directions: dict[str, _Directions]
    budget: int
    ranks: dict[str, int] = field(default_factory=dict)

    def distribute(self) -> None:
        """Gives the ranks to the directions that explain most."""
        owners, shares = [], []
        for path in self.most:
            explained = self.directions[self.first_with[path]].explained[: self.most[path]]
            owners += [path] * len(explained)
            shares.append(explained)
        # stable, or of layers with equal inputs one could get more than the first, whose directions must agree
        best = torch.cat(shares).argsort(descending=True, stable=True)[: self.budget]
        counts = Counter(owners[index] for index in best)
        self.ranks = {path: counts.get(path, 0) for path in self.most}

    def is_settled(self, first: str) -> bool:
        """Tells whether the directions of a layer agree that it needs."""
        needed = self.ranks.get(first, self.most[first])
        return bool(self.directions[first].is_settled[:needed].all())


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
    """Returns the directions of each layer's inputs, (rank, features), by the layer's path.

    Args:
        model: The model, adapted or not; it stays as it is.
        dataloader: Batches, which are gone through until the directions agree.
        peft_config: The config; that of the adapter if None.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Makes of a batch, and of the config, what the next function gets.
        prepare_layer_inputs_fn: Makes rows of a layer's inputs, of what the function before gave, and of the layer's
            path; or such functions by path. None takes all rows.
        adapter_name: The adapter.
        gather_distributed_inputs: Must be False where several processes train: each measures what it runs.
        show_progress_bar: Whether to show how many layers' directions agree.

    Raises:
        AdaptError: If the batches are too small, or a layer isn't run.
        ValueError: If there is no config, there are no batches, or the inputs of several processes are to be gathered.

    Example:
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
    paused = lifecycle.Paused(model) if state is not None else contextlib.nullcontext()
    with paused, in_mode(model, training=False):
        batches = _Batches(model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        found = _measured(layers, batches, config, show_progress_bar)
    prefix = PREFIX if state is not None else ""
    return {prefix + path: rows for path, rows in found.items()}


@dataclass
class _Batches:
    """Runs a model on batches, and gives the rows of its layers."""

    model: nn.Module
    data: Iterable[Any]
    config: Any
    forward: Callable[[nn.Module, Any], Any]
    prepare: Callable[[Any, Any], Any] | None
    rows_of: Any

    def run(self, batch: Any, layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> None:
        """Runs one batch, and gives `take` the rows that come into each of `layers`."""
        device = next(self.model.parameters()).device
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        told = self.prepare(batch, self.config) if self.prepare is not None else copy.deepcopy(batch)

        def watch(path: str) -> Callable[..., None]:
            function = self.rows_of.get(path) if isinstance(self.rows_of, Mapping) else self.rows_of
            function = function or _all_rows
            return lambda _, args, kwargs: take(path, function(args or (kwargs["input"],), told, path))

        with contextlib.ExitStack() as hooks:
            for path, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(watch(path), with_kwargs=True))
            self.forward(self.model, batch)


def _measured(layers: Mapping[str, nn.Module], batches: _Batches, config: Any, shows: bool) -> dict[str, Tensor]:
    options: EvaConfig = config.eva_config or EvaConfig()
    batch = next(iter(batches.data), None)
    if batch is None:
        raise ValueError("the dataloader is empty")
    measurement = _begin(layers, batches, batch, config, options)
    firsts = {path: layers[path] for path in measurement.directions}
    progress = tqdm(itertools.cycle(batches.data), leave=False, disable=not shows)
    rows_before = -1
    for index, batch in enumerate(progress):
        open_ones = {path: layer for path, layer in firsts.items() if not measurement.is_settled(path)}
        settled = sum(measurement.first_with[path] not in open_ones for path in layers)
        progress.set_description(f"the directions of {settled} of {len(layers)} layers agree")
        if not open_ones:
            break
        taken = 0

        def take(path: str, rows: Tensor) -> None:
            nonlocal taken
            taken += len(rows) >= measurement.directions[path].count
            measurement.directions[path].add(rows)

        batches.run(batch, open_ones, take)
        rows_before = index if taken else rows_before
        if index - rows_before > _length(batches.data):
            most = max(measurement.most[path] for path in open_ones)
            raise AdaptError(
                f"no batch has the {most} rows that as many directions need; make batches larger, or r smaller"
            )
        if all(one.components is not None for one in measurement.directions.values()):
            measurement.distribute()
    progress.close()
    found: dict[str, Tensor] = {}
    for path, rank in measurement.ranks.items():
        directions = measurement.directions[measurement.first_with[path]]
        assert directions.components is not None
        rows = directions.components[:rank]
        found[path] = rows / directions.singular_values[:rank].sqrt().view(-1, 1) if options.whiten else rows.clone()
    return found


def _length(data: Any) -> int:
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in data)


def _begin(
    layers: Mapping[str, nn.Module], batches: _Batches, batch: Any, config: Any, options: EvaConfig
) -> _Measurement:
    """Finds the layers with equal inputs, by one batch, and how many directions each can have."""
    inputs: dict[str, Tensor] = {}

    def take(path: str, rows: Tensor) -> None:
        inputs.setdefault(path, rows)

    batches.run(batch, layers, take)
    lacking = [path for path in layers if path not in inputs]
    if lacking:
        raise AdaptError(f"forward_fn doesn't run {lacking[0]}, of which eva needs inputs; leave it out, or run it")
    rho = options.rho
    if rho > _UNUSUAL_RHO:
        rho = min(rho, max(max(p.shape) for p in batches.model.parameters() if p.ndim) // config.r)
    ranks = {path: rank_at(path, config) for path in layers}
    most = {path: round(rank * rho) for path, rank in ranks.items()}
    first_with: dict[str, str] = {}
    for path in layers:
        equal = (other for other in dict.fromkeys(first_with.values()) if _equal(inputs[other], inputs[path]))
        first_with[path] = next(equal, path)
    for path, first in first_with.items():
        most[first] = max(most[first], most[path])
    most = {path: most[first_with[path]] for path in layers}
    for path, count in most.items():
        if 2 * count > inputs[path].shape[1]:
            raise AdaptError(
                f"eva looks for {count} directions of {path}, and finds them by twice as many, of which its inputs "
                f"have {inputs[path].shape[1]}; make r, or rho of eva_config, smaller"
            )
    directions = {path: _Directions(most[path], options.tau) for path in layers if first_with[path] == path}
    return _Measurement(most, first_with, directions, sum(ranks.values()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


# adapting


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[[Any, Any, str], Tensor]
    | Mapping[str, Callable[[Any, Any, str], Tensor]]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Gives an adapter with ``init_lora_weights="eva"`` its ranks and its A.

    Args:
        model: An adapted model.
        dataloader: Batches; not needed with `eva_state_dict`.
        eva_state_dict: The result of `get_eva_state_dict`; None measures it.
        forward_fn: Calls the model with a batch.
        prepare_model_inputs_fn: Makes the input of `prepare_layer_inputs_fn` from a batch and the config.
        prepare_layer_inputs_fn: Makes rows, (number, features), from a layer's inputs, the result of
            `prepare_model_inputs_fn` and the layer's path; or such functions by path. None takes all rows.
        adapter_name: The adapter, which must be the only active one.
        gather_distributed_inputs: Must be False where several processes train: each measures its own inputs.
        show_progress_bar: Whether to show the number of layers whose directions agree.

    Raises:
        AdaptError: If the batches are too small, or a layer isn't run; the adapter is unchanged then.
        ValueError: If the model or the adapter isn't of this kind, or neither batches nor directions are given.

    Example:
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
    state = adapters_of(model)
    if state is None or adapter_name not in state.by_name:
        raise ValueError(
            f"the {type(model).__name__} has no adapter {adapter_name!r}; adapt it with get_peft_model first"
        )
    if state.active != [adapter_name]:
        raise ValueError(f"{state.active} are active; make {adapter_name!r} the only one, with set_adapter")
    config = state.by_name[adapter_name].config
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(f"adapter {adapter_name!r} hasn't init_lora_weights='eva'; adapt the model with that")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("pass a dataloader, or the eva_state_dict of get_eva_state_dict")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    _adapt_anew(model, state, adapter_name, _with_ranks(config, state.by_name[adapter_name].sites, found), found)


def _with_ranks(config: Any, sites: list[Any], found: Mapping[str, Tensor]) -> Any:
    """Returns the config with the ranks that were found, and without the layers that got none."""
    paths = [adapted.site.name for adapted in sites]
    lacking = [path for path in paths if path not in found]
    if lacking:
        raise AdaptError(f"the eva_state_dict lacks {lacking[0]}; it is of another model or config")
    changed = copy.deepcopy(config)
    ranks = {path: len(found[path]) for path in paths if len(found[path])}
    changed.target_modules, changed.rank_pattern, changed.alpha_pattern = set(ranks), {}, {}
    changed.layers_to_transform = changed.layers_pattern = None
    options: EvaConfig = config.eva_config or EvaConfig()
    for path, rank in ranks.items():
        before = rank_at(path, config)
        alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        if options.adjust_scaling_factors and rank != before:
            alpha *= rank / before
        if rank != config.r:
            changed.rank_pattern[targets.pattern_of(path)] = rank
        if alpha != config.lora_alpha:
            changed.alpha_pattern[targets.pattern_of(path)] = alpha
    return changed


def _adapt_anew(model: nn.Module, state: Adapters, name: str, config: Any, found: Mapping[str, Tensor]) -> None:
    """Takes the adapter off and puts it on with other ranks and with what was found as A."""
    modules = dict(model.named_modules())
    dtypes = {adapted.dtype == adapted.site.dtype for adapted in state.by_name[name].sites}
    with warnings.catch_warnings():
        # what there is to warn of was said when the model was adapted
        warnings.simplefilter("ignore")
        plan = make_plan(
            model,
            config,
            name,
            owned=state.owned,
            known=state.lifted,
            autocast_adapter_dtype=dtypes != {True},
        )
    if plan.report.refused:
        raise AdaptError("; ".join(f"{refusal.name}: {refusal.reason}" for refusal in plan.report.refused))
    with transaction(model):
        lifecycle.remove(modules, state, name)
        lifecycle.add(modules, state, name, plan)
        lifecycle.activate(modules, state, [name])
        for adapted in plan.sites:
            modules[adapted.site.owner].get_parameter(adapted.names["lora_A"]).copy_(found[adapted.site.name])
        set_trainable(modules, state, [name])
