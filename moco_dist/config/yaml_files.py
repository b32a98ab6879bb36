"""Reads and writes configurations as YAML files and key=value arguments.

The type of a key decides how its value is read, never the look of the value: YAML would take 010
for 8, 1:30 for 90 and no for false, and would cut a path at ' #'.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

import yaml
from yaml.constructor import ConstructorError

from moco_dist import packaged
from moco_dist.config.recipe import FREE_ON_RESUME
from moco_dist.config.rules import of_sweep
from moco_dist.errors import ConfigError, shown

Schema = TypeVar("Schema")

# Python's, because libyaml refuses the escapes of a path that is not UTF-8.
_Loader = yaml.SafeLoader
_TAG = "tag:yaml.org,2002:"
# Levels of a configuration are two or three; the time of PyYAML grows with their square.
_DEEPEST = 20
_TAGS = {*_Loader.yaml_constructors, f"{_TAG}merge", f"{_TAG}value"}
# What PyYAML raises besides its own errors for some texts that are no configuration.
_BROKEN = (OSError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, KeyError)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the whole configuration as YAML text."""
    text = str(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    if set(text) & set("\x85\u2028\u2029"):  # which are read as spaces unless they are escaped
        text = str(yaml.safe_dump(to_dict(config), sort_keys=False))
    return text


def stored(path: Path) -> dict[str, Any]:
    """Return the leaves of a file that any version of `to_yaml` wrote, {} if it can't be read."""
    try:
        text, depth = path.read_bytes().decode(), 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            # `to_yaml` writes no aliases, and a few of them could expand to terabytes.
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
                return {}
        return flat(yaml.safe_load(text))
    except (yaml.YAMLError, *_BROKEN):
        return {}


def from_dict(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Return the configuration that `to_dict` turned into `values`; ConfigError for other keys."""
    keys = _keys(schema)
    try:
        found = flat(values)
        for key, value in found.items():
            if key not in keys:
                raise ConfigError(_no_key(key, keys))
            found[key] = _converted(keys[key], value, _same)
        return _built(schema, flat(to_dict(schema())) | found)
    except _BROKEN as error:
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
        if before.get(key) != after.get(key) and not is_among(key, FREE_ON_RESUME)
    ]


def is_among(key: str, keys: Collection[str]) -> bool:
    """Return whether a dotted key is one of `keys`, or in one of those groups that end in a dot."""
    return key in keys or key.startswith(tuple(each for each in keys if each.endswith(".")))


def load(schema: type[Schema], arguments: list[str]) -> Schema:
    """Return the defaults with the arguments, YAML files or overrides `a.b=c`, applied in order.

    A run of a W&B sweep gets its id into its name, unless an argument gives one.

    Raises ConfigError for an unknown key, a wrong type, a value out of range or a missing file.
    """
    keys, values = _keys(schema), flat(to_dict(schema()))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        try:
            if equals and not os.path.isfile(argument):
                found = _override(key, value, keys)
            else:
                text = _read(argument, keys)
                node = yaml.compose(text, _Loader)
                if node and not isinstance(node, yaml.MappingNode):
                    raise ConfigError("holds no 'key: value' lines; see --help for the keys")
                found = _leaves(node, "", keys, text) if node else {}
            for group in (each for each in found if found[each] is None):  # null takes all back
                values = {k: v for k, v in values.items() if not k.startswith(f"{group}.")}
            values |= found
        except ConfigError as error:
            raise ConfigError(f"{shown(argument)}: {error}") from error
        except (yaml.YAMLError, *_BROKEN) as error:
            raise ConfigError(
                f"{shown(argument)}: not valid YAML ({_one_line(error)}); correct its syntax"
            ) from error
    if values["name"] and not any(argument.startswith("name=") for argument in arguments):
        values["name"] += of_sweep()
    return _built(schema, values)


def _built(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Return the configuration with `values` under all its dotted keys."""
    parts: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        inside, group = _inside(name, values), _group(kind)
        if group is None or not inside:
            parts[name] = values[name]
        elif group is kind:
            parts[name] = _built(group, inside)
        else:  # NAME_2 changes keys of NAME
            base = name.rpartition("_")[0]
            try:
                parts[name] = _built(group, _inside(base, values) | inside)
            except ConfigError as error:
                raise ConfigError(str(error).replace(f"{base}.", f"{name}.")) from error
    return schema(**parts)


def _inside(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a group's keys."""
    start = f"{group}."
    return {key.removeprefix(start): values[key] for key in values if key.startswith(start)}


def _group(kind: Any) -> Any:
    """Return the schema of a group, or of one that may be null; None for other types."""
    kinds = (kind, *typing.get_args(kind))
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _override(key: str, value: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the values of 'key=value', which are several where the key is a group."""
    if not any(f"{known}.".startswith(f"{key}.") for known in keys):
        raise ConfigError(_no_key(key, keys))
    if key in keys and keys[key] is not NoneType and typing.get_origin(keys[key]) is not list:
        if len(value) > 1 and value[0] in "'\"" and value[0] == value[-1]:
            with suppress(yaml.YAMLError):  # of two quoted names, or the beginning of a longer one
                node = yaml.compose(value, _Loader)
                value = node.value if isinstance(node, yaml.ScalarNode) else value
        return _leaves(yaml.ScalarNode(f"{_TAG}str", value), key, keys, value)
    node = yaml.compose(value, _Loader) or yaml.ScalarNode(f"{_TAG}str", "")
    return _leaves(node, key, keys, value)


def _leaves(node: yaml.Node, key: str, keys: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the values of a node of `text`, which stands at the dotted `key`, '' for all."""
    if node.tag not in _TAGS:
        problem = f"could not determine a constructor for the tag '{node.tag}'"
        raise ConstructorError(None, None, problem, node.start_mark)
    if key in keys and not (keys[key] is NoneType and isinstance(node, yaml.MappingNode)):
        try:
            return {key: _converted(keys[key], node, _parsed)}
        except _BROKEN as error:
            mark, end = node.start_mark, node.end_mark
            here = text[mark.index : end.index].strip() if mark else node.value
            raise ConfigError(f"{key}={shown(here)} is not {_kind(keys[key])}") from error
    if key and not any(known.startswith(f"{key}.") for known in keys):
        raise ConfigError(_no_key(key, keys))
    if not isinstance(node, yaml.MappingNode):
        if key and isinstance(node, yaml.ScalarNode) and node.start_mark and not node.value:
            return {}  # a group of which all lines are comments
        inside = ", ".join(known for known in keys if known.startswith(f"{key}."))
        raise ConfigError(f"'{key}' is a group and takes no value; set one of {inside}")
    found: dict[str, Any] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise ConstructorError(None, None, "found a key that is no text", name.start_mark)
        leaves = _leaves(value, f"{key}.{name.value}" if key else name.value, keys, text)
        if twice := leaves.keys() & found.keys():
            problem = f"found duplicate key {min(twice).removeprefix(f'{key}.')}"
            raise ConstructorError(None, None, problem, name.start_mark)
        found |= leaves
    return found


def _read(argument: str, keys: dict[str, Any]) -> str:
    """Return the text of a YAML file; os.path returns False for a name that is too long."""
    if not os.path.isfile(argument) and (own := packaged.config(argument)):
        argument = str(own)
    if not argument.endswith((".yaml", ".yml")) and not os.path.exists(argument):
        near = _nearest(argument, keys)
        hint = f"did you mean '{near}=...'?" if near else "see --help for the keys"
        raise ConfigError(f"neither a YAML file nor a key=value; {hint}")
    if not os.path.isfile(argument):
        raise ConfigError("no such file; list the project's own with python -m moco_dist.packaged")
    try:
        return Path(argument).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"can't be read ({error.strerror}); correct its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not valid YAML ({error}); save it as UTF-8") from error


def _converted(kind: Any, given: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """Return what is `given` as a value of a type; ValueError if it is none.

    `convert` does so for all that are not lists.
    """
    if typing.get_origin(kind) is list:
        items = given.value if isinstance(given, yaml.SequenceNode) else given
        if not isinstance(items, list) or isinstance(given, yaml.MappingNode):
            raise ValueError("no list")
        return [_converted(typing.get_args(kind)[0], item, convert) for item in items]
    value = convert(kind, given)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"'{shown(value)}' has a '${{', which is not replaced here; let the shell do it, or "
            "write the value out"
        )
    if value == "???":
        raise ConfigError("'???' is no value; give one")
    return value


def _parsed(kind: Any, node: yaml.Node) -> Any:
    """Return a scalar as a value of a type: numbers are decimal, texts are as they stand."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("no scalar")
    text = node.value
    if "${" in text or text == "???":
        return text  # refused with a sentence of its own
    if typing.get_origin(kind) is Literal:
        return _same(kind, text)
    if kind is bool:
        return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.strip().lower()]
    if kind is str:
        return text
    if kind is NoneType:
        return {"null": None, "~": None, "": None}[text.strip().lower()]
    if not text.isascii():
        raise ValueError("digits of another script")
    # YAML writes .inf and .nan, which the rule for numbers refuses with a sentence of its own.
    special = text.strip().lower().replace(".inf", "inf").replace(".nan", "nan")
    return int(text) if kind is int else float(special)


_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


def _same(kind: Any, value: Any) -> Any:
    """Return a value that has its type already; ValueError if it has not."""
    if typing.get_origin(kind) is Literal:
        fits = value in typing.get_args(kind)
    else:
        wanted = (int, float) if kind is float else kind
        fits = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{shown(value)} is not {_kind(kind)}")
    return float(value) if kind is float else value


def _keys(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return the type of each dotted key of a schema; a group that may be null is one itself."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        group = _group(kind)
        if group is not kind:
            keys[prefix + name] = NoneType if group else kind
        if group:
            keys |= _keys(group, f"{prefix}{name}.")
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


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        things = {int: "whole numbers such as [1,2,3]", str: "words such as [a=1,b=2]"}
        return f"a list of {things.get(typing.get_args(annotation)[0], 'numbers such as [1,2,3]')}"
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds[NoneType] = "a group of keys, or null"
    return kinds[annotation]


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return shown(f"{error.problem} in line {error.problem_mark.line + 1}")
    return shown(" ".join(str(error).split()))
