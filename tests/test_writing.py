"""What is saved takes the place of what was there whole, whenever the writer is killed and whoever reads meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from writers import Writers, adapted, base, found_in, writers

import graphpeft
from graphpeft import AdaptError, CheckpointError, ExportError, LoraConfig, PeftConfig, PeftModel, hotswap_adapter
from graphpeft.files import atomic_files
from graphpeft.stacks import peft_files
from graphpeft.testing import laws

needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs os.fork")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def process() -> Iterator[Writers]:
    with writers() as found:
        yield found


def in_sight(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# kills


def kill(process: Writers, folder: Path, times: int) -> Counter[str]:
    """Kills writers at random times, and returns what was there afterwards, how often."""
    when = random.Random(0)
    found: Counter[str] = Counter()
    for _ in range(times):
        writer = process.start(folder, "a", "b", "c")
        time.sleep(when.uniform(0, 0.15))
        process.kill(writer)
        found[found_in(folder)] += 1
        assert in_sight(folder) == {CONFIG, WEIGHTS, "README.md"}
    return found


@needs_fork
def test_a_killed_writer_leaves_an_adapter_whole(process: Writers, tmp_path: Path) -> None:
    assert sum(kill(process, tmp_path, 20).values()) == 20


@pytest.mark.long
@needs_fork
def test_of_300_killed_writers_each_leaves_an_adapter_whole(process: Writers, tmp_path: Path) -> None:
    found = kill(process, tmp_path, 300)
    assert set(found) == {"a", "b", "c"}


@pytest.mark.every
@needs_fork
@pytest.mark.parametrize(("move", "left"), [(1, "b"), (2, "a"), (3, "a")])
def test_a_writer_that_is_killed_between_two_files_leaves_the_new_adapter(
    process: Writers, move: int, left: str, tmp_path: Path
) -> None:
    process.wait(process.start(tmp_path, f"cut:{move}", "a", "b"))
    if move == 2:
        alpha = json.loads((tmp_path / CONFIG).read_text())["lora_alpha"]
        values = {float(tensor.unique()) for tensor in load_file(tmp_path / WEIGHTS).values()}
        assert (alpha, values) == (30, {1.0})  # the one file of b and the other one of a
    assert found_in(tmp_path) == left
    adapted("c").save_pretrained(tmp_path)
    assert found_in(tmp_path) == "c"


# readers and writers at one time


def read(folder: Path, times: int) -> Counter[str]:
    return Counter(found_in(folder) for _ in range(times))


@needs_fork
@pytest.mark.parametrize("times", [100, pytest.param(6600, marks=pytest.mark.long)])
def test_a_reader_beside_a_writer_finds_adapters_whole(process: Writers, times: int, tmp_path: Path) -> None:
    writer = process.start(tmp_path, "a", "b", "c")
    found = read(tmp_path, times)
    process.kill(writer)
    assert len(found) > 1


@needs_fork
@pytest.mark.parametrize("times", [50, pytest.param(2000, marks=pytest.mark.long)])
def test_two_writers_leave_the_adapter_of_one(process: Writers, times: int, tmp_path: Path) -> None:
    both = [process.start(tmp_path, "a", "b"), process.start(tmp_path, "c")]
    found = read(tmp_path, times)
    for writer in both:
        process.kill(writer)
    assert found.keys() > {"c"}
    assert found_in(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def read_twice() -> str:
        first = path.read_text()
        if first == "old":
            (tmp_path / "other").write_text("new")
            os.replace(tmp_path / "other", path)
        second = path.read_text()
        assert first == second
        return first

    assert atomic_files.read_together([path], read_twice) == "new"
    with pytest.raises(ZeroDivisionError):
        atomic_files.read_together([path], lambda: 1 // 0)


def test_an_adapter_that_is_saved_again_whenever_its_config_was_read_is_found_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = adapted("a"), adapted("b")
    a.save_pretrained(tmp_path)
    saves = itertools.chain([b, a] * 10)
    read_safetensors = peft_files.read_safetensors

    def save_and_read(path: str) -> Any:
        for model in itertools.islice(saves, 1):
            model.save_pretrained(tmp_path)
        return read_safetensors(path)

    monkeypatch.setattr(peft_files, "read_safetensors", save_and_read)
    assert found_in(tmp_path) == "a"


def test_files_that_are_replaced_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("a")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(atomic_files, "_READS", 3)
    read_safetensors = peft_files.read_safetensors

    def save_and_read(path: str) -> Any:
        model.save_pretrained(tmp_path)
        return read_safetensors(path)

    monkeypatch.setattr(peft_files, "read_safetensors", save_and_read)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.* can't be read: replaced again and again"):
        peft_files.read(tmp_path)


# errors


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("move", [1, 2])
def test_an_error_between_two_files_leaves_what_was_there(
    error: BaseException, move: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted("a").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, moves = os.replace, 0

    def replace_or_fail(source: Any, target: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == move:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(type(error)):
        adapted("b").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_of_several_adapters_none_is_written_if_one_cant_be(tmp_path: Path) -> None:
    model = adapted("a")
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    lacking = {name: tensor for name, tensor in model.state_dict().items() if "other" not in name}
    with pytest.raises(CheckpointError, match="the state_dict lacks"):
        model.save_pretrained(tmp_path / "new", state_dict=lacking)
    assert list(tmp_path.iterdir()) == []


def test_of_several_adapters_all_stay_if_one_cant_be_replaced(tmp_path: Path) -> None:
    model = adapted("a")
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    (tmp_path / "other" / WEIGHTS).unlink()
    (tmp_path / "other" / WEIGHTS).mkdir()
    model = adapted("b")
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    with pytest.raises(IsADirectoryError):
        model.save_pretrained(tmp_path)
    assert found_in(tmp_path) == "a"


# links, and what writers leave behind


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    adapted("a").save_pretrained(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(elsewhere / name)
    adapted("b").save_pretrained(folder)
    assert found_in(folder) == "b"
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_what_dead_writers_left_is_ignored_and_taken_away_after_a_day(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    left = [tmp_path / ".graphpeft-aaaaaaaa", tmp_path / ".graphpeft-bbbbbbbb"]
    for folder in left:
        adapted("b").save_pretrained(folder / "new")
    os.utime(left[0], (0, time.time() - 25 * 60 * 60))
    assert found_in(tmp_path) == "a"
    adapted("c").save_pretrained(tmp_path)
    assert found_in(tmp_path) == "c"
    assert [folder.exists() for folder in left] == [False, True]


@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "pickle"])
def test_a_config_that_a_dead_writer_has_left_is_found_until_another_one_takes_its_place(
    is_safe: bool, tmp_path: Path
) -> None:
    weights = WEIGHTS if is_safe else "adapter_model.bin"
    adapted("a").save_pretrained(tmp_path, safe_serialization=is_safe)
    left = tmp_path / ".graphpeft-aaaaaaaa"
    adapted("b").save_pretrained(left / "new", safe_serialization=is_safe)
    (left / "new" / weights).replace(tmp_path / weights)
    (left / "begun").touch()
    os.utime(left, (0, time.time() - 25 * 60 * 60))
    adapted("b").create_or_update_model_card(tmp_path)
    assert found_in(tmp_path) == "b"
    adapted("c").save_pretrained(tmp_path, safe_serialization=is_safe)
    assert found_in(tmp_path) == "c"
    assert not left.exists()


def test_what_a_dead_writer_has_left_beside_an_outer_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model" / "adapters" / "mine"
    adapted("a").save_pretrained(folder)
    staged = tmp_path / ".graphpeft-aaaaaaaa" / "new" / "model" / "adapters" / "mine"
    adapted("b").save_pretrained(staged)
    (staged / WEIGHTS).replace(folder / WEIGHTS)
    assert found_in(folder) == "b"


# a config and tensors that don't belong together


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"0": 9}}, {"init_lora_weights": "pissa"}]
)
def test_an_edited_config_is_refused_unless_it_is_given(values: dict[str, Any], tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    edit(tmp_path, **values)
    model = base()
    before = laws.snapshot(model)
    with pytest.raises(CheckpointError, match=r"were saved with another adapter_config\.json"):
        PeftModel.from_pretrained(model, tmp_path)
    laws.require_unchanged(model, before, "loading")
    with pytest.raises(CheckpointError, match=r"were saved with another adapter_config\.json"):
        hotswap_adapter(adapted("b"), tmp_path, "default")
    with pytest.raises((CheckpointError, AdaptError)):
        adapted("a").load_adapter(tmp_path, "default")
    loaded: Any = PeftModel.from_pretrained(model, tmp_path, config=PeftConfig.from_pretrained(tmp_path))
    name, value = next(iter(values.items()))
    assert getattr(loaded.peft_config["default"], name) == value


def test_a_config_that_is_given_becomes_the_adapters_own_and_no_second_ones(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    given = PeftConfig.from_pretrained(tmp_path)
    first = PeftModel.from_pretrained(base(), tmp_path, config=given)
    second = PeftModel.from_pretrained(base(), tmp_path, config=given, is_trainable=True)
    assert first.peft_config["default"] is given
    assert second.peft_config["default"] is not given
    assert (given.inference_mode, second.peft_config["default"].inference_mode) == (True, False)
    third = PeftModel.from_pretrained(base(), tmp_path, config=second.peft_config["default"])
    assert third.peft_config["default"] is not second.peft_config["default"]


def test_a_config_that_is_given_stays_as_it_was_if_its_adapter_can_not_be_loaded(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    given = PeftConfig.from_pretrained(tmp_path)
    before = dict(vars(given))
    with pytest.raises(AdaptError, match="nothing in Identity matches"):
        PeftModel.from_pretrained(nn.Identity(), tmp_path, config=given)
    assert vars(given) == before


def test_tensors_of_another_config_are_not_given_to_an_adapter_of_the_model(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path / "a")
    adapted("b").save_pretrained(tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).replace(tmp_path / "a" / WEIGHTS)
    model = adapted("a")
    before = laws.snapshot(model)
    for load in (model.load_adapter, lambda *args: PeftModel.from_pretrained(model, *args)):
        with pytest.raises(CheckpointError, match=r"were saved with another adapter_config\.json"):
            load(tmp_path / "a", "default")
    laws.require_unchanged(model, before, "loading")


def test_what_says_nothing_of_the_tensors_may_be_edited(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    edit(tmp_path, base_model_name_or_path="mine", inference_mode=False, task_type="CAUSAL_LM", revision="main")
    edit(tmp_path, lora_dropout=0.5, auto_mapping=None, peft_version="0.1")
    assert found_in(tmp_path) == "a"


def test_files_of_peft_may_be_edited_as_ever(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(str(tmp_path))
    edit(tmp_path, lora_alpha=7)
    loaded: Any = PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.peft_config["default"].lora_alpha == 7


def test_peft_writes_our_config_again_and_it_still_belongs_to_the_tensors(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"0": 3}, "alpha_pattern": {"0": 7}}
    config = LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["2"], exclude_modules=["2"], **patterns)
    laws.perturbed(graphpeft.get_peft_model(base(), config)).save_pretrained(tmp_path)
    peft.PeftConfig.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))
    assert peft_files.read(tmp_path)


def test_tensors_have_pytorchs_format_and_the_digest_of_their_config(tmp_path: Path) -> None:
    adapted("a").save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "graphpeft_config": PeftConfig.from_pretrained(tmp_path).digest()}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert found_in(tmp_path) == "a"


# exports


def test_a_graph_and_its_data_are_of_one_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    x = torch.ones(2, 16)

    def other(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 16)).eval()

    target = tmp_path / "m.onnx"
    graphpeft.export(other(1), (x,), target, "onnx")
    (data,) = tmp_path.glob("*.data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "other.data").write_text("mine")
    replace = os.replace

    def replace_or_fail(source: Any, place: Any) -> None:
        if place == target and "new" in Path(source).parts:
            raise OSError(28, "No space left on device", str(place))
        replace(source, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_or_fail)
        with pytest.raises(ExportError, match="No space left"):
            graphpeft.export(other(2), (x,), target, "onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before | {"other.data": b"mine"}
    report = graphpeft.export(other(2), (x,), target, "onnx")
    assert in_sight(tmp_path) == {"other.data", *(path.name for path in report.files)}
    assert not data.exists()
    onnxruntime = pytest.importorskip("onnxruntime")
    (found,) = onnxruntime.InferenceSession(str(target)).run(None, {"input": x.numpy()})
    laws.require_close(torch.from_numpy(found), laws.run(other(2), (x,)), 1e-5, "the export")


def test_an_export_is_never_away_while_another_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.pt2"
    graphpeft.export(adapted("a"), (torch.ones(2, 6),), target, check=False)
    replace = os.replace

    def replace_and_look(source: Any, place: Any) -> None:
        assert target.exists()
        replace(source, place)
        assert target.exists()

    monkeypatch.setattr(os, "replace", replace_and_look)
    graphpeft.export(adapted("b"), (torch.ones(2, 6),), target, check=False)


def test_files_of_a_trainer_are_replaced_with_the_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    for name in ("a", "b"):
        adapted(name).save_pretrained(folder)
        assert (folder / "model.safetensors").read_bytes() == (folder / WEIGHTS).read_bytes()
    assert found_in(folder) == "b"


def lora_of_a_product(value: float) -> Any:
    """A model with LoHa whose change is one number."""
    config = graphpeft.LoHaConfig(r=1, target_modules=["0"], init_weights=False)
    model = graphpeft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return model


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_what_is_converted_takes_the_place_of_what_was_there_whole_or_not_at_all(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted("b").save_pretrained(tmp_path)
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == file and "new" in Path(source).parts:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        graphpeft.save_as_lora(tmp_path, lora_of_a_product(1.0), rank=1)
    monkeypatch.undo()
    assert found_in(tmp_path) == "b"
    graphpeft.save_as_lora(tmp_path, lora_of_a_product(1.0), rank=1)
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert opened.metadata()[peft_files.DIGEST] == PeftConfig.from_pretrained(tmp_path).digest()


def test_a_writer_waits_until_another_has_moved_all_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted("c").save_pretrained(tmp_path)
    first, second = adapted("a"), adapted("b")
    replace, between, go_on = os.replace, threading.Event(), threading.Event()

    def replace_and_pause(source: Any, target: Any) -> None:
        replace(source, target)
        if threading.current_thread().name == "first" and not between.is_set():
            between.set()
            assert go_on.wait(30)

    monkeypatch.setattr(os, "replace", replace_and_pause)
    writers = [
        threading.Thread(target=model.save_pretrained, args=(tmp_path,), name=name)
        for name, model in (("first", first), ("second", second))
    ]
    writers[0].start()
    assert between.wait(30)
    writers[1].start()
    writers[1].join(1)
    assert writers[1].is_alive()
    go_on.set()
    for writer in writers:
        writer.join(30)
    assert found_in(tmp_path) == "b"
