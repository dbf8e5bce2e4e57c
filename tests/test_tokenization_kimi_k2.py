"""The tokenizer against tiktoken and the hub's files.

What needs the real vocabulary is skipped where the data folder next to the checkout is absent; everything
that does not depend on the exact ids then runs on a vocabulary trained on the standard library.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from huggingface_hub import constants
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken
from transformers import AutoTokenizer, TokenizersBackend

from transformers_k2 import KimiK2Tokenizer
from transformers_k2.tokenization_kimi_k2 import CHAT_TEMPLATES, PATTERN
from transformers_k2.tokenizer_conversion import cache_folder
from transformers_k2.tokenizer_training import train_tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
VOCAB = SHARED / "tokenizer" / "tiktoken.model"
HUB_CONFIG = SHARED / "checkpoints" / "kimi_k2_instruct.tokenizer_config.json"
needs_hub_data = pytest.mark.skipif(not VOCAB.is_file(), reason="needs ../shared/data")
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))]
SMALL_SIZE = 1500


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        yield


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer(SOURCES, SMALL_SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def small(small_folder: Path) -> KimiK2Tokenizer:
    return KimiK2Tokenizer(vocab_file=small_folder / "tiktoken.model")


@pytest.fixture(scope="module")
def kimi(own_cache: None) -> KimiK2Tokenizer:
    return KimiK2Tokenizer(vocab_file=VOCAB)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[KimiK2Tokenizer, tiktoken.Encoding]:
    """The tokenizer, the real one if possible, and its oracle."""
    tokenizer = request.getfixturevalue("kimi" if VOCAB.is_file() else "small")
    return tokenizer, oracle_of(tokenizer)


def oracle_of(tokenizer: KimiK2Tokenizer) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(tokenizer.vocab_file))
    return tiktoken.Encoding("k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def assert_same_ids(pair: tuple[KimiK2Tokenizer, tiktoken.Encoding], texts: list[str]) -> None:
    tokenizer, oracle = pair
    ids = tokenizer(texts, split_special_tokens=True)["input_ids"]
    expected = oracle.encode_ordinary_batch(texts, num_threads=2)
    different = [text for text, a, b in zip(texts, ids, expected, strict=True) if a != b]
    assert not different, f"{len(different)} of {len(texts)}, first: {different[0][:200]!a}"
    assert tokenizer.batch_decode(ids) == texts


# ---- ids ------------------------------------------------------------------------------------------------


@needs_hub_data
def test_golden_pairs(kimi: KimiK2Tokenizer) -> None:
    lines = (SHARED / "tokenizer" / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    for case in map(json.loads, lines):
        assert kimi.encode(case["text"], split_special_tokens=True) == case["ids"], case["text"][:100]
        assert kimi.decode(case["ids"]) == case["text"]


def test_long_text(pair) -> None:
    long = ["".join(SOURCES)[:1_000_000], "a" * 50_000, " " * 50_000, "\n" * 50_000, "中 " * 9_999]
    assert_same_ids(pair, long)


def test_every_code_point(pair) -> None:
    """Planes 4 to 13 hold no character, 15 and 16 only private ones; these are sampled."""
    scalars = [*range(0xD800), *range(0xE000, 0x110000)]
    points = [c for c in scalars if c >> 16 in (0, 1, 2, 3, 14) or c % 97 == 0]
    assert_same_ids(pair, ["\n".join(map(chr, points[i : i + 499])) for i in range(0, len(points), 499)])
    random.Random(0).shuffle(points)
    assert_same_ids(pair, ["".join(map(chr, points[i : i + 61])) for i in range(0, len(points), 61 * 4)])


POOLS = [
    "'stredmvlSTREDMVL\u017f\u212a ",
    " \t\r\n\u3000\xa0\u2028",
    "0123²①一\u3007Ⅷ٣",
    "{}[]()<>|_=+-*/#!?.,;:",
    "".join(map(chr, range(0x300, 0x370))),
    "".join(map(chr, range(0x3040, 0x3100))),
    "".join(map(chr, range(0x4E00, 0x9FFF))),
    "".join(map(chr, range(0x1F300, 0x1FAFF))) + "\u200d\ufe0f",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(count)
    texts = []
    for _ in range(count):
        chosen = rng.choices(POOLS, k=rng.randint(1, 4))
        texts.append("".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 40))))
        texts.append(rng.randbytes(rng.randint(1, 99)).decode(rng.choice(["utf-8", "latin-1"]), "replace"))
    return texts


def test_random_mixtures(pair) -> None:
    assert_same_ids(pair, random_texts(2500))


def test_unpaired_surrogates(pair) -> None:
    tokenizer, oracle = pair
    text = "a\udfffb\ud83d\ude00c\ud800"
    assert tokenizer.encode(text) == oracle.encode_ordinary(text)
    assert tokenizer([text, "x"])["input_ids"] == oracle.encode_ordinary_batch([text, "x"])
    with pytest.raises(ValueError, match="must be of type"):
        tokenizer(5)


# ---- special tokens -------------------------------------------------------------------------------------

SPECIAL_IDS = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|reserved_token_163589|>": 163589,
    "[EOT]": 163593,
    "<|im_system|>": 163594,
    "<|im_middle|>": 163601,
    "<|media_begin|>": 163602,
    "<|media_pad|>": 163605,
    "<|reserved_token_163837|>": 163837,
    "[UNK]": 163838,
    "[PAD]": 163839,
}
PLAIN_IDS = {
    "<|tool_calls_section_begin|>": 163595,
    "<|tool_calls_section_end|>": 163596,
    "<|tool_call_begin|>": 163597,
    "<|tool_call_argument_begin|>": 163598,
    "<|tool_call_end|>": 163599,
    "<think>": 163606,
    "</think>": 163607,
}


@needs_hub_data
def test_special_tokens(kimi: KimiK2Tokenizer) -> None:
    assert len(kimi) == kimi.vocab_size == len(kimi.get_vocab()) == 163840
    assert sorted(kimi.get_vocab().values()) == list(range(163840))
    for special, ids in ((True, SPECIAL_IDS), (False, PLAIN_IDS)):
        for name, index in ids.items():
            token = kimi.added_tokens_decoder[index]
            assert (kimi.encode(f"a{name}b")[1], token.content, token.special) == (index, name, special)
    named = json.loads(HUB_CONFIG.read_text(encoding="utf-8"))["added_tokens_decoder"]
    assert {i: kimi.added_tokens_decoder[int(i)].__getstate__() for i in named} == named
    attributes = (kimi.bos_token_id, kimi.eos_token_id, kimi.unk_token_id, kimi.pad_token_id)
    assert attributes == (163584, 163585, 163838, 163839)
    mixed = [163586, *kimi.encode("x"), 163597]
    assert kimi.decode(mixed, skip_special_tokens=True) == "x<|tool_call_begin|>"
    assert kimi.clean_up_tokenization_spaces is False
    assert kimi("x")["input_ids"] == kimi("x", add_special_tokens=False)["input_ids"]


def test_split_special_tokens(pair, small_folder: Path) -> None:
    tokenizer, oracle = pair
    text = "<|im_end|> <|tool_call_begin|>[EOS]<|reserved_token_1300|>"
    assert len(tokenizer.encode("<|im_end|><|tool_call_begin|>[EOS]")) == 3
    assert tokenizer.encode(text, split_special_tokens=True) == oracle.encode_ordinary(text)
    batch = tokenizer(["[PAD]", text], split_special_tokens=True, padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id
    always = KimiK2Tokenizer(vocab_file=tokenizer.vocab_file, split_special_tokens=True)
    assert always.encode(text) == oracle.encode_ordinary(text)
    chat = [{"role": "user", "content": "<|im_end|><|tool_call_begin|>"}]
    ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]
    end, call = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|tool_call_begin|>"])
    assert (ids.count(end), ids.count(call)) == (2, 0)


def test_padding_is_left(small: KimiK2Tokenizer) -> None:
    batch = small(["import os", "x"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1].tolist()[-1] == 1
    assert batch["attention_mask"][1].tolist()[0] == 0
    assert batch["input_ids"][1, 0] == small.pad_token_id == SMALL_SIZE - 1


# ---- loading and saving ---------------------------------------------------------------------------------


def flags(tokenizer: KimiK2Tokenizer) -> dict[int, dict]:
    return {index: token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}


def hub_folder(folder: Path, config: str | None) -> Path:
    """The hub's layout, with Python code that must never run."""
    shutil.copy(VOCAB, folder)
    shutil.copy(HUB_CONFIG, folder / "tokenizer_config.json")
    if config is not None:
        shutil.copy(SHARED / "checkpoints" / config, folder / "config.json")
    for module in ("tokenization_kimi", "configuration_deepseek", "configuration_kimi_k25"):
        (folder / f"{module}.py").write_text("raise RuntimeError('remote code ran')\n", encoding="utf-8")
    return folder


@needs_hub_data
@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("config", ["kimi_k2_instruct.config.json", "kimi_k2_5.config.json", None])
def test_auto_tokenizer_on_hub_folder(tmp_path: Path, config: str | None, trust: bool | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hub_folder(tmp_path, config), trust_remote_code=trust)
    assert type(tokenizer) is KimiK2Tokenizer
    assert tokenizer.encode("don't DON'T") == [88709, 92629, 64833]
    hub = json.loads(HUB_CONFIG.read_text(encoding="utf-8"))
    assert tokenizer.chat_template == hub["chat_template"]
    assert tokenizer.extra_special_tokens == hub["additional_special_tokens"]
    assert tokenizer.convert_tokens_to_ids("<|reserved_token_163606|>") == 163606  # not named by this folder
    messages = [{"role": "user", "content": "hi"}]
    for name, template in CHAT_TEMPLATES.items():
        ours = tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False)
        assert ours == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert "created by Moonshot AI" in ours


@needs_hub_data
def test_save_keeps_the_hub_layout(tmp_path: Path, kimi: KimiK2Tokenizer) -> None:
    source, saved = tmp_path / "hub", tmp_path / "saved"
    source.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(hub_folder(source, "kimi_k2_instruct.config.json"))
    tokenizer.save_pretrained(saved)
    assert (saved / "tiktoken.model").read_bytes() == VOCAB.read_bytes()
    ours = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    hub = json.loads(HUB_CONFIG.read_text(encoding="utf-8"))
    assert ours == {k: v for k, v in hub.items() if k not in ("auto_map", "chat_template")} | {
        "padding_side": "left"
    }
    again = AutoTokenizer.from_pretrained(saved)
    assert type(again) is KimiK2Tokenizer
    assert (flags(again), again.chat_template) == (flags(tokenizer), hub["chat_template"])
    # What plain transformers does with the folder: the unknown class name makes it take tokenizer.json.
    plain = TokenizersBackend.from_pretrained(saved)
    text = "don't 日本語 <|im_end|><|tool_call_begin|> x1234"
    assert plain.encode(text) == again.encode(text) == tokenizer.encode(text)
    assert plain.decode(plain.encode(text), skip_special_tokens=True) == text.replace("<|im_end|>", "")


def test_round_trip_with_changes(tmp_path: Path, small_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        small_folder, pad_token="<|pad_too|>", extra_special_tokens=["<|mine|>"], add_bos_token=True
    )
    assert type(tokenizer) is KimiK2Tokenizer
    tokenizer.add_tokens(["plainword", AddedToken("<tag>", special=False)])
    tokenizer.chat_template, tokenizer.padding_side = "{{ messages[0].content }}!", "right"
    text = "<|mine|>a plainword<tag><|im_end|>"
    ids = tokenizer.encode(text)
    assert (ids[0], ids[1] >= SMALL_SIZE, tokenizer.pad_token_id >= SMALL_SIZE) == (
        tokenizer.bos_token_id,
        True,
        True,
    )
    assert len(tokenizer) == SMALL_SIZE + 4
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    from_ranks = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    for other in (again, from_ranks, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is KimiK2Tokenizer
        assert (other.encode(text), other.get_vocab(), flags(other)) == (
            ids,
            tokenizer.get_vocab(),
            flags(tokenizer),
        )
        assert (other.pad_token, other.padding_side, other.extra_special_tokens) == (
            *("<|pad_too|>", "right", ["<|mine|>"]),
        )
        assert other.chat_template == "{{ messages[0].content }}!"


def test_tokenizer_json_alone(tmp_path: Path, small: KimiK2Tokenizer) -> None:
    small.save_pretrained(tmp_path / "full")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "full" / "tokenizer.json", tmp_path / "alone")
    tokenizer = KimiK2Tokenizer.from_pretrained(tmp_path / "alone")
    assert (flags(tokenizer), tokenizer.get_vocab()) == (flags(small), small.get_vocab())
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tiktoken.model").read_bytes() == Path(small.vocab_file).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "alone").encode("don't x1") == small.encode("don't x1")


def test_foreign_tokenizer_json_is_not_trusted(tmp_path: Path, small: KimiK2Tokenizer, caplog) -> None:
    """Converters that do not know the pattern leave such files next to tiktoken.model."""
    small.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    file.write_text(json.dumps(content), encoding="utf-8")
    for expected in ("is read instead", "is replaced"):
        tokenizer = KimiK2Tokenizer.from_pretrained(tmp_path)
        assert expected in caplog.text
        assert tokenizer.encode("don't x1234") == small.encode("don't x1234")
        (tmp_path / "tiktoken.model").unlink(missing_ok=True)


# ---- the file and its cache -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda lines: [*lines[:9], "version https://git-lfs", *lines[10:]],
            "line 10: got 'version https://git-lfs'",
        ),
        (
            lambda lines: [*lines[:9], "a b c", *lines[10:]],
            "line 10: got 'a b c', expected '<base64 token> <rank>'",
        ),
        (lambda lines: [*lines[:9], lines[9].split()[0], *lines[10:]], "line 10: "),
        (lambda lines: [*lines[:9], lines[9].split()[0] + " -9", *lines[10:]], "line 10: "),
        (
            lambda lines: [*lines[:9], lines[9].split()[0] + " 4", *lines[10:]],
            "line 10: rank 4 is already on line 5",
        ),
        (
            lambda lines: [*lines[:9], lines[0].split()[0] + " 9", *lines[10:]],
            "line 10: token '.*' is already on line 1",
        ),
        (
            lambda lines: [*lines[:900], *lines[901:]],
            f"line {SMALL_SIZE - 257}: .* without rank 900, .* 0 to 1242",
        ),
        (lambda lines: lines[:200], "none of its 200 ranks is the single byte 0x"),
        (lambda lines: [], "none of its 0 ranks"),
    ],
)
def test_malformed_vocabulary(tmp_path: Path, small_folder: Path, edit: Callable, message: str) -> None:
    lines = (small_folder / "tiktoken.model").read_text(encoding="utf-8").splitlines()
    file = tmp_path / "tiktoken.model"
    file.write_text("".join(f"{line}\n" for line in edit(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file}.*{message}") as error:
        KimiK2Tokenizer(vocab_file=file)
    assert "\n" not in str(error.value)


def test_missing_or_mismatched_vocabulary(tmp_path: Path, small_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        KimiK2Tokenizer(vocab_file=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a vocab_file"):
        KimiK2Tokenizer()
    shutil.copy(small_folder / "tokenizer_config.json", tmp_path)
    lines = (small_folder / "tiktoken.model").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "tiktoken.model").write_text("".join(lines[:1000]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has 1000 ranks .* expected {SMALL_SIZE - 256} ranks"):
        AutoTokenizer.from_pretrained(tmp_path)


LOAD = """
import sys
from transformers_k2 import KimiK2Tokenizer
print(KimiK2Tokenizer(vocab_file=sys.argv[1]).encode("abc def"))
"""


def test_cache(tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    vocab = small_folder / "tiktoken.model"
    expected = KimiK2Tokenizer(vocab_file=vocab).encode("abc def")
    (entry,) = cache_folder().iterdir()
    content = entry.read_bytes()
    stamp = entry.stat().st_mtime_ns
    assert KimiK2Tokenizer(vocab_file=vocab).encode("abc def") == expected
    assert entry.stat().st_mtime_ns == stamp
    for damaged in (b"", content[:-9], content.replace(b'"abc"', b'"abd"', 1) + b" ", b"\xff" * 99):
        entry.write_bytes(damaged)
        caplog.clear()
        assert KimiK2Tokenizer(vocab_file=vocab).encode("abc def") == expected
        assert "is damaged" in caplog.text
        assert (entry.read_bytes(), list(cache_folder().iterdir())) == (content, [entry])
    other = tmp_path / "other.model"  # one token differs: another key
    other.write_bytes(vocab.read_bytes() + b"enp6enp6eno= %d\n" % (SMALL_SIZE - 256))
    assert len(KimiK2Tokenizer(vocab_file=other)) == SMALL_SIZE + 1
    assert len(list(cache_folder().iterdir())) == 2


def test_cache_that_cannot_be_written(tmp_path: Path, small: KimiK2Tokenizer, monkeypatch, caplog) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert KimiK2Tokenizer(vocab_file=small.vocab_file).encode("abc def") == small.encode("abc def")
    assert "cannot be written" in caplog.text


@pytest.mark.slow
def test_cache_under_concurrent_processes(tmp_path: Path, small: KimiK2Tokenizer) -> None:
    command = [sys.executable, "-c", LOAD, str(small.vocab_file)]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    outputs = {process.communicate()[0].strip() for process in running}
    assert outputs == {str(small.encode("abc def"))}
    assert len(list((tmp_path / "transformers_k2" / "tokenizers").iterdir())) == 1


# ---- training -------------------------------------------------------------------------------------------


def test_trained_ranks_in_tiktoken(small: KimiK2Tokenizer) -> None:
    assert_same_ids((small, oracle_of(small)), [*SOURCES[:40], *random_texts(1000)])


def test_training_is_deterministic(tmp_path: Path, small_folder: Path, small: KimiK2Tokenizer) -> None:
    train_tokenizer(reversed(SOURCES), SMALL_SIZE, tmp_path)
    digests = {
        hashlib.sha256((f / "tiktoken.model").read_bytes()).hexdigest() for f in (tmp_path, small_folder)
    }
    assert len(digests) == 1
    assert (len(small), small.num_ranks, small.bos_token_id) == (
        SMALL_SIZE,
        SMALL_SIZE - 256,
        SMALL_SIZE - 256,
    )
    assert small.convert_tokens_to_ids("<think>") == SMALL_SIZE - 256 + 22
    again = small.train_new_from_iterator([SOURCES[:3], SOURCES[3:]], SMALL_SIZE)
    assert again.get_vocab() == small.get_vocab()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["hello"], 511, "511 is too small: expected at least 512"),
        (["hello hello"], 600, "600 is too large .* at most 517 ids"),
        ("hello", 600, "is one string"),
        (["hello", 5], 600, r"texts\[1\] is int"),
    ],
)
def test_training_errors(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size)


def test_smallest_vocabulary_and_surrogates() -> None:
    tokenizer = train_tokenizer(["a\ud800"], 512)
    assert tokenizer.encode("é") == [tokenizer.convert_tokens_to_ids(c) for c in "Ã©"]
