"""Layouts as data: a YAML file in conversion/ says how the tensors of one are named and made from the hub's, both ways.

The hub's per-expert names are the canonical form. A row of a table names tensors of the hub (`hub`) and the tensor, or
tensors, that hold the same numbers in the layout (`here`):

* one to one: a new name;
* several to one: put one above the other (gate and up in one matrix);
* `<expert>` in `hub` alone: the experts of a layer stacked under a new first dimension;
* `op: split_heads`: kv_b_proj, whose rows are per head those of the keys and those of the values, as two stacks over heads,
  the keys' matrices transposed.

Names are only ever made from the hub's, so a table is read in one direction and works in both. The schema is in
conversion/README.md; this file knows names, arrange.py what becomes of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .. import resources
from ..manifest import SIZE_KEYS, expected_tensors

CODECS = ("bf16", "fp8", "int4", "affine")
SPLITS = ("rows", "columns", "experts")
OPS = ("split_heads",)
# What a weight X.weight is stored as, by codec: local names in the hub's layouts, and MLX's for "affine".
PARTS: Mapping[str, tuple[str, ...]] = {
    "bf16": ("weight",),
    "fp8": ("weight", "weight_scale_inv"),
    "int4": ("weight_packed", "weight_scale", "weight_shape"),
    "affine": ("weight", "scales", "biases"),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of the hub's names
_DIGITS = re.compile(r"\d+")
_LAYER, _EXPERT = re.compile(r"layers\.\d+\."), re.compile(r"experts\.\d+\.")
_VARIABLE = re.compile(r"<(\w+)>")
_KEYS = {
    "about",
    "names",
    "prefix",
    "codecs",
    "dtype",
    "parts",
    "mtp",
    "files",
    "tensors",
    "drop",
    "config",
    "shared",
}
_ROW_KEYS = {"hub", "here", "also", "op", "split", "layers"}
_LAYERS = ("dense", "moe")


class Shape(NamedTuple):
    """What names depend on beside themselves: which layers have experts, and where MTP layers begin."""

    num_layers: int
    first_dense: int
    moe_every: int
    num_experts: int

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> Shape:
        """Of the text part of a config.json."""
        return cls(
            text["num_hidden_layers"],
            text["first_k_dense_replace"] or 0,
            text.get("moe_layer_freq") or 1,
            text["n_routed_experts"],
        )

    def kind(self, layer: int) -> str:
        """ "dense" or "moe"."""
        return "moe" if layer >= self.first_dense and layer % self.moe_every == 0 else "dense"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        hub: names of the hub's tensors, with <layer> and <expert>.
        here: names in the layout; more than one only with an `op`.
        also: other spellings, which are read but not written.
        op: of OPS, or None.
        split: what model-parallel ranks share: of SPLITS, or None (each has it whole).
        layers: of "dense" and "moe", or None for both.
    """

    hub: tuple[str, ...]
    here: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()
    op: str | None = None
    split: str | None = None
    layers: str | None = None

    @cached_property
    def stacked(self) -> bool:
        """Whether the experts of a layer are one tensor."""
        return "<expert>" in self.hub[0] and "<expert>" not in self.here[0]


class Group(NamedTuple):
    """Tensors of the layout and those of the hub that they are made from.

    Attributes:
        row: how.
        here: names in the layout, the first spelling of the row.
        members: the hub's names; of a stack expert by expert, and of each the row's order.
        also: other spellings of `here`.
    """

    row: Row
    here: tuple[str, ...]
    members: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()


class Drop(NamedTuple):
    """Names that are no weights, and why they may go."""

    name: str
    why: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """The name as a regular expression; <layer> and <expert> are numbers, * anything."""
        text = re.escape(self.name)
        for variable in ("<layer>", "<expert>"):
            text = text.replace(re.escape(variable), r"\d+")
        return re.compile(text.replace(r"\*", ".*"))


@dataclass(frozen=True)
class Layout:
    """A layout, as its YAML file says.

    Attributes:
        name: the file's stem.
        about: whose layout it is, in a sentence.
        rows: see the module docstring.
        hub_names: tensors without a row have the hub's names; if not, they are an error.
        prefix: before every name.
        codecs: the weight formats it can hold.
        dtype: that unquantised weights are brought to, or None to keep theirs.
        parts: the hub's local name of a part of a quantised weight -> the layout's.
        mtp: "same": multi-token-prediction layers are named as others; None: the layout has none; or a prefix, that of a
            layer, and what stands there for MTP layer number <mtp>: first what is written, then other spellings.
        shared: tensors of the hub that the layout leaves out because they repeat others -> those others.
        files: name of a model-parallel rank's file, with <rank> and <ranks>; None for shards with an index.
        drop: what it may hold besides.
        config: "hub", "k25" (the text part inside a wrapper) or "mlx": what its config.json is like.
    """

    name: str
    about: str
    rows: tuple[Row, ...]
    codecs: tuple[str, ...]
    hub_names: bool = False
    prefix: str = ""
    dtype: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    mtp: str | tuple[str, tuple[str, ...]] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    files: str | None = None
    drop: tuple[Drop, ...] = ()
    config: str = "hub"

    def groups(self, names: Iterable[str], shape: Shape) -> Iterator[Group]:
        """The tensors of a model with these canonical names, in their order.

        Raises:
            ValueError: a name that no row claims, or an expert or projection that its stack lacks; MTP layers where the
                layout has none are left out.
        """
        waiting: dict[tuple[str, ...], tuple[Row, dict[tuple[int, int], str], Any]] = {}
        for name in names:
            found = self._row(name, shape)
            if found is None:
                continue
            row, position, expert, here = found
            if row is None or (len(row.hub) == 1 and not row.stacked):
                only = row or _IDENTITY
                yield Group(only, here[0], (name,), here[1:])
                continue
            key = here[0]
            if key not in waiting:
                waiting[key] = (row, {}, here[1:])
            members = waiting[key][1]
            members[expert if row.stacked else 0, position] = name
            if len(members) == len(row.hub) * (shape.num_experts if row.stacked else 1):
                _, members, also = waiting.pop(key)
                yield Group(row, key, tuple(members[one] for one in sorted(members)), also)
        for key, (row, members, _) in waiting.items():
            wanted = len(row.hub) * (shape.num_experts if row.stacked else 1)
            raise ValueError(
                f"{self.name} makes {key[0]} of {wanted} tensors, but there are {len(members)}, such as "
                f"{next(iter(members.values()))}: expected all of them."
            )

    def part(self, name: str, local: str) -> str:
        """The name of a part of a quantised weight, from the name of the weight."""
        stem, _, leaf = name.rpartition(".")
        local = self.parts.get(local, local)
        return f"{stem}.{local}" if leaf == "weight" else name.replace("weight", local)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The names of rows, all spellings and parts, their numbers and variables replaced by #."""
        found = set()
        for row in (*self.rows, *(_hub_rows(self._overridden) if self.hub_names else ())):
            for spelling in (row.here, *row.also):
                for here in spelling:
                    names = [here]
                    if isinstance(self.mtp, tuple):
                        names += [here.replace(self.mtp[0], place) for place in self.mtp[1]]
                    for name in names:
                        found.add(name)
                        if name.endswith("weight"):
                            found |= {
                                self.part(name, local) for codec in self.codecs for local in PARTS[codec]
                            }
        return frozenset(kind_of(self.prefix + _VARIABLE.sub("0", name)) for name in found)

    def repeated(self, name: str) -> str | None:
        """The canonical name of what `name` repeats, which the layout has instead of it; None: it has its own."""
        return self.shared.get(_NUMBER.sub("<layer>", name)) if self.shared else None

    @cached_property
    def _overridden(self) -> set[str]:
        return {hub for row in self.rows for hub in row.hub}

    @cached_property
    def _by_kind(self) -> dict[str, list[tuple[Row, int]]]:
        found: dict[str, list[tuple[Row, int]]] = {}
        for row in self.rows:
            for position, hub in enumerate(row.hub):
                found.setdefault(_VARIABLE.sub("#", hub), []).append((row, position))
        return found

    def _row(self, name: str, shape: Shape) -> tuple[Row | None, int, int, Any] | None:
        """The row of a canonical name, its place in it, its expert, and all spellings of what it becomes; None: no place."""
        numbers: list[str] = []

        def keep(match: re.Match[str]) -> str:
            numbers.append(match[0])
            return "#"

        kind = _NUMBER.sub(keep, name)
        layer = int(numbers[0]) if numbers else -1
        beyond = layer >= shape.num_layers
        if (beyond and self.mtp is None) or self.repeated(name) is not None:
            return None
        rows = [
            (row, position)
            for row, position in self._by_kind.get(kind, ())
            if row.layers is None or row.layers == shape.kind(layer)
        ]
        if not rows:
            if self.hub_names:
                return None, 0, 0, ((self.prefix + name,),)
            raise ValueError(
                f"{self.name} has no row for {name}: expected one in conversion/{self.name}.yaml."
            )
        if len(rows) > 1:
            raise ValueError(
                f"{self.name} has {len(rows)} rows for {name} ({', '.join(row.here[0] for row, _ in rows)}): expected one."
            )
        row, position = rows[0]
        expert = int(numbers[1]) if len(numbers) > 1 else 0
        values = {"<layer>": str(layer), "<expert>": str(expert), "<mtp>": str(layer - shape.num_layers)}
        moves: list[tuple[str, str] | None] = [None]
        if beyond and isinstance(self.mtp, tuple):
            moves = [(self.mtp[0], place) for place in self.mtp[1]]
        return (
            row,
            position,
            expert,
            tuple(
                tuple(self.prefix + _fill(here, values, move) for here in spelling)
                for move in moves
                for spelling in (row.here, *row.also)
            ),
        )


_IDENTITY = Row(("*",), ("*",))


def _fill(template: str, values: Mapping[str, str], move: tuple[str, str] | None) -> str:
    if move is not None and "<mtp>" not in template:
        template = template.replace(*move)
    for variable, value in values.items():
        if variable in template:
            template = template.replace(variable, value)
    return template


def kind_of(name: str) -> str:
    """A name, its numbers replaced by #: what thousands of tensors have in common."""
    return _DIGITS.sub("#", name)


@lru_cache
def _hub_names() -> frozenset[str]:
    """The hub's names with variables, for what a layout does not name otherwise: those of the smallest models."""
    sizes = dict.fromkeys(SIZE_KEYS, 1) | {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    }
    more = {"attention_bias": True, "num_nextn_predict_layers": 1}
    found = (
        name for rank in (None, 1) for name in expected_tensors(sizes | more | {"q_lora_rank": rank}, "none")
    )
    return frozenset(_EXPERT.sub("experts.<expert>.", _LAYER.sub("layers.<layer>.", name)) for name in found)


def _hub_rows(without: set[str]) -> Iterator[Row]:
    return (Row((name,), (name,)) for name in _hub_names() if name not in without)


def names() -> list[str]:
    """The layouts there are: the stems of conversion/*.yaml."""
    return resources.names("conversion")


def detect(kinds: Mapping[str, int]) -> Layout | None:
    """The layout whose table claims most of the names, and holds their codec; None if none claims half of them.

    Args:
        kinds: kind (see `kind_of`) -> how many names there are of it.
    """
    suffixes = {kind.rpartition(".")[2] for kind in kinds}
    codec = "int4" if "weight_packed" in suffixes else "fp8" if "weight_scale_inv" in suffixes else "bf16"
    best, best_score = None, (0, False, 0)
    for layout in map(load, names()):
        claimed = sum(num for kind, num in kinds.items() if kind in layout.kinds)
        score = (claimed, codec in layout.codecs, -len(layout.codecs))
        if score > best_score:
            best, best_score = layout, score
    return best if 2 * best_score[0] > sum(kinds.values()) else None


@lru_cache
def load(name: str) -> Layout:
    """A layout by its name, or by the path of its YAML file.

    Raises:
        ValueError: there is none of that name, or its file breaks the schema; the message names the key.
    """
    return parse(resources.find("conversion", name))


def parse(path: Path) -> Layout:
    """The layout in a file.

    Raises:
        ValueError: it breaks the schema.
    """

    def wrong(told: str) -> ValueError:
        return ValueError(f"{path}: {told}; the schema is in conversion/README.md.")

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise wrong(f"no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise wrong(f"the file is {type(content).__name__}, expected a mapping")
    if extra := content.keys() - _KEYS:
        raise wrong(f"unknown keys {', '.join(map(str, extra))}, expected some of {', '.join(sorted(_KEYS))}")
    codecs = content.get("codecs")
    if not isinstance(codecs, list) or not codecs or set(codecs) - set(CODECS):
        raise wrong(f"codecs is {codecs!r}, expected a list of {', '.join(CODECS)}")
    if content.get("names", "own") not in ("own", "hub"):
        raise wrong(f"names is {content['names']!r}, expected own or hub")
    if content.get("config", "hub") not in ("hub", "k25", "mlx"):
        raise wrong(f"config is {content['config']!r}, expected hub, k25 or mlx")
    given = content.get("mtp", "same")
    mtp: str | tuple[str, tuple[str, ...]] | None = None if given == "none" else "same"
    if isinstance(given, dict) and len(given) == 1:
        mtp = next((str(source), _texts(places, "mtp", wrong)) for source, places in given.items())
    elif given not in ("same", "none"):
        raise wrong(f"mtp is {given!r}, expected same, none or one pair of prefixes")
    rows = [_row(entry, wrong) for entry in content.get("tensors") or ()]
    seen: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        for hub in row.hub:
            for layers in (row.layers,) if row.layers else (None, *_LAYERS):
                if (hub, layers) in seen:
                    raise wrong(f"{hub} has two rows, expected one")
                seen[hub, layers] = row
    drops = content.get("drop") or ()
    for entry in drops:
        if not isinstance(entry, dict) or entry.keys() != {"name", "why"}:
            raise wrong(f"drop has {entry!r}, expected name and why")
    shared = content.get("shared") or {}
    if not isinstance(shared, dict) or not all(
        isinstance(one, str) for pair in shared.items() for one in pair
    ):
        raise wrong(f"shared is {shared!r}, expected names of the hub and what they repeat")
    return Layout(
        name=path.stem,
        about=" ".join(str(content.get("about", "")).split()),
        rows=tuple(rows),
        codecs=tuple(codecs),
        hub_names=content.get("names") == "hub",
        prefix=str(content.get("prefix") or ""),
        dtype=content.get("dtype"),
        parts=dict(content.get("parts") or {}),
        mtp=mtp,
        shared=shared,
        files=content.get("files"),
        drop=tuple(Drop(str(entry["name"]), str(entry["why"])) for entry in drops),
        config=content.get("config", "hub"),
    )


def _row(entry: Any, wrong: Any) -> Row:
    if not isinstance(entry, dict) or not {"hub", "here"} <= entry.keys() <= _ROW_KEYS:
        raise wrong(f"a row is {entry!r}, expected hub, here and some of {', '.join(sorted(_ROW_KEYS))}")
    hub, here, also = (_texts(entry.get(key), key, wrong) for key in ("hub", "here", "also"))
    for key, choices in (("op", OPS), ("split", SPLITS), ("layers", _LAYERS)):
        if entry.get(key) is not None and entry[key] not in choices:
            raise wrong(f"{key} is {entry[key]!r} for {here[0]}, expected one of {', '.join(choices)}")
    op = entry.get("op")
    if len(here) != (2 if op == "split_heads" else 1):
        raise wrong(f"{hub[0]} has {len(here)} names here, expected {2 if op else 1}")
    if also and op:
        raise wrong(f"{hub[0]} has other spellings and an op, expected one or the other")
    return Row(hub, here, tuple((name,) for name in also), op, entry.get("split"), entry.get("layers"))


def _texts(value: Any, key: str, wrong: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) and one for one in values) or (not values and key != "also"):
        raise wrong(f"{key} is {value!r}, expected a name or a list of names")
    if unknown := {variable for one in values for variable in _VARIABLE.findall(one)} - {
        "layer",
        "expert",
        "mtp",
    }:
        raise wrong(f"{key} has the variable <{sorted(unknown)[0]}>, expected <layer>, <expert> or <mtp>")
    return tuple(values)
