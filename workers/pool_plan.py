"""Converts a memory budget to page counts. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.sizes import PageGeometry

# The default.
DEFAULT_MAX_HOT_SHARE = 0.5
# Where `max_num_seqs` is a GPU's default.
AUTO_MAX_HOT_SHARE = 0.125
# Of what sequences do not hold exactly: for the exact pages of prefixes that no sequence holds. A
# prefix cannot be used without them, so 4 pages may save the computation of thousands.
CACHED_HOT_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """How many pages a rank allocates.

    hot_pages: what sequences may hold between steps, `max_num_seqs` × hot_per_sequence
    headroom_pages: additional hot pages, for the tokens of the step in flight
    cached_pages: additional hot pages, for cached prefixes
    """

    hot_pages: int
    headroom_pages: int
    sealed_pages: int
    max_num_seqs: int
    cached_pages: int = 0

    @property
    def hot_total(self) -> int:
        return self.hot_pages + self.headroom_pages + self.cached_pages

    def num_bytes(self, geometry: PageGeometry) -> int:
        """Of one rank."""
        return (
            self.hot_total * geometry.hot_page_bytes
            + self.sealed_pages * geometry.sealed_page_bytes
            + self.max_num_seqs * geometry.state_bytes
        )

    def hot_share(self, geometry: PageGeometry) -> float:
        """The smallest `max_hot_share` with which `plan_pool` allows so many hot pages."""
        total = self.num_bytes(geometry)
        hot = (self.hot_pages + self.headroom_pages) * geometry.hot_page_bytes
        hot += self.max_num_seqs * geometry.state_bytes
        # Half a page more, as the share is a rounded number.
        return (hot + min(geometry.hot_page_bytes, total - hot) / 2) / total


def plan_pool(
    budget_bytes: int,
    geometry: PageGeometry,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_hot_share: float = DEFAULT_MAX_HOT_SHARE,
) -> PoolPlan:
    """Split `budget_bytes` of one rank into hot and sealed pages, and recurrent states.

    max_hot_share: maximum share of the budget for hot pages and states; a smaller pool runs fewer
        sequences
    Raises ConfigError naming kv_memory_bytes if not even one sequence of two pages fits.
    """
    per_sequence = geometry.hot_per_sequence()
    hot_limit = int(budget_bytes * max_hot_share) // geometry.hot_page_bytes
    wanted_headroom = geometry.on_fullest(-(-max_num_batched_tokens // geometry.page_size))
    hot_bytes = per_sequence * geometry.hot_page_bytes + geometry.state_bytes
    spare_bytes = budget_bytes - hot_bytes - geometry.sealed_page_bytes  # with one sequence
    headroom = min(wanted_headroom, hot_limit // 2, spare_bytes // geometry.hot_page_bytes)
    headroom = max(1, headroom)
    room_bytes = int(budget_bytes * max_hot_share) - headroom * geometry.hot_page_bytes
    seqs = min(max_num_seqs, max(1, room_bytes // hot_bytes))
    hot = seqs * per_sequence
    left = budget_bytes - seqs * hot_bytes - headroom * geometry.hot_page_bytes
    cached = _cached_pages(left, hot, geometry)
    left -= cached * geometry.hot_page_bytes
    sealed = left // geometry.sealed_page_bytes
    if sealed < 1:
        min_bytes = (per_sequence + 1) * geometry.hot_page_bytes + geometry.sealed_page_bytes
        min_bytes += geometry.state_bytes
        raise ConfigError(
            "kv_memory_bytes",
            f"{budget_bytes:,} bytes cannot hold one sequence, which needs {min_bytes:,} bytes "
            f"({per_sequence + 1} hot pages of {geometry.hot_page_bytes:,} and a sealed page "
            f"of {geometry.sealed_page_bytes:,})",
        )
    return PoolPlan(hot, headroom, sealed, seqs, cached)


def pool_for(
    geometry: PageGeometry, *, sequences: int, tokens: int, max_num_batched_tokens: int
) -> PoolPlan:
    """The smallest pool in which so many sequences of so many tokens run at a time.

    `plan_pool` plans the same pool for its `num_bytes` and `hot_share`, and that many sequences.
    """
    need = geometry.peak_need(tokens)
    hot = sequences * geometry.hot_per_sequence()
    wanted_headroom = geometry.on_fullest(-(-max_num_batched_tokens // geometry.page_size))
    headroom = max(1, min(wanted_headroom, hot))
    sealed = max(1, sequences * need.sealed)
    sealed_bytes, cached, more = sealed * geometry.sealed_page_bytes, -1, 0
    while more != cached:  # they are a share of what they are a part of
        cached = more
        more = _cached_pages(sealed_bytes + cached * geometry.hot_page_bytes, hot, geometry)
    return PoolPlan(hot, headroom, sealed, sequences, cached)


def _cached_pages(left_bytes: int, hot_pages: int, geometry: PageGeometry) -> int:
    """How many hot pages cached prefixes get of what sequences do not hold exactly."""
    if not geometry.sink_pages + geometry.recent_pages:
        return 0  # a format without exact windows reads no hot page of a prefix
    return min(hot_pages, int(left_bytes * CACHED_HOT_SHARE) // geometry.hot_page_bytes)
