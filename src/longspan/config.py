"""Configuration: frozen keyword-only dataclasses, built from TOML or JSON data, checked field by field.

A configuration class is a plain `@dataclass(frozen=True, kw_only=True)` whose every field has a default. `from_dict`
builds one (nested ones too); its errors name the field and suggest the nearest valid name. `to_dict` is its inverse;
`override` applies `--set a.b=c`.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from longspan.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: `; did you mean 'x'?` if a similar one exists,
    else the list of known names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration dataclass from plain data.

    Args:
        cls: the dataclass.
        data: field names to plain values (as read from TOML or JSON).
        where: name of the data in error messages, such as `model`.

    Raises:
        ConfigError: an unknown field (with the nearest name) or a value of the wrong type.
    """
    assert dataclasses.is_dataclass(cls)
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a table of fields, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r}{nearest(str(name), known)}")
        values[name] = _convert(hints[name], value, f"{where}.{name}")
    return typing.cast(T, cls(**values))


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert a value to the type of its hint: int to float, list to tuple, table to dataclass.

    Raises:
        ConfigError: the value does not have that type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} = {value!r} is not one of {', '.join(repr(a) for a in args)}")
        return value
    if origin is tuple or hint is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        element = args[0] if args else Any
        return tuple(_convert(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert a value to the first of several types that fits; arguments as in `_convert`."""
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise errors[0] if len(errors) == 1 else ConfigError(f"{where}: expected {expected}, got {value!r}")


def to_dict(config: Any) -> Any:
    """Convert a configuration to plain data (dicts, lists, numbers, strings); `from_dict` inverts it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Return a copy of plain data with one assignment `a.b=c` applied; numbers in the path index lists
    (`model.mixers.0.window=64`).

    The value is read as TOML (`3`, `0.1`, `true`, `[1, 2]`, `"text"`); if it is not TOML, it is taken as a string.

    Raises:
        ConfigError: there is no `=`, or the path leads through something that is not a table or a list.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {assignment!r}: expected a.b=c, for example train.steps=100")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    changed = json.loads(json.dumps(data))
    node = changed
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                where = ".".join(keys[:depth])
                raise ConfigError(
                    f"--set {assignment!r}: {key!r} is not an index of a list of length {len(node)}, {where}; indices "
                    "start at 0"
                )
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not last:
                node.setdefault(key, {})
        else:
            raise ConfigError(
                f"--set {assignment!r}: {'.'.join(keys[:depth])} is a value, not a table; it has no fields to set"
            )
        if last:
            node[index] = value
        else:
            node = node[index]
    return typing.cast(dict[str, Any], changed)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the data of a TOML file.

    Raises:
        ConfigError: the file does not exist, or is not TOML (with the line).
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `longspan train` needs a recipe in TOML") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def check_least(config: Any, where: str, least_of: Mapping[str, float]) -> None:
    """Check that fields, where they are set, are not below their smallest allowed value.

    Raises:
        ConfigError: names the first field that is too small.
    """
    for name, least in least_of.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{where}.{name} = {value}: must be at least {least}")


def check_shares(config: Any, where: str, names: Iterable[str]) -> None:
    """Check that fields are between 0 and 1, both included.

    Raises:
        ConfigError: names the first field outside.
    """
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{where}.{name} = {getattr(config, name)}: must be from 0 to 1")


def check_fractions(config: Any, where: str, names: Iterable[str]) -> None:
    """Check that fields are between 0 and 1, both excluded.

    Raises:
        ConfigError: names the first field outside.
    """
    for name in names:
        if not 0 < getattr(config, name) < 1:
            raise ConfigError(f"{where}.{name} = {getattr(config, name)}: must be greater than 0 and less than 1")
