"""The page of a picture in a real browser, without a network: it opens, folds, finds, and tells of what is clicked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import graphpeft
from graphpeft import LoraConfig, explain, get_peft_model
from graphpeft.adapters.adapting import modules_of
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of

pytestmark = pytest.mark.browser

MOST_ELEMENTS = 1_000
"""What a page has at most before a reader unfolds it, so that it opens at once."""

SHOTS = Path(os.environ.get("GRAPHPEFT_SCREENSHOTS", "build/screenshots"))


class Opened:
    """A page in a tab without a network, and the errors that it has met."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.errors: list[str] = []
        settings = {"viewport": {"width": 1280, "height": 900}, "offline": True, **options}
        self.tab = browser.new_context(**settings).new_page()
        self.tab.set_default_timeout(10_000)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.errors.append(request.url) if "file:" not in request.url else None)
        self.tab.goto(path.absolute().as_uri())
        self.tab.wait_for_selector("body[data-ready]")

    def open_all(self) -> None:
        self.tab.click("#unfold")
        self.tab.wait_for_selector("body[data-opened]")

    def count(self, selector: str) -> int:
        return self.tab.locator(selector).count()

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=SHOTS / f"{name}.png")


def vit() -> nn.Module:
    model = timm.create_model("vit_small_patch16_224", img_size=32, patch_size=8)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "proj"]))


def two_on_llama() -> nn.Module:
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32))
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(x, self.first)) @ self.second


def functional() -> nn.Module:
    return get_peft_model(Functional(), LoraConfig(r=2, target_parameters=["first", "second"]))


def traced() -> nn.Module:
    model = timm.create_model("vit_small_patch16_224", img_size=32, patch_size=8)
    graph = graphpeft.trace(model, (torch.randn(1, 3, 32, 32),))
    return get_peft_model(graph, LoraConfig(r=4, target_modules=["qkv"]))


MODELS = {"vit": vit, "llama": two_on_llama, "functional": functional, "traced": traced}


@pytest.fixture(scope="module", params=MODELS)
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    model = MODELS[request.param]()
    path = graphpeft.show(model, tmp_path_factory.mktemp("pictures") / f"{request.param}.html").path
    return request.param, model, path


@pytest.fixture(scope="module")
def page(browser: Any, shown: tuple[str, nn.Module, Path]) -> Opened:
    return Opened(browser, shown[2])


def test_it_opens_with_few_elements_and_meets_no_error(browser: Any, shown: tuple[str, nn.Module, Path]):
    opened = Opened(browser, shown[2])
    assert opened.count("*") < MOST_ELEMENTS
    assert opened.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_light_and_dark(browser: Any, shown: tuple[str, nn.Module, Path], scheme: str):
    opened = Opened(browser, shown[2], color_scheme=scheme)
    opened.shoot(f"{shown[0]}-{scheme}")
    ink, paper = opened.tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_it_fits_a_narrow_window(browser: Any, shown: tuple[str, nn.Module, Path]):
    opened = Opened(browser, shown[2], viewport={"width": 400, "height": 800})
    opened.shoot(f"{shown[0]}-narrow")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.tab.evaluate(CUT_BELOW) == 0


CUT_BELOW = """[...document.querySelectorAll("figure")].filter(
    (each) => each.offsetParent && each.scrollHeight > each.clientHeight + 1).length"""
"""The number of graphs whose lower part isn't seen."""


def test_wide_graphs_are_below_each_other_and_tall_ones_side_by_side(browser: Any, tmp_path: Path):
    torch.manual_seed(0)
    layers: Any = nn.Sequential(nn.Conv2d(512, 512, 3), nn.Linear(6, 6))
    adapted = graphpeft.get_peft_model(layers, graphpeft.LoraConfig(r=2, target_modules=["0", "1"]))
    opened = Opened(browser, graphpeft.show(adapted, tmp_path / "model.html").path)
    opened.open_all()
    assert opened.tab.evaluate(CUT_BELOW) == 0
    tops = opened.tab.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("details.module:has(> .inside > .graphs)")].map(
            (each) => [each.dataset.path, [...each.querySelectorAll("figure")].map((figure) => figure.offsetTop)]))"""
    )
    assert tops["0"][0] < tops["0"][1]
    assert tops["1"][0] == tops["1"][1]


def test_coloured_nodes_are_those_of_adapters(browser: Any, shown: tuple[str, nn.Module, Path]):
    _, model, path = shown
    opened = Opened(browser, path)
    opened.open_all()
    drawn = opened.tab.evaluate(
        """() => [...document.querySelectorAll("details.module")].map((each) => [
            each.dataset.path, each.querySelectorAll(":scope > .inside > .graphs .after .node.adapter").length])"""
    )
    by_path = {path: count for path, count in drawn if count}
    tagged = {
        path: nodes_of_adapters(module) for path, module in modules_of(model).items() if nodes_of_adapters(module)
    }
    assert by_path
    assert by_path == {path: count for path, count in tagged.items() if path in by_path}
    # one of equal layers is drawn
    assert {without_numbers(path) for path in by_path} == {without_numbers(path) for path in tagged}
    assert opened.errors == []


def nodes_of_adapters(module: nn.Module) -> int:
    template = template_of(module)
    return 0 if template is None else sum(TAG in node.meta for node in template.plain.graphs[0].nodes)


def without_numbers(path: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in path.split("."))


def test_before_and_after_have_the_same_base_nodes(page: Opened):
    names = """(side) => [...document.querySelectorAll(`.graphs .${side} .node:not(.adapter):not(.call)`)].map(
        (node) => node.dataset.name).sort()"""
    sides = [page.tab.evaluate(names, side) for side in ("before", "after")]
    assert sides[0] == sides[1] != []


def test_a_click_on_a_node_tells_its_rule_and_its_parameters(page: Opened):
    page.open_all()
    page.tab.locator(".after .node.call_function.adapter").last.click(force=True)
    told = page.tab.inner_text("#details")
    assert "rule\nLora" in told
    assert "lora_A" in told
    assert "call_function" in told


@pytest.mark.parametrize("make", [vit, traced])
def test_a_batch_s_costs_are_on_nodes_and_modules(browser: Any, tmp_path: Path, make: Any):
    shown = graphpeft.show(make(), tmp_path / "model.html", example_inputs=(torch.randn(2, 3, 32, 32),))
    opened = Opened(browser, shown.path)
    opened.open_all()
    opened.shoot(f"costs-{make.__name__}")
    assert opened.errors == []
    assert "keeps" in opened.tab.inner_text("details.module > summary")
    labels = opened.tab.locator(".after .node.adapter").all_text_contents()
    assert any("keeps" in label and "B" in label for label in labels)
    opened.tab.locator(".after .node.adapter", has_text="keeps").first.click(force=True)
    told = opened.tab.inner_text("#details")
    assert "kept for the backward" in told
    assert re.search(r"value\n2 × .*, float32", told)


def test_closed_calls_have_the_sum_of_what_their_nodes_keep(browser: Any, tmp_path: Path):
    shown = graphpeft.show(traced(), tmp_path / "model.html", example_inputs=(torch.randn(2, 3, 32, 32),))
    opened = Opened(browser, shown.path)
    assert any("keeps" in label for label in opened.tab.locator(".after .node.call").all_text_contents())


def test_without_a_batch_no_costs_are_told(page: Opened):
    page.open_all()
    assert "keeps" not in page.tab.inner_text("#model")


def test_a_search_finds_a_module_and_opens_it(browser: Any, tmp_path: Path):
    opened = Opened(browser, graphpeft.show(vit(), tmp_path / "vit.html").path)
    opened.tab.fill("#search", "blocks.7.attn.proj")
    opened.tab.click("#found button")
    opened.tab.wait_for_selector('details[data-path="blocks.7.attn.proj"] .node.adapter')
    opened.tab.fill("#search", "no such thing")
    assert opened.tab.inner_text("#found") == "nothing"


def test_a_search_finds_a_node_in_closed_calls(browser: Any, tmp_path: Path):
    opened = Opened(browser, graphpeft.show(traced(), tmp_path / "traced.html").path)
    opened.tab.fill("#search", "blocks_3_attn_qkv_slot0_lora_b")
    opened.tab.click("#found button")
    opened.tab.wait_for_selector(".after .node.chosen")
    assert "lora_B" in opened.tab.inner_text("#details h2")


class BoundInTraining(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.first)
        return torch.tanh(y) if self.training else y


def test_a_search_finds_a_node_of_training_alone(browser: Any, tmp_path: Path):
    model = get_peft_model(BoundInTraining(), LoraConfig(r=2, target_parameters=["first"]))
    opened = Opened(browser, graphpeft.show(model, tmp_path / "model.html").path)
    opened.tab.fill("#search", "tanh")
    opened.tab.locator("#found button", has_text=re.compile("tanh$")).click()
    opened.tab.wait_for_selector(".after .node.chosen")
    assert opened.tab.inner_text("#details h2") == "tanh"
    assert opened.tab.locator("select.mode").evaluate("(choice) => choice.value") == "training"
    assert opened.errors == []


def test_modules_fold_and_unfold(browser: Any, tmp_path: Path):
    opened = Opened(browser, graphpeft.show(vit(), tmp_path / "vit.html").path)
    opened.tab.click("#fold")
    assert opened.count("details[open]") == 0
    opened.open_all()
    assert "12 equal" in opened.tab.inner_text("details.fold > summary")
    assert opened.count("details.module[open]") > 5


def test_a_closed_call_opens_by_a_click_on_both_sides(browser: Any, tmp_path: Path):
    opened = Opened(browser, graphpeft.show(traced(), tmp_path / "traced.html").path)
    name = opened.tab.locator(".after .node.call").first.get_attribute("data-name")
    opened.tab.locator(".after .node.call").first.click()
    opened.tab.wait_for_function(f"!document.querySelector('.graphs .node[data-name=\"{name}\"]')")
    assert opened.count(f'.cluster[data-name="cluster:{name.removeprefix("call:")}"]') >= 2


def test_a_page_tells_why_nothing_is_kept(browser: Any, tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    opened = Opened(browser, graphpeft.show(model, tmp_path / "m.html", example_inputs=(torch.randn(2, 3),)).path)
    assert "since no parameter requires a gradient" in opened.tab.inner_text("p.remark")


def test_a_page_with_names_that_are_left_out_opens_as_a_whole(browser: Any, tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    report = explain(model, LoraConfig(target_modules=["0", "1", "2"], exclude_modules=["2"]))
    opened = Opened(browser, graphpeft.show(report, tmp_path / "plan.html").path)
    opened.open_all()
    assert opened.errors == []
    assert opened.tab.locator(".refusals p").all_inner_texts() == ["2"]


def test_refusals_are_told(browser: Any, tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    report = explain(model, LoraConfig(target_modules=["0", "1"]))
    opened = Opened(browser, graphpeft.show(report, tmp_path / "plan.html").path)
    assert "1 refused" in opened.tab.inner_text(".refusals")
    assert "a ReLU has no parameter called weight" in opened.tab.inner_text(".refusals")
    assert opened.count(".after .node.adapter") > 0
