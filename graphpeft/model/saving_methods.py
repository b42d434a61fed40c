"""The methods of an adapted model that write adapters into files and load state dicts."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphpeft.adapters import checkpoint, file_names, merged_weights, merging
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.empty_tensors import refuse_empty
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter
from graphpeft.adapters.trainable import trained_besides
from graphpeft.files.atomic_files import Staging, is_on_another_disk
from graphpeft.files.hub import WEIGHTS_NAME
from graphpeft.graph.hosts.sharding import is_sharded
from graphpeft.model import trainers
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.model.model_card import CARD_NAME, model_card
from graphpeft.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from graphpeft.peft_errors import PeftWarning
from graphpeft.transaction import set_items, transaction
from graphpeft.wording import joined


class SavingMethods(AdapterInfo):
    """The part of `PeftModel` that saves adapters and loads state dicts."""

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
        save_function: Callable[..., Any] | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes the adapters, without the base model, in PEFT's files.

        The adapter `default` goes into the folder itself, any other into a subfolder of its name. Files are replaced as
        a whole, after all are written. A file that is a symbolic link is replaced itself; its target stays unchanged.
        The folder's model card is made or completed, as by `create_or_update_model_card`.

        Args:
            save_directory: The folder; it is made if it doesn't exist.
            safe_serialization: Whether the tensors are written as `adapter_model.safetensors`, or else as
                `adapter_model.bin`, a pickle.
            selected_adapters: The names of the adapters to write; all if None.
            save_embedding_layers: Whether the tables of a Transformers model's embeddings are saved too: True, False,
                or ``"auto"``, which saves them if the config's `target_modules` names one, or if the vocabulary isn't
                that of the base model.
            is_main_process: Whether this process writes; if False, the call does nothing.
            path_initial_model_for_weight_conversion: The folder into which the adapter was saved before training, for
                an adapter that has taken a part of the weights, as PiSSA's does. The adapter is then written as plain
                LoRA of twice the rank, which acts on the original weights.
            state_dict: The model's state dict where it was gathered elsewhere, as distributed training does; None reads
                the tensors from the model.
            save_function: Accepted for compatibility with PEFT, which ignores it, too.
            max_shard_size: Accepted likewise; an adapter is one file.

        Raises:
            AdaptError: If the model has no adapter of a selected name, or none at all, or an option was set on an
                adapter's config since it was made; nothing is written then.
            CheckpointError: If the adapter in `path_initial_model_for_weight_conversion` is another one, `state_dict`
                lacks a tensor, or the metadata of an existing model card can't be read; nothing is written then.
            ValueError: If `safe_serialization` is False and a folder has the other file, which readers prefer,
                `save_embedding_layers` is True for a model that doesn't tell its embeddings, or an adapter can't be
                converted; nothing is written then.
            OSError: If a file can't be written; the files that were there are unchanged then.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if not self._peft_adapters.by_name:
            raise AdaptError("the model has no adapter any more that could be saved; add one, or call unload()")
        selected = {name: known_adapter(self, name) for name in names}
        if not is_main_process:
            if state_dict is None or any(map(is_sharded, state_dict.values())):
                # takes part in gathering
                for name in names:
                    get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            return
        for name, adapter in selected.items():
            refuse_missing(modules_of(self), adapter, name, reads=state_dict is None)
            if state_dict is None:
                refuse_empty(modules_of(self), adapter, name)
        trained = trained_besides(self)
        if trained:
            warnings.warn(
                f"{joined(trained)} require gradients and belong to no adapter, so its files lack them; name their "
                "modules in modules_to_save, or save them yourself",
                PeftWarning,
                stacklevel=2,
            )

        def folder_of(name: str) -> Path:
            return Path(save_directory) if name == "default" else Path(save_directory, name)

        older = [folder_of(name) / WEIGHTS_NAME for name in names]
        older = [] if safe_serialization else [file for file in older if file.exists()]
        if older:
            raise ValueError(
                f"{joined(list(map(str, older)))} would be loaded in place of the adapter_model.bin that "
                "safe_serialization=False writes; remove it, or save into another folder"
            )
        with contextlib.ExitStack() as stack:
            staging = stack.enter_context(Staging(Path(save_directory)))
            # files move to their places on one disk
            elsewhere = [name for name in names if is_on_another_disk(folder_of(name), Path(save_directory))]
            apart = {name: stack.enter_context(Staging(folder_of(name))) for name in elsewhere}
            for name, adapter in selected.items():
                beside = staging.folder / folder_of(name).relative_to(save_directory)
                folder = apart[name].folder if name in apart else beside
                first = path_initial_model_for_weight_conversion
                originals = merged_weights.Originals(self, self._peft_adapters)
                checkpoint.save(
                    self,
                    adapter,
                    name,
                    folder,
                    originals,
                    state_dict,
                    save_embedding_layers,
                    first,
                    safe_serialization,
                )
                is_checkpoint = safe_serialization and trainers.is_trainer_checkpoint(Path(save_directory))
                if name in self.active_adapters[:1] and is_checkpoint:
                    self._save_for_trainer(name, folder, staging.folder, state_dict)
            if names:
                self._stage_card(staging, Path(save_directory), list(selected.values()))
            for each in (*apart.values(), staging):
                each.put()
        if len(self.active_adapters) > 1 and trainers.is_trainer_checkpoint(Path(save_directory)):
            warnings.warn(
                f"a Trainer resumes the first active adapter alone, {self.active_adapters[0]!r}; load the others from "
                "the checkpoint with load_adapter",
                PeftWarning,
                stacklevel=2,
            )

    def _save_for_trainer(self, name: str, folder: Path, to: Path, state_dict: Mapping[str, Any] | None) -> None:
        adapter = known_adapter(self, name)
        if not adapter.config.training_state():
            trainers.give_trainers_name(folder / WEIGHTS_NAME, to)
            return
        originals = merged_weights.Originals(self, self._peft_adapters)
        at_first = trainers.as_at_first(adapter)
        tensors = checkpoint.state_dict_of(modules_of(self), at_first, name, originals, state_dict)
        trainers.write(adapter.config, tensors, to)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        r"""Writes the model card of all adapters, `README.md`, or completes the one that is there.

        Its metadata name the library and the base model, and have tags of both, of the methods, and of the model itself
        (`model_tags`). In an existing card, tags of other methods and of another base model are removed; all else
        stays. `save_pretrained` does the same.

        Args:
            output_dir: The folder; it is made if it doesn't exist.

        Raises:
            CheckpointError: If the metadata of an existing card can't be read; it is unchanged then.
            OSError: If the file can't be written; an existing card is unchanged then.

        Examples:
            >>> from pathlib import Path
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
            >>> Path("README.md").write_text("---\nlicense: mit\n---\nMine.")
            29
            >>> model.create_or_update_model_card(".")
            >>> print(Path("README.md").read_text())
            ---
            license: mit
            library_name: peft
            tags:
            - lora
            ---
            Mine.
            <BLANKLINE>
            ### Framework versions
            <BLANKLINE>
            - PEFT 0.21.2
            <BLANKLINE>
        """
        with Staging(Path(output_dir)) as staging:
            self._stage_card(staging, Path(output_dir), list(self._peft_adapters.by_name.values()))
            staging.put()

    def _stage_card(self, staging: Staging, folder: Path, adapters: Sequence[Adapter]) -> None:
        text = model_card(self, adapters, folder / CARD_NAME)
        # with the ends of lines that an existing card has
        (staging.folder / CARD_NAME).write_text(text, encoding="utf-8", newline="")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the state dict of the whole model, or of an adapter's file into the first active adapter.

        Args:
            state_dict: The tensors. If a name is one of the active adapter's names in PEFT's files, it is an adapter's
                state dict, which must be complete; otherwise it is the model's own.
            strict: For the model's own state dict: whether missing and unexpected names are an error.
            assign: For the model's own state dict: whether the model takes the tensors themselves, not their values.

        Returns:
            The missing and the unexpected names, as ``nn.Module.load_state_dict`` returns them.

        Raises:
            CheckpointError: If an adapter's tensors don't fit; nothing is loaded then.
            AdaptError: If the state dict has other values for weights into which adapters are merged; nothing is loaded
                then.
            RuntimeError: If the model's own state dict doesn't fit, as ``nn.Module.load_state_dict`` raises it.
        """
        for name in self.active_adapters[:1]:
            adapter = known_adapter(self, name)
            # names in files are never those of the model's own state dict
            if not file_names.keys(adapter, name, modules_of(self)).keys().isdisjoint(state_dict):
                tensors, state = trainers.without_state(state_dict)
                return self._load_adapter(adapter, name, tensors, state)
        merging.refuse_lost(modules_of(self), self._peft_adapters, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_adapter(self, adapter: Adapter, name: str, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
        with transaction(self):
            if state:
                set_items(vars(adapter.config), adapter.config.unchanged)
            loaded = set_peft_model_state_dict(self, tensors, name)
            if state:
                set_items(vars(adapter.config), adapter.config.resumed(state))
        return loaded

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> Any:
        """Saves the adapters and uploads them to a repository on the Hugging Face Hub.

        Args:
            repo_id: The repository, as ``owner/name``; it is made if it doesn't exist.
            private: Whether a new repository is private; None takes the owner's default.
            token: An access token of the Hub; None takes the one that is stored on this machine.
            **options: Options of ``huggingface_hub.HfApi.upload_folder``, such as `commit_message`.

        Returns:
            The result of ``upload_folder``: information on the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
