"""Passes change how adapted graphs compute, and not what; what holds for every one of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import TARGETS, Block, assert_equal_within, block, computed, inputs
from models import EXAMPLES, Example, call, result
from pairwise import pairwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphpeft import AdaptError, LoraConfig, get_peft_model, optimize, trace
from graphpeft.passes import PASSES
from graphpeft.testing import assert_copies_stay_adapted, laws

NAMES = [each.name for each in PASSES]
LISTS = {"+".join(passes): passes for passes in [*([name] for name in NAMES), NAMES]}
FORMS = ["regions", "flat"]
OPTIONS: list[dict[str, Any]] = [{}, {"lora_dropout": 0.3}]
each_pass = pytest.mark.parametrize("passes", LISTS.values(), ids=LISTS)
each_form = pytest.mark.parametrize("form", FORMS)


# what is computed, with each two values of different parameters together at least once


@pairwise(
    form=FORMS,
    passes=LISTS,
    options=[*OPTIONS, {"use_dora": True}, {"lora_bias": True}],
    training={"eval": False, "train": True},
)
def test_outputs_and_gradients_stay(form, passes, options, training):
    if form == "flat" and "lora_bias" in options:
        options = {**options, "target_modules": ["q", "v", "o"]}
    plain, optimized = block(form, **options).train(training), block(form, **options).train(training)
    optimize(optimized, passes)
    assert_equal_within(computed(optimized, inputs()), computed(plain, inputs()))


@pairwise(form=FORMS, passes=LISTS, options=OPTIONS)
def test_second_order_gradients_stay(form, passes, options):
    def second_order(model: Any) -> dict[str, Tensor]:
        x = inputs()
        torch.manual_seed(2)
        first = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(first[0].square().sum(), [x, *trained.values()])
        return dict(zip(["x", *trained], gradients, strict=True))

    plain, optimized = block(form, **options).train(), block(form, **options).train()
    optimize(optimized, passes)
    assert_equal_within(second_order(optimized), second_order(plain))


def tolerance_in_half(passes: list[str]) -> float:
    """Returns zero, or the rounding of bfloat16 where gradients of one value are added up before they are rounded."""
    return 2**-7 if {"flattened_rows", "shared_casts", "grouped_products"} & set(passes) else 0.0


@pairwise(
    form=FORMS,
    passes=LISTS,
    options=OPTIONS,
    autocast_adapter_dtype={"single-adapter": True, "half-adapter": False},
)
def test_half_precision_stays(form, passes, options, autocast_adapter_dtype):
    def adapted() -> Any:
        torch.manual_seed(0)
        model: Any = Block().bfloat16()
        model = trace(model) if form == "flat" else model
        config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **options)
        return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).train()

    plain, optimized = adapted(), adapted()
    optimize(optimized, passes)
    x = inputs(torch.bfloat16)
    assert_equal_within(computed(optimized, x), computed(plain, x), tolerance_in_half(passes))


@pairwise(form=FORMS, passes=LISTS, options=OPTIONS, backward_inside=[False, True])
def test_autocast_is_followed(form, passes, options, backward_inside):
    def under_autocast(model: Any) -> dict[str, Any]:
        x = inputs()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            if backward_inside:
                y.float().square().sum().backward()
        if not backward_inside:
            y.float().square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {"y": y, "x": x.grad, **found}

    plain, optimized = block(form, **options).train(), block(form, **options).train()
    optimize(optimized, passes)
    assert_equal_within(under_autocast(optimized), under_autocast(plain), tolerance_in_half(passes))


@pairwise(
    form=FORMS,
    passes=LISTS,
    context={"no_grad": torch.no_grad, "inference_mode": torch.inference_mode},
    shape=[(6,), (3, 6), (2, 3, 6), (0, 3, 6), (2, 1, 3, 6)],
)
def test_forwards_without_gradients_stay_in_every_shape(form, passes, context, shape):
    plain, optimized = (get_peft_model(nn.Sequential(nn.Linear(6, 4)), CONFIG_OF_0) for _ in range(2))
    optimized.load_state_dict(plain.state_dict())
    if form == "flat":
        plain, optimized = (get_peft_model(trace(nn.Sequential(nn.Linear(6, 4))), CONFIG_OF_0) for _ in range(2))
        optimized.load_state_dict(plain.state_dict())
    optimize(optimized, passes)
    x = torch.randn(shape)
    with context():
        assert torch.allclose(optimized(x), plain(x), rtol=0, atol=1e-6)


CONFIG_OF_0 = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_models_of_every_kind_compute_the_same(example: Example):
    plain, optimized = (get_peft_model(example.build(), example.config(init_lora_weights=False)) for _ in range(2))
    optimize(optimized)
    with torch.no_grad():
        found, expected = (result(call(model, example.inputs())) for model in (optimized, plain))
    assert (found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


@each_pass
def test_functional_spellings_compute_the_same(passes):
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w) + x @ self.u + torch.einsum("bti,oi->bto", x, self.w)

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(Functions(), LoraConfig(target_modules=["w", "u"], init_lora_weights=False))

    plain, optimized = adapted(), adapted()
    optimize(optimized, passes)
    assert_equal_within(computed(optimized, inputs()), computed(plain, inputs()))


# laws


@pytest.fixture
def _optimizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the laws look at models on which all passes are."""

    def adapt(*args: Any, **kwargs: Any) -> Any:
        model = get_peft_model(*args, **kwargs)
        optimize(model)
        return model

    monkeypatch.setattr(laws, "get_peft_model", adapt)


LAWS: list[Callable[..., None]] = [
    laws.assert_fresh_adapter_changes_no_output,
    laws.assert_only_the_adapter_is_trained,
    laws.assert_adapted_is_base_with_delta,
    laws.assert_saved_is_loaded,
    laws.assert_traced_is_adapted_alike,
    assert_copies_stay_adapted,
]


@pytest.mark.usefixtures("_optimizing")
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_the_laws_hold_with_all_passes(law, options):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Block()

    law(build, LoraConfig(r=2, target_modules=TARGETS, **options), (inputs().detach(),))


# adapters come and go


@each_form
@each_pass
def test_no_passes_give_back_the_plain_form_to_the_bit(form, passes):
    model = block(form)
    modules = [module for module in model.modules() if hasattr(module, "code")]
    before = computed(model, inputs()), [module.code for module in modules], [type(module) for module in modules]
    optimize(model, passes)
    optimize(model, [])
    after = computed(model, inputs()), [module.code for module in modules], [type(module) for module in modules]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]


@each_form
@each_pass
def test_passes_stay_while_adapters_come_and_go(form, passes):
    plain, optimized = block(form), block(form)
    optimize(optimized, passes)
    x = inputs()

    def both(act: Callable[[Any], object]) -> None:
        torch.manual_seed(3)
        act(plain)
        torch.manual_seed(3)
        act(optimized)
        assert_equal_within(computed(optimized, x), computed(plain, x))

    second = LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False)
    both(lambda model: model.add_adapter("second", second))
    both(lambda model: model.set_adapter("second"))
    both(lambda model: model.set_adapter(["default", "second"]))
    both(lambda model: model.disable_adapters())
    both(lambda model: model.enable_adapters())
    both(lambda model: model.merge_adapter(["second"]))
    both(lambda model: model.unmerge_adapter())
    both(lambda model: model.delete_adapter("default"))
    code = {name: module.code for name, module in optimized.named_modules() if hasattr(module, "code")}
    optimize(optimized, passes)
    assert code == {name: module.code for name, module in optimized.named_modules() if hasattr(module, "code")}
    with torch.no_grad():
        assert_equal_within({"y": optimized.unload()(x)}, {"y": plain.unload()(x)}, 0)
    if form == "flat":
        optimized.recompile()  # the graph is the model's own again, which can be edited
    else:
        assert type(optimized.q) is nn.Linear


@each_form
def test_a_model_without_acting_adapters_is_optimized_when_some_act(form):
    model = block(form)
    model.disable_adapters()
    assert all(not sites for sites in optimize(model).changed.values())
    model.enable_adapters()
    expected = block(form)
    optimize(expected)
    assert [module.code for module in model.modules() if hasattr(module, "code")] == [
        module.code for module in expected.modules() if hasattr(module, "code")
    ]


@each_form
@each_pass
def test_copies_and_pickles_stay_optimized_and_can_be_undone(form, passes):
    model = block(form)
    expected = computed(model, inputs())
    optimize(model, passes)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        for one, other in zip(copied.modules(), model.modules(), strict=True):
            assert getattr(one, "code", None) == getattr(other, "code", None)
        assert_equal_within(computed(copied, inputs()), computed(model, inputs()), 0)
        optimize(copied, [])
        assert_equal_within(computed(copied, inputs()), expected, 0)


def test_rows_of_a_batch_keep_their_adapters():
    plain, optimized = block("regions"), block("regions")
    for model in (plain, optimized):
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q"], init_lora_weights=False))
    optimize(optimized)
    names = ["second", "default"]
    assert torch.equal(optimized(inputs(), adapter_names=names), plain(inputs(), adapter_names=names))
    assert torch.allclose(optimized(inputs()), plain(inputs()), rtol=0, atol=1e-6)


@each_form
def test_an_optimized_graph_is_read_and_not_edited(form):
    model = block(form)
    expected = computed(model, inputs())
    optimize(model, ["inplace_addmm"])
    owner = model if form == "flat" else model.q
    assert "add_product" in str(owner.graph)
    with pytest.raises(RuntimeError, match=r"call graphpeft\.optimize\(model, \[\]\), edit the graph"):
        owner.recompile()
    with pytest.raises(RuntimeError, match="optimized"):
        owner.graph = copy.deepcopy(owner.graph)
    optimize(model, [])
    owner.recompile()
    assert_equal_within(computed(model, inputs()), expected, 0)


# compilers, and what runs again


@pairwise(form=FORMS, passes=LISTS, options=OPTIONS)
def test_torch_compile_takes_it_whole(form, passes, options):
    torch.compiler.reset()
    model = block(form, **options)
    optimize(model, passes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_within(computed(compiled, inputs()), computed(model, inputs()), 2e-6) if not options else None
    assert compiled(inputs()).shape == (2, 3, 5)
    model.train()
    compiled(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@each_form
@each_pass
def test_torch_export_takes_it(form, passes):
    model = block(form, lora_dropout=0.3).eval()
    optimize(model, passes)
    exported = torch.export.export(model, (inputs(),)).module()
    assert torch.allclose(exported(inputs()), model(inputs()), rtol=0, atol=1e-6)


@pairwise(form=FORMS, passes=LISTS, use_reentrant=[False, True], options=OPTIONS)
def test_checkpointed_models_train_alike(form, passes, use_reentrant, options):
    def checkpointed(model: Any) -> dict[str, Any]:
        x = inputs()
        torch.manual_seed(2)
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        torch.rand(3)  # other random numbers are drawn before the backward
        y.square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {"y": y, "x": x.grad, **found}

    plain, optimized = block(form, **options).train(), block(form, **options).train()
    optimize(optimized, passes)
    assert_equal_within(checkpointed(optimized), checkpointed(plain), 2e-6)


@each_pass
def test_a_trace_of_an_optimized_model_computes_the_same(passes):
    model = block("regions")
    expected = model(inputs())
    optimize(model, passes)
    assert torch.allclose(trace(model, (inputs().detach(),))(inputs()), expected, rtol=0, atol=1e-6)


def test_torch_func_takes_it():
    model = block("regions")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    x = inputs().detach()
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(parameters, x)
    optimize(model)
    assert_equal_within(per_sample(parameters, x), expected)


# the call


def test_unknown_passes_are_refused_and_change_nothing():
    model = block("regions")
    optimize(model, ["inplace_addmm"])
    code = model.q.code
    with pytest.raises(ValueError, match=f"no pass 'inplace'; there are {', '.join(NAMES)}"):
        optimize(model, ["inplace"])
    with pytest.raises(TypeError, match=r"pass a list of names, \['inplace_addmm'\]"):
        optimize(model, "inplace_addmm")
    assert model.q.code == code


def test_a_pass_that_fails_changes_nothing(monkeypatch):
    from graphpeft import passes
    from graphpeft.passes import Pass

    def fail(graph: Any, root: Any) -> Any:
        if root.bias is None:  # not the first one
            raise KeyError("broken")
        return PASSES[-1].apply(graph, root)

    model = block("regions")
    code = model.q.code
    monkeypatch.setattr(passes, "PASSES", (Pass("broken", fail, "nothing"),))
    with pytest.raises(KeyError):
        optimize(model, ["broken"])
    assert model.q.code == code
    model.set_adapter("default")


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdaptError, match="has no adapters; adapt it with get_peft_model first"):
        optimize(nn.Linear(2, 2))


def test_the_report_says_what_was_changed_and_what_was_left():
    model = block("regions", use_dora=True)
    report = optimize(model, ["inplace_addmm"])
    assert report.changed == {"inplace_addmm": ()}
    assert set(report.left["inplace_addmm"]) == set(TARGETS)
    assert "inplace_addmm leaves q, k, v, o: the adapted value isn't a sum" in str(report)
    assert optimize(block("regions"), ["inplace_addmm"]).changed == {"inplace_addmm": tuple(TARGETS)}
    assert str(optimize(model, [])) == "no passes: the graphs compute as they were written"


def test_a_pass_that_finds_nothing_says_so():
    model = block("regions")
    model.set_adapter([])
    assert "inplace_addmm finds nothing: there are no sums of" in str(optimize(model, ["inplace_addmm"]))


def test_equal_layers_still_share_one_class():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)), LoraConfig(target_modules=["0", "1"]))
    optimize(model)
    assert type(model[0]) is type(model[1])
