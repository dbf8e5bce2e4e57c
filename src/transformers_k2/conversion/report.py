"""What `inspect` found, as data and as text: the report's fields, its plain lines and its rich tables.

Strings from a checkpoint are printed neither as markup nor with control characters. Parameters are counted in
powers of 1000, bytes in powers of 1024.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

SEVERITIES = ("error", "warning", "note")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class Problem:
    """One kind of fault: `severity` is one of SEVERITIES, `count` how many tensors, files or keys have it."""

    severity: str
    kind: str  # file, config, layout, missing, unexpected, shape, dtype, quantization, index
    text: str
    count: int = 1
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that headers and config.json tell; a value that they do not tell is None or empty."""

    source: str
    model_type: str | None = None
    layout: str | None = None
    nearest_layout: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)  # part -> parameters, active, bytes
    num_parameters: int = 0
    num_active: int = 0
    num_bytes: int = 0
    num_tensors: int = 0
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)  # dtype -> tensors, bytes
    shards: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, tensors
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        result = asdict(self)
        for problem in result["problems"]:
            problem["examples"] = list(problem["examples"])
        return result

    def lines(self) -> list[str]:
        """The report as plain text, one fact a line, the problems last and the worst of them first."""
        facts = [f"{name:12}{value}" for name, value in self.facts()]
        parts = [
            f"{name:16}{part['parameters']:>20,}{part['active']:>18,}{part['bytes']:>22,}"
            for name, part in self.parts.items()
        ]
        head = [f"{'part':16}{'parameters':>20}{'active':>18}{'bytes':>22}"] if parts else []
        faults = [f"{problem.severity}: {printable(problem.text)}" for problem in self.sorted_problems()]
        return [self.source, *facts, *head, *parts, *(faults or ["No problems found."])]

    def sorted_problems(self) -> list[Problem]:
        """The problems, errors first."""
        return sorted(self.problems, key=lambda problem: SEVERITIES.index(problem.severity))

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of every fact that is known, as text."""
        layout = self.layout or ""
        if self.nearest_layout:
            layout += f", nearest: {self.nearest_layout}"
        options = {key: value for key, value in self.quantization.items() if key != "method"}
        stored = {"none": "unquantised", None: ""}.get(
            self.quantization.get("method"), self.quantization.get("method")
        )
        shards = f"{len(self.shards):,} files, {self.num_tensors:,} tensors" if self.shards else ""
        dtypes = ", ".join(
            f"{name} {entry['tensors']:,} ({_scaled(entry['bytes'], 1024)}B)"
            for name, entry in self.dtypes.items()
        )
        active = f"{_scaled(self.num_active, 1000)} used for one token"
        facts = {
            "model": self.model_type or "",
            "layout": layout,
            "stored as": ", ".join(filter(None, [stored, _words(options)])),
            "parameters": f"{_scaled(self.num_parameters, 1000)}, {active}" if self.num_parameters else "",
            "size": f"{self.num_bytes:,} bytes ({_scaled(self.num_bytes, 1024)}B)" if self.num_bytes else "",
            "shape": _words(self.shape),
            "context": _words(self.context),
            "shards": shards,
            "dtypes": dtypes,
        }
        return [(name, printable(value)) for name, value in facts.items() if value]


def render(report: Report) -> RenderableType:
    """The report as a rich renderable: facts, parts, problems."""
    # Imported here: a script that only wants the data should not pay for the terminal.
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, padding=(0, 1))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in report.facts():
        facts.add_row(name, Text(value))
    blocks: list[RenderableType] = [Text(report.source, style="bold"), facts]
    if report.parts:
        parts = Table(box=None, padding=(0, 1))
        parts.add_column("part")
        for name in ("parameters", "active", "bytes"):
            parts.add_column(name, justify="right")
        for name, part in report.parts.items():
            parts.add_row(name, *(f"{part[key]:,}" for key in ("parameters", "active", "bytes")))
        blocks.append(parts)
    for problem in report.sorted_problems():
        text = Text(f"{problem.severity}: ", style=_STYLES[problem.severity])
        blocks.append(text.append(printable(problem.text), style="none"))
    if not report.problems:
        blocks.append(Text("No problems found.", style="green"))
    return Group(*blocks)


def printable(text: str) -> str:
    """Text from a file, control characters escaped: it can neither break a line nor steer a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def kind_of(name: str) -> str:
    """A tensor name without its layer and expert numbers: what thousands of tensors have in common."""
    return _NUMBER.sub("{}", name)


class Fold(NamedTuple):
    """Names of one kind: `exact` if the pattern's ranges stand for these names and no others."""

    pattern: str
    count: int
    examples: tuple[str, ...]
    exact: bool


def fold(names: Iterable[str]) -> list[Fold]:
    """Tensor names folded to one entry per kind.

    `model.layers.{1-60}.mlp.experts.{0-383}.up_proj.weight` stands for 23,040 names. A range tells which
    numbers occur, in whatever combination.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[kind_of(name)].append(name)
    result = []
    for kind, members in groups.items():
        members.sort(key=_numbers)
        pattern, combinations = kind, 1
        for column in zip(*map(_numbers, members), strict=True):
            numbers = set(column)
            told = ranges(numbers)
            pattern = pattern.replace("{}", told if len(numbers) == 1 else "{" + told + "}", 1)
            combinations *= len(numbers)
        exact = combinations == len(members) and "..." not in pattern
        result.append(Fold(pattern, len(members), tuple(members[:3]), exact))
    return result


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: "0-3,7"; at most four runs are told."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:4])
    return told + (",..." if len(runs) > 4 else "")


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]


def _words(values: dict[str, Any]) -> str:
    """Values by name, on one line: a list is a product of sizes."""
    told = []
    for name, value in values.items():
        value = " x ".join(map(str, value)) if isinstance(value, list) else value
        told.append(f"{name} {value:,}" if type(value) is int else f"{name} {value}")
    return ", ".join(told)


def _scaled(number: int, base: int) -> str:
    """1,026,408,232,448 as "1,026.41 B" (base 1000), or as "955.92 Gi" (base 1024)."""
    units = ("", "k", "M", "B") if base == 1000 else ("", "Ki", "Mi", "Gi")
    power = min(3, max(0, len(str(number)) - 1) // 3)
    return f"{number / base**power:,.2f} {units[power]}" if power else f"{number} "
