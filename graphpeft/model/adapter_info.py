"""The methods of an adapted model that tell of its adapters and parameters, and change nothing."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn

from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters
from graphpeft.adapters.tensors import count_of_numbers
from graphpeft.graph.holders import Holder, all_parameters, has_tensor, tensor_at
from graphpeft.graph.hosts.sharding import is_asked_by
from graphpeft.graph.traced_model import stands_for
from graphpeft.model.peft_functions import PLACE, ConfigsForPeft
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.report import Report
from graphpeft.wording import number_of


class AdapterInfo(nn.Module):
    """The part of `PeftModel` that tells of the adapters and counts parameters."""

    # Transformers asks for it: gradient checkpointing of a frozen model needs inputs that require grad
    _hf_peft_config_loaded = True

    _peft_adapters: Adapters

    @property
    def peft_config(self) -> Configs:
        """The config of each adapter, by the adapter's name, in the order in which they were added."""
        if is_asked_by(PLACE):
            return cast("Configs", ConfigsForPeft(self._peft_adapters))
        return Configs(self._peft_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters; while adapters are disabled, these don't act."""
        return list(self._peft_adapters.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the list of names if several or none are: what `set_adapter` takes."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def _first_active(self) -> str:
        if not self.active_adapters:
            raise AdaptError(f"no adapter is active; name one of {sorted(self.peft_config)}, or call set_adapter first")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter.

        Raises:
            AdaptError: If no adapter is active.
        """
        return self.peft_config[self._first_active]

    @property
    def peft_type(self) -> Any:
        """The method of the first active adapter: one of `PeftType`, or the name of a method of one's own.

        Raises:
            AdaptError: If no adapter is active.
        """
        return self.active_peft_config.peft_type

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts: one is active, and adapters aren't disabled."""
        return bool(self._peft_adapters.active) and not self._peft_adapters.are_off

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype that the model says it has, as Transformers' models do; None if it doesn't say."""
        return getattr(self, "dtype", None)

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that `merge_adapter` has added to the weights."""
        return list(self._peft_adapters.merged)

    def get_base_model(self) -> Any:
        """Returns the model itself, since an adapted model is the base model with adapters.

        Returns:
            This model.
        """
        return self

    def _repr_html_(self) -> str:
        return modules_html(self, type(self).__name__)

    def adapter_report(self, adapter_name: str | None = None) -> Report:
        """Returns what an adapter adapted.

        Args:
            adapter_name: The adapter; the first active one if None.

        Returns:
            The adapter's sites, operations and parameters, as a table that prints.

        Raises:
            AdaptError: If the model has no adapter of this name, or none is active.
        """
        return known_adapter(self, self._first_active if adapter_name is None else adapter_name).report

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts the model's parameters, in numbers (not tensors).

        Of weights that bitsandbytes has packed into 4 bits, the numbers count that they stand for, as in PEFT. A tensor
        in place of a weight, such as PiSSA's residual, doesn't count.

        Returns:
            How many are trainable, and how many there are, those of adapters among them.
        """
        modules = modules_of(self)
        uncounted = {
            id(tensor_at(modules[path], name))
            for adapter_name, adapter in self._peft_adapters.by_name.items()
            for path, name in adapter.replacing_names(adapter_name)
            if path in modules and has_tensor(modules[path], name)
        }
        parameters = [parameter for parameter in self.parameters() if id(parameter) not in uncounted]
        trainable = sum(count_of_numbers(parameter) for parameter in parameters if parameter.requires_grad)
        return trainable, sum(count_of_numbers(parameter) for parameter in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints the counts of `get_nb_trainable_parameters`, and the share of the first in per cent, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201


def modules_html(model: nn.Module, title: str) -> str:
    """Returns the modules of a model as HTML, open where adapters are."""
    return f'<div style="font-family: monospace; line-height: 1.5">{_tree(model, title)}</div>'


def _tree(module: nn.Module, name: str) -> str:
    adapters = {name: child for name, child in module.named_children() if isinstance(child, Holder)}
    inside = {name: child for name, child in module.named_children() if name not in adapters}
    numbers = sum(parameter.numel() for part in module.modules() for _, parameter in _own(part))
    line = f"<b>{html.escape(name)}</b> {html.escape(stands_for(module).__name__)} · {number_of(numbers, 'parameter')}"
    told = "".join(f"<div>↳ {html.escape(f'{name}: {holder!r}')}</div>" for name, holder in adapters.items())
    if not inside and not told:
        return f"<div>{line}</div>"
    is_open = " open" if any(isinstance(part, Holder) for part in module.modules()) else ""
    parts = "".join(_tree(child, name) for name, child in inside.items())
    content = f'<div style="margin-left: 1.5em">{told}{parts}</div>'
    return f"<details{is_open}><summary>{line}</summary>{content}</details>"


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [] if isinstance(module, Holder) else list(all_parameters(module))


class Configs(Mapping[str, PeftConfig]):
    """The configs of a model's adapters by name, in the order in which these were added.

    It shows adapters that come and go. Options can be set on a config; adapters are added by `add_adapter`.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> PeftConfig:
        return self._adapters.by_name[name].config

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters.by_name)

    def __len__(self) -> int:
        return len(self._adapters.by_name)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __setitem__(self, name: str, config: Any) -> NoReturn:
        raise TypeError(
            f"a config in peft_config is of an adapter with tensors: model.add_adapter({name!r}, config) adds one, and "
            f"single options are set as in model.peft_config[{name!r}].inference_mode = True"
        )

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"a config goes with its adapter: call model.delete_adapter({name!r})")

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Raises TypeError, as adding a config does; PEFT's own functions update the configs of what they adapt."""
        raise TypeError(
            "the model is adapted by graphpeft, and a config in peft_config is of an adapter with tensors: for another "
            "adapter, call graphpeft.get_peft_model(model, config, name) or model.add_adapter(name, config), and not "
            "PEFT's get_peft_model; or take the adapters off first with unload() or merge_and_unload()"
        )

    def pop(self, name: str, *_: Any) -> NoReturn:
        """Raises TypeError, as deleting a config does."""
        self.__delitem__(name)
