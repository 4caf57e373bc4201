"""Which quantised checkpoints are read, from the `quantization_config` in config.json. Torch-free.

Their weights are decoded when they are loaded (quantised_weights.py). Activations are never
quantised, also where the checkpoint was made for it: the result is closer to the original model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_READ = "AWQ, GPTQ, FP8 and compressed-tensors"


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a checkpoint is quantised, None if it is not; config: the contents of its config.json."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, Mapping) else None


def why_not_read(quantisation: Mapping[str, Any]) -> str | None:
    """Why a checkpoint that is quantised like this is refused; None if it is read."""
    method = quantisation.get("quant_method")
    check = _CHECKS.get(str(method))
    if check is None:
        return f"its weights are quantised by {method}; only {_READ} are read"
    return check(quantisation)


def _gptq(quantisation: Mapping[str, Any]) -> str | None:
    bits, layout = quantisation.get("bits"), quantisation.get("checkpoint_format") or "gptq"
    if bits not in (2, 3, 4, 8):
        return f"its GPTQ weights have {bits} bits, expected 2, 3, 4 or 8"
    if layout not in ("gptq", "gptq_v2"):
        return f"its GPTQ weights are laid out as {layout}, expected gptq or gptq_v2"
    return None


def _awq(quantisation: Mapping[str, Any]) -> str | None:
    bits, version = quantisation.get("bits", 4), quantisation.get("version") or "gemm"
    if bits != 4:
        return f"its AWQ weights have {bits} bits, expected 4"
    if str(version).lower() != "gemm":
        return f"its AWQ weights are laid out for {version}, expected gemm"
    return None


def _fp8(quantisation: Mapping[str, Any]) -> str | None:
    kind = quantisation.get("fmt") or "e4m3"
    return None if kind == "e4m3" else f"its FP8 weights are {kind}, expected e4m3"


def _compressed_tensors(quantisation: Mapping[str, Any]) -> str | None:
    layout = quantisation.get("format") or "dense"
    sparsity = (quantisation.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        return f"its weights are sparse ({sparsity})"
    if quantisation.get("transform_config"):
        return "its weights are rotated (transform_config)"
    if layout not in _COMPRESSED_LAYOUTS:
        return f"its weights are compressed as {layout}, expected {', '.join(_COMPRESSED_LAYOUTS)}"
    return None


_COMPRESSED_LAYOUTS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
)
_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
