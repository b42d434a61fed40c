"""Quantised weights as numbers, and numbers as codes of the same kind, by the library that quantised the weight.

    numbers = Q⁻¹(codes)        codes = Q(numbers)

Known are bitsandbytes' 4 bits (nf4, fp4) and 8 bits, and torchao's `Int8Tensor`, `Float8Tensor` and
`IntxUnpackedToInt8Tensor`. A weight tells its bits, its blocks, and how inputs are quantised. It doesn't tell by which
algorithm its scales were chosen; new codes get the scales of the library's default. No library is imported here that
the weight hasn't come with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.graph.traced_model import stands_for


class QuantisingError(Exception):
    """Numbers can't be quantised as a weight was; the message says why."""


class Codes(NamedTuple):
    """The codes of a layer's weight.

    Attributes:
        weight: The weight, whose class knows its scales.
        beside: The state that the layer keeps beside the weight, by the names of the layer's attributes.
    """

    weight: nn.Parameter
    beside: Mapping[str, Any]

    def numbers(self) -> Tensor:
        """Returns the numbers that the codes stand for, (out, in)."""
        return numbers_of(self.weight, next(iter(self.beside.values()), None))

    def to(self, device: torch.device) -> Codes:
        """Returns the codes on a device: these, if they are there."""
        if self.weight.device == device:
            return self
        weight: Any = self.weight.to(device)
        beside = dict(self.beside)
        if "quant_state" in beside:
            beside["quant_state"] = weight.quant_state
        if "state" in beside:
            state = beside["state"] = copy.copy(beside["state"])
            state.CB, state.SCB = (None if part is None else part.to(device) for part in (state.CB, state.SCB))
        return Codes(weight, beside)


class _Quantiser(NamedTuple):
    """How one class of weights is read and made.

    Attributes:
        beside: The name of the layer's attribute that belongs to the codes, if there is one.
        numbers: Returns the numbers of a weight, given the value of this attribute.
        codes: Returns the codes of numbers, made as those of a weight, given the value of this attribute.
        dtype: Returns the dtype that a weight had before it was quantised, or None if it doesn't tell.
    """

    beside: tuple[str, ...]
    numbers: Callable[[Any, Any], Tensor]
    codes: Callable[[Any, Any, Tensor], Codes]
    dtype: Callable[[Any], torch.dtype | None]


def is_known(layer: nn.Module) -> bool:
    """Returns whether a layer's weight is quantised in a way that is known here."""
    weight = layer._parameters.get("weight")
    return isinstance(weight, Tensor) and issubclass(stands_for(layer), nn.Linear) and _quantiser(weight) is not None


def codes_of(layer: nn.Module) -> Codes:
    """Returns the codes that a layer has, not a copy of them."""
    weight: Any = layer._parameters["weight"]
    return Codes(weight, {name: getattr(layer, name) for name in _known(weight).beside})


def parts_of(layer: nn.Module) -> dict[str, str]:
    """Returns the attributes of a layer by which its numbers are read, `codes` and `state`, and that of its `bias`."""
    parts = {"codes": "weight"}
    for name in _known(layer._parameters["weight"]).beside:
        parts["state"] = name
    if layer._parameters.get("bias") is not None:
        parts["bias"] = "bias"
    return parts


def numbers_of(weight: Any, state: Any = None) -> Tensor:
    """Returns the numbers of a quantised weight, (out, in), without gradients."""
    quantiser = _quantiser(weight) or _QUANTISERS[_BY_STATE[type(state).__name__]]
    with torch.no_grad():
        return quantiser.numbers(weight, state)


@torch.no_grad()
def quantised(layer: nn.Module, numbers: Tensor) -> Codes:
    """Returns numbers as codes, made as those that a layer's weight has; the layer stays unchanged."""
    own: Any = layer._parameters["weight"]
    state = next((getattr(layer, name) for name in _known(own).beside), None)
    made = _known(own).codes(own, state, numbers)
    if hasattr(own, "module"):
        # bitsandbytes' 4 bits, to which it would have given its codes at once
        made.weight.module = layer  # pyright: ignore[reportAttributeAccessIssue]
    return made


@torch.no_grad()
def requantised(weight: Any, state: Any, numbers: Tensor) -> Tensor:
    """Returns what is left of numbers, (out, in), when they are quantised as a weight was."""
    quantiser = _quantiser(weight)
    if quantiser is None:
        raise QuantisingError("the weight was pickled, and has lost how it was quantised; load the base model anew")
    return quantiser.codes(weight, state, numbers).numbers()


def dtype_before(layer: nn.Module) -> torch.dtype:
    """Returns the dtype that a layer's weight had before it was quantised, as far as the layer tells."""
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    found = _known(weight).dtype(weight)
    return found or (torch.get_default_dtype() if bias is None else bias.dtype)


def casts_inputs(layer: nn.Module) -> bool:
    """Returns whether a layer takes inputs of any dtype, and returns outputs of the same."""
    return bool(_known(layer._parameters["weight"]).beside)


def quantises_inputs(layer: nn.Module) -> bool:
    """Returns whether a layer quantises its inputs, too, so that it isn't linear in its weight's numbers."""
    weight: Any = layer._parameters["weight"]
    options = (getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return type(weight).__name__ == "Int8Params" or any(option is not None for option in options)


NAMES_OF_LAYERS: dict[str, frozenset[str]] = {
    "bitsandbytes": frozenset(
        (
            "compute_dtype",
            "compute_type_is_set",
            "index",
            "quant_state",
            "quant_storage",
            "source_cls",
            "state",
            "support_avx512bf16_for_cpu",
        )
    ),
    "torchao": frozenset(("extra_repr",)),
}
"""The attributes that quantising gives to a layer itself, by the package."""


def _known(weight: Any) -> _Quantiser:
    found = _quantiser(weight)
    assert found is not None
    return found


def _quantiser(weight: Any) -> _Quantiser | None:
    cls = type(weight)
    found = _QUANTISERS.get((cls.__module__.partition(".")[0], cls.__name__))
    return found if found is not None and _is_quantised_by_now(weight) else None


def _is_quantised_by_now(weight: Any) -> bool:
    """Returns whether a weight has codes: those of bitsandbytes are made where a layer is moved to a device."""
    if type(weight).__name__ == "Params4bit":
        return weight.quant_state is not None
    return type(weight).__name__ != "Int8Params" or (weight.dtype == torch.int8 and not weight.has_fp16_weights)


# bitsandbytes


def _numbers_of_4_bits(weight: Any, state: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, getattr(weight, "quant_state", state)
    if getattr(state, "packing_format_for_cpu", False):
        # a copy, since that changes the state in place
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return functional.dequantize_4bit(data, state)


def _codes_of_4_bits(own: Any, _: Any, numbers: Tensor) -> Codes:
    options = {name: getattr(own, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    weight = type(own)(numbers, requires_grad=False, **options).to(own.device)
    return Codes(weight, {"quant_state": weight.quant_state})


def _dtype_before_4_bits(weight: Any) -> torch.dtype:
    state = weight.quant_state
    return state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype


def _numbers_of_8_bits(weight: Any, state: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # the scales move from the weight to the state in the layer's first call
    scales = weight.SCB if state is None or state.SCB is None else state.SCB
    return int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def _codes_of_8_bits(own: Any, state: Any, numbers: Tensor) -> Codes:
    state = copy.copy(state)
    # it quantises what comes from the CPU alone
    weight = type(own)(numbers.cpu(), requires_grad=False, has_fp16_weights=False).to(own.device)
    state.reset_grads()
    return Codes(weight, {"state": state})


# torchao


def _numbers_of_torchao(weight: Any, _: Any) -> Tensor:
    return weight.dequantize()


def _of_torchao(make: Callable[[Any, Tensor], Any]) -> Callable[[Any, Any, Tensor], Codes]:
    """Returns the function that makes a weight's codes by one that makes a tensor like another one."""

    def codes(own: Any, _: Any, numbers: Tensor) -> Codes:
        try:
            made = make(own, numbers.to(own.dtype))
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            raise QuantisingError(f"torchao can't quantise it anew: {error}") from error
        if _form(made) != _form(own):
            raise QuantisingError(f"quantised anew it would be {_form(made)}, and it was {_form(own)}")
        return Codes(nn.Parameter(made, requires_grad=False), {})

    return codes


def _form(weight: Any) -> tuple[Any, ...]:
    """Returns all that decides how a tensor of torchao computes, but for its numbers."""
    names, metadata = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in names]
    metadata = {key: list(value) if isinstance(value, tuple) else value for key, value in metadata.items()}
    return metadata, {name: (part.dtype, tuple(part.shape)) for name, part in zip(names, parts, strict=True)}


def _int8(own: Any, numbers: Tensor) -> Any:
    given = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    options = {name: getattr(own, name) for name in given if hasattr(own, name)}
    return type(own).from_hp(numbers, _granularity(own), _mapping(own), **options)


def _float8(own: Any, numbers: Tensor) -> Any:
    options = {name: getattr(own, name) for name in ("mm_config", "kernel_preference", "act_quant_kwargs")}
    return type(own).from_hp(numbers, own.qdata.dtype, _granularity(own), **options)


def _intx(own: Any, numbers: Tensor) -> Any:
    options = {"mapping_type": _mapping(own), "activation_quantization": own.activation_quantization}
    return type(own).from_hp(numbers, own.block_size, own.target_dtype, **options)


def _granularity(own: Any) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    block, shape = tuple(own.block_size), tuple(own.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _mapping(own: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    zero = getattr(own, "zero_point", None)
    return MappingType.ASYMMETRIC if zero is not None and bool(zero.any()) else MappingType.SYMMETRIC


_QUANTISERS: dict[tuple[str, str], _Quantiser] = {
    ("bitsandbytes", "Params4bit"): _Quantiser(
        ("quant_state",), _numbers_of_4_bits, _codes_of_4_bits, _dtype_before_4_bits
    ),
    ("bitsandbytes", "Int8Params"): _Quantiser(("state",), _numbers_of_8_bits, _codes_of_8_bits, lambda _: None),
    **{
        ("torchao", name): _Quantiser((), _numbers_of_torchao, _of_torchao(make), lambda weight: weight.dtype)
        for name, make in (("Int8Tensor", _int8), ("Float8Tensor", _float8), ("IntxUnpackedToInt8Tensor", _intx))
    },
}
"""By the package and the name of the weight's class."""

_BY_STATE = {"QuantState": ("bitsandbytes", "Params4bit"), "MatmulLtState": ("bitsandbytes", "Int8Params")}
"""The same of weights that have lost their class, by the class of what their layer keeps beside them."""
