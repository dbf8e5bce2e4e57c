"""Typed settings out of YAML: a dataclass describes them, `build` checks them, an error is one line with the key.

It exists because a typo in a recipe must not cost a run: unknown, missing, repeated and wrongly typed keys are errors
before work starts. Settings have no defaults in code, so a file shows everything that is set. What it gives up: only
the types that recipes need work (scalars, lists, fixed tuples, `dict[str, Any]`, unions, Literal, dataclasses).
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


@dataclass(frozen=True)
class Rule:
    """A condition on a value, for `Annotated[int, at_least(1)]`; `text` completes "expected an integer ..."."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """The value is `low` or more."""
    return Rule(f">= {low}", lambda value: value >= low)


def between(low: float, high: float) -> Rule:
    """The value is from `low` to `high`, both included."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


def above(low: float) -> Rule:
    """The value is more than `low`."""
    return Rule(f"> {low}", lambda value: value > low)


@dataclass(frozen=True)
class Variant:
    """A section whose keys depend on the value of one of them: `table[section[key]]` is its dataclass."""

    key: str
    table: Mapping[str, type]
    optional: bool = False  # null is allowed


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number (YAML 1.1 calls it text), a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is repeated", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or a mapping repeats a key; `source` and the position are named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{source}: not valid YAML ({where}{problem}).") from None


def keys(cls: type) -> Iterator[str]:
    """The dotted names of all settings of a dataclass; of a variant section, those of every variant."""
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        variant = _metadata(annotation, Variant)
        inner = list(variant[0].table.values()) if variant else [_section_of(_bare(annotation))]
        nested = [
            key for part in inner if isinstance(part, type) and is_dataclass(part) for key in keys(part)
        ]
        yield from dict.fromkeys(f"{name}.{key}" for key in nested) if nested else (name,)


def build(cls: type[T], value: Any, source: str, origins: Mapping[str, str] | None = None) -> T:
    """An instance of the dataclass `cls` from plain YAML values.

    Args:
        source: what the values came from, for messages.
        origins: dotted keys that came from elsewhere (an override), and what to call it.

    Raises:
        ValueError: a key is unknown (the nearest known one is named), missing, of the wrong type or out of range.
    """
    return _Builder(cls, source, origins or {}).section(cls, value, "")


@dataclass(frozen=True)
class _Builder:
    root: type
    source: str
    origins: Mapping[str, str]

    def error(self, key: str, message: str, or_below: bool = False) -> ValueError:
        """A message that begins with what set `key`: an override of it or of its section, or else the file."""
        at = [set_at for set_at in self.origins if f"{key}.".startswith(f"{set_at}.")]
        below = [set_at for set_at in self.origins if or_below and set_at.startswith(f"{key}.")]
        origin = self.origins[(at + below)[-1]] if at + below else self.source
        return ValueError(f"{origin}: {message}")

    def section(self, cls: type[T], value: Any, path: str) -> T:
        if not isinstance(value, Mapping):
            raise self.error(
                path, f"{path or 'the recipe'} is {value!r}: expected a mapping of keys to values."
            )
        hints = get_type_hints(cls, include_extras=True)
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in value:
            if key not in names:
                raise self.error(
                    f"{path}.{key}".lstrip("."), self.unknown(str(key), names, path), or_below=True
                )
        missing = [name for name in names if name not in value]
        if missing:
            name = f"{path}.{missing[0]}".lstrip(".")
            raise self.error(path, f"the key {name!r} is missing: expected {describe(hints[missing[0]])}.")
        return cls(
            **{name: self.value(hints[name], value[name], f"{path}.{name}".lstrip(".")) for name in names}
        )

    def unknown(self, key: str, names: list[str], path: str) -> str:
        prefix = f"{path}." if path else ""
        near = [prefix + name for name in difflib.get_close_matches(key, names, n=1)]
        if not near:  # right name, wrong section
            leaves = {known.rsplit(".", 1)[-1]: known for known in keys(self.root)}
            near = [leaves[name] for name in difflib.get_close_matches(key, leaves, n=1, cutoff=0.8)]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown key {prefix + key!r}.{hint} Known keys {f'in {path}' if path else 'here'}: {', '.join(names)}."

    def value(self, annotation: Any, value: Any, path: str) -> Any:
        if variant := _metadata(annotation, Variant):
            return self.variant(variant[0], value, path)
        bare = _bare(annotation)
        section = _section_of(bare)
        if is_dataclass(section):
            if bare is section:
                return self.section(section, value, path)  # type: ignore[arg-type]
            if get_origin(bare) is not list:
                return None if value is None else self.section(section, value, path)  # type: ignore[arg-type]
            if not isinstance(value, list) or not value:
                raise self.error(path, f"{path} is {value!r}: expected a list of mappings, at least one.")
            return [self.section(section, item, f"{path}[{number}]") for number, item in enumerate(value)]  # type: ignore[arg-type]
        try:
            result = _convert(bare, value)
        except TypeError:
            shown = f"{value!r} ({type(value).__name__})" if value is not None else "null"
            raise self.error(path, f"{path} is {shown}: expected {describe(annotation)}.") from None
        for rule in _metadata(annotation, Rule):
            if result is not None and not rule.holds(result):
                raise self.error(path, f"{path} is {value!r}: expected {describe(annotation)}.")
        return result

    def variant(self, variant: Variant, value: Any, path: str) -> Any:
        if value is None and variant.optional:
            return None
        choices = ", ".join(variant.table)
        if not isinstance(value, Mapping) or variant.key not in value:
            raise self.error(path, f"{path} needs the key {variant.key!r}: expected one of {choices}.")
        name = value[variant.key]
        if not isinstance(name, str) or name not in variant.table:
            near = difflib.get_close_matches(str(name), variant.table, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise self.error(
                f"{path}.{variant.key}", f"{path}.{variant.key} is {name!r}.{hint} Expected one of {choices}."
            )
        return self.section(variant.table[name], value, path)


def describe(annotation: Any) -> str:
    """What a value of this type looks like, in words: "an integer >= 1, or null"."""
    rules = " and ".join(rule.text for rule in _metadata(annotation, Rule))
    if variant := _metadata(annotation, Variant):
        null = ", or null" if variant[0].optional else ""
        return f"a mapping whose {variant[0].key!r} is one of {', '.join(variant[0].table)}{null}"
    bare = _bare(annotation)
    origin, arguments = get_origin(bare), get_args(bare)
    if bare in _SCALARS:
        text = _SCALARS[bare]
    elif origin is Literal:
        text = f"one of {', '.join(map(str, arguments))}"
    elif origin in (Union, types.UnionType):
        text = " or ".join("null" if part is type(None) else describe(part) for part in arguments)
    elif origin is list:
        text = f"a list, each item {describe(arguments[0])}"
    elif origin is tuple:
        text = f"a list of {len(arguments)}, each {describe(arguments[0])}"
    else:
        text = "a mapping of keys to values"
    return f"{text} {rules}".rstrip()


def _convert(annotation: Any, value: Any) -> Any:
    """`value` as `annotation`, or TypeError. Integers pass as floats, nothing else is converted."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        result = _convert(arguments[0], value)
        if not all(rule.holds(result) for rule in _metadata(annotation, Rule)):
            raise TypeError
        return result
    if origin in (Union, types.UnionType):
        for part in arguments:
            try:
                return _convert(part, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise TypeError
        return value
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], item) for item in value]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_convert(part, item) for part, item in zip(arguments, value, strict=True))
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    if annotation is type(None) and value is None:
        return None
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in _SCALARS and type(value) is annotation:
        return value
    raise TypeError


def _section_of(annotation: Any) -> Any:
    """The dataclass in `Section`, `Section | None` and `list[Section]`; anything else as it is."""
    parts = [part for part in get_args(annotation) if is_dataclass(part)]
    return parts[0] if len(parts) == 1 else annotation


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metadata(annotation: Any, kind: type[T]) -> list[T]:
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [extra for extra in extras if isinstance(extra, kind)]
