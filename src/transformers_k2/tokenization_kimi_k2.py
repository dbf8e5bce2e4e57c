"""KimiK2Tokenizer: Kimi K2's tokenizer on the `tokenizers` backend, read from the hub's `tiktoken.model`.

The hub ships Python code for it, which transformers 5 cannot import; without that code transformers silently
takes another model's pre-tokenisation pattern. Here the ids equal tiktoken's, everything a fast tokenizer
offers works (offsets, assistant masks, batches) and no remote code runs. The price: encoding is slower than
tiktoken's.

`save_pretrained` writes the hub's layout and more: `tiktoken.model`, `tokenizer_config.json` with the hub's
`tokenizer_class: TikTokenTokenizer` and `added_tokens_decoder`, `tokenizer.json`, and `chat_template.jinja`.
AutoTokenizer returns this class where `transformers_k2` is imported; plain transformers 5, and vLLM on it,
does not know the class name and takes `tokenizer.json`, which gives the same ids. `auto_map` is dropped,
because the code it points at is not saved: for transformers 4, copy `tokenization_kimi.py` and `auto_map`
from the hub to the folder.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import BatchEncoding, TokenizersBackend

from .files import write_text
from .tokenizer_conversion import (
    PATTERN,
    backend_ranks,
    load_backend,
    pre_tokenizer,
    replace_surrogates,
    write_ranks,
)

logger = logging.getLogger(__name__)

# Ids that follow the ranks. Source: the hub's embedding has 163840 rows and tiktoken.model 163584 ranks (the
# July tokenization_kimi.py reserved 258 ids, two more than there are rows).
NUM_RESERVED_TOKENS = 256

# Offset from the first reserved id: (name, special). Source: added_tokens_decoder in the
# tokenizer_config.json of moonshotai/Kimi-K2-Instruct; media and think tokens of moonshotai/Kimi-K2.5. Tool
# and think markers are not special, so that `skip_special_tokens` leaves them to the parser. A folder's own
# added_tokens_decoder replaces this table.
RESERVED_TOKENS: dict[int, tuple[str, bool]] = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    6: ("<|start_header_id|>", True),
    7: ("<|end_header_id|>", True),
    9: ("[EOT]", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    18: ("<|media_begin|>", True),
    19: ("<|media_content|>", True),
    20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}

# The class name in the hub's tokenizer_config.json, which AutoTokenizer looks up.
HUB_CLASS_NAME = "TikTokenTokenizer"

# Keys that transformers adds to the configuration while loading, and the hub's pointer to its Python code.
_UNSAVED_KEYS = ("auto_map", "backend", "is_local", "local_files_only")

# Name: Jinja text. Written for this package; the format's source is the hub's chat templates.
CHAT_TEMPLATES: dict[str, str] = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).with_name("chat_templates").glob("*.jinja"))
}


class KimiK2Tokenizer(TokenizersBackend):
    r"""Kimi K2's tokenizer. `len(tokenizer)` and `vocab_size`: the number of ranks plus 256 (163840).

    Text that spells a reserved token is read as that token, as in every Hugging Face tokenizer. With
    `split_special_tokens=True`, per call or at loading, it is read as plain text, tool and think markers
    included; for untrusted text inside a chat use `apply_chat_template(..., sanitize_control_tokens=True)`.
    Unpaired surrogates become U+FFFD, as in tiktoken. No BOS is added. Padding is on the left, because
    batched generation continues at the right end.

    Args:
        vocab_file: a `tiktoken.model`: lines `<base64 token> <rank>`, any number from 256 up.
        tokenizer_file: a `tokenizer.json` saved by this class. It wins over `vocab_file`, since it holds what
            was added later; one that cuts text by another pattern loses (a warning is logged).
        tokenizer_object: a ready `tokenizers.Tokenizer` instead of files.
        added_tokens_decoder: id -> AddedToken or its fields. Names of reserved ids (an unnamed one is called
            `<|reserved_token_{id}|>`) and of tokens that follow them. Default: `RESERVED_TOKENS`.
        chat_template: Jinja text, or "instruct" or "thinking" for this package's templates. Default:
            "instruct". The two names also work in `apply_chat_template(chat_template=...)`, whichever
            template was loaded.

    Raises:
        FileNotFoundError: `vocab_file` does not exist.
        ValueError: there is no source, `vocab_file` is malformed, or `added_tokens_decoder` does not fit it.
    """

    vocab_files_names = {"vocab_file": "tiktoken.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        tokenizer_object: Tokenizer | None = None,
        added_tokens_decoder: Mapping[int | str, AddedToken | Mapping[str, Any]] | None = None,
        chat_template: str | dict[str, str] | list[dict[str, str]] | None = None,
        bos_token: str | AddedToken | None = "[BOS]",
        eos_token: str | AddedToken | None = "[EOS]",
        unk_token: str | AddedToken | None = "[UNK]",
        pad_token: str | AddedToken | None = "[PAD]",
        **kwargs: Any,
    ) -> None:
        named = {
            int(index): token if isinstance(token, AddedToken) else AddedToken(**token)
            for index, token in (added_tokens_decoder or {}).items()
        }
        self._tokenizer = _load(vocab_file, tokenizer_file, tokenizer_object)
        if not self._tokenizer.get_added_tokens_decoder():
            self._tokenizer.add_tokens(_reserved_tokens(self.num_ranks, named))
        if chat_template is None:
            chat_template = "instruct"
        if isinstance(chat_template, str):
            chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
        if not {"extra_special_tokens", "additional_special_tokens"} & kwargs.keys():
            attributes = {str(token) for token in (bos_token, eos_token, unk_token, pad_token)}
            kwargs["extra_special_tokens"] = [
                token.content
                for index, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
                if token.special and token.content not in {*attributes, _placeholder(index)}
            ]
        # Set here, not only on the class, so that they are saved and hold for other readers of the folder.
        kwargs.setdefault("padding_side", self.padding_side)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            vocab_file=vocab_file,
            added_tokens_decoder=named,
            chat_template=chat_template,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            **kwargs,
        )
        for index, token in named.items():
            actual = self.convert_tokens_to_ids(token.content)
            if actual != index:
                raise ValueError(
                    f"{vocab_file or tokenizer_file} has {self.num_ranks} ranks and {token.content!r} id "
                    f"{actual}; added_tokens_decoder puts it at {index}, expected {min(named)} ranks."
                )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`; upstream converts `tiktoken.model` with another model's pattern."""
        return kwargs

    @classmethod
    def _patch_mistral_regex(cls, tokenizer: Tokenizer, *args: Any, **kwargs: Any) -> Tokenizer:
        """Skip upstream's check for Mistral's faulty pattern, which asks the hub on every load."""
        return tokenizer

    @property
    def num_ranks(self) -> int:
        """How many ids come from `tiktoken.model`; the reserved ids follow them."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Ranks and reserved ids (163840), as in config.json and the hub's class; without later additions."""
        return self.num_ranks + NUM_RESERVED_TOKENS

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict] | None = None) -> str:
        """As upstream; in addition "instruct" and "thinking" name this package's templates."""
        template = super().get_chat_template(chat_template, tools)
        return CHAT_TEMPLATES.get(template, template)

    def _encode_plus(
        self, text: Any, text_pair: Any = None, split_special_tokens: bool | None = None, **kwargs: Any
    ) -> BatchEncoding:
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        encode = super(KimiK2Tokenizer, self._plain_twin() if split else self)._encode_plus
        try:
            return encode(text, text_pair, split_special_tokens=split, **kwargs)
        except TypeError:  # how `tokenizers` refuses an unpaired surrogate, among other things
            replaced, replaced_pair = replace_surrogates(text), replace_surrogates(text_pair)
            if (replaced, replaced_pair) == (text, text_pair):
                raise
            return encode(replaced, replaced_pair, split_special_tokens=split, **kwargs)

    def _plain_twin(self) -> KimiK2Tokenizer:
        """This tokenizer with all reserved tokens flagged special: the backend ignores only special ones."""
        backend = Tokenizer(self._tokenizer.model)  # shares the model
        for stage in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (value := getattr(self._tokenizer, stage)) is not None:
                setattr(backend, stage, value)
        tokens = sorted(self._tokenizer.get_added_tokens_decoder().items())  # copies
        for index, token in tokens:
            token.special = token.special or self.num_ranks <= index < self.vocab_size
        backend.add_tokens([token for _, token in tokens])
        twin = copy.copy(self)
        twin._tokenizer = backend
        return twin

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str]:
        """Write `tiktoken.model`, byte for byte the hub's file if the tokenizer was read from it."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / name
        write_ranks(path, backend_ranks(self._tokenizer))
        return (str(path),)

    def _save_pretrained(
        self,
        save_directory: str | Path,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        config_file = Path(file_names[0])  # upstream has just written it
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for key in _UNSAVED_KEYS:
            config.pop(key, None)
        config["tokenizer_class"] = HUB_CLASS_NAME
        # The hub's spelling: transformers 4 refuses a list under `extra_special_tokens`, 5 reads both.
        config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
        config["extra_special_tokens"] = {}
        config["added_tokens_decoder"] = {
            str(index): token.__getstate__()
            for index, token in sorted(self.added_tokens_decoder.items())
            if token.content != _placeholder(index)
        }
        write_text(config_file, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(save_directory, filename_prefix)

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str | list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
    ) -> KimiK2Tokenizer:
        """`train_tokenizer` under upstream's name, on texts or batches of texts; keeps this chat template.

        Raises:
            ValueError: other special tokens are asked for, or as `train_tokenizer`.
        """
        from .tokenizer_training import train_tokenizer  # which imports this module

        if new_special_tokens or special_tokens_map:
            asked = new_special_tokens or special_tokens_map
            raise ValueError(
                f"The reserved tokens are fixed, got {asked}: expected none; add tokens afterwards."
            )
        texts = (text for batch in text_iterator for text in ([batch] if isinstance(batch, str) else batch))
        trained = train_tokenizer(texts, vocab_size)
        trained.chat_template = self.chat_template
        return trained


def _load(
    vocab_file: str | Path | None, tokenizer_file: str | Path | None, tokenizer_object: Tokenizer | None
) -> Tokenizer:
    if tokenizer_object is not None:
        return copy.deepcopy(tokenizer_object)
    if tokenizer_file is not None:
        backend = Tokenizer.from_file(str(tokenizer_file))
        found, ours = backend.pre_tokenizer, pre_tokenizer()
        if found is not None and found.__getstate__() == ours.__getstate__():
            return backend
        remedy = "its pattern is replaced" if vocab_file is None else f"{vocab_file} is read instead"
        logger.warning("%s does not cut text by Kimi K2's pattern; %s.", tokenizer_file, remedy)
        if vocab_file is None:
            backend.pre_tokenizer = ours
            return backend
    if vocab_file is None:
        raise ValueError(
            "No vocabulary: expected a vocab_file (tiktoken.model) or tokenizer_file (tokenizer.json)."
        )
    return load_backend(vocab_file)


def _reserved_tokens(num_ranks: int, named: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The 256 tokens after the ranks, by `named` if it names any of them, else by `RESERVED_TOKENS`."""
    ids = range(num_ranks, num_ranks + NUM_RESERVED_TOKENS)
    if named.keys().isdisjoint(ids):
        named = {
            num_ranks + offset: AddedToken(name, special=special, normalized=False)
            for offset, (name, special) in RESERVED_TOKENS.items()
        }
    return [named.get(i) or AddedToken(_placeholder(i), special=True, normalized=False) for i in ids]


def _placeholder(index: int) -> str:
    return f"<|reserved_token_{index}|>"


__all__ = ["CHAT_TEMPLATES", "NUM_RESERVED_TOKENS", "PATTERN", "RESERVED_TOKENS", "KimiK2Tokenizer"]
