"""From a model to the files of a layout: which tensors, in which form, made of what. Names and shapes only.

A plan holds names, dtypes and shapes; the lazy tensors that make them are built anew when a file's turn comes, so a plan of
70,000 weights takes tens of megabytes, not hundreds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checkpoint import CheckpointError, TensorInfo, no_collector
from ..lazy_tensors import DTYPES, NAMES, LazyTensor, Narrow, OpenFiles, Stored
from .arrange import forward
from .layout import PARTS, Group, Layout
from .opened import Model, Promised
from .tasks import SHARD_BYTES, Entry, File, Spec, Task, copied, in_shards, one_file
from .weights import BIAS, FLOATS, Encoder, Weight


@dataclass(frozen=True)
class Target:
    """What is to be made of a model.

    Attributes:
        layout: of the names.
        codec: of the weights in `coded`; "bf16" if none is quantised.
        encoder: writes that codec.
        coded: the modules whose weights are quantised.
        keep: weights that are in that codec already are passed on as they are.
        dtype: that unquantised weights get, or None to keep theirs. Routers' biases keep theirs in any case.
        cast_all: also those of another dtype than the model's own.
        base: the model's own dtype.
        num_ranks: of a layout with a file for each.
    """

    layout: Layout
    codec: str = "bf16"
    encoder: Encoder | None = None
    coded: frozenset[str] = frozenset()
    keep: bool = True
    dtype: str | None = None
    cast_all: bool = False
    base: str = "BF16"
    num_ranks: int = 1


class Made(NamedTuple):
    """A group of the layout's tensors, and what of it a rank writes.

    Attributes:
        how: "copy" (bytes of one file), "pass" (parts put together), "encode", "decode", "cast" or "arrange".
    """

    group: Group
    specs: tuple[Spec, ...]
    how: str
    rank: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that will be written.

    Attributes:
        files: in order.
        made: all groups, in the order of the files.
        counts: what becomes of how many tensors.
    """

    files: list[File]
    made: list[Made]
    num_packed: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(file.num_bytes for file in self.files)

    @property
    def num_tensors(self) -> int:
        """In all files."""
        return sum(len(file.specs) for file in self.files)


@no_collector()
def make_plan(model: Model, target: Target, files: OpenFiles, shard_bytes: int = SHARD_BYTES) -> Plan:
    """The plan; nothing is read or written.

    Raises:
        ValueError: names or shapes that the layout cannot hold.
    """
    planner = _Planner(model, target, files)
    groups = list(target.layout.groups(model.names, model.shape))
    by_rank = [
        [made for group in groups if (made := planner.made(group, rank)) is not None]
        for rank in range(target.num_ranks)
    ]
    extras = {} if target.layout.config != "k25" else model.extras
    copies = [_copy(name, extra, files) for name, extra in extras.items() if extra is not None]
    counts: Counter[str] = Counter()
    for made in by_rank:
        for one in made:
            counts[one.how] += len(one.specs)
    counts["copy"] += len(copies)
    if target.layout.files is None:
        (made,) = by_rank
        planned = in_shards([*(planner.entry(one) for one in made), *copies], shard_bytes)
    else:
        planned = [
            one_file(
                target.layout.files.replace("<ranks>", str(target.num_ranks)).replace("<rank>", str(rank)),
                [planner.entry(one) for one in made],
            )
            for rank, made in enumerate(by_rank)
        ]
    _check_names(planned)
    return Plan(planned, [one for made in by_rank for one in made], counts=dict(counts))


class _Planner:
    def __init__(self, model: Model, target: Target, files: OpenFiles) -> None:
        self.model, self.target, self.files = model, target, files

    def entry(self, made: Made) -> Entry:
        """What the engine wants."""
        return Entry(made.specs, lambda: self._tasks(made.group, made.rank)[1])

    def made(self, group: Group, rank: int) -> Made | None:
        """What a rank writes of a group; None if that is another rank's."""
        if not self._owns(group, rank):
            return None
        try:
            how, tasks = self._tasks(group, rank)
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(text if text.endswith(".") else f"{group.here[0]}: {text}.") from None
        return Made(group, tuple(spec for task in tasks for spec in task.outputs), how, rank)

    def _tasks(self, group: Group, rank: int) -> tuple[str, list[Task]]:
        target, weights = self.target, [self.model.read(name) for name in group.members]
        if (parts := self._passed(group, weights)) is not None:
            tasks = []
            for local, members in parts.items():
                if local == "weight_shape":
                    lazies = list(members)
                else:
                    lazies = [
                        self._share(one, group, rank) for one in forward(group, members, self.model.heads)
                    ]
                tasks.append(self._plain(self._name(group, local), lazies[0]))
            return "copy" if all(map(_is_copy, tasks)) else "pass", tasks
        coded = [weight.module in target.coded for weight in weights]
        if any(coded) and target.encoder is not None and group.row.op is None:
            if not all(coded):
                wrong = next(weight.name for weight, one in zip(weights, coded, strict=True) if not one)
                raise ValueError(
                    f"{target.layout.name} keeps {group.here[0]} in one form: expected all of its weights in "
                    f"{target.codec} or none, but {wrong} is not chosen."
                )
            values = forward(group, [weight.values() for weight in weights], self.model.heads)
            return "encode", [
                self._encoded(group, self._share(values[0], group, rank, coded=True), target.encoder)
            ]
        dtypes = [self._plain_dtype(weight) for weight in weights]
        values = forward(
            group,
            [weight.values(dtype) for weight, dtype in zip(weights, dtypes, strict=True)],
            self.model.heads,
        )
        changed = any(
            weight.codec != "bf16" or weight.dtype != dtype
            for weight, dtype in zip(weights, dtypes, strict=True)
        )
        tasks = [
            self._plain(name, self._share(value, group, rank), changed, weights[0])
            for name, value in zip(group.here, values, strict=True)
        ]
        if any(weight.codec != "bf16" for weight in weights):
            return "decode", tasks
        return ("cast" if changed else "copy" if all(map(_is_copy, tasks)) else "arrange"), tasks

    def _passed(self, group: Group, weights: Sequence[Weight]) -> Mapping[str, Sequence[LazyTensor]] | None:
        """Part by part, the weights as they are stored, if the target holds them so."""
        target = self.target
        if not target.keep or target.codec == "bf16" or group.row.op is not None:
            return None
        if any(weight.codec == "bf16" for weight in weights):
            return None
        found = [weight.parts_in(target.codec) for weight in weights]
        whole = [parts for parts in found if parts is not None]
        if len(whole) < len(found):
            return None
        return {
            local: [parts[local] for parts in whole] for local in PARTS[target.codec] if local in whole[0]
        }

    def _plain_dtype(self, weight: Weight) -> str:
        if weight.codec != "bf16":
            return self.target.dtype or weight.dtype
        fixed = weight.name.endswith(BIAS) or self.target.dtype is None or weight.dtype not in FLOATS
        if fixed or not (self.target.cast_all or weight.dtype == self.target.base):
            return weight.dtype
        return self.target.dtype or weight.dtype

    def _plain(
        self, name: str, value: LazyTensor, changed: bool = False, weight: Weight | None = None
    ) -> Task:
        about = "" if weight is None else weight.name
        if isinstance(value, Stored) and not changed:
            return copied(value.info, self.files, name)
        return Task((Spec(name, NAMES[value.dtype], value.shape),), value, changed=changed, about=about)

    def _encoded(self, group: Group, value: LazyTensor, encoder: Encoder) -> Task:
        lead, (out_features, in_features) = value.shape[:-2], value.shape[-2:]
        try:
            parts = encoder.parts(out_features, in_features)
        except ValueError as error:
            raise ValueError(f"{group.members[0]}: {error}") from None
        fixed = encoder.fixed(out_features, in_features)
        specs = {
            local: Spec(self._name(group, local), dtype, shape if local in fixed else (*lead, *shape))
            for local, (dtype, shape) in parts.items()
        }
        return Task(
            tuple(specs.values()),
            value,
            encode=encoder.encode,
            multiple=encoder.multiple,
            fixed={specs[local].name: data for local, data in fixed.items()},
            changed=True,
            about=group.here[0] if lead else group.members[0],
        )

    def _name(self, group: Group, local: str) -> str:
        return self.target.layout.part(group.here[0], local)

    def _owns(self, group: Group, rank: int) -> bool:
        """Experts that are tensors of their own belong to one rank; all else to each, whole or in part."""
        num_ranks, num_experts = self.target.num_ranks, self.model.shape.num_experts
        if num_ranks == 1 or group.row.split != "experts" or group.row.stacked:
            return True
        if num_experts % num_ranks:
            raise ValueError(
                f"{num_experts} experts cannot be shared by {num_ranks} ranks: expected a divisor of {num_experts}."
            )
        expert = int(group.members[0].partition(".experts.")[2].partition(".")[0])
        return expert // (num_experts // num_ranks) == rank

    def _share(self, value: LazyTensor, group: Group, rank: int, coded: bool = False) -> LazyTensor:
        """The part of a tensor that a rank holds."""
        split, num_ranks = group.row.split, self.target.num_ranks
        if num_ranks == 1 or split is None or (split == "experts" and not group.row.stacked):
            return value
        dim = len(value.shape) - 1 if split == "columns" else 0
        size = value.shape[dim]
        if size % num_ranks:
            raise ValueError(
                f"{group.here[0]} has {size} {split} to be shared by {num_ranks} ranks: expected a divisor of {size}."
            )
        each = size // num_ranks
        block = self.target.encoder.multiple if self.target.encoder is not None and coded else 1
        if each % block:
            raise ValueError(
                f"{group.here[0]} has {size} {split}: {num_ranks} ranks would give each {each} {split}, no multiple of "
                f"{block}; expected fewer ranks, so that FP8 blocks stay whole."
            )
        return Narrow(value, dim, rank * each, (rank + 1) * each)


def _copy(name: str, extra: TensorInfo | LazyTensor, files: OpenFiles) -> Entry:
    """A tensor beside the language model, as it is."""
    if not isinstance(extra, LazyTensor):
        return Entry((Spec(name, extra.dtype, extra.shape),), lambda: [copied(extra, files)])
    spec = Spec(name, extra.get_dtype(), extra.shape)
    return Entry((spec,), lambda: [Task((spec,), extra)])


def _is_copy(task: Task) -> bool:
    return isinstance(task.value, Stored | Promised) and not task.changed


def _check_names(files: Sequence[File]) -> None:
    """No name twice in a file."""
    for file in files:
        counted = Counter(spec.name for spec in file.specs)
        if twice := [name for name, num in counted.items() if num > 1]:
            raise ValueError(
                f"{file.name} would hold {twice[0]} {counted[twice[0]]} times: the layout's rows collide."
            )
        if wrong := [
            spec for spec in file.specs if spec.dtype not in NAMES.values() and spec.dtype in DTYPES
        ]:
            raise ValueError(f"{wrong[0].name} would be {wrong[0].dtype}, which cannot be written.")
