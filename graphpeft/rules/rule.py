"""How a method adapts one kind of site: the base classes of rules.

A rule is an `OperationRule`, an `InputRule` or a `BoundaryRule`, or no more than a `Rule` with a change, where only
weights as such are its sites. What else it can do, it says by further bases: `Mergeable`, `ReplacesWeight`,
`RunsByRow`, `Combines`. A rule whose change is written in PEFT's layout of weights is a `WeightRule`, and one that is
no more than that a `DeltaRule`, see `rules/delta_rule.py`.

The functions that compute name what they are given: each argument is one of the names that stand at the function, or a
parameter or a constant of the rule. One that a rule doesn't declare for every config has a default, as in
``lora_bias=None``. Any other name is an error when a model is adapted.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from graphpeft.rules.parameter_spec import ParameterSpec


class Rule(ABC):
    """How one method adapts one kind of site.

    Rules are frozen values, best dataclasses: equal rules give equal graphs, so what differs from site to site (shapes,
    scales) isn't theirs but comes from the site and the config.

    Example:
        >>> class Shift(Mergeable):
        ...     def parameters(self, site, config):
        ...         return {"shift": ParameterSpec((1,), "shift")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["shift"].zero_()
        ...
        ...     def delta(self, shift):
        ...         return shift
        >>> isinstance(Shift(), Rule)
        True
    """

    def check(self, site: Any, config: Any) -> str | None:
        """Returns the reason why a site can't be adapted, or None.

        Args:
            site: The site.
            config: The config.
        """
        return None

    call_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments that the model is given in each call beside those of its forward, as ``model(x, task_ids=…)``.

    ``rewrite``, ``enter`` and ``leave`` can ask for them. `BoundaryRule.more_inputs` are those of one forward, which
    its graph has as arguments. The model's forward is given them, too, if they are among its named arguments.
    """

    adapts_both_ways: ClassVar[bool] = False
    """Whether the rule adapts a weight that some operations read as (in, out), and others as (out, in)."""

    def at_site(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule with what its functions have to know of a site.

        Args:
            site: The site.
            dtype: The dtype of the rule's parameters there.
        """
        return self

    @abstractmethod
    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the parameters that the rule creates at a site, by name.

        Args:
            site: The site.
            config: The config.
        """
        ...

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the numbers that its functions read, by name; they live on the weight's module.

        Args:
            site: The site.
            config: The config.
        """
        return {}

    def all_constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the rule's constants, with those that a base class of it reads; a base class alone overrides it.

        Args:
            site: The site.
            config: The config.

        Returns:
            The numbers by name.
        """
        return self.constants(site, config)

    @abstractmethod
    def initialise(
        self, parameters: Mapping[str, torch.Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, torch.Tensor] | None:
        """Fills new parameters, on the CPU, with their first values.

        Args:
            parameters: The parameters by name, without values.
            site: The site.
            config: The config.
            module: The module of the weight beside which they live.

        Returns:
            Of a rule that `ReplacesWeight`, where it replaces that of the site: the tensor that the module reads in
            place of the weight, by the weight's name.
        """
        ...

    def unmergeable(self, site: Any) -> str | None:
        """Returns the reason why what the rule does at a site is no change of a weight and a bias, or None.

        Args:
            site: The site.
        """
        return f"{type(self).__name__} isn't Mergeable: it has no change of a weight"


class OperationRule(Rule):
    """Adapts operations that use a weight, and calls of modules whose inside is their own affair.

    Example:
        >>> class Scale(OperationRule):
        ...     def parameters(self, site, config):
        ...         return {"scale": ParameterSpec((1,), "scale")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["scale"].fill_(1)
        ...
        ...     def rewrite(self, y, scale):
        ...         return y * scale
        >>> Scale().rewrite(torch.ones(2), scale=3)
        tensor([3., 3.])
    """

    @abstractmethod
    def rewrite(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of the operation; it is run on proxies.

        Its arguments can be ``x`` and ``y``, the operation's input and its value so far; ``operation``, which has
        ``apply(x, weight)``, the same operation with other operands; ``training``; and of an operation that has a
        weight, ``weight`` and ``bias`` as adapters that act before have made them (None without a bias), and ``base``,
        the weight without them. A rule that is `Mergeable` can ask for ``change`` and ``bias_change``: what its
        ``delta`` and its ``bias_delta`` return there (None without a change of the bias).
        """
        ...


class InputRule(Rule):
    """Changes what an operation is given, so that the operation itself is computed once.

    Example:
        >>> class ScaledInput(InputRule):
        ...     def parameters(self, site, config):
        ...         return {"scale": ParameterSpec((1,), "scale")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["scale"].fill_(1)
        ...
        ...     def enter(self, x, scale):
        ...         return x * scale
        >>> ScaledInput().enter(torch.ones(2), scale=3)
        tensor([3., 3.])
    """

    @abstractmethod
    def enter(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new input of the operation; it is run on proxies.

        Its arguments can be ``x``, ``operation`` and ``training``, as in ``rewrite``. The operation and the adapters
        that act before are given what it returns. If ``delta`` makes W F of a weight W, ``enter`` returns F x: so W is
        the weight with the changes before, as in ``delta``.
        """
        ...


class Mergeable(Rule):
    """A rule that changes a weight, so that its change can be added to the weight.

    It is the rule of weights as such, too, whatever a model does with them: there, `delta` is run on proxies.

    Example:
        >>> class Scale(Mergeable):
        ...     def parameters(self, site, config):
        ...         return {"scale": ParameterSpec((1,), "scale")}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         parameters["scale"].fill_(1)
        ...
        ...     def delta(self, weight, scale):
        ...         return weight * (scale - 1)
        >>> Scale().delta(torch.ones(2), scale=3)
        tensor([2., 2.])
    """

    def unmergeable(self, site: Any) -> str | None:
        """Returns the reason why what the rule does at a site is no change of the weight and the bias, or None."""
        return None

    def change(self, given: Mapping[str, Any]) -> Any:
        """Returns what `delta` returns, in the shape in which the weight is stored.

        Args:
            given: What `delta` asks for, by name: tensors and numbers, or proxies.
        """
        return self.delta(**given)

    @abstractmethod
    def delta(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the weight's change, in the shape in which it is stored: what the rule does outside of training.

        Its arguments can be ``weight``, which other adapters may have changed before, and ``base``, the weight without
        them. Name them only if the change depends on them: of two such adapters at one weight, one isn't merged without
        the other where that would give something else.
        """
        ...

    def bias_change(self, given: Mapping[str, Any]) -> Any:
        """Returns what `bias_delta` returns.

        Args:
            given: What `bias_delta` asks for, by name, as in `change`.

        Returns:
            The change of the bias, (out,), or None.
        """
        return self.bias_delta(**given)

    @property
    def changes_bias(self) -> bool:
        """Whether the rule changes the bias of an operation, too: whether it has a ``bias_delta`` of its own."""
        return type(self).bias_delta is not Mergeable.bias_delta

    def bias_delta(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the change of the bias that the operation adds, or None.

        Its arguments can be ``bias``, ``weight`` and ``base``, as in ``rewrite``. One that needs ``bias``
        isn't asked where the operation has none.
        """
        return None


def changes_bias(rule: Any) -> bool:
    """Returns whether a rule changes the bias of an operation, too."""
    return isinstance(rule, Mergeable) and rule.changes_bias


class ReplacesWeight(ABC):
    """A rule that may have another weight read in place of the module's own while the adapter acts.

    That is frozen, and isn't saved: ``initialise`` computes it, where a file is loaded, too.

    Example:
        >>> class Rounding(ReplacesWeight):
        ...     def replaces(self, site, config):
        ...         return config.init_lora_weights == "loftq"
        >>> Rounding().replaces(None, LoraConfig())
        False
    """

    @abstractmethod
    def replaces(self, site: Any, config: Any) -> bool:
        """Returns whether the weight of a site is replaced; it isn't asked where the site is unmergeable.

        Args:
            site: The site.
            config: The config.
        """
        ...


class RunsByRow(ABC):
    """A rule that can give each row of a batch its own adapter in one graph.

    Example:
        >>> class ScaleByRow(RunsByRow):
        ...     def by_row(self, y, scale):
        ...         return y * scale
        >>> ScaleByRow().by_row(torch.ones(2, 3), scale=torch.tensor([[1.0], [2.0]])).sum(1)
        tensor([3., 6.])
    """

    zeros_change_nothing: ClassVar[bool] = False
    """Whether `by_row` returns ``y`` where all parameters are zeros, as those of rows without the adapter are.

    Otherwise the adapters of such a batch run in turn.
    """

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads, with what they are for an adapter without them; None for any value."""
        return {}

    def joined(self, rules: Sequence[Any]) -> Any:
        """Returns the rule for a batch whose rows have adapters with these rules, or None if there is none.

        Args:
            rules: The rules of the adapters at a site, of which this is one.
        """
        return self if all(rule == self for rule in rules) else None

    @abstractmethod
    def by_row(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of the operation; it is run on proxies.

        Its arguments can be ``x``, ``y``, ``operation`` and ``training``, as in ``rewrite``. The parameters are stacked
        row by row in a first dimension; a constant is a number, or a tensor with one for each row.
        """
        ...


class Combines(ABC):
    """A rule whose change is a product of two factors, of which several can be combined into one.

    Example:
        >>> class Product(Combines):
        ...     def as_product(self, delta):
        ...         return delta.flatten(1)
        >>> Product().as_product(torch.ones(2, 3, 3)).shape
        torch.Size([2, 9])
    """

    @property
    def rank_axes(self) -> tuple[int, int]:
        """The dimensions of the two factors that are as long as the rank."""
        return 0, 1

    @abstractmethod
    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix that the product of the factors is.

        Args:
            delta: The change, in the shape in which the weight is stored.
        """
        ...


class BoundaryRule(Rule):
    """Adapts what a module is given and what it returns.

    Example:
        >>> class Doubled(BoundaryRule):
        ...     def parameters(self, site, config):
        ...         return {}
        ...
        ...     def initialise(self, parameters, site, config, module):
        ...         return None
        ...
        ...     def leave(self, output):
        ...         return 2 * output
        >>> Doubled().leave(torch.ones(1))
        tensor([2.])
    """

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """The names of arguments that the forward gets beside its own; they are None unless they are given."""
        return ()

    def enter(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Returns the new values of arguments of the forward, by name; it is run on proxies.

        Its arguments can be ``inputs``, the forward's by name, ``training``, and what the site lets it read.
        """
        return {}

    def leave(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of what the module returns; it is run on proxies.

        Beside those of ``enter``, its arguments can be ``output`` and ``entered``, what ``enter`` has returned.
        """
        return kwargs["output"]


_BASES: dict[str, tuple[type, ...]] = {
    "rewrite": (OperationRule,),
    "enter": (InputRule, BoundaryRule),
    "leave": (BoundaryRule,),
    "delta": (Mergeable,),
    "bias_delta": (Mergeable,),
    "replaces": (ReplacesWeight,),
    "by_row": (RunsByRow,),
    "as_product": (Combines,),
}
"""The bases of the functions that a rule has without need, which nobody would call without them."""


@functools.lru_cache(maxsize=256)
def lacking_base(rule: type) -> str | None:
    """Returns why a class of rules is none, or has a function that nobody would call; None otherwise."""
    if not issubclass(rule, Rule):
        return f"{rule.__name__} is no rule; let it inherit from OperationRule, InputRule or BoundaryRule"
    for name, bases in _BASES.items():
        if hasattr(rule, name) and not issubclass(rule, bases):
            return f"{rule.__name__} has {name} and isn't {bases[0].__name__}; let it inherit from that"
    return None
