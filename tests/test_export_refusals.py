"""What can't be exported is refused with the reason; no file is left, none is changed, and the model is as it was."""

from __future__ import annotations

import builtins
import importlib
import os
from typing import Any

import onnxruntime
import pytest
import sympy
import torch
from exports import BERT, HAND_WRITTEN, LLAMA, SUFFIXES
from pairwise import pairwise
from torch import nn
from torch.utils._sympy.functions import Mod

import graphpeft
from graphpeft import ExportError, GuardError
from graphpeft.exporting.formats import FORMATS
from graphpeft.exporting.formats.pt2 import Pt2
from graphpeft.exporting.sizes import breaking


def state_of(model: nn.Module) -> dict:
    return {
        path: (
            type(module),
            module.training,
            {
                name: (id(p), p.requires_grad, p.detach().clone())
                for name, p in module._parameters.items()
                if p is not None
            },
            sorted(module.__dict__),
        )
        for path, module in model.named_modules()
    }


def assert_as_it_was(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for path, (cls, training, parameters, names) in before.items():
        assert after[path][0] is cls
        assert after[path][1] == training
        assert after[path][3] == names
        for name, (identity, requires_grad, value) in parameters.items():
            assert after[path][2][name][:2] == (identity, requires_grad)
            assert torch.equal(after[path][2][name][2], value)


@pytest.mark.quick("exporting")
@pytest.mark.parametrize("way", ["merged", "baked", "inputs", "rows"])
def test_an_export_leaves_the_model_as_it_is(way, tmp_path):
    model = HAND_WRITTEN.adapted()
    model.set_adapter("second")
    model.train()
    before, generator = state_of(model), torch.get_rng_state()
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters=way)
    assert_as_it_was(model, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.active_adapters == ["second"]


class DrawsInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5, training=True)


def test_an_export_of_a_model_that_draws_random_numbers_leaves_the_generator_as_it_is(tmp_path):
    model: Any = graphpeft.get_peft_model(DrawsInEvaluation(), graphpeft.LoraConfig(target_modules=["linear"]))
    x = torch.randn(2, 4)
    generator = torch.get_rng_state()
    graphpeft.export(model, (x,), tmp_path / "m.pt2", check=False)
    assert torch.equal(torch.get_rng_state(), generator)


def test_no_random_numbers_are_drawn_for_files_of_adapters(tmp_path):
    model, base, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.base(), HAND_WRITTEN.example()
    generator = torch.get_rng_state()
    graphpeft.export(model, example, tmp_path / "weights", "safetensors", "inputs")
    graphpeft.export(model, example, tmp_path / "m.pt2", adapters="inputs", check=False)
    graphpeft.export_adapter(base, tmp_path / "weights" / "adapters" / "second", tmp_path / "m.pt2")
    assert torch.equal(torch.get_rng_state(), generator)


def refused(model, example, path, match: str, error: type[BaseException] = ExportError, **options) -> None:
    """Asserts that an export is refused, and changes neither the model nor any file."""
    before = state_of(model)
    folder = path.parent
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(error, match=match):
        graphpeft.export(model, example, path, **options)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == files
    assert_as_it_was(model, before)


def test_unknown_formats_and_ways_are_named_with_those_that_there_are(tmp_path):
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    refused(model, example, tmp_path / "m.pt2", r"format is 'tflite'; it can be 'pt2', .*'onnx'", format="tflite")
    refused(model, example, tmp_path / "m.pt2", r"adapters is 'mixed'; it can be 'merged', ", adapters="mixed")


def test_a_path_ends_as_its_format_does(tmp_path):
    refused(
        HAND_WRITTEN.adapted(),
        HAND_WRITTEN.example(),
        tmp_path / "m.onnx",
        r"to end with \.pt2 .*; \.onnx is for format='onnx'",
    )


@pytest.mark.parametrize("way", ["baked", "inputs", "rows"])
def test_a_model_without_adapters_has_none_to_carry(way, tmp_path):
    refused(HAND_WRITTEN.base(), HAND_WRITTEN.example(), tmp_path / "m.pt2", "has no adapters", adapters=way)


def test_example_inputs_are_a_tuple_or_a_dict_with_a_tensor(tmp_path):
    model = HAND_WRITTEN.adapted()
    refused(model, HAND_WRITTEN.tensor(), tmp_path / "m.pt2", r"pass a tuple of positional arguments, as in \(x,\)")
    refused(model, (3,), tmp_path / "m.pt2", "has no tensor")
    refused(model, (torch.randn(3, 5),), tmp_path / "m.pt2", "can't be called with example_inputs: RuntimeError")


def test_adapters_of_other_ranks_are_named_with_their_shapes(tmp_path):
    model = HAND_WRITTEN.adapted()
    model.add_adapter("wide", graphpeft.LoraConfig(r=4, **HAND_WRITTEN.lora))
    match = r"adapter 'wide' doesn't fit the inputs of a graph for adapter 'first': .*\(4, \d+\) in place of \(2, \d+\)"
    refused(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", match, adapters="inputs")


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = nn.functional.linear(x, self.w)
        return y * 2 if x.shape[0] > 2 else y


@pytest.mark.parametrize("way", ["merged", "baked", "inputs"])
def test_an_example_for_which_the_model_decides_otherwise_violates_its_guard(way, tmp_path):
    config = graphpeft.LoraConfig(target_modules=["w"], init_lora_weights=False)
    model = graphpeft.get_peft_model(Deciding(), config, example_inputs=(torch.randn(5, 4),))
    match = r"^`return y \* 2 if x\.shape\[0\] > 2 else y` .*that was True when the graph was recorded"
    refused(model, (torch.randn(2, 4),), tmp_path / "m.pt2", match, GuardError, adapters=way)


def least(x, y):
    return x * 2 if x.shape[0] > 2 else x


def most(x, y):
    return x * 2 if x.shape[0] < 10 else x


def of_two(x, y):
    return x * 2 if x.shape[0] > y.shape[0] else x


def many(x, y):
    return x * 2 if x.shape[0] <= 500 else x


def many_halves(x, y):
    return x * 2 if x.shape[0] // 2 <= 300 else x


def even(x, y):
    return x * 2 if x.shape[0] % 2 == 0 else x


def no_hundred(x, y):
    return x * 2 if x.shape[0] % 100 != 0 else x


def some(x, y):
    return x * 2 if 3 <= x.shape[0] <= 40 else x


def all_but_one(x, y):
    return x * 2 if x.shape[0] != 37 else x


def oblong(x, y):
    return x * 2 if x.shape[0] != x.shape[1] else x


def few_elements(x, y):
    return x * 2 if x.shape[0] * x.shape[1] < 50 else x


def both(x, y):
    return x * 2 if x.shape[0] > 4 and x.shape[1] > 9 else x


def one_of_three(x, y):
    if x.shape[0] < 8:
        return x
    return x + 0 if x.shape[0] < 16 else x * 2


def alike(x, y):
    return x * 2 if x.shape[1] == y.shape[0] else x


CONDITIONS = {
    many: r"x\.shape\[0\] <= 500\. .*0: .*max=500\)",
    many_halves: r"\(x\.shape\[0\]//2\) <= 300\. .*max=601\)",
    even: r"Mod\(x\.shape\[0\], 2\) == 0\. Use format='pt2'",
    no_hundred: r"Mod\(x\.shape\[0\], 100\) != 0\. Use format='pt2'",
    some: r"x\.shape\[0\] .* [340]+\. .*min=3, max=40\)",
    all_but_one: r"x\.shape\[0\] != 37\. .*max=36\)",
    oblong: r"x\.shape\[0\] != x\.shape\[1\]\. Use format='pt2'",
    both: r"x\.shape\[1\] <= 9\. .*1: .*max=9\)",
    one_of_three: r"x\.shape\[0\] < 16\. .*max=15\)",
    few_elements: r"x\.shape\[0\]\*x\.shape\[1\] < 50\. Use format='pt2'",
    alike: r"x\.shape\[1\] == y\.shape\[0\]\. Use format='pt2'",
}


class By(nn.Module):
    """Computes what a function does."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


@pytest.mark.parametrize("format", ["onnx", pytest.param("aoti", marks=pytest.mark.long)])
@pytest.mark.parametrize("function", [least, most, of_two])
def test_a_file_that_doesnt_see_where_the_model_decides_otherwise_isnt_left(function, format, tmp_path):
    example = (torch.randn(4, 5), torch.randn(2))
    path = tmp_path / f"m{SUFFIXES[format]}"
    advice = "Use format='pt2'" if function is of_two else "Limit the sizes"
    refused(By(function), example, path, f"decides otherwise than on the example, .*{advice}", format=format)
    rows = torch.export.Dim("rows", min=3, max=9)
    limited = {"x": {0: rows}, "y": None}
    graphpeft.export(By(function), example, path, format, dynamic=limited)
    # a program checks its inputs itself
    graphpeft.export(By(function), example, tmp_path / "checked.pt2")


@pytest.mark.parametrize("function", CONDITIONS, ids=lambda function: function.__name__)
def test_the_condition_under_which_a_file_is_right_is_told(function, tmp_path):
    example = (torch.randn(4, 5), torch.randn(5))
    refused(By(function), example, tmp_path / "m.onnx", f"it is right where {CONDITIONS[function]}", format="onnx")
    if "pt2" in CONDITIONS[function]:  # as the refusal says
        graphpeft.export(By(function), example, tmp_path / "checked.pt2")


def mend_of(model, example, path) -> Any:
    """Returns the argument `dynamic` that a refusal names."""
    with pytest.raises(ExportError) as error:
        graphpeft.export(model, example, path, "onnx")
    return eval(str(error.value).partition("dynamic=")[2].partition(", or use")[0])


@pytest.mark.parametrize("function", [many, some], ids=lambda function: function.__name__)
def test_a_file_is_exported_with_the_limit_that_the_refusal_names(function, tmp_path):
    example = (torch.randn(4, 5), torch.randn(5))
    dynamic = mend_of(By(function), example, tmp_path / "m.onnx")
    assert graphpeft.export(By(function), example, tmp_path / "m.onnx", "onnx", dynamic=dynamic).checked


class ByRows(nn.Module):
    """Adds up rows, with a number for each of them, or with twice a number for all."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x, y, scale=None):
        rows, numbers = x.shape[0], y.shape[0]
        if self.limit is not None and rows > self.limit:
            raise ValueError
        if numbers == 1 < rows:
            y = 2 * y
        elif 2 * numbers <= rows:
            raise ValueError
        return y[torch.arange(rows).clamp(max=numbers - 1)] @ x


@pytest.mark.parametrize(("limit", "rows"), [(None, "a"), (40, "a ≤ 40")])
def test_sizes_that_must_be_equal_are_one_dim_in_the_refusal_with_which_the_file_is_exported(limit, rows, tmp_path):
    model, example = ByRows(limit), {"x": torch.randn(4, 5), "y": torch.randn(4), "scale": None}
    dynamic = mend_of(model, example, tmp_path / "m.onnx")
    report = graphpeft.export(model, example, tmp_path / "m.onnx", "onnx", dynamic=dynamic)
    assert report.inputs == {"x": f"({rows}, b)", "y": "(a,)"}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in (1, 7):
        x, y = torch.randn(size, 5), torch.randn(size)
        [found] = session.run(None, {"x": x.numpy(), "y": y.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x, y))
    with pytest.raises(Exception, match=r"dimension mismatch|out of data bounds"):
        session.run(None, {"x": torch.randn(4, 5).numpy(), "y": torch.randn(1).numpy()})


def test_further_ways_than_are_tried_are_told(tmp_path):
    def thresholds(x, y):
        for size in (6, 8, 10, 12, 14, 16, 18, 20, 22, 24):
            if x.shape[0] < size:
                return x + 0
        return x * 2

    with pytest.warns(graphpeft.PeftWarning, match="further branches were looked for behind 8 of these"):
        graphpeft.export(By(thresholds), (torch.randn(4, 5), torch.randn(5)), tmp_path / "m.onnx", "onnx")


AUTO = torch.export.Dim.AUTO


@pytest.mark.parametrize("function", [oblong, few_elements, alike, both], ids=lambda function: function.__name__)
def test_sizes_that_the_caller_leaves_open_are_tried_too(function, tmp_path):
    example = (torch.randn(4, 5), torch.randn(5))
    open_sizes = {"x": {0: AUTO, 1: AUTO}, "y": {0: AUTO}}
    refused(By(function), example, tmp_path / "m.onnx", "it is right where", format="onnx", dynamic=open_sizes)


def test_sizes_beyond_the_callers_limits_are_not_tried(tmp_path):
    rows = torch.export.Dim("rows", max=12)
    dynamic = {"x": {0: rows, 1: AUTO}, "y": None}
    assert graphpeft.export(By(many), (torch.randn(4, 5), torch.randn(5)), tmp_path / "m.onnx", "onnx", dynamic=dynamic)


class OfFrames(nn.Module):
    """Has a product for each frame, so that a program has one number of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.stack([self.linear(frame) for frame in x.unbind(1)]).sum(0)


def test_onnxruntime_refuses_a_size_that_the_program_fixes(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    report = graphpeft.export(OfFrames(), (torch.randn(3, 4, 6),), tmp_path / "m.onnx", "onnx")
    session = runtime.InferenceSession(str(report.path))
    session.run(None, {"x": torch.randn(5, 4, 6).numpy()})
    with pytest.raises(Exception, match="index: 1 Got: 6 Expected: 4"):
        session.run(None, {"x": torch.randn(5, 6, 6).numpy()})


@pytest.mark.long
def test_a_file_that_takes_sizes_which_its_program_fixes_isnt_left(tmp_path):
    path = tmp_path / "m.pt2"
    refused(OfFrames(), (torch.randn(3, 4, 6),), path, r"right where x\.shape\[1\] == 4\. Use", format="aoti")


def test_a_model_that_raises_itself_where_its_program_doesnt_hold_is_exported(tmp_path):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 5))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    report = graphpeft.export(Positions(), (torch.randn(4, 5),), tmp_path / "m.onnx", "onnx")
    assert report.checked


def test_sizes_at_which_a_condition_divides_by_a_negative_number_are_not_tried():
    size = sympy.Symbol("size", integer=True, positive=True)
    found = breaking(sympy.Eq(Mod(24, size - 6), 0), size, {size: 9})
    assert min(found) == 11  # 24 % 4 == 0, and 24 % 5 isn't; below 7 PyTorch's Mod refuses to compute


def test_a_condition_that_only_very_large_sizes_break_is_told_in_a_warning(tmp_path):
    class Long(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] <= 1_000_000 else x

    x = torch.randn(4, 5)
    with pytest.warns(graphpeft.PeftWarning, match=r"right where x\.shape\[0\] <= 1000000; larger sizes weren't tried"):
        graphpeft.export(Long(), (x,), tmp_path / "m.onnx", "onnx")
    rows = torch.export.Dim("rows", max=100)
    graphpeft.export(Long(), (x,), tmp_path / "m.onnx", "onnx", dynamic={"x": {0: rows}})


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.special.bessel_j0(nn.functional.linear(x, self.w))


# where the adapter is, how it is carried, and whether there are modules is asked in pairs
@pairwise(
    way=["merged", "baked", "inputs"],
    target={"beside it": "0", "in it": "1.w"},
    is_flat={"modules": False, "flat": True},
)
def test_an_operator_that_onnx_lacks_is_named_with_its_module(way, target, is_flat, tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), Bessel()), torch.randn(2, 4)
    if is_flat:
        model = graphpeft.trace(model, (x,))
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, target_modules=[target]))
    match = r"ONNX has no operator for \S*bessel_j0, which 1 \(Bessel\) calls\. .*format='pt2'"
    refused(model, (x,), tmp_path / "m.onnx", match, format="onnx", adapters=way)


def test_an_operator_of_the_model_itself_that_onnx_lacks_is_named_with_it(tmp_path):
    match = r"bessel_j0, which the model \(Bessel\) calls"
    refused(Bessel(), (torch.randn(2, 4),), tmp_path / "m.onnx", match, format="onnx")


def test_an_operator_that_pytorch_fails_to_translate_is_named_with_the_failure(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        error = torch.onnx.errors.OnnxExporterError(
            "While executing call_function[target=torch.ops.aten.linear.default]"
        )
        raise error from ValueError("Cannot view a tensor")

    monkeypatch.setattr(torch.onnx, "export", fails)
    match = r"^PyTorch can't translate aten\.linear\.default to ONNX as 0 \(Linear\) calls it: ValueError: Cannot view"
    refused(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),), tmp_path / "m.onnx", match, format="onnx")


class Squeezing(nn.Module):
    """Takes a dimension off if its size is 1, which ONNX does without asking."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).squeeze(1)


def test_a_graph_that_onnxruntime_cant_load_is_the_bases_too(tmp_path):
    model: Any = graphpeft.get_peft_model(Squeezing(), graphpeft.LoraConfig(r=2, target_modules=["linear"]))
    match = (
        r"onnxruntime can't load .* from m\.onnx failed.*Squeeze.*torch\.onnx has translated .*format='pt2'.*\. "
        "The base without its adapters can't be exported so either, for the same reason$"
    )
    refused(model, (torch.randn(2, 3, 4),), tmp_path / "m.onnx", match, format="onnx", adapters="inputs", dynamic=False)


class DecidesByValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else y * 2


@pytest.mark.parametrize(("format", "way"), [("pt2", "merged"), ("onnx", "inputs")])
def test_a_refusal_names_the_line_and_says_if_the_base_is_refused_too(format, way, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), DecidesByValues())
    match = (
        r"data-dependent.*, at `return y if y\.sum\(\) > 0 else y \* 2` of 1 \(DecidesByValues\)\. .*torch\.where, .*"
        "The base without its adapters can't be exported so either, for the same reason$"
    )
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, target_modules=["0", "1.linear"]))
    refused(model, (torch.randn(3, 4),), tmp_path / f"m{SUFFIXES[format]}", match, format=format, adapters=way)


def test_a_change_that_cant_be_merged_says_why_and_what_to_do(tmp_path):
    model = graphpeft.get_peft_model(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), graphpeft.LoraConfig(r=2, target_modules=["0"])
    )
    match = r"can't be merged: its features are in 2 groups.*adapters='baked'"
    refused(model, (torch.randn(2, 4, 8, 8),), tmp_path / "m.pt2", match)


def test_what_a_program_cant_return_is_named(tmp_path):
    example = {"input_ids": LLAMA.tensor()}
    refused(LLAMA.adapted(), example, tmp_path / "m.pt2", r"DynamicCache.*use_cache=False")


def test_weights_apart_are_a_folder(tmp_path):
    refused(
        BERT.adapted(),
        BERT.example(),
        tmp_path / "m.safetensors",
        "let the path be a folder",
        format="safetensors",
        adapters="inputs",
    )


# nothing half-written


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such path")
def test_a_path_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file is no folder")
    refused(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "file" / "m.pt2", "can't be written: Not a dir")


def test_folders_on_the_way_are_made_with_the_file_and_not_without(tmp_path):
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    with pytest.raises(ExportError):
        graphpeft.export(HAND_WRITTEN.base(), example, tmp_path / "a" / "b" / "m.pt2", adapters="baked")
    assert list(tmp_path.iterdir()) == []
    graphpeft.export(model, example, tmp_path / "a" / "b" / "m.pt2")
    assert (tmp_path / "a" / "b" / "m.pt2").exists()


def full_disk(at: str):
    """Returns an ``os.replace`` for which there is no space when a new file of this name is put into place."""
    replace = os.replace

    def replace_or_fail(source, target):
        if "new" in source.parts and target.name == at and "new" not in target.parts:
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target)

    return replace_or_fail


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_there_keeps_what_isnt_the_exports(fails, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    (folder / "adapters").mkdir(parents=True)
    for name in ("notes.txt", "adapters/notes.txt", "model.safetensors"):
        (folder / name).write_text(name)
    if fails:
        monkeypatch.setattr(os, "replace", full_disk(at="adapter_model.safetensors"))
        refused(
            HAND_WRITTEN.adapted(),
            HAND_WRITTEN.example(),
            folder,
            "No space left on device",
            format="safetensors",
            adapters="inputs",
        )
        assert {path.name for path in folder.iterdir()} == {"notes.txt", "adapters", "model.safetensors"}
    else:
        graphpeft.export(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), folder, "safetensors", "inputs")
        assert (folder / "model.safetensors").read_bytes() != b"model.safetensors"
        assert (folder / "adapters" / "second" / "adapter_model.safetensors").exists()
    for name in ("notes.txt", "adapters/notes.txt"):
        assert (folder / name).read_text() == name


def test_the_folder_itself_can_be_the_place(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path / "weights")
    report = graphpeft.export(HAND_WRITTEN.base(), HAND_WRITTEN.example(), ".", "safetensors")
    assert report.path == tmp_path / "weights"
    assert list(tmp_path.rglob("*.*")) == [tmp_path / "weights" / "model.safetensors"]


def test_a_folder_doesnt_make_way_for_a_file_nor_a_file_for_a_folder(tmp_path):
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    (tmp_path / "m.pt2").mkdir()
    (tmp_path / "m.pt2" / "notes.txt").write_text("mine")
    (tmp_path / "m").write_text("mine")
    refused(model, example, tmp_path / "m.pt2", "is a folder, and format='pt2' would write a file there")
    refused(model, example, tmp_path / "m", "is a file, and .* a folder there", format="state_dict")
    # nor where the file of an adapter is to go
    (tmp_path / "other.second.safetensors").mkdir()
    refused(model, example, tmp_path / "other.pt2", "Is a directory", adapters="inputs", check=False)


class Wrong(Pt2):
    """Computes something else than the model."""

    def __init__(self, change):
        self.change = change

    def runner(self, export, path):
        run = super().runner(export, path)
        return lambda case, example: self.change(run(case, example))


def test_a_file_that_differs_isnt_left_unless_told_so(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pt2", Wrong(lambda found: found + 1e-2))
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    path = tmp_path / "m.pt2"
    path.write_text("what was there")
    match = r"differs by \S+ from the model for .*, where 1e-04 is allowed; check=False"
    refused(model, example, path, match)
    assert path.read_text() == "what was there"
    report = graphpeft.export(model, example, path, check=False)
    assert report.checked == ()
    assert "not checked" in str(report)
    assert torch.export.load(path) is not None


class WrongWithAdapters(Pt2):
    """Computes something else than the model where adapters are inputs."""

    def runner(self, export, path):
        run = super().runner(export, path)
        return lambda case, example: run(case, example) + bool(case.name)


def test_a_difference_that_adapters_alone_bring_says_nothing_of_the_base(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pt2", WrongWithAdapters())
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    refused(model, example, tmp_path / "m.pt2", "differs by .* all the same$", adapters="inputs")


def test_a_difference_that_the_base_has_too_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pt2", Wrong(lambda found: found + 1e-2))
    match = (
        r"differs by .*\. The base without its adapters can't be exported so either, (for the same|since .* differs by)"
    )
    refused(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "m.pt2", match, adapters="baked")


class Hashing(nn.Module):
    """Projects by random numbers of a seed of its own, as an attention that hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        torch.manual_seed(3)
        y = nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return self.drop(self.linear(y)) @ torch.randn(4, 4)


def test_random_numbers_are_the_reason_for_a_difference(tmp_path):
    config = graphpeft.LoraConfig(r=2, target_modules=["1.linear"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4), Hashing()), config)
    match = (
        r"differs by .* allowed, since it draws random numbers by aten\.randn\.default in 1, which can't be compared"
    )
    refused(model, (torch.randn(3, 4),), tmp_path / "m.pt2", match)


class Results(nn.Module):
    """Returns results of all kinds."""

    def forward(self, x):
        complex_, indices = torch.complex(x, x), torch.arange(50_000, device=x.device)
        return {"complex": complex_, "indices": indices, "mask": x.log(), "number": 3, "rows": x.shape[0]}


@pytest.mark.every
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("complex", lambda complex_: complex_.real + 1.5j * complex_.imag, "differs by"),
        ("indices", lambda indices: indices + 1, "differs by 1 "),
        ("mask", lambda mask: mask.abs(), "differs by inf"),
        ("number", lambda number: number + 1, r"returns \[4, 3\] .* the model \[3, 3\]"),
        ("mask", lambda mask: mask[None], "returns tensors of the shapes"),
    ],
    ids=["imaginary parts", "an index", "the sign of infinity", "a number", "a shape"],
)
def test_results_of_all_kinds_are_compared(name, change, match, tmp_path, monkeypatch):
    x = torch.zeros(3, 4) + torch.tensor([0.0, 1.0, 2.0, 3.0])
    graphpeft.export(Results(), (x,), tmp_path / "m.pt2")
    monkeypatch.setitem(FORMATS, "pt2", Wrong(lambda found: {**found, name: change(found[name])}))
    refused(Results(), (x,), tmp_path / "m.pt2", match)


def test_what_onnx_cant_return_is_named(tmp_path):
    match = r"returns what is no tensor: \['number'\], \['rows'\]\. .*format='pt2'"
    refused(Results(), (torch.randn(3, 4),), tmp_path / "m.onnx", match, format="onnx")


def test_a_file_that_cant_be_loaded_isnt_left(tmp_path):
    class Texts(nn.Module):
        def forward(self, x):
            return x, "text"

    refused(Texts(), (torch.randn(3, 4),), tmp_path / "m.pt2", "can't be loaded: .*tensors and plain numbers alone")


def test_what_fails_while_it_is_written_is_named_with_the_format(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full_disk)
    match = "can't be written with format='pt2': OSError: .*No space left"
    refused(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "m.pt2", match)


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    class Interrupted(Pt2):
        def write(self, export, staged, about):
            super().write(export, staged, about)
            raise KeyboardInterrupt("by hand")

    monkeypatch.setitem(FORMATS, "pt2", Interrupted())
    (tmp_path / "m.pt2").write_text("what was there")
    refused(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "m.pt2", "by hand", KeyboardInterrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_an_error_of_a_runtime_may_say_nothing(tmp_path, monkeypatch):
    def fail(_):
        raise AssertionError

    monkeypatch.setitem(FORMATS, "pt2", Wrong(fail))
    refused(
        HAND_WRITTEN.base(), HAND_WRITTEN.example(), tmp_path / "m.pt2", r"itself can: AssertionError\. Give example"
    )


def test_what_fails_to_be_put_into_place_is_taken_back(tmp_path, monkeypatch):
    model, example = HAND_WRITTEN.adapted(), HAND_WRITTEN.example()
    graphpeft.export(model, example, tmp_path / "m.pt2", adapters="inputs", check=False)
    monkeypatch.setattr(os, "replace", full_disk(at="m.second.safetensors"))
    refused(model, example, tmp_path / "m.pt2", "No space left on device", adapters="inputs", check=False)


def test_a_library_that_isnt_there_is_named_with_the_extra(tmp_path, monkeypatch):
    importing = builtins.__import__
    monkeypatch.setattr("importlib.import_module", lambda name: importing("nothing_of_this_name"))
    refused(
        HAND_WRITTEN.adapted(),
        HAND_WRITTEN.example(),
        tmp_path / "m.onnx",
        r"pip install graphpeft\[export\]",
        format="onnx",
    )


def test_a_compiler_that_isnt_there_is_what_a_package_lacks(tmp_path):
    # not by monkeypatch, which would take the setting away in the end
    config: Any = importlib.import_module("torch._inductor.config")
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        refused(
            HAND_WRITTEN.adapted(),
            HAND_WRITTEN.example(),
            tmp_path / "m.pt2",
            r"AOTInductor can't compile.*C\+\+ compiler",
            format="aoti",
        )
