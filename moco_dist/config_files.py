"""Configurations in and out of YAML files and the command line; nothing else knows of YAML."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from moco_dist.config import FREE_ON_RESUME
from moco_dist.errors import ConfigError

Schema = TypeVar("Schema")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the whole configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def from_dict(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Return the configuration that `to_dict` made `values` of; unknown keys are errors."""
    try:
        return _to_object(schema, OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts under their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return 'key: old -> new' for each dotted key that differs and a resumed run must keep."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]


def load(schema: type[Schema], arguments: list[str]) -> Schema:
    """Return the configuration that the arguments give, applied left to right onto the defaults.

    An argument is a YAML file or an override `a.b=c`. Raises ConfigError, with one sentence, for an
    unknown key, a wrong type, a value out of range or a missing file.
    """
    config: Any = OmegaConf.structured(schema)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        try:
            if equals and not Path(argument).is_file():
                layer: Any = OmegaConf.from_dotlist([argument])
            else:
                layer = OmegaConf.load(_yaml_file(argument, schema))
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{argument}: not valid YAML ({_one_line(error)}); mend its syntax"
            ) from error
        if not OmegaConf.is_dict(layer):
            raise ConfigError(f"{argument}: holds no 'key: value' lines; see --help for the keys")
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{argument}: {_explain(error, schema, layer, key)}") from error
    return _to_object(schema, config)


def _to_object(schema: type[Schema], config: Any) -> Schema:
    found = OmegaConf.to_object(config)
    assert isinstance(found, schema), f"{schema.__name__} became {type(found).__name__}"
    return found


def _yaml_file(argument: str, schema: type[Any]) -> Path:
    path = Path(argument)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise ConfigError(
                f"{argument}: no such file; the project's own are in configs/pretrain "
                "and configs/probe"
            )
        return path
    near = _nearest(argument, _keys(schema))
    hint = f"did you mean '{near}=...'?" if near else "see --help for the keys"
    raise ConfigError(f"{argument}: neither a YAML file nor a key=value; {hint}")


def _keys(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the type of each dotted key of a schema."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        is_group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        keys |= _keys(kind, f"{prefix}{name}.") if is_group else {prefix + name: kind}
    return keys


def _nearest(key: str, keys: dict[str, Any]) -> str | None:
    last = key.rpartition(".")[2]
    by_last = {known.rpartition(".")[2]: known for known in reversed(keys)}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    close_last = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return close[0] if close else by_last[close_last[0]] if close_last else None


def _explain(error: OmegaConfBaseException, schema: type[Any], layer: Any, key: str) -> str:
    key = error.full_key or key
    keys = _keys(schema)
    if isinstance(error, ConfigKeyError):
        near = _nearest(key, keys)
        siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        way_out = (
            f"did you mean '{near}'?" if near else f"known there: {', '.join(siblings or keys)}"
        )
        return f"there is no key '{key}'; {way_out}"
    name = key.partition("[")[0]
    value = OmegaConf.select(layer, key) if "[" not in key else OmegaConf.select(layer, name)
    if name not in keys:
        inside = ", ".join(k for k in keys if k.startswith(name + "."))
        return f"'{name}' is a group and takes no value; set one of {inside or ', '.join(keys)}"
    return f"{name}={value} is not {_kind(keys[name])}"


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        return f"a list of {'whole numbers' if item is int else 'numbers'}, as [1,2,3]"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return kinds[annotation]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
