"""A group as the router knows it: what it holds, in which shapes, how well."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.routing.pace import Pace
from kvmesh.workers.request import EngineInfo
from kvmesh.workers.sizes import PageGeometry, PageNeed

REFERENCE_BITS = 16.0  # of a bf16 value, the exact cache of a GPU
UNKNOWN_PACE = Pace()
# Of an engine that nothing is known of: between what CPUs and large GPUs do, within reach of
# what the router learns by itself.
USUAL_PACE = Pace(prefill_s_per_token=1e-4)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a request's demand depends on; groups of one kind share it."""

    geometry: PageGeometry
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides whether a group could ever take a request, and how long it computes."""

    shape: Shape
    capacity: PageNeed
    max_sequences: int
    quality: float
    pace: Pace


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What does not change while a group's engine lives.

    group: the router's name of it
    engine_epoch: identifies the incarnation of its engine
    capacity: pages of one rank that leases may cover
    geometry: page shapes; its bytes times `geometry.ranks` are over all ranks
    quality: bits per stored key or value of a sealed page, metadata included
    pace: service times to begin with; the router corrects them by what it sees
    """

    group: str
    engine_epoch: str
    capacity: PageNeed
    geometry: PageGeometry
    max_model_len: int
    max_sequences: int
    kv_format: str
    quality: float
    pace: Pace = UNKNOWN_PACE

    @property
    def shape(self) -> Shape:
        return Shape(self.geometry, self.max_model_len)

    @property
    def kind(self) -> Kind:
        return Kind(self.shape, self.capacity, self.max_sequences, self.quality, self.pace)

    @property
    def capacity_bytes(self) -> int:
        return self.geometry.bytes_of(self.capacity)

    @classmethod
    def from_engine_info(
        cls,
        group: str,
        info: EngineInfo,
        *,
        reserved_hot_pages: int = 0,
        pace: Pace | None = None,
    ) -> GroupSpec:
        """The spec of an engine.

        reserved_hot_pages: of the pool, for the step in flight; not for leases
        pace: to begin with
        Raises ValueError if nothing remains to lease.
        """
        hot_pages = info.hot_pages - reserved_hot_pages
        if hot_pages < 1:
            raise ValueError(
                f"reserved_hot_pages must be less than the pool's {info.hot_pages}, "
                f"got {reserved_hot_pages}"
            )
        return cls(
            group=group,
            engine_epoch=info.epoch,
            capacity=PageNeed(hot=hot_pages, sealed=info.sealed_pages),
            geometry=PageGeometry(
                page_size=info.page_size,
                sink_pages=info.sink_pages,
                recent_pages=info.recent_pages,
                hot_page_bytes=info.hot_page_bytes,
                sealed_page_bytes=info.sealed_page_bytes,
            ),
            max_model_len=info.max_model_len,
            max_sequences=info.max_num_seqs,
            kv_format=info.kv_format,
            quality=REFERENCE_BITS * info.sealed_page_bytes / info.hot_page_bytes,
            pace=pace or USUAL_PACE,
        )
