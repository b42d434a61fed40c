"""`check_learning`: runs a batch forward and backward, and tells which tensors of adapters get gradients.

A gradient of zero may come from the first values alone: LoRA's A has none while B is zero. So the batch runs a second
time with other values in all trained tensors, after which everything is put back. What has no gradient then, either, is
dead, and the lines of code are sought that go past it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft._torch import pytree
from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.paths import unwrapped
from graphpeft.learning.learning_report import LearningReport, SiteLearning, TensorLearning
from graphpeft.learning.past import reason_and_line
from graphpeft.learning.places import Place, trained_places
from graphpeft.learning.undone_runs import batch_kept, undone, weights_cast_anew
from graphpeft.learning.watch import Watch
from graphpeft.progress import steps

Loss = Callable[[Any], Tensor]
"""Makes one number of what the model returns."""

_SPREAD = 0.02
"""The standard deviation of what is added to each trained tensor: that of the first weights of most language models."""


def check_learning(model: nn.Module, batch: ExampleInputs, loss: Loss | None = None) -> LearningReport:
    """Tells which tensors of the active adapters get gradients from a batch, and of those that never will, why.

    The batch runs twice forward and backward, in the mode in which the model is: with the present values, and with
    others in what is trained. All values, gradients, buffers and random states are put back.

    Args:
        model: An adapted model.
        batch: A batch: a tuple of positional or a dict of keyword arguments of the model.
        loss: Makes one number of what the model returns; None takes its `loss` if it has one, as Transformers' models
            with labels do, else a sum of all floating-point numbers in it with random weights.

    Returns:
        What learns, what waits for other tensors to change, and what is dead, with the line of code that goes past it;
        and how many sites each entry of ``target_modules`` has named.

    Raises:
        AdaptError: If the model has no adapters, none acts, or they train nothing.
        TypeError: If the batch is neither a tuple nor a dict.
        ValueError: If no loss can be made of what the model returns, or no gradient reaches anything that it computes.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> print(check_learning(model, (torch.ones(1, 4),), lambda output: output.sum()))  # doctest: +ELLIPSIS
        1 of 1 site learns
        <BLANKLINE>
        adapter  site  tensors
        ───────  ────  ─...
        default  0     lora_A waits for others; lora_B (...) learns
        <BLANKLINE>
        adapter  entry  sites
        ───────  ─────  ─────
        default  0          1
    """
    model = unwrapped(model)
    state, modules = known_adapters(model), modules_of(model)
    places = trained_places(state, modules)
    if not places:
        raise AdaptError(
            "no active adapter trains anything: activate one that isn't for inference (inference_mode=False), and "
            "unmerge and enable it while its learning is checked"
        )
    watch = Watch()
    paths = {place.region for place in places}
    # a compiler can't follow what looks on, and needn't: what is compiled computes the same
    eagerly = torch.compiler.set_stance("force_eager")
    # in inference mode nothing has a gradient, whatever the model is
    with eagerly, torch.inference_mode(False), undone(model, _trained(model, places)), steps(2) as step:
        step("checking what learns: a first run")
        now = _gradients(model, batch, loss, places)
        _move(_trained(model, places))
        step("checking what learns: a run with other values")
        with watch.of(modules, paths):
            # the loss is made inside, too: it may be what drops a value
            moved = _gradients(model, batch, loss, places)
        sites = tuple(
            _told(place, modules, watch, own, other) for place, own, other in zip(places, now, moved, strict=True)
        )
    return LearningReport(sites, _named(state))


def _trained(model: nn.Module, places: list[Place]) -> list[Tensor]:
    """Returns all that is trained, also beside the adapters: before a head that is zero at first, nothing learns."""
    found = [tensor for place in places for tensor in place.tensors.values()]
    found += [each for each in model.parameters() if each.requires_grad and each.is_floating_point()]
    return list({id(tensor): tensor for tensor in found}.values())


def _move(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor), alpha=_SPREAD)


def _gradients(
    model: Any, batch: ExampleInputs, loss: Loss | None, places: list[Place]
) -> list[dict[str, Tensor | None]]:
    """Runs a batch forward and backward, and returns the gradients at each place."""
    args, kwargs = split_inputs(batch)
    for parameter in model.parameters():
        parameter.grad = None
    with batch_kept(model, batch), weights_cast_anew():
        with torch.enable_grad():
            output = model(*args or (), **kwargs)
            number = _number(output) if loss is None else loss(output)
        if not isinstance(number, Tensor) or number.numel() != 1:
            raise ValueError(f"the loss is to be one number, and is {_shown(number)}")
        if number.requires_grad:
            number.backward()
    return [{name: tensor.grad for name, tensor in place.tensors.items()} for place in places]


def _number(output: Any) -> Tensor:
    """Returns the loss in what a model has returned, or a sum of its numbers with random weights."""
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    numbers = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    numbers = [leaf.float() for leaf in numbers if leaf.is_floating_point()]
    if not numbers:
        raise ValueError("the model returns no tensors of numbers; pass loss, a function that makes a number of it")
    # without random weights, a softmax or a normalisation at the end would give no gradient
    return torch.stack([(leaf * torch.randn_like(leaf)).sum() for leaf in numbers]).sum()


def _shown(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _told(
    place: Place,
    modules: Mapping[str, nn.Module],
    watch: Watch,
    now: Mapping[str, Tensor | None],
    moved: Mapping[str, Tensor | None],
) -> SiteLearning:
    tensors = {name: _learning(now[name], moved[name]) for name in place.tensors}
    dead = [name for name, tensor in tensors.items() if tensor.state == "dead"]
    if not dead:
        return SiteLearning(place.adapter, place.label, tensors)
    reason, line = reason_and_line(place.region, place.tensors[dead[0]], moved[dead[0]], modules, watch)
    return SiteLearning(place.adapter, place.label, tensors, reason, line)


def _learning(now: Tensor | None, moved: Tensor | None) -> TensorLearning:
    norm = None if now is None else float(torch.linalg.vector_norm(now.detach(), dtype=torch.float32))
    if norm:
        return TensorLearning("learns", norm)
    return TensorLearning("waits" if moved is not None and bool(moved.any()) else "dead", norm)


def _named(state: Adapters) -> dict[tuple[str, str], int]:
    """Returns the number of sites of each active adapter for each entry of its targets."""
    found: dict[tuple[str, str], int] = {}
    for name in state.active:
        adapter = state.by_name[name]
        options, names = adapter.config.target_options, [adapted.site.name for adapted in adapter.sites]
        for entries in (options.target_modules, options.target_parameters):
            if isinstance(entries, str):
                found[name, entries] = len(names)
                continue
            for entry in sorted(entries or ()):
                found[name, entry] = sum(_ends_in(entry, each) for each in names)
    return found


def _ends_in(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")
