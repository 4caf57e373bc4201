"""Runs a model over a text to measure what a KV format needs to know about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.kernels.formats.base import KVFormat, LayerParams, Side
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.kernels.formats.comparison.static8.side import Static8
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.calibration.attention import causal_attention
from kvmesh.workers.calibration.file import Calibration
from kvmesh.workers.calibration.nuq import LevelObserver
from kvmesh.workers.calibration.observer import Observer
from kvmesh.workers.calibration.ranges import RangeObserver
from kvmesh.workers.calibration.windows import windows_of
from kvmesh.workers.config import PAGE_SIZES
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.hook import AttendArgs
from kvmesh.workers.model.load import ServedModel, load_model
from kvmesh.workers.model.source import resolve_model
from kvmesh.workers.model.tokenizer import Tokenizer
from kvmesh.workers.page_geometry import format_for
from kvmesh.workers.parallel.comm import Communicator

Progress = Callable[[str, float | None], None]


def calibrate(
    model: str,
    kv_format: str,
    text: str,
    *,
    samples: int,
    context: int,
    device: str = "auto",
    progress: Progress | None = None,
    root: Path | None = None,
) -> Calibration:
    """The parameters that `kv_format` needs for `model`, measured on `text`.

    text: should not be the text on which the result is evaluated
    samples, context: number of windows of the text, and tokens per window
    progress: called with the current step and the share of it that is done, if known
    root: where converted models are kept
    Raises ConfigError naming the invalid argument.
    """
    report = progress or _silent
    fmt = _calibrated_format(kv_format)
    exact_tokens = fmt.sink_pages * min(PAGE_SIZES)
    if samples < 1:
        raise ConfigError("samples", f"must be at least 1, got {samples}")
    if context < 2 * exact_tokens + 2:
        raise ConfigError("context", f"must be at least {2 * exact_tokens + 2}, got {context}")
    files = resolve_model(model, progress=report, root=root)
    format_for(kv_format, files.path)
    report("reading the text", None)
    windows = windows_of(text, Tokenizer.load(files.path), samples, context)
    place = _device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    report("loading the model", None)
    served = load_model(files.path, dtype=dtype, device=place, comm=Communicator.single())
    if context > served.facts.max_model_len:
        raise ConfigError(
            "context", f"must be at most the model's {served.facts.max_model_len}, got {context}"
        )
    observers = _observer(fmt.k, served, samples), _observer(fmt.v, served, samples)
    for index, window in enumerate(windows):
        report("running the model", index / samples)
        tokens = torch.tensor(window, device=place)
        _run(served, tokens, observers, exact_tokens)
    num_layers = served.facts.num_kv_layers
    layers = []
    for layer in range(num_layers):
        report("fitting", layer / num_layers)
        layers.append(LayerParams(*(observer.params(layer) for observer in observers)))
    return Calibration(
        model=files.name,
        model_revision=files.revision,
        kv_format=fmt.name,
        head_dim=served.head_dim,
        sink_pages=fmt.sink_pages,
        samples=samples,
        context=context,
        layers=tuple(layers),
    )


class _NoObserver:
    """For a side that needs no calibration."""

    wants_gradients = False

    def observe(self, layer: int, x: Tensor, gradient: Tensor | None, positions: Tensor) -> None:
        """Does nothing."""

    def params(self, layer: int) -> dict[str, Tensor]:
        return {}


def _observer(side: Side, model: ServedModel, samples: int) -> Observer:
    if isinstance(side, Static8):
        return RangeObserver(side)
    if isinstance(side, NonUniform):
        return LevelObserver(side, model.ropes, model.num_kv_heads, model.head_dim, samples)
    assert not side.calibrated, f"there is no observer for {type(side).__name__}"
    return _NoObserver()


def _run(
    model: ServedModel, tokens: Tensor, observers: tuple[Observer, Observer], exact_tokens: int
) -> None:
    """Run the model over one window; observers do not see its first `exact_tokens` tokens."""
    wants_gradients = any(observer.wants_gradients for observer in observers)
    positions = torch.arange(len(tokens), device=tokens.device)
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, args: AttendArgs) -> Tensor:
        assert layer == len(seen), "layers attend in order"
        if wants_gradients:
            k, v = _with_gradient(k), _with_gradient(v)
        seen.append((k, v))
        return causal_attention(q, k, v, args)

    if wants_gradients:
        rows = positions[:-1]
        with torch.enable_grad():
            logits = model.forward_with_grad(tokens, positions, attend, rows)
            assert logits is not None
            F.cross_entropy(logits, tokens[1:], reduction="sum").backward()
    else:
        model.forward(tokens, positions, attend, positions[:0])
    for layer, sides in enumerate(seen):
        for observer, x in zip(observers, sides, strict=True):
            gradient = x.grad[exact_tokens:].float() if x.grad is not None else None
            x = x.detach()[exact_tokens:].float()
            observer.observe(layer, x, gradient, positions[exact_tokens:])


def _with_gradient(x: Tensor) -> Tensor:
    """x, which will keep its gradient."""
    if not x.requires_grad:  # in the first layer, because weights do not require gradients
        return x.detach().requires_grad_()
    x.retain_grad()
    return x


def _calibrated_format(name: str) -> KVFormat:
    try:
        fmt = get_format(name)
    except ValueError as error:
        raise ConfigError("kv_format", str(error)) from None
    if not fmt.needs_calibration:
        raise ConfigError("kv_format", f"{fmt.name} needs no calibration")
    return fmt


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _silent(step: str, share: float | None) -> None:
    """Do not report progress."""
