"""Long texts in pieces have the ids of the whole, or are encoded whole."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import tokenizers
from hypothesis import given

from kvmesh.workers.model import long_text, tokenizer
from kvmesh.workers.model.chat import PromptPiece
from kvmesh.workers.model.tokenizer import Tokenizer
from tests.exercised import Exercised
from tests.model.small import make_small_tokenizer
from tests.scenarios import SEEDS, scenarios

SEEN = Exercised("long texts", {"texts": 100, "cuts": 300, "texts without a cut": 5})
WORDS = ["the", "pages", " ", "  ", "\n", "\t", ".", ", ", "'s", "don't", "(x)", "12345"]
WORDS += ["<|im_end|>", "日本語", "。", "👩‍👩‍👧", "e\u0301", "wörld", "a" * 40, "\r\n\r\n"]
WORDS += ["_", "--"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pieces")
    make_small_tokenizer(path)
    return Tokenizer.load(path)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (long_text, tokenizer):
        monkeypatch.setattr(module, "PIECE_CHARS", 300)
    monkeypatch.setattr(long_text, "_SEARCH_CHARS", 100)
    monkeypatch.setattr(long_text, "_AROUND_CHARS", 40)


@SEEN.required
@scenarios(150)
@given(seed=SEEDS)
def test_pieces_have_the_ids_of_the_whole(byte_level: Tokenizer, seed: int) -> None:
    chance = Random(seed)
    words = chance.sample(WORDS, chance.randrange(1, len(WORDS)))
    text = "".join(chance.choice(words) + " " * chance.randrange(2) for _ in range(400))
    ids = byte_level.encode_array(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == byte_level.encode(text)
    cuts = len(list(long_text._cuts(text, lambda part: byte_level.encode(part, False))))
    SEEN.add("texts")
    SEEN.add("cuts", cuts)
    SEEN.add("texts without a cut", not cuts)


def test_chats_are_encoded_in_pieces_too(byte_level: Tokenizer) -> None:
    text = "one word, <|im_end|> and another. " * 60
    for literal in (True, False):
        pieces = [PromptPiece(text, literal), PromptPiece("end", not literal)]
        ids = byte_level.encode_pieces(pieces).tolist()
        assert (byte_level.special_tokens["<|im_end|>"] in ids) == (not literal)
        assert byte_level.decode(ids, skip_special_tokens=False) == text + "end"


def test_a_tokenizer_that_marks_the_start_of_a_text_encodes_it_whole(tmp_path: Path) -> None:
    """Pieces would each begin with the mark."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.", "▁w"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "w")], unk_token="<unk>"))
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    marking = Tokenizer.load(tmp_path)
    text = "words, and more words. " * 100
    assert marking.encode_array(text).tolist() == marking.encode(text)


@pytest.mark.parametrize(("template", "whole"), [("<s> $A", False), ("<s> $A </s>", True)])
def test_what_comes_before_a_text_comes_once(
    template: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_tokenizer(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(
                single=template,
                special_tokens=[(name, raw.token_to_id(name)) for name in ("<s>", "</s>")],
            ),
        ]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    calls: list[str] = []
    cut = long_text.encode_in_pieces
    monkeypatch.setattr(
        tokenizer,
        "encode_in_pieces",
        lambda *a: calls.append(a[0]) or cut(*a),  # type: ignore[func-returns-value]
    )
    text = "words, and more words. " * 100
    assert found.encode_array(text).tolist() == found.encode(text)
    assert calls == ([] if whole else [text])
