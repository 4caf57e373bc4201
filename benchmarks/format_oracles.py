"""Our group formats compared with the transformers caches that they follow, on the same tensors.

    pip install --no-deps optimum-quanto hqq termcolor ninja
    python -m benchmarks.format_oracles [--text FILE] [--output FILE]

Quanto and HQQ are not dependencies; hqq without termcolor breaks transformers' imports.
Keys and values are those that the embedded model computes for the text (check its licence
before using it) or, without a text, Gaussian numbers with outlier channels. Errors are
|x - x^|² / |x|² of one quantisation; transformers requantises its whole cache every 128
tokens, while a sealed page is never requantised.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from kvmesh.kernels.formats.registry import get_format

Pair = tuple[torch.Tensor, torch.Tensor]

PAGE_SIZE = 64
TOKENS = 1024


def model_cache(text: Path) -> list[Pair]:
    """Keys and values of every layer, each [1, num_kv_heads, TOKENS, head_dim] fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from kvmesh.workers.model.embedded import EMBEDDED_NAME
    from kvmesh.workers.model.source import resolve_model

    path = resolve_model(EMBEDDED_NAME).path
    ids = AutoTokenizer.from_pretrained(path)(text.read_text())["input_ids"][:TOKENS]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def synthetic_cache() -> list[Pair]:
    numbers = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 4, TOKENS, 128, generator=numbers)
    k += 4.0 * torch.randn(1, 4, 1, 128, generator=numbers)
    return [(k, v)]


def ours(name: str, k: torch.Tensor, v: torch.Tensor) -> Pair:
    fmt = get_format(name)
    pages = [x[0].unflatten(1, (-1, PAGE_SIZE)).transpose(0, 1) for x in (k, v)]
    decoded = fmt.decode(fmt.encode(*pages), PAGE_SIZE, k.shape[-1], torch.float32)
    k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in decoded)
    return k, v


def quanto(bits: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=bits, axis_key=0, axis_value=0, q_group_size=64)
    return tuple(layer._dequantize(layer._quantize(x.contiguous(), 0)) for x in (k, v))


def hqq(bits: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
    """Axis 1: groups of 64 neighbouring channels, as in Quanto."""
    from hqq.core.quantize import Quantizer

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        codes, meta = Quantizer.quantize(
            x, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(codes, meta).view(x.shape)  # type: ignore[no-any-return]

    return there_and_back(k), there_and_back(v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    layers = model_cache(options.text) if options.text else synthetic_cache()
    methods: dict[str, Callable[[torch.Tensor, torch.Tensor], Pair]] = {
        **{f"g64-int{bits}": partial(ours, f"g64-int{bits}") for bits in (4, 2)},
        **{f"transformers Quanto {bits}": partial(quanto, bits) for bits in (4, 2)},
        **{f"g64-hqq{bits}": partial(ours, f"g64-hqq{bits}") for bits in (4, 2)},
        **{f"HQQ {bits}": partial(hqq, bits) for bits in (4, 2)},
        **{name: partial(ours, name) for name in ("k4v4", "k2v2", "kivi4", "kivi2")},
    }
    report: dict[str, dict[str, float]] = {}
    print(f"{'method':22} {'keys':>9} {'values':>9}   relative squared error, mean over layers")
    for name, method in methods.items():
        errors = []
        for k, v in layers:
            got = method(k, v)
            pairs = zip(got, (k, v), strict=True)
            errors.append([float((y - x).square().sum() / x.square().sum()) for y, x in pairs])
        mean = torch.tensor(errors).mean(0).tolist()
        report[name] = {"keys": mean[0], "values": mean[1]}
        print(f"{name:22} {mean[0]:9.5f} {mean[1]:9.5f}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
