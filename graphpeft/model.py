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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from graphpeft import adapters as _adapters
from graphpeft import checkpoint, in_place, trainer
from graphpeft.adapters import Adapter, Adapters
from graphpeft.config import ConfigLike, PeftConfig, as_config
from graphpeft.plan import AdaptError, Plan, make_plan
from graphpeft.report import Report, listed
from graphpeft.targeting import unmatched_entries
from graphpeft.tracing.trace import ExampleInputs

_STATE = "_peft_adapters"


def explain(
    model: nn.Module,
    config: ConfigLike,
    adapter_name: str = "default",
    *,
    example_inputs: ExampleInputs | None = None,
) -> Report:
    """Returns what `get_peft_model` would do to `model`, which stays as it is.

    Args:
        model: Any module, or a traced one.
        config: A config of this library or of PEFT.
        adapter_name: The name that the adapter would have.
        example_inputs: As for `get_peft_model`.

    Raises:
        AdaptError: If the config asks for what isn't supported, or the adapter's name can't be used.
    """
    ours = as_config(config)
    plan = _plan(model, ours, adapter_name, example_inputs, autocast_adapter_dtype=True)
    _warn_of_unmatched(ours, plan)
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

    Raises:
        AdaptError: If nothing matches, a target can't be adapted, or the name is taken; the model is as it was.
        ValueError: If `mixed` is True.
    """
    if mixed:
        raise ValueError("mixed=True isn't needed: a model takes adapters of any methods here; leave mixed False")
    config = as_config(peft_config)
    if revision is not None:
        config = _with_revision(config, revision)
    plan = _plan(model, config, adapter_name, example_inputs, autocast_adapter_dtype)
    _refuse(plan)
    _warn_of_unmatched(config, plan)
    _adapt(model, adapter_name, plan, values=None)
    return model


class PeftModel(nn.Module):
    """The methods that an adapted model has beside its own; they mean what PEFT's of the same names mean."""

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
        _load(
            model,
            model_id,
            adapter_name,
            is_trainable,
            config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            example_inputs=example_inputs,
            use_safetensors=use_safetensors,
            **hub_options,
        )
        return model if is_trainable else model.eval()

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
    ) -> None:
        """Adds a new adapter, which doesn't act until `set_adapter` names it; arguments as for `get_peft_model`.

        Raises:
            AdaptError: As for `get_peft_model`; the model is as it was.
        """
        active = self.active_adapters
        get_peft_model(
            self,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            example_inputs=example_inputs,
        )
        _activate(self, active)

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
        active = self.active_adapters
        _load(
            self,
            model_id,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
            **options,
        )
        _activate(self, active)
        return _IncompatibleKeys([], [])

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters act, and be trained.

        Args:
            adapter_name: The name of an adapter, or several.
            inference_mode: Whether they are for inference instead, so that nothing is trained.

        Raises:
            AdaptError: If a name isn't known, or two of them train the same tensor whole.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = [_known(self, name).config for name in names]
        _adapters.activate(_modules(self), self._peft_adapters, names)
        for config in configs:
            config.inference_mode = inference_mode
        _adapters.set_trainable(_modules(self), self._peft_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes one adapter off for good; if it was active, the others that were go on acting."""
        _known(self, adapter_name)
        _adapters.remove(_modules(self), self._peft_adapters, adapter_name)
        _adapters.set_trainable(_modules(self), self._peft_adapters)

    def disable_adapters(self) -> None:
        """Lets no adapter act until `enable_adapters`, as Transformers' method of this name does."""
        _adapters.disable(_modules(self), self._peft_adapters, True)

    def enable_adapters(self) -> None:
        """Lets the active adapters act again."""
        _adapters.disable(_modules(self), self._peft_adapters, False)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the base model within the context; adapters that are set there act after it."""
        was = self._peft_adapters.is_disabled
        self.disable_adapters()
        try:
            yield
        finally:
            # unless the model was unloaded within the context
            if _STATE in self.__dict__:
                _adapters.disable(_modules(self), self._peft_adapters, was)

    def get_base_model(self) -> Any:
        """Returns the model itself: it is the base model, with adapters."""
        return self

    def adapter_report(self, adapter_name: str | None = None) -> Report:
        """Returns what was adapted, as a table that prints.

        Args:
            adapter_name: The adapter; the first that acts if None.
        """
        return _known(self, self.active_adapter if adapter_name is None else adapter_name).report

    def unload(self) -> Any:
        """Takes all adapters off and returns the model exactly as it was before the first one."""
        state = self._peft_adapters
        for name in list(state.by_name):
            _adapters.remove(_modules(self), state, name)
        modules = _modules(self)
        for region in state.lifted.keys() & modules.keys():
            in_place.take_off(modules[region], "graph")
        _undress(self)
        _adapters.thaw(modules, state)
        return self

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Adds the adapters to the weights, takes all adapters off, and returns the base model.

        Args:
            progressbar: Accepted for PEFT's sake; merging is one addition a weight.
            safe_merge: Whether to refuse changes that aren't finite.
            adapter_names: Which to merge; the active ones if None.

        Raises:
            AdaptError: If a weight is tied to another one, two adapters train the same tensor whole, or a change isn't
                finite; nothing is merged.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            _known(self, name)
        modules = _modules(self)
        if safe_merge:
            _adapters.refuse_infinite(modules, self._peft_adapters, names)
        _adapters.merge(modules, self._peft_adapters, names)
        return self.unload()

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

        Args:
            save_directory: The folder.
            safe_serialization: Only safetensors are written, so it must be True.
            selected_adapters: Which to write; all if None.
            save_embedding_layers: Accepted for PEFT's sake, and must be ``"auto"`` or False: what is saved is what an
                adapter holds.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: A folder into which the adapter was saved before it was trained.
                One that has taken a part of the weights, as PiSSA does, is then written as plain LoRA of twice the
                rank, which adds to the whole weights.
            state_dict: The model's state dict, where it was gathered elsewhere.

        Raises:
            AdaptError: If a selected adapter isn't known; nothing is written.
            CheckpointError: If the first values are those of another adapter.
            ValueError: If `safe_serialization` is False, `save_embedding_layers` is True, or an adapter can't be
                converted.
        """
        if save_embedding_layers not in ("auto", False):
            raise ValueError(
                f"save_embedding_layers={save_embedding_layers!r} isn't supported yet: an adapter's file holds what is "
                "trained alone. Leave it 'auto', and name an embedding that you train in modules_to_save"
            )
        if not safe_serialization:
            raise ValueError("adapters are written as safetensors only; leave safe_serialization True")
        if not is_main_process:
            return
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        selected = {name: _known(self, name) for name in names}
        for name, adapter in selected.items():
            _adapters.refuse_missing(_modules(self), adapter, name)
        for name, adapter in selected.items():
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            checkpoint.save(self, adapter, name, folder, state_dict, path_initial_model_for_weight_conversion)
            if name in self.active_adapters[:1] and trainer.is_trainer_checkpoint(Path(save_directory)):
                trainer.give_trainers_name(folder / checkpoint.WEIGHTS_NAME, Path(save_directory))
        if len(self.active_adapters) > 1 and trainer.is_trainer_checkpoint(Path(save_directory)):
            warnings.warn(
                f"a Trainer resumes the first active adapter alone, {self.active_adapter!r}; load the others from the "
                "checkpoint with load_adapter",
                stacklevel=2,
            )
        if names:
            checkpoint.write_model_card(self.peft_config[names[0]], Path(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the whole model's state dict, or that of an adapter's file into the active adapter.

        Raises:
            CheckpointError: If an adapter's tensors don't fit.
        """
        for name in self.active_adapters[:1]:
            # names in files are never those of the model's own state dict
            if not checkpoint.keys(_known(self, name), name, _modules(self)).keys().isdisjoint(state_dict):
                return set_peft_model_state_dict(self, state_dict, name)
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
    model: Any, state_dict: Mapping[str, Any] | None = None, adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter by their names in PEFT's files.

    Args:
        model: An adapted model.
        state_dict: The model's state dict, where it was gathered elsewhere.
        adapter_name: The adapter.
    """
    return checkpoint.state_dict_of(_modules(model), _known(model, adapter_name), adapter_name, state_dict)


def set_peft_model_state_dict(
    model: Any, peft_model_state_dict: Mapping[str, torch.Tensor], adapter_name: str = "default"
) -> Any:
    """Overwrites the tensors of an adapter from tensors by their names in PEFT's files.

    Returns:
        What ``load_state_dict`` returns: no missing and no unexpected keys.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or has another shape; nothing is overwritten.
    """
    modules = _modules(model)
    adapter = _known(model, adapter_name)
    values = checkpoint.fitted(adapter, adapter_name, modules, peft_model_state_dict)
    with torch.no_grad():
        for (path, attribute), value in values.items():
            getattr(modules[path], attribute).copy_(value)
    return _IncompatibleKeys([], [])


# the way in and out


def _load(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    config: ConfigLike | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    example_inputs: ExampleInputs | None = None,
    use_safetensors: bool = True,
    **hub_options: Any,
) -> None:
    if ephemeral_gpu_offload:
        raise ValueError(
            "ephemeral_gpu_offload=True isn't supported: an adapter is where its weight is; leave it False, and move "
            "the model as a whole"
        )
    if ignore_mismatched_sizes:
        raise ValueError(
            "ignore_mismatched_sizes=True isn't supported: an adapter is loaded whole or not at all. Adapt the model "
            "with get_peft_model, put the tensors that fit into what get_peft_model_state_dict gives, and that into "
            "set_peft_model_state_dict"
        )
    given = as_config(config) if config is not None else PeftConfig.from_pretrained(model_id, **hub_options)
    loaded = copy.copy(given)
    loaded.inference_mode = not is_trainable
    values = checkpoint.load(model_id, use_safetensors=use_safetensors, **hub_options)
    if key_mapping:
        values = checkpoint.renamed(values, key_mapping)
    loaded = loaded.fitted_to(values)
    plan = _plan(model, loaded, adapter_name, example_inputs, autocast_adapter_dtype)
    _refuse(plan)
    fitted = checkpoint.fitted(Adapter.of(plan), adapter_name, _modules(model), values)
    _adapt(model, adapter_name, plan, fitted)


def _with_revision(config: PeftConfig, revision: str) -> PeftConfig:
    if config.revision not in (None, revision):
        warnings.warn(f"the config's revision {config.revision!r} is replaced by {revision!r}", stacklevel=3)
    changed = copy.copy(config)
    changed.revision = revision
    return changed


def _plan(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    example_inputs: ExampleInputs | None,
    autocast_adapter_dtype: bool,
) -> Plan:
    state: Adapters | None = model.__dict__.get(_STATE)
    if not _is_name(adapter_name):
        raise AdaptError(
            f"{adapter_name!r} can't be an adapter's name, which is part of attributes' names and names a folder: "
            "choose one without dots, slashes, backslashes, control characters, and spaces at its ends"
        )
    if state is not None and adapter_name in state.by_name:
        raise AdaptError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
    return make_plan(
        model,
        config,
        adapter_name,
        owned=state.owned() if state is not None else frozenset(),
        known=state.lifted if state is not None else {},
        example_inputs=example_inputs,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def _is_name(name: object) -> bool:
    """Tells whether a module's attribute can end in `name`, and a folder inside another have that name."""
    if not isinstance(name, str) or "." in name or not name.isprintable() or name.strip() != name:
        return False
    # whatever divides paths on any system divides them on Windows
    return name != "" and name == PureWindowsPath(name).name


def _refuse(plan: Plan) -> None:
    """Raises AdaptError if a plan can't be carried out whole."""
    if plan.report.nothing_matched:
        raise AdaptError(plan.report.nothing_matched)
    refused = plan.report.refused
    if refused:
        reasons = listed([f"{refusal.name}: {refusal.reason}" for refusal in refused], "; ")
        ways_out = "; ".join(dict.fromkeys(refusal.way_out for refusal in refused))
        raise AdaptError(f"can't adapt {reasons}. Ways out: {ways_out}.")


def _warn_of_unmatched(config: PeftConfig, plan: Plan) -> None:
    """Warns of what a config names in vain beside what it finds: it may be a slip, or meant for other models too."""
    unmatched = [] if plan.report.nothing_matched else unmatched_entries(config, plan.modules, plan.report)
    if unmatched:
        model = type(plan.modules[""]).__name__
        warnings.warn(f"the config names what has no effect on {model}: {'; '.join(unmatched)}", stacklevel=3)


def _activate(model: Any, names: Sequence[str]) -> None:
    """Makes exactly these adapters act; whether each is trained or for inference stays as it was."""
    _adapters.activate(_modules(model), model._peft_adapters, names)
    _adapters.set_trainable(_modules(model), model._peft_adapters)


def _adapt(model: Any, name: str, plan: Plan, values: Any) -> None:
    """Carries out a plan: all of it, or nothing."""
    modules = plan.modules
    is_first = _STATE not in model.__dict__
    state = Adapters.before_any(modules) if is_first else model.__dict__[_STATE]
    _adapters.add(modules, state, name, plan, values)
    try:
        if is_first:
            in_place.put_on(model, _METHODS)
        _adapters.activate(modules, state, [name])
    except BaseException:
        _adapters.remove(modules, state, name)
        if is_first:
            in_place.take_off(model, "methods")
        raise
    model.__dict__[_STATE] = state
    if is_first:
        _adapters.freeze(modules, state)
    else:
        _adapters.set_trainable(modules, state)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def _undress(model: nn.Module) -> None:
    del model.__dict__[_STATE]
    in_place.take_off(model, "methods")


def _known(model: Any, name: str) -> Adapter:
    state: Adapters | None = model.__dict__.get(_STATE)
    if state is None:
        raise AdaptError(f"the {type(model).__name__} has no adapters; adapt it with get_peft_model first")
    if name not in state.by_name:
        raise AdaptError(f"the model has no adapter {name!r}; it has {sorted(state.by_name)}")
    return state.by_name[name]


def _methods_layer() -> in_place.Layer:
    return _METHODS


_METHODS = in_place.Layer("methods", (PeftModel,), {}, (_methods_layer, ()))
