"""KV formats that a request accepts, as it says on the wire."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kvmesh.cluster.routing.accepted_formats import AcceptedFormats
from kvmesh.kernels.formats.registry import get_format
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError


def accepted_formats(request: pb.GenerateRequest | pb.EstimateBudgetRequest) -> AcceptedFormats:
    """Raises InvalidFieldError for a name or a bound that makes no sense."""
    names = frozenset(_formats(request.allowed_kv_formats))
    bound = None
    if request.HasField("max_kv_divergence_nats"):
        bound = request.max_kv_divergence_nats
        if not 0 <= bound < math.inf:
            raise InvalidFieldError(
                "max_kv_divergence_nats", f"must be finite and at least 0, got {bound:g}"
            )
    return AcceptedFormats(names, bound)


def _formats(names: Sequence[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        try:
            yield get_format(name).name
        except ValueError as error:
            raise InvalidFieldError(f"allowed_kv_formats[{index}]", str(error)) from None
