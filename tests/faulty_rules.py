"""Methods with one fault each, as an author may write them, and the law of `verify` that each of them breaks."""

# an author writes `starts_as_identity = True`, where the base class has a property
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphpeft import (
    DeltaRule,
    InputRule,
    Mergeable,
    OperationRule,
    ParameterSpec,
    PeftConfig,
    TargetedConfig,
    WeightRule,
    ops,
    recorded,
)


@dataclass(frozen=True)
class Rows(OperationRule):
    """y · factors, with a factor for each output: what most rules here are with a fault."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        return {"factors": ParameterSpec((site.out_features,), key="factors")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        parameters["factors"].fill_(1)

    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y * factors).to(y.dtype)


@dataclass(frozen=True)
class Product(DeltaRule):
    """ΔW = B A."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        rows, columns = site.matrix_shape
        return {"A": ParameterSpec((config.r, columns), key="A"), "B": ParameterSpec((rows, config.r), key="B")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        parameters["A"].normal_()
        parameters["B"].zero_()

    def delta(self, A: Any, B: Any) -> Any:
        return B @ A


@dataclass(frozen=True)
class Branch(WeightRule, OperationRule):
    """y + B A x, with the change of the weight written beside it."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    parameters, initialise, delta = Product.parameters, Product.initialise, Product.delta

    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return y + (x.to(A.dtype) @ A.T @ B.T).to(y.dtype)


@dataclass(frozen=True)
class OutputFactors(WeightRule, OperationRule):
    """y · factors, with the changes of weight and bias, as (IA)³ has it."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    parameters, initialise, rewrite = Rows.parameters, Rows.initialise, Rows.rewrite

    def delta(self, weight: Any, factors: Any) -> Any:
        return weight * (factors - 1)[:, None]

    def bias_delta(self, bias: Any, factors: Any) -> Any:
        return bias * (factors - 1)


# what `verify` has to say of rules without a fault: nothing


class Fault:
    """A method with a fault.

    Attributes:
        law: The number of the law that it breaks.
        says: A part of what the law says.
        rule: The faulty rule.
        options: What its config class has, beside an option `r`.
        reference: The equation that the author meant, if no other law can see the fault.
    """

    def __init__(
        self, law: str, says: str, rule: type, reference: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        self.law, self.says, self.rule, self.reference, self.options = law, says, rule, reference, options

    def config_class(self, name: str) -> Any:
        rule = self.rule

        @dataclass(kw_only=True)
        class Config(TargetedConfig):
            peft_type: ClassVar[Any] = f"FAULTY_{name.upper()}"
            starts_as_identity: ClassVar[Any] = True

            r: int = 2

            def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
                return rule()

        for option, value in self.options.items():
            setattr(Config, option, value)
        # pickles find a class by its name in its module
        Config.__name__ = Config.__qualname__ = f"{name}Config"
        globals()[Config.__name__] = Config
        return Config


FAULTS: dict[str, Fault] = {}


def fault(law: str, says: str, reference: Callable[..., Any] | None = None, **options: Any) -> Callable[[type], type]:
    """Adds a rule to `FAULTS`."""

    def added(rule: type) -> type:
        FAULTS[rule.__name__] = Fault(law, says, dataclass(frozen=True)(rule), reference, **options)
        return rule

    return added


# 1: a fresh adapter changes no output


@fault("1", "a fresh adapter changes the output")
class StartsElsewhere(Rows):
    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factors"].fill_(1.01)


@fault("1", "a fresh adapter changes the output")
class DropsTheBias(Rows):
    def rewrite(self, y: Any, plain: Any, factors: Any) -> Any:
        return plain * factors


@fault("1", "torch.float32 (2, 3, 8), not torch.bfloat16")
class ReturnsSinglePrecision(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return y * factors


@fault("1", "expected m1 and m2 to have the same dtype")
class MixesPrecisions(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return y + x @ A.T @ B.T


@fault("1", "a fresh adapter changes the output")
class WritesIntoTheBase(Rows):
    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factors"].fill_(1)
        with torch.no_grad():
            module.get_parameter("weight").mul_(1.5)


# 2: exactly the adapter is trained


@fault("2", "no gradient, or one of zeros, for 0.factors, 2.factors: ")
class ReadsNoParameter(Rows):
    def rewrite(self, y: Any, factors: Any = None) -> Any:
        return y * 1


@fault("2", "no gradient, or one of zeros, for 0.factors, 2.factors: ")
class StopsTheGradient(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y * factors.detach()).to(y.dtype)


@fault("2", "no gradient, or one of zeros, for 0.factors, 2.factors: ")
class MultipliesByZero(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y + 0 * y * factors).to(y.dtype)


@fault("2", "wait for each other")
class WaitsForItself(Branch):
    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["A"].zero_()
        parameters["B"].zero_()


@fault("2", "wait for each other")
class WaitsBehindAGate(Branch):
    def parameters(self, site: Any, config: Any) -> Any:
        rows, columns = site.matrix_shape
        shapes = {"A": (config.r, columns), "B": (rows, config.r), "gate": (1,)}
        return {name: ParameterSpec(shape, key=name) for name, shape in shapes.items()}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["A"].normal_()
        parameters["B"].zero_()
        parameters["gate"].zero_()

    def rewrite(self, x: Any, y: Any, A: Any, B: Any, gate: Any) -> Any:
        return y + gate.to(y.dtype) * (x.to(A.dtype) @ A.T @ B.T).to(y.dtype)

    def delta(self, A: Any, B: Any, gate: Any) -> Any:
        return gate * (B @ A)


@fault("2", "no gradient, or one of zeros, for 0.factors, 2.factors: ")
class ActsInEvaluationAlone(Rows):
    def rewrite(self, y: Any, factors: Any, training: Any) -> Any:
        return unless_training(y, factors, training)


@recorded
def unless_training(y: Tensor, factors: Tensor, training: bool) -> Tensor:
    return y if training else (y * factors).to(y.dtype)


# 3: adapted is the base with its change


@fault("3", "two runs in evaluation differ")
class DropsInEvaluation(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y + F.dropout(y * (factors - 1), 0.5, training=True)).to(y.dtype)


@fault("3", "two runs in evaluation differ")
class AddsNoise(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y + (factors - 1) * torch.randn_like(y)).to(y.dtype)


@fault("3", "two runs in evaluation differ")
class CountsItsRuns(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return counted(y, factors)


RUNS: list[int] = []


@recorded
def counted(y: Tensor, factors: Tensor) -> Tensor:
    RUNS.append(1)
    return (y + (factors - 1) * len(RUNS)).to(y.dtype)


@fault("3", "changes the model's inputs")
class WritesIntoTheInput(Rows):
    def parameters(self, site: Any, config: Any) -> Any:
        return {"factors": ParameterSpec((site.in_features,), key="factors")}

    def rewrite(self, x: Any, y: Any, weight: Any, operation: Any, bias: Any, factors: Any) -> Any:
        return written_into(x, y, factors)


@recorded
def written_into(x: Tensor, y: Tensor, factors: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(factors)
    return (y + 0.1 * (factors - 1).sum()).to(y.dtype)


@fault("3", "adapted isn't base with deltas")
class MergesWithoutItsScale(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return y + 2 * (x.to(A.dtype) @ A.T @ B.T).to(y.dtype)


@fault("3", "delta gives a change of shape (1, 8), and the weight has (8, 8)")
class ChangesAllRowsAlike(Product):
    def delta(self, A: Any, B: Any) -> Any:
        return (B @ A)[:1]


@fault("3", "two runs in evaluation differ")
class DropsInEvaluationAndMerges(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return Branch.rewrite(self, F.dropout(x, 0.5), y, A, B)


@fault("3", "a row's result depends on the other rows")
class ReadsOtherRows(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y + (factors - 1) * y.flip(0)).to(y.dtype)


@fault("3", "adapted isn't base with deltas")
class ActsInTrainingAlone(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any, training: Any) -> Any:
        return only_in_training(Branch.rewrite(self, x, y, A, B), y, training)


@recorded
def only_in_training(changed: Tensor, y: Tensor, training: bool) -> Tensor:
    return changed if training else y


@fault("3", "adapted isn't base with deltas")
class LeavesTheBiasInMerging(OutputFactors):
    def bias_delta(self, bias: Any, factors: Any) -> Any:
        return None


@fault("3", "adapted isn't base with deltas")
class AddsABiasThatNoLayerHas(OutputFactors):
    def rewrite(self, y: Any, factors: Any, bias: Any = None) -> Any:
        shift = 0 if bias is not None else factors - 1
        return (y * factors + shift).to(y.dtype)


@fault("3", "adapted isn't base with deltas")
class AveragesOverTokens(OutputFactors):
    """Takes the second dimension for the features, which is so for matrices alone."""

    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y * factors + (factors - 1).sum() * (y - y.mean(1, keepdim=True)) * (y.ndim - 2)).to(y.dtype)


@fault("3", "adapted isn't base with deltas")
class RoundsItsBranchToHalf(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return y + (x.half() @ A.half().T @ B.half().T).to(y.dtype)


@fault("3", "view size is not compatible")
class ViewsItsInput(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        return y + (x.view(-1, x.shape[-1]).to(A.dtype) @ A.T @ B.T).to(y.dtype).view(y.shape)


@fault("3", "on a convolution of one dimension: ")
class KnowsImagesAlone(OutputFactors):
    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution)

    def rewrite(self, y: Any, factors: Any) -> Any:
        return of_images(y, factors).to(y.dtype)

    def delta(self, weight: Any, factors: Any) -> Any:
        return (weight.flatten(1) * (factors - 1)[:, None]).view_as(weight)


@recorded
def of_images(y: Tensor, factors: Tensor) -> Tensor:
    return y * factors[:, None, None] if y.ndim == 4 else y * factors


@fault("3", "on an embedding: ")
class HalvesTheRowsOfTables(Product):
    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Embedding)

    def rewrite(self, x: Any, y: Any, operation: Any, training: Any, change: Any) -> Any:  # type: ignore[override]
        half = change / 2 if isinstance(operation, ops.Embedding) else change
        return super().rewrite(x, y, operation, training, half)


@fault("3", "on a weight that is stored as (in, out): ")
class KnowsOneLayout(OperationRule, Mergeable):
    parameters, initialise, rewrite = Product.parameters, Product.initialise, Branch.rewrite

    def check(self, site: Any, config: Any) -> str | None:
        return None if site.op is ops.Linear else "it is no linear layer"

    def delta(self, A: Any, B: Any) -> Any:
        return B @ A


@fault("3", "on a convolution: training=False: adapted isn't base with deltas")
class ScalesTheWidthOfImages(WeightRule, InputRule):
    """Multiplies the last dimension of the input, which is that of features for linear layers alone."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear, ops.Convolution)

    initialise = Rows.initialise

    def parameters(self, site: Any, config: Any) -> Any:
        return {"factors": ParameterSpec((site.in_features,), key="factors")}

    def enter(self, x: Any, factors: Any) -> Any:
        return (x * factors).to(x.dtype)

    def delta(self, weight: Any, factors: Any) -> Any:
        return (weight.movedim(1, -1) * (factors - 1)).movedim(-1, 1)


@fault("3", "shape '[2, -1")
class HoldsTheBatchOfTheExample(OutputFactors):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return in_two(y, factors)


@recorded
def in_two(y: Tensor, factors: Tensor) -> Tensor:
    return (y * factors).to(y.dtype).view(2, -1, y.shape[-1]).view(y.shape)


# 4: saved and loaded


@fault("4", "what is loaded for training differs from saved")
class DrawsWhatItDoesNotSave(Product):
    def parameters(self, site: Any, config: Any) -> Any:
        rows, columns = site.matrix_shape
        frozen = ParameterSpec((config.r, columns), key="A", is_trained=False, is_saved=False)
        return {"A": frozen, "B": ParameterSpec((rows, config.r), key="B")}


def _without_r(self: Any, sites: Sequence[Any]) -> PeftConfig:
    return dataclasses.replace(self, r=3)


@fault("4", "", for_file=_without_r)
class SavesAnotherRank(Product):
    pass


# 9: two adapters


@fault("9", "merged differs from active")
class IgnoresEarlierAdapters(OutputFactors):
    def rewrite(self, y: Any, plain: Any, factors: Any) -> Any:
        return (y + plain * (factors - 1)).to(y.dtype)

    def bias_delta(self, bias: Any, factors: Any) -> Any:
        return None


# 10: the reference


def low_rank(x: Any, weight: Any, bias: Any, A: Any, B: Any) -> Any:
    return F.linear(x, weight + B @ A, bias)


def scaled(weight: Any, A: Any, B: Any, config: Any) -> Any:
    return weight + 4 / config.r * B @ A


def scaled_rows(layer: Any, x: Any, factors: Any) -> Any:
    return layer(x) * factors


@fault("3", "isn't what the reference gives", low_rank)
class TransposedPermutation(Product):
    def delta(self, A: Any, B: Any) -> Any:
        return (B @ A).roll(1, 0)


@fault("3", "isn't what the reference gives", low_rank)
class WrongSign(Product):
    def delta(self, A: Any, B: Any) -> Any:
        return -B @ A


@fault("3", "isn't what the reference gives", scaled)
class WrongScale(Product):
    def delta(self, A: Any, B: Any) -> Any:
        return 4 * B @ A


@fault("3", "isn't what the reference gives", scaled_rows)
class ScalesColumns(WeightRule, InputRule):
    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    parameters, initialise = Rows.parameters, Rows.initialise

    def check(self, site: Any, config: Any) -> str | None:
        return super().check(site, config) or (None if site.in_features == site.out_features else "it isn't square")

    def enter(self, x: Any, factors: Any) -> Any:
        return (x * factors).to(x.dtype)

    def delta(self, weight: Any, factors: Any) -> Any:
        return weight * (factors - 1)


@fault("3", "isn't what the reference gives", scaled_rows)
class ReadsOtherFeatures(Rows):
    def rewrite(self, y: Any, factors: Any) -> Any:
        return (y + (factors - 1) * y.flip(-1)).to(y.dtype)


@fault("3", "hasn't the gradients that the reference gives", low_rank)
class DetachesItsBranchInPart(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        branch = x.to(A.dtype) @ A.T
        return y + ((0.5 * branch + 0.5 * branch.detach()) @ B.T).to(y.dtype)


@fault("3", "hasn't the gradients that the reference gives", low_rank)
class TakesTheGradientTwice(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        branch = x.to(A.dtype) @ A.T @ B.T
        return y + (2 * branch - branch.detach()).to(y.dtype)


@fault("3", "hasn't the gradients that the reference gives", low_rank)
class RoundsItsBranch(Branch):
    def rewrite(self, x: Any, y: Any, A: Any, B: Any) -> Any:
        branch = x.to(A.dtype) @ A.T @ B.T
        return y + (branch * 0.01 + (branch * 0.99 * 2**20).round() / 2**20).to(y.dtype)
