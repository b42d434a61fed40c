"""Rules that change a weight, written for PEFT's layout of weights: (out, in), or (out, in / groups, *kernel).

A `DeltaRule` is just its `delta`: y + operation(dropout(x), ΔW) + Δb. It adapts linear operations, convolutions,
batches of matrices, and weights in other uses, in every stored layout. A `ProductRule` gives the change as a product.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from graphpeft.graph import ops
from graphpeft.graph.changed_products import (
    apart_in_training,
    dropped_by_row,
    plus_branch,
    products_by_row,
    with_change,
)
from graphpeft.graph.low_rank_sum import plus_stacked_product
from graphpeft.graph.ops.boundaries import Leaf
from graphpeft.graph.recorded import as_node, recorded
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.rules.arguments import asked_by
from graphpeft.rules.code_in_graphs import RuleError
from graphpeft.rules.options import Role
from graphpeft.rules.parameter_spec import Dropout
from graphpeft.rules.products import Product
from graphpeft.rules.rule import Mergeable, OperationRule, RunsByRow
from graphpeft.sites.site import LeafSite, Site, WeightLayout


@dataclass(frozen=True)
class WeightRule(Mergeable):
    """A rule whose `delta` gives a change in PEFT's layout, of shape `site.matrix_shape`.

    The arguments ``weight`` and ``base`` of `delta` and `bias_delta` are in this layout, too, and in the dtype of the
    rule's parameters, which is single precision for a base in half precision. In ``rewrite``, ``weight``, ``base``
    and ``change`` are in the stored layout, as ``operation.apply`` takes them.

    Attributes:
        layout: The stored layout of the site's weight; `at_site` sets it.
        casts: Whether the parameters' dtype differs from the weight's; `at_site` sets it.
        adapts: The kinds of weights that the rule adapts, by `Site.layout`.
        needs_matrix: Whether it refuses vectors.
        adapts_calls: Whether it adapts calls of modules without a plain weight, too: a `LeafSite`.

    Examples:
        >>> class Factors(WeightRule):
        ...     def parameters(self, site, config):
        ...         return {"factors": ParameterSpec((site.out_features, 1), "factors")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["factors"].fill_(1)
        ...
        ...     def delta(self, weight, factors):
        ...         return weight * (factors - 1)
        >>> Factors().change({"weight": torch.ones(2, 1), "factors": torch.tensor([[3.0], [1.0]])})
        tensor([[2.],
                [0.]])
    """

    layout: WeightLayout = dataclasses.field(default=WeightLayout(), kw_only=True, repr=False)
    casts: bool = dataclasses.field(default=False, kw_only=True, repr=False)

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution, ops.Weight)
    needs_matrix: ClassVar[bool] = False
    adapts_calls: ClassVar[bool] = False

    def at_site(self, site: Any, dtype: torch.dtype) -> WeightRule:
        """Returns the rule for the layout of a site's weight."""
        if not isinstance(site, Site):
            # a call's input and output may be in other dtypes than the parameters
            return dataclasses.replace(self, casts=True)
        layout, casts = site.weight_layout, dtype != site.dtype
        is_so = layout == self.layout and casts == self.casts
        return self if is_so else dataclasses.replace(self, layout=layout, casts=casts)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses sites without a weight, weights of other layouts or sizes, and embeddings that shorten their rows."""
        if isinstance(site, LeafSite):
            return None if self.adapts_calls else f"{config.method} changes weights, and it is {site.kind}"
        if site.layout not in self.adapts:
            return f"{config.method} isn't for weights of the kind {site.layout.__name__}"
        if site.shortens:
            return f"its max_norm shortens the rows that it reads, which {config.method} doesn't know"
        if self.needs_matrix and len(site.shape) < 2:
            return f"its {site.attribute} of shape {tuple(site.shape)} is no matrix"
        return None

    def change(self, given: Mapping[str, Any]) -> Any:
        """Returns the result of `delta` in the stored layout."""
        return self.layout.turned(self.delta(**self._all_seen(given)))

    def shaped(self, matrix: Any) -> Any:
        """Returns a matrix in the shape of the weight, which may have a kernel.

        Args:
            matrix: The matrix, (out, in · kernel), or (…, out, in) without a kernel.
        """
        return matrix.unflatten(-1, (-1, *self.layout.kernel)) if self.layout.kernel else matrix

    def bias_change(self, given: Mapping[str, Any]) -> Any:
        """Returns the result of `bias_delta`, which gets weights in PEFT's layout, too."""
        return self.bias_delta(**self._all_seen(given))

    def _all_seen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        own = [value for name, value in given.items() if name not in _OF_THE_MODEL]
        return {name: self._seen(value, own) if name in _WEIGHTS else value for name, value in given.items()}

    def _seen(self, weight: Any, own: list[Any]) -> Any:
        """Returns a weight in PEFT's layout, and in the dtype of the rule's parameters."""
        # merging runs on tensors, not proxies, and on a CPU in single precision, whatever the graph does
        is_cast = self.casts or isinstance(weight, torch.Tensor)
        return self.layout.turned(in_dtype_of(weight, *own) if is_cast else weight)


_WEIGHTS = ("weight", "base")
_OF_THE_MODEL = (*_WEIGHTS, "bias", "base_bias")


@recorded
def in_dtype_of(weight: torch.Tensor, *others: Any) -> torch.Tensor:
    """Returns a weight in the dtype of the first floating-point tensor of `others`, if there is one."""
    found = (other.dtype for other in others if isinstance(other, torch.Tensor) and other.is_floating_point())
    return weight.to(next(found, weight.dtype))


@dataclass(frozen=True)
class DeltaRule(WeightRule, OperationRule):
    """A rule that is just its `delta`: an author writes `parameters`, `initialise` and `delta`.

    The change can be added to the weight by which an operation multiplies. Where that is so, ``rewrite`` is given
    ``apart``: in runs where it holds, the operation's weight is without the change, so that ``rewrite`` adds the
    operation on it, and else the operation's value has it already. Where it's never so, ``apart`` is None.

    Examples:
        >>> class Shift(DeltaRule):
        ...     def parameters(self, site, config):
        ...         return {"shift": ParameterSpec(site.matrix_shape, "shift")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["shift"].zero_()
        ...
        ...     def delta(self, shift):
        ...         return shift
        >>> Shift().change({"shift": torch.ones(1, 2)})
        tensor([[1., 1.]])
    """

    adapts_both_ways: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses the sites that a `WeightRule` refuses, and dropout where the operation has no input of numbers."""
        reason = super().check(site, config)
        if reason is None and not 0 <= self.dropout_of(config) <= 1:
            reason = f"its dropout is {self.dropout_of(config)}, which is no probability"
        # an adapter for inference drops nothing anyway
        if reason is None and not self.has_numbers(site) and self.dropout_of(config) and not config.inference_mode:
            reason = (
                f"dropout drops elements of an operation's input, and the use of its {site.attribute} has none of "
                "numbers that is known; set it to 0"
            )
        return reason

    def dropout_of(self, config: Any) -> float:
        """Returns the probability of dropping an element of the branch's input in training.

        By default, it is the option with the role `Role.DROPOUT`.

        Args:
            config: The config.
        """
        return config.value_for(Role.DROPOUT) or 0.0

    def has_numbers(self, site: Any) -> bool:
        """Returns whether the branch has numbers at a site that dropout can drop: an operation's input.

        Args:
            site: The site.
        """
        return site.op not in (ops.Weight, ops.Embedding)

    def all_constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the rule's constants, with the probability of dropout as `dropout`, if it isn't 0."""
        dropout = self.dropout_of(config) if self.has_numbers(site) else 0.0
        return {**self.constants(site, config), **({"dropout": Dropout(dropout)} if dropout else {})}

    def multiplies(self, operation: Any) -> bool:
        """Returns whether an operation multiplies by the weight in PEFT's layout, x Wᵀ, or is the call of a layer.

        Args:
            operation: The operation. One weight may be read both ways: by x Wᵀ and by x W.
        """
        return isinstance(operation, ops.Linear | Leaf) and operation.transposed == (self.layout.exchanged is not None)

    def entering(self, x: Any, parameter: Any, training: Any, dropout: Any) -> Any:
        """Returns the branch's input: dropout(x), in the dtype of the rule's parameters.

        Args:
            x: The operation's input.
            parameter: One of the rule's parameters.
            training: Whether dropout is on.
            dropout: The probability; None for 0.
        """
        h = x.to(parameter.dtype) if self.casts else x
        return h if dropout is None else F.dropout(h, dropout, training)

    def leaving(self, result: Any, y: Any) -> Any:
        """Returns the operation's new value in the dtype of its present value, y.

        Args:
            result: The new value.
            y: The present value.
        """
        return result.to(y.dtype) if self.casts else result

    def adds_to_weight(self, operation: Any) -> bool:
        """Returns whether x (W + ΔW)ᵀ is the operation's value with its change: of products as precise as the change.

        Args:
            operation: The operation.
        """
        return isinstance(operation, ops.Linear) and not self.casts

    def keeps_apart(self, apart: Any, training: Any, dropout: Any = None) -> Any:
        """Returns whether a run is to keep W and ΔW apart, as it has to where dropout acts; it runs on proxies.

        Args:
            apart: Whether the run is to do so anyway.
            training: Whether dropout is on.
            dropout: The probability; None for 0.
        """
        return apart if dropout is None else apart_in_training(apart, training)

    def added(self, weight: Any, apart: Any, change: Any) -> Any:
        """Returns W + ΔW, and W in runs where both are to be apart; it runs on proxies.

        Args:
            weight: W.
            apart: Whether they are apart.
            change: ΔW, as the weight is stored.
        """
        return with_change(apart, weight, change)

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        dropout: Any = None,
        *,
        apart: Any = None,
    ) -> Any:
        """Returns y + operation(dropout(x), change), with the change of the bias if there is one."""
        # the input of an embedding is indices, which need no cast
        is_table = isinstance(operation, ops.Embedding)
        h = x if is_table else self.entering(x, change, training, dropout)
        if apart is None:
            result = y + operation.apply(h, change)
        else:
            result = plus_branch(y, operation.apply_if(apart, None, h, change))
        if bias_change is not None:
            result = result + operation.beside_outputs(bias_change.to(y.dtype))
        return self.leaving(result, y)


@dataclass(frozen=True)
class ProductRule(DeltaRule, RunsByRow):
    """A `DeltaRule` whose change is a product of factors, which an operation with the weight applies one by one.

    Rows of a batch have factors of their own in one graph if the class says ``zeros_change_nothing = True``: if its
    factors are matrices and diagonals, also where its parameters have rows in front, it has no other constants than
    `scales`, and it changes no bias.

    Attributes:
        is_product: Whether `product` is the change; other rules may have a function of that name.

    Examples:
        >>> class LowRank(ProductRule):
        ...     def parameters(self, site, config):
        ...         rows, columns = site.matrix_shape
        ...         return {"A": ParameterSpec((2, columns), "A"), "B": ParameterSpec((rows, 2), "B")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["A"].normal_()
        ...         parameters["B"].zero_()
        ...
        ...     def product(self, A, B):
        ...         return Product((B, A))
        >>> LowRank().delta(A=torch.ones(2, 3), B=torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    is_product: ClassVar[bool] = True

    @abstractmethod
    def product(self, *args: Any, **kwargs: Any) -> Product:
        """Returns the change, of matrices in PEFT's layout, a kernel counting as columns.

        A rule names the arguments that it needs: ``training``, and its own parameters and constants. The input is cast
        to the dtype of the first parameter that it names, where that isn't the weight's.

        Args:
            *args: The rule's arguments.
            **kwargs: Likewise.
        """
        ...

    def delta(self, **own: Any) -> Any:
        """Returns the product's result."""
        return self.shaped(self._product(own).dense())

    def _product(self, own: Mapping[str, Any], training: Any = False) -> Product:
        given = {**own, "training": training}
        return self.product(**{name: given[name] for name in asked_by(self.product).among(given)})

    def changed_weight(self, weight: Any, given: Mapping[str, Any]) -> Any:
        """Returns a weight as such with its change; what multiplies by a stack takes it factor by factor."""
        product = self._product(self._all_seen(given))
        first, second = product.halves()
        if second is None or self.layout.kernel:
            return super().changed_weight(weight, given)
        if self.layout.exchanged is not None:
            first, second = second.mT, first.mT
        return as_node(plus_stacked_product, weight, first, second, product.scale)

    def has_numbers(self, site: Any) -> bool:
        """Returns whether there is an operation: of an embedding, dropout drops elements of the first factor's rows."""
        return site.op is not ops.Weight

    def adds_to_weight(self, operation: Any) -> bool:
        """Returns whether an operation is a product, and none with the weight in PEFT's layout, x Wᵀ."""
        return super().adds_to_weight(operation) and not self.multiplies(operation)

    def fitted(self, x: Any, parameter: Any) -> Any:
        """Returns the input of which dropout drops elements, where that isn't the operation's.

        Args:
            x: The operation's input.
            parameter: The first parameter that `product` names.
        """
        return x

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any = None,
        bias_change: Any = None,
        dropout: Any = None,
        *,
        apart: Any = None,
        **own: Any,
    ) -> Any:
        """Returns y + s · dropout(x) F…ᵀ F₁ᵀ + Δb, and for other operations y + operation(dropout(x), ΔW) + Δb."""
        is_table = isinstance(operation, ops.Embedding)
        if not (is_table or self.multiplies(operation)):
            return super().rewrite(x, y, operation, training, change, bias_change, dropout, apart=apart)
        product, first = self._product(own, training), self._first(own)
        if is_table:
            # only leaves of the graph of gradients can have sparse ones
            rows = operation.apply(x, product.factors[0], sparse=False)
            branch = product.behind(rows if dropout is None else F.dropout(rows, dropout, training))
        else:
            branch = product.unscaled(self.entering(self.fitted(x, first), first, training, dropout))
        result = y + branch if product.scale is None else add_scaled(y, branch, product.scale)
        if self.changes_bias and not product.adds_bias:
            if isinstance(operation, Leaf):
                raise RuleError("it changes a bias, and the bias of a call isn't known; see Product.adds_bias")
            if bias_change is not None:
                result = result + operation.beside_outputs(bias_change.to(y.dtype))
        return self.leaving(result, y)

    def _first(self, own: Mapping[str, Any]) -> Any:
        return own[next(name for name in asked_by(self.product).names if name in own)]

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads."""
        return {**dict.fromkeys(self.scales), "dropout": Dropout(0.0)}

    def joined(self, rules: Sequence[Any]) -> Any:
        """Returns the rule for a batch whose rows have adapters with these rules; None with changes of a bias."""
        return None if self.changes_bias else super().joined(rules)

    def by_row(self, x: Any, y: Any, operation: Any, training: Any, dropout: Any, **own: Any) -> Any:
        """Returns y with the branch of each row's own factors, which are matrices and diagonals."""
        h = as_node(dropped_by_row, x.to(self._first(own).dtype) if self.casts else x, dropout)
        product = self._product(own, training)
        first, second = product.halves()
        if self.multiplies(operation):
            first, second = (first.mT, None) if second is None else (second.mT, first.mT)
        scale = 1.0 if product.scale is None else product.scale
        return self.leaving(as_node(products_by_row, y, h, first, second, scale), y)
