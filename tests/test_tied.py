"""One adapter for an embedding and the layers that have its table as their weight: `ensure_weight_tying`."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, LoraConfig, get_peft_model, own_weight, trace
from graphpeft.testing import verify

pytestmark = [
    # PEFT's, about how GPT-2 stores its weights, and about tables in files
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Plain(nn.Module):
    """A model without a config, whose head has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.between = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.between(self.table(input_ids))))


class TwoTables(nn.Module):
    """A table that two embeddings read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(32, 16), nn.Embedding(32, 16)
        self.second.weight = self.first.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.first(input_ids)) * self.second(input_ids.flip(1))


IDS = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(0))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build().eval()


def inputs_of(model: Any) -> dict[str, Any]:
    is_of_transformers = getattr(model, "config", None) is not None
    return {"input_ids": IDS, "use_cache": False} if is_of_transformers else {"input_ids": IDS}


def output(model: Any) -> Tensor:
    found = model(**inputs_of(model))
    return found if isinstance(found, Tensor) else found.logits


OPTIONS: list[Any] = [
    pytest.param(llama, {"target_modules": ["embed_tokens"]}, id="embedding"),
    pytest.param(llama, {"target_modules": ["lm_head"]}, id="head"),
    pytest.param(llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, id="both"),
    pytest.param(llama, {"target_modules": ".*(embed_tokens|v_proj)"}, id="pattern"),
    pytest.param(llama, {"target_modules": ["lm_head"], "init_lora_weights": True}, id="default values"),
    pytest.param(llama, {"target_modules": ["lm_head"], "init_lora_weights": "gaussian"}, id="gaussian"),
    pytest.param(llama, {"target_modules": ["lm_head"], "use_rslora": True}, id="rslora"),
    pytest.param(gpt2, {"target_modules": ["wte", "lm_head", "c_attn"]}, id="gpt2"),
    pytest.param(llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, id="saved embedding"),
    pytest.param(llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="saved head"),
    pytest.param(gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}, id="saved gpt2"),
]


def by(library: Any, build: Callable[[], nn.Module], options: dict[str, Any]) -> Any:
    """Adapts a model; equal seeds draw equal first values."""
    model = seeded(build)
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "ensure_weight_tying": True} | copy.deepcopy(
        options
    )
    return library.get_peft_model(model, library.LoraConfig(**options)).eval()


def state(library: Any, model: Any) -> dict[str, Tensor]:
    return library.get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_values_and_outputs_are_pefts(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    ours, theirs = by(graphpeft, build, options), by(peft, build, options)
    found, expected = state(graphpeft, ours), state(peft, theirs)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    oracle.assert_close(output(ours), output(theirs))


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_files_go_both_ways(build: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = by(graphpeft, build, options), by(peft, build, options)
    for model in (ours, theirs):
        oracle.perturb(model)
    ours.save_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = peft.PeftModel.from_pretrained(seeded(build), str(tmp_path / "ours")).eval()
    oracle.assert_close(output(loaded), output(ours))
    loaded = graphpeft.PeftModel.from_pretrained(seeded(build), str(tmp_path / "theirs")).eval()
    oracle.assert_close(output(loaded), output(theirs))


@pytest.mark.parametrize(("build", "options"), OPTIONS)
def test_gradients_are_the_sum_of_pefts(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    ours, theirs = by(graphpeft, build, options), by(peft, build, options)
    for model in (ours, theirs):
        output(model).square().mean().backward()
    expected: dict[tuple[int, ...], Tensor] = {}
    for parameter in filter(lambda p: p.requires_grad, theirs.parameters()):
        # PEFT's two parameters of one factor lie in the same memory, one of them transposed
        gradient = parameter.grad if parameter.is_contiguous() else parameter.grad.T
        key = (parameter.data_ptr(),)
        expected[key] = expected[key] + gradient if key in expected else gradient
    found = [p.grad for p in ours.parameters() if p.requires_grad]
    assert len(found) == len(expected)
    for gradient in found:
        assert any(g.shape == gradient.shape and torch.allclose(g, gradient, atol=1e-6) for g in expected.values())


@pytest.mark.parametrize("is_traced", [False, True], ids=["modules", "traced"])
@pytest.mark.parametrize(
    ("build", "options"),
    [*OPTIONS, pytest.param(Plain, {"target_modules": ["table"]}, id="plain"),
     pytest.param(Plain, {"target_modules": ["between"], "modules_to_save": ["head"]}, id="saved plain"),
     pytest.param(TwoTables, {"target_modules": ["second"]}, id="two tables")],
)  # fmt: skip
def test_what_is_tied_is_merged_once_and_stays_tied(
    build: Callable[[], nn.Module], options: dict[str, Any], is_traced: bool
) -> None:
    def made() -> Any:
        model = seeded(build)
        return (
            trace(model, {"input_ids": IDS} | ({} if build in (Plain, TwoTables) else {"use_cache": False}))
            if is_traced
            else model
        )

    base = output(made())
    model = by(graphpeft, made, options)
    oracle.perturb(model)
    adapted = output(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    tolerance = 1e-4 * adapted.detach().abs().max()
    model.merge_adapter()
    assert (output(model) - adapted).abs().max() < tolerance
    model.unmerge_adapter()
    assert torch.equal(output(model), adapted)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    merged = copy.deepcopy(model).merge_and_unload()
    assert (output(merged) - adapted).abs().max() < tolerance
    before, after = seeded(build), dict(merged.named_parameters())
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in before.parameters())
    assert after.keys() == dict(before.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "another tensor.* in the place of lm_head"),
        (
            {"target_modules": ["lm_head"], "use_dora": True},
            "change of lm_head.weight by 'other' depends on the weight",
        ),
    ],
)
def test_what_acts_at_one_of_them_keeps_what_is_tied_from_being_merged_beside_it(
    options: dict[str, Any], reason: str
) -> None:
    model = by(graphpeft, llama, {"target_modules": ["embed_tokens"]})
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, **options))
    model.set_adapter(["default", "other"])
    before = output(model)
    with pytest.raises(AdaptError, match=reason):
        model.merge_adapter(["default"])
    assert torch.equal(output(model), before)


def test_weights_that_were_untied_since_are_each_merged_into() -> None:
    model = by(graphpeft, llama, {"target_modules": ["embed_tokens"]})
    adapted = output(model)
    model.load_state_dict(copy.deepcopy(dict(model.state_dict())), assign=True)
    model.lm_head.weight = nn.Parameter(own_weight(model.lm_head).detach().clone())
    merged = output(model.merge_and_unload())
    assert (merged - adapted).abs().max() < 1e-4 * adapted.abs().max()


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_weights_are_tied_by_their_memory(options: dict[str, Any]) -> None:
    model = by(graphpeft, llama, options)
    oracle.perturb(model)
    adapted = output(model)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.lm_head._parameters["weight"] is not model.model.embed_tokens._parameters["weight"]
    merged = output(model.merge_and_unload())
    assert (merged - adapted).abs().max() < 1e-4 * adapted.abs().max()


def test_a_tied_weight_with_factors_that_were_untied_since_is_not_merged_into() -> None:
    model = by(graphpeft, llama, {"target_modules": ["embed_tokens"]})
    factors = model.lm_head.default._parameters
    factors |= {name: nn.Parameter(value.detach() + 1) for name, value in factors.items()}
    with pytest.raises(AdaptError, match=r"is tied to lm_head\.weight, which merging would change"):
        model.merge_and_unload()


def test_peft_merges_the_change_of_a_tied_weight_twice() -> None:
    model = by(peft, llama, {"target_modules": ["embed_tokens"]})
    adapted = output(model)
    assert (output(model.merge_and_unload()) - adapted).abs().max() > 1


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_one_step_of_an_optimizer_keeps_factors_and_copies_tied(options: dict[str, Any]) -> None:
    model = by(graphpeft, llama, options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output(model.train()).square().mean().backward()
    optimizer.step()
    found = {key.removeprefix("base_model.model."): value for key, value in state(graphpeft, model).items()}
    if "modules_to_save" in options:
        assert torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
        return
    a, b = (found[f"model.embed_tokens.lora_embedding_{factor}"] for factor in "AB")
    assert torch.equal(found["lm_head.lora_A.weight"], b.T)
    assert torch.equal(found["lm_head.lora_B.weight"], a.T)


def test_dropout_is_at_the_head_alone_and_half_precision_is_cast() -> None:
    model = by(graphpeft, llama, {"target_modules": ["lm_head"], "lora_dropout": 0.5})
    assert not torch.equal(output(model.train()), output(model.train()))
    assert torch.equal(output(model.eval()), output(model))
    model = by(graphpeft, lambda: llama().bfloat16(), {"target_modules": ["lm_head"]})
    assert output(model).dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


def test_several_adapters_of_tied_layers_are_mixed_combined_and_swapped(tmp_path: Path) -> None:
    model = by(graphpeft, llama, {"target_modules": ["embed_tokens", "q_proj"]})
    config = LoraConfig(target_modules=["lm_head"], r=3, init_lora_weights=False, ensure_weight_tying=True)
    model.add_adapter("second", config)
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(output(model))
    rows = model(input_ids=IDS, adapter_names=["default", "second", "__base__"]).logits
    oracle.assert_close(rows[0], alone[0][0], 1e-5)
    oracle.assert_close(rows[1], alone[1][1], 1e-5)
    oracle.assert_close(rows[2], output(seeded(llama))[2], 1e-5)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "both", combination_type="cat")
    model.set_adapter(["both"])
    weight = model.get_parameter("lm_head.weight").detach()
    expected = weight + 0.5 * _change(model, "default", 2.0) - 2.0 * _change(model, "second", 8 / 3)
    merged = model.merge_and_unload(adapter_names=["both"])
    oracle.assert_close(merged.lm_head.weight, expected, 1e-5)


def _change(model: Any, name: str, scaling: float) -> Tensor:
    a, b = (model.get_parameter(f"model.embed_tokens.{name}.lora_{factor}").detach() for factor in "AB")
    return scaling * (b @ a).T


def test_another_file_takes_the_place_of_a_tied_adapter(tmp_path: Path) -> None:
    model = by(graphpeft, llama, {"target_modules": ["embed_tokens"]})
    other = by(graphpeft, llama, {"target_modules": ["embed_tokens"]})
    oracle.perturb(other)
    other.save_pretrained(str(tmp_path), save_embedding_layers=False)
    graphpeft.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(output(model), output(other))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "lm_head: it is tied to model.embed_tokens, and use_dora=True"),
        ({"init_lora_weights": "mica"}, "lm_head: it is tied to model.embed_tokens, and init_lora_weights='mica'"),
        ({"rank_pattern": {"lm_head": 4}}, "rank_pattern gives 4 to it and 2 to that"),
        ({"alpha_pattern": {"embed_tokens": 3}}, "alpha_pattern gives 4 to it and 3 to that"),
        ({"exclude_modules": ["lm_head"]}, "isn't adapted, which ensure_weight_tying forbids"),
        ({"modules_to_save": ["lm_head"]}, "excluded model.embed_tokens, lm_head"),
    ],
)  # fmt: skip
def test_what_would_untie_them_is_refused(options: dict[str, Any], reason: str) -> None:
    model = seeded(llama)
    before, expected = copy.deepcopy(model.state_dict()), output(model)
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(
            model,
            LoraConfig(target_modules=["embed_tokens"], r=2, lora_alpha=4, ensure_weight_tying=True, **options),
        )
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("kept", ["model.embed_tokens", "lm_head"])
def test_one_of_them_alone_is_no_choice(kept: str) -> None:
    model = seeded(llama)
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(AdaptError, match=r"where holds for one alone of .* and lm_head, which are tied"):
        get_peft_model(model, config, where=lambda site: site.name == kept)
    get_peft_model(model, config, where=lambda site: site.name in ("model.embed_tokens", "lm_head"))
    assert not any("q_proj.lora" in name for name, _ in model.named_parameters())


class WithOtherHeads(Plain):
    """A model in which the head's path is the end of others."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Sequential(OrderedDict(head=nn.Linear(16, 16), subhead=nn.Linear(16, 16)))


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"target_modules": ["table"]}, "between.head as well; give target_modules as a regular expression"),
        ({"target_modules": ["between"], "modules_to_save": ["table"]}, "between.head, between.subhead as well"),
    ],
)
def test_names_that_would_mean_others_are_not_added(options: dict[str, Any], others: str) -> None:
    with pytest.raises(AdaptError, match=f"ensure_weight_tying has head named, too, .* {others}"):
        by(graphpeft, WithOtherHeads, options)
    model = by(graphpeft, WithOtherHeads, {"target_modules": "table"})
    assert {name.partition(".")[0] for name, _ in model.named_parameters() if "lora" in name} == {"table"}
    assert hasattr(model.head, "default")


def test_what_is_tied_to_a_layer_inside_of_a_saved_one_has_its_copy() -> None:
    def nested() -> nn.Module:
        model = Plain()
        inner = nn.Sequential(OrderedDict(table=model.table))
        return nn.Sequential(OrderedDict(inner=inner, between=model.between, head=model.head))

    model = by(graphpeft, nested, {"target_modules": ["between"], "modules_to_save": ["inner"]})
    assert model.head.default.weight is model.inner.table.default.weight


def test_factors_of_parts_or_calls_are_not_tied() -> None:
    config = LoraConfig(target_modules=["table"], target_parts={"head": [(0, 8)]}, ensure_weight_tying=True)
    with pytest.raises(
        AdaptError, match="head: it is tied to table, and target_parts has factors for some of its rows"
    ):
        get_peft_model(seeded(Plain), config)
    calls = graphpeft.LoraPerCallConfig(target_modules=["table"], ensure_weight_tying=True)
    with pytest.raises(AdaptError, match="head: it is tied to table, and each call has factors of its own"):
        get_peft_model(trace(seeded(Plain), {"input_ids": IDS}), calls)


class Doubled(nn.Linear):
    """A head that has another use for its weight than a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


def test_a_tied_weight_that_is_used_otherwise_is_refused() -> None:
    model = seeded(Plain)
    model.head.__class__ = Doubled
    config = LoraConfig(target_modules=["table"], ensure_weight_tying=True)
    with pytest.raises(AdaptError, match="head: it is tied to table, and isn't a linear layer"):
        get_peft_model(model, config)


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_file_that_isnt_tied_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = by(graphpeft, llama, {"target_modules": ["q_proj"]} | options)
    values = state(graphpeft, model)
    values = {key: value + (".lm_head." in key) for key, value in values.items()}
    before = output(model)
    with pytest.raises(CheckpointError, match=r"other values for lm_head.* which are one tensor here"):
        graphpeft.set_peft_model_state_dict(model, values)
    assert torch.equal(output(model), before)


def test_without_anything_tied_it_is_told() -> None:
    with pytest.warns(UserWarning, match="has no effect: nothing that is adapted is tied"):
        by(graphpeft, llama, {"target_modules": ["q_proj"]})


def test_the_laws_hold() -> None:
    model, config = seeded(llama), LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    verification = verify(model, config, inputs_of(model))
    assert verification.holds, verification


def test_rows_follow_as_before() -> None:
    model = by(graphpeft, llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3]})
    assert sum("trainable_tokens_delta" in name for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize(
    "options", [{"target_modules": ["head"]}, {"target_modules": ["between"], "modules_to_save": ["head"]}]
)
def test_an_exported_model_takes_what_is_tied_once(options: dict[str, Any], tmp_path: Path) -> None:
    model = by(graphpeft, Plain, options)
    graphpeft.export(model, {"input_ids": IDS}, tmp_path / "tied.pt2", adapters="inputs")
    oracle.perturb(model)
    values = load_file(graphpeft.export_adapter(model, "default", tmp_path / "tied.pt2"))
    assert not any(".head.lora_A" in key or key.endswith(".head.weight") for key in values)
    program = torch.export.load(tmp_path / "tied.pt2").module()
    oracle.assert_close(program(input_ids=IDS, adapters=values), output(model))


class Decoder(nn.Module):
    """A head around a parameter that it was given, as ESM's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias


class HandsOn(nn.Module):
    """An embedding whose table another module was given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = Decoder(self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(ids))))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["embed"]},
        {"target_parameters": ["head.weight"]},
        {"target_parameters": ["embed.weight"]},
        {"target_modules": ["embed", "middle"], "target_parameters": ["head.weight"]},
    ],
    ids=str,
)
def test_a_weight_that_two_modules_have_is_each_ones_own_in_a_flat_graph_too(targets: dict[str, list[str]]) -> None:
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for is_flat in (False, True):
        torch.manual_seed(0)
        model = trace(HandsOn().eval(), (ids,)) if is_flat else HandsOn().eval()
        config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **targets)  # type: ignore[arg-type]
        adapted = get_peft_model(model, config)
        found.append((graphpeft.get_peft_model_state_dict(adapted), adapted(ids)))
    (tensors, output), (flat_tensors, flat_output) = found
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in flat_tensors.items()
    }
    torch.testing.assert_close(output, flat_output, atol=1e-5, rtol=1e-5)


def test_one_name_of_two_tied_embeddings_trains_the_rows_that_both_share() -> None:
    sizes: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, **sizes)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}
    model: Any = get_peft_model(transformers.BartModel(config), graphpeft.LoraConfig(**options))
    tokens = torch.tensor([[3, 5, 7]])
    model(input_ids=tokens, decoder_input_ids=tokens).last_hidden_state.square().sum().backward()
    (rows,) = [parameter for name, parameter in model.named_parameters() if "trainable_tokens" in name]
    assert rows.shape == (2, 8)
    assert rows.grad is not None


def net_of_one_memory(view: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Returns two layers whose weights are views of one memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    first, second = view(torch.randn(16, 16) / 3)
    model[0].weight, model[2].weight = nn.Parameter(first), nn.Parameter(second)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda flat: (flat[:8, :8], flat[7:15, :8]),
    "columns": lambda flat: (flat[:8, :8], flat[:8, 7:15]),
    "transposed": lambda flat: (flat[:8, :8], flat[:8, :8].t()),
    "stretched": lambda flat: (flat[:8, :8], flat[0].view(2, 8)[:1].expand(8, 8)),
}
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda flat: (flat[:8, :8], flat[8:, :8]),
    "columns": lambda flat: (flat[:8, :8], flat[:8, 8:]),
    "every second row": lambda flat: (flat[::2, :8], flat[1::2, :8]),
}


@pytest.mark.parametrize("view", OVERLAPS.values(), ids=OVERLAPS)
def test_a_weight_that_shares_a_part_of_its_memory_is_not_merged_into(
    view: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    model = net_of_one_memory(view)
    before = [model[0].weight.clone(), model[2].weight.clone()]
    with pytest.raises(AdaptError, match=r"0.weight is tied to 2.weight"):
        model.merge_and_unload()
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[1])


@pytest.mark.parametrize("view", APART.values(), ids=APART)
def test_a_weight_that_lies_beside_another_is_merged_into(view: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    model = net_of_one_memory(view)
    x, before = torch.randn(3, 8), model[2].weight.clone()
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("named", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_what_is_tied_and_changed_alone_is_warned_of_as_in_peft(named: dict[str, Any]) -> None:
    for library in (graphpeft, peft):
        config = library.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **named})
        with pytest.warns(UserWarning, match="^Model has `tie_word_embeddings=True`"):
            library.get_peft_model(llama(), config)


@pytest.mark.parametrize("named", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_what_is_tied_and_changed_at_all_places_is_not_warned_of(named: dict[str, Any]) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], "ensure_weight_tying": True, **named})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(llama(), config)
