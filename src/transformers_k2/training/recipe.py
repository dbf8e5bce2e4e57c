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

from ..parallel import Layout
from ..resources import find
from .optimizers import OPTIMIZERS, OptimizerOptions
from .schema import Rule, Variant, above, at_least, between, build, parse_yaml

Count = Annotated[int, at_least(1)]
# A number of steps, or a share of training.steps.
Phase = Annotated[int, at_least(0)] | Annotated[float, between(0, 1)]
Seed = Annotated[int, between(0, 2**32 - 1)]
Dtype = Literal["float32", "bfloat16"]
RECOMPUTE = ("norms", "swiglu", "mla_up", "moe_down", "full")
TRACKERS = ("tensorboard", "wandb", "trackio")


def _some_of(choices: tuple[str, ...]) -> Rule:
    return Rule(
        f"of {', '.join(choices)}, none twice",
        lambda values: set(values) <= set(choices) and len(set(values)) == len(values),
    )


@dataclass(frozen=True)
class ModelSection:
    """A size in configs/ (or a path to a config.json) with weights drawn from the seed, or trained weights to start from.

    `weights` is a folder in the hub's layout or a hub name, whose own configuration counts if `config` is null;
    `overrides` are keys of the configuration to change.
    """

    config: str | None
    weights: str | None
    overrides: dict[str, Any]
    attention: Literal["sdpa", "padded_sdpa", "eager", "flex_attention"]
    experts: str | None


@dataclass(frozen=True)
class TokenizerSection:
    """Trained on the training text (`vocab_size` ids, 256 of them reserved), loaded from `path`, or the weights' own."""

    vocab_size: Count | None
    path: str | None


@dataclass(frozen=True)
class DataSection:
    """Which text or conversations, in which proportion, how they are cut; see data.py and packing.py."""

    kind: Literal["text", "chat"]
    source: str | list[str]
    weights: list[Annotated[float, above(0)]] | None
    text_field: str
    max_bytes: Count | None
    sequence_length: Annotated[int, at_least(2)]
    packing: Literal["joined", "separate", "unpacked"]
    held_out_share: Annotated[float, between(0.0001, 0.5)]
    seed: Seed
    cache_dir: str


@dataclass(frozen=True)
class ScheduleSection:
    """Warm-up from `min_lr`, constant, cosine to `min_lr` (arXiv 2507.20534, section 2.5).

    `warmup` and `decay` are steps if whole numbers, shares of training.steps if fractions; the rest is constant.
    """

    warmup: Phase
    decay: Phase
    min_lr: Annotated[float, at_least(0)]


@dataclass(frozen=True)
class RouterSection:
    """Load balance of the routed experts; see moe.py. `bias_freeze` is how long before the end the bias stays."""

    bias_update_speed: Annotated[float, at_least(0)]
    bias_freeze: Phase
    balance_loss: Annotated[float, at_least(0)]


@dataclass(frozen=True)
class ContextStage:
    """Consecutive steps with rows of one length; `rope_scaling` replaces the model's from here on, null leaves it."""

    steps: Count
    sequence_length: Annotated[int, at_least(2)]
    rope_scaling: dict[str, Any] | None


@dataclass(frozen=True)
class ContextSection:
    """A run over several sequence lengths; the tokens of a step stay the same.

    `final_rope_scaling` is what the finished model is saved with; at `eval_lengths` the held-out loss is measured before
    and after, with and without it.
    """

    stages: list[ContextStage]
    final_rope_scaling: dict[str, Any] | None
    max_position_embeddings: Count
    eval_lengths: list[Count]


@dataclass(frozen=True)
class SpikeGuardSection:
    """Steps whose loss exceeds median + factor x deviation of the last `window` are skipped; see spikes.py."""

    window: Annotated[int, at_least(4)]
    factor: Annotated[float, above(0)]
    max_skips: Count


@dataclass(frozen=True)
class TrainingSection:
    """How long, in which pieces and with which arithmetic.

    `batch_size` counts sequences of one optimizer step over all processes, `micro_batch_size` those of one forward pass
    of one process, at most; the number of accumulated passes follows. So a recipe means the same on any machine.
    """

    steps: Count
    batch_size: Count
    micro_batch_size: Count
    max_grad_norm: Annotated[float, above(0)] | None
    dtype: Dtype
    weights_dtype: Dtype
    cpu_threads: Count | None
    data_workers: Annotated[int, at_least(0)]
    seed: Seed
    eval_every: Count
    eval_sequences: Count
    spike_guard: SpikeGuardSection | None


@dataclass(frozen=True)
class MemorySection:
    """What is recomputed instead of kept, what is kept on the CPU, and how many tokens' logits exist at once."""

    recompute: Annotated[list[str], _some_of(RECOMPUTE)]
    offload: bool
    loss_chunk_tokens: Count | None


@dataclass(frozen=True)
class ParallelSection:
    """How processes share the model; see parallel/layout.py. Copies of the model take up what processes are left."""

    engine: Literal["transformers", "accelerate"]
    pipeline: Count
    shard: Count | Literal["all"]
    expert: Count
    schedule: Literal["1f1b", "gpipe"]
    micro_batches_per_run: (
        Count | None
    )  # of a pipeline: receive buffers exist for so many; null: for all of a step


@dataclass(frozen=True)
class AdapterSection:
    """LoRA: `targets` are names of projections; gate_proj, up_proj and down_proj mean routed experts too."""

    rank: Count
    alpha: Annotated[float, above(0)]
    dropout: Annotated[float, between(0, 0.99)]
    targets: list[str]


@dataclass(frozen=True)
class Int4:
    """A frozen base with its routed experts in INT4, packed as the hub stores them; the rest in `weights_dtype`."""

    method: Literal["int4"]
    group_size: Count


@dataclass(frozen=True)
class NF4:
    """The same, with its linear layers in bitsandbytes' 4-bit NormalFloat; `double_quant` quantises their scales too."""

    method: Literal["nf4"]
    group_size: Count
    double_quant: bool


@dataclass(frozen=True)
class Int4QAT:
    """Quantisation-aware training on the INT4 grid on which weights will be stored; see quantization/qat.py.

    `targets` and `ignore` are patterns as in compressed-tensors' configurations. The first `warmup` steps compute without
    rounding, the last `freeze` leave the quantised weights as they are.
    """

    method: Literal["int4_qat"]
    targets: list[str]
    ignore: list[str]
    group_size: Count
    convention: Literal["kimi", "compressed_tensors"]
    warmup: Phase
    freeze: Phase


QUANTIZATION: dict[str, type] = {"int4": Int4, "nf4": NF4, "int4_qat": Int4QAT}


@dataclass(frozen=True)
class CheckpointSection:
    """Every so many steps, the newest `keep` of them; `resume` continues an unfinished run of the same recipe."""

    every: Count | None
    keep: Count
    resume: bool


@dataclass(frozen=True)
class LoggingSection:
    """Trackers beside metrics.jsonl; `peak_tflops` of one process for the MFU: null looks the device up or measures it."""

    trackers: Annotated[list[str], _some_of(TRACKERS)]
    peak_tflops: Annotated[float, above(0)] | None


@dataclass(frozen=True)
class GenerationSection:
    """The sample that the reloaded model writes; `temperature` 0 always takes the likeliest token."""

    prompt: str
    max_new_tokens: Count
    temperature: Annotated[float, at_least(0)]


@dataclass(frozen=True)
class Recipe:
    """A training run, resolved: what the file and the overrides say together."""

    output_dir: str
    overwrite: bool
    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    optimizer: Annotated[OptimizerOptions, Variant("name", OPTIMIZERS)]
    schedule: ScheduleSection
    router: RouterSection
    context: ContextSection | None
    training: TrainingSection
    memory: MemorySection
    parallel: ParallelSection
    adapter: AdapterSection | None
    quantization: Annotated[Any, Variant("method", QUANTIZATION, optional=True)]
    checkpoint: CheckpointSection
    logging: LoggingSection
    generation: GenerationSection

    @property
    def tokens_per_step(self) -> int:
        """How many tokens one optimizer step reads."""
        return self.training.batch_size * self.data.sequence_length

    def num_steps(self, phase: int | float) -> int:
        """The length of a phase that is given as steps or as a share of all of them; shares are rounded down."""
        return phase if isinstance(phase, int) else int(phase * self.training.steps)

    def layout(self, world_size: int) -> Layout:
        """The parallel section for so many processes.

        Raises:
            ValueError: they do not divide.
        """
        parallel = self.parallel
        if world_size % parallel.pipeline:
            raise ValueError(
                f"parallel.pipeline is {parallel.pipeline}, but {world_size} processes run: expected a multiple of it."
            )
        data_size = world_size // parallel.pipeline
        shard = data_size if parallel.shard == "all" else parallel.shard
        if data_size % shard:
            raise ValueError(
                f"parallel.shard is {shard}, but each pipeline stage has {data_size} processes: expected a divisor, or all."
            )
        return Layout(data_size // shard, shard, parallel.expert, parallel.pipeline)

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


# What may change when an unfinished run goes on: it moves where and how the same numbers are computed.
_FREE = (
    *("overwrite", "parallel.", "memory.", "checkpoint.", "logging.", "generation.", "data.cache_dir"),
    *("training.micro_batch_size", "training.cpu_threads", "training.data_workers", "training.eval_"),
)


def differences(text: str, recipe: Recipe) -> list[str]:
    """Why a run that was started with the recipe `text` cannot be continued with `recipe`; nothing if it can."""
    before, now = _flat(parse_yaml(text, "recipe.yaml")), _flat(parse_yaml(recipe.to_yaml(), "recipe.yaml"))
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {
        key: item for name, value in values.items() for key, item in _flat(value, f"{prefix}{name}.").items()
    }


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

    def demand(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{source}: {message}")

    model, tokenizer, schedule, training = recipe.model, recipe.tokenizer, recipe.schedule, recipe.training
    demand(
        model.config is not None or model.weights is not None,
        "model.config and model.weights are both null: expected a size, or weights to start from.",
    )
    demand(
        tokenizer.vocab_size is None or tokenizer.path is None,
        f"tokenizer.vocab_size is {tokenizer.vocab_size!r} and tokenizer.path is {tokenizer.path!r}: expected at most one "
        "of them, the other null.",
    )
    demand(
        (tokenizer.vocab_size is None and tokenizer.path is None) <= (model.weights is not None),
        "tokenizer.vocab_size and tokenizer.path are both null, and so is model.weights: expected a tokenizer to train, to "
        "load, or one beside the weights.",
    )
    data = recipe.data
    sources = data.source if isinstance(data.source, list) else [data.source]
    demand(
        data.weights is None or len(data.weights) == len(sources),
        f"data.weights has {len(data.weights or ())} numbers, data.source {len(sources)} parts: expected one for each, or "
        "null.",
    )
    demand(
        data.kind == "text" or data.packing != "joined",
        "data.packing is 'joined', which would cut conversations in two: expected separate or unpacked for data.kind chat.",
    )
    steps = training.steps
    warmup, decay = recipe.num_steps(schedule.warmup), recipe.num_steps(schedule.decay)
    demand(
        warmup + decay <= steps,
        f"schedule.warmup is {schedule.warmup} and schedule.decay {schedule.decay}, together {warmup + decay} steps: "
        f"expected at most training.steps, {steps}.",
    )
    demand(
        schedule.min_lr <= recipe.optimizer.lr,
        f"schedule.min_lr is {schedule.min_lr:g}: expected at most optimizer.lr, {recipe.optimizer.lr:g}.",
    )
    if recipe.context is not None:
        _check_context(recipe, recipe.context, demand)
    parallel = recipe.parallel
    demand(
        parallel.engine == "transformers" or (parallel.pipeline == 1 and parallel.expert == 1),
        f"parallel.engine is 'accelerate', which has neither pipeline stages ({parallel.pipeline}) nor expert parallelism "
        f"({parallel.expert}): expected 1 of both, or the engine transformers.",
    )
    demand(
        parallel.engine == "transformers" or parallel.shard == "all",
        f"parallel.engine is 'accelerate', which shards over all processes, but parallel.shard is {parallel.shard}: "
        "expected all.",
    )
    demand(
        "full" not in recipe.memory.recompute or len(recipe.memory.recompute) == 1,
        f"memory.recompute is {recipe.memory.recompute}: expected 'full' alone, because it covers the others.",
    )
    adapter = recipe.adapter
    demand(
        adapter is None
        or (model.weights is not None and getattr(recipe.optimizer, "qk_clip_tau", None) is None),
        "an adapter needs model.weights, the base it belongs to, and optimizer.qk_clip_tau null, because the projections "
        "that would be scaled are frozen.",
    )
    demand(
        adapter is None or parallel.pipeline == 1,
        f"parallel.pipeline is {parallel.pipeline}: expected 1 with an adapter.",
    )
    demand(
        adapter is None or not isinstance(recipe.quantization, Int4QAT),
        "quantization.method is 'int4_qat', which trains the weights that an adapter freezes: expected one of them.",
    )
    demand(
        ("swiglu" not in recipe.memory.recompute and "moe_down" not in recipe.memory.recompute)
        or model.experts == "k2",
        f"memory.recompute is {recipe.memory.recompute}, but model.experts is {model.experts!r}: expected k2, whose routed "
        "experts can recompute them.",
    )
    if isinstance(recipe.quantization, Int4QAT):
        on, still = recipe.num_steps(recipe.quantization.warmup), recipe.num_steps(recipe.quantization.freeze)
        demand(
            on + still <= steps,
            f"quantization.warmup is {recipe.quantization.warmup} and quantization.freeze {recipe.quantization.freeze}, "
            f"together {on + still} steps: expected at most training.steps, {steps}.",
        )
    if isinstance(recipe.quantization, Int4 | NF4):
        method = f"quantization.method is {recipe.quantization.method!r}"
        demand(recipe.adapter is not None, f"{method}, whose weights cannot train: expected an adapter.")
        demand(model.weights is not None, f"{method}, a frozen base: expected model.weights.")


def _check_context(recipe: Recipe, context: ContextSection, demand: Any) -> None:
    total = sum(stage.steps for stage in context.stages)
    demand(
        total == recipe.training.steps,
        f"context.stages have {total} steps together: expected training.steps, {recipe.training.steps}.",
    )
    tokens = recipe.tokens_per_step
    for stage in context.stages:
        demand(
            tokens % stage.sequence_length == 0,
            f"a context stage has sequence_length {stage.sequence_length}: expected a divisor of the {tokens} tokens of a "
            "step (training.batch_size x data.sequence_length).",
        )
    longest = max([*context.eval_lengths, *(stage.sequence_length for stage in context.stages)])
    demand(
        longest <= context.max_position_embeddings,
        f"context.max_position_embeddings is {context.max_position_embeddings}: expected at least the longest sequence, "
        f"{longest}.",
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, which plain YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
