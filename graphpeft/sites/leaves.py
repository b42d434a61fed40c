"""Sites of opaque modules: their calls.

A branch needs the input and the output alone. So a leaf is a module that declares `in_features` and `out_features`, or
one without layers inside whose features the example inputs show. Only codes of known libraries can be merged into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from graphpeft.graph.autocast import default_precision
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_forwards import patched_forward
from graphpeft.graph.traced_model import stands_for
from graphpeft.sites import example_runs, quantisers
from graphpeft.sites.calls import Crossing, boundary
from graphpeft.sites.layer_kinds import declared_features, declares_features
from graphpeft.sites.quantised import described, is_quantised
from graphpeft.sites.regions import Regions
from graphpeft.sites.site import LeafSite, NoSiteError


def leaf_site(regions: Regions, path: str) -> LeafSite:
    """Returns the site of the calls of the module at `path`.

    Its features are the module's `in_features` and `out_features`. If the module declares none, they come from example
    values.
    """
    module = regions.modules[path]
    name = stands_for(module).__name__
    try:
        crossing = boundary(regions, path)
    except TraceError as error:
        raise NoSiteError(f"the call of a {name} can't be adapted: {error}") from error
    if not crossing.arguments:
        raise NoSiteError(f"the forward of a {name} takes no arguments")
    features = declared_features(module) if declares_features(module) else _features(regions, path, crossing)
    beside, dtype, quantised = _tensor_beside(regions, path)
    # a flat graph into which the forward was inlined may have read the weight's codes once
    is_recoded = quantisers.is_known(module) and regions.is_called(path) and patched_forward(module) is None
    return LeafSite(
        region=crossing.region,
        nodes=crossing.nodes,
        owner=path,
        in_features=features[0],
        out_features=features[1],
        beside=beside,
        dtype=dtype,
        quantised=quantised,
        is_recoded=is_recoded,
        quantises_inputs=is_recoded and quantisers.quantises_inputs(module),
        reads=tuple(quantisers.parts_of(module).items()) if is_recoded else (),
    )


def _tensor_beside(regions: Regions, path: str) -> tuple[tuple[str, str], torch.dtype, str | None]:
    """Returns the tensor whose device an adapter's tensors share, their dtype, and a quantised weight's description."""
    weight = regions.modules[path]._parameters.get("weight")
    if weight is not None and is_quantised(weight):
        # a layer that computes in a dtype of its own may have its codes packed as floats of any dtype
        found = vars(regions.modules[path]).get("compute_dtype", weight.dtype)
        is_floating = isinstance(found, torch.dtype) and found.is_floating_point
        return (path, "weight"), found if is_floating else default_precision(), described(weight)
    tensors = ((*names, tensor) for *names, tensor in _tensors(regions, path) if tensor.is_floating_point())
    owner, name, tensor = next(tensors, (path, "", torch.empty(0, dtype=default_precision())))
    return (owner, name), tensor.dtype, None


def _features(regions: Regions, path: str, crossing: Crossing) -> list[int]:
    """Returns the numbers of input and output features of a module, from example values."""
    name = stands_for(regions.modules[path]).__name__
    first = crossing.arguments[0]
    seen = (crossing.values.get(first), crossing.returned)
    if not all(isinstance(value, torch.Tensor) for value in seen) and regions.example_inputs is not None:
        try:
            inputs, returned = example_runs.call_of(regions.modules[""], regions.modules[path], regions.example_inputs)
        except TraceError as error:
            raise NoSiteError(str(error)) from error
        seen = (inputs.get(first) if isinstance(inputs, Mapping) else inputs[0], returned)
    elif regions.example_inputs is None and seen == (None, None):
        raise NoSiteError(f"a {name} declares no in_features and out_features; pass example_inputs, which show them")
    features = []
    for what, value in zip(("is given", "returns"), seen, strict=True):
        tensor = value if isinstance(value, torch.Tensor) and value.ndim else None
        if tensor is None or not tensor.is_floating_point():
            found = type(value).__name__ if tensor is None else tensor.dtype
            raise NoSiteError(f"a {name} {what} a {found}, where an adapter needs a tensor with features")
        features.append(tensor.shape[-1])
    return features


def _tensors(regions: Regions, path: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields all parameters with their owner's path and their name, parameters inside the module at `path` first."""
    inside = [other for other in regions.modules if other == path or other.startswith(f"{path}.")]
    for owner in (*inside, *regions.modules):
        for name, tensor in regions.modules[owner]._parameters.items():
            if tensor is not None:
                yield owner, name, tensor
