"""OSF's frozen directions, which follow from the base, and what they are to gradients."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from matrix_uses import LAYERS
from models import Experts
from oracle import LINEAR, Case, assert_close, moved, outputs
from peft.utils.constants import TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING
from quantised import by_bitsandbytes
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import AdaptError, OSFConfig, PeftModel, get_peft_model, own_weight
from graphpeft.sites import quantisers

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")

SHAPES = [(8, 6), (6, 8), (6, 6)]
NAMES = ("U_low", "S_low", "V_low")


def pair(rows: int, columns: int, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    """Returns one adapted layer in both libraries, with equal values that were moved, and its input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(columns, rows))
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.OSFConfig(target_modules=["0"], **options)))
    ours: Any = get_peft_model(base, OSFConfig(target_modules=["0"], **options))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs, torch.randn(4, columns)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gradients_are_off_the_frozen_directions_as_in_peft(rows: int, columns: int):
    ours, theirs, x = pair(rows, columns, effective_rank=2)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    adapter, params = ours[0].default, theirs.base_model.model[0].osf_svd_params["default"]
    for name in NAMES:
        assert_close(getattr(adapter, f"osf_{name}").grad, params[name].grad)
    u, _, v = torch.linalg.svd(own_weight(ours[0]))
    on_u, on_v = adapter.osf_U_low.grad, adapter.osf_V_low.grad
    assert (u[:, :2].T @ on_u).abs().max() < 1e-5 * on_u.abs().max()
    assert (on_v @ v[:2].T).abs().max() < 1e-5 * on_v.abs().max()


class Plain(nn.Module):
    """The weight of a layer, read as no layer does."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(own_weight(layer).detach().clone()), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", x, self.w.clone()) + self.bias


@pytest.mark.parametrize("way", ["as a weight", "compiled", "copied", "checkpointed"])
def test_gradients_are_projected_however_the_model_runs(way: str):
    ours, _, x = pair(8, 6)
    (expected,) = torch.autograd.grad(ours(x).square().sum(), [ours[0].default.osf_U_low])
    run: Any = copy.deepcopy(ours) if way == "copied" else ours
    factor = run[0].default.osf_U_low
    if way == "compiled":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    if way == "as a weight":
        run = get_peft_model(Plain(ours[0]), OSFConfig(target_modules=["w"]))
        values = graphpeft.get_peft_model_state_dict(ours)
        graphpeft.set_peft_model_state_dict(run, {key.replace(".0.", "."): value for key, value in values.items()})
        factor = run.default.w_osf_U_low
    y = checkpoint(run, x, use_reentrant=False) if way == "checkpointed" else run(x)
    y.square().sum().backward()
    assert_close(factor.grad, expected, 1e-5)


def test_torch_func_sees_the_projection():
    ours, _, x = pair(6, 8)
    named = dict(ours.named_parameters())
    loss = lambda values, x: torch.func.functional_call(ours, values, (x,)).square().sum()  # noqa: E731
    ours(x).square().sum().backward()
    found = torch.func.grad(loss)({name: value.detach() for name, value in named.items()}, x)
    assert_close(found["0.default.osf_U_low"], ours[0].default.osf_U_low.grad)
    of_rows = torch.func.vmap(torch.func.grad(loss), (None, 0))({n: v.detach() for n, v in named.items()}, x)
    assert_close(of_rows["0.default.osf_U_low"].sum(0), ours[0].default.osf_U_low.grad)


def test_steps_leave_the_large_directions_of_the_weight_alone():
    x = torch.randn(4, 6)
    first: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8)), OSFConfig(effective_rank=2, target_modules=["0"]))
    u, s, v = torch.linalg.svd(first[0].weight.detach(), full_matrices=False)
    optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        first(x).square().sum().backward()
        optimizer.step()
    merged = first.merge_and_unload()[0].weight
    assert not torch.allclose(merged, (u * s) @ v, atol=1e-3)
    assert_close(u[:, :2].T @ merged @ v[:2].T, s[:2].diag())


@pytest.mark.parametrize("options", [{}, {"effective_rank": 3}, {"effective_rank": 0.7}, {"rank_pattern": {"0": 0.4}}])
def test_no_trained_direction_is_of_another_number_than_pefts(options: dict[str, Any]):
    theirs: Any = peft.get_peft_model(LAYERS.build(), peft.OSFConfig(**LAYERS.targets, **options))
    ours: Any = get_peft_model(LAYERS.build(), OSFConfig(**LAYERS.targets, **options))
    expected = {key: value.shape for key, value in peft.get_peft_model_state_dict(theirs).items()}
    assert {key: value.shape for key, value in graphpeft.get_peft_model_state_dict(ours).items()} == expected


def test_the_first_pattern_that_matches_counts_also_in_peft_after_loading(tmp_path: Path):
    options: dict[str, Any] = {"rank_pattern": {"2|4": 1, "0|2": 3}, "effective_rank": 2}
    model = moved(get_peft_model(LAYERS.build(), OSFConfig(**LAYERS.targets, **options)))
    ranks = [model[place].default.osf_S_low.numel() for place in (0, 2, 4)]
    assert ranks == [3, 3, 3]
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(LAYERS.build(), str(tmp_path)).eval()
    assert_close(outputs(theirs, LAYERS), outputs(model, LAYERS), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_directions_are_pefts_beside_a_base_of_any_precision(dtype: torch.dtype):
    theirs: Any = peft.get_peft_model(LINEAR.build().to(dtype), peft.OSFConfig(target_modules=["0"]))
    ours: Any = get_peft_model(LINEAR.build().to(dtype), OSFConfig(target_modules=["0"]))
    layer, adapter = theirs.base_model.model[0], ours[0].default
    for name in ("U", "S", "V"):
        expected = getattr(layer, f"_osf_{name}_low_init")["default"]
        found = getattr(adapter, f"osf_{name}_init")
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert torch.equal(adapter.osf_U_high, layer._osf_U_high["default"])


def test_an_adapter_that_is_loaded_beside_a_merged_one_has_the_directions_of_the_base(tmp_path: Path):
    model = moved(get_peft_model(LINEAR.build(), OSFConfig(target_modules=["0"])))
    expected = outputs(model, LINEAR)
    model.save_pretrained(tmp_path)
    other: Any = moved(get_peft_model(LINEAR.build(), OSFConfig(target_modules=["0"])), seed=5)
    other.merge_adapter()
    other.load_adapter(tmp_path, "loaded")
    other.unmerge_adapter()
    other.set_adapter("loaded")
    assert torch.equal(outputs(other, LINEAR), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"effective_rank": 6}, "of the 6 directions of its weight, the effective rank 6 leaves none to train"),
        ({"effective_rank": 99}, "the effective rank 6 leaves none to train"),
        ({"effective_rank": 1.0}, "the effective rank 6 leaves none to train"),
        ({"effective_rank": 0.1}, "of the 6 directions of its weight, the effective rank 0 freezes none"),
        ({"rank_pattern": {"(": 1}}, "'(' in rank_pattern is not a regular expression"),
    ],
    ids=str,
)
def test_ranks_without_a_meaning_are_refused(options: dict[str, Any], reason: str):
    base = LINEAR.build()
    before = {name: value.clone() for name, value in base.named_parameters()}
    with pytest.raises(AdaptError, match=re.escape(reason)):
        get_peft_model(base, OSFConfig(target_modules=["0"], **options))
    assert all(torch.equal(value, before[name]) for name, value in base.named_parameters())


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0, True])
def test_a_rank_is_a_positive_number_or_a_share(value: Any):
    with pytest.raises(ValueError, match="effective_rank must be"):
        OSFConfig(effective_rank=value)


def test_the_default_targets_are_pefts_also_for_an_unknown_model() -> None:
    theirs, ours = peft.get_peft_model(LAYERS.build(), peft.OSFConfig()), get_peft_model(LAYERS.build(), OSFConfig())
    assert graphpeft.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    known = {kind: list(names) for kind, names in OSFConfig.default_targets.items()}
    assert known == TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING


def test_each_matrix_of_a_stack_has_directions_of_its_own():
    torch.manual_seed(0)
    config = OSFConfig(target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_osf_U_low.ndim == 3


def test_the_numbers_of_a_quantised_weight_are_decomposed():
    case = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),))
    config = OSFConfig(effective_rank=60, target_modules=["0"])
    base, model = case.build(), moved(get_peft_model(case.build(), config))
    plain: Any = nn.Sequential(nn.Linear(64, 64))
    plain[0].load_state_dict({"weight": quantisers.codes_of(base[0]).numbers(), "bias": base[0].bias})  # type: ignore[index]
    same: Any = get_peft_model(plain, config)
    graphpeft.set_peft_model_state_dict(same, graphpeft.get_peft_model_state_dict(model))
    (x,) = case.inputs()
    assert_close(model(x), base[2](torch.tanh(same(x))), 1e-5)  # type: ignore[index]


def test_a_file_goes_on_being_trained_off_the_frozen_directions(tmp_path: Path):
    ours, theirs, x = pair(8, 6)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again: Any = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 8)), tmp_path, is_trainable=True)
    for model in (again, theirs):
        model(x).square().sum().backward()
    params = theirs.base_model.model[0].osf_svd_params["default"]
    assert_close(again[0].default.osf_U_low.grad, params["U_low"].grad)
