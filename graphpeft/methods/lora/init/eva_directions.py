"""EVA: A starts with the principal directions of a layer's inputs, and layers whose inputs have more get a larger rank.

    X = U S Vᵀ, all inputs of a layer:     A = the first rows of Vᵀ (divided by √S with `whiten`),  B = 0

The sum of all ranks stays: the directions that explain most of the variance get them, at most `rho` · r in one layer.
Batches are run until the directions of two of them agree. Source: Paischer et al., "Parameter Efficient Fine-tuning via
Explained Variance Adaptation", arXiv 2410.07170; the same numbers as PEFT's ``tuners/lora/eva.py``, but for
`whiten`: of layers with equal inputs, PEFT divides all but the first repeatedly.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphpeft.adapters.plan import AdaptError
from graphpeft.methods.lora.factors import rank_at
from graphpeft.methods.lora.init.base import InitContext, InitialFactors, Initialisation, rank_refusal
from graphpeft.methods.lora.init.eva_batches import Batches
from graphpeft.methods.lora.init.incremental_pca import IncrementalPca
from graphpeft.rules.options import Within, check_options

_UNUSUAL_RHO = 1000


@dataclass
class EvaConfig:
    """The options of EVA; the names, defaults and meanings are PEFT's.

    Attributes:
        rho: The factor by which a layer's rank can grow.
        tau: The cosine from which on two directions agree.
        use_label_mask: Whether tokens without a label are left out.
        label_mask_value: The label of such tokens.
        whiten: Whether A is divided by the roots of the singular values.
        adjust_scaling_factors: Whether α grows with a layer's rank.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
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


def options_of(config: Any) -> EvaConfig:
    """Returns the options of EVA in a `LoraConfig`, or their defaults."""
    return config.eva_config or EvaConfig()


@dataclass(frozen=True)
class Eva(Initialisation):
    """A random A and B = 0, until `initialize_lora_eva_weights` gives A its directions."""

    needs_calibration = True

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank above the number of inputs."""
        return rank_refusal((shape[1], shape[1]), rank)

    def first(self, context: InitContext) -> InitialFactors:
        """Returns A as it was drawn, and zero."""
        return InitialFactors(context.drawn, context.weight.new_zeros(context.weight.shape[0], context.rank))


@dataclass
class _Search:
    """The directions of all layers; several may have the same inputs.

    Attributes:
        most: The largest number of directions of each layer.
        leaders: For each layer, the first with the same inputs.
        directions: The directions of each leader.
        budget: The sum of all ranks.
        ranks: The rank of each layer, once there are directions of all.
    """

    most: dict[str, int]
    leaders: dict[str, str]
    directions: dict[str, IncrementalPca]
    budget: int
    ranks: dict[str, int] = field(default_factory=dict)

    def distribute(self) -> None:
        """Gives the ranks to the directions that explain most, if there are directions of all layers."""
        if any(each.components is None for each in self.directions.values()):
            return
        owners, shares = [], []
        for path, leader in self.leaders.items():
            explained = self.directions[leader].explained[: self.most[path]]
            owners += [path] * len(explained)
            shares.append(explained)
        # stable, or of layers with equal inputs one could get more than the leader, whose directions must agree
        best = torch.cat(shares).argsort(descending=True, stable=True)[: self.budget]
        counts = Counter(owners[index] for index in best)
        self.ranks = {path: counts.get(path, 0) for path in self.most}

    def has_converged(self, leader: str) -> bool:
        """Returns whether the directions that a leader needs agree with those before."""
        needed = self.ranks.get(leader, self.most[leader])
        return bool(self.directions[leader].is_stable[:needed].all())

    def result(self, whitens: bool) -> dict[str, Tensor]:
        """Returns the directions of each layer, (rank, features), divided by √S if `whitens`."""
        found: dict[str, Tensor] = {}
        for path, rank in self.ranks.items():
            directions = self.directions[self.leaders[path]]
            assert directions.components is not None
            rows = directions.components[:rank]
            found[path] = rows / directions.singular_values[:rank].sqrt().view(-1, 1) if whitens else rows.clone()
        return found


def find_directions(layers: Mapping[str, nn.Module], batches: Batches, shows_progress: bool) -> dict[str, Tensor]:
    """Returns the directions of each layer's inputs, (rank, features), by the layer's path."""
    search, fruitless = _search(layers, batches), 0
    with tqdm(itertools.cycle(batches.data), leave=False, disable=not shows_progress) as progress:
        for batch in progress:
            waiting = {path: layers[path] for path in search.directions if not search.has_converged(path)}
            done = sum(leader not in waiting for leader in search.leaders.values())
            progress.set_description(f"the directions of {done} of {len(layers)} layers agree")
            if not waiting:
                break
            added: list[bool] = []
            batches.run(batch, waiting, lambda path, rows, to=added: to.append(search.directions[path].add(rows)))
            fruitless = 0 if any(added) else fruitless + 1
            if fruitless > _length(batches.data):
                raise AdaptError(
                    f"no batch has the {max(search.most[path] for path in waiting)} rows that as many directions need; "
                    "make batches larger, or r smaller"
                )
            search.distribute()
    return search.result(options_of(batches.config).whiten)


def _length(data: Any) -> int:
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in data)


def _search(layers: Mapping[str, nn.Module], batches: Batches) -> _Search:
    """Returns a search without directions: one batch tells which layers have equal inputs, and how many features."""
    batch = next(iter(batches.data), None)
    if batch is None:
        raise ValueError("the dataloader is empty")
    inputs: dict[str, Tensor] = {}
    batches.run(batch, layers, inputs.setdefault)
    lacking = [path for path in layers if path not in inputs]
    if lacking:
        raise AdaptError(f"forward_fn doesn't run {lacking[0]}, of which eva needs inputs; leave it out, or run it")
    leaders: dict[str, str] = {}
    for path in layers:
        equal = (leader for leader in dict.fromkeys(leaders.values()) if torch.equal(inputs[leader], inputs[path]))
        leaders[path] = next(equal, path)
    options = options_of(batches.config)
    rho = options.rho
    if rho > _UNUSUAL_RHO:
        largest = max(max(parameter.shape) for parameter in batches.model.parameters() if parameter.ndim)
        rho = min(rho, largest // batches.config.r)
    ranks = {path: rank_at(path, batches.config) for path in layers}
    of_leader: dict[str, int] = {}
    for path, leader in leaders.items():
        of_leader[leader] = max(of_leader.get(leader, 0), round(ranks[path] * rho))
    for path, leader in leaders.items():
        count, features = of_leader[leader], inputs[path].shape[1]
        if 2 * count > features:
            raise AdaptError(
                f"eva looks for {count} directions of {path}, and finds them by twice as many, of which its inputs "
                f"have {features}; make r, or rho of eva_config, smaller"
            )
    most = {path: of_leader[leader] for path, leader in leaders.items()}
    directions = {leader: IncrementalPca(count, options.tau) for leader, count in of_leader.items()}
    return _Search(most, leaders, directions, sum(ranks.values()))
