"""Functions that draw from Python's or NumPy's generator are calls of a graph, and draw anew in each run."""

from __future__ import annotations

import copy
import pickle
import random
from random import uniform
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand
from torch import nn
from transformers import HubertConfig, HubertForCTC, HubertModel

from graphpeft import TraceError, trace
from graphpeft.testing import laws
from graphpeft.tracing.random_numbers import no_random_python_numbers

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def mask_of(shape, share=0.5, lengths=None):
    mask = np.random.rand(*shape) < share
    if lengths is not None:
        for row, length in enumerate(lengths.sum(-1).tolist()):
            mask[row, length:] = False
    return mask


def factor_of(n):
    return random.random() * n


def uniform_factor():
    return uniform(1, 2) + rand()


class Ranges:
    """Has a module for each instance, as the functions of compiled libraries do."""

    __module__: Any = property(lambda _: "anywhere")
    least = 0.25


RANGES = Ranges()


def factor_in_range():
    return RANGES.least + random.random()


class Masked(nn.Module):
    """Masks tokens in training, as SpecAugment does."""

    def __init__(self):
        super().__init__()
        self.token, self.share = nn.Parameter(torch.randn(4)), 0.5

    def forward(self, x, lengths=None):
        if self.training:
            mask = torch.tensor(mask_of(tuple(x.shape[:2]), self.share, lengths), dtype=torch.bool)
            x = torch.where(mask[..., None], self.token, x) * factor_of(2) + uniform_factor() * factor_in_range()
        return x


def seeded(model: nn.Module, inputs: Any, seed: int = 1) -> Any:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return laws.run(model, inputs)


LENGTHS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [(X,), (X, LENGTHS)], ids=["alone", "with a mask"])
def test_a_function_that_draws_is_a_call_of_the_graph(training, inputs):
    model = Masked().train(training)
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), numpy_state()
    traced: Any = trace(model, inputs, strict=True)
    assert (random.getstate(), numpy_state()) == states
    others = tuple(value[:2] for value in inputs)
    for each in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for mode in (True, False):
            for given in (inputs, others):
                found, expected = seeded(each.train(mode), given), seeded(model.train(mode), given)
                assert torch.equal(found, expected)
    assert not torch.equal(seeded(traced.train(), inputs, 2), seeded(traced.train(), inputs, 3))


def test_functions_are_as_they_were_after_a_trace():
    before = mask_of, factor_of, uniform_factor, factor_in_range
    trace(Masked(), (X,))
    assert before == (mask_of, factor_of, uniform_factor, factor_in_range)
    with pytest.raises(TraceError):
        trace(Masked(), (X, "no mask"))
    assert before == (mask_of, factor_of, uniform_factor, factor_in_range)


def test_a_decision_on_drawn_numbers_keeps_the_module_a_call():
    class Deciding(nn.Module):
        def forward(self, x):
            return x * 2 if factor_of(2) > 1 else x

    traced: Any = trace(nn.Sequential(Deciding()), (X,))
    assert "decides on numbers that Python or NumPy draws" in traced.kept["0"]
    for seed in range(4):
        assert torch.equal(seeded(traced, (X,), seed), seeded(Deciding(), (X,), seed))


def test_so_does_a_draw_in_the_code_of_the_module():
    class Drawing(nn.Module):
        def forward(self, x):
            return x * random.random()

    traced: Any = trace(nn.Sequential(Drawing()), (X,))
    assert "draws random numbers" in traced.kept["0"]
    assert torch.equal(seeded(traced, (X,)), seeded(Drawing(), (X,)))


@pytest.mark.parametrize("cls", [HubertModel, HubertForCTC])
def test_a_hubert_that_is_traced_in_evaluation_can_be_trained(cls):
    torch.manual_seed(0)
    model = cls(
        HubertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_kernel=(3, 3),
            conv_stride=(2, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_length=2,
            mask_time_prob=0.3,
        )
    ).eval()
    x = torch.randn(2, 100)
    traced: Any = trace(model, (x,))
    for mode in (True, False):
        found, expected = (seeded(each.train(mode), (x,)) for each in (traced, model))
        laws.require_equal(found, expected, "the traced model")
    assert found[0].requires_grad


def test_an_interrupted_watch_puts_the_state_of_the_generator_back() -> None:
    before = random.getstate()

    def draw() -> None:
        with no_random_python_numbers():
            random.random()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert random.getstate() == before
