"""Where an adapted or traced model could answer wrongly without a word, it answers rightly or raises."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import gc
import logging
import math
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from kinds import ROUNDED
from models import GPT2, tiny_classifier
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import (
    AdamssConfig,
    AdaptError,
    GuardError,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    NeedsInputsError,
    OSFConfig,
    PeftModel,
    TraceError,
    UniLoraConfig,
    VeraConfig,
    convert_to_lora,
    explain,
    get_peft_model,
    optimize,
    own_weight,
    trace,
)
from graphpeft.graph import ops
from graphpeft.testing import laws

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 4))


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), **options)


def module_of(forward: Any, **members: Any) -> Any:
    """Returns a module with this forward and these members."""
    made = type("Made", (nn.Module,), {"forward": forward})()
    for name, value in members.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made


def assert_adapted_truly(model: nn.Module, *targets: str, inputs: tuple[Any, ...] = (X,)) -> None:
    """Asserts that the adapted model is the base with its deltas, in place and traced."""
    laws.assert_adapted_is_base_with_delta(lambda: copy.deepcopy(model), lora(*targets), inputs)
    laws.assert_traced_is_adapted_alike(lambda: copy.deepcopy(model), lora(*targets), inputs)


# who uses a weight, and how


@pytest.mark.parametrize("declared", ["ab", "ba"])
def test_adjacent_weights_are_adapted_in_any_order_of_declaration(declared):
    model = module_of(
        lambda self, x: F.linear(F.linear(F.linear(x, self.a), self.b), self.a), **{name: weight() for name in declared}
    )
    assert_adapted_truly(nn.Sequential(model), "0.a", "0.b")


def test_a_weight_that_a_module_around_reads_is_adapted_there():
    model = module_of(lambda self, x: F.linear(x, self.qkv.weight, self.qkv.bias), qkv=nn.Linear(4, 4))
    assert_adapted_truly(model, "qkv")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x @ self.fc.weight.T,
        lambda self, x: x @ self.fc.weight.t() + self.fc.bias.view(-1),
    ],
    ids=["attribute", "method"],
)
def test_a_weight_of_which_a_module_around_reads_something_is_adapted_there(forward):
    assert_adapted_truly(module_of(forward, fc=nn.Linear(4, 4)), "fc")


def hooked() -> nn.Module:
    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2

    layer = nn.Linear(4, 4)
    layer.register_forward_hook(doubled)
    return layer


READ_BESIDE_CALLS = {
    "embedding": (lambda self, x: self.part(x[..., 0].long() % 4) @ self.part.weight.T, lambda: nn.Embedding(4, 4)),
    "cast": (lambda self, x: F.linear(self.part(x), self.part.weight.to(x.dtype)), lambda: nn.Linear(4, 4)),
    "hooked": (lambda self, x: F.linear(self.part(x), self.part.weight), hooked),
    "attention": (
        lambda self, x: self.part(x, x, x)[0] @ self.part.in_proj_weight.T,
        lambda: nn.MultiheadAttention(4, 2),
    ),
}


@pytest.mark.parametrize(("forward", "part"), READ_BESIDE_CALLS.values(), ids=READ_BESIDE_CALLS)
def test_a_weight_that_is_read_beside_calls_that_are_more_than_an_operation_is_adapted_in_both(forward, part):
    assert_adapted_truly(module_of(forward, part=part()), "part")


@pytest.mark.parametrize("part", [nn.Embedding(4, 4), nn.Linear(4, 4)])
def test_such_a_weight_is_adapted_where_the_graph_around_has_another_site(part):
    def forward(self, x):
        found = self.part(x[..., 0].long() % 4 if isinstance(self.part, nn.Embedding) else x)
        return F.linear(x, self.first) + found @ self.part.weight.T.exp()

    model = module_of(forward, part=part, first=weight())
    assert_adapted_truly(model, "part")
    assert_adapted_truly(model, "part", "first")
    assert_adapted_truly(trace(model, (X,)), "part", "first")


def test_a_weight_whose_rows_calls_shorten_is_an_error_where_it_is_read_beside_them():
    model = module_of(READ_BESIDE_CALLS["embedding"][0], part=nn.Embedding(4, 4, max_norm=0.5))
    adapted = get_peft_model(model, lora("part"))
    with pytest.raises(AdaptError, match=r"read by code beside the operation .* LORA does there is no change"):
        adapted(X)


def test_a_weight_that_is_called_and_read_is_adapted_in_both_uses():
    model = module_of(lambda self, x: F.linear(self.fc(x), self.fc.weight), fc=nn.Linear(4, 4))
    assert_adapted_truly(model, "fc")


@pytest.mark.parametrize(
    "product", [lambda x, w: torch.matmul(other=w, input=x), lambda x, w: torch.mm(mat2=w, input=x.flatten(0, -2))]
)
def test_operands_of_a_product_may_be_named_in_any_order(product):
    model = module_of(lambda self, x: product(x, self.fc.weight), fc=nn.Linear(4, 4))
    [adapted] = explain(model, lora("fc")).adapted
    assert adapted.site.op is ops.Linear
    assert_adapted_truly(model, "fc")


def test_a_convolution_that_pads_in_a_circle_is_changed_so_in_a_trace_too():
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"))
    assert_adapted_truly(model, "0", inputs=(torch.randn(2, 3, 5),))


def test_a_product_that_is_multiplied_by_a_factor_is_changed_with_it():
    model = module_of(lambda self, x: torch.addmm(self.b, x, self.w, alpha=2), w=weight(), b=torch.ones(4))
    assert_adapted_truly(model, "w", inputs=(X[0],))


def test_a_weight_that_one_module_reads_and_another_calls_is_adapted_in_both():
    sub = module_of(lambda self, x: self.fc(x), fc=nn.Linear(4, 4))
    assert_adapted_truly(module_of(lambda self, x: self.sub(x) + F.linear(x, self.sub.fc.weight), sub=sub), "fc")
    part = module_of(lambda self, x: F.linear(x, self.fc.weight), fc=nn.Linear(4, 4))
    assert_adapted_truly(module_of(lambda self, x: self.part(x) + self.part.fc(x), part=part), "fc")


def test_a_weight_that_a_flat_graph_reads_and_a_call_in_it_uses_is_adapted_in_both():
    sub = module_of(lambda self, x: self.fc(x) if x.sum() > -100 else x, fc=nn.Linear(4, 4))
    model: Any = trace(module_of(lambda self, x: self.sub(x) + F.linear(x, self.sub.fc.weight), sub=sub), (X,))
    assert set(model.kept) == {"sub"}
    laws.assert_adapted_is_base_with_delta(lambda: copy.deepcopy(model), lora("fc"), (X,))


@pytest.mark.parametrize("read", [lambda a: a.out_proj.weight, lambda a: a.in_proj_weight], ids=["out_proj", "in_proj"])
def test_an_attention_whose_weights_are_read_is_traced_with_its_inside(read):
    def forward(self, x):
        return F.linear(self.attention(x, x, x, need_weights=False)[0], read(self.attention))

    base = module_of(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    config = lora("attention", init_lora_weights=False)
    laws.assert_adapted_is_base_with_delta(lambda: trace(copy.deepcopy(base), (X,)), config, (X,))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.linear(x, self.w) / self.w.norm(),
        lambda self, x: torch.einsum("ii,io->io", x[:, :4, 0], self.w),
        lambda self, x: torch.cat([F.linear(x, self.w[:2]), x @ self.w.T], -1),
    ],
    ids=["beside its norm", "of a diagonal", "of a part and of the whole"],
)
def test_a_weight_with_other_uses_is_changed_for_all_of_them(forward):
    made = nn.Sequential(module_of(forward, w=weight()))

    def build():
        return copy.deepcopy(made)

    config = lora("w", init_lora_weights=False)
    laws.assert_adapted_is_base_with_delta(build, config, (torch.randn(4, 4, 4),))
    assert get_peft_model(build(), config).adapter_report().adapted[0].site.op is ops.Weight


def test_a_weight_whose_result_goes_nowhere_is_refused():
    def forward(self, x):
        F.linear(x, self.w)
        return x

    with pytest.raises(AdaptError, match="no output depends"):
        get_peft_model(nn.Sequential(module_of(forward, w=weight())), lora("w"))


def test_a_weight_whose_result_is_written_into_the_output_is_adapted():
    def forward(self, x):
        out = torch.empty_like(x)
        out.copy_(F.linear(x, self.w))
        return out

    assert_adapted_truly(nn.Sequential(module_of(forward, w=weight())), "w")


def test_a_weight_of_convolutions_in_different_groups_is_adapted_in_all_of_them():
    def forward(self, x):
        return F.conv1d(x[:, :2], self.w) * F.conv1d(x, self.w, groups=3)

    model = nn.Sequential(module_of(forward, w=nn.Parameter(torch.randn(9, 2, 4))))
    assert_adapted_truly(model, "w", inputs=(torch.randn(5, 6, 7),))


@pytest.mark.parametrize("fast_path", [True, False])
def test_layers_that_torch_reads_without_calling_them_are_adapted_in_what_reads_them(fast_path):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    targets = ("linear1", "linear2", "out_proj", "in_proj_weight")
    for mode in (True, False):
        model = get_peft_model(copy.deepcopy(encoder).eval(), lora(*targets, init_lora_weights=False))
        regions = {adapted.site.region for adapted in model.adapter_report().adapted}
        assert {path.removesuffix(".self_attn")[:8] for path in regions} == {"layers.0", "layers.1"}
        merged = copy.deepcopy(model).merge_and_unload()
        torch.backends.mha.set_fastpath_enabled(fast_path)
        try:
            with torch.set_grad_enabled(mode):
                laws.require_close(model(X), merged(X), 1e-5, "adapted and merged")
                with model.disable_adapter():
                    laws.require_close(model(X), encoder.eval()(X), 1e-5, "disabled and the base")
                    assert not torch.allclose(model(X), merged(X))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_dropout_where_a_weight_has_no_input_is_refused():
    with pytest.raises(AdaptError, match=r"lora_dropout=0\.5 drops elements.*set lora_dropout=0"):
        get_peft_model(module_of(lambda self, x: x * self.w.sigmoid(), w=weight()), lora("w", lora_dropout=0.5))


def test_dropout_at_a_layer_of_an_encoder_is_pefts_though_that_has_a_fast_path():
    torch.manual_seed(0)
    encoder, found = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), []
    for library in (peft, graphpeft):
        torch.manual_seed(1)
        config = library.LoraConfig(r=2, target_modules=["linear1"], lora_dropout=0.5, init_lora_weights=False)
        model = library.get_peft_model(copy.deepcopy(encoder), config).train()
        torch.manual_seed(2)
        found.append(model(X))
    torch.testing.assert_close(found[1], found[0])
    with torch.no_grad():
        adapted = model.eval()(X)
        torch.testing.assert_close(model.merge_and_unload()(X), adapted)


def test_a_method_that_uses_the_weight_is_adapted_where_it_is_called_beside_the_forward():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = weight()

        def encode(self, x):
            return x @ self.proj

        def forward(self, x):
            return self.encode(x) * 2

    model: Any = get_peft_model(nn.Sequential(Clip()), lora("proj", init_lora_weights=False))
    torch.testing.assert_close(model[0].encode(X) * 2, model(X))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged[0].encode(X), model[0].encode(X))


def test_a_layer_used_both_ways_round_is_adapted_in_both():
    def forward(self, x):
        return self.enc(x) @ self.enc.weight

    assert_adapted_truly(module_of(forward, enc=nn.Linear(4, 6, bias=False)), "enc")
    model, inputs = GPT2.build(), GPT2.inputs()
    laws.assert_traced_is_adapted_alike(lambda: copy.deepcopy(model), GPT2.config(), inputs)


def test_merging_a_tied_weight_is_refused():
    model = module_of(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    adapted = laws.perturbed(get_peft_model(model, lora("a")))
    before = laws.run(adapted, (X,))
    with pytest.raises(AdaptError, match=r"a\.weight is tied to b\.weight"):
        adapted.merge_and_unload()
    assert torch.equal(laws.run(adapted, (X,)), before)


def _over_a_buffer(model: Any) -> None:
    numbers = torch.randn(20)
    model.a.weight = nn.Parameter(numbers[:16].view(4, 4))
    model.register_buffer("beside", numbers[5:9])


def _expanded(model: Any) -> None:
    model.a.weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))


@pytest.mark.parametrize(
    ("share", "reason"),
    [(_over_a_buffer, r"a\.weight is tied to beside"), (_expanded, r"numbers of a\.weight share memory")],
)
def test_merging_into_memory_that_something_else_has_is_refused(share: Callable[[nn.Module], None], reason: str):
    model = module_of(lambda self, x: self.a(x), a=nn.Linear(4, 4))
    share(model)
    adapted = laws.perturbed(get_peft_model(model, lora("a")))
    before = laws.run(adapted, (X,))
    with pytest.raises(AdaptError, match=reason):
        adapted.merge_adapter()
    assert torch.equal(laws.run(adapted, (X,)), before)


def test_an_adapter_named_twice_is_merged_once():
    model = nn.Sequential(nn.Linear(4, 4))
    adapted = laws.perturbed(get_peft_model(model, lora("0")))
    expected = adapted(X)
    merged = adapted.merge_and_unload(adapter_names=["default", "default"])
    torch.testing.assert_close(merged(X), expected)


# what a lifted graph depends on


def test_modules_that_differ_inside_get_graphs_of_their_own():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.w) * self.inner.eps

    def block(depth: int, eps: float) -> nn.Module:
        layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        made = Block()
        made.layers, made.inner, made.w = layers, nn.LayerNorm(4, eps=eps), weight()
        return made

    Block: Any = type("Block", (nn.Module,), {"forward": forward})
    assert_adapted_truly(nn.Sequential(block(1, 0.5), block(3, 0.5), block(1, 2.0)), "0.w", "1.w", "2.w")


def test_a_class_that_changes_between_two_adaptations_is_recorded_anew():
    class Scaled(nn.Module):
        factor = 2

        def __init__(self):
            super().__init__()
            self.w = weight()

        def forward(self, x):
            return F.linear(x, self.w) * self.factor

    assert_adapted_truly(nn.Sequential(Scaled()), "0.w")
    Scaled.factor = 5
    assert_adapted_truly(nn.Sequential(Scaled()), "0.w")
    Scaled.forward = lambda self, x: x @ self.w + 1  # type: ignore[method-assign]
    assert_adapted_truly(nn.Sequential(Scaled()), "0.w")


def test_two_names_of_one_weight_are_a_fact_about_a_module():
    class Two(nn.Module):
        def __init__(self, tied: bool):
            super().__init__()
            self.a = weight()
            self.b = self.a if tied else weight()

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.a)), self.b)

    for tied in (False, True, False):
        model = nn.Sequential(Two(tied))
        adapted = get_peft_model(copy.deepcopy(model), lora("0.a"))
        assert torch.equal(adapted(X), model(X))


def test_numbers_and_flags_of_an_adapted_module_stay_alive():
    def forward(self, x):
        y = F.linear(x, self.w) * self.temperature
        return y if self.on else -y

    model = get_peft_model(nn.Sequential(module_of(forward, w=weight(), temperature=2.0, on=True)), lora("w"))
    before = model(X)
    model[0].temperature = 4.0
    assert torch.equal(model(X), 2 * before)
    model[0].on = False
    with pytest.raises(GuardError, match=r"self\.on"):
        model(X)


def test_numbers_of_modules_inside_an_adapted_module_stay_alive():
    def forward(self, x):
        return F.linear(x, self.w) * self.inner.scale + self.inner(x)

    model: Any = nn.Sequential(module_of(forward, w=weight(), inner=module_of(lambda self, x: x, scale=2.0)))
    adapted = get_peft_model(copy.deepcopy(model), lora("w"))
    for changed in (model, adapted):
        changed[0].inner.scale = 5.0
    assert torch.equal(adapted(X), model(X))


@pytest.mark.parametrize("value", [None, "gelu"])
def test_strings_and_absent_attributes_of_an_adapted_module_are_checked(value):
    def forward(self, x):
        y = F.linear(x, self.w)
        return F.relu(y) if self.activation == "relu" else y if self.activation is None else F.gelu(y)

    model: Any = nn.Sequential(module_of(forward, w=weight(), activation=value))
    adapted = get_peft_model(copy.deepcopy(model), lora("w"))
    assert torch.equal(adapted(X), model(X))
    adapted[0].activation = "relu"
    with pytest.raises(GuardError, match=r"self\.activation"):
        adapted(X)


FACTOR = 2.0


def test_a_global_that_changes_between_two_adaptations_is_recorded_anew(monkeypatch):
    model = nn.Sequential(module_of(lambda self, x: F.linear(x, self.w) * FACTOR, w=weight()))
    get_peft_model(copy.deepcopy(model), lora("w"))
    monkeypatch.setitem(globals(), "FACTOR", 7.0)
    assert torch.equal(get_peft_model(copy.deepcopy(model), lora("w"))(X), model(X))


def _scaled(x):
    return x * FACTOR


class AsksForBias(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.w = weight()
        self.register_parameter("bias", nn.Parameter(torch.randn(4)) if bias else None)


class AsksItsDictionary(AsksForBias):
    def forward(self, x):
        bias = self._parameters["bias"]
        return F.linear(x, self.w) if bias is None else F.linear(x, self.w, bias)


class AsksItsParameters(AsksForBias):
    def forward(self, x):
        y = F.linear(x, self.w)
        for name, parameter in self.named_parameters():
            y = y + parameter if name == "bias" else y
        return y


class AsksBySettings(AsksForBias):
    def forward(self, x):
        return self.helper(F.linear(x, self.w))

    def helper(self, x):
        return _scaled(x)


@pytest.mark.parametrize("cls", [AsksItsDictionary, AsksItsParameters])
def test_modules_that_look_at_their_parameters_share_no_graph(cls):
    model = nn.Sequential(cls(bias=False), cls(bias=True))
    assert torch.equal(get_peft_model(copy.deepcopy(model), lora("w"))(X), model(X))


def test_a_global_that_a_helper_reads_is_recorded_anew(monkeypatch):
    model = nn.Sequential(AsksBySettings(bias=False))
    get_peft_model(copy.deepcopy(model), lora("w"))
    monkeypatch.setitem(globals(), "FACTOR", 7.0)
    assert torch.equal(get_peft_model(copy.deepcopy(model), lora("w"))(X), model(X))


@pytest.mark.parametrize("training", [True, False])
def test_flags_that_are_compared_by_identity_are_checked(training):
    def forward(self, x):
        y = F.linear(x, self.w)
        return -y if self.on is True else y * 2 if self.training is True else y

    model: Any = nn.Sequential(module_of(forward, w=weight(), on=False)).train(training)
    adapted, traced = get_peft_model(copy.deepcopy(model), lora("w")), trace(model, (X,))
    for mode in (training, not training):
        expected = model.train(mode)(X)
        assert torch.equal(adapted.train(mode)(X), expected)
        assert torch.equal(traced.train(mode)(X), expected)
    adapted[0].on = True
    with pytest.raises(GuardError, match=r"self\.on is True"):
        adapted(X)


def test_attributes_are_matched_as_the_model_does():
    def forward(self, x):
        y = F.linear(x, self.w)
        match self.on:
            case True:
                y = y + 1
        match self.size:
            case int():
                y = 2 * y
        match (self.on, self.size):
            case (True, 3):
                y = y - 3
        return y

    model: Any = nn.Sequential(module_of(forward, w=weight(), on=True, size=3))
    assert torch.equal(get_peft_model(copy.deepcopy(model), lora("w"))(X), model(X))


@pytest.mark.parametrize("on", [True, False])
def test_flags_that_are_compared_by_is_not_are_read(on):
    def forward(self, x):
        return F.linear(x, self.w) if self.on is not True else -F.linear(x, self.w)

    model: Any = nn.Sequential(module_of(forward, w=weight(), on=on))
    adapted, traced = get_peft_model(copy.deepcopy(model), lora("w")), trace(model, (X,))
    assert torch.equal(adapted(X), model(X))
    assert torch.equal(traced(X), model(X))


def test_a_decision_on_the_gradient_mode_is_checked():
    def forward(self, x):
        return F.linear(x, self.w) * 2 if torch.is_grad_enabled() else F.linear(x, self.w)

    model = nn.Sequential(module_of(forward, w=weight()))
    for made in (get_peft_model(copy.deepcopy(model), lora("w")), trace(model, (X,))):
        assert torch.equal(made(X), model(X))
        with torch.no_grad(), pytest.raises(GuardError, match=r"torch\.is_grad_enabled"):
            made(X)
    with torch.no_grad():
        other = get_peft_model(copy.deepcopy(model), lora("w"))
        assert torch.equal(other(X), model(X))


def test_a_model_that_threads_trace_and_run_meanwhile_stays_as_it_is():
    def forward(self, x):
        return F.linear(x, self.w) * 2 if self.training else F.linear(x, self.w)

    model: Any = nn.Sequential(*(module_of(forward, w=weight()) for _ in range(3))).eval()
    expected, wrong = model(X), []

    def run():
        for _ in range(200):
            wrong.extend([] if torch.equal(model(X), expected) else [1])

    threads = [threading.Thread(target=trace, args=(model, (X,))) for _ in range(4)]
    threads += [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(module.training for module in model.modules())


def test_the_other_mode_is_recorded_with_the_example_inputs():
    def forward(self, x):
        y = F.linear(x, self.w)
        return y * 2 if self.training and x.shape[0] > 1 else y

    model = nn.Sequential(module_of(forward, w=weight())).eval()
    adapted = get_peft_model(copy.deepcopy(model), lora("w"), example_inputs=(X,))
    for mode in (True, False):
        assert torch.equal(adapted.train(mode)(X), model.train(mode)(X))


def test_a_dtype_that_the_forward_asks_for_follows_the_module():
    model = nn.Sequential(module_of(lambda self, x: F.linear(x.to(self.w.dtype), self.w), w=weight()))
    adapted = get_peft_model(model, lora("w")).double()
    assert adapted(X.double()).dtype == torch.float64


def test_lifting_reads_the_modules_own_tensors_not_another_adapters():
    layer = module_of(lambda self, x: F.linear(x, self.w, self.bias), w=weight(), bias=nn.Parameter(torch.zeros(4)))
    model: Any = nn.Sequential(layer, nn.Linear(4, 4))
    base = model(X)
    get_peft_model(model, lora("1", bias="all"), "first")
    with torch.no_grad():
        model[0].first.bias.add_(10)
    get_peft_model(model, lora("0.w"), "second")
    assert torch.equal(model(X), base)


def test_a_buffer_that_a_forward_assigns_moves_the_override_alone():
    def forward(self, x):
        self.mean = 0.5 * self.mean + x.mean()
        return x * self.scale

    model = nn.Sequential(nn.Linear(4, 4), module_of(forward, mean=torch.zeros(()), scale=nn.Parameter(torch.ones(4))))
    adapted = get_peft_model(model, lora("0", modules_to_save=["1"]))
    adapted(X)
    assert adapted[1].default.mean != 0
    adapted.set_adapter([])
    assert adapted.unload()[1].mean == 0


def test_a_state_dict_that_is_assigned_reaches_the_tensors_behind_overrides():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora("0", modules_to_save=["1"]))
    expected = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(expected, assign=True)
    laws.require_equal(dict(model.state_dict()), expected, "assigning loads other values")
    assert torch.equal(model[1].weight, expected["1.default.weight"])


# what a trace must not lose


def _in_place(x):
    y = x * 1
    z = y
    z += 1
    view = y[:, 0]
    view *= 2
    return y


def _in_place_on_a_list(x):
    parts = list((x * 1).unbind(1))
    parts[0] -= 1
    return torch.stack(parts)


def _key_and_value(pair):
    key, value = pair
    return key if value is None else key * 2


def _of_a_dict(inputs):
    total = 0
    for name, value in inputs.items():
        if value is not None:
            total = total + value * len(name)
    return total


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (_in_place, X),
        (_in_place_on_a_list, X),
        (_key_and_value, (X, None)),
        (_key_and_value, (X, X)),
        (_of_a_dict, {"a": X, "bb": None, "ccc": X}),
    ],
)
def test_what_python_does_with_values_is_recorded(function, inputs):
    model = module_of(lambda self, inputs: function(inputs))
    laws.require_equal(laws.run(trace(model, (inputs,)), (inputs,)), laws.run(model, (inputs,)), function.__name__)


def test_none_that_a_layer_returns_is_none():
    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=False)
        return y if weights is None else y * 100

    model = module_of(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True))
    assert torch.equal(trace(model, (X,))(X), model(X))


def test_other_kinds_of_inputs_are_noticed():
    model = module_of(lambda self, inputs: sum(inputs[key] for key in inputs))
    with pytest.raises(GuardError):
        trace(model, ({"a": X},))({"a": X, "b": X})
    either = module_of(lambda self, x: x[0] if isinstance(x, list) else x)
    with pytest.raises(GuardError, match="'Tensor'"):
        trace(either, (X,))([X])
    with pytest.raises(NeedsInputsError):
        trace(either)


def test_hooks_of_the_model_itself_act():
    model = nn.Sequential(nn.Linear(4, 4))
    factor: Any = -2  # which type checkers would take for the output
    model.register_forward_hook(lambda module, args, out: factor * out)
    model[0].register_forward_hook(lambda module, args, out: factor * out)
    assert torch.equal(trace(model, (X,))(X), model(X))
    assert_adapted_truly(model, "0")


def test_an_attribute_set_on_a_value_is_an_error():
    def forward(self, x):
        y = x * 1
        y.grad = x
        return y

    with pytest.raises(TraceError, match="sets an attribute"):
        trace(module_of(forward), (X,))


def test_random_numbers_of_python_keep_a_module_a_call():
    model = nn.Sequential(module_of(lambda self, x: x * random.random()))
    traced: Any = trace(model, (X,))
    assert "draws random numbers" in traced.kept["0"]
    assert not torch.equal(traced(X), traced(X))


def test_tensors_made_by_any_name_are_new_in_each_run():
    from torch import randn

    def forward(self, x):
        total = torch.as_tensor([0.0, 0.0, 0.0, 0.0])
        total += x[0, 0]
        return total + randn(4)

    traced = trace(module_of(forward), (X,))
    assert torch.equal(laws.run(traced, (X,)), laws.run(module_of(forward), (X,)))
    assert not torch.equal(traced(X), traced(X))


def test_a_dataclass_with_an_absent_value_keeps_it_absent():
    @dataclasses.dataclass
    class Out:
        y: torch.Tensor
        extra: int | None = 7

    assert trace(module_of(lambda self, x: Out(x, None)), (X,))(X).extra is None


def test_a_loss_made_inside_a_forward_is_traced():
    model = tiny_classifier().eval()
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    laws.require_equal(laws.run(trace(model, inputs), inputs).loss, laws.run(model, inputs).loss, "the loss")


def test_extra_arguments_may_follow_defaults():
    named = module_of(lambda self, x, mask=None, **options: x + options["shift"])
    assert torch.equal(trace(named, {"x": X, "shift": 2})(X, shift=3), X + 3)
    positional = module_of(lambda self, x, mask=None, *rest: x * rest[0])
    assert torch.equal(trace(positional, (X, None, X))(X, None, 2 * X), X * (2 * X))


UNLIMITED = float("inf")


class _Clipped(nn.Module):
    def forward(self, x: torch.Tensor, limit: float = UNLIMITED) -> torch.Tensor:
        return x * 2 if limit is UNLIMITED else x.clamp(max=limit)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("example", [None, (X,)])
def test_a_default_is_the_object_that_the_model_declares(by_name: bool, example: tuple[torch.Tensor] | None):
    def forward(self: Any, x: torch.Tensor, limit: float = UNLIMITED) -> torch.Tensor:
        return self.inner(x @ self.w, limit)

    def forward_by_name(self: Any, x: torch.Tensor, *, limit: float = UNLIMITED) -> torch.Tensor:
        return self.inner(x @ self.w, limit)

    model = module_of(forward_by_name if by_name else forward, w=weight(), inner=_Clipped())
    before = model(X)
    get_peft_model(model, lora("w"), example_inputs=example)
    for adapted in (model, copy.deepcopy(model)):
        torch.testing.assert_close(adapted(X), before)


# threads, classes and other people's code


def test_threads_trace_one_after_the_other():
    results, threads = [], []

    def work():
        results.append(trace(nn.Sequential(nn.Linear(4, 4), nn.GELU()), (X,))(X).shape)

    for _ in range(4):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert results == [X.shape] * 4


def test_a_registry_of_subclasses_sees_no_new_ones():
    registered = []

    class Base(nn.Module):
        def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
            registered.append(name)

    class Mine(Base, name="mine"):
        def __init__(self):
            super().__init__()
            self.w = weight()

        def forward(self, x):
            return F.linear(x, self.w)

    adapted = get_peft_model(Mine(), lora("w"))
    assert registered == ["mine"]
    assert type(adapted.unload()) is Mine


def test_the_class_of_an_adapted_layer_still_builds_plain_layers():
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    assert type(type(adapted[0])(4, 2)) is nn.Linear


def test_a_module_with_attributes_of_a_graph_module_runs_its_own_code():
    model = nn.Sequential(module_of(lambda self, x: F.linear(x, self.w), w=weight(), graph=3))
    laws.assert_adapted_is_base_with_delta(lambda: copy.deepcopy(model), lora("w"), (X,))
    assert model[0].graph == 3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disable": lambda model: model.disable_adapter().__enter__(),
    "unload": lambda model: model.unload(),
    "merge": lambda model: model.merge_adapter(),
    "activate": lambda model: model.set_adapter([]),
    "delete": lambda model: model.delete_adapter("default"),
    "add": lambda model: model.add_adapter("other", lora("0")),
    "save": lambda model: model.save_pretrained("never"),
    "optimize": lambda model: optimize(model),
    "mixed batch": lambda model: model(X, adapter_names=["default", "__base__"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_class_that_somebody_exchanged_after_adapting_is_an_error(change):
    base = nn.Sequential(nn.Linear(4, 4))
    expected = base(X)
    adapted: Any = get_peft_model(base, lora("0", init_lora_weights=False))
    nn.utils.parametrizations.weight_norm(adapted[0])
    before = adapted(X)
    match = "the class of 0 was exchanged since it was adapted, for a ParametrizedLinear, .*take that off first, as"
    with pytest.raises(AdaptError, match=match):
        CHANGES[change](adapted)
    assert torch.equal(adapted(X), before)
    nn.utils.parametrize.remove_parametrizations(adapted[0], "weight")
    torch.testing.assert_close(adapted.unload()(X), expected)
    assert type(base[0]) is nn.Linear


def test_a_class_that_somebody_exchanged_after_merging_is_an_error():
    adapted: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    adapted.merge_adapter()
    nn.utils.parametrizations.weight_norm(adapted[0])
    with pytest.raises(AdaptError, match="the class of 0 was exchanged since it was adapted"):
        adapted.unmerge_adapter()


def test_an_adapted_module_with_a_parametrised_tensor_can_be_copied():
    layer = module_of(lambda self, x: F.linear(F.linear(x, self.v), self.w), w=weight(), v=weight())
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(layer, "v"))
    adapted = get_peft_model(model, lora("w", init_lora_weights=False))
    assert torch.equal(copy.deepcopy(adapted)(X), adapted(X))


def test_a_replaced_child_does_not_stop_unloading():
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora("0", "1"))
    adapted._modules["1"] = nn.Linear(4, 4)
    assert not isinstance(adapted.unload(), PeftModel)
    assert [type(layer) for layer in adapted] == [nn.Linear, nn.Linear]


def test_a_replaced_child_stops_neither_switching_to_another_adapter_nor_deleting():
    adapted = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)), lora("0.0", "1"))
    adapted.add_adapter("other", lora("1"))
    adapted.add_adapter("waiting", lora("0.0"))
    adapted._modules["0"] = nn.Identity()
    for use, name in [
        (adapted.save_pretrained, "default"),
        (adapted.set_adapter, "default"),
        (adapted.set_adapter, "waiting"),
    ]:
        with pytest.raises(AdaptError, match=rf"0\.0\.{name}.lora_A of adapter '{name}' is gone"):
            use(name)
    with pytest.warns(UserWarning, match="'other' is active now"):
        adapted.delete_adapter("default")
    adapted.set_adapter("other")
    assert list(adapted.peft_config) == ["other", "waiting"]


def test_an_attribute_of_the_class_in_an_adapters_place_is_noticed():
    Occupied = type("Occupied", (nn.Linear,), {"default": property(lambda self: self.weight)})
    with pytest.raises(AdaptError, match="has an attribute 'default' already"):
        get_peft_model(nn.Sequential(Occupied(4, 4)), lora("0"))


def test_a_weight_that_is_named_twice_is_refused():
    class Two(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            layer = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({"a": weight(), **layer})

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(F.linear(input, self.get_parameter("a")), self.weight)

    with pytest.raises(AdaptError, match="both target_modules and target_parameters name its weight"):
        get_peft_model(nn.Sequential(Two()), lora("0", target_parameters=["0.a", "0.weight"]))


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_a_weight_that_is_named_by_its_own_path_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"'{name}' in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora("0", name))


@pytest.mark.parametrize(("name", "value"), [("lora_dropout", 1.5), ("layers_to_transform", [1])])
def test_values_that_are_set_on_a_config_afterwards_are_checked(name, value):
    config = LoraConfig(r=2, target_modules="0")
    setattr(config, name, value)
    with pytest.raises(AdaptError, match=name):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)


def test_a_graph_that_was_exchanged_is_an_error():
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    adapted[0].graph = graph
    adapted.set_adapter([])
    with pytest.raises(AdaptError, match="the graph of 0 was exchanged since it was adapted"):
        adapted.set_adapter("default")
    with pytest.raises(AdaptError, match="no operation that a rule adapts uses its weight"):
        get_peft_model(adapted, lora("0"), "other")


def test_dropped_models_leave_no_graphs_behind():
    references = []
    for _ in range(4):
        traced: Any = trace(nn.Sequential(nn.Linear(4, 4)))
        references.append(weakref.ref(traced.graph))
    # first the models with their classes, then what was kept under these
    gc.collect()
    gc.collect()
    assert [reference() for reference in references[:-1]] == [None] * 3


def test_a_replaced_child_is_not_merged_in_part():
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora("0", "1", init_lora_weights=False))
    adapted._modules["1"] = nn.Linear(4, 4)
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(AdaptError, match=r"1\.default.lora_A of adapter 'default' is gone"):
        adapted.merge_and_unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())


def test_loading_an_adapter_leaves_the_modes_of_modules(tmp_path):
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)).train(), lora("0"))
    adapted[1].eval()
    adapted.save_pretrained(tmp_path)
    adapted.load_adapter(tmp_path, "other")
    assert adapted[0].training
    assert not adapted[1].training
    assert adapted.active_adapters == ["default"]


def test_a_misspelt_module_to_save_is_an_error():
    with pytest.raises(AdaptError, match="haed: modules_to_save names no module; near misses: head"):
        get_peft_model(
            nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)}), lora("body", modules_to_save=["haed"])
        )


def test_a_second_adapter_goes_onto_a_module_that_is_called_on_its_weights():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model: Any = nn.Sequential(module_of(lambda self, x: self.inner(x, x, x)[0], inner=attention)).eval()
    get_peft_model(model, lora("inner", init_lora_weights=False))
    first = model(X)
    model.add_adapter("second", lora("inner", init_lora_weights=False))
    model.set_adapter(["default", "second"])
    both = model(X)
    assert not torch.allclose(first, both)
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    model.set_adapter(["default", "second"])
    laws.require_close(model.merge_and_unload(adapter_names=["default", "second"])(X), both, 1e-5, "both merged")


# readers whose source doesn't say which weight they read


class Hidden(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.inner: Any = nn.ModuleDict({"l": nn.Linear(4, 4)})
        self.weights = [self.inner["l"].weight]
        self.read = read
        self.by_closure = lambda x: F.linear(x, self.inner["l"].weight)

    def forward(self, x):
        if self.read == "getattr":
            return F.linear(x, getattr(self.inner["l"], "weight"))  # noqa: B009
        if self.read == "list":
            return F.linear(x, self.weights[0])
        if self.read == "closure":
            return self.by_closure(x)
        return F.linear(x, dict(self.named_parameters())["inner.l.weight"])


@pytest.mark.parametrize("read", ["getattr", "list", "closure", "named_parameters"])
def test_a_weight_that_is_read_in_a_hidden_way_is_adapted_or_refused(read):
    model: Any = nn.Sequential(Hidden(read))
    base = model(X)
    try:
        get_peft_model(model, lora("l", init_lora_weights=False))
    except AdaptError:
        assert torch.equal(model(X), base)
        return
    adapted = model(X)
    assert not torch.allclose(adapted, base)
    # in place, since a copy's closure reads the weight of the original
    laws.require_close(model.merge_and_unload()(X), adapted, 1e-5, "merged and adapted")


def test_a_layer_in_two_readers_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    first, second = (module_of(lambda self, x: F.linear(x, self.l.weight), l=shared) for _ in range(2))
    laws.assert_adapted_is_base_with_delta(lambda: copy.deepcopy(nn.Sequential(first, second)), lora("l"), (X,))


# modules that are called on their weights


class Opaque(nn.Module):
    """Decides on values, so that it can't be traced, and reads the weight of a layer inside; may checkpoint that."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 1.5

        def run(t):
            return F.linear(t, self.l.weight).tanh()

        return run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)


def gradients_of(reentrant: bool | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), Opaque(reentrant), nn.Linear(4, 4))
    get_peft_model(model, lora("0", "l", init_lora_weights=False))
    model(X).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def test_what_is_checkpointed_in_a_module_that_is_called_on_its_weights_has_its_gradients():
    laws.require_close(gradients_of(False), gradients_of(None), 1e-6, "the gradients")


def test_an_adapter_acts_on_a_weight_that_another_one_fully_trains():
    model: Any = nn.Sequential(Opaque(), nn.Linear(4, 4))
    get_peft_model(model, lora("l"))
    model.add_adapter("whole", lora("1", modules_to_save=["l"]))
    model.set_adapter(["default", "whole"])
    before = model(X)
    with torch.no_grad():
        model[0].l.default.lora_B.add_(1)
    assert not torch.allclose(model(X), before)


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"sparse": True}])
def test_embeddings_with_options_are_merged_rightly_or_not_at_all(options):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(8, 4, **options))
    get_peft_model(model, lora("0", init_lora_weights=False))
    ids = torch.arange(8)
    model(ids).sum().backward()
    if "max_norm" in options:
        with pytest.raises(AdaptError, match="shortened to max_norm"):
            model.merge_and_unload()
    else:
        adapted = model(ids)
        laws.require_close(model.merge_and_unload()(ids), adapted, 1e-6, "merged and adapted")


def test_a_table_that_only_its_second_use_shortens_is_refused():
    def forward(self, ids):
        return F.embedding(ids, self.w) + F.embedding(ids + 1, self.w, max_norm=0.5)

    model = nn.Sequential(module_of(forward, w=nn.Parameter(torch.randn(8, 4))))
    with pytest.raises(AdaptError, match="shortened to max_norm"):
        get_peft_model(model, lora("w"))


def test_a_bias_of_b_is_not_merged_into_one_of_two_biases():
    class Gated(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.gate = nn.Parameter(torch.randn(3))

        def forward(self, input):
            return F.linear(input, self.weight, self.bias) * F.linear(input, self.weight, self.gate)

    model: Any = get_peft_model(nn.Sequential(Gated()), lora("0", lora_bias=True))
    with pytest.raises(AdaptError, match="no bias of its own, into which that of lora_bias could go"):
        model.merge_and_unload()


def test_a_bias_of_b_is_not_merged_into_one_that_is_read_elsewhere():
    class Doubled(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight, self.bias) + self.bias.tanh()

    model: Any = get_peft_model(nn.Sequential(Doubled(4, 3)), lora("0", lora_bias=True))
    with pytest.raises(AdaptError, match="its bias bias is read elsewhere, too"):
        model.merge_and_unload()


def test_a_convolution_in_groups_is_refused_where_its_weight_is_changed_before_it_is_used():
    class Centred(nn.Conv1d):
        def forward(self, input):
            return F.conv1d(input, self.weight - self.weight.mean(), self.bias, groups=self.groups)

    with pytest.raises(AdaptError, match="its features are in 2 groups"):
        get_peft_model(nn.Sequential(Centred(4, 6, 3, groups=2)), lora("0"))


def test_a_method_that_the_forward_does_not_call_is_adapted():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight()

        def decode(self, x):
            return x @ self.w.T

        def forward(self, x):
            return x @ self.w

    assert_adapted_truly(module_of(lambda self, x: self.a.decode(self.a(x)), a=Tied()), "a.w")


class ByAttribute(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        object.__setattr__(self, "other", other)

    def forward(self, x: Any) -> Any:
        other: Any = self.other
        return F.linear(x, other.weight)


class ByList(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        self.others = [other]

    def forward(self, x):
        for other in self.others:
            x = F.linear(x, other.weight)
        return x


class ByWeight(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        self.weights = {"other": other.weight}

    def forward(self, x):
        return F.linear(x, self.weights["other"])


class ByFunction(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        self.function = lambda x: F.linear(x, other.weight)

    def forward(self, x):
        return self.function(x)


class ByObject(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        self.holder = types.SimpleNamespace(layer=other)

    def forward(self, x):
        return F.linear(x, self.holder.layer.weight)


class ByCall(nn.Module):
    def __init__(self, other: nn.Linear):
        super().__init__()
        self.others = [other]

    def forward(self, x):
        return self.others[0](x)


class Beside(nn.Module):
    """Has a layer, and beside it a module that uses the layer without registering it."""

    def __init__(self, user: Callable[[nn.Linear], nn.Module], calls: bool):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.user = user(self.layer)
        self.calls = calls

    def forward(self, x):
        return self.user(self.layer(x) if self.calls else x)


def seeded(make: Any, *args: Any) -> Any:
    torch.manual_seed(1)
    return make(*args)


X4 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
READING = [ByAttribute, ByList, ByFunction, ByObject]


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("user", [*READING, ByCall])
def test_a_weight_that_a_module_beside_its_own_reads_is_adapted(user, calls):
    base = Beside(user, calls)
    before = base(X4)
    model: Any = get_peft_model(base, LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False))
    adapted = model(X4)
    assert not torch.allclose(adapted, before)
    # in place, since a copy's function reads the weight of the original
    laws.require_close(model.merge_and_unload()(X4), adapted, 1e-5, "merged and adapted")


@pytest.mark.parametrize("calls", [True, False])
def test_a_weight_that_a_module_holds_itself_is_refused(calls):
    model = Beside(ByWeight, calls)
    before = laws.snapshot(model)
    with pytest.raises(
        AdaptError, match=r"weight is held by self\.weights of user, too, where no change of it is read"
    ):
        get_peft_model(model, LoraConfig(target_modules=["layer"]))
    laws.require_unchanged(model, before, "a refused adaptation")


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("user", [*READING, ByWeight, ByCall])
def test_in_a_graph_of_the_whole_model_such_a_weight_is_adapted_wherever_it_is_read(user, calls):
    config = LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False)
    laws.assert_adapted_is_base_with_delta(lambda: trace(seeded(Beside, user, calls), (X4,)), config, (X4,))


def test_a_weight_of_a_layer_in_a_list_is_adapted():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))
            self.all: list[Any] = [self.inner[0]]

        def forward(self, x):
            for layer in self.all:
                x = F.linear(x, layer.weight)
            return x

    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    laws.assert_adapted_is_base_with_delta(lambda: seeded(Around), config, (X4,))


def test_a_layer_that_is_handed_to_a_checkpoint_is_called_there():
    class Checkpointing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    config = LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False)
    laws.assert_adapted_is_base_with_delta(lambda: seeded(nn.Sequential, seeded(Checkpointing)), config, (X4,))


@pytest.mark.parametrize("options", [{"modules_to_save": ["1"]}, {"target_modules": ["0", "1"], "kasa_config": {}}])
def test_a_weight_in_whose_place_an_adapter_has_another_is_not_pruned_and_stays(options: dict[str, Any]):
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model: Any = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["0"]} | options))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight of a Linear is an adapter's .* weight_orig .*merge_and_unload"):
        prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.disable_adapters()
    assert torch.equal(model[1].weight, before["1.weight"])


def test_a_weight_that_was_pruned_after_adapting_is_not_merged_into():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(3, 4)
    before = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match=r"0\.weight is no parameter any more, as after .* pruning"):
            merge()
    assert model.merged_adapters == []
    assert torch.equal(model(x), before)


def overflowing() -> Any:
    """A model in half precision whose weight and change are finite, and whose sum is not."""
    model: Any = nn.Sequential(nn.Linear(8, 8)).half()
    nn.init.constant_(model[0].weight, 60000.0)
    model = get_peft_model(
        model,
        LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.constant_(parameter, 71.0)
    return model


def with_nan() -> Any:
    """A model whose base has a NaN."""
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = torch.nan
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("make", [overflowing, with_nan], ids=["overflow", "nan"])
def test_a_safe_merge_looks_at_the_sum(make: Callable[[], Any], merge: str):
    model = make()
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=r"0.weight with 'default' merged into it isn't finite"):
        getattr(model, merge)(safe_merge=True)
    laws.require_unchanged(model, before, "a refused merge")


EDITS: dict[str, Callable[[Any], None]] = {
    "lora_alpha": lambda config: setattr(config, "lora_alpha", 200),
    "use_rslora": lambda config: setattr(config, "use_rslora", True),
    "alpha_pattern": lambda config: config.alpha_pattern.update({"0": 7}),
    "r": lambda config: setattr(config, "r", 0),
    "target_modules": lambda config: setattr(config, "target_modules", {"0", "1"}),
    "bias": lambda config: setattr(config, "bias", "all"),
    "modules_to_save": lambda config: setattr(config, "modules_to_save", ["1"]),
    "lora_dropout": lambda config: setattr(config, "lora_dropout", 0.5),
}


@pytest.mark.parametrize("option", EDITS)
def test_an_option_that_is_set_on_the_config_of_an_adapter_is_not_saved_as_if_it_acted(option: str, tmp_path: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0", lora_alpha=2))
    EDITS[option](model.peft_config["default"])
    with pytest.raises(AdaptError, match=f"{option} of 'default' was .* when its tensors were made"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_option_that_says_nothing_of_the_tensors_may_be_set(tmp_path: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode, config.task_type = "other", True, "CAUSAL_LM"
    config.target_modules = [*config.target_modules]
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "other"


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (graphpeft.FrodConfig(target_modules=["0"]), "progressbar", True),
        (UniLoraConfig(r=2, theta_d_length=11, target_modules=["0"]), "init_theta_d_bound", 0.5),
        (graphpeft.GloraConfig(r=2, target_modules=["0"]), "init_weights", False),
        (lora("0"), "init_lora_weights", "gaussian"),
    ],
    ids=["frod", "unilora", "glora", "prepared"],
)
def test_an_option_that_was_read_once_may_be_set(config: Any, option: str, value: Any, tmp_path: Any):
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)), config)
    if isinstance(config, LoraConfig):
        graphpeft.prepare_model_for_compiled_hotswap(model, target_rank=8)
    setattr(model.peft_config["default"], option, value)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert torch.equal(loaded(X), model.eval()(X))


def test_the_option_that_acts_nowhere_is_named_and_not_another(tmp_path: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    config: Any = model.peft_config["default"]
    config.init_lora_weights, config.lora_alpha = "gaussian", 7
    with pytest.raises(AdaptError, match="lora_alpha of 'default' was"):
        model.save_pretrained(tmp_path)


@pytest.fixture(params=["default dtype", "autocast"])
def half_precision_around(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """What halves the precision of code that doesn't choose one."""

    @contextlib.contextmanager
    def by_default():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
            assert torch.get_default_dtype() is torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)

    return by_default if request.param == "default dtype" else lambda: torch.autocast("cpu", dtype=torch.bfloat16)


def combined(kind: str) -> Callable[[Any], None]:
    def add(model: Any) -> None:
        model.add_adapter("b", lora("0", init_lora_weights=False))
        model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "sum", kind, svd_rank=2, density=0.5)
        model.set_adapter("sum")

    return add


@pytest.mark.parametrize(
    ("config", "then"),
    [
        (LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"), None),
        (LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), None),
        (LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), None),
        (OSFConfig(target_modules=["0"]), None),
        (AdamssConfig(r=4, num_subspaces=2, target_modules=["0"]), None),
        (VeraConfig(r=2, target_modules=["0"], init_weights=False), None),
        (lora("0", init_lora_weights=False), combined("svd")),
        (lora("0", init_lora_weights=False), combined("ties_svd")),
    ],
    ids=["olora", "pissa", "drawn", "osf", "adamss", "vera", "svd", "ties"],
)
def test_a_model_in_single_precision_is_adapted_and_combined_in_it(
    config: Any, then: Any, half_precision_around: Callable[[], Any]
):
    found = []
    for around in (contextlib.nullcontext, half_precision_around):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh())
        with around():
            torch.manual_seed(1)
            get_peft_model(model, copy.deepcopy(config))
            if then is not None:
                then(model)
        found.append(model.eval()(torch.ones(2, 16)))
    assert torch.equal(*found)


def test_a_model_without_parameters_is_adapted_in_single_precision(half_precision_around: Callable[[], Any]):
    base, config = ROUNDED.build(), UniLoraConfig(r=3, theta_d_length=11, target_modules=["0"])
    x, found = torch.ones(2, 6), []
    for around in (contextlib.nullcontext, half_precision_around):
        model: Any = copy.deepcopy(base)
        with around():
            torch.manual_seed(1)
            get_peft_model(model, copy.deepcopy(config))
        found.append(laws.perturbed(model)(x))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "config", [OSFConfig(target_modules=["0"]), AdamssConfig(r=4, num_subspaces=2, target_modules=["0"])], ids=str
)
def test_a_model_in_single_precision_is_loaded_in_it(
    config: Any, half_precision_around: Callable[[], Any], tmp_path: Any
):
    def base() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 12, bias=False), nn.Tanh())

    model = get_peft_model(base(), config).eval()
    model.save_pretrained(tmp_path)
    fresh = base()
    with half_precision_around():
        loaded: Any = PeftModel.from_pretrained(fresh, tmp_path)
    x = torch.ones(2, 16)
    assert torch.equal(loaded.eval()(x), model(x))


def test_an_adapter_in_single_precision_is_converted_in_it(half_precision_around: Callable[[], Any]):
    found = []
    for around in (contextlib.nullcontext, half_precision_around):
        torch.manual_seed(0)
        config = LoKrConfig(r=2, target_modules=["0"], init_weights=False)
        model: Any = get_peft_model(nn.Sequential(nn.Linear(16, 12)), config)
        with around():
            _, tensors = convert_to_lora(model, 8)
        found.append(tensors)
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor)


class Slots:
    """Keeps its value in a slot."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Behind:
    """Tells its value by a property, a method and a call, and holds another one in a dictionary."""

    def __init__(self) -> None:
        self._asked, self._computed, self._called, self.table = 1.0, 1.0, 1.0, {"inner": 1.0}

    @property
    def asked(self) -> float:
        return self._asked

    def computed(self) -> float:
        return self._computed

    def __call__(self) -> float:
        return self._called


class Holding(nn.Module):
    """A functional weight whose product is scaled by values that are held in many ways."""

    of_class: ClassVar[dict[str, float]] = {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()
        self.nested: Any = {"inner": {"scale": 1.0}}
        self.objects = [Slots(1.0)]
        self.slots, self.behind, self.method = Slots(1.0), Behind(), Behind().computed
        self.partial = functools.partial(math.prod, [1.0])
        self.queue, self.array = collections.deque([1.0]), np.array([1.0])
        self.key, self.keyed, self.long = "of a name", {"of a name": 1.0, "another": 1.0}, [[1.0] * 100, [1.0] * 100]

    def forward(self, x):
        behind = self.behind.asked * self.behind.computed() * self.behind() * self.behind.table["inner"]
        called = self.method() * self.partial() * sum(each.value for each in self.objects)
        held = self.slots.value * self.queue[0] * float(self.array[0]) * self.keyed[self.key] * self.long[1][99]
        return (x @ self.w) * self.nested["inner"]["scale"] * behind * called * held * self.of_class["scale"]


HELD: dict[str, Callable[[Any], Any]] = {
    "a dictionary in one": lambda module: module.nested["inner"].update(scale=2.0),
    "objects in a list": lambda module: setattr(module.objects[0], "value", 2.0),
    "a slot": lambda module: setattr(module.slots, "value", 2.0),
    "a property": lambda module: setattr(module.behind, "_asked", 2.0),
    "a method": lambda module: setattr(module.behind, "_computed", 2.0),
    "a call": lambda module: setattr(module.behind, "_called", 2.0),
    "a dictionary in an object": lambda module: module.behind.table.update(inner=2.0),
    "a method alone": lambda module: setattr(module.method.__self__, "_computed", 2.0),
    "an argument": lambda module: module.partial.args[0].append(2.0),
    "a queue": lambda module: module.queue.append(module.queue.popleft() + 1),
    "an array": lambda module: module.array.fill(2.0),
    "a key that is computed": lambda module: module.keyed.update({"of a name": 2.0}),
    "the class": lambda module: setattr(module, "of_class", {"scale": 2.0}),
    "long lists": lambda module: module.long[1].__setitem__(99, 2.0),
}


class Scaled(nn.Module):
    """A functional weight whose product is scaled by what objects hold."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()
        self.config = types.SimpleNamespace(scale=1.0, unread=1.0, nested=types.SimpleNamespace())
        self.config.nested.scale = self.config.last = 1.0
        self.options, self.sizes, self.seen = {"scale": 1.0}, [1.0, 2.0], {"step": 0, "scale": 1.0}

    def forward(self, x):
        config = self.config
        scale = config.last * self.config.scale * self.config.nested.scale * self.seen["scale"]
        return (x @ self.w) * scale * self.options["scale"] * self.sizes[0]


CHANGED_LATER: dict[str, Callable[[Any], None]] = {
    "config": lambda module: setattr(module.config, "scale", 2.0),
    "nested": lambda module: setattr(module.config.nested, "scale", 2.0),
    "config by another name": lambda module: setattr(module.config, "last", 2.0),
    "dict": lambda module: module.options.update(scale=2.0),
    "list": lambda module: module.sizes.__setitem__(0, 2.0),
    "another config": lambda module: setattr(
        module, "config", types.SimpleNamespace(scale=2.0, last=1.0, nested=types.SimpleNamespace(scale=1.0))
    ),
}


@pytest.mark.parametrize("where", CHANGED_LATER)
def test_a_setting_in_an_object_that_changes_later_is_not_ignored(where: str):
    model = get_peft_model(nn.Sequential(Scaled(), Scaled()), lora("w"))
    expected = model(X)
    model[1].config.unread, model[1].seen["step"] = 5.0, 1
    assert torch.equal(model(X), expected)
    CHANGED_LATER[where](model[1])
    with pytest.raises(GuardError, match="when the graph was recorded"):
        model(X)
    model.unload()
    assert not torch.allclose(model(X), expected)


@pytest.mark.parametrize("change", HELD.values(), ids=HELD)
def test_a_setting_that_is_held_in_whatever_way_is_not_ignored(change: Callable[[Any], Any]):
    assert_told(Holding(), change)


def assert_told(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Asserts that a change which doubles a module's value is an error while the module is adapted."""
    model = get_peft_model(nn.Sequential(module), lora("w"))
    expected = model(X)
    change(model[0])
    with pytest.raises(GuardError, match="when the graph was recorded"):
        model(X)
    model.unload()
    torch.testing.assert_close(model(X), 2 * expected)


class Mode(enum.Enum):
    """A setting that is no number."""

    ONE = 1
    TWO = 2


class Meter:
    """A factor, with a counter that no forward reads."""

    def __init__(self, scale: float) -> None:
        self.scale, self.count, self.last = scale, 0, math.nan

    def __len__(self) -> int:
        return self.count

    def __call__(self) -> float:
        return self.scale


class Twice(Meter):
    """Another class with the same attributes."""

    def __call__(self) -> float:
        return 2 * self.scale


def one(x: Any) -> Any:
    return x


def two(x: Any) -> Any:
    return 2 * x


class Asking(nn.Module):
    """A functional weight whose product is scaled by what has no numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()
        self.function, self.table, self.partial = one, {"act": one}, functools.partial(one, 1.0)
        self.mode, self.config = Mode.ONE, types.SimpleNamespace(mode=Mode.ONE)
        self.number, self.numbers = np.float64(1), {"one": np.float32(1)}
        self.members, self.steps, self.part = frozenset((1,)), range(1), slice(1)
        self.view, self.meter = types.MappingProxyType({"scale": 1.0}), Meter(1.0)

    def forward(self, x):
        x = self.function(x @ self.w) * self.table["act"](1.0) * self.partial()
        x = x * (1.0 if self.mode == Mode.ONE else 2.0) * (1.0 if self.config.mode == Mode.ONE else 2.0)
        x = x * float(self.number) * float(self.numbers["one"]) * (2.0 if 2 in self.members else 1.0)
        return x * len(self.steps) * torch.ones(2)[self.part].sum() * self.view["scale"] * self.meter()


EXCHANGED: dict[str, Callable[[Any], Any]] = {
    "a function": lambda module: setattr(module, "function", two),
    "a function in a table": lambda module: module.table.update(act=two),
    "a partial": lambda module: setattr(module, "partial", functools.partial(two, 1.0)),
    "a member of an enumeration": lambda module: setattr(module, "mode", Mode.TWO),
    "such a member in a config": lambda module: setattr(module.config, "mode", Mode.TWO),
    "a number of NumPy's": lambda module: setattr(module, "number", np.float64(2)),
    "such a number in a table": lambda module: module.numbers.update(one=np.float32(2)),
    "a frozen set": lambda module: setattr(module, "members", frozenset((1, 2))),
    "a range": lambda module: setattr(module, "steps", range(2)),
    "a slice": lambda module: setattr(module, "part", slice(2)),
    "a view": lambda module: setattr(module, "view", types.MappingProxyType({"scale": 2.0})),
    "an object of another class": lambda module: setattr(module, "meter", Twice(1.0)),
}


@pytest.mark.parametrize("change", EXCHANGED.values(), ids=EXCHANGED)
def test_what_is_no_number_and_is_exchanged_is_not_ignored(change: Callable[[Any], Any]):
    assert_told(Asking(), change)


class Telling(nn.Module):
    """A functional weight beside objects that change in each step, and decide nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.meter, self.random = weight(), Meter(1.0), random.Random(0)
        self.logger = logging.getLogger(__name__)
        self.scales, self.list = {"scale": 1.0, "unknown": math.nan}, [1.0, math.nan]
        self.keys = {object(): 1.0}
        self.large, self.rows = np.zeros(1000), {row: dict.fromkeys(range(50), 1.0) for row in range(50)}

    def forward(self, x):
        self.logger.debug("runs")
        scale = self.meter() * self.scales["scale"] * self.list[0] * sum(self.keys.values()) * self.rows[1][2]
        is_known = self.scales["unknown"] == self.scales["unknown"] or self.large[0] != 0
        return (x @ self.w) * scale * (2.0 if is_known or self.random is None else 1.0)


def test_what_decides_nothing_changes_as_it_likes():
    model: Any = get_peft_model(nn.Sequential(Telling()), lora("w"))
    expected = model(X)
    module = model[0]
    module.logger.setLevel(logging.ERROR)
    module.meter.count, module.meter.last = 3, 2.0
    module.scales["unknown"] = math.inf - math.inf
    module.random.random()
    for again in (model, copy.deepcopy(model)):
        assert torch.equal(again(X), expected)


class Moving(nn.Module):
    """A table that each forward moves, as a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = nn.Embedding(4, 4)

    def forward(self, x):
        found = self.part(x[..., 0].long() % 4)
        with torch.no_grad():
            self.part.weight.mul_(0.5)
        return found


def test_a_forward_that_writes_into_an_adapted_weight_is_told():
    model: Any = get_peft_model(nn.Sequential(Moving()), lora("part"))
    before = own_weight(model[0].part).detach().clone()
    with pytest.raises(
        RuntimeError, match="mul_ writes into weight of a Embedding, which adapters change, in a forward"
    ):
        model(X)
    assert torch.equal(own_weight(model[0].part), before)


class Recursive(nn.Module):
    """Calls itself, with a weight that no layer holds."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.w, self.asks = weight(), asks

    def forward(self, x, depth=0):
        if depth == 3 or (self.asks and x.sum() > 1e9):
            return x
        return self(torch.tanh(x @ self.w), depth + 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("call", [lambda model: model, lambda model: torch.compile(model, backend="aot_eager")])
@pytest.mark.parametrize("asks", [False, True])
def test_a_module_that_calls_itself_has_one_change_in_all_of_its_calls(asks: bool, call: Callable[[Any], Any]):
    model = get_peft_model(nn.Sequential(Recursive(asks)), lora("w", init_lora_weights=False))
    expected = copy.deepcopy(model).merge_and_unload()(X)
    torch.testing.assert_close(call(model)(X), expected)


# errors that were raw, or had the wrong reason


def test_a_model_without_adapters_is_not_saved_as_an_empty_folder(tmp_path: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    model.delete_adapter("default")
    with pytest.raises(AdaptError, match="has no adapter any more that could be saved"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"use_dora": True}, {}], ids=["read", "not read"])
def test_a_bias_that_an_adapter_reads_is_not_taken_away(options: dict[str, Any]):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0", init_lora_weights=False, **options))
    expected = model(X)
    if options:
        with pytest.raises(GuardError, match="bias of a Linear was a parameter when it was adapted, and is to be None"):
            model[0].bias = None
        assert torch.equal(model(X), expected)
    else:
        bias = model[0].bias
        model[0].bias = None
        torch.testing.assert_close(model(X) + bias, expected)


def test_fully_trained_tensors_are_loaded_onto_a_model_without_values(tmp_path: Any):
    def build() -> Any:
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    model = get_peft_model(build(), LNTuningConfig(target_modules=["1"]))
    model[1].weight.data.normal_()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = build()
    loaded = PeftModel.from_pretrained(empty, tmp_path)
    assert torch.equal(loaded.get_parameter("1.weight").to("cpu"), model[1].weight)


def test_an_adapter_that_is_made_in_inference_mode_can_be_trained():
    model: Any = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        get_peft_model(model, lora("0"))
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_rows_that_are_loaded_in_inference_mode_can_be_trained(tmp_path: Any):
    base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    model: Any = get_peft_model(base, lora("1", trainable_token_indices={"0": [1, 3]}))
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        model.load_adapter(tmp_path, "loaded", is_trainable=True)
    model.set_adapter("loaded")
    model(torch.tensor([1, 2])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_weights_that_were_made_in_inference_mode_are_merged_in_it_alone(call: str):
    with torch.inference_mode():
        model: Any = copy.deepcopy(get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0", init_lora_weights=False)))
        before = model(X)
    with pytest.raises(
        RuntimeError, match=r"shape \(4, 4\) was made in torch.inference_mode\(\), so it can't be changed"
    ):
        getattr(model, call)()
    with torch.inference_mode():
        assert torch.equal(model(X), before)
        getattr(model, call)()
        torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_adapters_that_are_loaded_or_combined_in_inference_mode_can_be_trained(kind: str, tmp_path: Any):
    model: Any = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        model.load_adapter(tmp_path, "loaded", is_trainable=True)
        model.add_weighted_adapter(["default", "loaded"], [1.0, 1.0], "combined", kind)
    for name in ("loaded", "combined"):
        model.set_adapter(name)
        model(X).sum().backward()
        assert model[0].get_submodule(name).lora_B.grad is not None


@pytest.mark.parametrize("inputs", [None, (X,)], ids=["without inputs", "with inputs"])
def test_a_weight_that_is_compared_beside_its_call_is_adapted_in_both(inputs: Any):
    class Compared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            signs = (self.layer.weight > 0).float()
            return self.layer(x) + F.linear(x, signs) + self.other(x)

    torch.manual_seed(0)
    model = get_peft_model(Compared(), lora("layer", "other", init_lora_weights=False), example_inputs=inputs)
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_a_mode_of_a_config_that_is_compared_is_checked():
    class Modal(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.config = weight(), types.SimpleNamespace(mode="a")

        def forward(self, x):
            y = x @ self.w
            return y if self.config.mode == "a" else -y

    model = get_peft_model(nn.Sequential(Modal()), lora("w"))
    model[0].config.mode = "b"
    with pytest.raises(GuardError, match=r"self\.config\.mode: that was 'a'"):
        model(X)


class Deciding(nn.Module):
    """Decides on its input, so that it runs its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.w
        return y if x.sum() > -1e9 else -y


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "self_attn"),
        (lambda: nn.Sequential(nn.GRU(4, 4, batch_first=True)), "0"),
        (Deciding, "w"),
    ],
    ids=["attention", "recurrent", "deciding"],
)
def test_two_threads_run_a_module_on_changed_weights_one_after_the_other(
    make: Callable[[], nn.Module], name: str
) -> None:
    interval = sys.getswitchinterval()
    model: Any = make().eval()
    before = copy.deepcopy(model.state_dict())
    get_peft_model(model, lora(name, init_lora_weights=False)).eval()

    def run() -> torch.Tensor:
        with torch.no_grad():
            output = model(X)
        return output[0] if isinstance(output, tuple) else output

    expected, found = run(), list[torch.Tensor]()
    threads = [threading.Thread(target=lambda: found.extend(run() for _ in range(60))) for _ in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 180
    assert all(torch.equal(each, expected) for each in found)
    after = model.unload().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
