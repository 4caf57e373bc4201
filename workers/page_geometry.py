"""The shapes of a model's pages, from its facts and a KV format. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import format_of_model, format_of_name
from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.facts import ModelFacts, read_json
from kvmesh.workers.model.sizes import ModelSizes
from kvmesh.workers.model.standard_keys import standard_keys
from kvmesh.workers.model.state_shape import StateShape
from kvmesh.workers.sizes import PageGeometry, kv_heads_of_rank, page_bytes_of


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a token's keys and values are, over all ranks.

    num_layers: of those that have any; state: what other layers keep of a sequence
    values_in_keys: how many channels of a key are its value; 0 if values are stored
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    state: StateShape | None = None
    values_in_keys: int = 0

    @classmethod
    def of(cls, facts: ModelFacts) -> KVShape:
        return cls(
            facts.num_kv_layers,
            facts.num_kv_heads,
            facts.head_dim,
            facts.state,
            facts.values_in_keys,
        )


def format_for(kv_format: str, model: Path) -> KVFormat:
    """The format of that name for the model in directory `model`.

    Raises ConfigError naming `kv_format` if it cannot store that model's pages.
    """
    file = model / "config.json"
    sizes = ModelSizes.of(standard_keys(read_json(file), file), file)
    try:
        return format_of_name(kv_format, sizes.values_in_keys)
    except ValueError as error:
        raise ConfigError("kv_format", str(error)) from None


def geometry_of(
    fmt: KVFormat,
    shape: KVShape,
    *,
    page_size: int,
    itemsize: int,
    tp: int = 1,
    kvp: int = 1,
    sink_pages: int | None = None,
    recent_pages: int | None = None,
) -> PageGeometry:
    """The pages of one of tp · kvp ranks: `tp` share the KV heads, `kvp` those of a sequence.

    sink_pages, recent_pages: the format's defaults if None
    Raises ValueError if the format does not support the head_dim, or values in keys.
    """
    fmt = format_of_model(fmt, shape.values_in_keys)
    hot, sealed = page_bytes_of(
        fmt,
        num_layers=shape.num_layers,
        num_kv_heads=kv_heads_of_rank(shape.num_kv_heads, tp),
        page_size=page_size,
        head_dim=shape.head_dim,
        dtype_bytes=itemsize,
    )
    return PageGeometry(
        page_size=page_size,
        sink_pages=fmt.sink_pages if sink_pages is None else sink_pages,
        recent_pages=fmt.recent_pages if recent_pages is None else recent_pages,
        hot_page_bytes=hot,
        sealed_page_bytes=sealed,
        state_bytes=0 if shape.state is None else shape.state.of_rank(tp * kvp).num_bytes(itemsize),
        ranks=tp * kvp,
        kvp=kvp,
    )
