"""A call that changes a model and fails, wherever and with whatever, leaves it as it was, or has done its work."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from interrupting import exchanged_in_pytorch, failing_at_line, failing_at_operation, lines_of, state_of
from models import llama_config
from torch import nn

import graphpeft

# models


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
            if "lora" in name or "rows" in name or "prompt" in name or name.rpartition("_")[2] in ("one", "two"):
                parameter += torch.randn(parameter.shape, generator=generator) / 5
    return model


def several() -> Any:
    """Returns the model with four adapters, of which two act."""
    torch.manual_seed(3)
    model = graphpeft.get_peft_model(layers(), copy.deepcopy(ONE), "one")
    for name, config in (("two", TWO), ("dora", DORA), ("rows", ROWS)):
        model.add_adapter(name, copy.deepcopy(config))
    model.set_adapter(["one", "dora"])
    return filled(model)


def merged() -> Any:
    """Returns it with one of the two merged beside the other."""
    model = several()
    model.set_adapter(["one", "two"])
    model.merge_adapter(["one"])
    return model


def with_rows() -> Any:
    """Returns it with rows of a tied table."""
    model = several()
    model.set_adapter(["rows"])
    return model


def llama() -> nn.Module:
    """Returns a language model."""
    torch.manual_seed(4)
    return transformers.LlamaForCausalLM(llama_config()).eval()


def prompted() -> Any:
    """Returns a language model with a prompt and LoRA, both active."""
    config = graphpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = graphpeft.get_peft_model(llama(), config, "prompt")
    model.add_adapter("lora", graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    model.set_adapter(["prompt", "lora"])
    return filled(model)


REPLICATING = graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])


def replicated() -> Any:
    """Returns a language model that runs a layer twice."""
    return filled(graphpeft.get_peft_model(llama(), copy.deepcopy(REPLICATING)))


def eva() -> Any:
    """Returns a model whose adapter isn't measured yet."""
    config = graphpeft.LoraConfig(r=1, lora_alpha=3, target_modules=["up", "down"], init_lora_weights="eva")
    return graphpeft.get_peft_model(layers(), config)


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
    """

    name: str
    build: Callable[[], Any]
    change: Callable[[Any], Any]
    repeats: bool = True

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


CALLS = (
    Call("adapt", layers, add(TWO), False),
    Call("adapt for evaluation", trained, lambda model: graphpeft.PeftModel.from_pretrained(model, folder("other")), False),
    Call("adapt with rows", layers, add(ROWS), False),
    Call("adapt with a part of the weight", merged, add(PISSA), False),
    Call("adapt once more", several, add(TWO), False),
    Call("add", several, lambda model: model.add_adapter("new", copy.deepcopy(DORA)), False),
    Call("load", several, lambda model: model.load_adapter(folder("other"), "new"), False),
    Call("combine", several, weighted, False),
    Call("choose", several, lambda model: model.set_adapter(["two", "one"])),
    Call("choose rows", merged, lambda model: model.set_adapter("rows", inference_mode=True)),
    Call("delete", several, lambda model: model.delete_adapter("one"), False),
    Call("delete the active one", with_rows, lambda model: model.delete_adapter("rows"), False),
    Call("disable", merged, lambda model: model.disable_adapters()),
    Call("disable for a while", several, within),
    Call("merge", several, lambda model: model.merge_adapter()),
    Call("merge more", merged, lambda model: model.merge_adapter()),
    Call("merge rows", with_rows, lambda model: model.merge_adapter()),
    Call("unmerge", merged, lambda model: model.unmerge_adapter()),
    Call("merge for good", several, lambda model: model.merge_and_unload(), False),
    Call("merge rows for good", with_rows, lambda model: model.merge_and_unload(), False),
    Call("merge the merged for good", merged, lambda model: model.merge_and_unload(), False),
    Call("unload", merged, lambda model: model.unload(), False),
    Call("optimize", several, graphpeft.optimize),
    Call("swap", several, lambda model: graphpeft.hotswap_adapter(model, folder("same"), "one")),
    Call("swap for another", several, lambda model: graphpeft.hotswap_adapter(model, folder("other"), "one")),
    Call("overwrite", several, state_dict, False),
    Call("measure", eva, measure),
    Call("mix", several, lambda model: model(torch.zeros(2, 3, dtype=torch.int64), adapter_names=["one", "dora"])),
    Call("trace", layers, lambda model: graphpeft.trace(model) and None),
    Call("explain", layers, lambda model: graphpeft.explain(model, TWO) and None),
    Call("explain a replication", llama, lambda model: graphpeft.explain(model, REPLICATING) and None),
    Call("adapt with a prompt", llama, lambda model: graphpeft.PeftModel.from_pretrained(model, folder("prompt"), "new"), False),
    Call("choose without a prompt", prompted, lambda model: model.set_adapter("lora")),
    Call("delete a prompt", prompted, lambda model: model.delete_adapter("prompt"), False),
    Call("replicate", llama, add(REPLICATING), False),
    Call("unload a replication", replicated, lambda model: model.unload(), False),
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
    model = call.build()
    before = state_of(model, *call.inputs(model))
    lines = lines_of(functools.partial(run, call, model))
    return before, state_of(model, *call.inputs(model)), lines


def differing(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns in what two states differ."""
    return [name for name in state if state[name] != other[name]]


def assert_whole(call: Call, context: Callable[[], Any], error: type[BaseException]) -> None:
    """A call that fails in a context leaves the old state or the new one, and works if it is made again."""
    before, after, _ = expected(call)
    model = call.build()
    patched = exchanged_in_pytorch()
    fails = False
    try:
        with context():
            run(call, model)
    except error:
        fails = True
    except Exception as raised:  # what failed may be told as the reason why something can't be adapted
        assert "planted" in str(raised), raised
        fails = True
    assert differing(exchanged_in_pytorch(), patched) == []
    torch.set_grad_enabled(True)
    found = state_of(model, *call.inputs(model))
    is_old, is_new = differing(found, before), differing(found, after)
    assert not is_new or (fails and not is_old), f"neither the old state, by {is_old}, nor the new one, by {is_new}"
    if is_new or call.repeats:
        run(call, model)
        left = differing(state_of(model, *call.inputs(model)), after)
        assert not left, f"made again, the call leaves other {left}"


def assert_whole_at_line(call: Call, number: int, error: type[BaseException]) -> None:
    """See `assert_whole`."""
    line = expected(call)[2][number - 1]
    try:
        assert_whole(call, lambda: failing_at_line(number, error("planted")), error)
    except AssertionError as failure:
        raise AssertionError(f"{call.name}, {error.__name__} at {line[0]}:{line[1]} (line {number}): {failure}") from failure


ERRORS = (KeyboardInterrupt, MemoryError)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_that_is_interrupted_at_any_line_has_done_all_or_nothing(call: Call) -> None:
    chance = random.Random(call.name)
    for error in ERRORS:
        assert_whole_at_line(call, chance.randint(1, len(expected(call)[2])), error)
