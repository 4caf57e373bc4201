"""The tokenizer of a GGUF file, which transformers rebuilds.

The file has the vocabulary and merges, but of the way in which text is split before them only a
name, `tokenizer.ggml.pre`. transformers takes GPT-2's way for a name that it does not know.
"""

from __future__ import annotations

from pathlib import Path

from kvmesh.workers.model.gguf_metadata import GGUFMetadata

_GPT2 = "gpt-2"
_DIGITS_FIRST = "smollm"  # GPT-2's way between digits, which are alone

# A word of the vocabulary is one token, whether merges make it or not.
_WORDS_FIRST = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3"})


def check_splitting(metadata: GGUFMetadata) -> None:
    """Raises UnsupportedModelError for a file whose text would be split in another way."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if metadata.tokenizer("model") != "gpt2":  # SentencePiece does not split
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
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    pre, backend = metadata.tokenizer("pre"), tokenizer.backend_tokenizer
    if pre in _WORDS_FIRST:
        backend.model.ignore_merges = True
    if pre == _DIGITS_FIRST:
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(target)
