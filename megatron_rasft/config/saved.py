"""The configuration that a run writes beside its checkpoints: config.json, which tools read, and config.toml for --config."""

import argparse
import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, Self

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.config_file import CONFIG_FLAG, flags_text
from megatron_rasft.files import write_json, write_text, written_to
from megatron_rasft.flags import flag_name

CONFIG_FILE = "config.json"
"""Name of the configuration's file in --save."""

FLAGS_FILE = "config.toml"
"""Name of the file with a run's flags in --save."""


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """The value of every flag of one run."""

    rasft: dict[str, Any] = field(default_factory=dict)
    """Group of this package's flags -> flag -> value."""
    megatron: dict[str, str] = field(default_factory=dict)
    """Megatron's argument -> value as text."""

    @classmethod
    def of(cls, args: argparse.Namespace, config: RasftConfig) -> Self:
        """Collects the values of the present run."""
        return cls(rasft=config.as_dict(), megatron={k: str(v) for k, v in sorted(vars(args).items())})

    @classmethod
    def read(cls, save: Path) -> Self | None:
        """Reads the configuration of the run that wrote ``save``; None if the folder has no ``CONFIG_FILE``.

        Raises:
            ValueError: the file does not hold a run's configuration.
        """
        path = save / CONFIG_FILE
        if not path.is_file():
            return None
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise ValueError(
                f"{path} does not hold the configuration of a run. Give the --save folder of a run, or delete this file to "
                "continue without it."
            ) from None

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Reads a configuration that this or another version has written. Parts that this version does not know are left out.

        Raises:
            ValueError: the content is not a configuration.
        """
        parts = [part.name for part in fields(cls)]
        found = (
            {name: content[name] for name in parts if name in content} if isinstance(content, dict) else {}
        )
        if not found or not all(isinstance(part, dict) for part in found.values()):
            raise ValueError(f"it has no objects {' and '.join(parts)}")
        return cls(**found)

    def write(self, save: Path) -> None:
        """Writes the configuration into a run's folder.

        Raises:
            RasftError: the file cannot be written.
        """
        path = save / CONFIG_FILE
        with written_to(path, "--save"):
            write_json(path, asdict(self))

    def changes(self, now: "SavedConfig") -> list[str]:
        """Describes the flags whose values differ from the present run's, such as ``--objective rasft -> sft``.

        A flag that the writing version did not have had this version's default.

        Of Megatron's arguments only those are compared that either run has on its command line, because others follow from the
        machine.
        """
        ours = {**_defaults(), **dict(_flags_of(self.rasft))}
        found = [
            f"{flag_name(name)} {ours[name]} -> {value}"
            for name, value in _flags_of(now.rasft)
            if name in ours and ours[name] != value
        ]
        given = self._given_flags() | now._given_flags()
        return found + [
            f"{given[name]} {self.megatron[name]} -> {now.megatron[name]}"
            for name in given
            if name in self.megatron and name in now.megatron and name not in ours
            if self.megatron[name] != now.megatron[name]
        ]

    def unknown_flags(self) -> list[str]:
        """The flags that this version does not have, with their values."""
        return [
            f"{flag_name(name)} {value}" for name, value in _flags_of(self.rasft) if name not in _defaults()
        ]

    def _given_flags(self) -> dict[str, str]:
        """Megatron's argument -> its flag as typed."""
        given: dict[str, str] = ast.literal_eval(self.megatron.get("given_flags", "{}"))
        return {name: flag for name, flag in given.items() if flag != CONFIG_FLAG}

    @property
    def hf_model(self) -> str | None:
        """The run's --hf-model; None if the file does not hold it."""
        path = self.rasft.get("run", {}).get("hf_model")
        return path if isinstance(path, str) else None


def _defaults() -> dict[str, str]:
    """Every flag of this package with its default, as ``_flags_of`` yields them."""
    return dict(_flags_of({title: kind.flag_fields() for title, kind in RasftConfig.sections().items()}))


def _flags_of(sections: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the fields of all sections with their values as JSON, in which a value that was read equals one that was not."""
    for flags in sections.values():
        for name, value in flags.items():
            if flag_name(name) != CONFIG_FLAG:  # the same flags may come from another file
                yield name, json.dumps(value).strip('"')


def write_flags(save: Path, given: Mapping[str, Any], config: RasftConfig) -> None:
    """Writes a file for --config, which gives the same run again.

    It has every flag of this package, so that later versions with other defaults give the same run too, and the given ones of Megatron.
    If an earlier start had other flags, its file is kept as config.1.toml, config.2.toml, ...

    Args:
        save: the run's --save.
        given: name of a flag -> value, for the flags on the command line and in the files of --config.

    Raises:
        RasftError: the file cannot be written.
    """
    path = save / FLAGS_FILE
    ours = config.as_dict()
    known = {name for section in RasftConfig.sections().values() for name in section.flag_fields()}
    ours["run"] = {name: value for name, value in ours["run"].items() if flag_name(name) != CONFIG_FLAG}
    megatron = {name: value for name, value in given.items() if name not in known}
    text = flags_text(
        {**ours, "megatron": megatron}, f"The flags of a run: pretrain_rasft.py {CONFIG_FLAG} {path}"
    )
    with written_to(path, "--save"):
        if path.exists() and path.read_text(encoding="utf-8") != text:
            path.rename(next(p for n in count(1) if not (p := save / f"config.{n}.toml").exists()))
        write_text(path, text)
