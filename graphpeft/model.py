"""The API with PEFT's names: adapts a model in place and gives it the methods of `PeftModel`.

`get_peft_model` returns the model it was given. Its class gains `PeftModel`'s methods, the adapted modules get their
forward from a graph, and everything else is as it was: names, hooks, methods, and ``isinstance``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft._torch import IncompatibleKeys
from graphpeft.adapters import checkpoint, combining, lifecycle, merging, mixing, trainer, training
from graphpeft.adapters.adapting import (
    Where,
    add_new,
    carry_out,
    known_adapter,
    modules_of,
    plan_for,
    refuse,
    replicate_layers,
    warn_of_adapted_and_trained_whole,
    warn_of_unmatched,
)
from graphpeft.adapters.loading import load
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import STATE, Adapters
from graphpeft.adapters.tensors import overwrite, refuse_missing, set_trainable, thaw
from graphpeft.files.atomic_files import Staging
from graphpeft.graph import in_place
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.template import names_in_slots
from graphpeft.model_card import model_card
from graphpeft.rules.combination import Combination
from graphpeft.rules.config import ConfigLike, PeftConfig, as_config
from graphpeft.rules.report import Report, listed
from graphpeft.transaction import delete_item, set_attribute, transaction, undone_by


def explain(
    model: nn.Module,
    config: ConfigLike,
    adapter_name: str = "default",
    *,
    example_inputs: ExampleInputs | None = None,
    where: Where | None = None,
) -> Report:
    """Returns what `get_peft_model` would do to `model`, which stays as it is.

    Args:
        model: Any module, or a traced one.
        config: A config of this library or of PEFT.
        adapter_name: The name that the adapter would have.
        example_inputs: As for `get_peft_model`.
        where: As for `get_peft_model`.

    Raises:
        AdaptError: If the config asks for what isn't supported, or the adapter's name can't be used.
    """
    ours = as_config(config)
    with transaction(model):
        replication = replicate_layers(model, ours)
        plan = plan_for(model, ours, adapter_name, example_inputs, autocast_adapter_dtype=True, where=where)
        warn_of_unmatched(ours, plan)
        warn_of_adapted_and_trained_whole(plan)
        if replication is not None:
            replication.undo()
    return plan.report


def get_peft_model(
    model: nn.Module,
    peft_config: ConfigLike,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,  # noqa: ARG001
    *,
    example_inputs: ExampleInputs | None = None,
    where: Where | None = None,
) -> Any:
    """Adapts `model` in place and returns it, with the methods of `PeftModel`.

    A model that is adapted already gets a further adapter, which becomes the active one.

    Args:
        model: Any module, or a traced one.
        peft_config: A config of this library or of PEFT.
        adapter_name: The adapter's name.
        mixed: Accepted for PEFT's sake, and must be False.
        autocast_adapter_dtype: Whether an adapter on half precision weights has single precision.
        revision: The base model's revision on the Hub, which is recorded in the adapter's config.
        low_cpu_mem_usage: Accepted for PEFT's sake; no tensor is made twice here.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model; needed where a module that
            uses a weight functionally decides on its inputs.
        where: Says of each site that the config names whether it is meant, such as
            ``lambda site: site.out_features == 64``. It isn't saved; the saved config names the sites that were.

    Raises:
        AdaptError: If nothing matches, a target can't be adapted, or the name is taken; the model is as it was.
        ValueError: If `mixed` is True.
    """
    if mixed:
        raise ValueError("mixed=True isn't needed: a model takes adapters of any methods here; leave mixed False")
    config = as_config(peft_config)
    if revision is not None:
        config = _with_revision(config, revision)
    add_new(
        model,
        config,
        adapter_name,
        example_inputs,
        autocast_adapter_dtype,
        where,
        activates=True,
        methods=_methods_for(model),
    )
    return model


class PeftModel(nn.Module):
    """The methods that an adapted model has beside its own; they mean what PEFT's of the same names mean.

    Those that change the model do all or nothing: if one fails, or is interrupted, the model is as it was. They wait
    for each other, and a forward doesn't wait for them: in one that runs in another thread meanwhile, some layers are
    as before the change and others as after it. `adapter_names` chooses adapters for one call without a change.
    """

    # Transformers asks for it: gradient checkpointing of a frozen model needs inputs that require grad
    _hf_peft_config_loaded = True

    _peft_adapters: Adapters

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "PeftModel isn't called, since a model keeps its own class here: call get_peft_model(model, config), or "
            "PeftModel.from_pretrained(model, folder) for a saved adapter"
        )

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
        use_safetensors: bool = True,
        **hub_options: Any,
    ) -> Any:
        """Adapts `model` in place with a saved adapter, in the files of PEFT or of this library, and returns it.

        Args:
            model: The base model.
            model_id: A folder, or a repository on the Hub.
            adapter_name: The adapter's name in the model.
            is_trainable: Whether it is to be trained further; otherwise the model goes into evaluation mode.
            config: Used in place of the file's config.
            autocast_adapter_dtype: Whether an adapter on half precision weights has single precision.
            ephemeral_gpu_offload: Accepted for PEFT's sake, and must be False.
            low_cpu_mem_usage: Accepted for PEFT's sake; no tensor is made twice here.
            key_mapping: Replacements in the names of the file's tensors, by regular expression; for each name the
                first that is found, without the prefix ``base_model.model.``. None takes those that a Transformers
                model has for its own checkpoints.
            torch_device: Accepted for PEFT's sake; each tensor goes to the device of the weight that it adapts.
            ignore_mismatched_sizes: Accepted for PEFT's sake, and must be False.
            example_inputs: As for `get_peft_model`.
            use_safetensors: False reads `adapter_model.bin`, a pickle, with ``weights_only=True``.
            hub_options: Options of ``huggingface_hub.hf_hub_download``, such as `revision`.

        Raises:
            FileNotFoundError: If a file is missing.
            CheckpointError: If the file doesn't fit the model, or is damaged; the model is as it was.
            AdaptError: As for `get_peft_model`.
            ValueError: If an option is True that must be False.
        """
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        with transaction(model):
            load(
                model,
                model_id,
                adapter_name,
                is_trainable,
                config,
                activates=True,
                methods=_methods_for(model),
                autocast_adapter_dtype=autocast_adapter_dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                example_inputs=example_inputs,
                use_safetensors=use_safetensors,
                **hub_options,
            )
            if not is_trainable:
                for module in model.modules():
                    undone_by(setattr, module, "training", module.training)
                model.eval()
        return model

    # calls

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Calls the model.

        Args:
            args: What its forward takes.
            adapter_names: An adapter for each row of the batch, whichever are active: a name, or ``"__base__"`` for the
                base model.
            kwargs: What its forward takes.

        Raises:
            AdaptError: If a name isn't known, or what is named can't be mixed.
            ValueError: If there are more or fewer names than rows.
        """
        if not isinstance(self, PeftModel):
            # a compiler or a caller has kept this method, and the adapters were taken off since
            names = {} if adapter_names is None else {"adapter_names": adapter_names}
            return self(*args, **kwargs, **names)
        if adapter_names is None:
            output = super().__call__(*args, **kwargs)
            state = self._peft_adapters
            return training.with_penalty(modules_of(self), state, output) if state.has_penalties else output
        if getattr(self, "_is_replica", False):
            raise AdaptError("DataParallel's copies of a model can't have adapter_names; call the model itself")
        with self.mixed_batch(adapter_names):
            return super().__call__(*args, **kwargs)

    def mixed_batch(self, adapter_names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """Lets all calls within the context have an adapter for each row, as ``model(…, adapter_names=…)`` does."""
        return mixing.mixed(lambda: modules_of(self), self._peft_adapters, adapter_names)

    # adapters

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter."""
        return {name: adapter.config for name, adapter in self._peft_adapters.by_name.items()}

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act, unless they are disabled."""
        return list(self._peft_adapters.active)

    @property
    def active_adapter(self) -> str:
        """The name of the first adapter that acts.

        Raises:
            AdaptError: If none does.
        """
        if not self.active_adapters:
            raise AdaptError(f"no adapter is active; name one of {sorted(self.peft_config)}, or call set_adapter first")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first adapter that acts.

        Raises:
            AdaptError: If none does.
        """
        return self.peft_config[self.active_adapter]

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
        """Adds a new adapter, which doesn't act until `set_adapter` names it; arguments as for `get_peft_model`.

        Raises:
            AdaptError: As for `get_peft_model`; the model is as it was.
        """
        config = as_config(peft_config)
        add_new(
            self,
            config,
            adapter_name,
            example_inputs,
            autocast_adapter_dtype,
            where,
            activates=False,
            methods=_methods_for(self),
        )

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
        """Adds a saved adapter, which doesn't act until `set_adapter` names it; arguments as for `from_pretrained`.

        The modes of the model's modules, training or evaluation, stay as they are.

        Returns:
            What ``load_state_dict`` returns: no missing and no unexpected keys.

        Raises:
            CheckpointError: As for `from_pretrained`, as the other errors are.
        """
        load(
            self,
            model_id,
            adapter_name,
            is_trainable,
            activates=False,
            methods=_methods_for(self),
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
            **options,
        )
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
        """Adds an adapter that combines others, which doesn't act until `set_adapter` names it.

        Args:
            adapters: The names of the others.
            weights: Their weights, which may be negative.
            adapter_name: The name of the new one.
            combination_type: How they are combined, by PEFT's names: ``"cat"`` is exactly their weighted sum, with the
                sum of their ranks; ``"svd"`` the nearest to it of another rank; ``"linear"`` a rough one of the same
                rank; for the rest see PEFT's documentation.
            svd_rank: The rank for kinds with ``svd``; None takes the highest of the others.
            svd_clamp: A quantile at which the factors of those are cut off.
            svd_full_matrices: Whether they compute all singular vectors.
            svd_driver: Their cuSOLVER method.
            density: The share of elements that kinds with ``ties``, ``dare`` and ``magnitude_prune`` keep.
            majority_sign_method: ``"total"`` or ``"frequency"``, for kinds with ``ties``.

        Raises:
            AdaptError: If a name isn't known, the new one is taken, the number of weights is another one, or the
                adapters can't be combined; the model is as it was.
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
            carry_out(self, adapter_name, plan, values, activates=False, methods=_methods_for(self))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters act, and be trained.

        A forward in another thread may see the change half done, see `PeftModel`.

        Args:
            adapter_name: The name of an adapter, or several.
            inference_mode: Whether they are for inference instead, so that nothing is trained.

        Raises:
            AdaptError: If a name isn't known, two of them train the same tensor whole, or one that was loaded for
                inference can't be trained.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = [known_adapter(self, name).config for name in names]
        for name in names if not inference_mode else ():
            lifecycle.refuse_untrainable(known_adapter(self, name), name)
        modules, before = modules_of(self), self.active_adapters
        with transaction(self):
            lifecycle.activate(modules, self._peft_adapters, names)
            for config in configs:
                set_attribute(config, "inference_mode", inference_mode)
            set_trainable(modules, self._peft_adapters, [*before, *names])

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes one adapter off for good.

        If it was active, the others that were go on acting; if there are none, the first that is left becomes the
        active one, with a warning, as in PEFT. A forward in another thread may see that half done, see `PeftModel`.

        Raises:
            AdaptError: If there is no such adapter, or it is merged; the model is as it was.
        """
        known_adapter(self, adapter_name)
        modules, state = modules_of(self), self._peft_adapters
        if adapter_name in state.merged:
            raise AdaptError(
                f"{adapter_name!r} is merged into the weights; call unmerge_adapter() before you delete it"
            )
        others = [name for name in state.by_name if name != adapter_name]
        with transaction(self):
            if state.active == [adapter_name] and others:
                warnings.warn(f"{adapter_name!r} was active and is deleted; {others[0]!r} is active now", stacklevel=2)
                lifecycle.activate(modules, state, others[:1])
            lifecycle.remove(modules, state, adapter_name)
            set_trainable(modules, state, state.active)

    def disable_adapters(self) -> None:
        """Lets no adapter act until `enable_adapters`, as Transformers' method of this name does.

        What is merged is unmerged first. A forward in another thread may see the change half done, see `PeftModel`.
        """
        with transaction(self):
            lifecycle.disable(modules_of(self), self._peft_adapters, True)

    def enable_adapters(self) -> None:
        """Lets the active adapters act again; within `disable_adapter`, after the context.

        A forward in another thread may see the change half done, see `PeftModel`.
        """
        with transaction(self):
            lifecycle.disable(modules_of(self), self._peft_adapters, False)

    def disable_adapter(self) -> contextlib.AbstractContextManager[Any]:
        """Runs the base model within the context, whoever calls it: the model is the base for all threads and tasks.

        Contexts can overlap, in whatever order they are left: adapters act again after the last one. What is merged is
        unmerged first. Adapters that are set, added or deleted within the context act, or don't, after it; to merge
        them there is refused, and `disable_adapters` within it holds after it, too. A forward that has begun in another
        thread may see the change half done, see `PeftModel`.
        """
        return lifecycle.Paused(self)

    def get_base_model(self) -> Any:
        """Returns the model itself: it is the base model, with adapters."""
        return self

    def adapter_report(self, adapter_name: str | None = None) -> Report:
        """Returns what was adapted, as a table that prints.

        Args:
            adapter_name: The adapter; the first that acts if None.
        """
        return known_adapter(self, self.active_adapter if adapter_name is None else adapter_name).report

    def unload(self) -> Any:
        """Takes all adapters off and returns the model exactly as it was before the first one.

        A forward in another thread may see the change half done, see `PeftModel`.
        """
        state, modules = self._peft_adapters, modules_of(self)
        with transaction(self):
            merging.unmerge(modules, state)
            for name in list(state.by_name):
                lifecycle.remove(modules, state, name)
            for region in state.mixable & modules.keys():
                in_place.take_off(modules[region], "rows")
            for region in state.lifted.keys() & modules.keys():
                if not names_in_slots(modules[region]):  # of adapters of a model inside or around
                    in_place.take_off(modules[region], "graph")
            delete_item(self.__dict__, STATE)
            in_place.take_off(self, "methods")
            thaw(modules, state)
            if state.replication is not None:
                state.replication.undo()
        return self

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Adds the adapters to the weights, takes all adapters off, and returns the base model.

        A copy of each weight that it changes is kept until it is done, in main memory if the weight is on an
        accelerator. A forward in another thread may see the change half done, see `PeftModel`.

        Args:
            progressbar: Accepted for PEFT's sake; merging is one addition a weight.
            safe_merge: Whether to refuse changes that aren't finite.
            adapter_names: Which to merge; the active ones if None.

        Raises:
            AdaptError: If a weight is tied to another one, two adapters train the same tensor whole, or a change isn't
                finite; nothing is merged.
        """
        state, modules = self._peft_adapters, modules_of(self)
        names = _to_merge(self, adapter_names)
        if safe_merge:
            merging.refuse_infinite(modules, state, names)
        with transaction(self):
            merging.merge(modules, state, [*state.merged, *names])
            return self.unload()

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Adds adapters to the weights, until `unmerge_adapter` gives these the very bits that they had.

        What is merged has no nodes in the graphs, so that the forward is the base's, and takes a copy of each weight.
        Adapters that are active and not merged go on acting. A forward in another thread may see the change half done,
        see `PeftModel`.

        Args:
            adapter_names: Which to merge; the active ones if None. Those that are merged already are left out, with a
                warning.
            safe_merge: Whether to refuse changes that aren't finite.

        Raises:
            AdaptError: As for `merge_and_unload`, and if adapters are disabled; nothing is merged.
        """
        state, modules = self._peft_adapters, modules_of(self)
        names = _to_merge(self, adapter_names)
        if safe_merge:
            merging.refuse_infinite(modules, state, names)
        with transaction(self):
            merging.merge_in_place(modules, state, names)

    def unmerge_adapter(self) -> None:
        """Takes all adapters out of the weights again; the active ones act by nodes, as before.

        A forward in another thread may see the change half done, see `PeftModel`.
        """
        if not self._peft_adapters.merged:
            warnings.warn("no adapter is merged, so there is nothing to unmerge", stacklevel=2)
        with transaction(self):
            merging.unmerge(modules_of(self), self._peft_adapters)

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that `merge_adapter` has added to the weights."""
        return list(self._peft_adapters.merged)

    # training

    def update_and_allocate(self, global_step: int) -> None:
        """Lets the adapters that are trained change after a step, as AdaLoRA moves ranks to where they matter most.

        Call it after ``loss.backward()`` and ``optimizer.step()``, and before the gradients are set to zero.

        Args:
            global_step: The number of the step.

        Raises:
            AdaptError: If the method of no such adapter changes then; the model is as it was.
        """
        with transaction(self):
            training.update_and_allocate(modules_of(self), self._peft_adapters, global_step)

    # parameters

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the number of trainable parameters and that of all."""
        parameters = list(self.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return trainable, sum(parameter.numel() for parameter in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints these numbers as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201

    # files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the adapters alone, in PEFT's files: `default` into the folder itself, any other into one of its name.

        Each file takes the place of one that is there as a whole, when all are written. One that is a symbolic link is
        replaced itself, and what it points to stays as it is.

        Args:
            save_directory: The folder.
            safe_serialization: Only safetensors are written, so it must be True.
            selected_adapters: Which to write; all if None.
            save_embedding_layers: Whether the tables of a Transformers model's embeddings are saved, too: ``"auto"``
                where the config's `target_modules` names one, or its vocabulary isn't that of the base model.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: A folder into which the adapter was saved before it was trained.
                One that has taken a part of the weights, as PiSSA does, is then written as plain LoRA of twice the
                rank, which adds to the whole weights.
            state_dict: The model's state dict, where it was gathered elsewhere.

        Raises:
            AdaptError: If a selected adapter isn't known; nothing is written.
            CheckpointError: If the first values are those of another adapter.
            ValueError: If `safe_serialization` is False, `save_embedding_layers` is True for a model that doesn't tell
                its embeddings, or an adapter can't be converted.
        """
        if not safe_serialization:
            raise ValueError("adapters are written as safetensors only; leave safe_serialization True")
        if not is_main_process:
            return
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        selected = {name: known_adapter(self, name) for name in names}
        for name, adapter in selected.items():
            refuse_missing(modules_of(self), adapter, name)

        def folder_of(name: str) -> Path:
            return Path(save_directory) if name == "default" else Path(save_directory, name)

        with contextlib.ExitStack() as stack:
            staged = {
                folder: stack.enter_context(Staging(folder))
                for folder in dict.fromkeys((Path(save_directory), *map(folder_of, names)))
            }
            for name, adapter in selected.items():
                folder = staged[folder_of(name)].folder
                first = path_initial_model_for_weight_conversion
                originals = self._peft_adapters.originals
                checkpoint.save(self, adapter, name, folder, originals, state_dict, save_embedding_layers, first)
                if name in self.active_adapters[:1] and trainer.is_trainer_checkpoint(Path(save_directory)):
                    trainer.give_trainers_name(folder / checkpoint.WEIGHTS_NAME, staged[Path(save_directory)].folder)
            if names and not (card := Path(save_directory, "README.md")).exists():
                text = model_card(self.peft_config[names[0]])
                (staged[Path(save_directory)].folder / card.name).write_text(text, encoding="utf-8")
            for staging in staged.values():
                staging.put()
        if len(self.active_adapters) > 1 and trainer.is_trainer_checkpoint(Path(save_directory)):
            warnings.warn(
                f"a Trainer resumes the first active adapter alone, {self.active_adapter!r}; load the others from the "
                "checkpoint with load_adapter",
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the whole model's state dict, or that of an adapter's file into the active adapter.

        Raises:
            CheckpointError: If an adapter's tensors don't fit.
            AdaptError: If it has other weights where adapters are merged; nothing is loaded.
        """
        for name in self.active_adapters[:1]:
            # names in files are never those of the model's own state dict
            if not checkpoint.keys(known_adapter(self, name), name, modules_of(self)).keys().isdisjoint(state_dict):
                return set_peft_model_state_dict(self, state_dict, name)
        merging.refuse_lost(modules_of(self), self._peft_adapters, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> Any:
        """Saves the adapters and uploads them to a repository on the Hub, which is made if it isn't there."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter by their names in PEFT's files.

    Args:
        model: An adapted model.
        state_dict: The model's state dict, where it was gathered elsewhere.
        adapter_name: The adapter.
        unwrap_compiled: Whether `model` may be what ``torch.compile`` returned.
        save_embedding_layers: As for `save_pretrained`.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    adapter = known_adapter(model, adapter_name)
    originals = model._peft_adapters.originals
    return checkpoint.state_dict_of(
        modules_of(model), adapter, adapter_name, originals, state_dict, save_embedding_layers
    )


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, torch.Tensor], adapter_name: str = "default"
) -> Any:
    """Overwrites the tensors of an adapter from tensors by their names in PEFT's files.

    Returns:
        What ``load_state_dict`` returns: no missing and no unexpected keys.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or has another shape; nothing is overwritten.
        AdaptError: If the adapter is merged; likewise.
    """
    modules = modules_of(model)
    adapter = known_adapter(model, adapter_name)
    if adapter_name in model._peft_adapters.merged:
        raise AdaptError(
            f"{adapter_name!r} is merged into the weights, which other values would leave as they are; call "
            "unmerge_adapter() before you load them"
        )
    originals = model._peft_adapters.originals
    values = checkpoint.fitted(adapter, adapter_name, modules, originals, peft_model_state_dict)
    with transaction(model):
        overwrite(modules, adapter, adapter_name, values)
    return IncompatibleKeys([], [])


def _to_merge(model: Any, names: Sequence[str] | None) -> list[str]:
    """Returns which adapters to merge, without those that are merged, of which PEFT warns too.

    Raises:
        AdaptError: If one isn't known.
        TypeError: If one name is given in place of a list.
    """
    if isinstance(names, str):
        raise TypeError(f"adapter_names is the text {names!r}; pass a list of names, [{names!r}]")
    wanted = list(dict.fromkeys(model.active_adapters if names is None else names))
    for name in wanted:
        known_adapter(model, name)
    merged = model._peft_adapters.merged
    left = [name for name in wanted if name not in merged]
    if wanted and not left:
        warnings.warn(f"{listed(wanted)} are merged already, so there is nothing to merge", stacklevel=3)
    elif left and merged:
        warnings.warn(f"{listed(merged)} are merged already; {listed(left)} are merged beside them", stacklevel=3)
    return left


def _with_revision(config: PeftConfig, revision: str) -> PeftConfig:
    if config.revision not in (None, revision):
        warnings.warn(f"the config's revision {config.revision!r} is replaced by {revision!r}", stacklevel=3)
    changed = copy.copy(config)
    changed.revision = revision
    return changed


class _GeneratingModel(PeftModel):
    """The methods of a model that generates text."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generates; `adapter_names` has an adapter for each row, as in a call of the model."""
        base: Any = super()
        if adapter_names is None:
            return base.generate(*args, **kwargs)
        settings = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        repeats = [
            kwargs.get(name, getattr(settings, name, None)) or 1 for name in ("num_beams", "num_return_sequences")
        ]
        with mixing.mixed(lambda: modules_of(self), self._peft_adapters, adapter_names, max(repeats)):
            return base.generate(*args, **kwargs)


def _methods_for(model: nn.Module) -> in_place.Layer:
    """Returns what gives a model the methods of an adapted one."""
    return _methods_layer(hasattr(model, "generate"))


def _methods_layer(generates: bool = False) -> in_place.Layer:
    return _GENERATING_METHODS if generates else _METHODS


_CALL = {"__call__": PeftModel.__call__}
_METHODS = in_place.Layer("methods", (PeftModel,), _CALL, (_methods_layer, ()))
_GENERATING_METHODS = in_place.Layer("methods", (_GeneratingModel,), _CALL, (_methods_layer, (True,)))
