"""`check_learning` names the line at which a value is lost, also past logs, shapes, checkpoints and own functions."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learning_blocks import SIZE, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphpeft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftWarning,
    check_learning,
    get_peft_model,
    own_weight,
)

pytestmark = pytest.mark.quick("learning")


class Logged(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.detach().mean()
        return x * (y > 0)


class LoggedAlone(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.detach().mean()
        return x + torch.zeros_like(y)


class DetachedInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y.detach_()
        return x + y


class Listed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor(self.layer(x).tolist())


class Copied(Block):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.layer(x), torch.empty_like(x)
        with torch.no_grad():
            z[:] = y
        return x + z


class Without(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return x + y


class Rounded(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).long()


class Dropped(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.norm(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None


class Silent(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + Doubled.apply(self.layer(x))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.layer, x.detach(), use_reentrant=True)


class NoRows(Block):
    def forward(self, x: Tensor) -> Tensor:
        none = torch.zeros(len(x), dtype=torch.bool)
        return x.index_add(0, none.nonzero()[:, 0], self.layer(x[none]))


class Parts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(SIZE, SIZE), self.layer)
        del self.layer
        self.set_up()

    def set_up(self) -> None:
        first: Any = self.parts[0]
        nn.init.ones_(first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[:1](x)


class Overridden(Without):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


METHODS = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "lokr": LoKrConfig(r=2),
    "loha": LoHaConfig(r=2),
    "oft": OFTConfig(oft_block_size=3),
}

EXPECTED = [
    (Logged, "gt has no gradient", "return x * (y > 0)"),
    (LoggedAlone, "what it computes is no part of the loss", "y = self.layer(x)"),
    (DetachedInPlace, "detach_ has no gradient", "y.detach_()"),
    (Listed, "tolist has no gradient", "self.layer(x).tolist()"),
    (Copied, "it runs without gradients, as under torch.no_grad()", "z[:] = y"),
    (Without, "it runs without gradients, as under torch.no_grad()", "y = self.layer(x)"),
    (Rounded, "long has no gradient", "return x + self.layer(x).long()"),
    (Dropped, "what it computes is no part of the loss", "self.layer(x)"),
    (Silent, "the backward of Doubled gives no gradient", "Doubled.apply"),
    (Checkpointed, "a reentrant checkpoint gives none", "use_reentrant=True"),
    (NoRows, "it is called with no rows in this batch", "self.layer(x[none])"),
    (Parts, "in Parts this line mentions parts", "return self.parts[:1](x)"),
    (Overridden, "the forward of Overridden does not mention layer", ""),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("block", "reason", "line"), EXPECTED, ids=[block.__name__ for block, *_ in EXPECTED])
def test_the_line_at_which_a_value_is_lost_is_told(block: type[Block], reason: str, line: str, method: str):
    config = METHODS[method]
    config.target_modules = ["parts.1" if block is Parts else "layer"]
    model = get_peft_model(nn.Sequential(block()), config).train()
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).dead
    # of this function's own gradient of none, a method's function makes zeros
    assert reason in site.reason or (block is Silent and "zero" in site.reason)
    assert line in site.line
    assert bool(site.line) == bool(line)


def test_trained_tokens_that_the_batch_lacks_are_told():
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [6, 7]})
    model = get_peft_model(nn.Sequential(nn.Embedding(8, SIZE), nn.Linear(SIZE, 2)), config)
    (site,) = check_learning(model, (torch.tensor([[1, 2]]),)).dead
    assert "the batch has none of the trained tokens" in site.reason


class Skipping(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.layers, self.draw = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(8)), draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.draw() > 0.3:
                x = x + layer(x)
        return x + self.layers[0](x).detach()


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random], ids=["torch", "python"])
def test_layers_that_are_skipped_at_random_are_not_dead(draw: Any):
    torch.manual_seed(0)
    random.seed(0)
    model = get_peft_model(Skipping(draw), LoraConfig(r=2, target_modules="all-linear"))
    for _ in range(3):
        report = check_learning(model, (torch.randn(3, SIZE),))
        assert report.dead == ()
        assert {site.state for site in report.sites} == {"learns"}


def test_a_model_that_draws_nothing_runs_twice():
    model = get_peft_model(nn.Sequential(Without()), LoraConfig(r=2, target_modules=["layer"]))
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    assert len(check_learning(model, (torch.randn(3, SIZE),)).dead) == 1
    assert len(runs) == 2


@pytest.mark.parametrize("loss", [lambda y: y.sum() / 0, lambda y: F.cross_entropy(y, torch.tensor([-100] * 3))])
def test_a_loss_that_is_no_number_is_refused(loss: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"the loss is -?(nan|inf) with this batch"):
        check_learning(model, (torch.randn(3, SIZE),), loss)


def test_a_gradient_that_is_no_number_does_not_learn():
    class Rooted(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + (0 * self.layer(x)).sqrt()

    model = get_peft_model(nn.Sequential(Rooted()), LoraConfig(r=2, target_modules=["layer"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE).abs(),), lambda y: y.nan_to_num().sum()).dead
    assert "isn't finite" in site.reason


class Recomputed(torch.autograd.Function):
    """Calls a module without gradients, and again in the backward, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Any:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), gradients)
        return x.grad, None


class Reversible(nn.Module):
    """Calls its layers in a function with a gradient of its own, and a head as usual."""

    def __init__(self, call: Callable[[Tensor, nn.Module], Tensor] = Recomputed.apply) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)), nn.Linear(SIZE, SIZE)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(x, self.blocks))


def by_its_name(x: Tensor, module: nn.Module) -> Tensor:
    [name] = [name for name in dir(Recomputed) if name == "apply"]
    return getattr(Recomputed, name)(x, module)


class OfAnotherName(Recomputed):
    """A function whose forward is called otherwise in the code."""

    @staticmethod
    def _run(ctx: Any, x: Tensor, module: nn.Module) -> Any:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    forward = _run


def by_a_table(x: Tensor, module: nn.Module) -> Tensor:
    return {"recomputed": Recomputed}["recomputed"].apply(x, module)


def in_a_function(x: Tensor, module: nn.Module) -> Tensor:
    return Recomputed.apply(x, lambda y: module(y))


def one_by_one(x: Tensor, module: nn.Module) -> Tensor:
    for layer in module.children():
        x = Recomputed.apply(x, layer)
    return x


def of_a_made_class(x: Tensor, module: nn.Module) -> Tensor:
    return type("Made", (Recomputed,), {}).apply(x, module)


def in_training_alone(x: Tensor, module: nn.Module) -> Tensor:
    return Recomputed.apply(x, module) if module.training else module(x)


CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
HEAD = {"0.head.default.lora_A", "0.head.default.lora_B"}


@pytest.mark.parametrize(
    "call",
    [
        Recomputed.apply,
        OfAnotherName.apply,
        by_its_name,
        by_a_table,
        in_a_function,
        one_by_one,
        of_a_made_class,
        in_training_alone,
    ],
)
def test_layers_in_a_function_that_gives_them_no_gradient_are_warned_of_in_training(call: Any) -> None:
    model: Any = get_peft_model(nn.Sequential(Reversible(call)), CONFIG)
    x = torch.ones(1, SIZE)
    assert own_weight(model[0].blocks[0]).requires_grad is False
    if call is not in_training_alone:
        model.eval()(x)
    with pytest.warns(PeftWarning, match=r"0\.blocks\.0 is called in \w+, a torch\.autograd\.Function") as warned:
        model.train()(x).sum().backward()
    assert len(warned) == 1
    assert {name for name, p in model.named_parameters() if p.grad is not None} == HEAD
    model(x.requires_grad_()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_layers_in_a_function_whose_input_requires_a_gradient_learn_without_a_warning() -> None:
    model: Any = get_peft_model(nn.Sequential(Reversible()), CONFIG)
    model(torch.ones(1, SIZE, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_layer_beside_such_a_function_is_adapted_without_a_warning() -> None:
    model = get_peft_model(nn.Sequential(Reversible()), LoraConfig(r=2, target_modules=["head"]))
    model(torch.ones(1, SIZE)).sum().backward()


def test_code_around_a_layer_may_be_a_function_without_arguments_by_any_name() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            def forward() -> Tensor:
                return self.layer(x)

            return forward()

    model = get_peft_model(nn.Sequential(Inner()), CONFIG)
    assert model(torch.ones(1, SIZE)).shape == (1, SIZE)


def test_a_warning_that_is_an_error_is_one_in_each_forward() -> None:
    model = get_peft_model(nn.Sequential(Reversible()), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(PeftWarning, match="is called in Recomputed"):
                model(torch.ones(1, SIZE))
