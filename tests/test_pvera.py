"""PVeRA's noise: when there is some, who draws it, and what can't be had with it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from matrix_uses import TARGETS, USES, build, inputs
from oracle import moved
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import AdaptError, PeftModel, PveraConfig, get_peft_model

X = inputs()


def adapted(library: Any = graphpeft, **options: Any) -> Any:
    torch.manual_seed(2)
    config = library.PveraConfig(**{"r": 3, "init_weights": False, "target_modules": TARGETS} | options)
    return library.get_peft_model(build(), config)


def outputs(model: Any, count: int = 3) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.stack([model(X) for _ in range(count)])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "options",
    [{}, {"generator_seed": 7}, {"sample_at_inference": True}, {"sample_at_inference": True, "generator_seed": 7}],
    ids=str,
)
def test_each_call_draws_the_numbers_that_pefts_draws(options: dict[str, Any], training: bool):
    theirs, ours = (outputs(adapted(library, **options).train(training)) for library in (peft, graphpeft))
    torch.testing.assert_close(ours, theirs)
    is_random = training or "sample_at_inference" in options
    assert torch.equal(ours[0], ours[1]) != is_random


def test_a_generator_of_its_own_leaves_pytorchs_alone_and_goes_on_in_copies():
    model = adapted(generator_seed=7).train()
    before = torch.get_rng_state()
    model(X)
    assert torch.equal(torch.get_rng_state(), before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))


def test_a_generator_of_its_own_is_in_no_file(tmp_path: Any):
    model = adapted(generator_seed=7)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert torch.equal(outputs(loaded.train()), outputs(model.train()))
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), model.eval()(X))


def test_a_generator_of_its_own_is_refused_where_a_checkpoint_would_draw_anew():
    model = adapted(generator_seed=7).train()
    output = checkpoint(model, X, use_reentrant=False)
    assert isinstance(output, torch.Tensor)
    with pytest.raises(RuntimeError, match=r"checkpointing runs a forward again, .* leave generator_seed None"):
        output.sum().backward()


def test_pytorchs_generator_gives_a_checkpoint_the_same_gradients():
    gradients = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model = adapted().train()
        torch.manual_seed(5)
        run(model, X).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_merging_takes_the_mean():
    model = moved(adapted())
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_what_is_random_in_evaluation_is_not_merged():
    model = adapted(sample_at_inference=True)
    with pytest.raises(AdaptError, match="its outputs are random, which no weight does; load it with False"):
        model.merge_adapter()


@pytest.mark.parametrize("target", ["one", "turned", "experts"])
def test_a_weight_without_a_linear_operation_is_refused(target: str):
    with pytest.raises(AdaptError, match="no one linear operation uses its"):
        get_peft_model(USES.build(), PveraConfig(r=2, target_modules=[target]))


def test_a_parameter_with_a_linear_operation_has_noise():
    config = PveraConfig(r=2, target_modules=["w"], init_weights=False)
    model: Any = get_peft_model(USES.build(), config).train()
    (x,) = USES.inputs()
    assert not torch.equal(model(x), model(x))
    expected = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
