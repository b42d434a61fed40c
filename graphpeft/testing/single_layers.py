"""Single layers in the forms that a rule may meet, for laws that a user's own model can't break.

A rule that is right on a user's model may be wrong elsewhere: without a bias, on inputs of more dimensions, for a
weight that is stored as (in, out), in half precision, on inputs that aren't contiguous, for convolutions of one or two
dimensions, for embeddings. So laws are also checked on such layers, one at a time, each at the place of a layer that
the config adapts, and with its sizes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph import ops
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.sites.site import Site
from graphpeft.testing.runs import run_each, seed_generators

MOST = 16
"""The most features of a convolution, whose inputs are as wide as it has features."""

TOLERANCE = 1e-5
"""The allowed difference of a single layer's outputs: less than half precision's rounding of the change alone."""


class Subject(NamedTuple):
    """A model with a config and inputs, on which laws are checked.

    Attributes:
        what: Its name in errors; "" for the user's own model.
        build: Builds the model, equal at each call.
        config: The config.
        inputs: Inputs of the model.
        others: Other inputs, of other sizes.
        has_reference: Whether an author's reference holds for it.
        tolerance: The allowed difference of outputs that rounding alone may make.
    """

    what: str
    build: Callable[[], nn.Module]
    config: PeftConfig
    inputs: ExampleInputs
    others: tuple[ExampleInputs, ...]
    has_reference: bool = True
    tolerance: float = 1e-4

    @property
    def adaptation(self) -> tuple[Callable[[], nn.Module], PeftConfig, ExampleInputs]:
        """The first arguments of a law."""
        return self.build, self.config, self.inputs


class Form(NamedTuple):
    """A form of a layer.

    Attributes:
        what: A description.
        layer: Makes it.
        shapes: The shapes of its inputs, and of other ones, which aren't contiguous.
        dtype: Its dtype and that of its inputs.
        has_reference: Whether an author's reference holds for it.
        of: The kind of operation; a rule that doesn't name it needn't know it, so that only wrong values break a law.
    """

    what: str
    layer: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    has_reference: bool = True
    of: type | None = None

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draws an input: numbers, or indices of the first rows of an embedding."""
        if self.of is ops.Embedding:
            return torch.randint(0, 2, shape, generator=generator)
        return torch.randn(shape, generator=generator).to(self.dtype)


class StoredInOut(nn.Module):
    """A linear layer that stores its weight as (in, out), as `transformers.pytorch_utils.Conv1D` does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output."""
        return x @ self.weight + self.bias


class Around(nn.Module):
    """A module that only calls the one inside, which so has the path that it has in the user's model."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the output of the module inside."""
        [inner] = self.children()
        return inner(x)


def _forms_of_linear(site: Site) -> tuple[Form, ...]:
    i, o = site.in_features, site.out_features
    assert i is not None
    assert o is not None
    shapes = ((2, 3, i), (3, 5, i))
    return (
        Form("a linear layer without a bias, on inputs of 3 dimensions", lambda: nn.Linear(i, o, bias=False), shapes),
        # without a reference: PEFT exchanges some methods' factors for a weight that is no layer's
        Form("a weight that is stored as (in, out)", lambda: StoredInOut(i, o), shapes, has_reference=False),
        Form("a linear layer in bfloat16", lambda: nn.Linear(i, o), shapes, torch.bfloat16),
        Form("an embedding", lambda: nn.Embedding(i, o), ((2, 3), (3, 5)), has_reference=False, of=ops.Embedding),
        *_convolutions(i, o),
    )


def _convolutions(in_channels: int, out_channels: int) -> list[Form]:
    """Returns convolutions of one and two dimensions, whatever the user's layer is."""
    narrow, fewer = min(in_channels, MOST), min(out_channels, MOST)
    # as wide as there are features, so that a rule that takes one dimension for the other computes something
    of_each = {
        "a convolution": (nn.Conv2d, (2, narrow, 4, narrow), (3, narrow, 5, narrow)),
        "a convolution of one dimension": (nn.Conv1d, (2, narrow, narrow), (3, narrow, narrow)),
    }
    return [
        Form(
            what, functools.partial(kind, narrow, fewer, 3, padding=1), shapes, has_reference=False, of=ops.Convolution
        )
        for what, (kind, *shapes) in of_each.items()
    ]


def _forms_of_convolution(layer: Any) -> tuple[Form, ...]:
    sizes = [d * (k - 1) + 4 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    shapes = ((2, layer.in_channels, *sizes), (3, layer.in_channels, *[size + 1 for size in sizes]))

    def without_bias() -> nn.Module:
        copied = copy.deepcopy(layer)
        copied.bias = None
        return copied

    return (
        Form("a convolution without a bias", without_bias, shapes),
        Form("a convolution in bfloat16", lambda: copy.deepcopy(layer), shapes, torch.bfloat16),
        *_convolutions(layer.in_channels, layer.out_channels),
    )


def single_layers(
    build: Callable[[], nn.Module], config: PeftConfig, inputs: ExampleInputs
) -> tuple[list[Subject], list[str]]:
    """Returns layers of all forms, at the place of the first layer of each kind that each class of rules adapts."""
    model = get_peft_model(build(), config, example_inputs=inputs)
    found: dict[Any, AdaptedSite] = {}
    for one in model._peft_adapters.by_name["default"].weight_sites:
        if _is_plain(one):
            found.setdefault((type(one.rule), one.site.layout), one)
    subjects, left_out = list[Subject](), list[str]()
    for one in found.values():
        site: Any = one.site
        narrowed = _only_at(site.name, build, config, inputs)
        layer = build().get_submodule(site.owner)
        forms = _forms_of_linear(site) if site.layout is ops.Linear else _forms_of_convolution(layer)
        if narrowed is None:
            continue
        for form in forms:
            subject = _subject(form, site.owner, narrowed)
            is_known = form.of is None or form.of in getattr(one.rule, "adapts", ())
            reason = _refusal(subject, is_known)
            if reason is None:
                subjects.append(subject)
            else:
                left_out.append(f"{form.what}: {reason}")
    return subjects, left_out


def _is_plain(one: AdaptedSite) -> bool:
    """Returns whether a site is a layer by itself, with a rule that needs nothing but the layer."""
    site: Any = one.site
    if not isinstance(site, Site) or not site.is_layer or one.rule.call_inputs:
        return False
    is_part = site.parts or any(each is not None for each in (site.call, site.named, site.computed, site.own_code))
    return not is_part and (site.layout is ops.Convolution or (site.layout is ops.Linear and len(site.shape) == 2))


def _only_at(name: str, build: Callable[[], nn.Module], config: PeftConfig, inputs: ExampleInputs) -> PeftConfig | None:
    """Returns the config that names one site; None if there is none."""
    try:
        model = get_peft_model(build(), config, example_inputs=inputs, where=lambda site: site.name == name)
    except AdaptError:
        return None
    narrowed = model.peft_config["default"]
    saves = getattr(narrowed, "modules_to_save", None)
    return dataclasses.replace(narrowed, modules_to_save=None) if saves else narrowed


def _subject(form: Form, path: str, config: PeftConfig) -> Subject:
    def build() -> nn.Module:
        seed_generators()
        layer = form.layer()
        for name in reversed(path.split(".")):
            layer = Around(name, layer)
        return layer.to(form.dtype)

    generator = torch.Generator().manual_seed(0)
    shape, another = form.shapes
    inputs = form.drawn(shape, generator)
    # stored in the other order, so that no view of it flattens dimensions
    other = form.drawn(another[::-1], generator).permute(*reversed(range(len(another))))
    return Subject(form.what, build, config, (inputs,), ((other,),), form.has_reference, TOLERANCE)


def _refusal(subject: Subject, is_known: bool) -> str | None:
    """Returns the reason why the config doesn't adapt a layer, or fails on one that the rule doesn't know, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(subject.build(), subject.config, example_inputs=subject.inputs)
            run_each(adapted, (subject.inputs, *subject.others))
    except AdaptError as error:
        return str(error).partition(chr(10))[0]
    except Exception as error:
        return None if is_known else f"{type(error).__name__}: {error}"
    return None
