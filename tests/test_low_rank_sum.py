"""A weight beside its change of low rank: products in every spelling are those of the sum, and make no such sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import IMPLEMENTATIONS, VOCABULARY, tiny_experts
from torch import Tensor

import graphpeft
from graphpeft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from graphpeft._torch import GROUPED_MM
from graphpeft.graph import low_rank_sum
from graphpeft.graph.low_rank_sum import LowRankSum, plus_product

pytestmark = pytest.mark.quick("graph")

EXPERTS, IN, OUT, RANK, SCALE = 5, 16, 24, 4, 1.5
AT = torch.tensor([0, 3, 3, 1])
OFFS = torch.tensor([2, 2, 5, 6, 7], dtype=torch.int32)


def made(seed: int = 0, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, first, second = (
        torch.randn(shape, generator=generator)
        for shape in ((EXPERTS, IN, OUT), (EXPERTS, IN, RANK), (EXPERTS, RANK, OUT))
    )
    return weight, first.requires_grad_(grad), second.requires_grad_(grad)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bmm": lambda w: torch.bmm(x(EXPERTS, 3, IN), w),
    "bmm by name": lambda w: torch.bmm(x(EXPERTS, 3, IN), mat2=w),
    "bmm from the right": lambda w: w.bmm(x(EXPERTS, OUT, 3)),
    "bmm transposed": lambda w: torch.bmm(x(EXPERTS, 3, OUT), w.transpose(1, 2)),
    "@": lambda w: x(EXPERTS, 3, IN) @ w,
    "@ from the right": lambda w: w @ x(EXPERTS, OUT, 3),
    "@ broadcast": lambda w: x(2, 1, 3, IN) @ w,
    "one matrix for all": lambda w: x(4, 3, IN) @ w[2:3],
    "one matrix for all, from the right": lambda w: w[2:3] @ x(4, OUT, 3),
    "one input for all": lambda w: x(1, 3, IN) @ w,
    "matmul": lambda w: torch.matmul(x(EXPERTS, 3, OUT), w.mT),
    "baddbmm": lambda w: torch.baddbmm(x(EXPERTS, 3, OUT), x(EXPERTS, 3, IN), w),
    "linear": lambda w: F.linear(x(3, OUT), w[2], x(IN)),
    "linear at an index in a tensor": lambda w: F.linear(x(3, OUT), weight=w[torch.tensor(2)]),
    "mm": lambda w: torch.mm(x(3, IN), w[4]),
    "t": lambda w: x(3, OUT) @ w[4].t(),
    "T": lambda w: x(3, OUT) @ w[-1].T,
    "chosen": lambda w: torch.bmm(x(4, 1, IN), w[AT]),
    "chosen transposed": lambda w: torch.bmm(x(4, 1, OUT), w[AT].mT),
    "sliced": lambda w: torch.bmm(x(3, 2, IN), w[1:4]),
    "masked": lambda w: torch.bmm(x(2, 2, IN), w[torch.tensor([True, False, False, True, False])]),
    "einsum": lambda w: torch.einsum("bti,eio->beto", x(2, 3, IN), w),
    "einsum in place of x": lambda w: torch.einsum("eio, bti -> bto", w, x(2, 3, IN)),
    "einsum of the columns": lambda w: torch.einsum("eto,eio->eti", x(EXPERTS, 3, OUT), w),
    "einsum with an ellipsis": lambda w: torch.einsum("...nd,...dh->...nh", x(EXPERTS, 3, IN), w),
    "einsum with longer and shorter ellipses": lambda w: torch.einsum("...dh,...nd -> ...nh", w, x(2, EXPERTS, 3, IN)),
    "einsum with one ellipsis": lambda w: torch.einsum("...i,eio->...eo", x(2, 3, IN), w),
    "einsum with a batch of experts": lambda w: torch.einsum("eti,eio->eto", x(EXPERTS, 3, IN), w),
    "grouped": lambda w: GROUPED_MM[0](x(7, IN).to(w.dtype), w, offs=OFFS),
    "public grouped": lambda w: F.grouped_mm(x(7, OUT).to(w.dtype), w.transpose(-2, -1), offs=OFFS),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(0),
    "itself": lambda w: torch.einsum("eio,ejo->eij", w, w),
    "inside of matrices": lambda w: w[:, 1:3] * 2,
    "a vector": lambda w: w @ x(OUT),
    "einsum that sums over experts": lambda w: torch.einsum("eio->io", w),
    "einsum of both sides": lambda w: torch.einsum("ti,to,eio->te", x(3, IN), x(3, OUT), w),
    "einsum elementwise": lambda w: torch.einsum("eio,eio->eio", x(EXPERTS, IN, OUT), w),
    "baddbmm with factors": lambda w: torch.baddbmm(x(EXPERTS, 3, OUT), x(EXPERTS, 3, IN), w, alpha=2, beta=0.5),
    "another transpose": lambda w: w.transpose(0, 1) @ x(OUT, 2),
    "a list": lambda w: torch.cat([w, w], 1),
    "loop": lambda w: torch.stack([x(3, IN) @ each for each in w]),
    "a function of its own": lambda w: Doubled.apply(w),
    "a view": lambda w: x(3, EXPERTS * IN) @ w.reshape(-1, OUT),
}


class Doubled(torch.autograd.Function):
    """Is given tensors without `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 2


def gradients(result: Tensor, *sources: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result.square().sum(), sources))


@pytest.mark.parametrize("spelling", [*SPELLINGS, *OTHERS])
def test_every_function_has_the_values_and_gradients_of_the_sum(spelling: str) -> None:
    function = (SPELLINGS | OTHERS)[spelling]
    weight, first, second = made()
    expected = function(weight + first @ second * SCALE)
    found = function(plus_product(weight, first, second, SCALE))
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for got, want in zip(gradients(found, first, second), gradients(expected, first, second), strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_two_changes_are_two_branches(spelling: str) -> None:
    function = SPELLINGS[spelling]
    (weight, *changed), (_, *others) = made(), made(3)
    both = plus_product(plus_product(weight, *changed, SCALE), *others, 0.5)
    expected = function(weight + changed[0] @ changed[1] * SCALE + others[0] @ others[1] * 0.5)
    found = function(both)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "total" not in vars(both)
    of_both = [gradients(result, *changed, *others) for result in (found, expected)]
    for got, want in zip(*of_both, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("spelling", [*SPELLINGS, *OTHERS])
def test_numbers_that_were_read_without_gradients_have_them_later(spelling: str) -> None:
    function = (SPELLINGS | OTHERS)[spelling]
    (weight, *changed), (_, *others) = made(), made(3)
    both = plus_product(plus_product(weight, *changed, SCALE), *others, 0.5)
    with torch.no_grad():
        assert both.abs().max() > 0
    expected = function(weight + changed[0] @ changed[1] * SCALE + others[0] @ others[1] * 0.5)
    of_both = [gradients(result, *changed, *others) for result in (function(both), expected)]
    for got, want in zip(*of_both, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_weight_in_half_precision_keeps_its_dtype(spelling: str) -> None:
    weight, first, second = made(grad=False)
    stack = plus_product(weight.bfloat16(), first, second, SCALE)
    function = SPELLINGS[spelling]
    with torch.autocast("cpu", torch.bfloat16):
        found = function(stack)
        expected = function(weight.bfloat16() + (first @ second * SCALE).bfloat16())
    torch.testing.assert_close(found.float(), expected.float(), atol=0.5, rtol=0.05)


# dropout


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets dropout double its input, which can be told from outputs."""

    def doubled(h: Tensor, p: float) -> Tensor:
        assert p == 0.25
        return h * 2

    monkeypatch.setattr(low_rank_sum.F, "dropout", doubled)


@pytest.mark.usefixtures("doubling")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dropout_acts_on_the_input_of_the_branch_alone(spelling: str) -> None:
    function = SPELLINGS[spelling]
    weight, first, second = made()
    found = function(plus_product(weight, first, second, SCALE, 0.25, True))
    torch.testing.assert_close(found, function(weight + 2 * first @ second * SCALE), atol=1e-4, rtol=1e-4)
    # a second adapter has dropout of its own
    both = plus_product(plus_product(weight, first, second, SCALE, 0.25, True), first, second, 0.5)
    torch.testing.assert_close(
        function(both), function(weight + first @ second * (2 * SCALE + 0.5)), atol=1e-4, rtol=1e-4
    )
    in_evaluation = function(plus_product(weight, first, second, SCALE, 0.25, False))
    torch.testing.assert_close(in_evaluation, function(weight + first @ second * SCALE), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", OTHERS)
def test_other_uses_of_a_stack_are_refused_where_dropout_would_act(spelling: str) -> None:
    with pytest.raises(RuntimeError, match="lora_dropout drops elements of what a weight is multiplied with"):
        OTHERS[spelling](plus_product(*made(), SCALE, 0.25, True))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiler_is_refused_dropout_at_a_stack(backend: str, fullgraph: bool) -> None:
    given = x(EXPERTS, 3, IN)

    def product(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return given @ plus_product(w, a, b, SCALE, 0.25, True)

    compiled: Any = torch.compile(product, backend=backend, fullgraph=fullgraph)
    with pytest.raises(Exception, match="dropout beside a weight that code reads isn't compiled"):
        compiled(*made())


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w[1].clamp_(0), lambda w: w.__setitem__(0, 1.0)])
def test_a_change_in_place_is_refused(write: Callable[[Tensor], Any]) -> None:
    stack = plus_product(*made(grad=False), SCALE)
    with pytest.raises(RuntimeError, match="would change a weight in place"):
        write(stack)


def test_what_was_changed_through_the_sum_is_read_from_there() -> None:
    weight, first, second = made(grad=False)
    stack, total = plus_product(weight, first, second, SCALE), weight + first @ second * SCALE
    for each in (stack, total):
        each.data.clamp_(0, 1)
    torch.testing.assert_close(x(EXPERTS, 3, IN) @ stack, x(EXPERTS, 3, IN) @ total)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_is_given_the_sum(backend: str) -> None:
    weight, first, second = made()
    compiled: Any = torch.compile(lambda x, w: x @ w, backend=backend)
    found = compiled(x(EXPERTS, 3, IN), plus_product(weight, first, second, SCALE))
    expected = x(EXPERTS, 3, IN) @ (weight + first @ second * SCALE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for got, want in zip(gradients(found, first, second), gradients(expected, first, second), strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-4)


def test_a_mapped_function_is_given_the_sum() -> None:
    weight, first, second = made()
    found = torch.func.vmap(torch.mm)(x(EXPERTS, 3, IN), plus_product(weight, first, second, SCALE))
    expected = x(EXPERTS, 3, IN) @ (weight + first @ second * SCALE)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for got, want in zip(gradients(found, first, second), gradients(expected, first, second), strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-4)


def test_metadata_is_that_of_the_weight() -> None:
    stack = plus_product(*made(), SCALE)
    assert isinstance(stack, LowRankSum)
    assert (stack.shape, stack.dtype, stack.ndim, len(stack)) == ((EXPERTS, IN, OUT), torch.float32, 3, EXPERTS)
    assert stack.requires_grad
    assert "total" not in vars(stack)


# Transformers' experts


CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["gate_up_proj", "down_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_train_without_a_tensor_of_the_stacks_size(
    implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    model: Any = get_peft_model(tiny_experts(implementation).to(dtype), LoraConfig(**CONFIG))
    expected = model(input_ids=ids).logits
    merged = copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(expected, merged, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-3)
    monkeypatch.setattr(LowRankSum, "total", property(lambda self: pytest.fail("it was added up")))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    of_experts = [
        parameter.grad for name, parameter in model.named_parameters() if "experts" in name and "lora" in name
    ]
    assert len(of_experts) == 4
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in of_experts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_have_the_gradients_of_pefts(implementation: str, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    found = []
    options = CONFIG | {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    theirs = peft.get_peft_model(tiny_experts(implementation), peft.LoraConfig(**options))
    theirs.save_pretrained(str(tmp_path))
    ours = PeftModel.from_pretrained(tiny_experts(implementation), tmp_path, is_trainable=True)
    for library, model in ((peft, theirs), (graphpeft, ours)):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        names = {tensor.data_ptr(): name for name, tensor in library.get_peft_model_state_dict(model).items()}
        found.append({names[p.data_ptr()]: p.grad for p in model.parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-4)


# the loop over experts depends on numbers, which a compiler doesn't see
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_experts_are_compiled_as_one_graph(implementation: str) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    model: Any = get_peft_model(tiny_experts(implementation), LoraConfig(**CONFIG))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_recomputed_layers_have_the_same_gradients() -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    found = []
    for recomputes in (False, True):
        torch.manual_seed(5)
        model: Any = get_peft_model(tiny_experts("eager"), LoraConfig(**CONFIG))
        if recomputes:
            # Transformers' newer name for it, and the older one
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_are_trained_with_dropout(implementation: str, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    model: Any = get_peft_model(tiny_experts(implementation), LoraConfig(**CONFIG, lora_dropout=0.5))
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(
        copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4
    )
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        model.train().zero_grad()
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
        drawn.append((result.logits, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (first, of_first), (second, _), (again, of_again) = drawn
    assert not torch.allclose(first, second)
    torch.testing.assert_close((first, of_first), (again, of_again))
    assert all(gradient.abs().max() > 0 for gradient in of_first)
    with pytest.warns(PeftWarning, match="is saved as 0, since PEFT refuses dropout beside parameters"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_experts(implementation), tmp_path)
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected)


def test_each_adapter_drops_elements_of_its_own_as_an_explicit_computation_does() -> None:
    weight, *factors = *made(), *made(1)[1:]
    given = x(EXPERTS, 3, IN)

    def by_sums() -> Tensor:
        one = plus_product(weight, factors[0], factors[1], SCALE, 0.25, True)
        return torch.bmm(given, plus_product(one, factors[2], factors[3], 0.5, 0.4, True))

    def explicit() -> Tensor:
        one = F.dropout(given, 0.25) @ factors[0] @ factors[1] * SCALE
        return given @ weight + one + F.dropout(given, 0.4) @ factors[2] @ factors[3] * 0.5

    found = []
    for function in (by_sums, explicit):
        torch.manual_seed(7)
        y = function()
        found.append([y, *torch.autograd.grad(y.square().sum(), factors)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
