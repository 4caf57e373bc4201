"""Calibration: what is measured, the file it is stored in, and which files are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvmesh.kernels.formats.base import LayerParams, PageShape
from kvmesh.kernels.formats.comparison.nuq.rope import RopePairs, phases
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.kernels.formats.comparison.static8.side import Static8
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.calibration.attention import causal_attention
from kvmesh.workers.calibration.calibrate import _run, calibrate
from kvmesh.workers.calibration.file import Calibration
from kvmesh.workers.calibration.levels import best_levels
from kvmesh.workers.calibration.nuq import LevelObserver
from kvmesh.workers.calibration.ranges import RangeObserver
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.local import local_executor
from kvmesh.workers.model.facts import read_facts
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import load_model
from kvmesh.workers.model.rope import Rope
from kvmesh.workers.parallel.comm import Communicator
from tests.in_process import run_kvmesh
from tests.model.attend import _attention
from tests.model.cases import CASES
from tests.model.small import make_small_model, make_small_tokenizer
from tests.workers.invariance import INVARIANT_TOKENS, Invariance, generate

TEXT = " ".join(f"page {i} of a sequence is dealt to rank {i * i % 7}," for i in range(400))
SAMPLES, CONTEXT = 3, 80


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    vocab_size = make_small_tokenizer(path)
    return make_small_model("LlamaForCausalLM", path, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def calibrations(model_path: Path) -> dict[str, Calibration]:
    return {
        name: calibrate(str(model_path), name, TEXT, samples=SAMPLES, context=CONTEXT, device="cpu")
        for name in ("nuq3", "int8-static", "int8-static-layer")
    }


# Levels


@pytest.mark.parametrize(("count", "mse"), [(4, 0.11748), (8, 0.03455), (16, 0.00950)])
def test_levels_of_normal_numbers_match_lloyd_and_max(count: int, mse: float) -> None:
    """To 1% of the tables of Max (1960)."""
    x = np.random.default_rng(0).standard_normal(400_000)
    levels = best_levels(x, np.ones_like(x), count)
    assert (np.diff(levels) > 0).all()
    error = np.square(x - levels[np.abs(x[:, None] - levels).argmin(1)]).mean()
    assert error == pytest.approx(mse, rel=0.01)


def test_levels_are_optimal() -> None:
    """Against every way to cut twelve weighted numbers into four runs."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, weights = np.sort(rng.standard_normal(12)), rng.random(12)

        def error_of(levels: np.ndarray, x: np.ndarray = x, w: np.ndarray = weights) -> float:
            return float((w * np.square(x[:, None] - levels).min(1)).sum())

        best = min(
            error_of(np.array([np.average(x[a:b], weights=weights[a:b]) for a, b in runs]))
            for cuts in itertools.combinations(range(1, 12), 3)
            for runs in [list(itertools.pairwise([0, *cuts, 12]))]
        )
        assert error_of(best_levels(x, weights, 4)) == pytest.approx(best, rel=1e-9)


def test_levels_of_few_numbers() -> None:
    assert best_levels(np.full(5, 3.0), np.ones(5), 4).tolist() == [3.0] * 4
    assert best_levels(np.array([1.0, 2.0]), np.zeros(2), 4).tolist() == [1.0, 2.0, 2.0, 2.0]


# Observers


def test_ranges_cover_all_windows() -> None:
    windows = torch.randn(3, 50, 2, 8)
    low, high = windows.amin((0, 1)), windows.amax((0, 1))
    for per in ("channel", "layer"):
        observer = RangeObserver(Static8(per=per))
        for window in windows:
            observer.observe(5, window, None, torch.arange(50))
        params = observer.params(5)
        if per == "layer":
            low, high = low.amin().expand(2, 8), high.amax().expand(2, 8)
        torch.testing.assert_close(params["scale"], (high - low) / 255)
        torch.testing.assert_close(params["zero"], (high + low) / 2)


HEADS, HEAD_DIM, TOKENS = 2, 128, 2048


def mixture(gen: torch.Generator) -> Tensor:
    """Normal, and one number in a hundred five times as large."""
    x = torch.randn(TOKENS, HEADS, HEAD_DIM, generator=gen)
    return torch.where(torch.rand(x.shape, generator=gen) < 0.01, x * 5, x)


def student(gen: torch.Generator) -> Tensor:
    """Student's t with 4 degrees of freedom."""
    squares = torch.randn(4, TOKENS, HEADS, HEAD_DIM, generator=gen).square().mean(0)
    return torch.randn(TOKENS, HEADS, HEAD_DIM, generator=gen) / squares.sqrt()


def our_error(width: int, draw: Callable[[torch.Generator], Tensor]) -> float:
    """Relative squared error of keys in the channels' own units: `draw` times a scale per channel,
    plus a mean, rotated by RoPE. Calibrated on one draw, evaluated on another."""
    gen = torch.Generator().manual_seed(0)
    scale = torch.randn(HEADS, HEAD_DIM, generator=gen).mul(0.5).exp()
    mean = torch.randn(HEADS, HEAD_DIM, generator=gen) * scale
    rope = Rope(10000.0 ** -(torch.arange(64) / 64), interleaved=False)
    side, pairs = NonUniform(width), RopePairs(interleaved=False)
    positions = torch.arange(TOKENS)
    forth = phases(rope.inv_freq, positions).unsqueeze(1)
    observer = LevelObserver(side, [rope], HEADS, HEAD_DIM, samples=1)
    seen = draw(gen) * scale + mean
    # The narrower a channel, the more an error in it costs.
    gradient = torch.randn(seen.shape, generator=gen) / scale
    observer.observe(0, pairs.rotate(seen, forth), pairs.rotate(gradient, forth), positions)
    params = observer.params(0)
    judged = draw(gen)
    keys = pairs.rotate(judged * scale + mean, forth).view(-1, 64, HEADS, HEAD_DIM).transpose(1, 2)
    pages = side.codec().encode(side, keys, params, positions[::64])
    got = side.codec().decode(side, pages, PageShape(64, HEAD_DIM, torch.float32), params)
    error = pairs.rotate((got - keys).transpose(1, 2).reshape(seen.shape), forth.conj()) / scale
    return float(error.square().sum() / judged.square().sum())


def kvquant_error(width: int, draw: Callable[[torch.Generator], Tensor]) -> float:
    """The same for KVQuant's own rule, fitted to the data it is evaluated on: all numbers beyond a
    channel's percentiles are kept, however many per token; levels by k-means of the others."""
    x = draw(torch.Generator().manual_seed(0)).flatten(1)
    low, high = torch.stack([x.quantile(at, 0) for at in (0.005, 0.995)])
    t = (x - (high + low) / 2) / ((high - low) / 2)
    inside = t.abs() <= 1
    numbers = t[inside].double().numpy()
    levels = torch.from_numpy(best_levels(numbers, np.ones_like(numbers), 2**width)).float()
    chosen = levels[torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)]
    error = (chosen - t) * (high - low) / 2 * inside
    return float(error.square().sum() / x.square().sum())


@pytest.mark.parametrize(("width", "max_error"), [(4, 0.0078), (3, 0.0294), (2, 0.107)])
def test_keys_with_outliers_lose_no_more_than_published(width: int, max_error: float) -> None:
    """KVQuant with 1% outliers was measured on synthetic keys on which a dense codebook loses
    .038, .126 and .409; on this mixture a dense codebook loses .040, .150 and .428."""
    assert our_error(width, mixture) <= max_error


@pytest.mark.parametrize(("width", "ratio"), [(4, 1.15), (3, 1.05), (2, 1.0)])
def test_a_fixed_number_of_outliers_costs_little(width: int, ratio: float) -> None:
    """If one token in seven has more outliers than it can store."""
    assert our_error(width, student) <= ratio * kvquant_error(width, student)


def test_constant_channels_and_gradients_of_zero() -> None:
    rope = Rope(torch.tensor([1.0, 0.1]), interleaved=False)
    for values in (False, True):
        observer = LevelObserver(NonUniform(4, values=values), [rope], 1, 4, samples=1)
        x = torch.full((200, 1, 4), 2.5)
        observer.observe(0, x, torch.zeros_like(x), torch.zeros(200, dtype=torch.int64))
        for name, tensor in observer.params(0).items():
            assert tensor.float().isfinite().all(), name


# Running the model


class Recorder:
    wants_gradients = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        assert gradient is not None and layer == len(self.seen)
        self.seen.append((x, gradient, positions))

    def params(self, layer: int) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo-clip", "cohere", "stablelm"])
def test_gradients_match_finite_differences(case: str, tmp_path: Path) -> None:
    """Against the loss with a key or a value changed slightly."""
    architecture, overrides = CASES[case]
    path = make_small_model(architecture, tmp_path, **overrides)
    model = load_model(
        path, dtype=torch.float32, device=torch.device("cpu"), comm=Communicator.single()
    )
    tokens = torch.arange(24) * 5 % 131
    recorders = Recorder(), Recorder()
    _run(model, tokens, recorders, exact_tokens=4)
    positions = torch.arange(24)

    def loss(moved: tuple[int, int], by: float) -> float:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
            k, v = k.clone(), v.clone()
            if layer == moved[0]:
                (k, v)[moved[1]][9, 1, 3] += by
            return causal_attention(q, k, v, args)

        logits = model.forward(tokens, positions, attend, positions[:-1])
        assert logits is not None
        return float(F.cross_entropy(logits.double(), tokens[1:], reduction="sum"))

    for layer, side in itertools.product(range(3), range(2)):
        x, gradient, at = recorders[side].seen[layer]
        assert x.shape == gradient.shape == (20, model.num_kv_heads, model.head_dim)
        assert at.tolist() == list(range(4, 24))
        slope = (loss((layer, side), 0.02) - loss((layer, side), -0.02)) / 0.04
        assert float(gradient[5, 1, 3]) == pytest.approx(slope, rel=0.05, abs=0.01)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, -torch.inf])])
def test_attention_of_a_window(
    softcap: float | None, window: int | None, sinks: Tensor | None
) -> None:
    q, (k, v) = torch.randn(33, 6, 8), torch.randn(2, 33, 2, 8)
    args = AttendArgs(0.3, softcap, window, sinks)
    got = causal_attention(q, k, v, args)
    torch.testing.assert_close(got, _attention(q, k, v, args), atol=1e-5, rtol=0)


# The file


def test_a_file_is_loaded_as_it_was_saved(
    calibrations: dict[str, Calibration], model_path: Path, tmp_path: Path
) -> None:
    for name, made in calibrations.items():
        file = tmp_path / f"{name}.safetensors"
        made.save(file)
        fmt, facts = get_format(name), read_facts(model_path)
        found = Calibration.load(file, fmt, facts, str(model_path), fmt.sink_pages)
        assert Calibration.format_of(file) == name
        assert (found.model_revision, found.samples) == (facts.revision, SAMPLES)
        for ours, theirs in zip(made.layers, found.layers, strict=True):
            for params, others in ((ours.k, theirs.k), (ours.v, theirs.v)):
                assert params.keys() == others.keys()
                assert all(torch.equal(params[key], others[key]) for key in params)
        assert [path.name for path in tmp_path.iterdir()].count(file.name) == 1
    assert len(list(tmp_path.iterdir())) == len(calibrations)


def test_the_same_text_gives_the_same_file(model_path: Path, tmp_path: Path) -> None:
    digests = []
    for file in (tmp_path / "one", tmp_path / "two"):
        calibrate(str(model_path), "nuq2", TEXT, samples=1, context=64, device="cpu").save(file)
        with safe_open(file, framework="pt") as opened:
            digests.append(opened.metadata()["sha256"])
    assert digests[0] == digests[1]


def test_a_file_that_cannot_be_written_leaves_nothing(
    calibrations: dict[str, Calibration], tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ConfigError, match=r"output: cannot write .*taken: Is a directory"):
        calibrations["nuq3"].save(taken)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


Edit = Callable[[dict[str, str], dict[str, Tensor]], None]


def _set(key: str, value: str) -> Edit:
    return lambda metadata, tensors: metadata.update({key: value})


def _drop(name: str) -> Edit:
    def edit(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        metadata.pop(name, None)
        tensors.pop(name, None)

    return edit


def _flip(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.1.v.levels"][2] += 1e-3


def _narrow(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.k.scale"] = tensors["layers.0.k.scale"][:3].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("version", "0"), "has format version 0, but this kvmesh reads 1"),
        (_set("kv_format", "nuq4"), "is for the format nuq4, not for nuq3"),
        (_set("model_revision", "abc"), r"is for the model .*, revision abc, not for"),
        (_set("head_dim", "64"), "is for head_dim 64, not for 8"),
        (_flip, "is corrupt"),
        (_narrow, r"has layers\.0\.k\.scale of shape \[3, 8\], expected \[4, 8\]"),
        (_drop("layers.2.k.zero"), r"for layers\.2\.k, expected bounds, .*zero"),
        (_drop("samples"), "is not a calibration file"),
        (_drop("version"), "is not a calibration file"),
        (_set("context", "some"), "is damaged: its context is 'some'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    edit: Edit,
    message: str,
    calibrations: dict[str, Calibration],
    model_path: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "nuq3.safetensors"
    calibrations["nuq3"].save(file)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    edit(metadata, tensors)
    save_file(tensors, file, metadata)
    config = EngineConfig(model=str(model_path), kv_format="nuq3", calibration=str(file))
    with pytest.raises(ConfigError, match=message) as caught:
        local_executor(config)
    assert caught.value.field == "calibration"
    assert f"kvmesh calibrate --model {model_path} --kv-format nuq3" in str(caught.value)


def test_a_missing_or_invalid_file_is_refused(model_path: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(model_path), kv_format="nuq3", calibration=str(tmp_path / "no"))
    with pytest.raises(ConfigError, match=r"calibration: .*no is missing; make a new one"):
        local_executor(config)
    foreign = tmp_path / "foreign"
    foreign.write_text("{}")
    config = config.replace(calibration=str(foreign))
    with pytest.raises(ConfigError, match=r"calibration: .*foreign cannot be read"):
        local_executor(config)


def test_the_first_pages_must_be_exact_if_calibration_left_them_out(
    calibrations: dict[str, Calibration], model_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "nuq3.safetensors"
    calibrations["nuq3"].save(file)
    config = EngineConfig(
        model=str(model_path), kv_format="nuq3", calibration=str(file), sink_pages=0
    )
    with pytest.raises(ConfigError, match="left out the tokens of the first 1 pages"):
        local_executor(config)


def test_a_format_and_its_file_must_match() -> None:
    with pytest.raises(ConfigError, match=r"calibration: nuq4 needs a .* --kv-format nuq4 --text"):
        EngineConfig(model="m", kv_format="nuq4")
    with pytest.raises(ConfigError, match="int8 needs no calibration; got file"):
        EngineConfig(model="m", kv_format="int8", calibration="file")
    with pytest.raises(ConfigError, match=r"kv_format: .*int9"):
        EngineConfig(model="m", kv_format="int9")


# Serving


@pytest.mark.parametrize("name", ["nuq3", "int8-static"])
def test_ranks_take_their_heads(name: str, calibrations: dict[str, Calibration]) -> None:
    fmt, made = get_format(name), calibrations[name]
    whole = made.for_rank(fmt, 0, 1, torch.device("cpu")).layers
    k, v = torch.randn(2, 5, 4, 16, 8)
    at = torch.arange(5) * 16
    for rank in range(2):
        heads = slice(2 * rank, 2 * rank + 2)
        share = made.for_rank(fmt, rank, 2, torch.device("cpu")).layers
        for layer in range(3):
            want = fmt.encode(k, v, whole[layer], at)[:, heads]
            assert torch.equal(fmt.encode(k[:, heads], v[:, heads], share[layer], at), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuq3", "int8-static", "int8-static-layer"])
def test_output_does_not_depend_on_how_it_is_run(
    name: str,
    calibrations: dict[str, Calibration],
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, in chunks, in a batch, with a cold and a warm prefix cache, after preemption."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the probe keeps its figures
    file = tmp_path / "file"
    calibrations[name].save(file)
    config = EngineConfig(
        model=str(model_path),
        kv_format=name,
        calibration=str(file),
        dtype="float32",
        device="cpu",
        page_size=16,
        kv_memory_bytes=32 << 20,
        max_num_batched_tokens=64,
        prefix_cache=False,
        threads_per_rank=1,
        kv_probe="warn",  # which has to find this format's file too
    )
    start = np.arange(100) * 7 % 301
    prompts = [[*start.tolist(), *(np.arange(60) * (5 + i) % 301).tolist()] for i in range(3)]
    invariance = Invariance(config, prompts)

    chunked = config.replace(max_num_batched_tokens=16)
    invariance.check(invariance.one_by_one(Engine(chunked, local_executor(chunked))))
    engine = Engine(config, local_executor(config))
    invariance.check(generate(engine, [*prompts, prompts[1][:40], [1, 2, 3]], INVARIANT_TOKENS)[:3])
    cached = config.replace(prefix_cache=True)
    engine = Engine(cached, local_executor(cached))
    invariance.check(invariance.one_by_one(engine))
    warm = invariance.one_by_one(engine)
    usage = warm[-1][-1].usage
    assert usage is not None and usage.cached_tokens > 0
    invariance.check(warm)
    invariance.check(invariance.preempted((12, 30)))


def test_outliers_and_levels_follow_fisher_information() -> None:
    """A channel without effect on the loss gets no outlier, whatever it contains."""
    rope = Rope(torch.tensor([0.5]), interleaved=False)
    side = NonUniform(2)
    observer = LevelObserver(side, [rope], 1, 8, samples=1)
    x, gradient = torch.randn(2, 3000, 1, 8)
    gradient[..., 6] = 0.0
    at = torch.zeros(3000, dtype=torch.int64)
    observer.observe(0, x, gradient, at)
    params = observer.params(0)
    assert params["importance"][0, 6] == 0.0
    keys = x[:64].view(1, 1, 64, 8)
    page = side.codec().encode(side, keys, params, torch.tensor([0]))
    channels = page[0, 0, -68:-4]
    assert channels.unique().numel() > 3
    assert not (channels == 6).any()


# The command


def invoke(*arguments: str) -> tuple[int, str]:
    result = run_kvmesh(["calibrate", *arguments], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_the_command_makes_a_file(model_path: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "int8.safetensors"
    text.write_text(TEXT)
    options = ["--model", str(model_path), "--kv-format", "int8-static", "--text", str(text)]
    options += ["--samples", "2", "--context", "64"]
    code, message = invoke(*options, "--output", str(output))
    assert code == 0, message
    assert "int8-static for" in message
    with safe_open(output, framework="pt") as opened:
        assert json.loads(opened.metadata()["samples"]) == 2


@pytest.mark.parametrize(
    ("change", "option", "message"),
    [
        ({"--kv-format": "int9"}, "--kv-format", "not known"),
        ({"--kv-format": "int8"}, "--kv-format", "int8 needs no calibration"),
        ({"--samples": "0"}, "--samples", "must be at least 1"),
        ({"--samples": "1000"}, "--text", "too few for 1000 samples"),
        ({"--context": "8"}, "--context", "must be at least"),
        ({"--context": "300", "--samples": "1"}, "--context", "at most the model's 256"),
        ({"--text": "/nowhere/text"}, "--text", "No such file"),
        ({"--output": "/nowhere/file"}, "--output", "the directory /nowhere does not exist"),
        ({"--model": "/nowhere"}, "--model", "/nowhere"),
    ],
)
def test_the_command_names_the_invalid_option(
    change: dict[str, str], option: str, message: str, model_path: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    options = {
        "--model": str(model_path),
        "--kv-format": "nuq4",
        "--text": str(text),
        "--samples": "2",
        "--context": "64",
        "--output": str(tmp_path / "out"),
        **change,
    }
    code, output = invoke(*(part for pair in options.items() for part in pair))
    assert code == 2
    assert option in output
    assert message in output
    assert not (tmp_path / "out").exists()


def test_params_of_layers_are_checked_against_the_format(
    calibrations: dict[str, Calibration], model_path: Path, tmp_path: Path
) -> None:
    short = dataclasses.replace(calibrations["nuq3"], layers=calibrations["nuq3"].layers[:2])
    file = tmp_path / "short"
    short.save(file)
    with pytest.raises(ConfigError, match="has 2 layers, but the model has 3"):
        Calibration.load(file, get_format("nuq3"), read_facts(model_path), "m", 1)
    wrong = dataclasses.replace(
        calibrations["nuq3"],
        layers=tuple(LayerParams(layer.v, layer.k) for layer in calibrations["nuq3"].layers),
    )
    wrong.save(file)
    with pytest.raises(ConfigError, match=r"has bounds, levels for layers\.0\.k"):
        Calibration.load(file, get_format("nuq3"), read_facts(model_path), "m", 1)
