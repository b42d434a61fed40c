"""`check_learning` finds each tensor that no gradient reaches, names no other, tells the line, and changes nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_blocks import SIZE, Block
from models import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

import graphpeft
from graphpeft import (
    AdaptError,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    check_learning,
    get_peft_model,
)

pytestmark = pytest.mark.quick("learning")


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Read(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.norm(x), self.layer.weight)


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(x)).clamp(max=2)


class Compared(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.norm(x))
        return x + torch.where(y.detach() > -100, y, 0 * y)


class Uncalled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Without(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layer(x)
        return x + y


class Detached(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).detach()


class DetachedWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(x, self.layer.weight.detach()))


class Unused(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.norm(x)


class Zero(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.layer(x)


class Chosen(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).argmax(-1, keepdim=True)


class Wall(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).detach() + self.norm.weight


LIVE: tuple[type[Block], ...] = (Plain, Read, Gated, Compared)
DEAD: tuple[type[Block], ...] = (Uncalled, Without, Detached, DetachedWeight, Unused, Zero, Chosen)

LINES = {
    Without: "y = self.layer(x)",
    Detached: "return x + self.layer(x).detach()",
    DetachedWeight: "return self.norm(F.linear(x, self.layer.weight.detach()))",
    Unused: "self.layer(x)",
    Zero: "return x + 0 * self.layer(x)",
    Chosen: "return x + self.layer(x).argmax(-1, keepdim=True)",
    Wall: "return torch.tanh(self.layer(x)).detach() + self.norm.weight",
}


def adapted(*blocks: type[Block], config: Any = None) -> Any:
    model = nn.Sequential(*(block() for block in blocks))
    config = config or LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])
    return get_peft_model(model, config, example_inputs=(torch.randn(3, SIZE),))


def dead_blocks(blocks: list[type[Block]]) -> list[int]:
    """Returns the places of the blocks whose layer can't learn: by itself, or since a wall comes later."""
    wall = max((place for place, block in enumerate(blocks) if block is Wall), default=-1)
    return [place for place, block in enumerate(blocks) if place <= wall or block in DEAD]


def check_blocks(blocks: list[type[Block]]) -> None:
    model = adapted(*blocks)
    report = check_learning(model, (torch.randn(3, SIZE),))
    assert [int(site.label.split(".")[0]) for site in report.dead] == dead_blocks(blocks)
    walls = [place for place, block in enumerate(blocks) if block is Wall]
    for site in report.dead:
        assert {tensor.state for tensor in site.tensors.values()} == {"dead"}
        place = int(site.label.split(".")[0])
        assert site.reason
        behind = [wall for wall in walls if wall > place]
        # what is not dead by itself is so by the next wall
        block = Wall if behind and blocks[place] in (*LIVE, Zero) else blocks[place]
        if block in LINES:
            assert LINES[block] in site.line


several = st.lists(st.sampled_from((*LIVE, *DEAD, Wall)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(several)
def test_planted_dead_sites_are_found_and_no_live_one_is_named(blocks: list[type[Block]]):
    check_blocks(blocks)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(several)
def test_planted_dead_sites_are_found_in_many_models(blocks: list[type[Block]]):
    check_blocks(blocks)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Uncalled, "never called with this batch; the forward of Uncalled does not mention layer"),
        (Without, "without gradients, as under torch.no_grad()"),
        (Detached, "detach has no gradient"),
        (DetachedWeight, "detach has no gradient"),
        (Unused, "no part of the loss"),
        (Zero, "zero whatever the adapters hold"),
        (Chosen, "argmax has no gradient"),
    ],
)
def test_the_reason_is_told(block: type[Block], reason: str):
    (site,) = check_learning(adapted(block), (torch.randn(3, SIZE),)).dead
    assert reason in site.reason


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Linear(SIZE, SIZE), nn.ModuleList([nn.Linear(SIZE, SIZE)])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return self.aside[0](x)
        return self.main(x)


def test_a_branch_that_the_batch_does_not_take_is_told_with_its_line():
    model = get_peft_model(Branch(), LoraConfig(r=2, target_modules=["main", "aside.0"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).dead
    assert (site.label, site.reason) == (
        "aside.0",
        "it is never called with this batch; in Branch this line mentions aside",
    )
    assert "`return self.aside[0](x)` (test_learning.py:" in site.line
    assert [site.label for site in check_learning(model, (torch.randn(101, SIZE),)).dead] == ["main"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(SIZE, SIZE)), nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        lost = F.linear(x, self.first).detach()
        return F.linear(x, self.second) + lost


def test_the_line_of_a_graph_is_the_line_of_the_model():
    model = get_peft_model(Functional(), LoraConfig(r=2, target_parameters=["first", "second"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).dead
    assert site.label == "first"
    assert "`lost = F.linear(x, self.first).detach()` (test_learning.py:" in site.line


def test_what_waits_for_first_values_is_told_apart():
    model = adapted(Plain)
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).sites
    assert {name: tensor.state for name, tensor in site.tensors.items()} == {"lora_A": "waits", "lora_B": "learns"}
    with torch.no_grad():
        model[0].layer.default.lora_B.normal_()
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).sites
    assert {tensor.state for tensor in site.tensors.values()} == {"learns"}


def test_gradients_told_are_those_of_a_backward():
    model, batch = adapted(Plain), (torch.randn(3, SIZE),)
    report = check_learning(model, batch, lambda output: output.square().mean())
    model(*batch).square().mean().backward()
    assert report.sites[0].tensors["lora_B"].gradient == pytest.approx(
        float(model[0].layer.default.lora_B.grad.norm()), rel=1e-6
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_all_generators_are_as_before(fails: bool):
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Dropout(0.3))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])).train()
    model(torch.randn(3, SIZE)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    kept = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
    states = torch.get_rng_state(), random.getstate()

    def loss(output: Tensor) -> Tensor:
        random.random()
        if fails and not torch.equal(model[0].default.lora_B, before["0.default.lora_B"]):
            raise KeyboardInterrupt
        return output.sum()

    if fails:
        with pytest.raises(KeyboardInterrupt):
            check_learning(model, (torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)),), loss)
    else:
        check_learning(model, (torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)),), loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, kept[name])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert not model[0]._forward_pre_hooks


def test_fully_trained_tensors_and_rows_are_told():
    model = nn.Sequential(nn.Embedding(8, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2))
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["2"], trainable_token_indices={"0": [1, 5]})
    report = check_learning(get_peft_model(model, config), (torch.tensor([[2, 3]]),))
    assert [(site.label, site.state) for site in report.sites] == [
        ("1", "learns"),
        ("2", "learns"),
        ("2", "learns"),
        ("0", "dead"),
    ]
    assert check_learning(model, (torch.tensor([[1, 5]]),)).dead == ()


class TiedHead(nn.Module):
    """Embeds tokens and tells the next by one table, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, SIZE), nn.Linear(SIZE, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_rows_that_tied_modules_share_are_told_once():
    config = TrainableTokensConfig(token_indices=[1, 5], target_modules=["embedding"])
    model = get_peft_model(TiedHead(), config)
    report = check_learning(model, (torch.tensor([[1, 5]]),))
    assert [(site.label, [*site.tensors], site.state) for site in report.sites] == [
        ("embedding", ["rows of weight"], "learns")
    ]


def test_the_sites_that_each_entry_names_are_counted():
    model = get_peft_model(nn.Sequential(Plain(), Plain()), LoraConfig(r=2, target_modules=["0.layer", "layer"]))
    report = check_learning(model, (torch.randn(3, SIZE),))
    assert dict(report.named) == {("default", "0.layer"): 1, ("default", "layer"): 2}


def test_a_transformers_model_is_checked_by_its_own_loss():
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type=TaskType.CAUSAL_LM)
    )
    tokens = torch.randint(0, 50, (2, 5))
    report = check_learning(model, {"input_ids": tokens, "labels": tokens})
    assert report.dead == ()
    assert {site.label for site in report.sites} >= {"lm_head"}


def test_prompts_are_checked():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM))
    (site,) = check_learning(model, {"input_ids": torch.randint(0, 50, (2, 5))}).sites
    assert site.state == "learns"


def test_a_model_with_a_head_that_returns_no_gradient_is_dead_as_a_whole():
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(SIZE, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).softmax(-1).argmax(-1).float()

    model = get_peft_model(Classifier(), LoraConfig(r=2, target_modules=["layer"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).dead
    assert "argmax" in site.reason


def test_a_flat_graph_is_checked():
    graph = graphpeft.trace(nn.Sequential(Plain(), Detached()), (torch.randn(3, SIZE),))
    model = get_peft_model(graph, LoraConfig(r=2, target_modules=["layer"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).dead
    assert site.label == "1.layer"
    assert LINES[Detached] in site.line


def test_two_adapters_are_told_apart():
    model = adapted(Plain, Detached)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["0.layer"]))
    model.base_model.set_adapter(["default", "other"])
    report = check_learning(model, (torch.randn(3, SIZE),))
    assert [(site.adapter, site.label) for site in report.dead] == [("default", "1.layer")]
    assert ("other", "0.layer") in {(site.adapter, site.label) for site in report.sites}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_reentrant_checkpoints_are_no_hindrance():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=50,
        )
    )
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    tokens = torch.randint(0, 50, (2, 5))
    assert check_learning(model, {"input_ids": tokens, "labels": tokens, "use_cache": False}).dead == ()


@pytest.mark.parametrize(
    ("prepare", "loss", "error", "reason"),
    [
        (lambda model: model.merge_adapter(), None, AdaptError, "no active adapter trains anything"),
        (lambda model: model.disable_adapters(), None, AdaptError, "no active adapter trains anything"),
        (lambda model: model.requires_grad_(False), None, AdaptError, "no active adapter trains anything"),
        (lambda model: None, lambda output: output, ValueError, r"is of shape \(3, 6\)"),
        (lambda model: None, lambda output: 1.0, ValueError, "is a float"),
    ],
)
def test_what_cannot_be_checked_is_refused(prepare: Any, loss: Any, error: type[Exception], reason: str):
    model = adapted(Plain)
    prepare(model)
    with pytest.raises(error, match=reason):
        check_learning(model, (torch.randn(3, SIZE),), loss)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdaptError, match="has no adapters"):
        check_learning(nn.Linear(3, 3), (torch.randn(3, 3),))


def test_a_report_prints_each_site_and_why_dead_ones_are():
    text = str(check_learning(adapted(Plain, Zero), (torch.randn(3, SIZE),)))
    assert text.startswith("1 of 2 sites doesn't learn")
    assert "lora_A waits for others; lora_B (" in text
    assert "lora_A, lora_B never learn\n" in text
    assert "1.layer: a gradient reaches it and is zero" in text


def test_explain_with_inputs_tells_which_sites_would_learn_and_changes_nothing():
    model = nn.Sequential(Plain(), Detached())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = graphpeft.explain(model, LoraConfig(r=2, target_modules=["layer"]), example_inputs=(torch.randn(3, SIZE),))
    assert [site.label for site in report.learning.dead] == ["1.layer"]
    last = [line.split("  ")[-1].strip() for line in str(report).splitlines() if "layer" in line]
    assert last[0] == "yes"
    assert last[1].startswith("no: `return x + self.layer(x).detach()` (test_learning.py:")
    assert [type(module) for module in model] == [Plain, Detached]
    assert type(model) is nn.Sequential
    assert {*model.state_dict()} == {*before}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_explain_says_why_it_cannot_tell_what_learns():
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    report = graphpeft.explain(Refuses(), LoraConfig(target_modules=["layer"]), example_inputs=(torch.randn(3, SIZE),))
    assert "which sites learn can't be told: ValueError: not today" in str(report)


def test_beside_a_refused_target_the_report_tells_why_learning_is_not_checked():
    config = LoraConfig(r=2, target_modules=["0", "1"])
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = graphpeft.explain(model, config, example_inputs=(torch.ones(2, 4),))
    assert "which sites learn can't be told: the model can't be adapted while a target is refused" in str(report)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, fresh: Tensor) -> Tensor:
        if not bool(fresh):
            return x
        fresh.zero_()
        return self.layer(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_batch_is_as_before_in_each_run_and_afterwards(fails: bool):
    model = get_peft_model(Overwrites(), LoraConfig(r=2, target_modules=["layer"]))
    x, fresh = torch.randn(3, SIZE, requires_grad=True), torch.tensor(True)
    x.grad = gradient = torch.ones(3, SIZE)

    def loss(output: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return output.sum()

    if fails:
        with pytest.raises(KeyboardInterrupt):
            check_learning(model, (x, fresh), loss)
    else:
        assert check_learning(model, (x, fresh), loss).dead == ()
    assert bool(fresh)
    assert x.grad is gradient
    assert torch.equal(gradient, torch.ones(3, SIZE))


def test_a_batch_whose_tensors_cannot_be_written_is_run():
    model = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), LoraConfig(r=2, target_modules=["0"]))
    assert check_learning(model, (torch.randn(1, SIZE).expand(3, SIZE),)).dead == ()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_is_told_where_gradients_are_off_what_learns_where_they_are_on(without: Any):
    model, x = adapted(Plain, Detached), torch.randn(3, SIZE)
    with without():
        report = check_learning(model, (x,))
    assert [site.label for site in report.dead] == ["1.layer"]


def test_a_line_that_calls_the_check_is_no_line_of_the_model():
    model = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), LoraConfig(r=2, target_modules=["0"]))
    (site,) = check_learning(model, (torch.randn(3, SIZE),), lambda output: output.sum() * 0).dead
    assert site.line == ""
    (site,) = check_learning(model, (torch.randn(3, SIZE),), lambda output: output.detach().sum()).dead
    assert "output.detach().sum()" in site.line


def test_the_line_of_a_decorated_method_is_in_the_file_of_the_method():
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        is_decoder=True,
        add_cross_attention=True,
    )
    model = get_peft_model(
        transformers.BertModel(config), LoraConfig(r=2, target_modules=["crossattention.self.query"])
    )
    (site,) = check_learning(model, {"input_ids": torch.randint(0, 50, (2, 5))}).dead
    assert "mentions query" in site.reason
    assert "(modeling_bert.py:" in site.line


def test_explain_tells_of_a_config_that_trains_tensors_of_the_model_alone():
    model = nn.Sequential(nn.Embedding(8, SIZE), Zero(), nn.LayerNorm(SIZE))
    report = graphpeft.explain(
        model, graphpeft.LNTuningConfig(target_modules=["norm", "2"]), example_inputs=(torch.tensor([[1]]),)
    )
    assert [(site.label, site.state) for site in report.learning.sites] == [("1.norm", "dead")] * 2 + [
        ("2", "learns")
    ] * 2
    told = str(report).split("never learns")[1]
    assert "1.norm.weight  " in told
    assert "2.weight" not in told


def test_explain_in_inference_mode_tells_what_learns():
    model, x = nn.Sequential(Plain(), Detached()), torch.randn(3, SIZE)
    with torch.inference_mode():
        report = graphpeft.explain(model, LoraConfig(r=2, target_modules=["layer"]), example_inputs=(x,))
    assert [site.label for site in report.learning.dead] == ["1.layer"]


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        if "seen" not in self._buffers:
            self.register_buffer("seen", x.detach())
        return self.head(self.layer(x))


def test_what_waits_for_a_head_that_is_trained_without_an_adapter_is_no_dead_site():
    model = get_peft_model(Headed(), LoraConfig(r=2, target_modules=["layer"]))
    assert [site.label for site in check_learning(model, (torch.randn(3, SIZE),)).dead] == ["layer"]
    model.head.requires_grad_(True)
    (site,) = check_learning(model, (torch.randn(3, SIZE),)).sites
    assert site.state == "waits"
    assert not model.head.weight.any()
    assert "seen" not in model._buffers


def test_within_autocast_each_run_has_its_own_values_and_later_ones_the_model_s():
    model = get_peft_model(Headed(), LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]))
    x = torch.randn(3, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).detach()
        assert check_learning(model, (x,)).dead == ()
        assert torch.equal(model(x), expected)


def cycles() -> Any:
    """LoRA both of whose factors are zero."""
    model = adapted(Plain)
    nn.init.zeros_(model[0].layer.default.lora_A)
    return model


def chains() -> Any:
    """Factors that wait for others, which wait for others: three steps until all learn."""
    model = adapted(Plain, config=LoHaConfig(r=2, target_modules=["layer"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        model[0].layer.default.hada_w1_a.fill_(1.0)
        model[0].layer.default.hada_w1_b.fill_(1.0)
        model[0].layer.default.hada_w2_b.fill_(1.0)
    return model


def test_tensors_that_wait_for_each_other_are_dead():
    (site,) = check_learning(cycles(), (torch.randn(3, SIZE),)).dead
    assert site.reason == "lora_A, lora_B wait for each other: each has a gradient of zero until another one changes"


def test_what_waits_for_what_learns_is_not_dead():
    assert check_learning(chains(), (torch.randn(3, SIZE),)).dead == ()
