"""Trainable tokens: which tables have the rows, tied ones too, what is refused, and adapters beside each other.

The contract with PEFT's files and names is in `test_methods_fully_trained.py`, which has more cases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import GPT2, LLAMA, call, llama_config, output, result
from oracle import perturb
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    CheckpointError,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
    trace,
)

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:Setting `save_embedding_layers`")

IDS = torch.arange(1, 15).view(2, 7)
TEXT: dict[str, Any] = {"input_ids": IDS}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def tied_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True))


def gemma() -> nn.Module:
    """Scales what comes out of its embedding."""
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **heads))


def bert() -> nn.Module:
    """Has a bias at the tied head, of zeros, since PEFT loses it."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, num_attention_heads=2))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart() -> nn.Module:
    """Has one table in four places, and scales what comes out of it."""
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _OF_BART.items()}
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, **layers, "scale_embedding": True}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))


_OF_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
TIED = {"llama": tied_llama, "gemma": gemma, "bert": bert, "t5": t5, "bart": bart}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def inputs_of(name: str) -> dict[str, Any]:
    return {**TEXT, "decoder_input_ids": IDS[:, :5]} if name in ("t5", "bart") else TEXT


@pytest.mark.parametrize("name", TIED)
def test_what_is_tied_has_the_same_rows_in_files_of_both_and_merged(name: str, tmp_path: Path) -> None:
    make, inputs = TIED[name], inputs_of(name)
    options: dict[str, Any] = {"token_indices": [9, 2, 5, 40]}
    ours: Any = perturbed(get_peft_model(built(make), TrainableTokensConfig(**options)))
    theirs: Any = perturbed(peft.get_peft_model(built(make), peft.TrainableTokensConfig(**options)))
    state = peft.get_peft_model_state_dict(theirs)
    assert graphpeft.get_peft_model_state_dict(ours).keys() == state.keys()
    for model, load in ((ours, peft.PeftModel), (theirs, PeftModel)):
        folder = tmp_path / load.__module__
        model.save_pretrained(str(folder))
        loaded: Any = load.from_pretrained(built(make), str(folder)).eval()
        torch.testing.assert_close(result(loaded(**inputs)), result(model(**inputs)))
    active = result(ours(**inputs))
    assert (active - result(built(make)(**inputs))).abs().max() > 0.1
    torch.testing.assert_close(result(ours.merge_and_unload()(**inputs)), active)


def perturbed(model: Any) -> Any:
    perturb(model)
    return model.eval()


def test_rows_have_pefts_names_and_go_with_their_adapter() -> None:
    found = []
    for library in (peft, graphpeft):
        config = library.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
        model: Any = library.get_peft_model(built(LLAMA.build), config)
        model.add_adapter("other", config)
        rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta
        assert rows["default"].shape == rows["other"].shape == (2, 32)
        assert set(rows.keys()) == {"default", "other"}
        found.append({name: tuple(p.shape) for name, p in model.named_parameters() if "trainable_tokens" in name})
    assert {f"base_model.model.{name}": shape for name, shape in found[1].items()} == found[0]
    model.set_adapter("other")
    model.delete_adapter("default")
    assert list(rows.keys()) == ["other"]
    model.unload()
    assert not hasattr(model.get_input_embeddings(), "token_adapter")


@pytest.mark.parametrize("name", TIED)
def test_rows_beside_another_method_are_in_files_once_as_in_peft(name: str) -> None:
    keys = []
    for library in (peft, graphpeft):
        config = library.LoraConfig(target_modules="all-linear", trainable_token_indices=[3, 5])
        model: Any = library.get_peft_model(built(TIED[name]), config)
        keys.append(library.get_peft_model_state_dict(model).keys())
    assert keys[0] == keys[1]
    assert any("trainable_tokens" in key for key in keys[1])


def test_a_table_that_has_the_name_already_is_refused() -> None:
    model: Any = built(LLAMA.build)
    model.get_input_embeddings().token_adapter = nn.Identity()
    before = list(model.state_dict())
    with pytest.raises(AdaptError, match="embed_tokens has an attribute 'token_adapter' already"):
        get_peft_model(model, TrainableTokensConfig(token_indices=[1]))
    assert list(model.state_dict()) == before


class Words(nn.Module):
    """An embedding and a head with a bias, in any order."""

    def __init__(self, **of_table: Any) -> None:
        super().__init__()
        self.head = nn.Linear(6, 20)
        self.table = nn.Embedding(20, 6, **of_table)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(input_ids)))


class TiedWords(Words):
    """Has one weight for both, without a config that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight


@pytest.mark.parametrize(
    "config",
    [TrainableTokensConfig(token_indices=[3, 1]), LoraConfig(target_modules=["head"], trainable_token_indices=[3, 1])],
    ids=["tokens", "lora"],
)
def test_the_input_embedding_is_meant_also_where_the_head_comes_first(config: Any) -> None:
    model = get_peft_model(built(Words), config)
    rows = [name for name in graphpeft.get_peft_model_state_dict(model) if name.endswith("trainable_tokens_delta")]
    assert [name.removeprefix("base_model.model.").split(".")[0] for name in rows] == ["table"]


def test_a_traced_model_has_the_same_default() -> None:
    traced = trace(built(Words), (IDS,))
    model: Any = get_peft_model(traced, TrainableTokensConfig(token_indices=[3, 1]))
    assert model.peft_config["default"].target_modules == "table"


@pytest.mark.parametrize("of_table", [{"max_norm": 1.0}, {"padding_idx": 3}], ids=str)
def test_the_options_of_an_embedding_hold_for_its_rows_as_in_peft(of_table: dict[str, Any]) -> None:
    found = []
    for library in (peft, graphpeft):
        model: Any = library.get_peft_model(
            built(lambda: Words(**of_table)),
            library.TrainableTokensConfig(token_indices=[3, 1], target_modules=["table"]),
        )
        (rows,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            rows.mul_(3)
        outputs = model(IDS)
        outputs.square().sum().backward()
        found.append((outputs, rows.grad))
    torch.testing.assert_close(found[1], found[0])


def test_a_linear_layer_keeps_its_bias_which_it_loses_in_peft() -> None:
    options: dict[str, Any] = {"token_indices": [3, 1], "target_modules": ["head"]}
    theirs: Any = peft.get_peft_model(built(Words), peft.TrainableTokensConfig(**options))
    ours: Any = get_peft_model(built(Words), TrainableTokensConfig(**options))
    assert torch.equal(ours(IDS), built(Words)(IDS))
    perturb(ours)
    graphpeft_rows, base = ours.head.token_adapter.trainable_tokens_delta["default"], built(Words)
    weight = base.get_parameter("head.weight").detach().clone()
    weight[[3, 1]] = graphpeft_rows.detach()
    peft.set_peft_model_state_dict(theirs, graphpeft.get_peft_model_state_dict(ours))
    hidden = torch.tanh(base.get_submodule("table")(IDS))
    bias = base.get_parameter("head.bias")
    torch.testing.assert_close(ours(IDS), F.linear(hidden, weight, bias))
    torch.testing.assert_close(theirs(IDS), F.linear(hidden, weight))
    torch.testing.assert_close(ours.merge_and_unload()(IDS), F.linear(hidden, weight, bias))


def test_a_tied_head_keeps_its_bias_which_it_loses_in_peft() -> None:
    def biased() -> nn.Module:
        model = bert()
        nn.init.normal_(model.get_parameter("cls.predictions.bias"))
        return model

    options: dict[str, Any] = {"token_indices": [3, 1]}
    expected = result(built(biased)(**TEXT))
    ours: Any = get_peft_model(built(biased), TrainableTokensConfig(**options))
    assert torch.equal(result(ours(**TEXT)), expected)
    theirs: Any = peft.get_peft_model(built(biased), peft.TrainableTokensConfig(**options)).eval()
    assert (result(theirs(**TEXT)) - expected).abs().max() > 1


def test_tied_weights_stay_tied_whatever_the_models_config_says(tmp_path: Path) -> None:
    ours: Any = perturbed(get_peft_model(built(TiedWords), TrainableTokensConfig(token_indices=[3, 1])))
    active = ours(IDS)
    assert ours.merge_and_unload().head.weight is ours.table.weight
    torch.testing.assert_close(ours(IDS), active)
    theirs: Any = perturbed(peft.get_peft_model(built(TiedWords), peft.TrainableTokensConfig(token_indices=[3, 1])))
    theirs.save_pretrained(str(tmp_path))
    # PEFT has trained it with two weights
    with pytest.raises(CheckpointError, match=r"lacks base_model\.model\.head\.trainable_tokens_delta"):
        PeftModel.from_pretrained(built(TiedWords), tmp_path)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "as the base"])
def test_rows_of_a_half_precision_base_have_the_dtype_of_pefts(autocast: bool) -> None:
    dtypes = []
    for library in (peft, graphpeft):
        model: Any = library.get_peft_model(
            built(tied_llama).to(torch.bfloat16),
            library.TrainableTokensConfig(token_indices=[3, 1]),
            autocast_adapter_dtype=autocast,
        )
        dtypes.append({tensor.dtype for tensor in library.get_peft_model_state_dict(model).values()})
        assert result(perturbed(model)(**TEXT)).dtype == torch.bfloat16
    assert dtypes[0] == dtypes[1] == {torch.float32 if autocast else torch.bfloat16}


def two(first: list[int], second: list[int], library: Any = graphpeft, make: Any = tied_llama) -> Any:
    model = library.get_peft_model(built(make), library.TrainableTokensConfig(token_indices=first))
    model.add_adapter("second", library.TrainableTokensConfig(token_indices=second))
    return perturbed(model)


def test_adapters_of_other_rows_act_and_are_merged_together_as_in_peft() -> None:
    ours, theirs = (two([3, 1], [7, 2], library, LLAMA.make) for library in (graphpeft, peft))
    ours.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    for name in ("default", "second"):
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        graphpeft.set_peft_model_state_dict(ours, state, adapter_name=name)
    active = result(ours(**TEXT))
    torch.testing.assert_close(active, result(theirs(**TEXT)))
    ours.merge_adapter()
    assert torch.equal(result(ours(**TEXT)), active)
    ours.unmerge_adapter()
    assert torch.equal(result(ours(**TEXT)), active)
    torch.testing.assert_close(result(ours.merge_and_unload()(**TEXT)), active)


def test_a_file_in_which_peft_repeats_the_rows_of_a_tied_head_is_read(tmp_path: Path) -> None:
    theirs = two([3, 1], [7, 2], peft)
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(built(tied_llama), tmp_path)
    found, written = graphpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    (repeated,) = written.keys() - found.keys()
    assert repeated == "base_model.model.lm_head.base_layer.trainable_tokens_delta"
    assert all(torch.equal(rows, written[name]) for name, rows in found.items())


def test_adapters_of_a_common_row_do_not_act_together() -> None:
    model = two([3, 1], [1, 2])
    before = result(model(**TEXT))
    with pytest.raises(AdaptError, match=r"both train rows of model\.embed_tokens; only one of them can be active"):
        model.set_adapter(["default", "second"])
    assert torch.equal(result(model(**TEXT)), before)


def test_rows_of_a_batch_have_an_adapter_each() -> None:
    model, names = two([3, 1, 9], [9, 2]), ["second", "default"]
    found = result(model(**TEXT, adapter_names=names))
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], result(model(**TEXT))[row])
    copied = copy.deepcopy(model)
    assert torch.equal(result(copied(**TEXT)), result(model(**TEXT)))
    with model.disable_adapter():
        assert torch.equal(result(model(**TEXT)), result(built(tied_llama)(**TEXT)))
    assert torch.equal(result(model.unload()(**TEXT)), result(built(tied_llama)(**TEXT)))


@pytest.mark.parametrize(
    "other",
    [
        LNTuningConfig(),
        LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    ],
    ids=["norms", "lora"],
)
def test_it_acts_beside_other_methods_and_is_merged_with_them(other: Any) -> None:
    model: Any = get_peft_model(LLAMA.build(), TrainableTokensConfig(token_indices=[3, 1]))
    model.add_adapter("other", other)
    model.set_adapter(["default", "other"])
    perturb(model)
    active = output(model, LLAMA.inputs())
    torch.testing.assert_close(output(model.merge_and_unload(), LLAMA.inputs()), active)


def test_names_of_tensors_choose_the_tables() -> None:
    config = TrainableTokensConfig(token_indices=[3, 1])
    names = [f"{path}.trainable_tokens_delta" for path in ("model.embed_tokens", "lm_head")]
    model = inject_adapter_in_model(config, built(tied_llama), state_dict=dict.fromkeys(names))
    assert sorted(graphpeft.get_peft_model_state_dict(model)) == sorted(f"base_model.model.{name}" for name in names)
    assert model.get_nb_trainable_parameters()[0] == 2 * 32


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"token_indices": []}, "rows have to be named, each once.*change token_indices"),
        ({"token_indices": [3, 3]}, "rows have to be named, each once"),
        ({"token_indices": [-1]}, "none of index -1"),
        ({"token_indices": [True]}, r"token_indices must be list\[int\]"),
        ({"token_indices": [3], "target_modules": ["c_fc"]}, r"a Conv1D stores its weight as \(in, out\)"),
        ({"token_indices": [3], "target_modules": ["nothing"]}, "nothing in .* matches"),
    ],
    ids=str,
)
def test_what_are_no_rows_of_tokens_is_refused(options: dict[str, Any], reason: str) -> None:
    model = GPT2.build()
    with pytest.raises((AdaptError, ValueError), match=reason):
        get_peft_model(model, TrainableTokensConfig(**options))
    assert not hasattr(model, "peft_config")
    assert torch.equal(output(model, GPT2.inputs()), output(GPT2.build(), GPT2.inputs()))


def test_a_model_that_tells_no_embedding_needs_a_name() -> None:
    with pytest.raises(AdaptError, match="target_modules: nothing in Sequential matches 'embed_tokens'"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), TrainableTokensConfig(token_indices=[1]))


def test_one_of_two_tied_weights_is_not_merged_into_both() -> None:
    config = TrainableTokensConfig(token_indices=[3, 1], target_modules=["lm_head"])
    model: Any = perturbed(get_peft_model(built(tied_llama), config))
    active = result(call(model, TEXT))
    with pytest.raises(AdaptError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        model.merge_and_unload()
    assert torch.equal(result(call(model, TEXT)), active)
