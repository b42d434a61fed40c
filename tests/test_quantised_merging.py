"""Adapters are merged into quantised weights as PEFT does, taken out again to the bit, or merged without quantising."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torchao.quantization as torchao
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn.modules import Linear4bit, LinearNF4
from interrupting import failing_at_line, lines_of
from oracle import Case, assert_close, config, outputs, perturb
from quantised import CASES, by_bitsandbytes, ours_of, theirs_of
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from graphpeft import (
    AdaptError,
    LoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
    trace,
)
from graphpeft.adapters import merged_codes
from graphpeft.sites import quantisers
from graphpeft.testing import laws
from graphpeft.testing.two_adapters import assert_two_adapters_act_together

pytestmark = [
    # PEFT can merge torchao's weights only in a model that Transformers has loaded, or where it is told the config
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:no gradient goes through a Linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights:UserWarning"),
]

each_kind = pytest.mark.parametrize("case", CASES, ids=str)


@each_kind
def test_merged_is_what_peft_merges(case: Case) -> None:
    expected = outputs(theirs_of(case).merge_and_unload(), case)
    merged = ours_of(case).merge_and_unload()
    assert torch.equal(outputs(merged, case), expected)
    assert [type(layer) for layer in merged] == [type(layer) for layer in case.build().children()]
    assert all(quantisers.is_known(merged[index]) for index in (0, 2))
    assert not merged[0].weight.requires_grad


@each_kind
def test_what_is_merged_for_a_while_is_taken_out_to_the_bit(case: Case) -> None:
    model = ours_of(case)
    before, weight = outputs(model, case), model[0].weight
    model.merge_adapter()
    merged = outputs(model, case)
    assert not torch.equal(merged, before)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        alone = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(outputs(alone, case), merged)
    model.unmerge_adapter()
    assert model[0].weight is weight
    assert torch.equal(outputs(model, case), before)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), outputs(case.build(), case))


@each_kind
def test_a_copy_of_a_merged_model_can_be_unmerged(case: Case) -> None:
    model = ours_of(case)
    before = outputs(model, case)
    model.merge_adapter()
    copies = [copy.deepcopy(model)]
    if "torchao" not in case.name:  # whose quantised models can't be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for copied in copies:
        copied.unmerge_adapter()
        assert torch.equal(outputs(copied, case), before)
    assert model.merged_adapters == ["default"]


@each_kind
def test_without_quantising_again_merged_is_adapted(case: Case) -> None:
    model = ours_of(case)
    adapted, layer = outputs(model, case), model[0]
    merged = model.merge_and_unload(dequantize=True)
    # what rounds inputs, too, rounds them no longer
    rounds_inputs = "of inputs" in case.name or "bitsandbytes int8" in case.name
    tolerance = 2e-2 if rounds_inputs or "bfloat16" in case.name else 1e-6
    assert (outputs(merged, case) - adapted).abs().max() <= tolerance * adapted.abs().max()
    assert merged[0] is layer
    for index in (0, 2):
        assert type(merged[index]) is nn.Linear
        assert type(merged[index].weight) is nn.Parameter
        assert merged[index].weight.dtype == case.inputs()[0].dtype
        plain = nn.Linear(2, 2)
        assert vars(merged[index]).keys() == vars(plain).keys()
        assert not merged[index]._load_state_dict_pre_hooks
    assert torch.equal(outputs(pickle.loads(pickle.dumps(merged)), case), outputs(merged, case))


@each_kind
def test_layers_without_an_adapter_become_plain_as_well(case: Case) -> None:
    model = get_peft_model(case.build(), LoraConfig(target_modules=["0"]))
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged[2]) is nn.Linear
    assert torch.equal(merged[2].weight, quantisers.codes_of(case.build()[2]).numbers().to(merged[2].weight.dtype))  # type: ignore[index]


@each_kind
def test_several_adapters_are_rounded_once_whether_at_once_or_in_turn(case: Case) -> None:
    model = ours_of(case)
    model.add_adapter("second", config(case, r=3, lora_alpha=5, target_modules=["2"]))
    model.set_adapter(["default", "second"])
    perturb(model)
    at_once = outputs(copy.deepcopy(model).merge_and_unload(), case)
    numbers = quantisers.codes_of(model[2]).numbers()
    for name in ("default", "second"):
        A, B = (model[2].get_parameter(f"{name}.lora_{factor}") for factor in "AB")
        numbers = numbers + B @ A * getattr(model[2], name).lora_scaling
    expected = quantisers.quantised(model[2], numbers).numbers()
    before = outputs(model, case)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="are merged already"):
        model.merge_adapter(["second"])
    assert torch.equal(quantisers.codes_of(model[2]).numbers(), expected)
    assert torch.equal(outputs(model, case), at_once)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case), before)


@each_kind
def test_a_failure_at_any_layer_leaves_all_as_they_were(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours_of(case)
    before, snapshot = outputs(model, case), laws.snapshot(model)
    whole = quantisers.quantised

    def failing(layer: nn.Module, numbers: torch.Tensor) -> Any:
        if layer is model[2]:
            raise quantisers.QuantisingError("no room")
        return whole(layer, numbers)

    monkeypatch.setattr(merged_codes.quantisers, "quantised", failing)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match=r"nothing can be merged into the weight of 2: no room; call .*dequantize"):
            merge()
        laws.require_unchanged(model, snapshot, "a failed merge")
        assert torch.equal(outputs(model, case), before)
        assert model.merged_adapters == []


@each_kind
def test_changes_that_are_not_finite_are_refused_and_change_nothing(case: Case) -> None:
    model = ours_of(case)
    with torch.no_grad():
        model[2].default.lora_B[0, 0] = torch.inf
    snapshot = laws.snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match=r"2\.weight with 'default' merged into it isn't finite"):
            merge(safe_merge=True)
        laws.require_unchanged(model, snapshot, "a refused merge")


@each_kind
def test_a_weight_that_two_layers_share_is_not_merged_into(case: Case) -> None:
    model: Any = case.build()
    model[2].weight = model[0].weight
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    with pytest.raises(AdaptError, match=r"0\.weight is tied to 2\.weight, which merging would change too"):
        adapted.merge_adapter()


@each_kind
def test_two_adapters_keep_their_law(case: Case) -> None:
    assert_two_adapters_act_together(case.build, LoraConfig(r=2, target_modules={"0", "2"}), case.inputs())


@each_kind
def test_merging_warns_of_what_it_rounds(case: Case) -> None:
    with pytest.warns(UserWarning, match="merged into the quantised weights of 0, 2, which rounds the sums anew"):
        ours_of(case).merge_adapter()


@each_kind
def test_the_weights_of_a_merged_model_are_not_exchanged(case: Case) -> None:
    model = ours_of(case)
    base = {name: tensor for name, tensor in model.state_dict().items() if "default" not in name}
    model.merge_adapter()
    with pytest.raises(AdaptError, match=r"the state dict has another 0\.weight than the one into which"):
        model.load_state_dict(base, strict=False)


def test_what_is_quantised_in_a_way_that_is_not_known_is_refused_by_name() -> None:
    class Rounded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__torch_function__(*args, **kwargs)

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Rounded), requires_grad=False)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))
    with pytest.raises(
        AdaptError, match=r"whose weight is quantised \(Rounded\); merge the adapter on the model as it"
    ):
        model.merge_and_unload()


def test_a_class_with_code_of_its_own_does_not_become_plain() -> None:
    class Own(LinearNF4):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = get_peft_model(by_bitsandbytes(Own)(), LoraConfig(target_modules=["0"]))
    snapshot = laws.snapshot(model)
    with pytest.raises(AdaptError, match="0 is a Own, whose own code computes with quantised weights"):
        model.merge_and_unload(dequantize=True)
    laws.require_unchanged(model, snapshot, "a refused merge")


@each_kind
def test_a_traced_model_is_merged_alike(case: Case) -> None:
    traced: Any = trace(case.build(), case.inputs())
    torch.manual_seed(2)
    get_peft_model(traced, config(case))
    perturb(traced)
    assert torch.equal(outputs(traced.merge_and_unload(), case), outputs(ours_of(case).merge_and_unload(), case))


def test_codes_that_a_processor_has_repacked_are_read_and_put_back() -> None:
    case = Case("repacked", by_bitsandbytes(LinearNF4), lambda: (torch.randn(4, 64),), {"target_modules": ["0", "2"]})
    model = ours_of(case)
    numbers = quantisers.codes_of(model[0]).numbers()
    weight = model[0].weight
    # what some processors do at the first evaluation
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu
    # the packed scales have half precision
    assert_close(quantisers.codes_of(model[0]).numbers(), numbers, 1e-2)
    assert weight.quant_state.packing_format_for_cpu
    packed = weight.data.clone()
    model.merge_adapter()
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    model.unmerge_adapter()
    assert model[0].weight is weight
    assert torch.equal(weight.data, packed)
    merged = model.merge_and_unload(dequantize=True)
    assert merged[0].weight.dtype == torch.float32


# models that Transformers has quantised

QUANTISED = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "torchao": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes a Llama in half precision, whose layers are as large as a block of 4 bits."""
    folder = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_model_that_transformers_has_quantised_is_prepared_adapted_and_merged_as_by_peft(
    llama: str, kind: str, tmp_path: Path
) -> None:
    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=QUANTISED[kind], dtype=torch.bfloat16)
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                vars(layer)["support_avx512bf16_for_cpu"] = False  # PEFT can't merge what was repacked
        return model.eval()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.arange(14).view(2, 7)).logits

    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    ours: Any = get_peft_model(prepare_model_for_kbit_training(load()), LoraConfig(**options))
    theirs = peft.get_peft_model(peft.prepare_model_for_kbit_training(load()), peft.LoraConfig(**options))  # type: ignore[arg-type]
    set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))  # type: ignore[arg-type]
    adapted = logits(ours.eval())
    # an input is rounded to another code where its last bit differs
    tolerance = 1e-2 if kind == "8 bits" else 1e-5
    assert_close(adapted, logits(theirs.eval()), tolerance)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.merge_adapter()
    theirs.merge_adapter()
    assert_close(logits(ours), logits(theirs), tolerance)
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), adapted)
    merged = ours.merge_and_unload(dequantize=True)
    assert_close(logits(merged), adapted, 2e-2)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=merged.lm_head.weight.dtype)
    assert type(again.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    assert_close(logits(again.eval()), logits(merged), 1e-5)


# interrupted


CHANGES: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: model.merge_adapter(),
    "merge for good": lambda model: model.merge_and_unload(),
    "merge into numbers": lambda model: model.merge_and_unload(dequantize=True),
    "unmerge": lambda model: model.unmerge_adapter(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("case", [each for each in CASES if each.name in ("bitsandbytes nf4", "torchao int8")], ids=str)
def test_an_interruption_at_any_line_of_it_leaves_all_or_nothing(case: Case, name: str) -> None:
    def build() -> Any:
        model = ours_of(case)
        if name == "unmerge":
            model.merge_adapter()
        return model

    def state(model: Any) -> tuple[Any, ...]:
        kinds = tuple((type(layer), type(layer._parameters.get("weight"))) for layer in model)
        return kinds, hasattr(model, "merged_adapters") and model.merged_adapters, outputs(model, case)

    changed = build()
    before = state(changed)
    lines = lines_of(functools.partial(CHANGES[name], changed))
    after = state(changed)
    own = ("adapters/merged_codes.py", "adapters/dequantising.py", "adapters/merging.py", "sites/quantisers.py")
    numbers = {line: number for number, line in enumerate(lines, 1) if line[0] in own}
    assert numbers
    for line, number in numbers.items():
        model = build()
        with contextlib.suppress(KeyboardInterrupt), failing_at_line(number, KeyboardInterrupt):
            CHANGES[name](model)
        found = state(model)
        assert any(found[:2] == each[:2] and torch.equal(found[2], each[2]) for each in (before, after)), line
