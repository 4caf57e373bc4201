"""Streamed text is decode(prompt + output) without decode(prompt), for every kind of tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvmesh.workers.model.tokenizer import Tokenizer
from tests.exercised import Exercised

WORDS = ["the sea at night is ä wörld, of 日本 and don't 🤗 say", "sea seas seaside night nights ."]
SPECIAL = ["<s>", "</s>", "<|im_start|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAIN = ["▁", *"abcdehinost,.'", "▁the", "the", "▁sea", "sea", "▁night", "▁▁"]


def byte_level() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.add_tokens(["<tool>", "[日本]"])
    return raw


def _sentencepiece(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    pieces = ["<unk>", *SPECIAL, *BYTES, *PLAIN]
    raw = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoder
    raw.add_special_tokens(SPECIAL)
    raw.add_tokens(["<tool>"])
    return raw


def llama() -> tokenizers.Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentencepiece(decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]))


def gemma() -> tokenizers.Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentencepiece(decoders.Sequence(steps))


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((piece, -2.0) for piece in PLAIN)]
    raw = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(SPECIAL)
    return raw


def word_piece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "the", "sea", "##s", "##ide", "night", ".", ",", "'", "don", "t", "a", "##a"]
    raw = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(SPECIAL)
    return raw


def no_decoder() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "sea": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(SPECIAL)
    return raw


KINDS = (byte_level, llama, gemma, unigram, word_piece, no_decoder)
MADE = {kind.__name__: Tokenizer(kind(), {}, {}) for kind in KINDS}


def streamed(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool
) -> list[str]:
    stream = tokenizer.stream(skip, prompt)
    return [*(stream.push([token]) for token in output), stream.flush()]


def difference(before: str, whole: str) -> str:
    """`whole` after what it has in common with `before`, which may end within a character."""
    common = zip(before, whole, strict=False)
    return whole[sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], common)) :]


ADDED = Exercised("streamed text", {"outputs after a prompt": 40, "outputs divided": 40})
ANY_IDS = Exercised("text of any ids", {"ids": 300, "texts without special tokens": 20})


@pytest.mark.parametrize("kind", MADE)
@ADDED.required
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_what_the_output_adds_to_the_prompt(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = MADE[kind]
    # Byte tokens that are not valid UTF-8 are another test's.
    valid = [
        [token]
        for token in range(tokenizer.vocab_size)
        if not (kind in ("llama", "gemma") and 4 <= token < 260)
    ]
    if kind in ("llama", "gemma"):
        # One character in each run of byte tokens: the library loses a whole run when one is
        # incomplete, see test_text.
        before = [260 + PLAIN.index("▁the")]
        valid += [[*before, *(4 + byte for byte in each.encode())] for each in "é日🤗a "]
    runs = st.lists(st.sampled_from(valid), max_size=12).map(
        lambda runs: list(itertools.chain(*runs))
    )
    prompt, output = data.draw(runs), data.draw(runs)
    # The prompt may end anywhere, also within a character.
    cut = data.draw(st.integers(0, len(output)))
    ADDED.add("outputs divided", 0 < cut < len(output))
    prompt, output = prompt + output[:cut], output[cut:]
    skip = data.draw(st.booleans())
    shown, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    ADDED.add("outputs after a prompt", bool(prompt and output))
    assert "".join(streamed(tokenizer, prompt, output, skip)) == difference(shown, whole)


@pytest.mark.parametrize("kind", MADE)
@ANY_IDS.required
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_ids_give_the_text_of_their_bytes(kind: str, data: st.DataObject) -> None:
    tokenizer = MADE[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    pieces = streamed(tokenizer, [0], ids, skip)
    special = set(tokenizer.special_tokens.values()) if skip else set()
    ANY_IDS.add("ids", len(ids))
    ANY_IDS.add("texts without special tokens", skip)
    joined = b"".join(tokenizer.token_bytes(token) for token in ids if token not in special)
    errors = "kvmesh_replace_bytes" if kind in ("llama", "gemma") else "replace"
    assert "".join(pieces) == joined.decode(errors=errors)
    # However the tokens are grouped, and wherever another stream takes over.
    stream = tokenizer.stream(skip, [0])
    assert stream.push(ids) + stream.flush() == "".join(pieces)


@pytest.mark.parametrize(
    ("kind", "prompt", "output", "text"),
    [
        ("llama", ["▁the"], ["▁sea", "▁night"], " sea night"),
        ("llama", ["<s>"], ["▁sea", "▁night"], "sea night"),  # it begins the text
        ("unigram", ["▁the"], ["▁sea"], " sea"),
        ("unigram", [], ["▁sea", "▁sea"], "sea sea"),
        ("gemma", [], ["▁sea"], " sea"),
        ("word_piece", ["the"], ["sea", "##s", "."], " seas."),
        ("llama", ["▁the", "<0xE6>", "<0x97>"], ["<0xA5>", "a"], "日a"),
        ("llama", ["▁the", "<0xE6>", "<0x97>"], ["a"], "a"),
        ("llama", ["a"], ["<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "a"], "日\ufffda"),
        ("byte_level", ["a"], ["<s>", "[日本]", "a"], "[日本]a"),
    ],
)
def test_text(kind: str, prompt: list[str], output: list[str], text: str) -> None:
    tokenizer = MADE[kind]
    ids = tokenizer._raw.get_vocab(with_added_tokens=True)
    before, after = [ids[name] for name in prompt], [ids[name] for name in output]
    assert "".join(streamed(tokenizer, before, after, skip=True)) == text


@pytest.mark.parametrize("kind", MADE)
def test_a_token_costs_the_same_however_long_the_output_is(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = MADE[kind]
    decoded = 0
    decode: Callable[[list[int]], str] = tokenizer._pieces._decode

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer._pieces, "_decode", counting)
    stream = tokenizer.stream(prompt=list(range(tokenizer.vocab_size)) * 100)
    for token in list(range(tokenizer.vocab_size)) * 20:
        stream.push([token])
    assert decoded <= 8 * tokenizer.vocab_size


def test_a_prompt_that_begins_with_the_bos_token_has_it_once() -> None:
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    tokenizer = Tokenizer(raw, {"bos_token": "<s>"}, {})
    bos = raw.token_to_id("<s>")
    plain = tokenizer.encode("the sea")
    assert plain[0] == bos
    assert plain.count(bos) == 1
    assert tokenizer.encode("<s>the sea") == plain
    assert tokenizer.encode("<s>") == tokenizer.encode("") == [bos]
    # Only at the beginning, and only where the tokenizer adds one.
    assert tokenizer.encode("the<s>sea").count(bos) == 2
    assert tokenizer.encode("<s>the", add_special_tokens=False).count(bos) == 1
    assert Tokenizer(byte_level(), {}, {}).encode("<s><s>the").count(bos) == 2
