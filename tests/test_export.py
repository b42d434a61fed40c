"""Exported models compute what the models do, in processes that don't know this library."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from exports import (
    BERT,
    HAND_WRITTEN,
    LLAMA,
    MODELS,
    RESNET,
    SUFFIXES,
    TIMM_VIT,
    TOLERANCE,
    TORCHVISION_VIT,
    Served,
)
from safetensors.torch import load_file

import graphpeft
from graphpeft.exporting.formats.tensors_alone import of_tensors

WAYS = ("merged", "baked", "inputs")
TENSOR = torch.randn(3, 4)
BY_ROWS = (TIMM_VIT, HAND_WRITTEN, BERT, LLAMA)


def assert_equal(served: Served) -> None:
    wrong = {what: difference for what, difference in served.differences().items() if not difference <= TOLERANCE}
    assert wrong == {}


# each test has one process for all its exports, since importing takes longer than computing


def test_exports_compute_what_the_models_do_in_a_fresh_process(tmp_path):
    served = Served(tmp_path)
    for way in WAYS:
        for model in (HAND_WRITTEN, TIMM_VIT, BERT):
            served.export(model, "pt2", way)
        served.export(HAND_WRITTEN, "onnx", way)
    for format in ("pt2", "onnx"):
        served.export(HAND_WRITTEN, format, "rows")
    served.export(HAND_WRITTEN, "aoti", "inputs")
    # weights load into their libraries, and into PEFT; which file has them doesn't matter to the model
    for number, model in enumerate(MODELS):
        for place, way in enumerate(WAYS):
            served.export(model, ("safetensors", "state_dict")[(number + place) % 2], way)
    assert_equal(served)
    package = tmp_path / f"{HAND_WRITTEN} aoti inputs.pt2"
    again = graphpeft.export_adapter(HAND_WRITTEN.adapted(), "second", package, tmp_path / "again.safetensors")
    assert again.read_bytes() == package.with_suffix(".second.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("models", "formats", "ways"),
    [
        ([RESNET, TORCHVISION_VIT, LLAMA], ["pt2"], WAYS),
        ([TIMM_VIT, RESNET, TORCHVISION_VIT, BERT, LLAMA], ["onnx"], WAYS),
        *(([model], ["aoti"], WAYS) for model in MODELS),
        (BY_ROWS, ["pt2", "onnx", "aoti"], ["rows"]),
    ],
    ids=lambda values: "+".join(map(str, values)),
)
def test_exports_of_larger_models_compute_what_they_do_in_a_fresh_process(models, formats, ways, tmp_path):
    served = Served(tmp_path)
    for model in models:
        for format in formats:
            for way in ways:
                served.export(model, format, way)
    assert_equal(served)


# the graph


def operations(path) -> collections.Counter[str]:
    """Counts the operations of a program that have weights."""
    program = torch.export.load(path)
    targets = [str(node.target) for node in program.graph.nodes if "aten" in str(node.target)]
    weighted = ("linear", "convolution", "conv2d", "matmul", "addmm", "embedding")
    return collections.Counter(target for target in targets if target.split(".")[1] in weighted)


@pytest.mark.parametrize("model", [BERT, pytest.param(RESNET, marks=pytest.mark.long)], ids=str)
def test_a_merged_program_is_the_bases_and_a_baked_one_adds_the_branches_alone(model, tmp_path):
    adapted = model.adapted()
    sites = len(adapted.adapter_report().adapted)
    graphpeft.export(model.base(), model.example(), tmp_path / "base.pt2", check=False)
    for way in ("merged", "baked"):
        graphpeft.export(adapted, model.example(), tmp_path / f"{way}.pt2", adapters=way, check=False)
    base, merged, baked = (torch.export.load(tmp_path / f"{name}.pt2") for name in ("base", "merged", "baked"))
    assert operations(tmp_path / "merged.pt2") == operations(tmp_path / "base.pt2")
    assert len(merged.graph.nodes) == len(base.graph.nodes)
    assert merged.state_dict.keys() == base.state_dict.keys()
    added = operations(tmp_path / "baked.pt2") - operations(tmp_path / "base.pt2")
    assert added.total() == 2 * sites
    of_adapter = baked.state_dict.keys() - base.state_dict.keys()
    assert len(of_adapter) == 2 * sites
    assert all(".first." in name for name in of_adapter)


@pytest.mark.parametrize("model", [HAND_WRITTEN, pytest.param(RESNET, marks=pytest.mark.long)], ids=str)
def test_a_merged_onnx_graph_has_the_bases_operators_and_a_baked_one_two_products_more_at_each_site(model, tmp_path):
    adapted = model.adapted(("first",))
    graphpeft.export(model.base(), model.example(), tmp_path / "base.onnx", "onnx", check=False)
    for way in ("merged", "baked"):
        graphpeft.export(adapted, model.example(), tmp_path / f"{way}.onnx", "onnx", way, check=False)
    base, merged, baked = (
        collections.Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node)
        for name in ("base", "merged", "baked")
    )
    assert merged == base
    products = [(baked - base)[operator] for operator in ("MatMul", "Gemm", "Conv")]
    assert sum(products) == 2 * len(adapted.adapter_report().adapted)


@pytest.mark.parametrize("format", ["pt2", "onnx", "safetensors", "state_dict"])
def test_merged_files_have_the_bases_size(format, tmp_path):
    suffix = {"safetensors": ".safetensors", "state_dict": ".pt"}.get(format) or SUFFIXES[format]
    base, merged = tmp_path / f"base{suffix}", tmp_path / f"merged{suffix}"
    graphpeft.export(TIMM_VIT.base(), TIMM_VIT.example(), base, format, check=False)
    graphpeft.export(TIMM_VIT.adapted(), TIMM_VIT.example(), merged, format, check=False)
    assert merged.stat().st_size == pytest.approx(base.stat().st_size, rel=0.02)


def test_an_export_over_another_one_is_as_the_first(tmp_path):
    model = HAND_WRITTEN.adapted()
    reports = [graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.onnx", "onnx", "inputs") for _ in range(2)]
    assert str(reports[0]) == str(reports[1])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in reports[1].files}


def test_what_a_program_returns_needs_no_library(tmp_path):
    graphpeft.export(BERT.adapted(), BERT.example(), tmp_path / "model.pt2")
    returned = torch.export.load(tmp_path / "model.pt2").module()(BERT.tensor())
    assert type(returned) is dict
    assert returned.keys() == {"last_hidden_state", "pooler_output"}


def test_a_flat_graph_is_exported_as_any_model(tmp_path):
    model = graphpeft.trace(TIMM_VIT.base(), (TIMM_VIT.tensor(),))
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, init_lora_weights=False, **TIMM_VIT.lora))
    for way in ("baked", "rows"):
        report = graphpeft.export(model, (TIMM_VIT.tensor(),), tmp_path / f"{way}.pt2", adapters=way)
        assert len(report.checked) == 3


# sizes


def test_the_report_names_the_sizes_that_can_change_and_what_was_checked(tmp_path):
    report = graphpeft.export(LLAMA.adapted(), LLAMA.example(), tmp_path / "model.pt2", adapters="inputs")
    [shape] = report.inputs.values()
    assert not any(character.isdigit() and shape.startswith(character) for character in shape)
    assert {(one.case, one.shapes) for one in report.checked} == {
        (case, shapes)
        for case in ("adapter 'first'", "adapter 'second'")
        for shapes in (((2, 7),), ((3, 8),), ((1, 1),))
    }
    assert all(one.difference <= TOLERANCE for one in report.checked)
    assert report.files.keys() == {
        tmp_path / name for name in ("model.pt2", "model.first.safetensors", "model.second.safetensors")
    }
    assert "adapter 'second'  (1, 1)" in str(report)


class Places(torch.nn.Module):
    """Adds the vectors of at most 500 places, and hides some of them."""

    def __init__(self):
        super().__init__()
        self.places, self.layer = torch.nn.Parameter(torch.randn(500, 8)), torch.nn.Linear(8, 4)

    def forward(self, x, shown):
        return self.layer(x + self.places[: x.shape[1]]) * shown[..., None]


class Joined(torch.nn.Module):
    """Has one input whose length follows from another's: 2n - 1 for n."""

    def forward(self, x, both):
        return torch.cat([x, x[:, 1:]], 1) + both


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_each_size_that_can_change_has_a_letter_and_its_limits_once(format, tmp_path):
    example = (torch.randn(2, 7, 8), torch.ones(2, 7))
    report = graphpeft.export(Places(), example, tmp_path / f"m.{format}", format)
    assert report.inputs == {"x": "(a, b ≤ 500, 8)", "shown": "(a, b)"}
    limits = {"x": {1: torch.export.Dim("rows", min=4, max=9)}, "shown": {1: torch.export.Dim("rows", min=4, max=9)}}
    report = graphpeft.export(Places(), example, tmp_path / f"m.{format}", format, dynamic=limits)
    assert report.inputs == {"x": "(2, 4 ≤ a ≤ 9, 8)", "shown": "(2, a)"}


def test_a_size_that_follows_from_another_is_told_by_its_letter(tmp_path):
    long = torch.export.Dim("long", min=4, max=40)
    dynamic = {"x": {1: long}, "both": {1: 2 * long - 1}}
    report = graphpeft.export(Joined(), (torch.randn(2, 7), torch.randn(2, 13)), tmp_path / "m.pt2", dynamic=dynamic)
    assert report.inputs == {"x": "(2, 4 ≤ a ≤ 40)", "both": "(2, 2*a - 1)"}


def test_an_example_of_one_row_and_one_token_serves_any_number_of_both(tmp_path):
    example = {"input_ids": LLAMA.tensor()[:1, :1], "use_cache": False}
    model = LLAMA.adapted()
    graphpeft.export(model, example, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for which in (0, 1):
        found = program(**LLAMA.inputs(which))["logits"]
        assert torch.allclose(found, LLAMA.output(model, which), atol=TOLERANCE)


def test_without_dynamic_sizes_they_are_the_examples(tmp_path):
    report = graphpeft.export(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "model.pt2", dynamic=False)
    assert report.inputs == {"x": "(3, 4, 8)"}
    assert [one.shapes for one in report.checked] == [((3, 4, 8),)]


@pytest.mark.parametrize("dynamic", [True, False, {"x": {0: torch.export.Dim("rows")}}], ids=["all", "none", "named"])
def test_an_example_of_one_row_serves_itself_whichever_sizes_are_open(dynamic, tmp_path):
    report = graphpeft.export(HAND_WRITTEN.base(), (torch.randn(1, 1, 8),), tmp_path / "m.pt2", dynamic=dynamic)
    assert report.checked[0].shapes == ((1, 1, 8),)
    assert (report.inputs["x"] == "(1, 1, 8)") == (dynamic is False)


class Masked(torch.nn.Module):
    """Attention of two heads, whose mask may be one for both, and whose rows may share a factor."""

    def forward(self, q, mask, factor):
        q = q.unflatten(-1, (2, -1)).transpose(1, 2) * factor[:, None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_a_size_of_one_that_stands_for_all_remains_one(tmp_path):
    example = (torch.randn(2, 5, 4), torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.ones(1))
    report = graphpeft.export(Masked(), example, tmp_path / "m.pt2")
    assert report.inputs["mask"].split(", ")[1] == "1"
    assert report.inputs["factor"] == "(1,)"
    assert [one.shapes[0][0] for one in report.checked] == [2, 4, 1]


def test_an_example_without_rows_serves_any_number(tmp_path):
    report = graphpeft.export(HAND_WRITTEN.base(), (torch.randn(0, 4, 8),), tmp_path / "m.pt2")
    assert [one.shapes for one in report.checked][:2] == [((0, 4, 8),), ((1, 5, 8),)]


class Pairs(torch.nn.Module):
    """Divides by the number of pairs in a row, of which a row of one value has none."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, x):
        return self.linear(x[..., None]) * (12 // (x.shape[1] // 2))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_size_for_which_the_model_raises_any_error_is_none_that_it_accepts(format, tmp_path):
    with pytest.raises(ZeroDivisionError):
        Pairs()(torch.randn(3, 1))
    model = graphpeft.get_peft_model(Pairs(), graphpeft.LoraConfig(r=2, target_modules=["linear"]))
    report = graphpeft.export(model, (torch.randn(3, 8),), tmp_path / f"m{SUFFIXES[format]}", format)
    assert [one.shapes for one in report.checked] == [((3, 8),), ((4, 9),), ((1, 8),)]


def test_an_example_can_be_any_mapping(tmp_path):
    example = collections.UserDict(BERT.inputs())
    assert graphpeft.export(BERT.base(), example, tmp_path / "m.pt2").inputs.keys() == {"input_ids"}


class OwnNames(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, adapters):
        return self.linear(x) + adapters


def test_a_model_may_have_arguments_of_the_names_of_an_exports(tmp_path):
    model = graphpeft.get_peft_model(OwnNames(), graphpeft.LoraConfig(target_modules=["linear"]))
    report = graphpeft.export(model, (TENSOR, TENSOR), tmp_path / "m.pt2", adapters="baked")
    assert list(report.inputs) == ["x", "adapters"]
    with pytest.raises(graphpeft.ExportError, match=r"has an argument 'adapters' itself, .*adapters='baked'"):
        graphpeft.export(model, (TENSOR, TENSOR), tmp_path / "m.pt2", adapters="inputs")


class Counting(torch.nn.Module):
    """Changes in each call what the next one gives."""

    count: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return x.mul_(self.count)


def test_a_program_counts_its_calls_as_the_model_does(tmp_path):
    model, x = Counting(), torch.ones(3, 4)
    graphpeft.export(model, (x,), tmp_path / "m.pt2")
    assert model.count == 0
    assert torch.equal(x, torch.ones(3, 4))
    loaded: Any = torch.export.load(tmp_path / "m.pt2").module()
    assert [float(loaded(torch.ones(3, 4))[0, 0]) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("dynamic", [True, False])
def test_onnx_counts_no_calls(dynamic, tmp_path):
    with pytest.raises(graphpeft.ExportError, match=r"differs by 0\.5 from the model"):
        graphpeft.export(Counting(), (torch.ones(3, 4),), tmp_path / "m.onnx", "onnx", dynamic=dynamic)


def test_sizes_can_be_named_as_for_pytorchs_exporter(tmp_path):
    rows = torch.export.Dim("rows", min=2, max=3)
    report = graphpeft.export(
        HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "model.pt2", dynamic={"x": {0: rows}}
    )
    assert report.inputs["x"].endswith(", 4, 8)")
    # the example's, the one below since there is none above, and the least
    assert [one.shapes for one in report.checked] == [((3, 4, 8),), ((2, 4, 8),), ((1, 4, 8),)]


def test_a_spec_of_sizes_is_for_all_arguments(tmp_path):
    with pytest.raises(graphpeft.ExportError, match="2 entries for the arguments x; give one for each"):
        graphpeft.export(HAND_WRITTEN.base(), HAND_WRITTEN.example(), tmp_path / "model.pt2", dynamic=({}, {}))


class Difference(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(x) - 2 * y


def adapted_difference():
    config = graphpeft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear"], init_lora_weights=False)
    return graphpeft.get_peft_model(Difference(), config).eval()


def test_one_tensor_that_is_given_twice_is_two_inputs_of_a_program(tmp_path):
    model, (x, y) = adapted_difference(), torch.randn(2, 3, 4)
    graphpeft.export(model, (TENSOR, TENSOR), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(x, y)
    torch.testing.assert_close(found, model(x, y).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", ["merged", "inputs"])
def test_one_tensor_that_is_given_twice_is_two_inputs_of_a_graph_in_onnx(adapters, tmp_path):
    model, (x, y) = adapted_difference(), torch.randn(2, 3, 4)
    graphpeft.export(model, (TENSOR, TENSOR), tmp_path / "model.onnx", "onnx", adapters=adapters)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for other in (y, y[:1]):
        [found] = session.run(None, {"x": x.numpy(), "y": other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x, other).detach(), rtol=1e-5, atol=1e-5)


class Choosing(torch.nn.Module):
    """Takes options before tensors, behind them and beside them in a container."""

    def forward(self, sign, pair, input, *, twice=False):
        x = pair[1] if sign else -pair[1]
        return {"sum": (x + x if twice else x) + input, "first": x.relu()}


def test_a_program_of_tensors_has_no_other_arguments_and_computes_the_same():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    rows = {0: torch.export.Dim.AUTO}
    dynamic = {"sign": None, "pair": (None, rows), "input": rows, "twice": None}
    program = torch.export.export(
        Choosing(), (False, ("unread", x), y), {"twice": True}, dynamic_shapes=dynamic, strict=True
    )
    nodes = len(program.graph.nodes)
    alone = of_tensors(program)
    assert alone.graph_signature.user_inputs == ("pair_1", "input")
    for rows in (3, 7):
        x, y = torch.randn(rows, 4), torch.randn(rows, 4)
        expected = Choosing()(False, ("unread", x), y, twice=True)
        for found in (alone.module()(x, y), program.module()(False, ("unread", x), y, twice=True)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert len(program.graph.nodes) == nodes


class OfLengths(torch.nn.Module):
    """Makes a mask from lengths, as torchaudio's Conformer does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, lengths):
        frames = torch.arange(int(lengths.max().item()))
        return self.layer(x).masked_fill((frames >= lengths[:, None])[..., None], 0.0)


@pytest.mark.every
@pytest.mark.parametrize("way", ["merged", "inputs"])
def test_a_size_that_python_reads_from_a_tensor_stays_open(way, tmp_path):
    torch.manual_seed(0)
    config = graphpeft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(OfLengths(), config)
    graphpeft.export(model, (torch.randn(2, 6, 4), torch.tensor([6, 3])), tmp_path / "model.pt2", adapters=way)
    given = {"adapters": load_file(tmp_path / "model.default.safetensors")} if way == "inputs" else {}
    x, lengths = torch.randn(3, 9, 4), torch.tensor([2, 9, 5])
    found = torch.export.load(tmp_path / "model.pt2").module()(x, lengths, **given)
    assert torch.allclose(found, model(x, lengths), atol=TOLERANCE)


class Sum(torch.nn.Module):
    def forward(self, x, *more, scale=None, **named):
        for tensor in (*more, *named.values()):
            x = x + (tensor if isinstance(tensor, torch.Tensor) else tensor["inside"])
        return {"sum": x if scale is None else x * scale, "parts": [x, None]}


@pytest.mark.parametrize(
    ("example", "names"),
    [
        ((TENSOR, TENSOR, TENSOR), ["x", "args.1", "args.2"]),
        ({"x": TENSOR, "scale": 2.0, "bias": TENSOR}, ["x", "bias"]),
        ({"x": TENSOR, "bias": {"inside": TENSOR}}, ["x", "bias.inside"]),
    ],
    ids=["by place", "by name", "nested"],
)
def test_arguments_of_every_kind_have_names_in_onnx_as_results_have(example, names, tmp_path):
    report = graphpeft.export(Sum(), example, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [one.name for one in session.get_inputs()] == names == list(report.inputs)
    assert [one.name for one in session.get_outputs()] == ["sum", "parts.0"]


class Scaled(torch.nn.Module):
    """Makes a row of a number, as a diffusion model of its time."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, time):
        times = time[None] if time.ndim == 0 else time
        return self.linear(x) * times[:, None]


@pytest.mark.parametrize("way", WAYS)
def test_a_number_of_the_models_own_stays_without_dimensions_in_onnx(way, tmp_path):
    model: Any = graphpeft.get_peft_model(Scaled(), graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["linear"]))
    time = torch.tensor(0.5)
    graphpeft.export(model, (TENSOR, time), tmp_path / "m.onnx", "onnx", way)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[1].shape == []
    [found] = session.run(None, {"x": TENSOR.numpy(), "time": time.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(TENSOR, time), atol=TOLERANCE)


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = x + self.w
        return {"x": y * 2, "add": y.relu(), "mul": y, "w": y.exp(), "same": x, "again": y}


def test_results_can_have_the_names_of_arguments_operations_and_weights(tmp_path):
    graphpeft.export(Named(), (TENSOR,), tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["output.x", "add", "mul", "w", "same", "again"]


class Fixed(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] == 3 else x


def test_a_batch_that_the_model_fixes_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"the batch isn't dynamic, .*x \(3, a\)"):
        graphpeft.export(Fixed(), (torch.randn(3, 4),), tmp_path / "model.pt2")


def test_half_precision_is_compared_as_far_as_it_can_be(tmp_path):
    model = LLAMA.adapted().to(torch.bfloat16)
    report = graphpeft.export(model, LLAMA.example(), tmp_path / "model.pt2")
    assert max(one.difference for one in report.checked) > 0


# weights


@pytest.mark.parametrize("format", ["safetensors", "state_dict"])
def test_merged_weights_are_one_file_with_the_bases_own_keys(format, tmp_path):
    suffix = ".safetensors" if format == "safetensors" else ".pt"
    path = tmp_path / f"model{suffix}"
    graphpeft.export(TIMM_VIT.adapted(), TIMM_VIT.example(), path, format)
    assert _loaded(path).keys() == TIMM_VIT.base().state_dict().keys()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model: model.merge_adapter(["second"]), ["first", "second"]),
        (lambda model: model.set_adapter(["first", "second"]), ["first", "second"]),
        (lambda model: model.disable_adapters(), []),
    ],
    ids=["merged beside it", "both active", "disabled"],
)
def test_baked_weights_have_a_folder_for_each_adapter_that_acts(change, names, tmp_path):
    model = HAND_WRITTEN.adapted()
    change(model)
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m", "safetensors", "baked")
    assert sorted(folder.name for folder in tmp_path.glob("m/adapters/*")) == names


def test_tied_weights_are_written_once_as_the_library_does(tmp_path):
    graphpeft.export(LLAMA.adapted(), LLAMA.example(), tmp_path / "model", "safetensors")
    LLAMA.base().save_pretrained(tmp_path / "own")
    ours, theirs = (_loaded(tmp_path / name / "model.safetensors") for name in ("model", "own"))
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in ours
