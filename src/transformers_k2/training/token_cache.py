"""Documents tokenised once into files that every process maps: ids, borders, content hashes and, for chat, the loss mask.

Building holds a few documents in memory at a time; reading costs page cache, shared by the processes of a machine.
Documents are held out by a hash of their content, so a document and its duplicates are always on the same side. What it
gives up: the split sorts 8 bytes per document in memory, and a damaged byte inside a file of the right size is not seen.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from .once import build_once

T = TypeVar("T")
Progress = Callable[[int], None]

_VERSION = 1  # of the files below; part of every fingerprint
_META = "meta.json"
_BATCH = 64  # documents tokenised in one call, which the tokenizer spreads over the cores
_BATCH_BYTES = 1 << 20  # one call gets no further document after this much


class Document(NamedTuple):
    """One document, tokenised. `content` is what it is held out by; `loss` is 1 on the ids to learn, None for all."""

    ids: list[int]
    content: bytes
    num_bytes: int
    loss: list[int] | None = None


@dataclass(frozen=True)
class Meta:
    """What meta.json holds."""

    version: int
    dtype: str  # of the ids: uint16 where the vocabulary allows, else int32
    num_tokens: int
    num_documents: int
    has_loss_mask: bool
    seed: int  # of the content hashes
    pad_token_id: int


def content_hash(content: bytes, seed: int) -> bytes:
    """16 bytes by which a document is held out or not."""
    return hashlib.blake2b(content, digest_size=16, salt=seed.to_bytes(16, "big")).digest()


def text_content(text: str) -> bytes:
    """What a text is hashed by: its UTF-8, with unpaired surrogates as they are."""
    return text.encode("utf-8", "surrogatepass")


def hash_texts(texts: Iterable[str], seed: int) -> np.ndarray:
    """The content hashes of a stream of texts: uint8 [documents, 16]."""
    hashes = bytearray()
    for text in texts:
        hashes += content_hash(text_content(text), seed)
    return np.frombuffer(hashes, np.uint8).reshape(-1, 16)


def held_out_mask(hashes: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out: those with the smallest hashes, `share` of them, at least one; bool [documents].

    Args:
        hashes: uint8 [documents, 16].

    Raises:
        ValueError: fewer than two different documents.
    """
    high, low = hashes.view(">u8").T.astype(np.uint64)
    different = len(high) > 0 and bool(((high != high[0]) | (low != low[0])).any())
    if not different:
        raise ValueError(
            f"data.source gives {len(high)} documents, {min(len(high), 1)} different: expected at least two, one to "
            "train on and one to hold out."
        )

    def up_to(place: int) -> np.ndarray:
        """Documents whose hash is at most the one at `place` of the sorted hashes."""
        bound = np.partition(high, place)[place]
        equal = high == bound
        rest = np.sort(low[equal])[place - int((high < bound).sum())]
        return (high < bound) | (equal & (low <= rest))

    mask = up_to(max(1, round(share * len(high))) - 1)
    return up_to(0) if mask.all() else mask  # all: duplicates filled the whole of it


def kept(documents: Iterable[T], mask: np.ndarray) -> Iterator[T]:
    """The documents of a stream where `mask` is true, such as the training texts to train a tokenizer on.

    Raises:
        ValueError: the stream has another length than when it was hashed.
    """
    number = -1
    for number, document in enumerate(documents):
        if number >= len(mask):
            break
        if mask[number]:
            yield document
    if number + 1 != len(mask):
        raise ValueError(
            f"data.source gave {len(mask)} documents and then another number: expected files that stay as they are."
        )


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Texts as documents, each followed by EOS. Text that spells a special token is tokenised as plain text."""
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )
    eos: Any = tokenizer.eos_token_id
    return [
        Document([*ids, eos], content := text_content(text), len(content))
        for text, ids in zip(texts, encoded["input_ids"], strict=True)
    ]


def fingerprint(*parts: Any) -> str:
    """A name for what follows from `parts` (JSON values), such as `source.identity()` and `tokenizer_identity()`."""
    text = json.dumps([_VERSION, *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a tokenizer's ids, its chat template included.

    Raises:
        ValueError: it is not one of the `tokenizers` library, whose content can be told.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}: expected one with a tokenizer.json (a TokenizersBackend)."
        )
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return fingerprint(tokenizer.backend_tokenizer.to_str(), names, tokenizer.chat_template)


class TokenCache:
    """A folder of tokenised documents, mapped into memory.

    Attributes:
        ids: all documents, one after the other: uint16 or int32 [tokens].
        offsets: where each begins, and the end of the last: int64 [documents + 1].
        num_bytes: each one's size as text: int64 [documents].
        hashes: of each one's content: uint8 [documents, 16].
        loss: 1 on the tokens to learn: uint8 [tokens]; None where all are to be learned.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError if the folder is not a complete cache."""
        self.folder = Path(folder)
        self.meta = self._meta()
        tokens, documents = self.meta.num_tokens, self.meta.num_documents
        self.ids = self._map("ids", self.meta.dtype, tokens)
        self.offsets = self._map("offsets", "int64", documents + 1)
        self.num_bytes = self._map("num_bytes", "int64", documents)
        self.hashes = self._map("hashes", "uint8", 16 * documents).reshape(-1, 16)
        self.loss = self._map("loss", "uint8", tokens) if self.meta.has_loss_mask else None
        if self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise ValueError(
                f"{self.folder}/offsets.bin does not belong to its ids: expected {tokens} tokens."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files again instead of receiving their content."""
        return TokenCache, (self.folder,)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self.meta.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents, held-out ones included."""
        return self.meta.num_documents

    def tokens(self, document: int) -> np.ndarray:
        """The ids of one document: uint16 or int32 [tokens], a view of the file."""
        return self.ids[self.offsets[document] : self.offsets[document + 1]]

    def _meta(self) -> Meta:
        path = self.folder / _META
        try:
            meta = Meta(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is missing or not a token cache's: {error}.") from None
        if meta.version != _VERSION:
            raise ValueError(f"{path} has version {meta.version}: expected {_VERSION}.")
        return meta

    def _map(self, name: str, dtype: str, size: int) -> np.ndarray:
        path, expected = self.folder / f"{name}.bin", size * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise ValueError(f"{path} has {found} bytes: expected {expected}, as its {_META} says.")
        if size == 0:
            return np.empty(0, dtype)
        with path.open("rb") as file:
            # Not np.memmap, whose slices cost microseconds each.
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def build_cache(
    documents: Iterable[T],
    encode: Callable[[list[T]], list[Document]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    seed: int,
    progress: Progress | None = None,
) -> TokenCache:
    """The cache at `folder`, built if need be. Processes that ask at once wait for the one that builds.

    Args:
        documents: read only if the cache has to be built; what `encode` takes.
        encode: a few documents -> the same, tokenised; see `encode_texts` and `chat_data.encode_conversations`.
        folder: named by `fingerprint`: a cache that exists is taken for the right one.
        seed: of the held-out split.
        progress: told the bytes of the documents done.

    Raises:
        ValueError: a document cannot be read or tokenised.
    """

    def build(partial: Path) -> None:
        _write(documents, encode, tokenizer, partial, seed, progress)

    return build_once(Path(folder), TokenCache, build)


def _write(
    documents: Iterable[T],
    encode: Callable[[list[T]], list[Document]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int,
    progress: Progress | None,
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    num_tokens = num_documents = 0
    has_loss_mask: bool | None = None
    with ExitStack() as stack:
        names = ("ids", "offsets", "num_bytes", "hashes", "loss")
        ids, offsets, num_bytes, hashes, loss = (
            stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names
        )
        offsets.write(array("q", [0]))
        for batch in _batches(documents):
            encoded = encode(batch)
            for document in encoded:
                assert has_loss_mask in (None, document.loss is not None), (
                    "some have a loss mask, some have none"
                )
                has_loss_mask = document.loss is not None
                num_tokens, num_documents = num_tokens + len(document.ids), num_documents + 1
                ids.write(np.asarray(document.ids, dtype).tobytes())
                offsets.write(array("q", [num_tokens]))
                num_bytes.write(array("q", [document.num_bytes]))
                hashes.write(content_hash(document.content, seed))
                if document.loss is not None:
                    assert len(document.loss) == len(document.ids)
                    loss.write(bytes(document.loss))
            if progress:
                progress(sum(document.num_bytes for document in encoded))
    if not has_loss_mask:
        (folder / "loss.bin").unlink()
    meta = Meta(_VERSION, dtype.name, num_tokens, num_documents, bool(has_loss_mask), seed, pad)
    (folder / _META).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")


def _batches(documents: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else _BATCH_BYTES // _BATCH
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split(cache: TokenCache, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the held-out documents, in order: two of int64 [documents].

    Raises:
        ValueError: the cache holds fewer than two different documents.
    """
    held_out = held_out_mask(cache.hashes, share)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
