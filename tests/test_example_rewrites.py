"""The ten rewrites in `examples/rewrites.py`: each computes what it should, and is undone exactly."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from graphpeft.rewrites import undo_rewrites
from graphpeft.testing import verify_rewrite

SOURCE = Path(__file__).parent.parent / "examples" / "rewrites.py"
TEXT = SOURCE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rewrites() -> Any:
    spec = importlib.util.spec_from_file_location("graphpeft_example_rewrites", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module


def assert_same(model: nn.Module, rewrite, matches: int, *inputs: tuple[torch.Tensor, ...], tolerance=1e-5) -> None:
    """Checks the laws of a rewrite that keeps the function, in both modes and undone."""

    def apply(copied):
        return rewrite(copied, expects=matches, example_inputs=inputs[0])

    found = verify_rewrite(model, apply, *inputs, undo=undo_rewrites, tolerance=tolerance, progress=False, quiet=True)
    assert found.holds, found


def test_there_are_ten_of_fewer_than_thirty_lines_each():
    parts = re.split(r"^# \d+\. ", TEXT.partition("\nclass Block")[0], flags=re.MULTILINE)
    assert len(parts) == 11
    assert all(len([line for line in part.splitlines() if line]) < 30 for part in parts[1:])


def test_a_norm_is_fused_into_its_convolution_in_evaluation(rewrites):
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2, bias=False)
    )
    model.append(nn.BatchNorm2d(4))
    for tensor in (*model.parameters(), model[1].running_mean, model[4].running_mean):
        nn.init.normal_(tensor)
    assert_same(model, rewrites.fused_norms, 2, (torch.randn(2, 3, 9, 9),), (torch.randn(3, 3, 11, 11),))
    rewrites.fused_norms(model)
    calls = [node.target for node in model.eval().graph.nodes if node.op == "call_module"]
    assert calls == ["2"]
    assert "4" in [node.target for node in model.train().graph.nodes]


def test_gelu_is_found_as_transformers_spells_it(rewrites):
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for activation in (NewGELUActivation(), FastGELUActivation()):
        x = torch.randn(3, 8)
        report = rewrites.one_gelu.find(activation)
        expected = 1 if isinstance(activation, NewGELUActivation) else 0
        assert len(report.matches) == expected, report
    assert_same(nn.Sequential(nn.Linear(8, 8), NewGELUActivation()), rewrites.one_gelu, 1, (x,))


def test_gelu_with_other_numbers_stays(rewrites):
    class Other(nn.Module):
        def forward(self, x):
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * torch.pow(x, 3))))

    report = rewrites.one_gelu.find(Other())
    assert not report.matches
    assert report.misses[0].reason == "cubic is 0.05"


def test_exact_gelu_becomes_its_approximation(rewrites):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(3, 8)
    expected = F.gelu(model[0](x), approximate="tanh")
    rewrites.faster_gelu(model, expects=1)
    assert torch.equal(model(x), expected)
    undo_rewrites(model)
    assert type(model[1]) is nn.GELU


def test_fake_quantisation_rounds_inputs_and_weights_and_passes_gradients(rewrites):
    model, x = nn.Linear(8, 4), torch.randn(3, 8)
    x_scale, w_scale = x.abs().max() / 127, model.weight.abs().max() / 127
    by_hand = F.linear((x / x_scale).round() * x_scale, (model.weight / w_scale).round() * w_scale, model.bias)
    exact = model(x)
    rewrites.fake_quantised(model, expects=1)
    torch.testing.assert_close(model(x), by_hand)
    assert not torch.allclose(model(x), exact, atol=1e-4)
    model(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, torch.ones(3, 4).T @ rewrites.rounded(x))


def test_each_linear_layer_of_a_model_is_quantised(rewrites):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    ids = torch.randint(20, (2, 5))
    before = model(ids).logits
    report = rewrites.fake_quantised(model, expects=2 * 7 + 1)
    assert {matched.module for matched in report.matches} > {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert not any(path.endswith("proj") for path in report.left)
    assert 0 < (model(ids).logits - before).abs().max() < 0.1
    undo_rewrites(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("make", [LlamaRMSNorm, T5LayerNorm])
def test_the_norms_of_llama_and_t5_become_one_operation(rewrites, make):
    for dtype in (torch.float32, torch.bfloat16) if make is LlamaRMSNorm else (torch.float32,):
        norm = make(8, eps=1e-5)
        nn.init.normal_(norm.weight)
        norm = norm.to(dtype)
        tolerance = 1e-6 if dtype is torch.float32 else 2e-2
        assert_same(norm, rewrites.one_norm, 1, (torch.randn(3, 8, dtype=dtype),), tolerance=tolerance)
        rewrites.one_norm(norm)
        norm.variance_epsilon = 1.0
        x = torch.randn(3, 8, dtype=dtype)
        torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1.0))


def test_residual_branches_are_scaled(rewrites):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x):
            return self.branch(x) + x

    model: Any = nn.Sequential(Residual(), Residual())
    x = torch.randn(3, 8)
    half = x + 0.5 * model[0].branch(x)
    expected = half + 0.5 * model[1].branch(half)
    rewrites.scaled_residuals(nn.Sequential, scale=0.5)(model, expects=2)
    torch.testing.assert_close(model(x), expected)


def test_later_blocks_are_left_out(rewrites):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.layer(x).relu()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model, x = Model(), torch.randn(3, 8)
    early = model.head(model.blocks[1](model.blocks[0](x)))
    rewrites.without_blocks(Block, *model.blocks[2:])(model, expects=2)
    assert torch.equal(model(x), early)


def test_activations_are_tapped_as_they_are_computed(rewrites):
    taken: list[torch.Tensor] = []
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()), torch.randn(3, 8)
    assert_same(model, rewrites.tapped(lambda _: None), 2, (x,), tolerance=0)
    rewrites.tapped(taken.append)(model)
    result = model(x)
    assert [value.shape for value in taken] == [(3, 8), (3, 4)]
    assert torch.equal(taken[-1], result)
    assert not taken[0].requires_grad


def test_a_head_reads_the_table_of_the_embedding(rewrites):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)

        def forward(self, ids):
            return self.head(self.norm(self.embed(ids)))

    model, ids = Model(), torch.randint(9, (2, 5))
    expected = F.linear(model.norm(model.embed(ids)), model.embed.weight)
    rewrites.tied("head", "embed")(model, inside=[""], expects=1)
    assert torch.equal(model(ids), expected)
    model(ids).sum().backward()
    assert model.head.weight.grad is None
    assert set(model.state_dict()) == {"embed.weight", "norm.weight", "norm.bias", "head.weight"}


def test_attention_becomes_one_operation(rewrites):
    class Attention(nn.Module):
        def __init__(self, spelling):
            super().__init__()
            self.qkv, self.spelling = nn.Linear(8, 24), spelling

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            return self.spelling(q, k, v).transpose(1, 2).reshape(batch, length, 8)

    spellings = (
        lambda q, k, v: (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v,
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(4), dim=-1), v),
        lambda q, k, v: torch.einsum(
            "bhqk,bhkd->bhqd", nn.Softmax(-1)(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5), v
        ),
    )
    for spelling in spellings:
        assert_same(Attention(spelling), rewrites.one_attention, 1, (torch.randn(2, 5, 8),), (torch.randn(3, 7, 8),))


def test_dropout_that_does_nothing_is_gone(rewrites):
    class Functional(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.3, self.training) * 2

    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), Functional(), nn.Dropout(0.0))
    assert_same(model, rewrites.dead_dropout, 3, (torch.randn(3, 8),), tolerance=0)
    report = rewrites.dead_dropout(model)
    assert [matched.modes for matched in report.matches] == ["evaluation", "evaluation", "both"]


def test_the_script_shows_three_of_them_on_one_model(rewrites, capsys):
    model, difference = rewrites.main()
    assert difference < 1e-5
    assert "one_attention: 2 matches" in capsys.readouterr().out
    assert "scaled_dot_product_attention" in model[0].code
    assert inspect.signature(rewrites.one_operation).parameters["scale"].default is None
