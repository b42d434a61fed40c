"""A picture has each node once on both sides, says whose it is, and is a page that holds nothing but itself."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import FIRST
from contracts.contract import Contract
from models import tiny_llama
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

import graphpeft
from graphpeft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    TrainableTokensConfig,
    explain,
    get_peft_model,
    own_weight,
    show,
)
from graphpeft.adapters.adapting import modules_of
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of
from graphpeft.showing.picture import DrawnModule, DrawnSite, Picture
from graphpeft.showing.picture_file import page
from graphpeft.showing.reading import picture_of
from graphpeft.testing.memory import kept_bytes

pytestmark = pytest.mark.quick("showing")


class Block(nn.Module):
    """A layer, and a weight that is used functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 6:
            raise ValueError(x.shape)
        return F.relu(F.linear(self.layer(x), self.mix)) + x


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], target_parameters=["mix"])
    get_peft_model(model, config, example_inputs=(torch.randn(3, 6),))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def all_modules(module: DrawnModule) -> list[DrawnModule]:
    return [module, *(part for inside in module.inside for part in all_modules(inside))]


def drawn(picture: Picture, path: str) -> DrawnModule:
    return next(module for module in all_modules(picture.model) if module.path == path)


def trained(picture: Picture) -> list[tuple[str, str]]:
    """Returns the modules with tensors that are fully trained, and these."""
    return [(module.path, each.tensors) for module in all_modules(picture.model) for each in module.trained]


def assert_exact(model: nn.Module) -> None:
    """Asserts that the picture of a model has each adapter's node, and the same other nodes on both sides."""
    picture, modules = picture_of(model), modules_of(model)
    assert [module.path for module in all_modules(picture.model)] == list(modules)
    adapters = 0
    for path, module in modules.items():
        template, shown = template_of(module), drawn(picture, path)
        if template is None:
            assert shown.graphs is None
            continue
        assert shown.graphs is not None
        for graph, of_mode in zip(template.plain.graphs, picture.graphs[shown.graphs], strict=True):
            tagged = [node.name for node in graph.nodes if TAG in node.meta]
            assert [node.name for node in of_mode.after if node.slot is not None] == tagged
            assert [node.name for node in of_mode.after if node.slot is None] == [node.name for node in of_mode.before]
            assert {node.slot for node in of_mode.after} - {None} <= shown.slots.keys()
            adapters += len(tagged)
    assert adapters or trained(picture)


@pytest.mark.parametrize("contract", FIRST, ids=str)
def test_a_picture_has_all_nodes_of_each_method_and_the_same_others_on_both_sides(contract: Contract):
    case = contract.cases[0]
    assert_exact(get_peft_model(case.build(), contract.our_config(case)))


def test_tensors_that_are_fully_trained_are_told():
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    )
    assert trained(picture_of(model)) == [("1", "weight, bias")]


def test_a_picture_has_the_nodes_of_prompts():
    assert_exact(get_peft_model(tiny_llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM)))


def test_a_picture_has_the_nodes_of_adapters_in_a_flat_graph_and_the_calls_around_them():
    model = graphpeft.trace(nn.Sequential(Block(), Block()), (torch.randn(2, 6),))
    get_peft_model(model, LoraConfig(r=2, target_modules=["layer"]))
    assert_exact(model)
    graph = picture_of(model).graphs[0][0]
    calls = {call for node in graph.after if node.slot is not None for call in node.calls}
    assert calls == {"(0)", "(1)"}


def test_nodes_of_two_adapters_are_told_apart():
    model: Any = adapted()
    model.add_adapter("other", LoHaConfig(r=3, target_modules=["0.layer"]))
    model.base_model.set_adapter(["default", "other"])
    assert_exact(model)
    picture = picture_of(model)
    module = drawn(picture, "0.layer")
    assert module.graphs is not None
    after = picture.graphs[module.graphs][0].after
    of_adapter = {module.slots[node.slot] for node in after if node.slot is not None}
    assert [picture.adapters[place].name for place in sorted(of_adapter)] == ["default", "other"]
    assert [site.rule.partition("(")[0] for site in module.sites] == ["LoraLinear", "LoHa"]


def test_a_node_tells_its_line_its_rule_and_its_checks():
    picture = picture_of(adapted())
    module = drawn(picture, "0")
    assert module.graphs is not None
    nodes = {node.name: node for node in picture.graphs[module.graphs][0].after}
    assert "return F.relu(F.linear(self.layer(x), self.mix)) + x" in nodes["relu"].line
    assert nodes["relu"].line.startswith("test_showing.py:")
    assert any("if x.shape[-1] != 6" in check for node in nodes.values() for check in node.checks)
    over = next(node for node in nodes.values() if node.over)
    assert (over.over, over.rule) == ("linear", "LoraLinear")


def site(model: nn.Module, path: str) -> DrawnSite:
    return drawn(picture_of(model), path).sites[0]


def test_numbers_are_those_of_the_model():
    model = adapted()
    layer: Any = model[0].layer  # type: ignore[index]
    with torch.no_grad():
        change = 5 / 2 * layer.default.lora_B @ layer.default.lora_A
        ratio = float(change.norm() / own_weight(layer).norm())
    assert site(model, "0.layer").change == pytest.approx(ratio, rel=1e-5)
    assert [tensor.gradient for tensor in site(model, "0.layer").tensors] == [None, None]
    model(torch.randn(3, 6)).sum().backward()
    norms = [float(layer.default.lora_A.grad.norm()), float(layer.default.lora_B.grad.norm())]
    assert [tensor.gradient for tensor in site(model, "0.layer").tensors] == pytest.approx(norms)


def test_a_change_is_relative_to_the_weight_of_the_base_while_another_adapter_is_merged():
    model: Any = adapted()
    before = site(model, "0.layer").change
    model.add_adapter("large", LoraConfig(r=2, lora_alpha=40, target_modules=["0.layer"], init_lora_weights=False))
    model.base_model.set_adapter(["large", "default"])
    weight = own_weight(model[0].layer).detach().clone()
    model.merge_adapter(["large"])
    assert float(own_weight(model[0].layer).norm()) > 2 * float(weight.norm())
    assert site(model, "0.layer").change == before


def test_numbers_of_a_model_without_values_are_left_out():
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert site(model, "0").change is None


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
        LoraConfig(r=2, target_modules=["0"], bias="all"),
        LoraConfig(r=2, target_modules=["0"], trainable_token_indices={"2": [0, 3]}),
    ],
    ids=["modules_to_save", "biases", "rows"],
)
def test_parameters_of_an_adapter_are_all_that_it_trains(config: LoraConfig):
    model = nn.ModuleList([nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(5, 3)])
    (planned,) = picture_of(explain(model, config)).adapters
    adapted: Any = get_peft_model(model, config)
    (there,) = picture_of(adapted).adapters
    assert planned.parameters == there.parameters == adapted.get_nb_trainable_parameters()[0]


class TiedHead(nn.Module):
    """Embeds and reads tokens by one table, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_rows_of_tied_tables_are_counted_once():
    config = TrainableTokensConfig(token_indices=[1, 2], target_modules=["embedding"])
    model: Any = get_peft_model(TiedHead(), config)
    (drawn_adapter,) = picture_of(model).adapters
    assert drawn_adapter.parameters == model.get_nb_trainable_parameters()[0] == 8


# costs


def kept(picture: Picture) -> dict[str, int]:
    """Returns the bytes that each node keeps, by the path of its graph's module and its name."""
    return {
        f"{module.path}:{name}": size for module in all_modules(picture.model) for name, size in module.kept_by.items()
    }


def test_kept_bytes_are_those_that_autograd_keeps_by_node():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.GELU()), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(7, 6)
    picture = picture_of(model, (x,))
    layer = drawn(picture, "0")
    assert layer.graphs is not None
    of_adapter = {node.name for node in picture.graphs[layer.graphs][0].after if node.slot is not None}
    # x is there anyway; x A^T, which B is multiplied with, is what the adapter keeps
    assert layer.kept_by.keys() <= of_adapter
    assert sum(layer.kept_by.values()) == layer.kept == 7 * 2 * 4
    # GELU keeps its input, and has no graph
    assert drawn(picture, "1").kept == 7 * 5 * 4
    assert picture.model.kept == 7 * 2 * 4 + 7 * 5 * 4


def test_a_batch_gives_nodes_their_shapes():
    """Where no trace has kept them: a layer's graph is written without an example."""
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Conv2d(1, 4, 3, padding=1, groups=1))
    model[2].register_forward_pre_hook(lambda _, args: (args[0][None, None],))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    model = get_peft_model(model, config)
    model.add_adapter("second", LoHaConfig(r=2, alpha=3, target_modules=["0"]))
    model.set_adapter(["default", "second"])
    picture = picture_of(model, (torch.randn(7, 6),))
    for path in ("0", "2"):
        layer = drawn(picture, path)
        (graph,) = model.get_submodule(path).graphs
        values = torch.randn(7, 6) if path == "0" else torch.randn(1, 1, 7, 5)
        propagated = ShapeProp(model.get_submodule(path))
        propagated.propagate(values)
        expected = {
            node.name: f"{' × '.join(map(str, meta.shape)) or 'scalar'}, float32"
            for node in propagated.module.graph.nodes
            if node.op != "output" and isinstance(meta := node.meta.get("tensor_meta"), TensorMetadata)
        }
        assert layer.shapes == expected
        assert len(graph.nodes) > len(expected) > 5
    assert not any(module.shapes for module in all_modules(picture_of(model).model))


def test_a_picture_tells_once_why_nothing_is_kept(tmp_path: Path):
    x = torch.randn(7, 6)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    assert picture_of(model, (x,)).remark == ""
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), tmp_path)
    told = (
        "nothing is kept for the backward, since no parameter requires a gradient; to measure training, load the "
        "adapter with is_trainable=True"
    )
    picture = picture_of(loaded, (x,))
    assert picture.remark == told
    assert picture.model.kept == 0
    show(loaded, tmp_path / "picture.json", example_inputs=(x,))
    assert (tmp_path / "picture.json").read_text(encoding="utf-8").count(told) == 1
    assert picture_of(loaded).remark == ""
    trained: Any = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5)), tmp_path, is_trainable=True)
    assert picture_of(trained, (x,)).remark == ""
    frozen = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    assert picture_of(frozen, (x,)).remark == told.partition(";")[0]


@pytest.mark.parametrize("traced", [False, True])
def test_kept_bytes_of_all_modules_are_those_that_a_profiler_counts(traced: bool):
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block() for _ in range(3)))
    x = torch.randn(4, 6)
    if traced:
        model = graphpeft.trace(model, (x,))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["layer"]), example_inputs=(x,))
    picture = picture_of(model, (x,))
    by_profiler = kept_bytes(lambda: model(x))
    assert picture.model.kept == by_profiler > 0
    assert sum(kept(picture).values()) <= by_profiler


class Twice(nn.Module):
    """Two operations save one value for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y * y.sin()


def test_what_two_operations_keep_in_one_memory_is_counted_once():
    model: Any = get_peft_model(nn.Sequential(Twice()), LoraConfig(r=2, target_modules=["layer"]))
    x = torch.randn(4, 6)
    assert picture_of(model, (x,)).model.kept == kept_bytes(lambda: model(x)) > 0


def test_the_model_the_batch_and_the_generators_are_as_before_they_were_measured():
    torch.manual_seed(0)
    layers = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
    model: Any = get_peft_model(nn.Sequential(*layers), LoraConfig(r=2, target_modules=["0"])).train()
    x = torch.randn(4, 6)
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: each.grad for name, each in model.named_parameters()}
    generator = torch.get_rng_state()
    picture_of(model, (x,))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(each.grad is gradients[name] for name, each in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_taken_off_if_a_batch_fails():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError):
        picture_of(model, (torch.randn(4, 5),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_time_of_a_module_is_that_of_what_is_inside_and_more():
    picture = picture_of(adapted(), (torch.randn(3, 6),))
    for module in all_modules(picture.model):
        assert module.seconds is not None
        assert module.seconds >= sum(part.seconds or 0 for part in module.inside) > -1
        assert module.kept is not None


def test_what_is_not_called_has_no_costs():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    picture = picture_of(get_peft_model(Sometimes(), LoraConfig(r=2, target_modules=["used"])), (torch.ones(1, 6),))
    assert (drawn(picture, "unused").kept, drawn(picture, "unused").seconds) == (None, None)
    assert drawn(picture, "used").seconds is not None


def test_without_a_batch_nothing_is_measured():
    picture = picture_of(adapted())
    assert all(module.kept is module.seconds is None for module in all_modules(picture.model))
    assert kept(picture) == {}


def test_a_plan_takes_no_batch():
    report = explain(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="adapt the model, and show that with the batch"):
        picture_of(report, (torch.ones(1, 3),))


def test_equal_layers_are_of_one_kind_and_share_their_graphs():
    model: Any = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["3.layer"]))
    model.base_model.set_adapter(["default", "other"])
    kinds = [module.kind for module in picture_of(model).model.inside]
    assert kinds[0] == kinds[1] == kinds[2] != kinds[3]


def test_a_plan_is_drawn_and_changes_nothing():
    model = nn.Sequential(Block(), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = explain(model, LoraConfig(r=2, target_modules=["layer", "1"]))
    picture = picture_of(report)
    assert [refusal.name for refusal in picture.refused] == ["1"]
    assert drawn(picture, "0.layer").sites[0].label == "0.layer"
    assert drawn(picture, "0.layer").graphs is not None
    assert type(model) is nn.Sequential
    assert template_of(model[0]) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_that_is_merged_or_rests_is_told():
    model: Any = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["3.layer"]))
    assert [adapter.state for adapter in picture_of(model).adapters] == ["acts", "rests"]
    model.merge_adapter()
    assert [adapter.state for adapter in picture_of(model).adapters] == ["merged", "rests"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert [adapter.state for adapter in picture_of(model).adapters] == ["disabled", "rests"]


def test_a_model_without_adapters_is_a_tree():
    picture = picture_of(nn.Sequential(nn.Linear(3, 3)))
    assert (picture.adapters, picture.graphs) == ([], [])
    assert [module.cls for module in all_modules(picture.model)] == ["Sequential", "Linear"]


class Links(html.parser.HTMLParser):
    """The tags of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def parsed(content: str) -> Links:
    links = Links()
    links.feed(content)
    return links


def test_a_page_loads_nothing():
    links = parsed(page(picture_of(adapted())))
    assert links.loaded == []
    assert links.scripts == 3


def test_names_of_others_are_no_code_of_the_page():
    class_name = "</script><script>alert(1)</script><!--{{css}}"
    model = type(class_name, (nn.Sequential,), {})(nn.Linear(3, 3))
    content = page(picture_of(get_peft_model(model, LoraConfig(target_modules=["0"]))))
    assert parsed(content).scripts == 3
    written = re.search(r'<script type="application/json" id="picture">(.*?)</script>', content, re.DOTALL)
    assert written is not None
    assert json.loads(written[1])["title"] == class_name


def test_show_writes_the_page(tmp_path: Path):
    shown = graphpeft.show(adapted(), tmp_path / "new" / "model.html")
    assert shown.path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert str(shown._repr_html_()).startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')


def test_show_opens_the_browser_without_a_path(monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    path = graphpeft.show(adapted()).path
    assert opened == [path.as_uri()]


@pytest.mark.parametrize(
    ("shown", "error", "reason"),
    [
        ("model", TypeError, "was given a str"),
        (LoraConfig, TypeError, "a model, a trace or a report"),
    ],
)
def test_what_is_no_model_is_refused(shown: Any, error: type[Exception], reason: str, tmp_path: Path):
    with pytest.raises(error, match=reason):
        graphpeft.show(shown, tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_the_report_of_an_adapter_that_is_there_names_the_way_out(tmp_path: Path):
    report = adapted().adapter_report()  # type: ignore[operator]
    with pytest.raises(ValueError, match="show the model itself"):
        graphpeft.show(report, tmp_path / "x.html")


def test_a_notebook_shows_the_modules_and_the_adapters():
    model = type("<Mine>", (nn.Sequential,), {})(nn.Linear(3, 3))
    text = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))._repr_html_()
    assert "default: lora(r=2, α=8; lora_A(2, 3), lora_B(3, 2))" in text
    assert "&lt;Mine&gt;" in text
    assert "<Mine>" not in text


def test_a_report_in_a_notebook_is_its_table():
    report = explain(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    assert "<pre" in report._repr_html_()
    assert "3 → 3" in report._repr_html_()


def test_a_trace_in_a_notebook_is_its_report_and_its_modules_once_it_is_adapted():
    traced: Any = graphpeft.trace(nn.Sequential(nn.Linear(3, 3)), (torch.ones(1, 3),))
    assert traced._repr_html_() == traced.report._repr_html_()
    assert "decisions, which each run checks" in traced._repr_html_()
    get_peft_model(traced, LoraConfig(r=2, target_modules=["0"]))
    assert "default: lora(r=2, α=8; lora_A(2, 3), lora_B(3, 2))" in traced._repr_html_()


def test_a_printed_model_tells_of_its_adapters():
    assert "(default): lora(r=2, α=5; lora_A(2, 6), lora_B(6, 2))" in str(adapted())


@pytest.mark.parametrize(("value", "told"), [(float("nan"), "NaN"), (float("inf"), "Infinity")])
def test_numbers_that_json_lacks_are_told_by_name(value: float, told: str):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, lora_alpha=5, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(value)
            parameter.grad = torch.full_like(parameter, value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"JSON has no {constant}")

    content = json.loads(picture_of(model).to_json(), parse_constant=refuse)
    site = content["model"]["inside"][0]["sites"][0]
    assert [tensor.get("gradient") for tensor in site["tensors"]] == [None, told]
    assert site["change"] in ("NaN", told)


class Holding(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.mix, self.act = nn.Parameter(torch.randn(6, 6)), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x @ self.mix)


def sized() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 6).bfloat16(), Holding(nn.ReLU()), Holding(nn.GELU())
    )


@pytest.mark.parametrize("adapted", [True, False])
def test_modules_of_one_class_are_drawn_with_their_own_shapes(adapted: bool):
    model, config = sized(), LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1", "2", "mix"])
    picture = picture_of(get_peft_model(model, config) if adapted else explain(model, config))
    for module in all_modules(picture.model):
        for graph in [] if module.graphs is None else picture.graphs[module.graphs]:
            for node in [*graph.before, *graph.after]:
                own = dict(modules_of(model))[module.path]
                if node.op == "call_module":
                    assert node.label == type(own.get_submodule(node.module)).__name__
                if node.op == "get_attr" and node.slot is None:
                    tensor = own.get_parameter(node.module)
                    sizes = " × ".join(map(str, tensor.shape))
                    assert node.value == f"{sizes}, {str(tensor.dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("name", ["model.png", "model.SVG"])
def test_a_page_is_not_written_as_an_image(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"a page of HTML.*model\.html"):
        graphpeft.show(nn.Linear(2, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_model_in_a_wrapper_is_shown_as_itself(wrap: Any):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert picture_of(wrap(model)) == picture_of(model)
    assert [adapter.name for adapter in picture_of(wrap(model)).adapters] == ["default"]


def test_a_suffix_in_capitals_is_that_of_model_explorer(tmp_path: Path):
    shown = graphpeft.show(nn.Sequential(nn.Linear(4, 4)), tmp_path / "MODEL.JSON")
    assert json.loads(shown.path.read_text(encoding="utf-8"))
    assert shown._repr_html_() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_norms_are_told_in_each_precision(dtype: torch.dtype):
    model: Any = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), autocast_adapter_dtype=False)
    with torch.no_grad():
        model[0].default.lora_B.normal_()
    x = torch.randn(3, 4, dtype=dtype)
    assert graphpeft.check_learning(model, (x,)).dead == ()
    model(x).sum().backward()
    (site,) = [site for module in picture_of(model).model.inside for site in module.sites]
    change = 3 * (model[0].default.lora_B.float() @ model[0].default.lora_A.float()).detach()
    assert site.change == pytest.approx(float(change.norm() / own_weight(model[0]).detach().float().norm()), rel=1e-2)
    gradients = {tensor.name: tensor.gradient for tensor in site.tensors}
    assert gradients["lora_B"] == pytest.approx(float(model[0].default.lora_B.grad.float().norm()), rel=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_has_taken_a_part_of_the_weight_has_changed_nothing_yet(init: Any):
    model: Any = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach().clone()
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    (site,) = [site for module in picture_of(model).model.inside for site in module.sites]
    assert site.change == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model[0].default.lora_B.mul_(2)
        now = (model(torch.eye(8)) - model(torch.zeros(1, 8))).T
    (site,) = [site for module in picture_of(model).model.inside for site in module.sites]
    assert site.change == pytest.approx(float((now - weight).norm() / weight.norm()), rel=1e-4)
