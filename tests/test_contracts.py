"""Every method has PEFT's numbers and files, and acts, is merged, trained, compiled and exported as each other one."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from contracts import CONTRACTS, FIRST
from contracts.contract import Contract
from kinds import BOTH_WAYS
from models import BERT, GPT2, LLAMA, T5, Example, call, result
from oracle import TRANSPOSED, Case, assert_close, assert_trains_alike, moved, outputs
from quantised import by_bitsandbytes
from safetensors.torch import load_file
from torch import Tensor
from trainers import losses, tokens, trainer_of

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, PeftType, get_peft_model
from graphpeft.adapters import changes
from graphpeft.rules.registry import registered
from graphpeft.testing import verify
from graphpeft.testing.merging import require_read_as_merged

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}")
    for begins in (
        # PEFT's own warnings, of what is meant here
        "fan_in_fan_out is set to False",
        "Specified to not (save|load)",
        "Sparse invariant checks",
        "Unsupported layer type",
        "Failed to load the CUDA extension",
        "The symmetric initialization can NOT",
        "Detected that the base layer has no bias term",
        "Setting boft_n_butterfly_factor to 1",
        # weights of integers
        "no gradient goes through",
    )
]


def pairs(cases: Callable[[Contract], Iterable[Case]]) -> Any:
    """Returns a mark that runs a test over all contracts, each with these cases."""
    found = [
        pytest.param(contract, case, id=f"{contract}-{case}") for contract in CONTRACTS for case in cases(contract)
    ]
    return pytest.mark.parametrize(("contract", "case"), found)


BY_NAME = {str(contract): contract for contract in CONTRACTS}

each_pair = pairs(lambda contract: contract.cases)
each_method = pytest.mark.parametrize("contract", FIRST, ids=str)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_file(found: Path, expected: Path) -> None:
    ours, theirs = tensors_in(found), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key


def test_every_method_has_a_contract() -> None:
    ours = {name for name, cls in registered().items() if cls.__module__.startswith("graphpeft.")}
    adapts_what_is_named = {name for name in ours if issubclass(registered()[name], graphpeft.TargetedConfig)}
    # one has files of this library's alone, the other needs tasks in each call; test_per_call.py, test_poly.py
    assert {contract.method for contract in FIRST} == adapts_what_is_named - {"GRAPHPEFT_LORA_PER_CALL", "POLY"}


# numbers and files


@each_pair
def test_parameters_are_counted_as_pefts_and_have_its_prefix(contract: Contract, case: Case) -> None:
    model: Any = get_peft_model(case.build(), contract.our_config(case))
    theirs: Any = peft.get_peft_model(case.build(), contract.their_config(case))
    trained, counted = model.get_nb_trainable_parameters()
    trained_there, counted_there = theirs.get_nb_trainable_parameters()
    assert trained == trained_there
    # an adapter that trains biases has copies of them here; PEFT has a number for each of AdaLoRA's sites
    has_copies = contract.our_config(case).trained_biases != "none"
    copied = sum(p.numel() for name, p in model.named_parameters() if has_copies and name.endswith("default.bias"))
    numbers = sum(p.numel() for name, p in theirs.named_parameters() if "ranknum" in name)
    assert counted - copied == counted_there - numbers
    trained_at_sites = [
        name
        for adapted in model._peft_adapters.by_name["default"].sites
        for name, spec in adapted.specs.items()
        if spec.is_trained
    ]
    assert [name for name in trained_at_sites if model.prefix not in name] == []


@each_pair
def test_peft_reads_the_file_and_gives_the_same(contract: Contract, case: Case, tmp_path: Path) -> None:
    model = moved(get_peft_model(case.build(), contract.our_config(case)))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    assert_close(outputs(theirs, case), outputs(model, case), contract.tolerance)


@each_pair
def test_a_file_of_pefts_gives_pefts_outputs_and_is_written_again(
    contract: Contract, case: Case, tmp_path: Path
) -> None:
    theirs = moved(peft.get_peft_model(case.build(), contract.their_config(case)))
    theirs.save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(case.build(), tmp_path).eval()
    expected = outputs(theirs, case)
    assert_close(outputs(model, case), expected, contract.tolerance)
    model.save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", tmp_path)
    if "merge" in contract.refuses:
        with pytest.raises(AdaptError, match=contract.refuses["merge"]):
            model.merge_adapter()
        assert_close(outputs(model, case), expected, contract.tolerance)
    else:
        merged = copy.deepcopy(model).merge_and_unload()
        assert_close(outputs(merged, case), expected, contract.tolerance)
        require_read_as_merged(model, merged, model._peft_adapters.by_name["default"], contract.tolerance)


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize("contract", [each for each in FIRST if "merge" not in each.refuses], ids=str)
def test_what_the_base_becomes_while_an_adapter_is_merged_is_kept_or_the_call_raises(contract: Contract) -> None:
    case = (*contract.cases, *contract.beyond)[0]
    model = moved(get_peft_model(case.build(), contract.our_config(case)))
    model.merge_adapter()
    for path, name in model._peft_adapters.originals:
        weight = model.get_submodule(path)._parameters[name]
        weight.data = weight + torch.linspace(0.1, 0.3, weight.numel()).view_as(weight)
    expected = outputs(model, case)
    assert torch.equal(outputs(copy.deepcopy(model).merge_and_unload(), case), expected)
    if any(changes.asks_of_weights(adapted.rule) for adapted in model._peft_adapters.by_name["default"].sites):
        with pytest.raises(AdaptError, match="depends on the weight itself"):
            model.unmerge_adapter()
        assert torch.equal(outputs(model, case), expected)
    else:
        model.unmerge_adapter()
        assert_close(outputs(model, case), expected, contract.tolerance)


@pytest.mark.filterwarnings("ignore:.*has no effect", "ignore:ensure_weight_tying=True but")
@pytest.mark.parametrize("contract", FIRST, ids=str)
def test_an_option_that_is_set_on_a_config_later_is_read_or_saving_raises(contract: Contract, tmp_path: Path) -> None:
    case = (*contract.cases, *contract.beyond)[0]
    model = moved(get_peft_model(case.build(), contract.our_config(case)))
    config = model.peft_config["default"]
    options = [(name, was) for name, was in vars(config).items() if type(was) in (bool, int, float)]
    for name, was in options:
        setattr(config, name, not was if isinstance(was, bool) else was + 1)
        try:
            model.save_pretrained(tmp_path / name)
        except (AdaptError, ValueError):
            assert not (tmp_path / name).exists() or not any((tmp_path / name).iterdir())
        else:
            loaded = PeftModel.from_pretrained(case.build(), tmp_path / name)
            assert_close(outputs(loaded, case), outputs(model, case), contract.tolerance)
        setattr(config, name, was)


@each_pair
def test_equal_seeds_give_pefts_values_and_then_equal_numbers(contract: Contract, case: Case, tmp_path: Path) -> None:
    following = []
    for library, config in ((peft, contract.their_config(case)), (graphpeft, contract.our_config(case))):
        base = case.build()
        torch.manual_seed(7)
        model: Any = library.get_peft_model(base, config)  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        model.save_pretrained(str(tmp_path / library.__name__))
    assert_same_file(tmp_path / "graphpeft", tmp_path / "peft")
    assert torch.equal(*following)


@pytest.mark.every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_method
def test_a_half_precision_base_has_pefts_dtypes_and_outputs(
    contract: Contract, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = contract.cases[0]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    theirs = peft.get_peft_model(case.build().to(dtype), contract.their_config(case))
    for name, parameter in theirs.named_parameters() if contract.trained_by_mistake else ():
        if contract.trained_by_mistake in name:
            parameter.requires_grad_(False)
    moved(theirs).save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(case.build().to(dtype), tmp_path).eval()
    expected = theirs(*inputs)
    found = model(*inputs)
    assert found.dtype == expected.dtype == dtype
    # a result is rounded to 8 or 11 bits
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
    model.save_pretrained(tmp_path / "again")
    assert_same_file(tmp_path / "again", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("contract", [contract for contract in CONTRACTS if contract.cases], ids=str)
def test_adapters_in_half_precision_give_pefts_outputs(contract: Contract, dtype: torch.dtype) -> None:
    case = contract.cases[0]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    found = []
    for library, config in ((peft, contract.their_config(case)), (graphpeft, contract.our_config(case))):
        torch.manual_seed(1)
        model = library.get_peft_model(case.build().to(dtype), config, autocast_adapter_dtype=False).eval()
        torch.manual_seed(4)
        found.append(model(*inputs))
    torch.testing.assert_close(*found, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@each_method
def test_it_is_made_and_computes_where_this_is_the_default_dtype(contract: Contract, dtype: torch.dtype) -> None:
    case = (*contract.cases, *contract.beyond)[0]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    torch.set_default_dtype(dtype)
    try:
        model = graphpeft.get_peft_model(case.build().to(dtype), contract.our_config(case))
        assert result(model(*inputs)).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_every_law_holds(contract: Contract, case: Case) -> None:
    config = contract.our_config(case)
    verification = verify(case.build(), config, case.inputs(), progress=False, quiet=True)
    silent = {verdict.law[0] for verdict in verification.verdicts if verdict.outcome != "holds"}
    is_alone = config.trained_biases != "none" or "together" in contract.refuses
    expected = {"1": not config.starts_as_identity, "9": is_alone}
    assert silent == {law for law, is_silent in expected.items() if is_silent}, verification


@pairs(lambda contract: contract.beyond)
def test_every_law_holds_where_peft_has_no_layer_for_it(contract: Contract, case: Case) -> None:
    assert_every_law_holds(contract, case)


@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
@each_method
def test_a_weight_that_is_read_both_ways_is_changed_both_ways_or_refused(contract: Contract, case: Case) -> None:
    config = contract.our_config(case)
    if "both ways" in contract.refuses:
        with pytest.raises(AdaptError, match=contract.refuses["both ways"]):
            get_peft_model(case.build(), config)
        return
    assert_every_law_holds(contract, case)


@pairs(lambda contract: contract.cases if contract.trains_alike else ())
def test_a_training_step_has_pefts_outputs_and_gradients(contract: Contract, case: Case, tmp_path: Path) -> None:
    theirs = moved(peft.get_peft_model(case.build(), contract.their_config(case)))
    theirs.save_pretrained(str(tmp_path))
    ours = PeftModel.from_pretrained(case.build(), tmp_path, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path), is_trainable=True)
    assert_trains_alike(ours, theirs, case, contract.tolerance)


# quantised layers


def in_four_bits() -> Any:
    model: Any = by_bitsandbytes(LinearNF4)()
    model.is_loaded_in_4bit = True  # by which PEFT recognises such a model
    return model


QUANTISED = Case("nf4", in_four_bits, lambda: (torch.randn(3, 64),), {"target_modules": ["0", "2"]})
MERGED = ["boft", "hira", "lora", "miss", "oft", "vera"]
ACTIVE = ["adalora", "beft", "gralora", "ia3", "lily", "pvera", "randlora", "road", "vblora"]
"""Contracts whose adapters PEFT can't merge into 4 bits, or fails to."""


@pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights", "ignore:Merge .* module")
@pytest.mark.parametrize("contract", [BY_NAME[name] for name in (*MERGED, *ACTIVE)], ids=str)
def test_quantised_layers_have_pefts_outputs_active_and_merged(contract: Contract) -> None:
    theirs = moved(peft.get_peft_model(QUANTISED.build(), contract.their_config(QUANTISED)))
    model: Any = get_peft_model(QUANTISED.build(), contract.our_config(QUANTISED)).eval()
    graphpeft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs))
    active = outputs(model, QUANTISED)
    assert_close(active, outputs(theirs, QUANTISED), contract.tolerance)
    if str(contract) in MERGED:
        theirs.merge_adapter()
        model.merge_adapter()
        assert_close(outputs(model, QUANTISED), outputs(theirs, QUANTISED), contract.tolerance)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, QUANTISED), active)


# several adapters


OF_ONE_KIND = tuple(PeftType(name) for name in ("FROD", "IA3", "MISS", "PVERA", "RANDLORA", "TINYLORA", "VERA"))
"""Methods whose adapters need equal options in PEFT to stand beside each other."""


def second_beside(contract: Contract, case: Case) -> Contract:
    """Returns the contract of a second adapter of the same method: the next one, if PEFT takes it."""
    refusal = contract.refuses.get("together")
    alike = [each for each in CONTRACTS if each.ours is contract.ours and each.refuses.get("together") == refusal]
    fitting = [each for each in alike if case in each.cases]
    return contract if contract.method in OF_ONE_KIND else fitting[(fitting.index(contract) + 1) % len(fitting)]


UNLIKE_MERGED = (PeftType.C3A, PeftType.OFT, PeftType.OSF)
"""Methods whose two active adapters fail in PEFT, or differ from the merged ones."""


@pairs(lambda contract: contract.cases[:1])
def test_two_active_adapters_compute_what_pefts_do(contract: Contract, case: Case) -> None:
    other = second_beside(contract, case)
    # PEFT refuses trained biases beside another adapter
    alone: Any = {"bias": "none"} if hasattr(contract.our_config(case), "bias") else {}
    both = ["default", "second"]
    theirs: Any = peft.get_peft_model(case.build(), contract.their_config(case, **alone))
    # PEFT trains one adapter of AdaLoRA at most
    theirs.add_adapter("second", other.their_config(case, **alone, inference_mode=True))
    model: Any = get_peft_model(case.build(), contract.our_config(case, **alone))
    model.add_adapter("second", other.our_config(case, **alone))
    if "together" in contract.refuses:
        with pytest.raises(AdaptError, match=contract.refuses["together"]):
            model.set_adapter(both)
        return
    theirs.base_model.set_adapter(both)
    moved(theirs)
    for name in both:
        graphpeft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(theirs, adapter_name=name), name)
    model.set_adapter(both)
    active = outputs(model.eval(), case)
    if contract.method not in UNLIKE_MERGED:
        assert_close(active, outputs(theirs.eval(), case), contract.tolerance)
    if "merge" not in contract.refuses:
        theirs.merge_adapter()
        assert_close(active, outputs(theirs.eval(), case), contract.tolerance)
        model.merge_adapter()
        assert_close(outputs(model, case), active, contract.tolerance)


OF_OTHER_RULES = ("dora", "bdlora", "kasa", "monteclora", "velora", "ia3-inputs", "miss-bat")
IN_ROWS = [*FIRST, *(BY_NAME[name] for name in OF_OTHER_RULES)]
"""The first contract of each method, and those of which the rule is of another base."""


@pytest.mark.parametrize("contract", IN_ROWS, ids=str)
def test_rows_of_a_batch_have_adapters_of_this_method_of_another_or_none(contract: Contract) -> None:
    case = contract.cases[0]
    model: Any = get_peft_model(case.build(), contract.our_config(case))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **case.targets))
    model.add_adapter("second", contract.our_config(case))
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        moved(model, seed)
    (x,) = case.inputs()
    names = ["default", "__base__", "other", "second"]
    given = torch.cat((x, x))[: len(names)]
    if "rows" in contract.refuses:
        with pytest.raises(AdaptError, match=contract.refuses["rows"]):
            model(given, adapter_names=names)
        return
    found, alone = model(given, adapter_names=names), []
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else [name])
        alone.append(model(given))
        torch.testing.assert_close(found[row], alone[-1][row])
    assert not any(torch.allclose(one, other, atol=1e-4) for one, other in itertools.combinations(alone, 2))


# a whole model


OF_NAMES = (PeftType.LN_TUNING, PeftType.TRAINABLE_TOKENS)
"""Methods that train tensors of the model by their names, whatever layers have them."""

WITH_DEFAULTS = [
    (contract, example)
    for contract in FIRST
    for example in (LLAMA, BERT, T5, GPT2)
    # PEFT's other methods don't take the layers of GPT-2
    if example is not GPT2 or TRANSPOSED in contract.cases or contract.method in OF_NAMES
]


@pytest.mark.parametrize(("contract", "example"), WITH_DEFAULTS, ids=str)
def test_defaults_name_the_targets_that_pefts_do(contract: Contract, example: Example) -> None:
    options: Any = {name: value for name, value in contract.options.items() if name != "feedforward_modules"}
    our_config, their_config = contract.ours(**options), contract.theirs(**options)
    if contract.method is PeftType.LN_TUNING and example is BERT:
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            peft.get_peft_model(example.build(), their_config)
        with pytest.raises(AdaptError, match="no default target_modules are known"):
            get_peft_model(example.build(), our_config)
        return
    expected: Any = moved(peft.get_peft_model(example.build(), their_config))
    model: Any = get_peft_model(example.build(), our_config).eval()
    values = peft.get_peft_model_state_dict(expected)
    assert graphpeft.get_peft_model_state_dict(model).keys() == values.keys()
    graphpeft.set_peft_model_state_dict(model, values)
    found, expected = (result(call(each, example.inputs())) for each in (model, expected))
    assert_close(found, expected, contract.tolerance)


@pytest.mark.parametrize("contract", [*FIRST, BY_NAME["dora"]], ids=str)
def test_a_llama_has_pefts_outputs_active_merged_and_beside_lora(contract: Contract, tmp_path: Path) -> None:
    theirs = moved(peft.get_peft_model(LLAMA.build(), contract.their_config()))
    theirs.save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, atol=1e-4, rtol=1e-4)
        if "merge" in contract.refuses:
            return
        if "merge llama" in contract.refuses:
            with pytest.raises(AdaptError, match=contract.refuses["merge llama"]):
                model.merge_adapter()
            return
        model.add_adapter("lora", LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", init_lora_weights=False))
        model.set_adapter(["lora", "default"])
        active = model(input_ids=tokens()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=tokens()).logits, active, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        model.set_adapter("default")
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, atol=1e-4, rtol=1e-4)


@each_method
def test_a_trainer_gives_pefts_losses_and_goes_on_from_a_checkpoint(contract: Contract, tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for library, config in ((peft, contract.their_config()), (graphpeft, contract.our_config())):
        base = LLAMA.build()
        torch.manual_seed(5)
        model: Any = library.get_peft_model(base, config)  # type: ignore[attr-defined]
        trainer = trainer_of(model, tmp_path / library.__name__)
        trainer.train()
        found[library.__name__] = losses(trainer)
    assert len(set(found["graphpeft"])) == 4
    if contract.trains_alike:
        assert found["graphpeft"] == pytest.approx(found["peft"], rel=1e-4)
    base = LLAMA.build()
    torch.manual_seed(5)
    again = trainer_of(get_peft_model(base, contract.our_config()), tmp_path / "again")
    again.train(str(tmp_path / "graphpeft" / "checkpoint-2"))
    assert losses(again) == pytest.approx(found["graphpeft"], rel=1e-5)


# compiled and exported


# a method with Fourier transforms runs PyTorch's own kernels for them, and inductor says once that it makes none
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
@each_method
def test_compiled_it_computes_and_trains_the_same(contract: Contract, backend: str) -> None:
    case = contract.cases[0]
    model: Any = moved(get_peft_model(case.build(), contract.our_config(case)))
    # else it draws numbers of its own
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True, options=options)
    assert_close(outputs(compiled, case), outputs(model, case), 1e-5)
    named = {name: tensor for name, tensor in model.train().named_parameters() if tensor.requires_grad}
    gradients = []
    for run in (model, compiled):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(run(*case.inputs()).square().mean(), [*named.values()]))
    for name, expected, got in zip(named, *gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4, msg=name)


# a merged model has the operations of the base, whatever the method
EXPORTS = [
    (contract, adapters, suffix)
    for contract, adapters, suffix in itertools.product(FIRST, ("merged", "baked"), ("pt2", "onnx"))
    if adapters == "baked" or contract.method in ("LORA", *OF_NAMES) or "merge" in contract.refuses
]


@pytest.mark.parametrize(("contract", "adapters", "suffix"), EXPORTS, ids=str)
def test_exported_it_computes_the_same(contract: Contract, adapters: str, suffix: str, tmp_path: Path) -> None:
    case = contract.cases[0]
    model: Any = moved(get_peft_model(case.build(), contract.our_config(case)))
    refused = {"merge"} & {*contract.refuses} if adapters == "merged" else {suffix} & {*contract.refuses}
    export = functools.partial(graphpeft.export, model, case.inputs(), tmp_path / f"model.{suffix}", format=suffix)
    if refused:
        with pytest.raises((AdaptError, graphpeft.ExportError), match=contract.refuses[refused.pop()]):
            export(adapters=adapters)
        return
    export(adapters=adapters)
    if suffix == "pt2":
        found = torch.export.load(tmp_path / "model.pt2").module()(*case.inputs())
    else:
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, case.inputs(), strict=True)}
        found = torch.from_numpy(session.run(None, given)[0])
    assert_close(found, outputs(model, case), 1e-5)


NEEDS_NUMBERS = frozenset({"adamss", "frod", "osf", "psoft"})
"""The methods with tensors that follow from the base's numbers, and aren't in files."""


@each_method
def test_an_adapter_is_loaded_onto_a_base_without_numbers_or_refused(contract: Contract, tmp_path: Path) -> None:
    case = contract.cases[0]
    get_peft_model(case.build(), contract.our_config(case)).save_pretrained(str(tmp_path))
    with torch.device("meta"):
        base = case.make()
    before = [(path, type(module), [*module._parameters]) for path, module in base.named_modules()]
    if str(contract) in NEEDS_NUMBERS:
        with pytest.raises(AdaptError, match="load the model"):
            PeftModel.from_pretrained(base, tmp_path)
        assert [(path, type(module), [*module._parameters]) for path, module in base.named_modules()] == before
        return
    loaded: Any = PeftModel.from_pretrained(base, tmp_path)
    loaded.save_pretrained(str(tmp_path / "again"))
    assert_same_file(tmp_path / "again", tmp_path)
