"""The base classes of rules. A rule defines how a method adapts one kind of site.

A rule is an `OperationRule`, an `InputRule` or a `BoundaryRule`; a rule only for weights as such is just a `Mergeable`.
Further bases declare further abilities: `Mergeable`, `RunsByRow`. A rule whose change is written in PEFT's layout of
weights is a `WeightRule`; a rule that is just such a change is a `DeltaRule`, see `rules/delta_rule.py`.

The functions that compute ask for values by the names of their arguments: the names in the function's docstring, and
the rule's parameters and constants. An argument that a rule doesn't declare for every config needs a default, as in
``lora_bias=None``. Any other name is an error when a model is adapted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from graphpeft.rules.parameter_spec import ParameterSpec


class Rule(ABC):
    """Adapts one kind of site for one method.

    Rules are frozen values, best dataclasses. Equal rules give equal graphs, so values that differ from site to site
    (shapes, scales) come from the site and the config, not from the rule.

    Examples:
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

    reads_whole_batch: ClassVar[bool] = False
    """Whether each row's result depends on all rows of its batch, so that rows can't have adapters of their own."""

    call_inputs: ClassVar[tuple[str, ...]] = ()
    """Extra arguments of each call of the model, as ``model(x, task_ids=…)``.

    ``rewrite``, ``enter`` and ``leave`` can ask for them. The model's forward gets them, too, if it has named arguments
    for them. `BoundaryRule.more_inputs`, in contrast, are extra arguments of one module's forward.
    """

    call_inputs_by_row: ClassVar[bool] = False
    """Whether each of ``call_inputs`` has a value for each row, so that rows of a batch can have adapters of their own.

    It's a tensor, a list, or a mapping to such.
    """

    held_in: ClassVar[str] = ""
    """The name of a module in which the site's owner has the tensors of all adapters with such rules.

    So they are at ``<held_in>.<adapter>.<name>``; by default, at ``<adapter>.<name>``.
    """

    scales: ClassVar[tuple[str, ...]] = ()
    """The constants by which the rule only multiplies, so that they may be tensors instead of numbers."""

    rounds_sum: ClassVar[bool] = False
    """Whether the rule computes with the rounded sum of a quantised weight and its change, as merging makes it."""

    adapts_both_ways: ClassVar[bool] = False
    """Whether the rule adapts a weight that some operations read as (in, out), and others as (out, in)."""

    def at_site(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule with the facts about a site that its functions need.

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
        """Returns the numbers that the rule's functions read, by name; they live on the site's owner.

        Args:
            site: The site.
            config: The config.
        """
        return {}

    def all_constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the rule's constants and its base classes' constants; only base classes override this method.

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
        """Fills new parameters, on the CPU, with their initial values.

        Args:
            parameters: The parameters by name, uninitialised.
            site: The site.
            config: The config.
            module: The module that owns the site's weight and the parameters.

        Returns:
            If the rule `replaces` the site's weight: the tensor that the module reads in place of the weight, by the
            weight's name. Otherwise None.
        """
        ...

    def replaces(self, site: Any, config: Any) -> bool:
        """Returns whether the module reads another weight while the adapter acts, which `initialise` returns.

        That weight is frozen and isn't saved: ``initialise`` computes it, also when a file is loaded.

        Args:
            site: The site, where the rule is a change of the weight.
            config: The config.
        """
        return False

    # no abstract one: most rules need nothing
    def complete(  # noqa: B027
        self, parameters: Mapping[str, torch.Tensor], site: Any, config: Any, module: nn.Module
    ) -> None:
        """Fills the parameters that files lack, where a file is loaded: in place of `initialise`, which has no file.

        Args:
            parameters: The parameters by name: those of the file, and the others with any values.
            site: The site.
            config: The config, as `initialise` gets it.
            module: The module that owns the site's weight and the parameters.

        Raises:
            ValueError: If the file's parameters can't be of this weight.
        """

    def unmergeable(self, site: Any) -> str | None:
        """Returns the reason why the rule's effect at a site is no change of a weight and a bias, or None.

        Args:
            site: The site.
        """
        return f"{type(self).__name__} isn't Mergeable: it has no change of a weight"


class OperationRule(Rule):
    """Adapts operations that use a weight, and calls of opaque modules.

    Examples:
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
        """Returns the new value of the operation; it runs on proxies.

        Its arguments can be ``x`` and ``y``, the operation's input and its present value; ``operation``, which has
        ``apply(x, weight)``, the same operation with other operands; and ``training``. For an operation with a weight,
        they can be ``weight`` and ``bias``, with the changes of earlier adapters (None without a bias), ``base`` and
        ``base_bias``, the same without these changes, and ``plain``, the operation with ``base`` and without a bias, on
        its input without adapters. In a `Mergeable` rule, they can be ``change`` and ``bias_change``: the results of
        its ``delta`` and its ``bias_delta`` (None without a change of the bias).
        """
        ...


class InputRule(Rule):
    """Changes the input of an operation, so that the operation itself runs once.

    Examples:
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
        """Returns the new input of the operation; it runs on proxies.

        Its arguments can be ``x``, ``operation`` and ``training``, as in ``rewrite``. The operation and the earlier
        adapters get the result as their input. If ``delta`` turns the weight W into W F, ``enter`` returns F x. So W is
        the weight with the changes of earlier adapters, as in ``delta``.
        """
        ...


class Mergeable(Rule):
    """A rule that changes a weight, so that its change can be merged into the weight.

    It also adapts weights as such, whatever the model does with them: there, `delta` runs on proxies.

    Examples:
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
        """Returns the reason why the rule's effect at a site is no change of the weight and the bias, or None."""
        return None

    def change(self, given: Mapping[str, Any]) -> Any:
        """Returns the result of `delta` in the weight's stored layout.

        Args:
            given: The arguments of `delta` by name: tensors and numbers, or proxies.
        """
        return self.delta(**given)

    def changed_weight(self, weight: Any, given: Mapping[str, Any]) -> Any:
        """Returns a weight as such with its change.

        Its arguments can also be ``training`` and the rule's own constants.

        Args:
            weight: The weight, with the changes of earlier adapters; a proxy.
            given: The arguments of `delta` by name, as in `change`; proxies.
        """
        return weight + self.change(given).to(weight.dtype)

    @abstractmethod
    def delta(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the weight's change in evaluation, in the weight's stored layout.

        Its arguments can be ``weight``, with the changes of earlier adapters, and ``base``, the weight without them.
        Name them only if the change depends on them: two such adapters of one weight can't be merged one without the
        other where the result would differ.
        """
        ...

    def bias_change(self, given: Mapping[str, Any]) -> Any:
        """Returns the result of `bias_delta`.

        Args:
            given: The arguments of `bias_delta` by name, as in `change`.

        Returns:
            The change of the bias, (out,), or None.
        """
        return self.bias_delta(**given)

    @property
    def changes_bias(self) -> bool:
        """Whether the rule changes the bias of an operation, too: whether it overrides ``bias_delta``."""
        return type(self).bias_delta is not Mergeable.bias_delta

    def bias_delta(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the change of the bias that the operation adds, or None.

        Its arguments can be ``bias``, ``base_bias``, ``weight`` and ``base``, as in ``rewrite``. If one of the first
        two has no default, the method isn't called for an operation without a bias.
        """
        return None


def changes_bias(rule: Any) -> bool:
    """Returns whether a rule changes the bias of an operation, too."""
    return isinstance(rule, Mergeable) and rule.changes_bias


class RunsByRow(ABC):
    """A rule that can give each row of a batch its own adapter in one graph.

    Examples:
        >>> class ScaleByRow(RunsByRow):
        ...     def by_row(self, y, scale):
        ...         return y * scale
        >>> ScaleByRow().by_row(torch.ones(2, 3), scale=torch.tensor([[1.0], [2.0]])).sum(1)
        tensor([3., 6.])
    """

    zeros_change_nothing: ClassVar[bool] = False
    """Whether `by_row` returns ``y`` where all parameters are zeros, the parameters for rows without the adapter.

    If False, the adapters of a batch with such rows run one after another.
    """

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads, each with its value for an adapter without it; None for any value.

        Where rows have different ones, `by_row` gets a tensor of shape (rows,), in double precision and on the CPU.
        """
        return {}

    def joined(self, rules: Sequence[Any]) -> Any:
        """Returns the rule for a batch whose rows have adapters with these rules, or None if there is none.

        Args:
            rules: The rules of the adapters at a site, including this one.
        """
        return self if all(rule == self for rule in rules) else None

    @abstractmethod
    def by_row(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the new value of the operation; it runs on proxies.

        Its arguments can be ``x``, ``y``, ``operation`` and ``training``, as in ``rewrite``. The parameters are stacked
        in a first dimension of rows; a constant is a number, or a tensor with one number for each row.
        """
        ...


class BoundaryRule(Rule):
    """Adapts the inputs and the output of a module.

    Examples:
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
        """The names of extra arguments of the module's forward; None is their default."""
        return ()

    reads_as_given: ClassVar[tuple[str, ...]] = ()
    """Arguments of the forward that tell the rule about the call only as the caller has given them."""

    @property
    def spends(self) -> tuple[str, ...]:
        """Arguments that don't tell other rules about the call any more once this rule has entered."""
        return ()

    def enter(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Returns new values of arguments of the forward, by name; it runs on proxies.

        Its arguments can be ``inputs``, the forward's arguments by name, ``training``, and the site's `reads`.
        """
        return {}

    def leave(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's new output; it runs on proxies.

        Its arguments can be the arguments of ``enter``, ``output``, and ``entered``, the result of ``enter``.
        """
        return kwargs["output"]
