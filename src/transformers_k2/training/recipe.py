"""The schema of a training recipe: one complete YAML file, every key written out, no inheritance.

`load_recipe` reads a file, applies `key=value` overrides and returns frozen dataclasses; whatever can be wrong with the
values alone is an error here, before data is read or a model is built. training_recipes/README.md shows the same schema
on one screen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from ..resources import find
from .optimizers import OPTIMIZERS, OptimizerOptions
from .schema import Variant, above, at_least, between, build, parse_yaml

Count = Annotated[int, at_least(1)]
# A number of steps, or a share of training.steps.
Phase = Annotated[int, at_least(0)] | Annotated[float, between(0, 1)]
Seed = Annotated[int, between(0, 2**32 - 1)]


@dataclass(frozen=True)
class ModelSection:
    """A size in configs/ (or a path to a config.json), and keys of it to change. Weights start from the seed."""

    config: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class TokenizerSection:
    """Either trained on the training text (`vocab_size` ids, 256 of them reserved) or loaded from `path`."""

    vocab_size: Count | None
    path: str | None


@dataclass(frozen=True)
class DataSection:
    """Which text, how it is cut; see data.py. Documents are concatenated, each followed by the EOS token."""

    source: str | list[str]
    text_field: str
    max_bytes: Count | None
    sequence_length: Annotated[int, at_least(2)]
    held_out_share: Annotated[float, between(0.0001, 0.5)]
    seed: Seed


@dataclass(frozen=True)
class ScheduleSection:
    """Warm-up from `min_lr`, constant, cosine to `min_lr` (arXiv 2507.20534, section 2.5).

    `warmup` and `decay` are steps if whole numbers, shares of training.steps if fractions; the rest is constant.
    """

    warmup: Phase
    decay: Phase
    min_lr: Annotated[float, at_least(0)]

    def num_steps(self, phase: Literal["warmup", "decay"], total: int) -> int:
        """The length of a phase in a run of `total` steps; shares are rounded down."""
        length = getattr(self, phase)
        return length if isinstance(length, int) else int(length * total)


@dataclass(frozen=True)
class TrainingSection:
    """How long, in which pieces and with which arithmetic. `batch_size` counts sequences per forward pass."""

    steps: Count
    batch_size: Count
    gradient_accumulation: Count
    max_grad_norm: Annotated[float, above(0)] | None
    dtype: Literal["float32", "bfloat16"]
    cpu_threads: Count | None
    seed: Seed
    eval_every: Count
    eval_sequences: Count


@dataclass(frozen=True)
class GenerationSection:
    """The sample that the reloaded model writes; `temperature` 0 always takes the likeliest token."""

    prompt: str
    max_new_tokens: Count
    temperature: Annotated[float, at_least(0)]


@dataclass(frozen=True)
class Recipe:
    """A pre-training run, resolved: what the file and the overrides say together."""

    output_dir: str
    overwrite: bool
    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    optimizer: Annotated[OptimizerOptions, Variant("name", OPTIMIZERS)]
    schedule: ScheduleSection
    training: TrainingSection
    generation: GenerationSection

    @property
    def tokens_per_step(self) -> int:
        """How many tokens one optimizer step reads."""
        return self.training.batch_size * self.training.gradient_accumulation * self.data.sequence_length

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True, width=100)


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name: a path, or the name of a file in training_recipes/.
        overrides: "dotted.key=value" texts; the value is YAML, so `model.overrides={num_hidden_layers: 2}` works, and
            so does `model.overrides.num_hidden_layers=2`. The later of two wins.

    Raises:
        ValueError: no such recipe, not YAML, or a key or value that does not fit; one line names it and the choices.
    """
    path = find("training_recipes", name)
    values = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    origins: dict[str, str] = {}
    for override in overrides:
        _apply(values, override, origins)
    recipe = build(Recipe, values, path.name, origins)
    _check(recipe, path.name)
    return recipe


def _apply(values: Any, override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    source = f"override {override!r}"
    names = key.split(".")
    if not equals or not all(names):
        raise ValueError(f"{source}: expected key=value with a dotted key, such as training.steps=100.")
    section = values
    for name in names[:-1]:
        if not isinstance(section, dict):
            break
        section = section.setdefault(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{source}: {'.'.join(names[:-1])!r} is {section!r}, not a section with keys.")
    section[names[-1]] = parse_yaml(text, source)
    origins[key] = source


def _check(recipe: Recipe, source: str) -> None:
    """Contradictions between keys."""
    tokenizer, schedule, steps = recipe.tokenizer, recipe.schedule, recipe.training.steps
    if (tokenizer.vocab_size is None) == (tokenizer.path is None):
        raise ValueError(
            f"{source}: tokenizer.vocab_size is {tokenizer.vocab_size!r} and tokenizer.path is {tokenizer.path!r}: "
            "expected exactly one of them, the other null."
        )
    warmup, decay = (schedule.num_steps(phase, steps) for phase in ("warmup", "decay"))
    if warmup + decay > steps:
        raise ValueError(
            f"{source}: schedule.warmup is {schedule.warmup} and schedule.decay {schedule.decay}, together "
            f"{warmup + decay} steps: expected at most training.steps, {steps}."
        )
    if schedule.min_lr > recipe.optimizer.lr:
        raise ValueError(
            f"{source}: schedule.min_lr is {schedule.min_lr:g}: expected at most optimizer.lr, {recipe.optimizer.lr:g}."
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, which plain YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
