"""What holds for every adapted or traced model, as checks that raise with what they found.

Each law takes a function that builds the model (equal at each call), and inputs: a tuple of positional or a dict of
keyword arguments. The numbers are those of the list in ``docs/architecture.md``.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from graphpeft._torch import pytree
from graphpeft.adapters import changes
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph import ops
from graphpeft.graph.errors import GuardError
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.paths import join
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.model.peft_model import PeftModel
from graphpeft.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from graphpeft.rules.config import PeftConfig
from graphpeft.testing.blame import Build, LawError, blames_a_site, describe, first_difference
from graphpeft.tracing.trace import trace

# the laws


BOTH_MODES = (False, True)
"""Evaluation and training."""


@blames_a_site
def assert_fresh_adapter_changes_no_output(
    build: Build, config: PeftConfig, inputs: ExampleInputs, modes: Sequence[bool] | None = None
) -> None:
    """Law 1: an adapter that starts as the identity changes no output, bit for bit, with gradients or without.

    PyTorch chooses by what requires gradients how it computes some layers, as `nn.MultiheadAttention` on its fast path.
    So the base has frozen weights, as an adapted model has. Where gradients are recorded, and an adapter changes a
    weight itself, a gradient goes through that; then this weight of the base requires one, too.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        modes: Whether to look at evaluation (False), training (True) or both. None leaves out training if the adapter
            draws random numbers there: it gives others to the rest of the model, and has none of these laws.
    """
    for mode in modes_to_compare(build, config, inputs) if modes is None else modes:
        for records in (False, True):
            base = build().train(mode).requires_grad_(False)
            adapted = get_peft_model(build().train(mode), config, example_inputs=inputs)
            sites = [one.site for one in adapted._peft_adapters.by_name["default"].weight_sites]
            changed = [site.weight for site in sites if site.op is ops.Weight]
            for path in changed if records else ():
                base.get_parameter(path).requires_grad_()
            with torch.set_grad_enabled(records):
                found, expected = run(adapted, inputs), run(base, inputs)
            when = f"with training={mode}, {'gradients' if records else 'no gradients'}"
            require_equal(found, expected, f"{when}, a fresh adapter changes the output")


@blames_a_site
def assert_only_the_adapter_is_trained(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 2: exactly the adapter's tensors require grad, and each of them gets one from a training step."""
    frozen = {path for path, _ in build().named_parameters()}
    adapted = perturbed(get_peft_model(build().train(), config, example_inputs=inputs))
    frozen |= {join(*name) for name in adapted._peft_adapters.by_name["default"].frozen_names("default")}
    loss_of(run(adapted, inputs)).backward()
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad == (path in frozen):
            raise LawError(f"{path} {'requires' if path in frozen else 'does not require'} grad")
        if parameter.requires_grad and parameter.grad is None:
            raise LawError(f"{path} gets no gradient")
        if not parameter.requires_grad and parameter.grad is not None:
            raise LawError(f"{path} gets a gradient, though it is frozen")


@blames_a_site
def assert_adapted_is_base_with_delta(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    modes: Sequence[bool] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Law 3: adapted = base with the deltas added by hand = merged; and `unload` restores the base exactly.

    An adapter that can't be merged must refuse that, and of it the latter holds; if some of its sites have deltas, the
    whole law holds for an adapter of these alone. `modes` as for law 1.
    """
    for narrowed in (config, *_of_what_can_be_merged(build, config, inputs)):
        _adapted_is_base_with_delta(build, narrowed, inputs, modes, tolerance)


def _of_what_can_be_merged(build: Build, config: PeftConfig, inputs: ExampleInputs) -> list[PeftConfig]:
    """Returns a config that names the sites alone which can be merged, if these are some and not all."""
    sites = get_peft_model(build(), config, example_inputs=inputs)._peft_adapters.by_name["default"].sites
    merged = {adapted.site.name for adapted in sites if adapted.unmergeable is None}
    if not 0 < len(merged) < len(sites):
        return []
    narrowed = get_peft_model(build(), config, example_inputs=inputs, where=lambda site: site.name in merged)
    return [narrowed.peft_config["default"]]


def _adapted_is_base_with_delta(
    build: Build, config: PeftConfig, inputs: ExampleInputs, modes: Sequence[bool] | None, tolerance: float
) -> None:
    for mode in modes_to_compare(build, config, inputs) if modes is None else modes:
        base, untouched = (build().train(mode).requires_grad_(False) for _ in range(2))
        adapted = perturbed(get_peft_model(build().train(mode), config, example_inputs=inputs))
        expected = run(adapted, inputs)
        adapter = adapted._peft_adapters.by_name["default"]
        if adapter.changes_weights:
            # first, since it refuses a weight that is tied to another, which a delta added by hand would change too
            merged = copy.deepcopy(adapted).merge_and_unload()
            _add_deltas(base, adapter, dict(adapted.named_modules()))
            require_close(run(base, inputs), expected, tolerance, f"training={mode}: adapted isn't base with deltas")
            require_close(run(merged, inputs), expected, tolerance, f"training={mode}: merged differs from adapted")
        else:
            _require_no_merge(adapted)
        require_restored(adapted.unload(), build().train(mode))
        require_equal(run(adapted.requires_grad_(False), inputs), run(untouched, inputs), "unload leaves other outputs")


def _require_no_merge(adapted: Any) -> None:
    before = snapshot(adapted)
    try:
        adapted.merge_and_unload()
    except AdaptError:
        require_unchanged(adapted, before, "a merge that is refused")
    else:
        raise LawError("an adapter that says why it can't be merged is merged")


def modes_to_compare(build: Build, config: PeftConfig, inputs: ExampleInputs) -> tuple[bool, ...]:
    """Returns the modes in which the adapter draws no random numbers: evaluation, and training."""
    left = []
    for model in (build().train(), get_peft_model(build().train(), config, example_inputs=inputs)):
        run(model, inputs)
        left.append(torch.get_rng_state())
        left += torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    half = len(left) // 2
    return BOTH_MODES if all(map(torch.equal, left[:half], left[half:])) else BOTH_MODES[:1]


@torch.no_grad()
def _add_deltas(base: nn.Module, adapter: Adapter, modules: Modules) -> None:
    for path, names in adapter.stand_ins.items():
        for name in names:
            getattr(base.get_submodule(path), name).copy_(getattr(modules[path], name))
    for adapted in changes.changing_sites(modules, adapter):
        base.get_parameter(adapted.site.weight).add_(changes.delta(adapted, modules))
        change = changes.bias_delta(adapted, modules)
        if change is not None:
            base.get_parameter(adapted.site.bias).add_(change)


@blames_a_site
def assert_saved_is_loaded(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 4: what is saved and loaded again gives the same outputs and the same tensors."""
    adapted = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        trained_on = PeftModel.from_pretrained(build(), folder, is_trainable=True, example_inputs=inputs).eval()
        loaded = PeftModel.from_pretrained(build(), folder, example_inputs=inputs)
    require_equal(dict(trained_on.named_parameters()), dict(adapted.named_parameters()), "loaded parameters differ")
    require_close(_file_of(trained_on), _file_of(adapted), 1e-6, "what is saved again differs")
    require_close(run(trained_on, inputs), run(adapted, inputs), 1e-6, "what is loaded for training differs from saved")
    require_close(run(loaded, inputs), run(adapted, inputs), 1e-6, "loaded differs from saved")


@blames_a_site
def assert_traced_is_adapted_alike(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 5: the model and its flat graph have the same sites, the same tensors in the file, and the same outputs."""
    model = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    traced = get_peft_model(trace(build().eval(), inputs), config)
    set_peft_model_state_dict(traced, _file_of(model))
    require_equal(_file_of(traced), _file_of(model), "the traced model's file differs")
    for mode in BOTH_MODES:
        found, expected = run(traced.train(mode), inputs), run(model.train(mode), inputs)
        require_close(found, expected, 1e-6, f"training={mode}: the traced model's outputs differ")


def assert_spellings_are_adapted_alike(
    build: Build, others: Sequence[Build], config: PeftConfig, inputs: ExampleInputs
) -> None:
    """Law 5: models that spell one computation in several ways have the same sites, files and outputs."""
    model = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    sites = [(site.site.name, site.site.shape) for site in model.adapter_report().adapted]
    for build_other in others:
        other = get_peft_model(build_other().eval(), config, example_inputs=inputs)
        if sites != [(site.site.name, site.site.shape) for site in other.adapter_report().adapted]:
            raise LawError(f"sites differ: {sites} and those of\n{other.adapter_report()}")
        # a file that doesn't fit raises
        set_peft_model_state_dict(other, _file_of(model))
        try:
            require_close(run(other, inputs), run(model, inputs), 1e-5, "another spelling's outputs differ")
        except LawError as error:
            adapted = other.adapter_report().adapted
            raise LawError(
                "\n".join([str(error), *(describe(site, other, config.method) for site in adapted)])
            ) from error


@blames_a_site
def assert_dry_runs_change_nothing(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 6: `explain` and a failed adaptation change nothing."""
    model = build()
    before = snapshot(model)
    explain(model, config, example_inputs=inputs)
    require_unchanged(model, before, "explain")
    try:
        get_peft_model(model, _with_failing_rules(config), example_inputs=inputs)
    except _RuleError:
        require_unchanged(model, before, "a failed adaptation")
    else:
        raise LawError("an adaptation whose rule fails didn't fail")


def assert_traced_is_the_model(
    build: Build, inputs: ExampleInputs, *others: ExampleInputs, may_refuse: bool = False
) -> None:
    """Law 7: tracing changes nothing, and the graph equals the model in both modes and on other inputs.

    Args:
        build: Builds the model.
        inputs: The example inputs.
        others: Other inputs.
        may_refuse: Whether the model decides on its inputs, so that a guard may refuse others.
    """
    for training in (False, True):
        model = build().train(training)
        before = snapshot(model)
        traced = trace(model, inputs)
        require_unchanged(model, before, "tracing")
        for given in (inputs, *others):
            for mode in (training, not training):
                expected = run(build().train(mode), given)
                try:
                    found = run(copy.deepcopy(traced).train(mode), given)
                except GuardError:
                    if may_refuse and given is not inputs:
                        continue
                    raise
                law = f"traced with training={training}, run with training={mode}"
                try:
                    require_equal(found, expected, law)
                except LawError as error:
                    models = build().train(mode), copy.deepcopy(traced).train(mode)
                    where = first_difference(*models, functools.partial(run, inputs=given))
                    raise LawError(f"{error}\n{where}") from error


def assert_traced_trains_as_the_model(
    build: Build,
    inputs: ExampleInputs,
    *others: ExampleInputs,
    may_refuse: bool = False,
    modes: Sequence[bool] = BOTH_MODES,
    strict: bool = False,
) -> None:
    """Law 7, for all that a run leaves: outputs, gradients, and what was written into buffers and into inputs.

    The model and its graph run several times without being built anew, so that each run finds what the last one left.

    Args:
        build: Builds the model.
        inputs: The example inputs.
        others: Other inputs.
        may_refuse: Whether the model decides on its inputs or its mode, so that a guard may refuse others.
        modes: Whether to trace in evaluation (False), in training (True) or in each of them.
        strict: Whether all modules must become nodes.
    """
    for training in modes:
        original, model = (build().train(training) for _ in range(2))
        before = snapshot(model)
        traced = trace(model, differentiable(inputs)[1], strict=strict)
        require_unchanged(model, before, "tracing")
        for given, mode in itertools.product((inputs, *others), (training, not training)):
            expected = left_by(original.train(mode), original, given)
            try:
                found = left_by(traced.train(mode), model, given)
            except GuardError:
                if may_refuse and (given is not inputs or mode != training):
                    return  # the run that was refused may have written into buffers
                raise
            for what, value in expected.items():
                law = f"traced with training={training}, run with training={mode}: {what}"
                require_equal(found[what], value, law)


@blames_a_site
def assert_copies_stay_adapted(build: Build, config: PeftConfig, inputs: ExampleInputs) -> None:
    """Law 8: `deepcopy`, pickles, `torch.save`, state dicts and `.to()` keep an adapted model adapted."""
    adapted = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    expected = run(adapted, inputs)
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    other = get_peft_model(build().eval(), config, example_inputs=inputs)
    other.load_state_dict(adapted.state_dict())
    copies = {
        "deepcopy": copy.deepcopy(adapted),
        "pickle": pickle.loads(pickle.dumps(adapted)),
        "torch.save": torch.load(buffer, weights_only=False),
        "state_dict": other,
        ".to() and back": copy.deepcopy(adapted).double().float(),
    }
    for name, copied in copies.items():
        require_equal(run(copied, inputs), expected, f"a copy by {name} differs")
        require_restored(copied.unload(), build().eval())


# what they are made of


def _file_of(adapted: nn.Module) -> dict[str, torch.Tensor]:
    return dict(sorted(get_peft_model_state_dict(adapted).items()))


def run(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Returns the outputs of `model` with the random numbers of seed 0."""
    args, kwargs = split_inputs(inputs)
    torch.manual_seed(0)
    return model(*(args or ()), **kwargs)


def left_by(model: nn.Module, owner: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    """Runs `model` forwards and backwards, and returns all that this gave; `owner` has its tensors by their names."""
    leaves, given = differentiable(inputs)
    outputs = run(model, given)
    parameters = dict(owner.named_parameters())
    buffers = {**dict(owner.named_buffers()), **dict(model.named_buffers())}
    left = {
        "the outputs": outputs,
        "what of them requires grad": pytree.tree_map_only(torch.Tensor, lambda output: output.requires_grad, outputs),
        "the inputs afterwards": given,
        "the buffers": buffers,
    }
    # before the backward pass, which may fail where something was written in place
    left = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), left)
    inputs_by_number = {f"input {number}": leaf for number, leaf in enumerate(leaves)}
    return left | {"the gradients": _gradients(outputs, inputs_by_number | parameters)}


def _gradients(outputs: Any, tensors: dict[str, torch.Tensor]) -> Any:
    loss = loss_of(outputs)
    if not loss.requires_grad:
        return None
    try:
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return "values were overwritten that they need"
    return dict(zip(tensors, found, strict=True))


def differentiable(inputs: ExampleInputs) -> tuple[list[torch.Tensor], Any]:
    """Returns new tensors that require grad, and `inputs` computed from them, into which a model can write."""
    leaves: list[torch.Tensor] = []

    def fresh(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return leaves, pytree.tree_map_only(torch.Tensor, fresh, inputs)


def perturbed(adapted: Any) -> Any:
    """Gives all trainable tensors values that matter, and returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def loss_of(outputs: Any) -> torch.Tensor:
    """Returns a number that depends on every output."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return sum((leaf.square().sum() for leaf in leaves), torch.zeros(()))


def require_equal(found: Any, expected: Any, law: str) -> None:
    """Raises unless all tensors of both are equal, bit for bit."""
    require_close(found, expected, 0.0, law)


def require_close(found: Any, expected: Any, tolerance: float, law: str) -> None:
    """Raises unless all tensors of both differ by `tolerance`, relative to their size, at the most."""
    left, left_tree = pytree.tree_flatten(found)
    right, right_tree = pytree.tree_flatten_with_path(expected)
    if left_tree != right_tree:
        raise LawError(f"{law}: the outputs are {left_tree}, not {right_tree}")
    parts = [part for leaf in left for part in _parts(leaf)]
    expected_parts = [(path, part) for path, leaf in right for part in _parts(leaf)]
    for a, (path, b) in zip(parts, expected_parts, strict=True):
        where = f"{law}, at {pytree.keystr(path)}" if path else law
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            raise LawError(f"{where}: {_kind(a)}, not {_kind(b)}")
        if isinstance(b, torch.Tensor):
            if a.dtype != b.dtype or a.shape != b.shape:
                raise LawError(f"{where}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
            difference, scale = _difference(a, b) if b.numel() else (0.0, 1.0)
            if not difference <= tolerance * scale:
                raise LawError(f"{where}: by {difference:.3g}")
        elif a != b:
            raise LawError(f"{where}: {a!r}, not {b!r}")


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Returns by how much two tensors differ, and how large the second is."""
    dtype = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0, a - b).abs().max().item(), max(1.0, b.abs().nan_to_num().max().item())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns all that an operation could change in `model`: classes, attributes, hooks, tensors and their flags."""
    return {path: _state(module) for path, module in model.named_modules(remove_duplicate=False)}


def _state(module: nn.Module) -> dict[str, Any]:
    named = [*module._parameters.items(), *module._buffers.items()]
    others = {name: value for name, value in module.__dict__.items() if name not in ("_parameters", "_buffers")}
    named += [(pytree.keystr(path), value) for path, value in pytree.tree_leaves_with_path(others)]
    tensors = {
        name: (id(tensor), tensor.requires_grad, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None)
        for name, tensor in named
        if isinstance(tensor, torch.Tensor)
    }
    attributes = {name: (id(value), _content(value)) for name, value in module.__dict__.items()}
    return {"class": type(module), "attributes": attributes, "tensors": tensors}


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(part) for key, part in value.items()}
    return [id(part) for part in value] if isinstance(value, list | tuple | set) else None


def require_unchanged(model: nn.Module, before: dict[str, Any], operation: str) -> None:
    """Raises unless `model` is what it was when `before` was taken by `snapshot`."""
    after = snapshot(model)
    if after.keys() != before.keys():
        raise LawError(f"{operation} changes the modules: {sorted(after.keys() ^ before.keys())}")
    for path, state in before.items():
        for kind in ("class", "attributes"):
            if after[path][kind] != state[kind]:
                raise LawError(f"{operation} changes the {kind} of {path or 'the model'}")
        for name, (identity, flag, values, grad) in state["tensors"].items():
            new_identity, new_flag, new_values, new_grad = after[path]["tensors"][name]
            if (
                (identity, flag) != (new_identity, new_flag)
                or grad is not new_grad
                or not _are_equal(values, new_values)
            ):
                raise LawError(f"{operation} changes the tensor {path}.{name}")


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two tensors have equal elements; those that are no numbers are equal to each other."""
    pairs = zip(_parts(one), _parts(other), strict=True)
    return all(torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def _parts(value: Any) -> list[Any]:
    """Returns the tensors that one holds whose class consists of others, as a quantised one does; else it alone."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


def require_restored(model: nn.Module, untouched: nn.Module) -> None:
    """Raises unless `model` has the classes, the keys and the flags of `untouched`."""
    if model.state_dict().keys() != untouched.state_dict().keys():
        raise LawError(f"unload leaves other keys: {sorted(model.state_dict().keys() ^ untouched.state_dict().keys())}")
    for (path, module), original in zip(model.named_modules(), untouched.modules(), strict=True):
        if _class_of(module) != _class_of(original):
            raise LawError(f"unload leaves {path or 'the model'} a {type(module)}")
        if module.__dict__.keys() != original.__dict__.keys():
            raise LawError(f"unload leaves attributes: {sorted(module.__dict__.keys() ^ original.__dict__.keys())}")
    for (path, parameter), original in zip(model.named_parameters(), untouched.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            raise LawError(f"unload leaves requires_grad={parameter.requires_grad} on {path}")


def _class_of(module: nn.Module) -> Any:
    """Returns a module's class; each graph has one of its own, so for these what that inherits from."""
    cls = type(module)
    return cls.__mro__[1:] if issubclass(cls, fx.GraphModule) else cls


class _RuleError(Exception):
    """What the rules raise with which the sixth law fails an adaptation."""


def _fail(*_: Any, **__: Any) -> Any:
    raise _RuleError


@functools.cache
def _failing_class(cls: type) -> type:
    """Returns a class of rules that fail as late as they can: when their nodes are inserted."""
    return type(cls.__name__, (cls,), {name: _fail for name in ("rewrite", "delta", "enter") if hasattr(cls, name)})


def _failing_rule(rule: Any) -> Any:
    failing = copy.copy(rule)
    object.__setattr__(failing, "__class__", _failing_class(type(rule)))  # rules are frozen
    return failing


def _with_failing_rules(config: PeftConfig) -> PeftConfig:
    of_its_class = type(config).rule_for

    # on the class, since the config is copied before it is asked for rules
    class Failing(type(config)):
        def rule_for(self, site: Any, dtype: Any) -> Any:
            return _failing_rule(of_its_class(self, site, dtype))

    failing = copy.deepcopy(config)
    failing.__class__ = Failing
    return failing
