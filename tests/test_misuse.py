"""What PEFT takes and the user can't have meant is refused or warned of, with the place, the reason and a way out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from models import MLP, VOCABULARY, llama_config, output
from refusals import refused
from torch import nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, GuardError, LoraConfig, PeftConfig, PeftModel, get_peft_model
from graphpeft.adapters.base_names import warn_of_other_base


@contextlib.contextmanager
def warned(*words: str) -> Iterator[None]:
    """Expects one warning, which has all of `words` and names a line of this file."""
    with pytest.warns(UserWarning, match=re.escape(words[0])) as caught:
        yield
    [warning] = caught
    for word in words:
        assert word in str(warning.message)
    assert warning.filename == __file__


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), **options)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(**options)).eval()


# a model or a config that is none


GIVEN_AS_MODEL: list[tuple[Any, list[str]]] = [
    (nn.Linear, ["model is the class Linear", "pass an instance", "Linear(…)"]),
    (transformers.LlamaForCausalLM, ["the class LlamaForCausalLM", "LlamaForCausalLM.from_pretrained(…)"]),
    ("some/model", ["model is 'some/model'", "load that model first", "PeftModel.from_pretrained(model, folder)"]),
    (LoraConfig(target_modules=["up"]), ["model is a LoraConfig", "get_peft_model(model, config)"]),
    ([nn.Linear(1, 1)], ["model is a list", "nn.Module"]),
    (None, ["model is a NoneType", "nn.Module"]),
]


@pytest.mark.parametrize(("given", "words"), GIVEN_AS_MODEL)
def test_a_model_that_is_none_is_told_from_one(given: Any, words: list[str], tmp_path: Path) -> None:
    get_peft_model(MLP.build(), lora("up")).save_pretrained(tmp_path)
    for use in (
        lambda: get_peft_model(given, lora("up")),
        lambda: graphpeft.explain(given, lora("up")),
        lambda: PeftModel.from_pretrained(given, tmp_path),
    ):
        with pytest.raises(TypeError) as caught:
            use()
        for word in words:
            assert word in str(caught.value)


GIVEN_AS_CONFIG: list[tuple[Any, list[str]]] = [
    (LoraConfig, ["config is the class LoraConfig", "pass an instance", "LoraConfig(…)"]),
    (peft.LoraConfig, ["config is the class LoraConfig", "pass an instance"]),
    ({"r": 2}, ["config is a dict", "LoraConfig(**…)"]),
    ({"peft_type": "LORA", "r": 2}, ["config is a dict", "PeftConfig.from_dict(…)"]),
    ("some/adapter", ["'some/adapter'", "PeftConfig.from_pretrained", "PeftModel.from_pretrained(model, folder)"]),
    (Path("adapter"), ["PosixPath('adapter')", "PeftConfig.from_pretrained(folder)"]),
    (nn.Linear(1, 1), ["config is a Linear", "the model first", "LoraConfig(…)"]),
]


@pytest.mark.parametrize(("given", "words"), GIVEN_AS_CONFIG)
def test_a_config_that_is_none_is_told_from_one(given: Any, words: list[str], tmp_path: Path) -> None:
    adapted = get_peft_model(MLP.build(), lora("up"), "first")
    adapted.save_pretrained(tmp_path)
    for model, use in (
        (MLP.build(), lambda model: get_peft_model(model, given)),
        (MLP.build(), lambda model: graphpeft.explain(model, given)),
        (MLP.build(), lambda model: PeftModel.from_pretrained(model, tmp_path / "first", config=given)),
        (adapted, lambda model: model.add_adapter("second", given)),
    ):
        with refused(model, TypeError, *words):
            use(model)


def test_arguments_in_another_order_are_told() -> None:
    model = get_peft_model(MLP.build(), lora("up"))
    swapped: Any = model.add_adapter
    with refused(model, TypeError, "model.add_adapter(adapter_name, config)"):
        swapped(lora("up"), "second")
    base, other = MLP.build(), cast("Any", nn.Linear(1, 1))
    with refused(base, TypeError, "config is a Linear", "pass the model first"):
        get_peft_model(base, other)


def test_a_config_in_place_of_a_folder_is_told_from_one() -> None:
    model: Any = MLP.build()
    given: Any = lora("up")
    with refused(model, TypeError, "model_id is a LoraConfig", "folder", "get_peft_model(model, config)"):
        PeftModel.from_pretrained(model, given)
    adapted = get_peft_model(model, lora("up"))
    with refused(adapted, TypeError, "model_id is a LoraConfig"):
        adapted.load_adapter(given, "second")


# a model that PEFT has adapted


def injected(model: Any) -> Any:
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), model)


def inside(model: Any) -> Any:
    return nn.ModuleDict({"encoder": peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))})


def wrapped(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))


def base_of_wrapped(model: Any) -> Any:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    return model


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (wrapped, "the model is a PeftModel of PEFT"),
        (base_of_wrapped, "first.up is a Linear of PEFT"),
        (injected, "first.up is a Linear of PEFT"),
        (inside, "encoder is a PeftModel of PEFT"),
    ],
)
def test_a_model_that_peft_has_adapted_is_refused(wrap: Callable[[Any], Any], place: str, tmp_path: Path) -> None:
    get_peft_model(MLP.build(), lora("up")).save_pretrained(tmp_path)
    model = wrap(MLP.build())
    words = (place, "merge_and_unload() or unload()", "PeftModel.from_pretrained(model, folder)")
    with refused(model, AdaptError, *words):
        get_peft_model(model, lora("down"))
    with refused(model, AdaptError, *words):
        graphpeft.explain(model, lora("down"))
    with refused(model, AdaptError, *words):
        PeftModel.from_pretrained(model, tmp_path)


def test_a_prompt_of_pefts_is_refused_too() -> None:
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = peft.get_peft_model(llama(), config)
    with refused(model, AdaptError, "the model is a PeftModelForCausalLM of PEFT"):
        get_peft_model(model, lora("q_proj"))


@pytest.mark.parametrize("way_out", ["unload", "merge_and_unload"])
def test_what_peft_gives_back_is_adapted(way_out: str) -> None:
    base = getattr(wrapped(MLP.build()), way_out)()
    assert get_peft_model(base, lora("up")) is base


def test_peft_isnt_imported_for_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    get_peft_model(MLP.build(), lora("up"))
    assert "peft" not in sys.modules


# a task of which the model has no head


@pytest.mark.parametrize("adapt", [get_peft_model, graphpeft.explain])
@pytest.mark.parametrize(
    ("cls", "task", "words"),
    [
        ("LlamaForCausalLM", "SEQ_CLS", ["classifier or score", "CAUSAL_LM", "AutoModelForSequenceClassification"]),
        ("LlamaForCausalLM", "TOKEN_CLS", ["classifier or score", "CAUSAL_LM", "AutoModelForTokenClassification"]),
        ("LlamaForCausalLM", "QUESTION_ANS", ["qa_outputs", "CAUSAL_LM", "AutoModelForQuestionAnswering"]),
        ("LlamaModel", "SEQ_CLS", ["classifier or score", "FEATURE_EXTRACTION"]),
        ("LlamaForSequenceClassification", "QUESTION_ANS", ["qa_outputs", "SEQ_CLS"]),
    ],
)
def test_a_task_without_its_head_is_warned_of(adapt: Any, cls: str, task: Any, words: list[str]) -> None:
    model = getattr(transformers, cls)(llama_config())
    with warned(f"task_type {task}", f"{cls} has none", *words):
        adapt(model, lora("q_proj", task_type=task))


def test_a_task_of_a_class_with_two_stacks_is_told() -> None:
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with warned("T5ForConditionalGeneration has none", "set task_type SEQ_2_SEQ_LM"):
        get_peft_model(transformers.T5ForConditionalGeneration(config), lora("q", task_type="SEQ_CLS"))


def test_a_class_that_is_for_no_task_is_told_to_have_none() -> None:
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with warned("BertForMaskedLM has none", "leave task_type None"):
        get_peft_model(transformers.BertForMaskedLM(config), lora("query", task_type="SEQ_CLS"))


def bart() -> Any:
    sizes: dict[str, Any] = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1}
    return transformers.BartForSequenceClassification(
        transformers.BartConfig(vocab_size=9, d_model=8, **sizes, **heads, **layers)
    )


def test_a_head_of_another_name_is_warned_of_and_its_name_said() -> None:
    model = bart()
    with warned("BartForSequenceClassification has none", "stays frozen", "modules_to_save", "['classification_head']"):
        get_peft_model(model, lora("q_proj", task_type="SEQ_CLS"))
    assert not any(parameter.requires_grad for parameter in model.classification_head.parameters())


def test_a_head_that_the_user_names_is_not_warned_of() -> None:
    get_peft_model(bart(), lora("q_proj", task_type="SEQ_CLS", modules_to_save=["classification_head"]))


class OwnClassifier(transformers.LlamaPreTrainedModel):
    """A model of a user's own on Transformers' base class, whose head nobody else knows."""

    def __init__(self) -> None:
        super().__init__(llama_config())
        self.model = transformers.LlamaModel(llama_config())
        self.sorts = nn.Linear(32, 2)


@pytest.mark.parametrize(
    ("build", "target", "task"),
    [
        (lambda: transformers.LlamaForSequenceClassification(llama_config()), "q_proj", "SEQ_CLS"),
        (lambda: transformers.LlamaForTokenClassification(llama_config()), "q_proj", "TOKEN_CLS"),
        (lambda: transformers.LlamaForQuestionAnswering(llama_config()), "q_proj", "QUESTION_ANS"),
        (lambda: transformers.LlamaModel(llama_config()), "q_proj", "FEATURE_EXTRACTION"),
        (llama, "q_proj", "CAUSAL_LM"),
        (llama, "q_proj", None),
        (OwnClassifier, "q_proj", "SEQ_CLS"),
        (MLP.build, "up", "SEQ_CLS"),
    ],
)
def test_a_task_that_fits_or_cant_be_judged_is_not_warned_of(build: Any, target: str, task: Any) -> None:
    # a warning is an error in these tests
    get_peft_model(build(), lora(target, task_type=task))


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = llama()
    with refused(model, UserWarning, "LlamaForCausalLM has none"):
        get_peft_model(model, lora("q_proj", task_type="SEQ_CLS"))


# adapted, or fully trained


class Blocks(nn.Module):
    """Modules inside of others, and a parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"inner": nn.Linear(4, 4)})
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["inner"](self.up(x)) @ self.w


@pytest.mark.parametrize("adapt", [get_peft_model, graphpeft.explain])
@pytest.mark.parametrize(
    ("entry", "saved"), [("inner", "inner"), ("block.inner", "block"), ("inner", "block"), ("block", "block")]
)
def test_a_target_that_is_fully_trained_instead_is_warned_of(adapt: Any, entry: str, saved: str) -> None:
    with warned(f"'{entry}' in target_modules", "modules_to_save trains that fully", "Blocks"):
        adapt(Blocks(), lora("up", entry, modules_to_save=[saved]))


def test_a_parameter_that_is_fully_trained_instead_is_warned_of() -> None:
    model = nn.ModuleDict({"part": Blocks(), "up": nn.Linear(4, 4)})
    with warned("'part.w' in target_modules", "modules_to_save trains that fully"):
        graphpeft.explain(model, LoraConfig(target_modules=["up", "part.w"], modules_to_save=["part"]))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up", "inner"], "exclude_modules": ["inner"]},
        {"target_modules": ["up", "inner"], "exclude_modules": ["inner"], "modules_to_save": ["inner"]},
        {"target_modules": ["up"], "modules_to_save": ["inner"]},
        {"target_modules": r"up|.*inner", "modules_to_save": ["inner"]},
        {"target_modules": "all-linear", "modules_to_save": ["inner"]},
        {"target_modules": ["up", "inner"], "bias": "all"},
    ],
)
def test_a_target_that_is_left_out_on_purpose_is_not_warned_of(options: dict[str, Any]) -> None:
    get_peft_model(Blocks(), LoraConfig(**options))


def test_an_entry_that_is_adapted_elsewhere_is_not_warned_of() -> None:
    model = nn.ModuleDict({"first": Blocks(), "second": Blocks()})
    graphpeft.explain(model, lora("inner", modules_to_save=["second"]))


def test_a_parameter_that_is_trained_both_ways_is_warned_of_by_its_options() -> None:
    model = nn.Sequential(Blocks(), nn.Linear(4, 4))
    config = LoraConfig(target_modules=["1"], target_parameters=["0.w"], modules_to_save=["0"])
    with warned("fully trains 0.w", "target_parameters", "name a weight in one of them"):
        get_peft_model(model, config)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_is_trained_and_changed_is_merged_by_the_way_out(bias: Any) -> None:
    model = get_peft_model(Blocks(), lora("up", bias=bias, lora_bias=True, init_lora_weights=False))
    x = torch.randn(2, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    adapted = model(x)
    with refused(model, AdaptError, "up.bias", "call merge_and_unload()"):
        model.merge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


# modules that are exchanged, or get another size


ON_THE_VOCABULARY: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "fully trained": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting config.tie_word_embeddings to False")
@pytest.mark.parametrize("options", ON_THE_VOCABULARY.values(), ids=ON_THE_VOCABULARY.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_on_which_an_adapter_is_keeps_its_size(options: dict[str, Any], tied: bool) -> None:
    model = get_peft_model(llama(tie_word_embeddings=tied), LoraConfig(r=2, **options))
    for arguments in ((VOCABULARY + 3,), (VOCABULARY, 48), (None, 48)):
        with refused(model, AdaptError, "'default'", "resize_token_embeddings", "before you adapt it", "unload()"):
            model.resize_token_embeddings(*arguments)
    base = model.unload()
    base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    assert base.lm_head.weight.shape == base.model.embed_tokens.weight.shape == (VOCABULARY + 3, 32)


def test_a_size_that_the_vocabulary_has_is_no_change() -> None:
    model = get_peft_model(llama(), lora("embed_tokens", "lm_head"))
    for size in (None, VOCABULARY):
        assert model.resize_token_embeddings(size) is model.get_input_embeddings()


def test_a_vocabulary_beside_an_adapter_is_resized() -> None:
    model = get_peft_model(llama(), lora("q_proj", init_lora_weights=False))
    model.resize_token_embeddings(VOCABULARY + 3, pad_to_multiple_of=8, mean_resizing=False)
    assert model(torch.tensor([[VOCABULARY + 2]])).logits.shape == (1, 1, VOCABULARY + 8)


def test_a_table_that_a_part_of_the_model_has_resized_is_not_saved_beside_an_adapter_of_the_old_size(
    tmp_path: Path,
) -> None:
    model = get_peft_model(llama(), lora("embed_tokens"))
    model.model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    for use in (
        lambda: model.save_pretrained(tmp_path),
        lambda: graphpeft.get_peft_model_state_dict(model),
    ):
        with refused(model, AdaptError, f"({VOCABULARY + 3}, 32) now, and had ({VOCABULARY}, 32)", "before you adapt"):
            use()
    assert not list(tmp_path.iterdir())


def exchanged(*adapters: str) -> Any:
    """Returns a model in which somebody has put another layer in the place of an adapted one."""
    model: Any = MLP.build()
    for name in adapters:
        get_peft_model(model, lora("up", "head"), name)
    model.set_adapter(list(adapters))
    put_past_the_check(model, "head", nn.Linear(8, 5))
    return model


def put_past_the_check(module: Any, name: str, new: nn.Module) -> None:
    """Exchanges a submodule without an assignment, which would be refused."""
    module._modules[name] = new


def in_disabled(model: Any) -> None:
    with model.disable_adapter():
        pass


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter("default"),
        in_disabled,
        lambda model: model.disable_adapters(),
        lambda model: graphpeft.get_peft_model_state_dict(model),
        lambda model: graphpeft.set_peft_model_state_dict(model, {}),
        lambda model: model.save_pretrained("unwritten"),
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
    ],
)
def test_an_adapter_whose_module_was_exchanged_is_used_no_longer(use: Callable[[Any], Any]) -> None:
    model = exchanged("default")
    with refused(model, AdaptError, "head.default.lora_A of adapter 'default' is gone", "put it back, or delete"):
        use(model)
    assert not Path("unwritten").exists()


def test_an_adapter_whose_module_was_taken_out_is_not_saved(tmp_path: Path) -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora("0", "1"))
    del model[1]
    with refused(model, AdaptError, "1.default.lora_A of adapter 'default' is gone"):
        model.save_pretrained(tmp_path)


def test_an_adapter_is_not_activated_where_its_module_was_exchanged() -> None:
    model = exchanged("default", "second")
    model.set_adapter([])
    for name in ("default", "second"):
        with refused(model, AdaptError, f"head.{name}.lora_A of adapter '{name}' is gone"):
            model.set_adapter(name)


@pytest.mark.parametrize("mend", ["put back", "delete"])
def test_adapters_remain_disabled_where_a_module_was_exchanged_meanwhile(mend: str) -> None:
    model: Any = get_peft_model(MLP.build(), lora("up", "head", init_lora_weights=False))
    head, x = model.head, MLP.inputs()
    adapted = output(model, x)
    disabled = model.disable_adapter()
    disabled.__enter__()
    base = output(model, x)
    put_past_the_check(model, "head", nn.Linear(8, 5))
    with pytest.raises(AdaptError, match=r"head\.default\.lora_A of adapter 'default' is gone"):
        disabled.__exit__(None, None, None)
    if mend == "delete":
        model.delete_adapter("default")
    model.head = head
    assert torch.equal(output(model, x), base)
    model.enable_adapters()
    assert torch.equal(output(model, x), base if mend == "delete" else adapted)


def test_a_swap_does_not_go_where_a_module_was_exchanged(tmp_path: Path) -> None:
    get_peft_model(MLP.build(), lora("up", "head")).save_pretrained(tmp_path)
    model = exchanged("default")
    with refused(model, AdaptError, "head.default.lora_A of adapter 'default' is gone"):
        graphpeft.hotswap_adapter(model, tmp_path, "default")


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_such_adapters_are_taken_off(order: list[str]) -> None:
    model = exchanged("default", "second")
    head, x = model.head, MLP.inputs()
    model.set_adapter([])
    for name in order:
        model.delete_adapter(name)
    expected = output(exchanged("default", "second").unload().eval(), x).shape
    assert output(model, x).shape == expected
    assert type(model.head) is nn.Linear
    assert model.head is head


def test_a_module_that_is_put_back_acts_again() -> None:
    model: Any = get_peft_model(MLP.build(), lora("up", "head", init_lora_weights=False))
    x, head = MLP.inputs(), model.head
    before = output(model, x)
    put_past_the_check(model, "head", nn.Linear(8, 5))
    model.head = head
    in_disabled(model)
    assert torch.equal(output(model, x), before)


def test_what_is_trained_and_in_no_adapter_is_told_where_it_would_be_lost(tmp_path: Path) -> None:
    model: Any = get_peft_model(MLP.build(), lora("up"))
    model.head = nn.Linear(8, 5)
    with warned("head.weight, head.bias require gradients and belong to no adapter", "modules_to_save"):
        model.save_pretrained(tmp_path)
    model.head.requires_grad_(False)
    model.save_pretrained(tmp_path)


def test_where_that_warning_is_an_error_nothing_is_written(tmp_path: Path) -> None:
    model = get_peft_model(MLP.build(), lora("up")).requires_grad_(True)
    with refused(model, UserWarning, "first.up.weight", "and belong to no adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# an adapter of another base


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter whose base is called owner/base."""
    get_peft_model(llama(), lora("q_proj")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "owner/base"}))
    return tmp_path


def named(name: Any, **options: Any) -> Any:
    model = llama(**options)
    model.name_or_path = name
    return model


def test_an_adapter_of_a_base_of_another_name_is_warned_of(saved: Path) -> None:
    words = ("'owner/base'", "'owner/other'", "base_model_name_or_path")
    with warned(*words):
        model = PeftModel.from_pretrained(named("owner/other"), saved)
    with warned(*words):
        model.load_adapter(saved, "second")
    with warned(*words):
        graphpeft.hotswap_adapter(model, saved, "second")


def test_such_a_warning_that_is_an_error_leaves_the_model_as_it_was(saved: Path) -> None:
    model = named("owner/other")
    with refused(model, UserWarning, "'owner/base'"):
        PeftModel.from_pretrained(model, saved)


def test_such_a_warning_is_silenced_by_the_config(saved: Path) -> None:
    config = PeftConfig.from_pretrained(saved)
    config.base_model_name_or_path = "owner/other"
    PeftModel.from_pretrained(named("owner/other"), saved, config=config)


@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [
        ("owner/base", "owner/base"),
        ("owner/base", "/data/models/base"),
        ("/data/models/base/", "owner/Base"),
        ("owner/base", "mirror/base"),
        ("owner/base", r"C:\models\base"),
        ("owner/base", "/root/.cache/huggingface/hub/models--owner--base/snapshots/0123456789abcdef"),
        ("base", "/hub/models--base/snapshots/0123456789abcdef"),
        ("owner/base", ""),
        ("owner/base", None),
        (None, "owner/base"),
        ("", "owner/base"),
        ("./", "owner/base"),
    ],
)
def test_names_that_may_be_of_one_base_are_not_warned_of(of_file: Any, of_model: Any) -> None:
    model: Any = nn.Linear(1, 1)
    model.name_or_path = of_model
    warn_of_other_base(model, LoraConfig(base_model_name_or_path=of_file), stacklevel=1)


@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [
        ("owner/base-7b", "owner/base-13b"),
        ("owner/base", "/hub/models--owner--other/snapshots/0123456789abcdef"),
        ("/out/checkpoint-500", "/out/checkpoint-1000"),
    ],
)
def test_names_of_two_bases_are_warned_of(of_file: str, of_model: str) -> None:
    model: Any = nn.Linear(1, 1)
    model.name_or_path = of_model
    with pytest.warns(UserWarning, match=f"{re.escape(repr(of_file))}.*{re.escape(repr(of_model))}"):
        warn_of_other_base(model, LoraConfig(base_model_name_or_path=of_file), stacklevel=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/other", ["'owner/base'", "'owner/other'"]),
        ("", ["'owner/base'", "a LlamaForCausalLM without a name"]),
    ],
)
def test_a_file_that_doesnt_fit_names_both_bases(name: str, words: list[str], saved: Path) -> None:
    model = named(name, hidden_size=16)
    with refused(model, CheckpointError, "q_proj.lora_A.weight of shape (2, 32)", *words):
        PeftModel.from_pretrained(model, saved)


def test_a_file_that_doesnt_fit_a_base_of_its_name_says_nothing_of_names(saved: Path) -> None:
    model = named("mirror/base", hidden_size=16)
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(model, saved)
    assert "owner/base" not in str(caught.value)


def test_an_adapter_goes_onto_its_own_base_from_the_disk(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora("q_proj", task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == os.fspath(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        PeftModel.from_pretrained(
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )


# what a new user runs into


class Recurrent(nn.Module):
    """Decides on its inputs, so that its own forward runs on changed weights, some of which a container holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.held = nn.ParameterDict({"up": torch.randn(4, 8) / 2, "down": torch.randn(8, 4) / 3})
        self.step = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:, 0]
        for time in range(1, x.shape[1]):
            y = torch.tanh(nn.functional.linear(y, self.step) + x[:, time])
        return torch.relu(y @ self.held["up"]) @ self.held["down"]


@pytest.mark.parametrize("entries", [["step", "up", "down"], ["up", "step"], ["up", "down"], ["step"]], ids=" ".join)
def test_weights_of_a_container_are_adapted_beside_others_without_an_example(entries: list[str]) -> None:
    paths = [entry if entry == "step" else f"held.{entry}" for entry in entries]
    model: Any = get_peft_model(Recurrent(), LoraConfig(r=2, target_parameters=paths, init_lora_weights=False))
    given = [torch.randn(3, times, 4) for times in (2, 5)]
    adapted = [model(x) for x in given]
    plain = Recurrent()
    assert all(not torch.allclose(y, plain(x)) for x, y in zip(given, adapted, strict=True))
    plain.load_state_dict(model.merge_and_unload().state_dict())
    for x, y in zip(given, adapted, strict=True):
        torch.testing.assert_close(plain(x), y)


def test_a_length_that_an_example_has_fixed_is_free_without_it_as_the_error_says() -> None:
    config = LoraConfig(r=2, target_parameters=["step"], init_lora_weights=False)
    given: Any = get_peft_model(Recurrent(), config, example_inputs=(torch.randn(3, 2, 4),))
    with pytest.raises(GuardError, match="Or adapt it without example_inputs"):
        given(torch.randn(3, 5, 4))
    free: Any = get_peft_model(Recurrent(), config)
    free.load_state_dict(given.state_dict())
    inputs = [torch.randn(3, length, 4) for length in (1, 2, 5)]
    outputs = [free(x) for x in inputs]
    torch.testing.assert_close(given(inputs[1]), outputs[1])
    merged = free.merge_and_unload()
    torch.testing.assert_close([merged(x) for x in inputs], outputs)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_inside_a_region_of_autocast_is_merging(merge: str) -> None:
    merged = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model: Any = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            getattr(model, merge)()
        merged.append(model[0].weight)
    assert torch.equal(*merged)


def test_a_compiled_model_is_adapted_where_it_reads_its_weight() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    compiled: Any = torch.compile(Functional(), backend="eager")
    x = torch.randn(2, 4)
    before = compiled(x)
    get_peft_model(compiled, LoraConfig(r=2, target_parameters=["weight"], init_lora_weights=False))
    adapted = compiled(x)
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(compiled.merge_and_unload()(x), adapted)
