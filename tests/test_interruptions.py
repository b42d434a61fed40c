"""A call that changes a model and fails, wherever and with whatever, leaves it as it was, or has done its work."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from interrupting import FailingAtOperation, exchanged_in_pytorch, failing_at_line, lines_of, state_of
from models import llama_config
from torch import nn

import graphpeft
from graphpeft import dry_runs
from graphpeft.transaction import delete_item, remember, set_item, transaction, undone_by

# models


def copied(build: Callable[[], Any]) -> Callable[[], Any]:
    """Lets a function build a model once, and copy it from then on."""
    built = functools.cache(build)
    return lambda: copy.deepcopy(built())


def layers() -> nn.Module:
    """Returns a model whose classes nobody has seen yet, so that its graphs are recorded anew."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 10)
            self.w = nn.Parameter(torch.randn(10, 10) / 3)
            self.down = nn.Linear(10, 6)
            self.scale = 0.5

        def forward(self, x: Any) -> Any:
            h = F.relu(self.up(x))
            h = F.linear(h, self.w) * self.scale if self.training else F.linear(h, self.w)
            return x + self.down(h)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.blocks = nn.Sequential(Block(), Block())
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Any) -> Any:
            return self.head(self.norm(self.blocks(self.embed(ids))))

    torch.manual_seed(1)
    return Model().eval()


def trained() -> nn.Module:
    """Returns it in training mode."""
    return layers().train()


ONE = graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"], bias="lora_only")
TWO = graphpeft.LoraConfig(
    r=4, lora_alpha=2, target_modules=["up", "down"], target_parameters=["w"], modules_to_save=["norm"]
)
DORA = graphpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["down"], use_dora=True)
ROWS = graphpeft.LoraConfig(r=2, lora_alpha=4, target_modules=["up"], trainable_token_indices={"embed": [1, 3]})
PISSA = graphpeft.LoraConfig(r=2, lora_alpha=4, target_modules=["down"], init_lora_weights="pissa")


def filled(model: Any, seed: int = 2) -> Any:
    """Gives the tensors of adapters values that tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of_adapter = any(word in name for word in ("lora", "trainable_tokens", "prompt"))
            if of_adapter or {"one", "two"} & {*name.split(".")}:
                parameter += torch.randn(parameter.shape, generator=generator) / 5
    return model


@copied
def several() -> Any:
    """Returns the model with four adapters, of which two act."""
    torch.manual_seed(3)
    model = graphpeft.get_peft_model(layers(), copy.deepcopy(ONE), "one")
    for name, config in (("two", TWO), ("dora", DORA), ("rows", ROWS)):
        model.add_adapter(name, copy.deepcopy(config))
    model.set_adapter(["one", "dora"])
    return filled(model)


@copied
def merged() -> Any:
    """Returns it with one of the two merged beside the other."""
    model = several()
    model.set_adapter(["one", "two"])
    model.merge_adapter(["one"])
    return model


@copied
def with_rows() -> Any:
    """Returns it with rows of a tied table."""
    model = several()
    model.set_adapter(["rows"])
    return model


def llama() -> nn.Module:
    """Returns a language model."""
    torch.manual_seed(4)
    return transformers.LlamaForCausalLM(llama_config()).eval()


@copied
def prompted() -> Any:
    """Returns a language model with a prompt and LoRA, both active."""
    config = graphpeft.PromptTuningConfig(task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = graphpeft.get_peft_model(llama(), config, "prompt")
    model.add_adapter("lora", graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    model.set_adapter(["prompt", "lora"])
    return filled(model)


REPLICATING = graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])


@copied
def replicated() -> Any:
    """Returns a language model that runs a layer twice."""
    return filled(graphpeft.get_peft_model(llama(), copy.deepcopy(REPLICATING)))


def eva() -> Any:
    """Returns a model whose adapter isn't measured yet."""
    config = graphpeft.LoraConfig(r=1, lora_alpha=3, target_modules=["up", "down"], init_lora_weights="eva")
    return graphpeft.get_peft_model(layers(), config)


@copied
def eva_among_others() -> Any:
    """Returns it in training, with another adapter behind it, and with a layer that is fully trained beside it."""
    own = {"modules_to_save": ["norm"], "init_lora_weights": "eva"}
    config = graphpeft.LoraConfig(r=1, lora_alpha=3, target_modules=["up", "down"], **own)
    model = graphpeft.get_peft_model(trained(), config)
    model.add_adapter("two", copy.deepcopy(TWO))
    return filled(model)


@functools.cache
def folder(which: str) -> str:
    """Returns a folder with a saved adapter, kept until the end."""
    made = tempfile.mkdtemp(prefix="graphpeft-interrupted-")
    config = {"same": ONE, "other": TWO, "prompt": None}[which]
    if config is None:
        model = prompted()
        model.save_pretrained(made, selected_adapters=["prompt"])
        return f"{made}/prompt"
    torch.manual_seed(5)
    filled(graphpeft.get_peft_model(layers(), copy.deepcopy(config)), 6).save_pretrained(made)
    return made


# calls


class Call(NamedTuple):
    """A call that changes a model.

    Attributes:
        name: What it does.
        build: Makes the model.
        change: Makes the call.
        repeats: Whether the call can be made again after it has done its work.
        writes: Whether it writes into tensors that are there.
    """

    name: str
    build: Callable[[], Any]
    change: Callable[[Any], Any]
    repeats: bool = True
    writes: bool = False

    def inputs(self, model: Any) -> tuple[Any, ...]:
        """Returns what the model is called with to tell what it computes."""
        return (torch.tensor([[1, 4, 3, 7], [2, 1, 8, 0]]),)


def add(config: Any) -> Callable[[Any], Any]:
    """Returns a call that adapts a model."""
    return lambda model: graphpeft.get_peft_model(model, copy.deepcopy(config), "new")


def weighted(model: Any) -> None:
    """Combines adapters."""
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", "cat")


def state_dict(model: Any) -> None:
    """Overwrites an adapter."""
    values = {key: value + 1 for key, value in graphpeft.get_peft_model_state_dict(model, adapter_name="two").items()}
    graphpeft.set_peft_model_state_dict(model, values, "two")


def within(model: Any) -> None:
    """Runs the base model for a while."""
    with model.disable_adapter():
        pass


def measure(model: Any) -> None:
    """Gives an adapter its ranks."""
    data = [{"ids": torch.arange(8).view(2, 4) + shift} for shift in (0, 1)]
    graphpeft.initialize_lora_eva_weights(
        model, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )


def load(which: str) -> Callable[[Any], Any]:
    """Returns a call that loads a saved adapter."""
    return lambda model: graphpeft.PeftModel.from_pretrained(model, folder(which), "new")


def swap(which: str) -> Callable[[Any], Any]:
    """Returns a call that swaps an adapter for a saved one."""
    return lambda model: graphpeft.hotswap_adapter(model, folder(which), "one")


def prepare(model: Any) -> None:
    """Gives adapters room for others."""
    graphpeft.prepare_model_for_compiled_hotswap(model, target_rank=6)


@copied
def prepared() -> Any:
    """Returns the model with adapters that have room for others."""
    model = several()
    prepare(model)
    return model


ONCE = {"repeats": False}
WRITES = {"writes": True}

CALLS = (
    Call("adapt", layers, add(TWO), **ONCE),
    Call("adapt for evaluation", trained, load("other"), **ONCE),
    Call("adapt with rows", layers, add(ROWS), **ONCE),
    Call("adapt with a part of the weight", merged, add(PISSA), **ONCE, **WRITES),
    Call("adapt once more", several, add(TWO), **ONCE),
    Call("add", several, lambda model: model.add_adapter("new", copy.deepcopy(DORA)), **ONCE),
    Call("load", several, lambda model: model.load_adapter(folder("other"), "new"), **ONCE),
    Call("combine", several, weighted, **ONCE),
    Call("choose", several, lambda model: model.set_adapter(["two", "one"])),
    Call("choose rows", merged, lambda model: model.set_adapter("rows", inference_mode=True), **WRITES),
    Call("delete", several, lambda model: model.delete_adapter("one"), **ONCE),
    Call("delete the active one", with_rows, lambda model: model.delete_adapter("rows"), **ONCE),
    Call("disable", merged, lambda model: model.disable_adapters(), **WRITES),
    Call("disable for a while", several, within),
    Call("merge", several, lambda model: model.merge_adapter(), **WRITES),
    Call("merge more", merged, lambda model: model.merge_adapter(), **WRITES),
    Call("merge rows", with_rows, lambda model: model.merge_adapter(), **WRITES),
    Call("unmerge", merged, lambda model: model.unmerge_adapter(), **WRITES),
    Call("merge for good", several, lambda model: model.merge_and_unload(), **ONCE, **WRITES),
    Call("merge rows for good", with_rows, lambda model: model.merge_and_unload(), **ONCE, **WRITES),
    Call("merge the merged for good", merged, lambda model: model.merge_and_unload(), **ONCE, **WRITES),
    Call("unload", merged, lambda model: model.unload(), **ONCE, **WRITES),
    Call("optimize", several, graphpeft.optimize),
    Call("swap", several, swap("same"), **WRITES),
    Call("swap for another", several, swap("other")),
    Call("prepare for swaps", several, prepare),
    Call("swap in a prepared model", prepared, swap("same"), **WRITES),
    Call("swap for another in a prepared model", prepared, swap("other")),
    Call("overwrite", several, state_dict, **WRITES),
    Call("measure", eva, measure),
    Call("measure among others", eva_among_others, measure),
    Call("mix", several, lambda model: model(torch.zeros(2, 3, dtype=torch.int64), adapter_names=["one", "dora"])),
    Call("trace", layers, lambda model: graphpeft.trace(model) and None),
    Call("explain", layers, lambda model: graphpeft.explain(model, TWO) and None),
    Call("explain a replication", llama, lambda model: graphpeft.explain(model, REPLICATING) and None),
    Call("adapt with a prompt", llama, load("prompt"), **ONCE),
    Call("choose without a prompt", prompted, lambda model: model.set_adapter("lora")),
    Call("delete a prompt", prompted, lambda model: model.delete_adapter("prompt"), **ONCE),
    Call("replicate", llama, add(REPLICATING), **ONCE),
    Call("unload a replication", replicated, lambda model: model.unload(), **ONCE),
)


def run(call: Call, model: Any) -> None:
    """Makes a call, whose first values are those of every run."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call.change(model)


@functools.cache
def expected(call: Call) -> tuple[Any, Any, list[Any]]:
    """Returns the state of the model before and after a call, and the lines that the call runs."""
    run(call, call.build())  # what it derives for copies of one model is there from then on
    model = call.build()
    before = state_of(model, *call.inputs(model))
    lines = lines_of(functools.partial(run, call, model))
    return before, state_of(model, *call.inputs(model)), lines


def differing(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns in what two states differ."""
    return [name for name in state if state[name] != other[name]]


def assert_whole(call: Call, context: contextlib.AbstractContextManager[Any]) -> BaseException | None:
    """A call that fails in a context leaves the old state or the new one, and works if it is made again.

    Returns:
        What it fails with.
    """
    before, after, _ = expected(call)
    model = call.build()
    patched = exchanged_in_pytorch()
    failure, lines = None, None
    try:
        with context as lines:
            run(call, model)
    except BaseException as raised:
        failure = raised
    left = differing(exchanged_in_pytorch(), patched)
    assert not left, f"PyTorch is left with other {left}, by an error at {lines}"
    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(_may_run_alone).result(), f"other threads wait for ever, by an error at {lines}"
    found = state_of(model, *call.inputs(model))
    is_old, is_new = differing(found, before), differing(found, after)
    assert not is_new or (failure and not is_old), (
        f"an error at {lines} leaves neither the old state, by {is_old}, nor the new one, by {is_new}"
    )
    if is_new or call.repeats:
        run(call, model)
        left = differing(state_of(model, *call.inputs(model)), after)
        assert not left, f"made again after an error at {lines}, the call leaves other {left}"
    return failure


def _may_run_alone() -> bool:
    lock = dry_runs._ONE_AT_A_TIME
    return lock.acquire(blocking=False) and not lock.release()


def assert_whole_at_line(call: Call, number: int, error: type[BaseException]) -> None:
    """See `assert_whole`."""
    failure = assert_whole(call, failing_at_line(number, error))
    assert failure is None or "planted" in str(failure), failure


def operations_of(call: Call) -> int:
    """Returns how many operations of PyTorch a call runs."""
    model = call.build()
    with FailingAtOperation(0) as counting:
        run(call, model)
    return counting.count


ERRORS = (KeyboardInterrupt, MemoryError)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_that_is_interrupted_at_any_line_has_done_all_or_nothing(call: Call) -> None:
    chance = random.Random(call.name)
    for error in ERRORS:
        assert_whole_at_line(call, chance.randint(1, len(expected(call)[2])), error)


@pytest.mark.every
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_is_undone_as_a_whole_if_what_it_is_a_part_of_fails(call: Call) -> None:
    before, _, _ = expected(call)
    model = call.build()
    with contextlib.suppress(ValueError), transaction(model):
        run(call, model)
        raise ValueError
    left = differing(state_of(model, *call.inputs(model)), before)
    assert not left, f"of what the call has changed, these are left: {left}"


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_that_is_interrupted_at_many_lines_has_done_all_or_nothing_each_time(call: Call) -> None:
    chance = random.Random(f"{call.name}, many times")
    # one occurrence of a line is as good as another, and most lines that run are those of a few loops
    numbers = {line: number for number, line in enumerate(expected(call)[2], 1)}
    for number in chance.sample(list(numbers.values()), 20):
        assert_whole_at_line(call, number, chance.choice(ERRORS))


@pytest.mark.parametrize("file", ["graph/call_values.py", "graph/recomputing.py"])
def test_no_call_has_the_rows_of_one_that_was_interrupted(file: str) -> None:
    call = next(call for call in CALLS if call.name == "mix")
    numbers = {line: number for number, line in enumerate(expected(call)[2], 1) if line[0] == file}
    assert numbers
    for number in numbers.values():
        assert_whole_at_line(call, number, KeyboardInterrupt)


def test_no_thread_waits_for_a_dry_run_that_was_interrupted() -> None:
    call = next(call for call in CALLS if any(file == "dry_runs.py" for file, _ in expected(call)[2]))
    numbers = {line: number for number, line in enumerate(expected(call)[2], 1) if line[0] == "dry_runs.py"}
    for number in numbers.values():
        assert_whole_at_line(call, number, KeyboardInterrupt)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("file", ["adapters/hotswap.py", "methods/lora/init/calibration.py"])
def test_an_adapter_that_is_adapted_anew_is_the_old_one_or_the_new_one(file: str, error: type[BaseException]) -> None:
    call = next(call for call in CALLS if call.name == "measure among others")
    numbers = {line: number for number, line in enumerate(expected(call)[2], 1) if line[0] == file}
    assert numbers
    for number in numbers.values():
        assert_whole_at_line(call, number, error)


@pytest.mark.parametrize("call", [call for call in CALLS if call.writes], ids=lambda call: call.name)
def test_a_call_that_runs_out_of_memory_at_any_operation_has_done_all_or_nothing(call: Call) -> None:
    number = random.Random(call.name).randint(1, operations_of(call))
    assert_whole(call, FailingAtOperation(number, torch.OutOfMemoryError("planted")))


@pytest.mark.long
@pytest.mark.parametrize("call", [call for call in CALLS if call.writes], ids=lambda call: call.name)
def test_a_call_that_runs_out_of_memory_has_done_all_or_nothing_at_each_operation(call: Call) -> None:
    for number in range(1, operations_of(call) + 1):
        assert_whole(call, FailingAtOperation(number, torch.OutOfMemoryError("planted")))


@pytest.mark.quick("transaction")
def test_running_out_of_memory_at_the_third_layer_merges_none() -> None:
    model = graphpeft.get_peft_model(stack(), graphpeft.LoraConfig(r=2, lora_alpha=5, target_modules=r"\d"))
    model = filled(model)
    x = torch.randn(3, 6)
    adapted, weights = model(x), [layer.weight.clone() for layer in model]

    with pytest.raises(torch.OutOfMemoryError), FailingAtOperation(3, torch.OutOfMemoryError("planted"), "aten::add_"):
        model.merge_and_unload()

    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
    assert torch.equal(model(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def stack() -> nn.Module:
    """Returns four layers."""
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))


@pytest.mark.quick("transaction")
def test_a_second_interruption_does_not_stop_what_the_first_one_takes_back() -> None:
    [call] = [call for call in CALLS if call.name == "merge"]
    number = len(expected(call)[2]) - 20  # when all has changed
    for then in range(1, 60, 4):
        assert_whole(call, failing_at_line(number, KeyboardInterrupt, then))


@pytest.mark.quick("transaction")
def test_what_runs_out_of_memory_while_it_is_taken_back_is_tried_once_more() -> None:
    held, errors = {"before": 0}, [MemoryError()]

    def restore() -> None:
        if errors:
            raise errors.pop()
        del held["first"]

    with contextlib.suppress(ValueError), transaction(nn.Identity()):
        undone_by(restore)
        held["first"] = 1
        set_item(held, "second", 1)
        raise ValueError
    assert held == {"before": 0}


@pytest.mark.quick("transaction")
def test_a_suspended_change_that_is_collected_takes_nothing_of_another_one_back() -> None:
    held = {"before": 0}
    suspended: Any = transaction(nn.Identity())
    suspended.__enter__()
    set_item(held, "suspended", 1)
    with contextlib.suppress(ValueError), transaction(nn.Identity()):
        set_item(held, "first", 1)
        del suspended  # as the traceback of an interruption, whose frame held it
        assert held == {"before": 0, "suspended": 1, "first": 1}
        raise ValueError
    assert held == {"before": 0, "suspended": 1}
    with contextlib.suppress(GeneratorExit), transaction(nn.Identity()):
        set_item(held, "second", 1)
        raise GeneratorExit
    assert held == {"before": 0, "suspended": 1}


@pytest.mark.quick("transaction")
def test_a_suspended_change_whose_function_has_ended_is_taken_back_before_the_next_one() -> None:
    held = {"before": 0}

    def interrupted() -> None:
        suspended: Any = transaction(nn.Identity())
        suspended.__enter__()
        with transaction(nn.Identity()):
            set_item(held, "suspended", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    with transaction(nn.Identity()):
        assert held == {"before": 0}
        set_item(held, "later", 1)
    del caught  # as the traceback that a notebook keeps
    gc.collect()
    assert held == {"before": 0, "later": 1}


@pytest.mark.quick("transaction")
def test_a_change_inside_a_change_that_fails_is_taken_back_alone() -> None:
    model, tensor, held = nn.Identity(), torch.zeros(2), {"first": 1, "second": 2}
    with transaction(model):
        remember(tensor)
        tensor += 1
        delete_item(held, "first")
        with contextlib.suppress(ValueError), transaction(model):
            remember(tensor)
            tensor += 1
            delete_item(held, "second")
            raise ValueError
        assert tensor.tolist() == [1, 1]
        assert held == {"second": 2}
