"""YAML and `key=value` overrides -> frozen dataclasses, with errors that say what to do."""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

# What fields were called in records and YAMLs of earlier versions, and what they are called now.
RENAMED = {
    "told": "timesteps",
    "tells": "sites",
    "watch": "validation",
    "judge_every": "every",
    "edge": "gradient_weight",
    "square": "mse_weight",
    "steady": "temporal_weight",
    "broken": "invalid_weight",
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and what is allowed."""


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """A `cls` from the YAML file at `path` (differences from the defaults) and dotted `key=value` overrides.

    A YAML may name another one under `base:`; its own keys win. Raises ConfigError for unknown keys, wrong types and
    impossible values, FileNotFoundError for a missing file.
    """
    bad = [o for o in overrides if "=" not in o]
    if bad:
        raise ConfigError(f"overrides are written key=value, got {bad[0]!r}")
    try:
        merged = OmegaConf.merge(read_yaml(path) if path else {}, parse(OmegaConf.from_dotlist, list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:  # OmegaConf: a list where keys are expected
        raise ConfigError(f"{path} and {list(overrides)} do not merge: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    return build(cls, {str(key): value for key, value in values.items()})


def settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The values that `key=value` words spell, typed as YAML would type them."""
    bad = [o for o in overrides if "=" not in o]
    if bad:
        raise ConfigError(f"settings are written key=value, got {bad[0]!r}")
    values = OmegaConf.to_container(parse(OmegaConf.from_dotlist, list(overrides)))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def parse(read: Any, source: Any) -> Any:
    """`read(source)`, with any complaint of the YAML parser as a ConfigError."""
    try:
        return read(source)
    except (OSError, OmegaConfBaseException):
        raise
    except Exception as error:  # the parser's own exceptions, whose package OmegaConf hides
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: str | Path, above: tuple[Path, ...] = ()) -> Any:
    """The merged OmegaConf node of a YAML file and the files it is based on; `above` are the files that led to it."""
    path = Path(path)
    if path.resolve() in above:
        raise ConfigError(f"base: goes in a circle: {' -> '.join(p.name for p in (*above, path))}")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"no config file {path}{hint}")
    node = parse(OmegaConf.load, path)
    base = node.pop("base", None) if OmegaConf.is_dict(node) else None
    return OmegaConf.merge(read_yaml(path.parent / base, (*above, path.resolve())), node) if base else node


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of dataclass `cls` from plain values; nested dataclasses and tuples are built by their types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.') or cls.__name__} must hold keys and values, got {values!r}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = renamed(values, set(known), where)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {where}{key}{hint}")
    hints = typing.get_type_hints(cls)
    kwargs = {key: convert(hints[key], value, f"{where}{key}") for key, value in values.items()}
    for f in known.values():
        if f.default is MISSING and f.default_factory is MISSING and f.name not in kwargs:
            raise ConfigError(f"{where}{f.name} is required")
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(f"{where.rstrip('.') or cls.__name__}: {error}") from error


def differences(cfg: Any) -> dict[str, Any]:
    """What a dataclass says beyond its defaults: a field that comes later changes nothing while nobody sets it."""
    found: dict[str, Any] = {}
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default:
            found[f.name] = differences(value) if is_dataclass(value) else value
    return found


def renamed(values: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    """`values` with the present names of fields; ConfigError where both names of one are given."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        new = RENAMED.get(key, key) if key not in known and RENAMED.get(key) in known else key
        if new in out or (new != key and new in values):
            raise ConfigError(f"{where}{key} is the former name of {where}{new}: give {new} alone")
        out[new] = value
    return out


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, or a ConfigError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return convert_union(args, value, where)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {value!r}")
        return build(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must hold {len(kinds)} values, got {len(value)}")
        return tuple(convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {value!r}")
        return {k: convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return convert_scalar(hint, value, where)


def convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise ConfigError(f"{where} must not be empty")
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return convert(arg, value, where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError("; or ".join(errors))


def convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float:
        return convert_float(value, where)
    if hint is int and isinstance(value, float) and value.is_integer():  # steps=1e4
        return int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {hint.__name__}, got {value!r} ({type(value).__name__})")


def convert_float(value: Any, where: str) -> float:
    """A finite number; YAML reads 1e-4 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where} must be a finite number, got {value!r} ({type(value).__name__})")
    return number
