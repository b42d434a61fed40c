"""`PeftModel`: the methods that an adapted model has beside its own.

The model's class gains them, and everything else is as it was: names, hooks, methods, and ``isinstance``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import IncompatibleKeys
from graphpeft.adapters import combining, mixing, training
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.adapting import Where, add_new, carry_out, modules_of, plan_for, refuse
from graphpeft.adapters.dispatching import OPTIONS, dispatch_again
from graphpeft.adapters.exchanged import refuse_lost
from graphpeft.adapters.given_inputs import given_in_call
from graphpeft.adapters.loading import has_adapter, load, load_again, load_over
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import adapters_of
from graphpeft.adapters.trainable import set_trainable_now
from graphpeft.graph import call_inputs, in_place
from graphpeft.graph.hosts.sharding import is_asked_by
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapted_class import layers_with, offered_names
from graphpeft.model.diffusers_methods import DiffusersMethods, is_of_diffusers
from graphpeft.model.earlier_optimizers import watch
from graphpeft.model.generating_methods import GeneratingMethods
from graphpeft.model.given_model import check_model
from graphpeft.model.merging_methods import MergingMethods
from graphpeft.model.other_names import OtherNames, free_names
from graphpeft.model.patched_forwards import with_patched_forward
from graphpeft.model.saving_methods import SavingMethods
from graphpeft.model.status import StatusMethods
from graphpeft.model.switching_methods import SwitchingMethods
from graphpeft.model.trainers import copy_left_out
from graphpeft.model.training_methods import TrainingMethods
from graphpeft.model.vocabulary_methods import VocabularyMethods
from graphpeft.rules.combination import Combination
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.rules.peft_names import TaskType
from graphpeft.transaction import transaction, undone_by


class PeftModel(SwitchingMethods, MergingMethods, SavingMethods, StatusMethods, TrainingMethods):
    """The methods that an adapted model has beside its own, with PEFT's names and meanings.

    An adapted model is an instance of its own class and of this one. Called as PEFT's class is, this one adapts a model
    in place, as `get_peft_model` does, and returns it.

    A method that changes the model does all of it or nothing: if it fails or is interrupted, the model is unchanged.
    Such calls wait for each other. A forward doesn't wait: while a change runs in another thread, some layers are as
    before it, others as after it, and one may be in the midst of it; so use a lock of your own around both. The
    argument `adapter_names` of a call chooses adapters without a change.

    Args:
        model: Any PyTorch module.
        peft_config: A config of this library or of PEFT; its class is the method.
        adapter_name: The adapter's name.
        autocast_adapter_dtype: Whether an adapter of a float16 or bfloat16 weight has tensors in float32.
        low_cpu_mem_usage: Whether the new tensors have no values, as in `get_peft_model`.

    Raises:
        AdaptError: If the model can't be adapted, as in `get_peft_model`.
        TypeError: If `model` is no module, or `peft_config` no config.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "first")
        >>> isinstance(model, PeftModel), isinstance(model, nn.Sequential)
        (True, True)
        >>> model.add_adapter("second", LoraConfig(target_modules=["0"]))
        >>> model.active_adapters, list(model.peft_config)
        (['first'], ['first', 'second'])
    """

    def __new__(
        cls,
        model: nn.Module,
        peft_config: ConfigLike,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> Any:
        """Adapts the model in place, and returns it."""
        check_model(model)
        add_new(
            model,
            as_config(peft_config),
            adapter_name,
            None,
            autocast_adapter_dtype,
            None,
            activates=True,
            is_empty=low_cpu_mem_usage,
            methods=give_methods,
        )
        watch(model)
        return model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # of the model that __new__ has returned, which is built already
        pass

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: ConfigLike | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,  # noqa: ARG003
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: str | torch.device | None = None,  # noqa: ARG003
        ignore_mismatched_sizes: bool = False,
        example_inputs: ExampleInputs | None = None,
        use_safetensors: bool | None = None,
        **hub_options: Any,
    ) -> Any:
        """Adapts a model in place with a saved adapter, from files of PEFT or of this library.

        Args:
            model: The base model, or one that has adapters already.
            model_id: A folder, or a repository on the Hub.
            adapter_name: The adapter's name in the model; one of this name and the same options gets the saved values.
            is_trainable: Whether the adapter is trained further; if False, the model is set to evaluation mode.
            config: A config that replaces the file's. As in PEFT, it becomes the adapter's own, filled in for the
                model, unless it is another adapter's already.
            autocast_adapter_dtype: Whether an adapter of a float16 or bfloat16 weight has tensors in float32.
            ephemeral_gpu_offload: Must be False.
            low_cpu_mem_usage: Accepted for compatibility with PEFT; no tensor is made twice here.
            key_mapping: Regular expressions with replacements for the names of the file's tensors, without the prefix
                ``base_model.model.``; the first that matches a name is applied. None takes those that a Transformers
                model has for its own checkpoints.
            torch_device: Accepted for compatibility with PEFT; each tensor goes to the device of the adapted weight.
            ignore_mismatched_sizes: Whether tensors of other shapes are left out, with a warning that names them; they
                have their first values.
            example_inputs: A tuple of positional or a dict of keyword arguments with which the whole model can be
                called. It is needed where the forward of a module that uses a weight functionally branches on its
                inputs.
            use_safetensors: True reads `adapter_model.safetensors`, False `adapter_model.bin`, a pickle, with
                ``weights_only=True``; None the first if it is there, else the second.
            **hub_options: Options of ``huggingface_hub.hf_hub_download``, such as `revision`. `device_map`,
                `max_memory`, `offload_folder` and `offload_index` spread a model anew that accelerate has spread over
                main memory or disk; other options of loading a base model, such as `torch_dtype`, are accepted for
                compatibility.

        Returns:
            `model` itself.

        Raises:
            FileNotFoundError: If a file is missing.
            CheckpointError: If a file doesn't fit the model, or is damaged; the model is unchanged then.
            AdaptError: If a target can't be adapted, the adapter can't have this name, or the model has adapters of the
                PEFT library; the model is unchanged then.
            TypeError: If `model` is no module, `model_id` no path, or `config` no config.
            ValueError: If an option is True that must be False.
        """
        check_model(model)
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        options = {
            "ephemeral_gpu_offload": ephemeral_gpu_offload,
            "key_mapping": key_mapping,
            "ignore_mismatched_sizes": ignore_mismatched_sizes,
            "example_inputs": example_inputs,
            "use_safetensors": use_safetensors,
        }
        with transaction(model):
            if has_adapter(model, adapter_name):
                load_over(model, model_id, adapter_name, is_trainable, config, **options, **hub_options)
            else:
                load(
                    model,
                    model_id,
                    adapter_name,
                    is_trainable,
                    config,
                    activates=True,
                    methods=give_methods,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    **options,
                    **hub_options,
                )
            dispatch_again(model, **{name: hub_options[name] for name in OPTIONS if name in hub_options})
            if not is_trainable:
                for module in model.modules():
                    undone_by(setattr, module, "training", module.training)
                model.eval()
        watch(model)
        return model

    # calls

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Calls the model.

        Args:
            *args: Positional arguments of the model's forward.
            adapter_names: The adapter of each row of the batch, active or not: its name, or ``"__base__"`` for the base
                model.
            **kwargs: Keyword arguments of the model's forward, and those that an adapter reads in each call.

        Returns:
            The result of the model's forward.

        Raises:
            AdaptError: If the model has no adapter of a name, the adapters can't be mixed in a batch, or a module that
                an active one adapts was replaced or resized.
            ValueError: If the number of names isn't the number of rows.
        """
        if not isinstance(self, PeftModel):
            # a compiler or a caller has kept this method, and the adapters were taken off since
            names = {} if adapter_names is None else {"adapter_names": adapter_names}
            return self(*args, **kwargs, **names)
        read, call = self._peft_adapters.call_inputs, with_patched_forward(self, super().__call__)
        state = self._peft_adapters
        if not torch.compiler.is_compiling():
            refuse_lost(self, state)
        elif not torch.compiler.is_dynamo_compiling():
            # imported where it is needed, since most programs export nothing
            from graphpeft.graph.hosts.pt2e import with_exported_layers

            call = with_exported_layers(call)
        if adapter_names is not None:
            if getattr(self, "_is_replica", False):
                raise AdaptError("DataParallel's copies of a model can't have adapter_names; call the model itself")
            if {*adapter_names} == {BASE}:
                mixing.refuse_other_rows(adapter_names, (args, kwargs))
            with self.mixed_batch(adapter_names), given_in_call(self, args, kwargs):
                output = call(*args, **call_inputs.left(read, kwargs))
        elif read:
            with given_in_call(self, args, kwargs):
                output = call(*args, **call_inputs.left(read, kwargs))
        else:
            output = call(*args, **kwargs)
        return training.with_penalty(lambda: modules_of(self), state, output) if state.has_penalties else output

    def mixed_batch(self, adapter_names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Gives all calls within a context an adapter for each row, as ``model(…, adapter_names=…)`` does for one.

        Args:
            adapter_names: The adapter of each row of the batch, active or not: its name, or ``"__base__"`` for the base
                model.

        Returns:
            The context.

        Raises:
            AdaptError: If the model has no adapter of a name, or the adapters can't be mixed in a batch.
            ValueError: If `adapter_names` is empty. A call within the context raises it if the number of names isn't
                the number of rows.
            TypeError: If `adapter_names` is one string.
        """
        return mixing.mixed(lambda: modules_of(self), self._peft_adapters, adapter_names)

    # further adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: ConfigLike,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        example_inputs: ExampleInputs | None = None,
        where: Where | None = None,
    ) -> None:
        """Adds a new adapter, which isn't active until `set_adapter` names it.

        Args:
            adapter_name: The new adapter's name.
            peft_config: A config of this library or of PEFT; its class is the method.
            low_cpu_mem_usage: Whether the new tensors have no values, as in `get_peft_model`.
            autocast_adapter_dtype: Whether an adapter of a float16 or bfloat16 weight has tensors in float32.
            example_inputs: A tuple of positional or a dict of keyword arguments with which the whole model can be
                called; needed where `get_peft_model` needs it.
            where: A predicate that narrows down the sites which the config names, as in `get_peft_model`.

        Raises:
            AdaptError: If nothing in the model matches the config, a target can't be adapted, or the adapter can't have
                this name. The model is unchanged then.
            TypeError: If `peft_config` is no config.
        """
        if isinstance(peft_config, str) and not isinstance(adapter_name, str):
            raise TypeError("pass the name first, as in PEFT: model.add_adapter(adapter_name, config)")
        config = as_config(peft_config)
        add_new(
            self,
            config,
            adapter_name,
            example_inputs,
            autocast_adapter_dtype,
            where,
            activates=False,
            is_empty=low_cpu_mem_usage,
            methods=give_methods,
        )
        if is_asked_by("trl"):
            copy_left_out(self, adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Any:
        """Adds a saved adapter, which isn't active until `set_adapter` names it.

        If the model has an adapter of this name with the same options, that gets the saved values, and stays active and
        trained as it is. The modules keep their modes, training or evaluation.

        Args:
            model_id: A folder, or a repository on the Hub.
            adapter_name: The adapter's name in the model.
            is_trainable: Whether the adapter can be trained further. Its tensors require gradients then, as in PEFT, so
                that an optimizer can be made before it is active.
            torch_device: Accepted for compatibility with PEFT; each tensor goes to the device of the adapted weight.
            autocast_adapter_dtype: Whether an adapter of a float16 or bfloat16 weight has tensors in float32.
            ephemeral_gpu_offload: Must be False.
            low_cpu_mem_usage: Accepted for compatibility with PEFT; no tensor is made twice here.
            key_mapping: Regular expressions with replacements for the names of the file's tensors, as in
                `from_pretrained`; None replaces nothing.
            **options: `config`, `example_inputs`, `ignore_mismatched_sizes` and `use_safetensors`, as in
                `from_pretrained`, and options of ``huggingface_hub.hf_hub_download``.

        Returns:
            The result of ``load_state_dict``: empty lists of missing and of unexpected keys.

        Raises:
            FileNotFoundError: If a file is missing.
            CheckpointError: If a file doesn't fit the model, or is damaged; the model is unchanged then.
            AdaptError: If a target can't be adapted, or the adapter can't have this name; the model is unchanged then.
            ValueError: If an option is True that must be False.
        """
        if adapter_name in self._peft_adapters.by_name:
            load_again(
                self,
                model_id,
                adapter_name,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                key_mapping=key_mapping,
                **options,
            )
            return IncompatibleKeys([], [])
        with transaction(self):
            load(
                self,
                model_id,
                adapter_name,
                is_trainable,
                activates=False,
                methods=give_methods,
                autocast_adapter_dtype=autocast_adapter_dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                key_mapping=key_mapping,
                **options,
            )
            # an optimizer may be made before it is activated
            set_trainable_now(modules_of(self), self._peft_adapters, {adapter_name: is_trainable})
        return IncompatibleKeys([], [])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds an adapter that combines others; it isn't active until `set_adapter` names it.

        Args:
            adapters: The names of the adapters to combine.
            weights: One weight for each of them; weights may be negative.
            adapter_name: The new adapter's name.
            combination_type: One of PEFT's kinds. ``"cat"`` is exactly the weighted sum, its rank the sum of the ranks;
                ``"svd"`` is the nearest adapter of rank `svd_rank` to that sum; ``"linear"`` is a rough approximation
                of the same rank. PEFT's documentation describes the others. Rows of `trainable_token_indices` get the
                weighted sum of their changes in all kinds, where PEFT gives them the base's values.
            svd_rank: For kinds with ``svd``: the rank of the new adapter; None takes the highest rank of the others.
            svd_clamp: For kinds with ``svd``: the quantile, in [0, 1], at which the factors are clamped; None doesn't
                clamp.
            svd_full_matrices: For kinds with ``svd``: whether all singular vectors are computed.
            svd_driver: For kinds with ``svd``: the cuSOLVER method, see ``torch.linalg.svd``.
            density: For kinds with ``ties``, ``dare`` and ``magnitude_prune``: the share of elements, in [0, 1], that
                is kept.
            majority_sign_method: For kinds with ``ties``: ``"total"`` or ``"frequency"``.

        Raises:
            AdaptError: If the model has no adapter of a name, the new name is taken, there aren't as many weights as
                adapters, or the adapters can't be combined. The model is unchanged then.
        """
        state, modules = self._peft_adapters, modules_of(self)
        combining.check_names(state, adapters, weights)
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        config = combining.combined_config(state, adapters, how)
        plan = plan_for(self, config, adapter_name, None, autocast_adapter_dtype=True)
        refuse(plan)
        by_name = dict(zip(adapters, weights, strict=True))
        values = combining.combined_values(modules, state, by_name, plan, how)
        with transaction(self):
            carry_out(self, adapter_name, plan, values, activates=False, methods=give_methods)


PeftMixedModel = PeftModel
"""PEFT's name for models with adapters of several methods, which all adapted models can have here."""


def give_methods(model: nn.Module, task: TaskType | None) -> None:
    """Gives a model the methods of an adapted one, inside a transaction; `task` is that of its first adapter."""
    further = {GeneratingMethods: "generate", VocabularyMethods: "resize_token_embeddings"}
    bases = (PeftModel, *(methods for methods, name in further.items() if hasattr(model, name)))
    if is_of_diffusers(model):
        bases = (DiffusersMethods, *bases)
    offered = offered_names(model)
    _refuse_names_of_methods(model, (*bases, OtherNames), offered)
    in_place.exchange(model, layers_with(bases, task, free_names(model), offered))


def _refuse_names_of_methods(model: nn.Module, bases: tuple[type, ...], offered: tuple[str, ...]) -> None:
    """Raises AdaptError if an adapter of the model's own tensors has the name of what every adapted model has."""
    state = adapters_of(model)
    for name in state.by_name if state is not None else ():
        if name in model._modules and (name in offered or any(hasattr(cls, name) for cls in bases)):
            raise AdaptError(f"an adapted model has an attribute {name!r} already; choose another adapter name")
