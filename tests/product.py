"""The product of LoRA's features with kinds of layers and of models, and what each library makes of a cell of it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from measuring import backwards, batches, forwards, preprocess_corda_of_peft, preprocess_loraga_of_peft
from models import LLAMA, TORCHVISION_VIT, VIT, Block, Example, call, result
from oracle import assert_close
from peft.utils.hotswap import hotswap_adapter as hotswap_adapter_of_peft
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft.testing import laws
from graphpeft.testing.snapshots import require_restored, with_saved

# kinds of layers, and of models


@dataclass(frozen=True, eq=False)
class Kind:
    """A small model with layers of one kind, or of one library.

    Attributes:
        name: What the tables of ``docs/lora.md`` call it.
        make: Builds it.
        make_inputs: Makes its inputs: a tuple of positional or a dict of keyword arguments.
        targets: What to adapt in it.
        key: One of the targets, as `rank_pattern` names it.
        parameter: A weight, as `target_parameters` names it.
        whole: A module that is no target.
        table: A module that holds the rows of tokens, if there is one.
        merges: Whether changes of its weights can be merged.
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[], Any]
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["inner"]})
    key: str = "inner"
    parameter: str = "inner.weight"
    whole: str = "head"
    table: str | None = None
    merges: bool = True

    def build(self) -> nn.Module:
        """Builds the model; each call gives equal weights."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self) -> Any:
        """Makes the inputs; each call gives equal ones."""
        torch.manual_seed(1)
        return self.make_inputs()

    def __str__(self) -> str:
        return self.name


class Under(nn.Module):
    """A layer under a head."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.inner = layer
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Goes through both."""
        return self.head(torch.tanh(self.inner(x)).flatten(1))


class UnderAttention(nn.Module):
    """An attention under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.inner.out_proj.bias)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Goes through both."""
        return self.head(self.inner(x, x, x, need_weights=False)[0].flatten(1))


class Plain(nn.Module):
    """Blocks under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(8), nn.LayerNorm(8), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Goes through all."""
        return self.head(self.blocks(x))


class Matrix(nn.Module):
    """A matrix that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies."""
        return F.linear(x, self.w)


class Experts(nn.Module):
    """A stack of matrices, all of which each token sees."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies by each, and adds up."""
        return torch.einsum("bti,eoi->bto", x, self.w)


def _conv1d() -> Conv1D:
    layer = Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


def _layer(
    name: str, make: Callable[[], nn.Module], features: int, make_inputs: Callable[[], Tensor], **options: Any
) -> Kind:
    return Kind(name, lambda: Under(make(), features), lambda: (make_inputs(),), **options)


PARAMETER: dict[str, Any] = {
    "targets": {"target_modules": [], "target_parameters": ["inner.w"]},
    "key": "inner.w",
    "parameter": "inner.w",
}

LAYERS = [
    _layer("`Linear`", lambda: nn.Linear(6, 8), 24, lambda: torch.randn(4, 3, 6)),
    _layer("`Conv1D`", _conv1d, 24, lambda: torch.randn(4, 3, 6)),
    _layer("`Conv1d`", lambda: nn.Conv1d(4, 6, 3, padding=1), 54, lambda: torch.randn(3, 4, 9)),
    _layer("`Conv2d`", lambda: nn.Conv2d(4, 6, 3, stride=2), 24, lambda: torch.randn(3, 4, 6, 6)),
    _layer("`Conv3d`", lambda: nn.Conv3d(4, 6, 2), 48, lambda: torch.randn(3, 4, 3, 3, 3)),
    _layer("`Embedding`", lambda: nn.Embedding(9, 6), 30, lambda: torch.randint(0, 9, (3, 5)), table="inner"),
    Kind("`MultiheadAttention`", UnderAttention, lambda: (torch.randn(3, 5, 8),), parameter="inner.in_proj_weight"),
    _layer("matrix", Matrix, 24, lambda: torch.randn(4, 3, 6), **PARAMETER),
    _layer("experts", Experts, 24, lambda: torch.randn(4, 3, 6), **PARAMETER),
]


def kind_of(name: str, example: Example, **options: Any) -> Kind:
    """Returns the kind of which a model is an example."""
    return Kind(name, example.make, lambda: example.inputs(1), example.lora, **options)


MODELS = [
    Kind(
        "plain",
        Plain,
        lambda: (torch.randn(4, 5, 8),),
        {"target_modules": ["up", "down"]},
        key="up",
        parameter="blocks.0.up.weight",
    ),
    kind_of("timm", VIT, key="qkv", parameter="blocks.0.mlp.fc1.weight"),
    kind_of("torchvision", TORCHVISION_VIT, key="mlp.0", parameter="encoder_layer_0.mlp.0.weight"),
    kind_of(
        "Transformers", LLAMA, key="q_proj", parameter="0.mlp.up_proj.weight", whole="lm_head", table="embed_tokens"
    ),
]

# features


Seen = dict[str, Any]
"""What one library makes of a cell: tensors, and plain values, by what they are."""


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature of LoRA's.

    Attributes:
        name: What the tables of ``docs/lora.md`` call it.
        options: The options of a config, for a kind.
        observe: Returns what a library makes of it; for this library it asserts what must hold by itself, too.
        dtype: That of the model.
        autocast: What `autocast_adapter_dtype` is.
        before: Measures the base.
        after: Measures the adapted model.
        tolerance: By how much numbers may differ.
        keeps_layers: Whether the model's own layers stay, so that disabling gives the base, and merging is possible.
        applies: Whether a kind has what the feature is about.
    """

    name: str
    options: Callable[[Kind], dict[str, Any]] = lambda kind: {}
    observe: Callable[[Any, Feature, Kind, Path], Seen] = None  # type: ignore[assignment]
    dtype: torch.dtype = torch.float32
    autocast: bool = True
    before: Callable[[Any, nn.Module, Any, Kind], None] = lambda *_: None
    after: Callable[[Any, nn.Module, Kind], None] = lambda *_: None
    tolerance: float = 1e-6
    keeps_layers: bool = True
    applies: Callable[[Kind], bool] = lambda kind: True

    def base(self, kind: Kind) -> nn.Module:
        """Builds the model without an adapter."""
        return kind.build().to(self.dtype)

    def config(self, library: Any, kind: Kind, **options: Any) -> Any:
        """Returns the config, by one of the libraries."""
        return library.LoraConfig(**{"r": 2, "lora_alpha": 3} | kind.targets | self.options(kind) | options)

    def adapted(self, library: Any, kind: Kind, name: str = "default") -> Any:
        """Returns the adapted model."""
        model, config = self.base(kind), self.config(library, kind)
        self.before(library, model, config, kind)
        torch.manual_seed(2)
        model = library.get_peft_model(model, config, name, autocast_adapter_dtype=self.autocast).eval()
        self.after(library, model, kind)
        return model

    def run(self, model: nn.Module, kind: Kind) -> Tensor:
        """Runs a model with the random numbers of one seed."""
        inputs = kind.inputs()
        if isinstance(inputs, tuple):
            inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        torch.manual_seed(4)
        return result(call(model, inputs))

    def outputs(self, model: nn.Module, kind: Kind) -> Tensor:
        """Runs a model without gradients."""
        with torch.no_grad():
            return self.run(model, kind)

    def __str__(self) -> str:
        return self.name


def tensors_of(library: Any, model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns an adapter's tensors by their names in the file."""
    return dict(sorted(library.get_peft_model_state_dict(model, adapter_name=name).items()))


def fill(library: Any, model: nn.Module, name: str = "default") -> None:
    """Gives an adapter other values, as training would; they depend on its name."""
    generator = torch.Generator().manual_seed(len(name))
    # a table that is adapted is in the file as well, and the model's own
    own = library.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    values = {
        key: (0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for key, tensor in sorted(own.items())
    }
    library.set_peft_model_state_dict(model, values, adapter_name=name)


def step(library: Any, feature: Feature, model: nn.Module, kind: Kind, *names: str) -> Seen:
    """Returns the outputs and the gradients of a training step."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    outputs = feature.run(model.train(), kind)
    outputs.float().square().mean().backward()
    model.eval()
    for buffer, value in before:
        buffer.copy_(value)  # what norms of batches have seen
    # afterwards, since PEFT gives half precision parameters other memory in a call
    known = {
        tensor.data_ptr(): f"{name}: {key}"
        for name in names or ("default",)
        for key, tensor in tensors_of(library, model, name).items()
    }
    seen: Seen = {"in training": outputs.detach()}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            key = known[parameter.data_ptr()]
            # PEFT adds the change of an attention's output projection twice, once without a gradient
            times = 2 if library is peft and re.search(r"base_layer\.out_proj\.lora", key) else 1
            seen[f"gradient of {key}"] = times * parameter.grad
    return seen


def weights_of(model: nn.Module) -> Seen:
    """Returns a model's own tensors."""
    return {f"weight {name}": tensor.clone() for name, tensor in model.state_dict().items()}


def require_base(feature: Feature, model: Any, kind: Kind) -> None:
    """Asserts that disabling gives the base, bit for bit, and unloading the base with copies of `modules_to_save`."""
    # PyTorch computes some layers in another way when nothing of them is trained
    base = feature.base(kind)
    frozen = feature.base(kind).requires_grad_(False)
    if feature.keeps_layers:
        with model.disable_adapter():
            assert torch.equal(feature.outputs(model, kind), feature.outputs(frozen, kind))
    left = with_saved(base, model)
    unloaded = copy.deepcopy(model).unload()
    for module in unloaded.modules():
        for measured in ("_graphpeft_corda", "_graphpeft_lora_ga"):
            vars(module).pop(measured, None)  # which the caller had measured, and may use again
    require_restored(unloaded, left)
    laws.require_equal(dict(unloaded.named_parameters()), dict(left.named_parameters()), "unload leaves other weights")


def trained(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """First values, outputs in evaluation and training, gradients, the file, and merged weights."""
    model = feature.adapted(library, kind)
    seen: Seen = {f"first value of {key}": tensor.clone() for key, tensor in tensors_of(library, model).items()}
    fill(library, model)
    seen["in evaluation"] = feature.outputs(model, kind)
    if library is graphpeft:
        assert (seen["in evaluation"] - feature.outputs(feature.base(kind), kind)).abs().max() > 1e-3
        require_base(feature, model, kind)
    seen |= step(library, feature, model, kind)
    model.save_pretrained(str(folder))
    if not kind.merges and library is graphpeft:
        with pytest.raises(graphpeft.AdaptError):
            model.merge_and_unload()
    if feature.keeps_layers and kind.merges and not _lacks_bias(model, feature, kind):
        merged = model.merge_and_unload()
        if library is graphpeft:
            tolerance = max(10 * feature.tolerance, 8 * torch.finfo(feature.dtype).eps)
            assert_close(feature.outputs(merged, kind), seen["in evaluation"], tolerance)
        seen |= weights_of(merged)
    return seen


def assert_loads(library: Any, feature: Feature, kind: Kind, folder: Path, seen: Seen) -> None:
    """Asserts that a library loads what one of them has saved, and computes the same."""
    model: nn.Module = feature.base(kind)
    feature.before(library, model, feature.config(library, kind), kind)
    torch.manual_seed(2)
    model = library.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=feature.autocast).eval()
    found = {"in evaluation": feature.outputs(model, kind)}
    compare(found, {"in evaluation": seen["in evaluation"]}, feature.tolerance)


def assert_alike(feature: Feature, kind: Kind, folder: Path) -> None:
    """Asserts that both libraries see the same, and load each other's files."""
    ours = feature.observe(graphpeft, feature, kind, folder / "ours")
    theirs = feature.observe(peft, feature, kind, folder / "theirs")
    compare(ours, theirs, feature.tolerance)
    if feature.observe is trained:
        for library, name in ((graphpeft, "theirs"), (peft, "ours"), (graphpeft, "ours")):
            assert_loads(library, feature, kind, folder / name, ours)


def _lacks_bias(model: nn.Module, feature: Feature, kind: Kind) -> bool:
    """Returns whether B has a bias that no layer's could take up, so that both libraries refuse to merge."""
    targets = feature.config(graphpeft, kind).target_modules
    layers = [
        module
        for path, module in kind.build().named_modules()
        if targets and path.endswith(tuple(targets)) and "bias" in module._parameters
    ]
    if not feature.options(kind).get("lora_bias") or all(layer.bias is not None for layer in layers):
        return False
    with pytest.raises((graphpeft.AdaptError, RuntimeError), match="has no bias"):
        copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    return True


# several adapters


def with_two(library: Any, feature: Feature, kind: Kind, ranks: tuple[int, int] = (2, 2)) -> Any:
    """Returns a model with the adapters "u" and "other"."""
    model = feature.base(kind)
    configs = [feature.config(library, kind, r=rank) for rank in ranks]
    torch.manual_seed(2)
    model = library.get_peft_model(model, configs[0], "u").eval()
    torch.manual_seed(2)
    model.add_adapter("other", configs[1])
    for name in ("u", "other"):
        fill(library, model, name)
    return model.eval()


def activate(library: Any, model: Any, names: list[str]) -> None:
    """Lets several adapters act."""
    (model if library is graphpeft else model.base_model).set_adapter(names)


def several(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """Two adapters that act together, and then one of them."""
    model = with_two(library, feature, kind, (2, 1))
    activate(library, model, ["u", "other"])
    seen: Seen = {"both": feature.outputs(model, kind)}
    seen |= step(library, feature, model, kind, "u", "other")
    model.set_adapter("other")
    seen["one"] = feature.outputs(model, kind)
    if library is graphpeft:
        model.set_adapter(["u", "other"])
        assert_close(feature.outputs(model.merge_and_unload(), kind), seen["both"], 1e-5)
    return seen


def mixed(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """A batch whose rows have different adapters."""
    model = with_two(library, feature, kind, (2, 1))
    [first, *_] = inputs = list(kind.inputs().values() if isinstance(kind.inputs(), dict) else kind.inputs())
    names = list(itertools.islice(itertools.cycle(["u", "__base__", "other"]), len(first)))
    with torch.no_grad():
        given = kind.inputs()
        found = model(**given, adapter_names=names) if isinstance(given, dict) else model(*inputs, adapter_names=names)
    seen: Seen = {"mixed": result(found)}
    if library is graphpeft:
        for row, name in enumerate(names):
            model.set_adapter([] if name == "__base__" else name)
            assert_close(seen["mixed"][row], feature.outputs(model, kind)[row], 1e-5)
    return seen


def combined(how: str) -> Callable[[Any, Feature, Kind, Path], Seen]:
    """Returns what observes an adapter that combines two others."""

    def observe(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
        model = with_two(library, feature, kind)
        seen: Seen = {}
        for new, weights in (("sum", [1.0, 1.0]), ("difference", [0.7, -0.4])):
            model.add_weighted_adapter(["u", "other"], weights, new, combination_type=how)
            model.set_adapter(new)
            seen[new] = feature.outputs(model, kind)
        if library is graphpeft and how == "cat":
            model.set_adapter(["u", "other"])
            assert_close(seen["sum"], feature.outputs(model, kind), 1e-5)
        return seen

    return observe


def swapped(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """An adapter in whose place a saved one is put."""
    other = feature.adapted(library, kind)
    fill(library, other)
    other.save_pretrained(str(folder))
    model = feature.adapted(library, kind)
    swap = hotswap_adapter_of_peft if library is peft else graphpeft.hotswap_adapter
    swap(model, str(folder), "default", torch_device="cpu")
    seen = {"swapped": feature.outputs(model, kind)}
    assert_close(seen["swapped"], feature.outputs(other, kind))
    return seen


# the weights


def safely_merged(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """What is merged safely; what isn't finite is refused."""
    model = feature.adapted(library, kind)
    fill(library, model)
    outputs = feature.outputs(model, kind)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert_close(feature.outputs(merged, kind), outputs, 1e-5)
    values = {key: torch.full_like(tensor, torch.inf) for key, tensor in tensors_of(library, model).items()}
    library.set_peft_model_state_dict(model, values)
    before = laws.snapshot(model)
    try:
        model.merge_and_unload(safe_merge=True)
    except ValueError:
        refuses = True
        if library is graphpeft:
            laws.require_unchanged(model, before, "a refused merge")
    else:
        refuses = False
    return weights_of(merged) | {"refuses what isn't finite": refuses}


def unmerged(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """What is merged in place, and taken out again."""
    model = feature.adapted(library, kind)
    fill(library, model)
    adapted = feature.outputs(model, kind)
    model.merge_adapter()
    seen: Seen = {"merged": feature.outputs(model, kind)}
    model.unmerge_adapter()
    seen["unmerged"] = feature.outputs(model, kind)
    if library is graphpeft:
        assert_close(seen["merged"], adapted, 1e-5)
        assert torch.equal(seen["unmerged"], adapted)
        require_base(feature, model, kind)
    return seen


def disabled(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """A model whose adapter is disabled, and enabled again."""
    model = feature.adapted(library, kind)
    fill(library, model)
    seen: Seen = {"before": feature.outputs(model, kind)}
    with model.disable_adapter():
        seen["disabled"] = feature.outputs(model, kind)
    seen["after"] = feature.outputs(model, kind)
    assert_close(seen["disabled"], feature.outputs(feature.base(kind), kind))
    if library is graphpeft:
        assert torch.equal(seen["before"], seen["after"])
        require_base(feature, model, kind)
    return seen


def with_tables(library: Any, feature: Feature, kind: Kind, folder: Path) -> Seen:
    """The tensors in a file with the embeddings."""
    model = feature.adapted(library, kind)
    fill(library, model)
    model.save_pretrained(str(folder), save_embedding_layers=True)
    return library.get_peft_model_state_dict(model, save_embedding_layers=True)


# measured first values


def _corda(library: Any, model: nn.Module, config: Any, kind: Kind) -> None:
    measure: Any = preprocess_corda_of_peft if library is peft else graphpeft.preprocess_corda
    measure(model, config, forwards(model, kind))


def _lora_ga(library: Any, model: nn.Module, config: Any, kind: Kind) -> None:
    measure: Any = preprocess_loraga_of_peft if library is peft else graphpeft.preprocess_loraga
    measure(model, config, backwards(model, kind))


def _eva(library: Any, model: nn.Module, kind: Kind) -> None:
    ways: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    library.initialize_lora_eva_weights(
        model, batches(kind), show_progress_bar=False, **({} if isinstance(kind.inputs(), dict) else ways)
    )


def _of(**options: Any) -> Callable[[Kind], dict[str, Any]]:
    return lambda kind: options


def _initialised(kind: Any, **more: Any) -> Feature:
    return Feature(f"`init_lora_weights={kind!r}`".replace("'", '"'), _of(init_lora_weights=kind), trained, **more)


def _measured(name: str, config: dict[str, Any], **more: Any) -> Feature:
    def options(kind: Kind) -> dict[str, Any]:
        transposed = any(isinstance(module, Conv1D) for module in kind.build().modules())
        return {"init_lora_weights": name, "fan_in_fan_out": transposed, f"{name}_config": config}

    return Feature(f'`init_lora_weights="{name}"`', options, trained, **more)


def _has_table(kind: Kind) -> bool:
    return kind.table is not None


def _rows(kind: Kind) -> dict[str, Any]:
    return {"target_modules": [kind.whole], "trainable_token_indices": {kind.table: [1, 3]}}


HALF_TOLERANCE = 4 * torch.finfo(torch.float16).eps
BFLOAT_TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps

FEATURES = [
    Feature("plain", observe=trained),
    Feature("`use_rslora`", _of(use_rslora=True), trained),
    Feature("`lora_dropout`", _of(lora_dropout=0.3), trained),
    Feature('`bias="all"`', _of(bias="all"), trained),
    Feature('`bias="lora_only"`', _of(bias="lora_only"), trained),
    Feature("`lora_bias`", _of(lora_bias=True), trained),
    Feature("`use_dora`", _of(use_dora=True), trained),
    _initialised(False),
    _initialised("gaussian"),
    _initialised("pissa"),
    _initialised("pissa_niter_4"),
    _initialised("olora"),
    _initialised("orthogonal"),
    _initialised("mica"),
    _measured("corda", {"corda_method": "ipm"}, before=_corda, tolerance=1e-4),
    _measured("lora_ga", {"direction": "ArB2r"}, before=_lora_ga, tolerance=1e-5),
    _measured("eva", {"rho": 1.5}, after=_eva, tolerance=1e-4),
    Feature(
        '`init_lora_weights="loftq"`',
        _of(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
        trained,
        tolerance=1e-5,
    ),
    Feature(
        "`rank_pattern`, `alpha_pattern`",
        lambda kind: {"rank_pattern": {kind.key: 1}, "alpha_pattern": {kind.key: 5}},
        trained,
    ),
    Feature("`modules_to_save`", lambda kind: {"modules_to_save": [kind.whole]}, trained),
    Feature("`target_parameters`", lambda kind: {"target_modules": [], "target_parameters": [kind.parameter]}, trained),
    Feature("`trainable_token_indices`", _rows, trained, applies=_has_table),
    Feature("`layer_replication`", _of(layer_replication=[(0, 2), (1, 2)]), trained, keeps_layers=False),
    Feature(
        "`ensure_weight_tying`, `trainable_token_indices`",
        lambda kind: _rows(kind) | {"ensure_weight_tying": True},
        trained,
        applies=_has_table,
    ),
    Feature("`save_embedding_layers=True`", observe=with_tables),
    Feature("float16", observe=trained, dtype=torch.float16, tolerance=HALF_TOLERANCE),
    Feature("bfloat16", observe=trained, dtype=torch.bfloat16, tolerance=BFLOAT_TOLERANCE),
    Feature(
        "bfloat16, `autocast_adapter_dtype=False`",
        observe=trained,
        dtype=torch.bfloat16,
        autocast=False,
        tolerance=BFLOAT_TOLERANCE,
    ),
    Feature("`merge_and_unload(safe_merge=True)`", observe=safely_merged),
    Feature("`merge_adapter`, `unmerge_adapter`", observe=unmerged),
    Feature("several active adapters", observe=several),
    Feature("`adapter_names`: mixed batches", observe=mixed),
    Feature('`add_weighted_adapter`: `"cat"`', observe=combined("cat")),
    Feature('`add_weighted_adapter`: `"linear"`', observe=combined("linear")),
    Feature('`add_weighted_adapter`: `"svd"`', observe=combined("svd"), tolerance=1e-5),
    Feature("`hotswap_adapter`", observe=swapped),
    Feature("`disable_adapter`", observe=disabled),
]


def compare(found: Seen, expected: Seen, tolerance: float) -> None:
    """Asserts that both libraries have seen the same, within `tolerance`."""
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        if isinstance(value, Tensor):
            assert (found[what].dtype, found[what].shape) == (value.dtype, value.shape), what
            within = 10 * tolerance if what.startswith("gradient") else tolerance
            if what.startswith("weight") and value.dtype != torch.float32 and value.is_floating_point():
                within = torch.finfo(value.dtype).eps
            difference = (found[what].float() - value.float()).abs().max()
            assert difference <= within * max(1, value.float().abs().max()), f"{what}: {difference}"
        else:
            assert found[what] == value, what
