"""The methods for adapters that the models of Diffusers have, on the adapters of this library.

Diffusers' own go through a model for the layers of PEFT. In a model of this library they would find none and do
nothing, without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from graphpeft.adapters import scales
from graphpeft.adapters.plan import AdaptError
from graphpeft.files.atomic_files import Staging
from graphpeft.model.merging_methods import MergingMethods
from graphpeft.model.state_dicts import get_peft_model_state_dict
from graphpeft.model.switching_methods import SwitchingMethods
from graphpeft.transaction import transaction
from graphpeft.wording import number_of


class DiffusersMethods(SwitchingMethods, MergingMethods):
    """The part of `PeftModel` that a model of Diffusers has in addition; pipelines call these methods.

    In a call, ``scale`` in `cross_attention_kwargs`, `joint_attention_kwargs` or `attention_kwargs` multiplies the
    scales of all adapters, as in Diffusers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, with the scales of adapters multiplied as a keyword argument of Diffusers says.

        Args:
            *args: Positional arguments of the model's forward.
            **kwargs: Keyword arguments of the model's forward, and those of a call of an adapted model.

        Returns:
            The result of the model's forward.

        Raises:
            AdaptError: If there is a scale in the call, and an adapter is merged or none has a scale.
        """
        given = (kwargs.get(name) or {} for name in _KEYWORDS)
        found = [each["scale"] for each in given if each.get("scale", 1.0) != 1.0]
        with scales.scaled(self, found[0]) if found else contextlib.nullcontext():
            return super().__call__(*args, **kwargs)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Makes exactly these adapters active, with their changes multiplied by weights until they are set again.

        Args:
            adapter_names: The name of one adapter, or a list of names.
            weights: A number for all of them, or a list with a number for each; None, here or in the list, is 1. In
                place of a number may be what Diffusers takes for blocks, as ``{"down": 0.9, "up": {"block_0": 0.5}}``.

        Raises:
            ValueError: If there is another number of weights than of names, or a weight is none; the model is
                unchanged.
            AdaptError: If the model has no adapter of a name, or an adapter is merged; the model is unchanged.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(given) != len(names):
            raise ValueError(
                f"{number_of(len(names), 'adapter')} and {number_of(len(given), 'weight')} were given; "
                "pass a weight for each"
            )
        functions = map(_weight_at, _expanded(self, [1.0 if weight is None else weight for weight in given]))
        with transaction(self):
            scales.set_weights(self, dict(zip(names, functions, strict=True)))
            self.set_adapter(names)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters with their tensors, as `delete_adapter` does; all of them or none.

        Args:
            adapter_names: The name of one adapter, or a list of names.

        Raises:
            AdaptError: If the model has no adapter of a name, or one is merged; the model is unchanged then.
        """
        with transaction(self):
            for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
                self.delete_adapter(name)

    def enable_lora(self) -> None:
        """Lets the active adapters act again, as `enable_adapters` does."""
        self.enable_adapters()

    def disable_lora(self) -> None:
        """Disables all adapters, as `disable_adapters` does."""
        self.disable_adapters()

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Adds adapters to the weights, as `merge_adapter` does, with their scales multiplied.

        Args:
            lora_scale: The factor.
            safe_fusing: Whether to refuse changes with infinities or NaNs.
            adapter_names: The adapters to merge; the active ones if None.

        Raises:
            AdaptError: If `merge_adapter` refuses it, or there is a factor and an adapter is merged already; nothing is
                merged then.
        """
        with scales.scaled(self, lora_scale) if lora_scale != 1.0 else contextlib.nullcontext():
            self.merge_adapter(adapter_names, safe_merge=safe_fusing)

    def unfuse_lora(self) -> None:
        """Takes all merged adapters out of the weights, as `unmerge_adapter` does."""
        self.unmerge_adapter()

    def unload_lora(self) -> None:
        """Takes all adapters off, as `unload` does."""
        self.unload()

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Writes an adapter as the one file that Diffusers' `load_lora_adapter` reads into a model.

        Args:
            save_directory: The folder, which is made if it doesn't exist.
            adapter_name: The adapter.
            upcast_before_saving: Whether the file's tensors are in single precision; the model's stay as they are.
            safe_serialization: True; no pickle is written.
            weight_name: The file's name, ``pytorch_lora_weights.safetensors`` if None.

        Raises:
            AdaptError: If the model has no adapter of this name; nothing is written.
            ValueError: If `safe_serialization` is False; nothing is written.
            OSError: If the file can't be written; one that was there is unchanged then.
        """
        if not safe_serialization:
            raise ValueError("no pickle is written here; leave out safe_serialization=False")
        values = get_peft_model_state_dict(self, adapter_name=adapter_name)
        dtype = torch.float32 if upcast_before_saving else None
        tensors = {
            name.removeprefix("base_model.model."): value.detach()
            .to("cpu", dtype)
            .clone(memory_format=torch.contiguous_format)
            for name, value in values.items()
        }
        config = json.dumps(self.peft_config[adapter_name].to_dict(), indent=2, sort_keys=True)
        with Staging(Path(save_directory)) as staging:
            staged = staging.folder / (weight_name or "pytorch_lora_weights.safetensors")
            save_file(tensors, staged, {"format": "pt", "lora_adapter_metadata": config})
            staging.put()

    def load_lora_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Is refused, since Diffusers would let PEFT adapt the model a second time.

        Raises:
            AdaptError: Always; the model is unchanged.
        """
        raise AdaptError(
            "load_lora_adapter lets PEFT wrap layers, and this model has adapters of graphpeft already: load the file "
            "into the model before it is adapted, or save the adapter by save_pretrained and load it by "
            "model.load_adapter(folder, name)"
        )


_KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def is_of_diffusers(model: Any) -> bool:
    """Returns whether a model has Diffusers' methods for adapters."""
    return any(cls.__module__ == "diffusers.loaders.peft" for cls in type(model).__mro__)


def _expanded(model: Any, weights: list[Any]) -> list[Any]:
    """Returns weights with those of blocks by the paths of these, as Diffusers expands them for a model."""
    of_models = sys.modules["diffusers.loaders.peft"]._SET_ADAPTER_SCALE_FN_MAPPING
    return of_models[type(model).__name__](model, weights)


def _weight_at(given: Any) -> Callable[[str], float]:
    """Returns a function of a module's path, from a number or from numbers by what stands in paths."""
    by_part = given if isinstance(given, dict) else {"": given}
    for number in by_part.values():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{number!r} is no weight of an adapter; pass a number")

    def at(path: str) -> float:
        names = path.split(".")
        # the other layers of a block have the weight of the attention with their number
        parts = [part for part in by_part if part in path]
        parts += [f"{names[0]}.{names[1]}.attentions.{names[3]}"] if len(names) > 3 else []
        return next((by_part[part] for part in parts if part in by_part), 1.0)

    return at
