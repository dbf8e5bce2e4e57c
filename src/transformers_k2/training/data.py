"""A recipe's tokenizer and rows: sources read, a tokenizer trained if need be, tokens cached, documents split.

Rank 0 does the work that is done once; the others map what it wrote. What it gives up: nodes without a common disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_kimi_k2 import KimiK2Config
from ..tokenizer_training import train_tokenizer
from . import machine
from .chat_data import encode_conversations, read_conversations
from .recipe import Recipe
from .rows import JoinedRows, Mixture, PackedRows, Rows, UnpackedRows
from .sources import Source
from .token_cache import (
    TokenCache,
    build_cache,
    encode_texts,
    fingerprint,
    hash_texts,
    held_out_mask,
    kept,
    split,
    tokenizer_identity,
)

_ROWS: dict[str, Any] = {"joined": JoinedRows, "separate": PackedRows, "unpacked": UnpackedRows}


@dataclass(frozen=True)
class Data:
    """What training reads and what it is judged by. `caches` are one per mixed source."""

    tokenizer: PreTrainedTokenizerBase
    caches: tuple[TokenCache, ...]
    training_documents: tuple[Any, ...]  # int64 arrays, one per cache
    held_out_documents: tuple[Any, ...]
    held_out: Rows
    skipped_files: int

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return sum(
            int(cache.num_bytes[documents].sum())
            for cache, documents in zip(self.caches, self.held_out_documents, strict=True)
        )

    def num_tokens(self, documents: tuple[Any, ...]) -> int:
        """Tokens of `training_documents` or `held_out_documents`."""
        return sum(
            int((cache.offsets[numbers + 1] - cache.offsets[numbers]).sum())
            for cache, numbers in zip(self.caches, documents, strict=True)
        )

    def rows(self, recipe: Recipe, sequence_length: int, seed: int, held_out: bool = False) -> Rows:
        """Rows of `sequence_length` tokens of the training documents (shuffled) or of the held-out ones (in order)."""
        kind = _ROWS[recipe.data.packing]
        documents = self.held_out_documents if held_out else self.training_documents
        parts = [
            kind(cache, numbers, sequence_length, seed=seed, shuffle=not held_out)
            for cache, numbers in zip(self.caches, documents, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        weights = recipe.data.weights
        assert weights is not None
        return Mixture(parts, weights)


def load_tokenizer(recipe: Recipe, config: KimiK2Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer at `tokenizer.path`, or the weights' own; None if the recipe trains one.

    Raises:
        ValueError: it has more ids than the model, or no EOS token.
    """
    if recipe.tokenizer.vocab_size is not None:
        return None
    path = recipe.tokenizer.path or recipe.model.weights
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer {path!r} has {len(tokenizer)} ids, but the model {recipe.model.config} only "
            f"{config.vocab_size}: set model.overrides.vocab_size={len(tokenizer)}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {path!r} has no eos_token: expected one, to end documents with.")
    return tokenizer


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, folder: Path, progress: Progress
) -> Data:
    """Train a tokenizer (on the training documents alone) unless one is given, tokenise once, split.

    Rank 0 works first; the others wait and map what it wrote.

    Args:
        folder: of the run; a trained tokenizer is kept there.
        progress: gets one bar per phase; its columns may show `task.fields["note"]`.

    Raises:
        ValueError: the text cannot be read, or is too little.
    """
    section = recipe.data
    names = section.source if section.weights is not None else [section.source]
    sources = [Source(name, section.text_field, section.max_bytes) for name in names]
    error: ValueError | None = None
    data: Data | None = None
    if machine.rank() == 0:
        try:
            data = _prepare(recipe, sources, tokenizer, folder, progress)
        except ValueError as caught:
            error = caught
    problem = machine.from_rank_0(str(error) if error else None)
    if problem is not None:
        raise error or ValueError(problem)
    if data is None:
        data = _prepare(recipe, sources, tokenizer, folder, progress)
    return data


def _prepare(
    recipe: Recipe,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    progress: Progress,
) -> Data:
    section = recipe.data
    if tokenizer is None:
        tokenizer = _trained_tokenizer(recipe, sources, folder / "tokenizer", progress)
    caches = []
    for source in sources:
        name = fingerprint(source.identity(), tokenizer_identity(tokenizer), section.kind, section.seed)
        task = progress.add_task("Tokenising", total=source.num_bytes, note="")
        documents: Any = source if section.kind == "text" else read_conversations(source)

        def encode(batch: list[Any], tokenizer: PreTrainedTokenizerBase = tokenizer) -> Any:
            if section.kind == "text":
                return encode_texts(batch, tokenizer)
            return encode_conversations(batch, tokenizer, {})

        cache = build_cache(
            documents,
            encode,
            tokenizer,
            Path(section.cache_dir) / name,
            section.seed,
            lambda done, task=task: progress.advance(task, done),
        )
        progress.update(task, total=1, completed=1, note=f"{cache.num_tokens:,} tokens")
        caches.append(cache)
    parts = [split(cache, section.held_out_share) for cache in caches]
    data = Data(
        tokenizer=tokenizer,
        caches=tuple(caches),
        training_documents=tuple(training for training, _ in parts),
        held_out_documents=tuple(held_out for _, held_out in parts),
        held_out=None,  # type: ignore[arg-type]
        skipped_files=sum(source.skipped for source in sources),
    )
    object.__setattr__(
        data, "held_out", data.rows(recipe, section.sequence_length, section.seed, held_out=True)
    )
    return data


def _trained_tokenizer(
    recipe: Recipe, sources: list[Source], folder: Path, progress: Progress
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, trained on the training documents if it is not there yet."""
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    section, vocab_size = recipe.data, recipe.tokenizer.vocab_size
    assert vocab_size is not None

    def texts(source: Source) -> Iterable[str]:
        if section.kind == "text":
            return source
        return (_conversation_text(row) for row in read_conversations(source))

    def training() -> Iterator[str]:
        for source in sources:
            sized = list(_counted(texts(source), progress, "Reading text", source.num_bytes))
            yield from kept(sized, ~held_out_mask(hash_texts(sized, section.seed), section.held_out_share))

    task = progress.add_task("Training the tokenizer", total=None, note="")
    tokenizer = train_tokenizer(training(), vocab_size)
    progress.update(task, total=1, completed=1)
    partial = folder.with_name(f".{folder.name}.partial")
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return tokenizer


def _conversation_text(row: dict[str, Any]) -> str:
    return "\n".join(str(message.get("content") or "") for message in row["messages"])


def _counted(texts: Iterable[str], progress: Progress, name: str, total: int | None) -> Iterator[str]:
    """Pass texts on and move a bar by their bytes; the bar is full when the texts are at their end."""
    task, done = progress.add_task(name, total=total, note=""), 0
    for text in texts:
        yield text
        done += len(text.encode("utf-8", "replace"))
        progress.update(task, completed=done, note=f"{done / 1e6:.1f} MB")
    progress.update(task, total=done)
