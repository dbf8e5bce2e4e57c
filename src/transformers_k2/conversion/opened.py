"""A checkpoint of any layout, opened as the model it holds: canonical names, each with its weight, nothing read yet.

The layout follows from the names (and is checked against config.json): every tensor of the model must be there, in its
shape, and every tensor that is there must be one of the model's, or on the layout's drop list, or an extra that K2.5 has
beside its language model. Anything else is an error that lists it before a byte is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, TensorInfo, no_collector
from ..lazy_tensors import DTYPES, Cat, Constant, Entry, LazyTensor, OpenFiles, Stack, Stored
from ..manifest import (
    WRAPPER_EXTRAS,
    WRAPPER_PREFIX,
    expected_tensors,
    optional_tensors,
    quantization_of,
    split_config,
)
from ..quantization.codecs import int4_pack
from . import layout as layouts
from .arrange import Heads, backward
from .found import Found, find, find_config
from .layout import PARTS, Group, Layout, Shape
from .report import fold
from .weights import FLOATS, Weight

# What parts of a quantised weight may be, by codec and local name: another type of the same width would be misread.
_PART_DTYPES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("fp8", "weight"): ("F8_E4M3",),
    ("fp8", "weight_scale_inv"): FLOATS,
    ("int4", "weight_packed"): ("I32",),
    ("int4", "weight_scale"): FLOATS,
    ("int4", "weight_shape"): ("I32", "I64"),
    ("affine", "weight"): ("U32",),
    ("affine", "scales"): FLOATS,
    ("affine", "biases"): FLOATS,
}


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
        config: its config.json.
        text: the language model's part.
        layout: the name of the layout it was found in.
        codec: how its quantised weights are stored; "bf16" if none is.
        names: the canonical name of every tensor -> its shape, in layer order.
        read: canonical name -> its weight.
        extras: tensors beside the language model, by their names in the file; None if only the name is known.
        dropped: (what, why, how many) that is left out.
        coded: the modules whose weights are quantised.
        group_size: inputs that share a scale, if those are INT4.
        folder: where its files are; what else is there may be copied.
        files: that hold weights.
    """

    config: Mapping[str, Any]
    text: Mapping[str, Any]
    layout: str
    codec: str
    names: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Weight]
    extras: Mapping[str, TensorInfo | LazyTensor | None] = field(default_factory=dict)
    dropped: tuple[tuple[str, str, int], ...] = ()
    coded: frozenset[str] = frozenset()
    group_size: int = 0
    folder: Path = Path()
    files: tuple[Path, ...] = ()

    @property
    def shape(self) -> Shape:
        """What names depend on."""
        return Shape.of(self.text)

    @property
    def heads(self) -> Heads:
        """Of the attention."""
        return Heads.of(self.text)


class Promised(LazyTensor):
    """A tensor known by name, whose file is not here yet: for plans."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.shape, self.dtype = tuple(shape), DTYPES[dtype]

    def fill(self, place: torch.Tensor, region: tuple[slice, ...]) -> None:
        raise AssertionError("a plan made from names alone cannot be carried out")


@no_collector()
def open_model(
    path: str | Path,
    files: OpenFiles,
    *,
    layout: str | None = None,
    config: str | Path | None = None,
    names_only: bool = False,
) -> Model:
    """The model in a checkpoint.

    Args:
        path: a folder, of safetensors or as torch.distributed.checkpoint writes it; a .safetensors file with a config.json
            beside it; or an index (names only).
        files: open while weights are read.
        layout: of conversion/*.yaml, instead of the one that the names show.
        config: of the model, if none stands beside the weights.
        names_only: take names from the index and shapes from the config; weights cannot be read then.

    Raises:
        ValueError: no such checkpoint or a broken file; no config; tensors that are missing, of another shape, or that
            nothing claims.
    """
    path = Path(path)
    found = find(path, files, layout, names_only)
    loaded = find_config(found.folder, config)
    text, wrapper = split_config(loaded)
    classes = text.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise CheckpointError(
            f"config.json has architectures {str(classes)[:60]!r}: expected a list of names."
        )
    names = found.tensors
    chosen = layouts.load(layout) if layout else _detect(names, found.layout)
    if wrapper and chosen.config != "k25" and chosen.hub_names and any(map(_wrapped, names)):
        raise CheckpointError(
            f"{found.folder} has names under {WRAPPER_PREFIX!r}: expected layout k25_int4, not {chosen.name}."
        )
    if bool(wrapper) != (chosen.config == "k25") and config is None:
        told = f"begin with {WRAPPER_PREFIX!r}" if chosen.config == "k25" else "have no prefix"
        has = "a" if wrapper else "no"
        raise CheckpointError(f"{found.folder}: the names {told}, but config.json has {has} text_config.")
    return _Opening(found, files, chosen, loaded, text).model()


class _Opening:
    """The work of `open_model`: claim every tensor, prove every shape."""

    def __init__(
        self, found: Found, files: OpenFiles, layout: Layout, config: dict[str, Any], text: dict[str, Any]
    ) -> None:
        self.found, self.files, self.layout, self.config, self.text = found, files, layout, config, text
        self.heads, self.shape = Heads.of(text), Shape.of(text)
        self.block = _block(text)
        self.promised = None in found.tensors.values()
        self.groups: dict[str, tuple[Group, int]] = {}
        self.codecs: dict[tuple[str, ...], str] = {}
        self.claimed: set[str] = set()

    def model(self) -> Model:
        self.expected = expected_tensors(dict(self.text) | {"quantization_config": None}, "none")
        if self.layout.mtp is None or not self._any_mtp():
            self.text = dict(self.text) | {"num_nextn_predict_layers": 0}
            self.expected = expected_tensors(self.text | {"quantization_config": None}, "none")
        missing: list[str] = []
        for group in self.layout.groups(self.expected, self.shape):
            if (here := self._claim(group)) is None:
                missing += group.here
                continue
            for position, member in enumerate(group.members):
                self.groups[member] = (here, position)
        for name in self.expected:
            if (other := self.layout.repeated(name)) in self.groups:
                self.groups[name] = self.groups[other]
        if missing:
            raise CheckpointError(
                f"{self.found.folder} ({self.layout.name}) lacks {_told(missing)} of the model that config.json describes."
            )
        extras, dropped = self._leftovers()
        if not self.promised:
            self._check_shapes()
        used = set(self.codecs.values()) - {"bf16"}
        if len(used) > 1:
            raise CheckpointError(
                f"{self.found.folder} holds weights in {' and '.join(sorted(used))}: expected one quantised form."
            )
        coded = frozenset(
            name.removesuffix(".weight")
            for name, (group, _) in self.groups.items()
            if group.here in self.codecs and group.row.op is None
        )
        codec = used.pop() if used else "bf16"
        packed = codec in ("int4", "affine")
        return Model(
            config=self.config,
            text=self.text,
            layout=self.layout.name,
            codec=codec,
            names={name: shape for name, (shape, _) in self.expected.items()},
            read=self._weight,
            extras=extras,
            dropped=(*self.found.dropped, *dropped),
            coded=coded,
            group_size=self._weight(f"{min(coded)}.weight").group_size if packed else 0,
            folder=self.found.folder,
            files=self.found.files,
        )

    def _any_mtp(self) -> bool:
        """Whether tensors of MTP layers are there, as far as the layout has any."""
        if not self.text.get("num_nextn_predict_layers"):
            return False
        beyond = [name for name in self.expected if _layer(name) >= self.shape.num_layers]
        return any(
            name in self.found.tensors
            for group in self.layout.groups(beyond, self.shape)
            for name in group.here
        )

    def _claim(self, group: Group) -> Group | None:
        """The group in the spelling that is there, its names claimed; None if it is not there."""
        names = self.found.tensors
        for spelling in (group.here, *group.also):
            there = group._replace(here=spelling)
            codec = self._codec(spelling[0])
            if codec is not None and all(self._codec(one) == codec for one in spelling):
                parts = [self.layout.part(one, local) for one in spelling for local in PARTS[codec]]
                self.claimed.update(part for part in parts if part in names)
            elif all(name in names for name in spelling):
                codec = "bf16"
                self.claimed.update(spelling)
            else:
                continue
            if codec != "bf16":
                self.codecs[spelling] = codec
            return there
        return None

    def _codec(self, name: str) -> str | None:
        """How the weight `name` is quantised here; None if it is not."""
        names, part = self.found.tensors, self.layout.part
        if "weight" not in name.rpartition(".")[2]:
            return None
        for codec in ("int4", "fp8", "affine"):
            needed = [local for local in PARTS[codec] if local != "weight_shape"]
            own = [local for local in needed if local != "weight"]
            there = [local for local in own if part(name, local) in names]
            if not there or (codec == "affine" and "affine" not in self.layout.codecs):
                continue
            if lacking := [part(name, local) for local in needed if part(name, local) not in names]:
                raise CheckpointError(
                    f"{self.found.folder} has {part(name, there[0])}, but {lacking[0]} is missing."
                )
            return codec
        return None

    def _leftovers(
        self,
    ) -> tuple[dict[str, TensorInfo | LazyTensor | None], tuple[tuple[str, str, int], ...]]:
        """Extras and what is dropped; an error if something is neither."""
        left = [name for name in self.found.tensors if name not in self.claimed]
        optional = {self.layout.prefix + name for name in optional_tensors(self.text)}
        drops = [(drop.pattern, drop) for drop in self.layout.drop]
        extras: dict[str, TensorInfo | LazyTensor | None] = {}
        dropped: Counter[tuple[str, str]] = Counter()
        unclaimed = []
        for name in left:
            info = self.found.tensors[name]
            if name.startswith(WRAPPER_EXTRAS) and self.layout.config == "k25":
                extras[name] = info
            elif drop := next((drop for pattern, drop in drops if pattern.fullmatch(name)), None):
                dropped[drop.name, drop.why] += 1
            elif name in optional and name.endswith("lm_head.weight"):
                dropped[name, "the model ties it to the embedding"] += 1
            else:
                unclaimed.append(name)
        if unclaimed:
            raise CheckpointError(
                f"{self.found.folder} ({self.layout.name}) holds {_told(unclaimed)} that no row of the layout claims: "
                "expected the tensors of the model that config.json describes; a drop list can name others."
            )
        return extras, tuple((name, why, num) for (name, why), num in dropped.items())

    def _check_shapes(self) -> None:
        for name, (shape, _) in self.expected.items():
            group, _ = self.groups[name]
            try:
                weight = self._weight(name)
                values = weight.values("F32") if weight.codec != "bf16" else weight.parts["weight"]
            except CheckpointError as error:
                text = str(error)
                raise CheckpointError(text if text.endswith(".") else f"{group.here[0]}: {text}.") from None
            if tuple(values.shape) != shape:
                which = group.here[0] if group.here[0].endswith(name) else f"{name}, from {group.here[0]},"
                raise CheckpointError(
                    f"{self.found.folder}: {which} has shape {list(values.shape)}, but config.json asks for {list(shape)}."
                )
            if weight.codec == "bf16" and weight.dtype not in FLOATS:
                alone = " without its scale" if weight.dtype.startswith("F8") else ""
                raise CheckpointError(
                    f"{self.found.folder}: {group.here[0]} is {weight.dtype}{alone}: expected one of {', '.join(FLOATS)}."
                )

    def _weight(self, name: str) -> Weight:
        group, position = self.groups[name]
        codec = self.codecs.get(group.here, "bf16")
        if self.promised:
            return self._promised_weight(name, codec)
        if codec == "bf16":
            here = [self._whole(one, group) for one in group.here]
            return Weight(name, codec, {"weight": backward(group, here, position, self.heads)})
        if (
            group.row.op is not None
        ):  # its tensors are no rows of the hub's: what it holds is had decoded only
            here = [self._decoded_stack(one, group) for one in group.here]
            return Weight(name, "bf16", {"weight": backward(group, here, position, self.heads)})
        parts = {}
        for local in PARTS[codec]:
            stored = self.layout.part(group.here[0], local)
            if stored in self.found.tensors and local != "weight_shape":
                parts[local] = backward(
                    group, [self._whole(stored, group, codec, local)], position, self.heads
                )
            elif local == "weight_shape" and stored in self.found.tensors:
                parts[local] = self._tensor(stored, group)
                self._check_dtype(stored, parts[local], codec, local)
        if codec == "affine":
            self._check_groups(name, parts)
        return Weight(name, codec, parts, self.block)

    def _decoded_stack(self, name: str, group: Group) -> LazyTensor:
        """MLX's groups in a stack [heads, out, in], multiplied out."""
        parts = {
            local: self._whole(self.layout.part(name, local), group, "affine", local)
            for local in PARTS["affine"]
        }
        heads = [
            {local: Entry(part, head) for local, part in parts.items()} for head in range(self.heads.num)
        ]
        self._check_groups(name, heads[0])
        return Stack(name, [Weight(name, "affine", head).values() for head in heads])

    def _whole(self, name: str, group: Group, codec: str = "bf16", local: str = "") -> LazyTensor:
        """A tensor of the layout, or a part of it, with as many dimensions and entries as `backward` counts on."""
        tensor = self._tensor(name, group)
        self._check_dtype(name, tensor, codec, local)
        num_dims, num = len(self.expected[group.members[0]][0]), None
        if group.row.stacked:
            num_dims, num = num_dims + 1, len(group.members) // len(group.row.hub)
        elif group.row.op is not None:
            num_dims, num = num_dims + 1, self.heads.num
        if len(tensor.shape) != num_dims or num not in (None, tensor.shape[0]):
            entries = "" if num is None else f", the first of {num}"
            raise CheckpointError(
                f"{self.found.folder}: {name} has shape {list(tensor.shape)}, but config.json asks for {num_dims} "
                f"dimensions{entries}."
            )
        return tensor

    def _check_dtype(self, name: str, tensor: LazyTensor, codec: str, local: str) -> None:
        wanted = _PART_DTYPES.get((codec, local))
        if wanted is not None and tensor.get_dtype() not in wanted:
            raise CheckpointError(
                f"{self.found.folder}: {name} is {tensor.get_dtype()}: expected {' or '.join(wanted)}."
            )

    def _check_groups(self, name: str, parts: Mapping[str, LazyTensor]) -> None:
        """MLX's groups divide the matrix."""
        rows, words = parts["weight"].shape
        for local in ("scales", "biases"):
            num_rows, num = parts[local].shape
            if num_rows != rows or not num or words * int4_pack.PER_INT32 % num:
                raise CheckpointError(
                    f"{self.found.folder}: the {local} {[num_rows, num]} of {name} do not divide a "
                    f"{[rows, words * int4_pack.PER_INT32]} weight into groups."
                )

    def _tensor(self, name: str, group: Group) -> LazyTensor:
        if not self.found.ranks:
            info = self.found.tensors[name]
            assert info is not None
            return info if isinstance(info, LazyTensor) else Stored(info, self.files)
        held = [Stored(rank[name], self.files) for rank in self.found.ranks if name in rank]
        if odd := next((one for one in held if len(one.shape) != len(held[0].shape) or not one.shape), None):
            raise CheckpointError(
                f"{odd.info.shard}: {name} has shape {list(odd.shape)}, that of the first rank {list(held[0].shape)}: "
                "expected parts of one tensor."
            )
        if group.row.split in (None, "experts") and not group.row.stacked:
            return held[0]
        if len(held) == 1 and group.row.split is None:
            return held[0]
        return Cat(held, len(held[0].shape) - 1 if group.row.split == "columns" else 0)

    def _promised_weight(self, name: str, codec: str) -> Weight:
        shape, dtype = self.expected[name]
        if codec == "bf16":
            return Weight(name, codec, {"weight": Promised(shape, dtype)})
        rows, columns = shape
        if codec == "fp8":
            grid = [-(-size // side) for size, side in zip(shape, self.block, strict=True)]
            parts = {"weight": Promised(shape, "F8_E4M3"), "weight_scale_inv": Promised(grid, "F32")}
            return Weight(name, codec, parts, self.block)
        group = quantization_of(self.config).group
        words, groups = (rows, columns // int4_pack.PER_INT32), (rows, columns // group)
        if codec == "int4":
            told = {
                "weight_packed": Promised(words, "I32"),
                "weight_scale": Promised(groups, "BF16"),
                "weight_shape": Constant(torch.tensor(shape, dtype=torch.int32)),
            }
            return Weight(name, codec, told)
        told = {
            "weight": Promised(words, "U32"),
            **dict.fromkeys(("scales", "biases"), Promised(groups, "BF16")),
        }
        return Weight(name, codec, told)


def _detect(names: Iterable[str], proven: str | None) -> Layout:
    """The layout of these names.

    Raises:
        CheckpointError: none claims half of them.
    """
    if proven is not None:
        return layouts.load(proven)
    kinds = Counter(layouts.kind_of(name) for name in names if not name.startswith(WRAPPER_EXTRAS))
    if (found := layouts.detect(kinds)) is None:
        examples = ", ".join(entry.pattern for entry in fold(names)[:3])
        raise CheckpointError(
            f"No layout claims these names ({examples}, ...): expected one of {', '.join(layouts.names())}."
        )
    return found


def _block(text: Mapping[str, Any]) -> tuple[int, int]:
    spec = text.get("quantization_config") or {}
    if not isinstance(spec, Mapping):
        raise CheckpointError(
            f"config.json has quantization_config {str(spec)[:60]!r}: expected a JSON object."
        )
    if spec.get("quant_method") != "fp8":
        return 128, 128
    return quantization_of({"quantization_config": spec}).block


def _layer(name: str) -> int:
    head, _, rest = name.partition("model.layers.")
    return int(rest.partition(".")[0]) if rest and not head else -1


def _wrapped(name: str) -> bool:
    return name.startswith(WRAPPER_PREFIX)


def _told(names: Sequence[str]) -> str:
    folds = fold(names)
    more = f" and {len(folds) - 4} more kinds" if folds[4:] else ""
    return f"{len(names):,} tensors ({', '.join(entry.pattern for entry in folds[:4])}{more})"
