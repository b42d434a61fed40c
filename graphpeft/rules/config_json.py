"""A config as PEFT's `adapter_config.json`: read with suspicion, written whole, and its digest."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from graphpeft.files.atomic_files import Staging
from graphpeft.files.foreign_files import CheckpointError, read_json
from graphpeft.files.hub import CONFIG_NAME, adapter_file
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import Role, options_for
from graphpeft.rules.plain_values import default_of, plain
from graphpeft.rules.registry import nearest, options, registered
from graphpeft.wording import joined, shown

ConfigT = TypeVar("ConfigT", bound="ConfigJson")

OWN = {"is_of_peft": False}
"""The metadata of an option that PEFT doesn't have: files hold the option only if it isn't the default."""


class ConfigJson:
    """The part of `PeftConfig` that reads and writes PEFT's JSON."""

    peft_type: ClassVar[Any]

    @property
    def editable(self) -> tuple[str, ...]:
        """The options that don't change the meaning of an adapter's tensors, so that a file's user may edit them."""
        return options_for(type(self), Role.EDITABLE, Role.IDENTITY, Role.DROPOUT, Role.TURNED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys of PEFT's JSON with plain values."""
        fields = {
            field.name: getattr(self, field.name)
            for field in options(self)
            if field.metadata != OWN or getattr(self, field.name) != field.default
        }
        return {key: plain(value) for key, value in (fields | {"peft_type": self.peft_type}).items()}

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Builds a config of the method that ``values["peft_type"]`` names.

        Args:
            values: The content of an `adapter_config.json`. Unknown keys are dropped with a warning.

        Returns:
            The config.

        Raises:
            ValueError: If the method isn't known, or `cls` is another method's class.
        """
        values = dict(values)
        config_class = cls._class_of(values.pop("peft_type", None))
        known = [field.name for field in options(config_class)]
        unknown = [name for name in values if name not in known]
        if unknown:
            near = [hint.removeprefix("; did") for hint in (nearest(name, known) for name in unknown) if hint]
            warnings.warn(
                f"{CONFIG_NAME} has keys that {config_class.__name__} doesn't know, and which are left out: "
                f"{joined(sorted(map(shown, unknown)))}.{''.join(f' Did{hint}' for hint in dict.fromkeys(near))}",
                PeftWarning,
                stacklevel=3,
            )
        return config_class(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def _class_of(cls: type[ConfigT], named: Any) -> type[ConfigT]:
        """Returns the class of the method of this name, which has to be `cls` or inherit from it."""
        config_class = next((c for t, c in registered().items() if named == t), None)
        if config_class is None:
            told = "there is no peft_type, which tells the method" if named is None else f"peft_type is {shown(named)}"
            raise ValueError(f"{told}; supported are {sorted(map(plain, registered()))}")
        if not issubclass(config_class, cls):
            raise ValueError(f"a config for {named} was read where {cls.__name__} was asked for")
        return config_class

    @classmethod
    def check_file(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError, or warns, where other versions of PEFT mean something else by a file's keys.

        Args:
            values: The keys of the file, with plain values.
        """

    @classmethod
    def from_peft_type(cls: type[ConfigT], **options: Any) -> ConfigT:
        """Builds a config of the method that `peft_type` names, or of this class if it is left out.

        Args:
            **options: The options. Unknown ones are dropped with a warning.

        Returns:
            The config.

        Raises:
            ValueError: If the method isn't known, `cls` is another method's class, or an option has an invalid value.

        Examples:
            >>> PeftConfig.from_peft_type(peft_type="LORA", r=2).r
            2
        """
        return cls.from_dict({"peft_type": getattr(cls, "peft_type", None)} | options)

    @staticmethod
    def from_json_file(path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Reads the keys of a config file.

        Args:
            path_json_file: The file.

        Returns:
            Its keys with plain values, which `from_dict` takes; without `runtime_config`, which isn't the adapter's.

        Raises:
            CheckpointError: If the file isn't a JSON object.
        """
        values = read_json(path_json_file)
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_pretrained(
        cls: type[ConfigT], pretrained_model_name_or_path: str | os.PathLike[str], **hub_options: Any
    ) -> ConfigT:
        """Reads `adapter_config.json` from a folder, or from a repository on the Hub.

        Args:
            pretrained_model_name_or_path: The folder, or the repository.
            **hub_options: Options of ``huggingface_hub.hf_hub_download``, such as `revision`.

        Returns:
            The config; its class is the method's.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file isn't JSON, its method isn't known, or an option has an invalid value.
        """
        return cls.from_file(adapter_file(pretrained_model_name_or_path, CONFIG_NAME, **hub_options))

    @classmethod
    def from_file(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
        """Reads a config file.

        Args:
            path: The file.

        Returns:
            The config; its class is the method's.

        Raises:
            CheckpointError: If the file isn't JSON, its method isn't known, or an option has an invalid value.
        """
        values = cls.from_json_file(path)
        try:
            cls._class_of(values.get("peft_type")).check_file(values)
            return cls.from_dict(values)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json`; an existing file is replaced atomically.

        Args:
            save_directory: The folder.
        """
        with Staging(Path(save_directory)) as staging:
            (staging.folder / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")
            staging.put()

    def to_json(self) -> str:
        """Returns the content of `adapter_config.json` as PEFT writes it: with sorted keys.

        Nested dicts keep their order, since of several patterns the first match counts.
        """
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2)

    def digest(self) -> str:
        """Returns a digest of the options that decide on the meaning of an adapter's tensors.

        Options with default values are left out, so that new options don't change the digest.
        """
        default, editable = _defaults(type(self)), self.editable
        values = {
            name: own.digest() if isinstance(own := getattr(self, name, None), ConfigJson) else value
            for name, value in self.to_dict().items()
            if name not in editable and (name not in default or value != default[name])
        }
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


@functools.cache
def _defaults(cls: Any) -> Mapping[str, Any]:
    """Returns the options' defaults as plain values."""
    return {field.name: default_of(field) for field in options(cls)}
