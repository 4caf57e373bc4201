"""Evaluation through the engine's path: results that transformers also gives, and arithmetic."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.evaluation.footprint import Footprint
from kvmesh.workers.evaluation.model import EvaluatedModel, choose_formats
from kvmesh.workers.evaluation.passkey import OUTPUT_TOKENS, PasskeyPromptMaker, measure_passkey
from kvmesh.workers.evaluation.perplexity import measure_perplexity
from kvmesh.workers.evaluation.recall import PASSAGE_TOKENS, measure_recall
from kvmesh.workers.evaluation.text import TokenText, read_text
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.local import InProcessExecutor, LocalProcesses
from kvmesh.workers.model.embedded import EMBEDDED_NAME
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.parallel.comm import Communicator
from kvmesh.workers.rank import Rank
from kvmesh.workers.scoring.gate import LIMIT_NATS, FormatCheck, alternatives, check_format
from kvmesh.workers.scoring.meter import Meter
from kvmesh.workers.scoring.probe import measure_divergences
from kvmesh.workers.scoring.scorer import Scorer
from kvmesh.workers.scoring.tally import Tally, compare
from tests.model.small import make_small_model, make_small_tokenizer
from tests.repo.imports import ROOT
from tests.workers.memory_executor import MemoryExecutor

PAGE = 16
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    vocab_size = make_small_tokenizer(folder)
    return make_small_model(
        "LlamaForCausalLM", folder, vocab_size=vocab_size, max_position_embeddings=1024
    )


def small_config(path: Path, **settings: object) -> EngineConfig:
    values = {"page_size": PAGE, "device": "cpu", "threads_per_rank": 1, **settings}
    return EngineConfig(model=str(path), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(path: Path) -> EvaluatedModel:
    return EvaluatedModel(small_config(path))


@pytest.fixture(scope="module")
def theirs(path: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return loaded


def their_logits(theirs: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logits: torch.Tensor = theirs(input_ids=ids).logits[0]
    return logits


def all_logits(path: Path, kv_format: str, tokens: np.ndarray, chunk_tokens: int) -> torch.Tensor:
    rank = Rank(small_config(path, kv_format=kv_format), 0, Communicator.single())
    scorer = Scorer(rank, page_size=PAGE, context=len(tokens), chunk_tokens=chunk_tokens)
    parts: list[torch.Tensor] = []
    for start, end, logits in scorer.logits(tokens):
        assert start == sum(len(part) for part in parts) and end - start <= chunk_tokens
        assert logits is not None
        parts.append(logits.clone())
    return torch.cat(parts)


def windows_of(model: EvaluatedModel, context: int, count: int) -> list[np.ndarray]:
    return list(TokenText(model.tokenizer, TEXT).windows(context, count))


@pytest.mark.slow
def test_exact_perplexity_equals_transformers(
    model: EvaluatedModel, theirs: torch.nn.Module
) -> None:
    report = measure_perplexity(
        model, choose_formats(["int4"]), TEXT, context=300, windows=3, meter=Meter()
    )
    nll = 0.0
    for tokens in windows_of(model, 300, 3):
        targets = torch.from_numpy(tokens[1:].astype(np.int64))
        logits = their_logits(theirs, tokens)[:-1]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    exact, int4 = report.formats
    assert report.windows == 3 and report.predictions == 3 * 299
    assert exact.perplexity == pytest.approx(math.exp(nll / report.predictions), rel=1e-4)
    assert exact.loss == exact.kl_nats == 0.0
    assert int4.kl_nats > 1e-3
    assert int4.loss == pytest.approx(int4.perplexity / exact.perplexity - 1)


@pytest.mark.slow
def test_exact_does_not_diverge_from_exact(model: EvaluatedModel) -> None:
    (tokens,) = windows_of(model, 200, 1)
    exact = get_format("exact")
    tallies = [Tally(), Tally()]
    compare([model.scorer(exact, 200), model.scorer(exact, 200)], tokens, tallies, Meter())
    assert tallies[1].kl_nats == 0.0
    assert tallies[1] == tallies[0]


def test_divergence_matches_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, exact = torch.randn(2, 100, 50, generator=generator)
    targets = torch.randint(50, (100,), generator=generator)
    tally = Tally()
    tally.add(logits, exact, targets)
    p, q = torch.softmax(exact.double(), -1), torch.softmax(logits.double(), -1)
    assert tally.mean_kl_nats == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    nll = -q[torch.arange(100), targets].log().mean()
    assert tally.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    assert tally.accuracy == float((q.argmax(-1) == targets).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["exact", "int8"])
def test_logits_do_not_depend_on_chunks(path: Path, model: EvaluatedModel, kv_format: str) -> None:
    (tokens,) = windows_of(model, 250, 1)
    whole = all_logits(path, kv_format, tokens, 256)
    spread = float(whole.std())
    for chunk_tokens in (PAGE, 37, 128):
        part = all_logits(path, kv_format, tokens, chunk_tokens)
        assert float((part - whole).abs().max()) < 2e-3 * spread
    # The difference that would show if a chunk read a page in the wrong form:
    other = all_logits(path, "int4", tokens, 256)
    assert float((other - whole).abs().max()) > 2e-2 * spread


@pytest.mark.slow
def test_recall_equals_the_accuracy_of_transformers_on_the_second_copy(
    model: EvaluatedModel, theirs: torch.nn.Module
) -> None:
    length, passages = 400, 2
    report = measure_recall(
        model,
        choose_formats(["int8"]),
        TEXT,
        lengths=[length],
        passages=passages,
        meter=Meter(),
    )
    hits = 0
    for window in windows_of(model, length, passages):
        tokens = np.concatenate((window, window[:PASSAGE_TOKENS]))
        expected = their_logits(theirs, tokens)[length:-1].argmax(-1).numpy()
        hits += int((expected == tokens[length + 1 :]).sum())
    exact, int8 = report.figures
    assert exact.accuracy == pytest.approx(hits / (passages * (PASSAGE_TOKENS - 1)))
    assert exact.difference == 0.0
    assert (int8.kv_format, int8.length, report.passages) == ("int8", length, {length: passages})


@pytest.mark.slow
def test_generated_tokens_equal_transformers(
    model: EvaluatedModel, theirs: torch.nn.Module
) -> None:
    (tokens,) = windows_of(model, 70, 1)
    output = model.scorer(get_format("exact"), 90).generate(tokens, 20)
    for token in output:
        assert int(their_logits(theirs, tokens)[-1].argmax()) == token
        tokens = np.append(tokens, np.int32(token))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9])
def test_a_passkey_prompt_hides_its_key_at_the_right_depth(
    model: EvaluatedModel, depth: float
) -> None:
    maker = PasskeyPromptMaker(model.tokenizer, TEXT)
    prompt = maker.make(800, depth, seed=3)
    assert 780 - OUTPUT_TOKENS < len(prompt.tokens) <= 800 - OUTPUT_TOKENS
    text = model.tokenizer.decode([int(token) for token in prompt.tokens])
    assert text.count(prompt.key) == 2
    begin, end = text.index("remember it.") + len("remember it."), text.index("What is the pass")
    needle = (
        f"The pass key number is {prompt.key}. Remember it. {prompt.key} is the pass key number."
    )
    before, after = text[begin:end].split(needle)
    # The number is at the end of the next sentence or word.
    assert depth - 0.02 < len(before) / len(before + after) < depth + 0.3
    again = maker.make(800, depth, seed=3)
    assert again.key == prompt.key and (again.tokens == prompt.tokens).all()
    assert maker.make(800, depth, seed=4).key != prompt.key


@pytest.mark.slow
def test_the_embedded_model_finds_a_passkey() -> None:
    model = EvaluatedModel(EngineConfig(model=EMBEDDED_NAME, device="cpu", threads_per_rank=1))
    report = measure_passkey(
        model, choose_formats([]), TEXT, lengths=[400], depths=2, seeds=1, meter=Meter()
    )
    (exact,) = report.figures
    assert (exact.found, exact.asked, exact.missed_depths) == (2, 2, [])


def test_windows_do_not_overlap_and_span_the_text(model: EvaluatedModel) -> None:
    source = TokenText(model.tokenizer, TEXT)
    available = len(source.ids) // 100
    windows = source.windows(100, 7)
    assert len(windows) == 7
    starts = []
    for window in windows:
        assert len(window) == 100
        (start,) = (
            at
            for at in range(0, len(source.ids) - 99, 100)
            if (source.ids[at : at + 100] == window).all()
        )
        starts.append(start)
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert starts[-1] >= (available - available / 7 - 1) * 100
    assert len(source.windows(100, 10**6)) == available


def test_windows_begin_with_the_models_prefix(model: EvaluatedModel) -> None:
    source = TokenText(model.tokenizer, TEXT)
    source.prefix = np.array([1], dtype=np.int32)
    for window in source.windows(50, 2):
        assert window[0] == 1 and len(window) == 50


def test_bits_count_exact_windows_as_bfloat16() -> None:
    int4 = get_format("int4")
    footprint = Footprint.of(
        int4,
        page_size=64,
        num_layers=2,
        num_kv_heads=3,
        head_dim=64,
        sink_pages=1,
        recent_pages=2,
    )
    # 2048 tokens are 32 pages; the next token is in page 32, so [1, 30) are sealed.
    assert footprint.bits_at(2048) == pytest.approx((29 * 4.5 + 3 * 16) / 32)
    assert footprint.bytes_per_token_at(2048) == pytest.approx(
        footprint.bits_at(2048) * 2 * 3 * 2 * 64 / 8
    )
    assert footprint.bits_at(100) == 16
    assert footprint.bits_at(2048) > footprint.bits_at(32_768) > footprint.sealed_bits == 4.5


def test_errors_name_the_invalid_argument(model: EvaluatedModel, tmp_path: Path) -> None:
    def fault(call: object, *arguments: object, **settings: object) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            call(*arguments, **settings)  # type: ignore[operator]
        return caught.value

    exact = choose_formats([])
    assert fault(choose_formats, ["int9"]).field == "kv_format"
    assert fault(read_text, tmp_path / "none.txt").field == "text"
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "UTF-8" in fault(read_text, tmp_path / "latin.txt").message
    settings = {"context": 300, "windows": 1, "meter": Meter()}
    assert fault(measure_perplexity, model, exact, "too short", **settings).field == "text"
    settings["context"] = 1025
    error = fault(measure_perplexity, model, exact, TEXT, **settings)
    assert error.field == "context" and "1024" in error.message
    recall = {"passages": 1, "meter": Meter()}
    for length in (PASSAGE_TOKENS, 1024):
        error = fault(measure_recall, model, exact, TEXT, lengths=[length], **recall)
        assert error.field == "lengths"
    hidden = {"depths": 1, "seeds": 1, "meter": Meter()}
    for length, field in ((1025, "lengths"), (90, "lengths"), (1000, "text")):
        text = "A short one. " * 10 if field == "text" else TEXT
        error = fault(measure_passkey, model, exact, text, lengths=[length], **hidden)
        assert error.field == field


class Figures:
    """Divergences from a table; records which formats were requested."""

    def __init__(self, kl_nats: dict[str, float]) -> None:
        self.kl_nats = kl_nats
        self.asked: list[list[str]] = []
        self.check = FormatCheck()

    def __call__(self, names: list[str]) -> list[float]:
        self.asked.append(names)
        return [self.kl_nats[name] for name in names]


def checked(kv_format: str, kv_probe: str, kl_nats: dict[str, float]) -> Figures:
    others = {fmt.name: 1.0 for fmt in alternatives(get_format(kv_format), 64, 64)}
    figures = Figures({**others, "exact": 0.0, **kl_nats})
    config = EngineConfig(model="m", kv_format=kv_format).replace(kv_probe=kv_probe)
    figures.check = check_format(config, 64, figures)
    return figures


def test_the_probe_can_be_off_and_exact_needs_none() -> None:
    assert checked("int4", "off", {}).asked == []
    exact = checked("exact", "refuse", {})
    assert (exact.asked, exact.check) == ([], FormatCheck())


def test_only_the_chosen_format_is_measured_if_it_is_harmless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    figures = checked("4", "refuse", {"int4": LIMIT_NATS})
    assert (figures.asked, figures.check) == ([["int4"]], FormatCheck(LIMIT_NATS))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("kl_nats", "advised"),
    [
        ({"int4": 0.4, "int8": 0.001}, "int8, with 8.50 bits"),
        ({"int4": math.nan, "int8": math.nan}, "exact, with 16.00 bits"),
    ],
)
def test_a_harmful_format_causes_a_warning_or_is_refused(
    kl_nats: dict[str, float], advised: str, caplog: pytest.LogCaptureFixture
) -> None:
    check = checked("int4", "warn", kl_nats).check
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    expected = f"{kl_nats['int4']:.3f} nats"
    assert advised in record.getMessage() and expected in record.getMessage()
    assert check.warning in record.getMessage() and advised in check.warning
    with pytest.raises(ConfigError, match=advised) as caught:
        checked("int4", "refuse", kl_nats)
    assert caught.value.field == "kv_format"


@pytest.mark.parametrize("kv_probe", ["warn", "refuse"])
def test_a_model_without_finite_logits_is_refused(kv_probe: str) -> None:
    every = {fmt.name: math.nan for fmt in alternatives(get_format("int4"), 64, 64)}
    with pytest.raises(ConfigError, match="its logits are not finite numbers") as caught:
        checked("int4", kv_probe, {**every, "int4": math.nan})
    assert caught.value.field == "model"


def test_alternatives_are_ordered_by_bits() -> None:
    formats = alternatives(get_format("int8"), 64, 64)
    bits = [fmt.bits_per_element(64, 64) for fmt in formats]
    assert bits == sorted(bits) and formats[-1].name == "exact"
    assert not any(fmt.needs_calibration or fmt.name == "int8" for fmt in formats)


async def test_a_group_does_not_start_with_a_refused_format() -> None:
    executor = MemoryExecutor(PAGE, 0, 0, 400)
    executor.kl_nats = {"int4": 1.0}
    config = EngineConfig(model="memory", kv_format="int4", page_size=PAGE, kv_probe="refuse")
    with pytest.raises(ConfigError, match="int4 hurts"):
        await EngineLeader(config, executor).start()


@pytest.mark.slow
def test_int8_diverges_less_than_int4_on_the_embedded_model() -> None:
    config = EngineConfig(model=EMBEDDED_NAME, device="cpu", threads_per_rank=1)
    rank = Rank(config, 0, Communicator.single())
    path = resolve_model(EMBEDDED_NAME).path
    int8, int4 = measure_divergences(rank, path, ["int8", "int4"], page_size=64, max_tokens=384)
    assert 0.0 < int8 < 1e-3 < int4


@pytest.mark.slow
def test_a_group_measures_together_and_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    alone = InProcessExecutor(small_config(path)).divergences(["int4", "int8"])
    group = LocalProcesses(small_config(path, tp=2))
    try:
        group.describe()
        together = group.divergences(["int4", "int8"])
        for file in (tmp_path / "kvmesh/probes").iterdir():
            file.write_text("[0.5, 0.25]")
        assert group.divergences(["int4", "int8"]) == [0.5, 0.25]
        assert group.divergences(["int8"]) == pytest.approx(together[1:])
    finally:
        group.close()
    assert together == pytest.approx(alone, rel=0.02)
    assert together[0] > together[1] > 0
