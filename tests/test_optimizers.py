"""Optimizers of LoRA's factors make the steps that PEFT's make, and those that PEFT's should."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, cast

import peft
import peft.optimizers.lorafa as lorafa_of_peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import tensors
from peft.optimizers import create_lorafa_optimizer as peft_lorafa
from peft.optimizers import create_loraplus_optimizer as peft_loraplus
from peft.optimizers import create_riemannian_optimizer as peft_riemannian
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    own_weight,
)

pytestmark = [
    pytest.mark.quick("optimizers"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"
    ),  # PEFT's, for lora_bias
]

Create = Callable[[Any], torch.optim.Optimizer]


class Network(nn.Module):
    """One with layers of each kind that the groups of LoRA+ tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.gelu(self.first(self.norm(self.table(x))))).mean(1))


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 3},
    "patterns": {"r": 2, "lora_alpha": 3, "rank_pattern": {"second": 4}, "alpha_pattern": {"first": 7}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "modules-to-save": {"r": 2, "lora_alpha": 3, "modules_to_save": ["head", "norm"]},
    "biases": {"r": 2, "lora_alpha": 3, "bias": "all"},
    "initialised": {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "bias-of-b": {"r": 2, "lora_alpha": 3, "lora_bias": True},
    "embedding": {"r": 2, "lora_alpha": 3, "target_modules": ["table", "first"]},
}


def adapted(library: Any, build: Callable[[], nn.Module] = Network, **options: Any) -> Any:
    """Returns a model adapted by either library, with equal values and none of them zero."""
    torch.manual_seed(0)
    model = build()
    config = library.LoraConfig(**{"target_modules": ["first", "second"], **options})
    torch.manual_seed(1)
    model = library.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in trained(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model


def trained(model: Any) -> dict[str, Tensor]:
    """Returns an adapter's tensors by their names in files, in an order that both libraries share."""
    return dict(sorted(tensors(model).items()))


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 11, (4, 5), generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]


def losses(model: Any, optimizer: torch.optim.Optimizer, count: int = 5) -> list[float]:
    """Trains, and returns the loss of each step."""
    found = []
    for x, label in batches(count):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def assert_trains_alike(ours: Any, of_ours: Any, theirs: Any, of_theirs: Any, tolerance: float = 1e-5) -> None:
    found, expected = losses(ours, of_ours), losses(theirs, of_theirs)
    assert found == pytest.approx(expected, rel=tolerance)
    values, wanted = trained(ours), trained(theirs)
    assert values.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(values[name], tensor, rtol=10 * tolerance, atol=tolerance)


# LoRA+


def loraplus(model: Any, create: Any = create_loraplus_optimizer) -> torch.optim.Optimizer:
    return create(
        model,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=4,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-2,
        betas=(0.8, 0.9),
    )


@pytest.mark.parametrize("options", [*CONFIGS.values(), *VARIANTS.values()], ids=[*CONFIGS, *VARIANTS])
def test_loraplus_trains_as_in_peft(options: dict[str, Any]):
    ours, theirs = adapted(graphpeft, **options), adapted(peft, **options)
    of_ours, of_theirs = loraplus(ours), loraplus(theirs, peft_loraplus)
    groups = [[len(g["params"]), g["lr"], g["weight_decay"]] for g in of_theirs.param_groups]
    assert [[len(g["params"]), g["lr"], g["weight_decay"]] for g in of_ours.param_groups] == groups
    assert_trains_alike(ours, of_ours, theirs, of_theirs)


def test_loraplus_takes_no_layer_for_a_bias_by_its_path():
    """PEFT takes decay from all of a layer in whose path "bias" is."""

    class Biased(Network):
        def __init__(self) -> None:
            super().__init__()
            self.biasless = nn.Linear(6, 3)
            del self.head

        def head(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.biasless(x)

    counts = []
    for library, create in ((graphpeft, create_loraplus_optimizer), (peft, peft_loraplus)):
        model = adapted(library, Biased, target_modules=["biasless"])
        counts.append([len(group["params"]) for group in loraplus(model, create).param_groups])
    assert counts == [[1, 0, 1, 0], [1, 0, 0, 1]]


def test_loraplus_refuses_what_would_have_no_effect():
    model = adapted(graphpeft, r=2)
    with pytest.raises(ValueError, match=r"weight_decay has no effect here.*pass loraplus_weight_decay"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2, weight_decay=0.1)


def test_loraplus_keeps_the_state_of_embeddings_exact_in_bitsandbytes():
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    model = adapted(graphpeft, r=2, modules_to_save=["table"])
    overrides = bitsandbytes.optim.GlobalOptimManager.get_instance().module_weight_config_triple
    before = len(overrides)
    create_loraplus_optimizer(model, bitsandbytes.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2)
    assert overrides[before:] == [(model.table, "weight", {"optim_bits": 32})]


# LoRA-FA


def lorafa(model: Any, create: Any = create_lorafa_optimizer) -> torch.optim.Optimizer:
    return create(model, r=2, lora_alpha=3, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_lorafa_trains_as_in_peft(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lorafa_of_peft, "is_bf16_available", lambda: False)
    ours, theirs = adapted(graphpeft, **options), adapted(peft, **options)
    before = {name: tensor.clone() for name, tensor in trained(ours).items()}
    of_ours = lorafa(ours)
    assert_trains_alike(ours, of_ours, theirs, lorafa(theirs, peft_lorafa))
    changed = {name for name, tensor in trained(ours).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_A" not in name}


def test_lorafa_is_exact_where_peft_rounds_to_bfloat16():
    ours, theirs = adapted(graphpeft, r=2, lora_alpha=3), adapted(peft, r=2, lora_alpha=3)
    assert_trains_alike(ours, lorafa(ours), theirs, lorafa(theirs, peft_lorafa), tolerance=1e-3)


def test_lorafa_follows_the_gradient_of_the_weight_as_closely_as_a_allows():
    torch.manual_seed(0)
    layer: Any = nn.Linear(6, 5, bias=False)
    model = adapted(graphpeft, lambda: nn.Sequential(layer), r=3, lora_alpha=4, target_modules=["0"])
    x, wanted = torch.randn(8, 6), torch.randn(8, 5)
    optimizer = create_lorafa_optimizer(model, 3, 4, lr=1e-2)
    (model(x) - wanted).square().mean().backward()
    A, B, scale = layer.default.lora_A, layer.default.lora_B, 4 / 3
    weight = (own_weight(layer) + scale * B @ A).detach().requires_grad_()
    (F.linear(x, weight) - wanted).square().mean().backward()
    nearest = torch.linalg.lstsq(scale * A.T, weight.grad.T).solution.T
    optimizer.step()
    torch.testing.assert_close(optimizer.state[B]["exp_avg"], 0.1 * nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_lorafa_trains_all_that_peft_takes_for_factors(options: dict[str, Any]):
    """PEFT pairs what has "lora" in its name, one after the other, and lets A of an embedding be, which is zero."""
    model = adapted(graphpeft, **options)
    before = {name: tensor.clone() for name, tensor in trained(model).items()}
    losses(model, lorafa(model))
    changed = {name for name, tensor in trained(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_A" not in name}


def test_lorafa_trains_two_adapters():
    model = adapted(graphpeft, r=2)
    model.add_adapter("other", graphpeft.LoraConfig(r=3, target_modules=["second", "head"]))
    model.set_adapter(["default", "other"])
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses(model, lorafa(model))
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {
        "first.default.lora_B",
        "second.default.lora_B",
        "second.other.lora_B",
        "head.other.lora_B",
    }


def stack(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(copy.deepcopy(layer), nn.Flatten())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.ConvTranspose1d(4, 6, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_lorafa_trains_convolutions(layer: nn.Module):
    model = adapted(graphpeft, stack(layer), r=3, lora_alpha=4, target_modules=["0"])
    optimizer = create_lorafa_optimizer(model, 3, 4, lr=1e-2)
    x = torch.randn(2, 4, *(5 for _ in layer.kernel_size))  # type: ignore[arg-type]
    model(x).square().mean().backward()
    A, B = model[0].default.lora_A, model[0].default.lora_B
    rows = (A.transpose(0, 1) if isinstance(layer, nn.ConvTranspose1d) else A).flatten(1)
    expected = B.grad.flatten(1) @ torch.linalg.inv(rows @ rows.T) * (3 / 4) ** 2
    optimizer.step()
    torch.testing.assert_close(optimizer.state[B]["exp_avg"].flatten(1), 0.1 * expected, rtol=1e-3, atol=1e-5)


def test_lorafa_refuses_what_is_no_product_of_two_matrices():
    model = adapted(graphpeft, stack(nn.Conv1d(4, 6, 3, groups=2)), r=4, target_modules=["0"])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(AdaptError, match="the adapter at 0 isn't: its groups or parts have ranks of their own"):
        create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_lorafa_refuses_another_kind_of_scale_than_the_configs():
    model = adapted(graphpeft, r=4, use_rslora=True)
    create_lorafa_optimizer(model, 4, 8, lr=1e-2, use_rslora=True)
    with pytest.raises(ValueError, match="use_rslora=False, and the config of 'default' has use_rslora=True"):
        create_lorafa_optimizer(model, 4, 8, lr=1e-2, use_rslora=False)


def test_lorafa_takes_a_closure():
    model = adapted(graphpeft, r=2)
    optimizer = lorafa(model)
    x, label = batches(1)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), label)
        loss.backward()
        return loss

    first: Any = cast(Any, optimizer).step(closure)
    assert F.cross_entropy(model(x), label).item() < first.item()


# Riemannian


def riemannian(model: Any, create: Any = create_riemannian_optimizer) -> torch.optim.Optimizer:
    return create(model, torch.optim.AdamW, lr=1e-2, reg=3e-2, weight_decay=0.1)


@pytest.mark.parametrize("options", [*CONFIGS.values(), *VARIANTS.values()], ids=[*CONFIGS, *VARIANTS])
def test_the_riemannian_optimizer_trains_as_in_peft(options: dict[str, Any]):
    ours, theirs = adapted(graphpeft, **options), adapted(peft, **options)
    assert_trains_alike(ours, riemannian(ours), theirs, riemannian(theirs, peft_riemannian), tolerance=3e-5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight)


def test_the_riemannian_optimizer_multiplies_the_factors_of_each_expert_by_themselves():
    model = adapted(graphpeft, Experts, r=2, target_modules=[], target_parameters=["weight"])
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.1)
    model(torch.randn(6, 4)).square().mean().backward()
    A, B = (parameter for parameter in model.parameters() if parameter.requires_grad)
    before, gradient = A.detach().clone(), A.grad.clone()
    each = [B.detach().view(5, 2, 3)[:, :, expert].clone() for expert in range(3)]
    optimizer.step()
    for expert, B_e in enumerate(each):
        rows = slice(2 * expert, 2 * expert + 2)
        inverse = torch.linalg.inv(B_e.T @ B_e + 0.1 * torch.eye(2))
        torch.testing.assert_close(A[rows], before[rows] - inverse @ gradient[rows])


def test_the_riemannian_optimizer_refuses_what_peft_refuses():
    model = adapted(graphpeft, r=2)
    with pytest.raises(TypeError, match="pass a class such as"):
        create_riemannian_optimizer(model, "AdamW", lr=1e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a step of LBFGS computes gradients anew by a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(ValueError, match="call step\\(\\) without one"):
        riemannian(model).step(lambda: 0)
    model = adapted(graphpeft, r=2, target_modules=["table"])
    with pytest.raises(ValueError, match="no A and B are matrices that are both trained"):
        riemannian(model)


def test_hooks_of_a_riemannian_optimizer_run_once():
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # whose class PyTorch wraps with the first instance
    model = adapted(graphpeft, r=2)
    optimizer, steps = riemannian(model), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    losses(model, optimizer, 2)
    assert len(steps) == 2


# all

OPTIMIZERS = [loraplus, lorafa, riemannian]


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_only_models_that_train_lora_are_taken(create: Create):
    with pytest.raises(AdaptError, match="the Network has no adapters"):
        create(Network())
    model = adapted(graphpeft, r=2)
    model.requires_grad_(False)
    with pytest.raises(AdaptError, match="the Network trains none; adapt it with a LoraConfig"):
        create(model)


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_training_goes_on_from_a_saved_state(create: Create):
    model = adapted(graphpeft, r=2, lora_alpha=3, bias="lora_only")
    optimizer = create(model)
    losses(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    again = create(other)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert losses(other, again) == losses(model, optimizer)
    assert all(torch.equal(trained(other)[name], tensor) for name, tensor in trained(model).items())


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_copies_and_pickles_of_a_model_with_its_optimizer_train_alike(create: Create):
    model = adapted(graphpeft, r=2, lora_alpha=3)
    optimizer = create(model)
    losses(model, optimizer, 2)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    copies = [copy.deepcopy((model, optimizer)), torch.load(file, weights_only=False)]
    expected = losses(model, optimizer)
    assert all(losses(*each) == expected for each in copies)


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_half_precision_trains(create: Create):
    model = adapted(graphpeft, r=2, lora_alpha=3)
    model.bfloat16()
    found = losses(model, create(model))
    assert found[-1] < found[0] * 1.5
    assert all(tensor.isfinite().all() for tensor in trained(model).values())


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_a_compiled_model_has_the_same_parameters(create: Create):
    model = adapted(graphpeft, r=2)
    of_compiled = create(torch.compile(model, backend="eager"))
    assert [g["params"] for g in of_compiled.param_groups] == [g["params"] for g in create(model).param_groups]


@pytest.mark.parametrize("create", OPTIMIZERS)
def test_the_trainer_takes_it(create: Create, tmp_path: Any):
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            x, label = batches(2)[index // 4]
            return {"x": x[index % 4], "labels": label[index % 4]}

    class WithLoss(Network):
        def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def trainer(steps: int) -> Any:
        model = adapted(graphpeft, WithLoss, r=2, lora_alpha=3)
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True
        )
        return transformers.Trainer(model, options, train_dataset=Data(), optimizers=(create(model), None))

    whole = trainer(6)
    whole.train()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in trained(whole.model).items():
        torch.testing.assert_close(trained(resumed.model)[name], tensor)
