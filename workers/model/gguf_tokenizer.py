"""The tokenizer of a GGUF file, which transformers rebuilds.

The file has the vocabulary and merges, but of the way in which text is split before them only a
name, `tokenizer.ggml.pre`. transformers takes GPT-2's way for a name that it does not know.

Its ids are the file's here. transformers spells some tokens otherwise, so that their names are
tokens of their own with ids that the model does not have, and adds names that a file lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.workers.model.gguf_metadata import GGUFMetadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RawTokenizer

_GPT2 = "gpt-2"
_DIGITS_FIRST = "smollm"  # GPT-2's way between digits, which are alone

# To llama.cpp, a word of the vocabulary is one token in these, whether merges make it or not, and
# texts begin with BOS if the file does not say.
_WORDS_FIRST = frozenset(
    {
        "falcon-h1",
        "falcon3",
        "jina-v5-nano",
        "lfm2",
        "llama-bpe",
        "llama-v3",
        "llama3",
        "midm-2.0",
        "pixtral",
        "tekken",
    }
)

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_IDS = tuple(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))


def check_tokenizer(metadata: GGUFMetadata) -> None:
    """Raises UnsupportedModelError for a tokenizer that would be another one here."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = metadata.tokenizer("model")
    if kind not in ("gpt2", "llama"):
        raise metadata.refused(
            f"its tokenizer {kind!r} (tokenizer.ggml.model) is not supported, only 'gpt2' and"
            " 'llama'"
        )
    count = len(metadata.tokens)
    for key in _IDS:
        number = metadata.tokenizer(key)
        if number is not None and not 0 <= number < count:
            raise metadata.refused(f"tokenizer.ggml.{key} is {number}, but it has {count:,} tokens")
    if kind == "llama":  # SentencePiece, which does not split
        return
    name = metadata.tokenizer("pre")
    if name is None:
        raise metadata.refused("it does not say how text is split (tokenizer.ggml.pre)")
    if name not in {_GPT2, _DIGITS_FIRST, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise metadata.refused(
            f"text that is split as {name!r} (tokenizer.ggml.pre) is not supported"
        )


def convert_tokenizer(file: Path, metadata: GGUFMetadata, target: Path) -> None:
    """Save the tokenizer of `file` in directory `target`."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, parts, config = get_gguf_tokenizer(str(file))
    rebuilt, _ = convert_gguf_tokenizer(architecture, parts)
    raw = _with_ids_of(metadata, rebuilt)
    pre = metadata.tokenizer("pre")
    _split(raw, pre)
    if metadata.tokenizer("model") == "llama" and metadata.tokenizer("add_space_prefix") is False:
        _add_no_space(raw)
    _begin_and_end(raw, {"add_bos_token": pre in _WORDS_FIRST, **config})
    names = {name: config[name] for name in _NAMES if config[name] is not None}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if named := metadata.chat_templates():
        about["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
    (target / "tokenizer.json").write_text(raw.to_str(pretty=True), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    if template := config.get("chat_template"):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _with_ids_of(metadata: GGUFMetadata, rebuilt: RawTokenizer) -> RawTokenizer:
    """The tokenizer with the file's tokens that are used, each with its own id, and no others."""
    from tokenizers import Tokenizer as RawTokenizer

    content = json.loads(rebuilt.to_str())
    tokens, model = metadata.tokens, content["model"]
    texts = dict(enumerate(tokens)) | {number: text for text, number in model["vocab"].items()}
    added = []
    for number, special in metadata.added_tokens().items():
        if metadata.tokenizer("model") == "gpt2":
            texts[number] = tokens[number]
        elif texts[number] != tokens[number]:  # Gemma's spaces, which merges make
            continue
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": number, "content": tokens[number], **flags, "special": special})
    content["added_tokens"] = added
    unused = metadata.unused_tokens()
    vocab = {text: number for number, text in texts.items() if number not in unused}
    model["vocab"] = vocab
    model["merges"] = [
        [left, right]
        for left, right in model["merges"]
        if left in vocab and right in vocab and left + right in vocab
    ]
    return RawTokenizer.from_str(json.dumps(content))


def _split(raw: RawTokenizer, pre: str | None) -> None:
    """Do what transformers leaves out of llama.cpp's way of this name."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if pre in _WORDS_FIRST:
        raw.model.ignore_merges = True
    if pre == _DIGITS_FIRST:
        raw.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def _add_no_space(raw: RawTokenizer) -> None:
    """Have pieces of a text without a space before it, which transformers always adds."""
    from tokenizers import decoders, normalizers

    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.pre_tokenizer = None
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _begin_and_end(raw: RawTokenizer, config: Mapping[str, Any]) -> None:
    """Put the tokens before and after a text that the file asks for."""
    from tokenizers.processors import TemplateProcessing

    begin, end = (
        [config[f"{side}_token"]]
        if config.get(f"add_{side}_token") and config[f"{side}_token"] is not None
        else []
        for side in ("bos", "eos")
    )
    raw.post_processor = TemplateProcessing(
        single=[*begin, "$A", *end],
        special_tokens=[(name, raw.token_to_id(name)) for name in {*begin, *end}],
    )
