"""Parameters for formats that need calibration, suitable for approximately normal numbers."""

from __future__ import annotations

import torch

from kvmesh.kernels.formats.base import NO_PARAMS, KVFormat, LayerParams, ModelParams, Side
from kvmesh.kernels.formats.comparison.nuq.side import NonUniform
from kvmesh.kernels.formats.comparison.static8.side import Static8


def model_params_for(
    fmt: KVFormat, num_layers: int, num_kv_heads: int, head_dim: int
) -> ModelParams | None:
    """Each layer's ranges are slightly wider than the previous one's; None if none are needed."""
    if not fmt.needs_calibration:
        return None
    layers = []
    for layer in range(num_layers):
        found = params_for(fmt, num_kv_heads, head_dim)
        wider = (
            {name: x * (1 + layer / 10) if name == "scale" else x for name, x in side.items()}
            for side in (found.k, found.v)
        )
        layers.append(LayerParams(*wider))
    return ModelParams(tuple(layers))


def params_for(fmt: KVFormat, num_kv_heads: int, head_dim: int, **rope: object) -> LayerParams:
    """rope: see `nuq_keys`"""
    if not fmt.needs_calibration:
        return NO_PARAMS
    return LayerParams(
        _side_params(fmt.k, num_kv_heads, head_dim, rope),
        _side_params(fmt.v, num_kv_heads, head_dim, rope),
    )


def _side_params(
    side: Side, num_kv_heads: int, head_dim: int, rope: dict[str, object]
) -> dict[str, torch.Tensor]:
    if isinstance(side, Static8):
        gen = torch.Generator().manual_seed(3)
        shape = (num_kv_heads, head_dim)
        zero = torch.randn(shape, generator=gen) * 0.3
        if side.per == "layer":
            zero = zero[:1, :1].expand(shape).contiguous()
        return {"scale": torch.full(shape, 12 / 255), "zero": zero}
    assert isinstance(side, NonUniform)
    if side.values:
        return levels_for(side.width)
    return {**levels_for(side.width), **nuq_keys(num_kv_heads, head_dim, **rope)}  # type: ignore[arg-type]


def levels_for(width: int, reach: float = 0.9) -> dict[str, torch.Tensor]:
    """Levels for normal numbers with a deviation of about a third, with bounds half-way between."""
    at = (torch.arange(2**width) + 0.5) / 2**width
    # Denser in the middle, like the optimal levels of a normal distribution.
    levels = torch.erfinv(2 * at - 1)
    levels = levels / levels.amax() * reach
    return {"levels": levels, "bounds": (levels[1:] + levels[:-1]) / 2}


def nuq_keys(
    num_kv_heads: int,
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    reach: float = 3.0,
) -> dict[str, torch.Tensor]:
    """Ranges of ±reach deviations around one zero per channel, and RoPE of base 10000."""
    planes = (head_dim if rotary_dim is None else rotary_dim) // 2
    gen = torch.Generator().manual_seed(4)
    return {
        "scale": torch.full((num_kv_heads, head_dim), reach),
        "zero": torch.randn(num_kv_heads, head_dim, generator=gen) * 0.3,
        "importance": torch.rand(num_kv_heads, head_dim, generator=gen) + 0.5,
        "inv_freq": 10000.0 ** -(torch.arange(planes) / planes),
        "interleaved": torch.tensor([interleaved], dtype=torch.uint8),
    }
