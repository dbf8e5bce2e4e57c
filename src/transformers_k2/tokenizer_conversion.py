"""A `tiktoken.model` as a `tokenizers.Tokenizer`: read and checked, converted exactly, cached on disk.

transformers converts the same file with another model's pre-tokenisation pattern, in about 6 s. Here the
pattern is Kimi's, the conversion takes about 2 s, and its result is kept under
`HF_HOME/transformers_k2/tokenizers`, from where it loads in under 1 s. The price is 9 MB of disk per
vocabulary; the folder may be deleted at any time. tiktoken itself is not needed.
"""

from __future__ import annotations

import binascii
import hashlib
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import tokenizers
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from .files import write_text

logger = logging.getLogger(__name__)

# Part of the cache key: raise it whenever `build_backend` gives another result for the same file.
CONVERTER_VERSION = 1

_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# How text is cut before merging; the first alternative that matches wins. Source: `pat_str` in
# tokenization_kimi.py of moonshotai/Kimi-K2-Instruct. `&&` is set intersection, known to tiktoken's and to
# tokenizers' regex engine.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        _PREFIX + _UPPER + "*" + _LOWER + "+" + _CONTRACTION,
        _PREFIX + _UPPER + "+" + _LOWER + "*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _byte_alphabet() -> str:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table); index = byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
_TO_BYTE = {ord(character): byte for byte, character in enumerate(BYTE_ALPHABET)}


def read_ranks(path: str | Path) -> list[bytes]:
    """The tokens of a `tiktoken.model` file; index = rank.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not `<base64 token> <rank>`, a token or a rank occurs twice, a rank is missing,
            or one of the 256 single bytes is (then some text could not be encoded). The message names file
            and line.
    """
    return _parse_ranks(path, _read(path))


def _read(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No tokenizer vocabulary at {path}: expected a tiktoken.model file.")
    return Path(path).read_bytes()


def _parse_ranks(path: str | Path, content: bytes) -> list[bytes]:
    line_of_rank: dict[int, int] = {}
    line_of_token: dict[bytes, int] = {}
    token_of_rank: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        encoded, _, digits = line.partition(b" ")
        try:
            token = binascii.a2b_base64(encoded, strict_mode=True)
        except binascii.Error:
            token = b""
        if not token or not digits.isdigit():
            raise ValueError(f"{path}, line {number}: got {_shown(line)}, expected '<base64 token> <rank>'.")
        rank = int(digits)
        if rank in line_of_rank:
            raise ValueError(
                f"{path}, line {number}: rank {rank} is already on line {line_of_rank[rank]}, "
                "expected each rank once."
            )
        if token in line_of_token:
            raise ValueError(
                f"{path}, line {number}: token {_shown(encoded)} is already on line {line_of_token[token]}, "
                "expected each token once."
            )
        line_of_rank[rank] = line_of_token[token] = number
        token_of_rank[rank] = token
    count = len(token_of_rank)
    missing = next((rank for rank in range(count) if rank not in token_of_rank), None)
    if missing is not None:
        last = max(token_of_rank)
        raise ValueError(
            f"{path}, line {line_of_rank[last]}: rank {last} in a file of {count} ranks, without rank "
            f"{missing}, expected the ranks 0 to {count - 1}."
        )
    absent = next((byte for byte in range(256) if bytes([byte]) not in line_of_token), None)
    if absent is not None:
        raise ValueError(
            f"{path}: none of its {count} ranks is the single byte 0x{absent:02x}, "
            "expected at least the 256 single bytes."
        )
    return [token_of_rank[rank] for rank in range(count)]


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace"))


def write_ranks(path: str | Path, ranks: list[bytes]) -> None:
    """Write a `tiktoken.model` file, atomically; `read_ranks` gives the same list back."""
    encoded = (binascii.b2a_base64(token, newline=False).decode("ascii") for token in ranks)
    write_text(path, "".join(f"{token} {rank}\n" for rank, token in enumerate(encoded)))


def backend_ranks(backend: Tokenizer) -> list[bytes]:
    """The inverse of `build_backend`: the tokens of the BPE model, without added tokens; index = rank."""
    vocab = backend.get_vocab(with_added_tokens=False)
    return [name.translate(_TO_BYTE).encode("latin-1") for name in sorted(vocab, key=vocab.__getitem__)]


def pre_tokenizer() -> PreTokenizer:
    """Cut text by `PATTERN`, then write its bytes in `BYTE_ALPHABET`."""
    return Sequence([Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def build_backend(ranks: list[bytes]) -> Tokenizer:
    """The `tokenizers.Tokenizer`, without added tokens, that gives tiktoken's ids for these ranks.

    tiktoken keeps no merges: it joins the two neighbours whose concatenation has the lowest rank. Here every
    split of a token into two tokens is a merge, ordered by the token's rank. That is exact: within the span
    that becomes one token the joins follow the same order whatever surrounds it, so only one of its splits
    ever appears, and the other merges do nothing. A piece that is a token as a whole is taken as it is
    (`ignore_merges`).
    """
    # Translated as one string: a call per token takes three times as long as all the rest.
    text = b"".join(ranks).decode("latin-1").translate(BYTE_ALPHABET)
    names, start = [], 0
    for token in ranks:
        names.append(text[start : start + len(token)])
        start += len(token)
    vocab = {name: rank for rank, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = ByteLevelDecoder()
    return backend


def load_backend(path: str | Path) -> Tokenizer:
    """`build_backend(read_ranks(path))`, from the cache when the same file was converted before.

    The key is the file's content and everything else the conversion depends on. Files are written under a
    temporary name and renamed, so processes may race; a damaged file fails its checksum and is rebuilt. A
    cache that cannot be read or written is no error: a warning is logged and the conversion runs again.

    Raises:
        FileNotFoundError, ValueError: as `read_ranks`.
    """
    content = _read(path)
    key = (hashlib.sha256(content).hexdigest(), str(CONVERTER_VERSION), tokenizers.__version__, PATTERN)
    entry = cache_folder() / f"{hashlib.sha256(' '.join(key).encode()).hexdigest()}.json"
    cached = _read_cache(entry)
    if cached is not None:
        return Tokenizer.from_buffer(cached)
    backend = build_backend(_parse_ranks(path, content))
    _write_cache(entry, backend.to_str())
    return backend


def cache_folder() -> Path:
    """Where converted vocabularies are kept: under `HF_HOME`."""
    return Path(constants.HF_HOME) / "transformers_k2" / "tokenizers"


def _read_cache(entry: Path) -> bytes | None:
    try:
        checksum, _, payload = entry.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("The tokenizer cache cannot be read (%s); converting the vocabulary again.", error)
        return None
    if hashlib.sha256(payload).hexdigest().encode() != checksum:
        logger.warning("The tokenizer cache file %s is damaged; converting the vocabulary again.", entry)
        return None
    return payload


def _write_cache(entry: Path, payload: str) -> None:
    checksum = hashlib.sha256(payload.encode()).hexdigest()
    # A name of its own, because two threads of one process may be here at once.
    temporary = entry.with_name(f"{entry.stem}.{uuid.uuid4().hex}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(temporary, f"{checksum}\n{payload}")
        os.replace(temporary, entry)
    except OSError as error:
        logger.warning("The tokenizer cache cannot be written (%s); the next load converts again.", error)


def replace_surrogates(text: Any) -> Any:
    """Unpaired surrogates, which UTF-8 cannot write, become U+FFFD as in tiktoken; also inside lists."""
    if isinstance(text, str):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(text, (list, tuple)):
        return type(text)(replace_surrogates(part) for part in text)
    return text
