"""Prompts go into one module of any model, as it is or as a flat graph, and nothing else of the model sees them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import given
from hypothesis import strategies as st
from models import BERT, GPT2, LLAMA, MIXER, SWIN, TORCHVISION_VIT, VIT, Example, equal, output
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    LoraConfig,
    PeftModel,
    TokenSequence,
    TraceError,
    find_token_sequence,
    get_peft_model,
    trace,
)
from graphpeft.methods.prompts.scope_masks import mask_with_tokens
from graphpeft.testing import laws


def pickle_again(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


SCOPES = [
    (VIT, "blocks"),
    (VIT, r"blocks\.\d+"),
    (TORCHVISION_VIT, "encoder.layers"),
    (TORCHVISION_VIT, r"encoder\.layers\.encoder_layer_\d+"),
    (BERT, "encoder"),
    (BERT, r"encoder\.layer\.\d+"),
]
every_scope = pytest.mark.parametrize(("example", "scope"), SCOPES, ids=lambda value: str(value))
FORMS: dict[str, Callable[[Example], Any]] = {
    "as it is": lambda example: example.build(),
    "as a graph": lambda example: trace(example.build(), example.inputs()),
}
every_form = pytest.mark.parametrize("form", FORMS)


def scoped(scope: str | list[str], **options: Any) -> graphpeft.PromptTuningConfig:
    return graphpeft.PromptTuningConfig(**{"num_virtual_tokens": 3, "prompt_scope": scope, **options})


@pytest.mark.parametrize("position", ["before", "after"])
@every_form
@every_scope
def test_virtual_tokens_go_into_a_scope_and_out_of_it(
    example: Example, scope: str, form: str, position: str, tmp_path: Path
) -> None:
    model, inputs = FORMS[form](example), example.inputs()
    base = output(model, inputs)
    get_peft_model(model, scoped(scope, prompt_position=position), example_inputs=inputs)
    prompted = output(model, inputs)
    assert prompted.shape == base.shape
    assert not torch.equal(prompted, base)
    model.save_pretrained(tmp_path)
    for loaded_into in FORMS.values():
        loaded = PeftModel.from_pretrained(loaded_into(example), tmp_path, example_inputs=inputs)
        assert torch.equal(output(loaded, inputs), prompted)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), base)
    assert torch.equal(output(model.unload(), inputs), base)


def test_a_prompt_is_nodes_around_those_of_its_scope() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.LayerNorm(8), nn.GELU()), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) + x)

    traced: Any = trace(Around(), (torch.randn(2, 5, 8),))
    before = traced.code
    assert names_of(traced) == ["x", "expect_present", "body_0", "body_1", "add", "head", "output"]
    get_peft_model(traced, scoped("body", token_dim=8))
    assert names_of(traced) == [
        *(
            "x",
            "expect_present",
            "body_prompt_encoder_slot0_embedding_weight",
            "inserted",
            "body_0",
            "body_1",
            "taken_out",
        ),
        *("add", "head", "output"),
    ]
    assert "taken_out = graphpeft_methods_prompts_in_scope_taken_out(body_1, x, 3, 'before')" in traced.code
    assert "add = taken_out + x" in traced.code
    assert "body" in str(traced.adapter_report())
    traced.unload()
    assert traced.code == before


def names_of(model: Any) -> list[str]:
    return [node.name for node in model.graph.nodes]


ADAPTERS: dict[str, Any] = {
    "shallow": scoped("blocks", token_dim=32),
    "deep": scoped(r"blocks\.\d+", token_dim=32, prompt_position="after"),
    "again": scoped("blocks", token_dim=32, num_virtual_tokens=2),
    "lora": LoraConfig(target_modules=["qkv", "attn.proj", "mlp.fc2"], init_lora_weights=False),
}


@functools.cache
def with_all_adapters() -> tuple[Any, Any, str]:
    """Returns a model, its trace with the same adapters and values, and the code of the trace without them."""
    model, traced = (build(VIT) for build in FORMS.values())
    code = traced.code
    for name, config in ADAPTERS.items():
        get_peft_model(model, config, name)
        get_peft_model(traced, config, name)
    traced.load_state_dict(model.state_dict(), strict=False)
    return model, traced, code


some_of_them = st.permutations(list(ADAPTERS)).flatmap(lambda order: st.integers(0, 4).map(lambda n: order[:n]))


@given(orders=st.lists(some_of_them))
def test_adapters_of_a_flat_graph_come_and_go_in_any_order(orders: list[list[str]]) -> None:
    model, traced, code = copy.deepcopy(with_all_adapters())
    inputs = VIT.inputs()
    for order in orders:
        model.set_adapter(order)
        traced.set_adapter(order)
        assert equal(output(traced, inputs), output(model, inputs))
    assert traced.unload().code == code


def test_each_call_of_a_shared_module_gets_the_prompt() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Reading(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(x)))

    torch.manual_seed(0)
    model: Any = Twice()
    x = torch.randn(2, 3, 8)
    traced: Any = trace(model, (x,))
    base = model(x)
    get_peft_model(model, scoped("block", token_dim=8))
    get_peft_model(traced, scoped("block", token_dim=8))
    traced.load_state_dict(model.state_dict())
    assert sum(node.name.startswith("inserted") for node in traced.graph.nodes) == 2
    assert equal(traced(x), model(x))
    assert not equal(model(x), base)


def test_a_decision_inside_a_scope_is_taken_on_the_longer_sequence() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Even(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) if x.shape[1] % 2 == 0 else x

    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1) if x.shape[1] % 2 == 0 else x

    x = torch.randn(2, 4, 8)
    traced: Any = get_peft_model(trace(Deciding(), (x,)), scoped("body", token_dim=8))
    with pytest.raises(graphpeft.GuardError, match=r"x\.flip\(1\)"):
        traced(x)


class Qkv(nn.Module):
    """An attention whose arguments can be one value."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + q


def around(body: nn.Module, call: Callable[[nn.Module, Tensor], Any] = lambda body, x: body(x)) -> Any:
    """Returns a model with a head behind `body`."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(call(self.body, x))

    return Around().eval()


def test_arguments_that_a_flat_graph_cannot_tell_apart_are_refused() -> None:
    x = torch.randn(2, 5, 8)
    traced = trace(around(Qkv(), lambda body, x: body(x, x, x)), (x,))
    with pytest.raises(AdaptError, match=r"one value is given as several of its arguments \(q, k, v\)"):
        get_peft_model(traced, scoped("body", token_dim=8))
    apart = around(Qkv(), lambda body, x: body(x, x + 0, x * 1))
    traced = trace(apart, (x,))
    get_peft_model(apart, scoped("body", token_dim=8))
    get_peft_model(traced, scoped("body", token_dim=8)).load_state_dict(apart.state_dict())
    assert equal(traced(x), apart(x))


def test_what_a_module_is_given_and_returns_keeps_its_tokens() -> None:
    class Beside(nn.Module):
        def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x * 2, memory, x * 3

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Beside(), nn.Linear(8, 2)

        def forward(self, x: Tensor, memory: Tensor) -> Any:
            return self.body(self.head.weight.sum() + x, memory)

    model = get_peft_model(Around(), scoped("body", token_dim=8))
    # as many tokens as the input has with those of the prompt
    shapes = [tensor.shape[1] for tensor in model(torch.randn(2, 5, 8), torch.randn(2, 8, 8))]
    assert shapes == [5, 8, 5]


def test_a_causal_hint_goes_when_the_mask_gets_longer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    model = around(layer, lambda body, x: body(x, src_mask=causal, is_causal=True))
    x = torch.randn(2, 5, 8)
    base = model(x)
    for position in ("before", "after"):
        get_peft_model(model, scoped("body", token_dim=8, prompt_position=position))
        assert not equal(model(x), base)
        model.unload()
    assert equal(model(x), base)


def test_a_scope_keeps_no_virtual_tokens_in_a_cache() -> None:
    model: Any = get_peft_model(GPT2.build(), scoped(r"transformer\.h\.\d+", token_dim=32))
    ids = torch.randint(3, 60, (1, 5))
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model.generate(ids, max_new_tokens=3)
    model.generate(ids, max_new_tokens=3, use_cache=False)


def test_masks_of_other_sequences_and_flags_stay_as_they_are() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, memory_mask: Tensor, use_causal_mask: bool = False) -> Tensor:
            return x + memory_mask.sum()

    model = get_peft_model(around(Masked(), lambda body, x: body(x, torch.ones(5, 5) > 0)), scoped("body", token_dim=8))
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 2)


def test_a_post_norm_attention_is_inside_its_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mha = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.mha(x, x, x, need_weights=False)[0])

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.blocks = nn.Sequential(nn.Linear(8, 8)), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.scale(x)
            for block in self.blocks:
                x = block(x)
            return x.mean(1)

    x = torch.randn(2, 5, 8)
    assert find_token_sequence(Blocks().eval(), (x,)) == TokenSequence(r"blocks\.\d+", 8, 5)


def test_a_graph_that_tells_of_no_modules_is_no_place() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    graph_module = torch.fx.symbolic_trace(nn.Sequential(Plain()))
    with pytest.raises(TraceError, match="doesn't tell which of its nodes belong to which module"):
        find_token_sequence(graph_module, (torch.randn(2, 3, 8),))


@pytest.mark.parametrize("again", [pickle_again, copy.deepcopy], ids=["pickled", "copied"])
def test_copies_of_a_flat_graph_keep_the_places_of_prompts(again: Callable[[Any], Any]) -> None:
    inputs = VIT.inputs()
    traced: Any = get_peft_model(trace(VIT.build(), inputs), scoped("blocks", token_dim=32))
    copied = again(traced)
    assert torch.equal(output(copied, inputs), output(traced, inputs))
    get_peft_model(copied, scoped(r"blocks\.\d+", token_dim=32), "deep").set_adapter(["default", "deep"])
    assert not equal(output(copied, inputs), output(traced, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scope_of_half_precision_takes_a_prompt(dtype: torch.dtype) -> None:
    model: Any = VIT.build().to(dtype)
    (images,) = VIT.inputs()
    get_peft_model(model, scoped("blocks", token_dim=32))
    assert model.blocks.prompt_encoder.default.embedding.weight.dtype == torch.float32
    assert model(images.to(dtype)).dtype == dtype


# where a prompt can go


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (VIT, TokenSequence("blocks", 32, 5)),
        (TORCHVISION_VIT, TokenSequence("encoder.layers", 32, 5)),
        (BERT, TokenSequence("encoder", 32, 7)),
        (GPT2, TokenSequence(r"transformer\.h\.\d+", 32, 7)),
    ],
    ids=str,
)
@every_form
def test_the_place_of_a_prompt_is_found(example: Example, expected: TokenSequence, form: str) -> None:
    model, inputs = FORMS[form](example), example.inputs()
    before = laws.snapshot(model)
    found = find_token_sequence(model, inputs)
    laws.require_unchanged(model, before, "finding the token sequence")
    assert found == expected
    base = output(model, inputs)
    get_peft_model(model, scoped(found.prompt_scope, token_dim=found.token_dim))
    assert output(model, inputs).shape == base.shape
    assert not equal(output(model, inputs), base)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (MIXER, ["no attention reads what a MlpMixer is given", "name a module in prompt_scope"]),
        (SWIN, ["takes more tokens", "layers.0.blocks.0.attn", "several sizes: 16, 32"]),
        (LLAMA, ["takes more tokens", "model.layers.0", "leave prompt_scope out"]),
    ],
    ids=str,
)
def test_where_no_place_takes_a_prompt_the_reasons_are_told(example: Example, words: list[str]) -> None:
    with pytest.raises(TraceError) as caught:
        find_token_sequence(example.build(), example.inputs())
    for word in words:
        assert word in str(caught.value)


def test_an_attention_that_the_trace_cannot_see_is_no_place() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"0 may hold an attention, but stays one call.*depends on the values"):
        find_token_sequence(nn.Sequential(Hidden()), (torch.randn(2, 3, 8),))


@pytest.mark.parametrize("value", [True, False])
def test_a_mask_that_transformers_makes_lets_virtual_tokens_be_seen(value: bool) -> None:
    # a mask by pairs of booleans, whose True keeps
    mask = torch.full((1, 1, 4, 4), value)
    found = mask_with_tokens(mask, "attention_mask", torch.randn(2, 4, 8), 3, "before")
    assert found is not None
    assert found[..., :3].all()
    assert found[..., :3, :].all()
    assert torch.equal(found[..., 3:, 3:], mask)


def test_a_scope_of_which_a_graph_uses_more_than_one_value_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.mean(1)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            tokens, mean = self.pair(x)
            return self.head(tokens) + self.head(mean)[:, None]

    traced: Any = trace(Around(), (torch.randn(2, 3, 8),))
    before = laws.snapshot(traced)
    with pytest.raises(AdaptError, match="can't adapt pair: it returns more than one value: mean is used, too"):
        get_peft_model(traced, scoped("pair", token_dim=8))
    laws.require_unchanged(traced, before, "a refused prompt")


def test_masked_virtual_tokens_change_nothing() -> None:
    class Masked(nn.Module):
        """An attention that leaves out what the mask says, and the tokens at its end."""

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores = (x @ x.mT).masked_fill(mask[:, None] == 0, -torch.inf)
            scores[..., 5:] = -torch.inf
            return scores.softmax(-1) @ x

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = Masked(), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.attention(x, mask))

    model: Any = Encoder()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    base = model(x, mask)
    config = graphpeft.PromptTuningConfig(
        num_virtual_tokens=3, token_dim=8, prompt_scope="attention", prompt_position="after"
    )
    assert equal(get_peft_model(model, config)(x, mask), base)


class Reading(nn.Module):
    """An attention that reads the weight of a layer which it doesn't call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.fc.weight, self.fc.bias)
        return (y @ y.mT).softmax(-1) @ y


def test_lora_acts_inside_a_scope_in_either_order() -> None:
    x, lora = torch.randn(2, 3, 8), LoraConfig(target_modules=["fc"], init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(Reading()), lora, "lora")
    adapted_alone = model(x)
    model.add_adapter("prompt", scoped(["0"], token_dim=8))
    model.set_adapter("prompt")
    prompted_alone = model(x)
    model.set_adapter(["lora", "prompt"])
    both = model(x)
    assert not any(torch.equal(both, alone) for alone in (adapted_alone, prompted_alone))
    other = get_peft_model(nn.Sequential(Reading()), scoped(["0"], token_dim=8), "prompt")
    other.add_adapter("lora", lora)
    other.load_state_dict(model.state_dict())
    other.set_adapter(["prompt", "lora"])
    torch.testing.assert_close(other(x), both)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_whose_values_could_mean_either_is_refused(dtype: torch.dtype) -> None:
    class Masking(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Masking(), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.inner(x, mask))

    model = get_peft_model(Around(), scoped("inner", token_dim=8))
    with pytest.raises(ValueError, match="what its values mean for the virtual tokens isn't known"):
        model(torch.randn(2, 3, 8), torch.ones(2, 3).to(dtype))


@pytest.mark.parametrize("batch", [2, 3])
def test_masks_of_pytorchs_layers_let_virtual_tokens_be_seen(batch: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, hidden = torch.randn(batch, 3, 8), torch.zeros(batch, 3, dtype=torch.bool)
    hidden[0, 2] = True
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    model: Any = get_peft_model(nn.Sequential(layer).train(), scoped(["0"], token_dim=8, num_virtual_tokens=2))
    found = model[0](x, src_mask=causal, src_key_padding_mask=hidden)
    table = model[0].prompt_encoder.default.embedding.weight.detach().expand(batch, -1, -1)
    model.unload()
    expected = layer(
        torch.cat((table, x), dim=1),
        src_mask=nn.functional.pad(causal, (2, 0, 2, 0)),
        src_key_padding_mask=nn.functional.pad(hidden, (2, 0)),
    )
    assert equal(found, expected[:, 2:])


# real data


class HandWrittenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(32), nn.Linear(32, 96)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.mlp(x)


class HandWrittenEncoder(nn.Module):
    """An encoder of patches, (batch, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(48, 32), nn.Parameter(0.1 * torch.randn(64, 32))
        self.blocks, self.head = nn.Sequential(HandWrittenBlock(), HandWrittenBlock()), nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, 4, stride=4).mT
        return self.head(self.blocks(self.embed(patches) + self.place).mean(1))


def digits(first: int) -> tuple[Tensor, Tensor]:
    """Returns scans of four digits, (n, 3, 32, 32), with their numbers from the first on, (n,)."""
    scans: Any = load_digits()
    chosen = (scans.target >= first) & (scans.target < first + 4)
    images = torch.tensor(scans.images[chosen], dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    return nn.functional.interpolate(images, (32, 32)), torch.tensor(scans.target[chosen]) - first


def loss_of(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def fit(model: Any, images: Tensor, labels: Tensor, rate: float) -> float:
    """Trains a model, and returns its loss after that."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(120):
        batch = torch.arange(step * 64, step * 64 + 64) % 600
        loss_of(model, images[batch], labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(loss_of(model.eval(), images, labels))


@pytest.mark.parametrize(
    ("build", "head", "scopes"),
    [
        pytest.param(VIT.build, "head", ("blocks", r"blocks\.\d+"), id="timm-vit"),
        pytest.param(
            TORCHVISION_VIT.build,
            "heads.head",
            ("encoder.layers", r"encoder\.layers\.encoder_layer_\d+"),
            id="torchvision-vit",
        ),
        pytest.param(HandWrittenEncoder, "head", ("blocks", r"blocks\.\d+"), id="hand-written"),
    ],
)
def test_prompts_teach_a_model_other_digits(build: Any, head: str, scopes: tuple[str, str]) -> None:
    # the model's first weights are others in each version of PyTorch, so no bound is close to what was measured
    torch.manual_seed(0)
    base = build()
    assert fit(base, *digits(0), rate=1e-3) < 0.4
    others = digits(4)
    base.requires_grad_(False).get_submodule(head).requires_grad_(True)
    of_head = fit(base, *others, rate=0.03)
    for scope in scopes:
        torch.manual_seed(0)
        config = scoped(scope, num_virtual_tokens=8)
        model = get_peft_model(copy.deepcopy(base), config, example_inputs=(others[0][:2],))
        with torch.no_grad():
            untrained = float(loss_of(model.eval(), *others))
        found = fit(model, *others, rate=0.1)
        # prompts alone are trained
        assert found < 0.95 * untrained
        assert found < 1.15 * of_head


# refusals


def test_a_module_with_a_forward_of_other_arguments_than_its_classs_takes_no_prompt() -> None:
    model: Any = nn.Sequential(Reading())
    model[0].forward = lambda given: given
    with pytest.raises(AdaptError, match=r"its forward was set on the instance .* and takes other arguments"):
        get_peft_model(model, scoped(["0"], token_dim=8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_scope": "bloks"}, ["names no module", "near misses"]),
        ({"prompt_scope": "patch_embed.proj"}, ["(2, 3, 32, 32)", "no token sequence"]),
        ({}, ["get_input_embeddings", "prompt_scope"]),
    ],
    ids=["no module", "no tokens", "no scope"],
)
def test_what_takes_no_prompt_is_refused(options: dict[str, Any], words: list[str]) -> None:
    model = VIT.build()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError) as caught:
        get_peft_model(
            model, graphpeft.PromptTuningConfig(num_virtual_tokens=2, **options), example_inputs=VIT.inputs()
        )
    for word in words:
        assert word in str(caught.value)
    laws.require_unchanged(model, before, "a refused prompt")


@pytest.mark.parametrize(
    ("body", "options", "words"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16), {}, "batch_first=True"),
        (Qkv(), {"token_dim": 5}, "token_dim is 5, and tokens have [8] values"),
    ],
    ids=["batch second", "token_dim"],
)
def test_a_scope_that_would_not_see_the_prompt_is_refused(body: nn.Module, options: Any, words: str) -> None:
    model = around(body, lambda body, x: body(x, x, x) if isinstance(body, Qkv) else body(x))
    before = laws.snapshot(model)
    with pytest.raises(AdaptError) as caught:
        get_peft_model(model, scoped("body", **options), example_inputs=(torch.randn(2, 5, 8),))
    assert words in str(caught.value)
    laws.require_unchanged(model, before, "a refused prompt")


def test_without_example_inputs_the_size_of_a_token_must_be_given() -> None:
    config = graphpeft.PromptTuningConfig(num_virtual_tokens=2, prompt_scope="blocks")
    with pytest.raises(AdaptError, match=r"size of a token isn't known.*example_inputs, or set token_dim"):
        get_peft_model(VIT.build(), config)
