"""The JSON for Google's Model Explorer has the graphs of a picture, in the fields that its readers know."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama
from torch import nn

import graphpeft
from graphpeft import LoraConfig, TaskType, explain, get_peft_model
from graphpeft.showing.reading import picture_of

TEXT, LIST = str, list

FIELDS: dict[str, dict[str, Any]] = {
    "collection": {"label": TEXT, "subgraphs": LIST},
    "graph": {"id": TEXT, "nodes": LIST, "groupNodeAttributes": dict},
    "node": {
        "id": TEXT,
        "label": TEXT,
        "namespace": TEXT,
        "subgraphIds": LIST,
        "attrs": LIST,
        "incomingEdges": LIST,
        "outputsMetadata": LIST,
        "style": dict,
    },
    "edge": {"sourceNodeId": TEXT, "sourceNodeOutputId": TEXT, "targetNodeInputId": TEXT},
    "attribute": {"key": TEXT, "value": TEXT},
    "metadata": {"id": TEXT, "attrs": LIST},
    "style": {"backgroundColor": TEXT},
}
"""The fields that Model Explorer reads, with the types of their values."""


def checked(kind: str, value: dict[str, Any], *needed: str) -> None:
    assert {*needed} <= value.keys() <= FIELDS[kind].keys(), (kind, value)
    assert all(isinstance(inner, FIELDS[kind][name]) for name, inner in value.items()), (kind, value)


def assert_readable(collections: list[dict[str, Any]]) -> None:
    """Asserts that collections have the fields of the format, and that all that they refer to is there."""
    assert collections
    for collection in collections:
        checked("collection", collection, "label", "subgraphs")
        assert collection["subgraphs"]
    graphs = [graph for collection in collections for graph in collection["subgraphs"]]
    ids = [graph["id"] for graph in graphs]
    assert len(ids) == len({*ids})
    for graph in graphs:
        checked("graph", graph, "id", "nodes")
        names = [node["id"] for node in graph["nodes"]]
        assert len(names) == len({*names}), graph["id"]
        for attributes in graph.get("groupNodeAttributes", {}).values():
            assert all(isinstance(value, str) for value in attributes.values())
        for node in graph["nodes"]:
            checked("node", node, "id", "label", "namespace")
            assert {*node["subgraphIds"]} <= {*ids}
            for attribute in node["attrs"]:
                checked("attribute", attribute, "key", "value")
            for edge in node.get("incomingEdges", ()):
                checked("edge", edge, "sourceNodeId")
                assert edge["sourceNodeId"] in names
            for metadata in node.get("outputsMetadata", ()):
                checked("metadata", metadata, "id", "attrs")
            checked("style", node.get("style", {}))


def written(shown: Any, folder: Path, **options: Any) -> dict[str, Any]:
    path = graphpeft.show(shown, folder / "model.json", **options).path
    collections = json.loads(path.read_text(encoding="utf-8"))
    assert_readable(collections)
    graphs = [graph for collection in collections for graph in collection["subgraphs"]]
    return {"graphs": graphs, "first": collections[0]["subgraphs"]}


def attributes(node: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"] for each in node["attrs"]}


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def test_nodes_of_adapters_have_a_colour_and_tell_of_their_adapter(tmp_path: Path) -> None:
    model = get_peft_model(two_layers(), LoraConfig(r=2, lora_alpha=5, target_modules=["0"]))
    collection = written(model, tmp_path, example_inputs=(torch.randn(3, 6),))
    graph = next(graph for graph in collection["graphs"] if graph["id"] == "0")
    picture = picture_of(model)
    [drawn] = picture.graphs[0]
    assert [node["id"] for node in graph["nodes"]] == [node.name for node in drawn.after]
    of_adapter = [node for node in graph["nodes"] if "adapter" in attributes(node)]
    assert [node["id"] for node in of_adapter] == [node.name for node in drawn.after if node.slot is not None]
    assert of_adapter == [node for node in graph["nodes"] if "style" in node]
    told = attributes(of_adapter[-1])
    assert told["adapter"] == "default: LORA (r=2, α=5)"
    assert told["rule"].startswith("LoraLinear")
    assert told["lora_A"] == "2 × 6, float32, trained"
    assert any("kept for the backward" in attributes(node) for node in of_adapter)


def test_each_edge_is_one_of_the_graph(tmp_path: Path) -> None:
    model = get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0"]))
    collection = written(model, tmp_path)
    graph = next(graph for graph in collection["graphs"] if graph["id"] == "0")
    [drawn] = picture_of(model).graphs[0]
    found = {node["id"]: [edge["sourceNodeId"] for edge in node["incomingEdges"]] for node in graph["nodes"]}
    assert found == {node.name: node.inputs for node in drawn.after}


def test_the_modules_lead_to_their_graphs(tmp_path: Path) -> None:
    collection = written(get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0", "2"])), tmp_path)
    overview = collection["graphs"][0]
    assert overview["id"] == "modules"
    assert {node["id"]: node["subgraphIds"] for node in overview["nodes"]} == {"0": ["0"], "1": [], "2": ["2"]}


def test_calls_of_a_trace_are_namespaces_and_the_trace_is_shown_first(tmp_path: Path) -> None:
    inside = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2))
    model = graphpeft.trace(inside, (torch.randn(2, 6),))
    collection = written(get_peft_model(model, LoraConfig(r=2, target_modules=["0.0"])), tmp_path)
    [first] = collection["first"]
    assert first["id"] == "the model"
    assert {node["namespace"] for node in first["nodes"] if "style" in node} == {"0"}


class Long(nn.Module):
    """Its forward has more nodes than the model has modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(6, 6)), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.tanh(x @ self.first)
        return self.second(x)


def test_the_modules_are_shown_first_where_a_forward_is_larger(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["second"], target_parameters=["0.first"])
    written_graphs = written(get_peft_model(nn.Sequential(Long(), nn.Linear(6, 6)), config), tmp_path)
    # of the first collection, the viewer shows the largest graph, wherever it stands
    assert [graph["id"] for graph in written_graphs["first"]] == ["modules"]
    assert {graph["id"] for graph in written_graphs["graphs"]} == {"modules", "0", "0.second"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: get_peft_model(
            tiny_llama(), LoraConfig(r=2, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
        ),
        lambda: explain(two_layers(), LoraConfig(r=2, target_modules=["0", "1"])),
        two_layers,
    ],
    ids=["llama", "plan", "no adapters"],
)
def test_all_that_is_drawn_is_readable(make: Any, tmp_path: Path) -> None:
    assert written(make(), tmp_path)["graphs"]


def test_in_a_notebook_it_is_no_picture(tmp_path: Path) -> None:
    assert graphpeft.show(two_layers(), tmp_path / "model.json")._repr_html_() is None


def graph_builder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns Model Explorer's module of dataclasses, without its server."""
    package = importlib.util.find_spec("model_explorer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("ai-edge-model-explorer isn't installed")
    path = Path(package.submodule_search_locations[0]) / "graph_builder.py"
    spec = importlib.util.spec_from_file_location("graph_builder_of_model_explorer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


def test_the_package_s_own_classes_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = graph_builder(monkeypatch)
    model = get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0"]))
    for graph in written(model, tmp_path)["graphs"]:
        nodes = [
            builder.GraphNode(
                **{
                    **node,
                    "attrs": [builder.KeyValue(**each) for each in node["attrs"]],
                    "incomingEdges": [builder.IncomingEdge(**each) for each in node.get("incomingEdges", ())],
                    "outputsMetadata": [
                        builder.MetadataItem(each["id"], [builder.KeyValue(**inner) for inner in each["attrs"]])
                        for each in node.get("outputsMetadata", ())
                    ],
                    "style": builder.GraphNodeStyle(**node["style"]) if "style" in node else None,
                }
            )
            for node in graph["nodes"]
        ]
        made = builder.Graph(graph["id"], nodes, graph.get("groupNodeAttributes"))
        assert [node.id for node in made.nodes] == [node["id"] for node in graph["nodes"]]
