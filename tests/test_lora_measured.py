"""First values of LoRA that are measured while the model runs are PEFT's, and measuring changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from measuring import backwards, batches, forwards, preprocess_corda_of_peft, preprocess_loraga_of_peft
from models import GPT2, LLAMA, VIT, call
from oracle import (
    CONV_2D,
    EMBEDDING,
    LINEAR,
    MATRICES,
    TRANSPOSED,
    WITHOUT_BIAS,
    assert_close,
    assert_converts_by_the_recipe_of_peft,
    assert_files_go_both_ways,
    assert_merges_and_unloads,
    assert_same_tensors,
    assert_trains_alike,
    config,
    outputs,
    peft_config,
    perturb,
    tensors,
)
from torch import nn

import graphpeft
from graphpeft import (
    AdaptError,
    CordaConfig,
    EvaConfig,
    LoraGAConfig,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from graphpeft.testing import laws

# what PEFT warns of is PEFT's
pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def adapted(
    measure: Any, measure_of_peft: Any, run: Any, case: Any, own: dict[str, Any], theirs: dict[str, Any]
) -> tuple[Any, Any]:
    """Measures and adapts with both libraries, with equal seeds."""
    model, config_of_ours = case.build(), config(case, **own)
    before = laws.snapshot(model)
    measure(model, config_of_ours, run(model, case))
    require_only_kept(model, before)
    torch.manual_seed(2)
    ours = graphpeft.get_peft_model(model, config_of_ours)

    model, config_of_theirs = case.build(), peft_config(case, **theirs)
    measure_of_peft(model, config_of_theirs, run(model, case))
    torch.manual_seed(2)
    return ours, peft.get_peft_model(model, config_of_theirs).eval()


KEPT = ("_graphpeft_corda", "_graphpeft_lora_ga")


def require_only_kept(model: nn.Module, before: dict[str, Any]) -> None:
    """Checks that measuring has changed nothing but the attributes that keep what was measured."""
    kept = {
        module: {name: vars(module).pop(name) for name in KEPT if name in vars(module)} for module in model.modules()
    }
    laws.require_unchanged(model, before, "measuring")
    assert any(kept.values())
    for module, statistics in kept.items():
        vars(module).update(statistics)


def with_corda(case: Any, **options: Any) -> tuple[Any, Any]:
    from peft.tuners.lora.config import CordaConfig as CordaConfigOfPeft

    own, theirs = CordaConfig(**options), CordaConfigOfPeft(**options)
    kind = {"init_lora_weights": "corda", "fan_in_fan_out": case is GPT2 or str(case) == "transformers-conv1d"}
    return adapted(
        preprocess_corda,
        preprocess_corda_of_peft,
        forwards,
        case,
        kind | {"corda_config": own},
        kind | {"corda_config": theirs},
    )


def with_lora_ga(case: Any, **options: Any) -> tuple[Any, Any]:
    kind = {"init_lora_weights": "lora_ga", "fan_in_fan_out": case is GPT2 or str(case) == "transformers-conv1d"}
    return adapted(
        preprocess_loraga,
        preprocess_loraga_of_peft,
        backwards,
        case,
        kind | {"lora_ga_config": LoraGAConfig(**options)},
        kind | {"lora_ga_config": peft.LoraGAConfig(**options)},
    )


def compare(ours: Any, theirs: Any, case: Any, tolerance: float) -> None:
    assert_same_tensors(ours, theirs, tolerance)
    assert_close(outputs(ours, case), outputs(case.build(), case), 1e-4)
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    assert_close(outputs(ours, case), outputs(theirs, case), tolerance)
    assert_trains_alike(ours, theirs, case, tolerance)
    assert_merges_and_unloads(ours, theirs, case, tolerance)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
# whose inputs are sequences, which PEFT wants
@pytest.mark.parametrize("case", [LINEAR, TRANSPOSED, LLAMA, GPT2, VIT], ids=str)
def test_cordas_values_are_pefts(case: Any, method: str) -> None:
    compare(*with_corda(case, corda_method=method), case, 1e-5)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_gas_values_are_pefts(direction: str, scale: str) -> None:
    for case in MATRICES:
        compare(*with_lora_ga(case, direction=direction, scale=scale), case, 1e-5)


@pytest.mark.parametrize("case", [LLAMA, GPT2, VIT], ids=str)
def test_lora_gas_values_are_pefts_in_whole_models(case: Any) -> None:
    ours, theirs = with_lora_ga(case, scale="gd_scale")
    compare(ours, theirs, case, 1e-4)


def test_what_was_measured_is_kept_in_files(tmp_path: Path) -> None:
    file, covariances = tmp_path / "a" / "cache.pt", tmp_path / "b" / "covariances.pt"
    options = {"cache_file": file, "covariance_file": str(covariances)}
    given = config(LINEAR, init_lora_weights="corda", corda_config=options)
    first, again, third = LINEAR.build(), LINEAR.build(), LINEAR.build()
    preprocess_corda(first, given, forwards(first, LINEAR))
    preprocess_corda(again, given)
    file.unlink()
    preprocess_corda(third, given)
    gradients = tmp_path / "gradients.pt"
    of_ga = config(LINEAR, init_lora_weights="lora_ga")
    fourth, fifth = LINEAR.build(), LINEAR.build()
    preprocess_loraga(fourth, of_ga, backwards(fourth, LINEAR), gradients)
    preprocess_loraga(fifth, of_ga, pytest.fail, gradients)
    for one, others, adapter in ((first, (again, third), given), (fourth, (fifth,), of_ga)):
        torch.manual_seed(0)
        expected = graphpeft.get_peft_model(one, adapter)
        for other in others:
            torch.manual_seed(0)
            assert_same_tensors(graphpeft.get_peft_model(other, adapter), expected)


@pytest.mark.filterwarnings("ignore:(corda|lora_ga)_config has no effect unless:UserWarning")
@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_pefts_recipe_for_plain_lora_gives_pefts_files(kind: str, tmp_path: Path) -> None:
    ours, theirs = with_corda(LINEAR) if kind == "corda" else with_lora_ga(LINEAR)
    assert_converts_by_the_recipe_of_peft(ours, theirs, LINEAR, tmp_path)


def test_options_without_effect_are_warned_of_as_in_peft() -> None:
    given = config(LINEAR, corda_config={"corda_method": "kpm"})
    with pytest.warns(UserWarning, match="corda_config has no effect unless init_lora_weights is 'corda'"):
        graphpeft.get_peft_model(LINEAR.build(), given)


def test_gradients_and_flags_are_what_they_were_after_measuring() -> None:
    model = LINEAR.build()
    backwards(model, LINEAR)()
    before = laws.snapshot(model)
    with pytest.raises(ZeroDivisionError):
        preprocess_loraga(model, config(LINEAR, init_lora_weights="lora_ga"), lambda: 1 / 0)  # type: ignore[arg-type]
    laws.require_unchanged(model, before, "a failed measurement")
    preprocess_loraga(model, config(LINEAR, init_lora_weights="lora_ga"), backwards(model, LINEAR))
    require_only_kept(model, before)


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_a_copy_of_the_model_has_what_was_measured(kind: str) -> None:
    model, given = LINEAR.build(), config(LINEAR, init_lora_weights=kind)
    if kind == "corda":
        preprocess_corda(model, given, forwards(model, LINEAR))
    else:
        preprocess_loraga(model, given, backwards(model, LINEAR))
    copied = copy.deepcopy(model)
    torch.manual_seed(2)
    expected = graphpeft.get_peft_model(model, given)
    del model
    torch.manual_seed(2)
    assert_same_tensors(graphpeft.get_peft_model(copied, given), expected)


def test_a_batch_of_many_sequences_is_measured_too() -> None:
    model = LINEAR.build()
    given = config(LINEAR, init_lora_weights="corda")
    preprocess_corda(model, given, lambda: call(model, LINEAR.inputs()))
    adapted = graphpeft.get_peft_model(model, given)
    assert_close(outputs(adapted, LINEAR), outputs(LINEAR.build(), LINEAR), 1e-5)


@pytest.mark.parametrize(("kind", "function"), [("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")])
def test_without_measuring_nothing_is_adapted_and_nothing_loaded(kind: str, function: str, tmp_path: Path) -> None:
    model = LINEAR.build()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=rf"needs what {function}\(.*call it first"):
        graphpeft.get_peft_model(model, config(LINEAR, init_lora_weights=kind))
    laws.require_unchanged(model, before, "a refused adaptation")

    ours, _ = with_corda(LINEAR) if kind == "corda" else with_lora_ga(LINEAR)
    ours.save_pretrained(tmp_path)
    with pytest.raises(AdaptError, match=rf"needs what {function}\("):
        graphpeft.PeftModel.from_pretrained(model, tmp_path)
    laws.require_unchanged(model, before, "a refused load")


@pytest.mark.parametrize("case", [CONV_2D, EMBEDDING], ids=str)
@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_what_is_no_linear_layer_is_refused(case: Any, kind: str) -> None:
    with pytest.raises(AdaptError, match="is for linear weights, and it is"):
        graphpeft.get_peft_model(case.build(), config(case, init_lora_weights=kind))
    with pytest.raises(AdaptError, match="target_modules names no linear layer of the Sequential"):
        preprocess_corda(case.build(), config(case, init_lora_weights=kind), pytest.fail)


def test_what_does_not_fit_is_refused_with_its_reason() -> None:
    model = LINEAR.build()
    preprocess_corda(model, config(LINEAR, init_lora_weights="corda"), forwards(model, LINEAR))
    with pytest.raises(AdaptError, match="was called for rank 2, not 3"):
        graphpeft.get_peft_model(model, config(LINEAR, init_lora_weights="corda", r=3))
    with pytest.raises(AdaptError, match="lora_ga needs 2r directions; its rank is 6 at most, and r is 4"):
        graphpeft.get_peft_model(model, config(LINEAR, init_lora_weights="lora_ga", r=4))
    with pytest.raises(AdaptError, match="run_model doesn't run 0"):
        preprocess_corda(model, config(LINEAR, init_lora_weights="corda"), lambda: None)
    with pytest.raises(AdaptError, match="train_step gives 0 no gradient"):
        preprocess_loraga(model, config(LINEAR, init_lora_weights="lora_ga"), lambda: None)
    with pytest.raises(ValueError, match="pass run_model"):
        preprocess_corda(model, config(LINEAR, init_lora_weights="corda"))
    for options, words in (
        ({"corda_config": {"method": "ipm"}, "init_lora_weights": "corda"}, "corda_config has no option 'method'"),
        ({"corda_config": {"corda_method": "x"}, "init_lora_weights": "corda"}, "corda_method must be Literal"),
        ({"lora_ga_config": {"scale": "x"}, "init_lora_weights": "lora_ga"}, "scale must be Literal"),
        ({"lora_ga_config": 3, "init_lora_weights": "lora_ga"}, "must be a LoraGAConfig, a dict"),
    ):
        with pytest.raises(ValueError, match=words):
            config(WITHOUT_BIAS, **options)


def test_nested_options_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    ours, theirs = with_lora_ga(LINEAR, direction="ArBr")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = [graphpeft.PeftConfig.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    assert read[0].to_dict() == read[1].to_dict()
    assert read[0].lora_ga_config == LoraGAConfig(direction="ArBr")  # type: ignore[attr-defined]


# EVA


def with_eva(case: Any, options: dict[str, Any], r: int = 2) -> tuple[Any, Any]:
    ways: dict[str, Any] = (
        {} if case is LLAMA else dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    )
    given: dict[str, Any] = {"init_lora_weights": "eva", "r": r}
    ours = graphpeft.get_peft_model(case.build(), config(case, **given, eva_config=EvaConfig(**options)))
    initialize_lora_eva_weights(ours, batches(case), show_progress_bar=False, **ways)
    theirs = peft.get_peft_model(case.build(), peft_config(case, **given, eva_config=peft.EvaConfig(**options))).eval()
    peft.initialize_lora_eva_weights(theirs, batches(case), show_progress_bar=False, **ways)
    return ours, theirs


TWO_LAYERS = LINEAR._replace(
    name="two-layers",
    make=lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 2)),
    make_inputs=lambda: (torch.randn(4, 3, 12),),
    targets={"target_modules": ["0", "2", "4"]},
)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.5}, {"tau": 0.5, "rho": 1.0}, {"tau": 0.5, "adjust_scaling_factors": False, "rho": 1.4}],
    ids=str,
)
@pytest.mark.parametrize("case", [TWO_LAYERS, LLAMA], ids=str)
def test_evas_values_and_ranks_are_pefts(case: Any, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = with_eva(case, options)
    own, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert own.rank_pattern == other.rank_pattern
    assert own.alpha_pattern == pytest.approx(other.alpha_pattern)
    assert set(own.target_modules) == {name.removeprefix("base_model.model.") for name in other.target_modules}
    compare_with_loads(ours, theirs, case, tmp_path)


def compare_with_loads(ours: Any, theirs: Any, case: Any, folder: Path) -> None:
    assert_same_tensors(ours, theirs, 1e-4)
    assert torch.equal(outputs(ours, case), outputs(case.build(), case))
    perturb(theirs)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    assert_close(outputs(ours, case), outputs(theirs, case), 1e-5)
    assert_trains_alike(ours, theirs, case, 1e-5)
    assert_files_go_both_ways(ours, theirs, case, folder, 1e-5)
    assert_merges_and_unloads(ours, theirs, case, 1e-5)


def test_eva_whitens_and_leaves_out_what_has_no_label() -> None:
    data = [
        batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] > 40, -100)} for batch in batches(LLAMA)
    ]
    options: dict[str, Any] = {"tau": 0.3, "whiten": True, "rho": 1.0}
    model = LLAMA.build()
    # of layers with equal inputs, PEFT divides all but the first more than once
    own: dict[str, Any] = {"init_lora_weights": "eva", "target_modules": ["q_proj", "down_proj"]}
    given = config(LLAMA, **own, eva_config=EvaConfig(**options))
    before = laws.snapshot(model)
    found = get_eva_state_dict(model, data, given, show_progress_bar=False)
    laws.require_unchanged(model, before, "measuring")
    theirs = peft_config(LLAMA, **own, eva_config=peft.EvaConfig(**options))
    expected = peft.get_eva_state_dict(LLAMA.build(), data, theirs, show_progress_bar=False)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert_close(found[name], rows, 1e-4)


def test_directions_draw_no_random_numbers() -> None:
    ways: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    given = config(LINEAR, init_lora_weights="eva", r=2, eva_config=EvaConfig(tau=0.0, rho=1.0))
    model, data = LINEAR.build(), batches(LINEAR)
    state = torch.get_rng_state()
    get_eva_state_dict(model, data, given, show_progress_bar=False, **ways)
    assert torch.equal(torch.get_rng_state(), state)


class Alike(nn.Module):
    """Two layers with the same inputs, so that their directions explain the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(96, 4), nn.Linear(96, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("rank", [9, 11, 12, 13, 14, 15])
def test_of_layers_with_equal_inputs_eva_gives_the_first_the_larger_rank(rank: int) -> None:
    own: dict[str, Any] = {"init_lora_weights": "eva", "r": rank, "rank_pattern": {"other": rank + 1}}
    given = graphpeft.LoraConfig(target_modules=["one", "other"], eva_config=EvaConfig(tau=0.0, rho=2.0), **own)
    data = [{"x": torch.randn(2, 60, 96)} for _ in range(2)]
    ways: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    found = get_eva_state_dict(Alike(), data, given, show_progress_bar=False, **ways)
    assert {name: len(rows) for name, rows in found.items()} == {"one": rank + 1, "other": rank}


def test_eva_leaves_what_else_there_is_as_it_was() -> None:
    config_of_eva = config(TWO_LAYERS, init_lora_weights="eva", r=2, modules_to_save=["2"], bias="all")
    with pytest.warns(UserWarning, match="'2' in target_modules, since modules_to_save trains that fully"):
        model: Any = graphpeft.get_peft_model(TWO_LAYERS.build(), config_of_eva)
    model.add_adapter("another", config(TWO_LAYERS, r=3))
    perturb(model)  # some training
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    ways: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    initialize_lora_eva_weights(model, batches(TWO_LAYERS), show_progress_bar=False, **ways)

    assert list(model.peft_config) == ["default", "another"]
    state = model.state_dict()
    assert {name for name, tensor in others.items() if not torch.equal(state[name], tensor)} == set()


def test_an_option_that_eva_lacks_is_refused_with_directions_at_hand() -> None:
    model = graphpeft.get_peft_model(LINEAR.build(), config(LINEAR, init_lora_weights="eva", r=2))
    directions = {"0": torch.eye(2, 6)}
    with pytest.raises(TypeError, match="forward_function"):
        initialize_lora_eva_weights(model, None, directions, forward_function=None)
    initialize_lora_eva_weights(model, None, directions, lambda model, batch: model(**batch), None, None, "default")


def test_what_eva_cannot_do_is_refused_with_its_reason() -> None:
    plain = graphpeft.get_peft_model(LINEAR.build(), config(LINEAR))
    ways: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    with pytest.raises(ValueError, match="hasn't init_lora_weights='eva'"):
        initialize_lora_eva_weights(plain, batches(LINEAR))
    with pytest.raises(ValueError, match="has no adapter 'default'"):
        initialize_lora_eva_weights(LINEAR.build(), batches(LINEAR))
    model = graphpeft.get_peft_model(LINEAR.build(), config(LINEAR, init_lora_weights="eva"))
    before = laws.snapshot(model)
    small = [{"input": torch.randn(1, 3, 6)}]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "pass a dataloader"),
        ([], ways, "the dataloader is empty"),
        (batches(LINEAR), ways, "eva looks for 4 directions of 0, .* of which its inputs have 6"),
        ([{"input": torch.randn(1, 6)}], ways, "eva looks for 4 directions"),
        (small, ways | {"forward_fn": lambda model, inputs: None}, "forward_fn doesn't run 0"),
        (small, ways | {"eva_state_dict": {"1": torch.zeros(2, 6)}}, "lacks 0; it is of another model"),
    ]
    for data, options, words in cases:
        with pytest.raises(ValueError, match=words):
            initialize_lora_eva_weights(model, data, show_progress_bar=False, **options)
        laws.require_unchanged(model, before, "a refused measurement")
    narrow = graphpeft.get_peft_model(
        LINEAR.build(), config(LINEAR, init_lora_weights="eva", r=3, eva_config={"rho": 1.0})
    )
    with pytest.raises(AdaptError, match="no batch has the 3 rows"):
        initialize_lora_eva_weights(narrow, [{"input": torch.randn(2, 6)}], show_progress_bar=False, **ways)
    with pytest.raises(ValueError, match="rho must be at least 1"):
        config(LINEAR, init_lora_weights="eva", eva_config={"rho": 0.5})
