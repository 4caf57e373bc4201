"""The KV quality floor: which groups' formats a request does not accept."""

from __future__ import annotations

import math

from kvmesh.cluster.ingress.estimate import geometry_of
from kvmesh.cluster.peers import ClusterStatus
from kvmesh.cluster.routing.errors import NeverFitsError
from kvmesh.kernels.formats.base import KVFormat
from kvmesh.kernels.formats.registry import get_format
from kvmesh.workers.errors import InvalidRequestError


def groups_below(min_kv_format: str, status: ClusterStatus) -> frozenset[str]:
    """Groups whose format has fewer bits than the least that will do.

    Raises InvalidRequestError for an unknown name, NeverFitsError if no group is left.
    """
    if not min_kv_format:
        return frozenset()
    try:
        floor = _bits(get_format(min_kv_format))
    except ValueError as error:
        raise InvalidRequestError("min_kv_format", str(error)) from None
    below = frozenset(
        group
        for group, report in status.reports.items()
        if _bits(get_format(report.info.kv_format)) < floor
    )
    if len(below) == len(status.reports):
        raise NeverFitsError(
            dict.fromkeys(below, 0),
            {group: _capacity_bytes(status, group) for group in below},
            {
                group: f"its format {status.reports[group].info.kv_format} is less faithful "
                f"than {min_kv_format}"
                for group in sorted(below)
            },
        )
    return below


def _bits(fmt: KVFormat) -> float:
    """Bits of a key and a value; a format without codes keeps all there are."""
    return fmt.k_bits + fmt.v_bits or math.inf


def _capacity_bytes(status: ClusterStatus, group: str) -> int:
    info = status.reports[group].info
    geometry = geometry_of(info)
    return info.hot_pages * geometry.hot_page_bytes + info.sealed_pages * geometry.sealed_page_bytes
