"""Reads and writes configurations as YAML files and key=value arguments."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from moco_dist import packaged
from moco_dist.config.recipe import FREE_ON_RESUME
from moco_dist.errors import ConfigError, shown

Schema = TypeVar("Schema")

# OmegaConf's choice, so that checking and loading parse a text the same way.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the whole configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def stored(path: Path) -> dict[str, Any]:
    """Return the leaves of a file that any version of `to_yaml` wrote, {} if it can't be read."""
    try:
        text = path.read_bytes().decode()
        # `to_yaml` writes no aliases, and a few of them could expand to terabytes.
        events = yaml.parse(text, Loader=_Loader)
        strange = any(isinstance(event, yaml.AliasEvent) for event in events)
        return {} if strange else flat(yaml.safe_load(text))
    except (yaml.YAMLError, *_BROKEN):
        return {}


def from_dict(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Return the configuration that `to_dict` turned into `values`; ConfigError for other keys."""
    try:
        for key, value in flat(values).items():
            for item in value if isinstance(value, list) else [value]:
                _check_text(key, item)
        return _to_object(schema, OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, *_BROKEN) as error:
        raise ConfigError(
            f"the stored configuration can't be read ({_one_line(error)}); use another one"
        ) from error


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts under their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        is_group = isinstance(value, dict)
        leaves |= flat(value, f"{prefix}{key}.") if is_group else {prefix + key: value}
    return leaves


def changed_keys(old: dict[str, Any], new: Any) -> list[str]:
    """Return 'key: old -> new' for each dotted key that differs and a resumed run must keep.

    `old` is from `to_dict`, possibly of an older version: a key that it lacks has its default,
    which is how runs behaved before the key existed. `new` is a configuration.
    """
    before, after = flat(to_dict(type(new)())) | flat(old), flat(to_dict(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in FREE_ON_RESUME
        and not key.startswith(tuple(group for group in FREE_ON_RESUME if group.endswith(".")))
    ]


def load(schema: type[Schema], arguments: list[str]) -> Schema:
    """Return the defaults with the arguments, YAML files or overrides `a.b=c`, applied in order.

    Raises ConfigError for an unknown key, a wrong type, a value out of range or a missing file.
    """
    config: Any = OmegaConf.structured(schema)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = shown(argument)
        override = bool(equals) and not os.path.isfile(argument)
        text = value if override else _read(argument, schema)
        try:
            known = _keys(schema)
            if override and not any(f"{full}.".startswith(f"{key}.") for full in known):
                raise ConfigError(f"{name}: {_no_key(key, known)}")
            _check_texts(name, text, mapping=not override)
            layer: Any
            if override:
                layer = OmegaConf.from_dotlist([argument])
                now, found = (OmegaConf.select(each, key) for each in (config, layer))
                # For a text key, no is not false, and 007 is not 7.
                if isinstance(now, str) and isinstance(found, int | float):
                    OmegaConf.update(layer, key, value)
            else:
                layer = OmegaConf.load(io.StringIO(text))
        except (yaml.YAMLError, OmegaConfBaseException, *_BROKEN) as error:
            raise ConfigError(
                f"{name}: not valid YAML ({_one_line(error)}); correct its syntax"
            ) from error
        try:
            config = OmegaConf.merge(config, layer)
        except (OmegaConfBaseException, *_BROKEN) as error:
            raise ConfigError(f"{name}: {_explain(error, schema, layer, key)}") from error
    try:
        return _to_object(schema, config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_one_line(error)}; see --help for the keys") from error


# What OmegaConf and PyYAML raise for some texts that are no configuration.
_BROKEN = (OSError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, KeyError)


def _to_object(schema: type[Schema], config: Any) -> Schema:
    found = OmegaConf.to_object(config)
    assert isinstance(found, schema), f"{schema.__name__} became {type(found).__name__}"
    return found


def _read(argument: str, schema: type[Any]) -> str:
    """Return the text of a YAML file; os.path returns False for a name that is too long."""
    name = shown(argument)
    if not os.path.isfile(argument) and (own := packaged.config(argument)):
        argument = str(own)
    if not argument.endswith((".yaml", ".yml")) and not os.path.exists(argument):
        near = _nearest(argument, _keys(schema))
        hint = f"did you mean '{near}=...'?" if near else "see --help for the keys"
        raise ConfigError(f"{name}: neither a YAML file nor a key=value; {hint}")
    if not os.path.isfile(argument):
        raise ConfigError(
            f"{name}: no such file; list the project's own with python -m moco_dist.packaged"
        )
    try:
        return Path(argument).read_bytes().decode()
    except OSError as error:
        raise ConfigError(
            f"{name}: can't be read ({error.strerror}); correct its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not valid YAML ({error}); save it as UTF-8") from error


def _check_texts(name: str, text: str, mapping: bool) -> None:
    """Raise ConfigError for a text in the YAML that OmegaConf would replace.

    With `mapping`, YAML must be empty or a mapping: OmegaConf would parse a lone text again.
    """
    nodes = (e for e in yaml.parse(text, Loader=_Loader) if isinstance(e, yaml.NodeEvent))
    for number, node in enumerate(nodes):
        if mapping and number == 0 and not isinstance(node, yaml.MappingStartEvent):
            raise ConfigError(f"{name}: holds no 'key: value' lines; see --help for the keys")
        if isinstance(node, yaml.ScalarEvent):
            _check_text(name, node.value)


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{name}: '{shown(value)}' has a '${{', which is not replaced here; let the shell do "
            "it, or write the value out"
        )
    if value == "???":
        raise ConfigError(f"{name}: '???' is no value; give one")


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


def _no_key(key: str, keys: dict[str, Any]) -> str:
    near = _nearest(key, keys)
    siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = f"did you mean '{near}'?" if near else f"use one of {', '.join(siblings or keys)}"
    return f"there is no key '{shown(key)}'; {hint}"


def _explain(error: Exception, schema: type[Any], layer: Any, key: str) -> str:
    keys = _keys(schema)
    if not isinstance(error, OmegaConfBaseException):  # a mapping in place of a list: no full_key
        lists = (k for k, kind in keys.items() if typing.get_origin(kind) is list)
        key = next((k for k in lists if OmegaConf.is_dict(OmegaConf.select(layer, k))), key)
    else:
        key = str(error.full_key or key)
    name = key.partition("[")[0]
    if isinstance(error, ConfigKeyError) or not any((k + ".").startswith(name + ".") for k in keys):
        return _no_key(key, keys)
    if name not in keys:
        inside = ", ".join(k for k in keys if k.startswith(name + "."))
        return f"'{name}' is a group and takes no value; set one of {inside or ', '.join(keys)}"
    value = OmegaConf.select(layer, key if "[" not in key else name)
    return f"{name}={shown(value)} is not {_kind(keys[name])}"


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        (item,) = typing.get_args(annotation)
        return f"a list of {'whole numbers' if item is int else 'numbers'} such as [1,2,3]"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return kinds[annotation]


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return shown(f"{error.problem} in line {error.problem_mark.line + 1}")
    return shown(" ".join(str(error).split()))
