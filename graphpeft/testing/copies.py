"""The law of copies: however an adapted model is copied, the copy is adapted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.config import PeftConfig
from graphpeft.testing.blame import Build, blames_a_site
from graphpeft.testing.comparing import require_equal
from graphpeft.testing.runs import accepted, perturbed, run_each
from graphpeft.testing.snapshots import require_restored


@blames_a_site
def assert_copies_stay_adapted(
    build: Build, config: PeftConfig, inputs: ExampleInputs, others: Sequence[ExampleInputs] = ()
) -> None:
    """Law 8: `deepcopy`, pickles, `torch.save`, state dicts and `.to()` keep an adapted model adapted.

    Ways of copying that fail for the model without adapters are left out.

    Args:
        build: Builds the model.
        config: The adapter's config.
        inputs: Inputs of the model.
        others: Other inputs; those that a guard refuses are left out.

    Raises:
        LawError: If a copy's outputs differ, or it can't be unloaded.
    """

    def adapt() -> Any:
        return get_peft_model(build().eval(), config, example_inputs=inputs)

    adapted = perturbed(adapt())
    every = accepted(inputs, others, adapted)
    expected, left_out = run_each(adapted, every), ways_left_out(build)
    for name, copied in _WAYS.items():
        if name not in left_out:
            again = copied(adapted, adapt)
            require_equal(run_each(again, every), expected, f"a copy by {name} differs")
            require_restored(again.unload(), build().eval())


def ways_left_out(build: Build) -> dict[str, str]:
    """Returns the ways of copying that fail for the model without adapters, each with the error.

    >>> ways_left_out(lambda: torch.nn.Linear(2, 2))
    {}
    """
    left_out: dict[str, str] = {}
    for name, copied in _WAYS.items():
        try:
            copied(build(), build)
        except Exception as error:  # each class has errors of its own
            left_out[name] = f"{type(error).__name__}: {error}"
    return left_out


def _by_pickle(model: Any, _: Callable[[], Any]) -> Any:
    return pickle.loads(pickle.dumps(model))


def _by_save(model: Any, _: Callable[[], Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _by_state_dict(model: Any, build: Callable[[], Any]) -> Any:
    other = build()
    other.load_state_dict(model.state_dict())
    return other


def _by_deepcopy(model: Any, _: Callable[[], Any]) -> Any:
    return copy.deepcopy(model)


def _to_and_back(model: Any, _: Callable[[], Any]) -> Any:
    """Converts a copy to double precision and back; tensors in half precision, via single precision."""
    copied = copy.deepcopy(model)
    tensors = [*copied.named_parameters(), *copied.named_buffers()]
    dtypes = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}
    copied.double()
    if torch.float64 not in dtypes.values():
        copied.float()
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if tensor.dtype != dtypes.get(name, tensor.dtype):
            tensor.data = tensor.data.to(dtypes[name])
    return copied


_WAYS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "deepcopy": _by_deepcopy,
    "pickle": _by_pickle,
    "torch.save": _by_save,
    ".to() and back": _to_and_back,
    "state_dict": _by_state_dict,
}
"""Functions that copy a model; they get a function that builds an equal one with other values, too."""
