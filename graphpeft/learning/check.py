"""`check_learning`: runs a batch forward and backward, and tells which tensors of adapters get gradients.

A gradient of zero may come from the first values alone: LoRA's A has none while B is zero. So the batch runs again with
other values in what has a gradient, as after a step, and again as long as that gives others one. A tensor without one
is then dead: it waits for what waits for it, or, if other values in everything give it none either, the lines of code
are sought that go past it. In the end everything is put back. Where the forward draws random numbers, as one that drops
whole layers, the batch runs a few times more before anything is called dead.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft._torch import CheckpointFunction, DisableTorchFunction, pytree
from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters
from graphpeft.dry_runs import trial
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.paths import unwrapped
from graphpeft.graph.traced_model import stands_for
from graphpeft.learning.learning_report import LearningReport, SiteLearning, TensorLearning
from graphpeft.learning.norms import norm_of
from graphpeft.learning.places import ROWS, Place, trained_places
from graphpeft.learning.undone_runs import WritesUndone, batch_kept, random_states, undone, weights_cast_anew
from graphpeft.learning.watch import Watch
from graphpeft.progress import steps
from graphpeft.transaction import remember
from graphpeft.wording import joined

Loss = Callable[[Any], Tensor]
"""Makes one number of what the model returns."""

_AGAIN = 7
"""How often a batch runs again where random numbers may have left something out."""

_SPREAD = 0.02
"""The standard deviation of what is added to each trained tensor: that of the first weights of most language models."""


def check_learning(model: nn.Module, batch: ExampleInputs, loss: Loss | None = None) -> LearningReport:
    """Tells which tensors of the active adapters get gradients from a batch, and of those that never will, why.

    The batch runs forward and backward in the mode in which the model is, and again with other values in what has a
    gradient, until all have one or no more get one: twice for most methods. If the forward draws random numbers, it
    runs up to seven times more for each. All values, gradients, buffers and random states are put back.

    Args:
        model: An adapted model.
        batch: A batch: a tuple of positional or a dict of keyword arguments of the model.
        loss: Makes one number of what the model returns; None takes its `loss` if it has one, as Transformers' models
            with labels do, else a sum of all floating-point numbers in it with random weights.

    Returns:
        The tensors that learn, that wait for others to change, and that are dead, with the line of code that goes past
        them; and how many sites each entry of ``target_modules`` has named.

    Raises:
        AdaptError: If the model has no adapters, none acts, or they train nothing.
        TypeError: If the batch is neither a tuple nor a dict.
        ValueError: If no loss can be made of what the model returns, or it is NaN or infinite.

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
    trained = _trained(model, places)
    # in inference mode nothing has a gradient, whatever the model is
    with torch.inference_mode(False), undone(model, trained), WritesUndone(model), steps(2 + _AGAIN) as step:
        step("checking what learns: a first run")
        runs = _Runs(model, batch, loss, places, modules)
        now = runs.gradients()
        with trial(model):
            stepped, count = now, 0
            while not _all_reached(stepped) and len(runs.reached) > count:
                count = len(runs.reached)
                again, _ = runs.moved([tensor for tensor in trained if id(tensor) in runs.reached], step)
                stepped = _joined(stepped, again)
            moved, watch = stepped, Watch()
            if _any_dead(now, stepped):
                moved, watch = runs.moved(trained, step)
        for _ in range(_AGAIN if runs.drawn else 0):
            if not _left_out(now, moved) and not _any_dead(now, stepped):
                break
            # a first run may have dropped what its tensors would have moved
            now = _joined(now, runs.gradients())
            with trial(model):
                _move([tensor for tensor in trained if id(tensor) in runs.reached])
                stepped = _joined(_joined(stepped, now), runs.gradients())
        sites = tuple(
            _told(place, modules, watch, *gradients)
            for place, *gradients in zip(places, now, stepped, moved, strict=True)
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
            remember(tensor)
            tensor.add_(torch.randn_like(tensor), alpha=_SPREAD)


_Gradients = list[dict[str, Tensor | None]]
"""The gradients at each place, by the tensors' names."""


class _Runs:
    """Runs of a batch forward and backward.

    Attributes:
        drawn: Whether a forward has drawn random numbers.
        reached: The ids of the parameters that have had a gradient in a run.
    """

    def __init__(
        self, model: Any, batch: ExampleInputs, loss: Loss | None, places: list[Place], modules: Mapping[str, nn.Module]
    ) -> None:
        self.drawn, self.reached = False, set[int]()
        self._model, self._inputs, self._loss = model, split_inputs(batch), loss
        self._places, self._modules = places, modules

    def moved(self, tensors: list[Tensor], step: Callable[[str], object]) -> tuple[_Gradients, Watch]:
        """Returns the gradients of a run with other values in some tensors, and what was seen of it."""
        _move(tensors)
        step("checking what learns: a run with other values")
        found, watch = self.watched()
        for _ in range(_AGAIN if self.drawn else 0):
            if _all_reached(found):
                break
            step("checking what learns: a run with other random numbers")
            again, other = self.watched()
            found = _joined(found, again)
            watch = max(watch, other, key=lambda each: len(each.called))
        return found, watch

    def watched(self) -> tuple[_Gradients, Watch]:
        """Returns the gradients of a run, and what was seen of it."""
        watch = Watch()
        with watch.of(self._modules, {place.region for place in self._places}):
            # the loss is made inside, too: it may be what drops a value
            return self.gradients(watch), watch

    def gradients(self, watch: Watch | None = None) -> _Gradients:
        """Returns the gradients of a run."""
        model, (args, kwargs) = self._model, self._inputs
        for parameter in model.parameters():
            parameter.grad = None
        with batch_kept(model, (args, kwargs)), weights_cast_anew(), torch.enable_grad():
            before = random_states()
            output = model(*args or (), **kwargs)
            self.drawn = self.drawn or random_states() != before
            number = _number(output) if self._loss is None else self._loss(output)
            if not isinstance(number, Tensor) or number.numel() != 1:
                raise ValueError(f"the loss is to be one number, and is {_shown(number)}")
            if not _is_finite(number):
                raise ValueError(f"the loss is {number.item()} with this batch, and its gradients tell nothing")
            if watch is not None:
                watch.before_backward(number)
            if number.requires_grad:
                number.backward()
        self.reached |= {id(parameter) for parameter in model.parameters() if _is_reached(parameter.grad)}
        self.reached |= {id(t) for place in self._places for t in place.tensors.values() if _is_reached(t.grad)}
        return [{name: tensor.grad for name, tensor in place.tensors.items()} for place in self._places]


def _is_finite(number: Tensor) -> bool:
    # unseen, since this is no operation of the model
    with DisableTorchFunction():
        return bool(number.isfinite())


def _is_reached(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _all_reached(gradients: _Gradients) -> bool:
    return all(_is_reached(gradient) for each in gradients for gradient in each.values())


def _any_dead(now: _Gradients, stepped: _Gradients) -> bool:
    pairs = zip(now, stepped, strict=True)
    return any(_learning(each[name], other[name]).state == "dead" for each, other in pairs for name in each)


def _joined(first: _Gradients, second: _Gradients) -> _Gradients:
    """Returns the gradients of a first run, and in the place of those that are zero or None, those of a second one."""
    return [
        {
            name: gradient if _is_reached(gradient) or other[name] is None else other[name]
            for name, gradient in each.items()
        }
        for each, other in zip(first, second, strict=True)
    ]


def _left_out(now: _Gradients, moved: _Gradients) -> bool:
    """Returns whether anything that learns with other values wasn't reached at all with the present ones."""
    return any(
        gradient is None and _is_reached(other[name])
        for each, other in zip(now, moved, strict=True)
        for name, gradient in each.items()
    )


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
    stepped: Mapping[str, Tensor | None],
    moved: Mapping[str, Tensor | None],
) -> SiteLearning:
    tensors = {name: _learning(now[name], stepped[name]) for name in place.tensors}
    dead = [name for name, tensor in tensors.items() if tensor.state == "dead"]
    if not dead:
        return SiteLearning(place.adapter, place.label, tensors)
    first = next((name for name in dead if not _waits_in_vain(now[name], moved[name])), None)
    if first is None:
        reason = f"{joined(dead)} wait for each other: each has a gradient of zero until another one changes"
        return SiteLearning(place.adapter, place.label, tensors, reason)
    reason, line = reason_and_line(place.region, first, place.tensors[first], moved[first], modules, watch)
    return SiteLearning(place.adapter, place.label, tensors, reason, line)


def _waits_in_vain(now: Tensor | None, moved: Tensor | None) -> bool:
    """Returns whether the gradient of a dead tensor is zero at its values alone, and another one elsewhere."""
    return moved is not None and _is_reached(moved) and bool(moved.isfinite().all()) and not _is_reached(now)


def _learning(now: Tensor | None, stepped: Tensor | None) -> TensorLearning:
    norm = None if now is None else norm_of(now)
    if norm is not None and not math.isfinite(norm):
        return TensorLearning("dead", norm)
    if norm:
        return TensorLearning("learns", norm)
    return TensorLearning("waits" if _is_reached(stepped) else "dead", norm)


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


def reason_and_line(
    region: str, name: str, tensor: Tensor, gradient: Tensor | None, modules: Mapping[str, nn.Module], watch: Watch
) -> tuple[str, str]:
    """Returns the reason why a tensor doesn't learn, and the line of code; "" where no one line does it."""
    if region not in watch.called:
        return _never_called(region, modules)
    line = watch.called[region]
    if region in watch.empty:
        return "it is called with no rows in this batch", line
    if gradient is not None:
        return _of_gradient(name, gradient), line
    silent = None if watch.silent is None else watch.silent.above(tensor)
    if silent is not None:
        return f"the backward of {silent} gives no gradient", line
    cuts = watch.cuts_of(tensor)
    if not cuts:
        return "what it computes is no part of the loss", line
    # the last line: an earlier one, such as a comparison of the value, leaves a way on to it
    cut = ([cut for cut in cuts if cut.is_number] or cuts)[-1]
    if cut.within == CheckpointFunction.__name__:
        return "a reentrant checkpoint gives none if its inputs need none; see enable_input_require_grads", cut.line
    if cut.within:
        return f"{cut.within} has no gradient", cut.line
    # a graph has a detach in the place of a region under no_grad
    if cut.under_no_grad or ("detach" in cut.function and "detach" not in cut.line):
        return "it runs without gradients, as under torch.no_grad()", cut.line
    return f"{cut.function} has no gradient", cut.line


def _of_gradient(name: str, gradient: Tensor) -> str:
    if not bool(gradient.isfinite().all()):
        return "its gradient isn't finite, as behind a division by zero or a root of zero"
    if name == ROWS:
        return "a gradient reaches it and is zero, as where the batch has none of the trained tokens"
    return "a gradient reaches it and is zero whatever the adapters hold, as behind a factor of zero"


def _never_called(region: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    around, _, name = region.rpartition(".")
    # containers have no forward of their own, or one that mentions no name
    while around and (not _has_forward(modules[around]) or isinstance(modules[around], nn.Sequential)):
        around, _, name = around.rpartition(".")
    cls = stands_for(modules[around])
    place = _mention(cls, name)
    never = "it is never called with this batch"
    if place is None:
        return f"{never}; the forward of {cls.__name__} does not mention {name}", ""
    return f"{never}; in {cls.__name__} this line mentions {name}", place


def _has_forward(module: nn.Module) -> bool:
    return stands_for(module).forward is not nn.Module.forward


def _mention(cls: type, name: str) -> str | None:
    """Returns the first line of a class's forward, or of methods that it names, that reads an attribute."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        called = waiting.pop(0)
        for method in _definitions(cls, called):
            read = _lines_that_read(method)
            if name in read:
                return read[name]
            new = [other for other in read if other not in seen]
            seen |= {*new}
            waiting += new
    return None


def _definitions(cls: type, name: str) -> Iterator[Callable[..., object]]:
    """Yields a class's function of a name, and its bases' functions that `super` calls there."""
    for base in cls.__mro__:
        found: Any = vars(base).get(name)
        function = found.fget if isinstance(found, property) else found
        # a decorated function would have its decorator's file
        method = inspect.unwrap(function) if callable(function) else None
        if inspect.isfunction(method):
            yield method
            if "super" not in method.__code__.co_names:
                return


def _lines_that_read(method: Callable[..., object]) -> dict[str, str]:
    """Returns the first line of a method that reads each attribute, by the attribute's name."""
    try:
        lines, first = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return {}
    file = os.path.basename(inspect.getsourcefile(method) or "")
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)]
    return {
        node.attr: f"`{lines[node.lineno - 1].strip()}` ({file}:{first + node.lineno - 1})"
        for node in sorted(read, key=lambda node: node.lineno, reverse=True)
    }
