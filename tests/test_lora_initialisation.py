"""First values of LoRA that come from the weight, and the bias of B, are PEFT's; the base stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import FUNCTIONAL, GPT2, LLAMA, VIT
from oracle import (
    CONV_2D,
    CONVOLUTIONS,
    EMBEDDING,
    LINEAR,
    MATRICES,
    TRANSPOSED,
    WITHOUT_BIAS,
    Case,
    assert_close,
    assert_converts_by_the_recipe_of_peft,
    assert_files_go_both_ways,
    assert_merges_and_unloads,
    assert_same_tensors,
    assert_trains_alike,
    by_peft,
    by_us,
    config,
    outputs,
    perturb,
    tensors,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, own_weight
from graphpeft.testing import laws

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft")

MODELS = [*MATRICES, LLAMA, GPT2, VIT]
TAKEN = ["pissa", "pissa_niter_4", "olora"]
"""The initialisations that take a part of the weight."""


def of(kind: str, cases: list[Any]) -> list[Any]:
    # PEFT decomposes the weight of a Conv1D as it is stored, which fits no A and B
    fitting = [case for case in cases if kind != "olora" or case not in (TRANSPOSED, GPT2)]
    return [pytest.param(case, kind, id=f"{kind}-{case}") for case in fitting]


EACH = [param for kind in (*TAKEN, "mica", "orthogonal") for param in of(kind, MODELS)] + of("mica", [EMBEDDING])
each = pytest.mark.parametrize(("case", "kind"), EACH)


def pair(case: Any, **options: Any) -> tuple[Any, Any]:
    """Returns the model adapted by both libraries, with equal values other than the first."""
    ours, theirs = by_us(case, **options), by_peft(case, **options)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    return ours, theirs


@each
def test_equal_seeds_give_pefts_values(case: Any, kind: str) -> None:
    for options in ({}, {"use_rslora": True, "alpha_pattern": {"0": 5}} if isinstance(case, Case) else {}):
        ours, theirs = by_us(case, init_lora_weights=kind, **options), by_peft(case, init_lora_weights=kind, **options)
        assert_same_tensors(ours, theirs)
        assert_close(outputs(ours, case), outputs(theirs, case))
        assert_close(outputs(ours, case), outputs(case.build(), case), 1e-5)


def test_a_layer_without_inputs_is_adapted_as_by_peft() -> None:
    # models have such layers where a small width is divided by a factor
    case = Case("no-inputs", lambda: nn.Sequential(nn.Linear(0, 3), nn.Tanh()), lambda: (torch.randn(2, 0),))
    with pytest.warns(UserWarning, match="zero-element"):
        theirs = by_peft(case, init_lora_weights=False)
    with pytest.warns(UserWarning, match="zero-element"):
        ours = by_us(case, init_lora_weights=False)
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_close(outputs(ours, case), outputs(theirs, case))


@each
def test_outputs_and_gradients_are_pefts(case: Any, kind: str) -> None:
    ours, theirs = pair(case, init_lora_weights=kind, lora_dropout=0.0 if case is EMBEDDING else 0.3)
    assert (outputs(ours, case) - outputs(case.build(), case)).abs().max() > 1e-3
    assert_close(outputs(ours, case), outputs(theirs, case))
    assert_trains_alike(ours, theirs, case)


@each
def test_files_go_both_ways(case: Any, kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, init_lora_weights=kind)
    # some steps approximate singular vectors, from a random start
    assert_files_go_both_ways(ours, theirs, case, tmp_path, 0.2 if "niter" in kind else 1e-6)


@each
def test_merged_is_pefts_and_unloaded_is_the_base(case: Any, kind: str) -> None:
    ours, theirs = pair(case, init_lora_weights=kind)
    assert_merges_and_unloads(ours, theirs, case)


@pytest.mark.parametrize("case", [TRANSPOSED, GPT2], ids=str)
def test_olora_decomposes_the_matrix_of_a_conv1d_as_it_multiplies(case: Any) -> None:
    model = by_us(case, init_lora_weights="olora")
    assert_close(outputs(model, case), outputs(case.build(), case), 1e-5)
    B = next(tensor for name, tensor in tensors(model).items() if name.endswith("lora_B.weight"))
    assert_close(B.T @ B, torch.eye(B.shape[1]), 1e-5)
    laws.assert_adapted_is_base_with_delta(case.build, config(case, init_lora_weights="olora"), case.inputs())
    laws.assert_saved_is_loaded(case.build, config(case, init_lora_weights="olora"), case.inputs())


@pytest.mark.parametrize("kind", TAKEN)
def test_dora_starts_from_what_is_left_of_the_weight_as_in_peft(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_lora_weights": kind, "use_dora": True}
    assert_same_tensors(by_us(LINEAR, **options), by_peft(LINEAR, **options), 1e-6)
    ours, theirs = pair(LINEAR, **options)
    assert_close(outputs(ours, LINEAR), outputs(theirs, LINEAR))
    assert_trains_alike(ours, theirs, LINEAR)
    assert_merges_and_unloads(ours, theirs, LINEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["pissa", "olora", "mica", "orthogonal"])
def test_on_half_precision_weights_values_and_dtypes_are_pefts(kind: str, dtype: torch.dtype) -> None:
    half = LINEAR._replace(
        make=lambda: LINEAR.make().to(dtype), make_inputs=lambda: (LINEAR.make_inputs()[0].to(dtype),)
    )
    ours, theirs = by_us(half, init_lora_weights=kind), by_peft(half, init_lora_weights=kind)
    assert {name: t.dtype for name, t in tensors(ours).items()} == {
        name: t.dtype for name, t in tensors(theirs).items()
    }
    assert_same_tensors(ours, theirs)
    assert torch.equal(outputs(ours, half), outputs(theirs, half))


# the override


def test_the_base_keeps_its_weight_and_the_module_reads_what_is_left() -> None:
    model = by_us(LINEAR, init_lora_weights="pissa")
    base = LINEAR.build().state_dict()
    assert torch.equal(model.state_dict()["0.weight"], base["0.weight"])
    tensors_of_file = tensors(model)
    A, B = (tensors_of_file[f"base_model.model.0.lora_{name}.weight"] for name in "AB")
    assert_close(own_weight(model[0]), base["0.weight"] - 1.5 * B @ A)
    assert_close(model[0].weight, base["0.weight"])
    assert not own_weight(model[0]).requires_grad
    assert sorted(tensors_of_file) == ["base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"]
    model.disable_adapters()
    assert torch.equal(model[0].weight, base["0.weight"])


def test_what_is_left_stays_frozen_when_adapters_are_chosen() -> None:
    model = by_us(LINEAR, init_lora_weights="pissa")
    model.add_adapter("plain", config(LINEAR))
    model.set_adapter("plain")
    assert torch.equal(model[0].weight, LINEAR.build()[0].weight)  # type: ignore[index]
    model.set_adapter("default")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["0.default.lora_A", "0.default.lora_B"]


def test_a_plain_adapter_acts_beside_one_that_has_taken_a_part() -> None:
    model = by_us(LINEAR, init_lora_weights="pissa")
    model.add_adapter("plain", config(LINEAR, init_lora_weights=False))
    model.set_adapter(["default", "plain"])
    expected = outputs(model, LINEAR)
    assert_close(outputs(model.merge_and_unload(), LINEAR), expected, 1e-5)


def test_of_two_adapters_that_have_taken_parts_of_one_weight_one_acts() -> None:
    model = by_us(LINEAR, init_lora_weights="pissa")
    model.add_adapter("other", config(LINEAR, init_lora_weights="olora"))
    before = laws.snapshot(model)
    for act in (lambda: model.set_adapter(["default", "other"]), lambda: model.merge_and_unload(adapter_names=BOTH)):
        with pytest.raises(AdaptError, match=r"'default' and 'other' both .* in the place of 0\.weight"):
            act()
        laws.require_unchanged(model, before, "a refused activation")
    model.set_adapter("other")
    model.delete_adapter("default")
    assert_close(outputs(model, LINEAR), outputs(LINEAR.build(), LINEAR), 1e-5)


BOTH = ["default", "other"]


def test_biases_fully_trained_go_with_weights_of_which_a_part_is_taken() -> None:
    for options in ({"bias": "lora_only"}, {"bias": "all"}):
        ours, theirs = pair(LINEAR, init_lora_weights="pissa", **options)
        assert_close(outputs(ours, LINEAR), outputs(theirs, LINEAR))
        assert_merges_and_unloads(ours, theirs, LINEAR)


def test_a_tied_weight_keeps_its_other_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    case = Case("tied", Tied, EMBEDDING.make_inputs, {"target_modules": ["head"]})
    model = by_us(case, init_lora_weights="pissa")
    assert_close(outputs(model, case), outputs(case.build(), case), 1e-5)


# as plain LoRA


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 5}}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("kind", TAKEN)
def test_what_has_taken_a_part_is_saved_as_plain_lora_of_twice_the_rank(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ours = by_us(LINEAR, init_lora_weights=kind, **options)
    ours.save_pretrained(tmp_path / "first")
    perturb(ours)
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")
    expected = outputs(ours, LINEAR)
    loaded = graphpeft.PeftModel.from_pretrained(LINEAR.build(), tmp_path / "plain")
    assert loaded.peft_config["default"].r == 4
    assert loaded.peft_config["default"].init_lora_weights is True
    assert_close(outputs(loaded, LINEAR), expected, 1e-5)
    theirs = peft.PeftModel.from_pretrained(LINEAR.build(), tmp_path / "plain").eval()
    assert_close(outputs(theirs, LINEAR), expected, 1e-5)


def test_the_converted_file_is_pefts(tmp_path: Path) -> None:
    theirs, ours = by_peft(LINEAR, init_lora_weights="pissa"), by_us(LINEAR, init_lora_weights="pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "first_of_theirs"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    ours.save_pretrained(tmp_path / "first")
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    path = str(tmp_path / "first_of_theirs")
    theirs.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=path)
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "first")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    read = [graphpeft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs")]
    assert read[0] == read[1]


@pytest.mark.parametrize("kind", TAKEN)
def test_pefts_recipe_for_plain_lora_gives_pefts_files(kind: str, tmp_path: Path) -> None:
    ours, theirs = (adapt(LINEAR, init_lora_weights=kind) for adapt in (by_us, by_peft))
    assert_converts_by_the_recipe_of_peft(ours, theirs, LINEAR, tmp_path)


def test_what_took_nothing_is_not_converted_whatever_its_config_says_later(tmp_path: Path) -> None:
    model = by_us(LINEAR)
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(ValueError, match="'default' took none when it was made; leave it None"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")


@pytest.mark.parametrize("kind", ["OLoRA", "MiCA", "Gaussian"])
def test_names_are_read_in_the_spellings_that_peft_reads(kind: str) -> None:
    assert_same_tensors(*(adapt(LINEAR, init_lora_weights=kind) for adapt in (by_us, by_peft)))
    assert config(LINEAR, init_lora_weights=kind).init_lora_weights == kind.lower()


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    by_us(LINEAR, init_lora_weights="pissa", r=3).save_pretrained(tmp_path / "other")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "'default' took none when it was made"),
        ({"init_lora_weights": "pissa"}, "the first values in .* are another adapter's"),
        ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"0": 3}}, "no α keeps the scale"),
    ]
    for options, words in cases:
        model = by_us(LINEAR, **{"r": 2 if "pissa" in str(options) else 3} | options)
        with pytest.raises(ValueError, match=words):
            model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "other")
        assert not (tmp_path / "new").exists()


# the bias of B

WITH_BIAS = [LINEAR, TRANSPOSED, *(case for case in CONVOLUTIONS if str(case) != "pointwise"), GPT2, VIT]


@pytest.mark.parametrize("case", WITH_BIAS, ids=str)
def test_the_bias_of_b_is_pefts(case: Any, tmp_path: Path) -> None:
    for kind in (True, False):
        ours, theirs = (adapt(case, lora_bias=True, init_lora_weights=kind) for adapt in (by_us, by_peft))
        assert_same_tensors(ours, theirs)
        assert any(name.endswith("lora_B.bias") for name in tensors(ours))
    ours, theirs = pair(case, lora_bias=True, lora_dropout=0.3)
    assert_close(outputs(ours, case), outputs(theirs, case))
    assert_trains_alike(ours, theirs, case)
    assert_files_go_both_ways(ours, theirs, case, tmp_path)
    assert_merges_and_unloads(ours, theirs, case)


def test_the_bias_of_b_goes_into_the_bias_that_is_fully_trained() -> None:
    ours, theirs = pair(LINEAR, lora_bias=True, bias="all")
    assert_close(outputs(ours, LINEAR), outputs(theirs, LINEAR))
    assert_merges_and_unloads(ours, theirs, LINEAR)


def test_where_the_operation_adds_no_bias_that_of_b_acts_and_cannot_be_merged() -> None:
    ours, theirs = pair(WITHOUT_BIAS, lora_bias=True)
    assert_close(outputs(ours, WITHOUT_BIAS), outputs(theirs, WITHOUT_BIAS))
    before = laws.snapshot(ours)
    with pytest.raises(AdaptError, match="0 of adapter 'default' can't be merged: it has no bias of its own"):
        ours.merge_and_unload()
    laws.require_unchanged(ours, before, "a refused merge")


def test_a_bias_that_is_tied_is_not_merged_into() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    adapted = graphpeft.get_peft_model(model, graphpeft.LoraConfig(target_modules=["0"], lora_bias=True))
    with pytest.raises(AdaptError, match=r"0\.bias is tied to 1\.bias"):
        adapted.merge_and_unload()


# refusals


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.w)


class Kept(nn.Module):
    """Keeps its parameter in a list too, as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.all = [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


X = Case("", nn.Module, lambda: (torch.randn(2, 5, 8),))
ATTENTION = X._replace(name="attention", make=Attention, targets={"target_modules": ["attention.in_proj_weight"]})
EXPERTS = X._replace(name="experts", make=Experts, targets={"target_modules": ["w"]})
KEPT = X._replace(name="kept", make=Kept, targets={"target_modules": ["w"]})


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        (LINEAR, {"init_lora_weights": "pissa", "r": 7}, "its rank is 6 at most, and r is 7"),
        (LINEAR, {"init_lora_weights": "pissa", "lora_alpha": 0}, "make lora_alpha positive"),
        (LINEAR, {"init_lora_weights": "olora", "r": 7}, "its rank is 6 at most"),
        (LINEAR, {"init_lora_weights": "mica", "r": 7}, "its rank is 6 at most"),
        (EMBEDDING, {"init_lora_weights": "mica", "r": 7}, "its rank is 6 at most"),
        (LINEAR, {"init_lora_weights": "orthogonal", "r": 3}, "3 is odd; choose an even r"),
        (CONV_2D, {"init_lora_weights": "pissa"}, "is for linear weights, and it is a convolution"),
        (EMBEDDING, {"init_lora_weights": "pissa"}, "is for linear weights, and it is an embedding"),
        (EXPERTS, {"init_lora_weights": "olora"}, "is for linear weights, and it is a stack of matrices"),
        (KEPT, {"init_lora_weights": "pissa"}, "its w is held by self.all of the model, too"),
        (FUNCTIONAL, {"init_lora_weights": "pissa", "modules_to_save": ["one"]}, "fully trains its w"),
        (LINEAR, {"init_lora_weights": "pizza"}, "'pizza' is not supported; choose one of True, False"),
        (LINEAR, {"init_lora_weights": "pissa_niter_x"}, "is not supported; choose one of True, False"),
        (EMBEDDING, {"lora_bias": True}, "lora_bias=True is for the outputs of linear layers and convolutions"),
        (ATTENTION, {"lora_bias": True}, "lora_bias=True is for the outputs of linear layers and convolutions"),
        (EXPERTS, {"lora_bias": True}, "lora_bias=True is for the outputs of linear layers and convolutions"),
        (FUNCTIONAL, {"lora_bias": True}, "lora_bias=True is for the outputs of linear layers and convolutions"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(case: Any, options: dict[str, Any], words: str) -> None:
    model = case.build()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=words):
        graphpeft.get_peft_model(model, config(case, **options))
    laws.require_unchanged(model, before, "a refused adaptation")


def test_a_bias_of_b_with_first_values_from_the_weight_is_refused_as_in_peft() -> None:
    with pytest.raises(ValueError, match="lora_bias=True needs init_lora_weights True or False"):
        config(LINEAR, lora_bias=True, init_lora_weights="pissa")


def test_copies_have_their_own_tensors() -> None:
    model = by_us(LINEAR, init_lora_weights="pissa")
    copied = copy.deepcopy(model)
    assert copied[0].weight is not model[0].weight
    assert torch.equal(outputs(copied, LINEAR), outputs(model, LINEAR))
