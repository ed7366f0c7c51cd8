"""Reads a configuration from a YAML file and from command-line flags, which override the file.

Flags have Megatron-LM's names where it has an equivalent (``--tensor-model-parallel-size``, ``--lr-decay-style``). The
YAML file uses the same names with underscores, grouped by section. Both go through the same validation: an unknown key
or an invalid type gives the same one-line error wherever it was written.
"""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from tidar_megatron.config.checks import check_config
from tidar_megatron.config.sections import Sources
from tidar_megatron.config.tree import Config, ResolvedConfig
from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, probably_meant

SECTIONS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Config)}
# flag name -> its section; flags are flat as in Megatron-LM, so a name may appear in one section only
FIELDS: dict[str, str] = {field.name: name for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values()), (
    "a flag name appears in two sections"
)
_VALIDATOR = TypeAdapter(Config)  # building one takes 10 ms
HELP = {field.name: field.metadata["help"] for cls in SECTIONS.values() for field in dataclasses.fields(cls)}


def flag(name: str) -> str:
    """Return the flag of a field: ``seq_length`` -> ``--seq-length``."""
    return "--" + name.replace("_", "-")


def _is_switch(section: str, name: str) -> bool:
    return next(f.type for f in dataclasses.fields(SECTIONS[section]) if f.name == name) is bool


def build_config(
    tree: dict[str, Any], source: str = "config", flags: dict[str, dict[str, Any]] | None = None
) -> Config:
    """Validate a nested dict of plain values and return the configuration.

    Args:
        tree: section -> field -> value.
        source: Where the values come from, for messages.
        flags: The part of ``tree`` that came from the command line, for messages.

    Raises:
        UserError: The message is one line that names the unknown key or the value of an invalid type.
    """
    for name, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and FIELDS.get(key) == name and not _is_switch(name, key):
                raise UserError(
                    f"{source}: {name}.{key} ({flag(key)}): is not a switch, got {value!r}; "
                    "YAML reads an unquoted yes, no, on or off as a boolean: quote the word"
                )
    try:
        config = _VALIDATOR.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        where = f"{source}: {'.'.join(path)}"
        if first["type"] == "unexpected_keyword_argument":
            hint = probably_meant(path[-1], HELP if len(path) > 1 else dict.fromkeys(SECTIONS))
            there = f" in section {FIELDS[hint]!r}" if hint and len(path) > 1 and FIELDS[hint] != path[0] else ""
            here = f" (did you mean {hint!r}{there}?)" if hint else ""
            raise UserError(f"{where}: unknown key{here}") from None
        if path[-1] in FIELDS:
            given = path[-1] in (flags or {}).get(path[0], {})
            where = flag(path[-1]) if given else f"{where} ({flag(path[-1])})"
        raise UserError(f"{where}: {first['msg']}, got {first['input']!r}") from None
    check_config(config)
    return config


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys; PyYAML's would silently keep the later value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping node as a dict.

        Raises:
            yaml.YAMLError: A key is duplicated; the message names it.
        """
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value!r} appears twice, the second time on line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: dict[str, dict[str, Any]] | None = None) -> Config:
    """Read a YAML file and return the configuration.

    Args:
        path: The YAML file.
        overrides: section -> field -> value; these override the file.

    Raises:
        UserError: The file cannot be read, is not YAML, or does not hold a valid configuration.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    # ValueError: an invalid date, or bytes that are not UTF-8; TypeError: a list as a key; RecursionError: deep nesting
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: must hold sections such as 'model:', not {type(tree).__name__}")
    for name, values in (overrides or {}).items():
        if not isinstance(tree.setdefault(name, {}) or {}, dict):
            break  # build_config names it in its error
        tree[name] = {**(tree[name] or {}), **values}
    return build_config({k: {} if v is None else v for k, v in tree.items()}, str(path), overrides)


def load_resolved_config(path: str | Path) -> ResolvedConfig:
    """Read the resolved configuration of a run's folder.

    Raises:
        UserError: The file is missing, or was not written by a run.
    """
    return ResolvedConfig.of(load_config(path), f"{path}: model.vocab_size is missing; copy the run's folder again")


def parse_config(argv: list[str] | None = None, description: str = "") -> Config:
    """Parse a training program's command line: ``--config FILE.yaml``, and one flag per field that overrides it.

    Args:
        argv: The arguments; by default those of the process.
        description: The program's description in ``--help``.

    Raises:
        UserError: An argument or the configuration is invalid.
    """
    parser = OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with the sections below; flags override it")
    for name, cls in SECTIONS.items():
        group = parser.add_argument_group(name, (cls.__doc__ or "").split("\n")[0])
        for field in dataclasses.fields(cls):
            default = "" if field.default in (None, ()) else f" [{field.default}]"
            kind: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%") + default}
            if field.type is Sources:
                kind |= {"nargs": "+", "metavar": "PATH"}
            elif typing.get_origin(field.type) is tuple:
                kind |= {"nargs": "+", "metavar": "|".join(typing.get_args(typing.get_args(field.type)[0])) or "NAME"}
            elif field.type is bool:
                kind["action"] = argparse.BooleanOptionalAction
            else:
                choices = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
                kind["metavar"] = "|".join(choices) or field.name.upper()
            group.add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    overrides: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        overrides.setdefault(FIELDS[name], {})[name] = value
    return load_config(path, overrides) if path else build_config(overrides, source="command line")
